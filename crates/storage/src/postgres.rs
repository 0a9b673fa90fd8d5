//! PostgreSQL: worker threads, each with a client and a runtime of its own.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::error::Error as _;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::BytesMut;
use crossbeam_channel::{Receiver, Sender, unbounded};
use futures::{StreamExt, TryStreamExt, pin_mut};
use tokio::runtime::Runtime;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};
use tokio_postgres::{Client, Config, NoTls, Statement};

use crate::cache::{Cached, Caches};
use crate::driver::{Conn, Engine, Error, Job, Param, Result, Row, Value, run_caught};

/// Tries of one write beside others before it runs alone.
const TRIES_SHARED_MAX: u32 = 4;

/// Tries of one write in all. Alone it can not collide, so what fails is the connection.
const TRIES_MAX: u32 = 6;

/// Statements on their way in one pipeline: bounds the memory of both ends.
const PIPELINE_MAX: usize = 512;

/// Rows that one INSERT takes where many are written: several times faster than one by one.
const ROWS_AT_ONCE: usize = 64;

/// Prepared statements kept for each connection; more than this program has.
const STATEMENTS_MAX: usize = 1024;

/// Tries to connect again before a job is given up.
const CONNECTS_MAX: u32 = 5;

/// Serialises the set-up of one database by several processes. Any number nobody else uses.
const SETUP_LOCK: i64 = 0x5645_5354;

const SETUP: &str = "
    CREATE TABLE IF NOT EXISTS write_turn (nothing BIGINT);
    CREATE OR REPLACE FUNCTION rarray(bigint[]) RETURNS TABLE (value bigint)
        LANGUAGE sql IMMUTABLE PARALLEL SAFE ROWS 100 AS 'SELECT unnest($1)';
    CREATE OR REPLACE FUNCTION rarray_text(text[]) RETURNS TABLE (value text)
        LANGUAGE sql IMMUTABLE PARALLEL SAFE ROWS 100 AS 'SELECT unnest($1)';
";

/// A plan that is kept may be one that was good while the tables were empty, as in the first join of a fresh
/// server: with it that took a hundred times as long. Planning anew costs some tens of microseconds.
const SESSION: &str = "SET plan_cache_mode = force_custom_plan; SET jit = off";

const BEGIN_READ: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
/// Serializable, so that a function that reads and then writes is as right here as with SQLite's one writer.
const BEGIN_SHARED: &str =
    "BEGIN ISOLATION LEVEL SERIALIZABLE; LOCK TABLE write_turn IN ROW EXCLUSIVE MODE";
/// Waits until the writes under way are over and lets no other begin. A lock taken before the first
/// statement comes before the snapshot, so nothing can have changed behind it.
const BEGIN_ALONE: &str =
    "BEGIN ISOLATION LEVEL SERIALIZABLE; LOCK TABLE write_turn IN EXCLUSIVE MODE";

pub(crate) struct Postgres {
    reads: Option<Sender<Box<dyn Job>>>,
    writes: Option<Sender<Box<dyn Job>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Postgres {
    pub(crate) fn open(
        url: &str,
        readers: usize,
        writers: usize,
        caches: &Arc<Caches>,
    ) -> Result<Self> {
        let config: Config = url.parse().map_err(translate)?;
        let cached = |fill| Cached {
            caches: Arc::clone(caches),
            fill,
        };
        let mut first = Session::new(config.clone(), cached(false))?;
        first.set_up()?;
        let (reads, read_queue) = unbounded();
        let (writes, write_queue) = unbounded();
        let mut threads = Vec::new();
        let mut first = Some(first);
        for _ in 0..writers.max(1) {
            let session = match first.take() {
                Some(session) => session,
                None => Session::new(config.clone(), cached(false))?,
            };
            threads.push(spawn(
                "postgres-writer",
                session,
                &write_queue,
                Session::write,
            )?);
        }
        for _ in 0..readers.max(1) {
            let session = Session::new(config.clone(), cached(true))?;
            threads.push(spawn(
                "postgres-reader",
                session,
                &read_queue,
                Session::read,
            )?);
        }
        Ok(Self {
            reads: Some(reads),
            writes: Some(writes),
            threads,
        })
    }
}

impl Engine for Postgres {
    fn submit_read(&self, job: Box<dyn Job>) {
        send(self.reads.as_ref(), job);
    }

