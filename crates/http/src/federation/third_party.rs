//! `PUT /exchange_third_party_invite` and `PUT /3pid/onbind`: an invited identifier has found its user.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#third-party-invites>

use axum::Json;
use axum::extract::State;
use homeserver::Homeserver;
use homeserver::third_party::BoundInvite;
use protocol::id::RoomId;
use serde::Deserialize;
use serde_json::{Value, json};

use super::signed::Signed;
use crate::error::Result;
use crate::extract::{self, Path};

pub async fn exchange(
    State(homeserver): State<Homeserver>,
    Path(room): Path<RoomId>,
    signed: Signed,
) -> Result<Json<Value>> {
    let event: Value = signed.json()?;
    homeserver
        .exchange_third_party_invite(&signed.origin, &room, &event)
        .await?;
    Ok(Json(json!({})))
}

#[derive(Deserialize)]
pub struct Bound {
    #[serde(default)]
    invites: Vec<BoundInvite>,
}

/// Identity servers sign no requests.
pub async fn onbind(
    State(homeserver): State<Homeserver>,
    extract::Json(bound): extract::Json<Bound>,
) -> Result<Json<Value>> {
    homeserver.take_bound_invites(bound.invites).await?;
    Ok(Json(json!({})))
}
