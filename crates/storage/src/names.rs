//! The numbers of events and state keys.
//!
//! A number that somebody asks for is given out from memory, and its row is written with the first event that bears
//! it, so that it costs no commit of its own. Until then only this process knows of it. Should another one give the
//! same name a number meanwhile, or the same number to another name, the commit that comes second finds the rows of
//! the first, is stale, and whoever made it asks again (docs/decisions/0015-numbers-without-a-commit.md).
//!
//! Once a row is there, a number means for ever what it meant once.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use protocol::id::{EventId, RoomId};
use protocol::nid::{EventNid, KeyNid, RoomNid};
use protocol::room_version::RoomVersion;
use room::effect::{Loaded, StateKey};
use room::write::{NewEvent, WriteSet};

use crate::driver::{Conn, Error, Result};
use crate::{Sequence, Store, events, load, row, states};

/// Whoever asks for more names than this fetches a room. Their rows are written at once: few of these events have a
/// number, and the insert tells which.
pub(crate) const FEW: usize = 64;
/// Names that wait for their rows, some 200 bytes each. Those of events that came to nothing stay until then.
const WAITING_MAX: usize = 50_000;
/// Tries to number a room's names while other processes do so too.
const TRIES_MAX: usize = 5;

/// Names whose numbers have no row so far.
#[derive(Default)]
pub(crate) struct Names(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    events: HashMap<EventId, EventNid>,
    rooms: HashMap<RoomId, Keys>,
    count: usize,
    /// A number may be about that neither waits here nor has a row.
    forgot: bool,
}

#[derive(Default)]
struct Keys {
    /// The next number, unless the room's row knows better.
    next: u32,
    waiting: HashMap<StateKey, KeyNid>,
}

impl Waiting {
    fn make_room(&mut self) {
        if self.count >= WAITING_MAX {
            *self = Self {
                forgot: true,
                ..Self::default()
            };
        }
    }

    fn keys_of(&mut self, room: &RoomId) -> &mut Keys {
        if !self.rooms.contains_key(room) {
            self.count += 1;
            self.rooms.insert(room.clone(), Keys::default());
        }
        self.rooms.get_mut(room).expect("just looked at")
    }
}

/// Names with their numbers, of one room.
#[derive(Clone, Default)]
pub(crate) struct Numbered {
    pub events: BTreeMap<EventId, EventNid>,
    pub keys: BTreeMap<StateKey, KeyNid>,
}

impl Names {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of the names of the events in a write set, those whose rows it has to write or look for.
    pub(crate) fn without_row(&self, writes: &WriteSet) -> Numbered {
        let waiting = self.waiting();
        let of_room = waiting.rooms.get(&writes.room);
        let mut names = Numbered::default();
        let keys_wait = of_room.is_some_and(|keys| !keys.waiting.is_empty());
        if !(waiting.forgot || keys_wait) && waiting.events.is_empty() {
            return names;
        }
        for event in &writes.events {
            let id = &event.pdu.event_id;
            if waiting.forgot || waiting.events.contains_key(id) {
                names.events.insert(id.clone(), event.nid);
            }
            if (waiting.forgot || keys_wait)
                && let Some((key, number)) = key_of(event)
                && (waiting.forgot || of_room.is_some_and(|keys| keys.waiting.contains_key(&key)))
            {
                names.keys.insert(key, number);
            }
        }
        names
    }

    /// The numbers of those of these that wait for their rows.
    pub(crate) fn of_events(&self, ids: &[EventId]) -> HashMap<EventId, EventNid> {
        let waiting = self.waiting();
        let given = ids
            .iter()
            .filter_map(|id| Some((id.clone(), *waiting.events.get(id)?)));
        given.collect()
    }

