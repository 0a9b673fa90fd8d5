//! What other servers ask about a room: who they are to it, its DAG, and who of theirs saw what.

use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::sync::Arc;

use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::nid::{EventNid, KeyNid, RoomNid};
use protocol::pdu::Pdu;
use protocol::state::StateMap;
use room::effect::{Place, StateKey};

use crate::driver::{Conn, Result};
use crate::events::{self, Standing};
use crate::rooms::{self, RoomRow};
use crate::states;

/// How a server that asks stands to a room.
#[derive(Clone, Debug)]
pub struct Asker {
    pub room: RoomRow,
    pub partial: bool,
    /// Whether it has a joined member; in a partial room, whether it is in the approximation.
    pub in_room: bool,
    pub acl: Option<Arc<Pdu>>,
}

const IS_HOST: &str = "SELECT 1 FROM room_hosts WHERE room_nid = $1 AND server = $2 AND joined > 0";
const IS_PARTIAL_SERVER: &str = "SELECT 1 FROM partial_servers WHERE room_nid = $1 AND server = $2";

/// `None` for a room that we were never in.
pub fn asker(c: &mut dyn Conn, room: &RoomId, server: &ServerName) -> Result<Option<Asker>> {
    let Some(room) = rooms::known(c, room)? else {
        return Ok(None);
    };
    let partial = rooms::is_partial(c, room.nid)?;
    // The join list first: the other order can lose a server in the moment of completion (P-1).
    let in_room = partial && c.exists(IS_PARTIAL_SERVER, &[&room.nid, server])?
        || c.exists(IS_HOST, &[&room.nid, server])?;
    let acl = current_event(c, room.nid, "m.room.server_acl", "")?;
    Ok(Some(Asker {
        room,
        partial,
        in_room,
        acl,
    }))
}

/// One event of the current state.
pub fn current_event(
    c: &mut dyn Conn,
    room: RoomNid,
    kind: &str,
    state_key: &str,
) -> Result<Option<Arc<Pdu>>> {
    let Some(key) = states::key(c, room, kind, state_key)? else {
        return Ok(None);
    };
    let Some(event) = states::current(c, room)?.get(key) else {
        return Ok(None);
    };
    Ok(events::body(c, event)?.map(|body| body.pdu))
}

/// An event with a place in the DAG.
#[derive(Clone, Debug)]
pub struct Placed {
    pub nid: EventNid,
    pub depth: i64,
    /// Below 0 for backfilled events.
    pub position: i64,
    pub prevs: Vec<EventNid>,
    pub standing: Standing,
    pub place: Place,
}

pub(crate) const PLACED: &str = "SELECT nid, depth, position, prevs, verdict, place FROM events
    WHERE room_nid = $1 AND place > 0 AND nid IN (SELECT value FROM rarray($2))";

/// Those of these events that have a place in this room.
pub fn placed(
    c: &mut dyn Conn,
    room: RoomNid,
    events: &[EventNid],
) -> Result<BTreeMap<EventNid, Placed>> {
    let numbers = events::raw(events);
    let rows = c.query_all(PLACED, &[&room, &numbers], |row| {
        Ok(Placed {
            nid: row.event_nid(0)?,
            depth: row.int(1)?,
            position: row.opt_int(2)?.unwrap_or(0),
            prevs: events::unpack(row.opt_blob(3)?.unwrap_or_default())?,
            standing: events::read_standing(row, 4)?,
            place: events::read_place(row, 5)?,
        })
    })?;
    Ok(rows.into_iter().map(|row| (row.nid, row)).collect())
}

/// A walk back through the DAG, deepest event first.
struct Walk {
    room: RoomNid,
    queue: BinaryHeap<(i64, i64, EventNid)>,
    seen: BTreeMap<EventNid, Placed>,
}

impl Walk {
    fn new(room: RoomNid) -> Self {
        Self {
            room,
            queue: BinaryHeap::new(),
            seen: BTreeMap::new(),
        }
    }

    fn add(&mut self, c: &mut dyn Conn, events: &[EventNid]) -> Result<()> {
        let new: Vec<EventNid> = events
            .iter()
            .filter(|nid| !self.seen.contains_key(nid))
            .copied()
            .collect();
        for (nid, event) in placed(c, self.room, &new)? {
            self.queue.push((event.depth, event.position, nid));
            self.seen.insert(nid, event);
        }
        Ok(())
    }

