//! Two forks of a big room meet: what resolving their states costs, through the machine that receives events
//! and the store.
//!
//! Each round two forks of ten state events grow from one event, on the same ten keys. The last event of the
//! second fork is the one looked at: with it the current state is the resolution of ten keys.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use protocol::auth;
use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::nid::{EventNid, KeyNid};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::signature::SigningKey;
use protocol::state::StateMap;
use protocol::state_resolution::resolve;
use room::effect::{Effect, Extremity, Input, Load, Loaded, Machine, Now, Place};
use room::receive::{Incoming, Receive, Received};
use room::template::Own;
use room::write::{EventState, FanOut, NewEvent, Verdict, WriteSet};
use serde_json::{Value, json};
use storage::apply::apply;
use storage::load::load;
use storage::{Options, Store};

/// Events in one commit, as in a join.
const CHUNK: usize = 2000;
/// Users with power, who make the forks.
const MODERATORS: usize = 10;
const ROUNDS: usize = 7;
/// The first number of a member's join; other events have lower ones.
const JOINS: u64 = 1_000_000;
const SERVER: &str = "example.org";
const ALICE: &str = "@alice:example.org";

/// What one room gave, medians of the rounds.
pub struct Figures {
    /// In what the store gave for the resolution.
    pub events: usize,
    pub resolving: Duration,
    pub loading: Duration,
    pub receiving: Duration,
    /// The same load from a store just opened, without the states themselves and with them.
    pub loading_cold: Duration,
    pub states_cold: Duration,
}

pub async fn measure(url: &str, version: RoomVersion, members: usize) -> anyhow::Result<Figures> {
    let mut world = World::open(url, version, members).await?;
    world.fill(members).await?;
    let mut rounds = Vec::new();
    for round in 0..ROUNDS {
        let forks = world.forks(round, members).await?;
        rounds.push(world.look_at(&forks).await?);
        world.merge(&forks).await?;
    }
    let forks = world.forks(ROUNDS, members).await?;
    let (tips, asked) = (forks.tips(), forks.question());
    drop(world.store);
    let store = open(url).await?;
    let start = Instant::now();
    load(&store, &world.room, Load::States { events: tips }).await?;
    let states_cold = start.elapsed();
    let start = Instant::now();
    load(&store, &world.room, asked).await?;
    let loading_cold = start.elapsed();
    let median = |of: fn(&Round) -> Duration| {
        let mut all: Vec<Duration> = rounds.iter().map(of).collect();
        all.sort_unstable();
        all[all.len() / 2]
    };
    let last = rounds.last().context("no rounds")?;
    Ok(Figures {
        events: last.events,
        resolving: median(|round| round.resolving),
        loading: median(|round| round.loading),
        receiving: median(|round| round.receiving),
        loading_cold,
        states_cold,
    })
}

struct Round {
    events: usize,
    resolving: Duration,
    loading: Duration,
    receiving: Duration,
}

/// Two forks, as far as they have been received: all but the last event of the second.
struct Forks {
    first: Line,
    second: Line,
    last: Arc<Pdu>,
    first_tip: (EventNid, StateMap),
    second_tip: (EventNid, StateMap),
}

impl Forks {
    fn tips(&self) -> Vec<EventNid> {
        vec![self.first_tip.0, self.second_tip.0]
    }

    fn question(&self) -> Load {
        Load::Closure {
            maps: vec![self.first_tip.1.clone(), self.second_tip.1.clone()],
            also: Vec::new(),
        }
    }
}

type Key = (Arc<str>, Arc<str>);

/// One end of the room, with what stands at the keys that its next events may name.
#[derive(Clone)]
struct Line {
    tips: Vec<EventId>,
    depth: i64,
    /// What the members' joins have been replaced by, and all else.
    state: BTreeMap<Key, EventId>,
}

struct World {
    store: Store,
    room: RoomId,
    version: RoomVersion,
    line: Line,
    /// What the ids of its events begin with.
    name: String,
    events: u64,
    own: Own,
}

