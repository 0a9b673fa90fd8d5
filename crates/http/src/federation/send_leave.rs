//! `PUT /send_leave`, both versions.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#put_matrixfederationv2send_leaveroomideventid>

use axum::Json;
use axum::extract::State;
use homeserver::Homeserver;
use homeserver::resident::{Handshake, SendQuestion};
use protocol::id::RoomId;
use serde_json::{Value, json};

use super::signed::Signed;
use crate::error::Result;
use crate::extract::Path;

pub async fn v2(
    State(homeserver): State<Homeserver>,
    Path(path): Path<(RoomId, String)>,
    signed: Signed,
) -> Result<Json<Value>> {
    send_leave(&homeserver, path, &signed).await?;
    Ok(Json(json!({})))
}

pub async fn v1(
    State(homeserver): State<Homeserver>,
    Path(path): Path<(RoomId, String)>,
    signed: Signed,
) -> Result<Json<Value>> {
    send_leave(&homeserver, path, &signed).await?;
    Ok(Json(json!([200, {}])))
}

async fn send_leave(
    homeserver: &Homeserver,
    (room, event_id): (RoomId, String),
    signed: &Signed,
) -> Result<()> {
    let question = SendQuestion {
        what: Handshake::Leave,
        room,
        event_id,
        origin: signed.origin.clone(),
        event: signed.text()?.into(),
    };
    Ok(homeserver.send_leave(question).await?)
}
