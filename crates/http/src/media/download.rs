//! Getting content out, with and without being logged in.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#get_matrixclientv1mediadownloadservernamemediaid>

use axum::extract::State;
use axum::response::Response;
use homeserver::Homeserver;
use protocol::id::ServerName;

use super::{Options, ThumbnailQuery, response};
use crate::error::Result;
use crate::extract::{Authed, Path, Query};

pub async fn open(
    State(homeserver): State<Homeserver>,
    Path((server, media)): Path<(ServerName, String)>,
    Query(options): Query<Options>,
) -> Result<Response> {
    give(&homeserver, &server, &media, &options, None).await
}

pub async fn open_named(
    State(homeserver): State<Homeserver>,
    Path((server, media, name)): Path<(ServerName, String, String)>,
    Query(options): Query<Options>,
) -> Result<Response> {
    give(&homeserver, &server, &media, &options, Some(&name)).await
}

pub async fn open_thumbnail(
    State(homeserver): State<Homeserver>,
    Path((server, media)): Path<(ServerName, String)>,
    Query(options): Query<Options>,
    Query(size): Query<ThumbnailQuery>,
) -> Result<Response> {
    give_thumbnail(&homeserver, &server, &media, &options, &size).await
}

pub async fn closed(
    State(homeserver): State<Homeserver>,
    _caller: Authed,
    Path((server, media)): Path<(ServerName, String)>,
    Query(options): Query<Options>,
) -> Result<Response> {
    give(&homeserver, &server, &media, &options, None).await
}

pub async fn closed_named(
    State(homeserver): State<Homeserver>,
    _caller: Authed,
    Path((server, media, name)): Path<(ServerName, String, String)>,
    Query(options): Query<Options>,
) -> Result<Response> {
    give(&homeserver, &server, &media, &options, Some(&name)).await
}

pub async fn closed_thumbnail(
    State(homeserver): State<Homeserver>,
    _caller: Authed,
    Path((server, media)): Path<(ServerName, String)>,
    Query(options): Query<Options>,
    Query(size): Query<ThumbnailQuery>,
) -> Result<Response> {
    give_thumbnail(&homeserver, &server, &media, &options, &size).await
}

async fn give(
    homeserver: &Homeserver,
    server: &ServerName,
    media: &str,
    options: &Options,
    name: Option<&str>,
) -> Result<Response> {
    let content = homeserver
        .media(server, media, options.wait(), options.remote())
        .await?;
    Ok(response(content, name))
}

async fn give_thumbnail(
    homeserver: &Homeserver,
    server: &ServerName,
    media: &str,
    options: &Options,
    size: &ThumbnailQuery,
) -> Result<Response> {
    let content = homeserver
        .thumbnail(
            server,
            media,
            size.size()?,
            options.wait(),
            options.remote(),
        )
        .await?;
    Ok(response(content, None))
}
