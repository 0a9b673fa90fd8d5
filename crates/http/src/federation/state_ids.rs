//! `GET /state_ids`: the state before an event, by name.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#get_matrixfederationv1state_idsroomid>

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use homeserver::Homeserver;
use homeserver::error::MatrixError;
use protocol::id::{EventId, RoomId};

use super::signed::Origin;
use crate::error::Result;
use crate::extract::{Path, QueryPairs};

pub async fn handle(
    State(homeserver): State<Homeserver>,
    Path(room): Path<RoomId>,
    query: QueryPairs,
    Origin(origin): Origin,
) -> Result<Response> {
    let event = event_of(&query)?;
    let ids = homeserver.reads_of(origin).state_ids(&room, &event).await?;
    Ok(([(CONTENT_TYPE, "application/json")], ids).into_response())
}

/// `event_id`, which must be there.
pub fn event_of(query: &QueryPairs) -> Result<EventId> {
    let id = query
        .first("event_id")
        .ok_or_else(|| MatrixError::missing_param("event_id is missing"))?;
    EventId::parse(id).map_err(|_| MatrixError::invalid_param("event_id is not an event id").into())
}
