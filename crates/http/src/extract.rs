//! What a request brings: who is calling, its path, its query, its body.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#client-authentication>

use std::net::{IpAddr, SocketAddr};

use axum::body::Body;
use axum::extract::{ConnectInfo, FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use homeserver::Homeserver;
use homeserver::accounts::{Appservice, Credentials};
use homeserver::error::MatrixError;
use protocol::id::UserId;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::Arc;

use crate::BODY_BYTES_MAX;
use crate::error::{Error, Result};

/// Who is calling, proved by an access token. Guests are let in: an endpoint closed to them takes
/// [`Member`].
#[derive(Clone, Debug)]
pub struct Authed {
    pub user: UserId,
    /// `None` for an application service that names no device.
    pub device: Option<String>,
    pub guest: bool,
    pub admin: bool,
    /// The application service that speaks, for itself or for a user of its namespaces.
    pub appservice: Option<Arc<Appservice>>,
}

impl Authed {
    /// Who reads a room.
    pub fn reader(&self) -> homeserver::room_view::Reader {
        homeserver::room_view::Reader {
            user: self.user.clone(),
            device: self.device.clone(),
        }
    }

    /// The device, for what makes sense only with one.
    pub fn device(&self) -> Result<&str> {
        self.device
            .as_deref()
            .ok_or_else(|| MatrixError::forbidden("This needs a device").into())
    }
}

impl FromRequestParts<Homeserver> for Authed {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, homeserver: &Homeserver) -> Result<Self> {
        let credentials = credentials(parts)
            .ok_or_else(|| MatrixError::missing_token("An access token is needed"))?;
        let caller = homeserver.authenticate(&credentials).await?;
        Ok(Self {
            user: caller.user,
            device: caller.device,
            guest: caller.guest,
            admin: caller.admin,
            appservice: caller.appservice,
        })
    }
}

/// A caller who is not a guest.
pub struct Member(pub Authed);

impl FromRequestParts<Homeserver> for Member {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, homeserver: &Homeserver) -> Result<Self> {
        let authed = Authed::from_request_parts(parts, homeserver).await?;
        if authed.guest {
            return Err(MatrixError::guest_access_forbidden("Guests may not do this").into());
        }
        Ok(Self(authed))
    }
}

/// A caller, or nobody when no token was given. A wrong token is still an error.
pub struct MaybeAuthed(pub Option<Authed>);

impl FromRequestParts<Homeserver> for MaybeAuthed {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, homeserver: &Homeserver) -> Result<Self> {
        if credentials(parts).is_none() {
            return Ok(Self(None));
        }
        let authed = Authed::from_request_parts(parts, homeserver).await?;
        Ok(Self(Some(authed)))
    }
}

/// A server administrator.
pub struct Admin(pub Authed);

impl FromRequestParts<Homeserver> for Admin {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, homeserver: &Homeserver) -> Result<Self> {
        let authed = Authed::from_request_parts(parts, homeserver).await?;
        if !authed.admin {
            return Err(MatrixError::forbidden("You are not a server administrator").into());
        }
        Ok(Self(authed))
    }
}

/// The access token and whom an application service wants to be.
/// <https://spec.matrix.org/v1.18/application-service-api/#identity-assertion>
fn credentials(parts: &Parts) -> Option<Credentials> {
    let query = query_pairs(parts.uri.query().unwrap_or_default());
    let named = |names: &[&str]| {
        query
            .iter()
            .find(|(key, _)| names.contains(&key.as_str()))
            .map(|(_, value)| value.clone())
    };
    let token = bearer(&parts.headers)
        .map(str::to_owned)
        .or_else(|| named(&["access_token"]))?;
    Some(Credentials {
        token,
        user: named(&["user_id"]),
        device: named(&["device_id", "org.matrix.msc3202.device_id"]),
        address: peer(parts),
    })
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// The pairs of a query string, in order, keys repeated as they stood.
pub fn query_pairs(query: &str) -> Vec<(String, String)> {
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (form_decode(key), form_decode(value))
        })
        .collect()
}

fn form_decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let hex = |b: &u8| (*b as char).to_digit(16).map(|digit| digit as u8);
        let (byte, tail) = match (first, tail) {
            (b'+', _) => (b' ', tail),
            (b'%', [high, low, tail @ ..]) => match (hex(high), hex(low)) {
                (Some(high), Some(low)) => (high << 4 | low, tail),
                _ => (b'%', &rest[1..]),
            },
            (other, _) => (*other, tail),
        };
        bytes.push(byte);
        rest = tail;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The query string as pairs: for endpoints with repeated keys such as `via`.
pub struct QueryPairs(pub Vec<(String, String)>);

impl QueryPairs {
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0
            .iter()
            .filter(move |(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    pub fn first(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }
}

impl<S: Send + Sync> FromRequestParts<S> for QueryPairs {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self> {
        Ok(Self(query_pairs(parts.uri.query().unwrap_or_default())))
    }
}

/// The query string as a struct.
pub struct Query<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self> {
        axum::extract::Query::<T>::from_request_parts(parts, state)
            .await
            .map(|axum::extract::Query(query)| Self(query))
            .map_err(|rejection| MatrixError::invalid_param(rejection.body_text()).into())
    }
}

/// The variable parts of the path, decoded and parsed.
pub struct Path<T>(pub T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self> {
        axum::extract::Path::<T>::from_request_parts(parts, state)
            .await
            .map(|axum::extract::Path(path)| Self(path))
            .map_err(|rejection| MatrixError::invalid_param(rejection.body_text()).into())
    }
}

/// A JSON body, in and out. What is no JSON is `M_NOT_JSON`; JSON of the wrong shape is `M_BAD_JSON`.
/// The content type is not looked at: many clients get it wrong.
pub struct Json<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = Error;

