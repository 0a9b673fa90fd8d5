//! `GET /make_join`, `/make_leave` and `/make_knock`: the template of a membership event.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#joining-rooms>

use axum::Json;
use axum::extract::State;
use homeserver::Homeserver;
use homeserver::resident::{Handshake, MakeQuestion};
use protocol::id::{RoomId, ServerName, UserId};
use serde_json::Value;

use super::signed::Origin;
use crate::error::Result;
use crate::extract::{Path, QueryPairs};

/// Versions named in one request; there are twelve.
const VERSIONS_MAX: usize = 64;

pub async fn join(
    State(homeserver): State<Homeserver>,
    Path(path): Path<(RoomId, UserId)>,
    query: QueryPairs,
    Origin(origin): Origin,
) -> Result<Json<Value>> {
    make(&homeserver, Handshake::Join, path, &query, origin).await
}

pub async fn leave(
    State(homeserver): State<Homeserver>,
    Path(path): Path<(RoomId, UserId)>,
    query: QueryPairs,
    Origin(origin): Origin,
) -> Result<Json<Value>> {
    make(&homeserver, Handshake::Leave, path, &query, origin).await
}

pub async fn knock(
    State(homeserver): State<Homeserver>,
    Path(path): Path<(RoomId, UserId)>,
    query: QueryPairs,
    Origin(origin): Origin,
) -> Result<Json<Value>> {
    make(&homeserver, Handshake::Knock, path, &query, origin).await
}

async fn make(
    homeserver: &Homeserver,
    what: Handshake,
    (room, user): (RoomId, UserId),
    query: &QueryPairs,
    origin: ServerName,
) -> Result<Json<Value>> {
    let versions = query.all("ver").take(VERSIONS_MAX).map(str::to_owned);
    let question = MakeQuestion {
        what,
        room,
        user,
        origin,
        versions: versions.collect(),
    };
    Ok(Json(homeserver.make_membership(question).await?))
}
