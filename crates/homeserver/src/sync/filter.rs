//! Filters: which events a client wants to see.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#filtering>

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::MatrixError;

/// Events in a timeline when the client names no limit.
pub const LIMIT_DEFAULT: u32 = 10;
/// More events than this are never put in one timeline or page.
pub const LIMIT_MAX: u32 = 1000;
/// Entries in any list of a filter.
const LIST_MAX: usize = 1000;

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Filter {
    pub event_fields: Option<Vec<String>>,
    pub event_format: EventFormat,
    pub presence: EventFilter,
    pub account_data: EventFilter,
    pub room: RoomFilter,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum EventFormat {
    #[default]
    Client,
    Federation,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RoomFilter {
    pub rooms: Option<Vec<String>>,
    pub not_rooms: Vec<String>,
    pub include_leave: bool,
    pub ephemeral: EventFilter,
    pub state: EventFilter,
    pub timeline: EventFilter,
    pub account_data: EventFilter,
}

/// `EventFilter`, `RoomEventFilter` and `StateFilter` in one.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct EventFilter {
    pub limit: Option<u32>,
    pub types: Option<Vec<String>>,
    pub not_types: Vec<String>,
    pub senders: Option<Vec<String>>,
    pub not_senders: Vec<String>,
    pub rooms: Option<Vec<String>>,
    pub not_rooms: Vec<String>,
    pub contains_url: Option<bool>,
    pub lazy_load_members: bool,
    pub include_redundant_members: bool,
    pub unread_thread_notifications: bool,
    #[serde(alias = "org.matrix.msc3874.rel_types")]
    pub rel_types: Option<Vec<String>>,
    #[serde(alias = "org.matrix.msc3874.not_rel_types")]
    pub not_rel_types: Vec<String>,
}

impl Filter {
    /// Reads a filter as stored or as given inline; a malformed one is the client's error.
    pub fn parse(text: &str) -> Result<Self, MatrixError> {
        let filter: Self = serde_json::from_str(text)
            .map_err(|e| MatrixError::bad_json(format!("not a filter: {e}")))?;
        filter.check()?;
        Ok(filter)
    }

    /// Lists are bounded, and identifiers in them look like what they stand for.
    pub fn check(&self) -> Result<(), MatrixError> {
        let room = &self.room;
        check_ids(room.rooms.iter().flatten().chain(&room.not_rooms), '!')?;
        for part in [
            &self.presence,
            &self.account_data,
            &room.ephemeral,
            &room.state,
            &room.timeline,
            &room.account_data,
        ] {
            part.check()?;
        }
        Ok(())
    }

    /// Whether anything of this room is wanted.
    pub fn wants_room(&self, room: &str) -> bool {
        listed(self.room.rooms.as_deref(), &self.room.not_rooms, room)
    }

    /// P-25: only the state filter decides whether the client loads members lazily.
    pub fn lazy(&self) -> bool {
        self.room.state.lazy_load_members
    }
}

impl EventFilter {
    fn check(&self) -> Result<(), MatrixError> {
        check_ids(self.rooms.iter().flatten().chain(&self.not_rooms), '!')?;
        check_ids(self.senders.iter().flatten().chain(&self.not_senders), '@')?;
        let lists = [self.types.as_deref(), Some(&self.not_types)];
        if lists
            .into_iter()
            .flatten()
            .any(|list| list.len() > LIST_MAX)
        {
            return Err(MatrixError::invalid_param(
                "a list in the filter is too long",
            ));
        }
        Ok(())
    }

    /// A room event filter from the `filter` query parameter of `/messages` and `/context`.
    pub fn parse(text: &str) -> Result<Self, MatrixError> {
        let filter: Self = serde_json::from_str(text)
            .map_err(|e| MatrixError::bad_json(format!("not a filter: {e}")))?;
        filter.check()?;
        Ok(filter)
    }

    pub fn limit(&self) -> u32 {
        self.limit.unwrap_or(LIMIT_DEFAULT).min(LIMIT_MAX)
    }

    pub fn wants_room(&self, room: &str) -> bool {
        listed(self.rooms.as_deref(), &self.not_rooms, room)
    }

    pub fn wants_type(&self, kind: &str) -> bool {
        let matches = |pattern: &String| glob(pattern, kind);
        self.types
            .as_ref()
            .is_none_or(|types| types.iter().any(matches))
            && !self.not_types.iter().any(matches)
    }

    pub fn wants_sender(&self, sender: &str) -> bool {
        listed(self.senders.as_deref(), &self.not_senders, sender)
    }

    /// Whether an event passes, the room aside.
    pub fn wants(&self, kind: &str, sender: Option<&str>, content: &Value) -> bool {
        self.wants_type(kind)
            && sender.is_none_or(|sender| self.wants_sender(sender))
            && self
                .contains_url
                .is_none_or(|wanted| content.get("url").is_some_and(Value::is_string) == wanted)
            && self.wants_relation(content)
    }

    fn wants_relation(&self, content: &Value) -> bool {
        if self.rel_types.is_none() && self.not_rel_types.is_empty() {
            return true;
        }
        let rel_type = content
            .get("m.relates_to")
            .and_then(|r| r.get("rel_type"))
            .and_then(Value::as_str);
        match rel_type {
            Some(rel_type) => listed(self.rel_types.as_deref(), &self.not_rel_types, rel_type),
            None => self.rel_types.is_none(),
        }
    }

    /// Whether every event passes, so that none need be read to know.
    pub fn passes_all(&self) -> bool {
        self.types.is_none()
            && self.not_types.is_empty()
            && self.senders.is_none()
            && self.not_senders.is_empty()
            && self.contains_url.is_none()
            && self.rel_types.is_none()
            && self.not_rel_types.is_empty()
    }
}

fn listed(only: Option<&[String]>, not: &[String], name: &str) -> bool {
    only.is_none_or(|only| only.iter().any(|n| n == name)) && !not.iter().any(|n| n == name)
}

fn check_ids<'a>(ids: impl Iterator<Item = &'a String>, sigil: char) -> Result<(), MatrixError> {
    for (n, id) in ids.enumerate() {
        if n >= LIST_MAX {
            return Err(MatrixError::invalid_param(
                "a list in the filter is too long",
            ));
        }
        if !id.starts_with(sigil) {
            return Err(MatrixError::invalid_param(format!(
                "{id} is no such identifier"
            )));
        }
    }
    Ok(())
}

