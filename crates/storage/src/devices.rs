//! The devices of our users, and the stream of device list changes.

use protocol::id::{ServerName, UserId};
use protocol::nid::RoomNid;

use crate::driver::{Conn, Result, texts};
use crate::streams::{self, Stream};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    pub device_id: String,
    pub display_name: Option<String>,
    pub last_seen_ms: Option<i64>,
    pub last_seen_ip: Option<String>,
    /// The identity keys, JSON.
    pub keys: Option<String>,
}

const LIST: &str = "SELECT device_id, display_name, last_seen_ms, last_seen_ip, keys
    FROM devices WHERE user_id = $1 ORDER BY device_id";
const GET: &str = "SELECT device_id, display_name, last_seen_ms, last_seen_ip, keys
    FROM devices WHERE user_id = $1 AND device_id = $2";
const CREATE: &str = "INSERT INTO devices (user_id, device_id, display_name, created_ms)
    VALUES ($1, $2, $3, $4) ON CONFLICT (user_id, device_id) DO NOTHING";
const RENAME: &str = "UPDATE devices SET display_name = $1 WHERE user_id = $2 AND device_id = $3";
const SEEN: &str = "UPDATE devices SET last_seen_ms = $1, last_seen_ip = $2
    WHERE user_id = $3 AND device_id = $4";
const SET_KEYS: &str = "UPDATE devices SET keys = $1 WHERE user_id = $2 AND device_id = $3";

pub fn list(c: &mut dyn Conn, user: &UserId) -> Result<Vec<Device>> {
    c.query_all(LIST, &[user], read_device)
}

pub fn get(c: &mut dyn Conn, user: &UserId, device: &str) -> Result<Option<Device>> {
    c.query_opt(GET, &[user, &device], read_device)
}

fn read_device(row: &dyn crate::driver::Row) -> Result<Device> {
    Ok(Device {
        device_id: row.string(0)?,
        display_name: row.opt_string(1)?,
        last_seen_ms: row.opt_int(2)?,
        last_seen_ip: row.opt_string(3)?,
        keys: row.opt_string(4)?,
    })
}

/// `false` when it exists already; its name is kept then.
pub fn create(
    c: &mut dyn Conn,
    user: &UserId,
    device: &str,
    display_name: Option<&str>,
    now_ms: i64,
) -> Result<bool> {
    let rows = c.execute(CREATE, &[user, &device, &display_name, &now_ms])?;
    Ok(rows == 1)
}

/// `false` when there is no such device.
pub fn rename(
    c: &mut dyn Conn,
    user: &UserId,
    device: &str,
    display_name: Option<&str>,
) -> Result<bool> {
    Ok(c.execute(RENAME, &[&display_name, user, &device])? == 1)
}

pub fn seen(
    c: &mut dyn Conn,
    user: &UserId,
    device: &str,
    now_ms: i64,
    ip: Option<&str>,
) -> Result<()> {
    c.execute(SEEN, &[&now_ms, &ip, user, &device]).map(drop)
}

/// `false` when there is no such device.
pub fn set_keys(c: &mut dyn Conn, user: &UserId, device: &str, keys: Option<&str>) -> Result<bool> {
    Ok(c.execute(SET_KEYS, &[&keys, user, &device])? == 1)
}

/// All that belongs to a device and goes with it.
const DELETE: [&str; 7] = [
    "DELETE FROM access_tokens WHERE user_id = $1 AND device_id = $2",
    "DELETE FROM refresh_tokens WHERE user_id = $1 AND device_id = $2",
    "DELETE FROM one_time_keys WHERE user_id = $1 AND device_id = $2",
    "DELETE FROM fallback_keys WHERE user_id = $1 AND device_id = $2",
    "DELETE FROM to_device WHERE user_id = $1 AND device_id = $2",
    "DELETE FROM pushers WHERE user_id = $1 AND device_id = $2",
    "DELETE FROM key_signatures WHERE target_user = $1 AND target = $2",
];
const DELETE_DEVICE: &str = "DELETE FROM devices WHERE user_id = $1 AND device_id = $2";

