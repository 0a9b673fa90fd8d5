//! The server's signing keys, and those of others as a notary, under `/_matrix/key`.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#retrieving-server-keys>

use std::collections::BTreeMap;

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use homeserver::Homeserver;
use homeserver::error::MatrixError;
use protocol::id::ServerName;
use serde::Deserialize;
use serde_json::Value;

use crate::error::Result;
use crate::extract::{Json, Path, QueryPairs};

/// Servers that one question may name. Synapse asks for those of a whole room in one question, and takes a refusal
/// for the notary's last word.
const SERVERS_MAX: usize = 20_000;
/// Keys of one server that one question may name.
const KEYS_MAX: usize = 64;

/// The paths with a key id at their end are of an older specification, and still asked for.
pub fn routes() -> Router<Homeserver> {
    Router::new()
        .route("/_matrix/key/v2/server", get(own))
        .route("/_matrix/key/v2/server/{key}", get(own))
        .route("/_matrix/key/v2/query", axum::routing::post(many))
        .route("/_matrix/key/v2/query/{server}", get(one))
        .route("/_matrix/key/v2/query/{server}/{key}", get(one_key))
}

async fn own(State(homeserver): State<Homeserver>) -> Json<Value> {
    Json(homeserver.own_server_keys())
}

async fn one(State(homeserver): State<Homeserver>, Path(server): Path<ServerName>) -> Json<Value> {
    let wanted = BTreeMap::from([(server, BTreeMap::new())]);
    Json(homeserver.notarise(wanted).await)
}

async fn one_key(
    State(homeserver): State<Homeserver>,
    Path((server, key)): Path<(ServerName, String)>,
    query: QueryPairs,
) -> Result<Json<Value>> {
    let until = query
        .first("minimum_valid_until_ts")
        .map(|ts| ts.parse::<i64>())
        .transpose()
        .map_err(|_| MatrixError::invalid_param("minimum_valid_until_ts is not a number"))?;
    let wanted = BTreeMap::from([(server, BTreeMap::from([(key, until)]))]);
    Ok(Json(homeserver.notarise(wanted).await))
}

#[derive(Deserialize)]
struct Question {
    server_keys: BTreeMap<ServerName, BTreeMap<String, Criteria>>,
}

#[derive(Deserialize)]
struct Criteria {
    minimum_valid_until_ts: Option<i64>,
}

async fn many(
    State(homeserver): State<Homeserver>,
    Json(question): Json<Question>,
) -> Result<Json<Value>> {
    let keys_of = |server: &BTreeMap<String, Criteria>| server.len();
    if question.server_keys.len() > SERVERS_MAX
        || question.server_keys.values().map(keys_of).max() > Some(KEYS_MAX)
    {
        return Err(MatrixError::invalid_param("Too many keys are asked for").into());
    }
    let wanted = question
        .server_keys
        .into_iter()
        .map(|(server, keys)| {
            let keys = keys
                .into_iter()
                .map(|(key, criteria)| (key, criteria.minimum_valid_until_ts));
            (server, keys.collect())
        })
        .collect();
    Ok(Json(homeserver.notarise(wanted).await))
}
