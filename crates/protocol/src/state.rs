//! Room state: a persistent map from state key to event.
//!
//! A radix trie over the room's dense key numbers, 32 ways at each level. A clone is one reference count;
//! a change copies the nodes on one path and shares the rest, in memory and, through each node's stored
//! id, in the store. Equal maps have equal shapes, and a difference costs what differs.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use crate::nid::{EventNid, KeyNid};

const BITS: u32 = 5;
/// A key is 32 bits wide: six levels of five bits below a root with the last two.
const LEVEL_MAX: u8 = 6;
/// Slots that such a root can have.
const TOP_SLOTS: u32 = 1 << (32 - BITS * 6);
/// One level byte, the bitmap and 32 numbers of at most ten bytes each.
const NODE_BYTES_MAX: usize = 1 + 4 + 32 * 10;

/// State key to event. A clone is cheap; a changed clone shares what did not change.
#[derive(Clone, Default)]
pub struct StateMap {
    root: Option<Arc<Node>>,
}

impl StateMap {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn get(&self, key: KeyNid) -> Option<EventNid> {
        let mut node = self.root.as_ref()?;
        if level_of(key) > node.level {
            return None;
        }
        loop {
            let index = node.index(slot_of(key, node.level))?;
            match &node.slots {
                Slots::Values(values) => return Some(values[index]),
                Slots::Children(children) => node = &children[index],
            }
        }
    }

    /// Sets the key's event and returns the one that stood there.
    pub fn insert(&mut self, key: KeyNid, event: EventNid) -> Option<EventNid> {
        // Writing what is there already must not copy the path.
        let old = self.get(key);
        if old == Some(event) {
            return old;
        }
        let level = level_of(key);
        let root = match self.root.take() {
            None => Arc::new(Node::of_one(level, key, event)),
            Some(mut root) => {
                while root.level < level {
                    root = Arc::new(Node::over(root));
                }
                put(&mut root, key, event);
                root
            }
        };
        self.root = Some(root);
        old
    }

    /// Takes the key out and returns the event that stood there.
    pub fn remove(&mut self, key: KeyNid) -> Option<EventNid> {
        let old = self.get(key)?;
        let mut root = self.root.take()?;
        if !take(&mut root, key) {
            return Some(old);
        }
        if root.bitmap == 0 {
            return Some(old);
        }
        // The height follows the largest key, down as well as up.
        while let (1, Slots::Children(children)) = (root.bitmap, &root.slots) {
            root = children[0].clone();
        }
        self.root = Some(root);
        Some(old)
    }

    pub fn len(&self) -> usize {
        self.root.as_ref().map_or(0, |root| root.count)
    }

    pub fn is_empty(&self) -> bool {
        self.root.is_none()
    }

    /// The entries in the order of their keys.
    pub fn iter(&self) -> Iter<'_> {
        let stack = self
            .root
            .iter()
            .map(|root| (&**root, root.bitmap, 0))
            .collect();
        Iter { stack }
    }

    /// The keys on which the two maps differ, in order, with what each has there. Costs what differs.
    pub fn diff(&self, other: &Self) -> Vec<(KeyNid, Option<EventNid>, Option<EventNid>)> {
        let mut found = Vec::new();
        let _ = self.walk(other, &mut |key, mine, theirs| {
            found.push((key, mine, theirs));
            ControlFlow::Continue(())
        });
        found
    }

    /// Whether the two are known to be equal without looking inside. `false` says nothing.
    pub fn same(&self, other: &Self) -> bool {
        same(self.root.as_ref(), other.root.as_ref())
    }

    /// The entries at these keys only.
    pub fn only(&self, keys: impl IntoIterator<Item = KeyNid>) -> Self {
        keys.into_iter()
            .filter_map(|key| Some((key, self.get(key)?)))
            .collect()
    }

    /// The top node, for the store.
    pub fn root(&self) -> Option<&Arc<Node>> {
        self.root.as_ref()
    }

    /// The map whose top node the store has read.
    pub fn from_root(root: Option<Arc<Node>>) -> Self {
        Self { root }
    }

    fn walk(&self, other: &Self, visit: Visit<'_>) -> ControlFlow<()> {
        let (a, b) = (self.root.as_ref(), other.root.as_ref());
        let level = a.into_iter().chain(b).map(|node| node.level).max();
        walk(a, b, level.unwrap_or(0), 0, visit)
    }
}

