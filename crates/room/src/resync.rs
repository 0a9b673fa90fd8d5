//! From partial to full: a reconciler that works from the rows and never from memory (joins.md part 4).
//!
//! Each round loads what is partial, fetches the state at prev events that are not here, judges events
//! again on full state, and commits. It can stop anywhere: the next run sees what is left.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use protocol::id::{EventId, RoomId, ServerName};
use protocol::nid::EventNid;
use protocol::room_version::RoomVersion;
use protocol::state::StateMap;

use crate::chance::Chance;
use crate::effect::{
    Effect, Extremity, Head, Input, Load, Loaded, Machine, Now, PartialMarker, ReadyEvent, StateAt,
    Step, StoredEvent, Tell, Ticket,
};
use crate::facts::{self, Facts, Got, both};
use crate::fetch::{CHUNK, Fetch, Fetched, Unfetched};
use crate::judge;
use crate::outbox::Outbox;
use crate::rest::Rest;
use crate::template::Own;
use crate::write::{EventState, Memberships, PartialChange, Rejudged, Verdict, WriteSet};

/// Events judged in one commit: long linear histories must not cost a commit each (O-55).
const BATCH: u32 = 100;
/// Servers that may be asked; more would not know more.
const SOURCES_MAX: usize = 50;
/// After all have failed: this long, then twice that, and so on (S-22).
const REST_MIN: Duration = Duration::from_secs(5);
const REST_MAX: Duration = Duration::from_secs(3600);
/// Rounds in which events without a key are waited for when no notary can be asked; one notary that is never
/// there must not keep a room partial for ever (S-6a).
const UNVOUCHED_ROUNDS_MAX: u32 = 3;
/// With fewer state events here than this, nearly all of a large room's state will be missing, and is asked for
/// at once.
const LITTLE_STORED: u64 = 1000;
/// With so many servers in it a room is large, and working out the ids of its state takes long.
const MANY_SERVERS: usize = 50;
/// Servers whose keys are asked for before an event of theirs is here: whom a resident names need not exist.
const KEYS_AHEAD_MAX: usize = 10_000;
/// While a handshake of ours runs the marker must stay (S-12a).
const HANDSHAKE_REST: Duration = Duration::from_millis(500);
/// After this long with nobody of ours in the room a partial room is given up (S-29).
const ABANDON_AFTER: Duration = Duration::from_secs(24 * 3600);
/// Rounds of judging dependents again (S-18); each round is at least one event deeper.
const DEPENDENT_ROUNDS_MAX: usize = 100;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resynced {
    /// The room is full.
    Full,
    /// Nobody of ours is in the room and nobody tells us of it; all that was partial is dropped (S-29).
    Freed,
    /// The room is not here any more (S-33).
    Gone,
}

#[derive(Clone, Copy, Debug)]
pub struct ResyncOptions {
    /// Ask two servers for the ids of a state, and compare (O-46).
    pub compare_donors: bool,
    /// Events of one commit.
    pub chunk: usize,
    /// From so many servers in the room on, its state is asked for along with the ids of it.
    pub state_at_once_from: usize,
}

impl Default for ResyncOptions {
    fn default() -> Self {
        Self {
            compare_donors: true,
            chunk: CHUNK,
            state_at_once_from: MANY_SERVERS,
        }
    }
}

pub struct Resync {
    own: Own,
    options: ResyncOptions,
    room: RoomId,
    chance: Chance,
    state: State,
    facts: Facts,
    /// States after unknown prev events, as far as fetched. In memory only: their events are stored.
    fetched: BTreeMap<EventId, Fetched>,
    /// What the answer to a join gave, and is to be stored instead of asking for a state.
    given: Option<Box<Rest>>,
    /// The state before a join, out of the answer to it.
    answered: BTreeMap<EventId, Fetched>,
    /// What the member events say that were stored so far.
    memberships: Arc<Memberships>,
    /// Who is still to be asked in this round.
    sources: Vec<ServerName>,
    round: Option<Round>,
    rounds_failed: u32,
    /// Whether the keys were asked for with which the members' servers signed.
    keys_wanted: bool,
    /// To be asked before all others.
    preferred: Option<ServerName>,
    nobody_since: Option<Duration>,
    out: Outbox,
    outcome: Option<Resynced>,
}

