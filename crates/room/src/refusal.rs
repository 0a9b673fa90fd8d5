//! An error as a client or another server is to see it.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#standard-error-response>

use protocol::pdu::PduError;
use protocol::room_version::RoomVersion;
use serde_json::{Map, Value};

/// Status, errcode, message and further keys of an error body.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{status} {errcode}: {message}")]
pub struct Refusal {
    pub status: u16,
    pub errcode: String,
    pub message: String,
    /// Keys of the body besides `errcode` and `error`, such as `room_version`.
    pub extra: Map<String, Value>,
}

impl Refusal {
    pub fn new(status: u16, errcode: &str, message: impl Into<String>) -> Self {
        Self {
            status,
            errcode: errcode.to_owned(),
            message: message.into(),
            extra: Map::new(),
        }
    }

    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(403, "M_FORBIDDEN", message)
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(404, "M_NOT_FOUND", message)
    }

    pub fn bad_json(message: impl Into<String>) -> Self {
        Self::new(400, "M_BAD_JSON", message)
    }

    /// What cannot be an event of its room version.
    pub fn bad_event(error: &PduError) -> Self {
        match error {
            PduError::TooLarge => Self::new(413, "M_TOO_LARGE", "the event is too large"),
            error => Self::bad_json(error.to_string()),
        }
    }

    pub fn missing_param(message: impl Into<String>) -> Self {
        Self::new(400, "M_MISSING_PARAM", message)
    }

    pub fn invalid_param(message: impl Into<String>) -> Self {
        Self::new(400, "M_INVALID_PARAM", message)
    }

    /// No other server gave a usable answer.
    pub fn bad_gateway(message: impl Into<String>) -> Self {
        Self::new(502, "M_UNKNOWN", message)
    }

    pub fn unsupported_version(version: &str) -> Self {
        Self::new(
            400,
            "M_UNSUPPORTED_ROOM_VERSION",
            format!("this server does not support room version {version}"),
        )
    }

    pub fn incompatible_version(version: RoomVersion) -> Self {
        let mut this = Self::new(
            400,
            "M_INCOMPATIBLE_ROOM_VERSION",
            "your server does not support the version of this room",
        );
        this.extra
            .insert("room_version".to_owned(), version.as_str().into());
        this
    }
}
