//! A big room in the store of a server that doesn't run: every event is signed by the server of its sender.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use protocol::build::PduDraft;
use protocol::id::{RoomId, ServerName, UserId};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::signature::SigningKey;
use protocol::state::StateMap;
use room::effect::{Extremity, Load, Loaded, Place};
use room::write::{EventState, FanOut, NewEvent, Verdict, WriteSet};
use serde_json::{Map, Value, json};
use storage::apply::apply;
use storage::load::load;
use storage::queues::{ServerKey, save_server_keys};
use storage::{Options, Store};

const VERSION: RoomVersion = RoomVersion::V11;
/// Events in one commit.
const CHUNK: usize = 2000;
const FAKE_SERVERS: usize = 100;
/// How long the keys of the fake servers are good for, as nobody can ask those for other ones.
const KEYS_VALID_MS: i64 = 7 * 24 * 3600 * 1000;

/// A server, real or not, in whose name events can be signed.
struct Signer {
    name: ServerName,
    key: SigningKey,
}

/// Makes the room, of the version 11 and public, and returns its id. The fake servers' keys are left with
/// the store, for its server to vouch for: names in `.invalid` are looked up nowhere.
pub async fn make(
    database: &Path,
    signing_key: &Path,
    creator: &UserId,
    members: usize,
    now_ms: i64,
) -> anyhow::Result<RoomId> {
    let server = creator.server_name();
    let line = std::fs::read_to_string(signing_key)?;
    let own = Signer {
        key: SigningKey::parse(line.trim())?,
        name: server.clone(),
    };
    let options = Options {
        server_name: server.clone(),
        ..Options::default()
    };
    let store = Store::open(&format!("sqlite:{}", database.display()), options).await?;
    let fakes: Vec<Signer> = (0..FAKE_SERVERS)
        .map(fake_server)
        .collect::<anyhow::Result<_>>()?;
    let keys: Vec<ServerKey> = fakes
        .iter()
        .map(|fake| published_key(fake, now_ms))
        .collect::<anyhow::Result<_>>()?;
    store.write(move |c| save_server_keys(c, &keys)).await?;

    let mut room = Room {
        id: RoomId::parse(&format!("!demo:{server}"))?,
        events: Vec::new(),
        now_ms,
        state: StateMap::new(),
    };
    room.begin(&own, creator, members)?;
    for n in room.members()..members {
        let fake = &fakes[n % fakes.len()];
        let user = UserId::parse(&format!("@user{n}:{}", fake.name))?;
        let content = json!({ "membership": "join", "displayname": format!("User {n}") });
        room.add(fake, &user, "m.room.member", user.as_str(), content)?;
    }
    for start in (0..room.events.len()).step_by(CHUNK) {
        room.store(&store, start).await?;
    }
    Ok(room.id)
}

fn fake_server(n: usize) -> anyhow::Result<Signer> {
    let mut seed = [0x56; 32];
    seed[..8].copy_from_slice(&(n as u64).to_be_bytes());
    Ok(Signer {
        name: ServerName::parse(&format!("s{n}.invalid"))?,
        key: SigningKey::generate(seed, "demo")?,
    })
}

/// What the server would answer to `GET /_matrix/key/v2/server`.
fn published_key(server: &Signer, now_ms: i64) -> anyhow::Result<ServerKey> {
    let (name, key) = (&server.name, &server.key);
    let valid_until_ms = now_ms + KEYS_VALID_MS;
    let mut response = Map::new();
    response.insert("server_name".to_owned(), name.as_str().into());
    response.insert("valid_until_ts".to_owned(), valid_until_ms.into());
    response.insert(
        "verify_keys".to_owned(),
        json!({ key.key_id(): { "key": key.public_base64() } }),
    );
    response.insert("old_verify_keys".to_owned(), json!({}));
    key.sign_json(&mut response, name)?;
    Ok(ServerKey {
        server: name.clone(),
        key_id: key.key_id().to_owned(),
        public_key: key.public_base64(),
        valid_until_ms,
        old: false,
        fetched_ms: now_ms,
        response: Value::Object(response).to_string(),
    })
}

/// The room so far: one line of state events, each upon the one before.
struct Room {
    id: RoomId,
    events: Vec<Arc<Pdu>>,
    now_ms: i64,
    /// After the last event that is stored.
    state: StateMap,
}

