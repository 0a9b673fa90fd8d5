//! Joining a room over federation: make_join, send_join, check, commit (joins.md part 1).
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#joining-rooms>
//!
//! Sending is a point of no return: whoever accepted our event holds us as a member, also when its answer
//! is lost. So the signed event is on disk before it leaves; after that the *same* event goes out again
//! until a server gives the room for it, and a join that fails all the same leaves a debt, not a ghost.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;

use crate::candidates::{self, ASKED_AT_ONCE_MAX, Failure, Failures, HEDGE, Half};
use crate::effect::{
    Answer, Ask, AskError, BadPdu, Effect, Handshake, Head, Input, Load, Loaded, Machine, Now,
    RawPdu, Section, Step, Tell, Ticket,
};
use crate::facts::Facts;
use crate::outbox::Outbox;
use crate::refusal::Refusal;
use crate::rest::Rest;
use crate::template::{self, Member, Order, Own};
use crate::write::{IntentChange, WriteSet};

mod answer;
mod held;

use answer::{Conclusion, Reply};

/// Synapse's limit for a template, and ample.
const MAKE_TIMEOUT: Duration = Duration::from_secs(20);
/// A resident may need long for a big room (J-50), but not without a byte in between.
const SEND_STALL_MAX: Duration = Duration::from_secs(120);
/// The whole of one send_join body; the largest rooms are hundreds of megabytes.
const SEND_TIMEOUT: Duration = Duration::from_secs(900);
/// With [`JoinOptions::race_send_join`]: how long a server may be silent before the next one hears too.
const RACE_AFTER: Duration = Duration::from_secs(3);
/// Checks of one body that run at the same time; while there are this many, no more of it is taken.
const CHECKS_MAX: usize = 4;
/// For auth events that the answer left out (J-64).
const EVENT_AUTH_TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Clone, Debug)]
pub struct JoinRequest {
    pub room: RoomId,
    pub user: UserId,
    /// Who may be asked, best first: see [`candidates::order`].
    pub candidates: Vec<ServerName>,
    pub member: Member,
    /// Names this join in the store's record of intents.
    pub job: i64,
    /// Position of our outgoing device-list stream at this moment (P-1).
    pub device_lists_at: i64,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct JoinOptions {
    /// Send to a second server when the first has not begun to answer after three seconds.
    pub race_send_join: bool,
    /// Of a full answer to a join that asked for a partial one, verify this many members before the user
    /// is in, and the others behind (O-49). `None`: all.
    pub members_first: Option<usize>,
    /// When an answer has events that are badly signed, or lack auth events, ask other servers for them
    /// behind the user (J-59).
    pub ask_for_left_out: bool,
}

/// What the store knows of a join that a crash interrupted ([`IntentChange::Intend`]).
#[derive(Clone, Debug)]
pub struct Intent {
    pub version: RoomVersion,
    pub event: Arc<str>,
    pub via: ServerName,
    pub omit_members: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Joined {
    pub event_id: EventId,
    pub version: RoomVersion,
    /// Whether the room is partial and a resync is due.
    pub partial: bool,
}

pub struct Join {
    own: Own,
    request: JoinRequest,
    options: JoinOptions,
    state: State,
    /// Those that have not been asked for a template.
    candidates: VecDeque<ServerName>,
    failures: Failures,
    /// Whether an intent of this join is on disk.
    intended: bool,
    /// Whether somebody may hold us as a member by an event of ours.
    unsure: bool,
    cancelled: bool,
    asked: u32,
    out: Outbox,
    outcome: Option<Result<Joined, Refusal>>,
}

enum State {
    Opening(Ticket),
    Asking(Asking),
    Intending(Intending),
    Sending(Sending),
    Concluding(Box<Concluding>),
    Ending(Ending),
    Done,
}

/// make_join is out to up to three servers; the first usable template wins.
struct Asking {
    omit_members: bool,
    in_flight: BTreeMap<Ticket, Asked>,
    hedge_at: Duration,
    /// A resident spoke for the room; it counts unless a server asked earlier lets us in (J-38).
    stop: Option<(u32, Refusal)>,
}

struct Asked {
    server: ServerName,
    /// In order of asking.
    rank: u32,
    until: Duration,
}

/// A template is signed; the intent is being made durable.
struct Intending {
    ticket: Ticket,
    signed: Signed,
    omit_members: bool,
}

/// Our event, and who gave the template for it.
#[derive(Clone)]
struct Signed {
    pdu: Arc<Pdu>,
    /// `None` when the template named no version (J-25).
    version_named: bool,
    via: ServerName,
    /// Only the template's server can add the signature that this join needs (J-44).
    restricted: bool,
}

/// send_join is out to one server, or to two when racing.
struct Sending {
    signed: Signed,
    attempts: BTreeMap<Ticket, Attempt>,
    targets: VecDeque<Target>,
    omit_members: bool,
    /// The last word of a resident that does not settle the matter, as another may have let us in.
    refused: Option<Refusal>,
}

#[derive(Clone, PartialEq)]
struct Target {
    server: ServerName,
    omit_members: bool,
}

struct Attempt {
    target: Target,
    since: Duration,
    /// When the last byte came.
    heard_at: Duration,
    silent: bool,
    reply: Reply,
}

/// The room came back and its events are verified: what do we make of it?
struct Concluding {
    sending: Sending,
    reply: Reply,
    facts: Facts,
    wait: Wait,
}

enum Wait {
    Facts,
    AuthEvents(Ticket),
    AuthEventsChecked(Ticket),
    /// The commit, whether it makes the room partial, and what follows then.
    Stored(Ticket, bool, Option<Box<Rest>>),
}

/// The failed join's record is being settled.
struct Ending {
    ticket: Ticket,
    refusal: Refusal,
}

impl Join {
    pub fn new(own: Own, request: JoinRequest, options: JoinOptions) -> Self {
        let mut this = Self::blank(own, request, options);
        this.state = State::Opening(this.out.load(&this.request.room, Load::Head));
        this
    }