    fn submit_write(&self, job: Box<dyn Job>) {
        send(self.writes.as_ref(), job);
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.reads = None;
        self.writes = None;
        let here = std::thread::current().id();
        for thread in self.threads.drain(..) {
            // The last handle may have been dropped by a closure on one of these threads.
            if thread.thread().id() != here && thread.join().is_err() {
                tracing::error!("a database thread panicked");
            }
        }
    }
}

fn send(queue: Option<&Sender<Box<dyn Job>>>, job: Box<dyn Job>) {
    let Some(queue) = queue else {
        return job.finish(Err(Error::Closed));
    };
    if let Err(refused) = queue.send(job) {
        refused.into_inner().finish(Err(Error::Closed));
    }
}

fn spawn(
    name: &str,
    mut session: Session,
    queue: &Receiver<Box<dyn Job>>,
    work: fn(&mut Session, &mut dyn Job) -> Result<()>,
) -> Result<JoinHandle<()>> {
    let queue = queue.clone();
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            while let Ok(mut job) = queue.recv() {
                let outcome = work(&mut session, job.as_mut());
                job.finish(outcome);
            }
        })
        .map_err(Error::engine)
}

/// One worker's connection, made again when it is lost.
struct Session {
    config: Config,
    cached: Cached,
    runtime: Runtime,
    client: Option<Client>,
    statements: HashMap<Box<str>, Statement>,
}

impl Session {
    fn new(config: Config, cached: Cached) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(Error::engine)?;
        Ok(Self {
            config,
            cached,
            runtime,
            client: None,
            statements: HashMap::new(),
        })
    }

    fn set_up(&mut self) -> Result<()> {
        self.connect()?;
        let lock = format!("SELECT pg_advisory_lock({SETUP_LOCK})");
        let unlock = format!("SELECT pg_advisory_unlock({SETUP_LOCK})");
        self.batch(&lock)?;
        let outcome = self.batch(SETUP);
        self.batch(&unlock)?;
        outcome
    }

    fn connect(&mut self) -> Result<()> {
        if self.client.as_ref().is_some_and(|c| !c.is_closed()) {
            return Ok(());
        }
        self.client = None;
        self.statements.clear();
        let mut failure = None;
        for attempt in 0..CONNECTS_MAX {
            if attempt > 0 {
                let pause = Duration::from_millis(100 << attempt);
                self.runtime
                    .block_on(async { tokio::time::sleep(pause).await });
            }
            match self.runtime.block_on(self.config.connect(NoTls)) {
                Ok((client, connection)) => {
                    self.runtime.spawn(async move {
                        if let Err(error) = connection.await {
                            tracing::warn!(%error, "lost a connection to the database");
                        }
                    });
                    self.client = Some(client);
                    return self.batch(SESSION);
                }
                Err(error) => failure = Some(error),
            }
        }
        Err(failure.map_or(Error::Closed, translate))
    }

    fn client(&self) -> Result<&Client> {
        self.client.as_ref().ok_or(Error::Closed)
    }

    fn batch(&self, sql: &str) -> Result<()> {
        self.runtime
            .block_on(self.client()?.batch_execute(sql))
            .map_err(translate)
    }

    fn read(&mut self, job: &mut dyn Job) -> Result<()> {
        let outcome = self.read_once(job);
        let lost = self.client.as_ref().is_none_or(Client::is_closed);
        if outcome.is_err() && lost {
            return self.read_once(job);
        }
        outcome
    }

    fn read_once(&mut self, job: &mut dyn Job) -> Result<()> {
        self.connect()?;
        self.batch(BEGIN_READ)?;
        let mut conn = PostgresConn {
            session: self,
            failed: false,
        };
        let outcome = run_caught(job, &mut conn);
        outcome.and(self.batch("ROLLBACK"))
    }

    fn write(&mut self, job: &mut dyn Job) -> Result<()> {
        for attempt in 1..TRIES_MAX {
            match self.write_once(job, attempt > TRIES_SHARED_MAX) {
                Err(Error::Conflict(reason)) => {
                    tracing::debug!(reason, attempt, "a write collided and runs again");
                }
                // Perhaps somebody else was quicker with the same row; the next run will see it.
                Err(Error::Constraint(reason)) if attempt == 1 => {
                    tracing::debug!(reason, "a write broke a constraint and runs again");
                }
                outcome => return outcome,
            }
        }
        self.write_once(job, true)
    }

    fn write_once(&mut self, job: &mut dyn Job, alone: bool) -> Result<()> {
        self.connect()?;
        self.batch(if alone { BEGIN_ALONE } else { BEGIN_SHARED })?;
        let mut conn = PostgresConn {
            session: self,
            failed: false,
        };
        let outcome = match run_caught(job, &mut conn) {
            // COMMIT of a failed transaction is a silent rollback.
            Ok(()) if conn.failed => Err(Error::engine("a function went on after an error")),
            outcome => outcome,
        };
        match outcome {
            Ok(()) => self.batch("COMMIT"),
            Err(error) => {
                if self.client.as_ref().is_none_or(Client::is_closed) {
                    return Err(Error::Conflict(format!("connection lost: {error}")));
                }
                self.batch("ROLLBACK")?;
                Err(error)
            }
        }
    }
}

