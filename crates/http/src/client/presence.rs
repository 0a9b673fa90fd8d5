//! Presence.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#presence>

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use homeserver::Homeserver;
use homeserver::error::MatrixError;
use protocol::id::UserId;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::Result;
use crate::extract::{Authed, Json, Path};

pub fn routes() -> Router<Homeserver> {
    Router::new().route("/presence/{user}/status", get(status).put(set))
}

async fn status(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path(user): Path<UserId>,
) -> Result<Json<Value>> {
    Ok(Json(homeserver.presence(&caller.user, &user).await?))
}

#[derive(Deserialize)]
struct Body {
    presence: String,
    status_msg: Option<String>,
}

async fn set(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path(user): Path<UserId>,
    Json(body): Json<Body>,
) -> Result<Json<Value>> {
    if caller.user != user {
        return Err(MatrixError::forbidden("This is another user's presence").into());
    }
    homeserver
        .set_presence(&user, &body.presence, body.status_msg)
        .await?;
    Ok(Json(json!({})))
}
