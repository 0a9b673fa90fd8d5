//! Invites over federation: U-31 to U-33, U-44, U-47, and those of U-52 that are unwanted.

use protocol::id::ServerName;
use protocol::room_version::RoomVersion;
use protocol::signature::SigningKey;
use serde_json::{Value, json};

use crate::dag::{Room, member};
use crate::stage::Stage;
use crate::ways::{
    content, invite, join_refused, pair, put_out, refusal, set, until_event, until_invited,
    until_member,
};
use crate::world::User;

async fn private_room(creator: &User, guests: &[&User]) -> String {
    let guests: Vec<&str> = guests.iter().map(|guest| guest.id.as_str()).collect();
    let request = json!({ "preset": "private_chat", "invite": guests });
    creator.create_room(request).await
}

#[tokio::test]
async fn u_31_an_invite_is_refused_and_the_inviters_server_hears_of_it() {
    let (a, b) = pair().await;
    let (alice, bob) = (a.register("alice").await, b.register("bob").await);
    let room = private_room(&alice, &[&bob]).await;
    until_invited(&bob, &room).await;
    let mut syncs = bob.eager();
    syncs.now().await;
    bob.leave(&room).await;
    syncs.until_left(&room).await;
    until_member(&alice, &room, &bob.id, "leave").await;
    assert_eq!(join_refused(&bob, &room, "a.test").await.0, 403);
}

#[tokio::test]
async fn u_32_an_invite_is_refused_several_times() {
    let (a, b) = pair().await;
    let (alice, bob) = (a.register("alice").await, b.register("bob").await);
    let room = private_room(&alice, &[]).await;
    for _ in 0..3 {
        invite(&alice, &room, &bob).await;
        until_invited(&bob, &room).await;
        bob.leave(&room).await;
        until_member(&alice, &room, &bob.id, "leave").await;
    }
}

#[tokio::test]
async fn u_32_an_invitee_sees_what_the_room_is() {
    let (a, b) = pair().await;
    let (alice, bob) = (a.register("alice").await, b.register("bob").await);
    let request = json!({ "preset": "private_chat", "name": "Invites room", "invite": [bob.id] });
    let room = alice.create_room(request).await;
    let shown = until_invited(&bob, &room).await;
    let shown = |kind: &str| {
        let found = shown.iter().find(|event| event["type"] == kind);
        found.unwrap_or_else(|| panic!("{kind} in {shown:?}"))["content"].clone()
    };
    assert_eq!(shown("m.room.name"), json!({ "name": "Invites room" }));
    let rules = content(&alice, &room, "m.room.join_rules").await;
    assert_eq!(shown("m.room.join_rules"), rules);
    assert_eq!(rules["join_rule"], "invite");
}

#[tokio::test]
async fn u_32_an_invite_to_a_room_that_the_server_is_in_is_taken_or_refused() {
    let (a, b) = pair().await;
    let alice = a.register("alice").await;
    let (bob, carol) = (b.register("bob").await, b.register("carol").await);
    let room = private_room(&alice, &[]).await;
    for user in [&bob, &carol] {
        invite(&alice, &room, user).await;
        until_invited(user, &room).await;
        user.join(&room, "a.test").await;
        until_member(&alice, &room, &user.id, "join").await;
    }
    let dora = b.register("dora").await;
    invite(&alice, &room, &dora).await;
    until_invited(&dora, &room).await;
    dora.leave(&room).await;
    until_member(&alice, &room, &dora.id, "leave").await;
}

/// the kick is sent to a server that nobody in the room is of.
#[tokio::test]
async fn u_32_who_invited_takes_the_invite_back() {
    let (a, b) = pair().await;
    let (alice, bob) = (a.register("alice").await, b.register("bob").await);
    let room = private_room(&alice, &[&bob]).await;
    until_invited(&bob, &room).await;
    let mut syncs = bob.eager();
    syncs.now().await;
    put_out(&alice, "kick", &room, &bob.id).await;
    syncs.until_left(&room).await;
}

