//! The ids that a fetch is about, and what is known of each. A large room has hundreds of thousands.

use std::collections::BTreeMap;

use protocol::id::EventId;

use crate::effect::Known;

/// What is known of an id.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Entry {
    pub known: Option<Known>,
    /// On its way to the store.
    pub coming: bool,
    /// Part of the state, of an auth chain, or asked for by name; others came as what such events stand on.
    pub wanted: bool,
    /// The sources that named it, a bit for each. Two are asked at most.
    named: u8,
    /// The sources in whose state it is.
    state: u8,
}

impl Entry {
    /// In a state, and not only in an auth chain.
    pub fn is_state(&self) -> bool {
        self.state != 0
    }

    /// Stored, or on its way there.
    pub fn is_here(&self) -> bool {
        self.coming || self.known.is_some()
    }
}

#[derive(Debug, Default)]
pub(super) struct Ids {
    /// What came in lists, in the order of the ids.
    listed: Vec<(EventId, Entry)>,
    /// The beginnings of these ids, which stay in the processor's cache when a room's ids do not.
    beginnings: Vec<u64>,
    /// Where among these those begin that have the same two characters in front, and the end; empty for few ids.
    fronts: Vec<u32>,
    /// What came one by one.
    single: BTreeMap<EventId, Entry>,
    wanted: usize,
    stored: usize,
    /// Wanted, and not looked for in the store so far.
    unsure: Vec<EventId>,
}

impl Ids {
    /// A source's state and auth chain.
    pub fn add_source(&mut self, source: usize, state: Vec<EventId>, chain: Vec<EventId>) {
        let bit = 1 << source;
        let entry = |state| Entry {
            wanted: true,
            named: bit,
            state,
            ..Entry::default()
        };
        let state = state.into_iter().map(|id| (id, entry(bit)));
        let chain = chain.into_iter().map(|id| (id, entry(0)));
        let before = std::mem::take(&mut self.listed);
        let mut all: Vec<_> = before.into_iter().chain(state).chain(chain).collect();
        all.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        all.dedup_by(|(id, later), (first, entry)| {
            let same = id == first;
            if same {
                entry.known = entry.known.or(later.known);
                entry.coming |= later.coming;
                entry.named |= later.named;
                entry.state |= later.state;
                entry.wanted |= later.wanted;
            }
            same
        });
        self.beginnings = all.iter().map(|(id, _)| beginning(id)).collect();
        self.fronts = fronts(&self.beginnings);
        self.listed = all;
        let mut new = Vec::new();
        for (id, entry) in &mut self.listed {
            if let Some(single) = self.single.remove(id) {
                entry.known = single.known;
                entry.coming = single.coming;
                entry.named |= single.named;
                entry.state |= single.state;
                if single.wanted {
                    continue;
                }
            } else if entry.named != bit {
                continue;
            }
            new.push(id.clone());
        }
        self.wanted += new.len();
        self.unsure.append(&mut new);
    }

    /// This one is wanted, if it was not before.
    pub fn want(&mut self, id: &EventId) {
        let entry = self.entry(id);
        if !std::mem::replace(&mut entry.wanted, true) {
            self.wanted += 1;
            self.unsure.push(id.clone());
        }
    }

    /// It is in the state that this source gives.
    pub fn in_state(&mut self, source: usize, id: &EventId) {
        self.entry(id).state |= 1 << source;
    }

    /// It is judged, and on its way to the store.
    pub fn comes(&mut self, id: &EventId) {
        self.entry(id).coming = true;
    }

    pub fn store(&mut self, id: &EventId, known: Known) {
        let entry = self.entry(id);
        entry.coming = false;
        if entry.known.replace(known).is_none() {
            self.stored += 1;
        }
    }

    pub fn is_wanted(&self, id: &EventId) -> bool {
        self.get(id).is_some_and(|entry| entry.wanted)
    }

    pub fn stored(&self, id: &EventId) -> Option<&Known> {
        self.get(id)?.known.as_ref()
    }

    pub fn is_stored(&self, id: &EventId) -> bool {
        self.stored(id).is_some()
    }

    /// Whether another copy would be of no use.
    pub fn is_here(&self, id: &EventId) -> bool {
        self.get(id).is_some_and(Entry::is_here)
    }

