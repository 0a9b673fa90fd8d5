//! The auth graph of a room, and the ids in it, as integers in a few rows: what an answer of tens of thousands
//! of ids, or an auth chain as long, is made from without reading an event.
//!
//! The log need not be complete. What is not in it, as in rooms that are older than it, is looked up in the
//! tables of events.

use std::collections::HashSet;
use std::sync::Arc;

use protocol::id::EventId;
use protocol::nid::{EventNid, RoomNid};

use crate::driver::{Conn, Error, Result};
use crate::{events, row};

/// A question about fewer events is none for which a graph is read; one that is in memory is used.
const GRAPH_FROM: usize = 500;
/// A graph finds its entries in a table over all numbers between the first and the last, if that is no more
/// than so many times as long as the list of them.
const TABLE_MAX: usize = 4;
/// What an entry takes in a row.
const ENTRY_BYTES: u64 = 50;

const INSERT: &str = "INSERT INTO state_log (room_nid, newest, events) VALUES ($1, $2, $3)";
const BYTES: &str = "SELECT CAST(SUM(LENGTH(events)) AS BIGINT) FROM state_log WHERE room_nid = $1";
const READ: &str =
    "SELECT newest, events FROM state_log WHERE room_nid = $1 AND newest > $2 ORDER BY newest";

/// A state event, its id, and its auth events as they stand in their column.
type Entry<'a> = (EventNid, &'a EventId, &'a [u8]);

// -- rows -----------------------------------------------------------------------------------------

/// Notes state events of a room that are stored for the first time.
pub(crate) fn add<'a>(
    c: &mut dyn Conn,
    room: RoomNid,
    stored: impl IntoIterator<Item = Entry<'a>>,
) -> Result<()> {
    let mut stored: Vec<Entry<'_>> = stored.into_iter().collect();
    stored.sort_unstable_by_key(|(nid, _, _)| *nid);
    let Some((newest, _, _)) = stored.last() else {
        return Ok(());
    };
    let row = encode(&stored)?;
    c.later(INSERT, &[row![room, *newest, &row]])
}

/// How many state events of the room are noted, roughly: an id takes 44 bytes, and auth events a few.
pub(crate) fn stored(c: &mut dyn Conn, room: RoomNid) -> Result<u64> {
    let bytes = c.query_int(BYTES, &[&room])?.unwrap_or(0);
    Ok(bytes.unsigned_abs() / ENTRY_BYTES)
}

/// By number: the distance from the number before (from 0 at first), the id after its length, how many auth
/// events there are, and for each the distance down to it.
fn encode(stored: &[Entry<'_>]) -> Result<Vec<u8>> {
    let mut text = Vec::with_capacity(stored.len() * 64);
    let mut before = 0;
    for (nid, id, auth) in stored {
        put(&mut text, nid.0.wrapping_sub(before).cast_unsigned());
        before = nid.0;
        put(&mut text, id.as_str().len() as u64);
        text.extend(id.as_str().as_bytes());
        let auth = events::unpack(auth)?;
        put(&mut text, auth.len() as u64);
        for named in auth {
            put(&mut text, zigzag(nid.0.wrapping_sub(named.0)));
        }
    }
    Ok(text)
}

/// Seven bits a byte, the lowest first; the highest bit says that more follow.
fn put(text: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        text.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    text.push(number as u8);
}

/// Small numbers for small distances of either sign.
fn zigzag(distance: i64) -> u64 {
    ((distance << 1) ^ (distance >> 63)).cast_unsigned()
}

fn unzigzag(number: u64) -> i64 {
    (number >> 1).cast_signed() ^ -(number & 1).cast_signed()
}

/// Reads a row's bytes from the front.
struct Reader<'a> {
    text: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn number(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = *self.text.get(self.at)?;
            self.at += 1;
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(number);
            }
        }
        None
    }

    fn length(&mut self) -> Option<usize> {
        let length = usize::try_from(self.number()?).ok()?;
        (length <= self.text.len() - self.at).then_some(length)
    }

    fn id(&mut self) -> Option<&'a str> {
        let length = self.length()?;
        let id = &self.text[self.at..self.at + length];
        self.at += length;
        std::str::from_utf8(id).ok()
    }
}

// -- the graph ------------------------------------------------------------------------------------

