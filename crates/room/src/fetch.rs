//! The state after one event, fetched from other servers and stored as outliers (joins.md P-17, P-18, S-4,
//! S-6, S-6a).
//!
//! The ids first, then only what is not stored: all at once when that is much, one by one from several
//! servers when it is little. Whoever knows beforehand that it is much asks for both at the same time. What is
//! verified is committed in chunks, and what is committed is not fetched again after a crash (S-25). While the
//! store takes one chunk the next is judged, and more is verified.
//!
//! The ids may be asked of two servers (O-46). When these do not agree, neither is believed: both states are
//! fetched, and whoever needs the state resolves them, as if the room had forked there. So a server that
//! leaves out a ban, or adds a member, does not get its way alone.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use protocol::hash;
use protocol::id::{EventId, RoomId, ServerName};
use protocol::nid::{EventNid, KeyNid};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::state::StateMap;

use crate::effect::{
    Answer, Ask, AskError, BadPdu, Fault, Input, Known, Load, Loaded, Now, Place, RawPdu, Section,
    StateKey, Ticket,
};
use crate::facts::{Facts, Got};
use crate::outbox::Outbox;
use crate::rest::Rest;
use crate::sift::{self, Judged, Pdus};
use crate::write::{FanOut, Memberships, NewEvent, Verdict, WriteSet};

mod ids;

use ids::{Entry, Ids};

/// Servers hold `/state_ids` back while they work it out.
const STATE_IDS_TIMEOUT: Duration = Duration::from_secs(120);
const STATE_TIMEOUT: Duration = Duration::from_secs(900);
const EVENT_TIMEOUT: Duration = Duration::from_secs(20);
/// Single events asked for at the same time, of each server that gave ids.
const EVENTS_AT_ONCE_MAX: usize = 5;
/// Once all is here, the second server's ids are awaited this long.
const COMPARE_WAIT: Duration = Duration::from_secs(10);
/// Events that are asked for ahead of a body. On each must stand this part of a commit's events.
const AHEAD_MAX: usize = 50;
const AHEAD_DEPENDENTS_PART: usize = 40;
/// Single events asked for before it is looked again at what is worth asking for.
const EVENTS_MAX: usize = 200;
/// Events that a server names and nobody has, before no more of those that it alone names are asked for.
const LOST_MAX: usize = 200;
/// Former memberships kept in memory, some 160 bytes each; the rest is read again.
const FORMER_MAX: usize = 100_000;
/// Servers asked for one event before it is given up.
const DONORS_MAX: usize = 4;
/// From this share of ids missing on, `/state` is cheaper than single events (P-17).
const MISSING_FOR_STATE_PERCENT: usize = 10;
/// Events of one commit.
pub(crate) const CHUNK: usize = 3000;
/// Auth events asked for though no id list named them; somebody who makes up events could go on for ever.
const UNNAMED_MAX: usize = 1000;
/// Checks that run at the same time; while there are this many, no more of a body is taken.
const CHECKS_MAX: usize = 2;
/// How much may be on its way from the wire to a judgement, in halves of a commit: with so much no more of a body is
/// taken.
const ON_THE_WAY_MAX: usize = 3;
/// Events of one check of what was given.
const WINDOW: usize = 1024;
/// Ids in one answer. The largest rooms known have some 200,000 events in state and auth chain (J-49).
const IDS_MAX: usize = 1_000_000;

/// The state after an event.
#[derive(Clone, Debug)]
pub(crate) struct Fetched {
    pub after: StateMap,
    /// What another server says that it is, when that is something else.
    pub disputed: Option<StateMap>,
    /// State events that nobody could give, or that can not be used.
    pub holes: usize,
    /// What the member events say that were stored on the way.
    pub memberships: Arc<Memberships>,
}

impl Fetched {
    /// What is to be resolved.
    pub fn maps(&self) -> impl Iterator<Item = StateMap> + '_ {
        std::iter::once(&self.after).chain(&self.disputed).cloned()
    }
}

/// Why a server's state could not be used.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Unfetched {
    /// It answered with a refusal: it may not have seen our join so far (S-23).
    Refused(String),
    Unreachable(String),
    /// It gave what it has, but nobody could be asked for the keys of some of it.
    Unvouched,
}

pub(crate) struct Fetch {
    version: RoomVersion,
    /// `None` when only single events are wanted, or the state before our join.
    event: Option<EventId>,
    /// Those asked for the ids first.
    donors: Vec<ServerName>,
    /// Requests for the ids that are not answered, by donor.
    ids_asked: BTreeMap<Ticket, usize>,
    /// Donors that gave ids; the state is theirs to give.
    sources: Vec<Source>,
    /// Donors that did not.
    failures: Vec<(ServerName, Unfetched)>,
    /// All is here but another server's ids; until when they are awaited.
    compare_until: Option<Duration>,
    facts: Facts,
    stage: Stage,
    /// Everything wanted, which is state, auth chain and the event itself; and what is stored.
    ids: Ids,
    /// Judged events that others stand on, stored or on their way there.
    auth: BTreeMap<EventId, Stood>,
    /// Members among these, stored: few are stood on by what comes later.
    rarely_stood_on: Vec<EventId>,
    /// Those of them that are in an auth chain alone, where they are for being stood on: what the rules will
    /// ask of them. The others are read again when they are.
    former: BTreeMap<EventId, Former>,
    /// Verified, but not judged and stored so far.
    waiting: Pdus,
    /// Verified while a thought about those that wait was under way. They come to these after it: a thought
    /// whose matter grows would never come to its end.
    arrived: VecDeque<Arc<Pdu>>,
    /// Events of one commit.
    chunk: usize,
    /// What those that wait stand on and is not among them; `None` when they have changed since.
    stood_on: Option<Arc<BTreeSet<EventId>>>,
    /// How many have to wait before they are looked at.
    flush_at: usize,
    /// What the store is at. Meanwhile more is judged.
    writing: Option<Writing>,
    /// What it is to be given then.
    next: Option<Vec<(Arc<Pdu>, Verdict)>>,
    /// More can be judged. Not at once, so that what the store waits for leaves first.
    think_at: Option<Duration>,
    create: Option<Arc<Pdu>>,
    /// How many donors were asked for an event.
    tried: BTreeMap<EventId, usize>,
    /// Events of which a second copy would be no better.
    hopeless: BTreeSet<EventId>,
    /// Events that were asked for, and came with a bad signature. Once for each that does not count: a donor
    /// that is the only one may have been lied for on the way.
    forged: BTreeSet<EventId>,
    /// Whether it is worth another try when keys could not be asked for, and the events in question.
    patient: bool,
    unvouched: BTreeSet<EventId>,
    /// Events that the source of the ids could not be asked for: another time it may be.
    unreached: BTreeSet<EventId>,
    /// Checks of PDUs that have come.
    checks: BTreeMap<Ticket, Checking>,
    /// What of an answer to our join is still to be checked.
    given: VecDeque<(Section, Vec<RawPdu>)>,
    /// The request for a whole state that runs, and who is asked.
    body: Option<(Ticket, usize)>,
    /// Requests for single events out of that body.
    ahead: BTreeSet<Ticket>,
    asked_ahead: BTreeSet<EventId>,
    /// The donors that were asked for the whole state.
    asked_for_state: BTreeSet<usize>,
    /// Of a state that was asked for along with its ids: what came before these.
    early: Vec<Result<Arc<Pdu>, BadPdu>>,
    /// Of what was stored.
    memberships: Arc<Memberships>,
    /// The few different ones.
    words: BTreeSet<Arc<str>>,
}

