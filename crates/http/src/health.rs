//! `GET /health`: whether the server answers and its store does. For load balancers and process keepers.

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use homeserver::Homeserver;

pub fn routes() -> Router<Homeserver> {
    Router::new().route("/health", get(health))
}

async fn health(State(hs): State<Homeserver>) -> (StatusCode, &'static str) {
    match hs.is_healthy().await {
        true => (StatusCode::OK, "OK"),
        false => (
            StatusCode::SERVICE_UNAVAILABLE,
            "the database does not answer",
        ),
    }
}