impl PartialEq for StateMap {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len()
            && self
                .walk(other, &mut |_, _, _| ControlFlow::Break(()))
                .is_continue()
    }
}

impl Eq for StateMap {}

impl FromIterator<(KeyNid, EventNid)> for StateMap {
    fn from_iter<I: IntoIterator<Item = (KeyNid, EventNid)>>(entries: I) -> Self {
        let mut map = Self::new();
        map.extend(entries);
        map
    }
}

impl Extend<(KeyNid, EventNid)> for StateMap {
    fn extend<I: IntoIterator<Item = (KeyNid, EventNid)>>(&mut self, entries: I) {
        for (key, event) in entries {
            self.insert(key, event);
        }
    }
}

impl<'a> IntoIterator for &'a StateMap {
    type Item = (KeyNid, EventNid);
    type IntoIter = Iter<'a>;

    fn into_iter(self) -> Iter<'a> {
        self.iter()
    }
}

impl fmt::Debug for StateMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(self.iter().map(|(key, event)| (key.0, event.0)))
            .finish()
    }
}

/// The entries of a [`StateMap`] in the order of their keys.
pub struct Iter<'a> {
    /// Nodes that are not done: the slots still to visit, and the bits of the key above the node.
    stack: Vec<(&'a Node, u32, u32)>,
}

impl Iterator for Iter<'_> {
    type Item = (KeyNid, EventNid);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let (node, left, prefix) = self.stack.last_mut()?;
            if *left == 0 {
                self.stack.pop();
                continue;
            }
            let slot = left.trailing_zeros();
            *left &= *left - 1;
            let (node, key) = (*node, *prefix | slot << (BITS * u32::from(node.level)));
            let index = node.index(slot).expect("the slot is in the bitmap");
            match &node.slots {
                Slots::Values(values) => return Some((KeyNid(key), values[index])),
                Slots::Children(children) => {
                    let child = &*children[index];
                    self.stack.push((child, child.bitmap, key));
                }
            }
        }
    }
}

// -- Nodes ----------------------------------------------------------------------------------------

/// One node of a [`StateMap`], shared between maps.
pub struct Node {
    /// 0 for a leaf.
    level: u8,
    /// Which of the 32 slots are filled. Never 0 in a map.
    bitmap: u32,
    /// One for each bit of the bitmap, in order.
    slots: Slots,
    /// Entries in and below this node.
    count: usize,
    /// The store's number for this node, 0 while it has none.
    stored: AtomicI64,
}

#[derive(Clone)]
enum Slots {
    Values(Vec<EventNid>),
    Children(Vec<Arc<Node>>),
}