struct Source {
    donor: usize,
}

enum Stage {
    /// Nobody has given ids so far.
    Ids,
    /// Finding out what of the wanted is stored.
    LookingUp(Ticket),
    /// Sifting what has come, or waiting for more.
    Thinking,
    /// All is here, but another server may see it otherwise.
    Comparing,
    Events(BTreeMap<Ticket, EventId>, VecDeque<EventId>),
    Over,
}

enum Writing {
    /// What is judged gets its numbers.
    Numbering(Ticket, Vec<(Arc<Pdu>, Verdict)>),
    Storing(Ticket, Vec<(Arc<Pdu>, Known)>, VecDeque<NewEvent>),
}

struct Checking {
    /// Where these stood in what was given.
    given: Option<Section>,
    count: usize,
}

struct Stood {
    pdu: Arc<Pdu>,
    rejected: bool,
}

struct Former {
    user: Arc<str>,
    membership: Option<Arc<str>>,
    rejected: bool,
}

impl Judged for Stood {
    fn pdu(&self) -> &Pdu {
        &self.pdu
    }

    fn is_rejected(&self) -> bool {
        self.rejected
    }
}

impl Fetch {
    /// Asks the first donor for the ids, and with `compare` the second one too. There must be one.
    pub fn new(
        room: RoomId,
        version: RoomVersion,
        event: EventId,
        donors: Vec<ServerName>,
        compare: bool,
        out: &mut Outbox,
    ) -> Self {
        let asked = donors.iter().take(if compare { 2 } else { 1 });
        let ids_asked = asked.enumerate().map(|(donor, server)| {
            let ask = Ask::StateIds {
                room: room.clone(),
                event_id: event.clone(),
            };
            (out.ask(server, ask, STATE_IDS_TIMEOUT), donor)
        });
        let ids_asked = ids_asked.collect();
        Self {
            event: Some(event),
            ids_asked,
            stage: Stage::Ids,
            ..Self::idle(room, version, donors)
        }
    }

    /// Takes what an answer to our join gave, and fetches what it lacks. The state is that before the join.
    pub fn given(
        room: RoomId,
        version: RoomVersion,
        rest: Rest,
        donors: Vec<ServerName>,
        out: &mut Outbox,
        now: Now,
    ) -> Self {
        let mut this = Self::idle(room, version, donors);
        for id in rest.state.iter().chain(&rest.bad) {
            this.ids.want(id);
        }
        for id in &rest.state {
            this.ids.in_state(0, id);
        }
        this.sources.push(Source { donor: 0 });
        for pdu in rest.left_out {
            this.ids.want(&pdu.event_id);
            this.arrived.push_back(pdu);
        }
        for (section, pdu) in rest.held {
            match this.given.back_mut() {
                Some((last, window)) if *last == section && window.len() < WINDOW => {
                    window.push(pdu);
                }
                _ => this.given.push_back((section, vec![pdu])),
            }
        }
        this.feed(out);
        let ended = this.think_if_idle(out, now);
        debug_assert!(ended.is_none());
        this
    }

    /// Fetches just these events, and what their auth chains lack here (P-14).
    pub fn auth_events(
        room: RoomId,
        version: RoomVersion,
        wanted: BTreeSet<EventId>,
        donors: Vec<ServerName>,
        out: &mut Outbox,
        now: Now,
    ) -> Self {
        let mut this = Self {
            ..Self::idle(room, version, donors)
        };
        for id in &wanted {
            this.ids.want(id);
        }
        // Nothing can be done without the store's word, so this does not end at once.
        let ended = this.think(out, now);
        debug_assert!(ended.is_none());
        this
    }

    fn idle(room: RoomId, version: RoomVersion, donors: Vec<ServerName>) -> Self {
        Self {
            version,
            event: None,
            donors,
            ids_asked: BTreeMap::new(),
            sources: Vec::new(),
            failures: Vec::new(),
            compare_until: None,
            facts: Facts::new(room),
            stage: Stage::Thinking,
            ids: Ids::default(),
            auth: BTreeMap::new(),
            rarely_stood_on: Vec::new(),
            former: BTreeMap::new(),
            waiting: Pdus::new(),
            arrived: VecDeque::new(),
            chunk: CHUNK,
            stood_on: None,
            flush_at: CHUNK,
            writing: None,
            next: None,
            think_at: None,
            create: None,
            tried: BTreeMap::new(),
            hopeless: BTreeSet::new(),
            forged: BTreeSet::new(),
            patient: false,
            unvouched: BTreeSet::new(),
            unreached: BTreeSet::new(),
            checks: BTreeMap::new(),
            given: VecDeque::new(),
            body: None,
            ahead: BTreeSet::new(),
            asked_ahead: BTreeSet::new(),
            asked_for_state: BTreeSet::new(),
            early: Vec::new(),
            memberships: Arc::default(),
            words: BTreeSet::new(),
        }
    }

