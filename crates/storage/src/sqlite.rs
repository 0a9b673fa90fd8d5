//! SQLite: reader threads on WAL snapshots, one writer thread that commits in groups, one that copies the log
//! into the file; or no threads, and one connection for whoever runs the work.

use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, Barrier, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use rusqlite::config::DbConfig;
use rusqlite::hooks::Wal;
use rusqlite::types::{ToSqlOutput, Value as Owned, ValueRef};
use rusqlite::vtab::array::{Array, load_module};
use rusqlite::{Connection, ErrorCode, OpenFlags, ToSql};

use crate::Executor;
use crate::cache::{Cached, Caches};
use crate::driver::{Conn, Engine, Error, Job, Param, Result, Row, Value, run_caught};

/// How many writes share one commit at most: enough to hide the fsync, few enough that the first one does
/// not wait long.
const GROUP_MAX: usize = 128;

/// Prepared statements kept for each connection; more than this program has.
const STATEMENTS_MAX: usize = 1024;

/// How long a connection waits for another process's lock (a backup, an admin's shell).
const BUSY_TIMEOUT: Duration = Duration::from_secs(20);

/// Pages in the log from which on it is copied into the file (16 kB each).
const LOG_PAGES: i32 = 4000;
/// With so many in it the writer copies them itself, and what is to be written waits for that: while it goes on
/// writing, the log has no end at which it could begin anew.
const LOG_PAGES_MAX: i32 = 16_000;

pub(crate) struct Sqlite {
    reads: Option<Sender<Box<dyn Job>>>,
    readers: usize,
    writes: Option<Sender<Box<dyn Job>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Sqlite {
    /// `path` is a file, or `:memory:` for a database that lives on the writer's connection alone.
    pub(crate) fn open(path: &str, readers: usize, caches: &Arc<Caches>) -> Result<Self> {
        let in_memory = path == ":memory:";
        let mut writer = connect(path, true)?;
        let (writes, write_queue) = unbounded();
        let (reads, read_queue) = unbounded::<Box<dyn Job>>();
        // What a reader meets on the writer's connection (in memory, all do) is committed with it.
        let cached = Cached {
            caches: Arc::clone(caches),
            fill: false,
        };
        let mut threads = Vec::new();
        if !in_memory {
            let (long, log_is_long) = bounded(1);
            watch_log(&mut writer, long)?;
            let connection = connect(path, true)?;
            threads.push(spawn("sqlite-log", move || {
                copy_loop(&connection, &log_is_long);
            })?);
        }
        threads.push(spawn("sqlite-writer", move || {
            write_loop(&writer, &write_queue, &cached);
        })?);
        let readers = if in_memory { 0 } else { readers.max(1) };
        if !in_memory {
            for _ in 0..readers {
                let connection = connect(path, false)?;
                let queue = read_queue.clone();
                let cached = Cached {
                    caches: Arc::clone(caches),
                    fill: true,
                };
                threads.push(spawn("sqlite-reader", move || {
                    read_loop(&connection, &queue, &cached);
                })?);
            }
        }
        Ok(Self {
            reads: (!in_memory).then_some(reads),
            readers,
            writes: Some(writes),
            threads,
        })
    }
}

impl Engine for Sqlite {
    fn submit_read(&self, job: Box<dyn Job>) {
        match &self.reads {
            Some(reads) => send(reads, job),
            None => self.submit_write(job),
        }
    }

    fn submit_write(&self, job: Box<dyn Job>) {
        match &self.writes {
            Some(writes) => send(writes, job),
            None => job.finish(Err(Error::Closed)),
        }
    }

    fn schema_is_there(&self) {
        let Some(reads) = &self.reads else { return };
        let all = Arc::new(Barrier::new(self.readers));
        for _ in 0..self.readers {
            let all = Arc::clone(&all);
            send(reads, Box::new(ReadSchema { all }));
        }
    }
}

/// Has a connection read the schema, which otherwise its first reader waits for.
struct ReadSchema {
    /// No thread gets to a second one before each has its own.
    all: Arc<Barrier>,
}

impl Job for ReadSchema {
    fn run(&mut self, conn: &mut dyn Conn) -> Result<()> {
        self.all.wait();
        conn.query("SELECT 1 FROM sqlite_schema LIMIT 1", &[], &mut |_| Ok(()))
    }