    /// Goes on after a crash. The room may know the event already, so it is the same one that is sent.
    pub fn resume(
        own: Own,
        request: JoinRequest,
        options: JoinOptions,
        intent: Intent,
        now: Now,
    ) -> Self {
        let mut this = Self::blank(own, request, options);
        this.intended = true;
        this.unsure = true;
        let Ok(pdu) = Pdu::parse(&intent.event, intent.version) else {
            this.state = this.fail_with(Refusal::bad_gateway("the join's record is unreadable"));
            return this;
        };
        let signed = Signed {
            restricted: is_restricted(&pdu),
            pdu: Arc::new(pdu),
            version_named: true,
            via: intent.via,
        };
        this.state = this.send(signed, intent.omit_members, now);
        this
    }

    fn blank(own: Own, request: JoinRequest, options: JoinOptions) -> Self {
        let candidates = candidates::order(&request.candidates, &own.name).into();
        Self {
            own,
            request,
            options,
            state: State::Done,
            candidates,
            failures: Failures::default(),
            intended: false,
            unsure: false,
            cancelled: false,
            asked: 0,
            out: Outbox::default(),
            outcome: None,
        }
    }

    /// Gives up, if that is still possible. Before anything was sent nothing remains; after that a leave
    /// is owed. Once the room is being stored the join stands.
    pub fn cancel(&mut self) {
        self.cancelled = true;
        let cancelled = Refusal::bad_gateway("the join was cancelled");
        self.state = match std::mem::replace(&mut self.state, State::Done) {
            State::Opening(_) | State::Asking(_) => self.fail_with(cancelled),
            State::Sending(_) => {
                self.unsure = true;
                self.fail_with(cancelled)
            }
            State::Concluding(s) if !matches!(s.wait, Wait::Stored(..)) => {
                self.unsure = true;
                self.fail_with(cancelled)
            }
            state => state,
        };
    }
}

impl Join {
    /// Somebody knows a server that may do better: it is asked next, and at once where that is possible
    /// (O-48).
    pub fn use_server(&mut self, server: ServerName, now: Now) {
        if server == self.own.name {
            return;
        }
        self.state = match std::mem::replace(&mut self.state, State::Done) {
            State::Asking(s) => {
                self.candidates.push_front(server);
                match self.may_hedge(&s) {
                    true => self.ask_next(s, now),
                    false => State::Asking(s),
                }
            }
            // Of a restricted join only the server that authorised it can make something.
            State::Sending(mut s) if !s.signed.restricted => {
                let omit_members = s.omit_members;
                s.targets.push_front(Target {
                    server,
                    omit_members,
                });
                State::Sending(s)
            }
            State::Opening(ticket) => {
                self.candidates.push_front(server);
                State::Opening(ticket)
            }
            state => state,
        };
    }
}

impl Machine for Join {
    type Outcome = Result<Joined, Refusal>;

