//! The five verbs: Ask, Load, Check, Commit, Tell. What a room may do to the world is on this page.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::nid::{EventNid, KeyNid};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::state::StateMap;

pub use protocol::event_set::{EventSet, StateKey, StoredEvent};

use crate::rest::Rest;
use crate::write::WriteSet;

/// Names one effect of one machine. A reply whose ticket the present state does not hold is late or
/// double, and falls on the floor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// The time, handed in with every input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Now {
    /// Since some fixed moment; only ever grows. For deadlines.
    pub since_start: Duration,
    /// Milliseconds since the Unix epoch. For `origin_server_ts`.
    pub unix_ms: i64,
}

/// One sans-IO machine.
pub trait Machine {
    type Outcome;

    /// Takes one input. Never blocks.
    fn handle(&mut self, input: Input, now: Now);
    /// The next thing the machine wants done, oldest first.
    fn poll_effect(&mut self) -> Option<Effect>;
    /// When [`Input::Woke`] is wanted at the latest, as [`Now::since_start`]. Waking early does no harm.
    fn deadline(&self) -> Option<Duration>;
    /// Whether more parts of bodies are of use now; `false` leaves them with their senders.
    fn wants_parts(&self) -> bool {
        true
    }
    /// The result, once. `Some` means the machine is done and wants no further input.
    fn poll_outcome(&mut self) -> Option<Self::Outcome>;
}

/// A PDU as it came off the wire: one JSON object, nothing checked.
pub type RawPdu = Arc<str>;

#[derive(Clone, Debug)]
pub enum Effect {
    /// Send a federation request to one server. Answered once, with [`Input::Answered`]; PDU lists of a
    /// large body arrive before that as [`Input::Part`]s.
    Ask {
        ticket: Ticket,
        to: ServerName,
        ask: Ask,
        timeout: Duration,
    },
    /// Read from one snapshot of the store.
    Load {
        ticket: Ticket,
        room: RoomId,
        load: Load,
    },
    /// Parse, hash and verify PDUs off the event loop; keys are fetched as needed.
    Check {
        ticket: Ticket,
        version: RoomVersion,
        pdus: Vec<RawPdu>,
    },
    /// Apply one write set in one transaction.
    Commit {
        ticket: Ticket,
        writes: Box<WriteSet>,
    },
    /// Answer a caller or wake somebody. Hears nothing back.
    Tell(Tell),
}

#[derive(Clone, Debug)]
pub enum Input {
    /// Some PDUs of the body that answers the Ask with this ticket; more may follow.
    Part {
        ticket: Ticket,
        from: ServerName,
        section: Section,
        pdus: Vec<RawPdu>,
    },
    Answered {
        ticket: Ticket,
        from: ServerName,
        answer: Result<Answer, AskError>,
    },
    Loaded {
        ticket: Ticket,
        loaded: Loaded,
    },
    /// One verdict for each PDU of the Check, in order.
    Checked {
        ticket: Ticket,
        pdus: Vec<Result<Arc<Pdu>, BadPdu>>,
    },
    Committed {
        ticket: Ticket,
        outcome: Result<(), Stale>,
    },
    Woke,
}

/// Which list of a `send_join` or `state` body a PDU stood in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Section {
    /// `state` of send_join, `pdus` of /state.
    State,
    AuthChain,
}

// -- Ask ------------------------------------------------------------------------------------------

