//! Incoming PDUs of one room, in order (joins.md 3.2).
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#checks-performed-on-receipt-of-a-pdu>
//!
//! Format, signature and hash (checks 1 to 3) are behind an event when it comes here. Missing prev events
//! are in `gap`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use protocol::format;
use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;

use crate::effect::{Ask, AskError, Effect, Head, Input, Machine, Now, Place, Ticket};
use crate::facts::{Facts, Got, auth_keys, both};
use crate::fetch::{Fetch, Fetched, Unfetched};
use crate::out_of_band;
use crate::outbox::Outbox;
use crate::policy;
use crate::sift;
use crate::template::Own;
use crate::view::{Placed, View, split_prevs};
use crate::write::{FanOut, Former, Verdict, WriteSet};

mod gap;

/// An event whose signatures have been checked.
#[derive(Clone, Debug)]
pub struct Incoming {
    pub pdu: Arc<Pdu>,
    /// Its row in the staging table, which goes when the event is dealt with.
    pub staged: Option<i64>,
}

/// What became of an event.
#[derive(Clone, Debug, PartialEq)]
pub enum Received {
    Accepted,
    Rejected(String),
    SoftFailed(String),
    /// In the timeline already.
    Known,
    /// Not stored, as something it stands on is missing; a later copy may do better (P-14, P-19).
    Refused(String),
    /// Nobody of ours is in the room (P-24).
    Dropped,
    /// A rescinded invite or a refused knock of a user of ours, in a room we are not in (J-76).
    OutOfBand,
    /// A join of ours is on its way: give the event again when that has ended (J-65).
    Postponed,
    /// Nobody could be asked for what it stands on, as they were not reached: give the event again later.
    Unreached,
}

/// Servers asked for what one event lacks: its sender, and, where that is not reached, others of the room.
const DONORS_MAX: usize = 3;

pub struct Receive {
    own: Own,
    room: RoomId,
    origin: ServerName,
    queue: VecDeque<Item>,
    state: State,
    out: Outbox,
    received: Vec<(EventId, Received)>,
    /// Staging rows that no commit has settled so far.
    settled: Vec<i64>,
    version: Option<RoomVersion>,
    /// Something that the event at hand stands on could not be asked for.
    unreached: bool,
    done: bool,
}

struct Item {
    pdu: Arc<Pdu>,
    staged: Option<i64>,
    /// Whether we asked for it to fill a gap. Such an event may have its prev events' state fetched.
    pulled: bool,
    /// Whether get_missing_events was asked for it.
    asked: bool,
}

enum State {
    Judging(Box<Judging>, Wait),
    Settling(Ticket),
    Done,
}

struct Judging {
    item: Item,
    facts: Facts,
    /// States after unknown prev events.
    fetched: BTreeMap<EventId, Fetched>,
    asked_for_auth_events: bool,
    /// Servers that were not reached, for this event.
    silent: Vec<ServerName>,
}

enum Wait {
    Facts,
    Missing(Ticket, ServerName),
    MissingChecked(Ticket),
    State(Box<Fetch>, EventId),
    AuthEvents(Box<Fetch>),
    Stored(Ticket, Received),
}

impl Receive {
    /// `origin` is who sent the events; they are handled in the order given (P-14b).
    pub fn new(
        own: Own,
        room: RoomId,
        origin: ServerName,
        events: Vec<Incoming>,
        now: Now,
    ) -> Self {
        let version = events.first().map(|event| event.pdu.version);
        let queue = events
            .into_iter()
            .map(|event| Item {
                pdu: event.pdu,
                staged: event.staged,
                pulled: false,
                asked: false,
            })
            .collect();
        let mut this = Self {
            own,
            room,
            origin,
            queue,
            state: State::Done,
            out: Outbox::default(),
            received: Vec::new(),
            settled: Vec::new(),
            version,
            unreached: false,
            done: false,
        };
        this.state = this.next(now);
        this
    }

    fn next(&mut self, now: Now) -> State {
        let Some(item) = self.queue.pop_front() else {
            return self.settle();
        };
        let judging = Judging {
            item,
            facts: Facts::new(self.room.clone()),
            fetched: BTreeMap::new(),
            asked_for_auth_events: false,
            silent: Vec::new(),
        };
        self.judge(Box::new(judging), now)
    }

