//! `GET /rooms/{roomId}/context/{eventId}`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#get_matrixclientv3roomsroomidcontexteventid>

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use homeserver::Homeserver;
use protocol::id::{EventId, RoomId};
use serde::Deserialize;
use serde_json::Value;

use crate::error::Result;
use crate::extract::{Authed, Json, Path, Query};

pub fn routes() -> Router<Homeserver> {
    Router::new().route("/rooms/{room}/context/{event}", get(context))
}

#[derive(Deserialize)]
struct Around {
    limit: Option<u32>,
    filter: Option<String>,
}

async fn context(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((room, event)): Path<(RoomId, EventId)>,
    Query(around): Query<Around>,
) -> Result<Json<Value>> {
    let answer = homeserver::messages::context(
        &homeserver,
        &caller.reader(),
        &room,
        &event,
        around.limit,
        around.filter.as_deref(),
    )
    .await?;
    Ok(Json(answer))
}
