//! `GET /query/directory`: the room behind an alias of ours, and who is in it.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#get_matrixfederationv1querydirectory>

use axum::Json;
use axum::extract::State;
use homeserver::Homeserver;
use homeserver::error::MatrixError;
use protocol::id::RoomAlias;
use serde_json::{Value, json};

use super::signed::Origin;
use crate::error::Result;
use crate::extract::QueryPairs;

pub async fn handle(
    State(homeserver): State<Homeserver>,
    query: QueryPairs,
    _: Origin,
) -> Result<Json<Value>> {
    let alias = query
        .first("room_alias")
        .ok_or_else(|| MatrixError::missing_param("room_alias is missing"))?;
    let alias = RoomAlias::parse(alias)
        .map_err(|_| MatrixError::invalid_param("room_alias is not a room alias"))?;
    // We answer for our own aliases; for others nobody should ask us.
    if alias.server_name() != homeserver.config().server_name {
        return Err(MatrixError::not_found("This alias is another server's").into());
    }
    let (room_id, servers) = homeserver.directory().resolve(&alias).await?;
    Ok(Json(json!({ "room_id": room_id, "servers": servers })))
}
