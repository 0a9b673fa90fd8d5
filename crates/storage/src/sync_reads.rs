//! What /sync asks about a user across rooms: memberships, shared rooms, what changed for whom.

use std::collections::BTreeSet;
use std::sync::Arc;

use protocol::id::{RoomId, UserId};
use protocol::nid::{EventNid, RoomNid};

use crate::driver::{Conn, Result, texts};
use crate::out_of_band;

/// A user's place in one room.
#[derive(Clone, Debug)]
pub struct Membership {
    pub room: RoomId,
    pub nid: RoomNid,
    pub membership: String,
    pub event: EventNid,
    /// Position of the change: in the events stream, or in the memberships stream when out of band.
    pub position: i64,
    /// Set when the room's state here does not know it: the stripped state that came with it.
    pub out_of_band: Option<Vec<Arc<str>>>,
}

const MEMBERSHIPS: &str = "SELECT r.room_id, m.room_nid, m.membership, m.event_nid, m.position
    FROM memberships m JOIN rooms r ON r.nid = m.room_nid WHERE m.user_id = $1 ORDER BY r.room_id";
const BECAME_FULL: &str = "SELECT room_nid FROM became_full WHERE position > $1 AND position <= $2";
const JOINED_COUNT: &str =
    "SELECT CAST(COALESCE(SUM(joined), 0) AS BIGINT) FROM room_hosts WHERE room_nid = $1";
const INVITED_COUNT: &str =
    "SELECT COUNT(*) FROM memberships WHERE room_nid = $1 AND membership = 'invite'";
const HEROES: &str = "SELECT user_id, event_nid FROM memberships WHERE room_nid = $1
    AND user_id <> $2 AND membership IN ('join', 'invite') ORDER BY position, user_id LIMIT $3";
const OLD_HEROES: &str = "SELECT user_id, event_nid FROM memberships WHERE room_nid = $1
    AND user_id <> $2 AND membership IN ('leave', 'ban') ORDER BY position, user_id LIMIT $3";
const JOINED: &str = "SELECT 1 FROM memberships m JOIN rooms r ON r.nid = m.room_nid
    WHERE r.room_id = $1 AND m.user_id = $2 AND m.membership = 'join'";
const ROOM_WITH: &str = "SELECT r.room_id FROM memberships b
    JOIN memberships a ON a.room_nid = b.room_nid AND a.user_id = $1 AND a.membership = 'join'
    JOIN rooms r ON r.nid = b.room_nid WHERE b.user_id = $2 ORDER BY r.nid LIMIT 1";
const JOINED_USERS: &str = "SELECT user_id FROM memberships
    WHERE room_nid = $1 AND membership = 'join' ORDER BY user_id";
const LOCAL_MEMBERS: &str = "SELECT user_id FROM memberships WHERE room_nid = $1 AND local = 1
    AND membership IN ('join', 'invite', 'knock')";
const OUT_OF_BAND_MEMBERS: &str = "SELECT user_id FROM out_of_band WHERE room_nid = $1
    AND membership IN ('invite', 'knock')";
const PARTIAL_SERVERS_OF: &str = "SELECT DISTINCT s.server FROM partial_servers s
    JOIN memberships m ON m.room_nid = s.room_nid WHERE m.user_id = $1 AND m.membership = 'join'";
const IN_PARTIAL_ROOMS_WITH: &str = "SELECT DISTINCT m.user_id FROM partial_servers s
    JOIN memberships m ON m.room_nid = s.room_nid
    WHERE s.server = $1 AND m.local = 1 AND m.membership = 'join'";
const GONE_FROM: &str = "SELECT o.user_id FROM memberships m JOIN memberships o
    ON o.room_nid = m.room_nid WHERE m.room_nid = $1 AND m.user_id = $2 AND m.membership = 'join'
    AND o.membership IN ('leave', 'ban') AND o.position > $3 AND o.position <= $4";
const SHARING: &str = "SELECT DISTINCT b.user_id FROM memberships a JOIN memberships b
    ON b.room_nid = a.room_nid WHERE a.user_id = $1 AND a.membership = 'join'
    AND b.membership = 'join' AND b.user_id IN (SELECT value FROM rarray_text($2))";
const ALL_SHARING: &str = "SELECT DISTINCT b.user_id FROM memberships a JOIN memberships b
    ON b.room_nid = a.room_nid WHERE a.user_id = $1 AND a.membership = 'join'
    AND b.membership = 'join'";
