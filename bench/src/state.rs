//! What the state of a big room costs in the store.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use protocol::id::{EventId, RoomId};
use protocol::nid::{EventNid, KeyNid};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::state::StateMap;
use room::effect::{Extremity, Load, Loaded, Place};
use room::write::{EventState, FanOut, NewEvent, Verdict, WriteSet};
use storage::apply::apply;
use storage::load::load;
use storage::{Options, Store};

use crate::resolve;

const VERSION: RoomVersion = RoomVersion::V11;
/// Events in one commit, as in a join.
const CHUNK: usize = 2000;

#[derive(clap::Args)]
pub struct Arguments {
    /// Members of the room.
    #[arg(long, default_value_t = 100_000)]
    members: usize,
    /// State changes to measure.
    #[arg(long, default_value_t = 200)]
    changes: usize,
    /// `sqlite:PATH` or `postgres://…`, empty. A file in a directory for temporary files when left out.
    #[arg(long)]
    database: Option<String>,
}

pub async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let file = std::env::temp_dir().join(format!("vestibule-bench-{}.db", std::process::id()));
    let url = match &arguments.database {
        Some(url) => url.clone(),
        None => format!("sqlite:{}", file.display()),
    };
    let engine = url.split(':').next().unwrap_or_default();
    println!("{engine}: {} members", arguments.members);
    let mut outcome = measure(&url, &arguments).await;
    if outcome.is_ok() {
        outcome = forks(&url, arguments.members).await;
    }
    if arguments.database.is_none() {
        for suffix in ["", "-wal", "-shm"] {
            // What is not there needs no removing.
            let _ = std::fs::remove_file(format!("{}{suffix}", file.display()));
        }
    }
    outcome
}

/// The same conflict in rooms of three sizes.
async fn forks(url: &str, members: usize) -> anyhow::Result<()> {
    println!("two forks that differ in ten events, microseconds");
    println!(
        "| room version | members | events read | reading them | resolving | last event received | the same reading, cold | states, cold |"
    );
    println!("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    for version in [VERSION, RoomVersion::V12] {
        for members in [members / 100, members / 10, members] {
            let found = resolve::measure(url, version, members).await?;
            let times = [
                found.loading,
                found.resolving,
                found.receiving,
                found.loading_cold,
                found.states_cold,
            ];
            let times = times.map(|time| time.as_micros().to_string());
            println!(
                "| {version} | {members} | {} | {} |",
                found.events,
                times.join(" | ")
            );
        }
    }
    Ok(())
}

async fn measure(url: &str, arguments: &Arguments) -> anyhow::Result<()> {
    let store = Store::open(url, Options::default()).await?;
    let room = RoomId::parse("!bench:example.org")?;
    let start = Instant::now();
    let entries = store_members(&store, &room, arguments.members).await?;
    report(
        "store the members' events as outliers",
        start.elapsed(),
        entries.len(),
    );
    let mut state: StateMap = entries.iter().copied().collect();
    let start = Instant::now();
    let first = append(&store, &room, &state, state.clone(), 1).await?;
    report(
        "one commit that makes them the current state",
        start.elapsed(),
        entries.len(),
    );
    let before = node_bytes(&store).await?;
    let start = Instant::now();
    for n in 0..arguments.changes {
        let (key, _) = entries[n * 7919 % entries.len()];
        let old = state.clone();
        // An event of somebody else's will do: what is measured does not look at it.
        state.insert(key, entries[(n + 1) % entries.len()].1);
        append(&store, &room, &old, state.clone(), n + 2).await?;
    }
    report(
        "commits that change one key",
        start.elapsed(),
        arguments.changes,
    );
    let grown = node_bytes(&store).await? - before;
    println!(
        "  {} bytes of state for each",
        grown / arguments.changes.max(1) as i64
    );
    drop(store);

    let store = Store::open(url, Options::default()).await?;
    for what in ["cold", "warm"] {
        let start = Instant::now();
        let question = Load::States {
            events: vec![first],
        };
        let Loaded::States(found) = load(&store, &room, question).await? else {
            bail!("not what was asked for");
        };
        let old = &found.get(&first).context("the event is gone")?.after;
        report(
            &format!("the whole state at an old event, {what}"),
            start.elapsed(),
            old.len(),
        );
        let start = Instant::now();
        let question = Load::StateEvents {
            state: old.clone(),
            keys: vec![("m.room.member".into(), user(arguments.members / 2).into())],
        };
        load(&store, &room, question).await?;
        report(
            &format!("one event of it by key, {what}"),
            start.elapsed(),
            1,
        );
    }
    Ok(())
}

fn user(n: usize) -> String {
    format!("@user{n}:server{}.example.org", n % 500)
}

