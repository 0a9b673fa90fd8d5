//! State resolution by example.

use protocol::event_set::EventSet;
use protocol::room_version::RoomVersion;
use protocol::state::StateMap;
use protocol::state_resolution::{resolve, state_from_events};
use serde_json::{Value, json};

use crate::world::{Draft, World, draft};

fn member(id: &str, sender: &str, target: &str, membership: &str) -> Draft {
    let content = json!({"membership": membership});
    draft(id, sender, "m.room.member", Some(target), content)
}

fn join(id: &str, user: &str) -> Draft {
    member(id, user, user, "join")
}

fn state(id: &str, sender: &str, kind: &str, content: Value) -> Draft {
    draft(id, sender, kind, Some(""), content)
}

fn levels(id: &str, sender: &str, users: Value) -> Draft {
    state(id, sender, "m.room.power_levels", json!({"users": users}))
}

fn rule(id: &str, sender: &str, rule: &str) -> Draft {
    state(id, sender, "m.room.join_rules", json!({"join_rule": rule}))
}

fn topic(id: &str, sender: &str, ts: i64) -> Draft {
    let mut topic = state(id, sender, "m.room.topic", json!({"topic": id}));
    topic.ts = ts;
    topic
}

/// Alice's public room, with her and whoever else has joined; the last event is `last`.
fn room(version: RoomVersion, users: Value, others: &[&str]) -> World {
    let mut world = World::new(version);
    let mut users = users;
    if version <= RoomVersion::V11 {
        users["@alice:one"] = 100.into();
    }
    let create = json!({"creator": "@alice:one", "room_version": version.as_str()});
    world.send(state("create", "@alice:one", "m.room.create", create), &[]);
    world.send(join("alice", "@alice:one"), &["create"]);
    world.send(levels("levels", "@alice:one", users), &["alice"]);
    world.send(rule("public", "@alice:one", "public"), &["levels"]);
    let mut last = "public".to_owned();
    for user in others {
        let id = user[1..].split(':').next().unwrap().to_owned();
        world.send(join(&id, user), &[&last]);
        last = id;
    }
    let note = state("last", "@alice:one", "m.room.name", json!({"name": "room"}));
    world.send(note, &[&last]);
    world
}

/// The state of a new event upon these.
fn upon(world: &World, ids: &[&str]) -> StateMap {
    let ids: Vec<_> = ids.iter().map(|id| (*id).to_owned()).collect();
    world.before(&ids)
}

fn id_at(world: &World, state: &StateMap, kind: &str, key: &str) -> String {
    let key = world.keys.get(&(kind.into(), key.into()));
    let event = key.and_then(|key| state.get(*key));
    event.map_or(String::new(), |event| world.word(event))
}

/// Versions 2 to 12.
fn second() -> impl Iterator<Item = RoomVersion> {
    RoomVersion::ALL.into_iter().skip(1)
}

/// Those before 2.1.
fn second_first() -> impl Iterator<Item = RoomVersion> {
    second().filter(|version| *version < RoomVersion::V12)
}

#[test]
fn nothing_to_resolve() {
    let none = EventSet::default();
    for version in RoomVersion::ALL {
        assert_eq!(resolve(version, &[], &none), StateMap::new());
        let world = room(version, json!({}), &[]);
        let state = upon(&world, &["last"]);
        let entries: Vec<_> = state.iter().collect();
        let again = state_from_events(&entries);
        assert_eq!(resolve(version, &[state.clone(), again], &none), state);
    }
}

#[test]
fn a_ban_beats_what_the_banned_user_did_meanwhile() {
    for version in second() {
        let mut world = room(version, json!({"@bob:two": 50}), &["@bob:two"]);
        world.send(member("ban", "@alice:one", "@bob:two", "ban"), &["last"]);
        world.send(topic("topic", "@bob:two", 1), &["last"]);
        let mut up = json!({"@bob:two": 50, "@carol:two": 50});
        if version <= RoomVersion::V11 {
            up["@alice:one"] = 100.into();
        }
        world.send(levels("up", "@bob:two", up), &["topic"]);
        let state = upon(&world, &["ban", "up"]);
        assert_eq!(id_at(&world, &state, "m.room.member", "@bob:two"), "ban");
        assert_eq!(id_at(&world, &state, "m.room.topic", ""), "");
        assert_eq!(id_at(&world, &state, "m.room.power_levels", ""), "levels");
    }
}