struct PostgresConn<'s> {
    session: &'s mut Session,
    /// Whether a statement failed, after which the transaction takes nothing more.
    failed: bool,
}

impl PostgresConn<'_> {
    fn statement(&mut self, sql: &str) -> Result<Statement> {
        if let Some(statement) = self.session.statements.get(sql) {
            return Ok(statement.clone());
        }
        let statement = self
            .session
            .runtime
            .block_on(self.session.client()?.prepare(sql))
            .map_err(translate)?;
        if self.session.statements.len() >= STATEMENTS_MAX {
            self.session.statements.clear();
        }
        self.session
            .statements
            .insert(sql.into(), statement.clone());
        Ok(statement)
    }
}

impl Conn for PostgresConn<'_> {
    fn query(
        &mut self,
        sql: &str,
        params: &[&dyn Param],
        each: &mut dyn FnMut(&dyn Row) -> Result<()>,
    ) -> Result<()> {
        let outcome = self.run_query(sql, params, each);
        self.failed |= outcome.is_err();
        outcome
    }

    fn execute(&mut self, sql: &str, params: &[&dyn Param]) -> Result<u64> {
        let outcome = self.run_execute(sql, params);
        self.failed |= outcome.is_err();
        outcome
    }

    fn execute_many(&mut self, sql: &str, rows: &[Vec<Value<'_>>]) -> Result<u64> {
        let outcome = self.run_execute_many(sql, rows);
        self.failed |= outcome.is_err();
        outcome
    }

    fn prepare(&mut self, sql: &str) -> Result<()> {
        let outcome = self.statement(sql).map(drop);
        self.failed |= outcome.is_err();
        outcome
    }

    fn cached(&self) -> Cached {
        self.session.cached.clone()
    }
}

impl PostgresConn<'_> {
    fn run_query(
        &mut self,
        sql: &str,
        params: &[&dyn Param],
        each: &mut dyn FnMut(&dyn Row) -> Result<()>,
    ) -> Result<()> {
        let statement = self.statement(sql)?;
        let values: Vec<Bound<'_>> = params.iter().map(|p| Bound(p.value())).collect();
        let client = self.session.client()?;
        let wanted = statement.params().len().min(values.len());
        let rows = self
            .session
            .runtime
            .block_on(client.query_raw(&statement, &values[..wanted]))
            .map_err(translate)?;
        pin_mut!(rows);
        while let Some(row) = self
            .session
            .runtime
            .block_on(rows.try_next())
            .map_err(translate)?
        {
            each(&PostgresRow {
                decoded: (0..row.len()).map(|_| OnceCell::new()).collect(),
                row: &row,
            })?;
        }
        Ok(())
    }

    fn run_execute(&mut self, sql: &str, params: &[&dyn Param]) -> Result<u64> {
        let statement = self.statement(sql)?;
        let values: Vec<Bound<'_>> = params.iter().map(|p| Bound(p.value())).collect();
        let wanted = statement.params().len().min(values.len());
        self.session
            .runtime
            .block_on(
                self.session
                    .client()?
                    .execute_raw(&statement, &values[..wanted]),
            )
            .map_err(translate)
    }

    fn run_execute_many(&mut self, sql: &str, rows: &[Vec<Value<'_>>]) -> Result<u64> {
        let (mut changed, mut left) = (0, rows);
        if rows.len() >= ROWS_AT_ONCE
            && let Some(many) = many_rows(sql, ROWS_AT_ONCE)
        {
            let whole = rows.len() / ROWS_AT_ONCE * ROWS_AT_ONCE;
            let statement = self.statement(&many)?;
            let (together, rest) = rows.split_at(whole);
            let values = together.chunks(ROWS_AT_ONCE).map(<[_]>::concat);
            changed = self.pipeline(&statement, values)?;
            left = rest;
        }
        if left.is_empty() {
            return Ok(changed);
        }
        let statement = self.statement(sql)?;
        Ok(changed + self.pipeline(&statement, left.iter().cloned())?)
    }

    fn pipeline<'v>(
        &self,
        statement: &Statement,
        rows: impl Iterator<Item = Vec<Value<'v>>>,
    ) -> Result<u64> {
        let client = self.session.client()?;
        let pipeline = futures::stream::iter(rows)
            .map(|row| {
                let values: Vec<Bound<'_>> = row.into_iter().map(Bound).collect();
                async move { client.execute_raw(statement, values).await }
            })
            .buffered(PIPELINE_MAX)
            .try_fold(0, |sum, changed| async move { Ok(sum + changed) });
        self.session.runtime.block_on(pipeline).map_err(translate)
    }
}

