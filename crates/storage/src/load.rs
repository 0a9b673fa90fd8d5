//! What a room machine may ask the store, each question answered from one snapshot.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use protocol::id::{EventId, RoomId, ServerName};
use protocol::nid::{EventNid, KeyNid, RoomNid};
use protocol::room_version::RoomVersion;
use protocol::state::StateMap;
use protocol::state_resolution;
use room::effect::{
    Child, EventSet, Found, Head, Known, Load, Loaded, Place, ReadyEvent, StateAt, StateKey,
    StoredEvent, StoredOutOfBand,
};

use crate::cache::Body;
use crate::driver::{Conn, Error, Result, Row};
use crate::events::{self, Standing, Status};
use crate::names::Wanted;
use crate::rooms::{self, RoomRow};
use crate::{Sequence, Store, auth_above, names, out_of_band, sequence, state_log, states};

/// Answers one question. Only `Intern` is answered with more than a look at one snapshot.
pub async fn load(store: &Store, room: &RoomId, load: Load) -> Result<Loaded> {
    let room = room.clone();
    if let Load::Intern {
        version,
        ids,
        keys,
        new,
    } = load
    {
        return names::number(store, room, version, Wanted { ids, keys, new }).await;
    }
    let own = store.server_name().clone();
    store.read(move |c| answer(c, &room, &load, &own)).await
}

/// Answers several questions, in their order, from one snapshot. `Intern` is not among them.
pub async fn load_all(store: &Store, questions: Vec<(RoomId, Load)>) -> Result<Vec<Loaded>> {
    let own = store.server_name().clone();
    let look = move |c: &mut dyn Conn| {
        let mut rows: BTreeMap<&RoomId, Option<RoomRow>> = BTreeMap::new();
        let mut answers = Vec::with_capacity(questions.len());
        for (room, load) in &questions {
            let row = match rows.get(room) {
                Some(row) => row.clone(),
                None => {
                    let row = rooms::by_id(c, room)?;
                    rows.insert(room, row.clone());
                    row
                }
            };
            answers.push(answer_in(c, row, load, &own)?);
        }
        Ok(answers)
    };
    store.read(look).await
}

/// Answers one question on this snapshot.
pub fn answer(c: &mut dyn Conn, room: &RoomId, load: &Load, own: &ServerName) -> Result<Loaded> {
    let row = rooms::by_id(c, room)?;
    answer_in(c, row, load, own)
}

fn answer_in(
    c: &mut dyn Conn,
    row: Option<RoomRow>,
    load: &Load,
    own: &ServerName,
) -> Result<Loaded> {
    let Some(row) = row else {
        return Ok(nothing(load));
    };
    match load {
        Load::Head => head(c, row),
        Load::Known { ids } => known(c, row.nid, ids).map(Loaded::Known),
        Load::Find { ids } => find(c, row.nid, ids),
        Load::Intern { .. } => Err(Error::Refused(
            "numbers are not all in the database: ask load()".to_owned(),
        )),
        Load::States { events } => states_at(c, row.nid, events),
        Load::StateEvents { state, keys } => state_events(c, row.nid, state, keys),
        Load::Closure { maps, also } => closure(c, row.nid, maps, also),
        Load::Events { events } => set_of(c, row.nid, events.iter().copied()).map(Loaded::Closure),
        Load::ReadyPartial { limit } => ready_partial(c, row.nid, *limit),
        Load::Children { events } => children(c, row.nid, events),
        Load::AuthDependents { events } => auth_dependents(c, row.nid, events),
        Load::OutOfBand { user } => {
            let Some(found) = out_of_band::get(c, row.nid, user)? else {
                return Ok(Loaded::OutOfBand(None));
            };
            let pdu = events::body(c, found.event)?
                .ok_or_else(|| Error::corrupt("an out-of-band membership has no event"))?
                .pdu;
            Ok(Loaded::OutOfBand(Some(Box::new(StoredOutOfBand {
                membership: found.membership,
                nid: found.event,
                pdu,
                via: found.via,
                stripped_state: found.stripped_state,
            }))))
        }
        Load::HandshakeRunning => {
            rooms::handshake_running(c, row.nid).map(Loaded::HandshakeRunning)
        }
        Load::Hosts => {
            let mut hosts = rooms::hosts(c, row.nid)?;
            hosts.retain(|host| host != own);
            Ok(Loaded::Hosts(hosts))
        }
        Load::StateStored => state_log::stored(c, row.nid).map(Loaded::StateStored),
        Load::BackwardExtremities => {
            rooms::backward_extremities(c, row.nid).map(Loaded::BackwardExtremities)
        }
    }
}

