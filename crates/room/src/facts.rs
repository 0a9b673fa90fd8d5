//! What a machine has learnt from the store while it thinks about one room.
//!
//! A decision is a pure function over facts. Where a fact is lacking it stops and names the load that
//! would bring it; the machine asks for that and runs the function again. So a decision reads from top to
//! bottom, and nothing of it lives between two inputs but the facts.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use protocol::auth;
use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::nid::{EventNid, KeyNid};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::state::StateMap;
use protocol::state_resolution;
use serde_json::{Map, Value};

use crate::effect::{
    Answer, Ask, AskError, Child, EventSet, Found, Head, Known, Load, Loaded, ReadyEvent, StateAt,
    StateKey, StoredEvent, StoredOutOfBand, Ticket,
};
use crate::outbox::Outbox;
use crate::policy;

/// That without which a decision can not go on.
#[derive(Debug)]
pub(crate) struct Lacking(Vec<Lack>);

#[derive(Debug)]
enum Lack {
    Load(Load),
    /// What a policy server says of an event.
    Word(ServerName, Arc<Pdu>),
}

/// The signatures that a policy server gave, or why it gave none.
type Word = Result<Map<String, Value>, AskError>;

pub(crate) type Got<T> = Result<T, Lacking>;

fn lacking<T>(load: Load) -> Got<T> {
    Err(Lacking(vec![Lack::Load(load)]))
}

/// Both, or everything that either of them lacks, so that it is loaded at once.
pub(crate) fn both<A, B>(a: Got<A>, b: Got<B>) -> Got<(A, B)> {
    match (a, b) {
        (Ok(a), Ok(b)) => Ok((a, b)),
        (Err(Lacking(mut a)), Err(Lacking(b))) => {
            a.extend(b);
            Err(Lacking(a))
        }
        (Err(lacking), Ok(_)) | (Ok(_), Err(lacking)) => Err(lacking),
    }
}

#[derive(Debug)]
pub(crate) struct Facts {
    pub room: RoomId,
    waiting: BTreeMap<Ticket, Load>,
    asking: BTreeMap<Ticket, EventId>,
    /// Of policy servers.
    words: BTreeMap<EventId, Word>,
    head: Option<Option<Arc<Head>>>,
    known: BTreeMap<EventId, Option<Known>>,
    found: BTreeMap<EventId, Option<Found>>,
    nids: BTreeMap<EventId, EventNid>,
    made: BTreeSet<EventId>,
    keys: BTreeMap<StateKey, KeyNid>,
    states: BTreeMap<EventNid, Option<StateAt>>,
    children: BTreeMap<EventNid, Vec<Child>>,
    dependents: BTreeMap<Vec<EventNid>, Vec<ReadyEvent>>,
    ready: Option<Vec<ReadyEvent>>,
    out_of_band: BTreeMap<UserId, Option<Arc<StoredOutOfBand>>>,
    hosts: Option<Vec<ServerName>>,
    state_stored: Option<u64>,
    handshake_running: Option<bool>,
    closures: Vec<Closure>,
    resolved: Vec<(Vec<StateMap>, StateMap)>,
    /// Events by number, from loads and from what the machine is about to store.
    events: EventSet,
    /// Those of the events that the machine is about to store, or to judge otherwise.
    own: BTreeSet<EventNid>,
    /// Asked for by number, and not stored.
    absent: BTreeSet<EventNid>,
}

#[derive(Debug)]
struct Closure {
    maps: Vec<StateMap>,
    also: Vec<EventNid>,
    set: EventSet,
}

impl Facts {
    pub fn new(room: RoomId) -> Self {
        Self {
            room,
            waiting: BTreeMap::new(),
            asking: BTreeMap::new(),
            words: BTreeMap::new(),
            head: None,
            known: BTreeMap::new(),
            found: BTreeMap::new(),
            nids: BTreeMap::new(),
            made: BTreeSet::new(),
            keys: BTreeMap::new(),
            states: BTreeMap::new(),
            children: BTreeMap::new(),
            dependents: BTreeMap::new(),
            ready: None,
            out_of_band: BTreeMap::new(),
            hosts: None,
            state_stored: None,
            handshake_running: None,
            closures: Vec::new(),
            resolved: Vec::new(),
            events: EventSet::default(),
            own: BTreeSet::new(),
            absent: BTreeSet::new(),
        }
    }

    /// Forgets all that another commit may have changed, numbers included: until something that bears them is
    /// committed they are an offer. What was said of an event stays.
    pub fn forget(&mut self) {
        let room = self.room.clone();
        let words = std::mem::take(&mut self.words);
        *self = Self {
            words,
            ..Self::new(room)
        };
    }

