//! Finding users: by id or profile, among the members of rooms.

use protocol::id::{RoomId, UserId};
use protocol::nid::{EventNid, RoomNid};

use crate::driver::{Conn, Result, texts};

const BY_ID: &str = "SELECT DISTINCT user_id FROM memberships
    WHERE membership = 'join' AND LOWER(user_id) LIKE $1 ESCAPE '\\' ORDER BY user_id LIMIT $2";
const BY_PROFILE: &str = "SELECT user_id FROM profile_fields
    WHERE name = 'displayname' AND LOWER(value) LIKE $1 ESCAPE '\\' ORDER BY user_id LIMIT $2";
const BY_MEMBER_EVENT: &str = "SELECT DISTINCT m.user_id FROM memberships m
    JOIN events e ON e.nid = m.event_nid
    WHERE m.membership = 'join' AND m.local = 0 AND LOWER(e.json) LIKE $1 ESCAPE '\\'
    ORDER BY m.user_id LIMIT $2";
const PLACES: &str = "SELECT m.user_id, m.room_nid, r.room_id, m.event_nid FROM memberships m
    JOIN rooms r ON r.nid = m.room_nid
    WHERE m.membership = 'join' AND m.user_id IN (SELECT value FROM rarray_text($1))
    ORDER BY m.user_id, r.room_id";

/// Users with a joined membership whose id or name may hold this text (in lower case). The caller looks
/// closer.
pub fn candidates(c: &mut dyn Conn, text: &str, limit: i64) -> Result<Vec<UserId>> {
    let escaped = text
        .replace('\\', "\\\\")
        .replace('%', "\\%")
        .replace('_', "\\_");
    let pattern = format!("%{escaped}%");
    let mut users: Vec<UserId> = Vec::new();
    for sql in [BY_ID, BY_PROFILE, BY_MEMBER_EVENT] {
        users.extend(c.query_all(sql, &[&pattern, &limit], |row| row.id(0))?);
    }
    users.sort_unstable();
    users.dedup();
    Ok(users)
}

/// A joined membership.
#[derive(Clone, Debug)]
pub struct Place {
    pub user: UserId,
    pub nid: RoomNid,
    pub room: RoomId,
    pub event: EventNid,
}

/// Where these users are joined.
pub fn places(c: &mut dyn Conn, users: &[UserId]) -> Result<Vec<Place>> {
    let users = users.to_vec();
    c.query_all(PLACES, &[&texts(&users)], |row| {
        Ok(Place {
            user: row.id(0)?,
            nid: row.room_nid(1)?,
            room: row.id(2)?,
            event: row.event_nid(3)?,
        })
    })
}
