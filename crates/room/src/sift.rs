//! Foreign state and auth chains: which of these events can be used (joins.md J-55 to J-62, S-6).

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use protocol::auth;
use protocol::id::{EventId, RoomId};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;

use crate::effect::Found;
use crate::write::Verdict;

/// Verified events of one room, by id.
pub(crate) type Pdus = BTreeMap<EventId, Arc<Pdu>>;

#[derive(Debug, Default)]
pub(crate) struct Sifted {
    /// In topological order from the create event. Accepted or rejected, to be stored as outliers.
    pub usable: Vec<(Arc<Pdu>, Verdict)>,
    /// Those without all their auth events. Not stored: a later copy may do better.
    pub left_out: BTreeSet<EventId>,
}

impl Sifted {
    /// Verdicts by id.
    pub fn verdicts(&self) -> BTreeMap<&EventId, &Verdict> {
        self.usable
            .iter()
            .map(|(pdu, verdict)| (&pdu.event_id, verdict))
            .collect()
    }
}

/// The auth events that are neither among these events nor stored.
pub(crate) fn outside(pdus: &Pdus) -> BTreeSet<EventId> {
    // Nearly all stand on the same few.
    let mut named: Vec<&EventId> = pdus.values().flat_map(|pdu| &pdu.auth_events).collect();
    named.sort_unstable();
    named.dedup();
    let outside = named.into_iter().filter(|id| !pdus.contains_key(*id));
    outside.cloned().collect()
}

/// The one create event among these; an error when there is a second one (J-55).
pub(crate) fn create_event(pdus: &Pdus) -> Result<Option<Arc<Pdu>>, String> {
    let mut creates = pdus.values().filter(|pdu| is_create(pdu));
    let first = creates.next().cloned();
    match creates.next() {
        None => Ok(first),
        Some(_) => Err("there are two create events".to_owned()),
    }
}

pub(crate) fn is_create(pdu: &Pdu) -> bool {
    &*pdu.kind == "m.room.create" && pdu.state_key.as_deref() == Some("")
}

/// An event that was judged before.
pub(crate) trait Judged {
    fn pdu(&self) -> &Pdu;
    fn is_rejected(&self) -> bool;
}

impl Judged for Found {
    fn pdu(&self) -> &Pdu {
        &self.pdu
    }

    fn is_rejected(&self) -> bool {
        self.known.rejected
    }
}

/// Walks up from the events that need none (J-62). An event counts only when all its auth events do
/// (J-60); one that fails the rules against them is rejected (J-61).
pub(crate) fn sift(
    version: RoomVersion,
    room: &RoomId,
    pdus: &Pdus,
    stored: &BTreeMap<EventId, impl Judged>,
    create: Option<&Arc<Pdu>>,
) -> Sifted {
    let mut walk = Walk::new(version, room, pdus, stored, create);
    let mut usable = Vec::new();
    while let Some(number) = walk.ready.pop_first() {
        let verdict = walk.judge(number);
        walk.nodes[number].accepted = Some(verdict == Verdict::Accepted);
        usable.push((walk.nodes[number].pdu.clone(), verdict));
        walk.release(number);
    }
    let unjudged = walk.nodes.iter().filter(|node| node.accepted.is_none());
    let left_out = unjudged.map(|node| node.pdu.event_id.clone()).collect();
    Sifted { usable, left_out }
}

/// Events by their place in the order of their ids, so that a walk over a whole room compares numbers.
struct Walk<'a> {
    version: RoomVersion,
    create: Option<&'a Arc<Pdu>>,
    nodes: Vec<Node<'a>>,
    /// The auth events of all nodes, one after the other.
    auth: Vec<Auth<'a>>,
    /// Which nodes wait for each.
    dependents: Vec<Vec<usize>>,
    ready: BTreeSet<usize>,
    cache: auth::Cache,
}

struct Node<'a> {
    pdu: &'a Arc<Pdu>,
    /// Where its auth events are.
    auth: Range<usize>,
    /// How many of them are not judged so far.
    open: usize,
    accepted: Option<bool>,
}

#[derive(Clone, Copy)]
enum Auth<'a> {
    Node(usize),
    /// And whether it was rejected.
    Stored(&'a Pdu, bool),
}

