//! Account data, tags and stored filters.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#client-config>

use protocol::id::{RoomId, UserId};
use serde_json::{Map, Value};
use storage::account_data as table;

use crate::Homeserver;
use crate::error::{MatrixError, Result};

/// One entry may be as large as an event, which clients rely on.
const CONTENT_BYTES_MAX: usize = 65_536;
const KIND_BYTES_MAX: usize = 255;
/// Filters are kept for ever, so one should not be a dump.
const FILTER_BYTES_MAX: usize = 65_536;

/// Types that the server writes itself.
const SERVER_OWNED: [&str; 2] = ["m.fully_read", "m.push_rules"];

pub const TAGS: &str = "m.tag";

impl Homeserver {
    /// What a client has stored, `M_NOT_FOUND` when nothing. `{}` counts as nothing (MSC3391).
    pub async fn account_data(
        &self,
        user: &UserId,
        room: Option<&RoomId>,
        kind: &str,
    ) -> Result<Value> {
        let content = self.stored_account_data(user, room, kind).await?;
        content
            .filter(|content| content.as_object().is_none_or(|map| !map.is_empty()))
            .ok_or_else(|| MatrixError::not_found("There is no such account data"))
    }

    pub(crate) async fn stored_account_data(
        &self,
        user: &UserId,
        room: Option<&RoomId>,
        kind: &str,
    ) -> Result<Option<Value>> {
        let (user, kind) = (user.clone(), kind.to_owned());
        let room = room.map_or(table::GLOBAL.to_owned(), |room| room.as_str().to_owned());
        let content = self
            .store()
            .read(move |c| table::get(c, &user, &room, &kind))
            .await?;
        Ok(content.and_then(|content| serde_json::from_str(&content).ok()))
    }

    /// `PUT …/account_data/{type}` by a client.
    pub async fn set_account_data(
        &self,
        user: &UserId,
        room: Option<&RoomId>,
        kind: &str,
        content: &Map<String, Value>,
    ) -> Result<()> {
        if SERVER_OWNED.contains(&kind) {
            return Err(MatrixError::new(
                405,
                "M_BAD_JSON",
                format!("{kind} is not set through this endpoint"),
            ));
        }
        if kind.len() > KIND_BYTES_MAX {
            return Err(MatrixError::invalid_param("The type is too long"));
        }
        let text = serde_json::to_string(content)
            .map_err(|_| MatrixError::bad_json("Unusable content"))?;
        if text.len() > CONTENT_BYTES_MAX {
            return Err(MatrixError::too_large("The account data is too large"));
        }
        self.write_account_data(user, room, kind, text).await
    }

    /// Stores any account data and wakes the user's syncs.
    pub(crate) async fn write_account_data(
        &self,
        user: &UserId,
        room: Option<&RoomId>,
        kind: &str,
        content: String,
    ) -> Result<()> {
        let (owner, kind) = (user.clone(), kind.to_owned());
        let room = room.map_or(table::GLOBAL.to_owned(), |room| room.as_str().to_owned());
        self.store()
            .write(move |c| table::set(c, &owner, &room, &kind, &content))
            .await?;
        self.notifier().wake_user(user);
        Ok(())
    }

    /// `{tag: {order}}` of a room.
    pub async fn tags(&self, user: &UserId, room: &RoomId) -> Result<Map<String, Value>> {
        let content = self.stored_account_data(user, Some(room), TAGS).await?;
        Ok(content
            .and_then(|content| content.get("tags")?.as_object().cloned())
            .unwrap_or_default())
    }

    /// Sets a tag, or removes it with `None`.
    pub async fn set_tag(
        &self,
        user: &UserId,
        room: &RoomId,
        tag: &str,
        content: Option<Map<String, Value>>,
    ) -> Result<()> {
        if tag.len() > KIND_BYTES_MAX {
            return Err(MatrixError::invalid_param("The tag is too long"));
        }
        let mut tags = self.tags(user, room).await?;
        match content {
            Some(content) => tags.insert(tag.to_owned(), Value::Object(content)),
            None => tags.remove(tag),
        };
        let text =
            Value::from(Map::from_iter([("tags".to_owned(), Value::Object(tags))])).to_string();
        if text.len() > CONTENT_BYTES_MAX {
            return Err(MatrixError::too_large("The room has too many tags"));
        }
        self.write_account_data(user, Some(room), TAGS, text).await
    }

