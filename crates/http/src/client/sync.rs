//! `GET /sync`
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#get_matrixclientv3sync>

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use homeserver::Homeserver;
use homeserver::sync::SyncAsked;
use serde::Deserialize;
use serde_json::Value;

use crate::error::Result;
use crate::extract::{Authed, Json, Query};

pub fn routes() -> Router<Homeserver> {
    Router::new().route("/sync", get(sync))
}

#[derive(Deserialize)]
struct Since {
    filter: Option<String>,
    since: Option<String>,
    #[serde(default)]
    full_state: bool,
    set_presence: Option<String>,
    timeout: Option<u64>,
    #[serde(default, alias = "org.matrix.msc4222.use_state_after")]
    use_state_after: bool,
}

async fn sync(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Query(since): Query<Since>,
) -> Result<Json<Value>> {
    homeserver
        .presence_of_sync(&caller.user, since.set_presence.as_deref())
        .await?;
    let asked = SyncAsked {
        filter: since.filter,
        since: since.since,
        full_state: since.full_state,
        timeout_ms: since.timeout.unwrap_or(0),
        use_state_after: since.use_state_after,
    };
    Ok(Json(
        homeserver::sync::sync(&homeserver, &caller.reader(), asked).await?,
    ))
}