    // -- asking and hearing ------------------------------------------------------------------------

    /// Asks for what is lacking.
    pub fn request(&mut self, lacking: Lacking, out: &mut Outbox) {
        for lack in lacking.0 {
            match lack {
                Lack::Load(load) => {
                    let ticket = out.load(&self.room, load.clone());
                    self.waiting.insert(ticket, load);
                }
                Lack::Word(server, pdu) => {
                    let event = pdu.json.clone();
                    let ticket = out.ask(&server, Ask::PolicySign { event }, policy::TIMEOUT);
                    self.asking.insert(ticket, pdu.event_id.clone());
                }
            }
        }
    }

    pub fn is_waiting(&self) -> bool {
        !self.waiting.is_empty() || !self.asking.is_empty()
    }

    /// Takes a reply. `true` when it was awaited and nothing else is, so that it is time to think again.
    pub fn hear(&mut self, ticket: Ticket, loaded: Loaded) -> bool {
        let Some(load) = self.waiting.remove(&ticket) else {
            return false;
        };
        self.learn(load, loaded);
        !self.is_waiting()
    }

    /// As [`Self::hear`], for what a server was asked.
    pub fn hear_answer(&mut self, ticket: Ticket, answer: Result<Answer, AskError>) -> bool {
        let Some(event) = self.asking.remove(&ticket) else {
            return false;
        };
        let word = match answer {
            Ok(Answer::PolicySigned { signatures }) => Ok(signatures),
            Ok(_) => Err(AskError::Unreachable {
                reason: "an answer of another kind".to_owned(),
            }),
            Err(error) => Err(error),
        };
        self.words.insert(event, word);
        !self.is_waiting()
    }

    /// What the policy server says of an event.
    pub fn word_of(&self, server: &ServerName, pdu: &Arc<Pdu>) -> Got<&Word> {
        match self.words.get(&pdu.event_id) {
            Some(word) => Ok(word),
            None => Err(Lacking(vec![Lack::Word(server.clone(), pdu.clone())])),
        }
    }

    fn learn(&mut self, load: Load, loaded: Loaded) {
        match (load, loaded) {
            (Load::Head, Loaded::Head(head)) => self.head = Some(head.map(|head| Arc::new(*head))),
            (Load::Known { ids }, Loaded::Known(mut known)) => {
                for id in ids {
                    let known = known.remove(&id);
                    if let Some(known) = &known {
                        self.nids.insert(id.clone(), known.nid);
                    }
                    self.known.insert(id, known);
                }
            }
            (Load::Find { ids }, Loaded::Found(mut found)) => {
                for id in ids {
                    let found = found.remove(&id);
                    if let Some(found) = &found {
                        self.nids.insert(id.clone(), found.known.nid);
                    }
                    self.found.insert(id, found);
                }
            }
            (
                Load::Intern { ids, keys, .. },
                Loaded::Interned {
                    events,
                    keys: numbers,
                },
            ) => {
                self.nids.extend(ids.into_iter().zip(events));
                self.keys.extend(keys.into_iter().zip(numbers));
            }
            (Load::States { events }, Loaded::States(mut states)) => {
                for nid in events {
                    self.states.insert(nid, states.remove(&nid));
                }
            }
            (Load::Closure { maps, also }, Loaded::Closure(set)) => {
                self.keys
                    .extend(set.keys.iter().map(|(k, n)| (k.clone(), *n)));
                self.closures.push(Closure { maps, also, set });
            }
            (Load::Events { events }, Loaded::Closure(set)) => {
                self.add_events(&set);
                let known = &self.events.events;
                let absent = events.into_iter().filter(|nid| !known.contains_key(nid));
                self.absent.extend(absent);
            }
            (Load::Children { events }, Loaded::Children(mut children)) => {
                for nid in events {
                    let upon = children.remove(&nid).unwrap_or_default();
                    self.children.insert(nid, upon);
                }
            }
            (Load::AuthDependents { events }, Loaded::Ready(ready)) => {
                self.dependents.insert(events, ready);
            }
            (Load::ReadyPartial { .. }, Loaded::Ready(ready)) => self.ready = Some(ready),
            (Load::OutOfBand { user }, Loaded::OutOfBand(stored)) => {
                self.out_of_band
                    .insert(user, stored.map(|stored| Arc::new(*stored)));
            }
            (Load::Hosts, Loaded::Hosts(hosts)) => self.hosts = Some(hosts),
            (Load::StateStored, Loaded::StateStored(stored)) => self.state_stored = Some(stored),
            (Load::HandshakeRunning, Loaded::HandshakeRunning(running)) => {
                self.handshake_running = Some(running);
            }
            // A reply of another kind is the driver's fault; the decision asks again.
            (_, _) => {}
        }
    }