async fn open(url: &str) -> anyhow::Result<Store> {
    let options = Options {
        server_name: ServerName::parse(SERVER)?,
        ..Options::default()
    };
    Ok(Store::open(url, options).await?)
}

fn member_name(n: usize) -> String {
    format!("@user{n}:server{}.example.org", n % 500)
}

impl World {
    async fn open(url: &str, version: RoomVersion, members: usize) -> anyhow::Result<Self> {
        let name = format!("v{version}m{members}e");
        // The first event's id with another sigil, as version 12 wants it and the others don't mind.
        let room = format!("!{name}0:{SERVER}");
        Ok(Self {
            store: open(url).await?,
            room: RoomId::parse(&room)?,
            version,
            line: Line {
                tips: Vec::new(),
                depth: 0,
                state: BTreeMap::new(),
            },
            name,
            events: 0,
            own: Own {
                name: ServerName::parse(SERVER)?,
                key: Arc::new(SigningKey::generate([7; 32], "bench")?),
            },
        })
    }

    fn id(&self, number: u64) -> anyhow::Result<EventId> {
        Ok(EventId::parse(&format!("${}{number}:{SERVER}", self.name))?)
    }

    /// An event of this line. What nobody signed nobody verifies here: that is done before events are received.
    fn event(
        &mut self,
        line: &mut Line,
        sender: &str,
        kind: &str,
        state_key: Option<&str>,
        content: Value,
    ) -> anyhow::Result<Arc<Pdu>> {
        let sender = UserId::parse(sender)?;
        let named = auth::auth_types(self.version, kind, &sender, state_key, &content);
        let named: Vec<&EventId> = named.iter().filter_map(|key| line.state.get(key)).collect();
        let id = self.id(self.events)?;
        self.events += 1;
        line.depth += 1;
        let mut json = json!({
            "auth_events": named,
            "content": content,
            "depth": line.depth,
            "hashes": {"sha256": "A".repeat(43)},
            "origin_server_ts": 1_700_000_000_000_i64 + line.depth,
            "prev_events": line.tips,
            "sender": sender,
            "signatures": {SERVER: {"ed25519:a": "A".repeat(86)}},
            "type": kind,
        });
        if let Some(state_key) = state_key {
            json["state_key"] = state_key.into();
            line.state
                .insert((kind.into(), state_key.into()), id.clone());
        }
        let names_room = kind != "m.room.create" || !self.version.rules().room_id_is_create_hash;
        if names_room {
            json["room_id"] = self.room.as_str().into();
        }
        line.tips = vec![id.clone()];
        let pdu = Pdu::parse_trusted(&json.to_string(), self.version, id, false)?;
        Ok(Arc::new(pdu))
    }

    // -- The room -----------------------------------------------------------------------------------

    /// Alice's room, as if she had joined it when all others were there.
    async fn fill(&mut self, members: usize) -> anyhow::Result<()> {
        let mut line = self.line.clone();
        let mut begun = Vec::new();
        let create = json!({"creator": ALICE, "room_version": self.version.as_str()});
        begun.push(self.event(&mut line, ALICE, "m.room.create", Some(""), create)?);
        let join = json!({"membership": "join"});
        begun.push(self.event(&mut line, ALICE, "m.room.member", Some(ALICE), join)?);
        let levels = self.levels();
        begun.push(self.event(&mut line, ALICE, "m.room.power_levels", Some(""), levels)?);
        let rule = json!({"join_rule": "public"});
        begun.push(self.event(&mut line, ALICE, "m.room.join_rules", Some(""), rule)?);
        let mut state = StateMap::new();
        let entries = self.store_outliers(&begun).await?;
        state.extend(entries);
        let named: Vec<EventId> = ["m.room.create", "m.room.power_levels", "m.room.join_rules"]
            .into_iter()
            .filter(|kind| *kind != "m.room.create" || self.version < RoomVersion::V12)
            .filter_map(|kind| line.state.get(&(kind.into(), "".into())).cloned())
            .collect();
        for start in (0..members).step_by(CHUNK) {
            let joins = (start..members.min(start + CHUNK))
                .map(|n| self.join_of(n, &named))
                .collect::<anyhow::Result<Vec<_>>>()?;
            state.extend(self.store_outliers(&joins).await?);
        }
        for n in 0..members {
            let key = ("m.room.member".into(), member_name(n).into());
            line.state.insert(key, self.id(JOINS + n as u64)?);
        }
        let begin = self.event(
            &mut line,
            ALICE,
            "m.room.message",
            None,
            json!({"body": "Hi"}),
        )?;
        self.begin(begin, state).await?;
        self.line = line;
        Ok(())
    }

