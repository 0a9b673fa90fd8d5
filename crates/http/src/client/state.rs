//! `GET` and `PUT /rooms/{roomId}/state/…`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#get_matrixclientv3roomsroomidstate>

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use homeserver::Homeserver;
use protocol::id::RoomId;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::client::send::{Timestamp, sender};
use crate::error::Result;
use crate::extract::{Authed, Json, Path, Query};

pub fn routes() -> Router<Homeserver> {
    Router::new()
        .route("/rooms/{room}/state", get(all))
        .route(
            "/rooms/{room}/state/{kind}",
            get(get_without_key).put(put_without_key),
        )
        .route(
            "/rooms/{room}/state/{kind}/",
            get(get_without_key).put(put_without_key),
        )
        .route(
            "/rooms/{room}/state/{kind}/{*state_key}",
            get(get_one).put(put_one),
        )
}

#[derive(Deserialize)]
struct Format {
    format: Option<String>,
}

async fn all(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path(room): Path<RoomId>,
) -> Result<Json<Value>> {
    let events = homeserver::room_state::all(&homeserver, &caller.user, &room).await?;
    Ok(Json(Value::Array(events)))
}

async fn get_without_key(
    homeserver: State<Homeserver>,
    caller: Authed,
    Path((room, kind)): Path<(RoomId, String)>,
    format: Query<Format>,
) -> Result<Json<Value>> {
    get_one(
        homeserver,
        caller,
        Path((room, kind, String::new())),
        format,
    )
    .await
}

async fn get_one(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((room, kind, state_key)): Path<(RoomId, String, String)>,
    Query(Format { format }): Query<Format>,
) -> Result<Json<Value>> {
    let mut event =
        homeserver::room_state::one(&homeserver, &caller.user, &room, &kind, &state_key).await?;
    if format.as_deref() == Some("event") {
        return Ok(Json(Value::Object(event)));
    }
    Ok(Json(event.remove("content").unwrap_or_else(|| json!({}))))
}

async fn put_without_key(
    homeserver: State<Homeserver>,
    caller: Authed,
    Path((room, kind)): Path<(RoomId, String)>,
    timestamp: Query<Timestamp>,
    body: Json<Map<String, Value>>,
) -> Result<Json<Value>> {
    let path = Path((room, kind, String::new()));
    put_one(homeserver, caller, path, timestamp, body).await
}

async fn put_one(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((room, kind, state_key)): Path<(RoomId, String, String)>,
    Query(timestamp): Query<Timestamp>,
    Json(content): Json<Map<String, Value>>,
) -> Result<Json<Value>> {
    let sender = sender(caller, Some(timestamp));
    let event =
        homeserver::send::state(&homeserver, sender, &room, kind, state_key, content).await?;
    Ok(Json(json!({ "event_id": event })))
}
