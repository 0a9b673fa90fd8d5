//! Knocking on a room that we are not in (joins.md J-80).
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#knocking-upon-a-room>

use std::sync::Arc;
use std::time::Duration;

use protocol::id::{EventId, RoomId, ServerName, UserId};

use crate::effect::{Effect, Handshake, Input, Machine, Now, Ticket};
use crate::exchange::{Exchange, Exchanged, Failed};
use crate::facts::Facts;
use crate::out_of_band;
use crate::outbox::Outbox;
use crate::refusal::Refusal;
use crate::template::{Member, Own};

/// Entries of `knock_room_state` that are kept.
const SHOWN_STATE_MAX: usize = 100;

#[derive(Clone, Debug)]
pub struct KnockRequest {
    pub room: RoomId,
    pub user: UserId,
    pub candidates: Vec<ServerName>,
    pub member: Member,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Knocked {
    pub event_id: EventId,
    pub via: ServerName,
}

pub struct Knock {
    request: KnockRequest,
    facts: Facts,
    state: State,
    out: Outbox,
    outcome: Option<Result<Knocked, Refusal>>,
}

enum State {
    Exchanging(Box<Exchange>),
    Numbering(Exchanged),
    Storing(Ticket, Knocked),
    Done,
}

impl Knock {
    pub fn new(own: Own, request: KnockRequest) -> Self {
        let mut out = Outbox::default();
        let whose = (request.room.clone(), request.user.clone());
        let (what, member) = (Handshake::Knock, request.member.clone());
        let exchange = Exchange::new(own, what, whose, member, &request.candidates, &mut out);
        let (state, outcome) = match exchange {
            Ok(exchange) => (State::Exchanging(Box::new(exchange)), None),
            Err(_) => {
                let refusal =
                    Refusal::not_found("no servers that are in the room have been provided");
                (State::Done, Some(Err(refusal)))
            }
        };
        Self {
            facts: Facts::new(request.room.clone()),
            request,
            state,
            out,
            outcome,
        }
    }

    fn on_exchanged(&mut self, done: Result<Exchanged, Failed>) -> State {
        match done {
            Ok(exchanged) => self.store(exchanged),
            Err(failed) => self.done(Err(failed.refusal)),
        }
    }

    fn store(&mut self, exchanged: Exchanged) -> State {
        let shown: Vec<Arc<str>> = exchanged
            .room_state
            .iter()
            .take(SHOWN_STATE_MAX)
            .cloned()
            .collect();
        let (pdu, via) = (&exchanged.pdu, &exchanged.via);
        match out_of_band::writes(&self.facts, pdu, &self.request.user, via, shown) {
            Err(lacking) => {
                self.facts.request(lacking, &mut self.out);
                State::Numbering(exchanged)
            }
            Ok(writes) => {
                let knocked = Knocked {
                    event_id: pdu.event_id.clone(),
                    via: via.clone(),
                };
                State::Storing(self.out.commit(writes), knocked)
            }
        }
    }

    fn done(&mut self, outcome: Result<Knocked, Refusal>) -> State {
        self.outcome = Some(outcome);
        State::Done
    }
}

impl Machine for Knock {
    type Outcome = Result<Knocked, Refusal>;

    fn handle(&mut self, input: Input, now: Now) {
        self.state = match (std::mem::replace(&mut self.state, State::Done), input) {
            (State::Exchanging(mut exchange), input) => {
                match exchange.handle(input, &mut self.out, now) {
                    Some(done) => self.on_exchanged(done),
                    None => State::Exchanging(exchange),
                }
            }
            (State::Numbering(exchanged), Input::Loaded { ticket, loaded }) => {
                match self.facts.hear(ticket, loaded) {
                    true => self.store(exchanged),
                    false => State::Numbering(exchanged),
                }
            }
            (State::Storing(t, knocked), Input::Committed { ticket, .. }) if t == ticket => {
                self.done(Ok(knocked))
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
        self.outcome.take()
    }
}
