//! The administration API: `/_synapse/admin`, the paths that existing tools know, and our own under
//! `/_vestibule/admin`.

mod joins;
mod register;
mod rooms;
mod server_notices;

use axum::Router;
use homeserver::Homeserver;

pub fn routes() -> Router<Homeserver> {
    register::routes()
        .merge(joins::routes())
        .merge(rooms::routes())
        .merge(server_notices::routes())
}