    fn handle(&mut self, input: Input, now: Now) {
        let state = std::mem::replace(&mut self.state, State::Done);
        self.state = match (state, input) {
            (State::Opening(t), Input::Loaded { ticket, loaded }) if ticket == t => {
                self.on_head(loaded, now)
            }
            (State::Asking(s), Input::Answered { ticket, answer, .. }) => {
                self.on_template(s, ticket, answer, now)
            }
            (State::Asking(s), Input::Woke) => self.on_hedge(s, now),
            (State::Intending(s), Input::Committed { ticket, .. }) if ticket == s.ticket => {
                self.on_intended(s, now)
            }
            (
                State::Sending(s),
                Input::Part {
                    ticket,
                    section,
                    pdus,
                    ..
                },
            ) => self.on_part(s, ticket, section, pdus, now),
            (State::Sending(s), Input::Answered { ticket, answer, .. }) => {
                self.on_reply(s, ticket, answer, now)
            }
            (State::Sending(s), Input::Checked { ticket, pdus }) => {
                self.on_checked(s, ticket, pdus, now)
            }
            (State::Sending(s), Input::Woke) => self.on_silence(s, now),
            (State::Concluding(s), input) => self.on_conclusion(s, input, now),
            (State::Ending(s), Input::Committed { ticket, .. }) if ticket == s.ticket => {
                self.done(Err(s.refusal))
            }
            (state, _late_or_double) => state,
        };
    }

    fn poll_effect(&mut self) -> Option<Effect> {
        self.out.next()
    }

    fn wants_parts(&self) -> bool {
        match &self.state {
            State::Sending(s) => s.attempts.values().all(|a| a.reply.checks() < CHECKS_MAX),
            _ => true,
        }
    }

    fn deadline(&self) -> Option<Duration> {
        match &self.state {
            State::Asking(s) => {
                let hedge = self.may_hedge(s).then_some(s.hedge_at);
                let answers = s.in_flight.values().map(|asked| asked.until);
                answers.chain(hedge).min()
            }
            State::Sending(s) => {
                let race = self.may_race(s);
                s.attempts
                    .values()
                    .map(|attempt| match race {
                        true => attempt.since + RACE_AFTER,
                        false => attempt.until(),
                    })
                    .min()
            }
            _ => None,
        }
    }

    fn poll_outcome(&mut self) -> Option<Self::Outcome> {
        self.outcome.take()
    }
}

// -- make_join ------------------------------------------------------------------------------------

impl Join {
    fn on_head(&mut self, loaded: Loaded, now: Now) -> State {
        let head = match loaded {
            Loaded::Head(head) => head,
            _ => None,
        };
        let omit_members = wants_members_omitted(head.as_deref());
        self.ask(omit_members, now)
    }

