//! The error that a door can show: a status, an errcode, words, and whatever keys belong to it.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#standard-error-response>

use std::borrow::Cow;

use serde_json::{Map, Value};

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{status} {errcode}: {message}")]
pub struct MatrixError {
    pub status: u16,
    pub errcode: Cow<'static, str>,
    pub message: String,
    /// Further keys of the body, such as `retry_after_ms` or `room_version`.
    pub extra: Map<String, Value>,
}

pub type Result<T> = std::result::Result<T, MatrixError>;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident => $status:literal $errcode:literal;)*) => {
        impl MatrixError {
            $($(#[$doc])*
            pub fn $name(message: impl Into<String>) -> Self {
                Self::new($status, $errcode, message)
            })*
        }
    };
}

kinds! {
    bad_json => 400 "M_BAD_JSON";
    bad_state => 400 "M_BAD_STATE";
    exclusive => 400 "M_EXCLUSIVE";
    guest_access_forbidden => 403 "M_GUEST_ACCESS_FORBIDDEN";
    forbidden => 403 "M_FORBIDDEN";
    incompatible_room_version => 400 "M_INCOMPATIBLE_ROOM_VERSION";
    invalid_param => 400 "M_INVALID_PARAM";
    invalid_room_state => 400 "M_INVALID_ROOM_STATE";
    invalid_username => 400 "M_INVALID_USERNAME";
    missing_param => 400 "M_MISSING_PARAM";
    missing_token => 401 "M_MISSING_TOKEN";
    not_found => 404 "M_NOT_FOUND";
    not_json => 400 "M_NOT_JSON";
    room_in_use => 400 "M_ROOM_IN_USE";
    too_large => 413 "M_TOO_LARGE";
    unable_to_authorise_join => 400 "M_UNABLE_TO_AUTHORISE_JOIN";
    unable_to_grant_join => 400 "M_UNABLE_TO_GRANT_JOIN";
    unauthorized => 401 "M_UNAUTHORIZED";
    unknown_token => 401 "M_UNKNOWN_TOKEN";
    unrecognized => 404 "M_UNRECOGNIZED";
    unsupported_room_version => 400 "M_UNSUPPORTED_ROOM_VERSION";
    user_in_use => 400 "M_USER_IN_USE";
    /// A request that is wrong in a way that no other errcode names.
    unknown => 400 "M_UNKNOWN";
    /// Another server could not be reached or answered nonsense.
    bad_gateway => 502 "M_UNKNOWN";
    /// A fault of ours. The message goes to the client: no details of the store, please.
    internal => 500 "M_UNKNOWN";
    /// Someone has to wait longer than this server lets a request wait.
    timed_out => 504 "M_UNKNOWN";
    /// joins.md 2.7: a question that only a full room can answer.
    partial_state => 403 "ORG.MATRIX.MSC3895_UNABLE_DUE_TO_PARTIAL_STATE";
}

impl MatrixError {
    pub fn new(
        status: u16,
        errcode: impl Into<Cow<'static, str>>,
        message: impl Into<String>,
    ) -> Self {
        Self {
            status,
            errcode: errcode.into(),
            message: message.into(),
            extra: Map::new(),
        }
    }

    pub fn limit_exceeded(retry_after_ms: u64) -> Self {
        Self::new(429, "M_LIMIT_EXCEEDED", "Too many requests")
            .with("retry_after_ms", retry_after_ms)
    }

    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.extra.insert(key.to_owned(), value.into());
        self
    }

    /// The body that goes over the wire.
    pub fn body(&self) -> Value {
        let mut body = self.extra.clone();
        // A first UIA challenge is no failure and has no errcode.
        if !self.errcode.is_empty() {
            body.insert("errcode".to_owned(), Value::from(self.errcode.as_ref()));
            body.insert("error".to_owned(), Value::from(self.message.as_str()));
        }
        Value::Object(body)
    }
}

/// What the store said is for the log only.
impl From<storage::Error> for MatrixError {
    fn from(error: storage::Error) -> Self {
        tracing::error!(%error, "the store failed");
        Self::internal("Internal server error")
    }
}
