//! Push rules and pushers.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#push-notifications>

use axum::Router;
use axum::extract::State;
use axum::routing::{get, post};
use homeserver::Homeserver;
use homeserver::push_rules::NewRule;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::error::Result;
use crate::extract::{Authed, Json, Member, Path, Query, QueryPairs};

pub fn routes() -> Router<Homeserver> {
    Router::new()
        .route("/pushrules", get(all))
        .route("/pushrules/", get(all))
        .route("/pushrules/global", get(global))
        .route("/pushrules/global/", get(global))
        .route("/pushrules/global/{kind}", get(of_kind))
        .route("/pushrules/global/{kind}/", get(of_kind))
        .route(
            "/pushrules/global/{kind}/{rule}",
            get(one).put(set).delete(remove),
        )
        .route(
            "/pushrules/global/{kind}/{rule}/enabled",
            get(enabled).put(enable),
        )
        .route(
            "/pushrules/global/{kind}/{rule}/actions",
            get(actions).put(set_actions),
        )
        .route("/notifications", get(notifications))
        .route("/pushers", get(pushers))
        .route("/pushers/set", post(set_pusher))
}

async fn all(State(homeserver): State<Homeserver>, caller: Authed) -> Result<Json<Value>> {
    Ok(Json(homeserver.push_rules(&caller.user).await?))
}

async fn global(State(homeserver): State<Homeserver>, caller: Authed) -> Result<Json<Value>> {
    Ok(Json(
        homeserver.push_rules(&caller.user).await?["global"].take(),
    ))
}

async fn of_kind(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path(kind): Path<String>,
) -> Result<Json<Value>> {
    Ok(Json(
        homeserver.push_rules_of_kind(&caller.user, &kind).await?,
    ))
}

async fn one(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((kind, rule)): Path<(String, String)>,
) -> Result<Json<Value>> {
    Ok(Json(
        homeserver.push_rule(&caller.user, &kind, &rule).await?,
    ))
}

async fn set(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((kind, rule)): Path<(String, String)>,
    query: QueryPairs,
    Json(body): Json<NewRule>,
) -> Result<Json<Value>> {
    let place = |name| query.first(name).map(str::to_owned);
    homeserver
        .put_push_rule(
            &caller.user,
            &kind,
            &rule,
            body,
            place("after"),
            place("before"),
        )
        .await?;
    Ok(Json(json!({})))
}

async fn remove(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((kind, rule)): Path<(String, String)>,
) -> Result<Json<Value>> {
    homeserver
        .delete_push_rule(&caller.user, &kind, &rule)
        .await?;
    Ok(Json(json!({})))
}

async fn enabled(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((kind, rule)): Path<(String, String)>,
) -> Result<Json<Value>> {
    let rule = homeserver.push_rule(&caller.user, &kind, &rule).await?;
    Ok(Json(json!({ "enabled": rule["enabled"] })))
}

#[derive(Deserialize)]
struct Enabled {
    enabled: bool,
}

async fn enable(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((kind, rule)): Path<(String, String)>,
    Json(body): Json<Enabled>,
) -> Result<Json<Value>> {
    homeserver
        .enable_push_rule(&caller.user, &kind, &rule, body.enabled)
        .await?;
    Ok(Json(json!({})))
}

async fn actions(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((kind, rule)): Path<(String, String)>,
) -> Result<Json<Value>> {
    let rule = homeserver.push_rule(&caller.user, &kind, &rule).await?;
    Ok(Json(json!({ "actions": rule["actions"] })))
}

#[derive(Deserialize)]
struct Actions {
    actions: Vec<Value>,
}

async fn set_actions(
    State(homeserver): State<Homeserver>,
    caller: Authed,
    Path((kind, rule)): Path<(String, String)>,
    Json(body): Json<Actions>,
) -> Result<Json<Value>> {
    homeserver
        .set_push_actions(&caller.user, &kind, &rule, &body.actions)
        .await?;
    Ok(Json(json!({})))
}

#[derive(Deserialize)]
struct Page {
    from: Option<String>,
    limit: Option<i64>,
    only: Option<String>,
}

async fn notifications(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Query(page): Query<Page>,
) -> Result<Json<Value>> {
    let only_highlights = page.only.as_deref() == Some("highlight");
    let list = homeserver.notifications(
        &caller.user,
        page.from.as_deref(),
        page.limit,
        only_highlights,
    );
    Ok(Json(list.await?))
}

async fn pushers(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
) -> Result<Json<Value>> {
    Ok(Json(
        json!({ "pushers": homeserver.pushers(&caller.user).await? }),
    ))
}

async fn set_pusher(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Json(body): Json<Map<String, Value>>,
) -> Result<Json<Value>> {
    homeserver
        .set_pusher(&caller.user, caller.device()?, &body)
        .await?;
    Ok(Json(json!({})))
}
