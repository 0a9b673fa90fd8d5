//! History from before what we hold: asked of the room's servers in turn (joins.md C-16, F-17).
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#backfilling-and-retrieving-missing-events>

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use protocol::id::{EventId, RoomId, ServerName};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::state::StateMap;

use crate::candidates;
use crate::effect::{
    Answer, Ask, AskError, BadPdu, Effect, Input, Load, Loaded, Machine, Now, Place, StateAt,
    StoredEvent, Ticket,
};
use crate::facts::{Facts, Got, both};
use crate::fetch::{Fetch, Fetched};
use crate::judge;
use crate::outbox::Outbox;
use crate::template::Own;
use crate::view::{Placed, split_prevs};
use crate::write::{FanOut, Verdict, WriteSet};

const TIMEOUT: Duration = Duration::from_secs(60);
/// Events asked for, and taken, in one backfill.
pub const EVENTS_MAX: u32 = 100;
/// Backward extremities named in one request.
const FROM_MAX: usize = 5;
/// Servers asked before the history is given up for this time.
const SERVERS_MAX: usize = 5;
/// States fetched for one backfill, for events whose prev events nobody gave.
const FETCHES_MAX: usize = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backfilled {
    /// Events that are in the timeline and were not before.
    pub events: usize,
    /// Nothing is missing any more: the room's beginning is here.
    pub complete: bool,
}

/// Fetches some history. Ends with nothing when no server has any to give.
pub struct Backfill {
    own: Own,
    room: RoomId,
    at: Option<(EventId, ServerName)>,
    limit: u32,
    state: State,
    facts: Facts,
    servers: VecDeque<ServerName>,
    from: Vec<EventId>,
    version: Option<RoomVersion>,
    out: Outbox,
    outcome: Option<Backfilled>,
}

enum State {
    Opening(Option<Vec<(EventId, i64)>>, Ticket),
    Asking(Ticket, ServerName),
    Checking(Ticket, ServerName),
    Placing(Box<Page>, Wait),
    Done,
}

/// The good events of one answer.
struct Page {
    server: ServerName,
    pdus: BTreeMap<EventId, Arc<Pdu>>,
    fetched: BTreeMap<EventId, Fetched>,
    /// Prev events whose state is not to be had, or not worth more requests.
    hopeless: BTreeSet<EventId>,
    asked_for_auth_events: bool,
}

enum Wait {
    Facts,
    State(Box<Fetch>, EventId),
    AuthEvents(Box<Fetch>),
    Stored(Ticket, usize),
}

impl Backfill {
    /// From the oldest events that we hold.
    pub fn new(own: Own, room: RoomId, limit: u32, now: Now) -> Self {
        Self::begin(own, room, None, limit, now)
    }

    /// At an event that this server told us of, somewhere in the history that we do not hold (C-17).
    pub fn at(own: Own, room: RoomId, at: (EventId, ServerName), limit: u32, now: Now) -> Self {
        Self::begin(own, room, Some(at), limit, now)
    }

    fn begin(
        own: Own,
        room: RoomId,
        at: Option<(EventId, ServerName)>,
        limit: u32,
        now: Now,
    ) -> Self {
        let mut this = Self {
            own,
            at,
            limit: limit.clamp(1, EVENTS_MAX),
            state: State::Done,
            facts: Facts::new(room.clone()),
            servers: VecDeque::new(),
            from: Vec::new(),
            version: None,
            out: Outbox::default(),
            outcome: None,
            room,
        };
        let ticket = this.out.load(&this.room, Load::BackwardExtremities);
        this.state = this.open(None, ticket, now);
        this
    }

    fn open(&mut self, missing: Option<Vec<(EventId, i64)>>, ticket: Ticket, now: Now) -> State {
        let (head, hosts) = match both(self.facts.head(), self.facts.hosts()) {
            Ok(known) => known,
            Err(lacking) => {
                if !self.facts.is_waiting() {
                    self.facts.request(lacking, &mut self.out);
                }
                return State::Opening(missing, ticket);
            }
        };
        let Some(missing) = missing else {
            return State::Opening(None, ticket);
        };
        let Some(head) = head.filter(|_| !missing.is_empty()) else {
            return self.done(0, missing.is_empty());
        };
        self.version = Some(head.version);
        if let Some((event, server)) = self.at.take() {
            self.from = vec![event];
            self.servers = VecDeque::from([server]);
            return self.ask_next(now);
        }
        let marker = head.partial.iter();
        let of_join = marker.flat_map(|m| std::iter::once(&m.joined_via).chain(&m.servers_in_room));
        let mut servers = candidates::order(of_join.chain(&hosts), &self.own.name);
        servers.truncate(SERVERS_MAX);
        self.servers = servers.into();
        self.from = missing
            .into_iter()
            .take(FROM_MAX)
            .map(|(id, _)| id)
            .collect();
        self.ask_next(now)
    }

