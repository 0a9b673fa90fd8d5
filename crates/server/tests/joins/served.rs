//! What our server answers to those who join its rooms: U-7 to U-10, U-21, U-23, U-26, U-51, and what of U-45 the
//! resident server does.

use std::collections::BTreeSet;
use std::sync::Arc;

use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use room::effect::AskError;
use serde_json::{Value, json};

use crate::dag::{New, Room, member, message};
use crate::resident::Resident;
use crate::stage::{Stage, plain};
use crate::ways::{forbidden, put_out, refusal, set, state_path, until_member};
use crate::world::{Server, User, list, until};

type Answer = Result<Value, AskError>;

/// A room of alice's on our server, and charlie of another server, who may come in.
struct Door {
    stage: Stage,
    alice: User,
    room: String,
    charlie: String,
}

impl Door {
    async fn open(request: Value) -> Self {
        let stage = Stage::set().await;
        let alice = stage.here.register("alice").await;
        let room = alice.create_room(request).await;
        let charlie = stage.resident.user("charlie");
        Self {
            stage,
            alice,
            room,
            charlie,
        }
    }

    async fn public(version: &str) -> Self {
        Self::open(json!({ "preset": "public_chat", "room_version": version })).await
    }

    fn resident(&self) -> &Arc<Resident> {
        &self.stage.resident
    }

    async fn get(&self, path: &str) -> Answer {
        let path = format!("/_matrix/federation/v1{path}");
        self.resident().get(&self.stage.here.name, &path).await
    }

    /// Charlie comes in; the room as his server knows it.
    async fn join(&self) -> (Arc<Room>, Arc<Pdu>) {
        let here = &self.stage.here.name;
        self.resident().join(here, &self.room, &self.charlie).await
    }

    async fn make(&self, what: &str, user: &str, version: &str) -> Answer {
        let path = format!("/make_{what}/{}/{user}?ver={version}", self.room);
        self.get(&path).await
    }

    /// The template of charlie's event, which he may change before he signs it.
    async fn template(&self, what: &str, change: impl FnOnce(&mut Value)) -> Arc<Pdu> {
        let made = self.make(what, &self.charlie, "11").await.unwrap();
        let mut event = made["event"].clone();
        change(&mut event);
        self.resident().sign(&event.to_string(), RoomVersion::V11)
    }

    /// `endpoint` with its version, such as `v2/send_join`.
    async fn send(&self, endpoint: &str, event: &Pdu) -> Answer {
        let path = format!(
            "/_matrix/federation/{endpoint}/{}/{}",
            self.room, event.event_id
        );
        let body = serde_json::from_str(&event.json).unwrap();
        self.resident().put(&self.stage.here.name, path, body).await
    }

    async fn membership(&self, user: &str) -> Option<String> {
        let path = state_path(&self.room, "m.room.member", user);
        let (_, content) = self.alice.ask("GET", &path, Value::Null).await;
        content["membership"].as_str().map(str::to_owned)
    }
}

///
#[tokio::test]
async fn u_07_who_is_banned_can_not_come_in_by_the_template_of_another() {
    let door = Door::public("11").await;
    put_out(&door.alice, "ban", &door.room, &door.charlie).await;
    let refused = refusal(door.make("join", &door.charlie, "11").await);
    assert_eq!(refused, forbidden());
    let other = door.resident().user("charlie2");
    let made = door.make("join", &other, "11").await.unwrap();
    let mut event = made["event"].clone();
    event["sender"] = json!(door.charlie);
    event["state_key"] = json!(door.charlie);
    let join = door.resident().sign(&event.to_string(), RoomVersion::V11);
    for endpoint in ["v1/send_join", "v2/send_join"] {
        assert_eq!(refusal(door.send(endpoint, &join).await), forbidden());
    }
    assert_eq!(door.membership(&door.charlie).await.unwrap(), "ban");
}

/// An endpoint takes its own kind of membership, and nothing else.
async fn check_kind(endpoint: &str, membership: &str, version: &str) {
    let door = Door::public(version).await;
    let (room, _) = door.join().await;
    let charlie = &door.charlie;
    let stateless = {
        let mut event = message(charlie, "bzz");
        event.become_kind("m.room.member");
        event
    };
    let mut wrong: Vec<(&str, New)> = vec![
        ("a message", message(charlie, "bzz")),
        ("no state", stateless),
        (
            "of another",
            member(charlie, &door.resident().user("doris"), membership),
        ),
    ];
    for other in ["join", "leave", "knock", "invite", "ban"] {
        if other != membership {
            wrong.push((other, member(charlie, charlie, other)));
        }
    }
    for (what, event) in wrong {
        let event = room.make(door.resident(), event);
        let (status, _) = refusal(door.send(endpoint, &event).await);
        assert_eq!(status, 400, "{endpoint}: {what}");
    }
    assert_eq!(door.membership(charlie).await.unwrap(), "join");
}