    fn levels(&self) -> Value {
        let mut users: serde_json::Map<String, Value> = (0..MODERATORS)
            .map(|n| (member_name(n), json!(50)))
            .collect();
        if self.version < RoomVersion::V12 {
            users.insert(ALICE.to_owned(), json!(100));
        }
        json!({"users": users})
    }

    fn join_of(&self, n: usize, named: &[EventId]) -> anyhow::Result<Arc<Pdu>> {
        let user = member_name(n);
        let json = json!({
            "auth_events": named,
            "content": {"displayname": "Somebody or other", "membership": "join"},
            "depth": n,
            "hashes": {"sha256": "A".repeat(43)},
            "origin_server_ts": 1_600_000_000_000_i64 + n as i64,
            "prev_events": [],
            "room_id": self.room,
            "sender": user,
            "signatures": {SERVER: {"ed25519:a": "A".repeat(86)}},
            "state_key": user,
            "type": "m.room.member",
        });
        let id = self.id(JOINS + n as u64)?;
        Ok(Arc::new(Pdu::parse_trusted(
            &json.to_string(),
            self.version,
            id,
            false,
        )?))
    }

    async fn store_outliers(&self, pdus: &[Arc<Pdu>]) -> anyhow::Result<Vec<(KeyNid, EventNid)>> {
        let (nids, keys) = self.intern(pdus).await?;
        let mut writes = WriteSet::new(self.room.clone(), self.version);
        for ((pdu, nid), key) in pdus.iter().zip(&nids).zip(&keys) {
            writes.events.push(NewEvent {
                nid: *nid,
                pdu: Arc::clone(pdu),
                key: Some(*key),
                place: Place::Outlier,
                state: None,
                verdict: Verdict::Accepted,
                fan_out: FanOut::Nobody,
                transaction: None,
            });
        }
        if apply(&self.store, writes).await?.is_err() {
            bail!("stale");
        }
        Ok(keys.into_iter().zip(nids).collect())
    }

    async fn intern(&self, pdus: &[Arc<Pdu>]) -> anyhow::Result<(Vec<EventNid>, Vec<KeyNid>)> {
        let question = Load::Intern {
            version: self.version,
            ids: pdus.iter().map(|pdu| pdu.event_id.clone()).collect(),
            keys: pdus
                .iter()
                .filter_map(|pdu| Some((pdu.kind.clone(), pdu.state_key.clone()?)))
                .collect(),
            new: false,
        };
        match load(&self.store, &self.room, question).await? {
            Loaded::Interned { events, keys } => Ok((events, keys)),
            _ => bail!("not what was asked for"),
        }
    }

    /// The first event with a place.
    async fn begin(&self, pdu: Arc<Pdu>, state: StateMap) -> anyhow::Result<()> {
        let (nids, _) = self.intern(std::slice::from_ref(&pdu)).await?;
        let nid = *nids.first().context("no number")?;
        let mut writes = WriteSet::new(self.room.clone(), self.version);
        writes.forward_extremities = Some(vec![Extremity {
            nid,
            event_id: pdu.event_id.clone(),
            depth: pdu.depth,
            partial: false,
        }]);
        writes.current_state = Some(state.clone());
        writes.events.push(NewEvent {
            nid,
            pdu,
            key: None,
            place: Place::Timeline,
            state: Some(EventState {
                before: state.clone(),
                after: state,
                partial: false,
            }),
            verdict: Verdict::Accepted,
            fan_out: FanOut::Nobody,
            transaction: None,
        });
        match apply(&self.store, writes).await? {
            Ok(_) => Ok(()),
            Err(_) => bail!("stale"),
        }
    }

