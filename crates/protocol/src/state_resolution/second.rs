//! Versions 2 and 2.1: by power.
//!
//! <https://spec.matrix.org/v1.18/rooms/v2/#state-resolution>,
//! <https://spec.matrix.org/v1.18/rooms/v12/#state-resolution>

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use super::{Draft, difference_of_disputed, shared_in_set};
use crate::auth_chain::subgraph;
use crate::event_set::{EventSet, StoredEvent};
use crate::id::EventId;
use crate::nid::{EventNid, KeyNid};
use crate::pdu::Pdu;
use crate::power::Level;
use crate::room_version::RoomVersion;
use crate::state::StateMap;

/// `from_nothing` is what makes 2.1 of 2.
pub(super) fn resolve(
    version: RoomVersion,
    maps: &[StateMap],
    disputed: BTreeMap<KeyNid, BTreeSet<EventNid>>,
    set: &EventSet,
    from_nothing: bool,
) -> StateMap {
    let mut undisputed = maps.first().cloned().unwrap_or_default();
    for key in disputed.keys() {
        undisputed.remove(*key);
    }
    let mut conflicted = difference_of_disputed(maps, &disputed, set);
    let shared = shared_in_set(maps, &disputed, set);
    conflicted.retain(|event| !shared.contains(event));
    let ends: BTreeSet<_> = disputed.into_values().flatten().collect();
    if from_nothing {
        conflicted.extend(subgraph(&ends, &|event| set.auth_events(event)));
    }
    conflicted.extend(ends);
    let is_state = |stored: &StoredEvent| stored.pdu.is_state();
    conflicted.retain(|event| set.events.get(event).is_some_and(is_state));

    let base = match from_nothing {
        true => StateMap::new(),
        false => undisputed.clone(),
    };
    let mut draft = Draft::new(version, set, base);
    let graph = power_graph(&conflicted, set);
    for event in power_order(&mut draft, &graph) {
        place_if_allowed(&mut draft, event);
    }
    let power_levels = draft.get("m.room.power_levels", "");
    let rest = conflicted.iter().filter(|event| !graph.contains_key(event));
    for event in mainline_order(set, power_levels, rest) {
        place_if_allowed(&mut draft, event);
    }
    draft.finish(undisputed)
}

/// One step of the iterative auth checks.
fn place_if_allowed(draft: &mut Draft<'_>, event: EventNid) {
    let set = draft.set;
    let Some(stored) = set.events.get(&event) else {
        return;
    };
    let mut own: BTreeMap<(&str, &str), &Pdu> = BTreeMap::new();
    for auth in set.auth_events(event) {
        if let Some(auth) = set.events.get(auth)
            && !auth.rejected
            && let Some(state_key) = &auth.pdu.state_key
        {
            own.insert((&auth.pdu.kind, state_key), &auth.pdu);
        }
    }
    if let Some(create) = draft.create {
        own.insert(("m.room.create", ""), &create.pdu);
    }
    if draft.allows(stored, &own) {
        draft.place(event, &stored.pdu);
    }
}

/// An event that may take away somebody's ability to do something.
fn is_power_event(pdu: &Pdu) -> bool {
    match &*pdu.kind {
        "m.room.power_levels" | "m.room.join_rules" => pdu.state_key.as_deref() == Some(""),
        "m.room.member" => {
            matches!(pdu.membership(), Some("leave" | "ban"))
                && pdu.state_key.as_deref() != Some(pdu.sender.as_str())
        }
        _ => false,
    }
}

/// The conflicted power events and what of their auth chains is conflicted, with the edges between.
///
/// As other servers do it, the chains are followed through conflicted events only: one below an event
/// that all states share is not drawn in.
fn power_graph(
    conflicted: &BTreeSet<EventNid>,
    set: &EventSet,
) -> BTreeMap<EventNid, BTreeSet<EventNid>> {
    let mut graph = BTreeMap::new();
    let mut left: Vec<EventNid> = conflicted
        .iter()
        .copied()
        .filter(|event| is_power_event(&set.events[event].pdu))
        .collect();
    while let Some(event) = left.pop() {
        if graph.contains_key(&event) {
            continue;
        }
        let below = set.auth_events(event).iter().copied();
        let below: BTreeSet<_> = below.filter(|event| conflicted.contains(event)).collect();
        left.extend(&below);
        graph.insert(event, below);
    }
    graph
}