/// The answer about a room that has no number.
fn nothing(load: &Load) -> Loaded {
    match load {
        Load::Head => Loaded::Head(None),
        Load::Known { .. } => Loaded::Known(BTreeMap::new()),
        Load::Find { .. } => Loaded::Found(BTreeMap::new()),
        Load::Intern { .. } => Loaded::Interned {
            events: Vec::new(),
            keys: Vec::new(),
        },
        Load::States { .. } => Loaded::States(BTreeMap::new()),
        Load::StateEvents { .. } => Loaded::StateEvents(BTreeMap::new()),
        Load::Closure { .. } | Load::Events { .. } => Loaded::Closure(EventSet::default()),
        Load::ReadyPartial { .. } | Load::AuthDependents { .. } => Loaded::Ready(Vec::new()),
        Load::Children { .. } => Loaded::Children(BTreeMap::new()),
        Load::OutOfBand { .. } => Loaded::OutOfBand(None),
        Load::HandshakeRunning => Loaded::HandshakeRunning(false),
        Load::Hosts => Loaded::Hosts(Vec::new()),
        Load::StateStored => Loaded::StateStored(0),
        Load::BackwardExtremities => Loaded::BackwardExtremities(Vec::new()),
    }
}

fn head(c: &mut dyn Conn, row: RoomRow) -> Result<Loaded> {
    if row.revision == 0 {
        return Ok(Loaded::Head(None));
    }
    let rows = rooms::head(c, row.nid)?;
    let partial = match rows.is_partial {
        true => rooms::partial_marker(c, row.nid)?,
        false => None,
    };
    Ok(Loaded::Head(Some(Box::new(Head {
        version: row.version,
        revision: row.revision,
        partial,
        forward_extremities: rows.forward_extremities,
        state: states::map(c, row.state_root)?,
        local_joined: rows.local_joined,
        min_depth: row.min_depth.unwrap_or(0),
        handshake_running: rows.handshake_running,
    }))))
}

fn known_as(status: &Status) -> Known {
    Known {
        nid: status.nid,
        key: status.key,
        place: status.place,
        rejected: status.standing == Standing::Rejected,
        partial: status.partial,
    }
}

fn known(c: &mut dyn Conn, room: RoomNid, ids: &[EventId]) -> Result<BTreeMap<EventId, Known>> {
    let found = events::statuses_by_id(c, ids)?;
    Ok(found
        .into_iter()
        .filter(|(_, status)| status.room == room && !status.is_forgotten())
        .map(|(id, status)| (id, known_as(&status)))
        .collect())
}

/// Whoever asks for more events than this at once fetches a room, and takes each of them once.
const KEPT_FOUND_MAX: usize = 64;

fn find(c: &mut dyn Conn, room: RoomNid, ids: &[EventId]) -> Result<Loaded> {
    let known = known(c, room, ids)?;
    let nids: Vec<EventNid> = known.values().map(|known| known.nid).collect();
    let pdus = match nids.len() <= KEPT_FOUND_MAX {
        true => events::pdus(c, &nids)?,
        false => events::pdus_once(c, &nids)?,
    };
    let found = known.into_iter().filter_map(|(id, known)| {
        let pdu = pdus.get(&known.nid)?.clone();
        Some((id, Found { known, pdu }))
    });
    Ok(Loaded::Found(found.collect()))
}

// -- A room's row ---------------------------------------------------------------------------------

const INSERT_ROOM: &str =
    "INSERT INTO rooms (nid, room_id, version, revision, state_root, next_key)
    VALUES ($1, $2, $3, 0, 0, 0)";