    // -- The forks ----------------------------------------------------------------------------------

    async fn forks(&mut self, round: usize, members: usize) -> anyhow::Result<Forks> {
        let (mut first, mut second) = (self.line.clone(), self.line.clone());
        let mut events = Vec::new();
        for (side, line) in [(0, &mut first), (1, &mut second)] {
            events.push(self.fork(line, round, side, members)?);
        }
        let mut second_events = events.pop().context("two forks")?;
        let first_events = events.pop().context("two forks")?;
        let last = second_events.pop().context("a fork has events")?;
        let tip_of = |events: &[Arc<Pdu>]| events.last().map(|pdu| pdu.event_id.clone());
        let first_tip = tip_of(&first_events).context("a fork has events")?;
        let second_tip = tip_of(&second_events).context("a fork has events")?;
        for pdu in first_events.into_iter().chain(second_events) {
            self.receive(pdu).await?;
        }
        Ok(Forks {
            first,
            second,
            last,
            first_tip: self.state_after(&first_tip).await?,
            second_tip: self.state_after(&second_tip).await?,
        })
    }

    /// Ten state events upon the line: a join rule, a ban on one side, profiles, and what else rooms have.
    fn fork(
        &mut self,
        line: &mut Line,
        round: usize,
        side: usize,
        members: usize,
    ) -> anyhow::Result<Vec<Arc<Pdu>>> {
        let word = format!("{round} {side}");
        let moderator = |n: usize| member_name((2 * n + side) % MODERATORS);
        // Far from each other and from the moderators.
        let some = |n: usize| MODERATORS + (round * 4 + n) * 7919 % (members - MODERATORS);
        let mut events = Vec::new();
        let mut add = |sender: &str, kind: &str, key: &str, content: Value| {
            let made = self.event(line, sender, kind, Some(key), content)?;
            events.push(made);
            anyhow::Ok(())
        };
        let admin = if side == 0 {
            ALICE.to_owned()
        } else {
            moderator(2)
        };
        let rule = json!({"join_rule": "public", "word": word});
        add(&admin, "m.room.join_rules", "", rule)?;
        let user = member_name(some(0));
        let (sender, content) = match side {
            // The one that comes later: to those who know of it the other would be too late.
            1 => (moderator(0), json!({"membership": "ban", "reason": word})),
            _ => (
                user.clone(),
                json!({"membership": "join", "displayname": word}),
            ),
        };
        add(&sender, "m.room.member", &user, content)?;
        for n in 1..4 {
            let user = member_name(some(n));
            let renamed = json!({"membership": "join", "displayname": word});
            add(&user, "m.room.member", &user, renamed)?;
        }
        add(&moderator(1), "m.room.topic", "", json!({"topic": word}))?;
        add(&moderator(2), "m.room.name", "", json!({"name": word}))?;
        add(&moderator(3), "m.bench", "one", json!({"word": word}))?;
        add(&moderator(4), "m.bench", "two", json!({"word": word}))?;
        add(&moderator(0), "m.bench", "three", json!({"word": word}))?;
        Ok(events)
    }

    async fn state_after(&self, id: &EventId) -> anyhow::Result<(EventNid, StateMap)> {
        let question = Load::Known {
            ids: vec![id.clone()],
        };
        let Loaded::Known(known) = load(&self.store, &self.room, question).await? else {
            bail!("not what was asked for");
        };
        let nid = known.get(id).context("the event is gone")?.nid;
        let question = Load::States { events: vec![nid] };
        let Loaded::States(mut found) = load(&self.store, &self.room, question).await? else {
            bail!("not what was asked for");
        };
        Ok((nid, found.remove(&nid).context("no state")?.after))
    }

