//! Random rooms, judged and resolved here and by ruma-state-res. A seed that disagrees prints itself.
//!
//! It has no resolution of version 1; that is held against the printed rules, followed to the letter.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use protocol::auth;
use protocol::nid::EventNid;
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::state::StateMap;
use ruma_common::room_version_rules::RoomVersionRules;
use ruma_common::{
    EventId, MilliSecondsSinceUnixEpoch, OwnedEventId, OwnedRoomId, OwnedUserId, RoomId,
    RoomVersionId, UserId,
};
use ruma_events::{StateEventType, TimelineEventType};
use ruma_state_res::utils::event_id_set::EventIdSet;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::world::{Draft, World, draft};

const SEEDS: u64 = 24;
const STEPS: usize = 45;
const USERS: [&str; 6] = [
    "@a:one", "@b:one", "@c:two", "@d:two", "@e:three", "@f:three",
];

#[test]
fn v1_agrees() {
    check(&[RoomVersion::V1]);
}

#[test]
fn v2_and_v3_agree() {
    check(&[RoomVersion::V2, RoomVersion::V3]);
}

#[test]
fn v4_and_v5_agree() {
    check(&[RoomVersion::V4, RoomVersion::V5]);
}

#[test]
fn v6_agrees() {
    check(&[RoomVersion::V6]);
}

#[test]
fn v7_agrees() {
    check(&[RoomVersion::V7]);
}

#[test]
fn v8_and_v9_agree() {
    check(&[RoomVersion::V8, RoomVersion::V9]);
}

#[test]
fn v10_agrees() {
    check(&[RoomVersion::V10]);
}

#[test]
fn v11_agrees() {
    check(&[RoomVersion::V11]);
}

#[test]
fn v12_agrees() {
    check(&[RoomVersion::V12]);
}

fn check(versions: &[RoomVersion]) {
    let mut resolved = 0;
    let mut refused = 0;
    for (version, seed) in versions
        .iter()
        .flat_map(|v| (0..SEEDS).map(move |seed| (*v, seed)))
    {
        let mut run = Run::new(version, seed);
        run.found();
        for _ in 0..STEPS {
            run.step();
        }
        run.resolve_any();
        resolved += run.resolved;
        refused += run.refused;
    }
    // Otherwise the rooms were too tame to show anything.
    assert!(resolved as u64 > SEEDS * 5, "{resolved} conflicts resolved");
    assert!(refused as u64 > SEEDS * 5, "{refused} events refused");
}

struct Run {
    world: World,
    theirs: Vec<Arc<Theirs>>,
    rules: RoomVersionRules,
    random: u64,
    seed: u64,
    names: u32,
    resolved: usize,
    refused: usize,
}

impl Run {
    fn new(version: RoomVersion, seed: u64) -> Self {
        let id = RoomVersionId::try_from(version.as_str()).unwrap();
        Self {
            world: World::new(version),
            theirs: Vec::new(),
            rules: id.rules().unwrap(),
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ version as u64,
            seed,
            names: 0,
            resolved: 0,
            refused: 0,
        }
    }

    fn version(&self) -> RoomVersion {
        self.world.version
    }

    /// splitmix64
    fn below(&mut self, end: usize) -> usize {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % end as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn user(&mut self) -> &'static str {
        USERS[self.below(USERS.len())]
    }

    /// Ids that do not sort by age.
    fn name(&mut self) -> String {
        self.names += 1;
        format!("{:04x}{:03}", self.below(0x10000), self.names)
    }