enum State {
    Thinking,
    Fetching(Box<Fetch>, Goal),
    Storing(Ticket, Stored),
    Resting(Duration),
    /// Looking up the hosts for another round.
    Rounding(Ticket, EventId),
    Done,
}

/// Which state is being fetched.
enum Goal {
    /// That after this event, which is not here.
    After(EventId),
    /// That before this join of ours.
    Before(EventId),
}

/// What the running commit means.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stored {
    Judged,
    Full,
    Freed,
}

/// One round over the servers.
#[derive(Default)]
struct Round {
    refused: bool,
    unreachable: bool,
    last: String,
}

impl Resync {
    pub fn new(own: Own, room: RoomId, options: ResyncOptions, seed: u64, now: Now) -> Self {
        let mut this = Self {
            own,
            options,
            chance: Chance::new(seed),
            state: State::Thinking,
            facts: Facts::new(room.clone()),
            room,
            fetched: BTreeMap::new(),
            memberships: Arc::default(),
            given: None,
            answered: BTreeMap::new(),
            sources: Vec::new(),
            round: None,
            rounds_failed: 0,
            keys_wanted: false,
            preferred: None,
            nobody_since: None,
            out: Outbox::default(),
            outcome: None,
        };
        this.think(now);
        this
    }

    /// A join's answer has more than was stored at once, so nobody need be asked.
    pub fn take(&mut self, rest: Box<Rest>, now: Now) {
        self.given = Some(rest);
        self.retry(now);
    }

    /// Somebody knows a server that may do better: it is asked next, instead of whoever is being asked or
    /// waited for (O-48).
    pub fn use_server(&mut self, server: ServerName, now: Now) {
        if server == self.own.name {
            return;
        }
        self.preferred = Some(server);
        if matches!(self.state, State::Resting(_) | State::Fetching(..)) {
            self.rounds_failed = 0;
            self.begin_again(now);
        }
    }

    /// Somebody asks for another try at once (O-48).
    pub fn retry(&mut self, now: Now) {
        if matches!(self.state, State::Resting(_)) {
            self.rounds_failed = 0;
            self.begin_again(now);
        }
    }
}

impl Machine for Resync {
    type Outcome = Resynced;

    fn handle(&mut self, input: Input, now: Now) {
        let state = std::mem::replace(&mut self.state, State::Done);
        match (state, input) {
            (State::Thinking, Input::Loaded { ticket, loaded }) => {
                self.state = State::Thinking;
                if self.facts.hear(ticket, loaded) {
                    self.think(now);
                }
            }
            (State::Fetching(mut fetch, goal), input) => {
                let before = fetch.progress();
                match (fetch.handle(input, &mut self.out, now), goal) {
                    (None, goal) => {
                        if fetch.progress() != before {
                            self.tell_progress(&fetch);
                        }
                        self.state = State::Fetching(fetch, goal);
                    }
                    (Some(fetched), Goal::After(event)) => {
                        self.on_fetched(event, fetch, fetched, now);
                    }
                    (Some(fetched), Goal::Before(join)) => {
                        self.on_taken(join, &fetch, fetched, now);
                    }
                }
            }
            (State::Rounding(t, event), Input::Loaded { ticket, loaded }) if t == ticket => {
                self.on_hosts(event, loaded, now);
            }
            (State::Storing(t, stored), Input::Committed { ticket, outcome }) if t == ticket => {
                self.on_stored(stored, outcome.is_ok(), now);
            }
            (State::Resting(until), Input::Woke) if now.since_start >= until => {
                self.begin_again(now);
            }
            (state, _late_or_double) => self.state = state,
        }
    }

    fn poll_effect(&mut self) -> Option<Effect> {
        self.out.next()
    }

    fn wants_parts(&self) -> bool {
        match &self.state {
            State::Fetching(fetch, _) => fetch.wants_parts(),
            _ => true,
        }
    }