    async fn from_request(request: Request, _: &S) -> Result<Self> {
        let bytes = read_body(request.into_body(), BODY_BYTES_MAX).await?;
        parse_json(&bytes).map(Self)
    }
}

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        axum::Json(self.0).into_response()
    }
}

/// A JSON body that may be left out, which is the same as `{}`.
pub struct OptionalJson<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for OptionalJson<T> {
    type Rejection = Error;

    async fn from_request(request: Request, _: &S) -> Result<Self> {
        let bytes = read_body(request.into_body(), BODY_BYTES_MAX).await?;
        if bytes.trim_ascii().is_empty() {
            return parse_json(b"{}").map(Self);
        }
        parse_json(&bytes).map(Self)
    }
}

/// The access token as it was given, unchecked.
pub struct Token(pub Option<String>);

impl<S: Send + Sync> FromRequestParts<S> for Token {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self> {
        Ok(Self(
            credentials(parts).map(|credentials| credentials.token),
        ))
    }
}

/// Where the request came from, when the listener tells. A proxy on this machine is believed.
pub struct Peer(pub Option<IpAddr>);

impl<S: Send + Sync> FromRequestParts<S> for Peer {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self> {
        Ok(Self(peer(parts)))
    }
}

fn peer(parts: &Parts) -> Option<IpAddr> {
    let address = parts
        .extensions
        .get::<ConnectInfo<SocketAddr>>()
        .map(|info| info.0.ip());
    let told = || {
        let header = parts.headers.get("x-forwarded-for")?.to_str().ok()?;
        header.rsplit(',').next()?.trim().parse().ok()
    };
    match address {
        Some(address) if address.is_loopback() => told().or(Some(address)),
        other => other,
    }
}

/// The whole body, or `M_TOO_LARGE` once it passes `limit`.
pub async fn read_body(body: Body, limit: usize) -> Result<Bytes> {
    axum::body::to_bytes(body, limit).await.map_err(|error| {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
        while let Some(inner) = cause {
            if inner.is::<http_body_util::LengthLimitError>() {
                return MatrixError::too_large("The body is too large").into();
            }
            cause = inner.source();
        }
        MatrixError::unknown("The body could not be read").into()
    })
}

pub fn parse_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    let text = std::str::from_utf8(bytes)
        .map_err(|_| MatrixError::not_json("The body is not valid UTF-8"))?;
    let refused = |error: serde_json::Error| match error.classify() {
        serde_json::error::Category::Data => MatrixError::bad_json(error.to_string()),
        _ => MatrixError::not_json("The body is not valid JSON"),
    };
    // A struct can be read from a list as well; no endpoint means that.
    if text.trim_start().starts_with('[') {
        serde_json::from_str::<serde::de::IgnoredAny>(text).map_err(refused)?;
        return Err(MatrixError::bad_json("The body is a list, not an object").into());
    }
    Ok(serde_json::from_str(text).map_err(refused)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_no_body() {
        #[derive(serde::Deserialize)]
        struct Body {
            #[expect(dead_code, reason = "only its presence matters")]
            name: Option<String>,
        }
        assert!(parse_json::<Body>(b"{}").is_ok());
        assert!(parse_json::<Body>(b" []").is_err());
        assert!(parse_json::<Body>(b"[null]").is_err());
    }

    #[test]
    fn a_query_keeps_repeated_keys_and_decodes_them() {
        let pairs = query_pairs("via=a.org&via=b%3A8448&q=one+two&bare&bad=%zz&&");
        let expected = [
            ("via", "a.org"),
            ("via", "b:8448"),
            ("q", "one two"),
            ("bare", ""),
            ("bad", "%zz"),
        ];
        assert_eq!(
            pairs,
            expected.map(|(k, v)| (k.to_owned(), v.to_owned())).to_vec()
        );
    }

    #[test]
    fn what_is_no_json_is_told_from_json_of_the_wrong_shape() {
        #[derive(Debug, serde::Deserialize)]
        struct Shape {
            _n: Option<u8>,
        }
        let errcode = |bytes: &[u8]| {
            parse_json::<Shape>(bytes)
                .err()
                .map(|Error(e)| e.errcode.to_string())
        };
        assert_eq!(errcode(b"{}"), None);
        assert_eq!(errcode(b"{").as_deref(), Some("M_NOT_JSON"));
        assert_eq!(errcode(b"{\"a\": \"\xff\"}").as_deref(), Some("M_NOT_JSON"));
        assert_eq!(errcode(b"{\"_n\": \"x\"}").as_deref(), Some("M_BAD_JSON"));
        assert_eq!(errcode(b"[]").as_deref(), Some("M_BAD_JSON"));
        assert_eq!(errcode(b"[").as_deref(), Some("M_NOT_JSON"));
        assert_eq!(errcode(&[b'['; 5000]).as_deref(), Some("M_NOT_JSON"));
    }
}
