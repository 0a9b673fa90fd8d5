//! The administration API under `/_synapse/admin`, the paths that existing tools know.

use axum::Router;
use homeserver::Homeserver;

pub fn routes() -> Router<Homeserver> {
    Router::new()
}
