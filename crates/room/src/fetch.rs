//! The state after one event, fetched from other servers and stored as outliers (joins.md P-17, P-18, S-4,
//! S-6, S-6a).
//!
//! The ids first, then only what is not stored: all at once when that is much, one by one from several
//! servers when it is little. What is verified is committed in chunks, and what is committed is not fetched
//! again after a crash (S-25).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use protocol::hash;
use protocol::id::{EventId, RoomId, ServerName};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::state::StateMap;

use crate::effect::{
    Answer, Ask, AskError, BadPdu, Found, Input, Known, Now, Place, RawPdu, Ticket,
};
use crate::facts::{Facts, Got};
use crate::outbox::Outbox;
use crate::sift::{self, Pdus, Sifted};
use crate::write::{FanOut, NewEvent, Verdict, WriteSet};

/// Servers hold `/state_ids` back while they work it out.
const STATE_IDS_TIMEOUT: Duration = Duration::from_secs(120);
const STATE_TIMEOUT: Duration = Duration::from_secs(900);
const EVENT_TIMEOUT: Duration = Duration::from_secs(20);
/// Single events asked for at the same time.
const EVENTS_AT_ONCE_MAX: usize = 5;
/// Servers asked for one event before it is given up.
const DONORS_MAX: usize = 4;
/// From this share of ids missing on, `/state` is cheaper than single events (P-17).
const MISSING_FOR_STATE_PERCENT: usize = 10;
/// Events of one commit.
const CHUNK: usize = 500;
/// Auth events asked for though no id list named them; somebody who makes up events could go on for ever.
const UNNAMED_MAX: usize = 1000;
/// Ids in one answer. The largest rooms known have some 200,000 events in state and auth chain (J-49).
const IDS_MAX: usize = 1_000_000;

/// The state after an event.
#[derive(Clone, Debug)]
pub(crate) struct Fetched {
    pub after: StateMap,
    /// State events that nobody could give, or that can not be used.
    pub holes: usize,
}

/// Why a server's state could not be used.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Unfetched {
    /// It answered with a refusal: it may not have seen our join so far (S-23).
    Refused(String),
    Unreachable(String),
}

pub(crate) struct Fetch {
    version: RoomVersion,
    /// `None` when only single events are wanted.
    event: Option<EventId>,
    /// The source of the ids first.
    donors: Vec<ServerName>,
    facts: Facts,
    stage: Stage,
    ids: Ids,
    stored: BTreeMap<EventId, Found>,
    /// Verified, but not judged and stored so far.
    waiting: Pdus,
    flush_at: usize,
    create: Option<Arc<Pdu>>,
    /// How many donors were asked for an event.
    tried: BTreeMap<EventId, usize>,
    /// Events that the source of the ids could not be asked for: another time it may be.
    unreached: BTreeSet<EventId>,
    /// Checks of PDUs that have come.
    checks: BTreeSet<Ticket>,
    asked_for_state: bool,
}

#[derive(Default)]
struct Ids {
    state: Vec<EventId>,
    /// Everything wanted: state, auth chain, the event itself.
    all: BTreeSet<EventId>,
}

enum Stage {
    Ids(Ticket),
    /// Looking up what is stored, or sifting what has come.
    Thinking,
    State(Ticket),
    Events(BTreeMap<Ticket, EventId>, VecDeque<EventId>),
    Storing(Ticket, Vec<Found>, VecDeque<NewEvent>),
    Over,
}

impl Fetch {
    /// Asks the first donor for the ids. There must be one.
    pub fn new(
        room: RoomId,
        version: RoomVersion,
        event: EventId,
        donors: Vec<ServerName>,
        out: &mut Outbox,
    ) -> Self {
        let ask = Ask::StateIds {
            room: room.clone(),
            event_id: event.clone(),
        };
        let ticket = out.ask(&donors[0], ask, STATE_IDS_TIMEOUT);
        Self {
            version,
            event: Some(event),
            donors,
            facts: Facts::new(room),
            stage: Stage::Ids(ticket),
            ids: Ids::default(),
            stored: BTreeMap::new(),
            waiting: Pdus::new(),
            flush_at: CHUNK,
            create: None,
            tried: BTreeMap::new(),
            unreached: BTreeSet::new(),
            checks: BTreeSet::new(),
            asked_for_state: false,
        }
    }