    /// Their rows are there. A name that waits with another number goes on waiting: whoever holds that is to find
    /// out when it commits.
    pub(crate) fn written(&self, room: &RoomId, names: &Numbered) {
        let mut waiting = self.waiting();
        let mut gone = 0;
        for (id, nid) in &names.events {
            if waiting.events.get(id) == Some(nid) {
                waiting.events.remove(id);
                gone += 1;
            }
        }
        if let Some(keys) = waiting.rooms.get_mut(room) {
            for (key, number) in &names.keys {
                if keys.waiting.get(key) == Some(number) {
                    keys.waiting.remove(key);
                    gone += 1;
                }
            }
        }
        waiting.count = waiting.count.saturating_sub(gone);
    }

    /// Somebody else has these names, or their numbers. What others here took from this will be found wrong too.
    pub(crate) fn lost(&self, room: &RoomId, names: &Numbered) {
        self.written(room, names);
        let mut waiting = self.waiting();
        if let Some(keys) = waiting.rooms.remove(room) {
            waiting.count = waiting.count.saturating_sub(1 + keys.waiting.len());
        }
        waiting.forgot = true;
    }
}

/// The state key of an event, with its number.
pub(crate) fn key_of(event: &NewEvent) -> Option<(StateKey, KeyNid)> {
    let state_key = event.pdu.state_key.clone()?;
    Some(((event.pdu.kind.clone(), state_key), event.key?))
}

/// What the database knows of some names.
struct Seen {
    room: Option<RoomNid>,
    next_key: u32,
    events: HashMap<EventId, EventNid>,
    keys: BTreeMap<StateKey, KeyNid>,
}

const NEXT_KEY: &str = "SELECT nid, next_key FROM rooms WHERE room_id = $1";

fn see(
    c: &mut dyn Conn,
    room: &RoomId,
    ids: Option<&[EventId]>,
    keys: &[StateKey],
) -> Result<Seen> {
    let row = c.query_opt(NEXT_KEY, &[room], |row| {
        let next = u32::try_from(row.int(1)?);
        Ok((row.room_nid(0)?, next.map_err(|_| too_many_keys())?))
    })?;
    Ok(Seen {
        room: row.map(|(nid, _)| nid),
        next_key: row.map_or(0, |(_, next)| next),
        events: match ids {
            Some(ids) => events::nids(c, ids)?,
            None => HashMap::new(),
        },
        keys: match row {
            Some((nid, _)) => states::keys(c, nid, keys)?,
            None => BTreeMap::new(),
        },
    })
}

fn too_many_keys() -> Error {
    Error::corrupt("a room has more state keys than numbers")
}

/// What is known of these names without a look into the database, if that is enough to number them.
fn remembered(store: &Store, room: &RoomId, wanted: &Wanted) -> Option<Seen> {
    let caches = &store.inner.caches;
    let nid = caches.rooms.get(room)?;
    let waiting = store.inner.names.waiting();
    let of_room = waiting.rooms.get(room);
    let key = |name: &StateKey| {
        let waits = of_room.and_then(|keys| keys.waiting.get(name).copied());
        let number = waits.or_else(|| caches.keys.get(&(nid, name.clone())));
        number.map(|number| (name.clone(), number))
    };
    let keys = wanted.keys.iter().map(key).collect::<Option<_>>()?;
    let mut events = HashMap::new();
    for id in &wanted.ids {
        let known = waiting.events.get(id).copied();
        match known.or_else(|| caches.ids.get(id)) {
            Some(number) => drop(events.insert(id.clone(), number)),
            None if wanted.new => {}
            None => return None,
        }
    }
    Some(Seen {
        room: Some(nid),
        next_key: 0,
        events,
        keys,
    })
}

/// What is to be numbered.
pub(crate) struct Wanted {
    pub ids: Vec<EventId>,
    pub keys: Vec<StateKey>,
    /// Whoever asks has just made these events. Should one have a number all the same, the commit that stores it is
    /// stale.
    pub new: bool,
}