    fn ask(&mut self, omit_members: bool, now: Now) -> State {
        let asking = Asking {
            omit_members,
            in_flight: BTreeMap::new(),
            hedge_at: now.since_start,
            stop: None,
        };
        self.ask_next(asking, now)
    }

    /// Asks the next candidate, if one is left; fails when nobody is and none is pending.
    fn ask_next(&mut self, mut s: Asking, now: Now) -> State {
        let next = match s.stop {
            None => self.candidates.pop_front(),
            Some(_) => None,
        };
        if let Some(server) = next {
            self.asked += 1;
            self.out.tell(Tell::Progress {
                room: self.request.room.clone(),
                step: Step::Asking {
                    server: server.clone(),
                    nth: self.asked,
                    of: self.asked + u32::try_from(self.candidates.len()).unwrap_or(u32::MAX),
                },
            });
            let ask = Ask::Make {
                what: Handshake::Join,
                room: self.request.room.clone(),
                user: self.request.user.clone(),
            };
            let ticket = self.out.ask(&server, ask, MAKE_TIMEOUT);
            let asked = Asked {
                server,
                rank: self.asked,
                until: now.since_start + MAKE_TIMEOUT,
            };
            s.in_flight.insert(ticket, asked);
            s.hedge_at = now.since_start + HEDGE;
        }
        self.settle_asking(s)
    }

    fn settle_asking(&mut self, s: Asking) -> State {
        let outranked = |stop_rank: u32| s.in_flight.values().all(|asked| asked.rank > stop_rank);
        match &s.stop {
            Some((rank, refusal)) if outranked(*rank) => {
                let refusal = refusal.clone();
                self.fail_with(refusal)
            }
            None if s.in_flight.is_empty() => {
                let refusal = self.nobody_left();
                self.fail_with(refusal)
            }
            _ => State::Asking(s),
        }
    }

    fn nobody_left(&self) -> Refusal {
        if self.request.candidates.is_empty() {
            return Refusal::not_found("no servers that are in the room have been provided");
        }
        self.failures.sum_up("join the room")
    }

    fn on_template(
        &mut self,
        mut s: Asking,
        ticket: Ticket,
        answer: Result<Answer, AskError>,
        now: Now,
    ) -> State {
        let Some(asked) = s.in_flight.remove(&ticket) else {
            return State::Asking(s);
        };
        match answer {
            Ok(Answer::Made {
                room_version,
                event,
            }) => self.on_made(s, asked, room_version, &event, now),
            Ok(_) => self.on_no_template(s, asked, &wrong_answer(), now),
            Err(error) => self.on_no_template(s, asked, &error, now),
        }
    }

    fn on_made(
        &mut self,
        mut s: Asking,
        asked: Asked,
        room_version: Option<String>,
        event: &str,
        now: Now,
    ) -> State {
        let version = match template::version_of(room_version.as_deref()) {
            Ok(version) => version,
            Err(refusal) => {
                s.stop = Some((asked.rank, refusal));
                return self.settle_asking(s);
            }
        };
        let order = Order {
            what: Handshake::Join,
            room: &self.request.room,
            user: &self.request.user,
            member: &self.request.member,
        };
        match template::complete(&order, event, version, &self.own, now) {
            Ok(pdu) => {
                // Fetched while our event is on its way: most of what comes back is signed by it.
                self.out.tell(Tell::PrefetchKeys {
                    servers: vec![asked.server.clone()],
                });
                let signed = Signed {
                    restricted: is_restricted(&pdu),
                    pdu: Arc::new(pdu),
                    version_named: room_version.is_some(),
                    via: asked.server,
                };
                self.intend(s, signed)
            }
            Err(reason) => {
                let error = AskError::Unreachable { reason };
                self.on_no_template(s, asked, &error, now)
            }
        }
    }

