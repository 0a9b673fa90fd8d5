//! What waits: PDUs staged for their room, the outbox of each destination, foreign keys, and the record of
//! joins and resyncs.

use std::collections::{BTreeMap, HashSet};

use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::nid::EventNid;
use protocol::room_version::RoomVersion;

use crate::driver::{Conn, Error, Result, Row, Value, texts};
use crate::row;

/// Rows that are written in one go for an event that goes to more, while other writers wait.
const SPREAD_MAX: usize = 500;

// -- incoming -------------------------------------------------------------------------------------

/// A PDU that was answered for and is not yet taken (joins.md P-22a).
#[derive(Clone, Debug, PartialEq)]
pub struct Staged {
    pub number: i64,
    pub origin: ServerName,
    pub pdu: String,
    pub received_ms: i64,
    /// How often it was put off.
    pub attempts: i64,
}

const SEEN: &str = "SELECT answer FROM transactions_seen WHERE origin = $1 AND txn_id = $2";
const SAVE_SEEN: &str = "INSERT INTO transactions_seen (origin, txn_id, answer, received_ms)
    VALUES ($1, $2, $3, $4) ON CONFLICT (origin, txn_id) DO NOTHING";
const DROP_SEEN: &str = "DELETE FROM transactions_seen WHERE received_ms < $1";
const STAGE: &str = "INSERT INTO staged_pdus (number, room_id, origin, pdu, received_ms)
    VALUES ($1, $2, $3, $4, $5)";
const STAGED: &str = "SELECT number, origin, pdu, received_ms, attempts FROM staged_pdus
    WHERE room_id = $1 AND not_before_ms <= $3
    ORDER BY number LIMIT $2";
const NEXT_DUE: &str = "SELECT MIN(not_before_ms) FROM staged_pdus WHERE room_id = $1";
const DEFER: &str =
    "UPDATE staged_pdus SET attempts = attempts + 1, not_before_ms = $2 WHERE number = $1";
const PUT_OFF: &str = "SELECT DISTINCT room_id FROM staged_pdus
    WHERE origin = $1 AND not_before_ms > 0 AND attempts <= $2 ORDER BY room_id";
const RECALL: &str = "UPDATE staged_pdus SET not_before_ms = 0
    WHERE origin = $1 AND not_before_ms > 0 AND attempts <= $2";
const STAGED_COUNT: &str = "SELECT COUNT(*) FROM staged_pdus WHERE room_id = $1";
const STAGED_ROOMS: &str = "SELECT DISTINCT room_id FROM staged_pdus ORDER BY room_id";
const UNSTAGE: &str = "DELETE FROM staged_pdus WHERE number = $1";

/// The answer to a transaction that was answered before.
pub fn seen_transaction(
    c: &mut dyn Conn,
    origin: &ServerName,
    txn_id: &str,
) -> Result<Option<String>> {
    c.query_opt(SEEN, &[origin, &txn_id], |row| row.string(0))
}

/// Records the answer and stages the PDUs, `(number, room, pdu)`, in one go.
pub fn take_transaction(
    c: &mut dyn Conn,
    origin: &ServerName,
    txn_id: &str,
    answer: &str,
    pdus: &[(i64, RoomId, String)],
    now_ms: i64,
) -> Result<()> {
    c.execute(SAVE_SEEN, &[origin, &txn_id, &answer, &now_ms])?;
    for (number, room, pdu) in pdus {
        c.execute(STAGE, &[number, room, origin, pdu, &now_ms])?;
    }
    Ok(())
}

/// Forgets answers older than this; a sender that repeats itself does so within hours.
pub fn drop_transactions_before(c: &mut dyn Conn, before_ms: i64) -> Result<u64> {
    c.execute(DROP_SEEN, &[&before_ms])
}

/// The oldest staged PDUs of a room, without those that are put off.
pub fn staged(c: &mut dyn Conn, room: &RoomId, limit: i64, now_ms: i64) -> Result<Vec<Staged>> {
    c.query_all(STAGED, &[room, &limit, &now_ms], |row| {
        Ok(Staged {
            number: row.int(0)?,
            origin: row.id(1)?,
            pdu: row.string(2)?,
            received_ms: row.int(3)?,
            attempts: row.int(4)?,
        })
    })
}

