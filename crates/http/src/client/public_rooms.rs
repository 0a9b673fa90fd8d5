//! The public room list: `/publicRooms` and `/directory/list/room/{roomId}`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#published-room-directory>

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use homeserver::Homeserver;
use homeserver::create_room::Visibility;
use homeserver::directory::{PublicRoomsAsked, PublicRoomsFilter};
use protocol::id::{RoomId, ServerName};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::Result;
use crate::extract::{Authed, Json, Member, OptionalJson, Path, Query};

pub fn routes() -> Router<Homeserver> {
    Router::new()
        .route("/publicRooms", get(list).post(search))
        .route(
            "/directory/list/room/{room}",
            get(visibility).put(set_visibility),
        )
}

#[derive(Deserialize)]
struct Page {
    limit: Option<usize>,
    since: Option<String>,
    server: Option<ServerName>,
}

async fn list(
    State(homeserver): State<Homeserver>,
    Query(page): Query<Page>,
) -> Result<Json<Value>> {
    let asked = PublicRoomsAsked {
        limit: page.limit,
        since: page.since,
        filter: PublicRoomsFilter::default(),
    };
    Ok(Json(
        homeserver
            .directory()
            .public_rooms(page.server, asked)
            .await?,
    ))
}

#[derive(Deserialize)]
struct Server {
    server: Option<ServerName>,
}

async fn search(
    State(homeserver): State<Homeserver>,
    _caller: Authed,
    Query(Server { server }): Query<Server>,
    OptionalJson(asked): OptionalJson<PublicRoomsAsked>,
) -> Result<Json<Value>> {
    Ok(Json(
        homeserver.directory().public_rooms(server, asked).await?,
    ))
}

async fn visibility(
    State(homeserver): State<Homeserver>,
    Path(room): Path<RoomId>,
) -> Result<Json<Value>> {
    let listed = homeserver.directory().is_listed(&room).await?;
    let visibility = if listed { "public" } else { "private" };
    Ok(Json(json!({ "visibility": visibility })))
}

#[derive(Deserialize)]
struct Body {
    visibility: Option<Visibility>,
}

async fn set_visibility(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Path(room): Path<RoomId>,
    OptionalJson(body): OptionalJson<Body>,
) -> Result<Json<Value>> {
    let public = body.visibility.unwrap_or(Visibility::Public) == Visibility::Public;
    homeserver
        .directory()
        .set_listed(&caller.user, &room, public)
        .await?;
    Ok(Json(json!({})))
}
