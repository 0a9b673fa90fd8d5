//! Version 1: by depth.
//!
//! <https://spec.matrix.org/v1.18/rooms/v1/#state-resolution>

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use sha1::{Digest as _, Sha1};

use super::Draft;
use crate::event_set::{EventSet, StoredEvent};
use crate::nid::{EventNid, KeyNid};
use crate::room_version::RoomVersion;
use crate::state::StateMap;

/// The keys of one kind are settled each for itself, against what the kinds before have come to.
pub(super) fn resolve(
    version: RoomVersion,
    first: &StateMap,
    disputed: &BTreeMap<KeyNid, BTreeSet<EventNid>>,
    set: &EventSet,
) -> StateMap {
    let mut undisputed = first.clone();
    let mut passes: [Vec<Vec<(EventNid, &StoredEvent)>>; 4] = Default::default();
    for (key, events) in disputed {
        undisputed.remove(*key);
        // Here a key that some states lack is no conflict.
        if let (1, Some(only)) = (events.len(), events.first()) {
            undisputed.insert(*key, *only);
            continue;
        }
        let mut events: Vec<_> = events
            .iter()
            .filter_map(|event| Some((*event, set.events.get(event)?)))
            .collect();
        events.sort_by_cached_key(|(_, event)| by_depth(event));
        let Some((_, event)) = events.first() else {
            continue;
        };
        let pass = match &*event.pdu.kind {
            "m.room.power_levels" if event.pdu.is("m.room.power_levels", "") => 0,
            "m.room.join_rules" => 1,
            "m.room.member" => 2,
            _ => 3,
        };
        passes[pass].push(events);
    }
    let [power_levels, join_rules, members, others] = passes;
    let mut draft = Draft::new(version, set, undisputed.clone());
    for pass in [power_levels, join_rules, members] {
        let settled: Vec<_> = pass
            .iter()
            .filter_map(|events| last_allowed(&mut draft, events))
            .collect();
        for (event, stored) in settled {
            draft.place(event, &stored.pdu);
        }
    }
    let settled: Vec<_> = others
        .iter()
        .filter_map(|events| deepest_allowed(&mut draft, events))
        .collect();
    for (event, stored) in settled {
        draft.place(event, &stored.pdu);
    }
    draft.finish(undisputed)
}

/// Ascending depth, then descending hash.
fn by_depth(event: &StoredEvent) -> (i64, Reverse<[u8; 20]>) {
    let hash = Sha1::digest(event.pdu.event_id.as_str().as_bytes());
    (event.pdu.depth, Reverse(hash.into()))
}

/// Up the list while each is allowed upon the one before.
fn last_allowed<'e>(
    draft: &mut Draft<'_>,
    events: &[(EventNid, &'e StoredEvent)],
) -> Option<(EventNid, &'e StoredEvent)> {
    let before = draft.placed.clone();
    let (&first, rest) = events.split_first()?;
    let mut last = first;
    for &(event, stored) in rest {
        draft.place(last.0, &last.1.pdu);
        if !draft.allows(stored, &BTreeMap::new()) {
            break;
        }
        last = (event, stored);
    }
    draft.placed = before;
    Some(last)
}

/// Down the list to the first that is allowed. Where none is, the printed rules choose nothing; like the
/// servers that have such rooms we keep the least deep.
fn deepest_allowed<'e>(
    draft: &mut Draft<'_>,
    events: &[(EventNid, &'e StoredEvent)],
) -> Option<(EventNid, &'e StoredEvent)> {
    events
        .iter()
        .rev()
        .find(|(_, stored)| draft.allows(stored, &BTreeMap::new()))
        .or(events.first())
        .copied()
}
