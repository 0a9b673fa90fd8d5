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
    Router::new()
        .route("/.well-known/matrix/client", get(client))
        .route("/.well-known/matrix/server", get(server))
}

async fn client(State(homeserver): State<Homeserver>) -> Result<Json<Value>> {
    let base_url = homeserver.config().public_base_url.as_ref();
    let base_url = base_url.ok_or_else(|| nothing_here("client"))?;
    Ok(Json(json!({ "m.homeserver": { "base_url": base_url } })))
}

async fn server(State(homeserver): State<Homeserver>) -> Result<Json<Value>> {
    let address = homeserver.config().federation_address.as_ref();
    let address = address.ok_or_else(|| nothing_here("server"))?;
    Ok(Json(json!({ "m.server": address })))
}

fn nothing_here(what: &str) -> MatrixError {
    MatrixError::not_found(format!("No address is configured for {what}s"))
}
