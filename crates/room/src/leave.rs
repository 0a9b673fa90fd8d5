//! Leaving a room that we are not in: rejecting an invite, taking back a knock, paying a debt (joins.md
//! J-75, J-81).
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#leaving-rooms-rejecting-invites>

use std::sync::Arc;
use std::time::Duration;

use protocol::build::PduDraft;
use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::nid::EventNid;
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use serde_json::{Map, json};

use crate::effect::{Effect, Handshake, Input, Machine, Now, StateKey, Ticket};
use crate::exchange::{Exchange, Exchanged, Failed};
use crate::facts::{Facts, Got, both};
use crate::out_of_band;
use crate::outbox::Outbox;
use crate::refusal::Refusal;
use crate::template::{Member, Own};
use crate::write::{Former, IntentChange, WriteSet};

/// A resident may take a join so long after we have stopped waiting for its answer. Until then its word that the
/// user is not in the room settles no debt.
pub const LATE_MAX: Duration = Duration::from_secs(600);

#[derive(Clone, Debug)]
pub struct LeaveRequest {
    pub room: RoomId,
    pub user: UserId,
    pub reason: Option<String>,
    pub why: Why,
}

#[derive(Clone, Debug)]
pub enum Why {
    /// The user holds an invite or a knock. If nobody takes the leave, it is made here alone.
    NotIn,
    /// A join of ours failed after it was sent: these servers may hold us as a member. The leave must be
    /// taken by one of them, or the debt stays.
    Owed {
        job: i64,
        candidates: Vec<ServerName>,
        /// What was sent. An invite that stands instead is not refused by this.
        joins: Vec<EventId>,
        /// From then on nothing of the join was on its way from here, as [`Now::since_start`].
        since: Duration,
    },
}

#[derive(Clone, Debug, PartialEq)]
pub struct Left {
    /// `None` when a debt turned out to be none.
    pub event_id: Option<EventId>,
    /// Whether another server knows of it.
    pub told: bool,
}

impl Left {
    fn by(leave: &Pdu, via: Option<&ServerName>) -> Self {
        Self {
            event_id: Some(leave.event_id.clone()),
            told: via.is_some(),
        }
    }
}

pub struct Leave {
    own: Own,
    request: LeaveRequest,
    state: State,
    /// The invite or knock that is being refused or taken back.
    held: Option<Held>,
    facts: Facts,
    out: Outbox,
    outcome: Option<Result<Left, Refusal>>,
}

struct Held {
    pdu: Arc<Pdu>,
    candidates: Vec<ServerName>,
    /// Its number, where it came from outside of the room.
    out_of_band: Option<EventNid>,
}

enum State {
    /// What is the user's membership here?
    Opening,
    Exchanging(Box<Exchange>),
    /// The event is made; its number is being looked up.
    Numbering(Arc<Pdu>, Option<ServerName>),
    Storing(Ticket, Arc<Pdu>, Option<ServerName>),
    /// The debt is being struck out.
    Settling(Ticket, Left),
    Done,
}

impl Leave {
    pub fn new(own: Own, request: LeaveRequest, now: Now) -> Self {
        let mut this = Self {
            own,
            state: State::Done,
            facts: Facts::new(request.room.clone()),
            request,
            held: None,
            out: Outbox::default(),
            outcome: None,
        };
        this.state = match this.request.why.clone() {
            Why::NotIn => this.open(now),
            Why::Owed {
                candidates, joins, ..
            } => this.exchange(&candidates, joins, now),
        };
        this
    }

    fn open(&mut self, now: Now) -> State {
        match self.held() {
            Err(lacking) => {
                self.facts.request(lacking, &mut self.out);
                State::Opening
            }
            Ok(Some(held)) => {
                let candidates = held.candidates.clone();
                self.held = Some(held);
                self.exchange(&candidates, Vec::new(), now)
            }
            Ok(None) => self.done(Err(Refusal::forbidden(
                "the user is not invited to the room",
            ))),
        }
    }

    /// The invite or knock, as it came to us, or as it stood in the room when we were last in it.
    fn held(&self) -> Got<Option<Held>> {
        let user = &self.request.user;
        let waits = |membership: &str| matches!(membership, "invite" | "knock");
        if let Some(stored) = self.facts.out_of_band(user)? {
            let sender = stored.pdu.sender.server_name();
            return Ok(waits(&stored.membership).then(|| Held {
                pdu: stored.pdu.clone(),
                candidates: vec![stored.via.clone(), sender],
                out_of_band: Some(stored.nid),
            }));
        }
        let (head, hosts) = both(self.facts.head(), self.facts.hosts())?;
        let Some(head) = head else {
            return Ok(None);
        };
        let key: StateKey = ("m.room.member".into(), user.as_str().into());
        self.facts.number(head.version, [], [key.clone()])?;
        let stood = self.facts.state_events(&head.state, &[key])?;
        let stood = stood.into_values().next().map(|(_, pdu)| pdu);
        let stood = stood.filter(|pdu| pdu.membership().is_some_and(waits));
        Ok(stood.map(|pdu| Held {
            candidates: [vec![pdu.sender.server_name()], hosts].concat(),
            pdu,
            out_of_band: None,
        }))
    }

