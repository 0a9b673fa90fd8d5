//! Account data, global and by room, with its stream; and stored filters.

use protocol::id::UserId;

use crate::driver::{Conn, Result};
use crate::streams::{self, Stream};

/// The room id of what belongs to no room.
pub const GLOBAL: &str = "";

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// [`GLOBAL`] or a room.
    pub room_id: String,
    pub kind: String,
    /// JSON.
    pub content: String,
}

const GET: &str =
    "SELECT content FROM account_data WHERE user_id = $1 AND room_id = $2 AND kind = $3";
const SET: &str = "INSERT INTO account_data (user_id, room_id, kind, content, position)
    VALUES ($1, $2, $3, $4, $5) ON CONFLICT (user_id, room_id, kind)
    DO UPDATE SET content = excluded.content, position = excluded.position";
const SINCE: &str = "SELECT room_id, kind, content FROM account_data
    WHERE user_id = $1 AND position > $2 AND position <= $3 AND (content <> '{}' OR $2 > 0)
    ORDER BY position";
const OF_ROOM: &str = "SELECT room_id, kind, content FROM account_data
    WHERE user_id = $1 AND room_id = $2 AND content <> '{}' ORDER BY kind";

pub fn get(c: &mut dyn Conn, user: &UserId, room_id: &str, kind: &str) -> Result<Option<String>> {
    c.query_opt(GET, &[user, &room_id, &kind], |row| row.string(0))
}

/// The position of the change.
pub fn set(
    c: &mut dyn Conn,
    user: &UserId,
    room_id: &str,
    kind: &str,
    content: &str,
) -> Result<i64> {
    let position = streams::next(c, Stream::AccountData)?;
    c.execute(SET, &[user, &room_id, &kind, &content, &position])?;
    Ok(position)
}

/// What changed after `from`, up to and with `to`, of all rooms and none. What was emptied is gone (MSC3391):
/// that is a change, but nothing to begin with.
pub fn since(c: &mut dyn Conn, user: &UserId, from: i64, to: i64) -> Result<Vec<Entry>> {
    c.query_all(SINCE, &[user, &from, &to], read_entry)
}

/// All of one room, or all that is [`GLOBAL`].
pub fn of_room(c: &mut dyn Conn, user: &UserId, room_id: &str) -> Result<Vec<Entry>> {
    c.query_all(OF_ROOM, &[user, &room_id], read_entry)
}

fn read_entry(row: &dyn crate::driver::Row) -> Result<Entry> {
    Ok(Entry {
        room_id: row.string(0)?,
        kind: row.string(1)?,
        content: row.string(2)?,
    })
}

const FIND_FILTER: &str = "SELECT filter_id FROM filters WHERE user_id = $1 AND filter = $2";
const NEXT_FILTER: &str = "SELECT MAX(filter_id) FROM filters WHERE user_id = $1";
const PUT_FILTER: &str = "INSERT INTO filters (user_id, filter_id, filter) VALUES ($1, $2, $3)";
const GET_FILTER: &str = "SELECT filter FROM filters WHERE user_id = $1 AND filter_id = $2";

/// The number of the filter: the same text has the same number.
pub fn put_filter(c: &mut dyn Conn, user: &UserId, filter: &str) -> Result<i64> {
    if let Some(known) = c.query_int(FIND_FILTER, &[user, &filter])? {
        return Ok(known);
    }
    let id = c.query_int(NEXT_FILTER, &[user])?.unwrap_or(0) + 1;
    c.execute(PUT_FILTER, &[user, &id, &filter])?;
    Ok(id)
}

pub fn get_filter(c: &mut dyn Conn, user: &UserId, id: i64) -> Result<Option<String>> {
    c.query_opt(GET_FILTER, &[user, &id], |row| row.string(0))
}