    /// Asks the first donor for the whole state too, without waiting for the ids to say how much is missing.
    pub fn with_state_at_once(mut self, wanted: bool, out: &mut Outbox) -> Self {
        if wanted && let Some(event) = self.event.clone() {
            self.ask_state(0, event, out);
        }
        self
    }

    /// Fails rather than to leave out what has no key for now.
    pub fn patiently(self, patient: bool) -> Self {
        Self { patient, ..self }
    }

    /// Commits at most this many events at a time.
    pub fn in_chunks_of(self, chunk: usize) -> Self {
        Self {
            chunk,
            flush_at: chunk,
            ..self
        }
    }

    /// Who gave the ids first; who was asked first when nobody did.
    pub fn source(&self) -> &ServerName {
        let donor = self.sources.first().map_or(0, |source| source.donor);
        &self.donors[donor]
    }

    /// The servers that were asked for ids and gave none, with their reasons.
    pub fn failures(&self) -> &[(ServerName, Unfetched)] {
        &self.failures
    }

    /// Whether more of a body is of use now, or would only pile up.
    pub fn wants_parts(&self) -> bool {
        let checking: usize = self.checks.values().map(|check| check.count).sum();
        let on_the_way = checking + self.arrived.len() + self.early.len();
        self.checks.len() < CHECKS_MAX && 2 * on_the_way < ON_THE_WAY_MAX * self.chunk
    }

    /// When [`Input::Woke`] is wanted, as [`Now::since_start`].
    pub fn deadline(&self) -> Option<Duration> {
        [self.compare_until, self.think_at]
            .into_iter()
            .flatten()
            .min()
    }

    /// How many of the wanted events are stored, and how many are wanted.
    pub fn progress(&self) -> (u64, u64) {
        let want = self.ids.wanted_count();
        (self.ids.stored_count().min(want) as u64, want as u64)
    }

    /// Takes an input; `Some` ends the fetch.
    pub fn handle(
        &mut self,
        input: Input,
        out: &mut Outbox,
        now: Now,
    ) -> Option<Result<Fetched, Unfetched>> {
        if matches!(input, Input::Woke) {
            self.think_at = None;
        }
        let input = match (self.writing.take(), input) {
            (
                Some(Writing::Numbering(t, judged)),
                Input::Loaded {
                    ticket,
                    loaded: Loaded::Interned { events, keys },
                },
            ) if t == ticket => {
                self.on_numbered(judged, events, keys, out);
                return None;
            }
            (Some(Writing::Storing(t, chunk, rest)), Input::Committed { ticket, outcome })
                if t == ticket =>
            {
                return self.on_stored(chunk, rest, outcome.is_ok(), out, now);
            }
            (writing, input) => {
                self.writing = writing;
                input
            }
        };
        let stage = std::mem::replace(&mut self.stage, Stage::Over);
        match (stage, input) {
            (Stage::Thinking, Input::Woke) => {
                self.stage = Stage::Thinking;
                return self.think_if_idle(out, now);
            }
            (stage, Input::Answered { ticket, answer, .. })
                if self.ids_asked.contains_key(&ticket) =>
            {
                self.stage = stage;
                let donor = self.ids_asked.remove(&ticket).expect("just looked at");
                return self.on_ids(donor, answer, out, now);
            }
            (Stage::Comparing, Input::Woke) => {
                self.stage = Stage::Comparing;
                if self
                    .compare_until
                    .is_some_and(|until| now.since_start >= until)
                {
                    self.ids_asked.clear();
                    self.compare_until = None;
                    self.stage = Stage::Thinking;
                    return self.think(out, now);
                }
            }
            (Stage::Thinking, Input::Loaded { ticket, loaded }) => {
                self.stage = Stage::Thinking;
                if self.facts.hear(ticket, loaded) {
                    return self.think(out, now);
                }
            }
            (stage, Input::Part { ticket, pdus, .. }) => {
                self.stage = stage;
                if self.is_body(ticket) {
                    self.check(pdus, out);
                }
            }
            (stage, Input::Answered { ticket, answer, .. }) if self.ahead.remove(&ticket) => {
                self.stage = stage;
                if let Ok(Answer::Pdus(pdus)) = answer {
                    self.check(pdus, out);
                }
                return self.think_if_idle(out, now);
            }
            (stage, Input::Answered { ticket, .. }) if self.is_body(ticket) => {
                // Whatever came counts. What it lacked is asked for elsewhere.
                self.stage = stage;
                self.body = None;
                return self.think_if_idle(out, now);
            }
            (
                Stage::LookingUp(t),
                Input::Loaded {
                    ticket,
                    loaded: Loaded::Known(known),
                },
            ) if t == ticket => {
                for (id, known) in known {
                    self.ids.store(&id, known);
                }
                self.stage = Stage::Thinking;
                return self.think(out, now);
            }
            (Stage::Events(asks, queue), Input::Answered { ticket, answer, .. }) => {
                return self.on_event((asks, queue), ticket, answer, out, now);
            }
            (stage, Input::Checked { ticket, pdus }) => {
                self.stage = stage;
                if let Some(check) = self.checks.remove(&ticket) {
                    match self.stage {
                        Stage::Ids => self.early.extend(pdus),
                        _ => self.on_checked(check.given, pdus),
                    }
                    self.feed(out);
                    return self.think_if_idle(out, now);
                }
            }
            (stage, _late_or_double) => self.stage = stage,
        }
        None
    }

