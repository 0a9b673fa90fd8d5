//! Accounts: who a token belongs to.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#client-authentication>

use std::sync::Arc;

use protocol::id::UserId;

use crate::Homeserver;
pub use crate::appservice::Appservice;
use crate::error::{MatrixError, Result};

/// What a request brought to prove who is calling.
#[derive(Clone)]
pub struct Credentials {
    pub token: String,
    /// Whom an application service wants to be.
    pub user: Option<String>,
    pub device: Option<String>,
}

/// Who is calling.
#[derive(Clone, Debug)]
pub struct Caller {
    pub user: UserId,
    pub device: Option<String>,
    pub guest: bool,
    pub admin: bool,
    pub appservice: Option<Arc<Appservice>>,
}

impl Homeserver {
    pub async fn authenticate(&self, _credentials: &Credentials) -> Result<Caller> {
        Err(MatrixError::unknown_token("Unknown access token"))
    }
}
