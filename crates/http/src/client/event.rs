//! `GET /rooms/{roomId}/event/{eventId}`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#get_matrixclientv3roomsroomideventeventid>

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use homeserver::Homeserver;
use protocol::id::{EventId, RoomId};
use serde_json::Value;

use crate::error::Result;
use crate::extract::{Authed, Json, Path};

pub fn routes() -> Router<Homeserver> {
    Router::new().route("/rooms/{room}/event/{event}", get(event))
}

async fn event(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((room, event)): Path<(RoomId, EventId)>,
) -> Result<Json<Value>> {
    let event = homeserver::messages::event(&homeserver, &caller.reader(), &room, &event).await?;
    Ok(Json(Value::Object(event)))
}
