//! The content repository
//!
//! <https://spec.matrix.org/v1.18/ `/_matrix/media`, and `/_matrix/client/v1/media` for those who are logged in.:client-server-api/#content-repository>

use axum::Router;
use homeserver::Homeserver;

pub fn routes() -> Router<Homeserver> {
    Router::new()
}
