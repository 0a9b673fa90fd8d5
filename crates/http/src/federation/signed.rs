//! A request that another server signed: who it is, and what it brought.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#request-authentication>

use axum::extract::{FromRequest, Request};
use axum::http::request::Parts;
use axum::http::{Method, header};
use bytes::Bytes;
use homeserver::Homeserver;
use homeserver::error::MatrixError;
use protocol::id::ServerName;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use crate::extract::{parse_json, read_body};

/// 50 PDUs of 64 KiB and 100 EDUs, with room for escapes.
const BODY_BYTES_MAX: usize = 16 << 20;
/// A server may sign with each of its keys; more headers than this are not looked at.
const AUTHORIZATIONS_MAX: usize = 4;

/// Who asks; a body is of no interest.
pub struct Origin(pub ServerName);

impl FromRequest<Homeserver> for Origin {
    type Rejection = Error;

    async fn from_request(request: Request, homeserver: &Homeserver) -> Result<Self> {
        let signed = Signed::from_request(request, homeserver).await?;
        Ok(Self(signed.origin))
    }
}

/// Who asks, and the bytes of the body.
pub struct Signed {
    pub origin: ServerName,
    body: Bytes,
}

impl Signed {
    pub fn json<T: DeserializeOwned>(&self) -> Result<T> {
        parse_json(&self.body)
    }

    pub fn bytes(&self) -> &[u8] {
        &self.body
    }

    pub fn text(&self) -> Result<&str> {
        std::str::from_utf8(&self.body)
            .map_err(|_| MatrixError::not_json("The body is not valid UTF-8").into())
    }
}

impl FromRequest<Homeserver> for Signed {
    type Rejection = Error;

    async fn from_request(request: Request, homeserver: &Homeserver) -> Result<Self> {
        let (parts, body) = request.into_parts();
        let body = read_body(body, BODY_BYTES_MAX).await?;
        // Some send a body with their GETs. Most of them do not sign it, so it is tried without first.
        let mut verified = if parts.method == Method::GET {
            verify(&parts, &[], homeserver).await
        } else {
            verify(&parts, &body, homeserver).await
        };
        if verified.is_err() && parts.method == Method::GET && !body.is_empty() {
            verified = verify(&parts, &body, homeserver).await;
        }
        let origin = verified?;
        Ok(Self { origin, body })
    }
}

async fn verify(parts: &Parts, body: &[u8], homeserver: &Homeserver) -> Result<ServerName> {
    let uri = parts.uri.path_and_query();
    let uri = uri.map_or("/", |path| path.as_str());
    let method = parts.method.as_str();
    let mut failure = None;
    for header in parts
        .headers
        .get_all(header::AUTHORIZATION)
        .iter()
        .take(AUTHORIZATIONS_MAX)
    {
        let header = header.to_str().ok();
        match homeserver
            .authenticate_server(header, method, uri, body)
            .await
        {
            Ok(origin) => return Ok(origin),
            Err(error) => failure = Some(error),
        }
    }
    Err(match failure {
        Some(error) => error.into(),
        None => MatrixError::unauthorized("This request must be signed").into(),
    })
}
