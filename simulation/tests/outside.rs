//! Memberships in a room that we are not in: what is sent, and what gives way to what.

use std::sync::Arc;

use protocol::build::PduDraft;
use protocol::id::{EventId, RoomId, UserId};
use protocol::room_version::RoomVersion;
use room::effect::{Answer, Ask, AskError, Effect, Input, Load, Loaded, Machine, Place, Ticket};
use room::knock::{Knock, KnockRequest};
use room::leave::{LATE_MAX, Leave, LeaveRequest, Left, Why};
use room::refusal::Refusal;
use room::template::{Member, Own};
use room::write::{FanOut, Former, NewEvent, OutOfBand, Verdict, WriteSet};
use serde_json::{Map, json};
use simulation::fixture;
use simulation::store::Store;

const VERSION: RoomVersion = RoomVersion::V11;

/// One of our users, and a resident.
struct Outside {
    own: Own,
    resident: Own,
    user: UserId,
    room: RoomId,
    store: Store,
    made: i64,
}

impl Outside {
    fn new() -> Self {
        let resident = fixture::own(fixture::server(0));
        let own = fixture::own(fixture::server(1));
        Self {
            user: fixture::user("ann", &own.name),
            room: RoomId::parse("!room:s0").unwrap(),
            store: Store::new(own.name.clone()),
            own,
            resident,
            made: 0,
        }
    }

    /// What another server made of our user's membership is stored, whatever was there.
    fn put(&mut self, membership: &str) -> EventId {
        self.made += 1;
        let by = &self.resident;
        let draft = PduDraft {
            room_id: Some(self.room.clone()),
            sender: fixture::user("bob", &by.name),
            kind: "m.room.member".to_owned(),
            state_key: Some(self.user.to_string()),
            content: json!({ "membership": membership }),
            prev_events: vec![event("$create").into()],
            auth_events: vec![event("$create").into()],
            depth: 5,
            origin_server_ts: self.made,
            redacts: None,
            extra: Map::new(),
        };
        let pdu = Arc::new(draft.sign(&by.key, &by.name, VERSION).unwrap());
        let key = ("m.room.member".into(), self.user.as_str().into());
        let intern = Load::Intern {
            version: VERSION,
            ids: vec![pdu.event_id.clone()],
            keys: vec![key],
            new: false,
        };
        let Loaded::Interned { events, keys } = self.store.load(&self.room, intern) else {
            panic!("not numbers");
        };
        let mut writes = WriteSet::new(self.room.clone(), VERSION);
        writes.events.push(NewEvent {
            nid: events[0],
            pdu: pdu.clone(),
            key: Some(keys[0]),
            place: Place::Outlier,
            state: None,
            verdict: Verdict::Accepted,
            fan_out: FanOut::Nobody,
            transaction: None,
        });
        writes.out_of_band.push(OutOfBand {
            user: self.user.clone(),
            membership: membership.into(),
            event: events[0],
            instead_of: Former::Any,
            stripped_state: Vec::new(),
            via: self.resident.name.clone(),
        });
        assert!(self.store.commit(writes).is_ok());
        pdu.event_id.clone()
    }

    fn standing(&mut self) -> Option<(String, EventId)> {
        let user = self.user.clone();
        match self.store.load(&self.room, Load::OutOfBand { user }) {
            Loaded::OutOfBand(stored) => {
                stored.map(|stored| (stored.membership.to_string(), stored.pdu.event_id.clone()))
            }
            _ => panic!("not a membership"),
        }
    }

    fn template(&self, after: &[EventId], membership: &str) -> Result<Answer, AskError> {
        let event = json!({
            "type": "m.room.member", "room_id": self.room, "sender": self.user,
            "state_key": self.user, "content": { "membership": membership }, "depth": 9,
            "prev_events": after, "auth_events": after, "origin_server_ts": 1,
        });
        Ok(Answer::Made {
            room_version: Some(VERSION.as_str().to_owned()),
            event: event.to_string().into(),
        })
    }

    /// A leave that is owed since the start, offered at this time.
    fn owing(&self, join: &EventId, at_ms: u64) -> Leave {
        let request = LeaveRequest {
            room: self.room.clone(),
            user: self.user.clone(),
            reason: None,
            why: Why::Owed {
                job: 1,
                candidates: vec![self.resident.name.clone()],
                joins: vec![join.clone()],
                since: fixture::at(0).since_start,
            },
        };
        Leave::new(self.own.clone(), request, fixture::at(at_ms))
    }

    /// Runs to the next question to another server, or to the end.
    fn go<M: Machine>(&mut self, machine: &mut M, at_ms: u64) -> Next<M::Outcome> {
        loop {
            if let Some(outcome) = machine.poll_outcome() {
                return Next::Over(outcome);
            }
            match machine.poll_effect().expect("it neither ends nor wants") {
                Effect::Ask { ticket, ask, .. } => return Next::Asks(ticket, ask),
                effect => {
                    if let Some(input) = fixture::carry_out(effect, &mut self.store) {
                        machine.handle(input, fixture::at(at_ms));
                    }
                }
            }
        }
    }

    fn answered(&self, ticket: Ticket, answer: Result<Answer, AskError>) -> Input {
        Input::Answered {
            ticket,
            from: self.resident.name.clone(),
            answer,
        }
    }
}

enum Next<O> {
    Asks(Ticket, Ask),
    Over(O),
}