    fn reads(&self) -> bool {
        true
    }

    fn finish(self: Box<Self>, outcome: Result<()>) {
        if let Err(error) = outcome {
            tracing::warn!(%error, "a reader cannot read the schema");
        }
    }
}

impl Drop for Sqlite {
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

/// One connection, and an executor that runs one job on it after another.
pub(crate) struct Given {
    connection: Arc<Mutex<Connection>>,
    cached: Cached,
    executor: Executor,
}

impl Given {
    pub(crate) fn open(path: &str, caches: &Arc<Caches>, executor: Executor) -> Result<Self> {
        Ok(Self {
            connection: Arc::new(Mutex::new(connect(path, true)?)),
            cached: Cached {
                caches: Arc::clone(caches),
                fill: false,
            },
            executor,
        })
    }
}

impl Engine for Given {
    fn submit_read(&self, job: Box<dyn Job>) {
        self.submit_write(job);
    }

    fn submit_write(&self, job: Box<dyn Job>) {
        let (connection, cached) = (Arc::clone(&self.connection), self.cached.clone());
        (self.executor.0)(Box::new(move || {
            let connection = connection.lock().unwrap_or_else(PoisonError::into_inner);
            write_group(&connection, job, || None, &cached);
        }));
    }

    fn after_crash(&self, caches: &Arc<Caches>, executor: Executor) -> Option<Box<dyn Engine>> {
        Some(Box::new(Self {
            connection: Arc::clone(&self.connection),
            cached: Cached {
                caches: Arc::clone(caches),
                fill: false,
            },
            executor,
        }))
    }
}

fn send(queue: &Sender<Box<dyn Job>>, job: Box<dyn Job>) {
    if let Err(refused) = queue.send(job) {
        refused.into_inner().finish(Err(Error::Closed));
    }
}

/// Pages that a connection keeps. The writer comes back to the leaves of its indexes; readers find what they
/// read again in our own caches, and the rest in the system's. A reader forgets all its pages when it meets a
/// newer snapshot.
const WRITER_CACHE_KB: i64 = 10 * 1024;
const READER_CACHE_KB: i64 = 1024;

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
        .map_err(Error::engine)
}

fn connect(path: &str, writer: bool) -> Result<Connection> {
    let connection = if path == ":memory:" {
        Connection::open_in_memory()
    } else {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_CREATE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        Connection::open_with_flags(Path::new(path), flags)
    }
    .map_err(translate)?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS_MAX);
    connection.busy_timeout(BUSY_TIMEOUT).map_err(translate)?;
    // The page size must come before the first table. FULL: what was answered 200 survives a power cut.
    let pragmas = "PRAGMA page_size = 16384; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;
        PRAGMA temp_store = MEMORY; PRAGMA journal_size_limit = 67108864;";
    connection.execute_batch(pragmas).map_err(translate)?;
    connection
        .pragma_update(None, "wal_autocheckpoint", LOG_PAGES)
        .map_err(translate)?;
    let cache_kb = if writer {
        WRITER_CACHE_KB
    } else {
        READER_CACHE_KB
    };
    connection
        .pragma_update(None, "cache_size", -cache_kb)
        .map_err(translate)?;
    if !writer {
        connection
            .execute_batch("PRAGMA query_only = ON")
            .map_err(translate)?;
    }
    load_module(&connection).map_err(translate)?;
    // Otherwise the planner looks at the value of a `LIMIT $n`, and every execution compiles the statement anew.
    connection
        .set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)
        .map_err(translate)?;
    Ok(connection)
}

/// Says after a commit that the log has become long.
fn watch_log(writer: &mut Connection, long: Sender<()>) -> Result<()> {
    let watch = move |log: &mut Wal, pages| {
        if pages >= LOG_PAGES_MAX {
            // Busy while the other one copies: then it is done with the next commit.
            let _copied = log.checkpoint();
        } else if pages >= LOG_PAGES {
            // Full: it has been told.
            let _told = long.try_send(());
        }
        Ok(())
    };
    writer.wal_hook(Some(watch)).map_err(translate)
}

