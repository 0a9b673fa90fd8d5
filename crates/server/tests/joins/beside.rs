//! What comes with a join: aliases, devices, history, typing, presence, summaries: U-34, U-48 to U-50, U-52.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use storage::queues;

use crate::network::Network;
use crate::stage::Stage;
use crate::ways::{pair, until_event, until_invited, until_member};
use crate::world::{Server, User, joined, list, server, start};

fn encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

#[tokio::test]
async fn u_34_an_alias_may_be_of_any_letters() {
    let (a, b) = pair().await;
    let (alice, bob) = (a.register("alice").await, b.register("bob").await);
    let room = alice.public_room().await;
    let path = format!("/directory/room/{}", encoded("#老虎Â£я🤨👉ඞ:a.test"));
    alice.put(&path, json!({ "room_id": room })).await;
    let found = bob.get(&path).await;
    assert_eq!(found["room_id"], room.as_str());
    let path = format!("/join/{}", encoded("#老虎Â£я🤨👉ඞ:a.test"));
    bob.post(&path, json!({})).await;
    until_member(&alice, &room, &bob.id, "join").await;
}

/// Gives the user's device a key, which must be signed by nobody that this server checks.
async fn upload_keys(user: &User) {
    let keys = json!({ "device_keys": {
        "user_id": user.id,
        "device_id": user.device,
        "algorithms": ["m.megolm.v1.aes-sha2"],
        "keys": { format!("ed25519:{}", user.device): "lEuiRJBit0IG6nUf5pUzWTUEsRVVe/HJkoKuEww9ULI" },
        "signatures": { &user.id: {} },
    } });
    user.post("/keys/upload", keys).await;
}

#[tokio::test]
async fn u_48_a_resident_is_told_of_the_devices_of_who_joins() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    upload_keys(&alice).await;
    stage.resident.serve_full_joins();
    stage.resident.hear_of_devices();
    let room = stage.room.id.as_str();
    alice.join(room, &stage.resident.name).await;
    let update = stage.resident.edu("m.device_list_update").await;
    assert_eq!(update["user_id"], alice.id.as_str());
    assert_eq!(update["device_id"], alice.device.as_str());
}

#[tokio::test]
async fn u_48_who_joins_is_among_the_changed_devices_of_those_in_the_room() {
    let (a, b) = pair().await;
    let (alice, bob) = (a.register("alice").await, b.register("bob").await);
    upload_keys(&bob).await;
    let room = alice.public_room().await;
    let mut syncs = alice.eager();
    syncs.now().await;
    bob.join(&room, "a.test").await;
    syncs.until_devices("changed", &bob.id).await;
    let keys = alice.query_keys(&bob.id).await;
    let device = &keys["device_keys"][&bob.id][&bob.device];
    assert_eq!(device["device_id"], bob.device.as_str(), "{keys}");
}

/// Alice gets another device while bob's server can not be reached. He hears of it when it can.
async fn check_outage(network: &Arc<Network>, a: &Server, b: &Server, restart: bool) {
    let (alice, bob) = (a.register("alice").await, b.register("bob").await);
    let request = json!({ "preset": "private_chat", "invite": [bob.id] });
    let room = alice.create_room(request).await;
    until_invited(&bob, &room).await;
    let mut alices = alice.eager();
    alices.now().await;
    let mut bobs = bob.eager();
    bobs.now().await;
    bob.join(&room, "a.test").await;
    alices.until_devices("changed", &bob.id).await;
    bobs.until_devices("changed", &alice.id).await;
    // Nothing of the join is on its way any more.
    let said = alice.say(&room, "hello").await;
    until_event(&bob, &room, &said).await;
    bobs.now().await;

    network.cut(&b.name);
    let (_, other) = a.login("alice", "secret").await;
    let other = a.user(&other);
    upload_keys(&other).await;
    alices.until_devices("changed", &alice.id).await;
    network.mend(&b.name);
    if restart {
        a.restart().await;
    } else {
        // Whoever is heard of again is sent what is due.
        bob.say(&room, "back").await;
    }
    bobs.until_devices("changed", &alice.id).await;
    let keys = bob.query_keys(&alice.id).await;
    let devices = &keys["device_keys"][&alice.id];
    assert!(devices.get(&other.device).is_some(), "{keys}");
}

