//! Who may invite a user.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#invite-permission>, and the lists of MSC4155, which are
//! finer: users and servers that are allowed, ignored or blocked, each a pattern.

use protocol::id::UserId;
use serde_json::Value;
use storage::account_data::{self, GLOBAL};
use storage::{Conn, Result};

use crate::Homeserver;
use crate::error::MatrixError;

/// The account data that says so, the spec's and the proposal's.
const CONFIGS: [&str; 2] = [
    "m.invite_permission_config",
    "org.matrix.msc4155.invite_permission_config",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permission {
    Allowed,
    /// The inviter need not know that nobody looks.
    Ignored,
    Blocked,
}

impl Permission {
    pub fn of(c: &mut dyn Conn, user: &UserId, inviter: &UserId) -> Result<Self> {
        for kind in CONFIGS {
            if let Some(text) = account_data::get(c, user, GLOBAL, kind)? {
                let config = serde_json::from_str(&text).unwrap_or_default();
                return Ok(Self::by(&config, inviter));
            }
        }
        Ok(Self::Allowed)
    }

    fn by(config: &Value, inviter: &UserId) -> Self {
        let (user, server) = (inviter.as_str(), inviter.server_str());
        for (list, name, permission) in [
            ("allowed_users", user, Self::Allowed),
            ("ignored_users", user, Self::Ignored),
            ("blocked_users", user, Self::Blocked),
            ("allowed_servers", server, Self::Allowed),
            ("ignored_servers", server, Self::Ignored),
            ("blocked_servers", server, Self::Blocked),
        ] {
            let patterns = config.get(list).and_then(Value::as_array);
            let mut patterns = patterns.into_iter().flatten().filter_map(Value::as_str);
            if patterns.any(|pattern| room::acl::matches(pattern, name)) {
                return permission;
            }
        }
        match config.get("default_action").and_then(Value::as_str) {
            Some("block") => Self::Blocked,
            _ => Self::Allowed,
        }
    }
}

impl Homeserver {
    /// an error if our user does not want to be invited by this one.
    pub(crate) async fn check_may_invite(
        &self,
        user: &UserId,
        inviter: &UserId,
    ) -> std::result::Result<(), MatrixError> {
        let (user, inviter) = (user.clone(), inviter.clone());
        let permission = self
            .store()
            .read(move |c| Permission::of(c, &user, &inviter))
            .await?;
        match permission {
            Permission::Allowed | Permission::Ignored => Ok(()),
            Permission::Blocked => Err(MatrixError::new(
                403,
                "M_INVITE_BLOCKED",
                "The user does not want to be invited",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_finest_word_counts() {
        let config = json!({
            "default_action": "block",
            "allowed_users": ["@friend:bad.test"],
            "blocked_users": ["@eve*:good.test"],
            "ignored_servers": ["*.test"],
            "blocked_servers": ["bad.test"],
            "allowed_servers": ["good.test"],
        });
        for (inviter, expected) in [
            ("@friend:bad.test", Permission::Allowed),
            ("@eve2:good.test", Permission::Blocked),
            ("@bob:good.test", Permission::Allowed),
            ("@bob:bad.test", Permission::Ignored),
            ("@bob:elsewhere.org", Permission::Blocked),
        ] {
            let inviter = UserId::parse(inviter).unwrap();
            assert_eq!(Permission::by(&config, &inviter), expected, "{inviter}");
            assert_eq!(Permission::by(&json!([]), &inviter), Permission::Allowed);
        }
    }
}
