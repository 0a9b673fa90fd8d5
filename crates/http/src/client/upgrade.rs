//! `POST /rooms/{roomId}/upgrade`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#post_matrixclientv3roomsroomidupgrade>

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
    Router::new().route("/rooms/{room}/upgrade", post(upgrade))
}

#[derive(Deserialize)]
struct Body {
    new_version: String,
    #[serde(default)]
    additional_creators: Vec<UserId>,
}

async fn upgrade(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Path(room): Path<RoomId>,
    Json(body): Json<Body>,
) -> Result<Json<Value>> {
    let replacement = homeserver::upgrade::upgrade(
        &homeserver,
        &caller.user,
        &room,
        &body.new_version,
        body.additional_creators,
    )
    .await?;
    Ok(Json(json!({ "replacement_room": replacement })))
}
