//! Joining a room of another server: U-1 to U-6, U-11, U-38, U-46, and what of U-45 the joining server does.

use std::sync::Arc;

use protocol::pdu::Pdu;
use serde_json::{Map, Value, json};

use crate::dag::{Room, message, state};
use crate::resident::Resident;
use crate::stage::{Stage, plain};
use crate::ways::{pair, until_event, until_member};
use crate::world::{BRIDGE_TOKEN, Server, start};

#[tokio::test]
async fn u_01_a_join_goes_to_the_server_that_is_named_and_not_to_that_of_the_rooms_id() {
    let stage = Stage::set().await;
    let other = Server::start(&stage.network, "other.test", plain).await;
    let alice = stage.here.register("alice").await;
    let bob = other.register("bob").await;
    let room = stage.room.id.as_str();
    stage.resident.serve_full_joins();
    alice.join(room, &stage.resident.name).await;
    stage.resident.take_asked("make_join");
    // The server of the room's id does not want any more joins.
    stage.resident.forget(&stage.room);
    let joined = bob
        .post(&format!("/join/{room}?server_name=here.test"), json!({}))
        .await;
    assert_eq!(joined["room_id"], room);
    assert_eq!(stage.resident.take_asked("make_join"), 0);
    until_member(&alice, room, &bob.id, "join").await;
    stage
        .resident
        .pdu("bob's join", |pdu| pdu.is("m.room.member", &bob.id))
        .await;
}

#[tokio::test]
async fn u_02_a_server_that_does_not_know_the_room_is_passed_over() {
    let stage = Stage::set().await;
    let other = start(&stage.network, "other.test").await;
    let (alice, bob) = (
        stage.here.register("alice").await,
        other.register("bob").await,
    );
    let room = bob.public_room().await;
    let path = format!("/join/{room}?via=resident.test&via=other.test");
    alice.post(&path, json!({})).await;
    until_member(&bob, &room, &alice.id, "join").await;
    assert_eq!(stage.resident.take_asked("make_join"), 1);
}

/// A piece of a room's state, of which a copy with other signatures goes round.
fn resigned(room: &Room, by: &Resident, new: crate::dag::New, signatures: Value) -> Arc<Pdu> {
    let good = room.make(by, new);
    let mut event: Map<String, Value> = serde_json::from_str(&good.json).unwrap();
    event.insert("signatures".to_owned(), signatures);
    let event = Value::Object(event).to_string();
    Arc::new(Pdu::parse(&event, room.version).unwrap())
}

const NOT_OURS: &str =
    "/3z+pJjiJXWhwfqIEzmNksvBHCoXTktK/y0rRuWJXw6i1+ygRG/suDCKhFuuz6gPapRmEMPVILi2mJqHHXPKAg";

/// A join into a room of whose state one event can not be verified.
async fn check_unverifiable(signatures: Value) {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let charlie = stage.resident.user("charlie");
    let name = json!({ "name": "Nobody vouches for this" });
    let name = state(&charlie, "m.room.name", "", name);
    let name = resigned(&stage.room, &stage.resident, name, signatures);
    stage.room.add(&name);
    stage.resident.serve_full_joins();
    let room = stage.room.id.as_str();
    alice.join(room, &stage.resident.name).await;
    // The room is as the others know it, but for that.
    let path = format!("/rooms/{room}/state/m.room.name/");
    assert_eq!(alice.refused("GET", &path, Value::Null).await.0, 404);
    until_member(&alice, room, &stage.resident.user("derek"), "join").await;
}

#[tokio::test]
async fn u_03_state_without_a_signature_does_not_hinder_a_join() {
    check_unverifiable(json!({})).await;
}

#[tokio::test]
async fn u_04_state_with_a_bad_signature_does_not_hinder_a_join() {
    check_unverifiable(json!({ "resident.test": { "ed25519:1": NOT_OURS } })).await;
}

#[tokio::test]
async fn u_05_state_signed_with_a_key_that_nobody_has_does_not_hinder_a_join() {
    check_unverifiable(json!({ "resident.test": { "ed25519:bogus": NOT_OURS } })).await;
}

#[tokio::test]
async fn u_06_state_that_stands_on_a_badly_signed_event_does_not_hinder_a_join() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let derek = stage.resident.user("derek");
    let renamed = json!({ "membership": "join", "displayname": "badly signed" });
    let renamed = state(&derek, "m.room.member", &derek, renamed);
    let signatures = json!({ "resident.test": { "ed25519:1": NOT_OURS } });
    let renamed = resigned(&stage.room, &stage.resident, renamed, signatures);
    stage.room.add(&renamed);
    let gone = crate::dag::member(&derek, &derek, "leave");
    let gone = stage.send(gone);
    assert!(gone.auth_events.contains(&renamed.event_id));
    stage.resident.serve_full_joins();
    alice
        .join(stage.room.id.as_str(), &stage.resident.name)
        .await;
    let room = stage.room.id.as_str();
    until_member(&alice, room, &stage.resident.user("charlie"), "join").await;
    let hello = message(&stage.resident.user("charlie"), "hello");
    let hello = stage.send(hello);
    stage.tell(&[&hello]).await;
    alice.eager().until_event(&hello).await;
}