    pub fn is_named_by(&self, source: usize, id: &EventId) -> bool {
        self.get(id)
            .is_some_and(|entry| entry.named & (1 << source) != 0)
    }

    pub fn wanted_count(&self) -> usize {
        self.wanted
    }

    pub fn stored_count(&self) -> usize {
        self.stored
    }

    /// The wanted ones, each once, in the order of the ids but for those that came one by one.
    pub fn wanted(&self) -> impl Iterator<Item = (&EventId, &Entry)> {
        self.iter().filter(|(_, entry)| entry.wanted)
    }

    /// What is in the state that this source gives.
    pub fn state_of(&self, source: usize) -> impl Iterator<Item = (&EventId, &Entry)> {
        self.iter()
            .filter(move |(_, entry)| entry.state & (1 << source) != 0)
    }

    /// Those that are to be looked for in the store; they are given once.
    pub fn take_unsure(&mut self) -> Vec<EventId> {
        let mut unsure = std::mem::take(&mut self.unsure);
        unsure.retain(|id| !self.is_stored(id));
        unsure
    }

    fn iter(&self) -> impl Iterator<Item = (&EventId, &Entry)> {
        let listed = self.listed.iter().map(|(id, entry)| (id, entry));
        listed.chain(&self.single)
    }

    pub fn get(&self, id: &EventId) -> Option<&Entry> {
        match self.place(id) {
            Some(place) => Some(&self.listed[place].1),
            None => self.single.get(id),
        }
    }

    fn entry(&mut self, id: &EventId) -> &mut Entry {
        match self.place(id) {
            Some(place) => &mut self.listed[place].1,
            None => self.single.entry(id.clone()).or_default(),
        }
    }

    fn place(&self, id: &EventId) -> Option<usize> {
        let wanted = beginning(id);
        let front = front(wanted);
        let range = match self.fronts.get(front..front + 2) {
            Some(&[from, to]) => from as usize..to as usize,
            _ => 0..self.beginnings.len(),
        };
        let near = &self.beginnings[range.clone()];
        let from = range.start + near.partition_point(|other| *other < wanted);
        let rest = &self.beginnings[from..range.end];
        // One, where ids are hashes.
        let alike = match rest {
            [first, second, ..] if *first == wanted && *second == wanted => {
                rest.partition_point(|other| *other == wanted)
            }
            [first, ..] if *first == wanted => 1,
            _ => return None,
        };
        let place = self.listed[from..from + alike].binary_search_by(|(other, _)| other.cmp(id));
        Some(from + place.ok()?)
    }
}

/// The first characters of an id after its sigil, as a number that is in the order of the ids.
fn beginning(id: &EventId) -> u64 {
    let text = id.as_str().as_bytes();
    let mut bytes = [0; 8];
    for (byte, character) in bytes.iter_mut().zip(text.iter().skip(1)) {
        *byte = *character;
    }
    u64::from_be_bytes(bytes)
}

/// From so many ids on they are looked for by the two characters in front.
const FRONTS_FROM: usize = 2_000;
const ASCII_PRINTED: usize = 96;
const FRONTS: usize = ASCII_PRINTED * ASCII_PRINTED;

/// The two characters in front as a number that is in the order of the ids. Hashes are in printed ASCII; whatever is
/// not comes to its ends.
fn front(beginning: u64) -> usize {
    let [first, second, ..] = beginning.to_be_bytes();
    let printed = |byte: u8| usize::from(byte.clamp(0x20, 0x7f)) - 0x20;
    match first {
        ..0x20 => 0,
        0x20..0x80 => printed(first) * ASCII_PRINTED + printed(second),
        0x80.. => FRONTS - 1,
    }
}

fn fronts(beginnings: &[u64]) -> Vec<u32> {
    if beginnings.len() < FRONTS_FROM || u32::try_from(beginnings.len()).is_err() {
        return Vec::new();
    }
    let mut at = 0;
    let mut fronts = Vec::with_capacity(FRONTS + 1);
    for wanted in 0..FRONTS {
        while beginnings
            .get(at)
            .is_some_and(|other| front(*other) < wanted)
        {
            at += 1;
        }
        fronts.push(at as u32);
    }
    fronts.push(beginnings.len() as u32);
    fronts
}