    fn found(&mut self) {
        let old = self.version() <= RoomVersion::V10;
        let mut create = json!({"room_version": self.version().as_str()});
        if old {
            create["creator"] = "@a:one".into();
        }
        if self.one_in(8) {
            create["m.federate"] = false.into();
        }
        if self.version() == RoomVersion::V12 && self.one_in(2) {
            create["additional_creators"] = json!(["@c:two"]);
        }
        let mut users = json!({"@b:one": 50, "@d:two": 100});
        if self.version() <= RoomVersion::V11 {
            users["@a:one"] = 100.into();
        }
        let rule = self.join_rule();
        let begin = [
            draft("create", "@a:one", "m.room.create", Some(""), create),
            draft(
                "a",
                "@a:one",
                "m.room.member",
                Some("@a:one"),
                json!({"membership": "join"}),
            ),
            draft(
                "levels",
                "@a:one",
                "m.room.power_levels",
                Some(""),
                json!({"users": users}),
            ),
            draft(
                "public",
                "@a:one",
                "m.room.join_rules",
                Some(""),
                json!({"join_rule": "public"}),
            ),
            draft(
                "b",
                "@b:one",
                "m.room.member",
                Some("@b:one"),
                json!({"membership": "join"}),
            ),
            draft(
                "c",
                "@c:two",
                "m.room.member",
                Some("@c:two"),
                json!({"membership": "join"}),
            ),
            draft(
                "d",
                "@d:two",
                "m.room.member",
                Some("@d:two"),
                json!({"membership": "join"}),
            ),
            draft(
                "rule",
                "@a:one",
                "m.room.join_rules",
                Some(""),
                json!({"join_rule": rule}),
            ),
        ];
        let mut last: Option<String> = None;
        for mut event in begin {
            event.prev = last.iter().cloned().collect();
            let state = self.world.before(&event.prev);
            event.auth = self.world.choose_auth(&event, &state);
            event.ts = self.names.into();
            if self.judge(&event, &state) {
                last = Some(event.id.clone());
                self.add(&event, false);
            }
        }
    }

    fn add(&mut self, event: &Draft, rejected: bool) {
        let nid = self.world.add(event, rejected);
        self.theirs
            .push(Arc::new(Theirs::of(&self.world.entry(nid).pdu, rejected)));
    }

    fn step(&mut self) {
        let mut prev = BTreeSet::new();
        let known = self.world.entries.len();
        for _ in 0..1 + self.below(3) {
            let back = 1 + self.below(known.min(9));
            prev.insert(self.world.word(EventNid((known - back) as i64)));
        }
        let prev: Vec<_> = prev.into_iter().collect();
        let maps: Vec<_> = prev
            .iter()
            .map(|id| self.world.entry(self.world.nid(id)).after.clone())
            .collect();
        self.compare_resolution(&maps);
        let state = self.world.before(&prev);
        let mut event = self.action(&state);
        event.id = self.name();
        event.prev = prev;
        event.ts = 100 + (self.names / 4) as i64 + self.below(3) as i64;
        event.auth = self.world.choose_auth(&event, &state);
        self.compare_selection(&event);
        if self.one_in(8) {
            self.spoil(&mut event);
        }
        let by_auth = self.judge_by_auth(&event);
        let by_state = self.judge(&event, &state);
        if by_auth && (by_state || self.one_in(3)) {
            self.add(&event, !by_state);
        }
        if by_auth && self.one_in(6) {
            self.compare_partial(&event, &state);
        }
    }

    /// P-11: the state we have against the one that the event claims.
    fn compare_partial(&mut self, event: &Draft, state: &StateMap) {
        let mut claimed: Vec<&str> = event.auth.iter().map(String::as_str).collect();
        if self.version() == RoomVersion::V12 {
            claimed.push("create");
        }
        let claimed = self.world.map(&claimed);
        self.compare_resolution(&[state.clone(), claimed]);
    }

    /// Any states at all, and in the end with some events judged otherwise: what a server rejects against
    /// the state before may all the same stand in a state that another gave it.
    fn resolve_any(&mut self) {
        for round in 0..8 {
            if round > 4 {
                let event = self.below(self.world.entries.len());
                // Where there is no join rule, we differ: see `action`.
                if &*self.world.entries[event].pdu.kind != "m.room.join_rules" {
                    self.world.entries[event].rejected = true;
                    Arc::make_mut(&mut self.theirs[event]).rejected = true;
                }
            }
            let many = 2 + self.below(3);
            let maps: Vec<_> = (0..many)
                .map(|_| {
                    let event = self.below(self.world.entries.len());
                    self.world.entries[event].after.clone()
                })
                .collect();
            self.compare_resolution(&maps);
        }
    }

