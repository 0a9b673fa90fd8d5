//! `POST /join/{roomIdOrAlias}` and `POST /rooms/{roomId}/join`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#joining-rooms>

use axum::Router;
use axum::extract::State;
use axum::routing::post;
use homeserver::Homeserver;
use homeserver::rooms::JoinWish;
use protocol::id::RoomId;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::client::via;
use crate::error::Result;
use crate::extract::{Authed, Json, OptionalJson, Path, QueryPairs};

pub fn routes() -> Router<Homeserver> {
    Router::new()
        .route("/join/{room}", post(join_any))
        .route("/rooms/{room}/join", post(join))
}

#[derive(Deserialize)]
struct Body {
    reason: Option<String>,
    third_party_signed: Option<Value>,
    #[serde(flatten)]
    extra: Map<String, Value>,
}

async fn join_any(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path(target): Path<String>,
    query: QueryPairs,
    OptionalJson(body): OptionalJson<Body>,
) -> Result<Json<Value>> {
    let via = via(&query);
    answer(&homeserver, &caller, &target, via, body).await
}

async fn join(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path(room): Path<RoomId>,
    OptionalJson(body): OptionalJson<Body>,
) -> Result<Json<Value>> {
    answer(&homeserver, &caller, room.as_str(), Vec::new(), body).await
}

async fn answer(
    homeserver: &Homeserver,
    caller: &Authed,
    target: &str,
    via: Vec<protocol::id::ServerName>,
    body: Body,
) -> Result<Json<Value>> {
    let wish = JoinWish {
        via,
        reason: body.reason,
        third_party_signed: body.third_party_signed,
        extra: body.extra,
    };
    let room = homeserver.rooms().join(&caller.user, target, wish).await?;
    Ok(Json(json!({ "room_id": room })))
}
