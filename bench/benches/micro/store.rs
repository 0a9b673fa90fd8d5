//! The store on SQLite, in a file: a window of events stored, state written and read. The limit of each is
//! the same rows through SQLite's own interface.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use protocol::id::EventId;
use protocol::nid::{EventNid, KeyNid};
use protocol::pdu::Pdu;
use protocol::state::StateMap;
use room::effect::{Load, Loaded, Place};
use room::write::{EventState, FanOut, NewEvent, Verdict, WriteSet};
use rusqlite::{Connection, params};
use storage::apply::apply;
use storage::load::load;
use storage::{Options, Store};
use tokio::runtime::Runtime;

use crate::corpus::{VERSION, room};
use crate::report::{Report, time};

/// Events that a join stores in one commit.
const WINDOW: usize = 500;
/// Entries of the state that is written and read.
const ENTRIES: u32 = 20_000;

pub fn measure(report: &mut Report<'_>) -> anyhow::Result<()> {
    let directory = Directory::new()?;
    let mut bench = Bench {
        runtime: Runtime::new()?,
        file: directory.0.join("ours.db"),
        made: 0,
    };
    let mut raw = Raw::open(&bench.runtime, &directory.0.join("raw.db"))?;
    window(report, &mut bench, &mut raw)?;
    state(report, &mut bench, &mut raw)
}

/// Goes with what is in it.
struct Directory(PathBuf);

