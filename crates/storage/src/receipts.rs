//! Read receipts: the newest of each user, kind and thread.

use protocol::id::{RoomId, UserId};

use crate::driver::{Conn, Result};
use crate::streams::{self, Stream};

#[derive(Clone, Debug, PartialEq)]
pub struct Receipt {
    pub room: RoomId,
    pub user: UserId,
    /// `m.read`, `m.read.private`
    pub kind: String,
    pub thread: Option<String>,
    /// What the user says was read; another server's user may name what is no event here.
    pub event: String,
    pub ts: i64,
}

const PUT: &str = "INSERT INTO receipts (room_id, user_id, kind, thread, event_id, ts, position)
    VALUES ($1, $2, $3, $4, $5, $6, $7)
    ON CONFLICT (room_id, user_id, kind, thread)
    DO UPDATE SET event_id = excluded.event_id, ts = excluded.ts, position = excluded.position";
const SINCE: &str = "SELECT room_id, user_id, kind, thread, event_id, ts FROM receipts
    WHERE room_id = $1 AND position > $2 AND position <= $3 ORDER BY position, user_id, kind, thread LIMIT $4";
const OF_USER: &str = "SELECT room_id, user_id, kind, thread, event_id, ts FROM receipts
    WHERE room_id = $1 AND user_id = $2 ORDER BY kind, thread";

/// Stores the receipt and gives its place in the stream.
pub fn put(c: &mut dyn Conn, receipt: &Receipt) -> Result<i64> {
    let position = streams::next(c, Stream::Receipts)?;
    let thread = receipt.thread.as_deref().unwrap_or("");
    c.execute(
        PUT,
        &[
            &receipt.room,
            &receipt.user,
            &receipt.kind,
            &thread,
            &receipt.event,
            &receipt.ts,
            &position,
        ],
    )?;
    Ok(position)
}

/// What changed in a room after one position and up to another.
pub fn since(
    c: &mut dyn Conn,
    room: &RoomId,
    after: i64,
    up_to: i64,
    limit: i64,
) -> Result<Vec<Receipt>> {
    c.query_all(SINCE, &[room, &after, &up_to, &limit], read)
}

pub fn of_user(c: &mut dyn Conn, room: &RoomId, user: &UserId) -> Result<Vec<Receipt>> {
    c.query_all(OF_USER, &[room, user], read)
}

fn read(row: &dyn crate::driver::Row) -> Result<Receipt> {
    let thread = row.string(3)?;
    Ok(Receipt {
        room: row.id(0)?,
        user: row.id(1)?,
        kind: row.string(2)?,
        thread: Some(thread).filter(|thread| !thread.is_empty()),
        event: row.string(4)?,
        ts: row.int(5)?,
    })
}
