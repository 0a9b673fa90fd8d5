//! PostgreSQL: worker threads, each with a client and a runtime of its own.

use std::cell::OnceCell;
use std::collections::{HashMap, HashSet, VecDeque};
use std::error::Error as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::thread::{JoinHandle, Thread};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures::future::{BoxFuture, join};
use futures::{SinkExt, StreamExt, TryStreamExt, pin_mut};
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

/// Rows of one statement that are sent without waiting for what comes of them, and all that are under way so.
const LATER_ROWS_MAX: usize = 8;
const LATER_MAX: usize = 64;

/// From this many rows on they go in lists, a parameter for each column.
const ROWS_IN_LISTS_MIN: usize = 4;

/// Rows in the lists of one statement. Beyond, the database writes some while the next are put together.
const ROWS_AT_ONCE: usize = 1000;

/// Statements with lists on their way in one pipeline.
const LISTS_MAX: usize = 2;

/// From this many rows on, those that can not collide are copied in, which is faster still.
const ROWS_COPIED_MIN: usize = 64;

/// Bytes of copied rows that are sent in one piece.
const COPY_BYTES: usize = 64 * 1024;

/// When so many writes wait, one worker takes them into one transaction of its own.
const GROUP_MIN: usize = 8;

/// Writes of one transaction. PostgreSQL keeps track of 64 savepoints without effort.
const GROUP_MAX: usize = 48;

/// Prepared statements kept for each connection; more than this program has.
const STATEMENTS_MAX: usize = 1024;

/// Tries to connect again before a job is given up.
const CONNECTS_MAX: u32 = 5;

/// Serialises the set-up of one database by several processes. Any number nobody else uses.
const SETUP_LOCK: i64 = 0x5645_5354;

const SETUP: &str = "CREATE TABLE IF NOT EXISTS write_turn (nothing BIGINT)";

/// A plan that is kept may be one that was good while the tables were empty, as in the first join of a fresh
/// server: with it that took a hundred times as long. Planning anew costs some tens of microseconds.
///
/// A table that is small is read as a whole by preference, and of a serializable transaction that has done so
/// PostgreSQL thinks that it collides with whoever writes anything there. There is an index for all that is
/// asked often.
const SESSION: &str =
    "SET plan_cache_mode = force_custom_plan; SET jit = off; SET enable_seqscan = off";

const BEGIN_READ: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
/// Serializable, so that a function that reads and then writes is as right here as with SQLite's one writer.
const BEGIN_SHARED: &str =
    "BEGIN ISOLATION LEVEL SERIALIZABLE; LOCK TABLE write_turn IN ROW EXCLUSIVE MODE";
/// Waits until the writes under way are over and lets no other begin. A lock taken before the first
/// statement comes before the snapshot, so nothing can have changed behind it.
const BEGIN_ALONE: &str =
    "BEGIN ISOLATION LEVEL SERIALIZABLE; LOCK TABLE write_turn IN EXCLUSIVE MODE";
/// The same, unless a long write is under way: others would wait for that, too.
const BEGIN_GROUP: &str = "BEGIN ISOLATION LEVEL SERIALIZABLE; SET LOCAL lock_timeout = '10ms';
    LOCK TABLE write_turn IN EXCLUSIVE MODE; SET LOCAL lock_timeout TO DEFAULT";

pub(crate) struct Postgres {
    reads: Arc<Queue>,
    writes: Arc<Queue>,
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
        let mut this = Self {
            reads: Arc::default(),
            writes: Arc::default(),
            threads: Vec::new(),
        };
        let mut first = Some(first);
        for _ in 0..writers.max(1) {
            let session = match first.take() {
                Some(session) => session,
                None => Session::new(config.clone(), cached(false))?,
            };
            let writer = spawn("postgres-writer", session, &this.writes, write_loop)?;
            this.threads.push(writer);
        }
        for _ in 0..readers.max(1) {
            let session = Session::new(config.clone(), cached(true))?;
            let reader = spawn("postgres-reader", session, &this.reads, read_loop)?;
            this.threads.push(reader);
        }
        Ok(this)
    }
}

impl Engine for Postgres {
    fn submit_read(&self, job: Box<dyn Job>) {
        self.reads.push(job);
    }

