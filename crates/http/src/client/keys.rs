//! End-to-end keys: uploading, querying and claiming them, and signing them.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#key-management-api>

use std::collections::BTreeMap;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::routing::{get, post};
use homeserver::Homeserver;
use homeserver::error::MatrixError;
use homeserver::key_query::Wanted;
use protocol::id::UserId;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::account::prove;
use crate::error::Result;
use crate::extract::{Authed, Json, Member, OptionalJson, Path, QueryPairs};

pub fn routes() -> Router<Homeserver> {
    Router::new()
        .route("/keys/upload", post(upload))
        .route("/keys/upload/{device}", post(upload_for))
        .route("/keys/query", post(query))
        .route("/keys/claim", post(claim))
        .route("/keys/changes", get(changes))
        .route("/keys/device_signing/upload", post(upload_signing_keys))
        .route("/keys/signatures/upload", post(upload_signatures))
}

async fn upload(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    OptionalJson(body): OptionalJson<Map<String, Value>>,
) -> Result<Json<Value>> {
    let counts = homeserver
        .upload_keys(&caller.user, caller.device()?, &body)
        .await?;
    Ok(Json(json!({ "one_time_key_counts": counts })))
}

/// An old form of the path; the device is the caller's in any case.
async fn upload_for(
    state: State<Homeserver>,
    caller: Authed,
    Path(_device): Path<String>,
    body: OptionalJson<Map<String, Value>>,
) -> Result<Json<Value>> {
    upload(state, caller, body).await
}

#[derive(Deserialize)]
struct Query {
    device_keys: Wanted,
    timeout: Option<u64>,
}

async fn query(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Json(body): Json<Query>,
) -> Result<Json<Value>> {
    let timeout = body.timeout.map(Duration::from_millis);
    Ok(Json(
        homeserver
            .query_keys(&caller.user, body.device_keys, timeout)
            .await?,
    ))
}

#[derive(Deserialize)]
struct Claim {
    one_time_keys: BTreeMap<UserId, BTreeMap<String, String>>,
    timeout: Option<u64>,
}

async fn claim(
    State(homeserver): State<Homeserver>,
    _caller: Authed,
    Json(body): Json<Claim>,
) -> Result<Json<Value>> {
    let timeout = body.timeout.map(Duration::from_millis);
    Ok(Json(
        homeserver.claim_keys(body.one_time_keys, timeout).await?,
    ))
}

async fn changes(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    query: QueryPairs,
) -> Result<Json<Value>> {
    let from = query
        .first("from")
        .ok_or_else(|| MatrixError::missing_param("from is missing"))?;
    let changes = homeserver::sync::key_changes(&homeserver, &caller.reader(), from).await?;
    Ok(Json(changes))
}

async fn upload_signing_keys(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Json(body): Json<Map<String, Value>>,
) -> Result<Json<Value>> {
    let keys = homeserver.check_signing_keys(&caller.user, &body).await?;
    if homeserver
        .signing_keys_need_proof(&caller.user, &keys)
        .await?
    {
        prove(&homeserver, &caller, "signing keys", body.get("auth")).await?;
    }
    homeserver.store_signing_keys(&caller.user, keys).await?;
    Ok(Json(json!({})))
}

async fn upload_signatures(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Json(body): Json<Map<String, Value>>,
) -> Result<Json<Value>> {
    let failures = homeserver.upload_signatures(&caller.user, &body).await?;
    Ok(Json(json!({ "failures": failures })))
}
