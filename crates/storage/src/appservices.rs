//! What application services are told: events in stream order, and how far each service has got.

use protocol::id::RoomId;
use protocol::nid::EventNid;

use crate::driver::{Conn, Result};

/// How far a service has been told, and the transaction that comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// In the events stream.
    pub position: i64,
    pub txn_id: i64,
}

const PROGRESS: &str = "SELECT position, txn_id FROM appservice_progress WHERE appservice = $1";
const SET_PROGRESS: &str = "INSERT INTO appservice_progress (appservice, position, txn_id)
    VALUES ($1, $2, $3) ON CONFLICT (appservice)
    DO UPDATE SET position = excluded.position, txn_id = excluded.txn_id";
const EVENTS: &str = "SELECT e.nid, e.position, r.room_id FROM events e
    JOIN rooms r ON r.nid = e.room_nid
    WHERE e.place = 1 AND e.verdict = 0 AND e.position > $1 ORDER BY e.position LIMIT $2";

pub fn progress(c: &mut dyn Conn, service: &str) -> Result<Option<Progress>> {
    c.query_opt(PROGRESS, &[&service], |row| {
        Ok(Progress {
            position: row.int(0)?,
            txn_id: row.int(1)?,
        })
    })
}

pub fn set_progress(c: &mut dyn Conn, service: &str, progress: Progress) -> Result<()> {
    c.execute(
        SET_PROGRESS,
        &[&service, &progress.position, &progress.txn_id],
    )
    .map(drop)
}

/// Accepted events of all rooms after a position: number, position, room.
pub fn events_after(
    c: &mut dyn Conn,
    position: i64,
    limit: i64,
) -> Result<Vec<(EventNid, i64, RoomId)>> {
    c.query_all(EVENTS, &[&position, &limit], |row| {
        Ok((row.event_nid(0)?, row.int(1)?, row.id(2)?))
    })
}
