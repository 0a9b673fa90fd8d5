//! A room in memory: events with numbers, the states around them, and what resolution needs of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use protocol::auth;
use protocol::auth_chain::auth_chain;
use protocol::canonical_json::to_canonical_lenient;
use protocol::event_set::{EventSet, StateKey, StoredEvent};
use protocol::id::{EventId, RoomId, UserId};
use protocol::nid::{EventNid, KeyNid};
use protocol::pdu::{Pdu, Spans};
use protocol::room_version::RoomVersion;
use protocol::state::StateMap;
use protocol::state_resolution::{in_question, resolve};
use serde_json::{Value, json};

/// An event as a test writes it. Ids are bare words; `depth` follows from the prev events.
#[derive(Clone, Debug)]
pub struct Draft {
    pub id: String,
    pub sender: String,
    pub kind: String,
    pub state_key: Option<String>,
    pub content: Value,
    pub prev: Vec<String>,
    pub auth: Vec<String>,
    pub ts: i64,
}

pub fn draft(id: &str, sender: &str, kind: &str, state_key: Option<&str>, content: Value) -> Draft {
    Draft {
        id: id.to_owned(),
        sender: sender.to_owned(),
        kind: kind.to_owned(),
        state_key: state_key.map(str::to_owned),
        content,
        prev: Vec::new(),
        auth: Vec::new(),
        ts: 0,
    }
}

pub struct Entry {
    pub pdu: Arc<Pdu>,
    pub auth: Vec<EventNid>,
    pub rejected: bool,
    pub after: StateMap,
}

pub struct World {
    pub version: RoomVersion,
    /// An event's number is its place here.
    pub entries: Vec<Entry>,
    pub ids: BTreeMap<String, EventNid>,
    pub keys: BTreeMap<StateKey, KeyNid>,
}

impl World {
    pub fn new(version: RoomVersion) -> Self {
        Self {
            version,
            entries: Vec::new(),
            ids: BTreeMap::new(),
            keys: BTreeMap::new(),
        }
    }

    pub fn entry(&self, event: EventNid) -> &Entry {
        &self.entries[event.0 as usize]
    }

    pub fn nid(&self, id: &str) -> EventNid {
        self.ids[id]
    }

    pub fn pdu(&self, draft: &Draft) -> Pdu {
        let depths = draft
            .prev
            .iter()
            .map(|id| self.entry(self.nid(id)).pdu.depth);
        let depth = protocol::dag::depth_upon(self.version, depths);
        pdu(self.version, draft, depth)
    }

    /// Puts an event into the room. Its state after is that of its prev events, resolved, with the event.
    pub fn add(&mut self, draft: &Draft, rejected: bool) -> EventNid {
        let before = self.before(&draft.prev);
        let pdu = self.pdu(draft);
        let nid = EventNid(self.entries.len() as i64);
        let mut after = before;
        if let Some(state_key) = &pdu.state_key {
            let key = self.key((pdu.kind.clone(), state_key.clone()));
            if !rejected {
                after.insert(key, nid);
            }
        }
        self.ids.insert(draft.id.clone(), nid);
        self.entries.push(Entry {
            auth: draft.auth.iter().map(|id| self.nid(id)).collect(),
            pdu: Arc::new(pdu),
            rejected,
            after,
        });
        nid
    }

    /// Fills in the auth events from the state before, then adds.
    pub fn send(&mut self, mut draft: Draft, prev: &[&str]) -> EventNid {
        draft.prev = prev.iter().map(|id| (*id).to_owned()).collect();
        let state = self.before(&draft.prev);
        draft.auth = self.choose_auth(&draft, &state);
        self.add(&draft, false)
    }

    pub fn choose_auth(&self, draft: &Draft, state: &StateMap) -> Vec<String> {
        let types = auth::auth_types(
            self.version,
            &draft.kind,
            &UserId::parse(&draft.sender).unwrap(),
            draft.state_key.as_deref(),
            &draft.content,
        );
        types
            .iter()
            .filter_map(|key| state.get(*self.keys.get(key)?))
            .map(|event| self.word(event))
            .collect()
    }

    pub fn word(&self, event: EventNid) -> String {
        let found = self.ids.iter().find(|(_, nid)| **nid == event);
        found.unwrap().0.clone()
    }

    pub fn before(&self, prev: &[String]) -> StateMap {
        let maps: Vec<_> = prev
            .iter()
            .map(|id| self.entry(self.nid(id)).after.clone())
            .collect();
        self.resolve(&maps)
    }

    pub fn resolve(&self, maps: &[StateMap]) -> StateMap {
        resolve(self.version, maps, &self.closure(maps))
    }

    pub fn map(&mut self, ids: &[&str]) -> StateMap {
        ids.iter()
            .map(|id| {
                let nid = self.nid(id);
                let pdu = self.entry(nid).pdu.clone();
                (
                    self.key((pdu.kind.clone(), pdu.state_key.clone().unwrap())),
                    nid,
                )
            })
            .collect()
    }

