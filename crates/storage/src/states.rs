//! States in the store: the nodes of StateMaps, each written once and shared by all states that contain it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use protocol::event_set::StateKey;
use protocol::nid::{EventNid, KeyNid, RoomNid};
use protocol::state::{BadNode, Node, StateMap};

use crate::driver::{Conn, Error, Result};
use crate::names::FEW;
use crate::row;

/// The root number of the empty state.
pub(crate) const EMPTY: i64 = 0;

/// Nodes asked for in one statement.
const BATCH: usize = 4000;

/// Up to here state keys are looked up one after another: a plan for a list can go wrong, this can't.
const KEYS_ONE_BY_ONE: usize = 8;

impl From<BadNode> for Error {
    fn from(bad: BadNode) -> Self {
        Self::Corrupt(bad.to_string())
    }
}

const NODES: &str = "SELECT nid, node FROM state_nodes WHERE nid IN (SELECT value FROM rarray($1))";
const INSERT_NODE: &str = "INSERT INTO state_nodes (nid, node) VALUES ($1, $2)";

/// The state with this root.
pub(crate) fn map(c: &mut dyn Conn, root: i64) -> Result<StateMap> {
    let mut found = maps(c, &[root])?;
    found
        .remove(&root)
        .ok_or_else(|| Error::corrupt("a state is gone"))
}

/// The states with these roots. Nodes come a level at a time and from memory where they are there.
pub(crate) fn maps(c: &mut dyn Conn, roots: &[i64]) -> Result<BTreeMap<i64, StateMap>> {
    let cached = c.cached();
    let mut have: HashMap<i64, Arc<Node>> = HashMap::new();
    let mut read: HashMap<i64, Vec<u8>> = HashMap::new();
    let mut wanted: Vec<i64> = roots.to_vec();
    while !wanted.is_empty() {
        wanted.sort_unstable();
        wanted.dedup();
        wanted.retain(|nid| {
            if *nid == EMPTY || have.contains_key(nid) || read.contains_key(nid) {
                return false;
            }
            match cached.caches.nodes.get(nid) {
                Some(node) => {
                    have.insert(*nid, node);
                    false
                }
                None => true,
            }
        });
        let mut below = Vec::new();
        for batch in wanted.chunks(BATCH) {
            c.query(NODES, &[&batch], &mut |row| {
                let bytes = row.blob(1)?.to_vec();
                below.extend(Node::child_ids(&bytes)?);
                read.insert(row.int(0)?, bytes);
                Ok(())
            })?;
        }
        wanted = below;
    }
    let mut found = BTreeMap::new();
    for root in roots {
        let top = if *root == EMPTY {
            None
        } else {
            Some(build(*root, &read, &mut have, &mut |nid, node| {
                cached.keep_node(nid, node);
            })?)
        };
        found.insert(*root, StateMap::from_root(top));
    }
    Ok(found)
}

fn build(
    nid: i64,
    read: &HashMap<i64, Vec<u8>>,
    have: &mut HashMap<i64, Arc<Node>>,
    keep: &mut dyn FnMut(i64, &Arc<Node>),
) -> Result<Arc<Node>> {
    if let Some(node) = have.get(&nid) {
        return Ok(Arc::clone(node));
    }
    let bytes = read
        .get(&nid)
        .ok_or_else(|| Error::Corrupt(format!("state node {nid} is gone")))?;
    let node = Node::decode::<Error>(bytes, &mut |child| build(child, read, have, keep))?;
    node.mark_stored(nid);
    let node = Arc::new(node);
    keep(nid, &node);
    have.insert(nid, Arc::clone(&node));
    Ok(node)
}

/// The nodes of some states that the store does not hold, children before their parents.
#[derive(Default)]
pub(crate) struct Unstored {
    nodes: Vec<Arc<Node>>,
    /// By address, which the list above keeps taken.
    places: HashMap<usize, usize>,
    /// The number of the first one; the others follow.
    first: i64,
}

fn address(node: &Arc<Node>) -> usize {
    Arc::as_ptr(node) as usize
}

impl Unstored {
    pub(crate) fn add(&mut self, map: &StateMap) {
        if let Some(root) = map.root() {
            self.add_node(root);
        }
    }

    fn add_node(&mut self, node: &Arc<Node>) {
        if node.stored_id().is_some() || self.places.contains_key(&address(node)) {
            return;
        }
        for child in node.children() {
            self.add_node(child);
        }
        self.places.insert(address(node), self.nodes.len());
        self.nodes.push(Arc::clone(node));
    }

    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    pub(crate) fn number_from(&mut self, first: i64) {
        self.first = first;
    }

    /// The number of a node, stored or to be stored.
    fn number(&self, node: &Arc<Node>) -> i64 {
        match self.places.get(&address(node)) {
            Some(place) => self.first + *place as i64,
            None => node.stored_id().expect("every node was added or is stored"),
        }
    }

    /// The root number of a state whose nodes were added.
    pub(crate) fn root(&self, map: &StateMap) -> i64 {
        map.root().map_or(EMPTY, |root| self.number(root))
    }

    pub(crate) fn write(&self, c: &mut dyn Conn) -> Result<()> {
        if self.nodes.is_empty() {
            return Ok(());
        }
        let encoded: Vec<(i64, Vec<u8>)> = self
            .nodes
            .iter()
            .map(|node| (self.number(node), node.encode(&|child| self.number(child))))
            .collect();
        let rows: Vec<_> = encoded.iter().map(|(nid, node)| row![nid, node]).collect();
        c.later(INSERT_NODE, &rows)
    }

