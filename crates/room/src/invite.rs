//! Inviting a user of another server, and being invited by one (joins.md ).
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#inviting-to-a-room>

use std::sync::Arc;
use std::time::Duration;

use protocol::build;
use protocol::id::{RoomId, ServerName, UserId};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use serde_json::{Map, Value};

use crate::acl;
use crate::candidates::{self, Failure, Half};
use crate::effect::{
    Answer, Ask, AskError, BadPdu, Effect, Head, Input, Machine, Now, RawPdu, StateKey, Ticket,
};
use crate::facts::{Facts, Got, both};
use crate::judge;
use crate::out_of_band;
use crate::outbox::Outbox;
use crate::refusal::Refusal;
use crate::resident::shown_state;
use crate::send::{self, Draft, Sent, SentEvent, Unsent};
use crate::template::Own;
use crate::thinking::{Decide, Decision, Thinking};
use crate::view::{Placed, View, split_prevs};
use crate::write::{FanOut, Former, Transaction, Verdict, WriteSet};

const INVITE_TIMEOUT: Duration = Duration::from_secs(60);
/// Entries of `invite_room_state` that are kept.
const SHOWN_STATE_MAX: usize = 100;

// -- inviting -------------------------------------------------------------------------------------

/// Invites a user of another server: that server signs first, then the room hears of it.
pub struct Invite {
    own: Own,
    room: RoomId,
    draft: Draft,
    invitee: ServerName,
    state: State,
    out: Outbox,
    outcome: Option<Result<Sent, Unsent>>,
}

enum State {
    Composing(Box<Facts>, Now),
    Asking(Ticket, Arc<Pdu>),
    Checking(Ticket, Arc<Pdu>),
    Placing(Box<Thinking<Placing>>),
    Done,
}

impl Invite {
    /// `draft` is the membership event of the invite; its state key names a user of another server.
    pub fn new(own: Own, room: RoomId, draft: Draft, now: Now) -> Result<Self, Refusal> {
        let invitee = draft.state_key.as_deref().map(UserId::parse);
        let Some(Ok(invitee)) = invitee else {
            return Err(Refusal::invalid_param("not a user id"));
        };
        let mut this = Self {
            own,
            draft,
            invitee: invitee.server_name(),
            state: State::Done,
            out: Outbox::default(),
            outcome: None,
            room: room.clone(),
        };
        this.state = this.compose(Box::new(Facts::new(room)), now);
        Ok(this)
    }

    fn compose(&mut self, mut facts: Box<Facts>, now: Now) -> State {
        match self.composed(&mut facts, now) {
            Err(lacking) => {
                facts.request(lacking, &mut self.out);
                State::Composing(facts, now)
            }
            Ok(Err(unsent)) => self.done(Err(unsent)),
            Ok(Ok((pdu, ask))) => {
                let ticket = self.out.ask(&self.invitee, ask, INVITE_TIMEOUT);
                State::Asking(ticket, pdu)
            }
        }
    }

    fn composed(&self, facts: &mut Facts, now: Now) -> Got<Result<(Arc<Pdu>, Ask), Unsent>> {
        let (pdu, before) = match send::compose(&self.own, facts, &self.draft, now)? {
            Ok(Some(composed)) => composed,
            Ok(None) => return Ok(Err(Refusal::forbidden("the user is invited already").into())),
            Err(unsent) => return Ok(Err(unsent)),
        };
        let stripped_state = shown_state(facts, pdu.version, &before, &[&self.draft.sender])?;
        let ask = Ask::Invite {
            room: self.room.clone(),
            event_id: pdu.event_id.clone(),
            version: pdu.version,
            event: pdu.json.clone(),
            stripped_state,
        };
        Ok(Ok((pdu, ask)))
    }

    fn on_answer(&mut self, pdu: Arc<Pdu>, answer: Result<Answer, AskError>) -> State {
        match answer {
            Ok(Answer::Invited { event }) => {
                State::Checking(self.out.check(pdu.version, vec![event]), pdu)
            }
            Ok(_) => self.done(Err(Refusal::bad_gateway("an answer of another kind").into())),
            Err(error) => {
                let refusal = refusal_of(&error, pdu.version);
                self.done(Err(refusal.into()))
            }
        }
    }

