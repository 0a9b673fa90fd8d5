//! `PUT /rooms/{roomId}/send/{eventType}/{txnId}`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#put_matrixclientv3roomsroomidsendeventtypetxnid>

use axum::Router;
use axum::extract::State;
use axum::routing::put;
use homeserver::Homeserver;
use homeserver::send::Sender;
use protocol::id::RoomId;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::error::Result;
use crate::extract::{Authed, Json, Path, Query};

pub fn routes() -> Router<Homeserver> {
    Router::new().route("/rooms/{room}/send/{kind}/{txn_id}", put(send))
}

/// Only application services may set the time of an event.
#[derive(Deserialize)]
pub struct Timestamp {
    ts: Option<i64>,
}

/// Who sends, as the service wants to know it.
pub fn sender(caller: Authed, timestamp: Option<Timestamp>) -> Sender {
    let ts = timestamp.and_then(|timestamp| timestamp.ts);
    Sender {
        origin_server_ts: ts.filter(|_| caller.appservice.is_some()),
        user: caller.user,
        device: caller.device,
    }
}

async fn send(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((room, kind, txn_id)): Path<(RoomId, String, String)>,
    Query(timestamp): Query<Timestamp>,
    Json(content): Json<Map<String, Value>>,
) -> Result<Json<Value>> {
    let sender = sender(caller, Some(timestamp));
    let event =
        homeserver::send::message(&homeserver, sender, &room, kind, txn_id, content).await?;
    Ok(Json(json!({ "event_id": event })))
}
