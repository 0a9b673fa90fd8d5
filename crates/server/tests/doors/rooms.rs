//! Rooms as their members see them, here and on another server.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::network::Network;
use crate::world::{Server, User, list, server, start};

async fn two_servers() -> (Server, Server) {
    let network = Arc::<Network>::default();
    (
        start(&network, "a.test").await,
        start(&network, "b.test").await,
    )
}

async fn public_room(creator: &User) -> String {
    creator
        .create_room(json!({ "preset": "public_chat" }))
        .await
}

fn joined(room: &str) -> impl Fn(&Value) -> Option<Value> {
    move |sync| sync["rooms"]["join"].get(room).cloned()
}

/// The event of the room's timeline with this key in its content.
fn in_timeline(room: &str, key: &str, value: &str) -> impl Fn(&Value) -> Option<Value> {
    move |sync| {
        let timeline = &sync["rooms"]["join"][room]["timeline"]["events"];
        let found = |event: &&Value| event["content"][key] == value;
        list(timeline).iter().find(found).cloned()
    }
}

async fn say(user: &User, room: &str, words: &str) -> String {
    let path = format!("/rooms/{room}/send/m.room.message/{words}");
    let content = json!({ "msgtype": "m.text", "body": words });
    let sent = user.put(&path, content).await;
    sent["event_id"].as_str().unwrap().to_owned()
}

fn bodies(chunk: &Value) -> Vec<&str> {
    let bodies = list(chunk).iter();
    bodies
        .filter_map(|event| event["content"]["body"].as_str())
        .collect()
}

#[tokio::test]
async fn a_first_sync_tells_who_was_put_out_and_not_who_went() {
    let server = server().await;
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let mut rooms = Vec::new();
    for _ in 0..3 {
        let room = public_room(&alice).await;
        bob.join(&room, "a.test").await;
        rooms.push(room);
    }
    let [kicked, banned, left] = rooms.as_slice() else {
        panic!("three rooms");
    };
    let target = || json!({ "user_id": bob.id });
    alice.post(&format!("/rooms/{kicked}/kick"), target()).await;
    alice.post(&format!("/rooms/{banned}/ban"), target()).await;
    bob.post(&format!("/rooms/{left}/leave"), json!({})).await;

    let told = async |filter: &str| {
        let sync = bob.get(&format!("/sync?filter={filter}")).await;
        let rooms = sync["rooms"]["leave"].as_object().cloned();
        rooms.map_or(Vec::new(), |rooms| rooms.keys().cloned().collect())
    };
    let sorted = |rooms: &[&String]| {
        let mut rooms: Vec<String> = rooms.iter().map(|room| (*room).clone()).collect();
        rooms.sort_unstable();
        rooms
    };
    let without = "%7B%22room%22:%7B%22include_leave%22:false%7D%7D";
    assert_eq!(told(without).await, sorted(&[kicked, banned]));
    let with = "%7B%22room%22:%7B%22include_leave%22:true%7D%7D";
    assert_eq!(told(with).await, sorted(&[kicked, banned, left]));

    bob.post(&format!("/rooms/{kicked}/forget"), json!({}))
        .await;
    assert_eq!(told(without).await, sorted(&[banned]));
}

#[tokio::test]
async fn u_32_an_invite_to_a_room_that_everybody_has_left_can_be_refused() {
    let (a, b) = two_servers().await;
    let alice = a.register("alice").await;
    let (here, there) = (a.register("bob").await, b.register("carol").await);
    for guest in [&here, &there] {
        let room = alice.create_room(json!({ "invite": [guest.id] })).await;
        let (_, since) = guest
            .sync_until(None, |sync| sync["rooms"]["invite"].get(&room).cloned())
            .await;
        let leave = format!("/rooms/{room}/leave");
        alice.post(&leave, json!({})).await;
        guest.post(&leave, json!({})).await;
        guest
            .sync_until(Some(&since), |sync| {
                sync["rooms"]["leave"].get(&room).cloned()
            })
            .await;
        let sync = guest.get("/sync").await;
        assert!(sync["rooms"]["invite"].get(&room).is_none(), "{}", guest.id);
    }
}

