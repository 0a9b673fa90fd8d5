//! Numbers that only need to be different, taken in blocks outside of any other transaction.

use std::collections::BTreeMap;
use std::ops::Range;

use tokio::sync::Mutex;

use crate::Store;
use crate::driver::{Conn, Result};

/// Numbers taken from the database at a time. What a crash leaves unused is lost; there are 2^63.
const BLOCK: i64 = 1000;

/// What is numbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sequence {
    Events,
    Rooms,
    Jobs,
    StateNodes,
    StagedPdus,
    /// For whoever needs a number that is different from all others of this store.
    Other,
}

impl Sequence {
    /// Those taken in blocks; a room's number is taken with its row.
    const IN_BLOCKS: [Self; 5] = [
        Self::Events,
        Self::Jobs,
        Self::StateNodes,
        Self::StagedPdus,
        Self::Other,
    ];

    fn as_str(self) -> &'static str {
        match self {
            Self::Events => "events",
            Self::Rooms => "rooms",
            Self::Jobs => "jobs",
            Self::StateNodes => "state_nodes",
            Self::StagedPdus => "staged_pdus",
            Self::Other => "other",
        }
    }
}

#[derive(Default)]
pub(crate) struct Sequences {
    free: Mutex<BTreeMap<Sequence, Range<i64>>>,
}

const RESERVE: &str = "INSERT INTO sequences (name, last) VALUES ($1, $2)
    ON CONFLICT (name) DO UPDATE SET last = sequences.last + excluded.last
    RETURNING last";

pub(crate) fn reserve(c: &mut dyn Conn, sequence: Sequence, count: i64) -> Result<Range<i64>> {
    let last = c.query_one(RESERVE, &[&sequence.as_str(), &count], |row| row.int(0))?;
    Ok(last - count + 1..last + 1)
}

impl Store {
    /// `count` numbers in a row that nobody else gets, from 1 up.
    pub async fn numbers(&self, sequence: Sequence, count: usize) -> Result<Range<i64>> {
        let count = i64::try_from(count).expect("a count of things in memory");
        let mut free = self.inner.sequences.free.lock().await;
        let block = free.entry(sequence).or_insert(0..0);
        if block.end - block.start < count {
            let wanted = count.max(BLOCK);
            *block = self.write(move |c| reserve(c, sequence, wanted)).await?;
        }
        let taken = block.start..block.start + count;
        block.start = taken.end;
        Ok(taken)
    }

    /// Takes a first block of each sequence, so that nobody waits for five commits where one will do.
    pub(crate) async fn reserve_numbers(&self) -> Result<()> {
        let blocks = self.write(|c| {
            let block = |sequence| Ok((sequence, reserve(c, sequence, BLOCK)?));
            Sequence::IN_BLOCKS.into_iter().map(block).collect()
        });
        let blocks: BTreeMap<_, _> = blocks.await?;
        *self.inner.sequences.free.lock().await = blocks;
        Ok(())
    }

    /// One number that nobody else gets.
    pub async fn number(&self, sequence: Sequence) -> Result<i64> {
        Ok(self.numbers(sequence, 1).await?.start)
    }
}