impl<'a> Walk<'a> {
    fn new(
        version: RoomVersion,
        room: &RoomId,
        pdus: &'a Pdus,
        stored: &'a BTreeMap<EventId, impl Judged>,
        create: Option<&'a Arc<Pdu>>,
    ) -> Self {
        let ids: Vec<&EventId> = pdus.keys().collect();
        let mut this = Self {
            version,
            create,
            nodes: Vec::with_capacity(pdus.len()),
            auth: Vec::new(),
            dependents: vec![Vec::new(); pdus.len()],
            ready: BTreeSet::new(),
            cache: auth::Cache::default(),
        };
        let find = |id: &EventId| match ids.binary_search(&id) {
            Ok(number) => Some(Auth::Node(number)),
            Err(_) => {
                let stored = stored.get(id)?;
                Some(Auth::Stored(stored.pdu(), stored.is_rejected()))
            }
        };
        for (number, pdu) in pdus.values().enumerate() {
            this.enter(number, pdu, room, find);
        }
        this
    }

    fn enter(
        &mut self,
        number: usize,
        pdu: &'a Arc<Pdu>,
        room: &RoomId,
        find: impl Fn(&EventId) -> Option<Auth<'a>>,
    ) {
        let begin = self.auth.len();
        let found: Option<Vec<_>> = pdu.auth_events.iter().map(&find).collect();
        let silent = self.silent_need(pdu).map(&find);
        let mut node = Node {
            pdu,
            auth: begin..begin,
            open: 0,
            accepted: None,
        };
        if pdu.room_id == *room
            && let Some(found) = found
            && !matches!(silent, Some(None))
        {
            let mut waits_for: Vec<usize> = found
                .iter()
                .chain(silent.iter().flatten())
                .filter_map(|auth| match auth {
                    Auth::Node(number) => Some(*number),
                    Auth::Stored(..) => None,
                })
                .collect();
            waits_for.sort_unstable();
            waits_for.dedup();
            self.auth.extend(found);
            node.auth = begin..self.auth.len();
            node.open = waits_for.len();
            if waits_for.is_empty() {
                self.ready.insert(number);
            }
            for needed in waits_for {
                self.dependents[needed].push(number);
            }
        }
        self.nodes.push(node);
    }

    /// In version 12 the create event that all others stand on without naming it.
    fn silent_need(&self, pdu: &Pdu) -> Option<&'a EventId> {
        let silent = !self.version.rules().create_in_auth_events;
        let create = self.create.filter(|_| silent)?;
        (create.event_id != pdu.event_id).then_some(&create.event_id)
    }

    fn judge(&mut self, number: usize) -> Verdict {
        let node = &self.nodes[number];
        let auth: Vec<(&Pdu, bool)> = self.auth[node.auth.clone()]
            .iter()
            .map(|auth| match auth {
                Auth::Node(number) => {
                    let node = &self.nodes[*number];
                    (&**node.pdu, node.accepted != Some(true))
                }
                Auth::Stored(pdu, rejected) => (*pdu, *rejected),
            })
            .collect();
        if node.pdu.oversized_field {
            return Verdict::Rejected(OVERSIZED.to_owned());
        }
        let create = self.create.map(|create| &**create);
        verdict(auth::check_auth_events_with(
            &mut self.cache,
            self.version,
            node.pdu,
            create,
            &auth,
        ))
    }

    fn release(&mut self, number: usize) {
        for dependent in std::mem::take(&mut self.dependents[number]) {
            let node = &mut self.nodes[dependent];
            node.open -= 1;
            if node.open == 0 {
                self.ready.insert(dependent);
            }
        }
    }
}

/// Check 4: the auth rules against the event's own auth events.
pub(crate) fn match_auth(
    version: RoomVersion,
    pdu: &Pdu,
    create: Option<&Pdu>,
    auth: &[(&Pdu, bool)],
) -> Verdict {
    if pdu.oversized_field {
        return Verdict::Rejected(OVERSIZED.to_owned());
    }
    verdict(auth::check_auth_events(version, pdu, create, auth))
}

/// V-20: such an event may be a prev event of others, but nothing else.
const OVERSIZED: &str = "a field has more than 255 bytes";

fn verdict(checked: Result<(), auth::Refused>) -> Verdict {
    match checked {
        Ok(()) => Verdict::Accepted,
        Err(refused) => Verdict::Rejected(refused.to_string()),
    }
}
