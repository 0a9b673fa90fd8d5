//! `GET /rooms/{roomId}/relations/…` and `/threads`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#get_matrixclientv1roomsroomidrelationseventid>

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use homeserver::Homeserver;
use homeserver::messages::Direction;
use homeserver::relations::{self, RelationsAsked};
use protocol::id::{EventId, RoomId};
use serde::Deserialize;
use serde_json::Value;

use crate::error::Result;
use crate::extract::{Authed, Json, Path, Query};

pub fn routes() -> Router<Homeserver> {
    Router::new()
        .route("/rooms/{room}/relations/{event}", get(all))
        .route("/rooms/{room}/relations/{event}/{rel_type}", get(of_type))
        .route(
            "/rooms/{room}/relations/{event}/{rel_type}/{kind}",
            get(of_kind),
        )
        .route("/rooms/{room}/threads", get(threads))
}

#[derive(Deserialize)]
struct Page {
    from: Option<String>,
    to: Option<String>,
    dir: Option<Direction>,
    limit: Option<u32>,
    #[serde(default)]
    recurse: bool,
    include: Option<String>,
}

async fn all(
    homeserver: State<Homeserver>,
    caller: Authed,
    Path((room, event)): Path<(RoomId, EventId)>,
    page: Query<Page>,
) -> Result<Json<Value>> {
    answer(homeserver, caller, room, event, None, None, page).await
}

async fn of_type(
    homeserver: State<Homeserver>,
    caller: Authed,
    Path((room, event, rel_type)): Path<(RoomId, EventId, String)>,
    page: Query<Page>,
) -> Result<Json<Value>> {
    answer(homeserver, caller, room, event, Some(rel_type), None, page).await
}

async fn of_kind(
    homeserver: State<Homeserver>,
    caller: Authed,
    Path((room, event, rel_type, kind)): Path<(RoomId, EventId, String, String)>,
    page: Query<Page>,
) -> Result<Json<Value>> {
    answer(
        homeserver,
        caller,
        room,
        event,
        Some(rel_type),
        Some(kind),
        page,
    )
    .await
}

async fn answer(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    room: RoomId,
    event: EventId,
    rel_type: Option<String>,
    kind: Option<String>,
    Query(page): Query<Page>,
) -> Result<Json<Value>> {
    let asked = RelationsAsked {
        parent: event,
        rel_type,
        kind,
        from: page.from,
        to: page.to,
        direction: page.dir.unwrap_or(Direction::Back),
        limit: page.limit,
        recurse: page.recurse,
    };
    Ok(Json(
        relations::relations(&homeserver, &caller.reader(), &room, asked).await?,
    ))
}

async fn threads(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path(room): Path<RoomId>,
    Query(page): Query<Page>,
) -> Result<Json<Value>> {
    let participated = page.include.as_deref() == Some("participated");
    let answer = relations::threads(
        &homeserver,
        &caller.reader(),
        &room,
        participated,
        page.from,
        page.limit,
    )
    .await?;
    Ok(Json(answer))
}