    fn on_no_template(&mut self, mut s: Asking, asked: Asked, error: &AskError, now: Now) -> State {
        match candidates::classify(Half::Make, error) {
            Failure::Final(refusal) => {
                if s.stop.as_ref().is_none_or(|(rank, _)| asked.rank < *rank) {
                    s.stop = Some((asked.rank, refusal));
                }
                self.settle_asking(s)
            }
            failure => {
                self.note(&asked.server, failure);
                self.ask_next(s, now)
            }
        }
    }

    fn may_hedge(&self, s: &Asking) -> bool {
        s.stop.is_none() && s.in_flight.len() < ASKED_AT_ONCE_MAX && !self.candidates.is_empty()
    }

    /// A slow server costs one hedge interval, not a timeout.
    fn on_hedge(&mut self, mut s: Asking, now: Now) -> State {
        let late: Vec<_> = s
            .in_flight
            .iter()
            .filter(|(_, asked)| asked.until <= now.since_start)
            .map(|(ticket, _)| *ticket)
            .collect();
        if let Some(ticket) = late.first() {
            let asked = s.in_flight.remove(ticket).expect("just found there");
            return self.on_no_template(s, asked, &timed_out(), now);
        }
        if s.hedge_at <= now.since_start && self.may_hedge(&s) {
            return self.ask_next(s, now);
        }
        State::Asking(s)
    }
}

// -- the intent -----------------------------------------------------------------------------------

impl Join {
    /// The intent is durable before anyone can know of us.
    fn intend(&mut self, s: Asking, signed: Signed) -> State {
        // Who has not answered so far may still be of use for a new template (J-37).
        let mut waiting: Vec<_> = s.in_flight.into_values().collect();
        waiting.sort_by_key(|asked| std::cmp::Reverse(asked.rank));
        for asked in waiting {
            self.candidates.push_front(asked.server);
        }
        let mut writes = WriteSet::new(self.request.room.clone(), signed.pdu.version);
        writes.intent = Some(IntentChange::Intend {
            job: self.request.job,
            user: self.request.user.clone(),
            event_id: signed.pdu.event_id.clone(),
            event: signed.pdu.json.clone(),
            via: signed.via.clone(),
            omit_members: s.omit_members,
        });
        State::Intending(Intending {
            ticket: self.out.commit(writes),
            signed,
            omit_members: s.omit_members,
        })
    }

    fn on_intended(&mut self, s: Intending, now: Now) -> State {
        self.intended = true;
        if self.cancelled {
            return self.fail_with(Refusal::bad_gateway("the join was cancelled"));
        }
        self.send(s.signed, s.omit_members, now)
    }
}

// -- send_join ------------------------------------------------------------------------------------

impl Attempt {
    fn until(&self) -> Duration {
        (self.heard_at + SEND_STALL_MAX).min(self.since + SEND_TIMEOUT)
    }
}

impl Join {
    fn send(&mut self, signed: Signed, omit_members: bool, now: Now) -> State {
        let first = signed.via.clone();
        let others = candidates::order(&self.request.candidates, &self.own.name)
            .into_iter()
            .filter(|server| *server != first && !signed.restricted);
        let targets = std::iter::once(first.clone())
            .chain(others)
            .map(|server| Target {
                server,
                omit_members,
            })
            .collect();
        let sending = Sending {
            signed,
            attempts: BTreeMap::new(),
            targets,
            omit_members,
            refused: None,
        };
        self.send_next(sending, now)
    }

    fn send_next(&mut self, mut s: Sending, now: Now) -> State {
        let Some(target) = s.targets.pop_front() else {
            if !s.attempts.is_empty() {
                return State::Sending(s);
            }
            return self.out_of_targets(s, now);
        };
        let ask = Ask::Send {
            what: Handshake::Join,
            room: self.request.room.clone(),
            event_id: s.signed.pdu.event_id.clone(),
            event: s.signed.pdu.json.clone(),
            omit_members: target.omit_members,
        };
        let ticket = self.out.ask(&target.server, ask, SEND_TIMEOUT);
        let attempt = Attempt {
            reply: Reply::new(target.server.clone(), target.omit_members),
            target,
            since: now.since_start,
            heard_at: now.since_start,
            silent: true,
        };
        s.attempts.insert(ticket, attempt);
        State::Sending(s)
    }