const PRESENCE_CHANGED: &str =
    "SELECT user_id FROM presence WHERE position > $1 AND position <= $2";
const ROOMS_WITH_EVENTS: &str =
    "SELECT DISTINCT room_nid FROM events WHERE place = 1 AND position > $1 AND position <= $2";
const ROOMS_WITH_RECEIPTS: &str =
    "SELECT DISTINCT room_id FROM receipts WHERE position > $1 AND position <= $2";
const FORGOTTEN: &str = "SELECT room_id, at FROM forgotten_rooms WHERE user_id = $1";
const FORGET: &str = "INSERT INTO forgotten_rooms (user_id, room_id, at) VALUES ($1, $2, $3)
    ON CONFLICT (user_id, room_id) DO UPDATE SET at = excluded.at";
const DROP_OUT_OF_BAND: &str = "DELETE FROM out_of_band WHERE user_id = $1
    AND membership NOT IN ('invite', 'knock')
    AND room_nid IN (SELECT nid FROM rooms WHERE room_id = $2)";
const HOSTS: &str =
    "SELECT server FROM room_hosts WHERE room_nid = $1 ORDER BY joined DESC, server";
const PARTIAL_HOSTS: &str = "SELECT server FROM partial_servers WHERE room_nid = $1 ORDER BY place";

/// All of a user's memberships, of the room's state or out of band, one for each room.
pub fn memberships(c: &mut dyn Conn, user: &UserId) -> Result<Vec<Membership>> {
    let apart: Vec<Membership> = out_of_band::of_user(c, user, 0, i64::MAX)?
        .into_iter()
        .map(|apart| Membership {
            room: apart.room_id,
            nid: apart.room_nid,
            membership: apart.membership.to_string(),
            event: apart.event,
            position: apart.position,
            out_of_band: Some(apart.stripped_state),
        })
        .collect();
    let mut all = c.query_all(MEMBERSHIPS, &[user], |row| {
        Ok(Membership {
            room: row.id(0)?,
            nid: row.room_nid(1)?,
            membership: row.string(2)?,
            event: row.event_nid(3)?,
            position: row.int(4)?,
            out_of_band: None,
        })
    })?;
    // Out of band is what happened since we left the room.
    all.retain(|known| known.membership == "join" || !apart.iter().any(|a| a.nid == known.nid));
    let joined: Vec<RoomNid> = all.iter().map(|known| known.nid).collect();
    all.extend(apart.into_iter().filter(|a| !joined.contains(&a.nid)));
    all.sort_by(|a, b| a.room.cmp(&b.room));
    Ok(all)
}

/// Rooms that became full after one position and up to another (P-31).
pub fn became_full(c: &mut dyn Conn, after: i64, up_to: i64) -> Result<Vec<RoomNid>> {
    c.query_all(BECAME_FULL, &[&after, &up_to], |row| row.room_nid(0))
}

/// How many are joined, and how many are invited.
pub fn member_counts(c: &mut dyn Conn, room: RoomNid) -> Result<(i64, i64)> {
    let joined = c.query_one(JOINED_COUNT, &[&room], |row| row.int(0))?;
    let invited = c.query_one(INVITED_COUNT, &[&room], |row| row.int(0))?;
    Ok((joined, invited))
}

/// The first members beside the user, for clients to name the room by; former members when there are none.
pub fn heroes(
    c: &mut dyn Conn,
    room: RoomNid,
    user: &UserId,
    limit: i64,
) -> Result<Vec<(UserId, EventNid)>> {
    let mut read = |sql: &str| {
        c.query_all(sql, &[&room, user, &limit], |row| {
            Ok((row.id(0)?, row.event_nid(1)?))
        })
    };
    let heroes = read(HEROES)?;
    if heroes.is_empty() {
        read(OLD_HEROES)
    } else {
        Ok(heroes)
    }
}

pub fn is_joined(c: &mut dyn Conn, room: &RoomId, user: &UserId) -> Result<bool> {
    c.exists(JOINED, &[room, user])
}

/// The oldest room that one user is in and that has a membership of the other, whichever it is.
pub fn room_with(c: &mut dyn Conn, joined: &UserId, other: &UserId) -> Result<Option<RoomId>> {
    c.query_opt(ROOM_WITH, &[joined, other], |row| row.id(0))
}

