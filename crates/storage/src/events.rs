//! Events as they are stored: bodies, numbers, places and verdicts.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use protocol::id::{EventId, ServerName};
use protocol::nid::{EventNid, KeyNid, RoomNid};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use room::effect::Place;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::cache::Body;
use crate::driver::{Conn, Error, Result, Row, texts};

/// Events asked for in one statement.
const BATCH: usize = 2000;

/// How an event was judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    Accepted,
    Rejected,
    SoftFailed,
}

/// What may change of a stored event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    pub nid: EventNid,
    pub room: RoomNid,
    pub key: Option<KeyNid>,
    pub place: Place,
    pub standing: Standing,
    pub partial: bool,
    /// Judged on partial state that never became full (S-29). Clients see it where it stood, but to
    /// whatever has to be decided it is an outlier, so that is the place given here.
    pub given_up: bool,
    /// In the events stream, below 0 for backfilled events.
    pub position: Option<i64>,
}

impl Status {
    /// Refused on state that nobody can vouch for: it has to be looked at afresh.
    pub fn is_forgotten(&self) -> bool {
        self.given_up && self.standing == Standing::Rejected
    }
}

/// The `partial` column of an event that was given up.
pub(crate) const GIVEN_UP: i64 = 2;

pub(crate) fn place_code(place: Place) -> i64 {
    match place {
        Place::Outlier => 0,
        Place::Timeline => 1,
        Place::Backfilled => 2,
    }
}

pub(crate) fn read_place(row: &dyn Row, column: usize) -> Result<Place> {
    match row.int(column)? {
        0 => Ok(Place::Outlier),
        1 => Ok(Place::Timeline),
        2 => Ok(Place::Backfilled),
        other => Err(Error::Corrupt(format!("place {other}"))),
    }
}

pub(crate) fn read_standing(row: &dyn Row, column: usize) -> Result<Standing> {
    match row.int(column)? {
        0 => Ok(Standing::Accepted),
        1 => Ok(Standing::Rejected),
        2 => Ok(Standing::SoftFailed),
        other => Err(Error::Corrupt(format!("verdict {other}"))),
    }
}

/// Numbers as they stand in a column, eight bytes each.
pub(crate) fn pack(numbers: &[EventNid]) -> Vec<u8> {
    numbers.iter().flat_map(|nid| nid.0.to_le_bytes()).collect()
}

pub(crate) fn unpack(bytes: &[u8]) -> Result<Vec<EventNid>> {
    let (numbers, rest) = bytes.as_chunks::<8>();
    if !rest.is_empty() {
        return Err(Error::corrupt("a list of event numbers is cut short"));
    }
    Ok(numbers
        .iter()
        .map(|number| EventNid(i64::from_le_bytes(*number)))
        .collect())
}

pub(crate) fn raw(events: &[EventNid]) -> Vec<i64> {
    events.iter().map(|nid| nid.0).collect()
}

const BODIES: &str =
    "SELECT e.nid, e.room_nid, e.key_nid, e.redacted, e.auth, r.version, i.event_id, e.json
    FROM events e JOIN rooms r ON r.nid = e.room_nid JOIN event_ids i ON i.nid = e.nid
    WHERE e.nid IN (SELECT value FROM rarray($1))";

/// The bodies of those of these events that are stored.
pub fn bodies(c: &mut dyn Conn, events: &[EventNid]) -> Result<HashMap<EventNid, Body>> {
    read_bodies(c, events, true)
}

fn read_bodies(
    c: &mut dyn Conn,
    events: &[EventNid],
    keep: bool,
) -> Result<HashMap<EventNid, Body>> {
    let cached = c.cached();
    let mut found = HashMap::with_capacity(events.len());
    let mut missing = Vec::new();
    for nid in events {
        match cached.caches.bodies.get(nid) {
            Some(body) => {
                found.insert(*nid, body);
            }
            None => missing.push(nid.0),
        }
    }
    missing.sort_unstable();
    missing.dedup();
    for batch in missing.chunks(BATCH) {
        c.query(BODIES, &[&batch], &mut |row| {
            let (nid, body) = read_body(row)?;
            if keep {
                cached.keep_body(nid, &body);
            }
            found.insert(nid, body);
            Ok(())
        })?;
    }
    Ok(found)
}