    fn deadline(&self) -> Option<Duration> {
        match self.state {
            State::Resting(until) => Some(until),
            State::Fetching(ref fetch, _) => fetch.deadline(),
            _ => None,
        }
    }

    fn poll_outcome(&mut self) -> Option<Self::Outcome> {
        self.outcome.take()
    }
}

// -- what to do next ------------------------------------------------------------------------------

enum Plan {
    Gone,
    AlreadyFull,
    /// The state after this event is needed.
    Fetch(Arc<Head>, EventId),
    /// What the answer to our join gave is needed.
    Take(Arc<Head>),
    Commit(Box<WriteSet>, Stored),
    /// A handshake of ours runs, so the marker stays for now; or a prev event turned partial meanwhile.
    Wait,
}

impl Resync {
    fn begin_again(&mut self, now: Now) {
        self.facts.forget();
        self.round = None;
        self.think(now);
    }

    fn think(&mut self, now: Now) {
        self.state = State::Thinking;
        let here = Here {
            fetched: &self.fetched,
            answered: &self.answered,
            given: self.given.as_deref(),
        };
        match plan(&mut self.facts, &here) {
            Err(lacking) => self.facts.request(lacking, &mut self.out),
            Ok(Plan::Gone) => self.done(Resynced::Gone),
            Ok(Plan::AlreadyFull) => self.done(Resynced::Full),
            Ok(Plan::Commit(mut writes, stored)) => {
                writes.memberships = Arc::clone(&self.memberships);
                self.state = State::Storing(self.out.commit(*writes), stored);
            }
            Ok(Plan::Wait) => self.state = State::Resting(now.since_start + HANDSHAKE_REST),
            Ok(Plan::Fetch(head, event)) => self.fetch(&head, event, now),
            Ok(Plan::Take(head)) => self.take_given(&head, now),
        }
    }

    fn done(&mut self, outcome: Resynced) {
        self.state = State::Done;
        if outcome == Resynced::Full {
            self.tell(Step::Full);
        }
        self.outcome = Some(outcome);
    }

    fn tell(&mut self, step: Step) {
        self.out.tell(Tell::Progress {
            room: self.room.clone(),
            step,
        });
    }

    fn tell_progress(&mut self, fetch: &Fetch) {
        let (have, want) = fetch.progress();
        self.tell(Step::Resyncing {
            from: fetch.source().clone(),
            have,
            want,
        });
    }

    fn on_stored(&mut self, stored: Stored, committed: bool, now: Now) {
        match (stored, committed) {
            (Stored::Full, true) => self.done(Resynced::Full),
            (Stored::Freed, true) => self.done(Resynced::Freed),
            // Stored, or the room has moved on meanwhile: either way the rows say what is next.
            (Stored::Judged, _) | (_, false) => self.begin_again(now),
        }
    }
}

// -- fetching -------------------------------------------------------------------------------------

impl Resync {
    /// Asks the next source of this round, beginning a round if there is none.
    fn fetch(&mut self, head: &Head, event: EventId, now: Now) {
        if self.round.is_none() {
            self.begin_round(head, event, now);
            return;
        }
        let Some(marker) = &head.partial else {
            return self.done(Resynced::Full);
        };
        if self.sources.is_empty() {
            // Nobody is in the room, and nobody is on the way.
            let nobody = head.local_joined.is_empty() && !head.handshake_running;
            return self.end_round(nobody, head.version, now);
        }
        let source = self.sources.remove(0);
        let donors = self.donors(&source, marker);
        let room = self.room.clone();
        let compare = self.options.compare_donors;
        let (version, wanted) = (head.version, event.clone());
        // Each of them has a member, and so an event in what is asked for below.
        if !std::mem::replace(&mut self.keys_wanted, true) {
            let servers = marker.servers_in_room.iter().take(KEYS_AHEAD_MAX);
            let servers = servers.cloned().collect();
            self.out.tell(Tell::PrefetchKeys { servers });
        }
        let large = marker.servers_in_room.len() >= self.options.state_at_once_from;
        let little = matches!(self.facts.state_stored(), Ok(stored) if stored < LITTLE_STORED);
        let fetch = Fetch::new(room, version, wanted, donors, compare, &mut self.out)
            .with_state_at_once(large && little, &mut self.out)
            .in_chunks_of(self.options.chunk)
            .patiently(self.rounds_failed < UNVOUCHED_ROUNDS_MAX);
        self.state = State::Fetching(Box::new(fetch), Goal::After(event));
        self.tell(Step::Resyncing {
            from: source,
            have: 0,
            want: 0,
        });
    }

