//! `POST /rooms/{roomId}/forget`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#post_matrixclientv3roomsroomidforget>

use axum::Router;
use axum::extract::State;
use axum::routing::post;
use homeserver::Homeserver;
use protocol::id::RoomId;
use serde_json::{Value, json};

use crate::error::Result;
use crate::extract::{Authed, Json, Path};

pub fn routes() -> Router<Homeserver> {
    Router::new().route("/rooms/{room}/forget", post(forget))
}

async fn forget(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path(room): Path<RoomId>,
) -> Result<Json<Value>> {
    homeserver::membership::forget(&homeserver, &caller.user, &room).await?;
    Ok(Json(json!({})))
}
