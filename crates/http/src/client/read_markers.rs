//! `POST /rooms/{roomId}/read_markers`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#post_matrixclientv3roomsroomidread_markers>

use axum::Router;
use axum::extract::State;
use axum::routing::post;
use homeserver::Homeserver;
use homeserver::receipts::{self, Mark};
use protocol::id::{EventId, RoomId};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::Result;
use crate::extract::{Authed, Json, Path};

pub fn routes() -> Router<Homeserver> {
    Router::new().route("/rooms/{room}/read_markers", post(read_markers))
}

#[derive(Deserialize)]
struct Body {
    #[serde(rename = "m.fully_read")]
    fully_read: Option<EventId>,
    #[serde(rename = "m.read")]
    read: Option<EventId>,
    #[serde(rename = "m.read.private")]
    read_private: Option<EventId>,
}

async fn read_markers(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path(room): Path<RoomId>,
    Json(body): Json<Body>,
) -> Result<Json<Value>> {
    for (mark, event) in [
        (Mark::FullyRead, body.fully_read),
        (Mark::Read, body.read),
        (Mark::ReadPrivate, body.read_private),
    ] {
        if let Some(event) = event {
            receipts::set(&homeserver, &caller.user, &room, mark, &event, None).await?;
        }
    }
    Ok(Json(json!({})))
}