    fn donors(&self, first: &ServerName, marker: &PartialMarker) -> Vec<ServerName> {
        let mut seen = BTreeSet::new();
        std::iter::once(first)
            .chain(&self.sources)
            .chain([&marker.joined_via])
            .chain(&marker.servers_in_room)
            .filter(|server| **server != self.own.name && seen.insert((*server).clone()))
            .take(SOURCES_MAX)
            .cloned()
            .collect()
    }

    fn take_given(&mut self, head: &Head, now: Now) {
        let (Some(rest), Some(marker)) = (self.given.take(), &head.partial) else {
            return self.begin_again(now);
        };
        let donors = self.donors(&rest.from, marker);
        let (room, version) = (self.room.clone(), head.version);
        let (join, from) = (rest.join.clone(), rest.from.clone());
        let fetch = Fetch::given(room, version, *rest, donors, &mut self.out, now)
            .in_chunks_of(self.options.chunk)
            .patiently(true);
        self.state = State::Fetching(Box::new(fetch), Goal::Before(join));
        self.tell(Step::Resyncing {
            from,
            have: 0,
            want: 0,
        });
    }

    fn learn(&mut self, fetched: &Fetched) {
        match self.memberships.is_empty() {
            true => self.memberships = Arc::clone(&fetched.memberships),
            false => {
                let more = fetched.memberships.iter();
                let more = more.map(|(nid, membership)| (*nid, Arc::clone(membership)));
                Arc::make_mut(&mut self.memberships).extend(more);
            }
        }
    }

    /// If it can not be used after all, the state is asked for as ever.
    fn on_taken(
        &mut self,
        join: EventId,
        fetch: &Fetch,
        taken: Result<Fetched, Unfetched>,
        now: Now,
    ) {
        let server = fetch.source().clone();
        match taken {
            Ok(taken) => {
                self.learn(&taken);
                self.answered.insert(join, taken);
            }
            Err(Unfetched::Refused(reason) | Unfetched::Unreachable(reason)) => {
                self.tell(Step::Failed { server, reason });
            }
            Err(Unfetched::Unvouched) => {
                let reason = "no notary can be asked for the keys of some events".to_owned();
                self.tell(Step::Failed { server, reason });
            }
        }
        self.facts.forget();
        self.think(now);
    }

    /// Servers learnt since the join are asked too, after those of the join (S-20, S-22).
    fn begin_round(&mut self, head: &Head, event: EventId, now: Now) {
        match head.local_joined.is_empty() {
            true => _ = self.nobody_since.get_or_insert(now.since_start),
            false => self.nobody_since = None,
        }
        let ticket = self.out.load(&self.room, Load::Hosts);
        self.state = State::Rounding(ticket, event);
    }

    fn on_hosts(&mut self, event: EventId, loaded: Loaded, now: Now) {
        let hosts = match loaded {
            Loaded::Hosts(hosts) => hosts,
            _ => Vec::new(),
        };
        let Ok(Some(head)) = self.facts.head() else {
            return self.begin_again(now);
        };
        let Some(marker) = &head.partial else {
            return self.done(Resynced::Full);
        };
        let mut seen = BTreeSet::new();
        self.sources = self
            .preferred
            .iter()
            .chain([&marker.joined_via])
            .chain(&marker.servers_in_room)
            .chain(&hosts)
            .filter(|server| **server != self.own.name && seen.insert((*server).clone()))
            .take(SOURCES_MAX)
            .cloned()
            .collect();
        self.round = Some(Round::default());
        self.fetch(&head, event, now);
    }

