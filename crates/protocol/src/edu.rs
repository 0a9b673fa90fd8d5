//! EDUs: what servers tell each other in passing.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#edus>

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::id::{ID_BYTES_MAX, RoomId, UserId};

/// One of the six EDUs. Whether its sender may say so is for the receiver to check.
#[derive(Clone, Debug, PartialEq)]
pub enum Edu {
    Typing(Typing),
    /// At most one for each room, kind and user: threads of one room go into EDUs of their own.
    Receipts(Vec<Receipt>),
    Presence(Vec<PresenceUpdate>),
    DeviceListUpdate(DeviceListUpdate),
    DirectToDevice(DirectToDevice),
    SigningKeyUpdate(SigningKeyUpdate),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Typing {
    pub room_id: RoomId,
    pub user_id: UserId,
    pub typing: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Receipt {
    pub room_id: RoomId,
    /// `m.read`; private receipts do not travel.
    pub kind: String,
    pub user_id: UserId,
    /// Not looked up, and not always in the form of an event id (P-63).
    pub event_id: String,
    /// When the user read the event, if that was told.
    pub ts: Option<i64>,
    /// The thread's root, or `main`; `None` for the room as a whole.
    pub thread_id: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PresenceUpdate {
    pub user_id: UserId,
    pub presence: Presence,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status_msg: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_active_ago: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub currently_active: Option<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Presence {
    Offline,
    Unavailable,
    Online,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceListUpdate {
    pub user_id: UserId,
    pub device_id: String,
    pub stream_id: i64,
    /// Updates before this one; one that is not known means that some were missed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prev_id: Vec<i64>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deleted: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_display_name: Option<String>,
    /// The device's identity keys as their owner signed them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keys: Option<Value>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct DirectToDevice {
    pub sender: UserId,
    /// The messages' event type.
    pub kind: String,
    /// To tell a repeated message.
    pub message_id: String,
    /// Content by user and device; the device `*` is all of that user's.
    pub messages: BTreeMap<UserId, BTreeMap<String, Value>>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SigningKeyUpdate {
    pub user_id: UserId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub master_key: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub self_signing_key: Option<Value>,
}

impl Edu {
    /// Reads an entry of a transaction's `edus`. `None` for a type that is not known and for one that
    /// says nothing usable; a bad entry in a list of several is left out.
    pub fn parse(edu: &Value) -> Option<Self> {
        let content = edu.get("content")?;
        Some(match edu.get("edu_type")?.as_str()? {
            "m.typing" => Self::Typing(read(content)?),
            "m.receipt" => Self::Receipts(receipts(content.as_object()?)),
            "m.presence" => {
                let push = content.get("push")?.as_array()?;
                Self::Presence(push.iter().filter_map(presence).collect())
            }
            "m.device_list_update" => Self::DeviceListUpdate(read(content)?),
            "m.direct_to_device" => Self::DirectToDevice(direct_to_device(content)?),
            // Synapse sends the second name beside the first.
            "m.signing_key_update" | "org.matrix.signing_key_update" => {
                Self::SigningKeyUpdate(read(content)?)
            }
            _ => return None,
        })
    }

    pub fn edu_type(&self) -> &'static str {
        match self {
            Self::Typing(_) => "m.typing",
            Self::Receipts(_) => "m.receipt",
            Self::Presence(_) => "m.presence",
            Self::DeviceListUpdate(_) => "m.device_list_update",
            Self::DirectToDevice(_) => "m.direct_to_device",
            Self::SigningKeyUpdate(_) => "m.signing_key_update",
        }
    }

    /// The entry for a transaction's `edus`.
    pub fn to_value(&self) -> Value {
        let content = match self {
            Self::Typing(typing) => json!(typing),
            Self::Receipts(receipts) => receipts_content(receipts),
            Self::Presence(push) => json!({ "push": push }),
            Self::DeviceListUpdate(update) => json!(update),
            Self::DirectToDevice(message) => json!({
                "sender": message.sender,
                "type": message.kind,
                "message_id": message.message_id,
                "messages": message.messages,
            }),
            Self::SigningKeyUpdate(update) => json!(update),
        };
        json!({ "edu_type": self.edu_type(), "content": content })
    }
}

fn read<T: DeserializeOwned>(content: &Value) -> Option<T> {
    // Others write absent values as null.
    let mut content = content.as_object()?.clone();
    content.retain(|_, value| !value.is_null());
    T::deserialize(Value::Object(content)).ok()
}

fn presence(update: &Value) -> Option<PresenceUpdate> {
    read(update)
}

fn receipts(rooms: &Map<String, Value>) -> Vec<Receipt> {
    let mut all = Vec::new();
    for (room, kinds) in rooms {
        let (Ok(room_id), Some(kinds)) = (RoomId::parse(room), kinds.as_object()) else {
            continue;
        };
        for (kind, users) in kinds {
            for (user, receipt) in users.as_object().into_iter().flatten() {
                all.extend(one_receipt(&room_id, kind, user, receipt));
            }
        }
    }
    all
}

fn one_receipt(room_id: &RoomId, kind: &str, user: &str, receipt: &Value) -> Option<Receipt> {
    let data = receipt.get("data");
    let thread_id = data.and_then(|data| data.get("thread_id")?.as_str());
    Some(Receipt {
        room_id: room_id.clone(),
        kind: kind.to_owned(),
        user_id: UserId::parse(user).ok()?,
        event_id: bounded_id(receipt.get("event_ids")?.get(0)?.as_str()?)?,
        ts: data.and_then(|data| data.get("ts")?.as_i64()),
        thread_id: thread_id.map(str::to_owned),
    })
}

fn bounded_id(id: &str) -> Option<String> {
    (id.len() <= ID_BYTES_MAX).then(|| id.to_owned())
}

fn receipts_content(receipts: &[Receipt]) -> Value {
    let mut rooms: BTreeMap<&str, BTreeMap<&str, BTreeMap<&str, Value>>> = BTreeMap::new();
    for receipt in receipts {
        let mut data = Map::new();
        if let Some(ts) = receipt.ts {
            data.insert("ts".to_owned(), ts.into());
        }
        if let Some(thread_id) = &receipt.thread_id {
            data.insert("thread_id".to_owned(), thread_id.as_str().into());
        }
        rooms
            .entry(receipt.room_id.as_str())
            .or_default()
            .entry(&receipt.kind)
            .or_default()
            .insert(
                receipt.user_id.as_str(),
                json!({ "event_ids": [receipt.event_id], "data": data }),
            );
    }
    json!(rooms)
}

fn direct_to_device(content: &Value) -> Option<DirectToDevice> {
    let text = |key: &str| content.get(key)?.as_str();
    let mut messages = BTreeMap::new();
    for (user, devices) in content.get("messages")?.as_object()? {
        let (Ok(user), Some(devices)) = (UserId::parse(user), devices.as_object()) else {
            continue;
        };
        let devices: BTreeMap<String, Value> = devices
            .iter()
            .filter(|(_, content)| content.is_object())
            .map(|(device, content)| (device.clone(), content.clone()))
            .collect();
        messages.insert(user, devices);
    }
    Some(DirectToDevice {
        sender: UserId::parse(text("sender")?).ok()?,
        kind: text("type")?.to_owned(),
        message_id: text("message_id")?.to_owned(),
        messages,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edu(edu_type: &str, content: Value) -> Value {
        json!({ "edu_type": edu_type, "content": content })
    }

    #[test]
    fn what_the_specification_shows_is_read_and_written_back() {
        for value in [
            edu(
                "m.typing",
                json!({"room_id": "!r:example.org", "user_id": "@u:example.org", "typing": true}),
            ),
            edu(
                "m.receipt",
                json!({"!r:example.org": {"m.read": {"@u:example.org": {
                    "data": {"ts": 1_533_358, "thread_id": "main"}, "event_ids": ["$e"]}}}}),
            ),
            edu(
                "m.presence",
                json!({"push": [
                    {"user_id": "@u:example.org", "presence": "online", "status_msg": "Making cupcakes",
                     "last_active_ago": 5000, "currently_active": true},
                    {"user_id": "@v:example.org", "presence": "offline"}]}),
            ),
            edu(
                "m.device_list_update",
                json!({"user_id": "@u:example.org", "device_id": "D", "stream_id": 6, "prev_id": [5],
                    "deleted": true, "device_display_name": "Mobile", "keys": {"algorithms": []}}),
            ),
            edu(
                "m.direct_to_device",
                json!({"sender": "@u:example.org", "type": "m.room_key_request", "message_id": "x",
                    "messages": {"@v:example.org": {"*": {"a": 1}}}}),
            ),
            edu(
                "m.signing_key_update",
                json!({"user_id": "@u:example.org", "master_key": {"keys": {}}}),
            ),
        ] {
            let parsed = Edu::parse(&value).expect("a good EDU");
            assert_eq!(parsed.to_value(), value);
        }
    }

    #[test]
    fn what_can_be_used_of_a_bad_edu_is_used() {
        let value = edu(
            "m.receipt",
            json!({
                "not a room": {"m.read": {"@u:a": {"event_ids": ["$e"]}}},
                "!r:a": {"m.read": {
                    "@u:a": {"event_ids": ["$e"], "data": {"ts": "x", "thread_id": 5}},
                    "@v:a": {"event_ids": []},
                    "nobody": {"event_ids": ["$e"]}}},
                "!s:a": []}),
        );
        let Some(Edu::Receipts(receipts)) = Edu::parse(&value) else {
            panic!("not receipts");
        };
        assert_eq!(receipts.len(), 1);
        assert_eq!((receipts[0].ts, &receipts[0].thread_id), (None, &None));

        let value = edu(
            "m.presence",
            json!({"push": [{"user_id": "@u:a", "presence": "busy"}, 5,
                {"user_id": "@u:a", "presence": "online", "status_msg": null}]}),
        );
        assert!(matches!(Edu::parse(&value), Some(Edu::Presence(push)) if push.len() == 1));

        let value = edu(
            "m.direct_to_device",
            json!({"sender": "@u:a", "type": "t", "message_id": "m", "messages":
                {"@v:a": {"D": {}, "E": 5}, "bad": {"D": {}}}}),
        );
        let Some(Edu::DirectToDevice(message)) = Edu::parse(&value) else {
            panic!("not a message");
        };
        assert_eq!(message.messages.len(), 1);
        assert_eq!(message.messages.values().next().map(BTreeMap::len), Some(1));
    }

    #[test]
    fn p63_a_receipt_may_name_what_is_no_event_id() {
        let receipt = |event_id: &str| {
            let users = json!({"@u:a": {"event_ids": [event_id], "data": {"ts": 1}}});
            edu("m.receipt", json!({"!r:a": {"m.read": users}}))
        };
        let value = receipt("mytesteventid");
        let parsed = Edu::parse(&value).expect("a good EDU");
        assert_eq!(parsed.to_value(), value);
        let endless = receipt(&"x".repeat(ID_BYTES_MAX + 1));
        assert_eq!(Edu::parse(&endless), Some(Edu::Receipts(Vec::new())));
    }

    #[test]
    fn an_edu_that_says_nothing_usable_is_none() {
        for value in [
            json!(null),
            json!({}),
            json!({"edu_type": "m.typing"}),
            edu("m.unknown", json!({})),
            edu(
                "m.typing",
                json!({"room_id": "!r:a", "user_id": "u", "typing": true}),
            ),
            edu("m.typing", json!([])),
            edu("m.presence", json!({})),
            edu("m.device_list_update", json!({"user_id": "@u:a"})),
            edu("m.direct_to_device", json!({"sender": "@u:a"})),
        ] {
            assert_eq!(Edu::parse(&value), None, "{value}");
        }
    }
}
