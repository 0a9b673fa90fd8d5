//! Previews of web pages.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#get_matrixclientv1mediapreview_url>

use axum::extract::State;
use homeserver::Homeserver;
use homeserver::error::MatrixError;
use serde_json::Value;

use crate::error::Result;
use crate::extract::{Json, Member, QueryPairs};

pub async fn preview(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    query: QueryPairs,
) -> Result<Json<Value>> {
    let url = query
        .first("url")
        .ok_or_else(|| MatrixError::missing_param("url is missing"))?;
    Ok(Json(homeserver.preview(&caller.user, url).await?))
}
