//! `GET /timestamp_to_event`: the event nearest to a moment.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#get_matrixfederationv1timestamp_to_eventroomid>

use axum::Json;
use axum::extract::State;
use homeserver::Homeserver;
use homeserver::error::MatrixError;
use protocol::id::RoomId;
use serde_json::Value;

use super::signed::Origin;
use crate::error::Result;
use crate::extract::{Path, QueryPairs};

pub async fn handle(
    State(homeserver): State<Homeserver>,
    Path(room): Path<RoomId>,
    query: QueryPairs,
    Origin(origin): Origin,
) -> Result<Json<Value>> {
    let ts_ms = query
        .first("ts")
        .ok_or_else(|| MatrixError::missing_param("ts is missing"))?
        .parse()
        .map_err(|_| MatrixError::invalid_param("ts is not a number"))?;
    let forward = match query.first("dir") {
        Some("f") => true,
        Some("b") => false,
        None => return Err(MatrixError::missing_param("dir is missing").into()),
        Some(_) => return Err(MatrixError::invalid_param("dir is neither f nor b").into()),
    };
    let found = homeserver
        .reads_of(origin)
        .timestamp_to_event(&room, ts_ms, forward)
        .await?;
    Ok(Json(found))
}