/// Numbers for these, in their order; those that have none get one.
pub(crate) async fn number(
    store: &Store,
    room: RoomId,
    version: RoomVersion,
    wanted: Wanted,
) -> Result<Loaded> {
    let few = wanted.ids.len() <= FEW && wanted.keys.len() <= FEW;
    let mut at_hand = match few {
        true => remembered(store, &room, &wanted),
        false => None,
    };
    let Wanted { ids, keys, .. } = wanted;
    for _ in 0..TRIES_MAX {
        let (asked_room, asked_keys) = (room.clone(), keys.clone());
        let asked_ids = few.then(|| ids.clone());
        let look = move |c: &mut dyn Conn| see(c, &asked_room, asked_ids.as_deref(), &asked_keys);
        let seen = match at_hand.take() {
            Some(seen) => seen,
            None => store.read(look).await?,
        };
        if let Some(nid) = seen.room {
            store.inner.caches.rooms.insert(room.clone(), nid);
        }
        let numbered = match few {
            true => give(store, &room, seen, &ids, &keys).await?,
            false => give_and_write(store, &room, version, seen, &ids, &keys).await?,
        };
        if let Some((events, keys)) = numbered {
            return Ok(Loaded::Interned { events, keys });
        }
    }
    Err(Error::Conflict(format!(
        "others number what is in {room} too"
    )))
}

type InOrder = (Vec<EventNid>, Vec<KeyNid>);

fn in_order(
    ids: &[EventId],
    keys: &[StateKey],
    event: impl Fn(&EventId) -> Option<EventNid>,
    key: impl Fn(&StateKey) -> Option<KeyNid>,
) -> Option<InOrder> {
    let events = ids.iter().map(event).collect::<Option<_>>()?;
    let keys = keys.iter().map(key).collect::<Option<_>>()?;
    Some((events, keys))
}

/// From memory alone. `None` when one was written while this looked elsewhere.
async fn give(
    store: &Store,
    room: &RoomId,
    seen: Seen,
    ids: &[EventId],
    keys: &[StateKey],
) -> Result<Option<InOrder>> {
    let (names, caches) = (&store.inner.names, &store.inner.caches);
    let lacking = {
        let waiting = names.waiting();
        let known =
            |id: &&EventId| seen.events.contains_key(*id) || waiting.events.contains_key(*id);
        ids.iter().filter(|id| !known(id)).count()
    };
    let mut free = store.numbers(Sequence::Events, lacking).await?;
    let mut waiting = names.waiting();
    waiting.make_room();
    let mut events = Vec::with_capacity(ids.len());
    for id in ids {
        let known = seen.events.get(id).copied();
        let known = known.or_else(|| waiting.events.get(id).copied());
        // Written since it was looked for.
        let known = known.or_else(|| caches.ids.get(id));
        if let Some(nid) = known {
            events.push(nid);
            continue;
        }
        let Some(number) = free.next() else {
            return Ok(None);
        };
        waiting.events.insert(id.clone(), EventNid(number));
        waiting.count += 1;
        events.push(EventNid(number));
    }
    let mut new = 0;
    let of_room = waiting.keys_of(room);
    of_room.next = of_room.next.max(seen.next_key);
    let mut numbers = Vec::with_capacity(keys.len());
    for key in keys {
        let known = seen.keys.get(key).copied();
        let known = known.or_else(|| of_room.waiting.get(key).copied());
        let written = || caches.keys.get(&(seen.room?, key.clone()));
        numbers.push(match known.or_else(written) {
            Some(number) => number,
            None => {
                let number = KeyNid(of_room.next);
                of_room.next = of_room.next.checked_add(1).ok_or_else(too_many_keys)?;
                of_room.waiting.insert(key.clone(), number);
                new += 1;
                number
            }
        });
    }
    waiting.count += new;
    Ok(Some((events, numbers)))
}

