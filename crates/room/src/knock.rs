//! Knocking on a room that we are not in (joins.md J-80).
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#knocking-upon-a-room>

use std::time::Duration;

use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::nid::EventNid;

use crate::effect::{Effect, Handshake, Input, Machine, Now, Ticket};
use crate::exchange::{Exchange, Exchanged, Failed};
use crate::facts::{Facts, Got};
use crate::out_of_band;
use crate::outbox::Outbox;
use crate::refusal::Refusal;
use crate::template::{Member, Own};
use crate::write::{Former, WriteSet};

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

impl From<Exchanged> for Knocked {
    fn from(exchanged: Exchanged) -> Self {
        Self {
            event_id: exchanged.pdu.event_id.clone(),
            via: exchanged.via,
        }
    }
}

pub struct Knock {
    own: Own,
    request: KnockRequest,
    facts: Facts,
    /// What the user was here before.
    former: Option<EventNid>,
    state: State,
    out: Outbox,
    outcome: Option<Result<Knocked, Refusal>>,
}

enum State {
    Opening,
    Exchanging(Box<Exchange>),
    Numbering(Exchanged),
    Storing(Ticket, Exchanged),
    Done,
}

impl Knock {
    pub fn new(own: Own, request: KnockRequest) -> Self {
        let mut this = Self {
            own,
            facts: Facts::new(request.room.clone()),
            former: None,
            request,
            state: State::Done,
            out: Outbox::default(),
            outcome: None,
        };
        this.state = this.open();
        this
    }

    fn open(&mut self) -> State {
        match self.facts.out_of_band(&self.request.user) {
            Err(lacking) => {
                self.facts.request(lacking, &mut self.out);
                return State::Opening;
            }
            Ok(stored) => self.former = stored.map(|stored| stored.nid),
        }
        let whose = (self.request.room.clone(), self.request.user.clone());
        let (what, member) = (Handshake::Knock, self.request.member.clone());
        let (own, candidates) = (self.own.clone(), &self.request.candidates);
        match Exchange::new(own, what, whose, member, candidates, &mut self.out) {
            Ok(exchange) => State::Exchanging(Box::new(exchange)),
            Err(_) => self.done(Err(Refusal::not_found(
                "no servers that are in the room have been provided",
            ))),
        }
    }

    fn on_exchanged(&mut self, done: Result<Exchanged, Failed>) -> State {
        match done {
            Ok(exchanged) => self.store(exchanged),
            Err(failed) => self.done(Err(failed.refusal)),
        }
    }

    fn store(&mut self, exchanged: Exchanged) -> State {
        match self.writes(&exchanged) {
            Err(lacking) => {
                self.facts.request(lacking, &mut self.out);
                State::Numbering(exchanged)
            }
            Ok(Some(writes)) => State::Storing(self.out.commit(writes), exchanged),
            Ok(None) => self.done(Ok(exchanged.into())),
        }
    }

    /// `None` when something newer than the knock is here: an invite, or an answer to this very knock.
    fn writes(&self, exchanged: &Exchanged) -> Got<Option<WriteSet>> {
        let user = &self.request.user;
        let (pdu, via) = (&exchanged.pdu, &exchanged.via);
        let there = self.facts.out_of_band(user)?;
        let newer = there
            .as_ref()
            .filter(|there| Some(there.nid) != self.former);
        // A refusal of an earlier knock may be as late as this.
        if newer.is_some_and(|newer| {
            &*newer.membership == "invite" || newer.pdu.auth_events.contains(&pdu.event_id)
        }) {
            return Ok(None);
        }
        let shown = exchanged.room_state.iter().take(SHOWN_STATE_MAX).cloned();
        let former = Former::Only(there.map(|there| there.nid));
        out_of_band::writes(&self.facts, pdu, user, via, shown.collect(), former).map(Some)
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
            (State::Opening, Input::Loaded { ticket, loaded }) => {
                match self.facts.hear(ticket, loaded) {
                    true => self.open(),
                    false => State::Opening,
                }
            }
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
            (State::Storing(t, exchanged), Input::Committed { ticket, outcome }) if t == ticket => {
                match outcome {
                    Ok(()) => self.done(Ok(exchanged.into())),
                    Err(_) => {
                        self.facts.forget();
                        self.store(exchanged)
                    }
                }
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
