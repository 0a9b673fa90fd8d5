//! The caller's devices.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#device-management>

use axum::Router;
use axum::extract::State;
use axum::routing::{get, post};
use homeserver::Homeserver;
use homeserver::devices::to_json;
use serde::Deserialize;
use serde_json::{Value, json};

use super::account::prove;
use crate::error::Result;
use crate::extract::{Authed, Json, Member, OptionalJson, Path};

pub fn routes() -> Router<Homeserver> {
    Router::new()
        .route("/devices", get(list))
        .route("/devices/{device}", get(one).put(rename).delete(delete_one))
        .route("/delete_devices", post(delete_many))
}

async fn list(State(homeserver): State<Homeserver>, caller: Authed) -> Result<Json<Value>> {
    let devices = homeserver.devices(&caller.user).await?;
    let devices: Vec<Value> = devices.iter().map(to_json).collect();
    Ok(Json(json!({ "devices": devices })))
}

async fn one(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path(device): Path<String>,
) -> Result<Json<Value>> {
    Ok(Json(to_json(
        &homeserver.device(&caller.user, &device).await?,
    )))
}

#[derive(Deserialize)]
struct Rename {
    display_name: Option<String>,
}

async fn rename(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path(device): Path<String>,
    Json(body): Json<Rename>,
) -> Result<Json<Value>> {
    match body.display_name {
        Some(name) => {
            homeserver
                .rename_device(&caller.user, &device, Some(name))
                .await?
        }
        None => drop(homeserver.device(&caller.user, &device).await?),
    }
    Ok(Json(json!({})))
}

#[derive(Deserialize)]
struct DeleteOne {
    auth: Option<Value>,
}

async fn delete_one(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Path(device): Path<String>,
    OptionalJson(body): OptionalJson<DeleteOne>,
) -> Result<Json<Value>> {
    prove(
        &homeserver,
        &caller,
        &format!("delete {device}"),
        body.auth.as_ref(),
    )
    .await?;
    homeserver
        .delete_devices(&caller.user, vec![device])
        .await?;
    Ok(Json(json!({})))
}

#[derive(Deserialize)]
struct DeleteMany {
    auth: Option<Value>,
    devices: Vec<String>,
}

async fn delete_many(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Json(body): Json<DeleteMany>,
) -> Result<Json<Value>> {
    prove(&homeserver, &caller, "delete devices", body.auth.as_ref()).await?;
    homeserver
        .delete_devices(&caller.user, body.devices)
        .await?;
    Ok(Json(json!({})))
}