const SET_VERSION: &str = "UPDATE rooms SET version = $2 WHERE nid = $1";
/// The room's number, given out if it has none yet.
///
/// Of what version a room is says its create event. Until that is here there is only somebody's word for it, a
/// template's or an invite's, and the last one counts: the first may have been a lie.
pub(crate) fn room_row(c: &mut dyn Conn, room: &RoomId, version: RoomVersion) -> Result<RoomNid> {
    if let Some(row) = rooms::by_id(c, room)? {
        if row.revision == 0 && row.version != version {
            c.execute(SET_VERSION, &[&row.nid, &version.as_str()])?;
        }
        return Ok(row.nid);
    }
    let nid = sequence::reserve(c, Sequence::Rooms, 1)?.start;
    c.execute(INSERT_ROOM, &[&nid, room, &version.as_str()])?;
    Ok(RoomNid(nid))
}

// -- States ---------------------------------------------------------------------------------------

pub(crate) const STATES: &str = "SELECT nid, before_root, after_root, partial FROM events
    WHERE room_nid = $1 AND place > 0 AND partial < 2 AND nid IN (SELECT value FROM rarray($2))";

fn states_at(c: &mut dyn Conn, room: RoomNid, asked: &[EventNid]) -> Result<Loaded> {
    let rows = c.query_all(STATES, &[&room, &events::raw(asked)], |row| {
        Ok((row.event_nid(0)?, row.int(1)?, row.int(2)?, row.flag(3)?))
    })?;
    let roots: Vec<i64> = rows
        .iter()
        .flat_map(|(_, before, after, _)| [*before, *after])
        .collect();
    let maps = states::maps(c, &roots)?;
    let found = rows.into_iter().map(|(nid, before, after, partial)| {
        let state = StateAt {
            before: maps[&before].clone(),
            after: maps[&after].clone(),
            partial,
        };
        (nid, state)
    });
    Ok(Loaded::States(found.collect()))
}

fn state_events(
    c: &mut dyn Conn,
    room: RoomNid,
    state: &StateMap,
    keys: &[StateKey],
) -> Result<Loaded> {
    let numbers = states::keys(c, room, keys)?;
    let standing: Vec<(StateKey, EventNid)> = numbers
        .into_iter()
        .filter_map(|(name, key)| Some((name, state.get(key)?)))
        .collect();
    let nids: Vec<EventNid> = standing.iter().map(|(_, nid)| *nid).collect();
    let mut found = BTreeMap::new();
    let bodies = events::bodies(c, &nids)?;
    for (name, nid) in standing {
        let body = bodies
            .get(&nid)
            .ok_or_else(|| Error::Corrupt(format!("state event {} is gone", nid.0)))?;
        found.insert(name, (nid, body.pdu.clone()));
    }
    Ok(Loaded::StateEvents(found))
}

/// The state keys whose events the auth rules may read for these events, with their numbers.
fn rule_keys<'b>(
    c: &mut dyn Conn,
    room: RoomNid,
    bodies: impl IntoIterator<Item = &'b Body>,
) -> Result<BTreeMap<StateKey, KeyNid>> {
    // Read by the rules of every event, and in version 12 named by none.
    let mut wanted = BTreeSet::from([("m.room.create".into(), "".into())]);
    for body in bodies {
        wanted.extend(protocol::auth::auth_types_of(&body.pdu));
        if let Some(state_key) = &body.pdu.state_key {
            wanted.insert((body.pdu.kind.clone(), state_key.clone()));
        }
    }
    let wanted: Vec<StateKey> = wanted.into_iter().collect();
    states::keys(c, room, &wanted)
}

fn closure(
    c: &mut dyn Conn,
    room: RoomNid,
    maps: &[StateMap],
    also: &[EventNid],
) -> Result<Loaded> {
    let differing: BTreeSet<KeyNid> = maps
        .iter()
        .skip(1)
        .flat_map(|map| maps[0].diff(map))
        .map(|(key, _, _)| key)
        .collect();
    let at = |key: &KeyNid| {
        maps.iter()
            .filter_map(|map| map.get(*key))
            .collect::<Vec<_>>()
    };
    let mut wanted: BTreeSet<EventNid> = also.iter().copied().collect();
    wanted.extend(differing.iter().flat_map(at));
    let first: Vec<EventNid> = wanted.iter().copied().collect();
    let bodies = events::bodies(c, &first)?;
    let readable = rule_keys(c, room, bodies.values())?;
    wanted.extend(readable.values().flat_map(at));
    let all = state_log::closure(c, room, wanted)?;
    let mut set = set_of(c, room, all)?;
    if !differing.is_empty() {
        set.shared = shared(c, maps, &differing, &set, also)?;
    }
    Ok(Loaded::Closure(set))
}

