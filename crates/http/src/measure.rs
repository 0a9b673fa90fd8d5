//! Counts and times requests, by route.

use axum::extract::{MatchedPath, Request, State};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::Response;
use homeserver::Homeserver;
use homeserver::metrics::{REQUEST_SECONDS, REQUESTS};

/// For routes and methods that exist: what others ask for has no bound.
pub async fn measure(State(hs): State<Homeserver>, request: Request, next: Next) -> Response {
    let clock = || hs.clock().now().since_start;
    let route = request.extensions().get::<MatchedPath>().cloned();
    let method = match *request.method() {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        _ => "other",
    };
    let began = clock();
    let response = next.run(request).await;
    if let Some(route) = route {
        let route = route.as_str().to_owned();
        let took = clock().saturating_sub(began).as_secs_f64();
        metrics::histogram!(REQUEST_SECONDS, "route" => route.clone()).record(took);
        let labels = [
            ("route", route),
            ("method", method.to_owned()),
            ("status", response.status().as_u16().to_string()),
        ];
        metrics::counter!(REQUESTS, &labels).increment(1);
    }
    response
}