    fn submit_write(&self, job: Box<dyn Job>) {
        self.writes.push(job);
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.reads.close();
        self.writes.close();
        let here = std::thread::current().id();
        for thread in self.threads.drain(..) {
            // The last handle may have been dropped by a closure on one of these threads.
            if thread.thread().id() != here && thread.join().is_err() {
                tracing::error!("a database thread panicked");
            }
        }
    }
}

fn spawn(
    name: &str,
    session: Session,
    queue: &Arc<Queue>,
    work: fn(Session, &Queue),
) -> Result<JoinHandle<()>> {
    let queue = Arc::clone(queue);
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || work(session, &queue))
        .map_err(Error::engine)
}

/// What waits for a worker. Of several idle ones the last to become so is woken: its connection has the
/// statements, and its process in the database has read the catalogues.
#[derive(Default)]
struct Queue(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    jobs: VecDeque<Box<dyn Job>>,
    idle: Vec<Thread>,
    closed: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, job: Box<dyn Job>) {
        let mut waiting = self.lock();
        waiting.jobs.push_back(job);
        let woken = waiting.idle.pop();
        drop(waiting);
        if let Some(worker) = woken {
            worker.unpark();
        }
    }

    /// What is there still gets done.
    fn close(&self) {
        let mut waiting = self.lock();
        waiting.closed = true;
        for worker in waiting.idle.drain(..) {
            worker.unpark();
        }
    }

    /// What `take` takes of the jobs, which are some, as soon as there are any; `None` when there will be none.
    fn wait<T>(&self, take: impl Fn(&mut VecDeque<Box<dyn Job>>) -> Option<T>) -> Option<T> {
        let here = std::thread::current();
        loop {
            let mut waiting = self.lock();
            // Whoever woke this worker has done so already; but it may also have woken by chance.
            waiting.idle.retain(|worker| worker.id() != here.id());
            if let Some(taken) = take(&mut waiting.jobs) {
                return Some(taken);
            }
            if waiting.closed {
                return None;
            }
            waiting.idle.push(here.clone());
            drop(waiting);
            std::thread::park();
        }
    }

    fn try_one(&self) -> Option<Box<dyn Job>> {
        self.lock().jobs.pop_front()
    }
}

fn read_loop(mut session: Session, queue: &Queue) {
    session.connect_early();
    while let Some(first) = queue.wait(VecDeque::pop_front) {
        let mut next = Some(first);
        while let Some(mut job) = next {
            let outcome = session.read(job.as_mut());
            // The snapshot may go after that: nobody waits for it.
            job.finish(outcome);
            next = queue.try_one();
            session.end_read(next.is_some());
        }
    }
}

fn write_loop(mut session: Session, queue: &Queue) {
    session.connect_early();
    let take = |jobs: &mut VecDeque<Box<dyn Job>>| -> Option<Vec<Box<dyn Job>>> {
        let count = match jobs.len() {
            0 => return None,
            GROUP_MIN.. => jobs.len().min(GROUP_MAX),
            _ => 1,
        };
        Some(jobs.drain(..count).collect())
    };
    while let Some(mut jobs) = queue.wait(take) {
        let outcomes = match jobs.len() {
            1 => None,
            _ => session.write_group(&mut jobs),
        };
        match outcomes {
            Some(outcomes) => {
                for (job, outcome) in jobs.into_iter().zip(outcomes) {
                    job.finish(outcome);
                }
            }
            None => {
                for mut job in jobs {
                    let outcome = session.write(job.as_mut());
                    job.finish(outcome);
                }
            }
        }
    }
}

