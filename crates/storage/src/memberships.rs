//! Who is in which room, by the current states.

use std::sync::Arc;

use protocol::id::{RoomId, ServerName, UserId};
use protocol::nid::{EventNid, RoomNid};

use crate::driver::{Conn, Result, Row};

#[derive(Clone, Debug, PartialEq)]
pub struct Member {
    pub user: UserId,
    pub membership: Arc<str>,
    pub event: EventNid,
    /// Where in the events stream it changed; 0: before we saw the room.
    pub position: i64,
}

const OF_ROOM: &str = "SELECT user_id, membership, event_nid, position FROM memberships
    WHERE room_nid = $1 ORDER BY user_id";
const WITH: &str = "SELECT user_id, membership, event_nid, position FROM memberships
    WHERE room_nid = $1 AND membership = $2 ORDER BY user_id";
const ONE: &str = "SELECT user_id, membership, event_nid, position FROM memberships
    WHERE room_nid = $1 AND user_id = $2";
const CHANGED: &str = "SELECT user_id, membership, event_nid, position FROM memberships
    WHERE room_nid = $1 AND position > $2 AND position <= $3 ORDER BY position, user_id";

fn read(row: &dyn Row) -> Result<Member> {
    Ok(Member {
        user: row.id(0)?,
        membership: row.shared(1)?,
        event: row.event_nid(2)?,
        position: row.int(3)?,
    })
}

/// Everybody with a membership of any kind.
pub fn of_room(c: &mut dyn Conn, room: RoomNid) -> Result<Vec<Member>> {
    c.query_all(OF_ROOM, &[&room], read)
}

/// Everybody with this membership.
pub fn with(c: &mut dyn Conn, room: RoomNid, membership: &str) -> Result<Vec<Member>> {
    c.query_all(WITH, &[&room, &membership], read)
}

pub fn get(c: &mut dyn Conn, room: RoomNid, user: &UserId) -> Result<Option<Member>> {
    c.query_opt(ONE, &[&room, user], read)
}

/// Whose membership last changed after `from`, up to and with `to`.
pub fn changed(c: &mut dyn Conn, room: RoomNid, from: i64, to: i64) -> Result<Vec<Member>> {
    c.query_all(CHANGED, &[&room, &from, &to], read)
}

const JOINED_ROOMS: &str = "SELECT m.room_nid, r.room_id FROM memberships m
    JOIN rooms r ON r.nid = m.room_nid
    WHERE m.user_id = $1 AND m.membership = 'join' ORDER BY r.room_id";
const SERVERS_SHARING: &str = "SELECT DISTINCT h.server FROM memberships m
    JOIN room_hosts h ON h.room_nid = m.room_nid
    WHERE m.user_id = $1 AND m.membership = 'join' ORDER BY h.server";
const PARTIAL_SERVERS_SHARING: &str = "SELECT DISTINCT p.server FROM memberships m
    JOIN partial_servers p ON p.room_nid = m.room_nid
    WHERE m.user_id = $1 AND m.membership = 'join' ORDER BY p.server";
const LOCAL_SHARING: &str = "SELECT DISTINCT b.user_id FROM memberships a
    JOIN memberships b ON b.room_nid = a.room_nid
    WHERE a.user_id = $1 AND a.membership = 'join' AND b.local = 1 AND b.membership = 'join'
    ORDER BY b.user_id";
const ROOMS_WITH_SERVER: &str = "SELECT h.room_nid, r.room_id FROM room_hosts h
    JOIN rooms r ON r.nid = h.room_nid WHERE h.server = $1 ORDER BY r.room_id";
const SERVER_IN_ROOM: &str = "SELECT 1 FROM room_hosts WHERE room_nid = $1 AND server = $2";

/// The rooms that a user is joined to.
pub fn joined_rooms(c: &mut dyn Conn, user: &UserId) -> Result<Vec<(RoomNid, RoomId)>> {
    c.query_all(JOINED_ROOMS, &[user], |row| {
        Ok((row.room_nid(0)?, row.id(1)?))
    })
}

/// The servers with somebody in a room that this user is in, own one included, and those of the join lists
/// of such rooms as are partial (P-41, P-49).
pub fn servers_sharing(c: &mut dyn Conn, user: &UserId) -> Result<Vec<ServerName>> {
    let mut servers: Vec<ServerName> = c.query_all(SERVERS_SHARING, &[user], |row| row.id(0))?;
    servers.extend(c.query_all(PARTIAL_SERVERS_SHARING, &[user], |row| row.id(0))?);
    servers.sort_unstable();
    servers.dedup();
    Ok(servers)
}

/// Our users in a room with this user, who may be anybody's; with ours, that user too.
pub fn local_users_sharing(c: &mut dyn Conn, user: &UserId) -> Result<Vec<UserId>> {
    c.query_all(LOCAL_SHARING, &[user], |row| row.id(0))
}

/// The rooms in which a server has somebody.
pub fn rooms_with_server(c: &mut dyn Conn, server: &ServerName) -> Result<Vec<(RoomNid, RoomId)>> {
    c.query_all(ROOMS_WITH_SERVER, &[server], |row| {
        Ok((row.room_nid(0)?, row.id(1)?))
    })
}

pub fn server_is_in_room(c: &mut dyn Conn, room: RoomNid, server: &ServerName) -> Result<bool> {
    c.exists(SERVER_IN_ROOM, &[&room, server])
}
