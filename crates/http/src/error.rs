//! A `MatrixError` becomes a status and an errcode.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#standard-error-response>

use std::any::Any;

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use axum::response::IntoResponse;
use homeserver::error::MatrixError;
use serde_json::Value;

/// What a handler may fail with: `?` takes whatever the service answers.
pub struct Error(pub MatrixError);

pub type Result<T> = std::result::Result<T, Error>;

impl From<MatrixError> for Error {
    fn from(error: MatrixError) -> Self {
        Self(error)
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response<Body> {
        let Self(error) = self;
        let status =
            StatusCode::from_u16(error.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let retry_after_ms = error.extra.get("retry_after_ms").and_then(Value::as_u64);
        let mut response = (status, axum::Json(error.body())).into_response();
        if let Some(ms) = retry_after_ms.filter(|_| status == StatusCode::TOO_MANY_REQUESTS) {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(ms.div_ceil(1000)));
        }
        response
    }
}

pub async fn unknown_path() -> Error {
    Error(MatrixError::unrecognized("There is nothing at this path"))
}

pub async fn wrong_method() -> Error {
    Error(MatrixError::new(
        405,
        "M_UNRECOGNIZED",
        "This path knows no such method",
    ))
}

/// A panic in a handler is a bug of ours: the caller hears 500, the log has the words.
pub fn panicked(panic: Box<dyn Any + Send + 'static>) -> Response<Body> {
    let words = panic
        .downcast_ref::<&'static str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    tracing::error!(panic = words, "a request handler panicked");
    Error(MatrixError::internal("Internal server error")).into_response()
}
