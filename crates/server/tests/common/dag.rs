//! A room as its residents know it: every event, and the state that is true.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD as BASE64;
use homeserver::clock::{Clock as _, SystemClock};
use protocol::auth::auth_types;
use protocol::build::{PduDraft, Reference};
use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use room::effect::{RawPdu, Section};
use serde_json::{Map, Value, json};

use crate::resident::Resident;

/// Of rooms for which the test has no other wish.
pub const VERSION: RoomVersion = RoomVersion::V11;

pub struct Room {
    pub id: RoomId,
    pub version: RoomVersion,
    dag: Mutex<Dag>,
}

#[derive(Default)]
struct Dag {
    events: BTreeMap<EventId, Arc<Pdu>>,
    state: BTreeMap<(String, String), Arc<Pdu>>,
    /// The newest event; the residents of these tests never fork a room by themselves.
    tip: Option<Arc<Pdu>>,
}

/// An event to be made.
pub struct New {
    sender: String,
    kind: String,
    key: Option<String>,
    content: Value,
    prev: Option<Vec<EventId>>,
    auth: Option<Vec<EventId>>,
}

pub fn message(sender: &str, words: &str) -> New {
    New {
        sender: sender.to_owned(),
        kind: "m.room.message".to_owned(),
        key: None,
        content: json!({ "msgtype": "m.text", "body": words }),
        prev: None,
        auth: None,
    }
}

pub fn state(sender: &str, kind: &str, key: &str, content: Value) -> New {
    New {
        kind: kind.to_owned(),
        key: Some(key.to_owned()),
        content,
        ..message(sender, "")
    }
}

pub fn member(sender: &str, target: &str, membership: &str) -> New {
    let content = json!({ "membership": membership });
    state(sender, "m.room.member", target, content)
}

impl New {
    /// After these, not after the newest event.
    pub fn after(mut self, prev: &[&Pdu]) -> Self {
        self.prev = Some(prev.iter().map(|pdu| pdu.event_id.clone()).collect());
        self
    }

    pub fn become_kind(&mut self, kind: &str) {
        self.kind = kind.to_owned();
    }

    /// With this in its content.
    pub fn set(&mut self, key: &str, value: Value) {
        self.content[key] = value;
    }

    /// With these auth events, whether or not they are the right ones.
    pub fn standing_on(mut self, auth: &[&Pdu]) -> Self {
        self.auth = Some(auth.iter().map(|pdu| pdu.event_id.clone()).collect());
        self
    }
}

impl Room {
    /// A public room of this resident's charlie, with these users in its power levels.
    pub fn new(founder: &Resident, levels: &[(&str, i64)]) -> Arc<Self> {
        Self::found(founder, VERSION, levels)
    }

    pub fn found(founder: &Resident, version: RoomVersion, levels: &[(&str, i64)]) -> Arc<Self> {
        let charlie = founder.user("charlie");
        let hashed = version.rules().room_id_is_create_hash;
        let number = founder.next_number();
        // Without its number a room of version 12 might have the id of another.
        let create = json!({
            "room_version": version.as_str(),
            "creator": charlie,
            "number": number,
        });
        let create = state(&charlie, "m.room.create", "", create);
        let id = format!("!room{number}:{}", founder.name);
        let mut room = Self {
            id: RoomId::parse(&id).unwrap(),
            version,
            dag: Mutex::default(),
        };
        let create = room.make(founder, create);
        room.id = create.room_id.clone();
        room.add(&create);
        let room = Arc::new(room);
        let mut users = Map::new();
        if !hashed {
            users.insert(charlie.clone(), json!(100));
        }
        for (localpart, level) in levels {
            users.insert(founder.user(localpart), json!(level));
        }
        let users = json!({ "users": users });
        let rules = json!({ "join_rule": "public" });
        let visibility = json!({ "history_visibility": "shared" });
        for event in [
            member(&charlie, &charlie, "join"),
            state(&charlie, "m.room.power_levels", "", users),
            state(&charlie, "m.room.join_rules", "", rules),
            state(&charlie, "m.room.history_visibility", "", visibility),
        ] {
            room.send(founder, event);
        }
        founder.holds(&room);
        room
    }