    /// Fetches just these events, and what their auth chains lack here (P-14).
    pub fn auth_events(
        room: RoomId,
        version: RoomVersion,
        wanted: BTreeSet<EventId>,
        donors: Vec<ServerName>,
        out: &mut Outbox,
    ) -> Self {
        let mut this = Self {
            version,
            event: None,
            donors,
            facts: Facts::new(room),
            stage: Stage::Thinking,
            ids: Ids {
                state: Vec::new(),
                all: wanted,
            },
            stored: BTreeMap::new(),
            waiting: Pdus::new(),
            flush_at: CHUNK,
            create: None,
            tried: BTreeMap::new(),
            unreached: BTreeSet::new(),
            checks: BTreeSet::new(),
            asked_for_state: true,
        };
        // Nothing can be done without the store's word, so this does not end at once.
        let ended = this.think(out);
        debug_assert!(ended.is_none());
        this
    }

    pub fn source(&self) -> &ServerName {
        &self.donors[0]
    }

    /// How many of the wanted events are here, and how many are wanted.
    pub fn progress(&self) -> (u64, u64) {
        let wanted = self.ids.all.len() as u64;
        let have = self
            .ids
            .all
            .iter()
            .filter(|id| self.stored.contains_key(*id) || self.waiting.contains_key(*id))
            .count() as u64;
        (have, wanted)
    }

    /// Takes an input; `Some` ends the fetch.
    pub fn handle(
        &mut self,
        input: Input,
        out: &mut Outbox,
        _: Now,
    ) -> Option<Result<Fetched, Unfetched>> {
        let stage = std::mem::replace(&mut self.stage, Stage::Over);
        match (stage, input) {
            (Stage::Ids(t), Input::Answered { ticket, answer, .. }) if t == ticket => {
                return self.on_ids(answer, out);
            }
            (Stage::Thinking, Input::Loaded { ticket, loaded }) => {
                self.stage = Stage::Thinking;
                if self.facts.hear(ticket, loaded) {
                    return self.think(out);
                }
            }
            (Stage::State(t), Input::Part { ticket, pdus, .. }) if t == ticket => {
                self.stage = Stage::State(t);
                self.check(pdus, out);
            }
            (Stage::State(t), Input::Answered { ticket, answer, .. }) if t == ticket => {
                // Whatever came counts; what did not is asked for singly.
                drop(answer);
                self.stage = Stage::Thinking;
                return self.think_if_idle(out);
            }
            (Stage::Events(asks, queue), Input::Answered { ticket, answer, .. }) => {
                return self.on_event(asks, queue, ticket, answer, out);
            }
            (Stage::Storing(t, chunk, rest), Input::Committed { ticket, outcome })
                if t == ticket =>
            {
                return self.on_stored(chunk, rest, outcome.is_ok(), out);
            }
            (stage, Input::Checked { ticket, pdus }) => {
                self.stage = stage;
                if self.checks.remove(&ticket) {
                    self.on_checked(pdus);
                    return self.think_if_idle(out);
                }
            }
            (stage, _late_or_double) => self.stage = stage,
        }
        None
    }

    fn on_ids(
        &mut self,
        answer: Result<Answer, AskError>,
        out: &mut Outbox,
    ) -> Option<Result<Fetched, Unfetched>> {
        let (state, chain) = match answer {
            Ok(Answer::StateIds {
                pdu_ids,
                auth_chain_ids,
            }) => (pdu_ids, auth_chain_ids),
            Ok(_) => return unreachable_source("an answer of another kind"),
            Err(AskError::Refused { errcode, error, .. }) => {
                return Some(Err(Unfetched::Refused(format!("{errcode}: {error}"))));
            }
            Err(AskError::Unreachable { reason }) => {
                return Some(Err(Unfetched::Unreachable(reason)));
            }
        };
        if state.is_empty() || state.len() + chain.len() > IDS_MAX {
            return unreachable_source("no state, or too much of it");
        }
        self.ids.all = state.iter().chain(&chain).cloned().collect();
        self.ids.all.extend(self.event.clone());
        self.ids.state = state;
        self.stage = Stage::Thinking;
        self.think(out)
    }

    fn check(&mut self, pdus: Vec<RawPdu>, out: &mut Outbox) {
        if !pdus.is_empty() {
            self.checks.insert(out.check(self.version, pdus));
        }
    }

    fn on_checked(&mut self, pdus: Vec<Result<Arc<Pdu>, BadPdu>>) {
        for pdu in pdus.into_iter().flatten() {
            let id = &pdu.event_id;
            let asked = self.ids.all.contains(id) || self.tried.contains_key(id);
            if asked && pdu.room_id == self.facts.room && !self.stored.contains_key(id) {
                if sift::is_create(&pdu) {
                    self.create = Some(pdu.clone());
                }
                self.waiting.insert(pdu.event_id.clone(), pdu);
            }
        }
    }

