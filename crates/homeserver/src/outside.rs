//! Memberships across the border of a room: leaving, inviting and knocking where other servers have a say,
//! and history that they hold.

use std::sync::Arc;
use std::time::Duration;

use federation::Direction;
use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::pdu::Pdu;
use room::backfill::Backfill;
use room::effect::{Load, Loaded};
pub use room::invite::ReceivedInvite;
use room::invite::{Invite, TakeInvite};
use room::knock::{Knock, KnockRequest};
use room::leave::{Leave, LeaveRequest, Why};
use room::send::{self, Unsent};
use serde_json::{Value, json};
use storage::load;
use storage::queues;

use crate::Homeserver;
use crate::drive::{Run, drive};
use crate::error::{MatrixError, Result};
use crate::rooms::{Rooms, content_of, stopping};
use crate::tasks::Debt;

/// Servers asked for the event at a time; the spec wants no more than a try.
const TIMESTAMP_SERVERS_MAX: usize = 5;

/// Events fetched with one that another server told us of.
const AT_EVENTS: u32 = 20;

/// An event that another server holds.
#[derive(Clone, Debug, PartialEq)]
pub struct Elsewhere {
    pub event_id: EventId,
    pub ts_ms: i64,
    pub server: ServerName,
}

impl Rooms<'_> {
    /// Leaves a room, or refuses an invite, or takes a knock back. Never waits for a resync (C-2).
    pub async fn leave(&self, user: &UserId, room: &RoomId, reason: Option<String>) -> Result<()> {
        let membership = self.membership(room, user).await?;
        match membership.as_deref() {
            Some("join" | "invite" | "knock") => {}
            // Who is out already is out.
            Some("leave") => return Ok(()),
            Some(_) => return Err(MatrixError::forbidden("You are banned from this room")),
            None => return Err(MatrixError::forbidden("You are not in this room")),
        }
        let inside = match self.head(room).await? {
            // A room that nobody is in is nobody's but ours to change.
            Some(head) if head.local_joined.is_empty() => self.servers(room).await?.is_empty(),
            Some(_) => true,
            None => false,
        };
        if inside {
            let mut content = json!({ "membership": "leave" });
            if let Some(reason) = reason {
                content["reason"] = Value::from(reason);
            }
            let draft = send::Draft::state(user.clone(), "m.room.member", user.as_str(), content);
            return self.send_all(vec![draft], room).await.map(drop);
        }
        let request = LeaveRequest {
            room: room.clone(),
            user: user.clone(),
            reason,
            why: Why::NotIn,
        };
        let machine = Leave::new(self.hs.own().clone(), request, self.hs.clock().now());
        let left = drive(self.hs, Run::of(machine))
            .await
            .ok_or_else(stopping)??;
        tracing::info!(%room, %user, told = left.told, "left a room that this server is not in");
        Ok(())
    }

    /// Offers a leave, owed since then ([`Why::Owed`]), to the servers that may hold our user as a member.
    pub(crate) async fn pay_debt(&self, debt: &Debt, since: Duration) -> Result<()> {
        // Not while a join of theirs runs; and who has come in since owes nothing.
        let lock = self.hs.handshakes().lock_of(&debt.room);
        let _no_join_meanwhile = lock.lock_owned().await;
        if self.membership(&debt.room, &debt.user).await?.as_deref() == Some("join") {
            return self.settle(debt.job).await;
        }
        let servers = self.servers(&debt.room).await?;
        let request = LeaveRequest {
            room: debt.room.clone(),
            user: debt.user.clone(),
            reason: None,
            why: Why::Owed {
                job: debt.job,
                candidates: [debt.via.as_slice(), &servers].concat(),
                joins: debt.joins.clone(),
                since,
            },
        };
        let machine = Leave::new(self.hs.own().clone(), request, self.hs.clock().now());
        drive(self.hs, Run::of(machine))
            .await
            .ok_or_else(stopping)??;
        self.settle(debt.job).await
    }

    async fn settle(&self, job: i64) -> Result<()> {
        self.hs
            .store()
            .write(move |c| queues::settle(c, job))
            .await?;
        Ok(())
    }

    /// Invites a user of this server or of another one.
    pub async fn invite(
        &self,
        sender: &UserId,
        room: &RoomId,
        target: &UserId,
        reason: Option<String>,
        is_direct: bool,
    ) -> Result<()> {
        let ours = self.hs.config().is_ours(target);
        if self.hs.is_notices_user(target) {
            return Err(MatrixError::forbidden("This user can not be invited"));
        }
        let mut member = match ours {
            true => self.member(target, None).await?,
            false => room::template::Member::default(),
        };
        member.reason = reason;
        let mut content = content_of("invite", &member);
        if is_direct {
            content["is_direct"] = Value::from(true);
        }
        self.invite_with(sender, room, target, content).await
    }

    /// Invites with this content.
    pub(crate) async fn invite_with(
        &self,
        sender: &UserId,
        room: &RoomId,
        target: &UserId,
        content: Value,
    ) -> Result<()> {
        let draft = send::Draft::state(sender.clone(), "m.room.member", target.as_str(), content);
        if self.hs.config().is_ours(target) {
            self.hs.check_may_invite(target, sender).await?;
            return self.send_all(vec![draft], room).await.map(drop);
        }
        let machine = Invite::new(
            self.hs.own().clone(),
            room.clone(),
            draft,
            self.hs.clock().now(),
        )?;
        match drive(self.hs, Run::of(machine))
            .await
            .ok_or_else(stopping)?
        {
            Ok(_) => Ok(()),
            Err(Unsent::Refused(refusal)) => Err(refusal.into()),
            Err(_) => Err(MatrixError::forbidden("You may not invite to this room")),
        }
    }

    /// `POST /knock/{roomIdOrAlias}` (J-80).
    pub async fn knock(
        &self,
        user: &UserId,
        target: &str,
        via: Vec<ServerName>,
        reason: Option<String>,
    ) -> Result<RoomId> {
        let (room, servers) = self.resolve(target, via).await?;
        let member = self.member(user, reason).await?;
        let head = self.head(&room).await?;
        if let Some(head) = &head
            && !head.local_joined.is_empty()
            && head.partial.is_none()
        {
            let content = content_of("knock", &member);
            let draft = send::Draft::state(user.clone(), "m.room.member", user.as_str(), content);
            self.send_all(vec![draft], &room).await?;
            return Ok(room);
        }
        let candidates = self
            .candidates(&room, user, servers, head.as_deref())
            .await?;
        let request = KnockRequest {
            room: room.clone(),
            user: user.clone(),
            candidates,
            member,
        };
        let machine = Knock::new(self.hs.own().clone(), request);
        drive(self.hs, Run::of(machine))
            .await
            .ok_or_else(stopping)??;
        Ok(room)
    }

    /// Fetches history. `true`: other servers gave some.
    pub async fn backfill(&self, room: &RoomId, limit: u32) -> Result<bool> {
        let (own, now) = (self.hs.own().clone(), self.hs.clock().now());
        self.run_backfill(Backfill::new(own, room.clone(), limit, now))
            .await
    }

    /// Fetches the history before an event, and the event, from a server that has it.
    pub async fn backfill_at(
        &self,
        room: &RoomId,
        event: &EventId,
        server: &ServerName,
    ) -> Result<bool> {
        let (own, now) = (self.hs.own().clone(), self.hs.clock().now());
        let at = (event.clone(), server.clone());
        self.run_backfill(Backfill::at(own, room.clone(), at, AT_EVENTS, now))
            .await
    }

    async fn run_backfill(&self, machine: Backfill) -> Result<bool> {
        let fetched = drive(self.hs, Run::of(machine))
            .await
            .ok_or_else(stopping)?;
        Ok(fetched.events > 0)
    }

    /// What other servers in the room hold nearest to a time (C-17).
    pub async fn timestamp_to_event(
        &self,
        room: &RoomId,
        ts_ms: i64,
        forward: bool,
    ) -> Result<Option<Elsewhere>> {
        let direction = if forward {
            Direction::Forward
        } else {
            Direction::Backward
        };
        for server in self
            .servers(room)
            .await?
            .into_iter()
            .take(TIMESTAMP_SERVERS_MAX)
        {
            match self
                .hs
                .client()
                .timestamp_to_event(&server, room, ts_ms, direction)
                .await
            {
                Ok(found) => {
                    return Ok(Some(Elsewhere {
                        event_id: found.event_id,
                        ts_ms: found.origin_server_ts,
                        server,
                    }));
                }
                Err(error) => tracing::debug!(%room, %server, ?error, "no event for that time"),
            }
        }
        Ok(None)
    }

    /// Whether a user holds an invite to a room, and who sent it.
    pub async fn pending_invite(&self, room: &RoomId, user: &UserId) -> Result<Option<UserId>> {
        let load = Load::OutOfBand { user: user.clone() };
        Ok(match load::load(self.hs.store(), room, load).await? {
            Loaded::OutOfBand(Some(held)) if &*held.membership == "invite" => {
                Some(held.pdu.sender.clone())
            }
            _ => None,
        })
    }
}

impl Homeserver {
    /// `PUT /invite/{roomId}/{eventId}`: checks, signs and keeps an invite for one of our users. The
    /// answer is the event with our signature.
    pub async fn take_invite(&self, invite: ReceivedInvite) -> Result<Arc<Pdu>> {
        let event: Value = serde_json::from_str(&invite.event).unwrap_or_default();
        let user = |key: &str| UserId::parse(event.get(key)?.as_str()?).ok();
        let inviter = user("sender");
        let invitee = user("state_key").filter(|user| self.config().is_ours(user));
        if let Some(user) = invitee {
            if !self.user_exists(&user).await? {
                return Err(MatrixError::not_found("There is no such user"));
            }
            if self.is_notices_user(&user) {
                return Err(MatrixError::forbidden("This user can not be invited"));
            }
            if let Some(inviter) = inviter {
                self.check_may_invite(&user, &inviter).await?;
            }
        }
        let machine = TakeInvite::new(self.own().clone(), invite);
        Ok(drive(self, Run::of(machine)).await.ok_or_else(stopping)??)
    }
}
