//! Which versions of the specification this server speaks.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#get_matrixclientversions>

use axum::Router;
use axum::routing::get;
use homeserver::Homeserver;
use serde_json::{Value, json};

use crate::extract::{Json, MaybeAuthed};

const VERSIONS: [&str; 20] = [
    "r0.5.0", "r0.6.0", "r0.6.1", "v1.1", "v1.2", "v1.3", "v1.4", "v1.5", "v1.6", "v1.7", "v1.8",
    "v1.9", "v1.10", "v1.11", "v1.12", "v1.13", "v1.14", "v1.15", "v1.16", "v1.17",
];

const UNSTABLE_FEATURES: [&str; 9] = [
    "org.matrix.e2e_cross_signing",
    "org.matrix.label_based_filtering",
    "org.matrix.msc2285.stable",
    "org.matrix.msc3440.stable",
    "org.matrix.msc3773",
    "org.matrix.msc3916.stable",
    "org.matrix.msc3981",
    "org.matrix.msc4222",
    "uk.tcpip.msc4133.stable",
];

pub fn routes() -> Router<Homeserver> {
    Router::new().route("/_matrix/client/versions", get(versions))
}

async fn versions(_caller: MaybeAuthed) -> Json<Value> {
    let features: serde_json::Map<String, Value> = UNSTABLE_FEATURES
        .iter()
        .map(|name| ((*name).to_owned(), Value::Bool(true)))
        .collect();
    Json(json!({ "versions": VERSIONS, "unstable_features": features }))
}