    /// Something that somebody might do, allowed or not.
    fn action(&mut self, state: &StateMap) -> Draft {
        let sender = self.user();
        let other = self.user();
        let has_rule = self.world.at(state, "m.room.join_rules", "").is_some();
        let member = |state_key: &str, membership: &str| {
            let content = json!({"membership": membership});
            draft("", sender, "m.room.member", Some(state_key), content)
        };
        match self.below(24) {
            // Where there is no join rule, ruma refuses; we hold with V-23.
            0..=4 if has_rule => {
                let mut join = member(sender, "join");
                if self.one_in(2) {
                    join.content["join_authorised_via_users_server"] = self.user().into();
                }
                join
            }
            5 => member(sender, "leave"),
            6 | 7 => member(other, "leave"),
            8 | 9 => member(other, "ban"),
            10 | 11 => member(other, "invite"),
            12 if has_rule => member(sender, "knock"),
            13 => {
                let membership = ["join", "dance", "knock"][self.below(3)];
                let target = if has_rule { other } else { sender };
                match has_rule {
                    true => member(target, membership),
                    false => member(target, "dance"),
                }
            }
            14..=17 => self.change_levels(state, sender),
            18 | 19 => {
                let content = json!({"join_rule": self.join_rule()});
                draft("", sender, "m.room.join_rules", Some(""), content)
            }
            20 => draft("", sender, "m.custom", Some(other), json!({})),
            21 => {
                let token = ["t", "u"][self.below(2)];
                draft(
                    "",
                    sender,
                    "m.room.third_party_invite",
                    Some(token),
                    json!({}),
                )
            }
            22 => match self.below(4) {
                0 => draft(
                    "",
                    sender,
                    "m.room.redaction",
                    None,
                    json!({"redacts": "$x:one"}),
                ),
                1 => draft("", sender, "m.room.aliases", Some("one"), json!({})),
                2 => draft(
                    "",
                    sender,
                    "m.room.member",
                    None,
                    json!({"membership": "join"}),
                ),
                _ => draft("", sender, "m.room.message", None, json!({})),
            },
            _ => draft(
                "",
                sender,
                "m.room.topic",
                Some(""),
                json!({"topic": self.below(99)}),
            ),
        }
    }

