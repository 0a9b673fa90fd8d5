//! Serving the handshakes of other servers' users (joins.md part 2): the decisions are in
//! `crates/room/src/resident.rs`; here are the questions it asks about other rooms, and the answers' bodies.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use protocol::id::{RoomId, ServerName, UserId};
use protocol::nid::EventNid;
use protocol::pdu::Pdu;
pub use room::effect::Handshake;
use room::effect::StateKey;
use room::receive::{Incoming, Receive};
use room::resident::{Accept, AcceptRequest, Accepted, Make, MakeRequest, SHOWN_STATE, Unserved};
use room::restricted::AllowedRooms;
use serde_json::{Value, json};
use storage::federation_reads as reads;
use storage::{events, rooms, state_log, states};

use crate::Homeserver;
use crate::drive::{Run, drive};
use crate::error::{MatrixError, Result};
use crate::federation_reads::EventStream;
use crate::limits::Limit;
use crate::rooms::stopping;

/// Memberships that name a room without a name (MSC3943).
const HEROES_MAX: usize = 5;
/// The joining server gives up after a minute or so, and what is caught up with stays.
const CATCH_UP_MAX: Duration = Duration::from_secs(30);
/// Times that a handshake is tried anew because a restricted rule changed under it, or as events were lacking.
const ROUNDS_MAX: u32 = 4;

/// What make_join and its kin were asked.
#[derive(Clone, Debug)]
pub struct MakeQuestion {
    pub what: Handshake,
    pub room: RoomId,
    pub user: UserId,
    pub origin: ServerName,
    /// `ver`, as it came.
    pub versions: Vec<String>,
}

/// What send_join and its kin were asked.
#[derive(Clone, Debug)]
pub struct SendQuestion {
    pub what: Handshake,
    pub room: RoomId,
    /// As the path names it.
    pub event_id: String,
    pub origin: ServerName,
    /// The body.
    pub event: Arc<str>,
}

/// How a send_join answer is to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JoinAnswer {
    pub omit_members: bool,
    /// The list of a status and the object, as version 1 of the endpoint has it.
    pub v1: bool,
}

impl Homeserver {
    /// The template of a membership event: `{room_version, event}`.
    pub async fn make_membership(&self, question: MakeQuestion) -> Result<Value> {
        if question.what == Handshake::Join {
            self.limit(Limit::RemoteJoin, question.room.as_str())?;
        }
        let mut allowed: Option<AllowedRooms> = None;
        for _ in 0..ROUNDS_MAX {
            let request = MakeRequest {
                what: question.what,
                room: question.room.clone(),
                user: question.user.clone(),
                origin: question.origin.clone(),
                versions: question.versions.clone(),
                allowed: allowed.take(),
            };
            let machine = Make::new(self.own().clone(), request, self.clock().now());
            let made = drive(self, Run::of(machine)).await.ok_or_else(stopping)?;
            match made {
                Ok(made) => {
                    return Ok(json!({
                        "room_version": made.version.as_str(),
                        "event": made.event,
                    }));
                }
                Err(Unserved::Refused(refusal)) => return Err(refusal.into()),
                Err(Unserved::AskAllowed(rooms)) => {
                    allowed = Some(self.rooms().allowed(&question.user, rooms).await?);
                }
                // A template comes after what is here.
                Err(Unserved::Behind { .. }) => return Err(behind()),
            }
        }
        Err(rules_change())
    }

    /// Takes a signed membership event into the room.
    async fn accept_membership(&self, question: &SendQuestion) -> Result<Accepted> {
        if question.what == Handshake::Join {
            self.limit(Limit::RemoteJoin, question.room.as_str())?;
        }
        let mut allowed: Option<AllowedRooms> = None;
        let mut failure = rules_change();
        for _ in 0..ROUNDS_MAX {
            let request = AcceptRequest {
                what: question.what,
                room: question.room.clone(),
                event_id: question.event_id.clone(),
                origin: question.origin.clone(),
                event: question.event.clone(),
                allowed: allowed.take(),
            };
            let machine = Accept::new(self.own().clone(), request);
            let accepted = drive(self, Run::of(machine)).await.ok_or_else(stopping)?;
            match accepted {
                Ok(accepted) => {
                    if accepted.extremities > 1 {
                        self.tie_extremities(question.room.clone());
                    }
                    return Ok(accepted);
                }
                Err(Unserved::Refused(refusal)) => return Err(refusal.into()),
                Err(Unserved::AskAllowed(rooms)) => {
                    let user = sender_of(&question.event)?;
                    allowed = Some(self.rooms().allowed(&user, rooms).await?);
                }
                Err(Unserved::Behind { from, events }) => {
                    failure = behind();
                    self.catch_up(&question.room, from, events).await;
                }
            }
        }
        Err(failure)
    }

