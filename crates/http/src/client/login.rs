//! Opening, refreshing and ending sessions.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#login>

use axum::Router;
use axum::extract::State;
use axum::routing::{get, post};
use homeserver::Homeserver;
use homeserver::accounts::Session;
use homeserver::error::MatrixError;
use homeserver::limits::Limit;
use homeserver::uia;
use serde::Deserialize;
use serde_json::{Value, json};

use super::register::opened;
use crate::error::Result;
use crate::extract::{Authed, Json, Member, OptionalJson, Peer, Token};

pub fn routes() -> Router<Homeserver> {
    Router::new()
        .route("/login", get(flows).post(login))
        .route("/login/get_token", post(get_token))
        .route("/refresh", post(refresh))
        .route("/logout", post(logout))
        .route("/logout/all", post(logout_all))
}

async fn flows(State(homeserver): State<Homeserver>) -> Json<Value> {
    let mut flows = vec![
        json!({ "type": "m.login.password" }),
        json!({ "type": "m.login.token", "get_login_token": true }),
    ];
    if homeserver.appservices().iter().next().is_some() {
        flows.push(json!({ "type": "m.login.application_service" }));
    }
    Json(json!({ "flows": flows }))
}

#[derive(Deserialize)]
struct LoginOptions {
    #[serde(rename = "type")]
    kind: Option<String>,
    token: Option<String>,
    device_id: Option<String>,
    initial_device_display_name: Option<String>,
    #[serde(default)]
    refresh_token: bool,
}

async fn login(
    State(homeserver): State<Homeserver>,
    Peer(peer): Peer,
    Token(token): Token,
    Json(body): Json<Value>,
) -> Result<Json<Value>> {
    if let Some(address) = peer {
        homeserver.limit(Limit::Login, &address.to_string())?;
    }
    let options = LoginOptions::deserialize(&body)
        .map_err(|error| MatrixError::bad_json(error.to_string()))?;
    let session = Session {
        device_id: options.device_id,
        display_name: options.initial_device_display_name,
        wants_refresh_token: options.refresh_token,
    };
    let session = match options.kind.as_deref() {
        Some("m.login.password") => homeserver.login_with_password(&body, session).await?,
        Some("m.login.token") => {
            let token = options
                .token
                .ok_or_else(|| MatrixError::missing_param("token is missing"))?;
            homeserver.login_with_token(&token, session).await?
        }
        Some("m.login.application_service") => {
            let token =
                token.ok_or_else(|| MatrixError::missing_token("An access token is needed"))?;
            let service = homeserver.appservices().with_token(&token).ok_or_else(|| {
                MatrixError::unknown_token("This is no application service's token")
            })?;
            homeserver
                .login_for_appservice(service, &body, session)
                .await?
        }
        Some(_) => return Err(MatrixError::unknown("Unknown login type").into()),
        None => return Err(MatrixError::missing_param("type is missing").into()),
    };
    let mut answer = opened(&session);
    if let Some(url) = &homeserver.config().public_base_url {
        answer["well_known"] = json!({ "m.homeserver": { "base_url": url } });
    }
    Ok(Json(answer))
}

#[derive(Deserialize)]
struct Reauthentication {
    auth: Option<Value>,
}

async fn get_token(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    OptionalJson(body): OptionalJson<Reauthentication>,
) -> Result<Json<Value>> {
    let action = format!("login token {}", caller.user);
    homeserver
        .authenticate_again(
            &action,
            Some(&caller.user),
            body.auth.as_ref(),
            uia::PASSWORD,
        )
        .await?;
    let (token, life_ms) = homeserver.make_login_token(&caller.user).await?;
    Ok(Json(
        json!({ "login_token": token, "expires_in_ms": life_ms }),
    ))
}

#[derive(Deserialize)]
struct RefreshBody {
    refresh_token: String,
}

async fn refresh(
    State(homeserver): State<Homeserver>,
    Json(body): Json<RefreshBody>,
) -> Result<Json<Value>> {
    let session = homeserver.refresh(&body.refresh_token).await?;
    Ok(Json(json!({
        "access_token": session.access_token,
        "refresh_token": session.refresh_token,
        "expires_in_ms": session.expires_in_ms,
    })))
}

async fn logout(State(homeserver): State<Homeserver>, caller: Authed) -> Result<Json<Value>> {
    if let Some(device) = &caller.device {
        homeserver
            .delete_devices(&caller.user, vec![device.clone()])
            .await?;
    }
    Ok(Json(json!({})))
}

async fn logout_all(State(homeserver): State<Homeserver>, caller: Authed) -> Result<Json<Value>> {
    homeserver.delete_all_devices(&caller.user).await?;
    Ok(Json(json!({})))
}