    fn exchange(&mut self, candidates: &[ServerName], after: Vec<EventId>, now: Now) -> State {
        let member = Member {
            reason: self.request.reason.clone(),
            ..Member::default()
        };
        let whose = (self.request.room.clone(), self.request.user.clone());
        let own = self.own.clone();
        let what = Handshake::Leave;
        match Exchange::new(own, what, whose, member, candidates, &mut self.out) {
            Ok(exchange) => State::Exchanging(Box::new(exchange.only_after(after))),
            Err(failed) => self.on_failed(failed, now),
        }
    }

    fn on_exchanged(&mut self, done: Result<Exchanged, Failed>, now: Now) -> State {
        match done {
            Ok(exchanged) => match self.request.why {
                Why::NotIn => self.number(exchanged.pdu, Some(exchanged.via)),
                Why::Owed { job, .. } => {
                    let event_id = Some(exchanged.pdu.event_id.clone());
                    self.settle(job, exchanged.pdu.version, event_id)
                }
            },
            Err(failed) => self.on_failed(failed, now),
        }
    }

    fn on_failed(&mut self, failed: Failed, now: Now) -> State {
        match self.request.why {
            // All say that we are not there, and nothing can come in any more: there is nothing to leave.
            Why::Owed { job, since, .. }
                if failed.all_refused && now.since_start >= since + LATE_MAX =>
            {
                self.settle(job, RoomVersion::V1, None)
            }
            Why::Owed { .. } => self.done(Err(failed.refusal)),
            Why::NotIn => match self.local_leave(now) {
                Ok(pdu) => self.number(Arc::new(pdu), None),
                Err(refusal) => self.done(Err(refusal)),
            },
        }
    }

    fn settle(&mut self, job: i64, version: RoomVersion, event_id: Option<EventId>) -> State {
        let mut writes = WriteSet::new(self.request.room.clone(), version);
        writes.intent = Some(IntentChange::Forget { job });
        let told = event_id.is_some();
        State::Settling(self.out.commit(writes), Left { event_id, told })
    }

    /// A leave that is never sent: it only ends the matter for our user.
    fn local_leave(&self, now: Now) -> Result<Pdu, Refusal> {
        let held = self.held.as_ref().map(|held| &held.pdu);
        let invite = held.ok_or_else(|| Refusal::forbidden("the user is not invited"))?;
        let mut content = json!({ "membership": "leave" });
        if let Some(reason) = &self.request.reason {
            content["reason"] = reason.as_str().into();
        }
        let auth_events = invite.auth_events.iter().chain([&invite.event_id]);
        PduDraft {
            room_id: Some(self.request.room.clone()),
            sender: self.request.user.clone(),
            kind: "m.room.member".to_owned(),
            state_key: Some(self.request.user.as_str().to_owned()),
            content,
            prev_events: vec![invite.event_id.clone().into()],
            auth_events: auth_events.cloned().map(Into::into).collect(),
            depth: invite.depth.saturating_add(1),
            origin_server_ts: now.unix_ms,
            redacts: None,
            extra: Map::new(),
        }
        .sign(&self.own.key, &self.own.name, invite.version)
        .map_err(|error| Refusal::bad_json(error.to_string()))
    }

    fn number(&mut self, pdu: Arc<Pdu>, via: Option<ServerName>) -> State {
        match self.writes(&pdu, via.as_ref()) {
            Err(lacking) => {
                self.facts.request(lacking, &mut self.out);
                State::Numbering(pdu, via)
            }
            Ok(Some(writes)) => State::Storing(self.out.commit(writes), pdu, via),
            Ok(None) => self.done(Ok(Left::by(&pdu, via.as_ref()))),
        }
    }

    /// `None` when another invite came meanwhile: that one was not refused.
    fn writes(&self, pdu: &Arc<Pdu>, via: Option<&ServerName>) -> Got<Option<WriteSet>> {
        let user = &self.request.user;
        let there = self.facts.out_of_band(user)?.map(|stored| stored.nid);
        let former = self.held.as_ref().and_then(|held| held.out_of_band);
        if there != former {
            return Ok(None);
        }
        let via = via.unwrap_or(&self.own.name);
        let former = Former::Only(former);
        out_of_band::writes(&self.facts, pdu, user, via, Vec::new(), former).map(Some)
    }

    fn done(&mut self, outcome: Result<Left, Refusal>) -> State {
        self.outcome = Some(outcome);
        State::Done
    }
}

impl Machine for Leave {
    type Outcome = Result<Left, Refusal>;

    fn handle(&mut self, input: Input, now: Now) {
        self.state = match (std::mem::replace(&mut self.state, State::Done), input) {
            (State::Opening, Input::Loaded { ticket, loaded }) => {
                match self.facts.hear(ticket, loaded) {
                    true => self.open(now),
                    false => State::Opening,
                }
            }
            (State::Exchanging(mut exchange), input) => {
                match exchange.handle(input, &mut self.out, now) {
                    Some(done) => self.on_exchanged(done, now),
                    None => State::Exchanging(exchange),
                }
            }
            (State::Numbering(pdu, via), Input::Loaded { ticket, loaded }) => {
                match self.facts.hear(ticket, loaded) {
                    true => self.number(pdu, via),
                    false => State::Numbering(pdu, via),
                }
            }
            (State::Storing(t, pdu, via), Input::Committed { ticket, outcome }) if t == ticket => {
                match outcome {
                    Ok(()) => self.done(Ok(Left::by(&pdu, via.as_ref()))),
                    Err(_) => {
                        self.facts.forget();
                        self.number(pdu, via)
                    }
                }
            }
            (State::Settling(t, left), Input::Committed { ticket, .. }) if t == ticket => {
                self.done(Ok(left))
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
