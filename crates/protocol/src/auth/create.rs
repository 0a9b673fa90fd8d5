//! The first event of a room, and whom it makes its creators.

use serde_json::Value;

use super::{Refused, refuse};
use crate::id::UserId;
use crate::pdu::Pdu;
use crate::room_version::{RoomVersion, Rules};

/// Rule 1.
pub(super) fn check(rules: &Rules, pdu: &Pdu) -> Result<(), Refused> {
    if !pdu.prev_events.is_empty() {
        return refuse("a create event has no event before it");
    }
    if rules.room_id_is_create_hash {
        if pdu.raw("room_id").is_some() {
            return refuse("a create event has no room id");
        }
    } else if domain(pdu.room_id.as_str()) != Some(pdu.sender.server_str()) {
        return refuse("the room id is not of the sender's server");
    }
    match pdu.content_get("room_version") {
        None => {}
        Some(Value::String(version)) if RoomVersion::parse(&version).is_some() => {}
        Some(_) => return refuse("the room version is not a known one"),
    }
    if rules.creator_in_content && pdu.content_raw("creator").is_none() {
        return refuse("the creator is missing");
    }
    if rules.privileged_creators && additional(pdu).is_none() {
        return refuse("the additional creators are not a list of user ids");
    }
    Ok(())
}

/// The user who may join before anybody else.
pub fn creator(version: RoomVersion, create: &Pdu) -> Option<UserId> {
    if !version.rules().creator_in_content {
        return Some(create.sender.clone());
    }
    let creator = create.content_get_str("creator")?;
    UserId::parse(&creator).ok()
}

/// The creator and, from version 12 on, those named beside.
pub fn creators(version: RoomVersion, create: &Pdu) -> Vec<UserId> {
    let mut creators: Vec<_> = creator(version, create).into_iter().collect();
    if version.rules().privileged_creators {
        creators.extend(additional(create).unwrap_or_default());
    }
    creators
}

/// `None` when it is there and not a list of user ids.
fn additional(create: &Pdu) -> Option<Vec<UserId>> {
    let Some(value) = create.content_get("additional_creators") else {
        return Some(Vec::new());
    };
    let ids = value.as_array()?;
    ids.iter()
        .map(|id| UserId::parse(id.as_str()?).ok())
        .collect()
}

fn domain(id: &str) -> Option<&str> {
    id.split_once(':').map(|(_, domain)| domain)
}