fn read_body(row: &dyn Row) -> Result<(EventNid, Body)> {
    let nid = row.event_nid(0)?;
    let version = read_version(row.text(5)?)?;
    let pdu = Pdu::parse_trusted(row.text(7)?, version, row.id(6)?, row.flag(3)?)
        .map_err(|error| Error::Corrupt(format!("event {}: {error}", nid.0)))?;
    let key = match row.opt_int(2)? {
        Some(_) => Some(row.key_nid(2)?),
        None => None,
    };
    let body = Body {
        room: row.room_nid(1)?,
        key,
        auth: unpack(row.blob(4)?)?.into(),
        pdu: Arc::new(pdu),
    };
    Ok((nid, body))
}

pub(crate) fn read_version(text: &str) -> Result<RoomVersion> {
    RoomVersion::parse(text).ok_or_else(|| Error::Corrupt(format!("room version {text:?}")))
}

/// One event's body.
pub fn body(c: &mut dyn Conn, event: EventNid) -> Result<Option<Body>> {
    Ok(bodies(c, &[event])?.remove(&event))
}

/// The events themselves, those that are stored.
pub fn pdus(c: &mut dyn Conn, events: &[EventNid]) -> Result<HashMap<EventNid, Arc<Pdu>>> {
    Ok(bodies(c, events)?
        .into_iter()
        .map(|(nid, body)| (nid, body.pdu))
        .collect())
}

/// As [`pdus`], for reading a whole room once: what is kept in memory stays as it is.
pub fn pdus_once(c: &mut dyn Conn, events: &[EventNid]) -> Result<HashMap<EventNid, Arc<Pdu>>> {
    Ok(read_bodies(c, events, false)?
        .into_iter()
        .map(|(nid, body)| (nid, body.pdu))
        .collect())
}

const JSON: &str = "SELECT nid, json FROM events WHERE nid IN (SELECT value FROM rarray($1))";

/// The federation form of events as stored text, without parsing, in the order of their numbers.
pub fn json(c: &mut dyn Conn, events: &[EventNid]) -> Result<Vec<(EventNid, Arc<str>)>> {
    let mut numbers = raw(events);
    numbers.sort_unstable();
    numbers.dedup();
    let mut found = Vec::with_capacity(numbers.len());
    for batch in numbers.chunks(BATCH) {
        let start = found.len();
        c.query(JSON, &[&batch], &mut |row| {
            found.push((row.event_nid(0)?, row.shared(1)?));
            Ok(())
        })?;
        found[start..].sort_unstable_by_key(|(nid, _)| *nid);
    }
    Ok(found)
}

const TEXTS: &str = "SELECT e.nid, i.event_id, e.json FROM events e
    JOIN event_ids i ON i.nid = e.nid WHERE e.nid IN (SELECT value FROM rarray($1))";

/// Ids and federation forms of these events as they are stored, one after the other.
pub fn texts_of(
    c: &mut dyn Conn,
    events: &[EventNid],
    each: &mut dyn FnMut(EventId, &str) -> Result<()>,
) -> Result<()> {
    let mut numbers = raw(events);
    numbers.sort_unstable();
    for batch in numbers.chunks(BATCH) {
        c.query(TEXTS, &[&batch], &mut |row| each(row.id(1)?, row.text(2)?))?;
    }
    Ok(())
}

/// The part of a member event that says what it makes of the user.
#[derive(Deserialize)]
struct MemberEvent<'a> {
    #[serde(borrow)]
    content: MemberContent<'a>,
}

#[derive(Deserialize)]
struct MemberContent<'a> {
    #[serde(borrow)]
    membership: Option<&'a RawValue>,
}

impl MemberEvent<'_> {
    /// As [`Pdu::membership`] has it.
    fn membership(&self) -> Option<Arc<str>> {
        // No membership there is needs an escape.
        let membership: &str = serde_json::from_str(self.content.membership?.get()).ok()?;
        Some(membership.into())
    }
}

