//! Rooms of version 12: U-35 to U-42.

use protocol::room_version::RoomVersion;
use serde_json::{Value, json};

use crate::dag::{Room, message, state};
use crate::resident::Resident;
use crate::stage::Stage;
use crate::ways::{content, forbidden, pair, put_out, set, state_path, until_event, until_member};
use crate::world::{Server, User, list, server, until};

/// The largest number that canonical JSON has.
const NUMBER_MAX: i64 = (1 << 53) - 1;

async fn room_of_12(creator: &User) -> String {
    let request = json!({ "preset": "public_chat", "room_version": "12" });
    creator.create_room(request).await
}

async fn set_levels(user: &User, room: &str, users: Value) -> (u16, Value) {
    let path = state_path(room, "m.room.power_levels", "");
    user.ask("PUT", &path, json!({ "users": users })).await
}

async fn three(server: &Server) -> [User; 3] {
    [
        server.register("alice").await,
        server.register("bob").await,
        server.register("charlie").await,
    ]
}

#[tokio::test]
async fn u_35_a_creator_is_not_among_the_powerful_and_is_above_them() {
    let server = server().await;
    let [alice, bob, _] = three(&server).await;
    let room = room_of_12(&alice).await;
    let levels = content(&alice, &room, "m.room.power_levels").await;
    assert_eq!(levels["users"], json!({}));
    assert_eq!(levels["events"]["m.room.tombstone"], 150);
    let refused = set_levels(&alice, &room, json!({ &alice.id: 100 })).await;
    assert_eq!(refused.0, 400);
    let beyond = json!({ &bob.id: NUMBER_MAX + 1 });
    assert_eq!(set_levels(&alice, &room, beyond).await.0, 400);

    for level in [100, 949_342, NUMBER_MAX] {
        bob.join(&room, "a.test").await;
        let set = set_levels(&alice, &room, json!({ &bob.id: level })).await;
        assert_eq!(set.0, 200, "{level}");
        let path = format!("/rooms/{room}/kick");
        let body = json!({ "user_id": alice.id });
        let refused = bob.refused("POST", &path, body).await;
        assert_eq!(refused, forbidden(), "{level}");
        put_out(&alice, "kick", &room, &bob.id).await;
    }
}

#[tokio::test]
async fn u_35_levels_may_be_given_when_a_room_is_created_but_not_to_its_creator() {
    let server = server().await;
    let [alice, bob, _] = three(&server).await;
    let request = |of: &User| {
        let levels = json!({ "users": { &of.id: 100 } });
        json!({ "room_version": "12", "power_level_content_override": levels })
    };
    let room = alice.create_room(request(&bob)).await;
    let levels = content(&alice, &room, "m.room.power_levels").await;
    assert_eq!(levels["users"], json!({ &bob.id: 100 }));
    let refused = alice.refused("POST", "/createRoom", request(&alice)).await;
    assert_eq!(refused.0, 400);
}

#[tokio::test]
async fn u_35_what_the_creator_did_is_resolved_before_what_the_powerful_did() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let room = room_of_12(&alice).await;
    let bob = stage.resident.user("bob");
    let here = &stage.here.name;
    let (theirs, _) = stage.resident.join(here, &room, &bob).await;
    let levels = json!({ "users": { &bob: 9_493_420 } });
    let levels = set(&alice, &room, "m.room.power_levels", "", levels).await;
    let levels = stage.resident.event(&levels).await;
    let rules = json!({ "join_rule": "invite" });
    let rules = set(&alice, &room, "m.room.join_rules", "", rules).await;

    // Bob has not heard of alice's rule. His is resolved after hers.
    let knock = json!({ "join_rule": "knock" });
    let knock = state(&bob, "m.room.join_rules", "", knock).after(&[&levels]);
    let knock = theirs.send(&stage.resident, knock);
    stage.tell(&[&knock]).await;
    until_event(&alice, &room, knock.event_id.as_str()).await;
    let now = content(&alice, &room, "m.room.join_rules").await;
    assert_eq!(now["join_rule"], "knock");
    stage.resident.event(&rules).await;
}

