//! Messages straight to devices.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#put_matrixclientv3sendtodeviceeventtypetxnid>

use axum::Router;
use axum::extract::State;
use axum::routing::put;
use homeserver::Homeserver;
use homeserver::to_device::Messages;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::Result;
use crate::extract::{Authed, Json, Path};

pub fn routes() -> Router<Homeserver> {
    Router::new().route("/sendToDevice/{type}/{txn}", put(send))
}

#[derive(Deserialize)]
struct Body {
    messages: Messages,
}

async fn send(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((kind, txn_id)): Path<(String, String)>,
    Json(body): Json<Body>,
) -> Result<Json<Value>> {
    homeserver
        .send_to_device(
            &caller.user,
            caller.device.as_deref(),
            &kind,
            &txn_id,
            body.messages,
        )
        .await?;
    Ok(Json(json!({})))
}