#[test]
fn of_equals_the_later_wins() {
    for version in second() {
        let mut world = room(version, json!({"@bob:two": 50}), &["@bob:two"]);
        world.send(topic("early", "@bob:two", 10), &["last"]);
        world.send(topic("late", "@alice:one", 11), &["last"]);
        let state = upon(&world, &["early", "late"]);
        assert_eq!(id_at(&world, &state, "m.room.topic", ""), "late");
        // By name where the time is the same.
        world.send(topic("a", "@alice:one", 20), &["last"]);
        world.send(topic("b", "@bob:two", 20), &["last"]);
        let state = upon(&world, &["b", "a"]);
        assert_eq!(id_at(&world, &state, "m.room.topic", ""), "b");
    }
}

#[test]
fn what_stands_on_later_levels_wins_whatever_its_time() {
    for version in second() {
        let mut world = room(version, json!({"@bob:two": 50}), &["@bob:two"]);
        world.send(topic("old", "@bob:two", 99), &["last"]);
        let mut users = json!({"@bob:two": 60});
        if version <= RoomVersion::V11 {
            users["@alice:one"] = 100.into();
        }
        world.send(levels("levels2", "@alice:one", users), &["last"]);
        world.send(topic("new", "@alice:one", 1), &["levels2"]);
        let state = upon(&world, &["old", "new"]);
        assert_eq!(id_at(&world, &state, "m.room.power_levels", ""), "levels2");
        assert_eq!(id_at(&world, &state, "m.room.topic", ""), "new");
    }
}

#[test]
fn the_more_powerful_goes_first_and_the_other_is_held_against_it() {
    for version in second() {
        let mut world = room(version, json!({"@bob:two": 50}), &["@bob:two"]);
        let full = |mut users: Value| {
            if version <= RoomVersion::V11 {
                users["@alice:one"] = 100.into();
            }
            users
        };
        let mut down = levels("down", "@alice:one", full(json!({"@bob:two": 0})));
        down.ts = 9;
        world.send(down, &["last"]);
        let carol = full(json!({"@bob:two": 50, "@carol:two": 50}));
        world.send(levels("friends", "@bob:two", carol), &["last"]);
        world.send(topic("topic", "@bob:two", 20), &["friends"]);
        let state = upon(&world, &["friends", "topic", "down"]);
        assert_eq!(id_at(&world, &state, "m.room.power_levels", ""), "down");
        assert_eq!(id_at(&world, &state, "m.room.topic", ""), "");
    }
}

/// Levels with which Bob and Carol may do as much as Alice, and one thing more.
fn shared_levels(version: RoomVersion, id: &str, sender: &str, thing: &str) -> Draft {
    let mut users = json!({"@bob:two": 100, "@carol:two": 100});
    if version <= RoomVersion::V11 {
        users["@alice:one"] = 100.into();
    }
    let content = json!({"users": users, "events": {thing: 1}});
    state(id, sender, "m.room.power_levels", content)
}

#[test]
fn v18_of_equal_power_the_earlier_goes_first_then_the_smaller_id() {
    for version in second() {
        let users = json!({"@bob:two": 100, "@carol:two": 100});
        let mut world = room(version, users, &["@bob:two", "@carol:two"]);
        for (id, sender, ts) in [
            ("b", "@bob:two", 20),
            ("c", "@carol:two", 10),
            ("d", "@carol:two", 20),
        ] {
            let mut event = shared_levels(version, id, sender, id);
            event.ts = ts;
            world.send(event, &["last"]);
        }
        // Both are allowed upon the other, so the one that goes last stands.
        for (prev, wins) in [(["b", "c"], "b"), (["b", "d"], "d"), (["c", "d"], "d")] {
            let state = upon(&world, &prev);
            assert_eq!(id_at(&world, &state, "m.room.power_levels", ""), wins);
        }
    }
}

