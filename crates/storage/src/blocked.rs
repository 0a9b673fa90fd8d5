//! Rooms that the administrators let nobody into.

use protocol::id::{RoomId, UserId};

use crate::driver::{Conn, Result};

const BLOCK: &str = "INSERT INTO blocked_rooms (room_id, blocked_by) VALUES ($1, $2)
    ON CONFLICT (room_id) DO NOTHING";
const UNBLOCK: &str = "DELETE FROM blocked_rooms WHERE room_id = $1";
const BLOCKED_BY: &str = "SELECT blocked_by FROM blocked_rooms WHERE room_id = $1";

pub fn block(c: &mut dyn Conn, room: &RoomId, by: &UserId) -> Result<()> {
    c.execute(BLOCK, &[room, by]).map(drop)
}

pub fn unblock(c: &mut dyn Conn, room: &RoomId) -> Result<()> {
    c.execute(UNBLOCK, &[room]).map(drop)
}

/// Who blocked the room; `None` when it is open.
pub fn blocked_by(c: &mut dyn Conn, room: &RoomId) -> Result<Option<UserId>> {
    c.query_opt(BLOCKED_BY, &[room], |row| row.id(0))
}