/// `*` stands for any run of characters.
pub fn glob(pattern: &str, text: &str) -> bool {
    let mut pieces = pattern.split('*');
    let first = pieces.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else {
        return false;
    };
    let mut last = None;
    for piece in pieces {
        if let Some(middle) = last.replace(piece) {
            let middle: &str = middle;
            match rest.find(middle) {
                Some(at) => rest = &rest[at + middle.len()..],
                None => return false,
            }
        }
    }
    match last {
        None => rest.is_empty(),
        Some(end) => rest.ends_with(end),
    }
}

/// Leaves of an event only the fields that `event_fields` names, by dotted paths with `\.` for a dot.
pub fn only_fields(event: Map<String, Value>, fields: &[String]) -> Map<String, Value> {
    let paths: BTreeSet<Vec<String>> = fields.iter().map(|field| path(field)).collect();
    let mut kept = Map::new();
    for path in paths {
        copy(&event, &path, &mut kept);
    }
    kept
}

fn copy(from: &Map<String, Value>, path: &[String], to: &mut Map<String, Value>) {
    let Some((head, tail)) = path.split_first() else {
        return;
    };
    let Some(value) = from.get(head) else {
        return;
    };
    if tail.is_empty() {
        to.insert(head.clone(), value.clone());
        return;
    }
    let Value::Object(inner) = value else {
        return;
    };
    let slot = to
        .entry(head.clone())
        .or_insert_with(|| Value::Object(Map::new()));
    if let Value::Object(slot) = slot {
        copy(inner, tail, slot);
    }
}

fn path(field: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = field.chars();
    while let Some(c) = chars.next() {
        match c {
            '.' => parts.push(String::new()),
            c => {
                let c = if c == '\\' {
                    chars.next().unwrap_or('\\')
                } else {
                    c
                };
                if let Some(part) = parts.last_mut() {
                    part.push(c);
                }
            }
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_star_stands_for_any_run() {
        for (pattern, text, hit) in [
            ("m.room.*", "m.room.name", true),
            ("m.room.*", "m.roomname", false),
            ("*", "anything", true),
            ("m.*.name", "m.room.name", true),
            ("m.*.name", "m.room.names", false),
            ("a*b*c", "axxbyyc", true),
            ("a*b*c", "axxc", false),
            ("plain", "plain", true),
            ("plain", "plainer", false),
        ] {
            assert_eq!(glob(pattern, text), hit, "{pattern} {text}");
        }
    }

    #[test]
    fn a_filter_of_wrong_types_is_refused() {
        for bad in [
            json!({"presence": "not_object"}),
            json!({"presence": {"senders": 17}}),
            json!({"room": {"timeline": {"rooms": ["not_a_room_id"]}}}),
            json!({"room": {"rooms": "x"}}),
            json!({"presence": {"senders": ["@_banned", 1]}}),
        ] {
            assert!(Filter::parse(&bad.to_string()).is_err(), "{bad}");
        }
        assert!(Filter::parse("{}").is_ok());
    }

    #[test]
    fn types_and_senders_are_kept_apart() {
        let filter = EventFilter::parse(
            r#"{"types": ["m.room.*"], "not_types": ["m.room.name"], "not_senders": ["@a:x"]}"#,
        )
        .unwrap();
        let content = json!({});
        assert!(filter.wants("m.room.topic", Some("@b:x"), &content));
        assert!(!filter.wants("m.room.topic", Some("@a:x"), &content));
        assert!(!filter.wants("m.room.name", Some("@b:x"), &content));
        assert!(!filter.wants("m.other", Some("@b:x"), &content));
    }

    #[test]
    fn event_fields_keep_what_they_name() {
        let Value::Object(event) = json!({"type": "t", "content": {"body": "b", "a.b": 1, "x": 2}})
        else {
            unreachable!()
        };
        let fields = ["content.body".to_owned(), r"content.a\.b".to_owned()];
        assert_eq!(
            Value::Object(only_fields(event, &fields)),
            json!({"content": {"body": "b", "a.b": 1}})
        );
    }
}