    fn ask_next(&mut self, _: Now) -> State {
        let Some(server) = self.servers.pop_front() else {
            return self.done(0, false);
        };
        let ask = Ask::Backfill {
            room: self.room.clone(),
            from: self.from.clone(),
            limit: self.limit,
        };
        let ticket = self.out.ask(&server, ask, TIMEOUT);
        State::Asking(ticket, server)
    }

    fn on_answer(
        &mut self,
        server: ServerName,
        answer: Result<Answer, AskError>,
        now: Now,
    ) -> State {
        match (answer, self.version) {
            (Ok(Answer::Pdus(mut pdus)), Some(version)) if !pdus.is_empty() => {
                pdus.truncate(self.limit as usize);
                State::Checking(self.out.check(version, pdus), server)
            }
            _ => self.ask_next(now),
        }
    }

    fn on_checked(
        &mut self,
        server: ServerName,
        pdus: Vec<Result<Arc<Pdu>, BadPdu>>,
        now: Now,
    ) -> State {
        let good = pdus
            .into_iter()
            .flatten()
            .filter(|pdu| pdu.room_id == self.room);
        let page = Page {
            pdus: good.map(|pdu| (pdu.event_id.clone(), pdu)).collect(),
            server,
            fetched: BTreeMap::new(),
            hopeless: BTreeSet::new(),
            asked_for_auth_events: false,
        };
        self.facts.forget();
        self.place(Box::new(page), now)
    }

    fn place(&mut self, mut page: Box<Page>, now: Now) -> State {
        let Some(version) = self.version else {
            return self.done(0, false);
        };
        let placing = match page.place(&mut self.facts, version) {
            Ok(placing) => placing,
            Err(lacking) => {
                self.facts.request(lacking, &mut self.out);
                return State::Placing(page, Wait::Facts);
            }
        };
        let donors = vec![page.server.clone()];
        let room = self.room.clone();
        match placing {
            // It has nothing that we can use; another one may.
            Placing::Commit(writes) if writes.events.is_empty() => self.ask_next(now),
            Placing::Commit(writes) => {
                let count = writes.events.len();
                let ticket = self.out.commit(*writes);
                State::Placing(page, Wait::Stored(ticket, count))
            }
            Placing::FetchState(event) => {
                let fetch = Fetch::new(room, version, event.clone(), donors, false, &mut self.out);
                State::Placing(page, Wait::State(Box::new(fetch), event))
            }
            Placing::FetchAuthEvents(wanted) => {
                page.asked_for_auth_events = true;
                let fetch = Fetch::auth_events(room, version, wanted, donors, &mut self.out, now);
                State::Placing(page, Wait::AuthEvents(Box::new(fetch)))
            }
        }
    }

    fn on_input(&mut self, mut page: Box<Page>, wait: Wait, input: Input, now: Now) -> State {
        let wait = match (wait, input) {
            (Wait::Facts, Input::Loaded { ticket, loaded }) => {
                match self.facts.hear(ticket, loaded) {
                    true => return self.place(page, now),
                    false => Wait::Facts,
                }
            }
            (Wait::State(mut fetch, event), input) => {
                match fetch.handle(input, &mut self.out, now) {
                    None => Wait::State(fetch, event),
                    Some(fetched) => {
                        match fetched {
                            Ok(fetched) => _ = page.fetched.insert(event, fetched),
                            Err(_) => _ = page.hopeless.insert(event),
                        }
                        self.facts.forget();
                        return self.place(page, now);
                    }
                }
            }
            (Wait::AuthEvents(mut fetch), input) => match fetch.handle(input, &mut self.out, now) {
                None => Wait::AuthEvents(fetch),
                Some(_) => {
                    self.facts.forget();
                    return self.place(page, now);
                }
            },
            (Wait::Stored(t, count), Input::Committed { ticket, outcome }) if t == ticket => {
                match outcome {
                    Ok(()) => return self.done(count, false),
                    Err(_) => {
                        self.facts.forget();
                        return self.place(page, now);
                    }
                }
            }
            (wait, _late_or_double) => wait,
        };
        State::Placing(page, wait)
    }

    fn done(&mut self, events: usize, complete: bool) -> State {
        self.outcome = Some(Backfilled { events, complete });
        State::Done
    }
}

impl Machine for Backfill {
    type Outcome = Backfilled;

    fn handle(&mut self, input: Input, now: Now) {
        self.state = match (std::mem::replace(&mut self.state, State::Done), input) {
            (State::Opening(None, t), Input::Loaded { ticket, loaded }) if t == ticket => {
                let missing = match loaded {
                    Loaded::BackwardExtremities(missing) => missing,
                    _ => Vec::new(),
                };
                self.open(Some(missing), t, now)
            }
            (State::Opening(missing, t), Input::Loaded { ticket, loaded }) => {
                match self.facts.hear(ticket, loaded) {
                    true => self.open(missing, t, now),
                    false => State::Opening(missing, t),
                }
            }
            (State::Asking(t, server), Input::Answered { ticket, answer, .. }) if t == ticket => {
                self.on_answer(server, answer, now)
            }
            (State::Checking(t, server), Input::Checked { ticket, pdus }) if t == ticket => {
                self.on_checked(server, pdus, now)
            }
            (State::Placing(page, wait), input) => self.on_input(page, wait, input, now),
            (state, _late_or_double) => state,
        };
    }