    fn add_events(&mut self, set: &EventSet) {
        for (key, nid) in &set.keys {
            self.keys.insert(key.clone(), *nid);
        }
        for (nid, event) in &set.events {
            if !self.own.contains(nid) {
                self.events.events.insert(*nid, event.clone());
            }
        }
    }

    /// An event as it will stand once the machine has committed.
    pub fn add_own(&mut self, nid: EventNid, event: StoredEvent) {
        self.own.insert(nid);
        self.nids.insert(event.pdu.event_id.clone(), nid);
        self.events.events.insert(nid, event);
    }

    /// The state at an event as it will stand once the machine has committed.
    pub fn add_own_state(&mut self, nid: EventNid, state: StateAt) {
        self.states.insert(nid, Some(state));
    }

    // -- facts -------------------------------------------------------------------------------------

    pub fn head(&self) -> Got<Option<Arc<Head>>> {
        match &self.head {
            Some(head) => Ok(head.clone()),
            None => lacking(Load::Head),
        }
    }

    /// Where each of these stands, if it is stored; as many entries as ids.
    pub fn known(&self, ids: &[EventId]) -> Got<Vec<Option<Known>>> {
        let unasked: BTreeSet<_> = ids
            .iter()
            .filter(|id| !self.known.contains_key(*id))
            .collect();
        if !unasked.is_empty() {
            let ids = unasked.into_iter().cloned().collect();
            return lacking(Load::Known { ids });
        }
        Ok(ids.iter().map(|id| self.known[id]).collect())
    }

    /// Forgets all that [`Self::find`] told, which whoever asked keeps.
    pub fn forget_found(&mut self) {
        self.found.clear();
    }

    /// Whether each of these is stored, and how, with the events; as many entries as ids.
    pub fn find(&self, ids: &[EventId]) -> Got<Vec<Option<Found>>> {
        let unasked: BTreeSet<_> = ids
            .iter()
            .filter(|id| !self.found.contains_key(*id))
            .collect();
        if !unasked.is_empty() {
            let ids = unasked.into_iter().cloned().collect();
            return lacking(Load::Find { ids });
        }
        Ok(ids.iter().map(|id| self.found[id].clone()).collect())
    }

    /// Makes sure that these have numbers; [`Self::nid`] and [`Self::key`] tell them.
    pub fn number(
        &self,
        version: RoomVersion,
        ids: impl IntoIterator<Item = EventId>,
        keys: impl IntoIterator<Item = StateKey>,
    ) -> Got<()> {
        let ids: BTreeSet<_> = ids
            .into_iter()
            .filter(|id| !self.nids.contains_key(id))
            .collect();
        let keys: BTreeSet<_> = keys
            .into_iter()
            .filter(|key| !self.keys.contains_key(key))
            .collect();
        if ids.is_empty() && keys.is_empty() {
            return Ok(());
        }
        lacking(Load::Intern {
            version,
            new: ids.iter().all(|id| self.made.contains(id)),
            ids: ids.into_iter().collect(),
            keys: keys.into_iter().collect(),
        })
    }

    /// An event that was just made here. That one of another server is not stored is not enough: another event may
    /// have named it, so that it has a number.
    pub fn add_made(&mut self, id: &EventId) {
        self.made.insert(id.clone());
    }

    pub fn nid(&self, id: &EventId) -> Option<EventNid> {
        self.nids.get(id).copied()
    }

    pub fn key(&self, kind: &str, state_key: &str) -> Option<KeyNid> {
        self.keys.get(&(kind.into(), state_key.into())).copied()
    }

    fn own_event(&self, id: &EventId) -> Option<(EventNid, &StoredEvent)> {
        let nid = self.nid(id).filter(|nid| self.own.contains(nid))?;
        Some((nid, &self.events.events[&nid]))
    }

    /// The number of an event's own state key.
    pub fn key_of(&self, pdu: &Pdu) -> Option<KeyNid> {
        self.key(&pdu.kind, pdu.state_key.as_deref()?)
    }

    /// State before and after; `None` for events that have none. As many entries as events.
    pub fn states(&self, nids: &[EventNid]) -> Got<Vec<Option<StateAt>>> {
        let events: Vec<_> = nids
            .iter()
            .filter(|nid| !self.states.contains_key(*nid))
            .copied()
            .collect();
        if !events.is_empty() {
            return lacking(Load::States { events });
        }
        Ok(nids.iter().map(|nid| self.states[nid].clone()).collect())
    }

