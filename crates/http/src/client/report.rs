//! Reports of events, rooms and users.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#reporting-content>

use axum::Router;
use axum::extract::State;
use axum::routing::post;
use homeserver::Homeserver;
use homeserver::report::{self, Subject};
use protocol::id::{EventId, RoomId, UserId};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::Result;
use crate::extract::{Json, Member, OptionalJson, Path};

pub fn routes() -> Router<Homeserver> {
    Router::new()
        .route("/rooms/{room}/report/{event}", post(event))
        .route("/rooms/{room}/report", post(room))
        .route("/users/{user}/report", post(user))
}

#[derive(Deserialize)]
struct Body {
    reason: Option<String>,
}

async fn event(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Path((room, event)): Path<(RoomId, EventId)>,
    OptionalJson(body): OptionalJson<Body>,
) -> Result<Json<Value>> {
    report::report(
        &homeserver,
        &caller.user,
        Subject::Event(room, event),
        body.reason,
    )
    .await?;
    Ok(Json(json!({})))
}

async fn room(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Path(room): Path<RoomId>,
    OptionalJson(body): OptionalJson<Body>,
) -> Result<Json<Value>> {
    report::report(&homeserver, &caller.user, Subject::Room(room), body.reason).await?;
    Ok(Json(json!({})))
}

async fn user(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Path(user): Path<UserId>,
    OptionalJson(body): OptionalJson<Body>,
) -> Result<Json<Value>> {
    report::report(&homeserver, &caller.user, Subject::User(user), body.reason).await?;
    Ok(Json(json!({})))
}