    /// The rows of events that came to nothing go last.
    fn settle(&mut self) -> State {
        let (Some(version), false) = (self.version, self.settled.is_empty()) else {
            self.done = true;
            return State::Done;
        };
        let mut writes = WriteSet::new(self.room.clone(), version);
        writes.staged_done = std::mem::take(&mut self.settled);
        State::Settling(self.out.commit(writes))
    }

    fn judge(&mut self, mut s: Box<Judging>, now: Now) -> State {
        let judgement = match s.judge(&self.own, &self.origin) {
            Ok(judgement) => judgement,
            Err(lacking) => {
                s.facts.request(lacking, &mut self.out);
                return State::Judging(s, Wait::Facts);
            }
        };
        match judgement {
            Judgement::End(received) => self.end(s.item, received, now),
            Judgement::Commit(writes, received) => {
                let mut writes = *writes;
                writes.staged_done.extend(s.item.staged);
                let ticket = self.out.commit(writes);
                State::Judging(s, Wait::Stored(ticket, received))
            }
            Judgement::AskMissing(donor, ask) => {
                let timeout = match donor == self.origin {
                    true => gap::TIMEOUT,
                    false => gap::TIMEOUT_OF_OTHERS,
                };
                let ticket = self.out.ask(&donor, ask, timeout);
                State::Judging(s, Wait::Missing(ticket, donor))
            }
            Judgement::FetchState(donor, event) => {
                let version = s.item.pdu.version;
                let room = self.room.clone();
                let donors = vec![donor];
                let fetch = Fetch::new(room, version, event.clone(), donors, false, &mut self.out);
                State::Judging(s, Wait::State(Box::new(fetch), event))
            }
            Judgement::FetchAuthEvents(donor, wanted) => {
                s.asked_for_auth_events = true;
                let version = s.item.pdu.version;
                let room = self.room.clone();
                let donors = vec![donor];
                let fetch = Fetch::auth_events(room, version, wanted, donors, &mut self.out, now);
                State::Judging(s, Wait::AuthEvents(Box::new(fetch)))
            }
        }
    }

    fn end(&mut self, item: Item, mut received: Received, now: Now) -> State {
        match &received {
            Received::Unreached => self.unreached = true,
            // What came before it in the gap could not be had; that may be all that it lacks.
            Received::Refused(_) if self.unreached => received = Received::Unreached,
            _ => {}
        }
        let again = matches!(received, Received::Postponed | Received::Unreached);
        if !item.pulled {
            self.unreached = false;
            self.received.push((item.pdu.event_id.clone(), received));
        }
        if !again {
            self.settled.extend(item.staged);
        }
        self.next(now)
    }

    fn on_input(&mut self, mut s: Box<Judging>, wait: Wait, input: Input, now: Now) -> State {
        let wait = match (wait, input) {
            (Wait::Facts, Input::Loaded { ticket, loaded }) => match s.facts.hear(ticket, loaded) {
                true => return self.judge(s, now),
                false => Wait::Facts,
            },
            (Wait::Facts, Input::Answered { ticket, answer, .. }) => {
                match s.facts.hear_answer(ticket, answer) {
                    true => return self.judge(s, now),
                    false => Wait::Facts,
                }
            }
            (Wait::Missing(t, donor), Input::Answered { ticket, answer, .. }) if t == ticket => {
                if matches!(answer, Err(AskError::Unreachable { .. })) {
                    s.silent.push(donor);
                    return self.judge(s, now);
                }
                s.item.asked = true;
                let pdus = gap::answered(answer);
                Wait::MissingChecked(self.out.check(s.item.pdu.version, pdus))
            }
            (Wait::MissingChecked(t), Input::Checked { ticket, pdus }) if t == ticket => {
                let pulled = gap::pulled(&s.item.pdu, pdus);
                self.queue.push_front(s.item);
                for pdu in pulled.into_iter().rev() {
                    self.queue.push_front(Item {
                        pdu,
                        staged: None,
                        pulled: true,
                        asked: true,
                    });
                }
                return self.next(now);
            }
            (Wait::State(mut fetch, event), input) => {
                match fetch.handle(input, &mut self.out, now) {
                    None => Wait::State(fetch, event),
                    // A state with holes is no state to judge by (P-21a).
                    Some(Ok(fetched)) if fetched.holes == 0 => {
                        s.fetched.insert(event, fetched);
                        s.facts.forget();
                        return self.judge(s, now);
                    }
                    Some(Err(Unfetched::Unreachable(_))) => {
                        s.silent.push(fetch.source().clone());
                        return self.judge(s, now);
                    }
                    Some(_) => {
                        let refused =
                            Received::Refused("the state before it is not to be had".to_owned());
                        return self.end(s.item, refused, now);
                    }
                }
            }
            (Wait::AuthEvents(mut fetch), input) => match fetch.handle(input, &mut self.out, now) {
                None => Wait::AuthEvents(fetch),
                Some(fetched) => {
                    if matches!(fetched, Err(Unfetched::Unreachable(_))) {
                        s.asked_for_auth_events = false;
                        s.silent.push(fetch.source().clone());
                    }
                    s.facts.forget();
                    return self.judge(s, now);
                }
            },
            (Wait::Stored(t, received), Input::Committed { ticket, outcome }) if t == ticket => {
                if outcome.is_err() {
                    s.facts.forget();
                    return self.judge(s, now);
                }
                s.item.staged = None;
                return self.end(s.item, received, now);
            }
            (wait, _late_or_double) => wait,
        };
        State::Judging(s, wait)
    }
}