    /// Nobody gave the room for this event. A restricted join may try with another template (J-37).
    fn out_of_targets(&mut self, s: Sending, now: Now) -> State {
        if s.signed.restricted && !self.candidates.is_empty() && s.refused.is_none() {
            let omit_members = s.omit_members;
            return self.ask(omit_members, now);
        }
        let refusal = match s.refused {
            Some(refusal) => refusal,
            None => self.failures.sum_up("join the room"),
        };
        self.fail_with(refusal)
    }

    fn on_part(
        &mut self,
        mut s: Sending,
        ticket: Ticket,
        section: Section,
        pdus: Vec<RawPdu>,
        now: Now,
    ) -> State {
        if let Some(attempt) = s.attempts.get_mut(&ticket) {
            if attempt.silent {
                self.out.tell(Tell::Progress {
                    room: self.request.room.clone(),
                    step: Step::Accepted {
                        by: attempt.target.server.clone(),
                    },
                });
            }
            attempt.silent = false;
            attempt.heard_at = now.since_start;
            let members_first = self.options.members_first.filter(|_| s.omit_members);
            let pdus = attempt.reply.sort(section, pdus, members_first);
            if !pdus.is_empty() {
                let check = self.out.check(s.signed.pdu.version, pdus);
                attempt.reply.await_part(check, section);
            }
        }
        State::Sending(s)
    }

    fn on_reply(
        &mut self,
        mut s: Sending,
        ticket: Ticket,
        answer: Result<Answer, AskError>,
        now: Now,
    ) -> State {
        let Some(attempt) = s.attempts.get_mut(&ticket) else {
            return State::Sending(s);
        };
        attempt.heard_at = now.since_start;
        match answer {
            Ok(Answer::SentJoin(end)) => {
                self.unsure = true;
                let version = s.signed.pdu.version;
                let event = end
                    .event
                    .clone()
                    .map(|event| self.out.check(version, vec![event]));
                attempt.reply.end(end, event);
                self.settle_attempt(s, ticket, now)
            }
            Ok(_) => self.on_send_failed(s, ticket, &wrong_answer(), now),
            Err(error) => self.on_send_failed(s, ticket, &error, now),
        }
    }

    fn on_checked(
        &mut self,
        mut s: Sending,
        ticket: Ticket,
        pdus: Vec<Result<Arc<Pdu>, BadPdu>>,
        now: Now,
    ) -> State {
        let of = s
            .attempts
            .iter()
            .find(|(_, attempt)| attempt.reply.awaits(ticket))
            .map(|(of, _)| *of);
        let Some(of) = of else {
            return State::Sending(s);
        };
        let attempt = s.attempts.get_mut(&of).expect("just found there");
        attempt.heard_at = now.since_start;
        attempt.reply.on_checked(ticket, pdus);
        self.out.tell(Tell::Progress {
            room: self.request.room.clone(),
            step: Step::Verifying {
                have: attempt.reply.len(),
            },
        });
        self.settle_attempt(s, of, now)
    }

    /// Goes on to the conclusion once the whole body is here and verified.
    fn settle_attempt(&mut self, mut s: Sending, ticket: Ticket, now: Now) -> State {
        let attempt = s
            .attempts
            .get_mut(&ticket)
            .expect("the caller looked it up");
        if !attempt.reply.complete() {
            return State::Sending(s);
        }
        let needed = attempt.reply.release(&s.signed);
        if !needed.is_empty() {
            for (section, pdus) in needed {
                let check = self.out.check(s.signed.pdu.version, pdus);
                attempt.reply.await_part(check, section);
            }
            return State::Sending(s);
        }
        let attempt = s.attempts.remove(&ticket).expect("just looked at");
        let concluding = Concluding {
            sending: s,
            reply: attempt.reply,
            facts: Facts::new(self.request.room.clone()),
            wait: Wait::Facts,
        };
        self.conclude(Box::new(concluding), now)
    }

