//! Events by what they relate to, and threads.

use protocol::id::{EventId, UserId};
use protocol::nid::{EventNid, RoomNid};

use crate::driver::{Conn, Result, texts};
use crate::timeline::{self, Stretch, TimelineEvent};

/// An accepted event, not redacted, that relates to another.
#[derive(Clone, Debug)]
pub struct Child {
    pub parent: EventId,
    pub nid: EventNid,
    pub rel_type: String,
    pub kind: String,
    pub sender: UserId,
}

pub(crate) const CHILDREN: &str =
    "SELECT r.parent, r.event_nid, r.rel_type, r.kind, r.sender FROM relations r
    JOIN events e ON e.nid = r.event_nid JOIN event_ids i ON i.nid = e.nid
    WHERE r.parent IN (SELECT value FROM rarray_text($1)) AND e.room_nid = $2
    AND r.rel_type IN ('m.replace', 'm.thread', 'm.reference')
    AND e.place > 0 AND e.verdict = 0
    AND NOT EXISTS (SELECT 1 FROM redactions d WHERE d.target = i.event_id)
    ORDER BY e.depth, e.position LIMIT $3";
const ANNOTATION: &str = "SELECT 1 FROM relations r JOIN event_ids i ON i.nid = r.event_nid
    WHERE r.parent = $1 AND r.rel_type = 'm.annotation' AND r.sender = $2 AND r.aggregation_key = $3
    AND NOT EXISTS (SELECT 1 FROM redactions d WHERE d.target = i.event_id)";

/// The selection of events that relate to an event; an empty rel_type or kind is any.
macro_rules! related {
    ($comparison:literal, $at:literal, $order:literal) => {
        concat!(
            "SELECT e.nid FROM relations r JOIN events e ON e.nid = r.event_nid
            WHERE r.parent = $1 AND e.room_nid = $2 AND e.place > 0 AND e.verdict = 0
            AND (CAST($3 AS TEXT) = '' OR r.rel_type = $3) AND (CAST($4 AS TEXT) = '' OR r.kind = $4)
            AND e.position > $5 AND e.position <= $6
            AND (e.depth ",
            $comparison,
            " $7 OR (e.depth = $7 AND e.position ",
            $at,
            " $8)) ORDER BY ",
            $order,
            " LIMIT $9"
        )
    };
}

pub(crate) const BACK: &str = related!("<", "<", "e.depth DESC, e.position DESC");
pub(crate) const FORTH: &str = related!(">", ">=", "e.depth, e.position");

const THREADS: &str = "SELECT r.parent, MAX(e.position) AS latest FROM relations r
    JOIN events e ON e.nid = r.event_nid
    WHERE e.room_nid = $1 AND r.rel_type = 'm.thread' AND e.place > 0 AND e.verdict = 0
    GROUP BY r.parent HAVING MAX(e.position) < $2 ORDER BY latest DESC LIMIT $3";

/// What relates to these events, in order of the DAG.
pub fn children(
    c: &mut dyn Conn,
    room: RoomNid,
    parents: &[EventId],
    limit: i64,
) -> Result<Vec<Child>> {
    if parents.is_empty() {
        return Ok(Vec::new());
    }
    let parents = parents.to_vec();
    c.query_all(CHILDREN, &[&texts(&parents), &room, &limit], |row| {
        Ok(Child {
            parent: row.id(0)?,
            nid: row.event_nid(1)?,
            rel_type: row.string(2)?,
            kind: row.string(3)?,
            sender: row.id(4)?,
        })
    })
}

/// Whether the user has annotated the event with this key already.
pub fn has_annotation(
    c: &mut dyn Conn,
    parent: &EventId,
    user: &UserId,
    key: &str,
) -> Result<bool> {
    c.exists(ANNOTATION, &[parent, user, &key])
}

/// What relates to an event in a given way.
#[derive(Clone, Copy, Debug)]
pub struct Related<'a> {
    pub parent: &'a EventId,
    /// Empty: any.
    pub rel_type: &'a str,
    /// Empty: any.
    pub kind: &'a str,
}

/// One page of related events.
pub fn page(
    c: &mut dyn Conn,
    room: RoomNid,
    related: Related<'_>,
    stretch: Stretch,
    forth: bool,
    limit: i64,
) -> Result<Vec<TimelineEvent>> {
    let sql = if forth { FORTH } else { BACK };
    let nids = c.query_all(
        sql,
        &[
            related.parent,
            &room,
            &related.rel_type,
            &related.kind,
            &stretch.after,
            &stretch.up_to,
            &stretch.from.0,
            &stretch.from.1,
            &limit,
        ],
        |row| row.event_nid(0),
    )?;
    let mut events = timeline::by_nids(c, &nids)?;
    events.sort_by_key(|event| nids.iter().position(|nid| *nid == event.nid));
    Ok(events)
}

/// Roots of threads whose latest event is before a position, the latest thread first, with that position.
pub fn threads(
    c: &mut dyn Conn,
    room: RoomNid,
    before: i64,
    limit: i64,
) -> Result<Vec<(EventId, i64)>> {
    c.query_all(THREADS, &[&room, &before, &limit], |row| {
        Ok((row.id(0)?, row.int(1)?))
    })
}
