//! `GET /room_summary/{roomIdOrAlias}`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#get_matrixclientv1room_summaryroomidoralias>

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use homeserver::Homeserver;
use serde_json::Value;

use crate::client::via;
use crate::error::Result;
use crate::extract::{Json, MaybeAuthed, Path, QueryPairs};

pub fn routes() -> Router<Homeserver> {
    Router::new()
        .route("/room_summary/{room}", get(summary))
        .route("/summary/{room}", get(summary))
}

async fn summary(
    State(homeserver): State<Homeserver>,
    MaybeAuthed(caller): MaybeAuthed,
    Path(room): Path<String>,
    query: QueryPairs,
) -> Result<Json<Value>> {
    let user = caller.map(|caller| caller.user);
    let summary =
        homeserver::room_summary::summary(&homeserver, user.as_ref(), &room, via(&query)).await?;
    Ok(Json(summary))
}
