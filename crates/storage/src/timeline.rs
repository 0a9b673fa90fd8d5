//! Reading rooms for clients: timelines, pages of history, states at a moment, memberships.

use std::collections::HashMap;
use std::sync::Arc;

use protocol::id::{EventId, RoomId, UserId};
use protocol::nid::{EventNid, KeyNid, RoomNid};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::state::StateMap;

use crate::driver::{Conn, Error, Param, Result, Row, texts};
use crate::events::read_version;
use crate::states;

/// A room that somebody of ours is or was in.
#[derive(Clone, Debug)]
pub struct RoomRow {
    pub nid: RoomNid,
    pub room: RoomId,
    pub version: RoomVersion,
    pub partial: bool,
    /// The current state.
    pub state: StateMap,
}

/// An accepted event that has a place in the DAG.
#[derive(Clone, Debug)]
pub struct TimelineEvent {
    pub nid: EventNid,
    pub pdu: Arc<Pdu>,
    /// Position in the events stream, below 0 for events fetched from history.
    pub stream: i64,
    pub key: Option<KeyNid>,
    pub before: StateMap,
    pub after: StateMap,
    pub partial: bool,
    /// Some event before this one did not come by the stream: here /sync must break its timeline.
    pub gap: bool,
    /// Some event before this one is not stored with a place: there is history to be fetched.
    pub hole: bool,
    /// User, device and txn id of the request that made it.
    pub transaction: Option<Sent>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Sent {
    pub user: UserId,
    pub device: String,
    pub txn_id: String,
}

const ROOM: &str = "SELECT r.nid, r.version, r.state_root, p.room_nid FROM rooms r
    LEFT JOIN partial_rooms p ON p.room_nid = r.nid WHERE r.room_id = $1 AND r.revision > 0";

macro_rules! events {
    ($rest:literal) => {
        concat!(
            "SELECT e.nid, i.event_id, r.version, e.redacted, e.json, e.position, e.key_nid,
                e.before_root, e.after_root, e.partial, e.prevs, t.user_id, t.device, t.txn_id
            FROM events e JOIN event_ids i ON i.nid = e.nid JOIN rooms r ON r.nid = e.room_nid
            LEFT JOIN client_transactions t ON t.event_nid = e.nid
            WHERE e.place > 0 AND e.verdict = 0 AND ",
            $rest
        )
    };
}

pub(crate) const NEWEST: &str = events!(
    "e.room_nid = $1 AND e.position > $2 AND e.position <= $3 ORDER BY e.position DESC LIMIT $4"
);
pub(crate) const BACK: &str = events!(
    "e.room_nid = $1 AND e.position > $2 AND e.position <= $3
    AND (e.depth < $4 OR (e.depth = $4 AND e.position < $5))
    ORDER BY e.depth DESC, e.position DESC LIMIT $6"
);
pub(crate) const FORTH: &str = events!(
    "e.room_nid = $1 AND e.position > $2 AND e.position <= $3
    AND (e.depth > $4 OR (e.depth = $4 AND e.position >= $5))
    ORDER BY e.depth, e.position LIMIT $6"
);
const BY_NIDS: &str = events!("e.nid IN (SELECT value FROM rarray($1)) ORDER BY e.position");
const BY_ID: &str = events!("e.room_nid = $1 AND i.event_id = $2");
const REDACTIONS: &str = events!(
    "e.room_nid = $1 AND e.nid IN (SELECT event_nid FROM redactions
        WHERE target IN (SELECT value FROM rarray_text($2))) ORDER BY e.position"
);
const AT_TIME_FORTH: &str = events!(
    "e.room_nid = $1 AND e.origin_ts >= $2 ORDER BY e.origin_ts, e.depth, e.position LIMIT $3"
);
const AT_TIME_BACK: &str = events!(
    "e.room_nid = $1 AND e.origin_ts <= $2 ORDER BY e.origin_ts DESC, e.depth DESC, e.position DESC LIMIT $3"
);
const MEMBER_EVENTS: &str = events!(
    "e.room_nid = $1 AND e.kind = 'm.room.member' AND e.position > $2 AND e.position <= $3
    ORDER BY e.position LIMIT $4"
);
const PLACES: &str = "SELECT nid, place FROM events
    WHERE place > 0 AND nid IN (SELECT value FROM rarray($1))";