/// With their rows at once. `None` when another process was at it too.
async fn give_and_write(
    store: &Store,
    room: &RoomId,
    version: RoomVersion,
    seen: Seen,
    ids: &[EventId],
    keys: &[StateKey],
) -> Result<Option<InOrder>> {
    let (names, caches) = (&store.inner.names, &store.inner.caches);
    let wanted: BTreeSet<&EventId> = ids.iter().collect();
    let mut free = store.numbers(Sequence::Events, wanted.len()).await?;
    let mut new = Numbered::default();
    {
        let mut waiting = names.waiting();
        waiting.make_room();
        for id in wanted {
            let number = match waiting.events.get(id).copied() {
                Some(nid) => nid,
                None => EventNid(free.next().expect("as many as ids")),
            };
            new.events.insert(id.clone(), number);
        }
        let of_room = waiting.keys_of(room);
        of_room.next = of_room.next.max(seen.next_key);
        for key in keys {
            if seen.keys.contains_key(key) || new.keys.contains_key(key) {
                continue;
            }
            let number = match of_room.waiting.get(key) {
                Some(number) => *number,
                None => {
                    let number = KeyNid(of_room.next);
                    of_room.next = of_room.next.checked_add(1).ok_or_else(too_many_keys)?;
                    number
                }
            };
            new.keys.insert(key.clone(), number);
        }
    }
    let (named, new) = (room.clone(), Arc::new(new));
    let written = Arc::clone(&new);
    let others = store
        .write(move |c| {
            let row = load::room_row(c, &named, version)?;
            write(c, row, &written)
        })
        .await?;
    if others.keys_differ {
        names.lost(room, &new);
        return Ok(None);
    }
    let mut new = Arc::unwrap_or_clone(new);
    new.events.extend(others.events);
    names.written(room, &new);
    for (id, nid) in &new.events {
        caches.ids.insert(id.clone(), *nid);
    }
    let event = |id: &EventId| new.events.get(id).copied();
    let key = |key: &StateKey| seen.keys.get(key).or_else(|| new.keys.get(key)).copied();
    Ok(in_order(ids, keys, event, key))
}

/// What was found instead of the rows that were to be written.
#[derive(Default)]
pub(crate) struct Others {
    /// The numbers that these have.
    pub events: HashMap<EventId, EventNid>,
    /// A key has another number, or its number is another key's.
    pub keys_differ: bool,
}

const INSERT_ID: &str =
    "INSERT INTO event_ids (nid, event_id) VALUES ($1, $2) ON CONFLICT (event_id) DO NOTHING";
const INSERT_KEY: &str = "INSERT INTO state_keys (room_nid, key_nid, kind, state_key)
    VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING";
const RAISE_NEXT: &str = "UPDATE rooms SET next_key = $2 WHERE nid = $1 AND next_key < $2";

/// Writes their rows, where there are none.
pub(crate) fn write(c: &mut dyn Conn, room: RoomNid, names: &Numbered) -> Result<Others> {
    let mut others = Others::default();
    // In the order of the indexes, which are gone through once.
    let rows: Vec<_> = names
        .events
        .iter()
        .map(|(id, nid)| row![*nid, id])
        .collect();
    if !rows.is_empty() && c.execute_many(INSERT_ID, &rows)? < rows.len() as u64 {
        let ids: Vec<EventId> = names.events.keys().cloned().collect();
        others.events = events::nids(c, &ids)?;
        others.events.retain(|id, nid| names.events[id] != *nid);
    }
    let rows: Vec<_> = names
        .keys
        .iter()
        .map(|((kind, state_key), number)| row![room, *number, kind, state_key])
        .collect();
    let Some(last) = names.keys.values().max() else {
        return Ok(others);
    };
    if c.execute_many(INSERT_KEY, &rows)? < rows.len() as u64 {
        let keys: Vec<StateKey> = names.keys.keys().cloned().collect();
        others.keys_differ = states::keys(c, room, &keys)? != names.keys;
    }
    c.later(RAISE_NEXT, &[row![room, i64::from(last.0) + 1]])?;
    Ok(others)
}
