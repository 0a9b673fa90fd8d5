//! `GET /metrics` for Prometheus, on a listener of its own: it tells too much to stand among the doors.

use anyhow::Context as _;
use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse as _;
use axum::routing::get;
use homeserver::{Homeserver, metrics};
use metrics_exporter_prometheus::PrometheusBuilder;

/// Installs the recorder. Once in a process.
pub fn router(homeserver: Homeserver) -> anyhow::Result<Router> {
    let recorder = PrometheusBuilder::new()
        .set_buckets(&metrics::SECONDS)
        .and_then(PrometheusBuilder::install_recorder)
        .context("cannot set up the metrics")?;
    metrics::describe();
    let show = move || async move {
        if let Err(error) = homeserver.measure().await {
            tracing::warn!(%error, "the store could not be measured");
            return StatusCode::SERVICE_UNAVAILABLE.into_response();
        }
        recorder.run_upkeep();
        let kind = "text/plain; version=0.0.4; charset=utf-8";
        ([(header::CONTENT_TYPE, kind)], recorder.render()).into_response()
    };
    Ok(Router::new().route("/metrics", get(show)))
}
