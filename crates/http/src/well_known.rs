//! What the files under `/.well-known/matrix` say.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#well-known-uris>

use axum::Router;
use homeserver::Homeserver;

pub fn routes() -> Router<Homeserver> {
    Router::new()
}