const MEMBER_AMONG: &str = "SELECT e.nid FROM events e JOIN event_ids i ON i.nid = e.nid
    WHERE i.event_id IN (SELECT value FROM rarray_text($1))
    AND e.kind = 'm.room.member' AND e.state_key = $2 AND e.verdict = 0 LIMIT 1";
const TRANSACTION: &str = "SELECT i.event_id FROM client_transactions t JOIN event_ids i
    ON i.nid = t.event_nid WHERE t.user_id = $1 AND t.device = $2 AND t.room_nid = $3 AND t.txn_id = $4";

/// `None` for a room that nobody here was ever in.
pub fn room(c: &mut dyn Conn, room: &RoomId) -> Result<Option<RoomRow>> {
    let row = c.query_opt(ROOM, &[room], |row| {
        Ok((
            row.room_nid(0)?,
            read_version(row.text(1)?)?,
            row.int(2)?,
            row.opt_int(3)?.is_some(),
        ))
    })?;
    let Some((nid, version, root, partial)) = row else {
        return Ok(None);
    };
    Ok(Some(RoomRow {
        nid,
        room: room.clone(),
        version,
        partial,
        state: states::map(c, root)?,
    }))
}

/// Columns 1 to 4 of a list of events.
fn pdu(row: &dyn Row) -> Result<Arc<Pdu>> {
    let id: EventId = row.id(1)?;
    Pdu::parse_trusted(row.text(4)?, read_version(row.text(2)?)?, id, row.flag(3)?)
        .map(Arc::new)
        .map_err(|error| Error::corrupt(error.to_string()))
}

/// The newest events in stream order after one position and up to another, newest first.
pub fn newest(
    c: &mut dyn Conn,
    room: RoomNid,
    after: i64,
    up_to: i64,
    limit: i64,
) -> Result<Vec<TimelineEvent>> {
    events(c, NEWEST, &[&room, &after, &up_to, &limit])
}

/// Which part of a room's history to walk, in order of `(depth, stream)`.
#[derive(Clone, Copy, Debug)]
pub struct Stretch {
    /// Only events after this stream position …
    pub after: i64,
    /// … and up to this one.
    pub up_to: i64,
    /// Where the walk begins: just before this place. Going back the place itself is not in it, going
    /// forth it is.
    pub from: (i64, i64),
}

/// Older and older events.
pub fn back(
    c: &mut dyn Conn,
    room: RoomNid,
    stretch: Stretch,
    limit: i64,
) -> Result<Vec<TimelineEvent>> {
    walk(c, BACK, room, stretch, limit)
}

/// Newer and newer events.
pub fn forth(
    c: &mut dyn Conn,
    room: RoomNid,
    stretch: Stretch,
    limit: i64,
) -> Result<Vec<TimelineEvent>> {
    walk(c, FORTH, room, stretch, limit)
}

fn walk(
    c: &mut dyn Conn,
    sql: &str,
    room: RoomNid,
    Stretch { after, up_to, from }: Stretch,
    limit: i64,
) -> Result<Vec<TimelineEvent>> {
    events(c, sql, &[&room, &after, &up_to, &from.0, &from.1, &limit])
}

/// The first events at a time or after it, or the last at it or before.
pub fn at_time(
    c: &mut dyn Conn,
    room: RoomNid,
    ts: i64,
    forth: bool,
    limit: i64,
) -> Result<Vec<TimelineEvent>> {
    let sql = if forth { AT_TIME_FORTH } else { AT_TIME_BACK };
    events(c, sql, &[&room, &ts, &limit])
}

/// Membership events of the timeline after one position and up to another, oldest first.
pub fn member_events(
    c: &mut dyn Conn,
    room: RoomNid,
    after: i64,
    up_to: i64,
    limit: i64,
) -> Result<Vec<TimelineEvent>> {
    events(c, MEMBER_EVENTS, &[&room, &after, &up_to, &limit])
}

pub fn by_nid(c: &mut dyn Conn, nid: EventNid) -> Result<Option<TimelineEvent>> {
    Ok(by_nids(c, &[nid])?.pop())
}

/// In stream order. What is no accepted event with a place is absent.
pub fn by_nids(c: &mut dyn Conn, nids: &[EventNid]) -> Result<Vec<TimelineEvent>> {
    let numbers: Vec<i64> = nids.iter().map(|nid| nid.0).collect();
    events(c, BY_NIDS, &[&numbers])
}

