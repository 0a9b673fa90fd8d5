//! Content hash, reference hash and event id.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#calculating-the-content-hash-for-an-event>

use base64::Engine as _;
use base64::alphabet;
use base64::engine::general_purpose::{GeneralPurpose, NO_PAD_INDIFFERENT};
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use crate::canonical_json::{JsonError, Member, Object};
use crate::id::{EventId, RoomId};
use crate::redaction::redacted;
use crate::room_version::{EventIdFormat, RoomVersion};

/// Writes without padding; reads with or without, and does not mind stray bits at the end, which old
/// servers left there.
pub(crate) const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    NO_PAD_INDIFFERENT.with_decode_allow_trailing_bits(true),
);

pub(crate) const BASE64_URL: GeneralPurpose = GeneralPurpose::new(
    &alphabet::URL_SAFE,
    NO_PAD_INDIFFERENT.with_decode_allow_trailing_bits(true),
);

/// The hash that belongs in `hashes.sha256`.
pub fn content_hash(
    event: &Map<String, Value>,
    version: RoomVersion,
) -> Result<[u8; 32], JsonError> {
    Ok(of_content(&object(event, version)?))
}

/// The hash that ids and references of versions 1 and 2 are made from.
pub fn reference_hash(
    event: &Map<String, Value>,
    version: RoomVersion,
) -> Result<[u8; 32], JsonError> {
    let kind = event.get("type").and_then(Value::as_str).unwrap_or("");
    let signed = redacted(&object(event, version)?, kind, version.rules(), false);
    Ok(of_signed(&signed))
}

/// The id of an event of version 3 or later; `None` where the id is a key of the event.
pub fn event_id(
    event: &Map<String, Value>,
    version: RoomVersion,
) -> Result<Option<EventId>, JsonError> {
    Ok(id_of(reference_hash(event, version)?, version))
}

/// The room that an RV12 create event with this id makes.
pub fn room_of(create: &EventId) -> Option<RoomId> {
    RoomId::parse(&create.as_str().replacen('$', "!", 1)).ok()
}

/// The create event of an RV12 room.
pub fn create_of(room: &RoomId) -> Option<EventId> {
    EventId::parse(&room.as_str().replacen('!', "$", 1)).ok()
}

pub(crate) fn object(
    event: &Map<String, Value>,
    version: RoomVersion,
) -> Result<Object, JsonError> {
    // A map of strings and values can always be written.
    let raw = serde_json::to_string(event).map_err(|_| JsonError::NotAnObject)?;
    Object::parse(&raw, version.rules().strict_json)
}

pub(crate) fn of_content(event: &Object) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(b"{");
    let mut first = true;
    for run in runs(event, &["hashes", "signatures", "unsigned"]) {
        if !std::mem::take(&mut first) {
            hash.update(b",");
        }
        hash.update(run.as_bytes());
    }
    hash.update(b"}");
    hash.finalize().into()
}

/// Of the redacted event without signatures.
pub(crate) fn of_signed(signed: &str) -> [u8; 32] {
    Sha256::digest(signed.as_bytes()).into()
}

pub(crate) fn id_of(reference: [u8; 32], version: RoomVersion) -> Option<EventId> {
    let hash = match version.rules().event_id {
        EventIdFormat::Opaque => return None,
        EventIdFormat::Base64 => BASE64.encode(reference),
        EventIdFormat::UrlSafe => BASE64_URL.encode(reference),
    };
    EventId::parse(&format!("${hash}")).ok()
}

/// The object without these keys.
pub(crate) fn without(event: &Object, keys: &[&str]) -> String {
    let mut out = String::with_capacity(event.text.len());
    out.push('{');
    for run in runs(event, keys) {
        if out.len() > 1 {
            out.push(',');
        }
        out.push_str(run);
    }
    out.push('}');
    out
}

/// What stands between these keys: members that lie side by side, with the commas inside.
fn runs<'e>(event: &'e Object, keys: &[&str]) -> impl Iterator<Item = &'e str> {
    let text = &event.text;
    let goes = |member: &Member| keys.contains(&member.key(text));
    event
        .members
        .split(goes)
        .filter_map(|run| Some(&text[run.first()?.start()..run.last()?.end()]))
}