/// One worker's connection, made again when it is lost.
struct Session {
    config: Config,
    cached: Cached,
    runtime: Runtime,
    client: Option<Arc<Client>>,
    statements: HashMap<Box<str>, Statement>,
    /// Commands that go out together with the next statement.
    ahead: String,
    /// Statements that were sent and not yet answered. Their answers come before those to all that is sent after
    /// them.
    later: Vec<Later>,
    /// How long these are without the one that begins a transaction, while that is among them.
    begins: Option<usize>,
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
            ahead: String::new(),
            later: Vec::new(),
            begins: None,
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
        self.forget_connection();
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
                    self.client = Some(Arc::new(client));
                    return self.batch(SESSION);
                }
                Err(error) => failure = Some(error),
            }
        }
        Err(failure.map_or(Error::Closed, translate))
    }

    fn client(&self) -> Result<Arc<Client>> {
        self.client.clone().ok_or(Error::Closed)
    }

    /// Waits for this, and for all that was sent before. What went wrong first counts: PostgreSQL takes nothing
    /// more in a transaction after that.
    fn wait<T>(&mut self, then: impl Future<Output = Asked<T>>) -> Result<T> {
        let later = std::mem::take(&mut self.later);
        if later.is_empty() {
            return self.runtime.block_on(then).map_err(translate);
        }
        let settled = async {
            let mut first = Ok(());
            for statement in later {
                first = first.and(statement.await.map(drop));
            }
            first
        };
        let (settled, then) = self.runtime.block_on(join(settled, then));
        settled.and(then).map_err(translate)
    }

    fn settle(&mut self) -> Result<()> {
        match self.later.is_empty() {
            true => Ok(()),
            false => self.wait(std::future::ready(Ok(()))),
        }
    }

    fn batch(&mut self, sql: &str) -> Result<()> {
        let client = self.client()?;
        self.wait(client.batch_execute(sql))
    }

    /// To prove that one knows the password takes longer than most questions.
    fn connect_early(&mut self) {
        if let Err(error) = self.connect() {
            tracing::warn!(%error, "no connection to the database so far");
        }
    }

    fn forget_connection(&mut self) {
        self.client = None;
        self.statements.clear();
        self.ahead.clear();
        self.later.clear();
        self.begins = None;
    }

    fn is_lost(&self) -> bool {
        self.client.as_ref().is_none_or(|c| c.is_closed())
    }

    /// Has commands sent before the next statement, in the same packet.
    fn send_ahead(&mut self, commands: &str) {
        if !self.ahead.is_empty() {
            self.ahead.push_str("; ");
        }
        self.ahead.push_str(commands);
    }

    fn begin(&mut self, command: &str) {
        let before = self.ahead.len();
        self.send_ahead(command);
        self.begins = Some(before);
    }

    /// Ends the transaction after what still waits to be sent, or lets it be when it has not begun.
    fn end(&mut self, command: &str) -> Result<()> {
        match self.begins.take() {
            Some(before) => self.ahead.truncate(before),
            None => self.send_ahead(command),
        }
        if self.ahead.is_empty() {
            return Ok(());
        }
        let commands = std::mem::take(&mut self.ahead);
        self.batch(&commands)
    }

    /// The commands to go out with this statement. A statement that writes does not leave before the
    /// transaction it belongs to: if that did not begin, it would be one of its own.
    fn take_ahead(&mut self, sql: &str) -> Result<String> {
        let begins = self.begins.take().is_some();
        let commands = std::mem::take(&mut self.ahead);
        if begins && !sql.trim_start().starts_with("SELECT") {
            self.batch(&commands)?;
            return Ok(String::new());
        }
        Ok(commands)
    }

    fn conn(&mut self) -> PostgresConn<'_> {
        PostgresConn {
            session: self,
            failed: false,
        }
    }

    fn read(&mut self, job: &mut dyn Job) -> Result<()> {
        let outcome = self.read_once(job);
        if outcome.is_err() && self.is_lost() {
            return self.read_once(job);
        }
        outcome
    }

    fn read_once(&mut self, job: &mut dyn Job) -> Result<()> {
        self.connect()?;
        self.begin(BEGIN_READ);
        run_caught(job, &mut self.conn())
    }

    /// Ends the snapshot of the last read, at once or together with the beginning of the next.
    fn end_read(&mut self, more: bool) {
        if self.is_lost() {
            self.forget_connection();
        } else if more && self.begins.is_none() {
            self.send_ahead("ROLLBACK");
        } else if let Err(error) = self.end("ROLLBACK") {
            tracing::warn!(%error, "a snapshot did not end");
            self.forget_connection();
        }
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
        self.begin(if alone { BEGIN_ALONE } else { BEGIN_SHARED });
        match self.run_write(job) {
            Ok(()) => self.end("COMMIT"),
            Err(error) => {
                if self.is_lost() {
                    return Err(Error::Conflict(format!("connection lost: {error}")));
                }
                self.end("ROLLBACK")?;
                Err(error)
            }
        }
    }

    fn run_write(&mut self, job: &mut dyn Job) -> Result<()> {
        let mut conn = self.conn();
        match run_caught(job, &mut conn) {
            // COMMIT of a failed transaction is a silent rollback.
            Ok(()) if conn.failed => Err(Error::engine("a function went on after an error")),
            outcome => outcome,
        }
    }

    /// Runs several writes in one transaction with nobody beside it, as SQLite has them, each in a savepoint
    /// of its own: one commit for all, and none collides. `None` when nothing of that has come to pass.
    fn write_group(&mut self, jobs: &mut [Box<dyn Job>]) -> Option<Vec<Result<()>>> {
        self.connect().ok()?;
        if self.batch(BEGIN_GROUP).is_err() {
            self.give_up_group();
            return None;
        }
        let mut outcomes = Vec::with_capacity(jobs.len());
        for job in &mut *jobs {
            self.send_ahead("SAVEPOINT job");
            let outcome = self.run_write(job.as_mut());
            // To each its own.
            let outcome = outcome.and(self.settle());
            if self.is_lost() || matches!(outcome, Err(Error::Conflict(_))) {
                self.give_up_group();
                return None;
            }
            self.send_ahead(match outcome {
                Ok(()) => "RELEASE SAVEPOINT job",
                Err(_) => "ROLLBACK TO SAVEPOINT job; RELEASE SAVEPOINT job",
            });
            outcomes.push(outcome);
        }
        match self.end("COMMIT") {
            Ok(()) => Some(outcomes),
            Err(Error::Conflict(_)) => None,
            Err(error) => {
                let reason = error.to_string();
                let failed = |outcome: Result<()>| outcome.and(Err(Error::engine(reason.clone())));
                Some(outcomes.into_iter().map(failed).collect())
            }
        }
    }

    fn give_up_group(&mut self) {
        self.ahead.clear();
        if self.is_lost() || self.end("ROLLBACK").is_err() {
            self.forget_connection();
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
        self.prepare_as(sql, &dialect(sql))
    }

    /// Prepares what `sql` is called here. Nothing is executed by that, so what begins a transaction may go
    /// along.
    fn prepare_as(&mut self, sql: &str, here: &str) -> Result<Statement> {
        let commands = std::mem::take(&mut self.session.ahead);
        self.session.begins = None;
        let session = &mut *self.session;
        let client = session.client()?;
        let statement = session.wait(after(&client, &commands, client.prepare(here)))?;
        if session.statements.len() >= STATEMENTS_MAX {
            session.statements.clear();
        }
        session.statements.insert(sql.into(), statement.clone());
        Ok(statement)
    }
}