impl<O> Next<O> {
    fn making(self) -> Ticket {
        match self {
            Self::Asks(ticket, Ask::Make { .. }) => ticket,
            _ => panic!("it does not ask for a template"),
        }
    }

    fn sending(self) -> Ticket {
        match self {
            Self::Asks(ticket, Ask::Send { .. }) => ticket,
            _ => panic!("it does not send"),
        }
    }

    fn outcome(self) -> O {
        match self {
            Self::Over(outcome) => outcome,
            Self::Asks(_, ask) => panic!("it still asks {ask:?}"),
        }
    }
}

fn event(id: &str) -> EventId {
    EventId::parse(&format!("{id:_<44}")).unwrap()
}

fn not_in_the_room() -> Result<Answer, AskError> {
    Err(AskError::Refused {
        status: 403,
        errcode: "M_FORBIDDEN".to_owned(),
        error: "the user is not in the room".to_owned(),
        body: "{}".into(),
    })
}

fn offer(
    outside: &mut Outside,
    join: &EventId,
    at_ms: u64,
    answer: Result<Answer, AskError>,
) -> Result<Left, Refusal> {
    let mut leave = outside.owing(join, at_ms);
    let ticket = outside.go(&mut leave, at_ms).making();
    let input = outside.answered(ticket, answer);
    leave.handle(input, fixture::at(at_ms));
    outside.go(&mut leave, at_ms).outcome()
}

/// J-75: the send_join may still be under way to a resident, or be worked on there.
#[test]
fn a_refusal_settles_a_debt_only_when_no_join_can_come_in_any_more() {
    let mut outside = Outside::new();
    let join = event("$join");
    let late_ms = u64::try_from(LATE_MAX.as_millis()).unwrap();
    for at_ms in [10_000, late_ms - 1] {
        let refused = offer(&mut outside, &join, at_ms, not_in_the_room());
        assert_eq!(refused.unwrap_err().status, 403);
    }
    let none = Left {
        event_id: None,
        told: false,
    };
    assert_eq!(
        offer(&mut outside, &join, late_ms, not_in_the_room()),
        Ok(none)
    );
}

#[test]
fn a_debt_is_no_reason_to_refuse_an_invite() {
    let mut outside = Outside::new();
    let (join, invite) = (event("$join"), event("$invite"));
    let template = outside.template(&[event("$create"), invite], "leave");
    assert!(offer(&mut outside, &join, 10_000, template).is_err());

    let mut leave = outside.owing(&join, 10_000);
    let ticket = outside.go(&mut leave, 10_000).making();
    let template = outside.template(&[event("$create"), join], "leave");
    leave.handle(outside.answered(ticket, template), fixture::at(10_000));
    let ticket = outside.go(&mut leave, 10_000).sending();
    let taken = outside.answered(ticket, Ok(Answer::SentLeave));
    leave.handle(taken, fixture::at(10_000));
    assert!(outside.go(&mut leave, 10_000).outcome().unwrap().told);
}

/// Bots answer a knock within milliseconds; and the refusal of an earlier one may be late.
#[test]
fn j_80_an_invite_that_is_here_before_the_answer_to_the_knock_stands() {
    for meanwhile in [None, Some("invite"), Some("leave")] {
        let mut outside = Outside::new();
        let request = KnockRequest {
            room: outside.room.clone(),
            user: outside.user.clone(),
            candidates: vec![outside.resident.name.clone()],
            member: Member::default(),
        };
        let mut knock = Knock::new(outside.own.clone(), request);
        let ticket = outside.go(&mut knock, 0).making();
        let template = outside.template(&[event("$create")], "knock");
        knock.handle(outside.answered(ticket, template), fixture::at(0));
        let ticket = outside.go(&mut knock, 0).sending();
        let came = meanwhile.map(|membership| outside.put(membership));
        let room_state = Vec::new();
        let taken = outside.answered(ticket, Ok(Answer::SentKnock { room_state }));
        knock.handle(taken, fixture::at(0));
        let knocked = outside.go(&mut knock, 0).outcome().unwrap();
        let stands = match (meanwhile, came) {
            (Some("invite"), Some(invite)) => ("invite".to_owned(), invite),
            _ => ("knock".to_owned(), knocked.event_id),
        };
        assert_eq!(outside.standing(), Some(stands));
    }
}

/// J-81.
#[test]
fn a_newer_invite_is_not_refused_with_the_former() {
    for newer in [false, true] {
        let mut outside = Outside::new();
        let invite = outside.put("invite");
        let request = LeaveRequest {
            room: outside.room.clone(),
            user: outside.user.clone(),
            reason: None,
            why: Why::NotIn,
        };
        let mut leave = Leave::new(outside.own.clone(), request, fixture::at(0));
        let ticket = outside.go(&mut leave, 0).making();
        let template = outside.template(&[event("$create"), invite], "leave");
        leave.handle(outside.answered(ticket, template), fixture::at(0));
        let ticket = outside.go(&mut leave, 0).sending();
        let newer = newer.then(|| outside.put("invite"));
        leave.handle(
            outside.answered(ticket, Ok(Answer::SentLeave)),
            fixture::at(0),
        );
        let left = outside.go(&mut leave, 0).outcome().unwrap();
        assert!(left.told);
        let stands = match newer {
            Some(newer) => ("invite".to_owned(), newer),
            None => ("leave".to_owned(), left.event_id.unwrap()),
        };
        assert_eq!(outside.standing(), Some(stands));
    }
}