    fn on_ids(
        &mut self,
        donor: usize,
        answer: Result<Answer, AskError>,
        out: &mut Outbox,
        now: Now,
    ) -> Option<Result<Fetched, Unfetched>> {
        match ids(answer) {
            Ok((state, chain)) => {
                self.ids.add_source(self.sources.len(), state, chain);
                if let Some(event) = &self.event {
                    self.ids.want(event);
                }
                let first = self.sources.is_empty();
                self.sources.push(Source { donor });
                // Another was asked for the state, and nothing is here of it: it may never come.
                if first && self.early.is_empty() && self.checks.is_empty() {
                    self.body = self.body.filter(|(_, asked)| *asked == donor);
                }
                let early = std::mem::take(&mut self.early);
                self.on_checked(None, early);
            }
            Err(failure) => {
                self.failures
                    .push((self.donors[donor].clone(), failure.clone()));
                // Who has no ids is not waited for (S-21). What came of its state counts.
                self.body = self.body.filter(|(_, asked)| *asked != donor);
                if self.sources.is_empty() && self.ids_asked.is_empty() {
                    return Some(Err(failure));
                }
            }
        }
        match self.stage {
            Stage::Ids if self.sources.is_empty() => None,
            Stage::Ids | Stage::Comparing => {
                self.compare_until = None;
                self.stage = Stage::Thinking;
                self.think(out, now)
            }
            // What it adds is seen at the next thought, which may have waited for its state alone.
            _ => self.think_if_idle(out, now),
        }
    }

    fn check(&mut self, pdus: Vec<RawPdu>, out: &mut Outbox) {
        if !pdus.is_empty() {
            let (given, count) = (None, pdus.len());
            let ticket = out.check(self.version, pdus);
            self.checks.insert(ticket, Checking { given, count });
        }
    }

    /// Has more of what was given checked.
    fn feed(&mut self, out: &mut Outbox) {
        while self.wants_parts()
            && let Some((section, pdus)) = self.given.pop_front()
        {
            let (given, count) = (Some(section), pdus.len());
            let ticket = out.check(self.version, pdus);
            self.checks.insert(ticket, Checking { given, count });
        }
    }

    fn on_checked(&mut self, given: Option<Section>, pdus: Vec<Result<Arc<Pdu>, BadPdu>>) {
        for pdu in pdus {
            let (id, fault) = match &pdu {
                Ok(pdu) => (Some(&pdu.event_id), None),
                Err(bad) => (bad.event_id.as_ref(), Some(bad.fault)),
            };
            let Some(id) = id.cloned() else {
                continue;
            };
            if let Some(section) = given {
                self.ids.want(&id);
                if section == Section::State {
                    self.ids.in_state(0, &id);
                }
            }
            // Nobody's copy is better as long as there is no key.
            let keyless = matches!(fault, Some(Fault::NoKey | Fault::Unvouched));
            if keyless && self.ids.is_wanted(&id) {
                if fault == Some(Fault::Unvouched) && self.patient {
                    self.unvouched.insert(id.clone());
                }
                self.hopeless.insert(id.clone());
            }
            let Ok(mut pdu) = pdu else {
                if fault == Some(Fault::Signature)
                    && let Some(tried) = self.tried.get_mut(&id)
                    && self.forged.insert(id)
                {
                    *tried = tried.saturating_sub(1);
                }
                continue;
            };
            let id = &pdu.event_id;
            let entry = self.ids.get(id).copied().unwrap_or_default();
            let asked =
                entry.wanted || self.tried.contains_key(id) || self.asked_ahead.contains(id);
            if asked && pdu.room_id == self.facts.room && !entry.is_here() {
                if sift::is_create(&pdu) {
                    self.create = Some(pdu.clone());
                }
                // What stands on it may be judged now.
                if self.asked_ahead.contains(id) {
                    self.flush_at = self.chunk;
                }
                self.share(&mut pdu);
                self.arrived.push_back(pdu);
            }
        }
    }

    /// Tens of thousands are in memory at a time: what they have in common is there once.
    fn share(&mut self, pdu: &mut Arc<Pdu>) {
        if let Some(pdu) = Arc::get_mut(pdu) {
            pdu.room_id = self.facts.room.clone();
            if is_member(pdu) {
                pdu.kind = self.word(MEMBER);
            }
        }
    }

