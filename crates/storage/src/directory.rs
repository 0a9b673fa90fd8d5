//! Aliases of this server, and the public room list.

use protocol::id::{RoomAlias, RoomId, UserId};

use crate::driver::{Conn, Result};

/// Whom an alias belongs to and where it leads.
#[derive(Clone, Debug, PartialEq)]
pub struct AliasRow {
    pub room: RoomId,
    pub creator: UserId,
}

const ALIAS: &str = "SELECT room_id, creator FROM room_aliases WHERE alias = $1";
const ADD: &str = "INSERT INTO room_aliases (alias, room_id, creator) VALUES ($1, $2, $3)
    ON CONFLICT (alias) DO NOTHING";
const REMOVE: &str = "DELETE FROM room_aliases WHERE alias = $1";
const MOVE: &str = "UPDATE room_aliases SET room_id = $2 WHERE room_id = $1";
const OF_ROOM: &str = "SELECT alias FROM room_aliases WHERE room_id = $1 ORDER BY alias";
const LIST: &str = "INSERT INTO room_list (room_id) VALUES ($1) ON CONFLICT (room_id) DO NOTHING";
const UNLIST: &str = "DELETE FROM room_list WHERE room_id = $1";
const LISTED: &str = "SELECT 1 FROM room_list WHERE room_id = $1";
const ALL_LISTED: &str = "SELECT room_id FROM room_list ORDER BY room_id LIMIT $1";

pub fn alias(c: &mut dyn Conn, alias: &RoomAlias) -> Result<Option<AliasRow>> {
    c.query_opt(ALIAS, &[alias], |row| {
        Ok(AliasRow {
            room: row.id(0)?,
            creator: row.id(1)?,
        })
    })
}

/// `false` when the alias is taken.
pub fn add_alias(
    c: &mut dyn Conn,
    alias: &RoomAlias,
    room: &RoomId,
    creator: &UserId,
) -> Result<bool> {
    Ok(c.execute(ADD, &[alias, room, creator])? == 1)
}

pub fn remove_alias(c: &mut dyn Conn, alias: &RoomAlias) -> Result<bool> {
    Ok(c.execute(REMOVE, &[alias])? == 1)
}

/// Points all aliases of one room to another: what an upgrade does.
pub fn move_aliases(c: &mut dyn Conn, from: &RoomId, to: &RoomId) -> Result<()> {
    c.execute(MOVE, &[from, to]).map(|_| ())
}

pub fn aliases_of(c: &mut dyn Conn, room: &RoomId) -> Result<Vec<RoomAlias>> {
    c.query_all(OF_ROOM, &[room], |row| row.id(0))
}

pub fn set_listed(c: &mut dyn Conn, room: &RoomId, listed: bool) -> Result<()> {
    c.execute(if listed { LIST } else { UNLIST }, &[room])
        .map(|_| ())
}

pub fn is_listed(c: &mut dyn Conn, room: &RoomId) -> Result<bool> {
    c.exists(LISTED, &[room])
}

pub fn listed(c: &mut dyn Conn, limit: i64) -> Result<Vec<RoomId>> {
    c.query_all(ALL_LISTED, &[&limit], |row| row.id(0))
}