    /// takes events that a joining event comes after, as if the server that gave them had sent them. It is
    /// asked about what these come after, in turn.
    async fn catch_up(&self, room: &RoomId, from: ServerName, events: Vec<Arc<Pdu>>) {
        let incoming = events.into_iter().map(|pdu| Incoming { pdu, staged: None });
        let machine = Receive::new(
            self.own().clone(),
            room.clone(),
            from,
            incoming.collect(),
            self.clock().now(),
        );
        let received = tokio::time::timeout(CATCH_UP_MAX, drive(self, Run::of(machine))).await;
        tracing::debug!(%room, ?received, "a joining event comes after some that were not here");
    }

    /// whoever joined learns of the other branches by an event that follows them all.
    fn tie_extremities(&self, room: RoomId) {
        let hs = self.clone();
        self.spawn_until_stop("tie_extremities", async move {
            if let Err(error) = hs.rooms().send_dummy(&room).await {
                tracing::debug!(%room, %error, "the branches stay apart until the next event");
            }
        });
    }

    /// `PUT /send_join`: the answer's body.
    pub async fn send_join(
        &self,
        question: SendQuestion,
        answer: JoinAnswer,
    ) -> Result<EventStream> {
        let accepted = self.accept_membership(&question).await?;
        let (room, join) = (question.room, accepted.event.clone());
        let before = accepted.state_before;
        let (state, chain) = self
            .store()
            .read(move |c| {
                let room = rooms::by_id(c, &room)?
                    .ok_or_else(|| storage::Error::corrupt("a room just joined is gone"))?;
                let state: Vec<EventNid> = if answer.omit_members {
                    let plain = reads::keys_without_members(c, room.nid)?;
                    let mut state: Vec<EventNid> = plain
                        .into_iter()
                        .filter_map(|key| before.get(key))
                        .collect();
                    let own: StateKey = ("m.room.member".into(), join.sender.as_str().into());
                    let names = ["m.room.name", "m.room.canonical_alias"];
                    let names = names.map(|kind| (kind.into(), "".into()));
                    let wanted = [std::slice::from_ref(&own), &names].concat();
                    let keys = states::keys(c, room.nid, &wanted)?;
                    let stands = |name| keys.get(name).and_then(|key| before.get(*key));
                    state.extend(stands(&own));
                    if !names.iter().any(|name| stands(name).is_some()) {
                        let user = &join.sender;
                        state.extend(reads::heroes(c, room.nid, &before, user, HEROES_MAX)?);
                    }
                    state
                } else {
                    before.iter().map(|(_, nid)| nid).collect()
                };
                let joined = events::nids(c, std::slice::from_ref(&join.event_id))?;
                let tops: Vec<EventNid> =
                    state.iter().copied().chain(joined.into_values()).collect();
                let mut chain = state_log::auth_chain(c, room.nid, &tops)?;
                if answer.omit_members {
                    // what stands in `state` need not come twice.
                    let state: HashSet<EventNid> = state.iter().copied().collect();
                    chain.retain(|nid| !state.contains(nid));
                }
                Ok((state, chain))
            })
            .await?;
        let mut head = json!({
            "origin": self.config().server_name,
            "members_omitted": answer.omit_members,
        });
        if answer.omit_members {
            head["servers_in_room"] = json!(accepted.servers_before);
        }
        let head = head.to_string();
        let open = if answer.v1 { "[200," } else { "" };
        let close = if answer.v1 { "]}]" } else { "]}" };
        let text = format!(
            "{open}{},\"event\":{},\"state\":[",
            head.trim_end_matches('}'),
            accepted.event.json
        );
        Ok(EventStream::new(self.store().clone())
            .text(text)
            .events(state)
            .text("],\"auth_chain\":[")
            .events(chain)
            .text(close))
    }

    /// `PUT /send_leave`
    pub async fn send_leave(&self, question: SendQuestion) -> Result<()> {
        self.accept_membership(&question).await.map(drop)
    }

    /// `PUT /send_knock`: what the knocker is shown of the room, as PDUs.
    pub async fn send_knock(&self, question: SendQuestion) -> Result<EventStream> {
        let accepted = self.accept_membership(&question).await?;
        let (room, before) = (question.room, accepted.state_before);
        let shown = self
            .store()
            .read(move |c| {
                let Some(room) = rooms::by_id(c, &room)? else {
                    return Ok(Vec::new());
                };
                let mut shown = Vec::new();
                for kind in SHOWN_STATE {
                    let key = states::key(c, room.nid, kind, "")?;
                    shown.extend(key.and_then(|key| before.get(key)));
                }
                Ok(shown)
            })
            .await?;
        Ok(EventStream::new(self.store().clone())
            .text("{\"knock_room_state\":[")
            .events(shown)
            .text("]}"))
    }
}

fn sender_of(event: &str) -> Result<UserId> {
    let event: Value =
        serde_json::from_str(event).map_err(|_| MatrixError::bad_json("The body is no event"))?;
    let sender = event.get("sender").and_then(Value::as_str);
    sender
        .and_then(|sender| UserId::parse(sender).ok())
        .ok_or_else(|| MatrixError::bad_json("The event has no sender"))
}

fn behind() -> MatrixError {
    MatrixError::new(500, "M_UNKNOWN", "The event's prev events are not known")
}

fn rules_change() -> MatrixError {
    MatrixError::forbidden("The room's join rules keep changing")
}
