//! A room as its residents hold it, made by the machines themselves and shared by all runs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use protocol::build;
use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::signature::SigningKey;
use room::effect::{Effect, Fault, Handshake, Input, Machine, Now};
use room::resident::{Accept, AcceptRequest, Make, MakeRequest};
use room::send::{Draft, Send};
use room::template::Own;
use serde_json::{Map, Value, json};

use crate::store::Store;

pub const VERSION: RoomVersion = RoomVersion::V11;
/// Servers that hold the room.
pub const RESIDENTS: usize = 5;

pub struct Fixture {
    pub room: RoomId,
    /// The joining server.
    pub us: Own,
    pub user: UserId,
    pub residents: Vec<ServerName>,
    /// The room before our join.
    pub store: Store,
    pub template: Arc<str>,
    /// State before our join, and its auth chain.
    pub state: Vec<Arc<Pdu>>,
    pub chain: Vec<Arc<Pdu>>,
    pub by_json: BTreeMap<Arc<str>, Arc<Pdu>>,
}

pub fn server(n: usize) -> ServerName {
    ServerName::parse(&format!("s{n}")).expect("a plain name")
}

pub fn user(name: &str, server: &ServerName) -> UserId {
    UserId::parse(&format!("@{name}:{server}")).expect("a plain name")
}

pub fn own(name: ServerName) -> Own {
    let mut seed = [0; 32];
    for (to, from) in seed.iter_mut().zip(name.as_str().bytes()) {
        *to = from;
    }
    let key = SigningKey::generate(seed, "a").expect("a plain version");
    Own {
        name,
        key: Arc::new(key),
    }
}

pub fn at(millis: u64) -> Now {
    Now {
        since_start: Duration::from_millis(millis),
        unix_ms: 1_700_000_000_000 + millis as i64,
    }
}

/// Runs a machine against a store alone: no network, no delay.
pub fn run<M: Machine>(machine: &mut M, store: &mut Store) -> M::Outcome {
    for _ in 0..10_000 {
        while let Some(effect) = machine.poll_effect() {
            if let Some(input) = carry_out(effect, store) {
                machine.handle(input, at(0));
            }
        }
        if let Some(outcome) = machine.poll_outcome() {
            return outcome;
        }
    }
    panic!("a machine alone with its store does not end");
}

/// Load, Check and Commit; asks are not answered here.
pub fn carry_out(effect: Effect, store: &mut Store) -> Option<Input> {
    Some(match effect {
        Effect::Load { ticket, room, load } => Input::Loaded {
            ticket,
            loaded: store.load(&room, load),
        },
        Effect::Check {
            ticket,
            version,
            pdus,
        } => Input::Checked {
            ticket,
            pdus: pdus.iter().map(|raw| check(raw, version)).collect(),
        },
        Effect::Commit { ticket, writes } => Input::Committed {
            ticket,
            outcome: store.commit(*writes).map(|_| ()),
        },
        Effect::Ask { .. } | Effect::Tell(_) => return None,
    })
}

/// What a forged event begins with on this network. Signatures themselves are not looked at: the oracles
/// of `protocol` see to them.
pub const FORGED: &str = "forged";

pub fn check(raw: &str, version: RoomVersion) -> Result<Arc<Pdu>, room::effect::BadPdu> {
    let bad = |event_id, fault, reason: String| room::effect::BadPdu {
        event_id,
        reason,
        fault,
    };
    if let Some(copied) = raw.strip_prefix(FORGED) {
        let event_id = Pdu::parse(copied, version).ok().map(|pdu| pdu.event_id);
        return Err(bad(event_id, Fault::Signature, "forged".to_owned()));
    }
    Pdu::parse(raw, version)
        .map(Arc::new)
        .map_err(|error| bad(None, Fault::Form, error.to_string()))
}

/// The drafts of a new public room.
pub fn new_room(creator: &UserId, version: RoomVersion) -> Vec<Draft> {
    let state = |kind: &str, content: Value| Draft::state(creator.clone(), kind, "", content);
    let mut create = json!({ "room_version": version.as_str() });
    if version.rules().creator_in_content {
        create["creator"] = creator.as_str().into();
    }
    let users = match version.rules().privileged_creators {
        true => json!({}),
        false => json!({ creator.as_str(): 100 }),
    };
    vec![
        state("m.room.create", create),
        Draft::state(
            creator.clone(),
            "m.room.member",
            creator.as_str(),
            json!({ "membership": "join" }),
        ),
        state("m.room.power_levels", json!({ "users": users })),
        state("m.room.join_rules", json!({ "join_rule": "public" })),
        state(
            "m.room.history_visibility",
            json!({ "history_visibility": "shared" }),
        ),
        state("m.room.name", json!({ "name": "the room" })),
    ]
}