    fn on_event(
        &mut self,
        (mut asks, mut queue): (BTreeMap<Ticket, EventId>, VecDeque<EventId>),
        ticket: Ticket,
        answer: Result<Answer, AskError>,
        out: &mut Outbox,
        now: Now,
    ) -> Option<Result<Fetched, Unfetched>> {
        match (asks.remove(&ticket), answer) {
            (Some(_), Ok(Answer::Pdus(pdus))) => self.check(pdus, out),
            (Some(id), Err(AskError::Unreachable { .. }))
                if self.tried[&id] <= self.sources.len().max(1) =>
            {
                self.unreached.insert(id);
            }
            _ => {}
        }
        self.ask_events(&mut asks, &mut queue, out);
        if asks.is_empty() {
            self.stage = Stage::Thinking;
            return self.think_if_idle(out, now);
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
        let order = self.in_order_of_trust();
        let at_once = EVENTS_AT_ONCE_MAX * self.sources.len().max(1);
        while asks.len() < at_once
            && let Some(id) = queue.pop_front()
        {
            let tried = self.tried.entry(id.clone()).or_default();
            // Those that named the ids have the events, and share the work; the others are for what these
            // can not give (S-6a).
            let nth = match *tried < self.sources.len() {
                true => (*tried + asks.len()) % self.sources.len(),
                false => *tried % order.len(),
            };
            let donor = &self.donors[order[nth]];
            *tried += 1;
            let event_id = id.clone();
            let ticket = out.ask(donor, Ask::Event { event_id }, EVENT_TIMEOUT);
            asks.insert(ticket, id);
        }
    }

    /// The donors, sources first.
    fn in_order_of_trust(&self) -> Vec<usize> {
        let sources: Vec<_> = self.sources.iter().map(|source| source.donor).collect();
        let others = (0..self.donors.len()).filter(|donor| !sources.contains(donor));
        sources.iter().copied().chain(others).collect()
    }

    fn is_body(&self, ticket: Ticket) -> bool {
        self.body.is_some_and(|(running, _)| running == ticket)
    }

    fn is_idle(&self) -> bool {
        self.checks.is_empty()
            && self.given.is_empty()
            && self.body.is_none()
            && self.ahead.is_empty()
            && self.arrived.is_empty()
            && self.writing.is_none()
            && self.next.is_none()
    }

    /// Thinks once nothing is on its way, or there is enough to be stored.
    fn think_if_idle(&mut self, out: &mut Outbox, now: Now) -> Option<Result<Fetched, Unfetched>> {
        let free = matches!(self.stage, Stage::Thinking) && !self.facts.is_waiting();
        if !free || self.next.is_some() {
            return None;
        }
        self.take_arrived();
        match self.is_idle() || self.waiting.len() >= self.flush_at {
            true => self.think(out, now),
            false => None,
        }
    }

    fn take_arrived(&mut self) {
        if self.arrived.is_empty() {
            return;
        }
        self.stood_on = None;
        for id in self.rarely_stood_on.drain(..) {
            self.auth.remove(&id);
        }
        self.facts.forget_found();
        let enough = self.flush_at.max(self.waiting.len() + self.chunk);
        while self.waiting.len() < enough
            && let Some(pdu) = self.arrived.pop_front()
        {
            if !self.ids.is_here(&pdu.event_id) {
                self.waiting.insert(pdu.event_id.clone(), pdu);
            }
        }
    }

    fn think(&mut self, out: &mut Outbox, now: Now) -> Option<Result<Fetched, Unfetched>> {
        let mut unsure = self.ids.take_unsure();
        unsure.retain(|id| !self.waiting.contains_key(id));
        if !unsure.is_empty() {
            let load = Load::Known { ids: unsure };
            self.stage = Stage::LookingUp(out.load(&self.facts.room, load));
            return None;
        }
        let thought = match self.plan() {
            Ok(thought) => thought,
            Err(lacking) => {
                self.facts.request(lacking, out);
                return None;
            }
        };
        match thought {
            Thought::Store(events) => {
                self.keep(events, out, now);
                None
            }
            Thought::AskState(donor, event) => {
                self.ask_state(donor, event, out);
                None
            }
            Thought::AskAhead(ids, events) => {
                self.ask_ahead(ids, out);
                if !events.is_empty() {
                    self.keep(events, out, now);
                }
                None
            }
            // What came meanwhile may be what is waited for.
            Thought::Wait if !self.arrived.is_empty() => self.think_if_idle(out, now),
            Thought::Wait => None,
            Thought::AskEvents(ids) => {
                let (mut asks, mut queue) = (BTreeMap::new(), ids.into());
                self.ask_events(&mut asks, &mut queue, out);
                self.stage = Stage::Events(asks, queue);
                None
            }
            Thought::Done(_) if !self.ids_asked.is_empty() => {
                self.compare_until
                    .get_or_insert(now.since_start + COMPARE_WAIT);
                self.stage = Stage::Comparing;
                None
            }
            Thought::Done(done) => {
                self.stage = Stage::Over;
                Some(done)
            }
        }
    }

    fn ask_state(&mut self, donor: usize, event_id: EventId, out: &mut Outbox) {
        self.asked_for_state.insert(donor);
        let room = self.facts.room.clone();
        let ask = Ask::State { room, event_id };
        let ticket = out.ask(&self.donors[donor], ask, STATE_TIMEOUT);
        self.body = Some((ticket, donor));
    }

    /// What is to be done next, from all that is here.
    fn plan(&mut self) -> Got<Thought> {
        let stood_on = self.stood_on();
        self.look_up(&stood_on)?;
        self.load_auth(&stood_on)?;
        let judgeable = self.create.is_some() || !self.version.rules().room_id_is_create_hash;
        if self.waiting.len() >= self.flush_at && judgeable {
            let events = self.sift();
            let left = self.waiting.len() - events.len();
            self.flush_at = left + self.chunk.max(left / 2);
            let ahead = self.wanted_ahead(&stood_on);
            if !ahead.is_empty() {
                return Ok(Thought::AskAhead(ahead, events));
            }
            if !events.is_empty() {
                return Ok(Thought::Store(events));
            }
        }
        if !self.is_idle() {
            return Ok(Thought::Wait);
        }
        let mut missing = self.missing(&stood_on);
        let much = missing.len() * 100 >= self.ids.wanted_count() * MISSING_FOR_STATE_PERCENT;
        let mut donors = self.sources.iter().map(|source| source.donor);
        if much
            && missing.len() > 1
            && let Some(donor) = donors.find(|donor| !self.asked_for_state.contains(donor))
            && let Some(event) = &self.event
        {
            return Ok(Thought::AskState(donor, event.clone()));
        }
        self.give_up(&mut missing);
        if !missing.is_empty() {
            return Ok(Thought::AskEvents(missing));
        }
        let events = self.sift();
        if !events.is_empty() {
            return Ok(Thought::Store(events));
        }
        let (kind, state_key) = ("m.room.create", "");
        let create: StateKey = (kind.into(), state_key.into());
        self.facts.number(self.version, [], [create])?;
        let create = self.facts.key(kind, state_key);
        Ok(Thought::Done(self.build(create)))
    }

    /// What is wanted or stood on and is not here, in order.
    fn missing(&self, stood_on: &BTreeSet<EventId>) -> Vec<EventId> {
        let wanted = self.ids.wanted().filter(|(_, entry)| !entry.is_here());
        let unnamed = stood_on.iter();
        let unnamed = unnamed.filter(|id| !self.ids.is_wanted(id) && !self.ids.is_here(id));
        let missing = wanted.map(|(id, _)| id).chain(unnamed);
        let missing = missing.filter(|id| !self.waiting.contains_key(*id));
        let mut missing: Vec<_> = missing.cloned().collect();
        missing.sort_unstable();
        missing
    }

    fn stood_on(&mut self) -> Arc<BTreeSet<EventId>> {
        let stood_on = self.stood_on.get_or_insert_with(|| {
            let mut stood_on = sift::outside(&self.waiting);
            // From version 12 on every event stands on the create event without naming it.
            if self.version.rules().room_id_is_create_hash {
                stood_on.extend(hash::create_of(&self.facts.room));
            }
            Arc::new(stood_on)
        });
        Arc::clone(stood_on)
    }

    /// The few events that many of the waiting stand on, such as former power levels. A body has them near
    /// its end, and so long all would have to be kept.
    fn wanted_ahead(&self, stood_on: &BTreeSet<EventId>) -> Vec<EventId> {
        if self.body.is_none() || self.asked_ahead.len() >= AHEAD_MAX {
            return Vec::new();
        }
        let unasked = |id: &&EventId| !self.ids.is_here(id) && !self.asked_ahead.contains(*id);
        let missing = stood_on.iter().filter(unasked).map(|id| (id, 0));
        let mut dependents: BTreeMap<&EventId, usize> = missing.collect();
        if dependents.is_empty() {
            return Vec::new();
        }
        for id in self.waiting.values().flat_map(|pdu| &pdu.auth_events) {
            if let Some(count) = dependents.get_mut(id) {
                *count += 1;
            }
        }
        let mut dependents: Vec<_> = dependents.into_iter().collect();
        dependents.retain(|(_, count)| *count * AHEAD_DEPENDENTS_PART >= self.chunk);
        dependents.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        dependents.truncate(AHEAD_MAX - self.asked_ahead.len());
        dependents.into_iter().map(|(id, _)| id.clone()).collect()
    }

    fn ask_ahead(&mut self, ids: Vec<EventId>, out: &mut Outbox) {
        let donor = self.sources.first().map_or(0, |source| source.donor);
        for id in ids {
            let ask = Ask::Event {
                event_id: id.clone(),
            };
            let ticket = out.ask(&self.donors[donor], ask, EVENT_TIMEOUT);
            self.ahead.insert(ticket);
            self.asked_ahead.insert(id);
        }
    }

    /// Leaves those of the missing events that are worth asking for, begun ones first. A server that names
    /// many that nobody has is not asked for more of these, so that it can not keep the room partial.
    fn give_up(&self, missing: &mut Vec<EventId>) {
        let donors = self.donors.len().min(DONORS_MAX);
        let full = self.tried.len() >= self.ids.wanted_count() + UNNAMED_MAX;
        let lost: Vec<_> = missing
            .iter()
            .filter(|id| self.tried.get(*id).is_some_and(|tried| *tried >= donors))
            .collect();
        let sources = 0..self.sources.len();
        let names = |source: usize, id: &EventId| self.ids.is_named_by(source, id);
        let believed: Vec<_> = sources
            .clone()
            .map(|source| lost.iter().filter(|id| names(source, id)).count() < LOST_MAX)
            .collect();
        let worth = |id: &EventId| match self.tried.get(id) {
            Some(tried) if *tried >= donors => false,
            None if full => false,
            _ => {
                let mut naming = sources
                    .clone()
                    .filter(|source| names(*source, id))
                    .peekable();
                naming.peek().is_none() || naming.any(|source| believed[source])
            }
        };
        missing.retain(|id| worth(id) && !self.hopeless.contains(id));
        missing.sort_by_key(|id| !self.tried.contains_key(id));
        missing.truncate(EVENTS_MAX);
    }

    /// Looks for what is stood on without being wanted in the store.
    fn look_up(&mut self, stood_on: &BTreeSet<EventId>) -> Got<()> {
        let unnamed = |id: &&EventId| !self.ids.is_wanted(id) && !self.ids.is_here(id);
        let ids: Vec<_> = stood_on.iter().filter(unnamed).cloned().collect();
        let known = self.facts.known(&ids)?;
        for (id, known) in ids.iter().zip(known) {
            if let Some(known) = known {
                self.ids.store(id, known);
            }
        }
        Ok(())
    }

    /// Loads what is stood on, of what is stored.
    fn load_auth(&mut self, stood_on: &BTreeSet<EventId>) -> Got<()> {
        let unread = |id: &&EventId| self.ids.is_stored(id) && !self.auth.contains_key(*id);
        let mut ids: Vec<_> = stood_on.iter().filter(unread).cloned().collect();
        ids.retain(|id| !self.recall(id));
        let found = self.facts.find(&ids)?;
        for (id, found) in ids.into_iter().zip(found) {
            if let Some(found) = found {
                if sift::is_create(&found.pdu) {
                    self.create = Some(found.pdu.clone());
                }
                let rejected = found.known.rejected;
                let pdu = found.pdu;
                if is_member(&pdu) {
                    self.rarely_stood_on.push(id.clone());
                }
                self.auth.insert(id, Stood { pdu, rejected });
            }
        }
        Ok(())
    }

    /// Whether it is a former membership that is still known.
    fn recall(&mut self, id: &EventId) -> bool {
        let Some(former) = self.former.get(id) else {
            return false;
        };
        let (room, user) = (self.facts.room.clone(), Arc::clone(&former.user));
        let pdu = Pdu::bare_member(self.version, id, room, user, former.membership.as_deref());
        let stood = Stood {
            pdu: Arc::new(pdu),
            rejected: former.rejected,
        };
        self.rarely_stood_on.push(id.clone());
        self.auth.insert(id.clone(), stood);
        true
    }

    /// It is stored. What it said may still be asked for.
    fn remember(&mut self, pdu: &Pdu, rejected: bool) {
        self.rarely_stood_on.push(pdu.event_id.clone());
        let in_state = self.ids.get(&pdu.event_id).is_some_and(Entry::is_state);
        if let (false, Some(user)) = (in_state, &pdu.state_key)
            && self.former.len() < FORMER_MAX
        {
            // Nothing that was rejected is asked what it says.
            let said = pdu.membership().filter(|_| !rejected);
            let former = Former {
                user: Arc::clone(user),
                membership: said.map(|word| self.word(word)),
                rejected,
            };
            self.former.insert(pdu.event_id.clone(), former);
        }
    }

    /// One text for all that are alike.
    fn word(&mut self, word: &str) -> Arc<str> {
        if let Some(word) = self.words.get(word) {
            return Arc::clone(word);
        }
        let word: Arc<str> = word.into();
        self.words.insert(Arc::clone(&word));
        word
    }

    /// The waiting events that can be judged.
    fn sift(&self) -> Vec<(Arc<Pdu>, Verdict)> {
        let create = self.create.as_ref();
        let (version, room) = (self.version, &self.facts.room);
        sift::sift(version, room, &self.waiting, &self.auth, create).usable
    }

    /// These are judged, and go to the store as soon as it is free.
    fn keep(&mut self, events: Vec<(Arc<Pdu>, Verdict)>, out: &mut Outbox, now: Now) {
        self.stood_on = None;
        for (pdu, verdict) in &events {
            let id = &pdu.event_id;
            self.waiting.remove(id);
            self.ids.comes(id);
            let stood = Stood {
                pdu: Arc::clone(pdu),
                rejected: *verdict != Verdict::Accepted,
            };
            self.auth.insert(id.clone(), stood);
        }
        if self.writing.is_some() {
            self.next = Some(events);
            return;
        }
        self.number(events, out);
        self.think_at = Some(now.since_start);
    }

    /// Gets numbers for these events and their state keys, to store them.
    fn number(&mut self, judged: Vec<(Arc<Pdu>, Verdict)>, out: &mut Outbox) {
        let ids = judged.iter().map(|(pdu, _)| pdu.event_id.clone()).collect();
        let keys = judged.iter().filter_map(|(pdu, _)| key_of(pdu)).collect();
        let load = Load::Intern {
            version: self.version,
            ids,
            keys,
            new: false,
        };
        self.writing = Some(Writing::Numbering(out.load(&self.facts.room, load), judged));
    }

    fn on_numbered(
        &mut self,
        judged: Vec<(Arc<Pdu>, Verdict)>,
        nids: Vec<EventNid>,
        keys: Vec<KeyNid>,
        out: &mut Outbox,
    ) {
        for ((pdu, verdict), nid) in judged.iter().zip(&nids) {
            if let (Verdict::Accepted, Some(membership)) = (verdict, pdu.membership()) {
                let word = self.word(membership);
                Arc::make_mut(&mut self.memberships).insert(*nid, word);
            }
        }
        let mut keys = keys.into_iter();
        let events = judged.into_iter().zip(nids).map(|((pdu, verdict), nid)| {
            let key = pdu.is_state().then(|| keys.next());
            NewEvent {
                nid,
                key: key.flatten(),
                pdu,
                place: Place::Outlier,
                state: None,
                verdict,
                fan_out: FanOut::Nobody,
                transaction: None,
            }
        });
        self.store(events.collect(), out);
    }

    fn store(&mut self, mut events: VecDeque<NewEvent>, out: &mut Outbox) {
        let rest = events.split_off(self.chunk.min(events.len()));
        let chunk = events
            .iter()
            .map(|event| {
                let known = Known {
                    nid: event.nid,
                    key: event.key,
                    place: Place::Outlier,
                    rejected: event.verdict != Verdict::Accepted,
                    partial: false,
                };
                (event.pdu.clone(), known)
            })
            .collect();
        let mut writes = WriteSet::new(self.facts.room.clone(), self.version);
        writes.events = events.into();
        self.writing = Some(Writing::Storing(out.commit(writes), chunk, rest));
    }

    fn on_stored(
        &mut self,
        chunk: Vec<(Arc<Pdu>, Known)>,
        rest: VecDeque<NewEvent>,
        committed: bool,
        out: &mut Outbox,
        now: Now,
    ) -> Option<Result<Fetched, Unfetched>> {
        if !committed {
            // Another process has numbered the same events; what is stored so far stays (S-25).
            return Some(Err(unreachable("another process numbers the same events")));
        }
        for (pdu, known) in chunk {
            self.ids.store(&pdu.event_id, known);
            if is_member(&pdu) {
                self.remember(&pdu, known.rejected);
            }
        }
        if !rest.is_empty() {
            self.store(rest, out);
            return None;
        }
        if let Some(next) = self.next.take() {
            self.number(next, out);
            self.think_at = Some(now.since_start);
            return None;
        }
        self.feed(out);
        self.think_if_idle(out, now)
    }

    fn build(&self, create: Option<KeyNid>) -> Result<Fetched, Unfetched> {
        let absent = |id: &EventId| !self.ids.is_stored(id);
        if self.unvouched.iter().any(absent) {
            return Err(Unfetched::Unvouched);
        }
        // A lost answer is no hole: what is stored stays, and the source is asked again some time.
        if self.unreached.iter().any(absent) {
            return Err(unreachable("it could not be asked for all events"));
        }
        if self.sources.is_empty() {
            return Ok(self.build_events());
        }
        let built = (0..self.sources.len()).map(|source| self.map_of(source));
        let has_create = |map: &StateMap| create.is_some_and(|key| map.get(key).is_some());
        let mut built = built.filter(|(map, _)| has_create(map));
        let Some((after, holes)) = built.next() else {
            return Err(unreachable("the state has no create event of this room"));
        };
        let (disputed, more) = match built.find(|(map, _)| *map != after) {
            Some((map, more)) => (Some(map), more),
            None => (None, 0),
        };
        Ok(Fetched {
            after,
            disputed,
            holes: holes + more,
            memberships: Arc::clone(&self.memberships),
        })
    }

    /// The map after the event: the state before it, with the event itself in it (P-18), unless that is our
    /// join; and how many of its events are not to be had.
    fn map_of(&self, source: usize) -> (StateMap, usize) {
        let mut after = StateMap::new();
        let mut holes = 0;
        let before = self.ids.state_of(source).map(|(_, entry)| entry.known);
        let event = self.event.iter().map(|id| self.ids.stored(id).copied());
        for known in before.chain(event) {
            match known {
                Some(known) if known.rejected => {}
                Some(known) => {
                    if let Some(key) = known.key {
                        after.insert(key, known.nid);
                    }
                }
                None => holes += 1,
            }
        }
        (after, holes)
    }

    fn build_events(&self) -> Fetched {
        let wanted = self.ids.wanted();
        Fetched {
            after: StateMap::new(),
            disputed: None,
            holes: wanted.filter(|(_, entry)| entry.known.is_none()).count(),
            memberships: Arc::clone(&self.memberships),
        }
    }
}

/// State and auth chain of an answer.
fn ids(answer: Result<Answer, AskError>) -> Result<(Vec<EventId>, Vec<EventId>), Unfetched> {
    match answer {
        Ok(Answer::StateIds {
            pdu_ids,
            auth_chain_ids,
        }) if !pdu_ids.is_empty() && pdu_ids.len() + auth_chain_ids.len() <= IDS_MAX => {
            Ok((pdu_ids, auth_chain_ids))
        }
        Ok(Answer::StateIds { .. }) => Err(unreachable("no state, or too much of it")),
        Ok(_) => Err(unreachable("an answer of another kind")),
        Err(AskError::Refused { errcode, error, .. }) => {
            Err(Unfetched::Refused(format!("{errcode}: {error}")))
        }
        Err(AskError::Unreachable { reason }) => Err(Unfetched::Unreachable(reason)),
    }
}

const MEMBER: &str = "m.room.member";

fn is_member(pdu: &Pdu) -> bool {
    &*pdu.kind == MEMBER
}

fn key_of(pdu: &Pdu) -> Option<StateKey> {
    Some((pdu.kind.clone(), pdu.state_key.clone()?))
}

enum Thought {
    Store(Vec<(Arc<Pdu>, Verdict)>),
    AskState(usize, EventId),
    AskEvents(Vec<EventId>),
    /// Ask for these while a body arrives, and store those.
    AskAhead(Vec<EventId>, Vec<(Arc<Pdu>, Verdict)>),
    /// More is on its way.
    Wait,
    Done(Result<Fetched, Unfetched>),
}

fn unreachable(reason: &str) -> Unfetched {
    Unfetched::Unreachable(reason.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::effect::Effect;

    const NOW: Now = Now {
        since_start: Duration::ZERO,
        unix_ms: 0,
    };

    fn ids(names: &[&str]) -> Vec<EventId> {
        let ids = names.iter().map(|name| EventId::parse(name));
        ids.collect::<Result<_, _>>().unwrap()
    }

    /// Asked two donors for ids, and the first one for the state too.
    struct Asked {
        fetch: Fetch,
        out: Outbox,
        /// In the order of the donors.
        for_ids: Vec<Ticket>,
        for_state: Ticket,
    }

    fn asked_at_once() -> Asked {
        let mut out = Outbox::default();
        let room = RoomId::parse("!a:a.org").unwrap();
        let donors = ["a.org", "b.org"].map(|name| ServerName::parse(name).unwrap());
        let event = EventId::parse("$e").unwrap();
        let version = RoomVersion::V11;
        let fetch = Fetch::new(room, version, event, donors.to_vec(), true, &mut out)
            .with_state_at_once(true, &mut out);
        let mut asked = Vec::new();
        while let Some(effect) = out.next() {
            match effect {
                Effect::Ask { ticket, .. } => asked.push(ticket),
                other => panic!("{other:?}"),
            }
        }
        let [first, second, for_state] = asked[..] else {
            panic!("{asked:?}")
        };
        Asked {
            fetch,
            out,
            for_ids: vec![first, second],
            for_state,
        }
    }

    impl Asked {
        fn answer(&mut self, ticket: Ticket, answer: Result<Answer, AskError>) {
            let from = ServerName::parse("whoever.org").unwrap();
            let input = Input::Answered {
                ticket,
                from,
                answer,
            };
            assert!(self.fetch.handle(input, &mut self.out, NOW).is_none());
        }

        fn give_ids(&mut self, donor: usize) {
            let answer = Answer::StateIds {
                pdu_ids: ids(&["$a", "$b", "$c"]),
                auth_chain_ids: Vec::new(),
            };
            self.answer(self.for_ids[donor], Ok(answer));
        }

        /// Nothing is stored. Who is asked for the state then, if anybody.
        fn asks_for_state(&mut self) -> Option<ServerName> {
            while let Some(effect) = self.out.next() {
                match effect {
                    Effect::Load { ticket, .. } => {
                        let loaded = Loaded::Known(BTreeMap::new());
                        let input = Input::Loaded { ticket, loaded };
                        assert!(self.fetch.handle(input, &mut self.out, NOW).is_none());
                    }
                    Effect::Ask {
                        to,
                        ask: Ask::State { .. },
                        ..
                    } => return Some(to),
                    Effect::Ask {
                        ask: Ask::Event { .. },
                        ..
                    } => return None,
                    other => panic!("{other:?}"),
                }
            }
            None
        }
    }

    #[test]
    fn p17_who_is_giving_the_state_is_not_asked_twice() {
        let mut asked = asked_at_once();
        asked.give_ids(0);
        assert_eq!(asked.asks_for_state(), None);
        // Nothing came: what is missing is asked for by itself.
        asked.answer(asked.for_state, Ok(Answer::State));
        assert_eq!(asked.asks_for_state(), None);
    }

    #[test]
    fn s21_who_is_silent_is_not_waited_for_when_another_gives_ids() {
        let mut asked = asked_at_once();
        asked.give_ids(1);
        assert_eq!(asked.asks_for_state().unwrap().as_str(), "b.org");
    }

    #[test]
    fn a_state_that_comes_goes_on_coming_when_another_gives_ids() {
        let mut asked = asked_at_once();
        asked.give_ids(0);
        assert_eq!(asked.asks_for_state(), None);
        asked.give_ids(1);
        assert_eq!(asked.asks_for_state(), None);
        assert!(asked.fetch.is_body(asked.for_state));
    }

    #[test]
    fn s21_who_has_no_ids_is_not_waited_for_with_its_state() {
        let mut asked = asked_at_once();
        let reason = "gone".to_owned();
        asked.answer(asked.for_ids[0], Err(AskError::Unreachable { reason }));
        asked.give_ids(1);
        assert_eq!(asked.asks_for_state().unwrap().as_str(), "b.org");
    }
}