/// Copies the log into the file, beside the writer, which can begin it anew once all of it is copied.
fn copy_loop(connection: &Connection, log_is_long: &Receiver<()>) {
    while log_is_long.recv().is_ok() {
        if let Err(error) = connection.execute_batch("PRAGMA wal_checkpoint(PASSIVE)") {
            tracing::warn!(%error, "the log of the database was not copied into its file");
        }
    }
}

fn read_loop(connection: &Connection, queue: &Receiver<Box<dyn Job>>, cached: &Cached) {
    while let Ok(mut job) = queue.recv() {
        let outcome = connection
            .execute_batch("BEGIN DEFERRED")
            .map_err(translate)
            .and_then(|()| {
                let outcome = run_caught(job.as_mut(), &mut SqliteConn { connection, cached });
                let ended = connection.execute_batch("ROLLBACK").map_err(translate);
                outcome.and(ended)
            });
        job.finish(outcome);
    }
}

fn write_loop(connection: &Connection, queue: &Receiver<Box<dyn Job>>, cached: &Cached) {
    while let Ok(first) = queue.recv() {
        write_group(connection, first, || queue.try_recv().ok(), cached);
    }
}

/// Runs what is queued, each job in a savepoint of its own, and replies after the one commit.
fn write_group(
    connection: &Connection,
    first: Box<dyn Job>,
    queued: impl Fn() -> Option<Box<dyn Job>>,
    cached: &Cached,
) {
    if let Err(error) = connection.execute_batch("BEGIN IMMEDIATE") {
        first.finish(Err(translate(error)));
        return;
    }
    let mut done: Vec<(Box<dyn Job>, Result<()>)> = Vec::new();
    let mut next = Some(first);
    while let Some(mut job) = next {
        let outcome = run_in_savepoint(connection, job.as_mut(), cached);
        done.push((job, outcome));
        next = if done.len() < GROUP_MAX {
            queued()
        } else {
            None
        };
    }
    let committed = connection.execute_batch("COMMIT");
    if committed.is_err() && !connection.is_autocommit() {
        let _ended = connection.execute_batch("ROLLBACK");
    }
    for (job, outcome) in done {
        let outcome = match &committed {
            Ok(()) => outcome,
            Err(error) => outcome.and(Err(Error::engine(error.to_string()))),
        };
        job.finish(outcome);
    }
}

fn run_in_savepoint(connection: &Connection, job: &mut dyn Job, cached: &Cached) -> Result<()> {
    if connection.is_autocommit() {
        // A full disk and its like roll the whole transaction back, not the statement.
        return Err(Error::engine(
            "the transaction was rolled back by the engine",
        ));
    }
    connection
        .execute_batch("SAVEPOINT job")
        .map_err(translate)?;
    let cached = &Cached {
        fill: job.reads(),
        ..cached.clone()
    };
    let outcome = run_caught(job, &mut SqliteConn { connection, cached });
    let end = if outcome.is_ok() {
        "RELEASE job"
    } else {
        "ROLLBACK TO job; RELEASE job"
    };
    let ended = connection.execute_batch(end).map_err(translate);
    outcome.and(ended)
}

struct SqliteConn<'c> {
    connection: &'c Connection,
    cached: &'c Cached,
}

impl Conn for SqliteConn<'_> {
    fn query(
        &mut self,
        sql: &str,
        params: &[&dyn Param],
        each: &mut dyn FnMut(&dyn Row) -> Result<()>,
    ) -> Result<()> {
        let mut statement = prepare(self.connection, sql)?;
        let places = places(&statement)?;
        bind(&mut statement, &places, |index| {
            params.get(index).map(|p| p.value())
        })?;
        let mut rows = statement.raw_query();
        while let Some(row) = rows.next().map_err(translate)? {
            each(&SqliteRow(row))?;
        }
        Ok(())
    }

    fn execute(&mut self, sql: &str, params: &[&dyn Param]) -> Result<u64> {
        let mut statement = prepare(self.connection, sql)?;
        let places = places(&statement)?;
        bind(&mut statement, &places, |index| {
            params.get(index).map(|p| p.value())
        })?;
        run_bound(&mut statement)
    }

    fn execute_many(&mut self, sql: &str, rows: &[Vec<Value<'_>>]) -> Result<u64> {
        let mut statement = prepare(self.connection, sql)?;
        let places = places(&statement)?;
        let mut changed = 0;
        for row in rows {
            bind(&mut statement, &places, |index| row.get(index).copied())?;
            changed += run_bound(&mut statement)?;
        }
        Ok(changed)
    }

    fn later(&mut self, sql: &str, rows: &[Vec<Value<'_>>]) -> Result<()> {
        self.execute_many(sql, rows).map(drop)
    }

    fn prepare(&mut self, sql: &str) -> Result<()> {
        prepare(self.connection, sql).map(drop)
    }

    fn cached(&self) -> Cached {
        self.cached.clone()
    }
}

fn prepare<'c>(connection: &'c Connection, sql: &str) -> Result<rusqlite::CachedStatement<'c>> {
    if sql.contains("rarray_text(") {
        // One array module serves both kinds here.
        return connection
            .prepare_cached(&sql.replace("rarray_text(", "rarray("))
            .map_err(translate);
    }
    connection.prepare_cached(sql).map_err(translate)
}

