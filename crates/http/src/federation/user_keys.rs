//! `POST /user/keys/query` and `/user/keys/claim`: end-to-end keys of users of ours.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#end-to-end-encryption>

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use homeserver::Homeserver;
use homeserver::key_query::Wanted;
use protocol::id::UserId;
use serde::Deserialize;
use serde_json::Value;

use super::signed::Signed;
use crate::error::Result;

#[derive(Deserialize)]
struct Query {
    device_keys: Wanted,
}

#[derive(Deserialize)]
struct Claim {
    one_time_keys: BTreeMap<UserId, BTreeMap<String, String>>,
}

pub async fn query(State(homeserver): State<Homeserver>, signed: Signed) -> Result<Json<Value>> {
    let query: Query = signed.json()?;
    let keys = homeserver.federation_query_keys(query.device_keys).await?;
    Ok(Json(keys))
}

pub async fn claim(State(homeserver): State<Homeserver>, signed: Signed) -> Result<Json<Value>> {
    let claim: Claim = signed.json()?;
    let keys = homeserver
        .federation_claim_keys(claim.one_time_keys)
        .await?;
    Ok(Json(keys))
}