/// When the first of the room's staged PDUs is due.
pub fn next_due(c: &mut dyn Conn, room: &RoomId) -> Result<Option<i64>> {
    c.query_int(NEXT_DUE, &[room])
}

/// Puts a staged PDU off.
pub fn defer(c: &mut dyn Conn, number: i64, until_ms: i64) -> Result<()> {
    c.execute(DEFER, &[&number, &until_ms]).map(drop)
}

/// Makes what this server sent, and what was put off no more often than so, due at once. The rooms of it.
pub fn recall(c: &mut dyn Conn, origin: &ServerName, attempts_max: i64) -> Result<Vec<RoomId>> {
    let rooms = c.query_all(PUT_OFF, &[origin, &attempts_max], |row| row.id(0))?;
    if !rooms.is_empty() {
        c.execute(RECALL, &[origin, &attempts_max])?;
    }
    Ok(rooms)
}

pub fn staged_count(c: &mut dyn Conn, room: &RoomId) -> Result<i64> {
    Ok(c.query_int(STAGED_COUNT, &[room])?.unwrap_or(0))
}

pub fn staged_rooms(c: &mut dyn Conn) -> Result<Vec<RoomId>> {
    c.query_all(STAGED_ROOMS, &[], |row| row.id(0))
}

pub fn unstage(c: &mut dyn Conn, numbers: &[i64]) -> Result<()> {
    for number in numbers {
        c.execute(UNSTAGE, &[number])?;
    }
    Ok(())
}

// -- outgoing -------------------------------------------------------------------------------------

/// Something that a destination must be sent.
#[derive(Clone, Debug, PartialEq)]
pub struct Outgoing {
    pub number: i64,
    pub what: Cargo,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Cargo {
    /// The federation form of a stored event.
    Pdu(String),
    /// The text of an EDU.
    Edu(String),
}

/// How a destination has fared.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Destination {
    /// Set while it does not answer.
    pub failing_since_ms: Option<i64>,
    pub retry_at_ms: Option<i64>,
    pub interval_ms: Option<i64>,
    pub last_success_ms: Option<i64>,
}

const NUMBER: &str = "INSERT INTO sequences (name, last) VALUES ('outbox', 1)
    ON CONFLICT (name) DO UPDATE SET last = sequences.last + 1 RETURNING last";
const ENQUEUE: &str = "INSERT INTO outbox (server, number, event_nid, edu) VALUES ($1, $2, $3, $4)";
const FAN_OUT: &str = "INSERT INTO fan_outs (number, event_nid, servers) VALUES ($1, $2, $3)";
const OLDEST_FAN_OUT: &str = "SELECT number, event_nid, servers FROM fan_outs
    WHERE number >= $1 ORDER BY number LIMIT 1";
const SHORTEN_FAN_OUT: &str = "UPDATE fan_outs SET servers = $2 WHERE number = $1";
const DROP_FAN_OUT: &str = "DELETE FROM fan_outs WHERE number = $1";
const WAITING: &str = "SELECT o.number, e.json, o.edu FROM outbox o
    LEFT JOIN events e ON e.nid = o.event_nid
    WHERE o.server = $1 ORDER BY o.number LIMIT $2";
const SENT: &str = "DELETE FROM outbox WHERE server = $1 AND number = $2";
const WAITING_SERVERS: &str = "SELECT DISTINCT o.server, d.retry_at_ms FROM outbox o
    LEFT JOIN destinations d ON d.server = o.server ORDER BY o.server";
/// Of each room only the newest event stays: who gets that can ask for what is between (P-44).
const TRIM: &str =
    "DELETE FROM outbox WHERE server = $1 AND event_nid IS NOT NULL AND number NOT IN (
        SELECT MAX(o.number) FROM outbox o JOIN events e ON e.nid = o.event_nid
        WHERE o.server = $1 GROUP BY e.room_nid)";
