//! A PDU: its canonical bytes plus the fields that the rules read, parsed once.

use std::sync::Arc;

use crate::id::{EventId, RoomId, ServerName, UserId};
use crate::room_version::RoomVersion;

/// A PDU whose format, size and content hash have been checked. Signatures are another step.
#[derive(Clone, Debug, PartialEq)]
pub struct Pdu {
    pub version: RoomVersion,
    pub event_id: EventId,
    pub room_id: RoomId,
    pub sender: UserId,
    /// The event's `type`.
    pub kind: Arc<str>,
    pub state_key: Option<Arc<str>>,
    /// The `content` object, canonical JSON.
    pub content: Arc<str>,
    pub origin_server_ts: i64,
    pub depth: i64,
    pub prev_events: Vec<EventId>,
    pub auth_events: Vec<EventId>,
    /// The event a redaction names: top level before version 11, in `content` from then on.
    pub redacts: Option<EventId>,
    /// The federation form, canonical JSON with `hashes` and `signatures`, without `unsigned`:
    /// ready to be stored and sent. Redacted when the content hash was wrong.
    pub json: Arc<str>,
    /// Whether the content hash was wrong, so that this is the redacted form.
    pub redacted: bool,
    /// `signatures` as they stood: server, key id, unpadded base64.
    pub signatures: Vec<(ServerName, String, String)>,
}