#[test]
fn v18_what_stands_on_no_levels_goes_first_whatever_its_time() {
    for version in second() {
        let mut world = World::new(version);
        let create = json!({"creator": "@alice:one", "room_version": version.as_str()});
        world.send(state("create", "@alice:one", "m.room.create", create), &[]);
        world.send(join("alice", "@alice:one"), &["create"]);
        world.send(topic("first", "@alice:one", 99), &["alice"]);
        let mut users = json!({});
        if version <= RoomVersion::V11 {
            users["@alice:one"] = 100.into();
        }
        world.send(levels("levels", "@alice:one", users), &["first"]);
        world.send(topic("second", "@alice:one", 1), &["levels"]);
        let old = world.map(&["create", "alice", "first", "levels"]);
        let new = world.map(&["create", "alice", "second", "levels"]);
        let state = world.resolve(&[old, new]);
        assert_eq!(id_at(&world, &state, "m.room.topic", ""), "second");
    }
}

#[test]
fn v18_what_the_state_lacks_an_event_brings_along_unless_that_was_rejected() {
    for version in second() {
        let mut world = room(version, json!({"@bob:two": 50}), &["@bob:two"]);
        // In both states, so that Bob's join is in no difference.
        let note = state("note", "@bob:two", "m.room.avatar", json!({"url": "x"}));
        world.send(note, &["last"]);
        world.send(topic("topic", "@bob:two", 1), &["note"]);
        let common = ["create", "alice", "levels", "public", "note"];
        let without = world.map(&common);
        let with = world.map(&[&common[..], &["topic"]].concat());
        let maps = [without, with];
        let state = world.resolve(&maps);
        assert_eq!(id_at(&world, &state, "m.room.topic", ""), "topic");
        let bob = world.nid("bob");
        world.entries[bob.0 as usize].rejected = true;
        let state = world.resolve(&maps);
        assert_eq!(id_at(&world, &state, "m.room.topic", ""), "");
    }
}

#[test]
fn v18_an_event_that_fails_is_left_out_and_the_others_go_on() {
    for version in second() {
        let users = json!({"@bob:two": 50, "@carol:two": 50});
        let mut world = room(version, users, &["@bob:two", "@carol:two"]);
        world.send(member("kick", "@alice:one", "@bob:two", "leave"), &["last"]);
        world.send(topic("topic", "@bob:two", 9), &["last"]);
        let name = state("name", "@carol:two", "m.room.name", json!({"name": "new"}));
        world.send(name, &["topic"]);
        let state = upon(&world, &["kick", "name"]);
        assert_eq!(id_at(&world, &state, "m.room.topic", ""), "");
        assert_eq!(id_at(&world, &state, "m.room.name", ""), "name");
        assert_eq!(id_at(&world, &state, "m.room.member", "@bob:two"), "kick");
    }
}

#[test]
fn v18_whoever_leaves_by_themselves_takes_nothing_from_anybody() {
    for version in second() {
        let mut world = room(version, json!({"@bob:two": 50}), &["@bob:two"]);
        let mut leave = member("leave", "@bob:two", "@bob:two", "leave");
        leave.ts = 9;
        world.send(leave, &["last"]);
        world.send(topic("topic", "@bob:two", 1), &["last"]);
        // No power event: by time, after the topic; had it been one, the topic would be gone.
        let state = upon(&world, &["leave", "topic"]);
        assert_eq!(id_at(&world, &state, "m.room.topic", ""), "topic");
        assert_eq!(id_at(&world, &state, "m.room.member", "@bob:two"), "leave");
    }
}

/// MSC4297, problem A: two servers whose states lack each other's newest memberships; one has an old join
/// rule on top of which the admin, who has left, can not be seen to have made the rooms private.
fn problem_a(version: RoomVersion) -> (World, StateMap) {
    let mut world = room(version, json!({}), &["@bob:two", "@charlie:three"]);
    let mut closed = rule("invite", "@alice:one", "invite");
    closed.ts = 6;
    world.send(closed, &["last"]);
    world.send(
        member("gone", "@alice:one", "@alice:one", "leave"),
        &["invite"],
    );
    for (id, user, ts) in [("bob2", "@bob:two", 8), ("charlie2", "@charlie:three", 9)] {
        let mut rejoin = join(id, user);
        rejoin.ts = ts;
        rejoin.content["displayname"] = "other".into();
        world.send(rejoin, &["gone"]);
    }
    let bob = world.map(&["create", "levels", "charlie", "invite", "gone", "bob2"]);
    let charlie = world.map(&["create", "levels", "public", "bob", "gone", "charlie2"]);
    let state = world.resolve(&[bob, charlie]);
    (world, state)
}

