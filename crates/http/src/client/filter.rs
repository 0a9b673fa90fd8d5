//! Stored filters.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#filtering>

use axum::Router;
use axum::extract::State;
use axum::routing::{get, post};
use homeserver::Homeserver;
use homeserver::error::MatrixError;
use protocol::id::UserId;
use serde_json::{Map, Value, json};

use crate::error::Result;
use crate::extract::{Authed, Json, Path};

pub fn routes() -> Router<Homeserver> {
    Router::new()
        .route("/user/{user}/filter", post(create))
        .route("/user/{user}/filter/{filter}", get(read))
}

async fn create(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path(user): Path<UserId>,
    Json(filter): Json<Map<String, Value>>,
) -> Result<Json<Value>> {
    if caller.user != user {
        return Err(MatrixError::forbidden("A filter is made for oneself").into());
    }
    let id = homeserver.store_filter(&user, &filter).await?;
    Ok(Json(json!({ "filter_id": id })))
}

async fn read(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((user, id)): Path<(UserId, String)>,
) -> Result<Json<Value>> {
    if caller.user != user {
        return Err(MatrixError::forbidden("This filter belongs to another user").into());
    }
    Ok(Json(homeserver.filter(&user, &id).await?))
}