    pub fn words(&self, state: &StateMap) -> BTreeSet<String> {
        state.iter().map(|(_, event)| self.word(event)).collect()
    }

    pub fn at(&self, state: &StateMap, kind: &str, state_key: &str) -> Option<Arc<Pdu>> {
        let key = self.keys.get(&(kind.into(), state_key.into()))?;
        Some(self.entry(state.get(*key)?).pdu.clone())
    }

    /// What resolving these maps needs and not an event more.
    pub fn closure(&self, maps: &[StateMap]) -> EventSet {
        let mut wanted = BTreeSet::new();
        for map in maps.iter().skip(1) {
            for (_, a, b) in maps[0].diff(map) {
                wanted.extend(a.into_iter().chain(b));
            }
        }
        if wanted.is_empty() {
            return EventSet::default();
        }
        let mut seen = BTreeSet::new();
        while let Some(event) = wanted.pop_first() {
            if !seen.insert(event) {
                continue;
            }
            let entry = self.entry(event);
            let create = ("m.room.create".into(), "".into());
            let types = auth::auth_types_of(&entry.pdu).into_iter().chain([create]);
            let keys: Vec<_> = types
                .filter_map(|key| self.keys.get(&key).copied())
                .collect();
            let stand = keys
                .iter()
                .flat_map(|key| maps.iter().filter_map(|map| map.get(*key)));
            let chain = auth_chain([event], &|event| &self.entry(event).auth);
            wanted.extend(stand.chain(chain).filter(|event| !seen.contains(event)));
        }
        let events = seen.into_iter().map(|event| {
            let Entry {
                pdu,
                auth,
                rejected,
                ..
            } = self.entry(event);
            let stored = StoredEvent {
                pdu: pdu.clone(),
                auth_events: auth.clone(),
                rejected: *rejected,
            };
            (event, stored)
        });
        let mut set = EventSet {
            events: events.collect(),
            keys: self.keys.clone(),
            shared: BTreeSet::new(),
        };
        set.shared = self.shared(maps, &set, &[]);
        set
    }

    /// As a machine does that has made or received an event and not stored it yet: the store answers for
    /// what it has, and is told what the other stands on.
    pub fn resolve_with_own(&self, maps: &[StateMap], own: EventNid) -> StateMap {
        let mut set = self.closure(maps);
        let Some(stored) = set.events.remove(&own) else {
            return resolve(self.version, maps, &set);
        };
        set.shared.clear();
        set.shared = self.shared(maps, &set, &stored.auth_events);
        set.events.insert(own, stored);
        resolve(self.version, maps, &set)
    }

    fn shared(&self, maps: &[StateMap], set: &EventSet, also: &[EventNid]) -> BTreeSet<EventNid> {
        let agreed = maps[0]
            .iter()
            .filter(|(key, event)| maps.iter().all(|map| map.get(*key) == Some(*event)));
        let agreed = agreed.map(|(_, event)| event);
        let chain = auth_chain(agreed, &|event| &self.entry(event).auth);
        let mut shared = in_question(maps, set, also);
        shared.retain(|event| chain.contains(event));
        shared
    }

    fn key(&mut self, key: StateKey) -> KeyNid {
        let next = KeyNid(self.keys.len() as u32);
        *self.keys.entry(key).or_insert(next)
    }
}

/// Versions 1 and 2 have a domain in their ids.
pub fn event_id(version: RoomVersion, word: &str) -> EventId {
    let id = match version <= RoomVersion::V2 && !word.contains(':') {
        true => format!("${word}:one"),
        false => format!("${word}"),
    };
    EventId::parse(&id).unwrap()
}

/// The room is named for a create event with the id `create`.
pub fn room_id(version: RoomVersion) -> RoomId {
    RoomId::parse(match version.rules().room_id_is_create_hash {
        true => "!create",
        false => "!room:one",
    })
    .unwrap()
}

pub fn pdu(version: RoomVersion, draft: &Draft, depth: i64) -> Pdu {
    let ids = |words: &[String]| words.iter().map(|word| event_id(version, word)).collect();
    let mut object = json!({"type": draft.kind, "content": draft.content});
    let room_id = room_id(version);
    if draft.kind != "m.room.create" || !version.rules().room_id_is_create_hash {
        object["room_id"] = room_id.as_str().into();
    }
    let json = to_canonical_lenient(&object).unwrap();
    Pdu {
        version,
        event_id: event_id(version, &draft.id),
        room_id,
        sender: UserId::parse(&draft.sender).unwrap(),
        kind: draft.kind.as_str().into(),
        state_key: draft.state_key.as_deref().map(Into::into),
        origin_server_ts: draft.ts,
        depth,
        prev_events: ids(&draft.prev),
        auth_events: ids(&draft.auth),
        redacts: draft.content["redacts"]
            .as_str()
            .map(|id| Box::new(EventId::parse(id).unwrap())),
        spans: Spans::of(&json),
        json: json.into(),
        redacted: false,
        oversized_field: false,
    }
}
