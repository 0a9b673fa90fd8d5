//! Profiles of our users: one row for each field, the value as JSON.

use protocol::id::UserId;

use crate::driver::{Conn, Result};

const GET: &str = "SELECT value FROM profile_fields WHERE user_id = $1 AND name = $2";
const ALL: &str = "SELECT name, value FROM profile_fields WHERE user_id = $1 ORDER BY name";
const SET: &str = "INSERT INTO profile_fields (user_id, name, value) VALUES ($1, $2, $3)
    ON CONFLICT (user_id, name) DO UPDATE SET value = excluded.value";
const REMOVE: &str = "DELETE FROM profile_fields WHERE user_id = $1 AND name = $2";
const REMOVE_ALL: &str = "DELETE FROM profile_fields WHERE user_id = $1";

/// The field's JSON text.
pub fn get(c: &mut dyn Conn, user: &UserId, name: &str) -> Result<Option<String>> {
    c.query_opt(GET, &[user, &name], |row| row.string(0))
}

/// Every field, in the order of the names.
pub fn all(c: &mut dyn Conn, user: &UserId) -> Result<Vec<(String, String)>> {
    c.query_all(ALL, &[user], |row| Ok((row.string(0)?, row.string(1)?)))
}

pub fn set(c: &mut dyn Conn, user: &UserId, name: &str, value: &str) -> Result<()> {
    c.execute(SET, &[user, &name, &value]).map(drop)
}

pub fn remove(c: &mut dyn Conn, user: &UserId, name: &str) -> Result<()> {
    c.execute(REMOVE, &[user, &name]).map(drop)
}

pub fn remove_all(c: &mut dyn Conn, user: &UserId) -> Result<()> {
    c.execute(REMOVE_ALL, &[user]).map(drop)
}