/// Reverse topological power ordering: Kahn's algorithm, the most powerful sender first.
fn power_order(
    draft: &mut Draft<'_>,
    graph: &BTreeMap<EventNid, BTreeSet<EventNid>>,
) -> Vec<EventNid> {
    type Rank<'a> = (Reverse<Level>, i64, &'a EventId, EventNid);
    let mut ranks: BTreeMap<EventNid, Rank<'_>> = BTreeMap::new();
    let mut dependents: BTreeMap<EventNid, Vec<EventNid>> = BTreeMap::new();
    let mut waits: BTreeMap<EventNid, usize> = BTreeMap::new();
    for (&event, below) in graph {
        let stored = &draft.set.events[&event];
        let level = sender_level(draft, stored);
        let pdu = &stored.pdu;
        ranks.insert(
            event,
            (Reverse(level), pdu.origin_server_ts, &pdu.event_id, event),
        );
        waits.insert(event, below.len());
        for below in below {
            dependents.entry(*below).or_default().push(event);
        }
    }
    let mut ready: BTreeSet<Rank<'_>> = ranks
        .iter()
        .filter(|(event, _)| waits[event] == 0)
        .map(|(_, rank)| *rank)
        .collect();
    let mut order = Vec::with_capacity(graph.len());
    while let Some((_, _, _, event)) = ready.pop_first() {
        order.push(event);
        for above in dependents.get(&event).into_iter().flatten() {
            let waits = waits.entry(*above).or_default();
            *waits = waits.saturating_sub(1);
            if *waits == 0 {
                ready.insert(ranks[above]);
            }
        }
    }
    order
}

/// By the event's own auth events.
fn sender_level(draft: &mut Draft<'_>, stored: &StoredEvent) -> Level {
    let set = draft.set;
    let find = |kind: &str| {
        stored
            .auth_events
            .iter()
            .filter_map(|event| set.events.get(event))
            .find(|event| event.pdu.is(kind, ""))
    };
    let create = draft.create.or_else(|| find("m.room.create"));
    let power_levels = find("m.room.power_levels");
    draft
        .cache
        .power(
            draft.version,
            create.map(|event| &*event.pdu),
            power_levels.map(|event| &*event.pdu),
        )
        .user(&stored.pdu.sender)
}

/// Mainline ordering: what stands on the oldest power levels first.
fn mainline_order<'e>(
    set: &EventSet,
    power_levels: Option<EventNid>,
    events: impl Iterator<Item = &'e EventNid>,
) -> Vec<EventNid> {
    let below = |event: EventNid| {
        let is_power_levels = |event: &&EventNid| {
            let stored = set.events.get(event);
            stored.is_some_and(|stored| stored.pdu.is("m.room.power_levels", ""))
        };
        set.auth_events(event).iter().find(is_power_levels).copied()
    };
    // How far down the mainline an event is reached; `None` beyond its end.
    let mut positions: BTreeMap<EventNid, Option<usize>> = BTreeMap::new();
    let mut next = power_levels;
    while let Some(event) = next {
        let position = positions.len();
        if positions.insert(event, Some(position)).is_some() {
            break;
        }
        next = below(event);
    }
    let mut position = |event: EventNid| {
        let mut path = Vec::new();
        let mut next = below(event);
        let found = loop {
            let Some(event) = next else { break None };
            if let Some(known) = positions.get(&event) {
                break *known;
            }
            // Holds the place while the walk goes on, so that a circle ends.
            positions.insert(event, None);
            path.push(event);
            next = below(event);
        };
        for event in path {
            positions.insert(event, found);
        }
        found
    };
    let mut order: Vec<_> = events
        .map(|&event| {
            let pdu = &set.events[&event].pdu;
            let position = position(event).unwrap_or(usize::MAX);
            let rank = (Reverse(position), pdu.origin_server_ts, &pdu.event_id);
            (rank, event)
        })
        .collect();
    order.sort();
    order.into_iter().map(|(_, event)| event).collect()
}
