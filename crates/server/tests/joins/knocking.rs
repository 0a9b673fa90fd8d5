//! Knocking, here and over federation: U-19 and U-20.

use serde_json::{Value, json};

use crate::ways::{
    forbidden, invite, join_refused, pair, put_out, set, until_invited, until_member,
};
use crate::world::{Syncs, User, list};

/// Knocks through a.test; the status.
async fn knock(user: &User, room: &str, reason: &str) -> u16 {
    let path = format!("/knock/{room}?via=a.test");
    let body = match reason {
        "" => json!({}),
        reason => json!({ "reason": reason }),
    };
    user.ask("POST", &path, body).await.0
}

/// Knocks, and waits until the knocker and those in the room see it.
async fn knock_seen(alice: &User, user: &User, room: &str, reason: &str) {
    assert_eq!(knock(user, room, reason).await, 200, "{reason}");
    let seen = |sync: &Value| {
        let knocked = sync["rooms"]["knock"].get(room)?;
        let events = list(&knocked["knock_state"]["events"]);
        let own = events.iter().find(|event| event["state_key"] == user.id)?;
        assert_eq!(own["content"]["membership"], "knock");
        Some(())
    };
    user.eager().until("the knock", seen).await;
    let knock = until_member(alice, room, &user.id, "knock").await;
    assert_eq!(knock["reason"].as_str().unwrap_or_default(), reason);
}

async fn check(alice: &User, user: &User, version: &str, rule: &str) {
    let private = json!({ "preset": "private_chat", "room_version": version });
    let room = alice.create_room(private).await;
    assert_eq!(knock(user, &room, "Can I knock anyways?").await, 403);

    let rules = json!({ "join_rule": rule });
    set(alice, &room, "m.room.join_rules", "", rules).await;
    assert_eq!(join_refused(user, &room, "a.test").await, forbidden());
    knock_seen(alice, user, &room, "Let me in").await;
    knock_seen(alice, user, &room, "I really like knock knock jokes").await;

    // To take a knock back over federation is not in the spec.
    if user.server.name == alice.server.name {
        let mut syncs: Syncs = user.eager();
        syncs.now().await;
        user.leave(&room).await;
        syncs.until_left(&room).await;
        knock_seen(alice, user, &room, "Let me in... again?").await;
    }

    // The knocker's server need not hear of the refusal.
    put_out(alice, "kick", &room, &user.id).await;
    until_member(alice, &room, &user.id, "leave").await;
    knock_seen(alice, user, &room, "Pleeease let me in?").await;
    put_out(alice, "kick", &room, &user.id).await;
    until_member(alice, &room, &user.id, "leave").await;
    knock_seen(alice, user, &room, "").await;

    invite(alice, &room, user).await;
    until_invited(user, &room).await;
    assert_eq!(knock(user, &room, "Through the window").await, 403);
    user.join(&room, "a.test").await;
    until_member(alice, &room, &user.id, "join").await;
    assert_eq!(knock(user, &room, "Through the window").await, 403);
    put_out(alice, "ban", &room, &user.id).await;
    until_member(alice, &room, &user.id, "ban").await;
    assert_eq!(knock(user, &room, "I didn't mean it!").await, 403);
}

#[tokio::test]
async fn u_19_knocking_on_the_same_server() {
    let (a, _) = pair().await;
    let (alice, bob) = (a.register("alice").await, a.register("bob").await);
    check(&alice, &bob, "7", "knock").await;
    check(&alice, &bob, "10", "knock_restricted").await;
}

#[tokio::test]
async fn u_19_knocking_from_another_server() {
    let (a, b) = pair().await;
    let (alice, bob) = (a.register("alice").await, b.register("bob").await);
    check(&alice, &bob, "7", "knock").await;
    check(&alice, &bob, "10", "knock_restricted").await;
}

#[tokio::test]
async fn u_20_the_directory_says_where_one_may_knock() {
    let (a, _) = pair().await;
    let alice = a.register("alice").await;
    for (version, preset, rule) in [
        ("7", "private_chat", "knock"),
        ("10", "private_chat", "knock_restricted"),
        ("10", "public_chat", "public"),
    ] {
        let request = json!({ "preset": preset, "room_version": version });
        let room = alice.create_room(request).await;
        let rules = json!({ "join_rule": rule });
        set(&alice, &room, "m.room.join_rules", "", rules).await;
        let listed = json!({ "visibility": "public" });
        alice
            .put(&format!("/directory/list/room/{room}"), listed)
            .await;
        let public = alice.get("/publicRooms").await;
        let mut chunk = list(&public["chunk"]).iter();
        let entry = chunk.find(|entry| entry["room_id"] == room.as_str());
        assert_eq!(entry.unwrap()["join_rule"], rule);
    }
}
