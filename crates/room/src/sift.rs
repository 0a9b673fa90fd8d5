//! Foreign state and auth chains: which of these events can be used (joins.md J-55 to J-62, S-6).

use std::collections::{BTreeMap, BTreeSet};
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
    pdus.values()
        .flat_map(|pdu| &pdu.auth_events)
        .filter(|id| !pdus.contains_key(*id))
        .cloned()
        .collect()
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

/// Walks up from the events that need none (J-62). An event counts only when all its auth events do
/// (J-60); one that fails the rules against them is rejected (J-61).
pub(crate) fn sift(
    version: RoomVersion,
    room: &RoomId,
    pdus: &Pdus,
    stored: &BTreeMap<EventId, Found>,
    create: Option<&Arc<Pdu>>,
) -> Sifted {
    let mut walk = Walk::new(version, room, pdus, stored, create);
    while let Some(id) = walk.ready.pop_first() {
        let pdu = walk.pdus[&id].clone();
        let verdict = walk.judge(&pdu);
        walk.sifted.usable.push((pdu, verdict.clone()));
        walk.verdicts.insert(id.clone(), verdict);
        walk.release(&id);
    }
    let verdicts = walk.verdicts;
    let mut sifted = walk.sifted;
    sifted.left_out = pdus
        .keys()
        .filter(|id| !verdicts.contains_key(*id))
        .cloned()
        .collect();
    sifted
}

struct Walk<'a> {
    version: RoomVersion,
    pdus: &'a Pdus,
    stored: &'a BTreeMap<EventId, Found>,
    create: Option<&'a Arc<Pdu>>,
    /// How many auth events of each event are not judged so far.
    open: BTreeMap<&'a EventId, usize>,
    dependents: BTreeMap<&'a EventId, Vec<&'a EventId>>,
    ready: BTreeSet<EventId>,
    verdicts: BTreeMap<EventId, Verdict>,
    sifted: Sifted,
    cache: auth::Cache,
}

impl<'a> Walk<'a> {
    fn new(
        version: RoomVersion,
        room: &RoomId,
        pdus: &'a Pdus,
        stored: &'a BTreeMap<EventId, Found>,
        create: Option<&'a Arc<Pdu>>,
    ) -> Self {
        let mut this = Self {
            version,
            pdus,
            stored,
            create,
            open: BTreeMap::new(),
            dependents: BTreeMap::new(),
            ready: BTreeSet::new(),
            verdicts: BTreeMap::new(),
            sifted: Sifted::default(),
            cache: auth::Cache::default(),
        };
        for pdu in pdus.values().filter(|pdu| pdu.room_id == *room) {
            this.enter(pdu);
        }
        this
    }

    fn enter(&mut self, pdu: &'a Arc<Pdu>) {
        let needs = self.needs(pdu);
        if needs
            .iter()
            .any(|id| !self.pdus.contains_key(*id) && !self.stored.contains_key(*id))
        {
            return;
        }
        let waits_for: Vec<_> = needs
            .into_iter()
            .filter(|id| self.pdus.contains_key(*id))
            .collect();
        if waits_for.is_empty() {
            self.ready.insert(pdu.event_id.clone());
        }
        self.open.insert(&pdu.event_id, waits_for.len());
        for id in waits_for {
            self.dependents.entry(id).or_default().push(&pdu.event_id);
        }
    }

    /// The auth events, and in version 12 the create event that all others silently stand on.
    fn needs(&self, pdu: &'a Pdu) -> BTreeSet<&'a EventId> {
        let mut needs: BTreeSet<_> = pdu.auth_events.iter().collect();
        if !self.version.rules().create_in_auth_events
            && let Some(create) = self.create.filter(|create| create.event_id != pdu.event_id)
        {
            needs.insert(&create.event_id);
        }
        needs
    }

    fn judge(&mut self, pdu: &Pdu) -> Verdict {
        let auth: Vec<(&Pdu, bool)> = pdu
            .auth_events
            .iter()
            .map(|id| match (self.pdus.get(id), self.stored.get(id)) {
                (Some(pdu), _) => (&**pdu, self.verdicts[id] != Verdict::Accepted),
                (None, Some(found)) => (&*found.pdu, found.known.rejected),
                (None, None) => unreachable!("only events with all auth events get here"),
            })
            .collect();
        if pdu.oversized_field {
            return Verdict::Rejected(OVERSIZED.to_owned());
        }
        let create = self.create.map(|create| &**create);
        let cache = &mut self.cache;
        verdict(auth::check_auth_events_with(
            cache,
            self.version,
            pdu,
            create,
            &auth,
        ))
    }

    fn release(&mut self, id: &EventId) {
        for dependent in self.dependents.remove(id).unwrap_or_default() {
            let open = self
                .open
                .get_mut(dependent)
                .expect("entered with its needs");
            *open -= 1;
            if *open == 0 {
                self.ready.insert(dependent.clone());
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
