//! The memory: one set of SQL, two engines.
//!
//! A [`Store`] gives snapshots to read and transactions to write. SQL lives in plain synchronous functions
//! over `&mut dyn Conn`, one file for each topic; [`Store::read`] and [`Store::write`] run them on the
//! engine's threads (docs/decisions/0001-sync-sql.md). This crate decides nothing about rooms and knows
//! neither HTTP nor other servers; only `sqlite.rs` and `postgres.rs` name a database engine.

pub mod account_data;
pub mod accounts;
pub mod apply;
pub mod appservices;
mod auth_above;
pub mod backup;
pub mod blocked;
mod cache;
pub mod devices;
pub mod directory;
pub mod driver;
pub mod e2ee;
pub mod event_index;
pub mod events;
pub mod federation_reads;
pub mod leases;
pub mod load;
pub mod media;
pub mod migrations;
mod names;
pub mod out_of_band;
mod postgres;
pub mod presence;
pub mod profiles;
pub mod purge;
pub mod push;
pub mod queues;
pub mod receipts;
pub mod relations;
pub mod reports;
pub mod rooms;
pub mod search;
mod sequence;
mod sqlite;
pub mod state_log;
pub mod states;
mod statistics;
pub mod streams;
pub mod sync_reads;
pub mod timeline;
pub mod to_device;
pub mod user_directory;

use std::sync::Arc;

use protocol::id::ServerName;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

pub use crate::cache::{Body, CacheBytes, Cached, Caches};
pub use crate::driver::{Conn, Error, Param, Result, Row, Value, texts};
use crate::driver::{Engine, Job};
pub use crate::sequence::Sequence;

/// Closures waiting or running at a time; beyond that, callers wait. Bounds what a burst can pile up.
const QUEUE_MAX: usize = 4096;

/// What a store wants run: one closure in its transaction, and the reply.
pub type Work = Box<dyn FnOnce() + Send>;

/// Runs the closures of a store in place of its threads, when and where it likes. For simulations, into which
/// threads would bring chance; work that is never run is what a crash leaves undone.
#[derive(Clone)]
pub struct Executor(Arc<dyn Fn(Work) + Send + Sync>);

impl Executor {
    pub fn new(run: impl Fn(Work) + Send + Sync + 'static) -> Self {
        Self(Arc::new(run))
    }
}

impl std::fmt::Debug for Executor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Executor")
    }
}

#[derive(Clone, Debug)]
pub struct Options {
    /// Threads that read.
    pub readers: usize,
    /// Connections that write. SQLite has always one.
    pub writers: usize,
    /// Who runs closures on the one connection of a SQLite database; `None`: threads of the store's own.
    pub executor: Option<Executor>,
    /// Our own name: whose users are local, and who is never a destination.
    pub server_name: ServerName,
    pub cache: CacheBytes,
    /// An event for more servers than this is not queued for each of them by the commit, but spread after it, and
    /// no more of them are sent something at once.
    pub fan_out_direct_max: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            readers: 4,
            writers: 4,
            executor: None,
            server_name: ServerName::parse("localhost").expect("a valid name"),
            cache: CacheBytes::default(),
            fan_out_direct_max: 64,
        }
    }
}

/// The database. Clones share it; the last one to go ends its threads.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    engine: Box<dyn Engine>,
    queue: Arc<Semaphore>,
    sequences: sequence::Sequences,
    caches: Arc<Caches>,
    names: names::Names,
    server_name: ServerName,
    fan_out_direct_max: usize,
}

impl Store {
    /// Opens (and brings up to date) `sqlite:PATH`, `sqlite::memory:` or `postgres://…`.
    pub async fn open(url: &str, options: Options) -> Result<Self> {
        let owned = url.to_owned();
        let caches = Arc::new(Caches::new(&options.cache));
        let kept = Arc::clone(&caches);
        let server_name = options.server_name.clone();
        let fan_out_direct_max = options.fan_out_direct_max;
        let runs_elsewhere = options.executor.is_some();
        let opening = move || open_engine(&owned, &options, &caches);
        let (engine, dialect) = match runs_elsewhere {
            true => opening()?,
            false => tokio::task::spawn_blocking(opening)
                .await
                .map_err(Error::engine)??,
        };
        let store = Self::around(engine, kept, server_name, fan_out_direct_max);
        let ready = move |c: &mut dyn Conn| {
            migrations::run(c, dialect.schema)?;
            (dialect.statistics)(c)
        };
        store.write(ready).await?;
        store.inner.engine.schema_is_there();
        store.reserve_numbers().await?;
        Ok(store)
    }