/// A federation request (server-server API; paths without `/_matrix/federation`).
#[derive(Clone, Debug, PartialEq)]
pub enum Ask {
    /// `GET /v1/make_join/{room}/{user}?ver=…`, likewise make_leave and make_knock.
    Make {
        what: Handshake,
        room: RoomId,
        user: UserId,
    },
    /// `PUT /v2/send_join/{room}/{event}?omit_members=…`, likewise send_leave; send_knock is v1 only.
    /// The v1 fallback of J-46 happens inside the Ask.
    Send {
        what: Handshake,
        room: RoomId,
        event_id: EventId,
        event: Arc<str>,
        omit_members: bool,
    },
    /// `GET /v1/state_ids/{room}?event_id=…`
    StateIds { room: RoomId, event_id: EventId },
    /// `GET /v1/state/{room}?event_id=…`; its PDUs come as [`Input::Part`]s.
    State { room: RoomId, event_id: EventId },
    /// `GET /v1/event/{event}`
    Event { event_id: EventId },
    /// `GET /v1/event_auth/{room}/{event}`
    EventAuth { room: RoomId, event_id: EventId },
    /// `POST /v1/get_missing_events/{room}`
    GetMissingEvents {
        room: RoomId,
        earliest: Vec<EventId>,
        latest: Vec<EventId>,
        limit: u32,
        min_depth: i64,
    },
    /// `GET /v1/backfill/{room}?v=…&limit=…`
    Backfill {
        room: RoomId,
        from: Vec<EventId>,
        limit: u32,
    },
    /// `PUT /v2/invite/{room}/{event}`, falling back to v1 for room versions 1 and 2.
    Invite {
        room: RoomId,
        event_id: EventId,
        version: RoomVersion,
        event: Arc<str>,
        stripped_state: Vec<Arc<str>>,
    },
    /// `POST /_matrix/policy/v1/sign`.
    PolicySign { event: Arc<str> },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handshake {
    Join,
    Leave,
    Knock,
}

#[derive(Clone, Debug)]
pub enum Answer {
    /// The template event as JSON, and `room_version` as it stood.
    Made {
        room_version: Option<String>,
        event: Arc<str>,
    },
    /// The end of a send_join body; its `state` and `auth_chain` came as parts.
    SentJoin(SentJoin),
    /// send_leave was accepted.
    SentLeave,
    /// `knock_room_state`, entries as they stood.
    SentKnock { room_state: Vec<Arc<str>> },
    StateIds {
        pdu_ids: Vec<EventId>,
        auth_chain_ids: Vec<EventId>,
    },
    /// The end of a /state body; its PDUs came as parts.
    State,
    /// The signatures of a policy server: by server, then by key id.
    PolicySigned {
        signatures: serde_json::Map<String, serde_json::Value>,
    },
    /// The PDUs of event, event_auth, get_missing_events or backfill.
    Pdus(Vec<RawPdu>),
    /// The invite with the invitee's server's signature added.
    Invited { event: RawPdu },
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct SentJoin {
    /// The join as the resident holds it; present when it added a signature.
    pub event: Option<RawPdu>,
    pub members_omitted: bool,
    pub servers_in_room: Option<Vec<ServerName>>,
}

/// Why an Ask got no usable answer.
#[derive(Clone, Debug, PartialEq)]
pub enum AskError {
    /// DNS, connect, TLS, timeout, host in backoff, 5xx, or a body that is not what the endpoint gives.
    Unreachable { reason: String },
    /// A 3xx or 4xx with what the server said. `body` is the whole JSON object, for pass-through (J-38).
    Refused {
        status: u16,
        errcode: String,
        error: String,
        body: Arc<str>,
    },
}

// -- Load -----------------------------------------------------------------------------------------

/// A question to one snapshot of the store, always about one room.
#[derive(Clone, Debug)]
pub enum Load {
    /// → [`Loaded::Head`]
    Head,
    /// Which of these events are stored, and how. Ids not stored are absent. → [`Loaded::Known`]
    Known { ids: Vec<EventId> },
    /// As Known, with the events themselves. → [`Loaded::Found`]
    Find { ids: Vec<EventId> },
    /// Numbers for events and state keys, given out where there is none yet, also in a room that is not
    /// known so far. The answer has them in the order of the question. A new one is an offer until an event that
    /// bears it is committed; who commits another one is stale. → [`Loaded::Interned`]
    Intern {
        version: RoomVersion,
        ids: Vec<EventId>,
        keys: Vec<StateKey>,
        /// These events were just made: nobody has named them so far, and the store need not look.
        new: bool,
    },
    /// The state before and after each of these timeline (or backfilled) events; those that have no state
    /// are absent. → [`Loaded::States`]
    States { events: Vec<EventNid> },
    /// The events that stand at these keys in this state. Absent keys are absent. → [`Loaded::StateEvents`]
    StateEvents {
        state: StateMap,
        keys: Vec<StateKey>,
    },
    /// What a resolution of these maps needs. → [`Loaded::Closure`] with
    /// - the events of every key on which the maps differ (a key that only some of them have counts),
    /// - the events in `also`,
    /// - for each event so far, what stands in each map at the keys that its auth rules may read,
    /// - the whole auth chains of all these,
    ///
    /// Those of the events that are in the auth chain of an entry on which all maps agree stand in the
    /// set's `shared` as well, as far as that is in question: they are in no auth difference.
    ///
    /// `keys` of the set numbers the key of each of its state events and each key that their rules may
    /// read, as far as they have a number.
    Closure {
        maps: Vec<StateMap>,
        also: Vec<EventNid>,
    },
    /// Events by number, without their auth chains. → [`Loaded::Closure`] with just these, and their keys.
    Events { events: Vec<EventNid> },
    /// At most `limit` partial events in an order in which each event's prev events are full, unknown, or
    /// stand earlier in the list; as near to stream order as that allows. → [`Loaded::Ready`]
    ReadyPartial { limit: u32 },
    /// The timeline events that name one of these in `prev_events`. → [`Loaded::Children`]
    Children { events: Vec<EventNid> },
    /// The timeline events that are not partial and name one of these in `auth_events`, in stream order:
    /// what S-18 judges again. → [`Loaded::Ready`]
    AuthDependents { events: Vec<EventNid> },
    /// What is stored about a membership of our user apart from the room's state. → [`Loaded::OutOfBand`]
    OutOfBand { user: UserId },
    /// Whether a handshake of ours for this room is between its intent and its end, also for a room that is
    /// not known so far. → [`Loaded::HandshakeRunning`]
    HandshakeRunning,
    /// The servers with a joined member in the current state, own name excluded. → [`Loaded::Hosts`]
    Hosts,
    /// How many state events of the room are stored, roughly, outliers included. → [`Loaded::StateStored`]
    StateStored,
    /// Prev events of the timeline's oldest events that are not stored, deepest first, with their depth
    /// as far as known. → [`Loaded::BackwardExtremities`]
    BackwardExtremities,
}

#[derive(Clone, Debug)]
pub enum Loaded {
    Head(Option<Box<Head>>),
    Known(BTreeMap<EventId, Known>),
    Found(BTreeMap<EventId, Found>),
    Interned {
        events: Vec<EventNid>,
        keys: Vec<KeyNid>,
    },
    States(BTreeMap<EventNid, StateAt>),
    StateEvents(BTreeMap<StateKey, (EventNid, Arc<Pdu>)>),
    Closure(EventSet),
    Ready(Vec<ReadyEvent>),
    /// For each of the events asked about (absent: none), the events upon it.
    Children(BTreeMap<EventNid, Vec<Child>>),
    OutOfBand(Option<Box<StoredOutOfBand>>),
    HandshakeRunning(bool),
    Hosts(Vec<ServerName>),
    StateStored(u64),
    BackwardExtremities(Vec<(EventId, i64)>),
}

/// A room at this moment.
#[derive(Clone, Debug)]
pub struct Head {
    pub version: RoomVersion,
    /// Grows with every commit that changes extremities, current state or the partial marker.
    pub revision: u64,
    /// The partial marker; `None` for a full room.
    pub partial: Option<PartialMarker>,
    pub forward_extremities: Vec<Extremity>,
    /// Current state; in a partial room without most remote memberships.
    pub state: StateMap,
    /// Our users that are joined in the current state.
    pub local_joined: Vec<UserId>,
    /// The smallest depth in the timeline, backfilled events included.
    pub min_depth: i64,
    /// Whether a handshake of ours for this room is between its intent and its end.
    pub handshake_running: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Extremity {
    pub nid: EventNid,
    pub event_id: EventId,
    pub depth: i64,
    pub partial: bool,
}

/// What P-1 records for a partial room.
#[derive(Clone, Debug, PartialEq)]
pub struct PartialMarker {
    pub servers_in_room: Vec<ServerName>,
    pub joined_via: ServerName,
    pub join_event: EventId,
    /// Position of our outgoing device-list stream before the join.
    pub device_lists_at: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    pub nid: EventNid,
    /// The number of `(type, state_key)`, for state events.
    pub key: Option<KeyNid>,
    pub place: Place,
    pub rejected: bool,
    pub partial: bool,
}

#[derive(Clone, Debug)]
pub struct Found {
    pub known: Known,
    pub pdu: Arc<Pdu>,
}

/// A timeline event that has a certain prev event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Child {
    pub nid: EventNid,
    pub rejected: bool,
    pub soft_failed: bool,
}

/// An invite, knock or leave of our user in a room we are not in, as [`crate::write::OutOfBand`] stored it.
#[derive(Clone, Debug)]
pub struct StoredOutOfBand {
    pub membership: Arc<str>,
    pub nid: EventNid,
    pub pdu: Arc<Pdu>,
    pub via: ServerName,
    pub stripped_state: Vec<Arc<str>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Stored, without a place in the DAG and without state.
    Outlier,
    /// In the timeline, newest end.
    Timeline,
    /// In the timeline, fetched from history: shown by /messages, never by /sync.
    Backfilled,
}

#[derive(Clone, Debug)]
pub struct StateAt {
    pub before: StateMap,
    /// Equal to `before` unless the event is an accepted state event.
    pub after: StateMap,
    pub partial: bool,
}

/// An event to be judged (again) on full state.
#[derive(Clone, Debug)]
pub struct ReadyEvent {
    pub nid: EventNid,
    pub pdu: Arc<Pdu>,
    /// The number of `(type, state_key)`, for state events.
    pub key: Option<KeyNid>,
    pub rejected: bool,
    pub soft_failed: bool,
    /// Its prev events in the timeline.
    pub known_prevs: Vec<EventNid>,
    /// Its prev events that have no place in the DAG here.
    pub unknown_prevs: Vec<EventId>,
}

// -- Check ----------------------------------------------------------------------------------------

/// Why a PDU can not be used (checks 1 and 2; a wrong content hash is no reason).
#[derive(Clone, Debug, PartialEq)]
pub struct BadPdu {
    /// Known when the PDU could be parsed at all.
    pub event_id: Option<EventId>,
    pub reason: String,
    pub fault: Fault,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is no PDU of this room version.
    Form,
    /// A signature is absent or wrong, so that another copy may be good (J-59).
    Signature,
    /// No key is to be had for a signature; another copy fares no better.
    NoKey,
    /// Nobody who may know the key could be asked: later it may be had.
    Unvouched,
}

// -- Commit ---------------------------------------------------------------------------------------

/// The room changed since the Head that the write set was made from: load again, decide again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stale;

// -- Tell -----------------------------------------------------------------------------------------

#[derive(Clone, Debug, PartialEq)]
pub enum Tell {
    /// How far a join or resync is, for the admin API, metrics and logs.
    Progress { room: RoomId, step: Step },
    /// Begin (or go on with) the resync of this room, with what is here already.
    StartResync {
        room: RoomId,
        rest: Option<Box<Rest>>,
    },
    /// Fetch these servers' signing keys, they will be needed.
    PrefetchKeys { servers: Vec<ServerName> },
}

#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    Asking {
        server: ServerName,
        nth: u32,
        of: u32,
    },
    /// One server could not be used, or its answer could not.
    Failed {
        server: ServerName,
        reason: String,
    },
    Accepted {
        by: ServerName,
    },
    Verifying {
        have: u64,
    },
    Usable {
        partial: bool,
    },
    Resyncing {
        from: ServerName,
        have: u64,
        want: u64,
    },
    Retrying {
        reason: String,
        in_ms: u64,
    },
    Full,
}