    fn on_send_failed(
        &mut self,
        mut s: Sending,
        ticket: Ticket,
        error: &AskError,
        now: Now,
    ) -> State {
        let Some(attempt) = s.attempts.remove(&ticket) else {
            return State::Sending(s);
        };
        match candidates::classify(Half::Send, error) {
            Failure::Final(refusal) if self.unsure || !s.attempts.is_empty() => {
                s.refused = Some(refusal);
            }
            Failure::Final(refusal) => return self.fail_with(refusal),
            failure @ (Failure::Unable(_) | Failure::NotFound(_)) => {
                self.note(&attempt.target.server, failure);
            }
            failure @ Failure::Unreachable { .. } => {
                self.unsure = true;
                self.note(&attempt.target.server, failure);
                again_in_full(&mut s, attempt.target);
            }
        }
        self.send_next(s, now)
    }

    fn may_race(&self, s: &Sending) -> bool {
        self.options.race_send_join
            && s.attempts.len() == 1
            && s.attempts.values().all(|attempt| attempt.silent)
            && !s.targets.is_empty()
    }

    fn on_silence(&mut self, s: Sending, now: Now) -> State {
        let late = s
            .attempts
            .iter()
            .find(|(_, attempt)| attempt.until() <= now.since_start)
            .map(|(ticket, _)| *ticket);
        if let Some(ticket) = late {
            return self.on_send_failed(s, ticket, &timed_out(), now);
        }
        let patient = s
            .attempts
            .values()
            .all(|attempt| now.since_start < attempt.since + RACE_AFTER);
        if self.may_race(&s) && !patient {
            return self.send_next(s, now);
        }
        State::Sending(s)
    }
}

/// The answer was lost or broken, so the same server is asked again, and for all of it: maybe the partial
/// answer is what it can not give.
fn again_in_full(s: &mut Sending, target: Target) {
    if target.omit_members {
        s.targets.push_front(Target {
            omit_members: false,
            ..target
        });
    }
}

// -- the conclusion -------------------------------------------------------------------------------

impl Join {
    fn on_conclusion(&mut self, mut s: Box<Concluding>, input: Input, now: Now) -> State {
        match (&mut s.wait, input) {
            (Wait::Facts, Input::Loaded { ticket, loaded }) => {
                let heard_all = s.facts.hear(ticket, loaded);
                if heard_all {
                    return self.conclude(s, now);
                }
            }
            (Wait::AuthEvents(t), Input::Answered { ticket, answer, .. }) if *t == ticket => {
                let pdus = match answer {
                    Ok(Answer::Pdus(pdus)) => pdus,
                    _ => Vec::new(),
                };
                s.wait =
                    Wait::AuthEventsChecked(self.out.check(s.sending.signed.pdu.version, pdus));
            }
            (Wait::AuthEventsChecked(t), Input::Checked { ticket, pdus }) if *t == ticket => {
                s.reply.add_to_chain(pdus);
                return self.conclude(s, now);
            }
            (Wait::Stored(t, partial, rest), Input::Committed { ticket, outcome })
                if *t == ticket =>
            {
                return match outcome {
                    Ok(()) => {
                        let (partial, rest) = (*partial, rest.take());
                        self.joined(&s.sending.signed, partial, rest)
                    }
                    Err(_) => {
                        s.facts.forget();
                        self.conclude(s, now)
                    }
                };
            }
            _ => {}
        }
        State::Concluding(s)
    }