    /// What a send_join gave.
    pub fn of(id: RoomId, version: RoomVersion, parts: Vec<(Section, Vec<RawPdu>)>) -> Arc<Self> {
        let room = Self {
            id,
            version,
            dag: Mutex::default(),
        };
        for (section, pdus) in parts {
            for pdu in pdus {
                let pdu = Arc::new(Pdu::parse(&pdu, version).unwrap());
                match section {
                    Section::State => room.add(&pdu),
                    Section::AuthChain => room.dag.lock().unwrap().know(&pdu),
                }
            }
        }
        Arc::new(room)
    }

    /// Makes and signs an event that nobody but the test knows.
    pub fn make(&self, by: &Resident, new: New) -> Arc<Pdu> {
        let sender = UserId::parse(&new.sender).unwrap();
        let makes_id = self.version.rules().room_id_is_create_hash && new.kind == "m.room.create";
        let key = new.key.as_deref();
        let (prev_events, auth_events, depth) = {
            let dag = self.dag.lock().unwrap();
            let prev = new.prev.unwrap_or_else(|| {
                let tip = dag.tip.iter();
                tip.map(|pdu| pdu.event_id.clone()).collect()
            });
            let depths = prev.iter().map(|id| dag.depth(id));
            let depth = depths.max().unwrap_or(0) + 1;
            let auth = new.auth.unwrap_or_else(|| {
                let wanted = auth_types(self.version, &new.kind, &sender, key, &new.content);
                let found = wanted.iter().filter_map(|(kind, key)| {
                    let pdu = dag.state.get(&(kind.to_string(), key.to_string()))?;
                    Some(pdu.event_id.clone())
                });
                found.collect()
            });
            (prev, auth, depth)
        };
        let draft = PduDraft {
            room_id: Some(self.id.clone()).filter(|_| !makes_id),
            sender,
            kind: new.kind,
            state_key: new.key,
            content: new.content,
            prev_events: prev_events.into_iter().map(Reference::from).collect(),
            auth_events: auth_events.into_iter().map(Reference::from).collect(),
            depth,
            origin_server_ts: now_ms(),
            redacts: None,
            extra: Map::new(),
        };
        let pdu = draft.sign(by.key(), &by.name, self.version).unwrap();
        let pdu = Arc::new(pdu);
        self.dag.lock().unwrap().know(&pdu);
        pdu
    }

    /// Makes an event that breaks a rule of the room's version, by the rules of another one.
    pub fn make_with(
        &self,
        by: &Resident,
        new: New,
        version: RoomVersion,
        change: impl FnOnce(&mut Value),
    ) -> Arc<Pdu> {
        let good = self.make(by, new);
        let mut event: Value = serde_json::from_str(&good.json).unwrap();
        change(&mut event);
        let Value::Object(event) = event else {
            panic!("an event is an object");
        };
        let pdu = Arc::new(sign_anything(event, by, version));
        self.dag.lock().unwrap().know(&pdu);
        pdu
    }

    /// Forgets an event that is the newest of its kind.
    pub fn lose(&self, pdu: &Pdu) {
        let mut dag = self.dag.lock().unwrap();
        dag.events.remove(&pdu.event_id);
        if let Some(key) = &pdu.state_key {
            dag.state.remove(&(pdu.kind.to_string(), key.to_string()));
        }
    }

    /// Makes an event that is true in the room.
    pub fn send(&self, by: &Resident, new: New) -> Arc<Pdu> {
        let pdu = self.make(by, new);
        self.add(&pdu);
        pdu
    }

    /// Makes an event that comes after the others, and changes nothing: the rules forbid it.
    pub fn send_forbidden(&self, by: &Resident, new: New) -> Arc<Pdu> {
        let pdu = self.make(by, new);
        self.dag.lock().unwrap().tip = Some(pdu.clone());
        pdu
    }

