//! The administration API under `/_synapse/admin`, the paths that existing tools know.

mod register;

use axum::Router;
use homeserver::Homeserver;

pub fn routes() -> Router<Homeserver> {
    register::routes()
}