#[cfg(test)]
mod tests {
    use protocol::nid::EventNid;

    use super::*;
    use crate::effect::Place;

    fn id(name: &str) -> EventId {
        EventId::parse(&format!("${name}:a.test")).unwrap()
    }

    fn known(nid: i64) -> Known {
        Known {
            nid: EventNid(nid),
            key: None,
            place: Place::Outlier,
            rejected: false,
            partial: false,
        }
    }

    fn names<'a>(of: impl Iterator<Item = (&'a EventId, &'a Entry)>) -> Vec<&'a str> {
        let ids = of.map(|(id, _)| id.as_str());
        ids.map(|id| &id[1..id.len() - ":a.test".len()]).collect()
    }

    #[test]
    fn what_two_sources_name_is_wanted_and_looked_for_once() {
        let mut ids = Ids::default();
        ids.want(&id("d"));
        ids.store(&id("x"), known(1));
        ids.add_source(
            0,
            vec![id("c"), id("a"), id("a")],
            vec![id("b"), id("d"), id("x")],
        );
        assert_eq!(ids.take_unsure(), [id("d"), id("a"), id("b"), id("c")]);
        ids.store(&id("a"), known(2));
        ids.add_source(1, vec![id("e"), id("a")], vec![id("b")]);
        assert_eq!(ids.take_unsure(), [id("e")]);
        assert_eq!((ids.wanted_count(), ids.stored_count()), (6, 2));
        assert_eq!(names(ids.wanted()), ["a", "b", "c", "d", "e", "x"]);
        assert_eq!(names(ids.state_of(0)), ["a", "c"]);
        assert_eq!(names(ids.state_of(1)), ["a", "e"]);
        assert!(ids.is_named_by(0, &id("b")) && ids.is_named_by(1, &id("b")));
        assert!(!ids.is_named_by(1, &id("c")));
        assert!(ids.is_stored(&id("a")) && ids.is_stored(&id("x")) && !ids.is_stored(&id("b")));
    }

    #[test]
    fn ids_that_begin_alike_are_told_apart() {
        let names = ["a", "abcdefgh", "abcdefgh1", "abcdefgh2", "abcdefgi", "b"];
        let mut ids = Ids::default();
        ids.add_source(
            0,
            names.iter().rev().map(|name| id(name)).collect(),
            Vec::new(),
        );
        for (nid, name) in names.iter().enumerate() {
            ids.store(&id(name), known(nid as i64));
        }
        for (nid, name) in names.iter().enumerate() {
            assert_eq!(ids.stored(&id(name)), Some(&known(nid as i64)));
        }
        assert_eq!(ids.stored_count(), names.len());
        assert!(!ids.is_wanted(&id("abcdefgh3")) && !ids.is_wanted(&id("c")));
    }

    #[test]
    fn ids_of_all_characters_are_found_in_a_long_list() {
        let characters = "\u{1}\u{2} -0:AZ_az~\u{7f}éß";
        let mut texts = Vec::new();
        for first in characters.chars() {
            for second in characters.chars() {
                texts.extend((0..20).map(|number| format!("{first}{second}{number}")));
            }
        }
        let all: Vec<_> = texts.iter().map(|text| id(text)).collect();
        let (there, missing) = all.split_at(all.len() * 3 / 4);
        let mut ids = Ids::default();
        ids.add_source(0, there.iter().rev().cloned().collect(), Vec::new());
        assert!(!ids.fronts.is_empty());
        assert!(there.iter().all(|id| ids.is_wanted(id)));
        assert!(!missing.iter().any(|id| ids.is_wanted(id)));
        let mut ids = Ids::default();
        ids.add_source(0, missing.to_vec(), Vec::new());
        assert!(ids.fronts.is_empty() && missing.iter().all(|id| ids.is_wanted(id)));
    }

    #[test]
    fn an_id_that_is_only_stored_is_not_wanted() {
        let mut ids = Ids::default();
        ids.store(&id("a"), known(1));
        assert!(!ids.is_wanted(&id("a")));
        assert_eq!(ids.stored(&id("a")), Some(&known(1)));
        ids.want(&id("a"));
        assert!(ids.take_unsure().is_empty());
        ids.in_state(0, &id("a"));
        assert_eq!(names(ids.state_of(0)), ["a"]);
    }
}