/// Lets a user of another server join at this store's server, as that server would do it.
pub fn join_at(
    resident: &Own,
    store: &mut Store,
    room: &RoomId,
    joiner: &Own,
    user: &UserId,
) -> Arc<Pdu> {
    let request = MakeRequest {
        what: Handshake::Join,
        room: room.clone(),
        user: user.clone(),
        origin: joiner.name.clone(),
        versions: vec![VERSION.as_str().to_owned()],
        allowed: None,
    };
    let made = run(&mut Make::new(resident.clone(), request, at(0)), store).expect("a public room");
    let template: Map<String, Value> =
        serde_json::from_value(made.event).expect("a template is an object");
    let join = build::sign(template, &joiner.key, &joiner.name, VERSION).expect("a good template");
    let request = AcceptRequest {
        what: Handshake::Join,
        room: room.clone(),
        event_id: join.event_id.to_string(),
        origin: joiner.name.clone(),
        event: join.json.clone(),
        allowed: None,
    };
    run(&mut Accept::new(resident.clone(), request), store)
        .expect("a public room")
        .event
}

impl Fixture {
    pub fn new() -> Self {
        let residents: Vec<_> = (1..=RESIDENTS).map(server).collect();
        let first = own(residents[0].clone());
        let creator = user("creator", &first.name);
        let mut store = Store::new(first.name.clone());
        let room = RoomId::parse("!room:s1").expect("a plain name");
        let drafts = new_room(&creator, VERSION);
        let create = Send::create(first.clone(), VERSION, Some(room.clone()), drafts, at(0));
        let mut create = create.expect("good drafts");
        run(&mut create, &mut store).expect("a good room");
        for (n, resident) in residents.iter().enumerate().skip(1) {
            for name in ["one", "two", "three"].iter().take(n) {
                let joiner = own(resident.clone());
                let joining = user(name, resident);
                join_at(&first, &mut store, &room, &joiner, &joining);
            }
        }
        let topics = (0..4).map(|n| {
            let key = format!("key{n}");
            Draft::state(
                creator.clone(),
                "org.example.extra",
                &key,
                json!({ "n": n }),
            )
        });
        let mut extra = Send::new(first.clone(), room.clone(), topics.collect(), None, at(1));
        run(&mut extra, &mut store).expect("the creator may");
        Self::around(store, room, residents)
    }

    fn around(mut store: Store, room: RoomId, residents: Vec<ServerName>) -> Self {
        let us = own(ServerName::parse("us").expect("a plain name"));
        let user = user("alice", &us.name);
        let request = MakeRequest {
            what: Handshake::Join,
            room: room.clone(),
            user: user.clone(),
            origin: us.name.clone(),
            versions: vec![VERSION.as_str().to_owned()],
            allowed: None,
        };
        let first = own(residents[0].clone());
        let made = run(&mut Make::new(first, request, at(2)), &mut store).expect("a public room");
        let here = store.room(&room).expect("just made");
        let state: Vec<_> = here
            .state()
            .values()
            .map(|id| here.row(id).expect("state is stored").pdu.clone())
            .collect();
        let chain = chain_of(&store, &room, &state);
        let all = here.events.values().map(|row| row.pdu.clone());
        Self {
            by_json: all.map(|pdu| (pdu.json.clone(), pdu)).collect(),
            template: made.event.to_string().into(),
            room,
            us,
            user,
            residents,
            state,
            chain,
            store,
        }
    }

    /// Current state after our join, by name.
    pub fn truth(&self, join: &EventId) -> BTreeMap<(String, String), EventId> {
        let mut truth = self.store.room(&self.room).expect("it is there").state();
        let key = ("m.room.member".to_owned(), self.user.to_string());
        truth.insert(key, join.clone());
        truth
    }
}

impl Default for Fixture {
    fn default() -> Self {
        Self::new()
    }
}

/// The auth chains of these events, without the events themselves.
pub fn chain_of(store: &Store, room: &RoomId, of: &[Arc<Pdu>]) -> Vec<Arc<Pdu>> {
    let here = store.room(room).expect("the room is stored");
    let given: BTreeSet<_> = of.iter().map(|pdu| pdu.event_id.clone()).collect();
    let mut seen = BTreeSet::new();
    let mut left: Vec<EventId> = of.iter().flat_map(|pdu| pdu.auth_events.clone()).collect();
    while let Some(id) = left.pop() {
        if seen.insert(id.clone())
            && let Some(row) = here.row(&id)
        {
            left.extend(row.pdu.auth_events.iter().cloned());
        }
    }
    seen.difference(&given)
        .filter_map(|id| Some(here.row(id)?.pdu.clone()))
        .collect()
}