/// `content.membership` of these member events, as far as they are stored and have it: thousands of them when
/// a room becomes full, of which nothing else is wanted.
pub fn memberships(
    c: &mut dyn Conn,
    events: &[EventNid],
) -> Result<HashMap<EventNid, Option<Arc<str>>>> {
    let cached = c.cached();
    let mut found = HashMap::with_capacity(events.len());
    let mut missing = Vec::new();
    for nid in events {
        match cached.caches.bodies.peek(nid) {
            Some(body) => {
                found.insert(*nid, body.pdu.membership().map(Arc::from));
            }
            None => missing.push(nid.0),
        }
    }
    missing.sort_unstable();
    for batch in missing.chunks(BATCH) {
        c.query(JSON, &[&batch], &mut |row| {
            let nid = row.event_nid(0)?;
            let event: MemberEvent<'_> = serde_json::from_str(row.text(1)?)
                .map_err(|error| Error::Corrupt(format!("event {}: {error}", nid.0)))?;
            found.insert(nid, event.membership());
            Ok(())
        })?;
    }
    Ok(found)
}

const STATUS: &str = "SELECT nid, room_nid, place, verdict, partial, position, key_nid FROM events
    WHERE nid IN (SELECT value FROM rarray($1))";
const STATUS_BY_ID: &str =
    "SELECT e.nid, e.room_nid, e.place, e.verdict, e.partial, e.position, e.key_nid, i.event_id
    FROM event_ids i JOIN events e ON e.nid = i.nid
    WHERE i.event_id IN (SELECT value FROM rarray_text($1))";

fn read_status(row: &dyn Row) -> Result<Status> {
    let mark = row.int(4)?;
    let given_up = mark == GIVEN_UP;
    Ok(Status {
        nid: row.event_nid(0)?,
        room: row.room_nid(1)?,
        key: row.opt_key_nid(6)?,
        place: match given_up {
            true => Place::Outlier,
            false => read_place(row, 2)?,
        },
        standing: read_standing(row, 3)?,
        partial: mark == 1,
        given_up,
        position: row.opt_int(5)?,
    })
}

/// Where these events stand, those that are stored.
pub fn statuses(c: &mut dyn Conn, events: &[EventNid]) -> Result<HashMap<EventNid, Status>> {
    let mut found = HashMap::with_capacity(events.len());
    for batch in raw(events).chunks(BATCH) {
        c.query(STATUS, &[&batch], &mut |row| {
            let status = read_status(row)?;
            found.insert(status.nid, status);
            Ok(())
        })?;
    }
    Ok(found)
}

/// The same by id. Events of any room: whoever asks about one room compares.
pub fn statuses_by_id(c: &mut dyn Conn, ids: &[EventId]) -> Result<BTreeMap<EventId, Status>> {
    let caches = c.cached().caches;
    let mut numbered = Vec::new();
    let mut others = Vec::new();
    for id in ids {
        match caches.ids.get(id) {
            Some(nid) => numbered.push((nid, id)),
            None => others.push(id.clone()),
        }
    }
    numbered.sort_unstable();
    let nids: Vec<EventNid> = numbered.iter().map(|(nid, _)| *nid).collect();
    let statuses = statuses(c, &nids)?;
    let mut found: BTreeMap<EventId, Status> = numbered
        .into_iter()
        .filter_map(|(nid, id)| Some((id.clone(), *statuses.get(&nid)?)))
        .collect();
    for batch in others.chunks(BATCH) {
        c.query(STATUS_BY_ID, &[&texts(&batch.to_vec())], &mut |row| {
            found.insert(row.id(7)?, read_status(row)?);
            Ok(())
        })?;
    }
    Ok(found)
}

const IN_TIMELINE: &str = "SELECT nid FROM events
    WHERE place = 1 AND partial < 2 AND nid IN (SELECT value FROM rarray($1))";

