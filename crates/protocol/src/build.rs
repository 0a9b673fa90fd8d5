//! Making events: draft, content hash, signature, id (J-32).
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#adding-hashes-and-signatures-to-outgoing-events>

use base64::Engine as _;
use serde_json::{Map, Value};

use crate::format;
use crate::hash::{self, BASE64, BASE64_URL};
use crate::id::{EventId, RoomId, ServerName, UserId};
use crate::pdu::{Pdu, PduError};
use crate::redaction::redacted;
use crate::room_version::{RoomVersion, Rules};
use crate::signature::SigningKey;

/// An event that another one refers to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    pub event_id: EventId,
    /// Only versions 1 and 2 write it down, and receivers do without.
    pub sha256: Option<[u8; 32]>,
}

impl From<EventId> for Reference {
    fn from(event_id: EventId) -> Self {
        Self {
            event_id,
            sha256: None,
        }
    }
}

impl From<&Pdu> for Reference {
    fn from(pdu: &Pdu) -> Self {
        let pairs = pdu.version.rules().reference_pairs;
        Self {
            event_id: pdu.event_id.clone(),
            sha256: pairs.then(|| pdu.reference_hash()),
        }
    }
}

/// An event to be.
#[derive(Clone, Debug)]
pub struct PduDraft {
    /// `None` for the create event of an RV12 room.
    pub room_id: Option<RoomId>,
    pub sender: UserId,
    pub kind: String,
    pub state_key: Option<String>,
    pub content: Value,
    pub prev_events: Vec<Reference>,
    pub auth_events: Vec<Reference>,
    /// Brought down to the version's limit where it is above.
    pub depth: i64,
    pub origin_server_ts: i64,
    /// Written where the version has it.
    pub redacts: Option<EventId>,
    /// Other top-level keys. The fields above win over them.
    pub extra: Map<String, Value>,
}

impl PduDraft {
    pub fn sign(
        self,
        key: &SigningKey,
        server: &ServerName,
        version: RoomVersion,
    ) -> Result<Pdu, PduError> {
        sign(self.into_object(version.rules()), key, server, version)
    }

    fn into_object(self, rules: &Rules) -> Map<String, Value> {
        let mut event = self.extra;
        let mut content = self.content;
        if let Some(target) = self.redacts {
            let target = Value::from(target.as_str());
            match &mut content {
                Value::Object(content) if rules.redacts_in_content => {
                    content.insert("redacts".to_owned(), target);
                }
                _ => {
                    event.insert("redacts".to_owned(), target);
                }
            }
        }
        let mut set = |key: &str, value: Value| {
            event.insert(key.to_owned(), value);
        };
        if let Some(room_id) = &self.room_id {
            set("room_id", room_id.as_str().into());
        }
        if let Some(state_key) = self.state_key {
            set("state_key", state_key.into());
        }
        set("sender", self.sender.as_str().into());
        set("type", self.kind.into());
        set("content", content);
        set("prev_events", references(&self.prev_events, rules));
        set("auth_events", references(&self.auth_events, rules));
        set("depth", self.depth.min(rules.depth_max).into());
        set("origin_server_ts", self.origin_server_ts.into());
        event
    }
}

fn references(list: &[Reference], rules: &Rules) -> Value {
    list.iter()
        .map(|reference| {
            let id = Value::from(reference.event_id.as_str());
            if !rules.reference_pairs {
                return id;
            }
            let mut hashes = Map::new();
            if let Some(sha256) = reference.sha256 {
                hashes.insert("sha256".to_owned(), BASE64.encode(sha256).into());
            }
            Value::Array(vec![id, Value::Object(hashes)])
        })
        .collect()
}

/// Makes an object an event of ours: a given `event_id`, `hashes`, `signatures` and `unsigned` go; hash,
/// signature and, in versions 1 and 2, an id come. Completing a template ends here (J-30). What goes beyond
/// a limit is refused even where others' events may (J-33).
pub fn sign(
    mut event: Map<String, Value>,
    key: &SigningKey,
    server: &ServerName,
    version: RoomVersion,
) -> Result<Pdu, PduError> {
    for of_others in ["event_id", "hashes", "signatures", "unsigned"] {
        event.remove(of_others);
    }
    if version.rules().event_id_server_signs {
        // As good as random: it covers sender, time, content and the events before.
        let opaque = BASE64_URL.encode(&hash::content_hash(&event, version)?[..18]);
        event.insert("event_id".to_owned(), format!("${opaque}:{server}").into());
    }
    let sha256 = BASE64.encode(hash::content_hash(&event, version)?);
    event.insert(
        "hashes".to_owned(),
        Value::Object(Map::from_iter([("sha256".to_owned(), sha256.into())])),
    );
    let pdu = add_signature(event, key, server, version)?;
    format::check_limits(&pdu)?;
    if pdu.oversized_field {
        return Err(PduError::FieldTooLong("type, state_key or an id"));
    }
    Ok(pdu)
}

/// Adds our signature to somebody else's event: an invite, or a restricted join that we authorise.
pub fn cosign(pdu: &Pdu, key: &SigningKey, server: &ServerName) -> Result<Pdu, PduError> {
    let event = serde_json::from_str(&pdu.json).map_err(|_| PduError::Format("event"))?;
    add_signature(event, key, server, pdu.version)
}

/// Adds a signature that another server has given, whatever it is worth.
pub fn with_signature(
    pdu: &Pdu,
    server: &ServerName,
    key_id: &str,
    signature: &str,
) -> Result<Pdu, PduError> {
    let format = || PduError::Format("signatures");
    let mut event: Map<String, Value> = serde_json::from_str(&pdu.json).map_err(|_| format())?;
    let signatures = event
        .entry("signatures")
        .or_insert_with(|| Map::new().into());
    let signatures = signatures.as_object_mut().ok_or_else(format)?;
    let by_server = signatures
        .entry(server.as_str())
        .or_insert_with(|| Map::new().into());
    let by_server = by_server.as_object_mut().ok_or_else(format)?;
    by_server.insert(key_id.to_owned(), signature.into());
    let raw = serde_json::to_string(&event).map_err(|_| format())?;
    Pdu::parse(&raw, pdu.version)
}

fn add_signature(
    mut event: Map<String, Value>,
    key: &SigningKey,
    server: &ServerName,
    version: RoomVersion,
) -> Result<Pdu, PduError> {
    let kind = event
        .get("type")
        .and_then(Value::as_str)
        .ok_or(PduError::Format("type"))?;
    let signed = redacted(
        &hash::object(&event, version)?,
        kind,
        version.rules(),
        false,
    );
    key.add_signature(&mut event, server, key.sign(signed.as_bytes()));
    let raw = serde_json::to_string(&event).map_err(|_| PduError::Format("event"))?;
    Pdu::parse(&raw, version)
}
