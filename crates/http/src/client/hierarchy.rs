//! `GET /rooms/{roomId}/hierarchy`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#get_matrixclientv1roomsroomidhierarchy>

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use homeserver::Homeserver;
use homeserver::room_summary::HierarchyAsked;
use protocol::id::RoomId;
use serde::Deserialize;
use serde_json::Value;

use crate::error::Result;
use crate::extract::{Authed, Json, Path, Query};

pub fn routes() -> Router<Homeserver> {
    Router::new().route("/rooms/{room}/hierarchy", get(hierarchy))
}

#[derive(Deserialize)]
struct Page {
    #[serde(default)]
    suggested_only: bool,
    limit: Option<usize>,
    max_depth: Option<usize>,
    from: Option<String>,
}

async fn hierarchy(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path(room): Path<RoomId>,
    Query(page): Query<Page>,
) -> Result<Json<Value>> {
    let asked = HierarchyAsked {
        suggested_only: page.suggested_only,
        limit: page.limit,
        max_depth: page.max_depth,
        from: page.from,
    };
    Ok(Json(
        homeserver::room_summary::hierarchy(&homeserver, &caller.user, &room, asked).await?,
    ))
}