#[tokio::test]
async fn what_a_join_says_of_itself_is_in_the_event_and_no_more() {
    let (a, b) = two_servers().await;
    let alice = a.register("alice").await;
    let room = public_room(&alice).await;
    for user in [a.register("bob").await, b.register("carol").await] {
        let body = json!({
            "foo": "bar",
            "reason": "I like it here",
            "membership": "leave",
            "displayname": "not me",
            "join_authorised_via_users_server": alice.id,
            "third_party_invite": {},
        });
        user.post(&format!("/join/{room}?via=a.test"), body).await;
        let path = format!("/rooms/{room}/state/m.room.member/{}", user.id);
        let name = user.id[1..].split(':').next();
        let expected = json!({
            "membership": "join",
            "displayname": name,
            "reason": "I like it here",
            "foo": "bar",
        });
        assert_eq!(alice.get(&path).await, expected);
        assert_eq!(user.get(&path).await, expected);
    }
}

#[tokio::test]
async fn a_page_ends_where_there_is_nothing_more_and_not_where_nothing_passed() {
    let server = server().await;
    let alice = server.register("alice").await;
    let room = public_room(&alice).await;
    for words in ["1", "2", "3"] {
        say(&alice, &room, words).await;
    }
    let page = async |direction: &str, kind: &str, from: Option<&str>| {
        let from = from.map_or(String::new(), |from| format!("&from={from}"));
        let filter = format!("%7B%22types%22:[%22{kind}%22]%7D");
        let query = format!("dir={direction}&limit=2&filter={filter}{from}");
        alice.get(&format!("/rooms/{room}/messages?{query}")).await
    };
    for direction in ["b", "f"] {
        let nothing = page(direction, "x.unheard.of", None).await;
        assert!(list(&nothing["chunk"]).is_empty());
        let end = nothing["end"].as_str().expect("events were passed over");
        let beyond = page(direction, "x.unheard.of", Some(end)).await;
        assert!(list(&beyond["chunk"]).is_empty());
        assert!(beyond.get("end").is_none(), "{beyond}");

        let mut seen = Vec::new();
        let mut from = None;
        loop {
            let some = page(direction, "m.room.message", from.as_deref()).await;
            seen.extend(bodies(&some["chunk"]).into_iter().map(str::to_owned));
            let Some(end) = some["end"].as_str() else {
                break;
            };
            from = Some(end.to_owned());
        }
        seen.sort_unstable();
        assert_eq!(seen, ["1", "2", "3"], "{direction}");
    }
}

#[tokio::test]
async fn u_50_an_event_found_by_its_time_on_another_server_can_be_read_on_from() {
    const BRIDGE: &str = "bridge-token";
    let (a, b) = two_servers().await;
    let (alice, bob) = (a.register("alice").await, b.register("bob").await);
    let room = public_room(&alice).await;
    let join = format!("/join/{room}");
    a.get("POST", &join, BRIDGE, json!({})).await;
    let mut ids = Vec::new();
    for ts in [1000, 2000, 3000] {
        let path = format!("/rooms/{room}/send/m.room.message/{ts}?ts={ts}");
        let words = json!({ "msgtype": "m.text", "body": ts.to_string() });
        let sent = a.get("PUT", &path, BRIDGE, words).await;
        ids.push(sent["event_id"].clone());
    }
    bob.join(&room, "a.test").await;
    let context = format!("/rooms/{room}/context/{}?limit=0", ids[1].as_str().unwrap());
    let refused = bob.refused("GET", &context, Value::Null).await;
    assert_eq!(refused, (404, "M_NOT_FOUND".to_owned()));

    let path = format!("/_matrix/client/v1/rooms/{room}/timestamp_to_event");
    let found = bob.get(&format!("{path}?ts=1500&dir=f")).await;
    assert_eq!(
        found,
        json!({ "event_id": ids[1], "origin_server_ts": 2000 })
    );
    let context = bob.get(&context).await;
    assert_eq!(context["event"]["content"]["body"], "2000");
    let start = context["start"].as_str().unwrap();
    let before = bob
        .get(&format!(
            "/rooms/{room}/messages?dir=b&limit=1&from={start}"
        ))
        .await;
    assert_eq!(bodies(&before["chunk"]), ["1000"]);
}

