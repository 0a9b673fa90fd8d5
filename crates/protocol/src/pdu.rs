//! A PDU: its canonical bytes plus the fields that the rules read, parsed once.
//!
//! Checks 1 and 3 of <https://spec.matrix.org/v1.18/server-server-api/#checks-performed-on-receipt-of-a-pdu>.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::{Arc, LazyLock};

use base64::Engine as _;
use serde_json::Value;

use crate::canonical_json::{self, JsonError, Object};
use crate::format;
use crate::hash;
use crate::id::{EventId, RoomId, ServerName, UserId};
use crate::redaction::{self, write_redacted};
use crate::room_version::RoomVersion;

/// Canonical JSON with signatures, without `unsigned` (V-20).
pub const EVENT_BYTES_MAX: usize = 65_536;

/// Signatures beyond this many are not looked at: no event needs more than a handful.
const SIGNATURES_MAX: usize = 64;

/// What every [`Pdu::bare_member`] has in common.
struct Bare {
    sender: UserId,
    kind: Arc<str>,
}

static BARE: LazyLock<Bare> = LazyLock::new(|| Bare {
    sender: UserId::parse("@nobody:invalid").expect("a valid id"),
    kind: "m.room.member".into(),
});

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
    pub origin_server_ts: i64,
    pub depth: i64,
    pub prev_events: Vec<EventId>,
    pub auth_events: Vec<EventId>,
    /// The event a redaction names: top level before version 11, in `content` from then on. In a box, since hardly
    /// any of the tens of thousands of events in memory has one.
    pub redacts: Option<Box<EventId>>,
    /// The federation form, canonical JSON with `hashes` and `signatures`, without `unsigned`:
    /// ready to be stored and sent. Redacted when the content hash was wrong.
    pub json: Arc<str>,
    /// Whether the content hash was wrong, so that this is the redacted form.
    pub redacted: bool,
    /// A field has more than 255 bytes, though not more than 255 code points: to be stored as rejected
    /// (V-20). Never in versions 11 and later.
    pub oversized_field: bool,
    pub spans: Spans,
}

/// Where in an event's canonical JSON that stands which is read again. Tens of thousands of events are in
/// memory at a time, so nothing of their text is there twice.
#[derive(Clone, Debug, PartialEq)]
pub struct Spans {
    content: Range<u32>,
    /// Empty where there are none.
    signatures: Range<u32>,
}

impl Spans {
    /// In the canonical JSON of an event.
    pub fn of(json: &str) -> Self {
        Self::within(&Object::index(json.to_owned()))
    }

    fn within(event: &Object) -> Self {
        let span = |key| {
            let span = event.span(key).unwrap_or(0..0);
            let at = |at| u32::try_from(at).expect("events have 64 kB at most");
            at(span.start)..at(span.end)
        };
        Self {
            content: span("content"),
            signatures: span("signatures"),
        }
    }
}

