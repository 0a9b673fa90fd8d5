//! Users, and the tokens that speak for them.
//!
//! Tokens come in as their SHA-256; whoever calls has hashed them.

use protocol::id::{RoomId, UserId};

use crate::driver::{Conn, Result};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    pub password_hash: Option<String>,
    pub created_ms: i64,
    pub admin: bool,
    pub guest: bool,
    pub deactivated: bool,
    pub erased: bool,
    pub locked: bool,
    /// The application service that made this account.
    pub appservice: Option<String>,
}

const CREATE: &str =
    "INSERT INTO users (user_id, password_hash, created_ms, admin, guest, appservice)
    VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (user_id) DO NOTHING";
const GET: &str =
    "SELECT password_hash, created_ms, admin, guest, deactivated, erased, locked, appservice
    FROM users WHERE user_id = $1";
const SET_PASSWORD: &str = "UPDATE users SET password_hash = $1 WHERE user_id = $2";
const SET_ADMIN: &str = "UPDATE users SET admin = $1 WHERE user_id = $2";
const SET_LOCKED: &str = "UPDATE users SET locked = $1 WHERE user_id = $2";
const DEACTIVATE: &str = "UPDATE users SET deactivated = 1, erased = $1, password_hash = NULL
    WHERE user_id = $2";
const REACTIVATE: &str = "UPDATE users SET deactivated = 0, erased = 0, password_hash = $1
    WHERE user_id = $2";
const LIST: &str =
    "SELECT user_id, password_hash, created_ms, admin, guest, deactivated, erased, locked, appservice
    FROM users WHERE user_id > $1 ORDER BY user_id LIMIT $2";

const GUESTS_IN: &str = "SELECT m.user_id FROM memberships m JOIN rooms r ON r.nid = m.room_nid
    JOIN users u ON u.user_id = m.user_id
    WHERE r.room_id = $1 AND m.local = 1 AND m.membership = 'join' AND u.guest = 1
    ORDER BY m.user_id";
const ROOMS_WITH_GUESTS: &str = "SELECT DISTINCT r.room_id FROM users u
    JOIN memberships m ON m.user_id = u.user_id AND m.membership = 'join'
    JOIN rooms r ON r.nid = m.room_nid WHERE u.guest = 1 ORDER BY r.room_id";
const DEACTIVATED_MEMBERS: &str = "SELECT u.user_id FROM users u WHERE u.deactivated = 1
    AND (EXISTS (SELECT 1 FROM memberships m WHERE m.user_id = u.user_id
            AND m.membership IN ('join', 'invite', 'knock'))
        OR EXISTS (SELECT 1 FROM out_of_band o WHERE o.user_id = u.user_id
            AND o.membership IN ('invite', 'knock')))
    ORDER BY u.user_id";

/// `false` when the name is taken.
pub fn create(c: &mut dyn Conn, user: &UserId, new: &User) -> Result<bool> {
    let rows = c.execute(
        CREATE,
        &[
            user,
            &new.password_hash,
            &new.created_ms,
            &new.admin,
            &new.guest,
            &new.appservice,
        ],
    )?;
    Ok(rows == 1)
}

pub fn get(c: &mut dyn Conn, user: &UserId) -> Result<Option<User>> {
    c.query_opt(GET, &[user], |row| {
        Ok(User {
            password_hash: row.opt_string(0)?,
            created_ms: row.int(1)?,
            admin: row.flag(2)?,
            guest: row.flag(3)?,
            deactivated: row.flag(4)?,
            erased: row.flag(5)?,
            locked: row.flag(6)?,
            appservice: row.opt_string(7)?,
        })
    })
}

/// Users after `after` in the order of their ids, at most `limit`.
pub fn list(c: &mut dyn Conn, after: &str, limit: i64) -> Result<Vec<(UserId, User)>> {
    c.query_all(LIST, &[&after, &limit], |row| {
        let user = User {
            password_hash: row.opt_string(1)?,
            created_ms: row.int(2)?,
            admin: row.flag(3)?,
            guest: row.flag(4)?,
            deactivated: row.flag(5)?,
            erased: row.flag(6)?,
            locked: row.flag(7)?,
            appservice: row.opt_string(8)?,
        };
        Ok((row.id(0)?, user))
    })
}

/// The guests that are joined to a room.
pub fn guests_in(c: &mut dyn Conn, room: &RoomId) -> Result<Vec<UserId>> {
    c.query_all(GUESTS_IN, &[room], |row| row.id(0))
}

pub fn rooms_with_guests(c: &mut dyn Conn) -> Result<Vec<RoomId>> {
    c.query_all(ROOMS_WITH_GUESTS, &[], |row| row.id(0))
}

