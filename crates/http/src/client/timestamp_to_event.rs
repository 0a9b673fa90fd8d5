//! `GET /rooms/{roomId}/timestamp_to_event`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#get_matrixclientv1roomsroomidtimestamp_to_event>

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use homeserver::Homeserver;
use homeserver::messages::Direction;
use protocol::id::RoomId;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::Result;
use crate::extract::{Authed, Json, Path, Query};

pub fn routes() -> Router<Homeserver> {
    Router::new().route("/rooms/{room}/timestamp_to_event", get(timestamp_to_event))
}

#[derive(Deserialize)]
struct When {
    ts: i64,
    dir: Direction,
}

async fn timestamp_to_event(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path(room): Path<RoomId>,
    Query(when): Query<When>,
) -> Result<Json<Value>> {
    let (event, ts) = homeserver::messages::timestamp_to_event(
        &homeserver,
        &caller.user,
        &room,
        when.ts,
        when.dir,
    )
    .await?;
    Ok(Json(json!({ "event_id": event, "origin_server_ts": ts })))
}