/// Bytes that are not an encoded node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a state node: {0}")]
pub struct BadNode(pub &'static str);

impl Node {
    /// The number under which the store holds exactly this node.
    pub fn stored_id(&self) -> Option<i64> {
        match self.stored.load(Ordering::Relaxed) {
            0 => None,
            id => Some(id),
        }
    }

    /// Says that the store holds this node under this number. To be said when the transaction that wrote
    /// it has been committed, never before.
    pub fn mark_stored(&self, id: i64) {
        self.stored.store(id, Ordering::Relaxed);
    }

    /// The nodes below, none for a leaf.
    pub fn children(&self) -> &[Arc<Node>] {
        match &self.slots {
            Slots::Values(_) => &[],
            Slots::Children(children) => children,
        }
    }

    /// Entries in and below this node.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The bytes to store, a few hundred at most. `id` gives the number of a child.
    pub fn encode(&self, id: &dyn Fn(&Arc<Node>) -> i64) -> Vec<u8> {
        let mut bytes = vec![self.level];
        bytes.extend_from_slice(&self.bitmap.to_le_bytes());
        let mut last = 0;
        // Neighbours tend to have near numbers, so the distances are short.
        let mut push = |number: i64| {
            push_varint(&mut bytes, zigzag(number.wrapping_sub(last)));
            last = number;
        };
        match &self.slots {
            Slots::Values(values) => values.iter().for_each(|event| push(event.0)),
            Slots::Children(children) => children.iter().for_each(|child| push(id(child))),
        }
        bytes
    }

    /// Reads what [`Node::encode`] wrote; `child` gives the node with a number.
    pub fn decode<E: From<BadNode>>(
        bytes: &[u8],
        child: &mut dyn FnMut(i64) -> Result<Arc<Node>, E>,
    ) -> Result<Self, E> {
        let (level, bitmap, numbers) = parse(bytes)?;
        let (slots, count) = if level == 0 {
            let values: Vec<_> = numbers.into_iter().map(EventNid).collect();
            let count = values.len();
            (Slots::Values(values), count)
        } else {
            let mut children = Vec::with_capacity(numbers.len());
            let mut count = 0usize;
            for number in numbers {
                let node = child(number)?;
                if node.level + 1 != level {
                    return Err(BadNode("child of another level").into());
                }
                count = count.saturating_add(node.count);
                children.push(node);
            }
            (Slots::Children(children), count)
        };
        Ok(Self {
            level,
            bitmap,
            slots,
            count,
            stored: AtomicI64::new(0),
        })
    }

    /// The numbers of the nodes below an encoded node, so that a store can read a level at a time.
    pub fn child_ids(bytes: &[u8]) -> Result<Vec<i64>, BadNode> {
        let (level, _, numbers) = parse(bytes)?;
        Ok(if level == 0 { Vec::new() } else { numbers })
    }

    fn of_one(level: u8, key: KeyNid, event: EventNid) -> Self {
        let slots = if level == 0 {
            Slots::Values(vec![event])
        } else {
            Slots::Children(vec![Arc::new(Self::of_one(level - 1, key, event))])
        };
        Self {
            level,
            bitmap: 1 << slot_of(key, level),
            slots,
            count: 1,
            stored: AtomicI64::new(0),
        }
    }

    /// One level higher, the given node in the first slot.
    fn over(node: Arc<Node>) -> Self {
        Self {
            level: node.level + 1,
            bitmap: 1,
            count: node.count,
            slots: Slots::Children(vec![node]),
            stored: AtomicI64::new(0),
        }
    }

    /// Where a filled slot stands in `slots`.
    fn index(&self, slot: u32) -> Option<usize> {
        let bit = 1u32 << slot;
        (self.bitmap & bit != 0).then(|| (self.bitmap & (bit - 1)).count_ones() as usize)
    }
}

impl Clone for Node {
    /// A copy is made to be changed, so it is not what the store holds.
    fn clone(&self) -> Self {
        Self {
            level: self.level,
            bitmap: self.bitmap,
            slots: self.slots.clone(),
            count: self.count,
            stored: AtomicI64::new(0),
        }
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node")
            .field("level", &self.level)
            .field("count", &self.count)
            .field("stored", &self.stored_id())
            .finish_non_exhaustive()
    }
}

/// Level, bitmap and numbers of an encoded node.
fn parse(bytes: &[u8]) -> Result<(u8, u32, Vec<i64>), BadNode> {
    if bytes.len() > NODE_BYTES_MAX {
        return Err(BadNode("too long"));
    }
    let Some((head, mut rest)) = bytes.split_first_chunk::<5>() else {
        return Err(BadNode("too short"));
    };
    let level = head[0];
    let bitmap = u32::from_le_bytes([head[1], head[2], head[3], head[4]]);
    if level > LEVEL_MAX {
        return Err(BadNode("level out of range"));
    }
    if bitmap == 0 || (level == LEVEL_MAX && bitmap >> TOP_SLOTS != 0) {
        return Err(BadNode("slots out of range"));
    }
    let mut numbers = Vec::with_capacity(bitmap.count_ones() as usize);
    let mut last = 0i64;
    for _ in 0..bitmap.count_ones() {
        let distance = take_varint(&mut rest).ok_or(BadNode("number cut short"))?;
        last = last.wrapping_add(unzigzag(distance));
        numbers.push(last);
    }
    if !rest.is_empty() {
        return Err(BadNode("bytes left over"));
    }
    Ok((level, bitmap, numbers))
}

/// The smallest level of a node that can hold the key.
fn level_of(key: KeyNid) -> u8 {
    let bits = 32 - key.0.leading_zeros();
    bits.div_ceil(BITS).saturating_sub(1) as u8
}

fn slot_of(key: KeyNid, level: u8) -> u32 {
    key.0 >> (BITS * u32::from(level)) & 31
}

/// The node itself when nobody else has it, otherwise a copy in its place; no longer what is stored.
fn edit(node: &mut Arc<Node>) -> &mut Node {
    let node = Arc::make_mut(node);
    *node.stored.get_mut() = 0;
    node
}

/// Returns whether the key is an addition.
fn put(node: &mut Arc<Node>, key: KeyNid, event: EventNid) -> bool {
    let node = edit(node);
    let slot = slot_of(key, node.level);
    let level = node.level;
    let index = node.index(slot);
    let after = (node.bitmap & ((1 << slot) - 1)).count_ones() as usize;
    let added = match (&mut node.slots, index) {
        (Slots::Values(values), Some(index)) => {
            values[index] = event;
            false
        }
        (Slots::Values(values), None) => {
            values.insert(after, event);
            true
        }
        (Slots::Children(children), Some(index)) => put(&mut children[index], key, event),
        (Slots::Children(children), None) => {
            let child = Node::of_one(level - 1, key, event);
            children.insert(after, Arc::new(child));
            true
        }
    };
    node.bitmap |= 1 << slot;
    node.count += usize::from(added);
    added
}

/// Returns whether the key was there.
fn take(node: &mut Arc<Node>, key: KeyNid) -> bool {
    let node = edit(node);
    let slot = slot_of(key, node.level);
    let Some(index) = node.index(slot) else {
        return false;
    };
    let emptied = match &mut node.slots {
        Slots::Values(values) => {
            values.remove(index);
            true
        }
        Slots::Children(children) => {
            if !take(&mut children[index], key) {
                return false;
            }
            let emptied = children[index].bitmap == 0;
            if emptied {
                children.remove(index);
            }
            emptied
        }
    };
    if emptied {
        node.bitmap &= !(1 << slot);
    }
    node.count -= 1;
    true
}

// -- Differences ----------------------------------------------------------------------------------

type Visit<'a> = &'a mut dyn FnMut(KeyNid, Option<EventNid>, Option<EventNid>) -> ControlFlow<()>;

fn same(a: Option<&Arc<Node>>, b: Option<&Arc<Node>>) -> bool {
    match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => {
            Arc::ptr_eq(a, b) || (a.stored_id().is_some() && a.stored_id() == b.stored_id())
        }
        _ => false,
    }
}

