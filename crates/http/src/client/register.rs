//! Making an account.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#post_matrixclientv3register>

use axum::Router;
use axum::extract::State;
use axum::routing::{get, post};
use homeserver::Homeserver;
use homeserver::accounts::{NewAccount, Opened, Session};
use homeserver::error::MatrixError;
use homeserver::limits::Limit;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::Result;
use crate::extract::{Json, Peer, QueryPairs, Token};

pub fn routes() -> Router<Homeserver> {
    Router::new()
        .route("/register", post(register))
        .route("/register/available", get(available))
        .route(
            "/register/m.login.registration_token/validity",
            get(token_validity),
        )
}

#[derive(Deserialize)]
struct Body {
    auth: Option<Value>,
    #[serde(rename = "type")]
    kind: Option<String>,
    username: Option<String>,
    password: Option<String>,
    device_id: Option<String>,
    initial_device_display_name: Option<String>,
    #[serde(default)]
    inhibit_login: bool,
    #[serde(default)]
    refresh_token: bool,
}

async fn register(
    State(homeserver): State<Homeserver>,
    Peer(peer): Peer,
    Token(token): Token,
    query: QueryPairs,
    Json(body): Json<Body>,
) -> Result<Json<Value>> {
    if let Some(address) = peer.filter(|_| body.auth.is_some()) {
        homeserver.limit(Limit::Registration, &address.to_string())?;
    }
    match query.first("kind") {
        None | Some("user") => {}
        Some("guest") => return Ok(Json(opened(&homeserver.register_guest().await?))),
        Some(_) => return Err(MatrixError::invalid_param("kind is user or guest").into()),
    }
    let session = (!body.inhibit_login).then_some(Session {
        device_id: body.device_id,
        display_name: body.initial_device_display_name,
        wants_refresh_token: body.refresh_token,
    });
    let (user, session) = if body.kind.as_deref() == Some("m.login.application_service") {
        let token = token.ok_or_else(|| MatrixError::missing_token("An access token is needed"))?;
        let service = homeserver
            .appservices()
            .with_token(&token)
            .ok_or_else(|| MatrixError::unknown_token("This is no application service's token"))?;
        let username = body
            .username
            .ok_or_else(|| MatrixError::missing_param("A username is needed"))?;
        homeserver
            .register_for_appservice(service, &username, session)
            .await?
    } else {
        let new = NewAccount {
            username: body.username,
            password: body.password,
            session,
        };
        homeserver.register(new, body.auth.as_ref()).await?
    };
    Ok(Json(session.map_or_else(
        || json!({ "user_id": user }),
        |session| opened(&session),
    )))
}

/// The answer of everything that opens a session.
pub fn opened(session: &Opened) -> Value {
    let mut body = json!({
        "user_id": session.user,
        "device_id": session.device,
        "access_token": session.access_token,
        "home_server": session.user.server_str(),
    });
    if let Some(token) = &session.refresh_token {
        body["refresh_token"] = token.as_str().into();
    }
    if let Some(ms) = session.expires_in_ms {
        body["expires_in_ms"] = ms.into();
    }
    body
}

async fn available(State(homeserver): State<Homeserver>, query: QueryPairs) -> Result<Json<Value>> {
    let username = query
        .first("username")
        .ok_or_else(|| MatrixError::missing_param("username is missing"))?;
    homeserver.check_username(username, None).await?;
    Ok(Json(json!({ "available": true })))
}

async fn token_validity(
    State(homeserver): State<Homeserver>,
    query: QueryPairs,
) -> Result<Json<Value>> {
    let token = query
        .first("token")
        .ok_or_else(|| MatrixError::missing_param("token is missing"))?;
    let valid = homeserver
        .registration_token_is_usable(token.to_owned())
        .await?;
    Ok(Json(json!({ "valid": valid })))
}