#[tokio::test]
async fn u_08_nothing_but_a_join_comes_by_send_join() {
    check_kind("v1/send_join", "join", "11").await;
    check_kind("v2/send_join", "join", "12").await;
}

///
#[tokio::test]
async fn u_09_nothing_but_a_leave_comes_by_send_leave() {
    check_kind("v1/send_leave", "leave", "11").await;
    check_kind("v2/send_leave", "leave", "12").await;
}

#[tokio::test]
async fn u_21_nothing_but_a_knock_comes_by_send_knock() {
    check_kind("v1/send_knock", "knock", "7").await;
    check_kind("v1/send_knock", "knock", "10").await;
}

fn kinds(events: &Value) -> Vec<String> {
    let mut kinds: Vec<String> = list(events)
        .iter()
        .map(|event| {
            let (kind, key) = (&event["type"], &event["state_key"]);
            format!("{} {}", kind.as_str().unwrap(), key.as_str().unwrap())
        })
        .collect();
    kinds.sort_unstable();
    kinds
}

///
#[tokio::test]
async fn u_10_a_partial_answer_holds_just_what_it_should() {
    let door = Door::public("11").await;
    let bob = door.stage.here.register("bob").await;
    bob.join(&door.room, "here.test").await;
    let join = door.template("join", |_| ()).await;
    let endpoint = |version: &str, query: &str| {
        format!(
            "/_matrix/federation/{version}/send_join/{}/{}{query}",
            door.room, join.event_id
        )
    };
    let put = async |path: String| {
        let body: Value = serde_json::from_str(&join.json).unwrap();
        let (resident, here) = (door.resident(), &door.stage.here.name);
        resident.put(here, path, body).await
    };
    //
    let refused = refusal(put(endpoint("v2", "?omit_members=perhaps")).await);
    assert_eq!(refused, (400, "M_INVALID_PARAM".to_owned()));

    let answer = put(endpoint("v2", "?omit_members=true")).await.unwrap();
    assert_eq!(answer["members_omitted"], true);
    assert_eq!(answer["servers_in_room"], json!(["here.test"]));
    let plain = [
        "m.room.create ",
        "m.room.history_visibility ",
        "m.room.join_rules ",
        "m.room.member @alice:here.test",
        "m.room.member @bob:here.test",
        "m.room.power_levels ",
    ];
    assert_eq!(kinds(&answer["state"]), plain);
    assert_eq!(answer["auth_chain"], json!([]));
    //
    assert_eq!(answer["event"]["state_key"], door.charlie.as_str());
    assert_eq!(answer["origin"], "here.test");
    for event in list(&answer["state"]) {
        assert!(event.get("unsigned").is_none(), "{event}");
    }

    // the same join again, in full, by both versions.
    let full = put(endpoint("v2", "")).await.unwrap();
    let [status, v1] = &*put(endpoint("v1", "?omit_members=true"))
        .await
        .unwrap()
        .as_array()
        .unwrap()
        .clone()
    else {
        panic!("version 1 answers with two things");
    };
    assert_eq!(*status, 200);
    for answer in [&full, v1] {
        assert_ne!(answer["members_omitted"], true);
        assert_eq!(kinds(&answer["state"]), plain);
        assert_eq!(
            kinds(&answer["auth_chain"]),
            [
                "m.room.create ",
                "m.room.join_rules ",
                "m.room.member @alice:here.test",
                "m.room.power_levels ",
            ]
        );
    }
}

