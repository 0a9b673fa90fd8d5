//! `POST /rooms/{roomId}/ban`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#post_matrixclientv3roomsroomidban>

use axum::Router;
use axum::extract::State;
use axum::routing::post;
use homeserver::Homeserver;
use protocol::id::{RoomId, UserId};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::Result;
use crate::extract::{Json, Member, Path};

pub fn routes() -> Router<Homeserver> {
    Router::new().route("/rooms/{room}/ban", post(ban))
}

#[derive(Deserialize)]
struct Body {
    user_id: UserId,
    reason: Option<String>,
}

async fn ban(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Path(room): Path<RoomId>,
    Json(body): Json<Body>,
) -> Result<Json<Value>> {
    homeserver::membership::ban(&homeserver, &caller.user, &room, &body.user_id, body.reason)
        .await?;
    Ok(Json(json!({})))
}