/// Those of these events that are in a timeline, and not given up.
pub fn in_timeline(c: &mut dyn Conn, events: &[EventNid]) -> Result<HashSet<EventNid>> {
    let mut numbers = raw(events);
    numbers.sort_unstable();
    let mut found = HashSet::new();
    for batch in numbers.chunks(BATCH) {
        c.query(IN_TIMELINE, &[&batch], &mut |row| {
            found.insert(row.event_nid(0)?);
            Ok(())
        })?;
    }
    Ok(found)
}

const NIDS: &str =
    "SELECT event_id, nid FROM event_ids WHERE event_id IN (SELECT value FROM rarray_text($1))";
const IDS: &str = "SELECT nid, event_id FROM event_ids WHERE nid IN (SELECT value FROM rarray($1))";

/// The numbers of those of these ids that have one, stored or not.
pub fn nids(c: &mut dyn Conn, ids: &[EventId]) -> Result<HashMap<EventId, EventNid>> {
    let cached = c.cached();
    let mut found = HashMap::with_capacity(ids.len());
    let mut missing = Vec::new();
    for id in ids {
        match cached.caches.ids.get(id) {
            Some(nid) => {
                found.insert(id.clone(), nid);
            }
            None => missing.push(id.clone()),
        }
    }
    for batch in missing.chunks(BATCH) {
        c.query(NIDS, &[&texts(&batch.to_vec())], &mut |row| {
            let (id, nid): (EventId, _) = (row.id(0)?, row.event_nid(1)?);
            if cached.fill {
                cached.caches.ids.insert(id.clone(), nid);
            }
            found.insert(id, nid);
            Ok(())
        })?;
    }
    Ok(found)
}

/// The ids of these events, in the order of their numbers.
pub(crate) fn each_id(
    c: &mut dyn Conn,
    events: &mut [EventNid],
    each: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<()> {
    events.sort_unstable();
    for batch in raw(events).chunks(BATCH) {
        c.query(IDS, &[&batch], &mut |row| each(row.text(1)?))?;
    }
    Ok(())
}

/// The ids of numbers.
pub fn ids(c: &mut dyn Conn, events: &[EventNid]) -> Result<HashMap<EventNid, EventId>> {
    let mut found = HashMap::with_capacity(events.len());
    for batch in raw(events).chunks(BATCH) {
        c.query(IDS, &[&batch], &mut |row| {
            found.insert(row.event_nid(0)?, row.id(1)?);
            Ok(())
        })?;
    }
    Ok(found)
}

const NEWEST_OF_SERVER: &str =
    "SELECT e.nid, i.event_id FROM events e JOIN event_ids i ON i.nid = e.nid
    WHERE e.room_nid = $1 AND e.place = 1 AND e.verdict = 0 AND e.sender LIKE $2
    ORDER BY e.position DESC LIMIT 1";

/// The last accepted event in a room's timeline that a user of this server sent.
pub fn newest_of_server(
    c: &mut dyn Conn,
    room: RoomNid,
    server: &ServerName,
) -> Result<Option<(EventNid, EventId)>> {
    // A server name has no character that LIKE gives a meaning to.
    let of_server = format!("@%:{server}");
    c.query_opt(NEWEST_OF_SERVER, &[&room, &of_server], |row| {
        Ok((EventNid(row.int(0)?), row.id(1)?))
    })
}

const AUTH: &str = "SELECT nid, auth FROM events WHERE nid IN (SELECT value FROM rarray($1))";

/// The auth events of these events, those that are stored.
pub(crate) fn auth_of(
    c: &mut dyn Conn,
    events: &[EventNid],
) -> Result<HashMap<EventNid, Arc<[EventNid]>>> {
    let cached = c.cached();
    let mut found = HashMap::with_capacity(events.len());
    let mut missing = Vec::new();
    for nid in events {
        match cached.caches.auth.get(nid) {
            Some(auth) => {
                found.insert(*nid, auth);
            }
            None => missing.push(nid.0),
        }
    }
    for batch in missing.chunks(BATCH) {
        c.query(AUTH, &[&batch], &mut |row| {
            let nid = row.event_nid(0)?;
            let auth: Arc<[EventNid]> = unpack(row.blob(1)?)?.into();
            cached.keep_auth(nid, &auth);
            found.insert(nid, auth);
            Ok(())
        })?;
    }
    Ok(found)
}
