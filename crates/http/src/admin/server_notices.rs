//! `/_synapse/admin/v1/send_server_notice`: a word of the operators to one user.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#server-notices>

use axum::Router;
use axum::extract::State;
use axum::routing::{post, put};
use homeserver::Homeserver;
use homeserver::server_notices::Notice;
use protocol::id::UserId;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::error::Result;
use crate::extract::{Admin, Authed, Json, Path};

const PATH: &str = "/_synapse/admin/v1/send_server_notice";

pub fn routes() -> Router<Homeserver> {
    Router::new()
        .route(PATH, post(send))
        .route(&format!("{PATH}/{{txn_id}}"), put(send_once))
}

#[derive(Deserialize)]
struct Body {
    user_id: UserId,
    #[serde(rename = "type", default = "message")]
    kind: String,
    state_key: Option<String>,
    content: Map<String, Value>,
}

fn message() -> String {
    "m.room.message".to_owned()
}

async fn send(
    State(homeserver): State<Homeserver>,
    _admin: Admin,
    Json(body): Json<Body>,
) -> Result<Json<Value>> {
    answer(&homeserver, body, None).await
}

async fn send_once(
    State(homeserver): State<Homeserver>,
    Admin(admin): Admin,
    Path(txn_id): Path<String>,
    Json(body): Json<Body>,
) -> Result<Json<Value>> {
    answer(&homeserver, body, Some((session(&admin), txn_id))).await
}

/// Transaction ids are each device's own; the notices user sends for all of them.
fn session(admin: &Authed) -> String {
    let device = admin.device.as_deref().unwrap_or_default();
    format!("{}|{device}", admin.user)
}

async fn answer(
    homeserver: &Homeserver,
    body: Body,
    once: Option<(String, String)>,
) -> Result<Json<Value>> {
    let notice = Notice {
        to: body.user_id,
        kind: body.kind,
        state_key: body.state_key,
        content: body.content,
        once,
    };
    let event = homeserver.send_server_notice(notice).await?;
    Ok(Json(json!({ "event_id": event })))
}
