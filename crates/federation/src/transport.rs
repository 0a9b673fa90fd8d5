//! The seam between what is said to another server and how it gets there.

use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
pub use hyper::{HeaderMap, Method, StatusCode, header};
use protocol::id::ServerName;

/// One request to a server, named as in room state: how to reach it is the transport's matter.
#[derive(Clone, Debug)]
pub struct Request {
    pub to: ServerName,
    pub method: Method,
    /// As it is signed and as it goes out, percent-encoded.
    pub path_and_query: String,
    pub headers: HeaderMap,
    pub body: Option<Bytes>,
    /// How long the head of the answer may take, and then each pause within its body.
    pub timeout: Duration,
}

pub struct Response {
    pub status: StatusCode,
    pub headers: HeaderMap,
    /// As it arrives; whoever reads it bounds it.
    pub body: BoxStream<'static, Result<Bytes, TransportError>>,
}

/// Why a request got no answer, or no end of one.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum TransportError {
    /// Nothing was sent.
    #[error("cannot reach {server}: {reason}")]
    Connect { server: ServerName, reason: String },
    /// The request may have been heard.
    #[error("{0} in time")]
    Timeout(&'static str),
    #[error("the connection broke: {0}")]
    Broken(String),
}

/// Hyper in life, a scripted network in tests.
pub trait Transport: Send + Sync + 'static {
    fn send(&self, request: Request) -> BoxFuture<'_, Result<Response, TransportError>>;

    /// Whether somebody listens there at all, which costs less than to send something in vain. A transport that
    /// can not tell says yes.
    fn reach(&self, _to: &ServerName) -> BoxFuture<'_, Result<(), TransportError>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

/// Reads a body to its end, if that is within `bytes_max`.
pub async fn collect(response: Response, bytes_max: usize) -> Result<Bytes, TransportError> {
    use futures::StreamExt;
    let mut body = response.body;
    let mut whole = bytes::BytesMut::new();
    while let Some(chunk) = body.next().await {
        let chunk = chunk?;
        if whole.len() + chunk.len() > bytes_max {
            return Err(TransportError::Broken(format!(
                "an answer of more than {bytes_max} bytes"
            )));
        }
        whole.extend_from_slice(&chunk);
    }
    Ok(whole.freeze())
}