fn run_bound(statement: &mut rusqlite::CachedStatement<'_>) -> Result<u64> {
    if statement.column_count() == 0 {
        return Ok(statement.raw_execute().map_err(translate)? as u64);
    }
    let mut count = 0;
    let mut rows = statement.raw_query();
    while rows.next().map_err(translate)?.is_some() {
        count += 1;
    }
    Ok(count)
}

/// Which value goes where: statements may name `$n` in any order.
fn places(statement: &rusqlite::CachedStatement<'_>) -> Result<Vec<usize>> {
    let number = |place| {
        statement
            .parameter_name(place)
            .and_then(|name| name.strip_prefix('$'))
            .and_then(|digits| digits.parse::<usize>().ok())
            .ok_or_else(|| Error::engine("parameters must be written $1, $2, …"))
    };
    (1..=statement.parameter_count()).map(number).collect()
}

/// Binds `$n` to the n-th value.
fn bind<'v>(
    statement: &mut rusqlite::CachedStatement<'_>,
    places: &[usize],
    value: impl Fn(usize) -> Option<Value<'v>>,
) -> Result<()> {
    for (place, number) in (1..).zip(places) {
        let value = value(number - 1)
            .ok_or_else(|| Error::engine(format!("no value for parameter ${number}")))?;
        match list(value) {
            Some(array) => statement.raw_bind_parameter(place, array),
            None => statement.raw_bind_parameter(place, Bound(value)),
        }
        .map_err(translate)?;
    }
    Ok(())
}

/// A list as the `rarray` module takes it.
fn list(value: Value<'_>) -> Option<Array> {
    match value {
        Value::Ints(list) => Some(Rc::new(list.iter().map(|n| Owned::Integer(*n)).collect())),
        Value::Texts(list) => Some(Rc::new(
            (0..list.count())
                .map(|index| Owned::Text(list.text(index).to_owned()))
                .collect(),
        )),
        _ => None,
    }
}

struct Bound<'a>(Value<'a>);

impl ToSql for Bound<'_> {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(match self.0 {
            Value::Null => ToSqlOutput::Borrowed(ValueRef::Null),
            Value::Int(number) => ToSqlOutput::Borrowed(ValueRef::Integer(number)),
            Value::Text(text) => ToSqlOutput::Borrowed(ValueRef::Text(text.as_bytes())),
            Value::Blob(bytes) => ToSqlOutput::Borrowed(ValueRef::Blob(bytes)),
            Value::Ints(_) | Value::Texts(_) => ToSqlOutput::Borrowed(ValueRef::Null),
        })
    }
}

struct SqliteRow<'r, 's>(&'r rusqlite::Row<'s>);

impl SqliteRow<'_, '_> {
    fn get(&self, column: usize) -> Result<ValueRef<'_>> {
        self.0.get_ref(column).map_err(translate)
    }
}

impl Row for SqliteRow<'_, '_> {
    fn opt_int(&self, column: usize) -> Result<Option<i64>> {
        match self.get(column)? {
            ValueRef::Null => Ok(None),
            ValueRef::Integer(number) => Ok(Some(number)),
            other => Err(wrong_type(column, "a number", other)),
        }
    }

