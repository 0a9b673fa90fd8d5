//! A big room in the store of a server that doesn't run: every event is signed by the server of its sender.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use protocol::build::{PduDraft, Reference};
use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::signature::SigningKey;
use protocol::state::StateMap;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use room::effect::{Extremity, Load, Loaded, Place};
use room::write::{EventState, FanOut, NewEvent, Verdict, WriteSet};
use serde_json::{Map, Value, json};
use storage::apply::apply;
use storage::load::load;
use storage::queues::{ServerKey, save_server_keys};
use storage::{Options, Store};

/// Events in one commit.
const CHUNK: usize = 2000;
/// How long the keys of the fake servers are good for, as nobody can ask those for other ones.
const KEYS_VALID_MS: i64 = 7 * 24 * 3600 * 1000;
/// When the room was made, and how far its events are apart.
const BEGAN_MS: i64 = 1_760_000_000_000;
const APART_MS: i64 = 1000;
/// How much bigger the biggest of the fake servers are than the others: of the members, the first tenth of the
/// servers has about the half.
const SKEW: i32 = 3;
/// Changes of the power levels, spread over the room's life.
const POWER_CHANGES: usize = 5;

/// What the room is like. The same shape and creator make the same room.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    pub version: RoomVersion,
    /// Who is in the room at the end, with the creator.
    pub members: usize,
    /// Servers of the members, next to the creator's.
    pub servers: usize,
    /// Members that have changed their name, each once.
    pub profile_changes: usize,
    /// Members that have left, of their own will.
    pub leaves: usize,
    pub bans: usize,
    /// Pairs of joins that did not know of each other.
    pub forks: usize,
    pub seed: u64,
}

impl Shape {
    /// Nothing but joins.
    pub fn plain(version: RoomVersion, members: usize, servers: usize) -> Self {
        Self {
            version,
            members,
            servers,
            profile_changes: 0,
            leaves: 0,
            bans: 0,
            forks: 0,
            seed: 0,
        }
    }
}

/// What came out.
pub struct Generated {
    pub id: RoomId,
    pub state_events: usize,
    /// Those that are not of the state themselves.
    pub auth_chain_events: usize,
    pub bytes: usize,
}

/// A server, real or not, in whose name events can be signed.
pub struct Signer {
    pub name: ServerName,
    pub key: SigningKey,
}

/// Of servers that don't answer: their names are addresses of this machine's, so nobody looks them up, and
/// nothing listens there.
pub fn fake_server(n: usize) -> anyhow::Result<Signer> {
    let mut seed = [0x56; 32];
    seed[..8].copy_from_slice(&(n as u64).to_be_bytes());
    Ok(Signer {
        name: ServerName::parse(&format!("127.99.{}.{}:1", n / 250, n % 250 + 1))?,
        key: SigningKey::generate(seed, "bench")?,
    })
}

/// Makes a public room and stores it in the database of the creator's server.
pub async fn make(
    database: &Path,
    signing_key: &Path,
    creator: &UserId,
    shape: &Shape,
) -> anyhow::Result<Generated> {
    let server = creator.server_name();
    let line = std::fs::read_to_string(signing_key)?;
    let own = Signer {
        key: SigningKey::parse(line.trim())?,
        name: server.clone(),
    };
    let fakes = fake_servers(shape.servers)?;
    let mut room = Room::new(RoomId::parse(&format!("!bench:{server}"))?, shape.version);
    room.fill(&own, creator, &fakes, shape)?;

    let store = open(database, &server).await?;
    let mut stored = Stored::default();
    for start in (0..room.events.len()).step_by(CHUNK) {
        room.store(&store, start, &mut stored).await?;
    }
    Ok(room.summary())
}

/// Leaves the fake servers' keys with a store, for its server to vouch for.
pub async fn publish_keys(
    database: &Path,
    server: &ServerName,
    servers: usize,
    now_ms: i64,
) -> anyhow::Result<()> {
    let keys: Vec<ServerKey> = fake_servers(servers)?
        .iter()
        .map(|fake| published_key(fake, now_ms))
        .collect::<anyhow::Result<_>>()?;
    let store = open(database, server).await?;
    store.write(move |c| save_server_keys(c, &keys)).await?;
    Ok(())
}

async fn open(database: &Path, server: &ServerName) -> anyhow::Result<Store> {
    let options = Options {
        server_name: server.clone(),
        ..Options::default()
    };
    Ok(Store::open(&format!("sqlite:{}", database.display()), options).await?)
}

