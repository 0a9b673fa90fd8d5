//! `POST /rooms/{roomId}/kick`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#post_matrixclientv3roomsroomidkick>

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
    Router::new().route("/rooms/{room}/kick", post(kick))
}

#[derive(Deserialize)]
struct Body {
    user_id: UserId,
    reason: Option<String>,
}

async fn kick(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Path(room): Path<RoomId>,
    Json(body): Json<Body>,
) -> Result<Json<Value>> {
    homeserver::membership::kick(&homeserver, &caller.user, &room, &body.user_id, body.reason)
        .await?;
    Ok(Json(json!({})))
}