#[tokio::test]
async fn u_36_there_may_be_several_creators() {
    let server = server().await;
    let [alice, bob, charlie] = three(&server).await;
    let request = json!({
        "room_version": "12",
        "preset": "public_chat",
        "creation_content": { "additional_creators": [bob.id] },
    });
    let room = alice.create_room(request).await;
    bob.join(&room, "a.test").await;
    let kick = json!({ "user_id": bob.id });
    let path = format!("/rooms/{room}/kick");
    let refused = alice.refused("POST", &path, kick).await;
    assert_eq!(refused, forbidden());
    let name = json!({ "name": "Bob's room" });
    set(&bob, &room, "m.room.name", "", name).await;
    let refused = set_levels(&alice, &room, json!({ &bob.id: 100 })).await;
    assert_eq!(refused.0, 400);

    // Whom a trusted private chat invites becomes a creator, beside those that are named.
    for named in [json!([]), json!([charlie.id])] {
        let request = json!({
            "room_version": "12",
            "preset": "trusted_private_chat",
            "is_direct": true,
            "invite": [bob.id],
            "creation_content": { "additional_creators": named },
        });
        let room = alice.create_room(request).await;
        let create = content(&alice, &room, "m.room.create").await;
        let mut creators = list(&create["additional_creators"]).to_vec();
        creators.sort_by_key(Value::to_string);
        let mut expected = vec![json!(bob.id)];
        expected.extend(list(&named).iter().cloned());
        assert_eq!(creators, expected);
    }
}

#[tokio::test]
async fn u_36_creators_are_users() {
    let server = server().await;
    let alice = server.register("alice").await;
    for (creators, status) in [
        (json!("not-an-array"), 400),
        (json!(["@foo:example.com", 42]), 400),
        (json!(["@foo:example.com", "not-a-user-id"]), 400),
        (json!(["@invalid:dom$ain$.com"]), 400),
        (json!(["@foo:example.com", "@bar:baz.code"]), 200),
    ] {
        let request = json!({
            "room_version": "12",
            "creation_content": { "additional_creators": creators },
        });
        let answer = alice.ask("POST", "/createRoom", request).await;
        assert_eq!(answer.0, status, "{creators}");
    }
}

#[tokio::test]
async fn u_36_an_upgrade_makes_creators_and_leaves_the_others_their_power() {
    let server = server().await;
    let [alice, bob, charlie] = three(&server).await;
    let (a, b, c) = (alice.id.as_str(), bob.id.as_str(), charlie.id.as_str());
    // The version, the levels before, who upgrades, the new creators, the levels after.
    for (version, before, by, creators, after) in [
        ("11", json!({ b: 100 }), &bob, None, json!({})),
        (
            "11",
            json!({ b: 100, c: 100 }),
            &bob,
            None,
            json!({ c: 100 }),
        ),
        ("12", json!({ b: 150 }), &bob, Some(c), json!({})),
        ("12", json!({ b: 150, c: 50 }), &bob, Some(c), json!({})),
        ("11", json!({ a: 100, b: 100 }), &alice, Some(b), json!({})),
        (
            "11",
            json!({ a: 100, b: 100, c: 50 }),
            &alice,
            Some(b),
            json!({ c: 50 }),
        ),
    ] {
        let request = json!({ "room_version": version, "preset": "public_chat" });
        let room = alice.create_room(request).await;
        for user in [&bob, &charlie] {
            user.join(&room, "a.test").await;
        }
        let set = set_levels(&alice, &room, before.clone()).await;
        assert_eq!(set.0, 200, "{version} {before}");
        let mut upgrade = json!({ "new_version": "12" });
        if let Some(creator) = creators {
            upgrade["additional_creators"] = json!([creator]);
        }
        let path = format!("/rooms/{room}/upgrade");
        let upgraded = by.post(&path, upgrade).await;
        let new = upgraded["replacement_room"].as_str().unwrap();
        let create = content(by, new, "m.room.create").await;
        assert_eq!(create["room_version"], "12");
        let expected = creators.map(|creator| json!([creator]));
        assert_eq!(create.get("additional_creators").cloned(), expected);
        let levels = content(by, new, "m.room.power_levels").await;
        let levels = levels.get("users").cloned().unwrap_or(json!({}));
        assert_eq!(levels, after, "{version} {before}");
    }
}

async fn create_event(user: &User, room: &str) -> Value {
    let state = user.get(&format!("/rooms/{room}/state")).await;
    let mut state = list(&state).iter();
    let create = state.find(|event| event["type"] == "m.room.create");
    create.expect("a room has a create event").clone()
}

async fn check_id(user: &User, room: &str) {
    let create = create_event(user, room).await;
    let id = create["event_id"].as_str().unwrap();
    assert_eq!(room, id.replace('$', "!"));
}

#[tokio::test]
async fn u_37_a_room_is_named_by_its_create_event() {
    let server = server().await;
    let alice = server.register("alice").await;
    check_id(&alice, &room_of_12(&alice).await).await;
}

#[tokio::test]
async fn u_38_a_room_of_version_12_on_another_server_is_joined() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let room = Room::found(&stage.resident, RoomVersion::V12, &[]);
    stage.resident.serve_full_joins();
    let id = room.id.as_str();
    alice.join(id, &stage.resident.name).await;
    check_id(&alice, id).await;
    let hello = message(&stage.resident.user("charlie"), "hello");
    let hello = room.send(&stage.resident, hello);
    stage.tell(&[&hello]).await;
    alice.eager().until_event(&hello).await;
}

