//! One request to one server: signed, sent, and its answer read as JSON or as the error it is.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use protocol::id::ServerName;
use protocol::signature::SigningKey;
use room::effect::AskError;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::backoff::Backoff;
use crate::request_auth;
use crate::transport::{
    HeaderMap, Method, Request, Response, Transport, TransportError, collect, header,
};

/// An error is an errcode, a sentence and a few keys.
const ERROR_BYTES_MAX: usize = 64 << 10;
const USER_AGENT: &str = concat!("Vestibule/", env!("CARGO_PKG_VERSION"));

/// Speaks for one homeserver. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    transport: Arc<dyn Transport>,
    own: ServerName,
    key: SigningKey,
    backoff: Backoff,
}

/// A request as its caller words it.
pub struct Call<'a> {
    pub to: &'a ServerName,
    pub method: Method,
    /// From [`uri`]; as signed.
    pub uri: String,
    pub body: Body<'a>,
    pub timeout: Duration,
    /// Key requests go unsigned: who is asked for them may not have ours.
    pub signed: bool,
}

pub enum Body<'a> {
    None,
    Json(Value),
    /// JSON text, sent as it is.
    Raw(&'a str),
}

/// Why there is no answer to use. Finer than [`AskError`], for the fallbacks to older endpoints.
#[derive(Debug)]
pub enum Failure {
    Transport(TransportError),
    /// A 2xx that is not what the endpoint gives.
    Malformed(String),
    /// Not a 2xx; the body if it was a JSON object.
    Status {
        status: u16,
        body: Option<Map<String, Value>>,
    },
    /// The request has no canonical form, so it cannot be signed.
    Unsignable,
}

impl Client {
    pub fn new(transport: Arc<dyn Transport>, own: ServerName, key: SigningKey) -> Self {
        Self {
            inner: Arc::new(Inner {
                transport,
                own,
                key,
                backoff: Backoff::default(),
            }),
        }
    }

    pub fn own_name(&self) -> &ServerName {
        &self.inner.own
    }

    pub fn signing_key(&self) -> &SigningKey {
        &self.inner.key
    }

    /// How destinations have fared. Every request writes here; none reads it.
    pub fn backoff(&self) -> &Backoff {
        &self.inner.backoff
    }

    /// Whether somebody listens there: for those who would have to make much ready for a server that may be gone.
    /// Soon after this a request finds the way open.
    pub async fn reach(&self, server: &ServerName) -> Result<(), AskError> {
        let reached = self.inner.transport.reach(server).await;
        reached.map_err(|error| {
            self.inner.backoff.failed(server);
            Failure::Transport(error).into()
        })
    }

    /// Any request with a JSON answer of at most `bytes_max`.
    pub async fn request<T: DeserializeOwned>(
        &self,
        call: Call<'_>,
        bytes_max: usize,
    ) -> Result<T, AskError> {
        Ok(self.json(call, bytes_max).await?)
    }

    pub(crate) async fn json<T: DeserializeOwned>(
        &self,
        call: Call<'_>,
        bytes_max: usize,
    ) -> Result<T, Failure> {
        let timeout = call.timeout;
        let whole = async {
            let response = self.open(call).await?;
            collect(response, bytes_max)
                .await
                .map_err(Failure::Transport)
        };
        let body = tokio::time::timeout(timeout, whole)
            .await
            .map_err(|_| Failure::Transport(TransportError::Timeout("no answer")))??;
        serde_json::from_slice(&body).map_err(|error| Failure::Malformed(error.to_string()))
    }

    /// Sends a request and gives the answer's body, still to be read, if the status is a 2xx.
    pub(crate) async fn open(&self, call: Call<'_>) -> Result<Response, Failure> {
        let to = call.to.clone();
        if to == self.inner.own {
            // Nobody is to find us in a loop with ourselves.
            return Err(Failure::Malformed("that is this server".into()));
        }
        let request = self.signed(call)?;
        match self.inner.transport.send(request).await {
            Err(error) => {
                self.inner.backoff.failed(&to);
                Err(Failure::Transport(error))
            }
            Ok(response) => {
                if response.status.is_server_error() {
                    self.inner.backoff.failed(&to);
                } else {
                    self.inner.backoff.reset(&to);
                }
                if response.status.is_success() {
                    return Ok(response);
                }
                let status = response.status.as_u16();
                let body = collect(response, ERROR_BYTES_MAX).await.ok();
                Err(Failure::Status {
                    status,
                    body: body.and_then(|raw| serde_json::from_slice(&raw).ok()),
                })
            }
        }
    }

    fn signed(&self, call: Call<'_>) -> Result<Request, Failure> {
        let text = match call.body {
            Body::None => None,
            Body::Json(value) => Some(value.to_string()),
            Body::Raw(text) => Some(text.to_owned()),
        };
        let mut headers = HeaderMap::new();
        headers.insert(
            header::USER_AGENT,
            header::HeaderValue::from_static(USER_AGENT),
        );
        if text.is_some() {
            let json = header::HeaderValue::from_static("application/json");
            headers.insert(header::CONTENT_TYPE, json);
        }
        if call.signed {
            let content = text
                .as_deref()
                .map(serde_json::from_str)
                .transpose()
                .map_err(|_| Failure::Unsignable)?;
            let authorization = request_auth::sign(
                &self.inner.key,
                call.method.as_str(),
                &call.uri,
                &self.inner.own,
                call.to,
                content,
            )
            .ok_or(Failure::Unsignable)?
            .to_header();
            let authorization =
                header::HeaderValue::try_from(authorization).map_err(|_| Failure::Unsignable)?;
            headers.insert(header::AUTHORIZATION, authorization);
        }
        Ok(Request {
            to: call.to.clone(),
            method: call.method,
            path_and_query: call.uri,
            headers,
            body: text.map(Bytes::from),
            timeout: call.timeout,
        })
    }
}

