//! Backups of room keys.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#server-side-key-backups>

use std::collections::BTreeMap;

use axum::Router;
use axum::extract::State;
use axum::routing::{get, post};
use homeserver::Homeserver;
use homeserver::backup::{KeyData, Scope, SessionKey, StoredKey, to_json};
use homeserver::error::MatrixError;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::error::Result;
use crate::extract::{Json, Member, Path, QueryPairs};

pub fn routes() -> Router<Homeserver> {
    Router::new()
        .route("/room_keys/version", post(create).get(newest))
        .route(
            "/room_keys/version/{version}",
            get(one).put(update).delete(remove),
        )
        .route(
            "/room_keys/keys",
            get(all_keys).put(put_all).delete(delete_all),
        )
        .route(
            "/room_keys/keys/{room}",
            get(room_keys).put(put_room).delete(delete_room),
        )
        .route(
            "/room_keys/keys/{room}/{session}",
            get(session_key).put(put_session).delete(delete_session),
        )
}

#[derive(Deserialize)]
struct NewVersion {
    algorithm: String,
    auth_data: Map<String, Value>,
}

async fn create(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Json(body): Json<NewVersion>,
) -> Result<Json<Value>> {
    let version = homeserver
        .create_backup(
            &caller.user,
            &body.algorithm,
            &Value::Object(body.auth_data),
        )
        .await?;
    Ok(Json(json!({ "version": version })))
}

async fn newest(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
) -> Result<Json<Value>> {
    Ok(Json(homeserver.backup(&caller.user, None).await?))
}

async fn one(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Path(version): Path<String>,
) -> Result<Json<Value>> {
    Ok(Json(homeserver.backup(&caller.user, Some(&version)).await?))
}

async fn update(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Path(version): Path<String>,
    Json(body): Json<NewVersion>,
) -> Result<Json<Value>> {
    let auth_data = Value::Object(body.auth_data);
    homeserver
        .update_backup(&caller.user, &version, &body.algorithm, &auth_data)
        .await?;
    Ok(Json(json!({})))
}

async fn remove(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Path(version): Path<String>,
) -> Result<Json<Value>> {
    homeserver.delete_backup(&caller.user, &version).await?;
    Ok(Json(json!({})))
}

fn version(query: &QueryPairs) -> Result<&str> {
    Ok(query
        .first("version")
        .ok_or_else(|| MatrixError::missing_param("version is missing"))?)
}

fn of_room(room: String) -> Scope {
    Scope {
        room_id: Some(room),
        session_id: None,
    }
}

fn of_session(room: String, session: String) -> Scope {
    Scope {
        room_id: Some(room),
        session_id: Some(session),
    }
}

/// `{session: key}` by room.
fn by_room(keys: &[StoredKey]) -> Map<String, Value> {
    let mut rooms = Map::new();
    for key in keys {
        let room = rooms
            .entry(key.room_id.as_str())
            .or_insert_with(|| json!({ "sessions": {} }));
        room["sessions"][&key.session_id] = to_json(key);
    }
    rooms
}

async fn all_keys(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    query: QueryPairs,
) -> Result<Json<Value>> {
    let keys = homeserver
        .backup_keys(&caller.user, version(&query)?, Scope::default())
        .await?;
    Ok(Json(json!({ "rooms": by_room(&keys) })))
}

async fn room_keys(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Path(room): Path<String>,
    query: QueryPairs,
) -> Result<Json<Value>> {
    let keys = homeserver
        .backup_keys(&caller.user, version(&query)?, of_room(room.clone()))
        .await?;
    Ok(Json(
        by_room(&keys)
            .remove(&room)
            .unwrap_or_else(|| json!({ "sessions": {} })),
    ))
}

async fn session_key(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Path((room, session)): Path<(String, String)>,
    query: QueryPairs,
) -> Result<Json<Value>> {
    let keys = homeserver
        .backup_keys(&caller.user, version(&query)?, of_session(room, session))
        .await?;
    let key = keys
        .first()
        .ok_or_else(|| MatrixError::not_found("There is no such key"))?;
    Ok(Json(to_json(key)))
}

#[derive(Deserialize)]
struct Sessions {
    sessions: BTreeMap<String, KeyData>,
}

#[derive(Deserialize)]
struct Rooms {
    rooms: BTreeMap<String, Sessions>,
}

fn session_keys(room: &str, sessions: Sessions) -> Vec<SessionKey> {
    sessions
        .sessions
        .into_iter()
        .map(|(session_id, data)| SessionKey {
            room_id: room.to_owned(),
            session_id,
            data,
        })
        .collect()
}

async fn put_all(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    query: QueryPairs,
    Json(body): Json<Rooms>,
) -> Result<Json<Value>> {
    let keys = body
        .rooms
        .into_iter()
        .flat_map(|(room, sessions)| session_keys(&room, sessions))
        .collect();
    Ok(Json(
        homeserver
            .put_backup_keys(&caller.user, version(&query)?, keys)
            .await?,
    ))
}

async fn put_room(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Path(room): Path<String>,
    query: QueryPairs,
    Json(body): Json<Sessions>,
) -> Result<Json<Value>> {
    let keys = session_keys(&room, body);
    Ok(Json(
        homeserver
            .put_backup_keys(&caller.user, version(&query)?, keys)
            .await?,
    ))
}

async fn put_session(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Path((room_id, session_id)): Path<(String, String)>,
    query: QueryPairs,
    Json(data): Json<KeyData>,
) -> Result<Json<Value>> {
    let keys = vec![SessionKey {
        room_id,
        session_id,
        data,
    }];
    Ok(Json(
        homeserver
            .put_backup_keys(&caller.user, version(&query)?, keys)
            .await?,
    ))
}

async fn delete_all(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    query: QueryPairs,
) -> Result<Json<Value>> {
    let scope = Scope::default();
    Ok(Json(
        homeserver
            .delete_backup_keys(&caller.user, version(&query)?, scope)
            .await?,
    ))
}

async fn delete_room(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Path(room): Path<String>,
    query: QueryPairs,
) -> Result<Json<Value>> {
    let scope = of_room(room);
    Ok(Json(
        homeserver
            .delete_backup_keys(&caller.user, version(&query)?, scope)
            .await?,
    ))
}

async fn delete_session(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Path((room, session)): Path<(String, String)>,
    query: QueryPairs,
) -> Result<Json<Value>> {
    let scope = of_session(room, session);
    Ok(Json(
        homeserver
            .delete_backup_keys(&caller.user, version(&query)?, scope)
            .await?,
    ))
}