/// an empty name is one.
#[tokio::test]
async fn r_50_a_name_takes_the_place_of_the_heroes() {
    let door = Door::public("11").await;
    // He has been here before, so to speak.
    put_out(&door.alice, "ban", &door.room, &door.charlie).await;
    put_out(&door.alice, "unban", &door.room, &door.charlie).await;
    let name = json!({ "name": "" });
    set(&door.alice, &door.room, "m.room.name", "", name).await;
    let join = door.template("join", |_| ()).await;
    let path = format!(
        "/_matrix/federation/v2/send_join/{}/{}?omit_members=true",
        door.room, join.event_id
    );
    let body = serde_json::from_str(&join.json).unwrap();
    let here = &door.stage.here.name;
    let answer = door.resident().put(here, path, body).await.unwrap();
    // Of the members only what he was himself; the others stand in the auth chain.
    let members = |part: &str| {
        let mut kinds = kinds(&answer[part]);
        kinds.retain(|kind| kind.starts_with("m.room.member"));
        kinds
    };
    assert_eq!(members("state"), ["m.room.member @charlie:resident.test"]);
    assert!(members("auth_chain").contains(&"m.room.member @alice:here.test".to_owned()));
}

#[tokio::test]
async fn u_23_event_auth_gives_the_auth_chain_and_nothing_else() {
    let door = Door::public("11").await;
    let (_, first) = door.join().await;
    let leave = door.template("leave", |_| ()).await;
    assert_eq!(door.send("v2/send_leave", &leave).await.unwrap(), json!({}));
    let (room, second) = door.join().await;
    let rules = json!({ "join_rule": "invite" });
    let rules = set(&door.alice, &door.room, "m.room.join_rules", "", rules).await;
    let rules = door.resident().event(&rules).await;

    let ids = |pdus: Vec<Arc<Pdu>>| -> BTreeSet<String> {
        pdus.iter().map(|pdu| pdu.event_id.to_string()).collect()
    };
    let of_join = ids(room.auth_chain([&second]));
    for part in [&first, &leave] {
        assert!(of_join.contains(part.event_id.as_str()));
    }
    let of_rules = ids(room.auth_chain([&rules]));
    assert!(!of_rules.contains(first.event_id.as_str()));
    for (event, expected) in [(&second, of_join), (&rules, of_rules)] {
        let path = format!("/event_auth/{}/{}", door.room, event.event_id);
        let answer = door.get(&path).await.unwrap();
        let chain = list(&answer["auth_chain"]).iter();
        let chain: Vec<_> = chain
            .map(|pdu| Arc::new(Pdu::parse(&pdu.to_string(), RoomVersion::V11).unwrap()))
            .collect();
        assert_eq!(chain.len(), expected.len());
        assert_eq!(ids(chain), expected);
    }
}

#[tokio::test]
async fn u_26_missing_events_are_given_as_far_as_they_may_be_seen() {
    for visibility in ["world_readable", "shared", "invited", "joined"] {
        let door = Door::public("11").await;
        let seen = json!({ "history_visibility": visibility });
        let kind = "m.room.history_visibility";
        set(&door.alice, &door.room, kind, "", seen).await;
        door.alice.say(&door.room, "1").await;
        let (room, join) = door.join().await;
        let create = room.state("m.room.create", "");
        let path = format!("/_matrix/federation/v1/get_missing_events/{}", door.room);
        let question = json!({
            "earliest_events": [create.event_id],
            "latest_events": [join.event_id],
            "limit": 10,
            "min_depth": 1,
        });
        let here = &door.stage.here.name;
        let answer = door.resident().post(here, &path, question).await.unwrap();
        let events = list(&answer["events"]);
        let types = events.iter().map(|event| event["type"].as_str().unwrap());
        let types: Vec<&str> = types.collect();
        let mut expected = vec![
            "m.room.member",
            "m.room.power_levels",
            "m.room.join_rules",
            kind,
        ];
        // What the state says already makes no event.
        if visibility != "shared" {
            expected.push(kind);
        }
        expected.push("m.room.message");
        assert_eq!(types, expected, "{visibility}");
        let clear = ["world_readable", "shared"].contains(&visibility);
        let said = events.last().unwrap();
        assert_eq!(said["content"].get("body").is_some(), clear, "{visibility}");
        assert_eq!(events[0]["state_key"], door.alice.id.as_str());
    }
}