/// Deactivated users who are still in a room, or invited to one.
pub fn deactivated_members(c: &mut dyn Conn) -> Result<Vec<UserId>> {
    c.query_all(DEACTIVATED_MEMBERS, &[], |row| row.id(0))
}

pub fn set_password(c: &mut dyn Conn, user: &UserId, hash: Option<&str>) -> Result<()> {
    c.execute(SET_PASSWORD, &[&hash, user]).map(drop)
}

pub fn set_admin(c: &mut dyn Conn, user: &UserId, admin: bool) -> Result<()> {
    c.execute(SET_ADMIN, &[&admin, user]).map(drop)
}

pub fn set_locked(c: &mut dyn Conn, user: &UserId, locked: bool) -> Result<()> {
    c.execute(SET_LOCKED, &[&locked, user]).map(drop)
}

pub fn deactivate(c: &mut dyn Conn, user: &UserId, erase: bool) -> Result<()> {
    c.execute(DEACTIVATE, &[&erase, user]).map(drop)
}

pub fn reactivate(c: &mut dyn Conn, user: &UserId, hash: Option<&str>) -> Result<()> {
    c.execute(REACTIVATE, &[&hash, user]).map(drop)
}

/// Whom an access token speaks for, and what an endpoint must know about them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenOwner {
    pub user: UserId,
    pub device: String,
    pub expires_ms: Option<i64>,
    pub supersedes: Option<String>,
    pub guest: bool,
    pub admin: bool,
    pub locked: bool,
}

const TOKEN_OWNER: &str =
    "SELECT t.user_id, t.device_id, t.expires_ms, t.supersedes, u.guest, u.admin, u.locked
    FROM access_tokens t JOIN users u ON u.user_id = t.user_id
    WHERE t.token = $1 AND u.deactivated = 0";
const PUT_TOKEN: &str =
    "INSERT INTO access_tokens (token, user_id, device_id, expires_ms, supersedes)
    VALUES ($1, $2, $3, $4, $5)";
const DROP_TOKEN: &str = "DELETE FROM access_tokens WHERE token = $1";
const DROP_TOKENS_OF_DEVICE: &str =
    "DELETE FROM access_tokens WHERE user_id = $1 AND device_id = $2";
const DROP_REFRESH_OF_DEVICE: &str =
    "DELETE FROM refresh_tokens WHERE user_id = $1 AND device_id = $2";
const FORGET_SUPERSEDED: &str = "UPDATE access_tokens SET supersedes = NULL WHERE token = $1";

pub fn token_owner(c: &mut dyn Conn, token: &str) -> Result<Option<TokenOwner>> {
    c.query_opt(TOKEN_OWNER, &[&token], |row| {
        Ok(TokenOwner {
            user: row.id(0)?,
            device: row.string(1)?,
            expires_ms: row.opt_int(2)?,
            supersedes: row.opt_string(3)?,
            guest: row.flag(4)?,
            admin: row.flag(5)?,
            locked: row.flag(6)?,
        })
    })
}

pub fn put_token(
    c: &mut dyn Conn,
    token: &str,
    user: &UserId,
    device: &str,
    expires_ms: Option<i64>,
    supersedes: Option<&str>,
) -> Result<()> {
    c.execute(
        PUT_TOKEN,
        &[&token, user, &device, &expires_ms, &supersedes],
    )
    .map(drop)
}

pub fn drop_tokens_of_device(c: &mut dyn Conn, user: &UserId, device: &str) -> Result<()> {
    c.execute(DROP_TOKENS_OF_DEVICE, &[user, &device])?;
    c.execute(DROP_REFRESH_OF_DEVICE, &[user, &device])
        .map(drop)
}

const PUT_REFRESH: &str = "INSERT INTO refresh_tokens (token, user_id, device_id, access_token)
    VALUES ($1, $2, $3, $4)";
const REFRESH_OWNER: &str =
    "SELECT user_id, device_id, access_token FROM refresh_tokens WHERE token = $1";
const DROP_REFRESH: &str = "DELETE FROM refresh_tokens WHERE token = $1";
const ACCESS_SUPERSEDES: &str = "SELECT supersedes FROM access_tokens WHERE token = $1";

pub fn put_refresh(
    c: &mut dyn Conn,
    token: &str,
    user: &UserId,
    device: &str,
    access_token: &str,
) -> Result<()> {
    c.execute(PUT_REFRESH, &[&token, user, &device, &access_token])
        .map(drop)
}