    fn on_event(
        &mut self,
        mut asks: BTreeMap<Ticket, EventId>,
        mut queue: VecDeque<EventId>,
        ticket: Ticket,
        answer: Result<Answer, AskError>,
        out: &mut Outbox,
    ) -> Option<Result<Fetched, Unfetched>> {
        match (asks.remove(&ticket), answer) {
            (Some(_), Ok(Answer::Pdus(pdus))) => self.check(pdus, out),
            (Some(id), Err(AskError::Unreachable { .. })) if self.tried.get(&id) == Some(&1) => {
                self.unreached.insert(id);
            }
            _ => {}
        }
        self.ask_events(&mut asks, &mut queue, out);
        if asks.is_empty() {
            self.stage = Stage::Thinking;
            return self.think_if_idle(out);
        }
        self.stage = Stage::Events(asks, queue);
        None
    }

    fn ask_events(
        &mut self,
        asks: &mut BTreeMap<Ticket, EventId>,
        queue: &mut VecDeque<EventId>,
        out: &mut Outbox,
    ) {
        while asks.len() < EVENTS_AT_ONCE_MAX
            && let Some(id) = queue.pop_front()
        {
            let tried = self.tried.entry(id.clone()).or_default();
            // Who named the ids has the events; the others are for what it can not give (S-6a).
            let donor = &self.donors[*tried % self.donors.len()];
            *tried += 1;
            let event_id = id.clone();
            let ticket = out.ask(donor, Ask::Event { event_id }, EVENT_TIMEOUT);
            asks.insert(ticket, id);
        }
    }

    /// Thinks once nothing is on its way.
    fn think_if_idle(&mut self, out: &mut Outbox) -> Option<Result<Fetched, Unfetched>> {
        match self.stage {
            Stage::Thinking if self.checks.is_empty() => self.think(out),
            _ => None,
        }
    }

    fn think(&mut self, out: &mut Outbox) -> Option<Result<Fetched, Unfetched>> {
        let thought = match self.plan() {
            Ok(thought) => thought,
            Err(lacking) => {
                self.facts.request(lacking, out);
                return None;
            }
        };
        match thought {
            Thought::Store(events) => {
                self.store(events.into(), out);
                None
            }
            Thought::AskState(event_id) => {
                self.asked_for_state = true;
                let room = self.facts.room.clone();
                let ask = Ask::State { room, event_id };
                self.stage = Stage::State(out.ask(&self.donors[0], ask, STATE_TIMEOUT));
                None
            }
            Thought::AskEvents(ids) => {
                let (mut asks, mut queue) = (BTreeMap::new(), ids.into());
                self.ask_events(&mut asks, &mut queue, out);
                self.stage = Stage::Events(asks, queue);
                None
            }
            Thought::Done(done) => {
                self.stage = Stage::Over;
                Some(done)
            }
        }
    }

    /// What is to be done next, from all that is here.
    fn plan(&mut self) -> Got<Thought> {
        let mut ids: BTreeSet<_> = self.ids.all.clone();
        ids.extend(sift::outside(&self.waiting));
        // From version 12 on every event stands on the create event without naming it.
        if self.version.rules().room_id_is_create_hash {
            ids.extend(hash::create_of(&self.facts.room));
        }
        ids.retain(|id| !self.stored.contains_key(id) && !self.waiting.contains_key(id));
        let wanted: Vec<_> = ids.into_iter().collect();
        let found = self.facts.find(&wanted)?;
        let mut missing = Vec::new();
        for (id, found) in wanted.into_iter().zip(found) {
            match found {
                Some(found) => {
                    if sift::is_create(&found.pdu) && found.pdu.room_id == self.facts.room {
                        self.create = Some(found.pdu.clone());
                    }
                    self.stored.insert(id, found);
                }
                None => missing.push(id),
            }
        }
        if self.waiting.len() >= self.flush_at && self.create.is_some() {
            let events = self.sift()?;
            self.flush_at = CHUNK.max(2 * self.waiting.len());
            if !events.is_empty() {
                return Ok(Thought::Store(events));
            }
        }
        let much = missing.len() * 100 >= self.ids.all.len() * MISSING_FOR_STATE_PERCENT;
        if much
            && !self.asked_for_state
            && missing.len() > 1
            && let Some(event) = &self.event
        {
            return Ok(Thought::AskState(event.clone()));
        }
        let donors = self.donors.len().min(DONORS_MAX);
        let full = self.tried.len() >= self.ids.all.len() + UNNAMED_MAX;
        missing.retain(|id| match self.tried.get(id) {
            Some(tried) => *tried < donors,
            None => !full,
        });
        missing.truncate(CHUNK);
        if !missing.is_empty() {
            return Ok(Thought::AskEvents(missing));
        }
        let events = self.sift()?;
        if !events.is_empty() {
            return Ok(Thought::Store(events));
        }
        Ok(Thought::Done(self.build()))
    }