    fn conclude(&mut self, mut s: Box<Concluding>, now: Now) -> State {
        s.wait = Wait::Facts;
        let signed = &s.sending.signed;
        let conclusion = match s
            .reply
            .conclude(&self.request, &self.options, signed, &mut s.facts)
        {
            Ok(conclusion) => conclusion,
            Err(lacking) => {
                s.facts.request(lacking, &mut self.out);
                return State::Concluding(s);
            }
        };
        match conclusion {
            Conclusion::Store {
                writes,
                partial,
                rest,
            } => {
                s.wait = Wait::Stored(self.out.commit(*writes), partial, rest);
                State::Concluding(s)
            }
            Conclusion::AskForAuthEvents => {
                let ask = Ask::EventAuth {
                    room: self.request.room.clone(),
                    event_id: signed.pdu.event_id.clone(),
                };
                let ticket = self.out.ask(s.reply.server(), ask, EVENT_AUTH_TIMEOUT);
                s.wait = Wait::AuthEvents(ticket);
                State::Concluding(s)
            }
            Conclusion::Rejected(reason) => self.fail_with(Refusal::forbidden(format!(
                "the join event was rejected: {reason}"
            ))),
            Conclusion::BadCandidate(reason) => {
                let mut sending = s.sending;
                let target = Target {
                    server: s.reply.server().clone(),
                    omit_members: s.reply.omit_members(),
                };
                self.note(&target.server, Failure::Unreachable { reason });
                // Nothing is put off twice: maybe what was held is what it lacked.
                self.options.members_first = None;
                again_in_full(&mut sending, target);
                self.send_next(sending, now)
            }
        }
    }

    fn joined(&mut self, signed: &Signed, partial: bool, rest: Option<Box<Rest>>) -> State {
        let room = self.request.room.clone();
        self.out.tell(Tell::Progress {
            room: room.clone(),
            step: Step::Usable { partial },
        });
        if partial {
            self.out.tell(Tell::StartResync { room, rest });
        }
        self.done(Ok(Joined {
            event_id: signed.pdu.event_id.clone(),
            version: signed.pdu.version,
            partial,
        }))
    }

    fn note(&mut self, server: &ServerName, failure: Failure) {
        self.out.tell(Tell::Progress {
            room: self.request.room.clone(),
            step: Step::Failed {
                server: server.clone(),
                reason: failure.to_string(),
            },
        });
        self.failures.note(server, failure);
    }

    /// Settles what is on disk, then fails.
    fn fail_with(&mut self, refusal: Refusal) -> State {
        let job = self.request.job;
        let intent = match (self.unsure, self.intended) {
            (true, _) => IntentChange::OweLeave { job },
            (false, true) => IntentChange::Forget { job },
            (false, false) => return self.done(Err(refusal)),
        };
        // The version of a settled intent is the one it was made with; the store does not look at it.
        let mut writes = WriteSet::new(self.request.room.clone(), RoomVersion::V1);
        writes.intent = Some(intent);
        State::Ending(Ending {
            ticket: self.out.commit(writes),
            refusal,
        })
    }

    fn done(&mut self, outcome: Result<Joined, Refusal>) -> State {
        self.outcome = Some(outcome);
        State::Done
    }
}

/// J-45: a partial answer is of use when we hold no full state of the room.
fn wants_members_omitted(head: Option<&Head>) -> bool {
    head.is_none_or(|head| head.local_joined.is_empty() || head.partial.is_some())
}

fn is_restricted(pdu: &Pdu) -> bool {
    pdu.content_value()
        .get("join_authorised_via_users_server")
        .is_some()
}

fn wrong_answer() -> AskError {
    AskError::Unreachable {
        reason: "an answer of another kind".to_owned(),
    }
}

fn timed_out() -> AskError {
    AskError::Unreachable {
        reason: "no answer in time".to_owned(),
    }
}