#[tokio::test]
async fn u_32_who_did_not_invite_can_not_take_the_invite_back() {
    let (a, b) = pair().await;
    let (alice, aunt) = (a.register("alice").await, a.register("aunt").await);
    let bob = b.register("bob").await;
    let shared = private_room(&alice, &[&bob]).await;
    until_invited(&bob, &shared).await;
    bob.join(&shared, "a.test").await;
    let room = private_room(&alice, &[&aunt]).await;
    aunt.join(&room, "a.test").await;
    invite(&aunt, &room, &bob).await;
    until_invited(&bob, &room).await;

    put_out(&alice, "kick", &room, &bob.id).await;
    // What comes after the kick has come.
    let after = alice.say(&shared, "after").await;
    until_event(&bob, &shared, &after).await;
    until_invited(&bob, &room).await;
}

#[tokio::test]
async fn u_32_a_join_remembers_the_invite_that_it_follows() {
    let (a, b) = pair().await;
    let (alice, bob) = (a.register("alice").await, b.register("bob").await);
    let request = json!({ "preset": "private_chat", "invite": [bob.id], "is_direct": true });
    let room = alice.create_room(request).await;
    // By the invite alone, without another word of where the room is.
    until_invited(&bob, &room).await;
    bob.post(&format!("/join/{room}"), json!({})).await;
    let mut syncs = bob.eager();
    let joined = syncs.until_joined(&room).await;
    let own = ["timeline", "state"].into_iter().find_map(|part| {
        let events = joined[part]["events"].as_array().into_iter().flatten();
        let mut own = events.filter(|event| event["state_key"] == bob.id);
        own.find(|event| event["content"]["membership"] == "join")
    });
    let unsigned = &own.expect("his own join")["unsigned"];
    assert_eq!(unsigned["prev_content"]["membership"], "invite");
    assert_eq!(unsigned["prev_content"]["is_direct"], true);
    assert_eq!(unsigned["prev_sender"], alice.id.as_str());
}

#[tokio::test]
async fn u_33_an_invite_after_a_ban_was_lifted() {
    let (a, b) = pair().await;
    let (alice, bob) = (a.register("alice").await, b.register("bob").await);
    let room = bob.public_room().await;
    alice.join(&room, "b.test").await;
    let mut syncs = alice.eager();
    syncs.until_joined(&room).await;
    put_out(&bob, "ban", &room, &alice.id).await;
    syncs.until_left(&room).await;
    assert_eq!(join_refused(&alice, &room, "b.test").await.0, 403);

    put_out(&bob, "unban", &room, &alice.id).await;
    invite(&bob, &room, &alice).await;
    until_invited(&alice, &room).await;
    alice.join(&room, "b.test").await;
    until_member(&bob, &room, &alice.id, "join").await;
}

///
#[tokio::test]
async fn u_44_an_invitee_is_shown_when_the_room_was_created() {
    let (a, b) = pair().await;
    let alice = a.register("alice").await;
    let request = json!({ "preset": "public_chat", "room_version": "12" });
    let room = alice.create_room(request).await;
    for target in [a.register("local").await, b.register("remote").await] {
        invite(&alice, &room, &target).await;
        let shown = until_invited(&target, &room).await;
        let create = shown.iter().find(|event| event["type"] == "m.room.create");
        let create = create.unwrap_or_else(|| panic!("{shown:?}"));
        assert!(create["origin_server_ts"].is_i64(), "{create}");
    }
}

#[tokio::test]
async fn u_47_an_invite_without_any_state_is_shown_with_what_it_says() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let charlie = stage.resident.user("charlie");
    let mut invite = member(&charlie, &alice.id, "invite");
    invite.set("is_direct", json!(true));
    let invite = stage.room.make(&stage.resident, invite);
    let answer = send_invite(&stage, &stage.room, &invite, json!([])).await;
    let signed = answer.unwrap();
    assert!(signed["event"]["signatures"]["here.test"].is_object());
    let shown = until_invited(&alice, stage.room.id.as_str()).await;
    let own = shown.iter().find(|event| event["state_key"] == alice.id);
    assert_eq!(own.unwrap()["content"]["is_direct"], true);
}

type Answer = Result<Value, room::effect::AskError>;