    fn poll_effect(&mut self) -> Option<Effect> {
        self.out.next()
    }

    fn deadline(&self) -> Option<Duration> {
        None
    }

    fn poll_outcome(&mut self) -> Option<Self::Outcome> {
        self.outcome.take()
    }
}

// -- one page of history --------------------------------------------------------------------------

enum Placing {
    Commit(Box<WriteSet>),
    FetchState(EventId),
    FetchAuthEvents(BTreeSet<EventId>),
}

impl Page {
    fn place(&mut self, facts: &mut Facts, version: RoomVersion) -> Got<Placing> {
        let order = self.in_order(facts)?;
        if let Some(wanted) = self.missing_auth_events(facts, &order)? {
            return Ok(Placing::FetchAuthEvents(wanted));
        }
        let mut writes = WriteSet::new(facts.room.clone(), version);
        let mut placed_here = BTreeSet::new();
        for pdu in order {
            let (known, unknown) = split_here(facts, &pdu, &placed_here)?;
            if unknown.iter().any(|id| self.hopeless.contains(id)) {
                continue;
            }
            let wanted = unknown.iter().find(|id| !self.fetched.contains_key(*id));
            if let Some(wanted) = wanted {
                if self.fetched.len() < FETCHES_MAX {
                    return Ok(Placing::FetchState(wanted.clone()));
                }
                continue;
            }
            let states = facts.states(&known)?;
            let partial = states.iter().flatten().any(|at| at.partial);
            let mut maps: Vec<StateMap> = states.into_iter().flatten().map(|at| at.after).collect();
            let fetched = unknown.iter().filter_map(|id| self.fetched.get(id));
            maps.extend(fetched.flat_map(Fetched::maps));
            let before = facts.resolve(version, maps)?;
            let Some(verdict) = judge::on_full_state(facts, version, &pdu, &before)? else {
                continue;
            };
            let placed = Placed::new(facts, pdu, before, partial, verdict);
            publish(facts, &placed);
            placed_here.insert(placed.pdu.event_id.clone());
            let mut event = placed.into_event(FanOut::Nobody, None);
            event.place = Place::Backfilled;
            writes.events.push(event);
        }
        Ok(Placing::Commit(Box::new(writes)))
    }

    /// Those that have no place here so far, the oldest first.
    fn in_order(&self, facts: &Facts) -> Got<Vec<Arc<Pdu>>> {
        let ids: Vec<_> = self.pdus.keys().cloned().collect();
        let found = facts.find(&ids)?;
        let mut order: Vec<_> = self
            .pdus
            .values()
            .zip(found)
            .filter(|(_, found)| {
                found
                    .as_ref()
                    .is_none_or(|found| found.known.place == Place::Outlier)
            })
            .map(|(pdu, _)| pdu.clone())
            .collect();
        order.sort_by(|a, b| a.depth.cmp(&b.depth).then(a.event_id.cmp(&b.event_id)));
        Ok(order)
    }

    fn missing_auth_events(
        &self,
        facts: &Facts,
        order: &[Arc<Pdu>],
    ) -> Got<Option<BTreeSet<EventId>>> {
        let auth: BTreeSet<_> = order.iter().flat_map(|pdu| &pdu.auth_events).collect();
        let auth: Vec<_> = auth.into_iter().cloned().collect();
        let found = facts.find(&auth)?;
        let missing = auth.into_iter().zip(found);
        let missing: BTreeSet<_> = missing
            .filter(|(id, found)| found.is_none() && !self.pdus.contains_key(id))
            .map(|(id, _)| id)
            .collect();
        Ok(match missing.is_empty() || self.asked_for_auth_events {
            true => None,
            false => Some(missing),
        })
    }
}

/// Prev events with a place here, those of this page included, and the others.
fn split_here(
    facts: &Facts,
    pdu: &Pdu,
    placed_here: &BTreeSet<EventId>,
) -> Got<(Vec<protocol::nid::EventNid>, Vec<EventId>)> {
    let (mut known, unknown) = split_prevs(facts, &pdu.prev_events)?;
    let (here, unknown): (Vec<_>, Vec<_>) =
        unknown.into_iter().partition(|id| placed_here.contains(id));
    known.extend(here.iter().filter_map(|id| facts.nid(id)));
    Ok((known, unknown))
}

/// Lets the facts speak of the event as if it were stored.
fn publish(facts: &mut Facts, placed: &Placed) {
    let auth_events = placed.pdu.auth_events.iter();
    let stored = StoredEvent {
        pdu: placed.pdu.clone(),
        auth_events: auth_events.filter_map(|id| facts.nid(id)).collect(),
        rejected: matches!(placed.verdict, Verdict::Rejected(_)),
    };
    facts.add_own(placed.nid, stored);
    facts.add_own_state(
        placed.nid,
        StateAt {
            before: placed.state.before.clone(),
            after: placed.state.after.clone(),
            partial: placed.state.partial,
        },
    );
}
