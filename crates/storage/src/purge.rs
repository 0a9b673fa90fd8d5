//! Forgetting a room (joins.md P-69): it is then as if nobody here had ever been in it.

use std::collections::HashSet;

use protocol::id::RoomId;
use protocol::nid::EventNid;

use crate::driver::{Conn, Result};
use crate::{auth_above, event_index, events, rooms};

/// Events that go in one statement.
const BATCH: i64 = 2000;

const EVENTS: &str =
    "SELECT nid FROM events WHERE room_nid = $1 AND nid > $2 ORDER BY nid LIMIT $3";
/// What other servers are still to get: as a rule the leaves with which the purge began.
const OWED: &str = "SELECT o.event_nid FROM outbox o JOIN events e ON e.nid = o.event_nid
    WHERE e.room_nid = $1
    UNION SELECT f.event_nid FROM fan_outs f JOIN events e ON e.nid = f.event_nid
    WHERE e.room_nid = $1";
const KEEP: &str = "UPDATE events SET place = 0, partial = 0, position = NULL, before_root = NULL,
    after_root = NULL, prevs = NULL WHERE nid IN (SELECT value FROM rarray($1))";
/// What is found by an event's number.
const BY_EVENT: [&str; 3] = [
    "DELETE FROM event_children WHERE event_nid IN (SELECT value FROM rarray($1))",
    "DELETE FROM auth_dependents WHERE event_nid IN (SELECT value FROM rarray($1))",
    "DELETE FROM client_transactions WHERE event_nid IN (SELECT value FROM rarray($1))",
];
const DELETE: &str = "DELETE FROM events WHERE nid IN (SELECT value FROM rarray($1))";
const BY_ROOM: [&str; 11] = [
    "DELETE FROM room_states WHERE room_nid = $1",
    "DELETE FROM state_log WHERE room_nid = $1",
    "DELETE FROM forward_extremities WHERE room_nid = $1",
    "DELETE FROM backward_extremities WHERE room_nid = $1",
    "DELETE FROM memberships WHERE room_nid = $1",
    "DELETE FROM room_hosts WHERE room_nid = $1",
    "DELETE FROM out_of_band WHERE room_nid = $1",
    "DELETE FROM partial_rooms WHERE room_nid = $1",
    "DELETE FROM partial_servers WHERE room_nid = $1",
    "DELETE FROM became_full WHERE room_nid = $1",
    "DELETE FROM intents WHERE room_nid = $1 AND owe_leave = 0",
];
const BY_ID: [&str; 6] = [
    "DELETE FROM staged_pdus WHERE room_id = $1",
    "DELETE FROM receipts WHERE room_id = $1",
    "DELETE FROM room_aliases WHERE room_id = $1",
    "DELETE FROM room_list WHERE room_id = $1",
    "DELETE FROM push_actions WHERE room_id = $1",
    "DELETE FROM account_data WHERE room_id = $1",
];
/// The row and its state keys stay: a number means for ever what it meant once.
const RESET: &str =
    "UPDATE rooms SET revision = 0, state_root = 0, min_depth = NULL WHERE nid = $1";

/// Removes a room; whether there was one. What it still owes to other servers stays owed: such events are
/// kept as outliers.
pub fn room(c: &mut dyn Conn, room: &RoomId) -> Result<bool> {
    let Some(row) = rooms::by_id(c, room)? else {
        return Ok(false);
    };
    let owed: HashSet<EventNid> = c
        .query_all(OWED, &[&row.nid], |row| row.event_nid(0))?
        .into_iter()
        .collect();
    let mut last = EventNid(0);
    loop {
        let found: Vec<EventNid> =
            c.query_all(EVENTS, &[&row.nid, &last, &BATCH], |row| row.event_nid(0))?;
        let Some(newest) = found.last() else {
            break;
        };
        last = *newest;
        event_index::remove(c, &found)?;
        auth_above::remove(c, &found)?;
        for sql in BY_EVENT {
            c.execute(sql, &[&events::raw(&found)])?;
        }
        let (kept, gone): (Vec<_>, Vec<_>) = found.into_iter().partition(|nid| owed.contains(nid));
        c.execute(KEEP, &[&events::raw(&kept)])?;
        c.execute(DELETE, &[&events::raw(&gone)])?;
    }
    let owed: Vec<EventNid> = owed.into_iter().collect();
    auth_above::add_stored(c, &owed)?;
    for sql in BY_ROOM {
        c.execute(sql, &[&row.nid])?;
    }
    for sql in BY_ID {
        c.execute(sql, &[room])?;
    }
    c.execute(RESET, &[&row.nid])?;
    Ok(true)
}