impl<'a> Call<'a> {
    pub fn get(to: &'a ServerName, uri: String, timeout: Duration) -> Self {
        Self {
            to,
            method: Method::GET,
            uri,
            body: Body::None,
            timeout,
            signed: true,
        }
    }

    pub fn put(to: &'a ServerName, uri: String, body: Body<'a>, timeout: Duration) -> Self {
        Self {
            method: Method::PUT,
            body,
            ..Self::get(to, uri, timeout)
        }
    }

    pub fn post(to: &'a ServerName, uri: String, body: Body<'a>, timeout: Duration) -> Self {
        Self {
            method: Method::POST,
            body,
            ..Self::get(to, uri, timeout)
        }
    }
}

impl Failure {
    /// Whether the answer says that there is no such endpoint, so that an older one may be tried (J-46).
    /// A refusal in words that no Matrix endpoint speaks: perhaps it is not one.
    pub(crate) fn is_no_matrix_error(&self) -> bool {
        matches!(self, Self::Status { status: 400..500, body } if body
            .as_ref()
            .is_none_or(|body| !body.contains_key("errcode")))
    }

    pub(crate) fn is_unknown_endpoint(&self) -> bool {
        let Self::Status { status, body } = self else {
            return false;
        };
        let errcode = body.as_ref().map(|b| b.get("errcode"));
        let unrecognized = errcode.flatten().is_some_and(|c| c == "M_UNRECOGNIZED");
        match status {
            404 | 405 => body.is_none() || unrecognized,
            400 => unrecognized,
            _ => false,
        }
    }
}

impl From<Failure> for AskError {
    fn from(failure: Failure) -> Self {
        let reason = match failure {
            Failure::Transport(error) => error.to_string(),
            Failure::Malformed(reason) => format!("an answer that is none: {reason}"),
            Failure::Unsignable => "a request that cannot be signed".to_owned(),
            Failure::Status {
                status: status @ 300..500,
                body: Some(body),
            } => {
                let text = |key: &str| body.get(key).and_then(Value::as_str).map(str::to_owned);
                return Self::Refused {
                    status,
                    errcode: text("errcode").unwrap_or_else(|| "M_UNKNOWN".to_owned()),
                    error: text("error").unwrap_or_default(),
                    body: Value::Object(body).to_string().into(),
                };
            }
            Failure::Status { status, body } => {
                let said = body
                    .and_then(|b| b.get("error")?.as_str().map(|e| format!(": {e}")))
                    .unwrap_or_default();
                format!("status {status}{said}")
            }
        };
        Self::Unreachable { reason }
    }
}

/// `prefix` and one percent-encoded segment for each of `segments`.
pub fn uri(prefix: &str, segments: &[&str]) -> String {
    let mut uri = prefix.to_owned();
    for segment in segments {
        uri.push('/');
        encode_into(&mut uri, segment);
    }
    uri
}

/// Adds a query parameter.
pub fn with_query(mut uri: String, name: &str, value: &str) -> String {
    uri.push(if uri.contains('?') { '&' } else { '?' });
    uri.push_str(name);
    uri.push('=');
    encode_into(&mut uri, value);
    uri
}

fn encode_into(out: &mut String, text: &str) {
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_are_encoded_whole() {
        assert_eq!(
            uri("/_matrix/federation/v1/x", &["!a/b:c.org", "$é+%"]),
            "/_matrix/federation/v1/x/%21a%2Fb%3Ac.org/%24%C3%A9%2B%25"
        );
        let one = with_query("/x".into(), "ver", "1");
        assert_eq!(with_query(one, "v", "a&b"), "/x?ver=1&v=a%26b");
    }

    #[test]
    fn only_an_unknown_endpoint_calls_for_an_older_one() {
        let failure = |status, body: Option<Value>| Failure::Status {
            status,
            body: body.map(|b| b.as_object().unwrap().clone()),
        };
        let code = |errcode: &str| Some(serde_json::json!({"errcode": errcode}));
        for (status, body, unknown) in [
            (404, None, true),
            (405, None, true),
            (404, code("M_UNRECOGNIZED"), true),
            (405, code("M_UNRECOGNIZED"), true),
            (400, code("M_UNRECOGNIZED"), true),
            (404, code("M_NOT_FOUND"), false),
            (400, None, false),
            (400, code("M_BAD_JSON"), false),
            (403, code("M_UNRECOGNIZED"), false),
            (500, None, false),
        ] {
            let failure = failure(status, body);
            assert_eq!(failure.is_unknown_endpoint(), unknown, "{failure:?}");
        }
    }

    #[test]
    fn a_refusal_keeps_the_whole_body_and_the_rest_is_unreachable() {
        let body = serde_json::json!({"errcode": "M_X", "error": "no", "room_version": "6"});
        let refused = AskError::from(Failure::Status {
            status: 400,
            body: body.as_object().cloned(),
        });
        let AskError::Refused {
            status,
            errcode,
            error,
            body: kept,
        } = refused
        else {
            panic!("{refused:?}");
        };
        assert_eq!(
            (status, errcode.as_str(), error.as_str()),
            (400, "M_X", "no")
        );
        assert_eq!(serde_json::from_str::<Value>(&kept).unwrap(), body);
        for (status, body) in [(500, body.as_object().cloned()), (404, None), (302, None)] {
            let error = AskError::from(Failure::Status { status, body });
            assert!(matches!(error, AskError::Unreachable { .. }), "{status}");
        }
    }
}