    fn next(&mut self, c: &mut dyn Conn) -> Result<Option<EventNid>> {
        let Some((_, _, nid)) = self.queue.pop() else {
            return Ok(None);
        };
        let prevs = self.seen[&nid].prevs.clone();
        self.add(c, &prevs)?;
        Ok(Some(nid))
    }
}

/// Events looked at in one walk, however many of them may be given away.
const WALK_MAX: usize = 2000;

/// These events and those before them, deepest first, at most `limit`. Rejected ones are passed over.
pub fn backfill(
    c: &mut dyn Conn,
    room: RoomNid,
    from: &[EventId],
    limit: usize,
) -> Result<Vec<EventNid>> {
    let start: Vec<EventNid> = events::nids(c, from)?.into_values().collect();
    let mut walk = Walk::new(room);
    walk.add(c, &start)?;
    let mut found = Vec::new();
    while found.len() < limit && walk.seen.len() < WALK_MAX {
        let Some(nid) = walk.next(c)? else {
            break;
        };
        if walk.seen[&nid].standing != Standing::Rejected {
            found.push(nid);
        }
    }
    Ok(found)
}

/// The events between `earliest` and `latest`, both excluded, oldest first: at most `limit`, those nearest
/// to `latest` by number of steps.
pub fn missing_events(
    c: &mut dyn Conn,
    room: RoomNid,
    earliest: &[EventId],
    latest: &[EventId],
    min_depth: i64,
    limit: usize,
) -> Result<Vec<EventNid>> {
    let mut seen: BTreeSet<EventNid> = events::nids(c, earliest)?.into_values().collect();
    let latest: Vec<EventNid> = events::nids(c, latest)?
        .into_values()
        .filter(|nid| seen.insert(*nid))
        .collect();
    let mut front = placed(c, room, &latest)?;
    let mut found: Vec<(i64, i64, EventNid)> = Vec::new();
    while !front.is_empty() && found.len() < limit && seen.len() < WALK_MAX {
        let prevs: Vec<EventNid> = front
            .values()
            .flat_map(|event| event.prevs.iter().copied())
            .filter(|nid| seen.insert(*nid))
            .collect();
        front = placed(c, room, &prevs)?;
        front.retain(|_, event| event.depth >= min_depth);
        let mut level: Vec<&Placed> = front
            .values()
            .filter(|event| event.standing != Standing::Rejected)
            .collect();
        level.sort_by_key(|event| std::cmp::Reverse((event.depth, event.position)));
        for event in level.into_iter().take(limit - found.len()) {
            found.push((event.depth, event.position, event.nid));
        }
    }
    found.sort_unstable();
    Ok(found.into_iter().map(|(_, _, nid)| nid).collect())
}

const MEMBERS_LIKE: &str = "SELECT key_nid, state_key FROM state_keys
    WHERE room_nid = $1 AND kind = 'm.room.member' AND state_key LIKE $2";

/// The membership keys of a server's users in this room.
pub fn member_keys_of(c: &mut dyn Conn, room: RoomNid, server: &ServerName) -> Result<Vec<KeyNid>> {
    let suffix = format!(":{server}");
    let pattern = format!("%{suffix}");
    let mut found = Vec::new();
    // LIKE is lax about case in one engine, and `:a.org` also ends `@x:y:a.org`.
    c.query(MEMBERS_LIKE, &[&room, &pattern], &mut |row| {
        let user = row.text(1)?;
        if user
            .split_once(':')
            .is_some_and(|(_, domain)| domain == server.as_str())
        {
            found.push(row.key_nid(0)?);
        }
        Ok(())
    })?;
    Ok(found)
}

/// The state before and after each of these events, those that have a place.
pub fn states_around(
    c: &mut dyn Conn,
    events: &[EventNid],
) -> Result<BTreeMap<EventNid, (StateMap, StateMap)>> {
    let mut found = BTreeMap::new();
    for nid in events {
        if let Some(states) = states::around(c, *nid)? {
            found.insert(*nid, states);
        }
    }
    Ok(found)
}

