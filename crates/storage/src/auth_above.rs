//! What stands on an event: auth edges the other way round, so that whether an event is in the auth chain
//! of a state can be told without walking that state.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use protocol::nid::{EventNid, KeyNid};

use crate::driver::{Conn, Error, Result};
use crate::{events, row};

/// Rows read in one go, newest first. An event that much stands on has one for each commit, and what is
/// looked for is mostly in the first.
const PAGE: i64 = 4;
/// Events looked at in one go when the table is made.
const FILL: i64 = 2000;

const INSERT: &str = "INSERT INTO auth_above (auth_nid, newest, above) VALUES ($1, $2, $3)";
const ABOVE: &str = "SELECT newest, above FROM auth_above WHERE auth_nid = $1 AND newest < $2
    ORDER BY newest DESC LIMIT $3";
const REMOVE: &str = "DELETE FROM auth_above WHERE auth_nid IN (SELECT value FROM rarray($1))";
const STATE_EVENTS: &str = "SELECT nid, key_nid, auth FROM events
    WHERE nid > $1 AND key_nid IS NOT NULL ORDER BY nid LIMIT $2";
const STATE_EVENTS_OF: &str = "SELECT nid, key_nid, auth FROM events
    WHERE nid IN (SELECT value FROM rarray($1)) AND key_nid IS NOT NULL";

/// A state event, its key, and its auth events as they stand in their column.
type Edges<'a> = (EventNid, KeyNid, &'a [u8]);

/// Notes state events that are stored for the first time.
pub(crate) fn add<'a>(c: &mut dyn Conn, stored: impl IntoIterator<Item = Edges<'a>>) -> Result<()> {
    let mut above: BTreeMap<EventNid, (EventNid, Vec<u8>)> = BTreeMap::new();
    for (nid, key, auth) in stored {
        let named: BTreeSet<EventNid> = events::unpack(auth)?.into_iter().collect();
        for auth in named {
            let (newest, list) = above.entry(auth).or_insert((nid, Vec::new()));
            *newest = nid.max(*newest);
            list.extend(nid.0.to_le_bytes());
            list.extend(i64::from(key.0).to_le_bytes());
        }
    }
    let rows: Vec<_> = above
        .iter()
        .map(|(auth, (newest, list))| row![*auth, *newest, list])
        .collect();
    if rows.is_empty() {
        return Ok(());
    }
    c.later(INSERT, &rows)
}

/// Those of these events that are in the auth chain of one for which `agreed` holds.
///
/// Costs the state events above them that are not agreed on, each once; mostly there are few, or one that
/// is comes soon.
pub(crate) fn stood_on(
    c: &mut dyn Conn,
    events: &BTreeSet<EventNid>,
    agreed: &dyn Fn(EventNid, KeyNid) -> bool,
) -> Result<BTreeSet<EventNid>> {
    let mut known = Known::default();
    // What is above others was mostly stored after them, and what is known of it serves for these.
    for event in events.iter().rev() {
        any_stands_on(c, *event, agreed, &mut known)?;
    }
    known.carrying.retain(|event| events.contains(event));
    Ok(known.carrying)
}

/// What has been found out so far.
#[derive(Default)]
struct Known {
    /// Something agreed on stands on these.
    carrying: BTreeSet<EventNid>,
    /// Nothing does on these.
    bare: BTreeSet<EventNid>,
}

fn any_stands_on(
    c: &mut dyn Conn,
    event: EventNid,
    agreed: &dyn Fn(EventNid, KeyNid) -> bool,
    known: &mut Known,
) -> Result<()> {
    if known.bare.contains(&event) || known.carrying.contains(&event) {
        return Ok(());
    }
    let mut seen = BTreeSet::from([event]);
    let mut open = VecDeque::from([(event, i64::MAX)]);
    while let Some((nid, before)) = open.pop_front() {
        let page = c.query_all(ABOVE, &[&nid, &before, &PAGE], |row| {
            Ok((row.int(0)?, row.blob(1)?.to_vec()))
        })?;
        for (_, list) in &page {
            let (pairs, rest) = list.as_chunks::<16>();
            if !rest.is_empty() {
                return Err(Error::corrupt(
                    "a list of what stands on an event is cut short",
                ));
            }
            for pair in pairs {
                let above = events::unpack(pair)?;
                let &[above, EventNid(key)] = above.as_slice() else {
                    return Err(Error::corrupt("a pair of numbers is none"));
                };
                let key = u32::try_from(key).map_err(|_| Error::corrupt("a state key's number"))?;
                if agreed(above, KeyNid(key)) || known.carrying.contains(&above) {
                    known.carrying.insert(event);
                    return Ok(());
                }
                if !known.bare.contains(&above) && seen.insert(above) {
                    open.push_back((above, i64::MAX));
                }
            }
        }
        if let Some((last, _)) = page.get(PAGE as usize - 1) {
            open.push_back((nid, *last));
        }
    }
    known.bare.append(&mut seen);
    Ok(())
}

/// Forgets whatever stands on the events that these name.
pub(crate) fn remove(c: &mut dyn Conn, stored: &[EventNid]) -> Result<()> {
    let named: BTreeSet<EventNid> = events::auth_of(c, stored)?
        .values()
        .flat_map(|auth| auth.iter().copied())
        .collect();
    let named: Vec<EventNid> = named.into_iter().collect();
    c.execute(REMOVE, &[&events::raw(&named)]).map(drop)
}

/// Notes state events that are stored already.
pub(crate) fn add_stored(c: &mut dyn Conn, stored: &[EventNid]) -> Result<()> {
    let rows = c.query_all(STATE_EVENTS_OF, &[&events::raw(stored)], read)?;
    add(c, rows.iter().map(|(nid, key, auth)| (*nid, *key, &**auth)))
}

/// Fills the table of a database that had events before it had this table.
pub(crate) fn fill(c: &mut dyn Conn) -> Result<()> {
    let mut last = EventNid(0);
    loop {
        let rows = c.query_all(STATE_EVENTS, &[&last, &FILL], read)?;
        let Some((newest, _, _)) = rows.last() else {
            return Ok(());
        };
        last = *newest;
        add(c, rows.iter().map(|(nid, key, auth)| (*nid, *key, &**auth)))?;
    }
}

fn read(row: &dyn crate::driver::Row) -> Result<(EventNid, KeyNid, Vec<u8>)> {
    Ok((row.event_nid(0)?, row.key_nid(1)?, row.blob(2)?.to_vec()))
}
