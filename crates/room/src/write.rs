//! All that one transaction may change in a room.

use std::collections::BTreeMap;
use std::sync::Arc;

use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::nid::{EventNid, KeyNid};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::state::StateMap;

use crate::effect::{Extremity, PartialMarker, Place};

/// `content.membership` of member events.
pub type Memberships = BTreeMap<EventNid, Arc<str>>;

/// One transaction on one room. The default writes nothing.
#[derive(Clone, Debug)]
pub struct WriteSet {
    pub room: RoomId,
    pub version: RoomVersion,
    /// Apply only if the room's revision is still this one (`Some(0)`: the room is not known); else
    /// nothing is written and the commit is stale. `None` for writes that need no guard.
    pub expect: Option<u64>,
    /// Events to store. One that is stored as an outlier already is given its place, state and verdict by
    /// this; one that is an outlier here and is stored in any form is left as it is.
    pub events: Vec<NewEvent>,
    /// Events judged again on full state (S-9), or given a place.
    pub rejudged: Vec<Rejudged>,
    pub forward_extremities: Option<Vec<Extremity>>,
    /// The new current state. The store derives memberships, hosts and stream entries from the difference.
    pub current_state: Option<StateMap>,
    /// What member events of that state say, as far as whoever made this has just had them before it; the
    /// store reads the others.
    pub memberships: Arc<Memberships>,
    pub partial: PartialChange,
    pub intent: Option<IntentChange>,
    /// Invites, knocks and leaves of our users in rooms we are not in.
    pub out_of_band: Vec<OutOfBand>,
    /// Staged PDUs that this commit settles, by staging id.
    pub staged_done: Vec<i64>,
}

impl WriteSet {
    pub fn new(room: RoomId, version: RoomVersion) -> Self {
        Self {
            room,
            version,
            expect: None,
            events: Vec::new(),
            rejudged: Vec::new(),
            forward_extremities: None,
            current_state: None,
            memberships: Arc::default(),
            partial: PartialChange::Keep,
            intent: None,
            out_of_band: Vec::new(),
            staged_done: Vec::new(),
        }
    }
}

#[derive(Clone, Debug)]
pub struct NewEvent {
    pub nid: EventNid,
    pub pdu: Arc<Pdu>,
    /// The number of `(type, state_key)`, for state events.
    pub key: Option<KeyNid>,
    pub place: Place,
    /// State before and after; `None` exactly for outliers.
    pub state: Option<EventState>,
    pub verdict: Verdict,
    /// Who must be sent this event. Only for events of our own users, and joins we accepted.
    pub fan_out: FanOut,
    /// User, device and txn id of the request that made it, for `unsigned.transaction_id` and retries.
    pub transaction: Option<Transaction>,
}

#[derive(Clone, Debug)]
pub struct EventState {
    pub before: StateMap,
    pub after: StateMap,
    pub partial: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    Accepted,
    /// Fails checks 4 or 5: never shown, never state.
    Rejected(String),
    /// Fails check 6 or 7: stored with state, never shown, never a forward extremity.
    SoftFailed(String),
}

#[derive(Clone, Debug, PartialEq)]
pub enum FanOut {
    Nobody,
    Servers(Vec<ServerName>),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Transaction {
    pub user: UserId,
    pub device: String,
    pub txn_id: String,
}

#[derive(Clone, Debug)]
pub struct Rejudged {
    pub nid: EventNid,
    pub event_id: EventId,
    pub key: Option<KeyNid>,
    pub state: EventState,
    pub verdict: Verdict,
}

#[derive(Clone, Debug, PartialEq)]
pub enum PartialChange {
    Keep,
    /// Mark the room partial. An existing marker is kept as it is (J-74); a full room that a local user
    /// is joined to is refused as stale (S-37).
    Mark(PartialMarker),
    /// The room is full: marker, join list and spent device rows go, the room enters the "became full"
    /// stream. Refused as stale while partial events remain or a handshake runs (S-11, S-12a).
    Clear,
    /// The marker goes although events are partial, and nothing is announced (S-17, S-29). These events, and
    /// what was built on them, were judged on a state that nobody can vouch for: they stay to be read, but
    /// are outliers to every later load, as if the room had never been joined. Those rejected are not known
    /// at all. There are no forward extremities any more; the next join brings its own.
    Free,
}

/// The durable record of a join (J-67 and the ghost-join law: what was sent stays on record).
#[derive(Clone, Debug, PartialEq)]
pub enum IntentChange {
    /// A signed event is about to leave for `via`.
    Intend {
        job: i64,
        user: UserId,
        event_id: EventId,
        event: Arc<str>,
        via: ServerName,
        omit_members: bool,
    },
    /// The join is stored; forget the intent.
    Fulfil { job: i64 },
    /// Nothing was sent, or all that heard it refused.
    Forget { job: i64 },
    /// Somebody may hold us as a member: a leave is owed.
    OweLeave { job: i64 },
}

/// What a membership takes the place of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Former {
    /// Whatever is there gives way.
    Any,
    /// The membership that this event made, or none: when it is another one meanwhile, the write set is stale.
    Only(Option<EventNid>),
}

/// A membership of one of our users in a room we are not in.
#[derive(Clone, Debug, PartialEq)]
pub struct OutOfBand {
    pub user: UserId,
    /// `invite`, `knock` or `leave`.
    pub membership: Arc<str>,
    pub event: EventNid,
    pub instead_of: Former,
    /// `invite_room_state` or `knock_room_state`, entries as they stood.
    pub stripped_state: Vec<Arc<str>>,
    /// The server the invite came from or the knock went through.
    pub via: ServerName,
}
