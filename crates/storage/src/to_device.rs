//! To-device messages: an inbox for each device, and which requests have been carried out.

use protocol::id::UserId;

use crate::driver::{Conn, Result};
use crate::streams::{self, Stream};

/// How long a request is remembered, so that a repetition is not carried out twice.
const REMEMBERED_MS: i64 = 24 * 3600 * 1000;

const PUT: &str =
    "INSERT INTO to_device (position, user_id, device_id, message) VALUES ($1, $2, $3, $4)";
const SINCE: &str = "SELECT position, message FROM to_device
    WHERE user_id = $1 AND device_id = $2 AND position > $3 AND position <= $4
    ORDER BY position LIMIT $5";
const DROP: &str = "DELETE FROM to_device
    WHERE user_id = $1 AND device_id = $2 AND position <= $3";
const ANY: &str = "SELECT 1 FROM to_device
    WHERE user_id = $1 AND device_id = $2 AND position > $3 LIMIT 1";
const DONE: &str = "INSERT INTO to_device_done (origin, message_id, done_ms) VALUES ($1, $2, $3)
    ON CONFLICT (origin, message_id) DO NOTHING";
const FORGET_DONE: &str = "DELETE FROM to_device_done WHERE done_ms < $1";

/// Puts a message (JSON: `type`, `sender`, `content`) into a device's inbox.
pub fn put(c: &mut dyn Conn, user: &UserId, device: &str, message: &str) -> Result<i64> {
    let position = streams::next(c, Stream::ToDevice)?;
    c.execute(PUT, &[&position, user, &device, &message])?;
    Ok(position)
}

/// Messages after `from`, up to and with `to`, at most `limit`, oldest first, each with its position.
pub fn since(
    c: &mut dyn Conn,
    user: &UserId,
    device: &str,
    from: i64,
    to: i64,
    limit: i64,
) -> Result<Vec<(i64, String)>> {
    c.query_all(SINCE, &[user, &device, &from, &to, &limit], |row| {
        Ok((row.int(0)?, row.string(1)?))
    })
}

/// Whether anything waits after this position.
pub fn any_since(c: &mut dyn Conn, user: &UserId, device: &str, from: i64) -> Result<bool> {
    c.exists(ANY, &[user, &device, &from])
}

/// The device has seen everything up to here.
pub fn acknowledge(c: &mut dyn Conn, user: &UserId, device: &str, up_to: i64) -> Result<()> {
    c.execute(DROP, &[user, &device, &up_to]).map(drop)
}

/// Marks a request as carried out; `false` when it was before.
pub fn first_time(c: &mut dyn Conn, origin: &str, message_id: &str, now_ms: i64) -> Result<bool> {
    c.execute(FORGET_DONE, &[&(now_ms - REMEMBERED_MS)])?;
    Ok(c.execute(DONE, &[&origin, &message_id, &now_ms])? == 1)
}