    fn join_rule(&mut self) -> &'static str {
        let rules = [
            "public",
            "invite",
            "knock",
            "restricted",
            "knock_restricted",
            "private",
        ];
        rules[self.below(rules.len())]
    }

    fn change_levels(&mut self, state: &StateMap, sender: &str) -> Draft {
        let mut content = match self.world.at(state, "m.room.power_levels", "") {
            Some(levels) => levels.content_value(),
            None => json!({}),
        };
        for _ in 0..1 + self.below(2) {
            let level = json!([-1, 0, 25, 50, 51, 100, 101][self.below(7)]);
            let (section, key) = match self.below(10) {
                0..=5 => ("users", self.user()),
                6 => ("events", ["m.room.topic", "m.custom"][self.below(2)]),
                7 => ("notifications", "room"),
                _ => {
                    let named = ["ban", "kick", "invite", "redact", "users_default"];
                    ("", named[self.below(named.len())])
                }
            };
            if !section.is_empty() && content[section].is_null() {
                content[section] = json!({});
            }
            let place = match section {
                "" => &mut content,
                section => &mut content[section],
            };
            if self.one_in(4) {
                if let Some(entries) = place.as_object_mut() {
                    entries.remove(key);
                }
            } else {
                place[key] = match self.one_in(25) {
                    true => json!("50"),
                    false => level,
                };
            }
        }
        draft("", sender, "m.room.power_levels", Some(""), content)
    }

    /// Auth events that are missing, doubled or not asked for.
    fn spoil(&mut self, event: &mut Draft) {
        let place = self.below(event.auth.len().max(1));
        let any = self.below(self.world.entries.len());
        let any = self.world.word(EventNid(any as i64));
        match self.below(3) {
            0 if !event.auth.is_empty() => {
                event.auth.remove(place);
            }
            1 if !event.auth.is_empty() => event.auth.push(event.auth[place].clone()),
            _ => event.auth.push(any),
        }
    }

    // -- Comparisons ------------------------------------------------------------------------------

    fn compare_selection(&self, event: &Draft) {
        let pdu = self.world.pdu(event);
        let ours: BTreeSet<_> = auth::auth_types_of(&pdu)
            .into_iter()
            .map(|(kind, key)| (kind.to_string(), key.to_string()))
            .collect();
        let event = Theirs::of(&pdu, false);
        let theirs = ruma_state_res::auth_types_for_event(
            &event.kind,
            &event.sender,
            event.state_key.as_deref(),
            &event.content,
            &self.rules.authorization,
        );
        // It refuses malformed memberships here, we with the rules.
        if let Ok(theirs) = theirs {
            let theirs: BTreeSet<_> = theirs
                .into_iter()
                .map(|(kind, key)| (kind.to_string(), key))
                .collect();
            assert_eq!(ours, theirs, "seed {}: {event:?}", self.seed);
        }
    }

    fn fetch(&self, id: &EventId) -> Option<Arc<Theirs>> {
        let word = id.as_str().trim_start_matches('$');
        let word = word.strip_suffix(":one").unwrap_or(word);
        let nid = self.world.ids.get(word)?;
        Some(self.theirs[nid.0 as usize].clone())
    }

    fn judge(&mut self, event: &Draft, state: &StateMap) -> bool {
        let pdu = self.world.pdu(event);
        let ours = auth::check(self.version(), &pdu, &|kind, key| {
            self.world.at(state, kind, key)
        });
        let at = |kind: &StateEventType, key: &str| {
            let pdu = self.world.at(state, &kind.to_string(), key)?;
            self.fetch(<&EventId>::try_from(pdu.event_id.as_str()).unwrap())
        };
        let mut theirs = ruma_state_res::check_state_dependent_auth_rules(
            &self.rules.authorization,
            Theirs::of(&pdu, false),
            at,
        );
        if event.kind == "m.room.create" {
            theirs = ruma_state_res::check_state_independent_auth_rules(
                &self.rules.authorization,
                Theirs::of(&pdu, false),
                |id| self.fetch(id),
            );
        }
        assert_eq!(
            ours.is_ok(),
            theirs.is_ok(),
            "seed {} version {}: {event:?}: ours {ours:?}, theirs {theirs:?}",
            self.seed,
            self.version(),
        );
        self.refused += usize::from(ours.is_err());
        ours.is_ok()
    }

    fn judge_by_auth(&mut self, event: &Draft) -> bool {
        let pdu = self.world.pdu(event);
        let entries: Vec<_> = event
            .auth
            .iter()
            .map(|id| self.world.entry(self.world.nid(id)))
            .collect();
        let auth: Vec<_> = entries
            .iter()
            .map(|entry| (&*entry.pdu, entry.rejected))
            .collect();
        let create = self.world.entries[0].pdu.clone();
        let ours = auth::check_auth_events(self.version(), &pdu, Some(&create), &auth);
        let rules = &self.rules.authorization;
        let event = Theirs::of(&pdu, false);
        let theirs =
            ruma_state_res::check_state_independent_auth_rules(rules, &event, |id| self.fetch(id))
                .and_then(|()| {
                    let at = |kind: &StateEventType, key: &str| {
                        if *kind == StateEventType::RoomCreate {
                            return Some(self.theirs[0].clone());
                        }
                        let mut events = event.auth_events.iter().filter_map(|id| self.fetch(id));
                        events.find(|event| {
                            event.kind.to_string() == kind.to_string()
                                && event.state_key.as_deref() == Some(key)
                        })
                    };
                    // Auth events that lack the join rule: see `action`.
                    let joins = pdu.membership() == Some("join");
                    if joins && at(&StateEventType::RoomJoinRules, "").is_none() {
                        return ours.clone().map_err(|refused| refused.to_string());
                    }
                    ruma_state_res::check_state_dependent_auth_rules(rules, &event, at)
                });
        assert_eq!(
            ours.is_ok(),
            theirs.is_ok(),
            "seed {} version {}: {event:?} by its auth events: ours {ours:?}, theirs {theirs:?}",
            self.seed,
            self.version(),
        );
        self.refused += usize::from(ours.is_err());
        ours.is_ok()
    }

    fn compare_resolution(&mut self, maps: &[StateMap]) {
        if maps.iter().all(|map| *map == maps[0]) {
            return;
        }
        self.resolved += 1;
        let ours: BTreeMap<_, _> = self.named(&self.world.resolve(maps)).into_iter().collect();
        let theirs = match self.rules.state_res.v2_rules() {
            Some(_) => self.resolve_by_ruma(maps),
            None => self.resolve_as_printed(maps),
        };
        assert_eq!(
            ours,
            theirs,
            "seed {} version {}",
            self.seed,
            self.version()
        );
        let newest = maps.iter().flatten().map(|(_, event)| event).max();
        let own = self.world.resolve_with_own(maps, newest.unwrap());
        let own: BTreeMap<_, _> = self.named(&own).into_iter().collect();
        assert_eq!(own, theirs, "seed {} version {}", self.seed, self.version());
        // The order of the states says nothing.
        let mut turned = maps.to_vec();
        turned.rotate_left(1);
        assert_eq!(self.world.resolve(&turned), self.world.resolve(maps));
    }

    fn resolve_by_ruma(
        &self,
        maps: &[StateMap],
    ) -> BTreeMap<(StateEventType, String), OwnedEventId> {
        let their_maps: Vec<_> = maps.iter().map(|map| self.named(map)).collect();
        let chains = their_maps
            .iter()
            .map(|map| self.chain(map.values()))
            .collect();
        let theirs = ruma_state_res::resolve(
            &self.rules.authorization,
            self.rules.state_res.v2_rules().unwrap(),
            &their_maps,
            chains,
            |id| self.fetch(id),
            |conflicted| Some(self.between(conflicted.values().flatten().cloned().collect())),
        )
        .unwrap();
        theirs.into_iter().collect()
    }

    /// <https://spec.matrix.org/v1.18/rooms/v1/#state-resolution>
    ///
    /// What it leaves open is done as the servers do it that have such rooms: the keys of one type are settled
    /// by the state before any of them, and where no event is allowed the first of the list is taken.
    fn resolve_as_printed(
        &self,
        maps: &[StateMap],
    ) -> BTreeMap<(StateEventType, String), OwnedEventId> {
        let mut candidates: BTreeMap<(String, String), Vec<EventNid>> = BTreeMap::new();
        for (_, event) in maps.iter().flatten() {
            let pdu = &self.world.entry(event).pdu;
            let key = (
                pdu.kind.to_string(),
                pdu.state_key.as_deref().unwrap().to_owned(),
            );
            let events = candidates.entry(key).or_default();
            if !events.contains(&event) {
                events.push(event);
            }
        }
        let mut resolved: BTreeMap<(String, String), EventNid> = BTreeMap::new();
        candidates.retain(|key, events| {
            if events.len() == 1 {
                resolved.insert(key.clone(), events[0]);
            }
            events.len() > 1
        });
        for events in candidates.values_mut() {
            events.sort_by_key(|event| {
                use sha1::Digest as _;
                let pdu = &self.world.entry(*event).pdu;
                let hash: [u8; 20] = sha1::Sha1::digest(pdu.event_id.as_str()).into();
                (pdu.depth, std::cmp::Reverse(hash))
            });
        }
        let allowed = |event: EventNid, state: &BTreeMap<(String, String), EventNid>| {
            let pdu = &self.world.entry(event).pdu;
            let get = |kind: &str, key: &str| {
                let event = state.get(&(kind.to_owned(), key.to_owned()))?;
                let entry = self.world.entry(*event);
                (!entry.rejected).then(|| entry.pdu.clone())
            };
            auth::check(self.version(), pdu, &get).is_ok()
        };
        for kind in ["m.room.power_levels", "m.room.join_rules", "m.room.member"] {
            let before = resolved.clone();
            for (key, events) in candidates.iter().filter(|((of, _), _)| of == kind) {
                let mut state = before.clone();
                state.insert(key.clone(), events[0]);
                for event in &events[1..] {
                    if !allowed(*event, &state) {
                        break;
                    }
                    state.insert(key.clone(), *event);
                }
                resolved.insert(key.clone(), state[key]);
            }
            candidates.retain(|(of, _), _| of != kind);
        }
        let before = resolved.clone();
        for (key, events) in candidates {
            let last = events.iter().rev().find(|event| allowed(**event, &before));
            resolved.insert(key, *last.unwrap_or(&events[0]));
        }
        let named = resolved.into_iter().map(|((kind, key), event)| {
            let id = self.theirs[event.0 as usize].event_id.clone();
            ((StateEventType::from(kind.as_str()), key), id)
        });
        named.collect()
    }

    fn named(&self, map: &StateMap) -> HashMap<(StateEventType, String), OwnedEventId> {
        map.iter()
            .map(|(_, event)| {
                let pdu = &self.world.entry(event).pdu;
                let kind = StateEventType::from(&*pdu.kind);
                let state_key = pdu.state_key.as_deref().unwrap().to_owned();
                (
                    (kind, state_key),
                    self.theirs[event.0 as usize].event_id.clone(),
                )
            })
            .collect()
    }

    fn chain<'a>(&self, of: impl Iterator<Item = &'a OwnedEventId>) -> EventIdSet<OwnedEventId> {
        let mut found = EventIdSet::new();
        let mut left: Vec<OwnedEventId> = of.cloned().collect();
        while let Some(id) = left.pop() {
            for below in &self.fetch(&id).unwrap().auth_events {
                if found.insert(below.clone()) {
                    left.push(below.clone());
                }
            }
        }
        found
    }

    /// The conflicted state subgraph, the slow way: what is above an end and below one.
    fn between(&self, ends: BTreeSet<OwnedEventId>) -> EventIdSet<OwnedEventId> {
        let below = self.chain(ends.iter());
        let is_end_or_above = |id: &OwnedEventId| {
            ends.contains(id)
                || self
                    .chain([id].into_iter())
                    .iter()
                    .any(|id| ends.contains(id))
        };
        self.theirs
            .iter()
            .map(|event| event.event_id.clone())
            .filter(|id| (below.contains(id) || ends.contains(id)) && is_end_or_above(id))
            .collect()
    }
}

