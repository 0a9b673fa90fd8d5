//! Making accounts with a shared secret.

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use homeserver::Homeserver;
use homeserver::shared_secret::Request;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::client::register::opened;
use crate::error::Result;
use crate::extract::Json;

pub fn routes() -> Router<Homeserver> {
    Router::new().route("/_synapse/admin/v1/register", get(nonce).post(register))
}

async fn nonce(State(homeserver): State<Homeserver>) -> Result<Json<Value>> {
    Ok(Json(json!({ "nonce": homeserver.registration_nonce()? })))
}

#[derive(Deserialize)]
struct Body {
    nonce: String,
    username: String,
    password: String,
    #[serde(default)]
    admin: bool,
    user_type: Option<String>,
    mac: String,
}

async fn register(
    State(homeserver): State<Homeserver>,
    Json(body): Json<Body>,
) -> Result<Json<Value>> {
    let request = Request {
        nonce: body.nonce,
        username: body.username,
        password: body.password,
        admin: body.admin,
        user_type: body.user_type,
        mac: body.mac,
    };
    Ok(Json(opened(
        &homeserver.register_with_shared_secret(request).await?,
    )))
}
