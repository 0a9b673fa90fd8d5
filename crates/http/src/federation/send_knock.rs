//! `PUT /send_knock`: a signed knock comes in, what the knocker is shown of the room goes out.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#put_matrixfederationv1send_knockroomideventid>

use axum::extract::State;
use axum::response::Response;
use homeserver::Homeserver;
use homeserver::resident::{Handshake, SendQuestion};
use protocol::id::RoomId;

use super::signed::Signed;
use super::streamed;
use crate::error::Result;
use crate::extract::Path;

pub async fn handle(
    State(homeserver): State<Homeserver>,
    Path((room, event_id)): Path<(RoomId, String)>,
    signed: Signed,
) -> Result<Response> {
    let question = SendQuestion {
        what: Handshake::Knock,
        room,
        event_id,
        origin: signed.origin.clone(),
        event: signed.text()?.into(),
    };
    Ok(streamed(homeserver.send_knock(question).await?))
}
