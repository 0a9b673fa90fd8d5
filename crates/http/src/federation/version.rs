//! `GET /version`: which implementation this is.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#get_matrixfederationv1version>

use axum::Json;
use serde_json::{Value, json};

pub async fn handle() -> Json<Value> {
    Json(json!({
        "server": { "name": "Vestibule", "version": env!("CARGO_PKG_VERSION") },
    }))
}