const PDUS_WAITING: &str =
    "SELECT COUNT(*) FROM outbox WHERE server = $1 AND event_nid IS NOT NULL";
const DESTINATION: &str = "SELECT failing_since_ms, retry_at_ms, interval_ms, last_success_ms
    FROM destinations WHERE server = $1";
const DESTINATIONS: &str =
    "SELECT server, failing_since_ms, retry_at_ms, interval_ms, last_success_ms
    FROM destinations ORDER BY server";
const DESTINATIONS_OF: &str =
    "SELECT server, failing_since_ms, retry_at_ms, interval_ms, last_success_ms
    FROM destinations WHERE server IN (SELECT value FROM rarray_text($1))";
const WAIT_FOR: &str = "SELECT server, COUNT(*) FROM outbox
    WHERE server IN (SELECT value FROM rarray_text($1)) GROUP BY server";
const SAVE_DESTINATION: &str = "INSERT INTO destinations
        (server, failing_since_ms, retry_at_ms, interval_ms, last_success_ms)
    VALUES ($1, $2, $3, $4, $5)
    ON CONFLICT (server) DO UPDATE SET failing_since_ms = excluded.failing_since_ms,
        retry_at_ms = excluded.retry_at_ms, interval_ms = excluded.interval_ms,
        last_success_ms = excluded.last_success_ms";

/// The place of something in every outbox; the row stays locked until the commit, so places are seen in order.
fn number(c: &mut dyn Conn) -> Result<i64> {
    c.query_one(NUMBER, &[], |row| row.int(0))
}

/// Where an event waits that was just queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queued {
    /// In the outbox of every server.
    Waiting,
    /// In one row for all of them, for [`spread`].
    ToBeSpread,
}

/// Puts a stored event into the outbox of each of these servers, or where they are more than
/// [`crate::Options::fan_out_direct_max`] into one row: whoever sends something to thousands of servers, or
/// brings it, does not wait until each has a row of its own.
pub fn enqueue_event(
    c: &mut dyn Conn,
    event: EventNid,
    servers: &[ServerName],
    direct_max: usize,
) -> Result<Queued> {
    if servers.is_empty() {
        return Ok(Queued::Waiting);
    }
    let number = number(c)?;
    // An event has one place in an outbox.
    let servers = once(servers);
    if servers.len() > direct_max {
        c.later(FAN_OUT, &[row![number, event, &list(servers)]])?;
        return Ok(Queued::ToBeSpread);
    }
    enqueue(c, servers, number, Some(event), None)?;
    Ok(Queued::Waiting)
}

/// Each of these once, in their order.
pub(crate) fn once(servers: &[ServerName]) -> Vec<&ServerName> {
    let mut seen = HashSet::new();
    let first = servers.iter().filter(|server| seen.insert(*server));
    first.collect()
}

/// Puts an event or an EDU into the outbox of each of these, at this place.
fn enqueue<'a>(
    c: &mut dyn Conn,
    servers: impl IntoIterator<Item = &'a ServerName>,
    number: i64,
    event: Option<EventNid>,
    edu: Option<&str>,
) -> Result<()> {
    let rows = servers.into_iter();
    let rows: Vec<_> = rows
        .map(|server| row![server, number, event, edu])
        .collect();
    c.later(ENQUEUE, &rows)
}

fn list<'a>(servers: impl IntoIterator<Item = &'a ServerName>) -> String {
    let names = servers.into_iter();
    names.flat_map(|server| [server.as_str(), " "]).collect()
}

/// What [`spread`] did with an event.
#[derive(Clone, Debug, PartialEq)]
pub struct Spread {
    pub number: i64,
    /// Those into whose outboxes it went now.
    pub servers: Vec<ServerName>,
    /// Those that it is still to be spread to.
    pub left: Vec<ServerName>,
}

impl Spread {
    /// Whether more servers may have been wanted than go at once.
    pub fn is_full(&self) -> bool {
        self.servers.len() == SPREAD_MAX
    }
}

