//! `GET /state`: the events of the state before an event, and their auth chain.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#get_matrixfederationv1stateroomid>

use axum::extract::State;
use axum::response::Response;
use homeserver::Homeserver;
use protocol::id::RoomId;

use super::signed::Origin;
use super::state_ids::event_of;
use super::streamed;
use crate::error::Result;
use crate::extract::{Path, QueryPairs};

pub async fn handle(
    State(homeserver): State<Homeserver>,
    Path(room): Path<RoomId>,
    query: QueryPairs,
    Origin(origin): Origin,
) -> Result<Response> {
    let event = event_of(&query)?;
    let state = homeserver.reads_of(origin).state(&room, &event).await?;
    Ok(streamed(state))
}
