//! Batches of events as a graph: in which order to take them, and where the batch ends.

use std::collections::{BTreeMap, BTreeSet};

use crate::id::EventId;
use crate::pdu::Pdu;
use crate::room_version::RoomVersion;

/// An order in which every event comes after those of the batch that it names in `prev_events` or
/// `auth_events` (J-62, P-17). Where that leaves a choice, the order given stands.
///
/// Events on a circle, which opaque ids make possible, and those upon it are left out; so is the second
/// of two events with one id.
pub fn topological_order<'a>(batch: impl IntoIterator<Item = &'a Pdu>) -> Vec<usize> {
    let batch: Vec<&Pdu> = batch.into_iter().collect();
    let mut places: BTreeMap<&EventId, usize> = BTreeMap::new();
    for (place, pdu) in batch.iter().enumerate() {
        places.entry(&pdu.event_id).or_insert(place);
    }
    let mut dependents: Vec<Vec<usize>> = vec![Vec::new(); batch.len()];
    let mut waits: Vec<usize> = vec![0; batch.len()];
    for &place in places.values() {
        let pdu = batch[place];
        let below: BTreeSet<usize> = pdu
            .prev_events
            .iter()
            .chain(&pdu.auth_events)
            .filter_map(|id| places.get(id).copied())
            .collect();
        waits[place] = below.len();
        for below in below {
            dependents[below].push(place);
        }
    }
    let mut ready: BTreeSet<usize> = places
        .values()
        .copied()
        .filter(|&place| waits[place] == 0)
        .collect();
    let mut order = Vec::with_capacity(places.len());
    while let Some(place) = ready.pop_first() {
        order.push(place);
        for &above in &dependents[place] {
            waits[above] -= 1;
            if waits[above] == 0 {
                ready.insert(above);
            }
        }
    }
    order
}

/// The events that no other of the batch has as a prev event, in the order given.
pub fn forward_extremities<'a>(batch: impl IntoIterator<Item = &'a Pdu>) -> Vec<&'a EventId> {
    let batch: Vec<&Pdu> = batch.into_iter().collect();
    let named: BTreeSet<&EventId> = batch.iter().flat_map(|pdu| &pdu.prev_events).collect();
    batch
        .into_iter()
        .map(|pdu| &pdu.event_id)
        .filter(|id| !named.contains(id))
        .collect()
}

/// The prev events that the batch has not got, each once, in the order in which they are first named.
pub fn backward_extremities<'a>(batch: impl IntoIterator<Item = &'a Pdu>) -> Vec<&'a EventId> {
    let batch: Vec<&Pdu> = batch.into_iter().collect();
    let mut seen: BTreeSet<&EventId> = batch.iter().map(|pdu| &pdu.event_id).collect();
    batch
        .into_iter()
        .flat_map(|pdu| &pdu.prev_events)
        .filter(|id| seen.insert(id))
        .collect()
}

/// The depth of an event upon events of these depths: one more than the deepest, as far as the version
/// lets it grow.
pub fn depth_upon(version: RoomVersion, prev_depths: impl IntoIterator<Item = i64>) -> i64 {
    let deepest = prev_depths.into_iter().max().unwrap_or(0);
    deepest
        .saturating_add(1)
        .clamp(1, version.rules().depth_max)
}
