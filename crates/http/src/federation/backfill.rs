//! `GET /backfill`: events and what came before them.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#get_matrixfederationv1backfillroomid>

use axum::extract::State;
use axum::response::Response;
use homeserver::Homeserver;
use homeserver::error::MatrixError;
use protocol::id::{EventId, RoomId};

use super::signed::Origin;
use super::transaction;
use crate::error::Result;
use crate::extract::{Path, QueryPairs};

pub async fn handle(
    State(homeserver): State<Homeserver>,
    Path(room): Path<RoomId>,
    query: QueryPairs,
    Origin(origin): Origin,
) -> Result<Response> {
    let limit = query
        .first("limit")
        .ok_or_else(|| MatrixError::missing_param("limit is missing"))?
        .parse()
        .map_err(|_| MatrixError::invalid_param("limit is not a number"))?;
    let from = query
        .all("v")
        .map(EventId::parse)
        .collect::<std::result::Result<Vec<_>, _>>()
        .map_err(|_| MatrixError::invalid_param("v is not an event id"))?;
    if from.is_empty() {
        return Err(MatrixError::missing_param("v is missing").into());
    }
    let given = homeserver
        .reads_of(origin)
        .backfill(&room, from, limit)
        .await?;
    Ok(transaction(given))
}
