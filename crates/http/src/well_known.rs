//! What the files under `/.well-known/matrix` say.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#well-known-uris>

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use homeserver::Homeserver;
use homeserver::error::MatrixError;
use serde_json::{Value, json};

use crate::error::Result;
use crate::extract::Json;

pub fn routes() -> Router<Homeserver> {
    Router::new().route("/.well-known/matrix/client", get(client))
}

async fn client(State(homeserver): State<Homeserver>) -> Result<Json<Value>> {
    let Some(url) = &homeserver.config().public_base_url else {
        return Err(MatrixError::not_found("This server has no public address to tell").into());
    };
    Ok(Json(json!({ "m.homeserver": { "base_url": url } })))
}
