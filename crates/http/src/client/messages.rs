//! `GET /rooms/{roomId}/messages`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#get_matrixclientv3roomsroomidmessages>

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use homeserver::Homeserver;
use homeserver::messages::{Direction, MessagesAsked};
use protocol::id::RoomId;
use serde::Deserialize;
use serde_json::Value;

use crate::error::Result;
use crate::extract::{Authed, Json, Path, Query};

pub fn routes() -> Router<Homeserver> {
    Router::new().route("/rooms/{room}/messages", get(messages))
}

#[derive(Deserialize)]
struct Page {
    from: Option<String>,
    to: Option<String>,
    dir: Option<Direction>,
    limit: Option<u32>,
    filter: Option<String>,
}

async fn messages(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path(room): Path<RoomId>,
    Query(page): Query<Page>,
) -> Result<Json<Value>> {
    let asked = MessagesAsked {
        from: page.from,
        to: page.to,
        direction: page.dir.unwrap_or(Direction::Back),
        limit: page.limit,
        filter: page.filter,
    };
    let reader = caller.reader();
    Ok(Json(
        homeserver::messages::messages(&homeserver, &reader, &room, asked).await?,
    ))
}
