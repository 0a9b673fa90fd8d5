//! Rooms: their rows, extremities and partial markers.

use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::nid::{EventNid, RoomNid};
use protocol::room_version::RoomVersion;
use room::effect::{Extremity, PartialMarker};

use crate::driver::{Conn, Result, Row};
use crate::events::read_version;

/// A room's row.
#[derive(Clone, Debug, PartialEq)]
pub struct RoomRow {
    pub nid: RoomNid,
    pub room_id: RoomId,
    pub version: RoomVersion,
    /// 0: the room has a number, but we were never in it.
    pub revision: u64,
    pub(crate) state_root: i64,
    pub min_depth: Option<i64>,
}

const BY_ID: &str = "SELECT nid, room_id, version, revision, state_root, min_depth FROM rooms
    WHERE room_id = $1";
const BY_NID: &str = "SELECT nid, room_id, version, revision, state_root, min_depth FROM rooms
    WHERE nid = $1";
const ALL: &str = "SELECT nid, room_id, version, revision, state_root, min_depth FROM rooms
    WHERE revision > 0 AND room_id > $1 ORDER BY room_id LIMIT $2";
const COUNT: &str = "SELECT COUNT(*) FROM rooms WHERE revision > 0";

fn read(row: &dyn Row) -> Result<RoomRow> {
    Ok(RoomRow {
        nid: row.room_nid(0)?,
        room_id: row.id(1)?,
        version: read_version(row.text(2)?)?,
        revision: row.int(3)?.unsigned_abs(),
        state_root: row.int(4)?,
        min_depth: row.opt_int(5)?,
    })
}

/// A room that has a number.
pub fn by_id(c: &mut dyn Conn, room: &RoomId) -> Result<Option<RoomRow>> {
    c.query_opt(BY_ID, &[room], read)
}

pub fn by_nid(c: &mut dyn Conn, room: RoomNid) -> Result<Option<RoomRow>> {
    c.query_opt(BY_NID, &[&room], read)
}

/// A room that we are or were in.
pub fn known(c: &mut dyn Conn, room: &RoomId) -> Result<Option<RoomRow>> {
    Ok(by_id(c, room)?.filter(|row| row.revision > 0))
}

/// The rooms that we are or were in, by id, after this one (`""`: from the first).
pub fn list(c: &mut dyn Conn, after: &str, limit: i64) -> Result<Vec<RoomRow>> {
    c.query_all(ALL, &[&after, &limit], read)
}

pub fn count(c: &mut dyn Conn) -> Result<i64> {
    c.query_one(COUNT, &[], |row| row.int(0))
}

/// What a head has beside its room's row and its state. One statement, since on PostgreSQL each is a way to another
/// process and back.
const HEAD: &str = "SELECT CAST(0 AS BIGINT), e.nid, e.depth, e.partial, i.event_id
    FROM forward_extremities f JOIN events e ON e.nid = f.event_nid JOIN event_ids i ON i.nid = e.nid
    WHERE f.room_nid = $1
    UNION ALL SELECT 1, 0, 0, 0, user_id FROM memberships
    WHERE room_nid = $1 AND local = 1 AND membership = 'join'
    UNION ALL SELECT 2, 0, 0, 0, '' FROM partial_rooms WHERE room_nid = $1
    UNION ALL SELECT 3, 0, 0, 0, '' FROM intents WHERE room_nid = $1 AND owe_leave = 0
    ORDER BY 1, 2, 5";

#[derive(Default)]
pub(crate) struct HeadRows {
    pub forward_extremities: Vec<Extremity>,
    pub local_joined: Vec<UserId>,
    pub is_partial: bool,
    pub handshake_running: bool,
}

pub(crate) fn head(c: &mut dyn Conn, room: RoomNid) -> Result<HeadRows> {
    let mut head = HeadRows::default();
    c.query(HEAD, &[&room], &mut |row| {
        match row.int(0)? {
            0 => head.forward_extremities.push(Extremity {
                nid: row.event_nid(1)?,
                event_id: row.id(4)?,
                depth: row.int(2)?,
                partial: row.flag(3)?,
            }),
            1 => head.local_joined.push(row.id(4)?),
            2 => head.is_partial = true,
            _ => head.handshake_running = true,
        }
        Ok(())
    })?;
    Ok(head)
}

const BACKWARD: &str = "SELECT i.event_id, b.depth FROM backward_extremities b
    JOIN event_ids i ON i.nid = b.event_nid WHERE b.room_nid = $1 ORDER BY b.depth DESC, b.event_nid";

/// Prev events of placed events that have no place themselves, deepest first. The depth is that of an
/// event just before its deepest child.
pub fn backward_extremities(c: &mut dyn Conn, room: RoomNid) -> Result<Vec<(EventId, i64)>> {
    c.query_all(BACKWARD, &[&room], |row| Ok((row.id(0)?, row.int(1)? - 1)))
}

