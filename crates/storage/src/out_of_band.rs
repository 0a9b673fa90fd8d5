//! Memberships of our users in rooms we are not in: invites, knocks, and their ends.

use std::sync::Arc;

use protocol::id::{RoomId, ServerName, UserId};
use protocol::nid::{EventNid, RoomNid};

use room::write::{Former, OutOfBand};

use crate::driver::{Conn, Error, Result, Row};
use crate::streams::{self, Stream};

#[derive(Clone, Debug, PartialEq)]
pub struct Membership {
    pub room_nid: RoomNid,
    pub room_id: RoomId,
    pub user: UserId,
    /// `invite`, `knock` or `leave`.
    pub membership: Arc<str>,
    pub event: EventNid,
    /// Entries as they stood.
    pub stripped_state: Vec<Arc<str>>,
    pub via: ServerName,
    /// In the memberships stream.
    pub position: i64,
}

const GET: &str =
    "SELECT o.room_nid, r.room_id, o.user_id, o.membership, o.event_nid, o.stripped_state,
    o.via, o.position FROM out_of_band o JOIN rooms r ON r.nid = o.room_nid
    WHERE o.room_nid = $1 AND o.user_id = $2";
const OF_USER: &str = "SELECT o.room_nid, r.room_id, o.user_id, o.membership, o.event_nid,
    o.stripped_state, o.via, o.position FROM out_of_band o JOIN rooms r ON r.nid = o.room_nid
    WHERE o.user_id = $1 AND o.position > $2 AND o.position <= $3 ORDER BY o.position";

fn read(row: &dyn Row) -> Result<Membership> {
    let entries: Vec<Box<serde_json::value::RawValue>> =
        serde_json::from_str(row.text(5)?).map_err(|error| Error::Corrupt(error.to_string()))?;
    Ok(Membership {
        room_nid: row.room_nid(0)?,
        room_id: row.id(1)?,
        user: row.id(2)?,
        membership: row.shared(3)?,
        event: row.event_nid(4)?,
        stripped_state: entries.iter().map(|entry| entry.get().into()).collect(),
        via: row.id(6)?,
        position: row.int(7)?,
    })
}

pub fn get(c: &mut dyn Conn, room: RoomNid, user: &UserId) -> Result<Option<Membership>> {
    c.query_opt(GET, &[&room, user], read)
}

/// A user's, set after `from`, up to and with `to`.
pub fn of_user(c: &mut dyn Conn, user: &UserId, from: i64, to: i64) -> Result<Vec<Membership>> {
    c.query_all(OF_USER, &[user, &from, &to], read)
}

const UPSERT: &str = "INSERT INTO out_of_band
    (room_nid, user_id, membership, event_nid, stripped_state, via, position)
    VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (room_nid, user_id) DO UPDATE SET
    membership = excluded.membership, event_nid = excluded.event_nid,
    stripped_state = excluded.stripped_state, via = excluded.via, position = excluded.position";
const REMOVE: &str = "DELETE FROM out_of_band WHERE room_nid = $1 AND user_id = $2";

/// Stores a membership in place of an earlier one, which must be the one that it was made for; its position in the
/// memberships stream.
pub(crate) fn put(c: &mut dyn Conn, room: RoomNid, new: &OutOfBand) -> Result<i64> {
    if let Former::Only(former) = new.instead_of
        && get(c, room, &new.user)?.map(|there| there.event) != former
    {
        return Err(Error::Stale);
    }
    let position = streams::next(c, Stream::Memberships)?;
    // What another server sent may be anything; what is no JSON is of no use to a client either.
    let entries: Vec<&str> = new
        .stripped_state
        .iter()
        .map(|entry| &**entry)
        .filter(|entry| serde_json::from_str::<&serde_json::value::RawValue>(entry).is_ok())
        .collect();
    let entries = format!("[{}]", entries.join(","));
    c.execute(
        UPSERT,
        &[
            &room,
            &new.user,
            &new.membership,
            &new.event,
            &entries,
            &new.via,
            &position,
        ],
    )?;
    Ok(position)
}

/// The room's own state knows better, or the user has forgotten the room.
pub fn remove(c: &mut dyn Conn, room: RoomNid, user: &UserId) -> Result<bool> {
    Ok(c.execute(REMOVE, &[&room, user])? > 0)
}