#[test]
fn msc4297_problem_a_version_2_loses_the_join_rule() {
    for version in second_first() {
        let (world, state) = problem_a(version);
        let expected = ["create", "levels", "gone", "bob2", "charlie2"];
        assert_eq!(world.words(&state), expected.map(str::to_owned).into());
    }
}

#[test]
fn msc4297_problem_a_version_2_1_keeps_it() {
    let (world, state) = problem_a(RoomVersion::V12);
    let expected = ["create", "levels", "gone", "invite", "bob2", "charlie2"];
    assert_eq!(world.words(&state), expected.map(str::to_owned).into());
}

/// MSC4297, problem B: one state has the first power levels, the other the third; the second, which links
/// them, is in both auth chains and so in no difference.
fn problem_b(version: RoomVersion) -> (World, StateMap) {
    let mut world = room(version, json!({}), &["@bob:two", "@charlie:three"]);
    let full = |mut users: Value| {
        if version <= RoomVersion::V11 {
            users["@alice:one"] = 100.into();
        }
        users
    };
    let bob = full(json!({"@bob:two": 50}));
    world.send(levels("levels2", "@alice:one", bob), &["last"]);
    let both = full(json!({"@bob:two": 50, "@charlie:three": 50}));
    world.send(levels("levels3", "@bob:two", both), &["levels2"]);
    world.send(join("zara", "@zara:four"), &["levels3"]);
    world.send(join("eve", "@eve:five"), &["levels3"]);
    let mut eve = join("eve2", "@eve:five");
    eve.content["displayname"] = "other".into();
    world.send(eve, &["eve"]);
    let common = ["create", "alice", "public", "bob", "charlie"];
    let theirs = world.map(&[&common[..], &["levels", "eve2"]].concat());
    let ours = world.map(&[&common[..], &["levels3", "zara"]].concat());
    let state = world.resolve(&[theirs, ours]);
    (world, state)
}

#[test]
fn msc4297_problem_b_version_2_falls_back_to_the_first_levels() {
    for version in second_first() {
        let (world, state) = problem_b(version);
        assert_eq!(id_at(&world, &state, "m.room.power_levels", ""), "levels");
    }
}

#[test]
fn msc4297_problem_b_version_2_1_finds_the_way() {
    let (world, state) = problem_b(RoomVersion::V12);
    assert_eq!(id_at(&world, &state, "m.room.power_levels", ""), "levels3");
    assert_eq!(id_at(&world, &state, "m.room.member", "@eve:five"), "eve2");
    assert_eq!(id_at(&world, &state, "m.room.member", "@zara:four"), "zara");
}

#[test]
fn p11_a_ban_we_know_of_beats_the_join_that_an_event_claims() {
    for version in second() {
        let mut world = room(version, json!({}), &["@bob:two", "@derek:two"]);
        world.send(member("ban", "@alice:one", "@bob:two", "ban"), &["last"]);
        // Derek's join is not known here.
        let mut known = world.map(&["create", "alice", "levels", "public", "ban"]);
        let claimed = world.map(&["create", "levels", "bob"]);
        let state = world.resolve(&[known.clone(), claimed]);
        assert_eq!(id_at(&world, &state, "m.room.member", "@bob:two"), "ban");
        let claimed = world.map(&["create", "levels", "derek"]);
        let state = world.resolve(&[known.clone(), claimed]);
        assert_eq!(
            id_at(&world, &state, "m.room.member", "@derek:two"),
            "derek"
        );
        known.extend(world.map(&["derek"]).iter());
        assert_eq!(state, known);
    }
}

#[test]
fn v19_a_set_that_lacks_events_still_resolves_to_something() {
    for version in RoomVersion::ALL {
        let mut world = room(version, json!({"@bob:two": 50}), &["@bob:two"]);
        world.send(member("ban", "@alice:one", "@bob:two", "ban"), &["last"]);
        world.send(topic("topic", "@bob:two", 1), &["last"]);
        let maps = [upon(&world, &["ban"]), upon(&world, &["topic"])];
        let whole = world.closure(&maps);
        for gone in whole.events.keys() {
            let mut set = whole.clone();
            set.events.remove(gone);
            set.keys.remove(&("m.room.topic".into(), "".into()));
            let state = resolve(version, &maps, &set);
            assert!(state.len() + 2 >= maps[0].len());
        }
        let state = resolve(version, &maps, &EventSet::default());
        assert!(state.len() >= 5, "what is not disputed stays");
    }
}