impl Room {
    /// What a public room begins with.
    fn begin(&mut self, own: &Signer, creator: &UserId, members: usize) -> anyhow::Result<()> {
        let mut add = |kind, key: &str, content| self.add(own, creator, kind, key, content);
        let levels = json!({ "users": { creator.as_str(): 100 } });
        let join = json!({ "membership": "join", "displayname": "Host" });
        add("m.room.create", "", json!({ "room_version": "11" }))?;
        add("m.room.member", creator.as_str(), join)?;
        add("m.room.power_levels", "", levels)?;
        add("m.room.join_rules", "", json!({ "join_rule": "public" }))?;
        let visibility = json!({ "history_visibility": "shared" });
        add("m.room.history_visibility", "", visibility)?;
        let name = json!({ "name": format!("A room of {members}") });
        add("m.room.name", "", name)
    }

    fn members(&self) -> usize {
        let of_members = |pdu: &&Arc<Pdu>| &*pdu.kind == "m.room.member";
        self.events.iter().filter(of_members).count()
    }

    fn add(
        &mut self,
        signer: &Signer,
        sender: &UserId,
        kind: &str,
        state_key: &str,
        content: Value,
    ) -> anyhow::Result<()> {
        let depth = self.events.len() as i64 + 1;
        let draft = PduDraft {
            room_id: Some(self.id.clone()),
            sender: sender.clone(),
            kind: kind.to_owned(),
            state_key: Some(state_key.to_owned()),
            content,
            prev_events: self
                .events
                .last()
                .map(|pdu| (&**pdu).into())
                .into_iter()
                .collect(),
            auth_events: self.auth_events(sender, kind),
            depth,
            origin_server_ts: self.now_ms,
            redacts: None,
            extra: Map::new(),
        };
        let pdu = draft.sign(&signer.key, &signer.name, VERSION)?;
        self.events.push(Arc::new(pdu));
        Ok(())
    }

    /// Of the events of [`Self::begin`], which alone allow anything here.
    fn auth_events(&self, sender: &UserId, kind: &str) -> Vec<protocol::build::Reference> {
        let allows = |pdu: &&Arc<Pdu>| match &*pdu.kind {
            "m.room.create" | "m.room.power_levels" => true,
            "m.room.join_rules" => kind == "m.room.member",
            "m.room.member" => pdu.sender == *sender,
            _ => false,
        };
        let first = self.events.iter().take(6);
        first.filter(allows).map(|pdu| (&**pdu).into()).collect()
    }

    /// Stores the chunk that starts here; those before it are stored.
    async fn store(&mut self, store: &Store, start: usize) -> anyhow::Result<()> {
        let end = self.events.len().min(start + CHUNK);
        let chunk = &self.events[start..end];
        let keys = chunk
            .iter()
            .filter_map(|pdu| Some((pdu.kind.clone(), pdu.state_key.clone()?)));
        let question = Load::Intern {
            version: VERSION,
            ids: chunk.iter().map(|pdu| pdu.event_id.clone()).collect(),
            keys: keys.collect(),
        };
        let Loaded::Interned { events, keys } = load(store, &self.id, question).await? else {
            bail!("not what was asked for");
        };
        let mut writes = WriteSet::new(self.id.clone(), VERSION);
        for ((pdu, nid), key) in chunk.iter().zip(&events).zip(&keys) {
            let before = self.state.clone();
            self.state.insert(*key, *nid);
            writes.events.push(NewEvent {
                nid: *nid,
                pdu: Arc::clone(pdu),
                key: Some(*key),
                place: Place::Timeline,
                state: Some(EventState {
                    before,
                    after: self.state.clone(),
                    partial: false,
                }),
                verdict: Verdict::Accepted,
                fan_out: FanOut::Nobody,
                transaction: None,
            });
        }
        let last = writes.events.last().context("a chunk without events")?;
        writes.forward_extremities = Some(vec![Extremity {
            nid: last.nid,
            event_id: last.pdu.event_id.clone(),
            depth: last.pdu.depth,
            partial: false,
        }]);
        writes.current_state = Some(self.state.clone());
        match apply(store, writes).await? {
            Ok(_) => Ok(()),
            Err(_) => bail!("somebody else writes to the room"),
        }
    }
}