    fn on_checked(&mut self, pdu: &Pdu, checked: Option<Result<Arc<Pdu>, BadPdu>>) -> State {
        let signed = match checked {
            Some(Ok(signed)) if signed.event_id == pdu.event_id => signed,
            _ => return self.done(Err(Refusal::bad_gateway("another event came back").into())),
        };
        if !signed
            .signatures()
            .any(|signature| signature.server == self.invitee.as_str())
        {
            let refusal = Refusal::bad_gateway("the invite came back without a signature");
            return self.done(Err(refusal.into()));
        }
        let placing = Placing {
            own: self.own.name.clone(),
            pdu: signed,
            transaction: self.draft.transaction.clone(),
        };
        let facts = Facts::new(self.room.clone());
        let thinking = Thinking::new(placing, facts, &mut self.out);
        self.settle(Box::new(thinking))
    }

    fn settle(&mut self, mut thinking: Box<Thinking<Placing>>) -> State {
        match thinking.take_outcome() {
            Some(outcome) => self.done(outcome),
            None => State::Placing(thinking),
        }
    }

    fn done(&mut self, outcome: Result<Sent, Unsent>) -> State {
        self.outcome = Some(outcome);
        State::Done
    }
}

/// what the inviter hears when the invitee's server does not take the invite.
fn refusal_of(error: &AskError, version: RoomVersion) -> Refusal {
    if let AskError::Refused { errcode, .. } = error
        && errcode == "M_UNRECOGNIZED"
    {
        return Refusal::unsupported_version(version.as_str());
    }
    match candidates::classify(Half::Send, error) {
        Failure::Final(refusal) | Failure::NotFound(refusal) | Failure::Unable(refusal) => refusal,
        Failure::Unreachable { reason } => Refusal::bad_gateway(format!(
            "the user's server did not take the invite: {reason}"
        )),
    }
}

impl Machine for Invite {
    type Outcome = Result<Sent, Unsent>;