/// Where one event stands in the rows.
#[derive(Clone, Copy)]
struct Place {
    nid: EventNid,
    row: u32,
    /// Of its id.
    at: u32,
}

/// What is in the log of one room, in memory.
#[derive(Clone, Default)]
pub(crate) struct Graph {
    rows: Vec<Arc<[u8]>>,
    /// By number.
    places: Vec<Place>,
    /// For every number from the first one's on where it stands in `places`; empty where that would be long.
    table: Vec<u32>,
    newest: i64,
}

/// No event has this place.
const NOWHERE: u32 = u32::MAX;

impl Graph {
    /// The bytes it takes.
    pub(crate) fn weight(&self) -> u64 {
        let rows: usize = self.rows.iter().map(|row| row.len()).sum();
        (rows + self.places.len() * size_of::<Place>() + self.table.len() * 4 + 128) as u64
    }

    /// The room's log, if it is worth reading it. It may have more than this snapshot, and for a small question
    /// less.
    fn of(c: &mut dyn Conn, room: RoomNid, events: usize) -> Result<Option<Arc<Self>>> {
        let cached = c.cached();
        let kept = cached.caches.graphs.get(&room);
        if events < GRAPH_FROM {
            return Ok(kept);
        }
        let after = kept.as_ref().map_or(i64::MIN, |graph| graph.newest);
        let mut rows: Vec<(i64, Arc<[u8]>)> = Vec::new();
        c.query(READ, &[&room, &after], &mut |row| {
            rows.push((row.int(0)?, row.blob(1)?.into()));
            Ok(())
        })?;
        if rows.is_empty()
            && let Some(kept) = kept
        {
            return Ok(Some(kept));
        }
        let mut graph = kept.map_or_else(Self::default, |kept| (*kept).clone());
        for (newest, row) in rows {
            graph.push(newest, row)?;
        }
        graph.order();
        let graph = Arc::new(graph);
        if cached.fill {
            cached.caches.graphs.insert(room, Arc::clone(&graph));
        }
        Ok(Some(graph))
    }

    fn push(&mut self, newest: i64, row: Arc<[u8]>) -> Result<()> {
        let number = u32::try_from(self.rows.len()).map_err(Error::engine)?;
        let mut reader = Reader { text: &row, at: 0 };
        let mut nid: i64 = 0;
        while reader.at < row.len() {
            self.places.push(
                (|| {
                    nid = nid.wrapping_add(reader.number()?.cast_signed());
                    let place = Place {
                        nid: EventNid(nid),
                        row: number,
                        at: u32::try_from(reader.at).ok()?,
                    };
                    reader.id()?;
                    for _ in 0..reader.length()? {
                        reader.number()?;
                    }
                    Some(place)
                })()
                .ok_or_else(cut_short)?,
            );
        }
        self.rows.push(row);
        self.newest = self.newest.max(newest);
        Ok(())
    }

    fn order(&mut self) {
        if !self.places.is_sorted_by(|a, b| a.nid < b.nid) {
            self.places.sort_unstable_by_key(|place| place.nid);
            self.places.dedup_by_key(|place| place.nid);
        }
        self.table.clear();
        let (Some(first), Some(last)) = (self.places.first(), self.places.last()) else {
            return;
        };
        let span = usize::try_from(last.nid.0.abs_diff(first.nid.0)).unwrap_or(usize::MAX);
        if span / TABLE_MAX < self.places.len() && self.places.len() < NOWHERE as usize {
            let base = first.nid.0;
            self.table.resize(span + 1, NOWHERE);
            for (number, place) in (0..).zip(&self.places) {
                self.table[place.nid.0.abs_diff(base) as usize] = number;
            }
        }
    }

    fn find(&self, nid: EventNid) -> Option<usize> {
        if self.table.is_empty() {
            return self
                .places
                .binary_search_by_key(&nid, |place| place.nid)
                .ok();
        }
        let from_first = nid.0.checked_sub(self.places.first()?.nid.0)?;
        let number = *self.table.get(usize::try_from(from_first).ok()?)?;
        (number != NOWHERE).then_some(number as usize)
    }