    pub fn children(&self, nids: &[EventNid]) -> Got<Vec<Vec<Child>>> {
        let events: Vec<_> = nids
            .iter()
            .filter(|nid| !self.children.contains_key(*nid))
            .copied()
            .collect();
        if !events.is_empty() {
            return lacking(Load::Children { events });
        }
        Ok(nids.iter().map(|nid| self.children[nid].clone()).collect())
    }

    pub fn auth_dependents(&self, events: Vec<EventNid>) -> Got<Vec<ReadyEvent>> {
        match self.dependents.get(&events) {
            Some(dependents) => Ok(dependents.clone()),
            None => lacking(Load::AuthDependents { events }),
        }
    }

    pub fn ready_partial(&self, limit: u32) -> Got<Vec<ReadyEvent>> {
        match &self.ready {
            Some(ready) => Ok(ready.clone()),
            None => lacking(Load::ReadyPartial { limit }),
        }
    }

    pub fn out_of_band(&self, user: &UserId) -> Got<Option<Arc<StoredOutOfBand>>> {
        match self.out_of_band.get(user) {
            Some(stored) => Ok(stored.clone()),
            None => lacking(Load::OutOfBand { user: user.clone() }),
        }
    }

    pub fn handshake_running(&self) -> Got<bool> {
        match self.handshake_running {
            Some(running) => Ok(running),
            None => lacking(Load::HandshakeRunning),
        }
    }

    pub fn hosts(&self) -> Got<Vec<ServerName>> {
        match &self.hosts {
            Some(hosts) => Ok(hosts.clone()),
            None => lacking(Load::Hosts),
        }
    }

    /// How many state events are stored, roughly.
    pub fn state_stored(&self) -> Got<u64> {
        match self.state_stored {
            Some(stored) => Ok(stored),
            None => lacking(Load::StateStored),
        }
    }

    /// The events that stand at these keys in a state; absent ones are left out. The keys must have been
    /// numbered.
    pub fn state_events(
        &self,
        state: &StateMap,
        keys: &[StateKey],
    ) -> Got<BTreeMap<StateKey, (EventNid, Arc<Pdu>)>> {
        let at: Vec<_> = keys
            .iter()
            .filter_map(|key| Some((key, state.get(*self.keys.get(key)?)?)))
            .collect();
        let events: BTreeSet<_> = at
            .iter()
            .map(|(_, nid)| *nid)
            .filter(|nid| !self.events.events.contains_key(nid) && !self.absent.contains(nid))
            .collect();
        if !events.is_empty() {
            let events = events.into_iter().collect();
            return lacking(Load::Events { events });
        }
        let event = |nid: EventNid| Some(self.events.events.get(&nid)?.pdu.clone());
        Ok(at
            .into_iter()
            .filter_map(|(key, nid)| Some((key.clone(), (nid, event(nid)?))))
            .collect())
    }

    /// Events by number; those that are not stored are left out.
    pub fn pdus(&self, nids: &[EventNid]) -> Got<Vec<Arc<Pdu>>> {
        let events: Vec<_> = nids
            .iter()
            .filter(|nid| !self.events.events.contains_key(*nid) && !self.absent.contains(*nid))
            .copied()
            .collect();
        if !events.is_empty() {
            return lacking(Load::Events { events });
        }
        let stored = nids.iter().filter_map(|nid| self.events.events.get(nid));
        Ok(stored.map(|event| event.pdu.clone()).collect())
    }

    /// An event's auth events in order, each with whether it is rejected; `None` when one is not here.
    pub fn auth_of(&self, pdu: &Pdu) -> Got<Option<Vec<(EventNid, Arc<Pdu>, bool)>>> {
        let found = self.find(&pdu.auth_events)?;
        let auth = found.into_iter().zip(&pdu.auth_events).map(|(found, id)| {
            if let Some((nid, own)) = self.own_event(id) {
                return Some((nid, own.pdu.clone(), own.rejected));
            }
            let found = found?;
            Some((found.known.nid, found.pdu, found.known.rejected))
        });
        Ok(auth.collect())
    }

    // -- conclusions -------------------------------------------------------------------------------