/// Moves servers of the oldest event that is to be spread, from the number `from` on, into their outboxes: the first
/// five hundred of those that are `wanted`. `None` when there is no such event.
pub fn spread(
    c: &mut dyn Conn,
    from: i64,
    wanted: &dyn Fn(&ServerName) -> bool,
) -> Result<Option<Spread>> {
    let oldest = c.query_opt(OLDEST_FAN_OUT, &[&from], |row| {
        Ok((row.int(0)?, row.event_nid(1)?, row.string(2)?))
    })?;
    let Some((number, event, names)) = oldest else {
        return Ok(None);
    };
    let (mut servers, mut left) = (Vec::new(), Vec::new());
    for name in names.split_terminator(' ') {
        // Nothing can be sent to what is none.
        let Ok(server) = ServerName::parse(name) else {
            continue;
        };
        match servers.len() < SPREAD_MAX && wanted(&server) {
            true => servers.push(server),
            false => left.push(server),
        }
    }
    enqueue(c, &servers, number, Some(event), None)?;
    if left.is_empty() {
        c.execute(DROP_FAN_OUT, &[&number])?;
    } else if !servers.is_empty() {
        c.execute(SHORTEN_FAN_OUT, &[&number, &list(&left)])?;
    }
    Ok(Some(Spread {
        number,
        servers,
        left,
    }))
}

/// Puts an EDU into the outbox of each of these servers, where it waits as events do.
pub fn enqueue_edu(c: &mut dyn Conn, edu: &str, servers: &[ServerName]) -> Result<()> {
    if servers.is_empty() {
        return Ok(());
    }
    let number = number(c)?;
    let servers = once(servers);
    enqueue(c, servers, number, None, Some(edu))
}

/// The oldest things waiting for a destination. An event that was purged meanwhile is an empty PDU.
pub fn waiting(c: &mut dyn Conn, server: &ServerName, limit: i64) -> Result<Vec<Outgoing>> {
    c.query_all(WAITING, &[server, &limit], |row| {
        let what = match row.opt_string(2)? {
            Some(edu) => Cargo::Edu(edu),
            None => Cargo::Pdu(row.opt_string(1)?.unwrap_or_default()),
        };
        Ok(Outgoing {
            number: row.int(0)?,
            what,
        })
    })
}

pub fn sent(c: &mut dyn Conn, server: &ServerName, numbers: &[i64]) -> Result<()> {
    let rows: Vec<Vec<Value<'_>>> = numbers
        .iter()
        .map(|number| vec![Value::Text(server.as_str()), (*number).into()])
        .collect();
    c.execute_many(SENT, &rows)?;
    Ok(())
}

/// Servers for which something waits, and for those that did not answer when they are to be tried again.
pub fn waiting_servers(c: &mut dyn Conn) -> Result<Vec<(ServerName, Option<i64>)>> {
    c.query_all(WAITING_SERVERS, &[], |row| {
        Ok((row.id(0)?, row.opt_int(1)?))
    })
}

/// Drops all but the newest event of each room when more than `keep` wait. Returns how many went.
pub fn trim(c: &mut dyn Conn, server: &ServerName, keep: i64) -> Result<u64> {
    let waiting = c.query_int(PDUS_WAITING, &[server])?.unwrap_or(0);
    if waiting <= keep {
        return Ok(0);
    }
    c.execute(TRIM, &[server])
}

/// How long destinations are left alone that do not answer.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// The first pause, doubled each time.
    pub first_ms: i64,
    /// The same for one that has never answered.
    pub stranger_ms: i64,
    pub max_ms: i64,
    /// Where more waits, only the newest event of each room stays.
    pub keep: i64,
}

/// What becomes of a destination that did not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed {
    /// When it is to be tried again, from now on.
    pub pause_ms: i64,
    /// Whether anything waits for it here.
    pub waits: bool,
}