fn walk(
    a: Option<&Arc<Node>>,
    b: Option<&Arc<Node>>,
    level: u8,
    prefix: u32,
    visit: Visit<'_>,
) -> ControlFlow<()> {
    if same(a, b) {
        return ControlFlow::Continue(());
    }
    let mut left = bits_at(a, level) | bits_at(b, level);
    while left != 0 {
        let slot = left.trailing_zeros();
        left &= left - 1;
        let key = prefix | slot << (BITS * u32::from(level));
        if level > 0 {
            let (a, b) = (child_at(a, level, slot), child_at(b, level, slot));
            walk(a, b, level - 1, key, visit)?;
            continue;
        }
        let (mine, theirs) = (value_at(a, slot), value_at(b, slot));
        if mine != theirs {
            visit(KeyNid(key), mine, theirs)?;
        }
    }
    ControlFlow::Continue(())
}

/// The filled slots at a level; a node of a lower level is what its taller self has in the first slot.
fn bits_at(node: Option<&Arc<Node>>, level: u8) -> u32 {
    node.map_or(0, |node| if node.level < level { 1 } else { node.bitmap })
}

fn child_at(node: Option<&Arc<Node>>, level: u8, slot: u32) -> Option<&Arc<Node>> {
    let node = node?;
    if node.level < level {
        return (slot == 0).then_some(node);
    }
    node.children().get(node.index(slot)?)
}

