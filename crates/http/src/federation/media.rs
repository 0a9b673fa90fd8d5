//! `GET /media/download` and `GET /media/thumbnail`: our media for other servers.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#content-repository>

use axum::extract::State;
use axum::response::Response;
use homeserver::Homeserver;

use super::signed::Origin;
use crate::error::Result;
use crate::extract::{Path, Query};
use crate::media::{ThumbnailQuery, multipart};

pub async fn download(
    State(homeserver): State<Homeserver>,
    Path(media): Path<String>,
    _: Origin,
) -> Result<Response> {
    let own = &homeserver.config().server_name;
    Ok(multipart(homeserver.media(own, &media, None, false).await?))
}

pub async fn thumbnail(
    State(homeserver): State<Homeserver>,
    Path(media): Path<String>,
    Query(size): Query<ThumbnailQuery>,
    _: Origin,
) -> Result<Response> {
    let own = &homeserver.config().server_name;
    Ok(multipart(
        homeserver
            .thumbnail(own, &media, size.size()?, None, false)
            .await?,
    ))
}
