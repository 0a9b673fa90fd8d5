//! `GET` and `POST /publicRooms`: our public room list, for other servers.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#published-room-directory>

use axum::Json;
use axum::extract::State;
use homeserver::Homeserver;
use homeserver::directory::{PublicRoomsAsked, PublicRoomsFilter};
use serde_json::Value;

use super::signed::{Origin, Signed};
use crate::error::Result;
use crate::extract::QueryPairs;

pub async fn list(
    State(homeserver): State<Homeserver>,
    query: QueryPairs,
    _: Origin,
) -> Result<Json<Value>> {
    let asked = PublicRoomsAsked {
        limit: query.first("limit").and_then(|limit| limit.parse().ok()),
        since: query.first("since").map(str::to_owned),
        filter: PublicRoomsFilter::default(),
    };
    Ok(Json(
        homeserver.directory().public_rooms(None, asked).await?,
    ))
}

pub async fn search(State(homeserver): State<Homeserver>, signed: Signed) -> Result<Json<Value>> {
    let asked: PublicRoomsAsked = signed.json()?;
    Ok(Json(
        homeserver.directory().public_rooms(None, asked).await?,
    ))
}
