//! The form in which clients see events.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#room-event-format>

use std::fmt::Write as _;
use std::sync::Arc;

use protocol::canonical_json::pick;
use protocol::id::{EventId, RoomId};
use protocol::pdu::Pdu;
use protocol::redaction;
use serde_json::{Map, Value};

/// What stands in `unsigned` beside an event, as far as it is known.
#[derive(Clone, Debug, Default)]
pub struct Unsigned {
    /// Milliseconds since the event was made.
    pub age: Option<i64>,
    /// For the device that sent it.
    pub transaction_id: Option<String>,
    /// The state event that this one took the place of.
    pub replaced: Option<Arc<Pdu>>,
    /// The valid redaction of this event.
    pub redacted_because: Option<Arc<Pdu>>,
    /// The reader's own membership when the event was sent.
    pub membership: Option<String>,
    /// `m.relations`
    pub relations: Option<Value>,
}

/// The whole client form, with `room_id`.
pub fn client_event(pdu: &Pdu, unsigned: &Unsigned) -> Map<String, Value> {
    let mut event = without_room_id(pdu, unsigned);
    event.insert("room_id".to_owned(), Value::from(pdu.room_id.as_str()));
    event
}

/// The whole client form of a state event as JSON, without the detour of a tree.
pub fn write_state_event(pdu: &Pdu, unsigned: &Unsigned, out: &mut String) {
    if unsigned.redacted_because.is_some() || pdu.redacts.is_some() {
        let event = Value::Object(client_event(pdu, unsigned));
        out.push_str(&event.to_string());
        return;
    }
    out.push_str("{\"content\":");
    out.push_str(pdu.content());
    let state_key = pdu.state_key.as_deref().map(|key| ("state_key", key));
    let texts = [
        ("event_id", pdu.event_id.as_str()),
        ("room_id", pdu.room_id.as_str()),
        ("sender", pdu.sender.as_str()),
        ("type", &*pdu.kind),
    ];
    for (name, text) in texts.into_iter().chain(state_key) {
        let text = Value::from(text);
        _ = write!(out, ",\"{name}\":{text}");
    }
    _ = write!(out, ",\"origin_server_ts\":{}", pdu.origin_server_ts);
    let unsigned = unsigned_of(unsigned);
    if !unsigned.is_empty() {
        let unsigned = Value::Object(unsigned);
        _ = write!(out, ",\"unsigned\":{unsigned}");
    }
    out.push('}');
}

/// A member event as it is stored, read no further than clients want it.
pub struct MemberText<'a> {
    content: &'a str,
    pub membership: Option<&'a str>,
    origin_server_ts: i64,
    /// These are JSON, quotes and all.
    sender: &'a str,
    state_key: &'a str,
}

impl<'a> MemberText<'a> {
    /// `None` for what is no such event.
    pub fn read(json: &'a str) -> Option<Self> {
        let keys = ["content", "origin_server_ts", "sender", "state_key", "type"];
        let [content, origin_server_ts, sender, state_key, kind] = pick(json, keys);
        let content = content.filter(|_| kind == Some("\"m.room.member\""))?;
        let [membership] = pick(content, ["membership"]);
        Some(Self {
            content,
            // None there is has anything in it that would need an escape.
            membership: membership.and_then(|text| text.strip_prefix('"')?.strip_suffix('"')),
            origin_server_ts: origin_server_ts?.parse().ok()?,
            sender: sender?,
            state_key: state_key?,
        })
    }

    /// As [`write_state_event`] writes it.
    pub fn write(&self, id: &EventId, room: &RoomId, now_ms: i64, out: &mut String) {
        let age = (now_ms - self.origin_server_ts).max(0);
        let (id, room) = (Value::from(id.as_str()), Value::from(room.as_str()));
        _ = write!(
            out,
            "{{\"content\":{},\"event_id\":{id},\"room_id\":{room},\"sender\":{},\
            \"type\":\"m.room.member\",\"state_key\":{},\"origin_server_ts\":{},\
            \"unsigned\":{{\"age\":{age}}}}}",
            self.content, self.sender, self.state_key, self.origin_server_ts
        );
    }
}

/// The client form inside `/sync`, where the room is known from the place.
pub fn without_room_id(pdu: &Pdu, unsigned: &Unsigned) -> Map<String, Value> {
    let mut event = Map::new();
    let redacted = unsigned.redacted_because.as_deref();
    let content = match redacted {
        Some(_) => redacted_content(pdu),
        None => pdu.content_value(),
    };
    if let Some(state_key) = &pdu.state_key {
        event.insert("state_key".to_owned(), Value::from(state_key.as_ref()));
    }
    // Clients of either age find `redacts` where they look for it.
    let redacts = pdu.redacts.as_deref().filter(|_| redacted.is_none());
    let mut content = content;
    if let (Some(target), Some(content)) = (redacts, content.as_object_mut()) {
        let target = Value::from(target.as_str());
        event.insert("redacts".to_owned(), target.clone());
        content.entry("redacts").or_insert(target);
    }
    event.insert("content".to_owned(), content);
    event.insert("event_id".to_owned(), Value::from(pdu.event_id.as_str()));
    event.insert(
        "origin_server_ts".to_owned(),
        Value::from(pdu.origin_server_ts),
    );
    event.insert("sender".to_owned(), Value::from(pdu.sender.as_str()));
    event.insert("type".to_owned(), Value::from(pdu.kind.as_ref()));
    let unsigned = unsigned_of(unsigned);
    if !unsigned.is_empty() {
        event.insert("unsigned".to_owned(), Value::Object(unsigned));
    }
    event
}