    fn reader(&self, place: usize) -> Reader<'_> {
        let Place { row, at, .. } = self.places[place];
        Reader {
            text: &self.rows[row as usize],
            at: at as usize,
        }
    }

    fn id(&self, place: usize) -> Result<&str> {
        self.reader(place).id().ok_or_else(cut_short)
    }

    fn each_auth(&self, place: usize, each: &mut dyn FnMut(EventNid)) -> Result<()> {
        let nid = self.places[place].nid.0;
        let mut reader = self.reader(place);
        let mut read = || {
            reader.id()?;
            for _ in 0..reader.length()? {
                each(EventNid(nid.wrapping_sub(unzigzag(reader.number()?))));
            }
            Some(())
        };
        read().ok_or_else(cut_short)
    }
}

fn cut_short() -> Error {
    Error::corrupt("a row of the state log is cut short")
}

/// A set of places.
struct Places(Vec<u64>);

impl Places {
    fn new(graph: &Graph) -> Self {
        Self(vec![0; graph.places.len().div_ceil(64)])
    }

    /// Whether it is new.
    fn insert(&mut self, place: usize) -> bool {
        let (word, bit) = (&mut self.0[place / 64], 1 << (place % 64));
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    fn iter(&self) -> impl Iterator<Item = usize> {
        let bits = |word: u64| (0..64).filter(move |bit| word >> bit & 1 == 1);
        let words = self.0.iter().enumerate();
        words.flat_map(move |(number, word)| bits(*word).map(move |bit| number * 64 + bit))
    }
}

// -- what is asked --------------------------------------------------------------------------------

/// A walk down the auth events.
struct Walk<'a> {
    graph: &'a Graph,
    seen: Places,
    open: Vec<usize>,
    /// The same for what is not in the graph.
    seen_beside: HashSet<EventNid>,
    open_beside: Vec<EventNid>,
}

impl<'a> Walk<'a> {
    fn new(graph: &'a Graph) -> Self {
        Self {
            graph,
            seen: Places::new(graph),
            open: Vec::new(),
            seen_beside: HashSet::new(),
            open_beside: Vec::new(),
        }
    }

    fn add(&mut self, nid: EventNid) {
        match self.graph.find(nid) {
            Some(place) => {
                if self.seen.insert(place) {
                    self.open.push(place);
                }
            }
            None => {
                if self.seen_beside.insert(nid) {
                    self.open_beside.push(nid);
                }
            }
        }
    }

    /// To the end. What of it is stored, in the order of the numbers.
    fn finish(mut self, c: &mut dyn Conn) -> Result<Vec<EventNid>> {
        let graph = self.graph;
        let mut found = Vec::new();
        loop {
            while let Some(place) = self.open.pop() {
                graph.each_auth(place, &mut |nid| self.add(nid))?;
            }
            if self.open_beside.is_empty() {
                break;
            }
            let mut edge = std::mem::take(&mut self.open_beside);
            // In the order of the table, whose pages are then read once.
            edge.sort_unstable();
            for (nid, auth) in events::auth_of(c, &edge)? {
                found.push(nid);
                for nid in auth.iter() {
                    self.add(*nid);
                }
            }
        }
        found.extend(self.seen.iter().map(|place| graph.places[place].nid));
        found.sort_unstable();
        Ok(found)
    }
}

/// These events of a room (as far as they are stored) and their whole auth chains, in the order of their
/// numbers.
pub(crate) fn closure(
    c: &mut dyn Conn,
    room: RoomNid,
    events: impl IntoIterator<Item = EventNid>,
) -> Result<Vec<EventNid>> {
    let events: Vec<EventNid> = events.into_iter().collect();
    let graph = Graph::of(c, room, events.len())?.unwrap_or_default();
    let mut walk = Walk::new(&graph);
    for nid in events {
        walk.add(nid);
    }
    walk.finish(c)
}

/// The auth chains of these events of a room, without the events themselves unless one is in another's chain.
/// In the order of their numbers.
pub fn auth_chain(c: &mut dyn Conn, room: RoomNid, events: &[EventNid]) -> Result<Vec<EventNid>> {
    let graph = Graph::of(c, room, events.len())?.unwrap_or_default();
    let mut walk = Walk::new(&graph);
    let mut beside = Vec::new();
    for nid in events {
        match graph.find(*nid) {
            Some(place) => graph.each_auth(place, &mut |nid| walk.add(nid))?,
            None => beside.push(*nid),
        }
    }
    for nid in events::auth_of(c, &beside)?
        .values()
        .flat_map(|auth| auth.iter())
    {
        walk.add(*nid);
    }
    walk.finish(c)
}

