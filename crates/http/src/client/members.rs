//! `GET /rooms/{roomId}/members` and `/joined_members`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#get_matrixclientv3roomsroomidmembers>

use std::convert::Infallible;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderValue;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use homeserver::Homeserver;
use protocol::id::RoomId;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::Result;
use crate::extract::{Authed, Json, Path, Query};

pub fn routes() -> Router<Homeserver> {
    Router::new()
        .route("/rooms/{room}/members", get(members))
        .route("/rooms/{room}/joined_members", get(joined_members))
}

#[derive(Deserialize)]
struct Which {
    at: Option<String>,
    membership: Option<String>,
    not_membership: Option<String>,
}

async fn members(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path(room): Path<RoomId>,
    Query(which): Query<Which>,
) -> Result<Response> {
    let which = homeserver::room_state::MembersAsked {
        at: which.at,
        membership: which.membership,
        not_membership: which.not_membership,
    };
    let pieces = homeserver::room_state::members(&homeserver, &caller.user, &room, which).await?;
    let length: usize = pieces.iter().map(String::len).sum();
    let headers = [
        (CONTENT_TYPE, HeaderValue::from_static("application/json")),
        (CONTENT_LENGTH, HeaderValue::from(length)),
    ];
    let pieces = pieces.into_iter().map(Ok::<_, Infallible>);
    let body = Body::from_stream(futures::stream::iter(pieces));
    Ok((headers, body).into_response())
}

async fn joined_members(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path(room): Path<RoomId>,
) -> Result<Json<Value>> {
    let joined = homeserver::room_state::joined_members(&homeserver, &caller.user, &room).await?;
    Ok(Json(json!({ "joined": joined })))
}
