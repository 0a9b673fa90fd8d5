//! `/_vestibule/admin/v1/joins`: how far each join is, and what to do about one that hangs.
//!
//! Ours alone; no specification has it. `docs/operating.md` tells how to use it.

use std::convert::Infallible;

use axum::Router;
use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::routing::{delete, get, post};
use futures::{Stream, StreamExt as _};
use homeserver::Homeserver;
use homeserver::error::MatrixError;
use homeserver::jobs;
use protocol::id::ServerName;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio_stream::wrappers::BroadcastStream;

use crate::error::Result;
use crate::extract::{Admin, Json, Path, Query};

const LIMIT_DEFAULT: i64 = 100;
const LIMIT_MAX: i64 = 1000;

pub fn routes() -> Router<Homeserver> {
    Router::new()
        .route("/_vestibule/admin/v1/joins", get(list))
        .route("/_vestibule/admin/v1/joins/stream", get(stream))
        .route("/_vestibule/admin/v1/joins/{id}", get(one))
        .route("/_vestibule/admin/v1/joins/{id}", delete(cancel))
        .route("/_vestibule/admin/v1/joins/{id}/retry", post(retry))
        .route("/_vestibule/admin/v1/joins/{id}/server", post(use_server))
}

#[derive(Deserialize)]
struct Page {
    limit: Option<i64>,
}

async fn list(
    State(hs): State<Homeserver>,
    _admin: Admin,
    Query(page): Query<Page>,
) -> Result<Json<Value>> {
    let limit = page.limit.unwrap_or(LIMIT_DEFAULT).clamp(1, LIMIT_MAX);
    let joins: Vec<Value> = hs
        .jobs()
        .list(limit)
        .await
        .map_err(MatrixError::from)?
        .iter()
        .map(jobs::to_json)
        .collect();
    Ok(Json(json!({ "joins": joins })))
}

async fn one(
    State(hs): State<Homeserver>,
    _admin: Admin,
    Path(id): Path<i64>,
) -> Result<Json<Value>> {
    Ok(Json(hs.jobs().describe(id).await?))
}

/// Before `send_join` nothing remains of a cancelled join; after it a leave is owed; and who is in the room
/// already leaves it.
async fn cancel(
    State(hs): State<Homeserver>,
    _admin: Admin,
    Path(id): Path<i64>,
) -> Result<Json<Value>> {
    match hs.jobs().cancel(id).await? {
        true => Ok(Json(json!({}))),
        false => Err(MatrixError::not_found("No such join is under way").into()),
    }
}

#[derive(Deserialize)]
struct Use {
    server: ServerName,
}

async fn use_server(
    State(hs): State<Homeserver>,
    _admin: Admin,
    Path(id): Path<i64>,
    Json(body): Json<Use>,
) -> Result<Json<Value>> {
    match hs.jobs().use_server(id, body.server).await? {
        true => Ok(Json(json!({}))),
        false => Err(MatrixError::not_found("Nothing of this join is under way").into()),
    }
}

async fn retry(
    State(hs): State<Homeserver>,
    _admin: Admin,
    Path(id): Path<i64>,
) -> Result<Json<Value>> {
    match hs.jobs().retry(id).await? {
        true => Ok(Json(json!({}))),
        false => Err(MatrixError::not_found("No resync runs for this join").into()),
    }
}

/// Server-sent events: one `join` event for each change of a job.
async fn stream(
    State(hs): State<Homeserver>,
    _admin: Admin,
) -> Sse<impl Stream<Item = std::result::Result<Event, Infallible>>> {
    let changes = BroadcastStream::new(hs.jobs().follow());
    let events = changes.filter_map(async |change| {
        // A listener that lags sees the next change; the list has the whole picture.
        let job = change.ok()?;
        Some(Ok(Event::default()
            .event("join")
            .data(jobs::to_json(&job).to_string())))
    });
    Sse::new(events).keep_alive(KeepAlive::default())
}
