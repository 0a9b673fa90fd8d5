//! The seam between SQL and the engines: what a statement takes, gives, and how it fails.
//!
//! One SQL text serves both engines. Rules that keep it so: parameters are `$1`, `$2`, …; lists go in with
//! `IN (SELECT value FROM rarray($1))` for numbers and `rarray_text($1)` for texts; upserts are `INSERT …
//! ON CONFLICT (…) DO …`; `RETURNING` is fine; a parameter whose type nothing fixes needs `CAST($1 AS
//! TEXT)`; so does `SUM` (`CAST(SUM(x) AS BIGINT)`). Flags are BIGINT 0 or 1.

use std::sync::Arc;

use crate::Executor;
use crate::cache::{Cached, Caches};
use protocol::id::{EventId, RoomAlias, RoomId, ServerName, UserId};
use protocol::nid::{EventNid, KeyNid, RoomNid};

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The engine failed; nobody can do anything but report it.
    #[error("database: {0}")]
    Engine(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The transaction collided with another one. The store runs the closure again by itself.
    #[error("database: transactions collided: {0}")]
    Conflict(String),
    /// A unique or other constraint would be broken.
    #[error("database: constraint: {0}")]
    Constraint(String),
    /// What is in the database is not what this program writes.
    #[error("database: unexpected content: {0}")]
    Corrupt(String),
    /// The guard of a write set does not hold: load again, decide again.
    #[error("the room changed meanwhile")]
    Stale,
    /// The closure wants its transaction undone.
    #[error("{0}")]
    Refused(String),
    #[error("a database function panicked: {0}")]
    Panicked(String),
    #[error("the store is closed")]
    Closed,
}

impl Error {
    pub fn corrupt(what: impl Into<String>) -> Self {
        Self::Corrupt(what.into())
    }

    pub fn engine(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Engine(error.into())
    }
}

/// A value on its way into a statement.
#[derive(Clone, Copy)]
pub enum Value<'a> {
    Null,
    Int(i64),
    Text(&'a str),
    Blob(&'a [u8]),
    /// For `rarray`.
    Ints(&'a [i64]),
    /// For `rarray_text`.
    Texts(&'a dyn TextList),
}

/// A list of texts of whatever type holds them.
pub trait TextList: Sync {
    fn count(&self) -> usize;
    fn text(&self, index: usize) -> &str;
}

impl<T: AsRef<str> + Sync> TextList for [T] {
    fn count(&self) -> usize {
        self.len()
    }

    fn text(&self, index: usize) -> &str {
        self[index].as_ref()
    }
}

impl<T: AsRef<str> + Sync> TextList for Vec<T> {
    fn count(&self) -> usize {
        self.len()
    }

    fn text(&self, index: usize) -> &str {
        self[index].as_ref()
    }
}

/// What can be a parameter: numbers, texts, bytes, identifiers, lists of numbers, and options of these.
/// Lists of texts are wrapped in [`texts`].
pub trait Param {
    fn value(&self) -> Value<'_>;
}

/// A list of texts or identifiers as a parameter for `rarray_text`.
pub struct Texts<'a>(&'a dyn TextList);

pub fn texts(list: &dyn TextList) -> Texts<'_> {
    Texts(list)
}

impl Param for Texts<'_> {
    fn value(&self) -> Value<'_> {
        Value::Texts(self.0)
    }
}

impl Param for Value<'_> {
    fn value(&self) -> Value<'_> {
        *self
    }
}

impl<T: Param + ?Sized> Param for &T {
    fn value(&self) -> Value<'_> {
        (**self).value()
    }
}

impl<T: Param> Param for Option<T> {
    fn value(&self) -> Value<'_> {
        self.as_ref().map_or(Value::Null, Param::value)
    }
}

impl Param for str {
    fn value(&self) -> Value<'_> {
        Value::Text(self)
    }
}

impl Param for [u8] {
    fn value(&self) -> Value<'_> {
        Value::Blob(self)
    }
}

impl<const N: usize> Param for [u8; N] {
    fn value(&self) -> Value<'_> {
        Value::Blob(self)
    }
}

impl Param for [i64] {
    fn value(&self) -> Value<'_> {
        Value::Ints(self)
    }
}

impl Param for Vec<i64> {
    fn value(&self) -> Value<'_> {
        Value::Ints(self)
    }
}

impl Param for Vec<u8> {
    fn value(&self) -> Value<'_> {
        Value::Blob(self)
    }
}