const MARKER: &str =
    "SELECT joined_via, join_event, device_lists_at FROM partial_rooms WHERE room_nid = $1";
const MARKER_SERVERS: &str =
    "SELECT server FROM partial_servers WHERE room_nid = $1 ORDER BY place";
const PARTIAL: &str =
    "SELECT r.nid, r.room_id FROM partial_rooms p JOIN rooms r ON r.nid = p.room_nid
    ORDER BY r.nid";
const IS_PARTIAL: &str = "SELECT 1 FROM partial_rooms WHERE room_nid = $1";
const PARTIAL_LEFT: &str = "SELECT COUNT(*) FROM events WHERE room_nid = $1 AND partial = 1";

/// The partial marker; `None` for a full room.
pub fn partial_marker(c: &mut dyn Conn, room: RoomNid) -> Result<Option<PartialMarker>> {
    let marker = c.query_opt(MARKER, &[&room], |row| {
        Ok(PartialMarker {
            servers_in_room: Vec::new(),
            joined_via: row.id(0)?,
            join_event: row.id(1)?,
            device_lists_at: row.int(2)?,
        })
    })?;
    let Some(mut marker) = marker else {
        return Ok(None);
    };
    marker.servers_in_room = c.query_all(MARKER_SERVERS, &[&room], |row| row.id(0))?;
    Ok(Some(marker))
}

pub fn is_partial(c: &mut dyn Conn, room: RoomNid) -> Result<bool> {
    c.exists(IS_PARTIAL, &[&room])
}

/// Every partial room.
pub fn partial_rooms(c: &mut dyn Conn) -> Result<Vec<(RoomNid, RoomId)>> {
    c.query_all(PARTIAL, &[], |row| Ok((row.room_nid(0)?, row.id(1)?)))
}

const ENCRYPTED: &str =
    "SELECT 1 FROM state_keys WHERE room_nid = $1 AND kind = 'm.room.encryption'
    AND state_key = ''";
const MARKER_SERVER_COUNT: &str = "SELECT COUNT(*) FROM partial_servers WHERE room_nid = $1";

/// In which order partial rooms are best completed: encrypted ones first, as their users can not send
/// before the members are known (P-48), then those on few servers. The smaller, the earlier.
pub fn completion_rank(c: &mut dyn Conn, room: RoomNid) -> Result<(bool, i64)> {
    let servers = c.query_int(MARKER_SERVER_COUNT, &[&room])?.unwrap_or(0);
    Ok((!c.exists(ENCRYPTED, &[&room])?, servers))
}

/// How many events of a room are partial.
pub fn partial_events_left(c: &mut dyn Conn, room: RoomNid) -> Result<i64> {
    c.query_one(PARTIAL_LEFT, &[&room], |row| row.int(0))
}

const BECAME_FULL: &str = "SELECT b.position, r.nid, r.room_id FROM became_full b
    JOIN rooms r ON r.nid = b.room_nid WHERE b.position > $1 AND b.position <= $2 ORDER BY b.position";

/// The rooms that became full after `from`, up to and with `to`, with their positions in that stream.
pub fn became_full(c: &mut dyn Conn, from: i64, to: i64) -> Result<Vec<(i64, RoomNid, RoomId)>> {
    c.query_all(BECAME_FULL, &[&from, &to], |row| {
        Ok((row.int(0)?, row.room_nid(1)?, row.id(2)?))
    })
}

const HANDSHAKE: &str = "SELECT 1 FROM intents WHERE room_nid = $1 AND owe_leave = 0";
const LOCAL_JOINED: &str = "SELECT user_id FROM memberships
    WHERE room_nid = $1 AND local = 1 AND membership = 'join' ORDER BY user_id";
const HOSTS: &str =
    "SELECT server FROM room_hosts WHERE room_nid = $1 AND joined > 0 ORDER BY server";

/// Whether a handshake of ours for this room is between its intent and its end.
pub fn handshake_running(c: &mut dyn Conn, room: RoomNid) -> Result<bool> {
    c.exists(HANDSHAKE, &[&room])
}

/// Our users that are joined.
pub fn local_joined(c: &mut dyn Conn, room: RoomNid) -> Result<Vec<UserId>> {
    c.query_all(LOCAL_JOINED, &[&room], |row| row.id(0))
}

/// Every server with a joined member in the current state, ours included.
pub fn hosts(c: &mut dyn Conn, room: RoomNid) -> Result<Vec<ServerName>> {
    c.query_all(HOSTS, &[&room], |row| row.id(0))
}

const ROOM_OF_EVENT: &str = "SELECT room_nid FROM events WHERE nid = $1";

/// The room of a stored event.
pub fn of_event(c: &mut dyn Conn, event: EventNid) -> Result<Option<RoomNid>> {
    c.query_opt(ROOM_OF_EVENT, &[&event], |row| row.room_nid(0))
}
