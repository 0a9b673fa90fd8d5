//! `POST /search`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#post_matrixclientv3search>

use axum::Router;
use axum::extract::State;
use axum::routing::post;
use homeserver::Homeserver;
use homeserver::search::SearchAsked;
use serde::Deserialize;
use serde_json::Value;

use crate::error::Result;
use crate::extract::{Json, Member, Query};

pub fn routes() -> Router<Homeserver> {
    Router::new().route("/search", post(search))
}

#[derive(Deserialize)]
struct Page {
    next_batch: Option<String>,
}

async fn search(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Query(page): Query<Page>,
    Json(asked): Json<SearchAsked>,
) -> Result<Json<Value>> {
    Ok(Json(
        homeserver::search::search(&homeserver, &caller.reader(), asked, page.next_batch).await?,
    ))
}