/// An INSERT of one row as an INSERT of `count` rows, whose parameters follow one another. `None` for other
/// statements, and for upserts: those refuse to touch a row twice in one statement.
fn many_rows(sql: &str, count: usize) -> Option<String> {
    let (head, rest) = sql.split_once("VALUES (")?;
    let (tuple, tail) = rest.split_once(')')?;
    let plain = head.trim_start().starts_with("INSERT") && !tuple.contains('(');
    if !plain || tail.contains('$') || tail.contains("DO UPDATE") {
        return None;
    }
    let width = tuple.split(',').count();
    // Only `$1, $2, …` in this order: then the rows' values just follow one another.
    let ordered = (1..)
        .zip(tuple.split(','))
        .all(|(n, part)| part.trim() == format!("${n}"));
    if !ordered {
        return None;
    }
    let tuples: Vec<String> = (0..count)
        .map(|row| {
            let numbers = (1..=width).map(|n| format!("${}", row * width + n));
            format!("({})", numbers.collect::<Vec<_>>().join(", "))
        })
        .collect();
    Some(format!("{head}VALUES {}{tail}", tuples.join(", ")))
}

#[derive(Debug)]
struct Bound<'a>(Value<'a>);

impl std::fmt::Debug for Value<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Value::Null => "null",
            Value::Int(_) => "a number",
            Value::Text(_) => "a text",
            Value::Blob(_) => "bytes",
            Value::Ints(_) => "numbers",
            Value::Texts(_) => "texts",
        })
    }
}

type SqlResult = std::result::Result<IsNull, Box<dyn std::error::Error + Sync + Send>>;

impl ToSql for Bound<'_> {
    fn to_sql(&self, ty: &Type, out: &mut BytesMut) -> SqlResult {
        match (self.0, ty) {
            (Value::Null, _) => Ok(IsNull::Yes),
            (Value::Int(n), &Type::INT8) => n.to_sql(ty, out),
            (Value::Int(n), &Type::INT4) => i32::try_from(n)?.to_sql(ty, out),
            (Value::Int(n), &Type::INT2) => i16::try_from(n)?.to_sql(ty, out),
            (Value::Int(n), &Type::BOOL) => (n != 0).to_sql(ty, out),
            (Value::Text(text), &Type::TEXT | &Type::VARCHAR) => encode_nul(text).to_sql(ty, out),
            (Value::Blob(bytes), &Type::BYTEA) => bytes.to_sql(ty, out),
            (Value::Ints(list), &Type::INT8_ARRAY) => list.to_sql(ty, out),
            (Value::Texts(list), &Type::TEXT_ARRAY) => (0..list.count())
                .map(|index| encode_nul(list.text(index)))
                .collect::<Vec<_>>()
                .to_sql(ty, out),
            (value, ty) => Err(format!("{value:?} for a parameter of type {ty}").into()),
        }
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    to_sql_checked!();
}