    /// The parts by themselves, then the whole: the last event of the second fork is received.
    async fn look_at(&mut self, forks: &Forks) -> anyhow::Result<Round> {
        let maps = [forks.first_tip.1.clone(), forks.second_tip.1.clone()];
        let start = Instant::now();
        let Loaded::Closure(set) = load(&self.store, &self.room, forks.question()).await? else {
            bail!("not what was asked for");
        };
        let loading = start.elapsed();
        let start = Instant::now();
        let resolved = resolve(self.version, &maps, &set);
        let resolving = start.elapsed();
        if resolved.len() < maps[0].len() {
            bail!("the resolved state has {} entries", resolved.len());
        }
        let start = Instant::now();
        self.receive(Arc::clone(&forks.last)).await?;
        Ok(Round {
            events: set.events.len(),
            resolving,
            loading,
            receiving: start.elapsed(),
        })
    }

    /// Goes on from both forks.
    async fn merge(&mut self, forks: &Forks) -> anyhow::Result<()> {
        let mut line = Line {
            tips: [&forks.first, &forks.second]
                .into_iter()
                .flat_map(|line| line.tips.clone())
                .collect(),
            depth: forks.first.depth.max(forks.second.depth),
            state: self.current().await?,
        };
        let merge = self.event(
            &mut line,
            ALICE,
            "m.room.message",
            None,
            json!({"body": "Hm"}),
        )?;
        self.receive(merge).await?;
        self.line = line;
        Ok(())
    }

    /// The ids of the current state, of which the members nobody touched are what they were.
    async fn current(&self) -> anyhow::Result<BTreeMap<Key, EventId>> {
        let Loaded::Head(Some(head)) = load(&self.store, &self.room, Load::Head).await? else {
            bail!("not what was asked for");
        };
        let (room, state) = (self.room.clone(), head.state.clone());
        let found = self.store.read(move |c| {
            let nids: Vec<EventNid> = state.iter().map(|(_, nid)| nid).collect();
            let keys: Vec<KeyNid> = state.iter().map(|(key, _)| key).collect();
            let row = storage::rooms::by_id(c, &room)?;
            let names = match row {
                Some(row) => storage::states::key_names(c, row.nid, &keys)?,
                None => BTreeMap::new(),
            };
            let ids = storage::events::ids(c, &nids)?;
            let entries = state
                .iter()
                .filter_map(|(key, nid)| Some((names.get(&key)?.clone(), ids.get(&nid)?.clone())));
            Ok(entries.collect())
        });
        Ok(found.await?)
    }

    /// An event through its machine, which here has nobody to ask.
    async fn receive(&self, pdu: Arc<Pdu>) -> anyhow::Result<()> {
        let now = Now {
            since_start: Duration::ZERO,
            unix_ms: pdu.origin_server_ts,
        };
        let id = pdu.event_id.clone();
        let incoming = Incoming { pdu, staged: None };
        let origin = self.own.name.clone();
        let own = Own {
            name: self.own.name.clone(),
            key: Arc::clone(&self.own.key),
        };
        let mut machine = Receive::new(own, self.room.clone(), origin, vec![incoming], now);
        loop {
            if let Some(received) = machine.poll_outcome() {
                let [(_, Received::Accepted)] = received.as_slice() else {
                    bail!("{id}: {received:?}");
                };
                return Ok(());
            }
            let input = match machine.poll_effect().context("the machine stands still")? {
                Effect::Load {
                    ticket,
                    room,
                    load: question,
                } => Input::Loaded {
                    ticket,
                    loaded: load(&self.store, &room, question).await?,
                },
                Effect::Commit { ticket, writes } => Input::Committed {
                    ticket,
                    outcome: apply(&self.store, *writes).await?.map(drop),
                },
                Effect::Tell(_) => continue,
                other => bail!("{id}: {other:?}"),
            };
            machine.handle(input, now);
        }
    }
}
