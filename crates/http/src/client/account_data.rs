//! Account data and tags.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#client-config>

use axum::Router;
use axum::extract::State;
use axum::routing::{delete, get, put};
use homeserver::Homeserver;
use homeserver::error::MatrixError;
use protocol::id::{RoomId, UserId};
use serde_json::{Map, Value, json};

use crate::error::Result;
use crate::extract::{Authed, Json, OptionalJson, Path};

pub fn routes() -> Router<Homeserver> {
    Router::new()
        .route(
            "/user/{user}/account_data/{type}",
            get(global).put(set_global),
        )
        .route(
            "/user/{user}/rooms/{room}/account_data/{type}",
            get(of_room).put(set_of_room),
        )
        .route("/user/{user}/rooms/{room}/tags", get(tags))
        .route(
            "/user/{user}/rooms/{room}/tags/{tag}",
            put(set_tag).delete(remove_tag),
        )
}

/// <https://github.com/matrix-org/matrix-spec-proposals/pull/3391>
pub fn unstable_routes() -> Router<Homeserver> {
    let base = "/_matrix/client/unstable/org.matrix.msc3391/user/{user}";
    Router::new()
        .route(
            &format!("{base}/account_data/{{type}}"),
            delete(remove_global),
        )
        .route(
            &format!("{base}/rooms/{{room}}/account_data/{{type}}"),
            delete(remove_of_room),
        )
}

fn own(caller: &Authed, user: &UserId) -> Result<()> {
    if caller.user == *user {
        return Ok(());
    }
    Err(MatrixError::forbidden("This belongs to another user").into())
}

async fn global(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((user, kind)): Path<(UserId, String)>,
) -> Result<Json<Value>> {
    own(&caller, &user)?;
    Ok(Json(homeserver.account_data(&user, None, &kind).await?))
}

async fn set_global(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((user, kind)): Path<(UserId, String)>,
    Json(content): Json<Map<String, Value>>,
) -> Result<Json<Value>> {
    own(&caller, &user)?;
    homeserver
        .set_account_data(&user, None, &kind, &content)
        .await?;
    Ok(Json(json!({})))
}

async fn remove_global(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((user, kind)): Path<(UserId, String)>,
) -> Result<Json<Value>> {
    own(&caller, &user)?;
    homeserver
        .set_account_data(&user, None, &kind, &Map::new())
        .await?;
    Ok(Json(json!({})))
}

async fn of_room(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((user, room, kind)): Path<(UserId, RoomId, String)>,
) -> Result<Json<Value>> {
    own(&caller, &user)?;
    Ok(Json(
        homeserver.account_data(&user, Some(&room), &kind).await?,
    ))
}

async fn set_of_room(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((user, room, kind)): Path<(UserId, RoomId, String)>,
    Json(content): Json<Map<String, Value>>,
) -> Result<Json<Value>> {
    own(&caller, &user)?;
    homeserver
        .set_account_data(&user, Some(&room), &kind, &content)
        .await?;
    Ok(Json(json!({})))
}

async fn remove_of_room(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((user, room, kind)): Path<(UserId, RoomId, String)>,
) -> Result<Json<Value>> {
    own(&caller, &user)?;
    homeserver
        .set_account_data(&user, Some(&room), &kind, &Map::new())
        .await?;
    Ok(Json(json!({})))
}

async fn tags(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((user, room)): Path<(UserId, RoomId)>,
) -> Result<Json<Value>> {
    own(&caller, &user)?;
    Ok(Json(
        json!({ "tags": homeserver.tags(&user, &room).await? }),
    ))
}

async fn set_tag(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((user, room, tag)): Path<(UserId, RoomId, String)>,
    OptionalJson(content): OptionalJson<Map<String, Value>>,
) -> Result<Json<Value>> {
    own(&caller, &user)?;
    homeserver
        .set_tag(&user, &room, &tag, Some(content))
        .await?;
    Ok(Json(json!({})))
}

async fn remove_tag(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((user, room, tag)): Path<(UserId, RoomId, String)>,
) -> Result<Json<Value>> {
    own(&caller, &user)?;
    homeserver.set_tag(&user, &room, &tag, None).await?;
    Ok(Json(json!({})))
}