macro_rules! int_param {
    ($($ty:ty: $get:expr;)*) => {$(
        impl Param for $ty {
            fn value(&self) -> Value<'_> {
                let get: fn(&$ty) -> i64 = $get;
                Value::Int(get(self))
            }
        }

        impl From<$ty> for Value<'_> {
            fn from(number: $ty) -> Self {
                let get: fn(&$ty) -> i64 = $get;
                Value::Int(get(&number))
            }
        }
    )*};
}

int_param! {
    bool: |flag| i64::from(*flag);
    i64: |n| *n;
    i32: |n| i64::from(*n);
    u32: |n| i64::from(*n);
    u16: |n| i64::from(*n);
    u8: |n| i64::from(*n);
    RoomNid: |n| n.0;
    EventNid: |n| n.0;
    KeyNid: |n| i64::from(n.0);
}

/// An identifier that can be read from a text column with `Row::id`.
pub trait Id: Sized {
    fn parse_id(text: &str) -> Option<Self>;
}

macro_rules! text_param {
    ($($ty:ty),*) => {$(
        impl Param for $ty {
            fn value(&self) -> Value<'_> {
                Value::Text(self.as_ref())
            }
        }
    )*};
}

text_param!(
    String,
    Arc<str>,
    Box<str>,
    EventId,
    RoomAlias,
    RoomId,
    ServerName,
    UserId
);

macro_rules! id_column {
    ($($ty:ident),*) => {$(
        impl Id for $ty {
            fn parse_id(text: &str) -> Option<Self> {
                Self::parse(text).ok()
            }
        }
    )*};
}

id_column!(EventId, RoomAlias, RoomId, ServerName, UserId);

/// One row of parameters for [`Conn::execute_many`]: numbers by value, all else by reference.
#[macro_export]
macro_rules! row {
    ($($value:expr),* $(,)?) => {
        vec![$($crate::driver::Value::from($value)),*]
    };
}

impl<'a, T: Param + ?Sized> From<&'a T> for Value<'a> {
    fn from(param: &'a T) -> Self {
        param.value()
    }
}

impl<'a, T: Into<Value<'a>>> From<Option<T>> for Value<'a> {
    fn from(option: Option<T>) -> Self {
        option.map_or(Value::Null, Into::into)
    }
}

/// One row of a result. Columns count from 0. Reading a column as what it is not is an error.
pub trait Row {
    fn opt_int(&self, column: usize) -> Result<Option<i64>>;
    fn opt_text(&self, column: usize) -> Result<Option<&str>>;
    fn opt_blob(&self, column: usize) -> Result<Option<&[u8]>>;
}

impl dyn Row + '_ {
    pub fn int(&self, column: usize) -> Result<i64> {
        self.opt_int(column)?.ok_or_else(|| unexpected_null(column))
    }

    pub fn flag(&self, column: usize) -> Result<bool> {
        Ok(self.int(column)? != 0)
    }

    pub fn text(&self, column: usize) -> Result<&str> {
        self.opt_text(column)?
            .ok_or_else(|| unexpected_null(column))
    }

    pub fn blob(&self, column: usize) -> Result<&[u8]> {
        self.opt_blob(column)?
            .ok_or_else(|| unexpected_null(column))
    }

    pub fn string(&self, column: usize) -> Result<String> {
        Ok(self.text(column)?.to_owned())
    }

    pub fn opt_string(&self, column: usize) -> Result<Option<String>> {
        Ok(self.opt_text(column)?.map(str::to_owned))
    }

    pub fn shared(&self, column: usize) -> Result<Arc<str>> {
        Ok(self.text(column)?.into())
    }

    pub fn event_nid(&self, column: usize) -> Result<EventNid> {
        self.int(column).map(EventNid)
    }

    pub fn room_nid(&self, column: usize) -> Result<RoomNid> {
        self.int(column).map(RoomNid)
    }

    pub fn key_nid(&self, column: usize) -> Result<KeyNid> {
        let number = self.int(column)?;
        u32::try_from(number)
            .map(KeyNid)
            .map_err(|_| Error::Corrupt(format!("key number {number}")))
    }

    pub fn opt_key_nid(&self, column: usize) -> Result<Option<KeyNid>> {
        match self.opt_int(column)? {
            Some(_) => self.key_nid(column).map(Some),
            None => Ok(None),
        }
    }

    pub fn id<T: Id>(&self, column: usize) -> Result<T> {
        parse_id(self.text(column)?)
    }

    pub fn opt_id<T: Id>(&self, column: usize) -> Result<Option<T>> {
        self.opt_text(column)?.map(parse_id).transpose()
    }
}

fn parse_id<T: Id>(text: &str) -> Result<T> {
    T::parse_id(text).ok_or_else(|| Error::Corrupt(format!("identifier {text:?}")))
}

