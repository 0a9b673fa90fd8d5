//! `PUT /rooms/{roomId}/redact/{eventId}/{txnId}`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#put_matrixclientv3roomsroomidredacteventidtxnid>

use axum::Router;
use axum::extract::State;
use axum::routing::put;
use homeserver::Homeserver;
use protocol::id::{EventId, RoomId};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::client::send::sender;
use crate::error::Result;
use crate::extract::{Authed, Json, OptionalJson, Path};

pub fn routes() -> Router<Homeserver> {
    Router::new().route("/rooms/{room}/redact/{event}/{txn_id}", put(redact))
}

#[derive(Deserialize)]
struct Body {
    reason: Option<String>,
}

async fn redact(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((room, target, txn_id)): Path<(RoomId, EventId, String)>,
    OptionalJson(body): OptionalJson<Body>,
) -> Result<Json<Value>> {
    let sender = sender(caller, None);
    let event =
        homeserver::send::redact(&homeserver, sender, &room, target, txn_id, body.reason).await?;
    Ok(Json(json!({ "event_id": event })))
}