/// An event as ruma reads it.
#[derive(Clone, Debug)]
struct Theirs {
    event_id: OwnedEventId,
    room_id: Option<OwnedRoomId>,
    sender: OwnedUserId,
    ts: MilliSecondsSinceUnixEpoch,
    kind: TimelineEventType,
    content: Box<RawValue>,
    state_key: Option<String>,
    prev_events: Vec<OwnedEventId>,
    auth_events: Vec<OwnedEventId>,
    redacts: Option<OwnedEventId>,
    rejected: bool,
}

impl Theirs {
    fn of(pdu: &Pdu, rejected: bool) -> Self {
        let id = |id: &protocol::id::EventId| OwnedEventId::try_from(id.as_str()).unwrap();
        let named_by_hash = pdu.version.rules().room_id_is_create_hash;
        Self {
            event_id: id(&pdu.event_id),
            room_id: (!named_by_hash || &*pdu.kind != "m.room.create")
                .then(|| OwnedRoomId::try_from(pdu.room_id.as_str()).unwrap()),
            sender: OwnedUserId::try_from(pdu.sender.as_str()).unwrap(),
            ts: serde_json::from_value(Value::from(pdu.origin_server_ts)).unwrap(),
            kind: TimelineEventType::from(&*pdu.kind),
            content: RawValue::from_string(pdu.content().to_string()).unwrap(),
            state_key: pdu.state_key.as_deref().map(str::to_owned),
            prev_events: pdu.prev_events.iter().map(id).collect(),
            auth_events: pdu.auth_events.iter().map(id).collect(),
            redacts: pdu.redacts.as_deref().map(id),
            rejected,
        }
    }
}

impl ruma_state_res::Event for Theirs {
    type Id = OwnedEventId;

    fn event_id(&self) -> &OwnedEventId {
        &self.event_id
    }

    fn room_id(&self) -> Option<&RoomId> {
        self.room_id.as_deref()
    }

    fn sender(&self) -> &UserId {
        &self.sender
    }

    fn origin_server_ts(&self) -> MilliSecondsSinceUnixEpoch {
        self.ts
    }

    fn event_type(&self) -> &TimelineEventType {
        &self.kind
    }

    fn content(&self) -> &RawValue {
        &self.content
    }

    fn state_key(&self) -> Option<&str> {
        self.state_key.as_deref()
    }

    fn prev_events(&self) -> Box<dyn DoubleEndedIterator<Item = &OwnedEventId> + '_> {
        Box::new(self.prev_events.iter())
    }

    fn auth_events(&self) -> Box<dyn DoubleEndedIterator<Item = &OwnedEventId> + '_> {
        Box::new(self.auth_events.iter())
    }

    fn redacts(&self) -> Option<&OwnedEventId> {
        self.redacts.as_ref()
    }

    fn rejected(&self) -> bool {
        self.rejected
    }
}
