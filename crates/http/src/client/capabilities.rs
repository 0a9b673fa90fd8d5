//! What this server can do, and the small questions clients ask at start-up.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#capabilities-negotiation>

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use homeserver::Homeserver;
use homeserver::error::MatrixError;
use protocol::room_version::RoomVersion;
use serde_json::{Map, Value, json};

use crate::error::Result;
use crate::extract::{Authed, Json, Path};

pub fn routes() -> Router<Homeserver> {
    Router::new()
        .route("/capabilities", get(capabilities))
        .route("/voip/turnServer", get(turn_server))
        .route("/thirdparty/protocols", get(protocols))
        .route("/thirdparty/protocol/{protocol}", get(protocol))
        .route("/thirdparty/location", get(nothing))
        .route("/thirdparty/location/{protocol}", get(nothing))
        .route("/thirdparty/user", get(nothing))
        .route("/thirdparty/user/{protocol}", get(nothing))
}

async fn capabilities(State(homeserver): State<Homeserver>, _caller: Authed) -> Json<Value> {
    let available: Map<String, Value> = RoomVersion::ALL
        .iter()
        .map(|version| (version.as_str().to_owned(), "stable".into()))
        .collect();
    Json(json!({ "capabilities": {
        "m.room_versions": {
            "default": homeserver.config().default_room_version.as_str(),
            "available": available,
        },
        "m.change_password": { "enabled": true },
        "m.set_displayname": { "enabled": true },
        "m.set_avatar_url": { "enabled": true },
        "m.profile_fields": { "enabled": true },
        "m.3pid_changes": { "enabled": false },
        "m.get_login_token": { "enabled": true },
    } }))
}

/// No TURN server: clients then try without.
async fn turn_server(_caller: Authed) -> Json<Value> {
    Json(json!({}))
}

async fn protocols(State(homeserver): State<Homeserver>, _caller: Authed) -> Json<Value> {
    let protocols: Map<String, Value> = homeserver
        .appservices()
        .iter()
        .flat_map(|service| service.protocols.iter())
        .map(|name| (name.clone(), empty_protocol()))
        .collect();
    Json(Value::Object(protocols))
}

async fn protocol(
    State(homeserver): State<Homeserver>,
    _caller: Authed,
    Path(name): Path<String>,
) -> Result<Json<Value>> {
    let known = homeserver
        .appservices()
        .iter()
        .any(|service| service.protocols.contains(&name));
    if !known {
        return Err(MatrixError::not_found("There is no such protocol").into());
    }
    Ok(Json(empty_protocol()))
}

fn empty_protocol() -> Value {
    json!({ "user_fields": [], "location_fields": [], "icon": "", "field_types": {}, "instances": [] })
}

async fn nothing(_caller: Authed) -> Json<Value> {
    Json(json!([]))
}