/// `false` when there is no such device.
pub fn delete(c: &mut dyn Conn, user: &UserId, device: &str) -> Result<bool> {
    for statement in DELETE {
        c.execute(statement, &[user, &device])?;
    }
    Ok(c.execute(DELETE_DEVICE, &[user, &device])? == 1)
}

const CHANGED: &str =
    "INSERT INTO device_list_changes (position, user_id, device_id) VALUES ($1, $2, $3)";
const CHANGED_BETWEEN: &str = "SELECT DISTINCT user_id FROM device_list_changes
    WHERE position > $1 AND position <= $2 ORDER BY user_id";
const CHANGED_AMONG: &str = "SELECT DISTINCT user_id FROM device_list_changes
    WHERE position > $1 AND position <= $2 AND user_id IN (SELECT value FROM rarray_text($3))
    ORDER BY user_id";
const LOCAL_CHANGES_OF: &str = "SELECT device_id, MAX(position) FROM device_list_changes
    WHERE user_id = $1 AND position > $2 GROUP BY device_id ORDER BY MAX(position)";
const LAST_CHANGE: &str = "SELECT MAX(position) FROM device_list_changes
    WHERE user_id = $1 AND device_id <> ''";
const CHANGED_SINCE: &str = "SELECT 1 FROM device_list_changes
    WHERE user_id = $1 AND position > $2 LIMIT 1";

/// Puts a change into the stream; `device` is empty for cross-signing keys or an unknown set of devices.
pub fn changed(c: &mut dyn Conn, user: &UserId, device: &str) -> Result<i64> {
    let position = streams::next(c, Stream::DeviceLists)?;
    c.execute(CHANGED, &[&position, user, &device])?;
    Ok(position)
}

/// Everybody whose devices changed after `from`, up to and with `to`.
pub fn changed_between(c: &mut dyn Conn, from: i64, to: i64) -> Result<Vec<UserId>> {
    c.query_all(CHANGED_BETWEEN, &[&from, &to], |row| row.id(0))
}

/// Those of `users` whose devices changed after `from`, up to and with `to`.
pub fn changed_among(
    c: &mut dyn Conn,
    from: i64,
    to: i64,
    users: &[UserId],
) -> Result<Vec<UserId>> {
    c.query_all(
        CHANGED_AMONG,
        &[&from, &to, &texts(&users.to_vec())],
        |row| row.id(0),
    )
}

/// A user's changed devices since a position, each with its latest change, oldest first.
pub fn changes_of(c: &mut dyn Conn, user: &UserId, since: i64) -> Result<Vec<(String, i64)>> {
    c.query_all(LOCAL_CHANGES_OF, &[user, &since], |row| {
        Ok((row.string(0)?, row.int(1)?))
    })
}

/// The position of the latest change of one of the user's devices, 0 when there was none: the stream id
/// that other servers are told.
pub fn last_change(c: &mut dyn Conn, user: &UserId) -> Result<i64> {
    Ok(c.query_int(LAST_CHANGE, &[user])?.unwrap_or(0))
}

/// Whether anything about this user changed after a position.
pub fn changed_since(c: &mut dyn Conn, user: &UserId, since: i64) -> Result<bool> {
    c.exists(CHANGED_SINCE, &[user, &since])
}

const PEND: &str = "INSERT INTO pending_device_updates (position, user_id) VALUES ($1, $2)";
const PENDING: &str = "SELECT DISTINCT user_id FROM pending_device_updates
    WHERE position > $1 ORDER BY user_id";
const DROP_PENDING: &str = "DELETE FROM pending_device_updates WHERE position <= $1";

/// Remembers an update about a user who may be in a partial room (P-53). Takes a stream position, so
/// that "since the join" can be asked.
pub fn pend(c: &mut dyn Conn, user: &UserId) -> Result<()> {
    let position = streams::next(c, Stream::DeviceLists)?;
    c.execute(PEND, &[&position, user]).map(drop)
}

/// Who had updates pended after this position (P-54).
pub fn pending_since(c: &mut dyn Conn, position: i64) -> Result<Vec<UserId>> {
    c.query_all(PENDING, &[&position], |row| row.id(0))
}