/// Who went out of a room that the user is in, after one position and up to another.
pub fn gone_from(
    c: &mut dyn Conn,
    room: RoomNid,
    user: &UserId,
    after: i64,
    up_to: i64,
) -> Result<Vec<UserId>> {
    c.query_all(GONE_FROM, &[&room, user, &after, &up_to], |row| row.id(0))
}

pub fn joined_users(c: &mut dyn Conn, room: RoomNid) -> Result<Vec<UserId>> {
    c.query_all(JOINED_USERS, &[&room], |row| row.id(0))
}

/// Servers whose users may be in one of the user's partial rooms.
pub fn partial_servers_of(
    c: &mut dyn Conn,
    user: &UserId,
) -> Result<BTreeSet<protocol::id::ServerName>> {
    let servers = c.query_all(PARTIAL_SERVERS_OF, &[user], |row| row.id(0))?;
    Ok(servers.into_iter().collect())
}

/// Our users that are in a partial room of which this server is said to be, too.
pub fn in_partial_rooms_with(
    c: &mut dyn Conn,
    server: &protocol::id::ServerName,
) -> Result<Vec<UserId>> {
    c.query_all(IN_PARTIAL_ROOMS_WITH, &[server], |row| row.id(0))
}

/// Our users that are joined, invited or have knocked, in the room's state or out of band.
pub fn local_members(c: &mut dyn Conn, room: RoomNid) -> Result<Vec<UserId>> {
    let mut users = c.query_all(LOCAL_MEMBERS, &[&room], |row| row.id(0))?;
    users.extend(c.query_all(OUT_OF_BAND_MEMBERS, &[&room], |row| row.id(0))?);
    users.sort_unstable();
    users.dedup();
    Ok(users)
}

/// Those of these users who share a room with the user.
pub fn sharing(c: &mut dyn Conn, user: &UserId, among: &[UserId]) -> Result<Vec<UserId>> {
    if among.is_empty() {
        return Ok(Vec::new());
    }
    let among = among.to_vec();
    c.query_all(SHARING, &[user, &texts(&among)], |row| row.id(0))
}

/// Everybody who shares a room with the user, the user included.
pub fn all_sharing(c: &mut dyn Conn, user: &UserId) -> Result<Vec<UserId>> {
    c.query_all(ALL_SHARING, &[user], |row| row.id(0))
}

/// Whose presence changed after one position and up to another.
pub fn presence_changed(c: &mut dyn Conn, after: i64, up_to: i64) -> Result<Vec<UserId>> {
    c.query_all(PRESENCE_CHANGED, &[&after, &up_to], |row| row.id(0))
}

/// Rooms whose timeline grew after one position and up to another.
pub fn rooms_with_events(c: &mut dyn Conn, after: i64, up_to: i64) -> Result<BTreeSet<RoomNid>> {
    let rooms = c.query_all(ROOMS_WITH_EVENTS, &[&after, &up_to], |row| row.room_nid(0))?;
    Ok(rooms.into_iter().collect())
}

/// Rooms in which somebody read something after one position and up to another.
pub fn rooms_with_receipts(c: &mut dyn Conn, after: i64, up_to: i64) -> Result<BTreeSet<RoomId>> {
    let rooms = c.query_all(ROOMS_WITH_RECEIPTS, &[&after, &up_to], |row| row.id(0))?;
    Ok(rooms.into_iter().collect())
}

/// The rooms a user has forgotten, each with the position up to which.
pub fn forgotten(c: &mut dyn Conn, user: &UserId) -> Result<Vec<(RoomId, i64)>> {
    c.query_all(FORGOTTEN, &[user], |row| Ok((row.id(0)?, row.int(1)?)))
}

/// Everything of the room up to this position of the events stream is forgotten.
pub fn forget(c: &mut dyn Conn, user: &UserId, room: &RoomId, at: i64) -> Result<()> {
    c.execute(FORGET, &[user, room, &at])?;
    c.execute(DROP_OUT_OF_BAND, &[user, room]).map(|_| ())
}

/// The servers in a room: the join list of a partial room first (P-1), then the hosts of its members.
pub fn servers(c: &mut dyn Conn, room: RoomNid) -> Result<Vec<protocol::id::ServerName>> {
    let mut servers = c.query_all(PARTIAL_HOSTS, &[&room], |row| row.id(0))?;
    for host in c.query_all(HOSTS, &[&room], |row| row.id(0))? {
        if !servers.contains(&host) {
            servers.push(host);
        }
    }
    Ok(servers)
}