#[tokio::test]
async fn u_48_news_of_devices_outlive_an_outage() {
    let network = Arc::<Network>::default();
    let a = start(&network, "a.test").await;
    let b = start(&network, "b.test").await;
    check_outage(&network, &a, &b, false).await;
}

#[tokio::test]
async fn u_48_news_of_devices_outlive_a_restart() {
    let network = Arc::<Network>::default();
    let a = start(&network, "a.test").await;
    let b = start(&network, "b.test").await;
    check_outage(&network, &a, &b, true).await;
}

/// Until one server has not reached the other so often in a row.
async fn until_failed(from: &Server, to: &Server, times: u32) {
    let store = from.store();
    for _ in 0..1_000 {
        let name = to.name.clone();
        let state = store.read(move |c| queues::destination(c, &name)).await;
        let interval = state.unwrap().and_then(|state| state.interval_ms);
        if interval >= Some(1_000 << (times - 1)) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("it was not tried {times} times");
}

#[tokio::test]
async fn nothing_is_sent_to_a_server_where_nobody_listens() {
    let network = Arc::<Network>::default();
    let a = start(&network, "a.test").await;
    let b = start(&network, "b.test").await;
    let (alice, bob) = (a.register("alice").await, b.register("bob").await);
    let room = alice.public_room().await;
    bob.join(&room, "a.test").await;
    let mut said = vec![alice.say(&room, "hello").await];
    until_event(&bob, &room, &said[0]).await;

    network.cut(&b.name);
    said.push(alice.say(&room, "anybody").await);
    // It was alive a moment ago, and is sent that in vain; what comes after is only to see whether it is back.
    until_failed(&a, &b, 1).await;
    let sent = network.count("/federation/v1/send/");
    until_failed(&a, &b, 3).await;
    assert_eq!(network.count("/federation/v1/send/"), sent);
    said.push(alice.say(&room, "again").await);
    network.mend(&b.name);
    bob.say(&room, "back").await;
    for event in &said {
        until_event(&bob, &room, event).await;
    }
}

/// All messages that a user can page back to, the newest first.
async fn history(user: &User, room: &str, limit: usize) -> Vec<String> {
    let mut seen = Vec::new();
    let mut from = String::new();
    loop {
        let path = format!("/rooms/{room}/messages?dir=b&limit={limit}{from}");
        let page = user.get(&path).await;
        let bodies = list(&page["chunk"]).iter();
        let bodies = bodies.filter_map(|event| event["content"]["body"].as_str());
        seen.extend(bodies.map(str::to_owned));
        let Some(end) = page["end"].as_str() else {
            return seen;
        };
        from = format!("&from={end}");
    }
}

#[tokio::test]
async fn u_49_who_joins_can_read_all_that_was_said() {
    let (a, b) = pair().await;
    let (alice, bob) = (a.register("alice").await, b.register("bob").await);
    for (count, limit) in [(20, 10), (300, 200)] {
        let room = alice.public_room().await;
        let mut said: Vec<String> = (0..count).map(|n| n.to_string()).collect();
        for words in &said {
            alice.say(&room, words).await;
        }
        said.reverse();
        bob.join(&room, "a.test").await;
        assert_eq!(history(&bob, &room, limit).await, said);

        // Again after he was away.
        bob.leave(&room).await;
        until_member(&alice, &room, &bob.id, "leave").await;
        let meanwhile: Vec<String> = (0..count).map(|n| format!("m{n}")).collect();
        for words in &meanwhile {
            alice.say(&room, words).await;
        }
        bob.join(&room, "a.test").await;
        said.splice(0..0, meanwhile.into_iter().rev());
        assert_eq!(history(&bob, &room, limit).await, said);
    }
}

#[tokio::test]
async fn u_50_typing_and_presence_go_through_a_fast_join() {
    let (a, b) = pair().await;
    let (alice, bob) = (a.register("alice").await, b.register("bob").await);
    let room = alice.public_room().await;
    bob.join(&room, "a.test").await;
    let path = format!("/rooms/{room}/typing/{}", bob.id);
    let typing = json!({ "typing": true, "timeout": 30_000 });
    bob.put(&path, typing).await;
    let sees = |sync: &Value| {
        let room = joined(sync, &room)?;
        let mut events = list(&room["ephemeral"]["events"]).iter();
        let typing = events.find(|event| event["type"] == "m.typing")?;
        (typing["content"]["user_ids"] == json!([bob.id])).then_some(())
    };
    alice.eager().until("bob typing", sees).await;

    let path = format!("/presence/{}/status", bob.id);
    let status = json!({ "presence": "online", "status_msg": "here" });
    bob.put(&path, status).await;
    let sees = |sync: &Value| {
        let mut events = list(&sync["presence"]["events"]).iter();
        let his = events.find(|event| event["sender"] == bob.id)?;
        (his["content"]["status_msg"] == "here").then_some(())
    };
    alice.eager().until("bob's presence", sees).await;
}

#[tokio::test]
async fn u_52_a_summary_names_the_rooms_that_a_restricted_room_lets_in() {
    let server = server().await;
    let alice = server.register("alice").await;
    let allowed = alice.public_room().await;
    let rules = json!({
        "type": "m.room.join_rules",
        "state_key": "",
        "content": {
            "join_rule": "restricted",
            "allow": [{ "type": "m.room_membership", "room_id": allowed }],
        },
    });
    let request = json!({
        "preset": "public_chat",
        "room_version": "8",
        "initial_state": [rules],
    });
    let restricted = alice.create_room(request).await;
    let private = alice.create_room(json!({ "preset": "private_chat" })).await;
    let summary = async |room: &str| {
        alice
            .get(&format!("/_matrix/client/v1/room_summary/{room}"))
            .await
    };
    let of_restricted = summary(&restricted).await;
    assert_eq!(of_restricted["join_rule"], "restricted");
    assert_eq!(of_restricted["allowed_room_ids"], json!([allowed]));
    assert!(summary(&private).await.get("allowed_room_ids").is_none());
}

/// The rooms of a hierarchy, whatever their order.
async fn hierarchy(user: &User, space: &str) -> Vec<String> {
    let path = format!("/_matrix/client/v1/rooms/{space}/hierarchy");
    let hierarchy = user.get(&path).await;
    let rooms = list(&hierarchy["rooms"]).iter();
    let mut ids: Vec<String> = rooms
        .map(|room| room["room_id"].as_str().unwrap().to_owned())
        .collect();
    ids.sort_unstable();
    ids
}

#[tokio::test]
async fn u_52_a_hierarchy_goes_on_on_another_server() {
    let (a, b) = pair().await;
    let (alice, bob) = (a.register("alice").await, b.register("bob").await);
    let space = json!({ "preset": "public_chat", "creation_content": { "type": "m.space" } });
    let root = alice.create_room(space.clone()).await;
    let sub = bob.create_room(space).await;
    let leaf = bob.public_room().await;
    let hidden = bob.create_room(json!({ "preset": "private_chat" })).await;
    let child = async |user: &User, space: &str, room: &str, via: &str| {
        let path = format!("/rooms/{space}/state/m.space.child/{room}");
        user.put(&path, json!({ "via": [via] })).await;
    };
    child(&alice, &root, &sub, "b.test").await;
    child(&bob, &sub, &leaf, "b.test").await;
    child(&bob, &sub, &hidden, "b.test").await;
    let mut expected = vec![root.clone(), sub, leaf];
    expected.sort_unstable();
    assert_eq!(hierarchy(&alice, &root).await, expected);
}
