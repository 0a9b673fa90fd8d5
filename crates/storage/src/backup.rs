//! Server-side backups of room keys: versions, and the keys in them.

use protocol::id::UserId;

use crate::driver::{Conn, Result, Row};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    pub version: i64,
    pub algorithm: String,
    /// JSON.
    pub auth_data: String,
    /// Counts the changes of the keys.
    pub etag: i64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    pub room_id: String,
    pub session_id: String,
    pub first_message_index: i64,
    pub forwarded_count: i64,
    pub is_verified: bool,
    /// JSON.
    pub session_data: String,
}

/// Which keys: all, those of a room, or one session.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    pub room_id: Option<String>,
    pub session_id: Option<String>,
}

const LAST_VERSION: &str = "SELECT MAX(version) FROM backup_versions WHERE user_id = $1";
const CREATE: &str = "INSERT INTO backup_versions (user_id, version, algorithm, auth_data, etag)
    VALUES ($1, $2, $3, $4, 0)";
const CURRENT: &str = "SELECT version, algorithm, auth_data, etag FROM backup_versions
    WHERE user_id = $1 AND deleted = 0 ORDER BY version DESC LIMIT 1";
const GET: &str = "SELECT version, algorithm, auth_data, etag FROM backup_versions
    WHERE user_id = $1 AND version = $2 AND deleted = 0";
const SET_AUTH_DATA: &str = "UPDATE backup_versions SET auth_data = $1
    WHERE user_id = $2 AND version = $3 AND deleted = 0";
const DELETE: &str = "UPDATE backup_versions SET deleted = 1
    WHERE user_id = $1 AND version = $2 AND deleted = 0";
const DELETE_KEYS: &str = "DELETE FROM backup_keys WHERE user_id = $1 AND version = $2";
const BUMP: &str = "UPDATE backup_versions SET etag = etag + 1 WHERE user_id = $1 AND version = $2";
const COUNT: &str = "SELECT COUNT(*) FROM backup_keys WHERE user_id = $1 AND version = $2";
const KEYS: &str =
    "SELECT room_id, session_id, first_message_index, forwarded_count, is_verified, session_data
    FROM backup_keys WHERE user_id = $1 AND version = $2
    AND (CAST($3 AS TEXT) IS NULL OR room_id = $3) AND (CAST($4 AS TEXT) IS NULL OR session_id = $4)
    ORDER BY room_id, session_id";
const PUT_KEY: &str = "INSERT INTO backup_keys (user_id, version, room_id, session_id,
        first_message_index, forwarded_count, is_verified, session_data)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (user_id, version, room_id, session_id)
    DO UPDATE SET first_message_index = excluded.first_message_index,
        forwarded_count = excluded.forwarded_count, is_verified = excluded.is_verified,
        session_data = excluded.session_data";
const REMOVE_KEYS: &str = "DELETE FROM backup_keys WHERE user_id = $1 AND version = $2
    AND (CAST($3 AS TEXT) IS NULL OR room_id = $3) AND (CAST($4 AS TEXT) IS NULL OR session_id = $4)";

pub fn create(c: &mut dyn Conn, user: &UserId, algorithm: &str, auth_data: &str) -> Result<i64> {
    let version = c.query_int(LAST_VERSION, &[user])?.unwrap_or(0) + 1;
    c.execute(CREATE, &[user, &version, &algorithm, &auth_data])?;
    Ok(version)
}

pub fn current(c: &mut dyn Conn, user: &UserId) -> Result<Option<Version>> {
    c.query_opt(CURRENT, &[user], read_version)
}

pub fn get(c: &mut dyn Conn, user: &UserId, version: i64) -> Result<Option<Version>> {
    c.query_opt(GET, &[user, &version], read_version)
}

fn read_version(row: &dyn Row) -> Result<Version> {
    Ok(Version {
        version: row.int(0)?,
        algorithm: row.string(1)?,
        auth_data: row.string(2)?,
        etag: row.int(3)?,
    })
}

pub fn set_auth_data(c: &mut dyn Conn, user: &UserId, version: i64, auth_data: &str) -> Result<()> {
    c.execute(SET_AUTH_DATA, &[&auth_data, user, &version])
        .map(drop)
}

/// `false` when there is no such version.
pub fn delete(c: &mut dyn Conn, user: &UserId, version: i64) -> Result<bool> {
    let deleted = c.execute(DELETE, &[user, &version])? == 1;
    c.execute(DELETE_KEYS, &[user, &version])?;
    Ok(deleted)
}

pub fn count(c: &mut dyn Conn, user: &UserId, version: i64) -> Result<i64> {
    c.query_one(COUNT, &[user, &version], |row| row.int(0))
}

pub fn keys(c: &mut dyn Conn, user: &UserId, version: i64, scope: &Scope) -> Result<Vec<Key>> {
    c.query_all(
        KEYS,
        &[user, &version, &scope.room_id, &scope.session_id],
        |row| {
            Ok(Key {
                room_id: row.string(0)?,
                session_id: row.string(1)?,
                first_message_index: row.int(2)?,
                forwarded_count: row.int(3)?,
                is_verified: row.flag(4)?,
                session_data: row.string(5)?,
            })
        },
    )
}

/// Stores the key, replacing one of the same session.
pub fn put_key(c: &mut dyn Conn, user: &UserId, version: i64, key: &Key) -> Result<()> {
    c.execute(
        PUT_KEY,
        &[
            user,
            &version,
            &key.room_id,
            &key.session_id,
            &key.first_message_index,
            &key.forwarded_count,
            &key.is_verified,
            &key.session_data,
        ],
    )
    .map(drop)
}

pub fn remove_keys(c: &mut dyn Conn, user: &UserId, version: i64, scope: &Scope) -> Result<u64> {
    c.execute(
        REMOVE_KEYS,
        &[user, &version, &scope.room_id, &scope.session_id],
    )
}

/// Says that the keys of this version changed.
pub fn bump(c: &mut dyn Conn, user: &UserId, version: i64) -> Result<()> {
    c.execute(BUMP, &[user, &version]).map(drop)
}