    fn on_fetched(
        &mut self,
        event: EventId,
        fetch: Box<Fetch>,
        fetched: Result<Fetched, Unfetched>,
        now: Now,
    ) {
        let source = fetch.source().clone();
        for (server, failure) in fetch.failures() {
            self.sources.retain(|other| other != server);
            self.note(server, failure.clone());
        }
        match fetched {
            Ok(fetched) => {
                self.tell_progress(&fetch);
                if let Some(other) = &fetched.disputed {
                    let differ = fetched.after.diff(other).len();
                    self.tell(Step::Failed {
                        server: source.clone(),
                        reason: format!(
                            "another server gives another state, in {differ} entries; both count"
                        ),
                    });
                }
                self.learn(&fetched);
                self.fetched.insert(event, fetched);
                self.rounds_failed = 0;
                // Who has served well is asked first for the next event too (S-20).
                self.sources.retain(|other| *other != source);
                self.sources.insert(0, source);
            }
            // All others have the same events, whoever of them was asked already.
            Err(Unfetched::Unvouched) => self.note(&source, Unfetched::Unvouched),
            Err(failure) if fetch.failures().is_empty() => self.note(&source, failure),
            Err(_) => {}
        }
        self.facts.forget();
        self.think(now);
    }

    fn note(&mut self, source: &ServerName, failure: Unfetched) {
        let round = self.round.get_or_insert_with(Round::default);
        let reason = match failure {
            Unfetched::Refused(reason) => {
                round.refused = true;
                reason
            }
            Unfetched::Unreachable(reason) => {
                round.unreachable = true;
                reason
            }
            Unfetched::Unvouched => {
                round.unreachable = true;
                // The others have the same events.
                self.sources.clear();
                "no notary can be asked for the keys of some events".to_owned()
            }
        };
        round.last = format!("{source}: {reason}");
    }

    /// All have failed: rest and try again, for as long as one of ours is in the room (S-22). When nobody
    /// is, and all that can be reached refuse, or a day has passed, the room is let go (S-29).
    fn end_round(&mut self, nobody: bool, version: RoomVersion, now: Now) {
        let round = self.round.take().unwrap_or_default();
        let all_refuse = round.refused && !round.unreachable;
        let since = self.nobody_since.unwrap_or(now.since_start);
        if nobody && (all_refuse || now.since_start >= since + ABANDON_AFTER) {
            let mut writes = WriteSet::new(self.room.clone(), version);
            writes.partial = PartialChange::Free;
            writes.expect = self.facts.head().ok().flatten().map(|head| head.revision);
            self.state = State::Storing(self.out.commit(writes), Stored::Freed);
            return;
        }
        let doubled = REST_MIN.saturating_mul(1 << self.rounds_failed.min(10));
        let rest = self.chance.jitter(doubled.min(REST_MAX));
        self.rounds_failed += 1;
        self.tell(Step::Retrying {
            reason: round.last,
            in_ms: u64::try_from(rest.as_millis()).unwrap_or(u64::MAX),
        });
        self.state = State::Resting(now.since_start + rest);
    }
}

// -- judging --------------------------------------------------------------------------------------

/// The states that are here.
struct Here<'a> {
    fetched: &'a BTreeMap<EventId, Fetched>,
    answered: &'a BTreeMap<EventId, Fetched>,
    given: Option<&'a Rest>,
}

