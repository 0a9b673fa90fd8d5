//! Putting content in.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#post_matrixmediav3upload>

use axum::extract::{FromRequest, Request, State};
use axum::http::header;
use bytes::Bytes;
use homeserver::Homeserver;
use homeserver::error::MatrixError;
use homeserver::media::Label;
use protocol::id::ServerName;
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::extract::{Authed, Json, Member, Path, QueryPairs, read_body};

/// The content and what is said of it.
pub struct Upload {
    label: Label,
    bytes: Bytes,
}

impl FromRequest<Homeserver> for Upload {
    type Rejection = Error;

    async fn from_request(request: Request, homeserver: &Homeserver) -> Result<Self> {
        let limit = homeserver.media_bytes_max();
        let declared = request
            .headers()
            .get(header::CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
        if declared.is_some_and(|length| length > limit) {
            return Err(MatrixError::too_large("The media is too large").into());
        }
        let content_type = request
            .headers()
            .get(header::CONTENT_TYPE)
            .and_then(|kind| kind.to_str().ok())
            .map(str::to_owned);
        let bytes = read_body(request.into_body(), limit).await?;
        Ok(Self {
            label: Label {
                content_type,
                filename: None,
            },
            bytes,
        })
    }
}

pub async fn new(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    query: QueryPairs,
    mut upload: Upload,
) -> Result<Json<Value>> {
    upload.label.filename = query.first("filename").map(str::to_owned);
    let id = homeserver
        .upload_media(&caller.user, upload.label, upload.bytes)
        .await?;
    let uri = format!("mxc://{}/{id}", homeserver.config().server_name);
    Ok(Json(json!({ "content_uri": uri })))
}

pub async fn fill(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
    Path((server, media)): Path<(ServerName, String)>,
    query: QueryPairs,
    mut upload: Upload,
) -> Result<Json<Value>> {
    upload.label.filename = query.first("filename").map(str::to_owned);
    homeserver
        .fill_media(&caller.user, &server, &media, upload.label, upload.bytes)
        .await?;
    Ok(Json(json!({})))
}

pub async fn reserve(
    State(homeserver): State<Homeserver>,
    Member(caller): Member,
) -> Result<Json<Value>> {
    let (id, ends_ms) = homeserver.reserve_media(&caller.user).await?;
    let uri = format!("mxc://{}/{id}", homeserver.config().server_name);
    Ok(Json(
        json!({ "content_uri": uri, "unused_expires_at": ends_ms }),
    ))
}

pub async fn config(State(homeserver): State<Homeserver>, _caller: Authed) -> Json<Value> {
    Json(json!({ "m.upload.size": homeserver.config().media_upload_bytes_max }))
}