/// `None` for what is rejected, soft-failed, an outlier, or of another room.
pub fn by_id(c: &mut dyn Conn, room: RoomNid, id: &EventId) -> Result<Option<TimelineEvent>> {
    Ok(events(c, BY_ID, &[&room, id])?.pop())
}

/// The accepted redactions that name one of these events, in stream order.
pub fn redactions_of(
    c: &mut dyn Conn,
    room: RoomNid,
    targets: &[EventId],
) -> Result<Vec<TimelineEvent>> {
    if targets.is_empty() {
        return Ok(Vec::new());
    }
    let targets = targets.to_vec();
    events(c, REDACTIONS, &[&room, &texts(&targets)])
}

/// The membership of a user among these events, whatever their place.
pub fn member_among(c: &mut dyn Conn, ids: &[EventId], user: &UserId) -> Result<Option<EventNid>> {
    let ids = ids.to_vec();
    c.query_opt(MEMBER_AMONG, &[&texts(&ids), user], |row| row.event_nid(0))
}

/// The event that an earlier request with this transaction id made.
pub fn by_transaction(c: &mut dyn Conn, room: RoomNid, sent: &Sent) -> Result<Option<EventId>> {
    c.query_opt(
        TRANSACTION,
        &[&sent.user, &sent.device, &room, &sent.txn_id],
        |row| row.id(0),
    )
}

/// A row before the states and the prev events are looked up.
struct Half {
    event: TimelineEvent,
    before: i64,
    after: i64,
    prevs: Vec<i64>,
}

/// Reads a list of events with all that belongs to them.
pub(crate) fn events(
    c: &mut dyn Conn,
    sql: &str,
    params: &[&dyn Param],
) -> Result<Vec<TimelineEvent>> {
    let halves = c.query_all(sql, params, half)?;
    let mut prevs: Vec<i64> = halves.iter().flat_map(|half| half.prevs.clone()).collect();
    prevs.sort_unstable();
    prevs.dedup();
    let mut places = HashMap::new();
    if !prevs.is_empty() {
        c.query(PLACES, &[&prevs], &mut |row| {
            places.insert(row.int(0)?, row.int(1)?);
            Ok(())
        })?;
    }
    let roots: Vec<i64> = halves
        .iter()
        .flat_map(|half| [half.before, half.after])
        .collect();
    let states = states::maps(c, &roots)?;
    let mut list = Vec::with_capacity(halves.len());
    for half in halves {
        let mut event = half.event;
        event.before.clone_from(&states[&half.before]);
        event.after.clone_from(&states[&half.after]);
        event.gap = half.prevs.iter().any(|prev| places.get(prev) != Some(&1));
        event.hole = half.prevs.iter().any(|prev| !places.contains_key(prev));
        list.push(event);
    }
    Ok(list)
}

fn half(row: &dyn Row) -> Result<Half> {
    let prevs = row.opt_blob(10)?.unwrap_or_default();
    let transaction = match row.opt_id(11)? {
        Some(user) => Some(Sent {
            user,
            device: row.string(12)?,
            txn_id: row.string(13)?,
        }),
        None => None,
    };
    Ok(Half {
        event: TimelineEvent {
            nid: row.event_nid(0)?,
            pdu: pdu(row)?,
            stream: row.int(5)?,
            key: row.opt_int(6)?.map(|_| row.key_nid(6)).transpose()?,
            before: StateMap::new(),
            after: StateMap::new(),
            partial: row.flag(9)?,
            gap: false,
            hole: false,
            transaction,
        },
        before: row.opt_int(7)?.unwrap_or(0),
        after: row.opt_int(8)?.unwrap_or(0),
        prevs: prevs
            .as_chunks::<8>()
            .0
            .iter()
            .map(|bytes| i64::from_le_bytes(*bytes))
            .collect(),
    })
}

const PARTIAL: &str = "SELECT 1 FROM partial_rooms p JOIN rooms r ON r.nid = p.room_nid
    WHERE r.room_id = $1";

pub fn is_partial(c: &mut dyn Conn, room: &RoomId) -> Result<bool> {
    c.exists(PARTIAL, &[room])
}