/// Looks at the rows and says what is next.
fn plan(facts: &mut Facts, here: &Here) -> Got<Plan> {
    let (head, ready) = both(facts.head(), facts.ready_partial(BATCH))?;
    let Some(head) = head else {
        return Ok(Plan::Gone);
    };
    if head.partial.is_none() {
        return Ok(Plan::AlreadyFull);
    }
    let mut batch = Batch::default();
    for event in &ready {
        let unfetched = |id: &&EventId| !here.fetched.contains_key(*id);
        let answered = here.answered.contains_key(&event.pdu.event_id);
        if !answered && let Some(wanted) = event.unknown_prevs.iter().find(unfetched) {
            if batch.rejudged.is_empty() {
                return Ok(match here.given {
                    Some(rest) if rest.join == event.pdu.event_id => Plan::Take(head),
                    _ => {
                        // Who is asked for what depends on it.
                        facts.state_stored()?;
                        Plan::Fetch(head, wanted.clone())
                    }
                });
            }
            batch.cut_short = true;
            break;
        }
        if !batch.judge(facts, &head, event, here)? {
            batch.cut_short = true;
            break;
        }
    }
    if batch.rejudged.is_empty() && (head.handshake_running || batch.cut_short) {
        return Ok(Plan::Wait);
    }
    batch.judge_dependents(facts, &head)?;
    let last = !batch.cut_short && ready.len() < BATCH as usize && !head.handshake_running;
    let writes = batch.writes(facts, &head, last)?;
    let stored = match last {
        true => Stored::Full,
        false => Stored::Judged,
    };
    Ok(Plan::Commit(Box::new(writes), stored))
}

/// Events judged again, to be committed together.
#[derive(Default)]
struct Batch {
    rejudged: Vec<Rejudged>,
    events: BTreeMap<EventNid, Judged>,
    /// Those whose verdict changed.
    flipped: BTreeSet<EventNid>,
    cut_short: bool,
}

struct Judged {
    known_prevs: Vec<EventNid>,
    accepted: bool,
}

impl Batch {
    /// S-8: checks 4 and 5 on full state. `false` when a prev event is partial after all (S-10).
    fn judge(
        &mut self,
        facts: &mut Facts,
        head: &Head,
        event: &ReadyEvent,
        here: &Here,
    ) -> Got<bool> {
        if let Some(answered) = here.answered.get(&event.pdu.event_id) {
            let before = facts.resolve(head.version, answered.maps().collect())?;
            self.settle(facts, head, event, before)?;
            return Ok(true);
        }
        let prevs = facts.states(&event.known_prevs)?;
        let partial = prevs.iter().zip(&event.known_prevs).any(|(at, nid)| {
            !self.events.contains_key(nid) && at.as_ref().is_none_or(|at| at.partial)
        });
        if partial {
            return Ok(false);
        }
        let mut maps: Vec<_> = prevs.into_iter().flatten().map(|at| at.after).collect();
        let unknown = event.unknown_prevs.iter();
        maps.extend(
            unknown
                .filter_map(|id| here.fetched.get(id))
                .flat_map(Fetched::maps),
        );
        let before = facts.resolve(head.version, maps)?;
        self.settle(facts, head, event, before)?;
        Ok(true)
    }

    fn settle(
        &mut self,
        facts: &mut Facts,
        head: &Head,
        event: &ReadyEvent,
        before: StateMap,
    ) -> Got<()> {
        let verdict = judge_again(facts, head, event, &before)?;
        let accepted = !matches!(verdict, Verdict::Rejected(_));
        if accepted == event.rejected {
            self.flipped.insert(event.nid);
        }
        let after = facts::after(&before, event.key, event.nid, accepted);
        let auth_events = event.pdu.auth_events.iter();
        let stored = StoredEvent {
            pdu: event.pdu.clone(),
            auth_events: auth_events.filter_map(|id| facts.nid(id)).collect(),
            rejected: !accepted,
        };
        facts.add_own(event.nid, stored);
        let at = StateAt {
            before: before.clone(),
            after: after.clone(),
            partial: false,
        };
        facts.add_own_state(event.nid, at);
        let judged = Judged {
            known_prevs: event.known_prevs.clone(),
            accepted: verdict == Verdict::Accepted,
        };
        self.events.insert(event.nid, judged);
        self.rejudged.push(Rejudged {
            nid: event.nid,
            event_id: event.pdu.event_id.clone(),
            key: event.key,
            state: EventState {
                before,
                after,
                partial: false,
            },
            verdict,
        });
        Ok(())
    }