fn unexpected_null(column: usize) -> Error {
    Error::Corrupt(format!("null in column {column}"))
}

/// One connection inside one transaction. Functions on it are synchronous and must not wait for anything
/// else; after an error the transaction can only be given up (PostgreSQL takes nothing more in it).
pub trait Conn {
    /// Runs one statement and hands over its rows, one after another.
    fn query(
        &mut self,
        sql: &str,
        params: &[&dyn Param],
        each: &mut dyn FnMut(&dyn Row) -> Result<()>,
    ) -> Result<()>;

    /// Runs one statement; the number of rows it changed.
    fn execute(&mut self, sql: &str, params: &[&dyn Param]) -> Result<u64>;

    /// Runs one statement once for each row of parameters, with as few round trips as the engine can.
    fn execute_many(&mut self, sql: &str, rows: &[Vec<Value<'_>>]) -> Result<u64>;

    /// The same, for whoever wants no number. The engine may wait for the outcome together with that of the next
    /// statement, or of the commit: what goes wrong may come up only there.
    fn later(&mut self, sql: &str, rows: &[Vec<Value<'_>>]) -> Result<()>;

    /// Has the engine look at a statement without running it.
    fn prepare(&mut self, sql: &str) -> Result<()>;

    /// What is kept in memory.
    fn cached(&self) -> Cached;
}

impl dyn Conn + '_ {
    /// Every row.
    pub fn query_all<T>(
        &mut self,
        sql: &str,
        params: &[&dyn Param],
        mut read: impl FnMut(&dyn Row) -> Result<T>,
    ) -> Result<Vec<T>> {
        let mut rows = Vec::new();
        self.query(sql, params, &mut |row| {
            rows.push(read(row)?);
            Ok(())
        })?;
        Ok(rows)
    }

    /// The first row, if there is one.
    pub fn query_opt<T>(
        &mut self,
        sql: &str,
        params: &[&dyn Param],
        mut read: impl FnMut(&dyn Row) -> Result<T>,
    ) -> Result<Option<T>> {
        let mut first = None;
        self.query(sql, params, &mut |row| {
            if first.is_none() {
                first = Some(read(row)?);
            }
            Ok(())
        })?;
        Ok(first)
    }

    /// The first row, which must be there.
    pub fn query_one<T>(
        &mut self,
        sql: &str,
        params: &[&dyn Param],
        read: impl FnMut(&dyn Row) -> Result<T>,
    ) -> Result<T> {
        self.query_opt(sql, params, read)?
            .ok_or_else(|| Error::Corrupt(format!("no row for: {sql}")))
    }

    /// The first column of the first row, a number.
    pub fn query_int(&mut self, sql: &str, params: &[&dyn Param]) -> Result<Option<i64>> {
        Ok(self.query_opt(sql, params, |row| row.opt_int(0))?.flatten())
    }

    /// Whether there is a row.
    pub fn exists(&mut self, sql: &str, params: &[&dyn Param]) -> Result<bool> {
        Ok(self.query_opt(sql, params, |_| Ok(()))?.is_some())
    }
}

/// How the store hands work to an engine's threads: run in a transaction, reply after it ended.
pub(crate) trait Job: Send {
    /// Runs the closure once. The engine may run it again after a rollback.
    fn run(&mut self, conn: &mut dyn Conn) -> Result<()>;
    /// Whether it only reads.
    fn reads(&self) -> bool;
    /// Called once, after the commit (`Ok`) or the last rollback (`Err`).
    fn finish(self: Box<Self>, outcome: Result<()>);
}

/// The threads and connections of one engine. Dropping it ends them.
pub(crate) trait Engine: Send + Sync {
    fn submit_read(&self, job: Box<dyn Job>);
    fn submit_write(&self, job: Box<dyn Job>);

    /// What a first question would have to prepare can be prepared now.
    fn schema_is_there(&self) {}

    /// The same database for another life of its process; `None` where the engine's threads go on.
    fn after_crash(&self, _caches: &Arc<Caches>, _executor: Executor) -> Option<Box<dyn Engine>> {
        None
    }
}

/// Runs a job's closure so that a panic is an error like others.
pub(crate) fn run_caught(job: &mut dyn Job, conn: &mut dyn Conn) -> Result<()> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| job.run(conn))).unwrap_or_else(
        |panic| {
            let text = panic
                .downcast_ref::<&str>()
                .map(|text| (*text).to_owned())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "no message".to_owned());
            Err(Error::Panicked(text))
        },
    )
}
