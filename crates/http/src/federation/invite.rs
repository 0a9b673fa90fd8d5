//! `PUT /invite`, both versions: one of our users is invited, and we sign that we know it.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#inviting-to-a-room>

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use homeserver::Homeserver;
use homeserver::outside::ReceivedInvite;
use protocol::id::RoomId;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::raw;
use super::signed::Signed;
use crate::error::Result;
use crate::extract::Path;

#[derive(Deserialize)]
struct BodyV2 {
    room_version: String,
    event: Box<RawValue>,
    #[serde(default)]
    invite_room_state: Option<Vec<Box<RawValue>>>,
}

/// The event itself, which carries the room's state where nothing is signed.
#[derive(Deserialize)]
struct BodyV1 {
    #[serde(default)]
    unsigned: Unsigned,
}

#[derive(Default, Deserialize)]
struct Unsigned {
    #[serde(default)]
    invite_room_state: Option<Vec<Box<RawValue>>>,
}

#[derive(Serialize)]
pub struct Answer {
    event: Option<Box<RawValue>>,
}

pub async fn v2(
    State(homeserver): State<Homeserver>,
    Path((room, event_id)): Path<(RoomId, String)>,
    signed: Signed,
) -> Result<Json<Answer>> {
    let body: BodyV2 = signed.json()?;
    let invite = ReceivedInvite {
        room,
        event_id,
        origin: signed.origin,
        version: Some(body.room_version),
        event: body.event.get().into(),
        shown_state: texts(body.invite_room_state),
    };
    Ok(Json(take(&homeserver, invite).await?))
}

pub async fn v1(
    State(homeserver): State<Homeserver>,
    Path((room, event_id)): Path<(RoomId, String)>,
    signed: Signed,
) -> Result<Json<(u16, Answer)>> {
    let body: BodyV1 = signed.json()?;
    let invite = ReceivedInvite {
        room,
        event_id,
        event: signed.text()?.into(),
        origin: signed.origin,
        version: None,
        shown_state: texts(body.unsigned.invite_room_state),
    };
    Ok(Json((200, take(&homeserver, invite).await?)))
}

async fn take(homeserver: &Homeserver, invite: ReceivedInvite) -> Result<Answer> {
    let signed = homeserver.take_invite(invite).await?;
    Ok(Answer {
        event: raw(&signed.json),
    })
}

fn texts(entries: Option<Vec<Box<RawValue>>>) -> Vec<Arc<str>> {
    let entries = entries.unwrap_or_default();
    entries.iter().map(|entry| entry.get().into()).collect()
}
