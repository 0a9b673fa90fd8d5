//! `GET /hierarchy/{roomId}`: a space and its children, as far as the asker may know them.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#get_matrixfederationv1hierarchyroomid>

use axum::Json;
use axum::extract::State;
use homeserver::Homeserver;
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
    let suggested_only = query.first("suggested_only") == Some("true");
    Ok(Json(
        homeserver::room_summary::for_server(&homeserver, &origin, &room, suggested_only).await?,
    ))
}