/// What of the set is in the auth chain of an entry that all maps agree on, as far as it matters.
fn shared(
    c: &mut dyn Conn,
    maps: &[StateMap],
    differing: &BTreeSet<KeyNid>,
    set: &EventSet,
    also: &[EventNid],
) -> Result<BTreeSet<EventNid>> {
    let agreed = |nid: EventNid, key: KeyNid| {
        !differing.contains(&key) && maps.first().and_then(|map| map.get(key)) == Some(nid)
    };
    let in_question = state_resolution::in_question(maps, set, also);
    auth_above::stood_on(c, &in_question, &agreed)
}

fn set_of(
    c: &mut dyn Conn,
    room: RoomNid,
    wanted: impl IntoIterator<Item = EventNid>,
) -> Result<EventSet> {
    let nids: Vec<EventNid> = wanted.into_iter().collect();
    let statuses = events::statuses(c, &nids)?;
    let bodies = events::bodies(c, &nids)?;
    let keys = rule_keys(c, room, bodies.values())?;
    let stored = bodies.into_iter().map(|(nid, body)| {
        let rejected = statuses
            .get(&nid)
            .is_some_and(|status| status.standing == Standing::Rejected);
        let event = StoredEvent {
            pdu: body.pdu,
            auth_events: body.auth.to_vec(),
            rejected,
        };
        (nid, event)
    });
    Ok(EventSet {
        events: stored.collect(),
        keys,
        shared: BTreeSet::new(),
    })
}

// -- The DAG --------------------------------------------------------------------------------------

const PARTIAL: &str =
    "SELECT nid, prevs FROM events WHERE room_nid = $1 AND partial = 1 ORDER BY position";

fn ready_partial(c: &mut dyn Conn, room: RoomNid, limit: u32) -> Result<Loaded> {
    let rows = c.query_all(PARTIAL, &[&room], |row| {
        Ok((row.event_nid(0)?, read_prevs(row, 1)?))
    })?;
    let chosen = in_order(rows, limit as usize);
    ready(c, room, &chosen).map(Loaded::Ready)
}

fn read_prevs(row: &dyn Row, column: usize) -> Result<Vec<EventNid>> {
    events::unpack(row.opt_blob(column)?.unwrap_or_default())
}

/// The first `limit` events in an order in which those of each event's prev events that are in the list
/// come before it; where that allows a choice, in the order of the list.
fn in_order(events: Vec<(EventNid, Vec<EventNid>)>, limit: usize) -> Vec<EventNid> {
    let places: HashMap<EventNid, usize> = events
        .iter()
        .enumerate()
        .map(|(place, (nid, _))| (*nid, place))
        .collect();
    let mut waits = vec![0_usize; events.len()];
    let mut above: HashMap<usize, Vec<usize>> = HashMap::new();
    for (place, (_, prevs)) in events.iter().enumerate() {
        let inside: BTreeSet<usize> = prevs
            .iter()
            .filter_map(|prev| places.get(prev).copied())
            .collect();
        waits[place] = inside.len();
        for prev in inside {
            above.entry(prev).or_default().push(place);
        }
    }
    let mut free: BTreeSet<usize> = (0..events.len()).filter(|p| waits[*p] == 0).collect();
    let mut chosen = Vec::new();
    while chosen.len() < limit
        && let Some(place) = free.pop_first()
    {
        chosen.push(events[place].0);
        for child in above.remove(&place).unwrap_or_default() {
            waits[child] -= 1;
            if waits[child] == 0 {
                free.insert(child);
            }
        }
    }
    chosen
}

const PREVS: &str = "SELECT nid, prevs FROM events WHERE nid IN (SELECT value FROM rarray($1))";

