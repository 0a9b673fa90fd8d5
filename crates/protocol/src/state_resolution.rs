//! State resolution: the one state that several states come to.
//!
//! Everything here costs what the states disagree on: entries that all maps share are looked up one by
//! one where a rule asks for them, and never walked over.
//!
//! <https://spec.matrix.org/v1.18/rooms/v12/#state-resolution>

mod first;
mod second;

use std::collections::{BTreeMap, BTreeSet};

use crate::auth::{self, Cache};
use crate::auth_chain::{auth_chain, auth_difference};
use crate::event_set::{EventSet, StateKey, StoredEvent};
use crate::nid::{EventNid, KeyNid};
use crate::pdu::Pdu;
use crate::room_version::{RoomVersion, StateResolution};
use crate::state::StateMap;

/// The state that the maps resolve to, by the algorithm of the room version (V-18).
///
/// `set` holds the events of every key on which the maps differ; what stands in the maps at the keys that
/// the rules of those events may read, the create event among them; and the whole auth chains of all
/// these. It numbers the keys of all its events, and `shared` is right for all that is [`in_question`]. With
/// less than that the answer is a state all the same, though perhaps not the one other servers get.
pub fn resolve(version: RoomVersion, maps: &[StateMap], set: &EventSet) -> StateMap {
    let Some(first) = maps.first() else {
        return StateMap::new();
    };
    let disputed = disputed(maps);
    if disputed.is_empty() {
        return first.clone();
    }
    match version.rules().state_resolution {
        StateResolution::V1 => first::resolve(version, first, &disputed, set),
        StateResolution::V2 => second::resolve(version, maps, disputed, set, false),
        StateResolution::V2_1 => second::resolve(version, maps, disputed, set, true),
    }
}

/// A map of these entries, such as the auth events of one event for P-11.
pub fn state_from_events(entries: &[(KeyNid, EventNid)]) -> StateMap {
    entries.iter().copied().collect()
}

/// The events for which it matters whether they are in the set's `shared`: those in the auth chains of some
/// of the disputed entries that are not in those of all maps and not, as far as the set shows, in that of
/// an entry that all maps agree on. What stands disputed in a map is conflicted anyway. Where the maps hold events that the set has not got, `also` names what
/// those stand on.
pub fn in_question(maps: &[StateMap], set: &EventSet, also: &[EventNid]) -> BTreeSet<EventNid> {
    let disputed = disputed(maps);
    let mut found = difference_of_disputed(maps, &disputed, set);
    found.extend(also);
    found.extend(auth_chain(also.iter().copied(), &|event| {
        set.auth_events(event)
    }));
    if !found.is_empty() {
        let shared = shared_in_set(maps, &disputed, set);
        let ends: BTreeSet<_> = disputed.into_values().flatten().collect();
        found.retain(|event| !shared.contains(event) && !ends.contains(event));
    }
    found
}

/// The keys on which the maps differ, with the events that stand there in some of them.
fn disputed(maps: &[StateMap]) -> BTreeMap<KeyNid, BTreeSet<EventNid>> {
    let mut disputed: BTreeMap<KeyNid, BTreeSet<EventNid>> = BTreeMap::new();
    if let Some((first, others)) = maps.split_first() {
        for other in others {
            for (key, a, b) in first.diff(other) {
                let events = disputed.entry(key).or_default();
                events.extend(a.into_iter().chain(b));
            }
        }
    }
    disputed
}

/// What is in the auth chains of the disputed entries of some maps, and not of all.
fn difference_of_disputed(
    maps: &[StateMap],
    disputed: &BTreeMap<KeyNid, BTreeSet<EventNid>>,
    set: &EventSet,
) -> BTreeSet<EventNid> {
    let chains: Vec<_> = maps
        .iter()
        .map(|map| {
            let events = disputed.keys().filter_map(|key| map.get(*key));
            auth_chain(events, &|event| set.auth_events(event))
        })
        .collect();
    auth_difference(&chains)
}

/// What the set itself shows to be in the auth chain of an entry on which all maps agree, with what it
/// was told.
fn shared_in_set(
    maps: &[StateMap],
    disputed: &BTreeMap<KeyNid, BTreeSet<EventNid>>,
    set: &EventSet,
) -> BTreeSet<EventNid> {
    let agreed = set.events.keys().copied().filter(|&event| {
        set.key_of(event).is_some_and(|key| {
            !disputed.contains_key(&key) && maps.first().and_then(|map| map.get(key)) == Some(event)
        })
    });
    let mut shared = auth_chain(agreed, &|event| set.auth_events(event));
    shared.extend(&set.shared);
    shared
}

/// A state in the making: what has been placed, on top of what is not disputed.
struct Draft<'a> {
    version: RoomVersion,
    set: &'a EventSet,
    /// The create event of a version that names none in `auth_events`.
    create: Option<&'a StoredEvent>,
    base: StateMap,
    placed: BTreeMap<StateKey, EventNid>,
    cache: Cache,
}

impl<'a> Draft<'a> {
    fn new(version: RoomVersion, set: &'a EventSet, base: StateMap) -> Self {
        let implied = !version.rules().create_in_auth_events;
        let is_create = |event: &&StoredEvent| event.pdu.is("m.room.create", "");
        Self {
            version,
            set,
            create: implied
                .then(|| set.events.values().find(is_create))
                .flatten(),
            base,
            placed: BTreeMap::new(),
            cache: Cache::default(),
        }
    }

    fn get(&self, kind: &str, state_key: &str) -> Option<EventNid> {
        let key = (kind.into(), state_key.into());
        match self.placed.get(&key) {
            Some(event) => Some(*event),
            None => self.base.get(*self.set.keys.get(&key)?),
        }
    }

    fn place(&mut self, event: EventNid, pdu: &Pdu) {
        if let Some(state_key) = &pdu.state_key {
            self.placed
                .insert((pdu.kind.clone(), state_key.clone()), event);
        }
    }

    /// Whether the rules allow the event on top of the draft. What the draft lacks, or has from a rejected
    /// event, is taken from `own`.
    fn allows(&mut self, stored: &StoredEvent, own: &BTreeMap<(&str, &str), &'a Pdu>) -> bool {
        let mut cache = std::mem::take(&mut self.cache);
        let get = |kind: &str, state_key: &str| -> Option<&'a Pdu> {
            self.get(kind, state_key)
                .and_then(|event| self.set.events.get(&event))
                .filter(|stored| !stored.rejected)
                .map(|stored| &*stored.pdu)
                .or_else(|| own.get(&(kind, state_key)).copied())
        };
        let allowed = auth::check_rules(&mut cache, self.version, &stored.pdu, &get).is_ok();
        self.cache = cache;
        allowed
    }

    /// The undisputed entries with what was placed at the other keys.
    fn finish(self, undisputed: StateMap) -> StateMap {
        let mut state = undisputed.clone();
        for (key, event) in self.placed {
            // A key without a number is in no map and can be put in none.
            if let Some(key) = self.set.keys.get(&key)
                && undisputed.get(*key).is_none()
            {
                state.insert(*key, event);
            }
        }
        state
    }
}