#[tokio::test]
async fn after_a_join_over_federation_the_next_sync_names_whose_devices_to_learn() {
    let (a, b) = two_servers().await;
    let (alice, bob) = (a.register("alice").await, b.register("bob").await);
    let room = public_room(&alice).await;
    let (_, since) = bob.sync_until(None, |sync| Some(sync.clone())).await;
    bob.join(&room, "a.test").await;
    let (sync, _) = bob
        .sync_until(Some(&since), |sync| {
            joined(&room)(sync).map(|_| sync.clone())
        })
        .await;
    let changed = list(&sync["device_lists"]["changed"]);
    for user in [&alice.id, &bob.id] {
        assert!(changed.iter().any(|named| named == user), "{user}");
    }
}

#[tokio::test]
async fn a_room_becomes_full_and_messages_go_both_ways() {
    let (a, b) = two_servers().await;
    let (alice, carol) = (a.register("alice").await, a.register("carol").await);
    let bob = b.register("bob").await;
    let room = public_room(&alice).await;
    carol.join(&room, "a.test").await;
    bob.join(&room, "a.test").await;
    let members = bob.get(&format!("/rooms/{room}/members")).await;
    let mut names: Vec<&str> = list(&members["chunk"])
        .iter()
        .filter_map(|member| member["state_key"].as_str())
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["@alice:a.test", "@bob:b.test", "@carol:a.test"]);

    let (_, at_alice) = alice.sync_until(None, joined(&room)).await;
    say(&alice, &room, "there").await;
    bob.sync_until(None, in_timeline(&room, "body", "there"))
        .await;
    say(&bob, &room, "back").await;
    let (_, at_alice) = alice
        .sync_until(Some(&at_alice), in_timeline(&room, "body", "back"))
        .await;
    bob.post(&format!("/rooms/{room}/leave"), json!({})).await;
    let (left, _) = alice
        .sync_until(Some(&at_alice), in_timeline(&room, "membership", "leave"))
        .await;
    assert_eq!(left["state_key"], bob.id);
}

#[tokio::test]
async fn what_a_crash_kept_from_being_counted_is_counted_at_the_next_start() {
    let server = server().await;
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = public_room(&alice).await;
    bob.join(&room, "a.test").await;
    let counted = |count: i64| {
        let room = room.clone();
        move |sync: &Value| {
            let counts = &sync["rooms"]["join"][&room]["unread_notifications"];
            (counts["notification_count"] == count).then_some(())
        }
    };
    let words: Vec<String> = (0..5).map(|n| format!("word-{n}")).collect();
    for words in &words {
        say(&bob, &room, words).await;
    }
    alice.sync_until(None, counted(5)).await;

    let forget = |c: &mut dyn storage::Conn| {
        c.execute("DELETE FROM push_actions", &[])?;
        c.execute("UPDATE push_progress SET position = 0", &[])
    };
    server.store().write(forget).await.unwrap();
    server.restart().await;
    alice.sync_until(None, counted(5)).await;
}

#[tokio::test]
async fn who_was_deactivated_just_before_a_crash_leaves_at_the_next_start() {
    let server = server().await;
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = public_room(&alice).await;
    bob.join(&room, "a.test").await;
    let gone = protocol::id::UserId::parse(&bob.id).unwrap();
    let deactivate =
        move |c: &mut dyn storage::Conn| storage::accounts::deactivate(c, &gone, false);
    server.store().write(deactivate).await.unwrap();
    server.restart().await;
    let left = |sync: &Value| {
        let timeline = &sync["rooms"]["join"][&room]["timeline"]["events"];
        let left = |event: &Value| {
            event["state_key"] == bob.id.as_str() && event["content"]["membership"] == "leave"
        };
        list(timeline).iter().any(left).then_some(())
    };
    alice.sync_until(None, left).await;
}