fn ready(c: &mut dyn Conn, room: RoomNid, chosen: &[EventNid]) -> Result<Vec<ReadyEvent>> {
    let rows = c.query_all(PREVS, &[&events::raw(chosen)], |row| {
        Ok((row.event_nid(0)?, read_prevs(row, 1)?))
    })?;
    let prevs: HashMap<EventNid, Vec<EventNid>> = rows.into_iter().collect();
    let mut named: Vec<EventNid> = prevs.values().flatten().copied().collect();
    named.sort_unstable();
    named.dedup();
    let placed = |status: &Status| status.room == room && status.place != Place::Outlier;
    let mut statuses = events::statuses(c, &named)?;
    statuses.retain(|_, status| placed(status));
    named.retain(|nid| !statuses.contains_key(nid));
    let ids = events::ids(c, &named)?;
    let own = events::statuses(c, chosen)?;
    let bodies = events::bodies(c, chosen)?;
    let mut found = Vec::with_capacity(chosen.len());
    for nid in chosen {
        let (Some(body), Some(status)) = (bodies.get(nid), own.get(nid)) else {
            return Err(Error::Corrupt(format!("event {} is gone", nid.0)));
        };
        let prevs = prevs.get(nid).map(Vec::as_slice).unwrap_or_default();
        let (known, unknown): (Vec<EventNid>, Vec<EventNid>) =
            prevs.iter().partition(|nid| statuses.contains_key(*nid));
        found.push(ReadyEvent {
            nid: *nid,
            pdu: body.pdu.clone(),
            key: body.key,
            rejected: status.standing == Standing::Rejected,
            soft_failed: status.standing == Standing::SoftFailed,
            known_prevs: known,
            unknown_prevs: unknown
                .iter()
                .filter_map(|nid| ids.get(nid).cloned())
                .collect(),
        });
    }
    Ok(found)
}

pub(crate) const CHILDREN: &str = "SELECT h.prev_nid, e.nid, e.verdict FROM event_children h
    JOIN events e ON e.nid = h.event_nid
    WHERE h.prev_nid IN (SELECT value FROM rarray($1)) AND e.room_nid = $2
    AND e.place > 0 AND e.partial < 2
    ORDER BY h.prev_nid, e.position";

fn children(c: &mut dyn Conn, room: RoomNid, asked: &[EventNid]) -> Result<Loaded> {
    let mut found: BTreeMap<EventNid, Vec<Child>> = BTreeMap::new();
    c.query(CHILDREN, &[&events::raw(asked), &room], &mut |row| {
        let standing = events::read_standing(row, 2)?;
        found.entry(row.event_nid(0)?).or_default().push(Child {
            nid: row.event_nid(1)?,
            rejected: standing == Standing::Rejected,
            soft_failed: standing == Standing::SoftFailed,
        });
        Ok(())
    })?;
    Ok(Loaded::Children(found))
}

pub(crate) const DEPENDENTS: &str = "SELECT DISTINCT e.nid, e.position FROM auth_dependents a
    JOIN events e ON e.nid = a.event_nid
    WHERE a.auth_nid IN (SELECT value FROM rarray($1)) AND e.room_nid = $2
    AND e.place > 0 AND e.partial = 0
    ORDER BY e.position";

fn auth_dependents(c: &mut dyn Conn, room: RoomNid, asked: &[EventNid]) -> Result<Loaded> {
    let chosen = c.query_all(DEPENDENTS, &[&events::raw(asked), &room], |row| {
        row.event_nid(0)
    })?;
    ready(c, room, &chosen).map(Loaded::Ready)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(events: &[(i64, &[i64])], limit: usize, expected: &[i64]) {
        let events = events
            .iter()
            .map(|(nid, prevs)| {
                let prevs = prevs.iter().map(|nid| EventNid(*nid)).collect();
                (EventNid(*nid), prevs)
            })
            .collect();
        let found: Vec<i64> = in_order(events, limit).iter().map(|nid| nid.0).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn partial_events_come_after_their_partial_prev_events() {
        check(&[(1, &[]), (2, &[1]), (3, &[2])], 10, &[1, 2, 3]);
        check(&[(3, &[2]), (2, &[1]), (1, &[9])], 10, &[1, 2, 3]);
        check(
            &[(5, &[1, 2]), (1, &[]), (2, &[1]), (4, &[])],
            10,
            &[1, 2, 5, 4],
        );
        // 13001: the unready ones at the front do not use up the limit.
        check(&[(3, &[1]), (4, &[1]), (1, &[])], 1, &[1]);
        check(&[(1, &[1])], 10, &[]);
    }
}