#[tokio::test]
async fn u_11_a_user_of_an_application_service_joins_without_a_profile() {
    let (a, b) = pair().await;
    let charlie = b.register("charlie").await;
    let room = charlie.public_room().await;
    let path = format!("/join/{room}?via=b.test");
    a.get("POST", &path, BRIDGE_TOKEN, json!({})).await;
    let join = until_member(&charlie, &room, "@bridge:a.test", "join").await;
    assert_eq!(join.get("displayname"), None);
}

#[tokio::test]
async fn u_46_the_first_that_a_resident_is_sent_after_a_join_is_what_was_said() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    stage.resident.serve_full_joins();
    let room = stage.room.id.as_str();
    alice.join(room, &stage.resident.name).await;
    let said = alice.say(room, "hello").await;
    let first = stage.resident.pdu("anything", |_| true).await;
    assert_eq!(first.event_id.as_str(), said);
}

/// U-45: what a resident says that does not let in is said to the client.
#[tokio::test]
async fn u_45_a_residents_refusal_is_passed_on() {
    for (status, body, expected) in [
        (403, json!({ "errcode": "M_FORBIDDEN", "error": "no" }), 403),
        (
            400,
            json!({
                "errcode": "M_INCOMPATIBLE_ROOM_VERSION",
                "error": "no",
                "room_version": "x.y",
            }),
            400,
        ),
        (400, json!({ "errcode": "X_OWN", "error": "no" }), 400),
    ] {
        let stage = Stage::set().await;
        let alice = stage.here.register("alice").await;
        stage.resident.answer("make_join", status, body.clone());
        let path = format!("/join/{}?via=resident.test", stage.room.id);
        let (status, answer) = alice.ask("POST", &path, json!({})).await;
        assert_eq!(status, expected, "{answer}");
        assert_eq!(answer["errcode"], body["errcode"]);
        assert_eq!(answer.get("room_version"), body.get("room_version"));
    }
}

/// U-45: answers that no join can be made of.
#[tokio::test]
async fn u_45_an_answer_that_is_no_room_is_an_error() {
    let stage = Stage::set().await;
    stage.resident.serve_leaves();
    stage.resident.serve_full_joins();
    let alice = stage.here.register("alice").await;
    let path = format!("/join/{}?via=resident.test", stage.room.id);
    let template = json!({ "room_version": "unheard-of", "event": { "type": "m.room.member" } });
    stage.resident.answer("make_join", 200, template);
    let refused = alice.refused("POST", &path, json!({})).await;
    assert!(refused.0 >= 400, "{refused:?}");
    stage.resident.answer_as_usual("make_join");

    let state = stage.room.all_state();
    let state = state.iter().filter(|pdu| &*pdu.kind != "m.room.create");
    let state: Vec<Value> = state
        .map(|pdu| serde_json::from_str(&pdu.json).unwrap())
        .collect();
    let empty = json!({ "state": state, "auth_chain": [], "members_omitted": false });
    stage.resident.answer("send_join", 200, empty);
    let refused = alice.refused("POST", &path, json!({})).await;
    assert!(refused.0 >= 400, "{refused:?}");
    // The resident may believe that she is in, so she leaves.
    stage.resident.answer_as_usual("send_join");
    stage.resident.leave_of(&alice.id).await;
}

#[tokio::test]
async fn u_45_a_resident_that_has_only_version_1_of_send_join() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    stage.resident.serve_only_v1_joins();
    let room = stage.room.id.as_str();
    alice.join(room, &stage.resident.name).await;
    until_member(&alice, room, &stage.resident.user("derek"), "join").await;
    let hello = message(&stage.resident.user("charlie"), "hello");
    let hello = stage.send(hello);
    stage.tell(&[&hello]).await;
    until_event(&alice, room, hello.event_id.as_str()).await;
}

#[tokio::test]
async fn u_45_a_member_whose_name_is_no_name_does_not_hinder_a_join() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let derek = stage.resident.user("derek");
    let odd = json!({ "membership": "join", "displayname": [] });
    stage.send(state(&derek, "m.room.member", &derek, odd));
    stage.resident.serve_full_joins();
    let room = stage.room.id.as_str();
    alice.join(room, &stage.resident.name).await;
    until_member(&alice, room, &derek, "join").await;
}