fn event(n: usize, state_key: Option<String>, content: &str) -> anyhow::Result<Arc<Pdu>> {
    let id = format!("$bench{n}{}", if state_key.is_some() { "m" } else { "t" });
    let (kind, sender) = match &state_key {
        Some(user) => ("m.room.member", user.clone()),
        None => ("m.room.message", user(0)),
    };
    let state_key = state_key.map(|key| format!(",\"state_key\":\"{key}\""));
    let json = format!(
        "{{\"auth_events\":[],\"content\":{content},\"depth\":{n},\"hashes\":{{\"sha256\":\"{}\"}},\
        \"origin_server_ts\":1700000000000,\"prev_events\":[],\"room_id\":\"!bench:example.org\",\
        \"sender\":\"{sender}\",\"signatures\":{{\"example.org\":{{\"ed25519:a\":\"{}\"}}}}{},\
        \"type\":\"{kind}\"}}",
        "A".repeat(43),
        "A".repeat(86),
        state_key.unwrap_or_default(),
    );
    let id = EventId::parse(&id)?;
    Ok(Arc::new(Pdu::parse_trusted(&json, VERSION, id, false)?))
}

async fn intern(
    store: &Store,
    room: &RoomId,
    pdus: &[Arc<Pdu>],
) -> anyhow::Result<(Vec<EventNid>, Vec<KeyNid>)> {
    let question = Load::Intern {
        version: VERSION,
        ids: pdus.iter().map(|pdu| pdu.event_id.clone()).collect(),
        keys: pdus
            .iter()
            .filter_map(|pdu| Some((pdu.kind.clone(), pdu.state_key.clone()?)))
            .collect(),
        new: false,
    };
    match load(store, room, question).await? {
        Loaded::Interned { events, keys } => Ok((events, keys)),
        _ => bail!("not what was asked for"),
    }
}

async fn store_members(
    store: &Store,
    room: &RoomId,
    count: usize,
) -> anyhow::Result<Vec<(KeyNid, EventNid)>> {
    let mut entries = Vec::with_capacity(count);
    let content = "{\"avatar_url\":\"mxc://example.org/abcdefghijklmnopqrstuvwx\",\
        \"displayname\":\"Somebody or other\",\"membership\":\"join\"}";
    for start in (0..count).step_by(CHUNK) {
        let pdus: Vec<Arc<Pdu>> = (start..count.min(start + CHUNK))
            .map(|n| event(n, Some(user(n)), content))
            .collect::<anyhow::Result<_>>()?;
        let (nids, keys) = intern(store, room, &pdus).await?;
        let mut writes = WriteSet::new(room.clone(), VERSION);
        for ((pdu, nid), key) in pdus.into_iter().zip(&nids).zip(&keys) {
            writes.events.push(NewEvent {
                nid: *nid,
                pdu,
                key: Some(*key),
                place: Place::Outlier,
                state: None,
                verdict: Verdict::Accepted,
                fan_out: FanOut::Nobody,
                transaction: None,
            });
        }
        if apply(store, writes).await?.is_err() {
            bail!("stale");
        }
        entries.extend(keys.into_iter().zip(nids));
    }
    Ok(entries)
}

/// Appends a message after which the room's state is `after`.
async fn append(
    store: &Store,
    room: &RoomId,
    before: &StateMap,
    after: StateMap,
    n: usize,
) -> anyhow::Result<EventNid> {
    let pdu = event(n, None, "{\"body\":\"Hello\",\"msgtype\":\"m.text\"}")?;
    let (nids, _) = intern(store, room, std::slice::from_ref(&pdu)).await?;
    let mut writes = WriteSet::new(room.clone(), VERSION);
    writes.forward_extremities = Some(vec![Extremity {
        nid: nids[0],
        event_id: pdu.event_id.clone(),
        depth: pdu.depth,
        partial: false,
    }]);
    writes.current_state = Some(after.clone());
    writes.events.push(NewEvent {
        nid: nids[0],
        pdu,
        key: None,
        place: Place::Timeline,
        state: Some(EventState {
            before: before.clone(),
            after,
            partial: false,
        }),
        verdict: Verdict::Accepted,
        fan_out: FanOut::Nobody,
        transaction: None,
    });
    match apply(store, writes).await? {
        Ok(_) => Ok(nids[0]),
        Err(_) => bail!("stale"),
    }
}

async fn node_bytes(store: &Store) -> anyhow::Result<i64> {
    let sql = "SELECT CAST(SUM(LENGTH(node)) AS BIGINT) FROM state_nodes";
    let bytes = store.read(move |c| c.query_int(sql, &[])).await?;
    Ok(bytes.unwrap_or(0))
}

fn report(what: &str, took: Duration, count: usize) {
    let each = took.as_secs_f64() * 1e6 / count.max(1) as f64;
    println!(
        "  {what}: {:.3} s, {each:.1} us for each of {count}",
        took.as_secs_f64()
    );
}
