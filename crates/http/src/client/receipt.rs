//! `POST /rooms/{roomId}/receipt/{receiptType}/{eventId}`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#post_matrixclientv3roomsroomidreceiptreceipttypeeventid>

use axum::Router;
use axum::extract::State;
use axum::routing::post;
use homeserver::Homeserver;
use homeserver::error::MatrixError;
use homeserver::receipts::{self, Mark};
use protocol::id::{EventId, RoomId};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::Result;
use crate::extract::{Authed, Json, OptionalJson, Path};

pub fn routes() -> Router<Homeserver> {
    Router::new().route("/rooms/{room}/receipt/{kind}/{event}", post(receipt))
}

#[derive(Deserialize)]
struct Body {
    thread_id: Option<String>,
}

async fn receipt(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((room, kind, event)): Path<(RoomId, String, EventId)>,
    OptionalJson(body): OptionalJson<Body>,
) -> Result<Json<Value>> {
    let mark = match kind.as_str() {
        "m.read" => Mark::Read,
        "m.read.private" => Mark::ReadPrivate,
        "m.fully_read" => Mark::FullyRead,
        _ => return Err(MatrixError::invalid_param("Unknown receipt type").into()),
    };
    receipts::set(
        &homeserver,
        &caller.user,
        &room,
        mark,
        &event,
        body.thread_id,
    )
    .await?;
    Ok(Json(json!({})))
}