/// Records that none of these answered, however many: what becomes of each, in their order.
pub fn failed(
    c: &mut dyn Conn,
    servers: &[ServerName],
    now_ms: i64,
    patience: Patience,
) -> Result<Vec<Failed>> {
    let list = servers.to_vec();
    let list = texts(&list);
    let mut known = BTreeMap::new();
    c.query(DESTINATIONS_OF, &[&list], &mut |row| {
        known.insert(row.id::<ServerName>(0)?, read_destination(row, 1)?);
        Ok(())
    })?;
    let mut waits = BTreeMap::new();
    c.query(WAIT_FOR, &[&list], &mut |row| {
        waits.insert(row.id::<ServerName>(0)?, row.int(1)?);
        Ok(())
    })?;
    let mut states = Vec::with_capacity(servers.len());
    let mut failed = Vec::with_capacity(servers.len());
    for server in servers {
        let mut state = known.get(server).cloned().unwrap_or_default();
        let first_ms = match state.last_success_ms {
            Some(_) => patience.first_ms,
            None => patience.stranger_ms,
        };
        let pause_ms = state
            .interval_ms
            .map_or(first_ms, |last| (last * 2).min(patience.max_ms));
        state.failing_since_ms.get_or_insert(now_ms);
        state.interval_ms = Some(pause_ms);
        state.retry_at_ms = Some(now_ms + pause_ms);
        states.push(state);
        let waits = waits.get(server).copied().unwrap_or(0);
        if waits > patience.keep {
            trim(c, server, patience.keep)?;
        }
        failed.push(Failed {
            pause_ms,
            waits: waits > 0,
        });
    }
    let rows: Vec<Vec<Value<'_>>> = servers
        .iter()
        .zip(&states)
        .map(|(server, state)| destination_row(server, state).to_vec())
        .collect();
    c.execute_many(SAVE_DESTINATION, &rows)?;
    Ok(failed)
}

pub fn destination(c: &mut dyn Conn, server: &ServerName) -> Result<Option<Destination>> {
    c.query_opt(DESTINATION, &[server], |row| read_destination(row, 0))
}

pub fn destinations(c: &mut dyn Conn) -> Result<Vec<(ServerName, Destination)>> {
    c.query_all(DESTINATIONS, &[], |row| {
        Ok((row.id(0)?, read_destination(row, 1)?))
    })
}

fn read_destination(row: &dyn Row, at: usize) -> Result<Destination> {
    Ok(Destination {
        failing_since_ms: row.opt_int(at)?,
        retry_at_ms: row.opt_int(at + 1)?,
        interval_ms: row.opt_int(at + 2)?,
        last_success_ms: row.opt_int(at + 3)?,
    })
}

pub fn save_destination(c: &mut dyn Conn, server: &ServerName, state: &Destination) -> Result<()> {
    c.execute_many(SAVE_DESTINATION, &[destination_row(server, state).to_vec()])?;
    Ok(())
}

fn destination_row<'a>(server: &'a ServerName, state: &Destination) -> [Value<'a>; 5] {
    [
        Value::Text(server.as_str()),
        state.failing_since_ms.into(),
        state.retry_at_ms.into(),
        state.interval_ms.into(),
        state.last_success_ms.into(),
    ]
}

// -- keys -----------------------------------------------------------------------------------------

/// A signing key of another server.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerKey {
    pub server: ServerName,
    pub key_id: String,
    /// Unpadded base64.
    pub public_key: String,
    /// Its expiry, when `old`.
    pub valid_until_ms: i64,
    /// Listed under `old_verify_keys`.
    pub old: bool,
    pub fetched_ms: i64,
    /// The signed key object it came in.
    pub response: String,
}

const KEYS: &str = "SELECT server, key_id, public_key, valid_until_ms, old, fetched_ms, response
    FROM server_keys WHERE server IN (SELECT value FROM rarray_text($1))";
const SAVE_KEY: &str = "INSERT INTO server_keys
        (server, key_id, public_key, valid_until_ms, old, fetched_ms, response)
    VALUES ($1, $2, $3, $4, $5, $6, $7)
    ON CONFLICT (server, key_id) DO UPDATE SET public_key = excluded.public_key,
        valid_until_ms = excluded.valid_until_ms, old = excluded.old,
        fetched_ms = excluded.fetched_ms, response = excluded.response";

