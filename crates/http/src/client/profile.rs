//! Profiles.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#profiles>

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use homeserver::Homeserver;
use homeserver::error::MatrixError;
use protocol::id::UserId;
use serde_json::{Map, Value, json};

use crate::error::Result;
use crate::extract::{Authed, Json, MaybeAuthed, Path};

pub fn routes() -> Router<Homeserver> {
    Router::new().route("/profile/{user}", get(whole)).route(
        "/profile/{user}/{field}",
        get(field).put(set).delete(remove),
    )
}

async fn whole(
    State(homeserver): State<Homeserver>,
    _caller: MaybeAuthed,
    Path(user): Path<UserId>,
) -> Result<Json<Map<String, Value>>> {
    Ok(Json(homeserver.profile(&user).await?))
}

async fn field(
    State(homeserver): State<Homeserver>,
    _caller: MaybeAuthed,
    Path((user, name)): Path<(UserId, String)>,
) -> Result<Json<Map<String, Value>>> {
    let value = homeserver.profile_field(&user, &name).await?;
    if value.is_none() && !matches!(name.as_str(), "displayname" | "avatar_url") {
        return Err(MatrixError::not_found("The profile has no such field").into());
    }
    Ok(Json(value.map(|value| (name, value)).into_iter().collect()))
}

async fn set(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((user, name)): Path<(UserId, String)>,
    Json(mut body): Json<Map<String, Value>>,
) -> Result<Json<Value>> {
    may_set(&caller, &user, &name)?;
    let value = body.remove(&name);
    if value.is_none() && !matches!(name.as_str(), "displayname" | "avatar_url") {
        return Err(MatrixError::missing_param(format!("{name} is missing")).into());
    }
    homeserver.set_profile_field(&user, &name, value).await?;
    Ok(Json(json!({})))
}

async fn remove(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((user, name)): Path<(UserId, String)>,
) -> Result<Json<Value>> {
    may_set(&caller, &user, &name)?;
    homeserver.set_profile_field(&user, &name, None).await?;
    Ok(Json(json!({})))
}

fn may_set(caller: &Authed, user: &UserId, name: &str) -> Result<()> {
    if caller.guest && name != "displayname" {
        let words = "Guests have only a display name";
        return Err(MatrixError::guest_access_forbidden(words).into());
    }
    if caller.user == *user || caller.admin {
        return Ok(());
    }
    Err(MatrixError::forbidden("This is another user's profile").into())
}