fn fake_servers(count: usize) -> anyhow::Result<Vec<Signer>> {
    (0..count).map(fake_server).collect()
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

/// One event, and how it lies in the room.
struct Made {
    pdu: Arc<Pdu>,
    /// It did not know of the event before it in the list, only of those before that one.
    beside: bool,
}

/// The room so far: one line of state events with some places where two lie beside each other.
struct Room {
    id: RoomId,
    version: RoomVersion,
    events: Vec<Made>,
    /// The newest event for a type and state key.
    newest: BTreeMap<(String, String), Reference>,
    /// The events that nothing refers to so far, and those that they refer to.
    tips: Vec<Reference>,
    tips_before: Vec<Reference>,
}

impl Room {
    fn new(id: RoomId, version: RoomVersion) -> Self {
        Self {
            id,
            version,
            events: Vec::new(),
            newest: BTreeMap::new(),
            tips: Vec::new(),
            tips_before: Vec::new(),
        }
    }

    fn fill(
        &mut self,
        own: &Signer,
        creator: &UserId,
        fakes: &[Signer],
        shape: &Shape,
    ) -> anyhow::Result<()> {
        let mut rng = StdRng::seed_from_u64(shape.seed);
        self.begin(own, creator, shape)?;
        let comers = shape.members.saturating_sub(1) + shape.leaves + shape.bans;
        let forks = every(comers, shape.forks);
        let powers = every(comers, POWER_CHANGES.min(comers / 100));
        let mut users = Vec::with_capacity(comers);
        for n in 0..comers {
            let home = match n < fakes.len() {
                true => n,
                false => (fakes.len() as f64 * rng.random::<f64>().powi(SKEW)) as usize,
            };
            let fake = &fakes[home];
            let user = UserId::parse(&format!("@user{n}:{}", fake.name))?;
            let beside = forks.contains(&n) && n > 0;
            let content = json!({
                "membership": "join",
                "displayname": format!("User number {n}"),
                "avatar_url": format!("mxc://{}/{:024x}", fake.name, rng.random::<u64>()),
            });
            self.add(fake, &user, MEMBER, user.as_str(), content, beside)?;
            users.push((user, home));
            if powers.contains(&n) {
                let levels = json!({ "users": { creator.as_str(): 100 }, "invite": n % 50 });
                self.add(own, creator, "m.room.power_levels", "", levels, false)?;
            }
        }
        // Shuffled, so that who leaves is of any age and server.
        for n in (1..users.len()).rev() {
            users.swap(n, rng.random_range(0..=n));
        }
        let (banned, others) = users.split_at(shape.bans);
        let (left, stay) = others.split_at(shape.leaves);
        for (user, home) in stay.iter().take(shape.profile_changes) {
            let name = format!("Another name {}", rng.random::<u32>());
            let content = json!({ "membership": "join", "displayname": name });
            self.add(&fakes[*home], user, MEMBER, user.as_str(), content, false)?;
        }
        for (user, home) in left {
            let content = json!({ "membership": "leave" });
            self.add(&fakes[*home], user, MEMBER, user.as_str(), content, false)?;
        }
        for (user, _) in banned {
            let content = json!({ "membership": "ban", "reason": "spam" });
            self.add(own, creator, MEMBER, user.as_str(), content, false)?;
        }
        Ok(())
    }

    /// What a public room begins with.
    fn begin(&mut self, own: &Signer, creator: &UserId, shape: &Shape) -> anyhow::Result<()> {
        let mut add = |kind, key: &str, content| self.add(own, creator, kind, key, content, false);
        let mut create = json!({ "room_version": shape.version.as_str() });
        if shape.version < RoomVersion::V11 {
            create["creator"] = creator.as_str().into();
        }
        let join = json!({ "membership": "join", "displayname": "Host" });
        let levels = json!({ "users": { creator.as_str(): 100 } });
        add("m.room.create", "", create)?;
        add(MEMBER, creator.as_str(), join)?;
        add("m.room.power_levels", "", levels)?;
        add("m.room.join_rules", "", json!({ "join_rule": "public" }))?;
        let visibility = json!({ "history_visibility": "shared" });
        add("m.room.history_visibility", "", visibility)?;
        let name = json!({ "name": format!("A room of {}", shape.members) });
        add("m.room.name", "", name)
    }

    fn add(
        &mut self,
        signer: &Signer,
        sender: &UserId,
        kind: &str,
        state_key: &str,
        content: Value,
        beside: bool,
    ) -> anyhow::Result<()> {
        let joins = content["membership"] == "join";
        let auth_events = self.auth_events(sender, kind, state_key, joins);
        let number = self.events.len() as i64;
        let draft = PduDraft {
            room_id: Some(self.id.clone()),
            sender: sender.clone(),
            kind: kind.to_owned(),
            state_key: Some(state_key.to_owned()),
            content,
            prev_events: if beside {
                self.tips_before.clone()
            } else {
                self.tips.clone()
            },
            auth_events,
            depth: number + 1,
            origin_server_ts: BEGAN_MS + number * APART_MS,
            redacts: None,
            extra: Map::new(),
        };
        let pdu = Arc::new(draft.sign(&signer.key, &signer.name, self.version)?);
        let reference = Reference::from(&*pdu);
        if beside {
            self.tips.push(reference.clone());
        } else {
            self.tips_before = std::mem::replace(&mut self.tips, vec![reference.clone()]);
        }
        self.newest
            .insert((kind.to_owned(), state_key.to_owned()), reference);
        self.events.push(Made { pdu, beside });
        Ok(())
    }

    /// What the specification's selection gives; nobody here needs an invite.
    fn auth_events(
        &self,
        sender: &UserId,
        kind: &str,
        state_key: &str,
        joins: bool,
    ) -> Vec<Reference> {
        let mut wanted = vec![
            ("m.room.create", ""),
            ("m.room.power_levels", ""),
            (MEMBER, sender.as_str()),
        ];
        if joins {
            wanted.push(("m.room.join_rules", ""));
        }
        if kind == MEMBER && state_key != sender.as_str() {
            wanted.push((MEMBER, state_key));
        }
        wanted
            .into_iter()
            .filter_map(|(kind, key)| self.newest.get(&(kind.to_owned(), key.to_owned())))
            .cloned()
            .collect()
    }

    fn summary(&self) -> Generated {
        let by_id: BTreeMap<&EventId, &Pdu> = self
            .events
            .iter()
            .map(|made| (&made.pdu.event_id, &*made.pdu))
            .collect();
        let state: BTreeSet<&EventId> = self.newest.values().map(|r| &r.event_id).collect();
        let mut closure = state.clone();
        let mut open: Vec<&EventId> = state.iter().copied().collect();
        while let Some(id) = open.pop() {
            let cited = by_id.get(id).into_iter().flat_map(|pdu| &pdu.auth_events);
            open.extend(cited.filter(|id| closure.insert(id)));
        }
        Generated {
            id: self.id.clone(),
            state_events: state.len(),
            auth_chain_events: closure.len() - state.len(),
            bytes: closure.iter().map(|id| by_id[*id].json.len()).sum(),
        }
    }

    /// Stores the chunk that starts here; those before it are stored.
    async fn store(&self, store: &Store, start: usize, stored: &mut Stored) -> anyhow::Result<()> {
        let end = self.events.len().min(start + CHUNK);
        let chunk = &self.events[start..end];
        let keys = chunk
            .iter()
            .filter_map(|made| Some((made.pdu.kind.clone(), made.pdu.state_key.clone()?)));
        let question = Load::Intern {
            version: self.version,
            ids: chunk.iter().map(|made| made.pdu.event_id.clone()).collect(),
            keys: keys.collect(),
            new: false,
        };
        let Loaded::Interned { events, keys } = load(store, &self.id, question).await? else {
            bail!("not what was asked for");
        };
        let mut writes = WriteSet::new(self.id.clone(), self.version);
        for ((made, nid), key) in chunk.iter().zip(&events).zip(&keys) {
            if !made.beside {
                stored.before = stored.all.clone();
            }
            let mut after = stored.before.clone();
            after.insert(*key, *nid);
            // Only joins of different users lie beside each other, so nothing needs resolving.
            stored.all.insert(*key, *nid);
            writes.events.push(NewEvent {
                nid: *nid,
                pdu: Arc::clone(&made.pdu),
                key: Some(*key),
                place: Place::Timeline,
                state: Some(EventState {
                    before: stored.before.clone(),
                    after,
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
        writes.current_state = Some(stored.all.clone());
        match apply(store, writes).await? {
            Ok(_) => Ok(()),
            Err(_) => bail!("somebody else writes to the room"),
        }
    }
}

const MEMBER: &str = "m.room.member";

/// The state while the events are stored in turn.
#[derive(Default)]
struct Stored {
    /// With all events.
    all: StateMap,
    /// Before the last one that was not beside another.
    before: StateMap,
}

/// So many numbers below the length, evenly spread.
fn every(length: usize, count: usize) -> BTreeSet<usize> {
    (1..=count).map(|n| n * length / (count + 1)).collect()
}
