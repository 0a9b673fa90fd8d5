//! The content repository: `/_matrix/media`, and `/_matrix/client/v1/media` for those who are logged in.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#content-repository>

mod disposition;
mod download;
mod preview;
mod upload;

use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use homeserver::Homeserver;
use homeserver::media::Content;
use homeserver::thumbnails::Size;
use serde::Deserialize;

use crate::error::Result;
use homeserver::error::MatrixError;

pub fn routes() -> Router<Homeserver> {
    let open = Router::new()
        .route("/upload", post(upload::new))
        .route("/upload/{server}/{media}", put(upload::fill))
        .route("/create", post(upload::reserve))
        .route("/config", get(upload::config))
        .route("/preview_url", get(preview::preview))
        .route("/download/{server}/{media}", get(download::open))
        .route(
            "/download/{server}/{media}/{filename}",
            get(download::open_named),
        )
        .route("/thumbnail/{server}/{media}", get(download::open_thumbnail));
    let closed = Router::new()
        .route("/config", get(upload::config))
        .route("/preview_url", get(preview::preview))
        .route("/download/{server}/{media}", get(download::closed))
        .route(
            "/download/{server}/{media}/{filename}",
            get(download::closed_named),
        )
        .route(
            "/thumbnail/{server}/{media}",
            get(download::closed_thumbnail),
        );
    Router::new()
        .nest("/_matrix/media/r0", open.clone())
        .nest("/_matrix/media/v1", open.clone())
        .nest("/_matrix/media/v3", open)
        .nest("/_matrix/client/v1/media", closed)
}

/// What a download may ask for.
#[derive(Deserialize)]
struct Options {
    timeout_ms: Option<u64>,
    allow_remote: Option<bool>,
}

impl Options {
    fn wait(&self) -> Option<Duration> {
        self.timeout_ms.map(Duration::from_millis)
    }

    fn remote(&self) -> bool {
        self.allow_remote.unwrap_or(true)
    }
}

/// The size of a thumbnail, as every endpoint asks for it.
#[derive(Deserialize)]
pub struct ThumbnailQuery {
    width: u32,
    height: u32,
    method: Option<String>,
}

impl ThumbnailQuery {
    pub fn size(&self) -> Result<Size> {
        if self.width == 0 || self.height == 0 {
            return Err(MatrixError::invalid_param("A thumbnail has a width and a height").into());
        }
        let crop = match self.method.as_deref() {
            None | Some("scale") => false,
            Some("crop") => true,
            Some(_) => return Err(MatrixError::invalid_param("method is scale or crop").into()),
        };
        Ok(Size {
            width: self.width,
            height: self.height,
            crop,
        })
    }
}

/// Media as a response that no browser will run as a page of ours.
fn response(content: Content, name: Option<&str>) -> Response {
    let filename = name.or(content.filename.as_deref());
    let headers = [
        (header::CONTENT_TYPE, content.content_type.clone()),
        (
            header::CONTENT_DISPOSITION,
            disposition::header(&content.content_type, filename),
        ),
        (header::CONTENT_SECURITY_POLICY, SANDBOX.to_owned()),
        (
            header::CACHE_CONTROL,
            "public,max-age=86400,immutable".to_owned(),
        ),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
        (
            header::HeaderName::from_static("cross-origin-resource-policy"),
            "cross-origin".to_owned(),
        ),
    ];
    let valid = headers
        .into_iter()
        .filter_map(|(name, value)| Some((name, header::HeaderValue::try_from(value).ok()?)));
    let mut response = Body::from(content.bytes).into_response();
    response.headers_mut().extend(valid);
    response
}

const SANDBOX: &str = "sandbox; default-src 'none'; script-src 'none'; plugin-types application/pdf; \
    style-src 'unsafe-inline'; media-src 'self'; object-src 'self';";

/// The two parts in which one server gives media to another.
/// <https://spec.matrix.org/v1.18/server-server-api/#get_matrixfederationv1mediadownloadmediaid>
pub fn multipart(content: Content) -> Response {
    // Boundaries must not occur in the content; a line as long as this one by chance does not.
    let boundary = "vestibule-0d1f2a7c9be84633a5c17f64de80b219-boundary";
    let disposition = disposition::header(&content.content_type, content.filename.as_deref());
    let mut body = format!(
        "--{boundary}\r\nContent-Type: application/json\r\n\r\n{{}}\r\n--{boundary}\r\n\
         Content-Type: {}\r\nContent-Disposition: {disposition}\r\n\r\n",
        content.content_type
    )
    .into_bytes();
    body.extend_from_slice(&content.bytes);
    body.extend_from_slice(format!("\r\n--{boundary}--\r\n").as_bytes());
    let kind = format!("multipart/mixed; boundary={boundary}");
    ([(header::CONTENT_TYPE, kind)], body).into_response()
}