impl Machine for Receive {
    /// For each event given, in the order they were finished.
    type Outcome = Vec<(EventId, Received)>;

    fn handle(&mut self, input: Input, now: Now) {
        self.state = match (std::mem::replace(&mut self.state, State::Done), input) {
            (State::Judging(s, wait), input) => self.on_input(s, wait, input, now),
            (State::Settling(t), Input::Committed { ticket, .. }) if t == ticket => {
                self.done = true;
                State::Done
            }
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
        std::mem::take(&mut self.done).then(|| std::mem::take(&mut self.received))
    }
}

// -- one event ------------------------------------------------------------------------------------

enum Judgement {
    End(Received),
    Commit(Box<WriteSet>, Received),
    AskMissing(ServerName, Ask),
    FetchState(ServerName, EventId),
    FetchAuthEvents(ServerName, BTreeSet<EventId>),
}

impl Judging {
    fn judge(&mut self, own: &Own, origin: &ServerName) -> Got<Judgement> {
        let pdu = self.item.pdu.clone();
        let ids = [pdu.event_id.clone()];
        let (head, found) = both(self.facts.head(), self.facts.find(&ids))?;
        let placed = found
            .iter()
            .flatten()
            .any(|found| found.known.place != Place::Outlier);
        if placed {
            return Ok(Judgement::End(Received::Known));
        }
        // A gap is filled to its end even if a ban in it throws all of ours out: what comes after the ban may
        // bring them back, and nobody would send it again.
        let filling = self.item.asked;
        let taken = |head: &Arc<Head>| {
            !head.local_joined.is_empty() || filling && !head.forward_extremities.is_empty()
        };
        let Some(head) = head.filter(taken) else {
            return self.judge_from_outside(own, origin);
        };
        if pdu.version != head.version || pdu.room_id != self.facts.room {
            return Ok(refused("it is of another room version"));
        }
        if let Err(error) = format::check_limits(&pdu) {
            return Ok(refused(&error.to_string()));
        }
        let (known, unknown) = split_prevs(&self.facts, &pdu.prev_events)?;
        let unfetched = unknown.iter().find(|id| !self.fetched.contains_key(*id));
        if let Some(unfetched) = unfetched {
            let unfetched = unfetched.clone();
            return self.fill_gap(own, origin, &head, unfetched);
        }
        self.judge_here((own, origin), &head, &known, &unknown)
    }

    /// Who is asked for what is missing: the sender of the event; where that is not reached, others of the
    /// room; nobody, if enough of them are silent.
    fn donor(&self, own: &Own, origin: &ServerName) -> Got<Option<ServerName>> {
        if self.silent.is_empty() {
            return Ok(Some(origin.clone()));
        }
        if self.silent.len() >= DONORS_MAX {
            return Ok(None);
        }
        let hosts = self.facts.hosts()?;
        let mut others = hosts
            .into_iter()
            .filter(|host| *host != own.name && host != origin && !self.silent.contains(host));
        let first = others.next();
        // The author of the event has it, as a rule.
        let author = self.item.pdu.sender.server_name();
        Ok(others.find(|host| *host == author).or(first))
    }

