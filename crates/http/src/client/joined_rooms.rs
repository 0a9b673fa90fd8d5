//! `GET /joined_rooms`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#get_matrixclientv3joined_rooms>

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use homeserver::Homeserver;
use serde_json::{Value, json};

use crate::error::Result;
use crate::extract::{Authed, Json};

pub fn routes() -> Router<Homeserver> {
    Router::new().route("/joined_rooms", get(joined_rooms))
}

async fn joined_rooms(State(homeserver): State<Homeserver>, caller: Authed) -> Result<Json<Value>> {
    let rooms = homeserver::membership::joined_rooms(&homeserver, &caller.user).await?;
    Ok(Json(json!({ "joined_rooms": rooms })))
}