impl Directory {
    fn new() -> anyhow::Result<Self> {
        let path = std::env::temp_dir().join(format!("vestibule-micro-{}", std::process::id()));
        std::fs::create_dir_all(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // What is left lies among temporary files.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct Bench {
    runtime: Runtime,
    file: PathBuf,
    made: usize,
}

impl Bench {
    fn open(&self) -> anyhow::Result<Store> {
        open(&self.runtime, &self.file)
    }

    /// A member's join that was never seen before.
    fn event(&mut self) -> anyhow::Result<Arc<Pdu>> {
        self.made += 1;
        let n = self.made;
        let named: Vec<String> = (0..3).map(|k| format!("\"$common{k}\"")).collect();
        let json = format!(
            "{{\"auth_events\":[{}],\"content\":{{\"avatar_url\":\"mxc://example.org/{n:024}\",\
            \"displayname\":\"Somebody or other\",\"membership\":\"join\"}},\"depth\":{n},\
            \"hashes\":{{\"sha256\":\"{}\"}},\"origin_server_ts\":1700000000000,\
            \"prev_events\":[\"$before{n}\"],\"room_id\":\"{}\",\"sender\":\"@user{n}:example.org\",\
            \"signatures\":{{\"example.org\":{{\"ed25519:a_key\":\"{}\"}}}},\
            \"state_key\":\"@user{n}:example.org\",\"type\":\"m.room.member\"}}",
            named.join(","),
            "A".repeat(43),
            room()?,
            "A".repeat(86),
        );
        let id = EventId::parse(&format!("${n:043}"))?;
        Ok(Arc::new(Pdu::parse_trusted(&json, VERSION, id, false)?))
    }
}

fn open(runtime: &Runtime, file: &Path) -> anyhow::Result<Store> {
    let url = format!("sqlite:{}", file.display());
    Ok(runtime.block_on(Store::open(&url, Options::default()))?)
}

fn new_event(pdu: Arc<Pdu>, nid: EventNid, key: KeyNid, state: Option<EventState>) -> NewEvent {
    NewEvent {
        nid,
        pdu,
        key: Some(key),
        place: match state {
            Some(_) => Place::Timeline,
            None => Place::Outlier,
        },
        state,
        verdict: Verdict::Accepted,
        fan_out: FanOut::Nobody,
        transaction: None,
    }
}

/// Numbers and stores events; the last one, if there is a state, with that state around it.
async fn store_events(
    store: &Store,
    pdus: &[Arc<Pdu>],
    state: Option<EventState>,
) -> anyhow::Result<EventNid> {
    let question = Load::Intern {
        version: VERSION,
        ids: pdus.iter().map(|pdu| pdu.event_id.clone()).collect(),
        keys: pdus
            .iter()
            .filter_map(|pdu| Some((pdu.kind.clone(), pdu.state_key.clone()?)))
            .collect(),
        new: false,
    };
    let Loaded::Interned { events, keys } = load(store, &room()?, question).await? else {
        bail!("not what was asked for");
    };
    let mut writes = WriteSet::new(room()?, VERSION);
    for ((pdu, nid), key) in pdus.iter().zip(&events).zip(&keys) {
        writes
            .events
            .push(new_event(Arc::clone(pdu), *nid, *key, state.clone()));
    }
    match apply(store, writes).await? {
        Ok(_) => events.last().copied().context("no events"),
        Err(_) => bail!("stale"),
    }
}

fn window(report: &mut Report<'_>, bench: &mut Bench, raw: &mut Raw) -> anyhow::Result<()> {
    let store = bench.open()?;
    let mut make = || {
        (0..WINDOW)
            .map(|_| bench.event())
            .collect::<anyhow::Result<Vec<_>>>()
    };
    let mut windows = Vec::new();
    for _ in 0..WINDOWS {
        windows.push(make()?);
    }
    let mut again = windows.clone().into_iter();
    let mut windows = windows.into_iter();
    let runtime = &bench.runtime;
    let mut failed = None;
    report.pair(
        "storing a window of 500 events, in a file",
        WINDOW,
        &mut || {
            let Some(window) = windows.next() else {
                return NO_MORE;
            };
            let start = std::time::Instant::now();
            if let Err(error) = runtime.block_on(store_events(&store, &window, None)) {
                failed = Some(error);
            }
            start.elapsed()
        },
        "the same rows straight into SQLite",
        &mut || match again.next() {
            Some(window) => time(|| raw.store(&window)),
            None => NO_MORE,
        },
    );
    match failed {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Windows made beforehand, and what a pass says when they are used up: so much that it is never the best.
const WINDOWS: usize = 60;
const NO_MORE: Duration = Duration::from_millis(50);

fn state(report: &mut Report<'_>, bench: &mut Bench, raw: &mut Raw) -> anyhow::Result<()> {
    let mut state: StateMap = (0..ENTRIES)
        .map(|n| (KeyNid(n), EventNid(1_000_000 + i64::from(n) * 3)))
        .collect();
    let around = |state: &StateMap| {
        Some(EventState {
            before: state.clone(),
            after: state.clone(),
            partial: false,
        })
    };
    let first = bench.event()?;
    let events: Vec<Arc<Pdu>> = (0..WINDOWS * 20)
        .map(|_| bench.event())
        .collect::<anyhow::Result<_>>()?;
    let (runtime, store) = (&bench.runtime, bench.open()?);
    let first = runtime.block_on(store_events(&store, &[first], around(&state)))?;

    let mut left = events.iter();
    let mut again = events.iter();
    let mut failed = None;
    let mut n = 0_u32;
    report.pair(
        "state written: an event that changes one key of 20,000",
        1,
        &mut || {
            let Some(event) = left.next() else {
                return NO_MORE;
            };
            n += 1;
            state.insert(
                KeyNid(n * 7919 % ENTRIES),
                EventNid(2_000_000 + i64::from(n)),
            );
            let around = around(&state);
            let start = std::time::Instant::now();
            let stored = store_events(&store, std::slice::from_ref(event), around);
            if let Err(error) = runtime.block_on(stored) {
                failed = Some(error);
            }
            start.elapsed()
        },
        "its rows, straight into SQLite in two transactions",
        &mut || match again.next() {
            Some(event) => time(|| raw.change(event)),
            None => NO_MORE,
        },
    );
    if let Some(error) = failed {
        return Err(error);
    }
    drop(store);

    let question = || Load::States {
        events: vec![first],
    };
    let room = room()?;
    let whole = |store: &Store| -> anyhow::Result<usize> {
        match runtime.block_on(load(store, &room, question()))? {
            Loaded::States(found) => Ok(found.get(&first).map_or(0, |at| at.after.len())),
            _ => bail!("not what was asked for"),
        }
    };
    ensure!(whole(&open(runtime, &bench.file)?)? == ENTRIES as usize);
    let connection = Connection::open(&bench.file)?;
    report.pair(
        "state read: 20,000 keys at an event, nothing in memory",
        1,
        &mut || match open(runtime, &bench.file) {
            Ok(store) => time(|| whole(&store).is_ok()),
            Err(_) => NO_MORE,
        },
        "as many nodes, straight from SQLite",
        &mut || time(|| read_nodes(&connection).is_ok()),
    );
    let store = open(runtime, &bench.file)?;
    whole(&store)?;
    report.pair(
        "the same again",
        1,
        &mut || time(|| whole(&store).is_ok()),
        "an empty question to the store",
        &mut || time(|| runtime.block_on(store.read(|_| Ok(()))).is_ok()),
    );
    Ok(())
}

fn read_nodes(connection: &Connection) -> rusqlite::Result<usize> {
    let nodes = i64::from(ENTRIES.div_ceil(32) + ENTRIES.div_ceil(1024) + 1);
    let sql = "SELECT nid, node FROM state_nodes ORDER BY nid LIMIT ?1";
    let mut statement = connection.prepare_cached(sql)?;
    let mut rows = statement.query([nodes])?;
    let mut bytes = Vec::new();
    while let Some(row) = rows.next()? {
        bytes.push(row.get_ref(1)?.as_blob()?.to_vec());
    }
    Ok(bytes.len())
}

/// A database with the same tables and settings, and nobody in between.
struct Raw {
    connection: Connection,
    nid: i64,
}

impl Raw {
    fn open(runtime: &Runtime, file: &Path) -> anyhow::Result<Self> {
        drop(open(runtime, file)?);
        let connection = Connection::open(file)?;
        connection.execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA temp_store = MEMORY;
            PRAGMA cache_size = -32768; PRAGMA journal_size_limit = 67108864;",
        )?;
        Ok(Self { connection, nid: 0 })
    }

    fn store(&mut self, window: &[Arc<Pdu>]) -> rusqlite::Result<()> {
        let first = self.nid + 1;
        let transaction = self.connection.transaction()?;
        for (nid, pdu) in (first..).zip(window) {
            number(&transaction, nid, pdu)?;
        }
        transaction.commit()?;
        let transaction = self.connection.transaction()?;
        for (nid, pdu) in (first..).zip(window) {
            // Its prev and auth events have numbers, too.
            event(&transaction, nid, pdu, None)?;
        }
        let mut above = transaction.prepare_cached(ABOVE)?;
        for auth in 0..3_i64 {
            above.execute(params![auth, first, vec![0_u8; window.len() * 16]])?;
        }
        drop(above);
        transaction.commit()?;
        self.nid += window.len() as i64;
        Ok(())
    }

    /// A placed state event with the four nodes that one changed key makes.
    fn change(&mut self, pdu: &Pdu) -> rusqlite::Result<()> {
        self.nid += 1;
        let nid = self.nid;
        let transaction = self.connection.transaction()?;
        number(&transaction, nid, pdu)?;
        transaction.commit()?;
        let transaction = self.connection.transaction()?;
        event(&transaction, nid, pdu, Some(nid))?;
        let mut node = transaction.prepare_cached(NODE)?;
        for n in 0..4 {
            node.execute(params![nid * 4 + n, vec![0_u8; 90]])?;
        }
        let mut above = transaction.prepare_cached(ABOVE)?;
        let mut dependent = transaction.prepare_cached(DEPENDENT)?;
        for auth in 0..3_i64 {
            above.execute(params![auth, nid, vec![0_u8; 16]])?;
            dependent.execute(params![auth, nid])?;
        }
        drop((node, above, dependent));
        transaction.commit()
    }
}

const ID: &str = "INSERT INTO event_ids (nid, event_id) VALUES (?1, ?2)";
const KEY: &str =
    "INSERT INTO state_keys (room_nid, key_nid, kind, state_key) VALUES (1, ?1, ?2, ?3)";
const EVENT: &str = "INSERT INTO events (nid, room_nid, key_nid, place, verdict, partial, position,
    depth, origin_ts, before_root, after_root, prevs, auth, redacted, kind, state_key, sender, reason, json)
    VALUES (?1, 1, ?1, ?2, 0, 0, ?3, ?4, ?5, ?3, ?3, ?6, ?7, 0, ?8, ?9, ?10, NULL, ?11)";
const ABOVE: &str = "INSERT INTO auth_above (auth_nid, newest, above) VALUES (?1, ?2, ?3)";
const DEPENDENT: &str = "INSERT INTO auth_dependents (auth_nid, event_nid) VALUES (?1, ?2)";
const NODE: &str = "INSERT INTO state_nodes (nid, node) VALUES (?1, ?2)";

fn number(connection: &Connection, nid: i64, pdu: &Pdu) -> rusqlite::Result<()> {
    connection
        .prepare_cached(ID)?
        .execute(params![nid, pdu.event_id.as_str()])?;
    connection
        .prepare_cached(KEY)?
        .execute(params![nid, &*pdu.kind, pdu.state_key.as_deref()])?;
    Ok(())
}

fn event(
    connection: &Connection,
    nid: i64,
    pdu: &Pdu,
    position: Option<i64>,
) -> rusqlite::Result<()> {
    let prevs = position.map(|_| vec![0_u8; 8]);
    connection.prepare_cached(EVENT)?.execute(params![
        nid,
        i64::from(position.is_some()),
        position,
        pdu.depth,
        pdu.origin_server_ts,
        prevs,
        vec![0_u8; 24],
        &*pdu.kind,
        pdu.state_key.as_deref(),
        pdu.sender.as_str(),
        &*pdu.json,
    ])?;
    Ok(())
}