/// The ids of these events of a room, in no order, as the elements of a JSON array.
pub fn write_ids(
    c: &mut dyn Conn,
    room: RoomNid,
    events: &[EventNid],
    text: &mut String,
) -> Result<()> {
    let graph = Graph::of(c, room, events.len())?.unwrap_or_default();
    let begin = text.len();
    let mut beside = Vec::new();
    for nid in events {
        match graph.find(*nid) {
            Some(place) => write_id(graph.id(place)?, begin, text)?,
            None => beside.push(*nid),
        }
    }
    events::each_id(c, &mut beside, &mut |id| write_id(id, begin, text))
}

fn write_id(id: &str, begin: usize, text: &mut String) -> Result<()> {
    if text.len() > begin {
        text.push(',');
    }
    let plain = |byte: u8| byte.is_ascii_graphic() && byte != b'"' && byte != b'\\';
    if id.bytes().all(plain) {
        text.push('"');
        text.push_str(id);
        text.push('"');
    } else {
        text.push_str(&serde_json::to_string(id).map_err(Error::engine)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: i64 = 1_000_000_007;

    fn id(number: i64) -> EventId {
        EventId::parse(&format!("${number}:a.org")).unwrap()
    }

    /// Events with these numbers, each on the two before it and on one far above.
    fn graph(numbers: &[i64]) -> Graph {
        let mut graph = Graph::default();
        for (place, numbers) in numbers.chunks(7).enumerate() {
            let ids: Vec<EventId> = numbers.iter().map(|number| id(*number)).collect();
            let auth = |number: i64| {
                events::pack(&[number - 1, number - 2, number + (1 << 40)].map(EventNid))
            };
            let auth: Vec<Vec<u8>> = numbers.iter().map(|number| auth(*number)).collect();
            let entries: Vec<Entry<'_>> = (0..ids.len())
                .map(|at| (EventNid(numbers[at]), &ids[at], &*auth[at]))
                .collect();
            let row = encode(&entries).unwrap();
            graph.push(place as i64, row.into()).unwrap();
        }
        graph.order();
        graph
    }

    fn holds(graph: &Graph, numbers: &[i64]) {
        for number in numbers {
            let place = graph.find(EventNid(*number)).unwrap();
            assert_eq!(graph.id(place).unwrap(), id(*number).as_str());
            let mut auth = Vec::new();
            graph.each_auth(place, &mut |nid| auth.push(nid.0)).unwrap();
            assert_eq!(auth, [number - 1, number - 2, number + (1 << 40)]);
        }
        for nobody in [i64::MIN, -1, 0, FIRST - 1, i64::MAX] {
            assert!(numbers.contains(&nobody) || graph.find(EventNid(nobody)).is_none());
        }
    }

    #[test]
    fn numbers_in_a_row_are_found_in_a_table() {
        let numbers: Vec<i64> = (0..100).map(|number| FIRST + number * 2).collect();
        let graph = graph(&numbers);
        assert!(!graph.table.is_empty());
        holds(&graph, &numbers);
        assert!(graph.find(EventNid(FIRST + 1)).is_none());
    }

    #[test]
    fn numbers_far_apart_are_found_without_one() {
        let mut numbers: Vec<i64> = (0..100).map(|number| FIRST + number * 1000).collect();
        numbers.extend([i64::MAX / 2, 1, -5]);
        let graph = graph(&numbers);
        assert!(graph.table.is_empty());
        holds(&graph, &numbers);
    }

    #[test]
    fn a_row_that_is_cut_short_is_an_error() {
        let (id, auth) = (id(1), events::pack(&[EventNid(3), EventNid(4)]));
        let whole = encode(&[(EventNid(300), &id, &auth)]).unwrap();
        for end in 1..whole.len() {
            assert!(Graph::default().push(1, whole[..end].into()).is_err());
        }
        let mut graph = Graph::default();
        graph.push(1, whole.into()).unwrap();
        assert_eq!(graph.places.len(), 1);
        let endless: Arc<[u8]> = [0xff; 20].into();
        assert!(Graph::default().push(1, endless).is_err());
    }
}
