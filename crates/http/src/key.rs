//! The server's signing keys, and those of others as a notary, under `/_matrix/key`.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#retrieving-server-keys>

use axum::Router;
use homeserver::Homeserver;

pub fn routes() -> Router<Homeserver> {
    Router::new()
}
