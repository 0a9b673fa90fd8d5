//! Presence: the last known state of each user, with its stream.

use protocol::id::UserId;

use crate::driver::{Conn, Result, Row, texts};
use crate::streams::{self, Stream};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Presence {
    pub user: UserId,
    /// `online`, `unavailable` or `offline`.
    pub state: String,
    pub status_msg: Option<String>,
    pub last_active_ms: i64,
    pub currently_active: bool,
}

const GET: &str = "SELECT user_id, state, status_msg, last_active_ms, currently_active
    FROM presence WHERE user_id = $1";
const SET: &str = "INSERT INTO presence
        (user_id, state, status_msg, last_active_ms, currently_active, position)
    VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (user_id) DO UPDATE
    SET state = excluded.state, status_msg = excluded.status_msg,
        last_active_ms = excluded.last_active_ms, currently_active = excluded.currently_active,
        position = excluded.position";
const SINCE: &str = "SELECT user_id, state, status_msg, last_active_ms, currently_active
    FROM presence WHERE position > $1 AND position <= $2
    AND user_id IN (SELECT value FROM rarray_text($3)) ORDER BY position";

pub fn get(c: &mut dyn Conn, user: &UserId) -> Result<Option<Presence>> {
    c.query_opt(GET, &[user], read)
}

/// The position of the change.
pub fn set(c: &mut dyn Conn, presence: &Presence) -> Result<i64> {
    let position = streams::next(c, Stream::Presence)?;
    c.execute(
        SET,
        &[
            &presence.user,
            &presence.state,
            &presence.status_msg,
            &presence.last_active_ms,
            &presence.currently_active,
            &position,
        ],
    )?;
    Ok(position)
}

/// Those of `users` whose presence changed after `from`, up to and with `to`.
pub fn since(c: &mut dyn Conn, from: i64, to: i64, users: &[UserId]) -> Result<Vec<Presence>> {
    let users = users.to_vec();
    c.query_all(SINCE, &[&from, &to, &texts(&users)], read)
}

fn read(row: &dyn Row) -> Result<Presence> {
    Ok(Presence {
        user: row.id(0)?,
        state: row.string(1)?,
        status_msg: row.opt_string(2)?,
        last_active_ms: row.int(3)?,
        currently_active: row.flag(4)?,
    })
}