///
#[tokio::test]
async fn u_45_what_a_resident_says_to_make_join_and_make_leave() {
    let door = Door::public("11").await;
    let (charlie, alice) = (&*door.charlie, &*door.alice.id);
    for (what, user) in [
        ("join", alice),
        ("join", "@carol:elsewhere.test"),
        ("leave", alice),
        // Neither invited nor joined.
        ("leave", charlie),
    ] {
        let refused = refusal(door.make(what, user, "11").await);
        assert_eq!(refused, forbidden(), "{what} {user}");
    }
    // the answer says which version the room has.
    let refused = door.make("join", charlie, "1").await;
    let Err(AskError::Refused {
        status,
        errcode,
        body,
        ..
    }) = refused
    else {
        panic!("{refused:?}");
    };
    assert_eq!((status, &*errcode), (400, "M_INCOMPATIBLE_ROOM_VERSION"));
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(body["room_version"], "11");
    // Nobody of ours knows it; or all have gone.
    let path = format!("/make_join/!unheard:of.test/{charlie}?ver=11");
    let not_found = (404, "M_NOT_FOUND".to_owned());
    assert_eq!(refusal(door.get(&path).await), not_found);
    let path = format!("/make_leave/!unheard:of.test/{charlie}");
    assert_eq!(refusal(door.get(&path).await), not_found);
    let made = door.make("join", charlie, "11").await.unwrap();
    door.alice.leave(&door.room).await;
    assert_eq!(refusal(door.make("join", charlie, "11").await), not_found);
    let join = door
        .resident()
        .sign(&made["event"].to_string(), RoomVersion::V11);
    assert_eq!(refusal(door.send("v2/send_join", &join).await), not_found);
}

#[tokio::test]
async fn u_45_a_room_of_version_1_needs_no_version_in_the_question() {
    let door = Door::public("1").await;
    let path = format!("/make_join/{}/{}", door.room, door.charlie);
    let made = door.get(&path).await.unwrap();
    assert_eq!(made["room_version"], "1");
    let event = &made["event"];
    // references with their hashes.
    for list_of in ["prev_events", "auth_events"] {
        for reference in list(&event[list_of]) {
            assert!(reference[0].is_string(), "{event}");
            assert!(reference[1]["sha256"].is_string(), "{event}");
        }
    }
    assert_eq!(event["state_key"], door.charlie.as_str());
    assert_eq!(event["sender"], door.charlie.as_str());
    assert_eq!(event["room_id"], door.room.as_str());
    assert!(event["depth"].is_i64(), "{event}");
    assert!(event["origin_server_ts"].is_i64(), "{event}");
}

#[tokio::test]
async fn u_45_state_is_asked_for_at_an_event_of_the_room() {
    let door = Door::public("11").await;
    let other = door.alice.public_room().await;
    let elsewhere = door.alice.say(&other, "elsewhere").await;
    let (_, join) = door.join().await;
    for endpoint in ["state", "state_ids"] {
        let at = |event: &str| format!("/{endpoint}/{}?event_id={event}", door.room);
        let missing = format!("/{endpoint}/{}", door.room);
        assert_eq!(refusal(door.get(&missing).await).0, 400);
        let not_found = (404, "M_NOT_FOUND".to_owned());
        assert_eq!(refusal(door.get(&at(&elsewhere)).await), not_found);
        assert_eq!(refusal(door.get(&at("$unheard-of")).await), not_found);
        door.get(&at(join.event_id.as_str())).await.unwrap();
    }
}

#[tokio::test]
async fn u_45_a_refused_leave_does_not_spoil_the_good_one() {
    let door = Door::public("11").await;
    door.join().await;
    let leave = door.template("leave", |_| ()).await;
    let mut unsigned: Value = serde_json::from_str(&leave.json).unwrap();
    unsigned["signatures"] = json!({});
    let unsigned = Pdu::parse(&unsigned.to_string(), RoomVersion::V11).unwrap();
    assert_eq!(unsigned.event_id, leave.event_id);
    let refused = refusal(door.send("v2/send_leave", &unsigned).await);
    assert_eq!(refused, forbidden());
    assert_eq!(door.membership(&door.charlie).await.unwrap(), "join");
    let answer = door.send("v1/send_leave", &leave).await.unwrap();
    assert_eq!(answer, json!([200, {}]));
    assert_eq!(door.membership(&door.charlie).await.unwrap(), "leave");
}

/// R-29a: by the state that the join names nothing has changed.
#[tokio::test]
async fn r_29_what_changed_after_make_join_counts() {
    for change in ["ban", "invite only"] {
        let door = Door::public("11").await;
        let join = door.template("join", |_| ()).await;
        match change {
            "ban" => put_out(&door.alice, "ban", &door.room, &door.charlie).await,
            _ => {
                let rules = json!({ "join_rule": "invite" });
                set(&door.alice, &door.room, "m.room.join_rules", "", rules).await;
            }
        }
        let refused = refusal(door.send("v2/send_join", &join).await);
        assert_eq!(refused, forbidden(), "{change}");
        assert_ne!(
            door.membership(&door.charlie).await.as_deref(),
            Some("join")
        );
    }
}

