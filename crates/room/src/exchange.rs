//! make and send in turn, for leaves and knocks: one candidate after the other, until one accepts.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::pdu::Pdu;

use crate::candidates::{self, Failure, Failures, Half};
use crate::effect::{Answer, Ask, AskError, Handshake, Input, Now, Ticket};
use crate::outbox::Outbox;
use crate::refusal::Refusal;
use crate::template::{self, Member, Order, Own};

const MAKE_TIMEOUT: Duration = Duration::from_secs(20);
const SEND_TIMEOUT: Duration = Duration::from_secs(60);

/// A candidate has accepted our event.
pub(crate) struct Exchanged {
    pub pdu: Arc<Pdu>,
    pub via: ServerName,
    /// What send_knock showed of the room.
    pub room_state: Vec<Arc<str>>,
}

/// Nobody has accepted.
pub(crate) struct Failed {
    pub refusal: Refusal,
    /// Whether every candidate could be reached, and said no to the very request for a template: then no
    /// event of ours is anywhere.
    pub all_refused: bool,
}

pub(crate) struct Exchange {
    own: Own,
    what: Handshake,
    room: RoomId,
    user: UserId,
    member: Member,
    /// When not empty: the event is sent only where one of these is the user's membership.
    only_after: Vec<EventId>,
    candidates: VecDeque<ServerName>,
    failures: Failures,
    all_refused: bool,
    last: Option<Refusal>,
    state: State,
}

enum State {
    Making(Ticket, ServerName),
    Sending(Ticket, ServerName, Arc<Pdu>),
    Over,
}

impl Exchange {
    /// `Err` when there is no candidate.
    pub fn new(
        own: Own,
        what: Handshake,
        (room, user): (RoomId, UserId),
        member: Member,
        candidates: &[ServerName],
        out: &mut Outbox,
    ) -> Result<Self, Failed> {
        let candidates = candidates::order(candidates, &own.name).into();
        let mut this = Self {
            own,
            what,
            room,
            user,
            member,
            only_after: Vec::new(),
            candidates,
            failures: Failures::default(),
            all_refused: true,
            last: None,
            state: State::Over,
        };
        match this.next(out) {
            Some(Err(failed)) => Err(failed),
            _ => Ok(this),
        }
    }

    /// Takes a template for a refusal unless it stands on one of these memberships of the user's.
    pub fn only_after(mut self, memberships: Vec<EventId>) -> Self {
        self.only_after = memberships;
        self
    }

    /// Takes an input; `Some` ends the exchange.
    pub fn handle(
        &mut self,
        input: Input,
        out: &mut Outbox,
        now: Now,
    ) -> Option<Result<Exchanged, Failed>> {
        match (std::mem::replace(&mut self.state, State::Over), input) {
            (State::Making(t, server), Input::Answered { ticket, answer, .. }) if t == ticket => {
                self.on_template(server, answer, out, now)
            }
            (State::Sending(t, via, pdu), Input::Answered { ticket, answer, .. })
                if t == ticket =>
            {
                self.on_sent(via, pdu, answer, out)
            }
            (state, _late_or_double) => {
                self.state = state;
                None
            }
        }
    }

    fn next(&mut self, out: &mut Outbox) -> Option<Result<Exchanged, Failed>> {
        let Some(server) = self.candidates.pop_front() else {
            let refusal = match self.last.take() {
                Some(refusal) => refusal,
                None => self.failures.sum_up(self.what.membership()),
            };
            return Some(Err(Failed {
                refusal,
                all_refused: self.all_refused,
            }));
        };
        let ask = Ask::Make {
            what: self.what,
            room: self.room.clone(),
            user: self.user.clone(),
        };
        let ticket = out.ask(&server, ask, MAKE_TIMEOUT);
        self.state = State::Making(ticket, server);
        None
    }

    fn on_template(
        &mut self,
        server: ServerName,
        answer: Result<Answer, AskError>,
        out: &mut Outbox,
        now: Now,
    ) -> Option<Result<Exchanged, Failed>> {
        let signed = match answer {
            Ok(Answer::Made {
                room_version,
                event,
            }) => self.sign(room_version.as_deref(), &event, now),
            Ok(_) => Err(Failure::Unreachable {
                reason: "an answer of another kind".to_owned(),
            }),
            Err(error) => Err(candidates::classify(Half::Make, &error)),
        };
        let pdu = match signed {
            Ok(pdu) => Arc::new(pdu),
            Err(failure) => return self.on_failure(&server, Half::Make, failure, out),
        };
        let ask = Ask::Send {
            what: self.what,
            room: self.room.clone(),
            event_id: pdu.event_id.clone(),
            event: pdu.json.clone(),
            omit_members: false,
        };
        let ticket = out.ask(&server, ask, SEND_TIMEOUT);
        self.state = State::Sending(ticket, server, pdu);
        None
    }

    fn sign(&self, version: Option<&str>, template: &str, now: Now) -> Result<Pdu, Failure> {
        let version = template::version_of(version).map_err(Failure::Final)?;
        if self.what == Handshake::Knock && !version.rules().knock {
            let refusal = Refusal::forbidden("rooms of this version can not be knocked on");
            return Err(Failure::Final(refusal));
        }
        let order = Order {
            what: self.what,
            room: &self.room,
            user: &self.user,
            member: &self.member,
        };
        let pdu = template::complete(&order, template, version, &self.own, now)
            .map_err(|reason| Failure::Unreachable { reason })?;
        // Every change of a membership is authorised by the one before.
        let after = |id: &EventId| pdu.auth_events.contains(id);
        if !self.only_after.is_empty() && !self.only_after.iter().any(after) {
            let reason = "the user's membership is another one there";
            return Err(Failure::Final(Refusal::forbidden(reason)));
        }
        Ok(pdu)
    }

    fn on_sent(
        &mut self,
        via: ServerName,
        pdu: Arc<Pdu>,
        answer: Result<Answer, AskError>,
        out: &mut Outbox,
    ) -> Option<Result<Exchanged, Failed>> {
        let room_state = match (answer, self.what) {
            (Ok(Answer::SentLeave), Handshake::Leave) => Vec::new(),
            (Ok(Answer::SentKnock { room_state }), Handshake::Knock) => room_state,
            (Ok(_), _) => {
                let reason = "an answer of another kind".to_owned();
                return self.on_failure(&via, Half::Send, Failure::Unreachable { reason }, out);
            }
            (Err(error), _) => {
                let failure = candidates::classify(Half::Send, &error);
                return self.on_failure(&via, Half::Send, failure, out);
            }
        };
        Some(Ok(Exchanged {
            pdu,
            via,
            room_state,
        }))
    }

    fn on_failure(
        &mut self,
        server: &ServerName,
        half: Half,
        failure: Failure,
        out: &mut Outbox,
    ) -> Option<Result<Exchanged, Failed>> {
        let refused = half == Half::Make && !matches!(failure, Failure::Unreachable { .. });
        self.all_refused &= refused;
        match failure {
            // For a knock the first resident's word stands; a leave is wanted at any server that takes it.
            Failure::Final(refusal) if self.what == Handshake::Knock => {
                self.candidates.clear();
                self.last = Some(refusal);
            }
            Failure::Final(refusal) => self.last = Some(refusal),
            failure => self.failures.note(server, failure),
        }
        self.next(out)
    }
}
