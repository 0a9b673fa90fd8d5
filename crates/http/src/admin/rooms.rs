//! Deleting and blocking rooms, by the paths of Synapse's admin API.

use axum::Router;
use axum::extract::State;
use axum::routing::{delete, get};
use homeserver::Homeserver;
use homeserver::error::MatrixError;
use homeserver::room_deletion::Deletion;
use protocol::id::RoomId;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::Result;
use crate::extract::{Admin, Json, OptionalJson, Path};

pub fn routes() -> Router<Homeserver> {
    Router::new()
        .route("/_synapse/admin/v1/rooms/{room}", delete(delete_now))
        .route("/_synapse/admin/v2/rooms/{room}", delete(begin))
        .route(
            "/_synapse/admin/v2/rooms/{room}/delete_status",
            get(of_room),
        )
        .route("/_synapse/admin/v2/rooms/delete_status/{id}", get(one))
        .route(
            "/_synapse/admin/v1/rooms/{room}/block",
            get(is_blocked).put(block),
        )
}

/// Answers when it is done.
async fn delete_now(
    State(hs): State<Homeserver>,
    Admin(admin): Admin,
    Path(room): Path<RoomId>,
    OptionalJson(how): OptionalJson<Deletion>,
) -> Result<Json<Value>> {
    let deleted = hs.delete_room(&room, &admin.user, how).await?;
    Ok(Json(json!(deleted)))
}

/// Answers at once; the status tells how far it is.
async fn begin(
    State(hs): State<Homeserver>,
    Admin(admin): Admin,
    Path(room): Path<RoomId>,
    OptionalJson(how): OptionalJson<Deletion>,
) -> Result<Json<Value>> {
    let delete_id = hs.begin_deletion(room, admin.user, how)?;
    Ok(Json(json!({ "delete_id": delete_id })))
}

async fn of_room(
    State(hs): State<Homeserver>,
    _admin: Admin,
    Path(room): Path<RoomId>,
) -> Result<Json<Value>> {
    let results = hs.deletions_of(&room);
    if results.is_empty() {
        return Err(none().into());
    }
    Ok(Json(json!({ "results": results })))
}

async fn one(
    State(hs): State<Homeserver>,
    _admin: Admin,
    Path(id): Path<String>,
) -> Result<Json<Value>> {
    Ok(Json(json!(hs.deletion(&id).ok_or_else(none)?)))
}

fn none() -> MatrixError {
    MatrixError::not_found("There is no such deletion")
}

async fn is_blocked(
    State(hs): State<Homeserver>,
    _admin: Admin,
    Path(room): Path<RoomId>,
) -> Result<Json<Value>> {
    Ok(Json(match hs.room_blocked_by(&room).await? {
        Some(by) => json!({ "block": true, "user_id": by }),
        None => json!({ "block": false }),
    }))
}

#[derive(Deserialize)]
struct Block {
    block: bool,
}

async fn block(
    State(hs): State<Homeserver>,
    Admin(admin): Admin,
    Path(room): Path<RoomId>,
    Json(body): Json<Block>,
) -> Result<Json<Value>> {
    hs.block_room(&room, &admin.user, body.block).await?;
    Ok(Json(json!({ "block": body.block })))
}