#[tokio::test]
async fn r_15_a_template_leaves_nothing_behind() {
    let door = Door::public("11").await;
    let first = door.template("join", |_| ()).await;
    let second = door.template("join", |_| ()).await;
    assert_eq!(first.prev_events, second.prev_events);
    assert_eq!(door.membership(&door.charlie).await, None);
}

///
#[tokio::test]
async fn r_22_who_is_shut_out_hears_so_everywhere() {
    let door = Door::public("11").await;
    let (room, join) = door.join().await;
    let leave = door.template("leave", |_| ()).await;
    let acl = json!({ "allow": ["*"], "deny": ["resident.*"] });
    set(&door.alice, &door.room, "m.room.server_acl", "", acl).await;
    door.resident()
        .pdu("the ACL", |pdu| &*pdu.kind == "m.room.server_acl")
        .await;
    let (id, charlie, event) = (&door.room, &door.charlie, &join.event_id);
    for path in [
        format!("/make_join/{id}/{charlie}?ver=11"),
        format!("/make_leave/{id}/{charlie}"),
        format!("/make_knock/{id}/{charlie}?ver=11"),
        format!("/state/{id}?event_id={event}"),
        format!("/state_ids/{id}?event_id={event}"),
        format!("/backfill/{id}?v={event}&limit=1"),
        format!("/event_auth/{id}/{event}"),
    ] {
        assert_eq!(refusal(door.get(&path).await), forbidden(), "{path}");
    }
    for (endpoint, event) in [
        ("v1/send_join", &join),
        ("v2/send_join", &join),
        ("v1/send_leave", &leave),
        ("v2/send_leave", &leave),
    ] {
        let refused = refusal(door.send(endpoint, event).await);
        assert_eq!(refused, forbidden(), "{endpoint}");
    }
    let path = format!("/_matrix/federation/v1/get_missing_events/{id}");
    let question = json!({ "earliest_events": [], "latest_events": [event] });
    let here = &door.stage.here.name;
    let asked = door.resident().post(here, &path, question).await;
    assert_eq!(refusal(asked), forbidden());

    // Of a transaction only the events of this room are refused.
    let said = message(charlie, "through the window");
    let said = room.make(door.resident(), said);
    let pdu: Value = serde_json::from_str(&said.json).unwrap();
    let body = json!({ "origin": "resident.test", "origin_server_ts": 1, "pdus": [pdu] });
    let path = "/_matrix/federation/v1/send/shut-out".to_owned();
    let answer = door.resident().put(here, path, body).await.unwrap();
    let result = &answer["pdus"][said.event_id.as_str()];
    assert!(result["error"].is_string(), "{answer}");
}

#[tokio::test]
async fn r_07_a_flood_of_joins_is_slowed_down() {
    let network = Arc::default();
    let here = Server::start(&network, "here.test", |config| {
        plain(config);
        config.limits.enabled = true;
    })
    .await;
    let resident = Resident::start(&network, "resident.test");
    let alice = here.register("alice").await;
    let room = alice.public_room().await;
    let path = format!(
        "/_matrix/federation/v1/make_join/{room}/{}?ver=11",
        resident.user("charlie")
    );
    // More than any burst that is let through.
    for _ in 0..1000 {
        if let Err(AskError::Refused {
            status,
            errcode,
            body,
            ..
        }) = resident.get(&here.name, &path).await
        {
            assert_eq!((status, &*errcode), (429, "M_LIMIT_EXCEEDED"));
            let body: Value = serde_json::from_str(&body).unwrap();
            assert!(body["retry_after_ms"].is_i64(), "{body}");
            return;
        }
    }
    panic!("a thousand joins at once are let through");
}

