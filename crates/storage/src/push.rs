//! Pushers, and what the push rules made of events.

use protocol::id::{RoomId, UserId};
use protocol::nid::RoomNid;

use crate::driver::{Conn, Result, Row};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pusher {
    pub user: UserId,
    pub app_id: String,
    pub pushkey: String,
    /// The device whose access token set it.
    pub device_id: String,
    /// The pusher as the API shows it, JSON.
    pub json: String,
    /// Events up to here need no push any more.
    pub position: i64,
}

const PUT: &str = "INSERT INTO pushers (user_id, app_id, pushkey, device_id, pusher, position)
    VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (user_id, app_id, pushkey)
    DO UPDATE SET device_id = excluded.device_id, pusher = excluded.pusher";
const REMOVE: &str = "DELETE FROM pushers WHERE user_id = $1 AND app_id = $2 AND pushkey = $3";
const REMOVE_OF_OTHERS: &str =
    "DELETE FROM pushers WHERE app_id = $1 AND pushkey = $2 AND user_id <> $3";
const REMOVE_OF_OTHER_DEVICES: &str = "DELETE FROM pushers WHERE user_id = $1 AND device_id <> $2";
const OF_USER: &str = "SELECT user_id, app_id, pushkey, device_id, pusher, position FROM pushers
    WHERE user_id = $1 ORDER BY app_id, pushkey";
const ALL: &str = "SELECT user_id, app_id, pushkey, device_id, pusher, position FROM pushers
    ORDER BY user_id, app_id, pushkey";
const ADVANCE: &str = "UPDATE pushers SET position = $1
    WHERE user_id = $2 AND app_id = $3 AND pushkey = $4 AND position < $1";

/// Sets the pusher; of an existing one the position stays.
pub fn put(c: &mut dyn Conn, pusher: &Pusher) -> Result<()> {
    c.execute(
        PUT,
        &[
            &pusher.user,
            &pusher.app_id,
            &pusher.pushkey,
            &pusher.device_id,
            &pusher.json,
            &pusher.position,
        ],
    )
    .map(drop)
}

pub fn remove(c: &mut dyn Conn, user: &UserId, app_id: &str, pushkey: &str) -> Result<()> {
    c.execute(REMOVE, &[user, &app_id, &pushkey]).map(drop)
}

/// Removes the same pushkey of other users.
pub fn remove_of_others(
    c: &mut dyn Conn,
    user: &UserId,
    app_id: &str,
    pushkey: &str,
) -> Result<()> {
    c.execute(REMOVE_OF_OTHERS, &[&app_id, &pushkey, user])
        .map(drop)
}

/// Removes what other devices of this user have set.
pub fn remove_of_other_devices(c: &mut dyn Conn, user: &UserId, device: &str) -> Result<()> {
    c.execute(REMOVE_OF_OTHER_DEVICES, &[user, &device])
        .map(drop)
}

pub fn of_user(c: &mut dyn Conn, user: &UserId) -> Result<Vec<Pusher>> {
    c.query_all(OF_USER, &[user], read_pusher)
}

pub fn all(c: &mut dyn Conn) -> Result<Vec<Pusher>> {
    c.query_all(ALL, &[], read_pusher)
}

fn read_pusher(row: &dyn Row) -> Result<Pusher> {
    Ok(Pusher {
        user: row.id(0)?,
        app_id: row.string(1)?,
        pushkey: row.string(2)?,
        device_id: row.string(3)?,
        json: row.string(4)?,
        position: row.int(5)?,
    })
}

pub fn advance(c: &mut dyn Conn, pusher: &Pusher, position: i64) -> Result<()> {
    c.execute(
        ADVANCE,
        &[&position, &pusher.user, &pusher.app_id, &pusher.pushkey],
    )
    .map(drop)
}

/// What the push rules of one user made of one event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Action {
    pub user: UserId,
    pub room_id: String,
    /// The event's position in the events stream.
    pub position: i64,
    pub event_id: String,
    /// The thread root, empty for the main timeline.
    pub thread_id: String,
    pub highlight: bool,
    /// JSON.
    pub actions: String,
}

const PROGRESS: &str = "SELECT position FROM push_progress WHERE room_id = $1";
const SET_PROGRESS: &str = "INSERT INTO push_progress (room_id, position) VALUES ($1, $2)
    ON CONFLICT (room_id) DO UPDATE SET position = excluded.position";
const UNCOUNTED: &str = "SELECT 1 FROM events WHERE room_nid = $1 AND place > 0 AND verdict = 0
    AND position > $2 AND position <= $3 LIMIT 1";