    fn around(
        engine: Box<dyn Engine>,
        caches: Arc<Caches>,
        server_name: ServerName,
        fan_out_direct_max: usize,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                engine,
                queue: Arc::new(Semaphore::new(QUEUE_MAX)),
                sequences: sequence::Sequences::default(),
                caches,
                names: names::Names::default(),
                server_name,
                fan_out_direct_max,
            }),
        }
    }

    /// The database of a store with an executor, as a process finds it that starts after a crash: what was
    /// committed is there, and nothing that was in memory.
    pub fn after_crash(&self, executor: Executor) -> Result<Self> {
        let caches = Arc::new(Caches::new(&CacheBytes::default()));
        let engine = self.inner.engine.after_crash(&caches, executor);
        let engine = engine.ok_or_else(|| {
            Error::Refused("only a store with an executor can be opened again".to_owned())
        })?;
        let name = self.inner.server_name.clone();
        Ok(Self::around(
            engine,
            caches,
            name,
            self.inner.fan_out_direct_max,
        ))
    }

    /// Our own name.
    pub fn server_name(&self) -> &ServerName {
        &self.inner.server_name
    }

    /// See [`Options::fan_out_direct_max`].
    pub fn fan_out_direct_max(&self) -> usize {
        self.inner.fan_out_direct_max
    }

    /// Runs `f` on one snapshot. It may run again when a connection is lost.
    pub async fn read<T, F>(&self, f: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnMut(&mut dyn Conn) -> Result<T> + Send + 'static,
    {
        let (job, answer) = self.job(f, true).await?;
        self.inner.engine.submit_read(job);
        answer.await.map_err(|_| Error::Closed)?
    }

    /// Runs `f` in one transaction: committed, durably, when it answers `Ok`, undone when it answers `Err`.
    /// It may run several times when transactions collide; only the last run counts.
    pub async fn write<T, F>(&self, f: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnMut(&mut dyn Conn) -> Result<T> + Send + 'static,
    {
        let (job, answer) = self.job(f, false).await?;
        self.inner.engine.submit_write(job);
        answer.await.map_err(|_| Error::Closed)?
    }

    async fn job<T, F>(
        &self,
        f: F,
        reads: bool,
    ) -> Result<(Box<dyn Job>, oneshot::Receiver<Result<T>>)>
    where
        T: Send + 'static,
        F: FnMut(&mut dyn Conn) -> Result<T> + Send + 'static,
    {
        let permit = Arc::clone(&self.inner.queue)
            .acquire_owned()
            .await
            .map_err(|_| Error::Closed)?;
        let (reply, answer) = oneshot::channel();
        let job = Closure {
            f,
            value: None,
            reads,
            reply,
            _permit: permit,
        };
        Ok((Box::new(job), answer))
    }
}

/// What an engine has of its own.
#[derive(Clone, Copy)]
struct Dialect {
    /// The schema files' SQL as it wants them.
    schema: fn(&str) -> String,
    /// What its planner has to be told.
    statistics: fn(&mut dyn Conn) -> Result<()>,
}

const SQLITE: Dialect = Dialect {
    schema: sqlite::schema_dialect,
    statistics: statistics::write,
};
const POSTGRES: Dialect = Dialect {
    schema: str::to_owned,
    statistics: |_| Ok(()),
};

fn open_engine(
    url: &str,
    options: &Options,
    caches: &Arc<Caches>,
) -> Result<(Box<dyn Engine>, Dialect)> {
    if let Some(path) = url.strip_prefix("sqlite:") {
        let path = path.strip_prefix("//").unwrap_or(path);
        if let Some(executor) = options.executor.clone() {
            let engine = sqlite::Given::open(path, caches, executor)?;
            return Ok((Box::new(engine), SQLITE));
        }
        let engine = sqlite::Sqlite::open(path, options.readers, caches)?;
        return Ok((Box::new(engine), SQLITE));
    }
    if url.starts_with("postgres://") || url.starts_with("postgresql://") {
        let engine = postgres::Postgres::open(url, options.readers, options.writers, caches)?;
        return Ok((Box::new(engine), POSTGRES));
    }
    Err(Error::Refused(
        "a database URL starts with sqlite: or postgres://".to_owned(),
    ))
}

struct Closure<T, F> {
    f: F,
    value: Option<T>,
    reads: bool,
    reply: oneshot::Sender<Result<T>>,
    _permit: OwnedSemaphorePermit,
}

impl<T, F> Job for Closure<T, F>
where
    T: Send,
    F: FnMut(&mut dyn Conn) -> Result<T> + Send,
{
    fn run(&mut self, conn: &mut dyn Conn) -> Result<()> {
        self.value = None;
        self.value = Some((self.f)(conn)?);
        Ok(())
    }

    fn reads(&self) -> bool {
        self.reads
    }

    fn finish(self: Box<Self>, outcome: Result<()>) {
        let Self {
            f, value, reply, ..
        } = *self;
        // What the closure holds is free when the answer arrives.
        drop(f);
        // Whoever asked may have gone away.
        let _gone = reply.send(outcome.and_then(|()| value.ok_or(Error::Closed)));
    }
}
