//! Notices of the operators: who may send them, and what their user can do about them.

use std::sync::Arc;

use homeserver::config::ServerNotices;
use protocol::id::UserId;
use serde_json::{Value, json};

use crate::world::{Server, User, list, server};

const PATH: &str = "/_synapse/admin/v1/send_server_notice";

async fn server_with_notices() -> Server {
    Server::start(&Arc::default(), "a.test", |config| {
        config.server_notices = Some(ServerNotices {
            user: UserId::parse("@_server:a.test").unwrap(),
            display_name: Some("The house".to_owned()),
            avatar_url: None,
            room_name: Some("Notices".to_owned()),
            room_topic: None,
        });
    })
    .await
}

fn notice(words: &str) -> Value {
    json!({ "user_id": "@alice:a.test", "content": { "msgtype": "m.text", "body": words } })
}

/// The one room that the user is invited to.
async fn invite(user: &User) -> String {
    let sync = user.get("/sync").await;
    let invites = sync["rooms"]["invite"].as_object().unwrap();
    assert_eq!(invites.len(), 1);
    let (room, invite) = invites.iter().next().unwrap();
    for event in list(&invite["invite_state"]["events"]) {
        assert_eq!(event["sender"], "@_server:a.test");
    }
    room.clone()
}

#[tokio::test]
async fn a_notice_is_for_administrators_to_send() {
    let server = server_with_notices().await;
    let (admin, alice) = (
        server.administrator("admin").await,
        server.register("alice").await,
    );
    for body in [Value::Null, json!({}), notice("no")] {
        let refused = alice.refused("POST", PATH, body).await;
        assert_eq!(refused, (403, "M_FORBIDDEN".to_owned()));
    }
    for (to, status, errcode) in [
        ("@nobody:a.test", 404, "M_NOT_FOUND"),
        ("@alice:elsewhere.test", 400, "M_INVALID_PARAM"),
        ("@_server:a.test", 400, "M_INVALID_PARAM"),
    ] {
        let body = json!({ "user_id": to, "content": {} });
        let refused = admin.refused("POST", PATH, body).await;
        assert_eq!(refused, (status, errcode.to_owned()));
    }
    let (status, _) = admin.refused("POST", PATH, json!({ "content": {} })).await;
    assert_eq!(status, 400);
}

#[tokio::test]
async fn notices_are_off_without_a_setting() {
    let server = server().await;
    let admin = server.administrator("admin").await;
    server.register("alice").await;
    let refused = admin.refused("POST", PATH, notice("hello")).await;
    assert_eq!(refused, (400, "M_UNKNOWN".to_owned()));
}

#[tokio::test]
async fn a_notice_cannot_be_refused_but_its_room_can_be_left() {
    let server = server_with_notices().await;
    let (admin, alice) = (
        server.administrator("admin").await,
        server.register("alice").await,
    );
    let sent = admin.post(PATH, notice("first")).await;
    let room = invite(&alice).await;
    let leave = format!("/rooms/{room}/leave");
    let member = format!("/rooms/{room}/state/m.room.member/{}", alice.id);
    for (method, path) in [("POST", &leave), ("PUT", &member)] {
        let refused = alice
            .refused(method, path, json!({ "membership": "leave" }))
            .await;
        let errcode = "M_CANNOT_LEAVE_SERVER_NOTICE_ROOM".to_owned();
        assert_eq!(refused, (403, errcode), "{path}");
    }

    alice.post(&format!("/join/{room}"), json!({})).await;
    let sync = alice.get("/sync").await;
    let joined = &sync["rooms"]["join"][&room];
    let timeline = list(&joined["timeline"]["events"]);
    assert!(timeline.iter().any(|e| e["event_id"] == sent["event_id"]));
    let data = list(&joined["account_data"]["events"]);
    let tags = data.iter().find(|data| data["type"] == "m.tag").unwrap();
    assert!(tags["content"]["tags"]["m.server_notice"].is_object());
    let state = alice.get(&format!("/rooms/{room}/state")).await;
    let content = |kind: &str, key: &str| {
        let found = |event: &&Value| event["type"] == kind && event["state_key"] == key;
        list(&state).iter().find(found).unwrap()["content"].clone()
    };
    let sender = content("m.room.member", "@_server:a.test");
    assert_eq!(sender["displayname"], "The house");
    assert_eq!(content("m.room.name", "")["name"], "Notices");
    assert_eq!(content("m.room.create", "")["m.federate"], false);

    for (method, path) in [
        ("PUT", format!("/rooms/{room}/send/m.room.message/1")),
        ("PUT", format!("/rooms/{room}/state/m.room.topic")),
    ] {
        let refused = alice.refused(method, &path, json!({ "topic": "x" })).await;
        assert_eq!(refused, (403, "M_FORBIDDEN".to_owned()), "{path}");
    }
    alice.post(&leave, json!({})).await;
    alice
        .post(&format!("/rooms/{room}/forget"), json!({}))
        .await;

    let since = sync["next_batch"].as_str().unwrap();
    admin.post(PATH, notice("second")).await;
    let (again, _) = alice
        .sync_until(Some(since), |body| {
            let invites = body["rooms"]["invite"].as_object()?;
            invites.keys().next().cloned()
        })
        .await;
    assert_eq!(again, room, "there is one room for all");
    let (status, _) = alice.refused("POST", &leave, json!({})).await;
    assert_eq!(status, 403);
    alice.join(&room, "a.test").await;
    let messages = alice.get(&format!("/rooms/{room}/messages?dir=b")).await;
    let newest = list(&messages["chunk"]).iter();
    let mut newest = newest.filter(|event| event["type"] == "m.room.message");
    assert_eq!(newest.next().unwrap()["content"]["body"], "second");
}

#[tokio::test]
async fn a_notice_with_a_transaction_id_is_sent_once() {
    let server = server_with_notices().await;
    let admin = server.administrator("admin").await;
    let alice = server.register("alice").await;
    let send = async |txn_id: &str| {
        let path = format!("{PATH}/{txn_id}");
        admin.put(&path, notice("hello")).await["event_id"].clone()
    };
    let (first, again, other) = (send("1").await, send("1").await, send("2").await);
    assert_eq!(first, again);
    assert_ne!(first, other);
    let room = invite(&alice).await;
    alice.post(&format!("/join/{room}"), json!({})).await;
    let messages = alice
        .get(&format!("/rooms/{room}/messages?dir=b&limit=100"))
        .await;
    let notices = list(&messages["chunk"])
        .iter()
        .filter(|event| event["type"] == "m.room.message");
    assert_eq!(notices.count(), 2);
}

#[tokio::test]
async fn nobody_invites_the_user_that_notices_come_from() {
    let server = server_with_notices().await;
    let alice = server.register("alice").await;
    let room = alice.post("/createRoom", json!({})).await;
    let path = format!("/rooms/{}/invite", room["room_id"].as_str().unwrap());
    let body = json!({ "user_id": "@_server:a.test" });
    let refused = alice.refused("POST", &path, body).await;
    assert_eq!(refused, (403, "M_FORBIDDEN".to_owned()));
}

#[tokio::test]
async fn somebodys_account_does_not_become_the_notices_user() {
    let server = server().await;
    server.register("alice").await;
    let mut config = server.homeserver().config().clone();
    config.server_notices = Some(ServerNotices {
        user: UserId::parse("@alice:a.test").unwrap(),
        display_name: None,
        avatar_url: None,
        room_name: None,
        room_topic: None,
    });
    let again = server.restarted(config);
    let refused = again.start().await.unwrap_err();
    assert_eq!(refused.errcode, "M_USER_IN_USE");
}