/// Removes what no partial room can need any more (P-56).
pub fn drop_pending(c: &mut dyn Conn, up_to: i64) -> Result<()> {
    c.execute(DROP_PENDING, &[&up_to]).map(drop)
}

const AUDIENCE: &str = "SELECT h.server AS server FROM memberships m
    JOIN room_hosts h ON h.room_nid = m.room_nid
    WHERE m.user_id = $1 AND m.membership = 'join' AND h.joined > 0
    UNION SELECT p.server AS server FROM memberships m
    JOIN partial_servers p ON p.room_nid = m.room_nid
    WHERE m.user_id = $1 AND m.membership = 'join' ORDER BY server";
const LOCAL_SHARING: &str = "SELECT DISTINCT l.user_id FROM memberships m
    JOIN memberships l ON l.room_nid = m.room_nid AND l.local = 1 AND l.membership = 'join'
    WHERE m.user_id = $1 AND m.membership = 'join' ORDER BY l.user_id";
const TRACKED: &str = "SELECT 1 FROM memberships m
    JOIN memberships l ON l.room_nid = m.room_nid AND l.local = 1 AND l.membership = 'join'
    WHERE m.user_id = $1 AND m.membership = 'join' AND (m.position > 0 OR NOT EXISTS
        (SELECT 1 FROM partial_rooms p WHERE p.room_nid = m.room_nid)) LIMIT 1";
const ANY_PARTIAL: &str = "SELECT 1 FROM partial_rooms LIMIT 1";
const LISTED_IN_ROOM: &str = "SELECT r.user_id FROM remote_device_lists r
    JOIN memberships m ON m.user_id = r.user_id WHERE m.room_nid = $1";

/// The servers that are told of this user's devices: those with a joined member in a shared room, and of
/// partial rooms the join list (P-49). Ours may be among them.
pub fn audience(c: &mut dyn Conn, user: &UserId) -> Result<Vec<ServerName>> {
    c.query_all(AUDIENCE, &[user], |row| row.id(0))
}

/// Our users that share a room with this user.
pub fn local_sharing(c: &mut dyn Conn, user: &UserId) -> Result<Vec<UserId>> {
    c.query_all(LOCAL_SHARING, &[user], |row| row.id(0))
}

/// Whether a remote user's server keeps us up to date: the user is in a room with one of ours, and did not
/// come to our knowledge as a member from before the join of a room that is still partial (P-57 to P-59).
pub fn is_tracked(c: &mut dyn Conn, user: &UserId) -> Result<bool> {
    c.exists(TRACKED, &[user])
}

const NEWLY_MET: &str = "SELECT h.server FROM room_hosts h WHERE h.room_nid = $1 AND NOT EXISTS (
        SELECT 1 FROM memberships m JOIN room_hosts o ON o.room_nid = m.room_nid
        WHERE m.user_id = $2 AND m.membership = 'join' AND m.room_nid <> $1 AND o.server = h.server)
    ORDER BY h.server";

/// The servers in this room that share no other room with the user.
pub fn newly_met(c: &mut dyn Conn, room: RoomNid, user: &UserId) -> Result<Vec<ServerName>> {
    c.query_all(NEWLY_MET, &[&room, user], |row| row.id(0))
}

pub fn any_partial_room(c: &mut dyn Conn) -> Result<bool> {
    c.exists(ANY_PARTIAL, &[])
}

/// Forgets the cached list of each of these users who is not tracked any more: nobody tells us of their
/// changes, so a list kept would be wrong one day (P-58, P-60).
pub fn forget_untracked(c: &mut dyn Conn, users: &[UserId]) -> Result<()> {
    for user in users {
        if !is_tracked(c, user)? {
            crate::e2ee::drop_remote_list(c, user)?;
        }
    }
    Ok(())
}

/// As [`forget_untracked`], for everybody in a room that one of our users has left.
pub fn forget_untracked_in(c: &mut dyn Conn, room: RoomNid) -> Result<()> {
    let listed: Vec<UserId> = c.query_all(LISTED_IN_ROOM, &[&room], |row| row.id(0))?;
    forget_untracked(c, &listed)
}