    /// P-16, P-17, P-19: what to do about a prev event that is not here.
    fn fill_gap(
        &self,
        own: &Own,
        origin: &ServerName,
        head: &Head,
        unknown: EventId,
    ) -> Got<Judgement> {
        let item = &self.item;
        if !item.pulled && (item.asked || item.pdu.depth <= head.min_depth) {
            return Ok(refused("its prev events are not to be had"));
        }
        let Some(donor) = self.donor(own, origin)? else {
            return Ok(Judgement::End(Received::Unreached));
        };
        if item.pulled {
            return Ok(Judgement::FetchState(donor, unknown));
        }
        let known = |id: &&EventId| {
            let found = self.facts.find(std::slice::from_ref(*id));
            found.is_ok_and(|found| {
                found
                    .iter()
                    .flatten()
                    .any(|found| found.known.place != Place::Outlier)
            })
        };
        let known_prevs = item.pdu.prev_events.iter().filter(known);
        let ask = gap::ask(&self.facts.room, head, &item.pdu, known_prevs);
        Ok(Judgement::AskMissing(donor, ask))
    }

    /// Checks 4 to 7, and the event's place.
    fn judge_here(
        &mut self,
        (own, origin): (&Own, &ServerName),
        head: &Arc<Head>,
        known: &[protocol::nid::EventNid],
        unknown: &[EventId],
    ) -> Got<Judgement> {
        let pdu = self.item.pdu.clone();
        let own_key = pdu.state_key.clone().map(|key| (pdu.kind.clone(), key));
        let keys = auth_keys(&pdu).into_iter().chain(own_key);
        let keys = keys.chain([policy::key()]);
        let ids = [pdu.event_id.clone()];
        let numbered = self.facts.number(head.version, ids, keys);
        let (auth, ()) = both(self.facts.auth_of(&pdu), numbered)?;
        let Some(auth) = auth else {
            return self.missing_auth_events(own, origin, &pdu);
        };
        let (before, partial) = self.before(head, known, unknown)?;
        // A verdict on partial state may be wrong, so it does not spread to what stands on it; check 5
        // resolves without such events, and the resync judges all of them again (P-13, P-15).
        let found = self.facts.find(&pdu.auth_events)?;
        let firm = found
            .iter()
            .map(|found| !partial || found.as_ref().is_none_or(|found| !found.known.partial));
        let by_ref: Vec<_> = auth
            .iter()
            .zip(firm)
            .map(|((_, pdu, rejected), firm)| (&**pdu, *rejected && firm))
            .collect();
        let create_key = [("m.room.create".into(), "".into())];
        let create = self.facts.state_events(&before, &create_key)?;
        let create = create.values().next().map(|(_, pdu)| pdu.clone());
        let mut verdict = sift::match_auth(head.version, &pdu, create.as_deref(), &by_ref);
        if verdict == Verdict::Accepted {
            let passes = match partial {
                true => {
                    let auth: Vec<_> = auth.into_iter().map(|(nid, pdu, _)| (nid, pdu)).collect();
                    self.facts.check_against_partial(&pdu, &before, &auth)?
                }
                false => self.facts.check_against(&pdu, &before)?,
            };
            if let Err(reason) = passes {
                verdict = Verdict::Rejected(reason);
            }
        }
        // Current state that is partial would soft-fail the innocent (P-12).
        if verdict == Verdict::Accepted
            && head.partial.is_none()
            && let Err(reason) = self.facts.check_against(&pdu, &head.state)?
        {
            verdict = Verdict::SoftFailed(reason);
        }
        // Check 7. The event is stored with the signature that was asked for.
        if verdict == Verdict::Accepted {
            match policy::vet(&self.facts, own, head, &pdu)? {
                Ok(vetted) => self.item.pdu = vetted,
                Err(refusal) => verdict = Verdict::SoftFailed(refusal.to_string()),
            }
        }
        self.place(head, before, partial, verdict)
    }

