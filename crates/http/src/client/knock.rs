//! `POST /knock/{roomIdOrAlias}`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#post_matrixclientv3knockroomidoralias>

use axum::Router;
use axum::extract::State;
use axum::routing::post;
use homeserver::Homeserver;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::client::via;
use crate::error::Result;
use crate::extract::{Json, Member, OptionalJson, Path, QueryPairs};

pub fn routes() -> Router<Homeserver> {
    Router::new().route("/knock/{room}", post(knock))
}

#[derive(Deserialize)]
struct Body {
    reason: Option<String>,
}

async fn knock(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Path(target): Path<String>,
    query: QueryPairs,
    OptionalJson(body): OptionalJson<Body>,
) -> Result<Json<Value>> {
    let room = homeserver
        .rooms()
        .knock(&caller.user, &target, via(&query), body.reason)
        .await?;
    Ok(Json(json!({ "room_id": room })))
}