    fn opt_text(&self, column: usize) -> Result<Option<&str>> {
        match self.get(column)? {
            ValueRef::Null => Ok(None),
            ValueRef::Text(bytes) => std::str::from_utf8(bytes)
                .map(Some)
                .map_err(|_| Error::corrupt("text that is not UTF-8")),
            other => Err(wrong_type(column, "text", other)),
        }
    }

    fn opt_blob(&self, column: usize) -> Result<Option<&[u8]>> {
        match self.get(column)? {
            ValueRef::Null => Ok(None),
            ValueRef::Blob(bytes) => Ok(Some(bytes)),
            other => Err(wrong_type(column, "bytes", other)),
        }
    }
}

fn wrong_type(column: usize, wanted: &str, found: ValueRef<'_>) -> Error {
    Error::Corrupt(format!(
        "column {column} is {}, not {wanted}",
        found.data_type()
    ))
}

fn translate(error: rusqlite::Error) -> Error {
    match error.sqlite_error_code() {
        Some(ErrorCode::ConstraintViolation) => Error::Constraint(error.to_string()),
        _ => Error::engine(error),
    }
}

/// The words of the schema that SQLite spells in another way.
pub(crate) fn schema_dialect(sql: &str) -> String {
    sql.replace("BIGINT PRIMARY KEY", "INTEGER PRIMARY KEY")
        .replace("BYTEA", "BLOB")
}

#[cfg(test)]
mod tests {
    use rusqlite::StatementStatus;

    use super::*;
    use crate::{Options, Store, row};

    #[test]
    fn a_limit_given_as_a_parameter_does_not_compile_a_statement_anew() {
        let connection = connect(":memory:", true).unwrap();
        connection.execute_batch("CREATE TABLE t (n)").unwrap();
        let mut statement = prepare(&connection, "SELECT n FROM t ORDER BY n LIMIT $1").unwrap();
        for limit in 1..4 {
            bind(&mut statement, &[1], |_| Some(Value::Int(limit))).unwrap();
            assert!(statement.raw_query().next().unwrap().is_none());
        }
        assert_eq!(statement.get_status(StatementStatus::RePrepare), 0);
    }

    /// Some 130 MB, written as fast as they can be.
    #[tokio::test]
    async fn the_log_is_copied_beside_the_writer_and_has_an_end() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("a.db");
        let url = format!("sqlite:{}", path.display());
        let store = Store::open(&url, Options::default()).await.unwrap();
        let create = "CREATE TABLE t (n INTEGER PRIMARY KEY, text TEXT)";
        store.write(move |c| c.execute(create, &[])).await.unwrap();
        for _ in 0..32 {
            let fill = "INSERT INTO t (text) VALUES ($1)";
            let rows = store.write(move |c| {
                let text = "x".repeat(16_000);
                c.execute_many(fill, &vec![row![text.as_str()]; 256])
            });
            assert_eq!(rows.await.unwrap(), 256);
        }
        let size = |path: &Path| std::fs::metadata(path).map_or(0, |file| file.len());
        let log = home.path().join("a.db-wal");
        let end = LOG_PAGES_MAX.unsigned_abs() + 1000;
        assert!(size(&log) < u64::from(end) * 16_384);
        let copied = async {
            while size(&path) < 64 << 20 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let copied = tokio::time::timeout(Duration::from_secs(30), copied).await;
        copied.expect("the log is copied");
    }

    const ADD: &str = "INSERT INTO streams (kind, position) VALUES ($1, 1)";

    #[tokio::test]
    async fn what_an_executor_did_not_run_is_not_there_after_a_crash() {
        let at_once = Executor::new(|work| work());
        let options = Options {
            executor: Some(at_once.clone()),
            ..Options::default()
        };
        let first = Store::open("sqlite::memory:", options).await.unwrap();
        first.write(|c| c.execute(ADD, &[&"kept"])).await.unwrap();
        let never = first.after_crash(Executor::new(drop)).unwrap();
        assert!(never.write(|c| c.execute(ADD, &[&"lost"])).await.is_err());
        let second = never.after_crash(at_once).unwrap();
        let kinds =
            second.read(|c| c.query_all("SELECT kind FROM streams", &[], |row| row.string(0)));
        assert_eq!(kinds.await.unwrap(), ["kept"]);
    }
}