const CLOSEST_BEFORE: &str = "SELECT e.nid, i.event_id, e.origin_ts FROM events e
    JOIN event_ids i ON i.nid = e.nid
    WHERE e.room_nid = $1 AND e.place > 0 AND e.verdict = 0 AND e.origin_ts <= $2
    ORDER BY e.origin_ts DESC, e.depth DESC LIMIT 1";
const CLOSEST_AFTER: &str = "SELECT e.nid, i.event_id, e.origin_ts FROM events e
    JOIN event_ids i ON i.nid = e.nid
    WHERE e.room_nid = $1 AND e.place > 0 AND e.verdict = 0 AND e.origin_ts >= $2
    ORDER BY e.origin_ts, e.depth LIMIT 1";

/// The event of a room nearest to a time, at or before it, or at or after it.
pub fn closest_event(
    c: &mut dyn Conn,
    room: RoomNid,
    ts_ms: i64,
    forward: bool,
) -> Result<Option<(EventNid, EventId, i64)>> {
    let sql = if forward {
        CLOSEST_AFTER
    } else {
        CLOSEST_BEFORE
    };
    c.query_opt(sql, &[&room, &ts_ms], |row| {
        Ok((row.event_nid(0)?, row.id(1)?, row.int(2)?))
    })
}

const REDACTION_TARGETS: &str = "SELECT i.nid FROM event_ids i
    WHERE i.nid IN (SELECT value FROM rarray($1))
    AND EXISTS (SELECT 1 FROM redactions d WHERE d.target = i.event_id)";

/// Those of these events that an accepted redaction names.
pub fn redaction_targets(c: &mut dyn Conn, events: &[EventNid]) -> Result<Vec<EventNid>> {
    let numbers = events::raw(events);
    c.query_all(REDACTION_TARGETS, &[&numbers], |row| row.event_nid(0))
}

const PLAIN_KEYS: &str = "SELECT key_nid FROM state_keys
    WHERE room_nid = $1 AND kind < 'm.room.member'
    UNION ALL SELECT key_nid FROM state_keys WHERE room_nid = $1 AND kind > 'm.room.member'";

/// Every state key that is not a membership.
pub fn keys_without_members(c: &mut dyn Conn, room: RoomNid) -> Result<Vec<KeyNid>> {
    c.query_all(PLAIN_KEYS, &[&room], |row| row.key_nid(0))
}

const PRESENT: &str = "SELECT user_id, event_nid FROM memberships
    WHERE room_nid = $1 AND membership IN ('join', 'invite') AND user_id <> $2
    ORDER BY position, event_nid LIMIT $3";
const GONE: &str = "SELECT user_id, event_nid FROM memberships
    WHERE room_nid = $1 AND membership IN ('leave', 'ban') AND user_id <> $2
    ORDER BY position, event_nid LIMIT $3";

/// Membership events that name a room without a name: of those joined or invited, oldest first, or
/// of those gone when there is nobody. Only what stands in `state`, which may be older than the table.
pub fn heroes(
    c: &mut dyn Conn,
    room: RoomNid,
    state: &StateMap,
    without: &UserId,
    limit: usize,
) -> Result<Vec<EventNid>> {
    // Some more than needed, for those who changed meanwhile.
    let asked = i64::try_from(limit * 4).unwrap_or(i64::MAX);
    for sql in [PRESENT, GONE] {
        let found = c.query_all(sql, &[&room, without, &asked], |row| {
            Ok((row.shared(0)?, row.event_nid(1)?))
        })?;
        let names: Vec<StateKey> = found
            .iter()
            .map(|(user, _)| ("m.room.member".into(), Arc::clone(user)))
            .collect();
        let keys = states::keys(c, room, &names)?;
        let stands = |name| keys.get(name).and_then(|key| state.get(*key));
        let mut heroes: Vec<EventNid> = found
            .iter()
            .zip(&names)
            .filter(|((_, event), name)| stands(name) == Some(*event))
            .map(|((_, event), _)| *event)
            .collect();
        if !heroes.is_empty() {
            heroes.truncate(limit);
            return Ok(heroes);
        }
    }
    Ok(Vec::new())
}