async fn send_invite(
    stage: &Stage,
    room: &Room,
    event: &protocol::pdu::Pdu,
    shown: Value,
) -> Answer {
    let path = format!(
        "/_matrix/federation/v2/invite/{}/{}",
        room.id, event.event_id
    );
    let body = json!({
        "room_version": room.version.as_str(),
        "event": serde_json::from_str::<Value>(&event.json).unwrap(),
        "invite_room_state": shown,
    });
    stage.resident.put(&stage.here.name, path, body).await
}

#[tokio::test]
async fn r_62_an_invite_that_is_not_right_is_not_signed() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let charlie = stage.resident.user("charlie");
    let (room, resident) = (&stage.room, &stage.resident);
    let good = room.make(resident, member(&charlie, &alice.id, "invite"));
    let bad = |new| room.make(resident, new);
    let unsigned = {
        let mut event: Value = serde_json::from_str(&good.json).unwrap();
        event["signatures"] = json!({});
        event
    };
    for (what, event, errcode) in [
        (
            "a join",
            bad(member(&charlie, &alice.id, "join")),
            "M_INVALID_PARAM",
        ),
        (
            "for somebody of another server",
            bad(member(&charlie, "@x:elsewhere.test", "invite")),
            "M_INVALID_PARAM",
        ),
    ] {
        let refused = refusal(send_invite(&stage, room, &event, json!([])).await);
        assert_eq!(refused, (400, errcode.to_owned()), "{what}");
    }
    let path = format!(
        "/_matrix/federation/v2/invite/{}/{}",
        room.id, good.event_id
    );
    let mut body = json!({ "room_version": "11", "event": unsigned, "invite_room_state": [] });
    let refused = resident.put(&stage.here.name, path.clone(), body.clone());
    assert_eq!(refusal(refused.await), (403, "M_FORBIDDEN".to_owned()));
    body["room_version"] = json!("unheard-of");
    let refused = refusal(resident.put(&stage.here.name, path, body).await);
    let incompatible = "M_INCOMPATIBLE_ROOM_VERSION".to_owned();
    assert_eq!(refused, (400, incompatible));

    // In version 12 the create event must come with it, and be the room's.
    let hashed = Room::found(resident, RoomVersion::V12, &[]);
    let other = Room::found(resident, RoomVersion::V12, &[("derek", 1)]);
    let invite = hashed.make(resident, member(&charlie, &alice.id, "invite"));
    let shown = |room: &Room| {
        let create = room.state("m.room.create", "");
        json!([serde_json::from_str::<Value>(&create.json).unwrap()])
    };
    let refused = refusal(send_invite(&stage, &hashed, &invite, json!([])).await);
    assert_eq!(refused, (400, "M_MISSING_PARAM".to_owned()));
    let refused = refusal(send_invite(&stage, &hashed, &invite, shown(&other)).await);
    assert_eq!(refused, (400, "M_INVALID_PARAM".to_owned()));
    let taken = send_invite(&stage, &hashed, &invite, shown(&hashed)).await;
    taken.unwrap();

    // R-32b: what was refused did not spoil the good one.
    send_invite(&stage, room, &good, json!([])).await.unwrap();
    until_invited(&alice, room.id.as_str()).await;
}

#[tokio::test]
async fn r_64_an_invite_that_is_not_taken_is_not_sent_to_the_room() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let room = alice.public_room().await;
    let guest = stage.resident.user("guest");
    let path = format!("/rooms/{room}/invite");
    for (status, errcode, expected) in [
        (403, "M_FORBIDDEN", (403, "M_FORBIDDEN")),
        (403, "M_INVITE_BLOCKED", (403, "M_INVITE_BLOCKED")),
        (404, "M_UNRECOGNIZED", (400, "M_UNSUPPORTED_ROOM_VERSION")),
        (400, "M_MISSING_PARAM", (502, "M_UNKNOWN")),
        (400, "M_INVALID_PARAM", (502, "M_UNKNOWN")),
    ] {
        let body = json!({ "errcode": errcode, "error": "no" });
        stage.resident.answer("invite", status, body);
        let invite = json!({ "user_id": guest });
        let (status, got) = alice.refused("POST", &path, invite).await;
        assert_eq!((status, &*got), expected, "{errcode}");
        let member = crate::ways::state_path(&room, "m.room.member", &guest);
        assert_eq!(alice.refused("GET", &member, Value::Null).await.0, 404);
    }
}