#[tokio::test]
async fn r_14_a_template_names_no_more_events_than_it_may() {
    let door = Door::public("11").await;
    let dora = Resident::start(&door.stage.network, "other.test");
    let here = &door.stage.here.name;
    let user = dora.user("dora");
    let (room, join) = dora.join(here, &door.room, &user).await;
    let branches: Vec<_> = (0..25)
        .map(|n| message(&user, &n.to_string()).after(&[&join]))
        .map(|branch| room.make(&dora, branch))
        .collect();
    dora.send(here, &branches.iter().collect::<Vec<_>>(), &[])
        .await;
    for branch in &branches {
        until("a branch", async || {
            door.alice.can_see(branch).await.then_some(())
        })
        .await;
    }
    let made = door.make("join", &door.charlie, "11").await.unwrap();
    let prev_events = list(&made["event"]["prev_events"]);
    assert_eq!(prev_events.len(), 20);
    assert!(list(&made["event"]["auth_events"]).len() <= 10);
    let join = door
        .resident()
        .sign(&made["event"].to_string(), RoomVersion::V11);
    door.send("v2/send_join", &join).await.unwrap();
    // the other branches are tied in.
    door.resident().pdu("a tie", |_| true).await;
}

#[tokio::test]
async fn r_19_a_room_that_is_not_known_comes_before_what_is_wrong_with_the_event() {
    let door = Door::public("11").await;
    let (room, _) = door.join().await;
    let said = room.make(door.resident(), message(&door.charlie, "no join"));
    let mut event: Value = serde_json::from_str(&said.json).unwrap();
    event["room_id"] = json!("!unheard:of.test");
    for endpoint in [
        "v1/send_join",
        "v2/send_join",
        "v2/send_leave",
        "v1/send_knock",
    ] {
        let path = format!("/_matrix/federation/{endpoint}/!unheard:of.test/$any");
        let here = &door.stage.here.name;
        let sent = door.resident().put(here, path, event.clone()).await;
        assert_eq!(refusal(sent), (404, "M_NOT_FOUND".to_owned()), "{endpoint}");
    }
}

#[tokio::test]
async fn r_32_a_flood_of_signed_joins_is_slowed_down() {
    let network = Arc::default();
    let here = Server::start(&network, "here.test", |config| {
        plain(config);
        config.limits.enabled = true;
    })
    .await;
    let resident = Resident::start(&network, "resident.test");
    let alice = here.register("alice").await;
    let room = alice.public_room().await;
    let path = format!("/_matrix/federation/v2/send_join/{room}/$any");
    for _ in 0..1000 {
        let sent = resident.put(&here.name, path.clone(), json!({ "room_id": room }));
        match refusal(sent.await) {
            (400, _) => {}
            refused => {
                assert_eq!(refused, (429, "M_LIMIT_EXCEEDED".to_owned()));
                return;
            }
        }
    }
    panic!("a thousand joins at once are let through");
}

#[tokio::test]
async fn r_33_a_join_need_not_say_where_it_comes_from() {
    let door = Door::public("11").await;
    let join = door
        .template("join", |event| {
            event.as_object_mut().unwrap().remove("origin");
        })
        .await;
    assert!(!join.json.contains("\"origin\""), "{}", join.json);
    door.send("v2/send_join", &join).await.unwrap();
    assert_eq!(door.membership(&door.charlie).await.unwrap(), "join");
}

#[tokio::test]
async fn r_49_a_server_that_was_in_before_is_among_the_servers() {
    let door = Door::public("11").await;
    door.join().await;
    let other = door.resident().user("chris");
    let made = door.make("join", &other, "11").await.unwrap();
    let join = door
        .resident()
        .sign(&made["event"].to_string(), RoomVersion::V11);
    let path = format!(
        "/_matrix/federation/v2/send_join/{}/{}?omit_members=true",
        door.room, join.event_id
    );
    let body = serde_json::from_str(&join.json).unwrap();
    let answer = door.resident().put(&door.stage.here.name, path, body);
    let answer = answer.await.unwrap();
    let mut servers: Vec<&str> = list(&answer["servers_in_room"])
        .iter()
        .map(|server| server.as_str().unwrap())
        .collect();
    servers.sort_unstable();
    assert_eq!(servers, ["here.test", "resident.test"]);
}

#[tokio::test]
async fn r_37_a_join_is_sent_to_the_others_in_the_room_and_not_back() {
    let door = Door::public("11").await;
    let other = Resident::start(&door.stage.network, "other.test");
    let here = &door.stage.here.name;
    let dora = other.user("dora");
    other.join(here, &door.room, &dora).await;
    let (_, join) = door.join().await;
    let heard = other.event(join.event_id.as_str()).await;
    assert_eq!(heard.json, join.json);
    // What is said next is the first that charlie's server hears.
    let said = door.alice.say(&door.room, "hello").await;
    let first = door.resident().pdu("anything", |_| true).await;
    assert_eq!(first.event_id.as_str(), said);
    other.event(&said).await;
}

