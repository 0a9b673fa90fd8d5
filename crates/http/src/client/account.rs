//! The caller's own account: who am I, a new password, the end.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#account-management>

use axum::Router;
use axum::extract::State;
use axum::routing::{get, post};
use homeserver::Homeserver;
use homeserver::error::MatrixError;
use homeserver::uia;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::Result;
use crate::extract::{Authed, Json, Member, OptionalJson, Path};
use protocol::id::UserId;

pub fn routes() -> Router<Homeserver> {
    Router::new()
        .route("/account/whoami", get(whoami))
        .route("/account/password", post(change_password))
        .route("/account/deactivate", post(deactivate))
        .route(
            "/account/3pid",
            get(third_party_ids).post(no_third_party_ids),
        )
        .route("/account/3pid/add", post(no_third_party_ids))
        .route("/account/3pid/bind", post(no_third_party_ids))
        .route("/account/3pid/unbind", post(unbind))
        .route("/account/3pid/delete", post(unbind))
        .route("/account/3pid/{medium}/requestToken", post(request_token))
        .route(
            "/account/password/{medium}/requestToken",
            post(request_token),
        )
        .route("/register/{medium}/requestToken", post(request_token))
        .route("/user/{user}/openid/request_token", post(openid_token))
}

async fn whoami(caller: Authed) -> Json<Value> {
    let mut body = json!({ "user_id": caller.user, "is_guest": caller.guest });
    if let Some(device) = caller.device {
        body["device_id"] = device.into();
    }
    Json(body)
}

#[derive(Deserialize)]
struct NewPassword {
    auth: Option<Value>,
    new_password: Option<String>,
    logout_devices: Option<bool>,
}

async fn change_password(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Json(body): Json<NewPassword>,
) -> Result<Json<Value>> {
    prove(&homeserver, &caller, "password", body.auth.as_ref()).await?;
    let password = body
        .new_password
        .ok_or_else(|| MatrixError::missing_param("new_password is missing"))?;
    homeserver
        .change_password(
            &caller.user,
            password,
            caller.device.as_deref(),
            body.logout_devices.unwrap_or(true),
        )
        .await?;
    Ok(Json(json!({})))
}

#[derive(Deserialize)]
struct Deactivation {
    auth: Option<Value>,
    #[serde(default)]
    erase: bool,
}

async fn deactivate(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    OptionalJson(body): OptionalJson<Deactivation>,
) -> Result<Json<Value>> {
    prove(&homeserver, &caller, "deactivate", body.auth.as_ref()).await?;
    homeserver.deactivate(&caller.user, body.erase).await?;
    Ok(Json(json!({ "id_server_unbind_result": "no-support" })))
}

/// Has the caller prove again who he is. Application services need not: they have no passwords.
pub async fn prove(
    homeserver: &Homeserver,
    caller: &Authed,
    action: &str,
    auth: Option<&Value>,
) -> Result<()> {
    if caller.appservice.is_some() {
        return Ok(());
    }
    let action = format!("{action} {}", caller.user);
    homeserver
        .authenticate_again(&action, Some(&caller.user), auth, uia::PASSWORD)
        .await?;
    Ok(())
}

async fn third_party_ids(_caller: Authed) -> Json<Value> {
    Json(json!({ "threepids": [] }))
}

async fn no_third_party_ids(_caller: Authed) -> Result<Json<Value>> {
    Err(MatrixError::new(
        403,
        "M_THREEPID_MEDIUM_NOT_SUPPORTED",
        "This server takes no third-party identifiers",
    )
    .into())
}

async fn unbind(_caller: Authed) -> Json<Value> {
    Json(json!({ "id_server_unbind_result": "no-support" }))
}

async fn request_token() -> Result<Json<Value>> {
    Err(MatrixError::new(
        400,
        "M_THREEPID_MEDIUM_NOT_SUPPORTED",
        "This server takes no third-party identifiers",
    )
    .into())
}

/// <https://spec.matrix.org/v1.18/client-server-api/#openid>
async fn openid_token(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Path(user): Path<UserId>,
) -> Result<Json<Value>> {
    if user != caller.user {
        return Err(MatrixError::forbidden("This is another user than the one logged in").into());
    }
    let (token, life_ms) = homeserver.make_openid_token(&user).await?;
    Ok(Json(json!({
        "access_token": token,
        "token_type": "Bearer",
        "matrix_server_name": homeserver.config().server_name,
        "expires_in": life_ms / 1000,
    })))
}
