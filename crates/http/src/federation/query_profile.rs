//! `GET /query/profile`: the profile of a user of ours.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#get_matrixfederationv1queryprofile>

use axum::Json;
use axum::extract::State;
use homeserver::Homeserver;
use homeserver::error::MatrixError;
use protocol::id::UserId;
use serde_json::{Map, Value};

use super::signed::Origin;
use crate::error::Result;
use crate::extract::QueryPairs;

pub async fn handle(
    State(homeserver): State<Homeserver>,
    query: QueryPairs,
    _: Origin,
) -> Result<Json<Map<String, Value>>> {
    let user = query
        .first("user_id")
        .ok_or_else(|| MatrixError::missing_param("user_id is missing"))?;
    let user =
        UserId::parse(user).map_err(|_| MatrixError::invalid_param("user_id is not a user id"))?;
    if !homeserver.config().is_ours(&user) {
        return Err(MatrixError::invalid_param("This user is another server's").into());
    }
    let mut profile = homeserver.profile(&user).await?;
    if let Some(field) = query.first("field") {
        profile.retain(|name, _| name == field);
    }
    Ok(Json(profile))
}
