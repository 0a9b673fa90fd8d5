//! `POST /createRoom`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#post_matrixclientv3createroom>

use axum::Router;
use axum::extract::State;
use axum::routing::post;
use homeserver::Homeserver;
use homeserver::create_room::CreateRoom;
use serde_json::{Value, json};

use crate::error::Result;
use crate::extract::{Json, Member};

pub fn routes() -> Router<Homeserver> {
    Router::new().route("/createRoom", post(create_room))
}

async fn create_room(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Json(body): Json<CreateRoom>,
) -> Result<Json<Value>> {
    let room = homeserver::create_room::create_room(&homeserver, &caller.user, body).await?;
    Ok(Json(json!({ "room_id": room })))
}
