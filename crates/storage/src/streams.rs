//! Stream positions: one counter for each kind of change, given out inside the writing transaction.
//!
//! The counter's row stays locked until the commit, so positions of one kind become visible in order: who
//! has seen position n will never be surprised by a smaller one.

use crate::driver::{Conn, Result};

/// What a stream carries. A sync token is a vector of positions in these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stream {
    /// Timeline events.
    Events,
    /// Events fetched from history; counts up here, stored as negative positions.
    Backfilled,
    /// Memberships in rooms we are not in: invites, knocks, their ends.
    Memberships,
    /// Rooms that stopped being partial.
    BecameFull,
    Receipts,
    AccountData,
    ToDevice,
    /// Whose devices changed, ours and others'.
    DeviceLists,
    Presence,
}

impl Stream {
    pub const ALL: [Self; 9] = [
        Self::Events,
        Self::Backfilled,
        Self::Memberships,
        Self::BecameFull,
        Self::Receipts,
        Self::AccountData,
        Self::ToDevice,
        Self::DeviceLists,
        Self::Presence,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Events => "events",
            Self::Backfilled => "backfilled",
            Self::Memberships => "memberships",
            Self::BecameFull => "became_full",
            Self::Receipts => "receipts",
            Self::AccountData => "account_data",
            Self::ToDevice => "to_device",
            Self::DeviceLists => "device_lists",
            Self::Presence => "presence",
        }
    }
}

const ADVANCE: &str = "INSERT INTO streams (kind, position) VALUES ($1, $2)
    ON CONFLICT (kind) DO UPDATE SET position = streams.position + excluded.position
    RETURNING position";
const POSITION: &str = "SELECT position FROM streams WHERE kind = $1";
const POSITIONS: &str = "SELECT kind, position FROM streams";

/// The next position of this stream.
pub fn next(c: &mut dyn Conn, stream: Stream) -> Result<i64> {
    advance(c, stream, 1)
}

/// The first of `count` positions in a row. With `count` 0 the one that would come next.
pub fn advance(c: &mut dyn Conn, stream: Stream, count: i64) -> Result<i64> {
    let last = c.query_one(ADVANCE, &[&stream.as_str(), &count], |row| row.int(0))?;
    Ok(last - count + 1)
}

/// Takes the stream's turn early, for a transaction that will move it after other work.
pub(crate) fn hold(c: &mut dyn Conn, stream: Stream) -> Result<()> {
    c.execute(ADVANCE, &[&stream.as_str(), &0_i64]).map(drop)
}

/// The last position given out, 0 when there was none.
pub fn position(c: &mut dyn Conn, stream: Stream) -> Result<i64> {
    Ok(c.query_int(POSITION, &[&stream.as_str()])?.unwrap_or(0))
}

/// The last position of every stream, in the order of [`Stream::ALL`].
pub fn positions(c: &mut dyn Conn) -> Result<[i64; Stream::ALL.len()]> {
    let mut found = [0; Stream::ALL.len()];
    c.query(POSITIONS, &[], &mut |row| {
        let kind = row.text(0)?;
        if let Some(place) = Stream::ALL.iter().position(|s| s.as_str() == kind) {
            found[place] = row.int(1)?;
        }
        Ok(())
    })?;
    Ok(found)
}