/// The user and device of a refresh token. Its use ends what its access token had superseded.
pub fn use_refresh(c: &mut dyn Conn, token: &str) -> Result<Option<(UserId, String)>> {
    let Some((user, device, access)) = c.query_opt(REFRESH_OWNER, &[&token], |row| {
        Ok((row.id::<UserId>(0)?, row.string(1)?, row.string(2)?))
    })?
    else {
        return Ok(None);
    };
    let superseded = c
        .query_opt(ACCESS_SUPERSEDES, &[&access], |row| row.opt_string(0))?
        .flatten();
    if let Some(superseded) = superseded {
        end_superseded(c, &access, &superseded)?;
    }
    Ok(Some((user, device)))
}

/// The first use of an access token that came from a refresh ends the refresh token it came from, and the
/// access token that belonged to that.
pub fn end_superseded(c: &mut dyn Conn, access_token: &str, superseded: &str) -> Result<()> {
    let old = c.query_opt(REFRESH_OWNER, &[&superseded], |row| row.string(2))?;
    if let Some(old) = old {
        c.execute(DROP_TOKEN, &[&old])?;
        c.execute(DROP_REFRESH, &[&superseded])?;
    }
    c.execute(FORGET_SUPERSEDED, &[&access_token]).map(drop)
}

const PUT_SHORT: &str = "INSERT INTO short_tokens (token, purpose, user_id, expires_ms)
    VALUES ($1, $2, $3, $4)";
const SHORT_OWNER: &str = "SELECT user_id FROM short_tokens
    WHERE token = $1 AND purpose = $2 AND expires_ms > $3";
const DROP_SHORT: &str = "DELETE FROM short_tokens WHERE token = $1";
const DROP_EXPIRED_SHORT: &str = "DELETE FROM short_tokens WHERE expires_ms <= $1";

/// What a token of a single purpose is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    Login,
    OpenId,
}

impl Purpose {
    fn as_str(self) -> &'static str {
        match self {
            Self::Login => "login",
            Self::OpenId => "openid",
        }
    }
}

/// Stores a token, and sweeps out what has expired by `now_ms`.
pub fn put_short(
    c: &mut dyn Conn,
    token: &str,
    purpose: Purpose,
    user: &UserId,
    expires_ms: i64,
    now_ms: i64,
) -> Result<()> {
    c.execute(DROP_EXPIRED_SHORT, &[&now_ms])?;
    c.execute(PUT_SHORT, &[&token, &purpose.as_str(), user, &expires_ms])
        .map(drop)
}

pub fn short_owner(
    c: &mut dyn Conn,
    token: &str,
    purpose: Purpose,
    now_ms: i64,
) -> Result<Option<UserId>> {
    c.query_opt(SHORT_OWNER, &[&token, &purpose.as_str(), &now_ms], |row| {
        row.id(0)
    })
}

/// As [`short_owner`], and the token is spent.
pub fn take_short(
    c: &mut dyn Conn,
    token: &str,
    purpose: Purpose,
    now_ms: i64,
) -> Result<Option<UserId>> {
    let owner = short_owner(c, token, purpose, now_ms)?;
    c.execute(DROP_SHORT, &[&token])?;
    Ok(owner)
}

const TOKEN_USABLE: &str = "SELECT 1 FROM registration_tokens WHERE token = $1
    AND (uses_allowed IS NULL OR completed < uses_allowed) AND (expires_ms IS NULL OR expires_ms > $2)";
const USE_REGISTRATION_TOKEN: &str = "UPDATE registration_tokens SET completed = completed + 1
    WHERE token = $1
    AND (uses_allowed IS NULL OR completed < uses_allowed) AND (expires_ms IS NULL OR expires_ms > $2)";
const PUT_REGISTRATION_TOKEN: &str =
    "INSERT INTO registration_tokens (token, uses_allowed, expires_ms) VALUES ($1, $2, $3)
    ON CONFLICT (token) DO UPDATE
    SET uses_allowed = excluded.uses_allowed, expires_ms = excluded.expires_ms";

pub fn registration_token_is_usable(c: &mut dyn Conn, token: &str, now_ms: i64) -> Result<bool> {
    c.exists(TOKEN_USABLE, &[&token, &now_ms])
}

/// Counts one use; `false` when none was left.
pub fn use_registration_token(c: &mut dyn Conn, token: &str, now_ms: i64) -> Result<bool> {
    Ok(c.execute(USE_REGISTRATION_TOKEN, &[&token, &now_ms])? == 1)
}

pub fn put_registration_token(
    c: &mut dyn Conn,
    token: &str,
    uses_allowed: Option<i64>,
    expires_ms: Option<i64>,
) -> Result<()> {
    c.execute(
        PUT_REGISTRATION_TOKEN,
        &[&token, &uses_allowed, &expires_ms],
    )
    .map(drop)
}