/// A character no text needs. PostgreSQL's texts can not hold U+0000, Matrix's can.
const ESCAPE: char = '\u{10FFFF}';

fn encode_nul(text: &str) -> std::borrow::Cow<'_, str> {
    if !text.contains(['\0', ESCAPE]) {
        return text.into();
    }
    let mut encoded = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        match c {
            '\0' => encoded.extend([ESCAPE, '0']),
            ESCAPE => encoded.extend([ESCAPE, '1']),
            other => encoded.push(other),
        }
    }
    encoded.into()
}

fn decode_nul(text: &str) -> String {
    let mut decoded = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            ESCAPE if chars.next() == Some('0') => decoded.push('\0'),
            other => decoded.push(other),
        }
    }
    decoded
}

struct PostgresRow<'r> {
    row: &'r tokio_postgres::Row,
    decoded: Box<[OnceCell<String>]>,
}

impl PostgresRow<'_> {
    fn column_type(&self, column: usize) -> Result<&Type> {
        self.row
            .columns()
            .get(column)
            .map(|c| c.type_())
            .ok_or_else(|| Error::Corrupt(format!("there is no column {column}")))
    }
}

impl Row for PostgresRow<'_> {
    fn opt_int(&self, column: usize) -> Result<Option<i64>> {
        match *self.column_type(column)? {
            Type::INT8 => self.row.try_get::<_, Option<i64>>(column),
            Type::INT4 => self
                .row
                .try_get::<_, Option<i32>>(column)
                .map(|n| n.map(i64::from)),
            Type::INT2 => self
                .row
                .try_get::<_, Option<i16>>(column)
                .map(|n| n.map(i64::from)),
            Type::BOOL => self
                .row
                .try_get::<_, Option<bool>>(column)
                .map(|n| n.map(i64::from)),
            ref other => {
                return Err(Error::Corrupt(format!(
                    "column {column} is {other}, not a number"
                )));
            }
        }
        .map_err(translate)
    }

    fn opt_text(&self, column: usize) -> Result<Option<&str>> {
        let text = self
            .row
            .try_get::<_, Option<&str>>(column)
            .map_err(translate)?;
        Ok(text.map(|text| {
            if text.contains(ESCAPE) {
                self.decoded[column].get_or_init(|| decode_nul(text))
            } else {
                text
            }
        }))
    }

    fn opt_blob(&self, column: usize) -> Result<Option<&[u8]>> {
        self.row
            .try_get::<_, Option<&[u8]>>(column)
            .map_err(translate)
    }
}

fn translate(error: tokio_postgres::Error) -> Error {
    let text = match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    };
    match error.code() {
        Some(
            &SqlState::T_R_SERIALIZATION_FAILURE
            | &SqlState::T_R_DEADLOCK_DETECTED
            | &SqlState::LOCK_NOT_AVAILABLE,
        ) => Error::Conflict(text),
        Some(code) if code.code().starts_with("23") => Error::Constraint(text),
        _ => Error::engine(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inserts_of_one_row_become_inserts_of_many() {
        let nothing = "ON CONFLICT (a) DO NOTHING";
        assert_eq!(
            many_rows(
                &format!("INSERT INTO t (a, b) VALUES ($1, $2) {nothing}"),
                2
            ),
            Some(format!(
                "INSERT INTO t (a, b) VALUES ($1, $2), ($3, $4) {nothing}"
            ))
        );
        for other in [
            "UPDATE t SET a = $1",
            "INSERT INTO t (a, b) VALUES ($2, $1)",
            "INSERT INTO t (a, b) VALUES ($1, NULL)",
            "INSERT INTO t (a) VALUES (LOWER($1))",
            "INSERT INTO t (a) VALUES ($1) ON CONFLICT (a) DO UPDATE SET b = 1",
            "INSERT INTO t (a) SELECT b FROM u WHERE c = $1",
        ] {
            assert_eq!(many_rows(other, 2), None, "{other}");
        }
    }

    #[test]
    fn a_nul_in_a_text_survives_postgres() {
        for text in ["", "plain", "a\0b", "\u{10FFFF}", "\u{10FFFF}0\0", "\0\0"] {
            let encoded = encode_nul(text).into_owned();
            assert!(!encoded.contains('\0'));
            assert_eq!(decode_nul(&encoded), text);
        }
    }
}
