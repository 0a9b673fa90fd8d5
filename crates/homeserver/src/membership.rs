//! Memberships that one user changes for another, and what a user is a member of.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#room-membership>

use protocol::id::{RoomId, UserId};
use serde_json::{Map, Value, json};
use storage::sync_reads;

use crate::Homeserver;
use crate::error::{MatrixError, Result};
use crate::room_view::{Reader, RoomView, membership_of};
use crate::send::state_draft;

pub async fn is_joined(homeserver: &Homeserver, room: &RoomId, user: &UserId) -> Result<bool> {
    let (room, user) = (room.clone(), user.clone());
    let joined = homeserver
        .store()
        .read(move |c| sync_reads::is_joined(c, &room, &user))
        .await?;
    Ok(joined)
}

/// C-19: partial rooms are in.
pub async fn joined_rooms(homeserver: &Homeserver, user: &UserId) -> Result<Vec<RoomId>> {
    let user = user.clone();
    let memberships = homeserver
        .store()
        .read(move |c| sync_reads::memberships(c, &user))
        .await?;
    Ok(memberships
        .into_iter()
        .filter(|membership| membership.membership == "join")
        .map(|membership| membership.room)
        .collect())
}

/// What a user asks for; the server itself may take them out of any room.
pub async fn leave(
    homeserver: &Homeserver,
    user: &UserId,
    room: &RoomId,
    reason: Option<String>,
) -> Result<()> {
    if homeserver.is_notices_invite(user, room).await? {
        return Err(MatrixError::new(
            403,
            "M_CANNOT_LEAVE_SERVER_NOTICE_ROOM",
            "An invite to the server's notices cannot be refused",
        ));
    }
    homeserver.rooms().leave(user, room, reason).await
}

pub async fn kick(
    homeserver: &Homeserver,
    sender: &UserId,
    room: &RoomId,
    target: &UserId,
    reason: Option<String>,
) -> Result<()> {
    let present = current(homeserver, room, sender, target).await?;
    if !matches!(present, "join" | "invite" | "knock") {
        return Err(MatrixError::forbidden("The user is not in the room"));
    }
    set(homeserver, sender, room, target, "leave", reason).await
}

pub async fn ban(
    homeserver: &Homeserver,
    sender: &UserId,
    room: &RoomId,
    target: &UserId,
    reason: Option<String>,
) -> Result<()> {
    current(homeserver, room, sender, target).await?;
    set(homeserver, sender, room, target, "ban", reason).await
}

pub async fn unban(
    homeserver: &Homeserver,
    sender: &UserId,
    room: &RoomId,
    target: &UserId,
    reason: Option<String>,
) -> Result<()> {
    if current(homeserver, room, sender, target).await? != "ban" {
        return Err(MatrixError::forbidden("The user is not banned"));
    }
    set(homeserver, sender, room, target, "leave", reason).await
}

/// The target's membership as far as it is known (C-3: a partial room's view is good enough). The sender
/// must be in the room.
async fn current(
    homeserver: &Homeserver,
    room: &RoomId,
    sender: &UserId,
    target: &UserId,
) -> Result<&'static str> {
    let (room, target) = (room.clone(), target.clone());
    let reader = Reader {
        user: sender.clone(),
        device: None,
    };
    let found = homeserver
        .store()
        .read(move |c| {
            let Some(mut view) = RoomView::open(c, &room, &reader)? else {
                return Ok(None);
            };
            if !view.is_joined() {
                return Ok(None);
            }
            let state = view.room.state.clone();
            let member = view.state_event(&state, "m.room.member", target.as_str())?;
            Ok(Some(
                member.map_or("leave", |member| membership_of(&member)),
            ))
        })
        .await?;
    found.ok_or_else(|| MatrixError::forbidden("You are not in this room"))
}

async fn set(
    homeserver: &Homeserver,
    sender: &UserId,
    room: &RoomId,
    target: &UserId,
    membership: &str,
    reason: Option<String>,
) -> Result<()> {
    let mut content = Map::from_iter([("membership".to_owned(), Value::from(membership))]);
    if let Some(reason) = reason {
        content.insert("reason".to_owned(), Value::from(reason));
    }
    let draft = state_draft(
        sender.clone(),
        "m.room.member",
        target.as_str(),
        Value::Object(content),
    );
    homeserver.rooms().send(draft, room).await.map(|_| ())
}

/// The room is shown no more, unless its user comes back (C-29).
pub async fn forget(homeserver: &Homeserver, user: &UserId, room: &RoomId) -> Result<()> {
    let (asked_user, asked_room) = (user.clone(), room.clone());
    let membership = homeserver
        .store()
        .read(move |c| {
            let all = sync_reads::memberships(c, &asked_user)?;
            let found = all
                .into_iter()
                .find(|membership| membership.room == asked_room);
            Ok(found.map(|membership| membership.membership))
        })
        .await?;
    match membership.as_deref() {
        Some("join" | "invite" | "knock") => {
            return Err(MatrixError::unknown("You are still in this room"));
        }
        Some(_) => {}
        None => return Err(MatrixError::not_found("You were never in this room")),
    }
    let (user, room) = (user.clone(), room.clone());
    homeserver
        .store()
        .write(move |c| {
            let at = storage::streams::position(c, storage::streams::Stream::Events)?;
            sync_reads::forget(c, &user, &room, at)
        })
        .await?;
    Ok(())
}

/// `join` content as a client may set it: what only the server may say is dropped (J-4).
pub fn client_member_content(mut content: Map<String, Value>) -> Value {
    content.remove("join_authorised_via_users_server");
    json!(content)
}