const PUT_ACTION: &str =
    "INSERT INTO push_actions (user_id, room_id, position, event_id, thread_id, highlight, actions)
    VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (user_id, room_id, position) DO NOTHING";
const DROP_UP_TO: &str = "DELETE FROM push_actions
    WHERE user_id = $1 AND room_id = $2 AND position <= $3";
const DROP_EVENT: &str = "DELETE FROM push_actions WHERE room_id = $1 AND event_id = $2";
const COUNTS: &str = "SELECT thread_id, position, highlight FROM push_actions
    WHERE user_id = $1 AND room_id = $2 AND position > $3 AND position <= $4 ORDER BY position";
const FOR_PUSHER: &str =
    "SELECT user_id, room_id, position, event_id, thread_id, highlight, actions FROM push_actions
    WHERE user_id = $1 AND position > $2 ORDER BY position LIMIT $3";
const COUNT_UNREAD: &str = "SELECT COUNT(*) FROM push_actions WHERE user_id = $1";
const LIST: &str =
    "SELECT user_id, room_id, position, event_id, thread_id, highlight, actions FROM push_actions
    WHERE user_id = $1 AND position < $2 AND highlight >= $3 ORDER BY position DESC LIMIT $4";

/// How far the rules have been run over this room.
pub fn progress(c: &mut dyn Conn, room_id: &str) -> Result<Option<i64>> {
    c.query_int(PROGRESS, &[&room_id])
}

/// Older events than these are history by the time we would notify of them.
pub const EVENTS_BACK_MAX: i64 = 1000;

/// Whether there is anything new in the room, up to this position, over which the rules are still to be run.
pub fn is_behind(c: &mut dyn Conn, nid: RoomNid, room: &RoomId, up_to: i64) -> Result<bool> {
    let counted = progress(c, room.as_str())?.unwrap_or(0);
    let after = counted.max(up_to - EVENTS_BACK_MAX);
    c.exists(UNCOUNTED, &[&nid, &after, &up_to])
}

pub fn set_progress(c: &mut dyn Conn, room_id: &str, position: i64) -> Result<()> {
    c.execute(SET_PROGRESS, &[&room_id, &position]).map(drop)
}

pub fn put_actions(c: &mut dyn Conn, actions: &[Action]) -> Result<()> {
    for action in actions {
        c.execute(
            PUT_ACTION,
            &[
                &action.user,
                &action.room_id,
                &action.position,
                &action.event_id,
                &action.thread_id,
                &action.highlight,
                &action.actions,
            ],
        )?;
    }
    Ok(())
}

/// Forgets what the user has read in all threads of the room.
pub fn drop_up_to(c: &mut dyn Conn, user: &UserId, room_id: &str, position: i64) -> Result<()> {
    c.execute(DROP_UP_TO, &[user, &room_id, &position])
        .map(drop)
}

/// A redacted event is not worth a notification.
pub fn drop_event(c: &mut dyn Conn, room_id: &str, event_id: &str) -> Result<()> {
    c.execute(DROP_EVENT, &[&room_id, &event_id]).map(drop)
}

/// Thread, position and highlight of what waits for the user in this room after `from`, up to `to`.
pub fn waiting(
    c: &mut dyn Conn,
    user: &UserId,
    room_id: &str,
    from: i64,
    to: i64,
) -> Result<Vec<(String, i64, bool)>> {
    c.query_all(COUNTS, &[user, &room_id, &from, &to], |row| {
        Ok((row.string(0)?, row.int(1)?, row.flag(2)?))
    })
}

/// What waits for the user in all rooms after this position, oldest first.
pub fn after(c: &mut dyn Conn, user: &UserId, position: i64, limit: i64) -> Result<Vec<Action>> {
    c.query_all(FOR_PUSHER, &[user, &position, &limit], read_action)
}

pub fn count_unread(c: &mut dyn Conn, user: &UserId) -> Result<i64> {
    c.query_one(COUNT_UNREAD, &[user], |row| row.int(0))
}

/// What notified the user before this position, newest first.
pub fn before(
    c: &mut dyn Conn,
    user: &UserId,
    position: i64,
    only_highlights: bool,
    limit: i64,
) -> Result<Vec<Action>> {
    c.query_all(
        LIST,
        &[user, &position, &only_highlights, &limit],
        read_action,
    )
}

fn read_action(row: &dyn Row) -> Result<Action> {
    Ok(Action {
        user: row.id(0)?,
        room_id: row.string(1)?,
        position: row.int(2)?,
        event_id: row.string(3)?,
        thread_id: row.string(4)?,
        highlight: row.flag(5)?,
        actions: row.string(6)?,
    })
}
