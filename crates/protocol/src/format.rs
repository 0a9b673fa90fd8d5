//! The event format of each room version: which keys an event has, and of which shape (check 1).
//!
//! <https://spec.matrix.org/v1.18/rooms/v11/#event-format>

use std::borrow::Cow;

use crate::canonical_json::{self, Object};
use crate::hash;
use crate::id::{EventId, ID_BYTES_MAX, RoomId, UserId};
use crate::pdu::{Pdu, PduError};
use crate::room_version::Rules;

pub const PREV_EVENTS_MAX: usize = 20;
pub const AUTH_EVENTS_MAX: usize = 10;

/// At most 20 prev events and 10 auth events. Asked of what is pushed at us, not of history (F-17, P-21).
pub fn check_limits(pdu: &Pdu) -> Result<(), PduError> {
    if pdu.prev_events.len() > PREV_EVENTS_MAX {
        return Err(PduError::TooMany("prev_events"));
    }
    if pdu.auth_events.len() > AUTH_EVENTS_MAX {
        return Err(PduError::TooMany("auth_events"));
    }
    Ok(())
}

pub(crate) fn string<'e>(event: &'e Object, key: &'static str) -> Result<Cow<'e, str>, PduError> {
    event
        .get(key)
        .and_then(canonical_json::string)
        .ok_or(PduError::Format(key))
}

pub(crate) fn optional_string<'e>(
    event: &'e Object,
    key: &'static str,
) -> Result<Option<Cow<'e, str>>, PduError> {
    event
        .get(key)
        .map(|value| canonical_json::string(value).ok_or(PduError::Format(key)))
        .transpose()
}

pub(crate) fn object<'e>(event: &'e Object, key: &'static str) -> Result<&'e str, PduError> {
    optional_object(event, key)?.ok_or(PduError::Format(key))
}

/// `hashes` and `signatures` may be absent: that is a wrong hash and a missing signature.
pub(crate) fn optional_object<'e>(
    event: &'e Object,
    key: &'static str,
) -> Result<Option<&'e str>, PduError> {
    match event.get(key) {
        Some(value) if !value.starts_with('{') => Err(PduError::Format(key)),
        value => Ok(value),
    }
}

pub(crate) fn integer(event: &Object, key: &'static str) -> Result<i64, PduError> {
    event
        .get(key)
        .and_then(|value| value.parse().ok())
        .ok_or(PduError::Format(key))
}

pub(crate) fn depth(event: &Object, rules: &Rules) -> Result<i64, PduError> {
    let depth = integer(event, "depth")?;
    if (0..=rules.depth_max).contains(&depth) {
        return Ok(depth);
    }
    Err(PduError::Format("depth"))
}

pub(crate) fn event_id(event: &Object) -> Result<EventId, PduError> {
    let text = string(event, "event_id")?;
    too_many_code_points("event_id", &text)?;
    EventId::parse_oversized(&text).map_err(|_| PduError::Format("event_id"))
}

pub(crate) fn sender(event: &Object) -> Result<UserId, PduError> {
    let text = string(event, "sender")?;
    too_many_code_points("sender", &text)?;
    UserId::parse_oversized(&text).map_err(|_| PduError::Format("sender"))
}

pub(crate) fn room_id(
    event: &Object,
    rules: &Rules,
    kind: &str,
    state_key: Option<&str>,
    event_id: &EventId,
) -> Result<RoomId, PduError> {
    let bad = PduError::Format("room_id");
    let creates = kind == "m.room.create" && state_key == Some("");
    if rules.room_id_is_create_hash && creates {
        if event.get("room_id").is_some() {
            return Err(bad);
        }
        return hash::room_of(event_id).ok_or(bad);
    }
    let text = string(event, "room_id")?;
    too_many_code_points("room_id", &text)?;
    RoomId::parse_oversized(&text).map_err(|_| bad)
}

pub(crate) fn references(
    event: &Object,
    key: &'static str,
    rules: &Rules,
) -> Result<Vec<EventId>, PduError> {
    let bad = || PduError::Format(key);
    let list = event
        .get(key)
        .and_then(canonical_json::elements)
        .ok_or_else(bad)?;
    let ids = list.map(|entry| {
        let id = if rules.reference_pairs {
            paired_id(entry)
        } else {
            canonical_json::string(entry)
        };
        EventId::parse_oversized(&id.ok_or_else(bad)?).map_err(|_| bad())
    });
    let mut ids = ids.collect::<Result<Vec<_>, _>>()?;
    // Many events are kept for a while when a room is joined.
    ids.shrink_to_fit();
    Ok(ids)
}

/// The id in `["$id", {"sha256": "…"}]`.
fn paired_id(entry: &str) -> Option<Cow<'_, str>> {
    let mut pair = canonical_json::elements(entry)?;
    let (id, hashes) = (pair.next()?, pair.next()?);
    if !hashes.starts_with('{') || pair.next().is_some() {
        return None;
    }
    canonical_json::string(id)
}

/// V-20: more than 255 code points are refused; more than 255 bytes are refused or only noted.
pub(crate) fn has_oversized_field(
    fields: &[(&'static str, &str)],
    rules: &Rules,
) -> Result<bool, PduError> {
    let mut oversized = false;
    for (key, text) in fields {
        if text.len() > ID_BYTES_MAX {
            too_many_code_points(key, text)?;
            if rules.strict_byte_limits {
                return Err(PduError::FieldTooLong(key));
            }
            oversized = true;
        }
    }
    Ok(oversized)
}

fn too_many_code_points(key: &'static str, text: &str) -> Result<(), PduError> {
    if text.len() > ID_BYTES_MAX && text.chars().count() > ID_BYTES_MAX {
        return Err(PduError::FieldTooLong(key));
    }
    Ok(())
}