    /// To be called when the transaction has been committed.
    pub(crate) fn committed(&self, caches: &crate::cache::Caches) {
        for node in &self.nodes {
            let nid = self.number(node);
            node.mark_stored(nid);
            caches.nodes.insert(nid, Arc::clone(node));
        }
    }
}

const CURRENT: &str = "SELECT state_root FROM rooms WHERE nid = $1";
const AT_POSITION: &str = "SELECT root FROM room_states WHERE room_nid = $1 AND position <= $2
    ORDER BY position DESC LIMIT 1";
const AROUND: &str = "SELECT before_root, after_root FROM events WHERE nid = $1 AND place > 0";

/// The current state of a room.
pub fn current(c: &mut dyn Conn, room: RoomNid) -> Result<StateMap> {
    let root = c.query_int(CURRENT, &[&room])?.unwrap_or(EMPTY);
    map(c, root)
}

/// What was the current state when the events stream stood at this position; empty before we were there.
pub fn at_position(c: &mut dyn Conn, room: RoomNid, position: i64) -> Result<StateMap> {
    let root = c.query_int(AT_POSITION, &[&room, &position])?;
    map(c, root.unwrap_or(EMPTY))
}

/// The keys at which the current state changed between two positions: key, then what stood there at each.
pub fn changes(
    c: &mut dyn Conn,
    room: RoomNid,
    from: i64,
    to: i64,
) -> Result<Vec<(KeyNid, Option<EventNid>, Option<EventNid>)>> {
    let before = at_position(c, room, from)?;
    let after = at_position(c, room, to)?;
    Ok(before.diff(&after))
}

/// The state before and after an event that has a place.
pub fn around(c: &mut dyn Conn, event: EventNid) -> Result<Option<(StateMap, StateMap)>> {
    let roots = c.query_opt(AROUND, &[&event], |row| Ok((row.int(0)?, row.int(1)?)))?;
    let Some((before, after)) = roots else {
        return Ok(None);
    };
    let found = maps(c, &[before, after])?;
    Ok(Some((found[&before].clone(), found[&after].clone())))
}

const KEY: &str =
    "SELECT key_nid FROM state_keys WHERE room_nid = $1 AND kind = $2 AND state_key = $3";
const KEYS_OF_KIND: &str =
    "SELECT key_nid, state_key FROM state_keys WHERE room_nid = $1 AND kind = $2";
const KEY_NAMES: &str = "SELECT key_nid, kind, state_key FROM state_keys
    WHERE room_nid = $1 AND key_nid IN (SELECT value FROM rarray($2))";
const KEYS: &str = "SELECT state_key, key_nid FROM state_keys WHERE room_nid = $1 AND kind = $2
    AND state_key IN (SELECT value FROM rarray_text($3))";

/// The number of a state key, if this room has ever used it.
pub fn key(c: &mut dyn Conn, room: RoomNid, kind: &str, state_key: &str) -> Result<Option<KeyNid>> {
    let found = keys(c, room, &[(kind.into(), state_key.into())])?;
    Ok(found.into_values().next())
}

/// The numbers of state keys, those that this room has ever used.
pub fn keys(
    c: &mut dyn Conn,
    room: RoomNid,
    wanted: &[StateKey],
) -> Result<BTreeMap<StateKey, KeyNid>> {
    let cached = c.cached();
    // Whoever asks for many fetches a room, and takes each of them once.
    let keep_them = cached.fill && wanted.len() <= FEW;
    let mut found = BTreeMap::new();
    let mut missing: BTreeMap<&Arc<str>, BTreeSet<&Arc<str>>> = BTreeMap::new();
    for name in wanted {
        match cached.caches.keys.get(&(room, name.clone())) {
            Some(key) => {
                found.insert(name.clone(), key);
            }
            None => {
                missing.entry(&name.0).or_default().insert(&name.1);
            }
        }
    }
    for (kind, state_keys) in missing {
        let state_keys: Vec<&Arc<str>> = state_keys.into_iter().collect();
        let mut keep = |state_key: Arc<str>, key: KeyNid| {
            let name = (Arc::clone(kind), state_key);
            if keep_them {
                cached.caches.keys.insert((room, name.clone()), key);
            }
            found.insert(name, key);
        };
        if state_keys.len() <= KEYS_ONE_BY_ONE {
            for state_key in state_keys {
                let number = c.query_opt(KEY, &[&room, kind, state_key], |row| row.key_nid(0))?;
                if let Some(number) = number {
                    keep(Arc::clone(state_key), number);
                }
            }
            continue;
        }
        for batch in state_keys.chunks(BATCH) {
            c.query(
                KEYS,
                &[&room, kind, &crate::texts(&batch.to_vec())],
                &mut |row| {
                    keep(row.shared(0)?, row.key_nid(1)?);
                    Ok(())
                },
            )?;
        }
    }
    Ok(found)
}

/// Every state key of this type with its number.
pub fn keys_of_kind(
    c: &mut dyn Conn,
    room: RoomNid,
    kind: &str,
) -> Result<Vec<(KeyNid, Arc<str>)>> {
    c.query_all(KEYS_OF_KIND, &[&room, &kind], |row| {
        Ok((row.key_nid(0)?, row.shared(1)?))
    })
}

/// The names of state keys.
pub fn key_names(
    c: &mut dyn Conn,
    room: RoomNid,
    keys: &[KeyNid],
) -> Result<BTreeMap<KeyNid, StateKey>> {
    let numbers: Vec<i64> = keys.iter().map(|key| i64::from(key.0)).collect();
    let rows = c.query_all(KEY_NAMES, &[&room, &numbers], |row| {
        Ok((row.key_nid(0)?, (row.shared(1)?, row.shared(2)?)))
    })?;
    Ok(rows.into_iter().collect())
}
