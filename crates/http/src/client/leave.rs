//! `POST /rooms/{roomId}/leave`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#post_matrixclientv3roomsroomidleave>

use axum::Router;
use axum::extract::State;
use axum::routing::post;
use homeserver::Homeserver;
use homeserver::membership;
use protocol::id::RoomId;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::Result;
use crate::extract::{Authed, Json, OptionalJson, Path};

pub fn routes() -> Router<Homeserver> {
    Router::new().route("/rooms/{room}/leave", post(leave))
}

#[derive(Deserialize)]
struct Body {
    reason: Option<String>,
}

async fn leave(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path(room): Path<RoomId>,
    OptionalJson(body): OptionalJson<Body>,
) -> Result<Json<Value>> {
    membership::leave(&homeserver, &caller.user, &room, body.reason).await?;
    Ok(Json(json!({})))
}