pub fn server_keys(c: &mut dyn Conn, servers: &[ServerName]) -> Result<Vec<ServerKey>> {
    c.query_all(KEYS, &[&texts(&servers.to_vec())], |row| {
        Ok(ServerKey {
            server: row.id(0)?,
            key_id: row.string(1)?,
            public_key: row.string(2)?,
            valid_until_ms: row.int(3)?,
            old: row.flag(4)?,
            fetched_ms: row.int(5)?,
            response: row.string(6)?,
        })
    })
}

pub fn save_server_keys(c: &mut dyn Conn, keys: &[ServerKey]) -> Result<()> {
    let rows: Vec<Vec<Value<'_>>> = keys
        .iter()
        .map(|key| {
            vec![
                Value::Text(key.server.as_str()),
                Value::Text(&key.key_id),
                Value::Text(&key.public_key),
                key.valid_until_ms.into(),
                key.old.into(),
                key.fetched_ms.into(),
                Value::Text(&key.response),
            ]
        })
        .collect();
    c.execute_many(SAVE_KEY, &rows)?;
    Ok(())
}

// -- jobs -----------------------------------------------------------------------------------------

/// The record of a join, from its first request to the full room.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    pub number: i64,
    /// `join` or `leave` (one that is owed).
    pub kind: String,
    pub room_id: RoomId,
    pub user_id: Option<UserId>,
    /// resolving, asking, accepted, verifying, usable, resyncing, full, failed, cancelled.
    pub state: String,
    pub donor: Option<String>,
    pub last_error: Option<String>,
    /// A JSON object.
    pub progress: String,
    pub created_ms: i64,
    pub updated_ms: i64,
    pub finished_ms: Option<i64>,
}

const JOB_COLUMNS: &str = "number, kind, room_id, user_id, state, donor, last_error, progress,
    created_ms, updated_ms, finished_ms";
const CREATE_JOB: &str =
    "INSERT INTO jobs (number, kind, room_id, user_id, state, progress, created_ms,
        updated_ms)
    VALUES ($1, $2, $3, $4, $5, '{}', $6, $6)";
const UPDATE_JOB: &str = "UPDATE jobs SET state = $1, donor = $2, last_error = $3, progress = $4,
        updated_ms = $5, finished_ms = $6
    WHERE number = $7";
const DROP_JOBS: &str = "DELETE FROM jobs WHERE finished_ms IS NOT NULL AND finished_ms < $1";
const RECORD_ATTEMPT: &str =
    "INSERT INTO job_attempts (job, nth, server, began_ms, ended_ms, outcome)
    SELECT CAST($1 AS BIGINT), COALESCE(MAX(nth), 0) + 1, CAST($2 AS TEXT), CAST($3 AS BIGINT),
        CAST($3 AS BIGINT), CAST($4 AS TEXT)
    FROM job_attempts WHERE job = $1";
const ATTEMPTS: &str = "SELECT server, began_ms, outcome FROM job_attempts WHERE job = $1
    ORDER BY nth DESC LIMIT $2";

/// One try at one server, as far as it can be looked back on.
#[derive(Clone, Debug, PartialEq)]
pub struct Attempt {
    pub server: String,
    pub at_ms: i64,
    pub outcome: Option<String>,
}

pub fn create_job(
    c: &mut dyn Conn,
    number: i64,
    kind: &str,
    room: &RoomId,
    user: Option<&UserId>,
    state: &str,
    now_ms: i64,
) -> Result<()> {
    c.execute(CREATE_JOB, &[&number, &kind, room, &user, &state, &now_ms])?;
    Ok(())
}

pub fn update_job(c: &mut dyn Conn, job: &Job) -> Result<()> {
    c.execute(
        UPDATE_JOB,
        &[
            &job.state,
            &job.donor,
            &job.last_error,
            &job.progress,
            &job.updated_ms,
            &job.finished_ms,
            &job.number,
        ],
    )?;
    Ok(())
}

