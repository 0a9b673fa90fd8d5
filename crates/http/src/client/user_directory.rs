//! `POST /user_directory/search`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#post_matrixclientv3user_directorysearch>

use axum::Router;
use axum::extract::State;
use axum::routing::post;
use homeserver::Homeserver;
use serde::Deserialize;
use serde_json::Value;

use crate::error::Result;
use crate::extract::{Json, Member};

pub fn routes() -> Router<Homeserver> {
    Router::new().route("/user_directory/search", post(search))
}

#[derive(Deserialize)]
struct Body {
    search_term: String,
    limit: Option<usize>,
}

async fn search(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Json(body): Json<Body>,
) -> Result<Json<Value>> {
    let found = homeserver::user_directory::search(
        &homeserver,
        &caller.user,
        &body.search_term,
        body.limit,
    )
    .await?;
    Ok(Json(found))
}
