//! Room aliases: `/directory/room/{roomAlias}` and `/rooms/{roomId}/aliases`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#room-aliases>

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use homeserver::Homeserver;
use homeserver::error::MatrixError;
use protocol::id::{RoomAlias, RoomId};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::Result;
use crate::extract::{Authed, Json, Member, Path};

pub fn routes() -> Router<Homeserver> {
    Router::new()
        .route(
            "/directory/room/{alias}",
            get(resolve).put(add).delete(remove),
        )
        .route("/rooms/{room}/aliases", get(of_room))
}

#[derive(Deserialize)]
struct Body {
    room_id: RoomId,
}

fn parse(alias: &str) -> Result<RoomAlias> {
    Ok(RoomAlias::parse(alias).map_err(|_| MatrixError::invalid_param("This is no room alias"))?)
}

async fn resolve(
    State(homeserver): State<Homeserver>,
    Path(alias): Path<String>,
) -> Result<Json<Value>> {
    let (room, servers) = homeserver.directory().resolve(&parse(&alias)?).await?;
    Ok(Json(json!({ "room_id": room, "servers": servers })))
}

async fn add(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Path(alias): Path<String>,
    Json(body): Json<Body>,
) -> Result<Json<Value>> {
    homeserver
        .directory()
        .create(&caller.user, &parse(&alias)?, &body.room_id)
        .await?;
    Ok(Json(json!({})))
}

async fn remove(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Path(alias): Path<String>,
) -> Result<Json<Value>> {
    homeserver
        .directory()
        .delete(&caller.user, &parse(&alias)?)
        .await?;
    Ok(Json(json!({})))
}

async fn of_room(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path(room): Path<RoomId>,
) -> Result<Json<Value>> {
    let aliases = homeserver
        .directory()
        .aliases_of(&caller.user, &room)
        .await?;
    Ok(Json(json!({ "aliases": aliases })))
}