/// One entry of `signatures`, as it stood.
#[derive(Clone, Debug, PartialEq)]
pub struct Signature<'p> {
    /// Any text: it need not be the name of a server.
    pub server: &'p str,
    pub key_id: &'p str,
    /// Unpadded base64, if it is a signature.
    pub text: Cow<'p, str>,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PduError {
    #[error(transparent)]
    Json(#[from] JsonError),
    #[error("`{0}` is missing or not what an event of this room version has there")]
    Format(&'static str),
    #[error("{0} is too long")]
    FieldTooLong(&'static str),
    #[error("more than {EVENT_BYTES_MAX} bytes")]
    TooLarge,
    #[error("too many {0}")]
    TooMany(&'static str),
}

impl Pdu {
    /// Checks format, limits and content hash (checks 1 and 3). An event with a wrong content hash comes
    /// back in its redacted form. How many events it refers to is `format::check_limits`'s matter.
    pub fn parse(raw: &str, version: RoomVersion) -> Result<Self, PduError> {
        Self::parse_with_signed(raw, version, &mut String::new())
    }

    /// As [`Pdu::parse`]. Puts the bytes that the signatures are of, which it has to make anyway, at the end of
    /// `signed`; with an error nothing.
    pub fn parse_with_signed(
        raw: &str,
        version: RoomVersion,
        signed: &mut String,
    ) -> Result<Self, PduError> {
        let before = signed.len();
        let parsed = Self::parse_and_write(raw, version, signed);
        if parsed.is_err() {
            signed.truncate(before);
        }
        parsed
    }

    fn parse_and_write(
        raw: &str,
        version: RoomVersion,
        signed: &mut String,
    ) -> Result<Self, PduError> {
        let rules = version.rules();
        let mut event = Object::parse(raw, rules.strict_json)?;
        event.remove("unsigned");
        if event.text.len() > EVENT_BYTES_MAX {
            return Err(PduError::TooLarge);
        }
        let kind = format::string(&event, "type")?.into_owned();
        format::object(&event, "content")?;
        let before = signed.len();
        signed.reserve(event.text.len());
        write_redacted(signed, &event, &kind, rules, false);
        let event_id = match hash::id_of(hash::of_signed(&signed[before..]), version) {
            Some(event_id) => event_id,
            None => format::event_id(&event)?,
        };
        let redacted = !content_hash_is_right(&event);
        if redacted {
            event = Object::index(redaction::redacted(&event, &kind, rules, true));
        }
        extract(event, version, event_id, kind, redacted)
    }

    /// Reads back what [`Pdu::parse`] made: canonical already, so that nothing need be sorted, hashed or
    /// compared. The row says whether it is the redacted form.
    pub fn parse_trusted(
        json: &str,
        version: RoomVersion,
        event_id: EventId,
        redacted: bool,
    ) -> Result<Self, PduError> {
        let event = Object::index(json.to_owned());
        let kind = format::string(&event, "type")?.into_owned();
        extract(event, version, event_id, kind, redacted)
    }

    /// A membership with no more than what the auth rules ask of one among an event's auth events: the room, the
    /// user, and the word as [`Pdu::membership`] gives it. Not to be stored, sent or checked by itself.
    pub fn bare_member(
        version: RoomVersion,
        event_id: &EventId,
        room_id: RoomId,
        user: Arc<str>,
        membership: Option<&str>,
    ) -> Self {
        let json = match membership {
            Some(membership) => format!("{{\"content\":{{\"membership\":\"{membership}\"}}}}"),
            None => "{\"content\":{}}".to_owned(),
        };
        Self {
            version,
            event_id: event_id.clone(),
            room_id,
            sender: BARE.sender.clone(),
            kind: Arc::clone(&BARE.kind),
            state_key: Some(user),
            origin_server_ts: 0,
            depth: 0,
            prev_events: Vec::new(),
            auth_events: Vec::new(),
            redacts: None,
            spans: Spans::of(&json),
            json: json.into(),
            redacted: false,
            oversized_field: false,
        }
    }

    /// The `content` object, canonical JSON.
    pub fn content(&self) -> &str {
        self.span(&self.spans.content)
    }

    fn span(&self, span: &Range<u32>) -> &str {
        &self.json[span.start as usize..span.end as usize]
    }

    /// The first of its signatures. Entries that are no signature of anybody are left out: they prove nothing.
    pub fn signatures(&self) -> impl Iterator<Item = Signature<'_>> {
        let by_server = self.span(&self.spans.signatures);
        let servers = canonical_json::members(by_server);
        let entries = servers.flat_map(move |server| {
            let (name, by_key) = (server.key(by_server), server.value(by_server));
            let entries = canonical_json::members(by_key);
            entries.filter_map(move |entry| {
                Some(Signature {
                    server: name,
                    key_id: entry.key(by_key),
                    text: canonical_json::string(entry.value(by_key))?,
                })
            })
        });
        entries.take(SIGNATURES_MAX)
    }

    pub fn is_state(&self) -> bool {
        self.state_key.is_some()
    }

    /// Whether this is the state event of that type and key.
    pub fn is(&self, kind: &str, state_key: &str) -> bool {
        &*self.kind == kind && self.state_key.as_deref() == Some(state_key)
    }

    /// `content.membership` of an `m.room.member` event.
    pub fn membership(&self) -> Option<&str> {
        if &*self.kind != "m.room.member" {
            return None;
        }
        match canonical_json::string(self.content_raw("membership")?)? {
            Cow::Borrowed(membership) => Some(membership),
            // No membership there is needs an escape.
            Cow::Owned(_) => None,
        }
    }

    /// The canonical text of one value in `content`. For keys that need no escape.
    pub fn content_raw(&self, key: &str) -> Option<&str> {
        canonical_json::get(self.content(), key)
    }

    /// A string in `content`.
    pub fn content_get_str(&self, key: &str) -> Option<Cow<'_, str>> {
        canonical_json::string(self.content_raw(key)?)
    }

    /// One value in `content`.
    pub fn content_get(&self, key: &str) -> Option<Value> {
        serde_json::from_str(self.content_raw(key)?).ok()
    }

    /// The whole `content`, for those who look at more than a key or two.
    pub fn content_value(&self) -> Value {
        serde_json::from_str(self.content())
            .unwrap_or_else(|_| Value::Object(serde_json::Map::new()))
    }

    /// The canonical text of one value at the top level. For keys that need no escape.
    pub fn raw(&self, key: &str) -> Option<&str> {
        canonical_json::get(&self.json, key)
    }

    /// What is signed: the redacted event without `signatures`, canonical.
    pub fn signing_bytes(&self) -> String {
        let event = Object::index(self.json.as_ref().to_owned());
        redaction::redacted(&event, &self.kind, self.version.rules(), false)
    }

    /// The hash that others put beside the id when they refer to this event (versions 1 and 2).
    pub fn reference_hash(&self) -> [u8; 32] {
        hash::of_signed(&self.signing_bytes())
    }

    /// The server that sent it.
    pub fn origin(&self) -> ServerName {
        self.sender.server_name()
    }
}

fn content_hash_is_right(event: &Object) -> bool {
    let Some(stated) = event
        .get("hashes")
        .and_then(|hashes| canonical_json::get(hashes, "sha256"))
        .and_then(canonical_json::string)
    else {
        return false;
    };
    let made = hash::of_content(event);
    hash::BASE64
        .decode(stated.as_bytes())
        .is_ok_and(|stated| stated == made)
}

fn extract(
    event: Object,
    version: RoomVersion,
    event_id: EventId,
    kind: String,
    redacted: bool,
) -> Result<Pdu, PduError> {
    let rules = version.rules();
    let content = format::object(&event, "content")?;
    let state_key = format::optional_string(&event, "state_key")?;
    format::optional_object(&event, "signatures")?;
    let sender = format::sender(&event)?;
    let room_id = format::room_id(&event, rules, &kind, state_key.as_deref(), &event_id)?;
    let oversized_field = format::has_oversized_field(
        &[
            ("type", &kind),
            ("state_key", state_key.as_deref().unwrap_or("")),
            ("sender", sender.as_str()),
            ("room_id", room_id.as_str()),
            ("event_id", event_id.as_str()),
        ],
        rules,
    )?;
    format::optional_object(&event, "hashes")?;
    if rules.event_id != crate::room_version::EventIdFormat::Opaque
        && event.get("event_id").is_some()
    {
        return Err(PduError::Format("event_id"));
    }
    let redacts = if kind == "m.room.redaction" {
        let target = if rules.redacts_in_content {
            canonical_json::get(content, "redacts")
        } else {
            event.get("redacts")
        };
        target
            .and_then(canonical_json::string)
            .and_then(|id| EventId::parse_oversized(&id).ok())
    } else {
        None
    };
    // Members mostly speak for themselves.
    let state_key = state_key.map(|key| match key == sender.as_str() {
        true => sender.shared(),
        false => key.into(),
    });
    Ok(Pdu {
        version,
        room_id,
        sender,
        state_key,
        origin_server_ts: format::integer(&event, "origin_server_ts")?,
        depth: format::depth(&event, rules)?,
        prev_events: format::references(&event, "prev_events", rules)?,
        auth_events: format::references(&event, "auth_events", rules)?,
        redacts: redacts.map(Box::new),
        redacted,
        oversized_field,
        event_id,
        kind: kind.into(),
        spans: Spans::within(&event),
        json: event.text.into(),
    })
}