    /// The waiting events that can be judged, ready for the store.
    fn sift(&self) -> Got<Vec<NewEvent>> {
        let create = self.create.as_ref();
        let Sifted { usable, .. } = sift::sift(
            self.version,
            &self.facts.room,
            &self.waiting,
            &self.stored,
            create,
        );
        let ids = usable.iter().map(|(pdu, _)| pdu.event_id.clone());
        let keys = usable
            .iter()
            .filter_map(|(pdu, _)| Some((pdu.kind.clone(), pdu.state_key.clone()?)));
        self.facts.number(self.version, ids, keys)?;
        Ok(usable
            .into_iter()
            .map(|(pdu, verdict)| NewEvent {
                nid: self.facts.nid(&pdu.event_id).expect("numbered before"),
                key: self.facts.key_of(&pdu),
                pdu,
                place: Place::Outlier,
                state: None,
                verdict,
                fan_out: FanOut::Nobody,
                transaction: None,
            })
            .collect())
    }

    fn store(&mut self, mut events: VecDeque<NewEvent>, out: &mut Outbox) {
        let rest = events.split_off(CHUNK.min(events.len()));
        let chunk = events
            .iter()
            .map(|event| Found {
                known: Known {
                    nid: event.nid,
                    place: Place::Outlier,
                    rejected: event.verdict != Verdict::Accepted,
                    partial: false,
                },
                pdu: event.pdu.clone(),
                key: event.key,
            })
            .collect();
        let mut writes = WriteSet::new(self.facts.room.clone(), self.version);
        writes.events = events.into();
        self.stage = Stage::Storing(out.commit(writes), chunk, rest);
    }

    fn on_stored(
        &mut self,
        chunk: Vec<Found>,
        rest: VecDeque<NewEvent>,
        committed: bool,
        out: &mut Outbox,
    ) -> Option<Result<Fetched, Unfetched>> {
        if !committed {
            // The room was purged in the meantime; nothing here is of use any more.
            return unreachable_source("the room is gone");
        }
        for found in chunk {
            let id = found.pdu.event_id.clone();
            self.waiting.remove(&id);
            self.stored.insert(id, found);
        }
        if !rest.is_empty() {
            self.store(rest, out);
            return None;
        }
        self.stage = Stage::Thinking;
        self.think_if_idle(out)
    }

    /// The map after the event: the state before it, with the event itself in it (P-18).
    fn build(&self) -> Result<Fetched, Unfetched> {
        // A lost answer is no hole: what is stored stays, and the source is asked again some time.
        if self
            .unreached
            .iter()
            .any(|id| !self.stored.contains_key(id))
        {
            let reason = "it could not be asked for all events".to_owned();
            return Err(Unfetched::Unreachable(reason));
        }
        let Some(event) = &self.event else {
            return Ok(self.build_events());
        };
        let ids = self.ids.state.iter().chain([event]);
        let usable = |id: &EventId| self.stored.get(id).filter(|found| !found.known.rejected);
        let mut after = StateMap::new();
        let mut holes = 0;
        for id in ids {
            match usable(id) {
                Some(found) => {
                    if let Some(key) = found.key {
                        after.insert(key, found.known.nid);
                    }
                }
                None if !self.stored.contains_key(id) => holes += 1,
                None => {}
            }
        }
        let has_create = self
            .create
            .as_ref()
            .and_then(|create| self.stored.get(&create.event_id))
            .is_some_and(|found| found.key.and_then(|key| after.get(key)) == Some(found.known.nid));
        if !has_create {
            let reason = "the state has no create event of this room".to_owned();
            return Err(Unfetched::Unreachable(reason));
        }
        Ok(Fetched { after, holes })
    }
}

impl Fetch {
    fn build_events(&self) -> Fetched {
        let absent = |id: &&EventId| !self.stored.contains_key(*id);
        Fetched {
            after: StateMap::new(),
            holes: self.ids.all.iter().filter(absent).count(),
        }
    }
}

enum Thought {
    Store(Vec<NewEvent>),
    AskState(EventId),
    AskEvents(Vec<EventId>),
    Done(Result<Fetched, Unfetched>),
}

fn unreachable_source(reason: &str) -> Option<Result<Fetched, Unfetched>> {
    Some(Err(Unfetched::Unreachable(reason.to_owned())))
}
