//! The doors: one endpoint, one file, named by the spec. Parse, call, answer.
//!
//! This crate holds no rule about rooms or accounts. It knows no SQL and speaks to no other server:
//! everything is asked of [`homeserver::Homeserver`].

mod admin;
mod client;
mod error;
mod extract;
mod federation;
mod health;
mod key;
mod measure;
mod media;
mod well_known;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{HeaderName, Method, header};
use homeserver::Homeserver;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{Any, CorsLayer};

/// A JSON body larger than this is refused with `M_TOO_LARGE`. Endpoints whose bodies are larger by
/// nature (media, federation transactions) name their own limit.
pub const BODY_BYTES_MAX: usize = 2 * 1024 * 1024;

/// Every door of the house.
pub fn router(homeserver: Homeserver) -> Router {
    finished(
        for_clients()
            .merge(federation::routes())
            .merge(key::routes()),
        homeserver,
    )
}

/// The doors for clients only.
pub fn client_router(homeserver: Homeserver) -> Router {
    finished(for_clients(), homeserver)
}

fn for_clients() -> Router<Homeserver> {
    Router::new()
        .merge(client::routes())
        .merge(media::routes())
        .merge(well_known::routes())
        .merge(admin::routes())
        .merge(health::routes())
}

fn finished(routes: Router<Homeserver>, homeserver: Homeserver) -> Router {
    routes
        .route_layer(axum::middleware::from_fn_with_state(
            homeserver.clone(),
            measure::measure,
        ))
        .fallback(error::unknown_path)
        .method_not_allowed_fallback(error::wrong_method)
        // Around the fallbacks too: a preflight is a method that no route names.
        .layer(cors())
        .layer(DefaultBodyLimit::disable())
        .layer(CatchPanicLayer::custom(error::panicked))
        .with_state(homeserver)
}

/// <https://spec.matrix.org/v1.18/client-server-api/#web-browser-clients>
fn cors() -> CorsLayer {
    CorsLayer::new()
        .allow_origin(Any)
        .allow_methods([
            Method::GET,
            Method::POST,
            Method::PUT,
            Method::DELETE,
            Method::OPTIONS,
            Method::HEAD,
            Method::PATCH,
        ])
        .allow_headers([
            HeaderName::from_static("x-requested-with"),
            header::CONTENT_TYPE,
            header::AUTHORIZATION,
            header::DATE,
        ])
        .expose_headers([
            header::CONTENT_LENGTH,
            header::RETRY_AFTER,
            header::CONTENT_DISPOSITION,
        ])
        .max_age(std::time::Duration::from_secs(86_400))
}
