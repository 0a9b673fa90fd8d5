//! `GET /openid/userinfo`: whose OpenID token this is. Anybody may ask who has the token.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#openid>

use axum::Json;
use axum::extract::State;
use homeserver::Homeserver;
use homeserver::error::MatrixError;
use serde_json::{Value, json};

use crate::error::Result;
use crate::extract::QueryPairs;

pub async fn handle(
    State(homeserver): State<Homeserver>,
    query: QueryPairs,
) -> Result<Json<Value>> {
    let token = query
        .first("access_token")
        .ok_or_else(|| MatrixError::missing_token("access_token is missing"))?;
    let user = homeserver
        .openid_user(token)
        .await?
        .ok_or_else(|| MatrixError::unknown_token("This token is unknown or has expired"))?;
    Ok(Json(json!({ "sub": user })))
}