    /// The id under which the filter is stored.
    pub async fn store_filter(&self, user: &UserId, filter: &Map<String, Value>) -> Result<String> {
        check_filter(filter)?;
        let text =
            serde_json::to_string(filter).map_err(|_| MatrixError::bad_json("Unusable filter"))?;
        if text.len() > FILTER_BYTES_MAX {
            return Err(MatrixError::too_large("The filter is too large"));
        }
        let user = user.clone();
        let id = self
            .store()
            .write(move |c| table::put_filter(c, &user, &text))
            .await?;
        Ok(id.to_string())
    }

    pub async fn filter(&self, user: &UserId, id: &str) -> Result<Value> {
        let missing = || MatrixError::not_found("There is no such filter");
        let id: i64 = id.parse().map_err(|_| missing())?;
        let user = user.clone();
        let text = self
            .store()
            .read(move |c| table::get_filter(c, &user, id))
            .await?;
        text.and_then(|text| serde_json::from_str(&text).ok())
            .ok_or_else(missing)
    }
}

/// Refuses what no filter can mean: a member of the wrong type, or something that is no id where ids stand.
fn check_filter(filter: &Map<String, Value>) -> Result<()> {
    let wrong =
        |what: &str| MatrixError::bad_json(format!("The filter's {what} is of the wrong kind"));
    let object = |value: Option<&Value>| value.is_none_or(Value::is_object);
    for name in ["account_data", "presence", "room"] {
        if !object(filter.get(name)) {
            return Err(wrong(name));
        }
    }
    if filter
        .get("event_fields")
        .is_some_and(|fields| !is_list(fields, |_| true))
    {
        return Err(wrong("event_fields"));
    }
    let room = filter.get("room").and_then(Value::as_object);
    let mut event_filters: Vec<&Map<String, Value>> = ["account_data", "presence"]
        .iter()
        .filter_map(|name| filter.get(*name).and_then(Value::as_object))
        .collect();
    if let Some(room) = room {
        for name in ["account_data", "ephemeral", "state", "timeline"] {
            if !object(room.get(name)) {
                return Err(wrong(name));
            }
            event_filters.extend(room.get(name).and_then(Value::as_object));
        }
        event_filters.push(room);
    }
    for filter in event_filters {
        for (name, check) in LISTS {
            if filter
                .get(*name)
                .is_some_and(|value| !value.is_null() && !is_list(value, check))
            {
                return Err(wrong(name));
            }
        }
        if filter
            .get("limit")
            .is_some_and(|limit| !limit.is_null() && limit.as_i64().is_none())
        {
            return Err(wrong("limit"));
        }
    }
    Ok(())
}

type Check = fn(&str) -> bool;

const LISTS: &[(&str, Check)] = &[
    ("types", |_| true),
    ("not_types", |_| true),
    ("senders", |id| UserId::parse(id).is_ok()),
    ("not_senders", |id| UserId::parse(id).is_ok()),
    ("rooms", |id| RoomId::parse(id).is_ok()),
    ("not_rooms", |id| RoomId::parse(id).is_ok()),
];

fn is_list(value: &Value, check: impl Fn(&str) -> bool) -> bool {
    value
        .as_array()
        .is_some_and(|list| list.iter().all(|item| item.as_str().is_some_and(&check)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_that_can_mean_nothing_is_refused() {
        let verdict = |text: &str| check_filter(&serde_json::from_str(text).unwrap()).is_ok();
        assert!(verdict("{}"));
        assert!(verdict(
            r#"{"room": {"timeline": {"limit": 10, "senders": ["@a:b"]}}, "event_fields": ["type"]}"#
        ));
        for bad in [
            r#"{"presence": "fake_presence"}"#,
            r#"{"event_fields": "type"}"#,
            r#"{"room": {"rooms": "not_a_list"}}"#,
            r#"{"room": {"rooms": ["not_an_id"]}}"#,
            r#"{"room": {"timeline": {"senders": ["nobody"]}}}"#,
            r#"{"room": {"timeline": {"limit": "ten"}}}"#,
        ] {
            assert!(!verdict(bad), "{bad}");
        }
    }
}