    fn handle(&mut self, input: Input, _: Now) {
        self.state = match (std::mem::replace(&mut self.state, State::Done), input) {
            (State::Composing(mut facts, now), Input::Loaded { ticket, loaded }) => {
                match facts.hear(ticket, loaded) {
                    true => self.compose(facts, now),
                    false => State::Composing(facts, now),
                }
            }
            (State::Composing(mut facts, now), Input::Answered { ticket, answer, .. }) => {
                match facts.hear_answer(ticket, answer) {
                    true => self.compose(facts, now),
                    false => State::Composing(facts, now),
                }
            }
            (State::Asking(t, pdu), Input::Answered { ticket, answer, .. }) if t == ticket => {
                self.on_answer(pdu, answer)
            }
            (State::Checking(t, pdu), Input::Checked { ticket, pdus }) if t == ticket => {
                self.on_checked(&pdu, pdus.into_iter().next())
            }
            (State::Placing(mut thinking), input) => {
                thinking.handle(input, &mut self.out);
                self.settle(thinking)
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

/// An event of ours that another server has signed too goes where it was made for, wherever the room is by
/// now.
struct Placing {
    own: ServerName,
    pdu: Arc<Pdu>,
    transaction: Option<Transaction>,
}

impl Decide for Placing {
    type Outcome = Result<Sent, Unsent>;

    fn wants_proof(outcome: &Self::Outcome) -> bool {
        outcome.is_err()
    }

    fn decide(&self, facts: &mut Facts) -> Got<Decision<Self::Outcome>> {
        let pdu = &self.pdu;
        let (head, hosts) = both(facts.head(), facts.hosts())?;
        let Some(head) = head else {
            return Ok(Decision::Done(Err(
                Refusal::not_found("the room is gone").into()
            )));
        };
        let (known, _) = split_prevs(facts, &pdu.prev_events)?;
        let mut view = View::of(&head);
        let (before, partial) = view.before(facts, &known)?;
        if let Some(Verdict::Rejected(reason)) =
            judge::on_full_state(facts, head.version, pdu, &before)?
        {
            return Ok(Decision::Done(Err(Refusal::forbidden(reason).into())));
        }
        if let Err(reason) = facts.check_against(pdu, &head.state)? {
            return Ok(Decision::Done(Err(Refusal::forbidden(reason).into())));
        }
        let fan_out: FanOut =
            send::destinations(pdu, None, &hosts, head.partial.as_ref(), &self.own);
        let placed = Placed::new(facts, pdu.clone(), before, partial, Verdict::Accepted);
        view.add(facts, &placed)?;
        let sent = Sent {
            room: facts.room.clone(),
            version: head.version,
            events: vec![SentEvent {
                event_id: pdu.event_id.clone(),
                nid: placed.nid,
                unchanged: false,
            }],
        };
        let mut writes = WriteSet::new(facts.room.clone(), head.version);
        writes.expect = Some(head.revision);
        writes.events = vec![placed.into_event(fan_out, self.transaction.clone())];
        view.write(&mut writes);
        Ok(Decision::Commit {
            writes: Box::new(writes),
            outcome: Ok(sent),
            tell: Vec::new(),
        })
    }
}

// -- being invited --------------------------------------------------------------------------------

#[derive(Clone, Debug)]
pub struct ReceivedInvite {
    pub room: RoomId,
    /// As the path names it.
    pub event_id: String,
    pub origin: ServerName,
    /// `room_version` of the body; v1 has none, and means version 1 or 2.
    pub version: Option<String>,
    pub event: RawPdu,
    /// `invite_room_state`, entries as they stood.
    pub shown_state: Vec<Arc<str>>,
}

/// Takes an invite for one of our users: checks it, signs it, stores it out of band.
///
/// That the invited user exists here, and has not blocked the inviter, is the caller's to see to.
pub struct TakeInvite {
    own: Own,
    invite: ReceivedInvite,
    state: Taking,
    out: Outbox,
    outcome: Option<Result<Arc<Pdu>, Refusal>>,
}

enum Taking {
    /// In a room we know, its ACL is heard.
    Opening(Box<Facts>, Box<Pdu>),
    Checking(Ticket),
    Storing(Box<Thinking<StoreInvite>>),
    Done,
}

impl TakeInvite {
    pub fn new(own: Own, invite: ReceivedInvite) -> Self {
        let mut this = Self {
            own,
            state: Taking::Done,
            out: Outbox::default(),
            outcome: None,
            invite,
        };
        this.state = match this.inspect() {
            Ok(pdu) => {
                let facts = Facts::new(this.invite.room.clone());
                this.open(Box::new(facts), Box::new(pdu))
            }
            Err(refusal) => this.done(Err(refusal)),
        };
        this
    }

    /// R-62, but for ACL and signatures.
    fn inspect(&self) -> Result<Pdu, Refusal> {
        let invite = &self.invite;
        let named = invite.version.as_deref().unwrap_or("1");
        let Some(version) = RoomVersion::parse(named) else {
            let mut refusal = Refusal::incompatible_version(RoomVersion::V1);
            refusal
                .extra
                .insert("room_version".to_owned(), named.into());
            return Err(refusal);
        };
        let pdu = Pdu::parse(&invite.event, version).map_err(|error| Refusal::bad_event(&error))?;
        let wrong = |what: &str| Err(Refusal::invalid_param(format!("wrong {what}")));
        if pdu.room_id != invite.room {
            return wrong("room_id");
        }
        if pdu.event_id.as_str() != invite.event_id {
            return wrong("event id");
        }
        if pdu.membership() != Some("invite") {
            return wrong("membership");
        }
        if pdu.sender.server_name() != invite.origin {
            return wrong("sender");
        }
        match pdu.state_key.as_deref().map(UserId::parse) {
            Some(Ok(user)) if user.server_name() == self.own.name => Ok(pdu),
            _ => wrong("state_key"),
        }
    }

    fn open(&mut self, mut facts: Box<Facts>, pdu: Box<Pdu>) -> Taking {
        match self.acl_allows(&facts) {
            Err(lacking) => {
                facts.request(lacking, &mut self.out);
                Taking::Opening(facts, pdu)
            }
            Ok(false) => self.done(Err(Refusal::forbidden(
                "the room's ACL shuts this server out",
            ))),
            Ok(true) => match self.create_pdu(pdu.version) {
                Err(refusal) => self.done(Err(refusal)),
                Ok(create) => {
                    let pdus = std::iter::once(pdu.json.clone()).chain(create).collect();
                    Taking::Checking(self.out.check(pdu.version, pdus))
                }
            },
        }
    }

    fn acl_allows(&self, facts: &Facts) -> Got<bool> {
        let Some(head) = facts.head()? else {
            return Ok(true);
        };
        let head: &Head = &head;
        let key: StateKey = ("m.room.server_acl".into(), "".into());
        facts.number(head.version, [], [key.clone()])?;
        let events = facts.state_events(&head.state, std::slice::from_ref(&key))?;
        let acl = events.get(&key).map(|(_, pdu)| &**pdu);
        Ok(acl::allows(acl, &self.invite.origin))
    }

    /// From version 12 on the create event shows what room this is.
    fn create_pdu(&self, version: RoomVersion) -> Result<Option<RawPdu>, Refusal> {
        if !version.rules().room_id_is_create_hash {
            return Ok(None);
        }
        let is_create = |entry: &&Arc<str>| {
            let entry: Map<String, Value> = serde_json::from_str(entry).unwrap_or_default();
            entry.get("type").and_then(Value::as_str) == Some("m.room.create")
        };
        match self.invite.shown_state.iter().find(is_create) {
            None => Err(Refusal::missing_param(
                "invite_room_state has no create event",
            )),
            Some(create) => match Pdu::parse(create, version) {
                Ok(pdu) if pdu.room_id == self.invite.room => Ok(Some(create.clone())),
                _ => Err(Refusal::invalid_param(
                    "the create event is that of another room",
                )),
            },
        }
    }

    fn on_checked(&mut self, pdus: Vec<Result<Arc<Pdu>, BadPdu>>) -> Taking {
        let mut pdus = pdus.into_iter();
        let pdu = match pdus.next() {
            Some(Ok(pdu)) => pdu,
            _ => return self.done(Err(Refusal::forbidden("the invite is not properly signed"))),
        };
        if pdus.any(|create| create.is_err()) {
            let refusal = Refusal::invalid_param("the create event is not properly signed");
            return self.done(Err(refusal));
        }
        let signed = match build::cosign(&pdu, &self.own.key, &self.own.name) {
            Ok(signed) => Arc::new(signed),
            Err(error) => return self.done(Err(Refusal::bad_json(error.to_string()))),
        };
        let mut shown_state = self.invite.shown_state.clone();
        shown_state.truncate(SHOWN_STATE_MAX);
        let store = StoreInvite {
            pdu: signed,
            via: self.invite.origin.clone(),
            shown_state,
        };
        let facts = Facts::new(self.invite.room.clone());
        let thinking = Thinking::new(store, facts, &mut self.out);
        self.settle(Box::new(thinking))
    }

    fn settle(&mut self, mut thinking: Box<Thinking<StoreInvite>>) -> Taking {
        match thinking.take_outcome() {
            Some(outcome) => self.done(outcome),
            None => Taking::Storing(thinking),
        }
    }

    fn done(&mut self, outcome: Result<Arc<Pdu>, Refusal>) -> Taking {
        self.outcome = Some(outcome);
        Taking::Done
    }
}

impl Machine for TakeInvite {
    /// The invite with our signature.
    type Outcome = Result<Arc<Pdu>, Refusal>;

    fn handle(&mut self, input: Input, _: Now) {
        self.state = match (std::mem::replace(&mut self.state, Taking::Done), input) {
            (Taking::Opening(mut facts, pdu), Input::Loaded { ticket, loaded }) => {
                match facts.hear(ticket, loaded) {
                    true => self.open(facts, pdu),
                    false => Taking::Opening(facts, pdu),
                }
            }
            (Taking::Checking(t), Input::Checked { ticket, pdus }) if t == ticket => {
                self.on_checked(pdus)
            }
            (Taking::Storing(mut thinking), input) => {
                thinking.handle(input, &mut self.out);
                self.settle(thinking)
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

struct StoreInvite {
    pdu: Arc<Pdu>,
    via: ServerName,
    shown_state: Vec<Arc<str>>,
}

impl Decide for StoreInvite {
    type Outcome = Result<Arc<Pdu>, Refusal>;

    fn wants_proof(outcome: &Self::Outcome) -> bool {
        outcome.is_err()
    }

    fn decide(&self, facts: &mut Facts) -> Got<Decision<Self::Outcome>> {
        let user = self.pdu.state_key.as_deref().map(UserId::parse);
        let Some(Ok(user)) = user else {
            return Ok(Decision::Done(Err(Refusal::invalid_param(
                "wrong state_key",
            ))));
        };
        let shown = self.shown_state.clone();
        let writes = out_of_band::writes(facts, &self.pdu, &user, &self.via, shown, Former::Any)?;
        Ok(Decision::Commit {
            writes: Box::new(writes),
            outcome: Ok(self.pdu.clone()),
            tell: Vec::new(),
        })
    }
}
