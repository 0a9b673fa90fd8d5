//! Guests: where they may go, and when they have to leave (J-83, P-22b).
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#guest-access>

use protocol::id::{RoomId, UserId};
use serde_json::Value;
use storage::apply::Applied;
use storage::{Conn, accounts, timeline};

use crate::Homeserver;
use crate::error::{MatrixError, Result};

const GUEST_ACCESS: &str = "m.room.guest_access";

impl Homeserver {
    /// A guest joins only where the state that we hold lets guests in; so never a room we are not in. The
    /// answer is whether the user is one.
    pub(crate) async fn check_guest(&self, user: &UserId, room: &RoomId) -> Result<bool> {
        let (user, room) = (user.clone(), room.clone());
        let (guest, allowed) = self
            .store()
            .read(move |c| {
                let guest = is_guest(c, &user)?;
                Ok((guest, !guest || lets_guests_in(c, &room)?))
            })
            .await?;
        match allowed {
            true => Ok(guest),
            false => Err(MatrixError::guest_access_forbidden(
                "Guests may not join this room",
            )),
        }
    }

    /// Our guests leave a room that shuts them out.
    pub(crate) fn mind_guests(&self, room: &RoomId, applied: &Applied) {
        let told = applied.events.iter().any(|placed| {
            placed.accepted && &*placed.pdu.kind == GUEST_ACCESS && placed.pdu.state_key.is_some()
        });
        if !told && applied.became_full.is_none() {
            return;
        }
        let (hs, room) = (self.clone(), room.clone());
        self.spawn_until_stop("guests", async move { hs.send_guests_out(room).await });
    }

    /// What a stop may have kept from happening.
    pub(crate) async fn mind_all_guests(&self) -> Result<()> {
        let rooms = self.store().read(accounts::rooms_with_guests).await?;
        let hs = self.clone();
        self.spawn_until_stop("guests", async move {
            for room in rooms {
                hs.send_guests_out(room).await;
            }
        });
        Ok(())
    }

    /// If the room shuts guests out.
    pub(crate) async fn send_guests_out(&self, room: RoomId) {
        let asked = room.clone();
        let guests = match self.store().read(move |c| guests_to_leave(c, &asked)).await {
            Ok(guests) => guests,
            Err(error) => {
                tracing::warn!(%room, %error, "guests could not be looked up");
                return;
            }
        };
        for guest in guests {
            if let Err(error) = self.rooms().leave(&guest, &room, None).await {
                tracing::warn!(%room, %guest, %error, "a guest could not leave");
            }
        }
    }
}

fn is_guest(c: &mut dyn Conn, user: &UserId) -> storage::Result<bool> {
    Ok(accounts::get(c, user)?.is_some_and(|account| account.guest))
}

fn lets_guests_in(c: &mut dyn Conn, room: &RoomId) -> storage::Result<bool> {
    let Some(row) = timeline::room(c, room)? else {
        return Ok(false);
    };
    if storage::rooms::local_joined(c, row.nid)?.is_empty() {
        return Ok(false);
    }
    let Some(key) = storage::states::key(c, row.nid, GUEST_ACCESS, "")? else {
        return Ok(false);
    };
    let Some(nid) = row.state.get(key) else {
        return Ok(false);
    };
    let pdu = storage::events::pdus(c, &[nid])?.remove(&nid);
    let content = pdu.map(|pdu| pdu.content_value());
    let access = content
        .as_ref()
        .and_then(|content| content.get("guest_access"));
    Ok(access.and_then(Value::as_str) == Some("can_join"))
}

fn guests_to_leave(c: &mut dyn Conn, room: &RoomId) -> storage::Result<Vec<UserId>> {
    if lets_guests_in(c, room)? {
        return Ok(Vec::new());
    }
    accounts::guests_in(c, room)
}