// -- Version 1 ------------------------------------------------------------------------------------

const V1: RoomVersion = RoomVersion::V1;

#[test]
fn v1_a_key_that_one_state_lacks_is_no_conflict() {
    let mut world = room(V1, json!({}), &["@bob:two"]);
    world.send(topic("topic", "@alice:one", 1), &["last"]);
    world.send(member("gone", "@bob:two", "@bob:two", "leave"), &["last"]);
    let state = upon(&world, &["topic", "gone"]);
    assert_eq!(id_at(&world, &state, "m.room.topic", ""), "topic");
    assert_eq!(id_at(&world, &state, "m.room.member", "@bob:two"), "gone");
}

#[test]
fn v1_of_the_others_the_deepest_allowed_wins() {
    let mut world = room(V1, json!({"@bob:two": 50}), &["@bob:two"]);
    world.send(topic("first", "@alice:one", 9), &["last"]);
    world.send(
        draft("note", "@alice:one", "m.room.message", None, json!({})),
        &["last"],
    );
    world.send(topic("deep", "@bob:two", 1), &["note"]);
    let state = upon(&world, &["first", "deep"]);
    assert_eq!(id_at(&world, &state, "m.room.topic", ""), "deep");
    // At the same depth the smaller SHA-1 of the id.
    world.send(topic("x1", "@alice:one", 1), &["last"]);
    world.send(topic("x2", "@bob:two", 1), &["last"]);
    let smaller = smaller_hash(&["x1", "x2"]);
    let state = upon(&world, &["x1", "x2"]);
    assert_eq!(id_at(&world, &state, "m.room.topic", ""), smaller);
}

#[test]
fn v1_levels_go_up_the_list_while_each_is_allowed_upon_the_last() {
    let mut world = room(V1, json!({"@bob:two": 50}), &["@bob:two"]);
    let users = json!({"@alice:one": 100, "@bob:two": 0});
    world.send(levels("down", "@alice:one", users), &["last"]);
    world.send(
        draft("note", "@bob:two", "m.room.message", None, json!({})),
        &["last"],
    );
    let users = json!({"@alice:one": 100, "@bob:two": 50, "@carol:two": 50});
    world.send(levels("friends", "@bob:two", users), &["note"]);
    world.send(topic("topic", "@bob:two", 1), &["friends"]);
    let state = upon(&world, &["down", "topic"]);
    assert_eq!(id_at(&world, &state, "m.room.power_levels", ""), "down");
    assert_eq!(id_at(&world, &state, "m.room.topic", ""), "topic");
}

#[test]
fn v1_members_and_join_rules_are_settled_by_the_levels_that_won() {
    let mut world = room(V1, json!({"@bob:two": 50}), &["@bob:two", "@carol:two"]);
    let users = json!({"@alice:one": 100, "@bob:two": 0});
    world.send(levels("down", "@alice:one", users), &["last"]);
    world.send(rule("open", "@alice:one", "public"), &["down"]);
    let renamed = json!({"membership": "join", "displayname": "C"});
    let mut renamed = draft("renamed", "@carol:two", "m.room.member", None, renamed);
    renamed.state_key = Some("@carol:two".to_owned());
    world.send(renamed, &["open"]);
    // Bob did not know that he had lost his power. His kick is the deepest.
    world.send(rule("invite", "@bob:two", "invite"), &["last"]);
    let mut last = "invite";
    for id in ["one", "two", "three"] {
        let note = draft(id, "@bob:two", "m.room.message", None, json!({}));
        world.send(note, &[last]);
        last = id;
    }
    let kick = member("kick", "@bob:two", "@carol:two", "leave");
    world.send(kick, &["three"]);
    let state = upon(&world, &["kick", "renamed"]);
    assert_eq!(id_at(&world, &state, "m.room.power_levels", ""), "down");
    assert_eq!(id_at(&world, &state, "m.room.join_rules", ""), "open");
    let carol = id_at(&world, &state, "m.room.member", "@carol:two");
    assert_eq!(carol, "renamed");
}

fn smaller_hash(words: &[&str]) -> String {
    use sha1::Digest as _;
    let hash = |word: &&&str| sha1::Sha1::digest(format!("${word}:one"));
    (*words.iter().min_by_key(hash).unwrap()).to_string()
}