#[tokio::test]
async fn o_2_who_did_not_answer_is_not_asked_sooner_for_a_restart_of_ours() {
    let door = Door::public("11").await;
    let other = Resident::start(&door.stage.network, "other.test");
    let here = &door.stage.here;
    let dora = other.user("dora");
    other.join(&here.name, &door.room, &dora).await;
    let (_, join) = door.join().await;
    other.event(join.event_id.as_str()).await;

    door.stage.network.cut(&other.name);
    let missed = door.alice.say(&door.room, "missed").await;
    door.resident().event(&missed).await;
    let destination = async || {
        let name = other.name.clone();
        let read = move |c: &mut dyn storage::Conn| storage::queues::destination(c, &name);
        let found = here.store().read(read).await.unwrap();
        found.filter(|destination| destination.failing_since_ms.is_some())
    };
    let before = until("it does not arrive", &destination).await;
    here.restart().await;
    let said = door.alice.say(&door.room, "said").await;
    door.resident().event(&said).await;
    assert_eq!(destination().await, Some(before));

    // It is heard of: now there is no need to wait.
    door.stage.network.mend(&other.name);
    let nobody = json!({ "push": [] });
    other.edu_to(&here.name, "m.presence", nobody).await;
    other.event(&missed).await;
    other.event(&said).await;
}

#[tokio::test]
async fn r_38_who_joins_beside_another_event_learns_of_it() {
    let door = Door::public("11").await;
    let join = door.template("join", |_| ()).await;
    let said = door.alice.say(&door.room, "meanwhile").await;
    door.send("v2/send_join", &join).await.unwrap();
    until_member(&door.alice, &door.room, &door.charlie, "join").await;
    // Nobody tells charlie's server what was said before he came; but something that follows it.
    let tie = door
        .resident()
        .pdu("what ties both", |pdu| {
            pdu.prev_events.iter().any(|id| id.as_str() == said)
        })
        .await;
    assert!(tie.prev_events.contains(&join.event_id), "{}", tie.json);
}

/// A door through which dora of another server has gone, who says things that our server does not hear.
async fn with_dora() -> (Door, Arc<Resident>, Arc<Room>, [Arc<Pdu>; 3]) {
    let door = Door::public("11").await;
    let other = Resident::start(&door.stage.network, "other.test");
    let dora = other.user("dora");
    let here = &door.stage.here.name;
    let (room, _) = other.join(here, &door.room, &dora).await;
    let said = ["one", "two", "three"].map(|words| room.send(&other, message(&dora, words)));
    (door, other, room, said)
}

#[tokio::test]
async fn r_30_a_join_that_comes_after_what_is_not_here_is_caught_up_with() {
    let (door, other, room, [one, two, three]) = with_dora().await;
    other.serve_gap(&three, &[&one, &two]);
    let join = member(&door.charlie, &door.charlie, "join").after(&[&three]);
    let join = room.make(door.resident(), join);
    let answer = door.send("v2/send_join", &join).await.unwrap();
    assert_eq!(answer["event"]["state_key"], door.charlie.as_str());
    for event in [&one, &two, &three] {
        assert!(door.alice.can_see(event).await, "{}", event.json);
    }
    assert_eq!(door.membership(&door.charlie).await.unwrap(), "join");
    // Dora's server hears of it.
    other.event(join.event_id.as_str()).await;
}

#[tokio::test]
async fn r_30_a_join_that_comes_after_what_nobody_has_is_not_taken() {
    let (door, other, room, [_, _, three]) = with_dora().await;
    other.hide(&three);
    let join = member(&door.charlie, &door.charlie, "join").after(&[&three]);
    let join = room.make(door.resident(), join);
    let sent = door.send("v2/send_join", &join).await;
    let Err(AskError::Unreachable { reason }) = sent else {
        panic!("{sent:?}");
    };
    assert!(reason.contains("500"), "{reason}");
    assert_eq!(other.take_asked("event "), 1);
    assert_eq!(door.membership(&door.charlie).await, None);
}