fn value_at(node: Option<&Arc<Node>>, slot: u32) -> Option<EventNid> {
    let node = node?;
    match &node.slots {
        Slots::Values(values) => values.get(node.index(slot)?).copied(),
        Slots::Children(_) => None,
    }
}

// -- Numbers --------------------------------------------------------------------------------------

fn zigzag(number: i64) -> u64 {
    ((number << 1) ^ (number >> 63)) as u64
}

fn unzigzag(number: u64) -> i64 {
    (number >> 1) as i64 ^ -((number & 1) as i64)
}

fn push_varint(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0u64;
    for shift in (0..70).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        let part = u64::from(byte & 0x7f);
        if shift == 63 && part > 1 {
            return None;
        }
        number |= part << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn map(entries: &BTreeMap<u32, i64>) -> StateMap {
        entries
            .iter()
            .map(|(&key, &event)| (KeyNid(key), EventNid(event)))
            .collect()
    }

    /// Saves every node that is not saved yet, as a store does, and returns how many bytes that took.
    fn save(map: &StateMap, disk: &mut BTreeMap<i64, Vec<u8>>) -> usize {
        fn visit(node: &Arc<Node>, disk: &mut BTreeMap<i64, Vec<u8>>) -> usize {
            if node.stored_id().is_some() {
                return 0;
            }
            let below: usize = node.children().iter().map(|child| visit(child, disk)).sum();
            let bytes = node.encode(&|child| child.stored_id().unwrap());
            let (id, size) = (disk.len() as i64 + 1, bytes.len());
            assert!(size <= NODE_BYTES_MAX);
            disk.insert(id, bytes);
            node.mark_stored(id);
            below + size
        }
        map.root().map_or(0, |root| visit(root, disk))
    }

    fn load(id: i64, disk: &BTreeMap<i64, Vec<u8>>) -> Result<Arc<Node>, BadNode> {
        let bytes = disk.get(&id).ok_or(BadNode("no such node"))?;
        let node = Node::decode(bytes, &mut |id| load(id, disk))?;
        node.mark_stored(id);
        Ok(Arc::new(node))
    }

    fn keys() -> impl Strategy<Value = u32> {
        prop_oneof![0..70u32, 0..3000u32, any::<u32>(), Just(u32::MAX)]
    }

    fn entries() -> impl Strategy<Value = BTreeMap<u32, i64>> {
        proptest::collection::btree_map(keys(), any::<i64>(), 0..120)
    }

    proptest! {
        #[test]
        fn behaves_like_an_ordered_map(
            changes in proptest::collection::vec((keys(), proptest::option::of(0..9i64)), 0..200)
        ) {
            let mut ours = StateMap::new();
            let mut model = BTreeMap::new();
            let mut past = Vec::new();
            for (key, event) in changes {
                past.push((ours.clone(), model.clone()));
                let (old, expected) = match event {
                    Some(event) => {
                        (ours.insert(KeyNid(key), EventNid(event)), model.insert(key, event))
                    }
                    None => (ours.remove(KeyNid(key)), model.remove(&key)),
                };
                prop_assert_eq!(old, expected.map(EventNid));
                prop_assert_eq!(ours.len(), model.len());
                prop_assert_eq!(ours.get(KeyNid(key)), event.map(EventNid));
                prop_assert_eq!(ours.is_empty(), model.is_empty());
            }
            past.push((ours, model));
            for (ours, model) in past {
                let listed: Vec<_> = ours.iter().map(|(key, event)| (key.0, event.0)).collect();
                prop_assert_eq!(listed, model.iter().map(|(k, v)| (*k, *v)).collect::<Vec<_>>());
                // The shape follows from the content, so equal maps save to equal nodes.
                let rebuilt = map(&model);
                prop_assert_eq!(rebuilt.root().map(|r| r.level), ours.root().map(|r| r.level));
                prop_assert_eq!(rebuilt, ours);
            }
        }

        #[test]
        fn a_difference_lists_every_key_that_differs(left in entries(), right in entries()) {
            let expected: Vec<_> = left
                .keys()
                .chain(right.keys())
                .collect::<std::collections::BTreeSet<_>>()
                .into_iter()
                .map(|key| (key, left.get(key), right.get(key)))
                .filter(|(_, a, b)| a != b)
                .map(|(key, a, b)| (KeyNid(*key), a.map(|e| EventNid(*e)), b.map(|e| EventNid(*e))))
                .collect();
            prop_assert_eq!(map(&left).diff(&map(&right)), expected);
            prop_assert_eq!(map(&left) == map(&right), left == right);
        }

        #[test]
        fn what_was_saved_is_read_back(first in entries(), second in entries()) {
            let mut disk = BTreeMap::new();
            let mut ours = map(&first);
            save(&ours, &mut disk);
            ours.extend(map(&second).iter());
            save(&ours, &mut disk);
            let id = ours.root().and_then(|root| root.stored_id());
            let read = StateMap::from_root(id.map(|id| load(id, &disk).unwrap()));
            prop_assert_eq!(read.len(), ours.len());
            prop_assert!(read.same(&ours));
            prop_assert_eq!(read.iter().collect::<Vec<_>>(), ours.iter().collect::<Vec<_>>());
        }

        #[test]
        fn bytes_that_are_no_node_are_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let leaf = StateMap::from_iter([(KeyNid(3), EventNid(5))]).root().unwrap().clone();
            if let Ok(node) = Node::decode::<BadNode>(&bytes, &mut |_| Ok(leaf.clone())) {
                let map = StateMap::from_root(Some(Arc::new(node)));
                prop_assert_eq!(map.iter().count(), map.len());
            }
        }
    }

    #[test]
    fn one_change_in_a_hundred_thousand_keys_is_under_two_kibibytes() {
        let mut disk = BTreeMap::new();
        let base = 3_000_000_000_000;
        let mut ours: StateMap = (0..100_000)
            .map(|key| {
                (
                    KeyNid(key),
                    EventNid(base + i64::from(key) * 977 % 1_000_000),
                )
            })
            .collect();
        save(&ours, &mut disk);
        let before = ours.clone();
        for (key, event) in [(31_337, base + 5_000_000), (100_000, base + 5_000_001)] {
            ours.insert(KeyNid(key), EventNid(event));
            let bytes = save(&ours, &mut disk);
            assert!((1..2048).contains(&bytes), "{bytes} bytes");
        }
        assert_eq!(before.diff(&ours).len(), 2);
        ours.insert(KeyNid(31_337), EventNid(base + 5_000_000));
        assert_eq!(
            save(&ours, &mut disk),
            0,
            "nothing changed, so nothing to save"
        );
    }

    #[test]
    fn a_changed_node_is_no_longer_the_stored_one() {
        let mut ours = StateMap::from_iter([(KeyNid(1), EventNid(1))]);
        save(&ours, &mut BTreeMap::new());
        let before = ours.clone();
        ours.insert(KeyNid(1), EventNid(2));
        assert!(!ours.same(&before));
        assert_eq!(ours.root().unwrap().stored_id(), None);
        assert_eq!(before.root().unwrap().stored_id(), Some(1));
        drop(before);
        save(&ours, &mut BTreeMap::new());
        ours.insert(KeyNid(1), EventNid(3));
        assert_eq!(ours.root().unwrap().stored_id(), None, "changed in place");
    }

    #[test]
    fn a_difference_does_not_enter_what_is_stored_as_the_same_node() {
        let mut disk = BTreeMap::new();
        let ours: StateMap = (0..5000).map(|n| (KeyNid(n), EventNid(n.into()))).collect();
        save(&ours, &mut disk);
        let id = ours.root().unwrap().stored_id().unwrap();
        let mut read = StateMap::from_root(Some(load(id, &disk).unwrap()));
        assert!(ours.same(&read));
        read.insert(KeyNid(4000), EventNid(7));
        assert_eq!(
            ours.diff(&read),
            [(KeyNid(4000), Some(EventNid(4000)), Some(EventNid(7)))]
        );
        assert_eq!(read.only([KeyNid(4000), KeyNid(9999)]).len(), 1);
    }
}