/// The newest jobs; with `open_only` those that go on.
pub fn jobs(c: &mut dyn Conn, open_only: bool, limit: i64) -> Result<Vec<Job>> {
    let filter = if open_only {
        "WHERE finished_ms IS NULL"
    } else {
        ""
    };
    let sql = format!("SELECT {JOB_COLUMNS} FROM jobs {filter} ORDER BY number DESC LIMIT $1");
    c.query_all(&sql, &[&limit], read_job)
}

pub fn job(c: &mut dyn Conn, number: i64) -> Result<Option<Job>> {
    let sql = format!("SELECT {JOB_COLUMNS} FROM jobs WHERE number = $1");
    c.query_opt(&sql, &[&number], read_job)
}

/// The newest join of a room, whose resync goes on under its number.
pub fn job_of_room(c: &mut dyn Conn, room: &RoomId) -> Result<Option<Job>> {
    let sql = format!(
        "SELECT {JOB_COLUMNS} FROM jobs WHERE room_id = $1 AND kind = 'join'
         AND state IN ('usable', 'resyncing') ORDER BY number DESC LIMIT 1"
    );
    c.query_opt(&sql, &[room], read_job)
}

fn read_job(row: &dyn Row) -> Result<Job> {
    Ok(Job {
        number: row.int(0)?,
        kind: row.string(1)?,
        room_id: row.id(2)?,
        user_id: row.opt_id(3)?,
        state: row.string(4)?,
        donor: row.opt_string(5)?,
        last_error: row.opt_string(6)?,
        progress: row.string(7)?,
        created_ms: row.int(8)?,
        updated_ms: row.int(9)?,
        finished_ms: row.opt_int(10)?,
    })
}

pub fn drop_jobs_finished_before(c: &mut dyn Conn, before_ms: i64) -> Result<u64> {
    c.execute(DROP_JOBS, &[&before_ms])
}

pub fn record_attempt(
    c: &mut dyn Conn,
    job: i64,
    server: &str,
    now_ms: i64,
    outcome: &str,
) -> Result<()> {
    c.execute(RECORD_ATTEMPT, &[&job, &server, &now_ms, &outcome])?;
    Ok(())
}

/// The last tries of a job, newest first.
pub fn attempts(c: &mut dyn Conn, job: i64, limit: i64) -> Result<Vec<Attempt>> {
    c.query_all(ATTEMPTS, &[&job, &limit], |row| {
        Ok(Attempt {
            server: row.string(0)?,
            at_ms: row.int(1)?,
            outcome: row.opt_string(2)?,
        })
    })
}

/// A signed join that left, or may have left, and is not settled.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredIntent {
    pub job: i64,
    pub room: RoomId,
    pub version: RoomVersion,
    pub user: UserId,
    pub via: ServerName,
    pub event_id: EventId,
    pub event: String,
    pub omit_members: bool,
    /// The handshake failed; a leave is owed to whoever holds us as a member.
    pub owe_leave: bool,
}

const INTENTS: &str = "SELECT i.job, r.room_id, r.version, i.user_id, i.via, i.event_id, i.event,
        i.omit_members, i.owe_leave
    FROM intents i JOIN rooms r ON r.nid = i.room_nid ORDER BY i.job, i.via";
const SETTLE: &str = "DELETE FROM intents WHERE job = $1";

/// Every unsettled intent: at boot, what to take up again.
pub fn intents(c: &mut dyn Conn) -> Result<Vec<StoredIntent>> {
    c.query_all(INTENTS, &[], |row| {
        let version = row.text(2)?;
        let version = RoomVersion::parse(version)
            .ok_or_else(|| Error::corrupt(format!("room version {version:?}")))?;
        Ok(StoredIntent {
            job: row.int(0)?,
            room: row.id(1)?,
            version,
            user: row.id(3)?,
            via: row.id(4)?,
            event_id: row.id(5)?,
            event: row.string(6)?,
            omit_members: row.int(7)? != 0,
            owe_leave: row.int(8)? != 0,
        })
    })
}

/// The owed leave was taken, or nobody holds us as a member.
pub fn settle(c: &mut dyn Conn, job: i64) -> Result<()> {
    c.execute(SETTLE, &[&job])?;
    Ok(())
}
