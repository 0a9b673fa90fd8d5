//! Auth chains: what an event stands on, all the way down.
//!
//! <https://spec.matrix.org/v1.18/rooms/v2/#definitions>

use std::collections::{BTreeMap, BTreeSet};

use crate::event_set::EventSet;
use crate::nid::EventNid;

/// Everything that can be reached from these events along `auth_events`. The events themselves are in it
/// only where another of them stands on them.
pub fn auth_chain<'a>(
    events: impl IntoIterator<Item = EventNid>,
    auth_events: &dyn Fn(EventNid) -> &'a [EventNid],
) -> BTreeSet<EventNid> {
    let mut chain = BTreeSet::new();
    let mut left: Vec<_> = events.into_iter().collect();
    while let Some(event) = left.pop() {
        for &below in auth_events(event) {
            if chain.insert(below) {
                left.push(below);
            }
        }
    }
    chain
}

/// What is in some of the chains, though not in all.
pub fn auth_difference(chains: &[BTreeSet<EventNid>]) -> BTreeSet<EventNid> {
    let mut times: BTreeMap<EventNid, usize> = BTreeMap::new();
    for event in chains.iter().flatten() {
        *times.entry(*event).or_default() += 1;
    }
    times
        .into_iter()
        .filter(|(_, times)| *times < chains.len())
        .map(|(event, _)| event)
        .collect()
}

/// The events on all paths along `auth_events` that begin and end in `ends`, with the ends.
pub fn subgraph<'a>(
    ends: &BTreeSet<EventNid>,
    auth_events: &dyn Fn(EventNid) -> &'a [EventNid],
) -> BTreeSet<EventNid> {
    let mut below_some = auth_chain(ends.iter().copied(), auth_events);
    below_some.extend(ends);
    let mut dependents: BTreeMap<EventNid, Vec<EventNid>> = BTreeMap::new();
    for &event in &below_some {
        for &below in auth_events(event) {
            dependents.entry(below).or_default().push(event);
        }
    }
    // Upwards from the ends, never leaving what is below some of them.
    let mut found = ends.clone();
    let mut left: Vec<_> = ends.iter().copied().collect();
    while let Some(event) = left.pop() {
        for &above in dependents.get(&event).into_iter().flatten() {
            if found.insert(above) {
                left.push(above);
            }
        }
    }
    found
}

impl EventSet {
    /// The auth events of one event; none when the set has not got it.
    pub fn auth_events(&self, event: EventNid) -> &[EventNid] {
        self.events
            .get(&event)
            .map_or(&[], |stored| &stored.auth_events)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(numbers: &[i64]) -> BTreeSet<EventNid> {
        numbers.iter().copied().map(EventNid).collect()
    }

    /// Each number's auth events, by position.
    fn graph(edges: &[&[i64]]) -> Vec<Vec<EventNid>> {
        edges
            .iter()
            .map(|below| below.iter().copied().map(EventNid).collect())
            .collect()
    }

    #[test]
    fn a_chain_reaches_to_the_bottom_and_leaves_out_where_it_began() {
        let graph = graph(&[&[], &[0], &[0, 1], &[2], &[1]]);
        let auth = |event: EventNid| &*graph[event.0 as usize];
        assert_eq!(auth_chain([EventNid(3)], &auth), set(&[0, 1, 2]));
        assert_eq!(
            auth_chain([EventNid(3), EventNid(2)], &auth),
            set(&[0, 1, 2])
        );
        assert_eq!(auth_chain([EventNid(0)], &auth), set(&[]));
        let chains = [set(&[0, 1, 2]), set(&[0, 1]), set(&[0, 4])];
        assert_eq!(auth_difference(&chains), set(&[1, 2, 4]));
        assert_eq!(auth_difference(&[]), set(&[]));
    }

    #[test]
    fn a_chain_over_a_circle_ends() {
        let graph = graph(&[&[1], &[0]]);
        let auth = |event: EventNid| &*graph[event.0 as usize];
        assert_eq!(auth_chain([EventNid(0)], &auth), set(&[0, 1]));
        assert_eq!(subgraph(&set(&[0]), &auth), set(&[0, 1]));
    }

    #[test]
    fn the_subgraph_is_what_lies_between() {
        // 5 stands on 3 and 4, both on 1; 6 stands on 2; all on 0.
        let graph = graph(&[&[], &[0], &[0], &[1], &[1], &[3, 4], &[2]]);
        let auth = |event: EventNid| &*graph[event.0 as usize];
        assert_eq!(subgraph(&set(&[5, 1]), &auth), set(&[1, 3, 4, 5]));
        assert_eq!(subgraph(&set(&[5, 6]), &auth), set(&[5, 6]));
        assert_eq!(
            subgraph(&set(&[5, 6, 0]), &auth),
            set(&[0, 1, 2, 3, 4, 5, 6])
        );
    }
}
