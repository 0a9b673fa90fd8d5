//! From a resident server's template to our signed membership event (joins.md J-25 to J-34).
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#joining-rooms>

use std::sync::Arc;

use protocol::build;
use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::signature::SigningKey;
use serde_json::{Map, Value};

use crate::effect::{Handshake, Now};
use crate::refusal::Refusal;

/// References a template may hold (J-33).
const PREV_EVENTS_MAX: usize = 20;
const AUTH_EVENTS_MAX: usize = 10;

/// This server: its name and the key it signs with.
#[derive(Clone)]
pub struct Own {
    pub name: ServerName,
    pub key: Arc<SigningKey>,
}

/// What our user puts into a membership event.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Member {
    pub displayname: Option<String>,
    pub avatar_url: Option<String>,
    pub reason: Option<String>,
    /// Further keys of the user's own; those that the server answers for are left out.
    pub extra: Map<String, Value>,
}

/// Who authorises a restricted join.
pub(crate) const AUTHORISED_BY: &str = "join_authorised_via_users_server";

/// Keys of a membership event that no client may set by itself.
const NOT_THE_USERS: [&str; 4] = [
    "membership",
    AUTHORISED_BY,
    "third_party_invite",
    "is_direct",
];

impl Member {
    /// The content of a membership event of this user. A leave carries no profile.
    pub fn content(&self, membership: &str) -> Map<String, Value> {
        let mut content = self.extra.clone();
        for key in NOT_THE_USERS {
            content.remove(key);
        }
        content.insert("membership".to_owned(), membership.into());
        let leaves = membership == "leave";
        let keys = [
            ("displayname", self.displayname.as_ref().filter(|_| !leaves)),
            ("avatar_url", self.avatar_url.as_ref().filter(|_| !leaves)),
            ("reason", self.reason.as_ref()),
        ];
        for (key, value) in keys {
            if let Some(value) = value {
                content.insert(key.to_owned(), value.as_str().into());
            }
        }
        content
    }
}

impl Handshake {
    pub fn membership(self) -> &'static str {
        match self {
            Self::Join => "join",
            Self::Leave => "leave",
            Self::Knock => "knock",
        }
    }
}

/// The room version a template names; versions 1 and 2 need not be named (J-25, J-26).
pub(crate) fn version_of(named: Option<&str>) -> Result<RoomVersion, Refusal> {
    let named = named.unwrap_or("1");
    RoomVersion::parse(named).ok_or_else(|| Refusal::unsupported_version(named))
}

/// What a template is to become.
pub(crate) struct Order<'a> {
    pub what: Handshake,
    pub room: &'a RoomId,
    pub user: &'a UserId,
    pub member: &'a Member,
}

/// Checks a template and turns it into our signed event. An error means: a bad candidate.
pub(crate) fn complete(
    order: &Order<'_>,
    template: &str,
    version: RoomVersion,
    own: &Own,
    now: Now,
) -> Result<Pdu, String> {
    let mut event: Map<String, Value> =
        serde_json::from_str(template).map_err(|_| "the template is not an object".to_owned())?;
    check(order, &event)?;
    check_references(version, &event, "prev_events", PREV_EVENTS_MAX)?;
    check_references(version, &event, "auth_events", AUTH_EVENTS_MAX)?;
    let depth = event.get("depth").and_then(Value::as_i64).unwrap_or(1);
    let depth = depth.clamp(1, version.rules().depth_max);
    event.remove("room_version");
    event.insert("content".to_owned(), content(order, &event));
    event.insert("depth".to_owned(), depth.into());
    event.insert("origin_server_ts".to_owned(), now.unix_ms.into());
    // Harmless, and older servers want it (J-31).
    event.insert("origin".to_owned(), own.name.as_str().into());
    build::sign(event, &own.key, &own.name, version).map_err(|error| error.to_string())
}

/// J-28.
fn check(order: &Order<'_>, template: &Map<String, Value>) -> Result<(), String> {
    let text = |key: &str| template.get(key).and_then(Value::as_str);
    let membership = template
        .get("content")
        .and_then(|content| content.get("membership"))
        .and_then(Value::as_str);
    let wanted = [
        ("type", text("type"), "m.room.member"),
        ("room_id", text("room_id"), order.room.as_str()),
        ("sender", text("sender"), order.user.as_str()),
        ("state_key", text("state_key"), order.user.as_str()),
        ("membership", membership, order.what.membership()),
    ];
    for (name, found, right) in wanted {
        if found != Some(right) {
            return Err(format!("the template's {name} is not {right}"));
        }
    }
    Ok(())
}

/// Event ids as the version writes them: `[id, {hash}]` pairs in 1 and 2, plain ids from 3 on.
fn check_references(
    version: RoomVersion,
    template: &Map<String, Value>,
    key: &str,
    max: usize,
) -> Result<(), String> {
    let list = template
        .get(key)
        .and_then(Value::as_array)
        .ok_or_else(|| format!("the template's {key} is no list"))?;
    if list.len() > max {
        return Err(format!("the template's {key} is too long"));
    }
    let id = |entry: &Value| {
        let text = match entry {
            Value::Array(pair) if version.rules().reference_pairs => pair.first()?.as_str(),
            entry if !version.rules().reference_pairs => entry.as_str(),
            _ => None,
        };
        EventId::parse(text?).ok()
    };
    match list.iter().all(|entry| id(entry).is_some()) {
        true => Ok(()),
        false => Err(format!(
            "the template's {key} holds something else than event ids"
        )),
    }
}

/// J-30: our own words only, and who authorises the join.
fn content(order: &Order<'_>, template: &Map<String, Value>) -> Value {
    let mut content = order.member.content(order.what.membership());
    if order.what == Handshake::Join
        && let Some(by) = template.get("content").and_then(|c| c.get(AUTHORISED_BY))
    {
        content.insert(AUTHORISED_BY.to_owned(), by.clone());
    }
    content.into()
}