    /// S-18: full events that stand on one whose verdict changed.
    fn judge_dependents(&mut self, facts: &mut Facts, head: &Head) -> Got<()> {
        let mut flipped: Vec<_> = self.flipped.iter().copied().collect();
        for _ in 0..DEPENDENT_ROUNDS_MAX {
            if flipped.is_empty() {
                break;
            }
            let mut dependents = facts.auth_dependents(flipped)?;
            dependents.retain(|event| !self.events.contains_key(&event.nid));
            let before_these = self.flipped.clone();
            for event in &dependents {
                let states = facts.states(&[event.nid])?;
                if let Some(at) = states.into_iter().next().flatten() {
                    self.settle(facts, head, event, at.before)?;
                }
            }
            flipped = self.flipped.difference(&before_these).copied().collect();
        }
        Ok(())
    }

    fn writes(mut self, facts: &mut Facts, head: &Head, last: bool) -> Got<WriteSet> {
        let extremities = self.extremities(facts, head)?;
        let mut writes = WriteSet::new(facts.room.clone(), head.version);
        writes.expect = Some(head.revision);
        writes.rejudged = std::mem::take(&mut self.rejudged);
        if last {
            writes.partial = PartialChange::Clear;
        }
        if !head.local_joined.is_empty() {
            let nids: Vec<_> = extremities.iter().map(|e| e.nid).collect();
            let states = facts.states(&nids)?;
            let maps = states.into_iter().flatten().map(|at| at.after).collect();
            writes.current_state = Some(facts.resolve(head.version, maps)?);
        }
        // With nobody of ours there no state is published (S-17).
        writes.forward_extremities = Some(extremities);
        Ok(writes)
    }

    /// S-19: rejected ones go, and what they stood on comes back; accepted ones without a successor come.
    fn extremities(&self, facts: &Facts, head: &Head) -> Got<Vec<Extremity>> {
        let mut extremities = head.forward_extremities.clone();
        for extremity in &mut extremities {
            extremity.partial &= !self.events.contains_key(&extremity.nid);
        }
        let rejected = |nid: &EventNid| self.events.get(nid).is_some_and(|e| !e.accepted);
        let flipped: Vec<_> = self.flipped.iter().copied().collect();
        if flipped.is_empty() {
            return Ok(extremities);
        }
        extremities.retain(|extremity| !rejected(&extremity.nid));
        let mut candidates: BTreeSet<EventNid> = flipped.iter().copied().collect();
        for nid in &flipped {
            candidates.extend(&self.events[nid].known_prevs);
        }
        candidates.retain(|nid| !rejected(nid) && extremities.iter().all(|e| e.nid != *nid));
        let candidates: Vec<_> = candidates.into_iter().collect();
        let (children, states) = both(facts.children(&candidates), facts.states(&candidates))?;
        let mut came_back = Vec::new();
        for ((nid, children), state) in candidates.into_iter().zip(children).zip(states) {
            let succeeded = children
                .iter()
                .any(|child| match self.events.get(&child.nid) {
                    Some(judged) => judged.accepted,
                    None => !child.rejected && !child.soft_failed,
                });
            if !succeeded {
                came_back.push((nid, state.is_some_and(|at| at.partial)));
            }
        }
        let nids: Vec<_> = came_back.iter().map(|(nid, _)| *nid).collect();
        for ((nid, partial), pdu) in came_back.into_iter().zip(facts.pdus(&nids)?) {
            extremities.push(Extremity {
                nid,
                event_id: pdu.event_id.clone(),
                depth: pdu.depth,
                partial,
            });
        }
        Ok(match extremities.is_empty() {
            // All that is left was rejected; a room needs an end to go on from.
            true => head.forward_extremities.clone(),
            false => extremities,
        })
    }
}

/// Checks 4 and 5. An event that was soft-failed for other reasons stays so.
fn judge_again(
    facts: &mut Facts,
    head: &Head,
    event: &ReadyEvent,
    before: &StateMap,
) -> Got<Verdict> {
    let verdict = judge::on_full_state(facts, head.version, &event.pdu, before)?;
    Ok(match verdict {
        Some(Verdict::Accepted) if event.soft_failed => {
            Verdict::SoftFailed("soft-failed before".to_owned())
        }
        Some(verdict) => verdict,
        None => Verdict::Rejected("an auth event is not here".to_owned()),
    })
}
