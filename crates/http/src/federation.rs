//! The server-server API under `/_matrix/federation`
//!
//! <https://spec.matrix.org/v1.18/ one endpoint, one file.:server-server-api/>

use axum::Router;
use homeserver::Homeserver;

pub fn routes() -> Router<Homeserver> {
    Router::new()
}
