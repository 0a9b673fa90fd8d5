//! Users that a user does not want to hear of.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#ignoring-users>

use std::collections::BTreeSet;

use protocol::id::UserId;
use serde_json::Value;
use storage::account_data::{self, GLOBAL};
use storage::{Conn, Result};

pub fn ignored_users(c: &mut dyn Conn, user: &UserId) -> Result<BTreeSet<UserId>> {
    let Some(text) = account_data::get(c, user, GLOBAL, "m.ignored_user_list")? else {
        return Ok(BTreeSet::new());
    };
    let content: Value = serde_json::from_str(&text).unwrap_or_default();
    let users = content.get("ignored_users").and_then(Value::as_object);
    Ok(users
        .into_iter()
        .flatten()
        .filter_map(|(user, _)| UserId::parse(user).ok())
        .collect())
}
