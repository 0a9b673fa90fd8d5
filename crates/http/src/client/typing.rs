//! `PUT /rooms/{roomId}/typing/{userId}`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#put_matrixclientv3roomsroomidtypinguserid>

use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::routing::put;
use homeserver::Homeserver;
use homeserver::error::MatrixError;
use protocol::id::{RoomId, UserId};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::Result;
use crate::extract::{Authed, Json, Path};

pub fn routes() -> Router<Homeserver> {
    Router::new().route("/rooms/{room}/typing/{user}", put(typing))
}

#[derive(Deserialize)]
struct Body {
    typing: bool,
    timeout: Option<u64>,
}

async fn typing(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((room, user)): Path<(RoomId, UserId)>,
    Json(body): Json<Body>,
) -> Result<Json<Value>> {
    if user != caller.user {
        return Err(MatrixError::forbidden("You can only tell of your own typing").into());
    }
    let lasts = body.timeout.map(Duration::from_millis);
    homeserver::typing::set(&homeserver, &room, &user, body.typing, lasts).await?;
    Ok(Json(json!({})))
}
