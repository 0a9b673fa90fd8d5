//! `GET /event_auth`: the whole auth chain of an event.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#get_matrixfederationv1event_authroomideventid>

use axum::extract::State;
use axum::response::Response;
use homeserver::Homeserver;
use protocol::id::{EventId, RoomId};

use super::signed::Origin;
use super::streamed;
use crate::error::Result;
use crate::extract::Path;

pub async fn handle(
    State(homeserver): State<Homeserver>,
    Path((room, event)): Path<(RoomId, EventId)>,
    Origin(origin): Origin,
) -> Result<Response> {
    let reads = homeserver.reads_of(origin);
    Ok(streamed(reads.event_auth(&room, &event).await?))
}
