//! Walks over the DAG for other servers: get_missing_events and backfill.

use std::collections::{BTreeSet, HashMap};

use protocol::id::EventId;
use protocol::nid::{EventNid, RoomNid};
use room::effect::Place;

use crate::driver::{Conn, Result};
use crate::events::{self, Standing};

/// Events looked at in one walk at most, whoever asks for how many.
const WALK_MAX: usize = 5000;

const NODES: &str = "SELECT nid, depth, verdict, prevs FROM events
    WHERE room_nid = $1 AND place > 0 AND nid IN (SELECT value FROM rarray($2))";

struct Node {
    depth: i64,
    standing: Standing,
    prevs: Vec<EventNid>,
}

fn nodes(c: &mut dyn Conn, room: RoomNid, wanted: &[EventNid]) -> Result<HashMap<EventNid, Node>> {
    let rows = c.query_all(NODES, &[&room, &events::raw(wanted)], |row| {
        let node = Node {
            depth: row.int(1)?,
            standing: events::read_standing(row, 2)?,
            prevs: events::unpack(row.opt_blob(3)?.unwrap_or_default())?,
        };
        Ok((row.event_nid(0)?, node))
    })?;
    Ok(rows.into_iter().collect())
}

/// What lies between: the events of this room before `latest` and not before (or among) `earliest`, not
/// below `min_depth`, nearest to `latest` first taken, in the order of their depth.
pub fn missing_events(
    c: &mut dyn Conn,
    room: RoomNid,
    earliest: &[EventId],
    latest: &[EventId],
    min_depth: i64,
    limit: usize,
) -> Result<Vec<EventNid>> {
    let earliest: BTreeSet<EventNid> = events::nids(c, earliest)?.into_values().collect();
    let latest: BTreeSet<EventNid> = events::nids(c, latest)?.into_values().collect();
    let mut seen: BTreeSet<EventNid> = earliest.union(&latest).copied().collect();
    let mut edge: Vec<EventNid> = latest.difference(&earliest).copied().collect();
    let mut found: Vec<(i64, EventNid)> = Vec::new();
    while !edge.is_empty() && found.len() < limit && seen.len() < WALK_MAX {
        let here = nodes(c, room, &edge)?;
        let mut below = Vec::new();
        for nid in &edge {
            let prevs = here.get(nid).map(|node| node.prevs.as_slice());
            below.extend(
                prevs
                    .unwrap_or_default()
                    .iter()
                    .filter(|prev| seen.insert(**prev)),
            );
        }
        let there = nodes(c, room, &below)?;
        edge.clear();
        for nid in below {
            let Some(node) = there.get(&nid).filter(|node| node.depth >= min_depth) else {
                continue;
            };
            edge.push(nid);
            if node.standing != Standing::Rejected && found.len() < limit {
                found.push((node.depth, nid));
            }
        }
    }
    found.sort_unstable();
    Ok(found.into_iter().map(|(_, nid)| nid).collect())
}

/// History from these events (themselves included) downwards, deepest first.
pub fn backfill(
    c: &mut dyn Conn,
    room: RoomNid,
    from: &[EventId],
    limit: usize,
) -> Result<Vec<EventNid>> {
    let start: Vec<EventNid> = events::nids(c, from)?.into_values().collect();
    let mut seen: BTreeSet<EventNid> = start.iter().copied().collect();
    let mut waiting: BTreeSet<(i64, EventNid)> = BTreeSet::new();
    let mut known = nodes(c, room, &start)?;
    waiting.extend(known.iter().map(|(nid, node)| (node.depth, *nid)));
    let mut found = Vec::new();
    while found.len() < limit
        && seen.len() < WALK_MAX
        && let Some((_, nid)) = waiting.pop_last()
    {
        let Some(node) = known.remove(&nid) else {
            continue;
        };
        if node.standing != Standing::Rejected {
            found.push(nid);
        }
        let below: Vec<EventNid> = node
            .prevs
            .into_iter()
            .filter(|nid| seen.insert(*nid))
            .collect();
        if below.is_empty() {
            continue;
        }
        for (nid, node) in nodes(c, room, &below)? {
            waiting.insert((node.depth, nid));
            known.insert(nid, node);
        }
    }
    Ok(found)
}

/// An event that can be given to another server: it has a place and is not rejected (S-14), or it is an
/// outlier that is not.
pub fn servable(c: &mut dyn Conn, id: &EventId) -> Result<Option<events::Status>> {
    let found = events::statuses_by_id(c, std::slice::from_ref(id))?;
    Ok(found
        .into_values()
        .find(|status| status.standing != Standing::Rejected))
}

/// The same, if it has a place in this room.
pub fn placed(c: &mut dyn Conn, room: RoomNid, id: &EventId) -> Result<Option<events::Status>> {
    Ok(servable(c, id)?.filter(|status| status.room == room && status.place != Place::Outlier))
}