///
#[tokio::test]
async fn r_60_a_knocker_is_shown_the_room() {
    let door = Door::open(json!({
        "preset": "private_chat",
        "room_version": "11",
        "name": "Behind the door",
        "topic": "Who is there?",
    }))
    .await;
    let refused = refusal(door.make("knock", &door.charlie, "11").await);
    assert_eq!(refused, forbidden());
    let rules = json!({ "join_rule": "knock" });
    set(&door.alice, &door.room, "m.room.join_rules", "", rules).await;
    let refused = refusal(door.make("knock", &door.charlie, "6").await);
    assert_eq!(refused.1, "M_INCOMPATIBLE_ROOM_VERSION");
    let knock = door.template("knock", |_| ()).await;
    let answer = door.send("v1/send_knock", &knock).await.unwrap();
    assert_eq!(
        kinds(&answer["knock_room_state"]),
        [
            "m.room.create ",
            "m.room.join_rules ",
            "m.room.name ",
            "m.room.topic ",
        ]
    );
    for event in list(&answer["knock_room_state"]) {
        assert!(event["signatures"].is_object(), "{event}");
    }
    assert_eq!(door.membership(&door.charlie).await.unwrap(), "knock");

    // Version 6 has no knocking.
    let door = Door::public("6").await;
    let refused = refusal(door.make("knock", &door.charlie, "6").await);
    assert_eq!(refused, forbidden());
}

///
#[tokio::test]
async fn u_51_an_endpoint_that_is_not_there_and_a_method_that_it_has_not() {
    let door = Door::public("11").await;
    let here = &door.stage.here;
    for path in [
        "/_matrix/unknown",
        "/_matrix/client/unknown",
        "/_matrix/client/v1/unknown",
        "/_matrix/client/v3/room/unknown",
        "/_matrix/federation/unknown",
        "/_matrix/federation/v1/unknown",
        "/_matrix/key/unknown",
        "/_matrix/key/v2/unknown",
        "/_matrix/media/unknown",
        "/_matrix/media/v3/unknown",
    ] {
        let (status, answer) = here.ask("GET", path, "", Value::Null).await;
        assert_eq!(
            (status, &answer["errcode"]),
            (404, &json!("M_UNRECOGNIZED")),
            "{path}"
        );
    }
    for (method, path) in [
        ("PUT", "/_matrix/client/v3/login"),
        ("PUT", "/_matrix/federation/v1/version"),
        ("PUT", "/_matrix/key/v2/query"),
        ("PATCH", "/_matrix/media/v3/upload"),
    ] {
        let (status, answer) = here.ask(method, path, "", Value::Null).await;
        assert_eq!(
            (status, &answer["errcode"]),
            (405, &json!("M_UNRECOGNIZED")),
            "{path}"
        );
    }
}

#[tokio::test]
async fn u_51_our_keys_are_given_to_everybody_and_signed_by_themselves() {
    let door = Door::public("11").await;
    let here = &door.stage.here;
    let path = "/_matrix/key/v2/server";
    let (status, keys) = here.ask("GET", path, "", Value::Null).await;
    assert_eq!(status, 200);
    assert_eq!(keys["server_name"], "here.test");
    // an hour, at least.
    let until = keys["valid_until_ts"].as_i64().unwrap();
    assert!(until > crate::dag::now_ms() + 3_600_000, "{keys}");
    let key = crate::world::key_of(&here.name);
    let id = key.key_id().to_string();
    assert_eq!(keys["verify_keys"][&id]["key"], key.public_base64());
    assert!(keys["old_verify_keys"].is_object());
    let signed = keys.as_object().unwrap();
    let verified = protocol::signature::verify_json(signed, &here.name, &id, &key.verify_key());
    assert!(verified.is_ok(), "{keys}");
}

#[tokio::test]
async fn r_02_a_request_that_is_not_signed_as_it_should_be() {
    let door = Door::public("11").await;
    let (here, network) = (&door.stage.here.name, &door.stage.network);
    // Another server signs as the resident, whose key it does not have.
    let liar = Resident::impostor(network, "resident.test");
    let path = format!(
        "/_matrix/federation/v1/make_join/{}/{}?ver=11",
        door.room, door.charlie
    );
    let call = federation::Call::get(here, path.clone(), crate::world::PATIENCE);
    let refused = refusal(liar.request::<Value>(call, usize::MAX).await);
    assert_eq!(refused, (401, "M_UNAUTHORIZED".to_owned()));
    let (status, answer) = door.stage.here.ask("GET", &path, "", Value::Null).await;
    assert_eq!(
        (status, &answer["errcode"]),
        (401, &json!("M_UNAUTHORIZED"))
    );
}