    pub fn add(&self, pdu: &Arc<Pdu>) {
        let mut dag = self.dag.lock().unwrap();
        dag.know(pdu);
        if let Some(key) = &pdu.state_key {
            let key = (pdu.kind.to_string(), key.to_string());
            dag.state.insert(key, pdu.clone());
        }
        dag.tip = Some(pdu.clone());
    }

    pub fn event(&self, id: &EventId) -> Option<Arc<Pdu>> {
        self.dag.lock().unwrap().events.get(id).cloned()
    }

    pub fn tip(&self) -> Arc<Pdu> {
        let dag = self.dag.lock().unwrap();
        dag.tip
            .clone()
            .expect("a room begins with its create event")
    }

    pub fn state(&self, kind: &str, key: &str) -> Arc<Pdu> {
        let key = (kind.to_owned(), key.to_owned());
        self.dag.lock().unwrap().state[&key].clone()
    }

    pub fn member(&self, user: &str) -> Arc<Pdu> {
        self.state("m.room.member", user)
    }

    pub fn all_state(&self) -> Vec<Arc<Pdu>> {
        self.dag.lock().unwrap().state.values().cloned().collect()
    }

    pub fn servers(&self) -> BTreeSet<ServerName> {
        let state = self.all_state().into_iter();
        let joined = state.filter(|pdu| pdu.membership() == Some("join"));
        joined.map(|pdu| pdu.sender.server_name()).collect()
    }

    /// The auth events of these, theirs, and so on.
    pub fn auth_chain<'a>(&self, of: impl IntoIterator<Item = &'a Arc<Pdu>>) -> Vec<Arc<Pdu>> {
        let dag = self.dag.lock().unwrap();
        let mut chain = BTreeMap::new();
        let mut open: Vec<EventId> = of
            .into_iter()
            .flat_map(|pdu| pdu.auth_events.clone())
            .collect();
        while let Some(id) = open.pop() {
            chain.entry(id).or_insert_with_key(|id| {
                let pdu = dag.events[id].clone();
                open.extend(pdu.auth_events.iter().cloned());
                pdu
            });
        }
        chain.into_values().collect()
    }

    /// What a resident answers to make_join and make_leave.
    pub fn template(&self, user: &UserId, content: Value) -> Value {
        let dag = self.dag.lock().unwrap();
        let wanted = auth_types(
            self.version,
            "m.room.member",
            user,
            Some(user.as_str()),
            &content,
        );
        let auth: Vec<&EventId> = wanted
            .iter()
            .filter_map(|(kind, key)| dag.state.get(&(kind.to_string(), key.to_string())))
            .map(|pdu| &pdu.event_id)
            .collect();
        let tip = dag.tip.as_ref().expect("a room has events");
        json!({
            "type": "m.room.member",
            "room_id": self.id,
            "sender": user,
            "state_key": user,
            "content": content,
            "prev_events": [tip.event_id],
            "auth_events": auth,
            "depth": tip.depth + 1,
        })
    }
}

/// Signs what our own signer would refuse to.
fn sign_anything(mut event: Map<String, Value>, by: &Resident, version: RoomVersion) -> Pdu {
    let hash = protocol::hash::content_hash(&event, version).unwrap();
    event.insert(
        "hashes".to_owned(),
        json!({ "sha256": BASE64.encode(hash) }),
    );
    event.insert("signatures".to_owned(), json!({}));
    let unsigned = Value::Object(event).to_string();
    let unsigned = Pdu::parse(&unsigned, version).unwrap();
    protocol::build::cosign(&unsigned, by.key(), &by.name).unwrap()
}

impl Dag {
    fn know(&mut self, pdu: &Arc<Pdu>) {
        self.events.insert(pdu.event_id.clone(), pdu.clone());
    }

    fn depth(&self, id: &EventId) -> i64 {
        self.events.get(id).map_or(0, |pdu| pdu.depth)
    }
}

pub fn ids(pdus: &[Arc<Pdu>]) -> Vec<EventId> {
    pdus.iter().map(|pdu| pdu.event_id.clone()).collect()
}

pub fn now_ms() -> i64 {
    SystemClock::default().unix_ms()
}