    /// The state that several states come to (check 5's "state before", current state).
    pub fn resolve(&mut self, version: RoomVersion, maps: Vec<StateMap>) -> Got<StateMap> {
        let mut distinct: Vec<StateMap> = Vec::new();
        for map in maps {
            if !distinct.contains(&map) {
                distinct.push(map);
            }
        }
        if distinct.len() < 2 {
            return Ok(distinct.pop().unwrap_or_default());
        }
        if let Some((_, resolved)) = self.resolved.iter().find(|(maps, _)| *maps == distinct) {
            return Ok(resolved.clone());
        }
        let set = self.closure(&distinct)?;
        let resolved = state_resolution::resolve(version, &distinct, &set);
        self.resolved.push((distinct, resolved.clone()));
        Ok(resolved)
    }

    /// The events a resolution of these maps needs, our own ones on top.
    fn closure(&self, maps: &[StateMap]) -> Got<EventSet> {
        let also = self.roots(maps);
        let Some(closure) = self
            .closures
            .iter()
            .find(|closure| closure.maps == maps && closure.also == also)
        else {
            let maps = maps.to_vec();
            return lacking(Load::Closure { maps, also });
        };
        let mut set = closure.set.clone();
        for (key, nid) in &self.keys {
            set.keys.insert(key.clone(), *nid);
        }
        for nid in &self.own {
            set.events.insert(*nid, self.events.events[nid].clone());
        }
        Ok(set)
    }

    /// The stored events on which our own, unstored ones stand.
    fn roots(&self, maps: &[StateMap]) -> Vec<EventNid> {
        if self.own.is_empty() {
            return Vec::new();
        }
        let mut roots: BTreeSet<_> = self
            .own
            .iter()
            .flat_map(|nid| &self.events.events[nid].auth_events)
            .filter(|nid| !self.own.contains(*nid))
            .copied()
            .collect();
        for pair in maps.windows(2) {
            for (_, a, b) in pair[0].diff(&pair[1]) {
                roots.extend([a, b].into_iter().flatten());
            }
        }
        roots.retain(|nid| !self.own.contains(nid));
        roots.into_iter().collect()
    }

    /// The auth rules against a whole state (checks 5 and 6). The keys must have been numbered.
    pub fn check_against(&self, pdu: &Pdu, state: &StateMap) -> Got<Result<(), String>> {
        let keys = auth_keys(pdu);
        let events = self.state_events(state, &keys)?;
        Ok(check(pdu, &events))
    }

    /// P-11: check 5 on partial state. What we know of the state is resolved with what the event's own
    /// auth events say, on just the keys that its rules read.
    pub fn check_against_partial(
        &mut self,
        pdu: &Pdu,
        state: &StateMap,
        auth: &[(EventNid, Arc<Pdu>)],
    ) -> Got<Result<(), String>> {
        let keys = auth_keys(pdu);
        let numbers: Vec<_> = keys
            .iter()
            .filter_map(|key| self.keys.get(key).copied())
            .collect();
        let known = state.only(numbers.iter().copied());
        let mut claimed = StateMap::new();
        for (nid, pdu) in auth {
            if let Some(key) = self.key_of(pdu).filter(|key| numbers.contains(key)) {
                claimed.insert(key, *nid);
            }
        }
        // Version 12 names no create event, and there is only one.
        if let Some(create) = self.key("m.room.create", "")
            && let (Some(nid), None) = (known.get(create), claimed.get(create))
        {
            claimed.insert(create, nid);
        }
        let resolved = self.resolve(pdu.version, vec![known, claimed])?;
        self.check_against(pdu, &resolved)
    }
}

/// The state keys that an event's auth rules may read: those of its auth events, and the create event,
/// which version 12 reads without naming it.
pub(crate) fn auth_keys(pdu: &Pdu) -> Vec<StateKey> {
    let mut keys = auth::auth_types(
        pdu.version,
        &pdu.kind,
        &pdu.sender,
        pdu.state_key.as_deref(),
        &pdu.content_value(),
    );
    let create = ("m.room.create".into(), "".into());
    if !keys.contains(&create) {
        keys.push(create);
    }
    keys
}

fn check(pdu: &Pdu, events: &BTreeMap<StateKey, (EventNid, Arc<Pdu>)>) -> Result<(), String> {
    let at = |kind: &str, state_key: &str| {
        events
            .get(&(kind.into(), state_key.into()))
            .map(|(_, pdu)| pdu.clone())
    };
    auth::check(pdu.version, pdu, &at).map_err(|refused| refused.to_string())
}

/// State after an event: the state before it, with the event in it when it is accepted state.
pub(crate) fn after(
    before: &StateMap,
    key: Option<KeyNid>,
    nid: EventNid,
    accepted: bool,
) -> StateMap {
    let mut after = before.clone();
    if let (Some(key), true) = (key, accepted) {
        after.insert(key, nid);
    }
    after
}
