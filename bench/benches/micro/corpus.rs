//! Signed member events of version 11, as other servers send them.

use std::collections::BTreeMap;

use protocol::build::{PduDraft, Reference};
use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::signature::{Keys, SigningKey, VerifyKey};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::{Map, Value, json};

pub const VERSION: RoomVersion = RoomVersion::V11;
/// As many as a full batch of signatures.
pub const EVENTS: usize = 2048;
/// Whose servers they are of.
const SERVERS: usize = 200;

pub struct Corpus {
    /// With `unsigned`, and the keys in no order.
    pub raw: Vec<String>,
    pub pdus: Vec<Pdu>,
    /// What each was signed over.
    pub signed: Vec<String>,
    pub keys: KeyMap,
}

pub struct KeyMap(pub BTreeMap<ServerName, VerifyKey>);

impl Keys for KeyMap {
    fn key(&self, server: &ServerName, _: &str, _: i64, _: RoomVersion) -> Option<VerifyKey> {
        self.0.get(server).cloned()
    }
}

/// The order in which a server may well write the keys of an event.
const WRITTEN: [&str; 13] = [
    "type",
    "room_id",
    "sender",
    "content",
    "depth",
    "prev_events",
    "auth_events",
    "origin_server_ts",
    "hashes",
    "state_key",
    "origin",
    "signatures",
    "unsigned",
];

pub fn room() -> anyhow::Result<RoomId> {
    Ok(RoomId::parse("!bench:example.org")?)
}

pub fn make() -> anyhow::Result<Corpus> {
    let mut rng = StdRng::seed_from_u64(1);
    let mut keys = BTreeMap::new();
    let mut signers = Vec::new();
    for n in 0..SERVERS {
        let name = ServerName::parse(&format!("server{n}.example.org"))?;
        let key = SigningKey::generate(rng.random(), "a_key")?;
        keys.insert(name.clone(), key.verify_key());
        signers.push((name, key));
    }
    let mut corpus = Corpus {
        raw: Vec::new(),
        pdus: Vec::new(),
        signed: Vec::new(),
        keys: KeyMap(keys),
    };
    for n in 0..EVENTS {
        let (server, key) = &signers[rng.random_range(0..SERVERS)];
        let mut id = || -> anyhow::Result<Reference> {
            Ok(EventId::parse(&format!("${:043x}", rng.random::<u128>()))?.into())
        };
        let auth_events = (0..4).map(|_| id()).collect::<anyhow::Result<_>>()?;
        let prev_events = (0..1 + n % 5)
            .map(|_| id())
            .collect::<anyhow::Result<_>>()?;
        let sender = UserId::parse(&format!("@user{n}:{server}"))?;
        let draft = PduDraft {
            room_id: Some(room()?),
            state_key: Some(sender.as_str().to_owned()),
            sender,
            kind: "m.room.member".to_owned(),
            content: json!({
                "avatar_url": format!("mxc://{server}/{:024x}", rng.random::<u64>()),
                "displayname": format!("Somebody or other, number {n} \u{1f980}"),
                "membership": "join",
            }),
            prev_events,
            auth_events,
            depth: 1000 + n as i64,
            origin_server_ts: 1_700_000_000_000 + n as i64,
            redacts: None,
            extra: Map::from_iter([("origin".to_owned(), server.as_str().into())]),
        };
        let pdu = draft.sign(key, server, VERSION)?;
        let mut event: Map<String, Value> = serde_json::from_str(&pdu.json)?;
        event.insert("unsigned".to_owned(), json!({"age": 1234}));
        corpus.raw.push(written(&event));
        corpus.signed.push(pdu.signing_bytes());
        corpus.pdus.push(pdu);
    }
    Ok(corpus)
}

fn written(event: &Map<String, Value>) -> String {
    let members: Vec<String> = WRITTEN
        .iter()
        .filter_map(|key| Some(format!("\"{key}\":{}", event.get(*key)?)))
        .collect();
    format!("{{{}}}", members.join(","))
}