#[tokio::test]
async fn u_39_no_event_names_the_create_event_it_stands_on() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let room = room_of_12(&alice).await;
    let (resident, here): (&Resident, _) = (&stage.resident, &stage.here.name);
    let bob = resident.user("bob");
    let (theirs, join) = resident.join(here, &room, &bob).await;
    let create = theirs.state("m.room.create", "");
    let said = alice.say(&room, "hello").await;
    let said = resident.event(&said).await;
    for pdu in theirs.all_state().iter().chain([&join, &said]) {
        let raw: Value = serde_json::from_str(&pdu.json).unwrap();
        assert!(raw["auth_events"].is_array(), "{raw}");
        assert!(!pdu.auth_events.contains(&create.event_id), "{raw}");
        assert_eq!(pdu.room_id.as_str(), room);
        let names_room = raw.get("room_id").is_some();
        assert_eq!(names_room, pdu.event_id != create.event_id, "{raw}");
    }
}

#[tokio::test]
async fn u_40_an_upgrade_names_the_room_before_it_and_no_event() {
    let server = server().await;
    let [alice, bob, _] = three(&server).await;
    for version in ["12", "11", "10"] {
        let request = json!({ "room_version": version, "preset": "public_chat" });
        let old = alice.create_room(request).await;
        bob.join(&old, "a.test").await;
        let upgrade = json!({ "new_version": "12" });
        let upgraded = alice.post(&format!("/rooms/{old}/upgrade"), upgrade).await;
        let new = upgraded["replacement_room"].as_str().unwrap();
        check_id(&alice, new).await;
        let tombstone = content(&alice, &old, "m.room.tombstone").await;
        assert_eq!(tombstone["replacement_room"], new);
        let create = content(&alice, new, "m.room.create").await;
        assert_eq!(create["predecessor"], json!({ "room_id": old }));
    }
}

#[tokio::test]
async fn u_41_a_room_is_created_once() {
    let server = server().await;
    let alice = server.register("alice").await;
    for version in ["11", "12"] {
        let room = alice.create_room(json!({ "room_version": version })).await;
        let path = state_path(&room, "m.room.create", "");
        let body = json!({ "room_version": version, "entropy": 100 });
        assert_eq!(alice.ask("PUT", &path, body).await.0, 400);
    }
}

#[tokio::test]
async fn u_42_clients_see_which_room_a_create_event_is_of() {
    let server = server().await;
    let alice = server.register("alice").await;
    let room = room_of_12(&alice).await;
    let said = alice.say(&room, "hello").await;
    let create = room.replace('!', "$");
    let rooms = format!("/rooms/{room}");
    for (path, part) in [
        (format!("{rooms}/state"), ""),
        (format!("{rooms}/messages?dir=b&limit=100"), "chunk"),
        (format!("{rooms}/event/{create}"), ""),
        (format!("{rooms}/context/{create}"), "event"),
        (format!("{rooms}/context/{said}?limit=100"), "events_before"),
        (format!("{rooms}/context/{said}?limit=100"), "state"),
        (format!("{rooms}/state/m.room.create/?format=event"), ""),
    ] {
        let answer = alice.get(&path).await;
        let part = if part.is_empty() {
            &answer
        } else {
            &answer[part]
        };
        let event = match part {
            Value::Array(events) => events
                .iter()
                .find(|event| event["type"] == "m.room.create")
                .unwrap_or_else(|| panic!("{path}: {answer}")),
            event => event,
        };
        assert_eq!(event["type"], "m.room.create", "{path}");
        assert_eq!(event["room_id"], room.as_str(), "{path}");
    }
}

#[tokio::test]
async fn every_version_is_joined_from_another_server() {
    let (a, b) = pair().await;
    let (alice, bob) = (a.register("alice").await, b.register("bob").await);
    for version in RoomVersion::ALL {
        let request = json!({ "preset": "public_chat", "room_version": version.as_str() });
        let room = alice.create_room(request).await;
        bob.join(&room, "a.test").await;
        until_member(&bob, &room, &alice.id, "join").await;
        let here = alice.say(&room, "here").await;
        until_event(&bob, &room, &here).await;
        let there = bob.say(&room, "there").await;
        until_event(&alice, &room, &there).await;
        // Both have the same state, event for event.
        let state = async |user: &User| {
            let state = user.get(&format!("/rooms/{room}/state")).await;
            let ids = list(&state)
                .iter()
                .map(|event| event["event_id"].to_string());
            ids.collect::<std::collections::BTreeSet<_>>()
        };
        let theirs = state(&alice).await;
        until("the same state", async || {
            (state(&bob).await == theirs).then_some(())
        })
        .await;
    }
}