#[tokio::test]
async fn r_65_an_invite_to_an_identifier_becomes_one_to_its_user() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let private = json!({ "preset": "private_chat" });
    let room = alice.create_room(private).await;
    let identity = ServerName::parse("identity.test").unwrap();
    let key = SigningKey::generate([5; 32], "0").unwrap();
    let offer = json!({
        "display_name": "g...@mail.test",
        "key_validity_url": "https://identity.test/valid",
        "public_key": key.public_base64(),
        "public_keys": [{ "public_key": key.public_base64() }],
    });
    set(
        &alice,
        &room,
        "m.room.third_party_invite",
        "the-token",
        offer,
    )
    .await;

    let guest = stage.resident.user("guest");
    let exchange = async |mxid: &str, token: &str, by: &SigningKey| {
        let signed = json!({ "mxid": mxid, "token": token });
        let mut signed = signed.as_object().unwrap().clone();
        by.sign_json(&mut signed, &identity).unwrap();
        let event = json!({
            "type": "m.room.member",
            "room_id": room,
            "sender": alice.id,
            "state_key": guest,
            "content": {
                "membership": "invite",
                "third_party_invite": { "display_name": "guest", "signed": signed },
            },
        });
        let path = format!("/_matrix/federation/v1/exchange_third_party_invite/{room}");
        stage.resident.put(&stage.here.name, path, event).await
    };
    let liar = SigningKey::generate([6; 32], "0").unwrap();
    for (what, mxid, token, by) in [
        ("another's signature", &guest, "the-token", &liar),
        ("another token", &guest, "no-token", &key),
        (
            "another user",
            &stage.resident.user("eve"),
            "the-token",
            &key,
        ),
    ] {
        let refused = refusal(exchange(mxid, token, by).await);
        assert_eq!(refused, (403, "M_FORBIDDEN".to_owned()), "{what}");
    }
    assert_eq!(stage.resident.take_asked("invite"), 0);
    let answer = exchange(&guest, "the-token", &key).await.unwrap();
    assert_eq!(answer, json!({}));
    assert_eq!(stage.resident.take_asked("invite"), 1);
    let invited = until_member(&alice, &room, &guest, "invite").await;
    let proof = &invited["third_party_invite"]["signed"];
    assert_eq!(proof["token"], "the-token");
}

const FILTER: &str = "org.matrix.msc4155.invite_permission_config";

#[tokio::test]
async fn u_52_invites_that_are_not_wanted_do_not_come() {
    let (a, b) = pair().await;
    let (bob, eve) = (b.register("bob").await, b.register("eve").await);
    for (nth, (filter, refused)) in [
        (json!({ "blocked_users": [bob.id] }), true),
        (json!({ "ignored_users": [bob.id] }), false),
        (json!({ "blocked_servers": ["b.test"] }), true),
        (json!({ "ignored_servers": ["b.test"] }), false),
        (json!({ "blocked_users": ["@b*"] }), true),
        (json!({ "blocked_servers": ["b*"] }), true),
    ]
    .into_iter()
    .enumerate()
    {
        let alice = a.register(&format!("alice{nth}")).await;
        let path = format!("/user/{}/account_data/{FILTER}", alice.id);
        alice.put(&path, filter.clone()).await;
        let room = private_room(&bob, &[]).await;
        let path = format!("/rooms/{room}/invite");
        let body = json!({ "user_id": alice.id });
        let (status, answer) = bob.ask("POST", &path, body).await;
        if refused {
            assert_eq!(status, 403, "{filter}");
            assert_eq!(answer["errcode"], "M_INVITE_BLOCKED", "{filter}");
        } else {
            assert_eq!(status, 200, "{filter}: {answer}");
        }
        let sync = alice.eager().now().await;
        assert!(sync["rooms"]["invite"].get(&room).is_none(), "{filter}");
    }
    let alice = a.register("alice").await;
    let path = format!("/user/{}/account_data/{FILTER}", alice.id);
    let filter = json!({ "allowed_users": [eve.id], "blocked_servers": ["b.test"] });
    alice.put(&path, filter).await;
    let room = private_room(&eve, &[&alice]).await;
    until_invited(&alice, &room).await;
}
