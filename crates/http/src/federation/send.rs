//! `PUT /send`: a transaction of PDUs and EDUs.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#put_matrixfederationv1sendtxnid>

use axum::Json;
use axum::extract::State;
use homeserver::Homeserver;
use serde_json::Value;

use super::signed::Signed;
use crate::error::Result;
use crate::extract::Path;

pub async fn handle(
    State(homeserver): State<Homeserver>,
    Path(txn_id): Path<String>,
    signed: Signed,
) -> Result<Json<Value>> {
    let answer = homeserver
        .take_transaction(&signed.origin, &txn_id, signed.bytes())
        .await?;
    Ok(Json(answer))
}