fn unsigned_of(from: &Unsigned) -> Map<String, Value> {
    let mut unsigned = Map::new();
    let mut put = |key: &str, value: Value| unsigned.insert(key.to_owned(), value);
    if let Some(age) = from.age {
        put("age", Value::from(age));
    }
    if let Some(txn_id) = &from.transaction_id {
        put("transaction_id", Value::from(txn_id.as_str()));
    }
    if let Some(replaced) = &from.replaced {
        put("prev_content", replaced.content_value());
        put("prev_sender", Value::from(replaced.sender.as_str()));
        put("replaces_state", Value::from(replaced.event_id.as_str()));
    }
    if let Some(because) = &from.redacted_because {
        let inner = Unsigned::default();
        put(
            "redacted_because",
            Value::Object(client_event(because, &inner)),
        );
        put("redacted_by", Value::from(because.event_id.as_str()));
    }
    if let Some(membership) = &from.membership {
        put("membership", Value::from(membership.as_str()));
    }
    if let Some(relations) = &from.relations {
        put("m.relations", relations.clone());
    }
    unsigned
}

fn redacted_content(pdu: &Pdu) -> Value {
    let whole: Map<String, Value> = serde_json::from_str(&pdu.json).unwrap_or_default();
    redaction::redact(&whole, pdu.version)
        .remove("content")
        .unwrap_or_else(|| Value::Object(Map::new()))
}

/// The stripped form of an entry of `invite_room_state` or `knock_room_state`, given as it stood (R-61).
/// `None` for what is no event.
pub fn stripped(entry: &str) -> Option<Value> {
    let event: Map<String, Value> = serde_json::from_str(entry).ok()?;
    let text = |key: &str| event.get(key).filter(|value| value.is_string());
    let mut out = Map::new();
    for key in ["type", "state_key", "sender"] {
        out.insert(key.to_owned(), text(key)?.clone());
    }
    let content = event.get("content").filter(|value| value.is_object())?;
    out.insert("content".to_owned(), content.clone());
    // MSC4311: clients of version 12 rooms read the room's age from its create event (U-44).
    if text("type").is_some_and(|kind| kind == "m.room.create")
        && let Some(time) = event.get("origin_server_ts").filter(|time| time.is_i64())
    {
        out.insert("origin_server_ts".to_owned(), time.clone());
        if let Some(room) = text("room_id") {
            out.insert("room_id".to_owned(), room.clone());
        }
        if let Some(id) = text("event_id") {
            out.insert("event_id".to_owned(), id.clone());
        }
    }
    Some(Value::Object(out))
}

/// The stripped form of an event of our own store.
pub fn stripped_pdu(pdu: &Pdu) -> Value {
    stripped(&pdu.json).unwrap_or_else(|| Value::Object(Map::new()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_the_create_event_keeps_its_time_when_stripped() {
        let entry = |kind: &str| {
            json!({"type": kind, "state_key": "", "sender": "@a:b", "content": {"x": 1},
                "origin_server_ts": 5, "auth_events": []})
            .to_string()
        };
        assert_eq!(
            stripped(&entry("m.room.name")),
            Some(
                json!({"type": "m.room.name", "state_key": "", "sender": "@a:b", "content": {"x": 1}})
            )
        );
        let create = stripped(&entry("m.room.create")).unwrap();
        assert_eq!(create["origin_server_ts"], 5);
    }

    #[test]
    fn what_is_written_at_once_is_what_the_tree_says() {
        let event = json!({"type": "m.room.member", "state_key": "@a\"\u{1}:b", "sender": "@a:b",
            "room_id": "!r:b", "content": {"membership": "join", "displayname": "\u{7f}é\n\""},
            "origin_server_ts": 7, "depth": 1, "prev_events": [], "auth_events": [],
            "hashes": {"sha256": ""}, "signatures": {}});
        let id = protocol::id::EventId::parse("$e").unwrap();
        let version = protocol::room_version::RoomVersion::V11;
        let pdu = Pdu::parse_trusted(&event.to_string(), version, id, false).unwrap();
        let redacted = Unsigned {
            redacted_because: Some(Arc::new(pdu.clone())),
            ..Unsigned::default()
        };
        let aged = Unsigned {
            age: Some(5),
            ..Unsigned::default()
        };
        for unsigned in [Unsigned::default(), aged, redacted] {
            let mut text = String::new();
            write_state_event(&pdu, &unsigned, &mut text);
            let written: Value = serde_json::from_str(&text).unwrap();
            assert_eq!(written, Value::Object(client_event(&pdu, &unsigned)));
        }

        let member = MemberText::read(&pdu.json).unwrap();
        assert_eq!(member.membership, Some("join"));
        let mut text = String::new();
        member.write(&pdu.event_id, &pdu.room_id, 12, &mut text);
        let aged = Unsigned {
            age: Some(5),
            ..Unsigned::default()
        };
        let written: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(written, Value::Object(client_event(&pdu, &aged)));
        let message = pdu.json.replace("m.room.member", "m.room.message");
        for bad in ["", "{}", &pdu.json[..40], &message] {
            assert!(MemberText::read(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn what_is_no_event_is_dropped_from_stripped_state() {
        for bad in [
            "[]",
            "{",
            r#"{"type": "t"}"#,
            r#"{"type":1,"state_key":"","sender":"@a:b","content":{}}"#,
        ] {
            assert_eq!(stripped(bad), None, "{bad}");
        }
    }
}
