//! Reports of events, rooms and users.

use protocol::id::{EventId, RoomId, UserId};

use crate::driver::{Conn, Result};

#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    pub reporter: UserId,
    pub room: Option<RoomId>,
    pub event: Option<EventId>,
    pub user: Option<UserId>,
    pub reason: Option<String>,
    pub ts: i64,
}

const ADD: &str = "INSERT INTO reports (number, reporter, room_id, event_id, user_id, reason, ts)
    VALUES ($1, $2, $3, $4, $5, $6, $7)";
const NEWEST: &str = "SELECT number, reporter, room_id, event_id, user_id, reason, ts FROM reports
    WHERE number < $1 ORDER BY number DESC LIMIT $2";

pub fn add(c: &mut dyn Conn, number: i64, report: &Report) -> Result<()> {
    c.execute(
        ADD,
        &[
            &number,
            &report.reporter,
            &report.room,
            &report.event,
            &report.user,
            &report.reason,
            &report.ts,
        ],
    )
    .map(|_| ())
}

/// The newest reports before a number, each with its own.
pub fn before(c: &mut dyn Conn, number: i64, limit: i64) -> Result<Vec<(i64, Report)>> {
    c.query_all(NEWEST, &[&number, &limit], |row| {
        Ok((
            row.int(0)?,
            Report {
                reporter: row.id(1)?,
                room: row.opt_id(2)?,
                event: row.opt_id(3)?,
                user: row.opt_id(4)?,
                reason: row.opt_string(5)?,
                ts: row.int(6)?,
            },
        ))
    })
}