    /// State before the event, and whether it is partial: if a known prev event is (P-5, P-6).
    fn before(
        &mut self,
        head: &Head,
        known: &[protocol::nid::EventNid],
        unknown: &[EventId],
    ) -> Got<(protocol::state::StateMap, bool)> {
        if unknown.is_empty() {
            return View::of(head).before(&mut self.facts, known);
        }
        let states = self.facts.states(known)?;
        let partial = states.iter().flatten().any(|at| at.partial);
        let mut maps: Vec<_> = states.into_iter().flatten().map(|at| at.after).collect();
        let fetched = unknown.iter().filter_map(|id| self.fetched.get(id));
        maps.extend(fetched.flat_map(Fetched::maps));
        Ok((self.facts.resolve(head.version, maps)?, partial))
    }

    /// P-14.
    fn missing_auth_events(&self, own: &Own, origin: &ServerName, pdu: &Pdu) -> Got<Judgement> {
        if self.asked_for_auth_events {
            return Ok(refused("its auth events are not to be had"));
        }
        let Some(donor) = self.donor(own, origin)? else {
            return Ok(Judgement::End(Received::Unreached));
        };
        let found = self.facts.find(&pdu.auth_events)?;
        let missing = pdu.auth_events.iter().zip(found);
        let missing = missing.filter(|(_, found)| found.is_none());
        let missing = missing.map(|(id, _)| id.clone()).collect();
        Ok(Judgement::FetchAuthEvents(donor, missing))
    }

    fn place(
        &mut self,
        head: &Head,
        before: protocol::state::StateMap,
        partial: bool,
        verdict: Verdict,
    ) -> Got<Judgement> {
        let pdu = self.item.pdu.clone();
        let placed = Placed::new(&self.facts, pdu, before, partial, verdict.clone());
        let children = self.facts.children(&[placed.nid])?;
        let succeeded = children
            .iter()
            .flatten()
            .any(|c| !c.rejected && !c.soft_failed);
        let mut writes = WriteSet::new(self.facts.room.clone(), head.version);
        writes.expect = Some(head.revision);
        let mut view = View::of(head);
        match succeeded {
            true => view.add_below(&mut self.facts, &placed)?,
            false => view.add(&mut self.facts, &placed)?,
        }
        writes.events = vec![placed.into_event(FanOut::Nobody, None)];
        view.write(&mut writes);
        let received = match verdict {
            Verdict::Accepted => Received::Accepted,
            Verdict::Rejected(reason) => Received::Rejected(reason),
            Verdict::SoftFailed(reason) => Received::SoftFailed(reason),
        };
        Ok(Judgement::Commit(Box::new(writes), received))
    }
}

fn refused(reason: &str) -> Judgement {
    Judgement::End(Received::Refused(reason.to_owned()))
}

// -- rooms we are not in --------------------------------------------------------------------------

impl Judging {
    /// J-65, J-76, P-24.
    fn judge_from_outside(&mut self, own: &Own, origin: &ServerName) -> Got<Judgement> {
        if self.facts.handshake_running()? {
            return Ok(Judgement::End(Received::Postponed));
        }
        let pdu = self.item.pdu.clone();
        let target = match (pdu.membership(), pdu.state_key.as_deref()) {
            (Some("leave" | "ban"), Some(target)) if target != pdu.sender.as_str() => target,
            _ => return Ok(Judgement::End(Received::Dropped)),
        };
        let target = match UserId::parse(target) {
            Ok(target) if target.server_name() == own.name => target,
            _ => return Ok(Judgement::End(Received::Dropped)),
        };
        let stored = self.facts.out_of_band(&target)?;
        let Some(stored) = stored.filter(|stored| pdu.auth_events.contains(&stored.pdu.event_id))
        else {
            return Ok(Judgement::End(Received::Dropped));
        };
        let entitled = match &*stored.membership {
            "invite" => pdu.membership() == Some("leave") && pdu.sender == stored.pdu.sender,
            "knock" => pdu.sender.server_name() == stored.via,
            _ => false,
        };
        if !entitled || pdu.version != stored.pdu.version {
            return Ok(Judgement::End(Received::Dropped));
        }
        let shown = stored.stripped_state.clone();
        // Who is refused may knock again before we hear of the refusal.
        let former = Former::Only(Some(stored.nid));
        let writes = out_of_band::writes(&self.facts, &pdu, &target, origin, shown, former)?;
        Ok(Judgement::Commit(Box::new(writes), Received::OutOfBand))
    }
}