/// What became of a question to the database.
type Asked<T> = std::result::Result<T, tokio_postgres::Error>;
type Later = BoxFuture<'static, Asked<u64>>;

/// Sends commands and what comes after them in one go.
async fn after<T>(
    client: &Client,
    commands: &str,
    then: impl Future<Output = Asked<T>>,
) -> Asked<T> {
    if commands.is_empty() {
        return then.await;
    }
    // Each is sent when it is polled for the first time, in this order.
    let (began, then) = join(client.batch_execute(commands), then).await;
    began?;
    then
}

/// A statement in PostgreSQL's words: a list is an array here.
fn dialect(sql: &str) -> String {
    const LIST: &str = "IN (SELECT value FROM rarray";
    let mut here = String::with_capacity(sql.len());
    let mut rest = sql;
    while let Some((before, list)) = rest.split_once(LIST) {
        let list = list.strip_prefix("_text").unwrap_or(list);
        let Some((parameter, after)) = list.split_once("))") else {
            break;
        };
        match before.strip_suffix("NOT ") {
            Some(before) => here.extend([before, "<> ALL", parameter, ")"]),
            None => here.extend([before, "= ANY", parameter, ")"]),
        }
        rest = after;
    }
    here.push_str(rest);
    here
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

    fn later(&mut self, sql: &str, rows: &[Vec<Value<'_>>]) -> Result<()> {
        let outcome = self.run_later(sql, rows);
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
        let commands = self.session.take_ahead(sql)?;
        let values: Vec<Bound<'_>> = params.iter().map(|p| Bound(p.value())).collect();
        let client = self.session.client()?;
        let wanted = statement.params().len().min(values.len());
        let asked = client.query_raw(&statement, &values[..wanted]);
        let rows = self.session.wait(after(&client, &commands, asked))?;
        self.session.runtime.block_on(async {
            pin_mut!(rows);
            while let Some(row) = rows.try_next().await.map_err(translate)? {
                each(&PostgresRow {
                    row: &row,
                    decoded: OnceCell::new(),
                })?;
            }
            Ok(())
        })
    }

    fn run_execute(&mut self, sql: &str, params: &[&dyn Param]) -> Result<u64> {
        let statement = self.statement(sql)?;
        let commands = self.session.take_ahead(sql)?;
        let values: Vec<Bound<'_>> = params.iter().map(|p| Bound(p.value())).collect();
        let client = self.session.client()?;
        let wanted = statement.params().len().min(values.len());
        let execution = client.execute_raw(&statement, &values[..wanted]);
        self.session.wait(after(&client, &commands, execution))
    }

    fn run_later(&mut self, sql: &str, rows: &[Vec<Value<'_>>]) -> Result<()> {
        let statement = self.statement(sql)?;
        let waits = !self.session.ahead.is_empty();
        if waits || rows.len() > LATER_ROWS_MAX || self.session.later.len() > LATER_MAX {
            return self.run_execute_many(sql, rows).map(drop);
        }
        let client = self.session.client()?;
        for row in rows {
            let params = statement.params().iter().zip(row);
            let params = params.map(|(ty, value)| Encoded::of(*value, ty));
            let params = params.collect::<Result<Vec<_>>>()?;
            let (client, statement) = (Arc::clone(&client), statement.clone());
            let execution = async move { client.execute_raw(&statement, params).await };
            let mut execution: Later = Box::pin(execution);
            // Which sends it.
            let sent = self
                .session
                .runtime
                .block_on(async { futures::poll!(execution.as_mut()) });
            match sent {
                Poll::Ready(outcome) => drop(outcome.map_err(translate)?),
                Poll::Pending => self.session.later.push(execution),
            }
        }
        Ok(())
    }

    fn run_execute_many(&mut self, sql: &str, rows: &[Vec<Value<'_>>]) -> Result<u64> {
        let statement = self.statement(sql)?;
        let commands = self.session.take_ahead(sql)?;
        match commands.is_empty() {
            true => self.session.settle()?,
            false => self.session.batch(&commands)?,
        }
        let insert = match rows.len() >= ROWS_IN_LISTS_MIN {
            true => Insert::parse(sql),
            false => None,
        };
        match insert {
            Some(insert) if insert.collides_never() && rows.len() >= ROWS_COPIED_MIN => {
                let name = insert.copy();
                let copy = match self.session.statements.get(&*name) {
                    Some(copy) => copy.clone(),
                    None => self.prepare_as(&name, &name)?,
                };
                self.copy_in(&copy, statement.params(), rows)
            }
            Some(insert) if insert.takes_together(rows) => {
                let name = insert.with_lists(statement.params());
                let from_lists = match self.session.statements.get(&*name) {
                    Some(from_lists) => from_lists.clone(),
                    None => self.prepare_as(&name, &name)?,
                };
                let width = statement.params().len();
                let lists = rows
                    .chunks(ROWS_AT_ONCE)
                    .map(|rows| (0..width).map(|n| column(rows, n)).collect());
                self.pipeline::<Vec<Bound<'_>>>(&from_lists, lists, LISTS_MAX)
            }
            _ => {
                let rows = rows
                    .iter()
                    .map(|row| row.iter().copied().map(Bound).collect());
                self.pipeline::<Bound<'_>>(&statement, rows, PIPELINE_MAX)
            }
        }
    }

    fn pipeline<P: ToSql>(
        &self,
        statement: &Statement,
        rows: impl Iterator<Item = Vec<P>>,
        at_once: usize,
    ) -> Result<u64> {
        let client = self.session.client()?;
        let pipeline = futures::stream::iter(rows)
            .map(|row| client.execute_raw(statement, row))
            .buffered(at_once)
            .try_fold(0, |sum, changed| async move { Ok(sum + changed) });
        self.session.runtime.block_on(pipeline).map_err(translate)
    }

    fn copy_in(&self, copy: &Statement, types: &[Type], rows: &[Vec<Value<'_>>]) -> Result<u64> {
        let client = self.session.client()?;
        self.session.runtime.block_on(async {
            let sink = client.copy_in::<_, Bytes>(copy).await.map_err(translate)?;
            pin_mut!(sink);
            let mut piece = BytesMut::with_capacity(2 * COPY_BYTES);
            piece.put_slice(COPY_HEADER);
            for row in rows {
                copy_row(row, types, &mut piece).map_err(Error::Engine)?;
                if piece.len() >= COPY_BYTES {
                    let full = piece.split().freeze();
                    sink.send(full).await.map_err(translate)?;
                    piece.reserve(2 * COPY_BYTES);
                }
            }
            piece.put_i16(-1);
            sink.send(piece.freeze()).await.map_err(translate)?;
            sink.finish().await.map_err(translate)
        })
    }
}

/// A signature, no flags, no extension: <https://www.postgresql.org/docs/current/sql-copy.html>
const COPY_HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";

/// One row in the binary format of COPY.
fn copy_row(
    row: &[Value<'_>],
    types: &[Type],
    out: &mut BytesMut,
) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
    out.put_i16(i16::try_from(types.len())?);
    for (value, ty) in row.iter().zip(types) {
        let at = out.len();
        out.put_i32(-1);
        if let IsNull::No = Bound(*value).to_sql(ty, out)? {
            let length = i32::try_from(out.len() - at - 4)?;
            out[at..at + 4].copy_from_slice(&length.to_be_bytes());
        }
    }
    Ok(())
}

/// An INSERT of one row, whose parameters are `$1, $2, …` in this order.
struct Insert<'s> {
    /// All before `VALUES`.
    head: &'s str,
    width: usize,
    /// All after the row.
    tail: &'s str,
}

impl<'s> Insert<'s> {
    fn parse(sql: &'s str) -> Option<Self> {
        let (head, rest) = sql.split_once("VALUES (")?;
        let (tuple, tail) = rest.split_once(')')?;
        let ordered = (1..)
            .zip(tuple.split(','))
            .all(|(n, part)| part.trim() == format!("${n}"));
        let plain = head.trim_start().starts_with("INSERT INTO ") && head.contains('(');
        (plain && ordered && !tail.contains('$')).then_some(Self {
            head,
            width: tuple.split(',').count(),
            tail,
        })
    }

    fn collides_never(&self) -> bool {
        self.tail.trim().is_empty()
    }

    /// Whether one statement may take these rows: an upsert refuses to touch a row twice.
    fn takes_together(&self, rows: &[Vec<Value<'_>>]) -> bool {
        if !self.tail.contains("DO UPDATE") {
            return true;
        }
        let key = self.tail.split_once("ON CONFLICT (");
        let Some((key, _)) = key.and_then(|(_, rest)| rest.split_once(')')) else {
            return false;
        };
        let columns = self.head.split_once('(');
        let Some((columns, _)) = columns.and_then(|(_, rest)| rest.split_once(')')) else {
            return false;
        };
        let places: Option<Vec<usize>> = key
            .split(',')
            .map(|name| columns.split(',').position(|c| c.trim() == name.trim()))
            .collect();
        let Some(places) = places else {
            return false;
        };
        let mut seen = HashSet::new();
        rows.iter().all(|row| {
            let key = places.iter().map(|place| key_part(row[*place]));
            key.collect::<Option<Vec<_>>>()
                .is_some_and(|key| seen.insert(key))
        })
    }

    /// The same for a list of each column.
    fn with_lists(&self, types: &[Type]) -> String {
        let lists: Vec<String> = (1..=self.width)
            .zip(types)
            .map(|(n, ty)| format!("CAST(${n} AS {}[])", ty.name()))
            .collect();
        format!(
            "{}SELECT * FROM unnest({}) AS rows{}",
            self.head,
            lists.join(", "),
            self.tail
        )
    }

    fn copy(&self) -> String {
        let table = self.head.trim_start().trim_start_matches("INSERT INTO");
        format!("COPY{table}FROM STDIN (FORMAT binary)")
    }
}

fn column<'v>(rows: &[Vec<Value<'v>>], n: usize) -> Vec<Bound<'v>> {
    rows.iter().map(|row| Bound(row[n])).collect()
}

/// A part of a key as something to compare.
fn key_part(value: Value<'_>) -> Option<(i64, &[u8])> {
    match value {
        Value::Int(n) => Some((n, &[])),
        Value::Text(text) => Some((0, text.as_bytes())),
        Value::Blob(bytes) => Some((0, bytes)),
        Value::Null | Value::Ints(_) | Value::Texts(_) => None,
    }
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

/// A parameter as it goes over the wire.
#[derive(Debug)]
struct Encoded(Option<Bytes>);

impl Encoded {
    fn of(value: Value<'_>, ty: &Type) -> Result<Self> {
        let mut bytes = BytesMut::new();
        match Bound(value).to_sql(ty, &mut bytes) {
            Ok(IsNull::Yes) => Ok(Self(None)),
            Ok(IsNull::No) => Ok(Self(Some(bytes.freeze()))),
            Err(error) => Err(Error::Engine(error)),
        }
    }
}

impl ToSql for Encoded {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> SqlResult {
        let Some(bytes) = &self.0 else {
            return Ok(IsNull::Yes);
        };
        out.put_slice(bytes);
        Ok(IsNull::No)
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    to_sql_checked!();
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
    // One after the other: a search for one character goes through many bytes at a time.
    if !text.contains('\0') && !text.contains(ESCAPE) {
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
    /// The texts that had to be decoded, by column.
    decoded: OnceCell<Box<[OnceCell<String>]>>,
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
                let decoded = self
                    .decoded
                    .get_or_init(|| (0..self.row.len()).map(|_| OnceCell::new()).collect());
                decoded[column].get_or_init(|| decode_nul(text))
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
    fn inserts_of_one_row_take_lists() {
        let tail = " ON CONFLICT (a) DO NOTHING";
        let sql = format!("INSERT INTO t (a, b) VALUES ($1, $2){tail}");
        let insert = Insert::parse(&sql).unwrap();
        let lists = "CAST($1 AS int8[]), CAST($2 AS text[])";
        assert_eq!(
            insert.with_lists(&[Type::INT8, Type::TEXT]),
            format!("INSERT INTO t (a, b) SELECT * FROM unnest({lists}) AS rows{tail}")
        );
        assert!(!insert.collides_never());
        let plain = Insert::parse("INSERT INTO t\n    (a, b) VALUES ($1, $2)").unwrap();
        assert!(plain.collides_never());
        assert_eq!(
            plain.copy(),
            "COPY t\n    (a, b) FROM STDIN (FORMAT binary)"
        );
        for other in [
            "UPDATE t SET a = $1",
            "INSERT INTO t (a, b) VALUES ($2, $1)",
            "INSERT INTO t (a, b) VALUES ($1, NULL)",
            "INSERT INTO t (a) VALUES (LOWER($1))",
            "INSERT INTO t (a) VALUES ($1) ON CONFLICT (a) DO UPDATE SET b = $1",
            "INSERT INTO t (a) SELECT b FROM u WHERE c = $1",
        ] {
            assert!(Insert::parse(other).is_none(), "{other}");
        }
    }

    #[test]
    fn an_upsert_takes_a_row_once() {
        let sql = "INSERT INTO t (a, b, c) VALUES ($1, $2, $3)
            ON CONFLICT (c, a) DO UPDATE SET b = excluded.b";
        let upsert = Insert::parse(sql).unwrap();
        let row = |a: i64, b: i64, c: &'static str| vec![a.into(), b.into(), Value::Text(c)];
        assert!(upsert.takes_together(&[row(1, 5, "x"), row(2, 5, "x"), row(1, 5, "y")]));
        assert!(!upsert.takes_together(&[row(1, 5, "x"), row(2, 5, "x"), row(1, 6, "x")]));
    }

    #[test]
    fn lists_become_arrays() {
        let sql =
            "SELECT a FROM t WHERE a IN (SELECT value FROM rarray($1)) AND b NOT IN (SELECT value
            FROM u) AND c NOT IN (SELECT value FROM rarray_text($12)) LIMIT $2";
        let here = "SELECT a FROM t WHERE a = ANY($1) AND b NOT IN (SELECT value
            FROM u) AND c <> ALL($12) LIMIT $2";
        assert_eq!(dialect(sql), here);
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
