//! What other servers send into rooms that our server knows in full: U-22, U-24, U-25, U-27 to U-30, U-43, and what
//! of U-50 is about forks.

use std::sync::Arc;

use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use serde_json::{Value, json};

use crate::dag::{Room, member, message, state};
use crate::network::Network;
use crate::resident::{Gate, Resident};
use crate::stage::{Stage, plain};
use crate::ways::{content, set, until_event, until_member};
use crate::world::{Server, Syncs, User, joined, list, until};

/// A room of alice's, in which charlie of the resident is, too.
struct Shared {
    stage: Stage,
    alice: User,
    room: Arc<Room>,
    charlie: String,
    /// The newest event that both know.
    join: Arc<Pdu>,
}

impl Shared {
    async fn set(version: &str) -> Self {
        let stage = Stage::set().await;
        let alice = stage.here.register("alice").await;
        let request = json!({ "preset": "public_chat", "room_version": version });
        let room = alice.create_room(request).await;
        let charlie = stage.resident.user("charlie");
        let here = &stage.here.name;
        stage.resident.serve_full_joins();
        let (room, join) = stage.resident.join(here, &room, &charlie).await;
        Self {
            stage,
            alice,
            room,
            charlie,
            join,
        }
    }

    fn resident(&self) -> &Arc<Resident> {
        &self.stage.resident
    }

    fn say(&self, words: &str) -> Arc<Pdu> {
        let said = message(&self.charlie, words);
        self.room.send(self.resident(), said)
    }

    async fn tell(&self, pdus: &[&Arc<Pdu>]) {
        self.stage.tell(pdus).await;
    }
}

/// A room of the resident's charlie that alice has joined, of which she knows everything.
async fn joined_in_full(version: RoomVersion) -> (Stage, User, Arc<Room>) {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let room = Room::found(&stage.resident, version, &[]);
    stage.resident.serve_full_joins();
    alice.join(room.id.as_str(), &stage.resident.name).await;
    (stage, alice, room)
}

#[tokio::test]
async fn u_22_what_stands_on_a_rejected_event_is_rejected() {
    let shared = Shared::set("11").await;
    let (room, resident, charlie) = (&shared.room, shared.resident(), &shared.charlie);
    let rejected = state(charlie, "m.room.power_levels", "", json!({ "users": {} }));
    let rejected = room.make(resident, rejected);
    shared.tell(&[&rejected]).await;

    let create = room.state("m.room.create", "");
    let rules = room.state("m.room.join_rules", "");
    let levels = room.state("m.room.power_levels", "");
    let joined = &shared.join;
    let outlier = member(charlie, charlie, "join");
    let outlier = outlier.standing_on(&[&create, &rules, &rejected, joined]);
    let outlier = room.make(resident, outlier);
    resident.serve_event_auth();
    let upon = |words: &str| {
        let said = message(charlie, words);
        room.make(
            resident,
            said.standing_on(&[&create, &rules, &levels, joined, &outlier]),
        )
    };
    let (first, second) = (upon("first"), upon("second"));
    let sentinel = shared.say("sentinel");
    shared.tell(&[&first, &second, &sentinel]).await;
    shared.alice.eager().until_event(&sentinel).await;
    for bad in [&rejected, &outlier, &first, &second] {
        assert!(!shared.alice.can_see(bad).await, "{}", bad.json);
    }
}

/// The ids in a room's timeline, as far back as a sync goes.
async fn timeline(user: &User, room: &Room) -> Vec<String> {
    let sync = user.eager().now().await;
    let room = joined(&sync, &room.id).expect("a joined room");
    let events = list(&room["timeline"]["events"]).iter();
    events
        .map(|event| event["event_id"].as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn u_24_a_gap_is_filled_in_order() {
    let shared = Shared::set("11").await;
    let missing: Vec<_> = (0..5).map(|n| shared.say(&n.to_string())).collect();
    let newest = shared.say("newest");
    shared
        .resident()
        .serve_gap(&newest, &missing.iter().collect::<Vec<_>>());
    shared.tell(&[&newest]).await;
    shared.alice.eager().until_event(&newest).await;
    let seen = timeline(&shared.alice, &shared.room).await;
    let from = |id: &str| seen.iter().position(|seen| seen == id).unwrap();
    let expected = [&shared.join]
        .into_iter()
        .chain(&missing)
        .chain([&newest])
        .map(|pdu| pdu.event_id.to_string());
    let expected: Vec<_> = expected.collect();
    assert_eq!(seen[from(&expected[0])..], expected);
    // One question, from what was known to what came; none about state.
    assert_eq!(
        shared.resident().gaps_asked(),
        [(
            vec![shared.join.event_id.clone()],
            vec![newest.event_id.clone()]
        )]
    );
    assert_eq!(shared.resident().take_asked("state"), 0);
}

#[tokio::test]
async fn u_25_a_bad_event_in_a_gap_is_dropped_and_what_stands_on_it_refused() {
    let (stage, alice, room) = joined_in_full(RoomVersion::V11).await;
    let (resident, charlie) = (&stage.resident, stage.resident.user("charlie"));
    let join = room.tip();
    // What no version from 6 on allows.
    let bad = message(&charlie, "bad");
    let bad = room.make_with(resident, bad, RoomVersion::V5, |event| {
        event["content"]["bad_val"] = json!(1.1);
    });
    let second = message(&charlie, "second").after(&[&bad]);
    let second = room.send(resident, second);
    resident.serve_gap(&second, &[&bad]);
    stage.tell(&[&second]).await;
    resident.asked("get_missing_events").await;
    let third = room.send(resident, message(&charlie, "third"));
    resident.serve_gap(&third, &[]);
    stage.tell(&[&third]).await;
    resident.asked("get_missing_events").await;
    let earliest = vec![join.event_id.clone()];
    assert_eq!(
        resident.gaps_asked(),
        [
            (earliest.clone(), vec![second.event_id.clone()]),
            (earliest, vec![third.event_id.clone()])
        ]
    );
    // The room goes on.
    let after = message(&charlie, "after").after(&[&join]);
    let after = room.make(resident, after);
    stage.tell(&[&after]).await;
    alice.eager().until_event(&after).await;
    for lost in [&bad, &second, &third] {
        assert!(!alice.can_see(lost).await, "{}", lost.json);
    }
}

#[tokio::test]
async fn u_27_an_oversized_event_is_rejected_and_what_comes_after_it_is_not() {
    let (stage, alice, room) = joined_in_full(RoomVersion::V10).await;
    let (resident, charlie) = (&stage.resident, stage.resident.user("charlie"));
    let join = room.tip();
    // 280 bytes, 70 letters.
    let long = state(&charlie, "my.room.breaker", "", json!({}));
    let long = room.make_with(resident, long, RoomVersion::V10, |event| {
        event["state_key"] = json!("💥".repeat(70));
    });
    let after = message(&charlie, "after").after(&[&long]);
    let after = room.send(resident, after);
    resident.serve_gap(&after, &[&long]);
    stage.tell(&[&after]).await;
    alice.eager().until_event(&after).await;
    assert_eq!(
        resident.gaps_asked(),
        [(vec![join.event_id.clone()], vec![after.event_id.clone()])]
    );
    assert!(!alice.can_see(&long).await);
    let path = format!("/rooms/{}/state", room.id);
    let all = alice.get(&path).await;
    let breaker = |event: &Value| event["type"] == "my.room.breaker";
    assert!(!list(&all).iter().any(breaker));
}

#[tokio::test]
async fn u_28_a_hole_in_an_auth_chain_is_no_way_in() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let sentinel = stage.here.register("sentinel").await;
    let request = json!({ "preset": "public_chat", "room_version": "10" });
    let id = alice.create_room(request).await;
    sentinel.join(&id, "here.test").await;
    // So many that a few that are missing are not worth asking for all.
    for _ in 0..50 {
        alice.leave(&id).await;
        alice.join(&id, "here.test").await;
    }
    let (resident, bob) = (&stage.resident, stage.resident.user("bob"));
    let (room, join) = resident.join(&stage.here.name, &id, &bob).await;
    let [create, levels, rules] = ["m.room.create", "m.room.power_levels", "m.room.join_rules"]
        .map(|kind| room.state(kind, ""));
    let renamed = |name: &str, before: &Arc<Pdu>| {
        let content = json!({ "membership": "join", "displayname": name });
        let event = state(&bob, "m.room.member", &bob, content);
        let event = event.standing_on(&[&create, &levels, &rules, before]);
        room.make(resident, event.after(&[before]))
    };
    let a = renamed("A", &join);
    let b = renamed("B", &a);
    let c = renamed("C", &b);
    let d = renamed("D", &c);
    let e = renamed("E", &d);
    room.add(&e);
    let first = room.send(resident, message(&bob, "before which state is asked for"));
    let mut state_then = room.all_state();
    state_then.sort_by(|a, b| a.event_id.cmp(&b.event_id));
    let second = room.send(resident, message(&bob, "in the gap"));
    let third = room.send(resident, message(&bob, "sent"));
    resident.serve_gap(&third, &[&second]);
    resident.serve_state_at(&first, state_then, &Gate::new(true));
    resident.hide(&b);
    stage.tell(&[&third]).await;
    resident.asked(&format!("event {}", b.event_id)).await;
    // Single events are asked for, not all.
    assert_eq!(resident.take_asked("state $"), 0);

    // Another branch, on what is good.
    let good = message(&bob, "good").after(&[&join]);
    let good = good.standing_on(&[&create, &levels, &join]);
    let good = room.make(resident, good);
    stage.tell(&[&good]).await;
    sentinel.eager().until_event(&good).await;
    let bobs = until_member(&alice, &id, &bob, "join").await;
    assert_eq!(bobs.get("displayname"), None, "{bobs}");
    for bad in [&c, &d, &e] {
        assert!(!alice.can_see(bad).await, "{}", bad.json);
    }
}

#[tokio::test]
async fn u_29_an_event_that_was_refused_is_taken_once_the_gap_is_filled() {
    let (stage, alice, room) = joined_in_full(RoomVersion::V11).await;
    let (resident, charlie) = (&stage.resident, stage.resident.user("charlie"));
    let a = room.send(resident, message(&charlie, "a"));
    let b = room.send(resident, message(&charlie, "b"));
    resident.serve_gap(&b, &[]);
    stage.tell(&[&b]).await;
    resident.asked("get_missing_events").await;
    let mut syncs = alice.eager();
    stage.tell(&[&a]).await;
    syncs.until_event(&a).await;
    assert!(!alice.can_see(&b).await);
    stage.tell(&[&b]).await;
    syncs.until_event(&b).await;
}

#[tokio::test]
async fn p_16_an_event_is_not_lost_because_nobody_was_reached_about_its_gap() {
    let (stage, alice, room) = joined_in_full(RoomVersion::V11).await;
    let (resident, charlie) = (&stage.resident, stage.resident.user("charlie"));
    let a = room.send(resident, message(&charlie, "a"));
    let b = room.send(resident, message(&charlie, "b"));
    resident.serve_gap(&b, &[&a]);
    stage.network.cut(&resident.name);
    stage.tell(&[&b]).await;
    until("the question", async || {
        (stage.network.count("get_missing_events") > 0).then_some(())
    })
    .await;
    assert!(!alice.can_see(&b).await);
    stage.network.mend(&resident.name);
    until("both", async || {
        // Whoever is heard of may be asked again.
        let status = json!({ "push": [] });
        let here = &stage.here.name;
        resident.edu_to(here, "m.presence", status).await;
        alice.can_see(&b).await.then_some(())
    })
    .await;
    assert!(alice.can_see(&a).await);
}

#[tokio::test]
async fn p_16_an_event_that_is_put_off_outlives_a_restart() {
    let (stage, alice, room) = joined_in_full(RoomVersion::V11).await;
    let (resident, charlie) = (&stage.resident, stage.resident.user("charlie"));
    let a = room.send(resident, message(&charlie, "a"));
    let b = room.send(resident, message(&charlie, "b"));
    resident.serve_gap(&b, &[&a]);
    stage.network.cut(&resident.name);
    stage.tell(&[&b]).await;
    let put_off = |c: &mut dyn storage::Conn| {
        let sql = "SELECT MAX(attempts) FROM staged_pdus";
        c.query_one(sql, &[], |row| row.opt_int(0))
    };
    until("it is put off", async || {
        let attempts = stage.here.store().read(put_off).await.unwrap();
        attempts.filter(|attempts| *attempts > 0)
    })
    .await;
    stage.here.restart().await;
    stage.network.mend(&resident.name);
    alice.eager().until_event(&b).await;
    assert!(alice.can_see(&a).await);
}

#[tokio::test]
async fn p_16_another_server_of_the_room_is_asked_where_the_sender_is_not_reached() {
    let mut stage = Stage::set().await;
    let second = stage.second();
    let erin = second.user("erin");
    stage.room.send(&second, member(&erin, &erin, "join"));
    let alice = stage.here.register("alice").await;
    for resident in [&stage.resident, &second] {
        resident.serve_full_joins();
    }
    let room = &stage.room;
    alice.join(room.id.as_str(), &stage.resident.name).await;
    let charlie = stage.resident.user("charlie");
    let a = stage.send(message(&charlie, "a"));
    let b = stage.send(message(&charlie, "b"));
    let c = stage.send(message(&charlie, "c"));
    second.serve_gap(&c, &[&b]);
    // Of the state before what is given, too.
    second.serve_state_at(&a, room.all_state(), &Gate::new(true));
    stage.network.cut(&stage.resident.name);
    stage.tell(&[&c]).await;
    alice.eager().until_event(&c).await;
    assert!(alice.can_see(&b).await);
}

struct Three {
    alice: User,
    bob: User,
    charlie: User,
    /// Bob's server is shut out of it.
    room: String,
    /// All are in it.
    open: String,
}

/// Alice, bob and charlie on servers of their own.
async fn shut_out() -> Three {
    let network = Arc::<Network>::default();
    let start = async |name: &str| Server::start(&network, name, plain).await;
    let [a, b, c] = [
        start("a.test").await,
        start("b.test").await,
        start("c.test").await,
    ];
    let (alice, bob) = (a.register("alice").await, b.register("bob").await);
    let charlie = c.register("charlie").await;
    let (room, open) = (alice.public_room().await, alice.public_room().await);
    bob.join(&room, "a.test").await;
    for user in [&bob, &charlie] {
        user.join(&open, "a.test").await;
        until_member(user, &open, &alice.id, "join").await;
    }
    until_member(&bob, &room, &alice.id, "join").await;
    let acl = json!({ "allow": ["*"], "allow_ip_literals": true, "deny": ["b.test"] });
    let acl = set(&alice, &room, "m.room.server_acl", "", acl).await;
    until_event(&bob, &room, &acl).await;
    charlie.join(&room, "a.test").await;
    until_member(&charlie, &room, &alice.id, "join").await;
    Three {
        alice,
        bob,
        charlie,
        room,
        open,
    }
}

#[tokio::test]
async fn u_30_nothing_comes_from_a_server_that_is_shut_out() {
    let three = shut_out().await;
    let blocked = three.bob.say(&three.room, "blocked").await;
    let heard = three.bob.say(&three.open, "heard").await;
    for user in [&three.alice, &three.charlie] {
        until_event(user, &three.open, &heard).await;
        let path = format!("/rooms/{}/event/{blocked}", three.room);
        assert_eq!(user.refused("GET", &path, Value::Null).await.0, 404);
        let acl = content(user, &three.room, "m.room.server_acl").await;
        assert_eq!(acl["deny"], json!(["b.test"]));
    }
}

#[tokio::test]
async fn u_30_nor_that_somebody_types_or_has_read() {
    let three = shut_out().await;
    let (alice, bob) = (&three.alice, &three.bob);
    for room in [&three.room, &three.open] {
        let said = alice.say(room, "read-me").await;
        until_event(bob, room, &said).await;
        let path = format!("/rooms/{room}/typing/{}", bob.id);
        let typing = json!({ "typing": true, "timeout": 30_000 });
        bob.put(&path, typing).await;
        let path = format!("/rooms/{room}/receipt/m.read/{said}");
        bob.post(&path, json!({})).await;
    }
    let told = |sync: &Value, room: &str, kind: &str| {
        let room = joined(sync, room).map(|room| room["ephemeral"]["events"].clone());
        let events = room.unwrap_or_default();
        list(&events).iter().any(|event| {
            let by_bob = event["content"].to_string().contains(&bob.id);
            event["type"] == kind && by_bob
        })
    };
    for user in [alice, &three.charlie] {
        for kind in ["m.typing", "m.receipt"] {
            until(kind, async || {
                let sync = user.eager().now().await;
                assert!(!told(&sync, &three.room, kind), "{sync}");
                told(&sync, &three.open, kind).then_some(())
            })
            .await;
        }
    }
}

const GAP: usize = 250;

/// Many events in a row by somebody who changes his name, of which our server knows none.
fn names(room: &Room, resident: &Resident, user: &str) -> Vec<Arc<Pdu>> {
    let named = (0..GAP).map(|n| {
        let content = json!({ "membership": "join", "displayname": format!("Number {n}") });
        room.send(resident, state(user, "m.room.member", user, content))
    });
    named.collect()
}

/// The last of these is sent; of the state before the gap the resident lies.
async fn send_behind_a_lie(
    stage: &Stage,
    room: &Room,
    events: &[Arc<Pdu>],
    lie: impl FnOnce(&mut Vec<Arc<Pdu>>),
) -> Arc<Pdu> {
    let newest = events.last().unwrap();
    // The ten before it are given; before these, state is asked for.
    let given = &events[GAP - 11..GAP - 1];
    let at = &events[GAP - 12];
    let mut state_then = room.all_state();
    for pdu in &mut state_then {
        if pdu.event_id == newest.event_id {
            *pdu = events[GAP - 13].clone();
        }
    }
    lie(&mut state_then);
    stage
        .resident
        .serve_gap(newest, &given.iter().collect::<Vec<_>>());
    stage
        .resident
        .serve_state_at(at, state_then, &Gate::new(true));
    stage.tell(&[newest]).await;
    newest.clone()
}

#[tokio::test]
async fn u_43_a_lie_about_the_join_rule_does_not_hold() {
    let shared = Shared::set("12").await;
    let (room, resident, alice) = (&shared.room, shared.resident(), &shared.alice);
    let id = room.id.as_str();
    let bob = shared.stage.here.register("bob").await;
    bob.join(id, "here.test").await;
    resident
        .pdu("bob's join", |pdu| pdu.is("m.room.member", &bob.id))
        .await;
    let public = room.state("m.room.join_rules", "");
    let private = json!({ "join_rule": "invite" });
    let private = set(alice, id, "m.room.join_rules", "", private).await;
    resident.event(&private).await;
    alice.leave(id).await;
    resident.leave_of(&alice.id).await;

    let events = names(room, resident, &shared.charlie);
    let newest = send_behind_a_lie(&shared.stage, room, &events, |state| {
        state.retain(|pdu| !pdu.is("m.room.join_rules", ""));
        state.push(public);
    })
    .await;
    bob.eager().until_event(&newest).await;
    let rules = content(&bob, id, "m.room.join_rules").await;
    assert_eq!(rules["join_rule"], "invite");
}

#[tokio::test]
async fn u_43_a_lie_about_the_power_levels_does_not_hold() {
    let shared = Shared::set("12").await;
    let (room, resident, creator) = (&shared.room, shared.resident(), &shared.alice);
    let id = room.id.as_str();
    let [alice, bob, zara] = ["admin", "bob", "zara"];
    let alice = shared.stage.here.register(alice).await;
    let bob = shared.stage.here.register(bob).await;
    let zara = shared.stage.here.register(zara).await;
    let charlie = &shared.charlie;
    let eve = resident.user("eve");
    let kind = "m.room.power_levels";
    let levels = json!({ "users": { &alice.id: 100 } });
    let first = set(creator, id, kind, "", levels).await;
    let first = resident.event(&first).await;
    for user in [&alice, &bob] {
        user.join(id, "here.test").await;
        resident
            .pdu("a join", |pdu| pdu.is("m.room.member", &user.id))
            .await;
    }
    let levels = json!({ "users": { &alice.id: 100, &bob.id: 50 } });
    let second = set(&alice, id, kind, "", levels).await;
    resident.event(&second).await;
    let all = json!({ "users": { &alice.id: 100, &bob.id: 50, charlie: 50 } });
    let third = set(&bob, id, kind, "", all.clone()).await;
    let third = resident.event(&third).await;
    zara.join(id, "here.test").await;
    let zaras = resident
        .pdu("zara's join", |pdu| pdu.is("m.room.member", &zara.id))
        .await;

    // Eve comes in beside zara, and her server has not heard of zara.
    room.lose(&zaras);
    let eves = room.send(resident, member(&eve, &eve, "join").after(&[&third]));
    shared.tell(&[&eves]).await;
    alice.eager().until_event(&eves).await;
    let events = names(room, resident, &eve);
    let newest = send_behind_a_lie(&shared.stage, room, &events, |state| {
        state.retain(|pdu| !pdu.is(kind, ""));
        state.push(first);
    })
    .await;
    alice.eager().until_event(&newest).await;
    let now = content(&alice, id, kind).await;
    assert_eq!(now["users"], all["users"]);
}

/// The events that a sync with this filter for the timeline shows of a room.
async fn filtered(syncs: &Syncs, room: &Room, filter: Value) -> Value {
    let filter = json!({ "room": { "timeline": filter } });
    let sync = syncs.filtered(&filter).now().await;
    joined(&sync, &room.id).expect("a joined room").clone()
}

#[tokio::test]
async fn u_50_nothing_is_lost_between_a_sync_and_the_messages_before_it() {
    let (stage, alice, room) = joined_in_full(RoomVersion::V11).await;
    let bob = stage.here.register("bob").await;
    bob.join(room.id.as_str(), "here.test").await;
    stage
        .resident
        .pdu("bob's join", |pdu| pdu.is("m.room.member", &bob.id))
        .await;
    let mut syncs = bob.eager();
    syncs.now().await;
    // The network falls apart: the resident says this, and here is said that.
    let charlie = stage.resident.user("charlie");
    let there = room.make(&stage.resident, message(&charlie, "there"));
    let say = async |words: &str| {
        let said = alice.say(room.id.as_str(), words).await;
        stage.resident.event(&said).await;
        said
    };
    let mut here = Vec::new();
    for words in ["1", "2", "3", "4"] {
        here.push(say(words).await);
    }
    stage.tell(&[&there]).await;
    alice.eager().until_event(&there).await;
    for words in ["5", "6", "7"] {
        here.push(say(words).await);
    }
    let ids = |events: &Value| -> Vec<String> {
        let ids = list(events).iter().map(|event| &event["event_id"]);
        ids.map(|id| id.as_str().unwrap().to_owned()).collect()
    };
    let shown = filtered(&syncs, &room, json!({ "limit": 4 })).await;
    let mut expected = vec![there.event_id.to_string()];
    expected.extend_from_slice(&here[4..]);
    assert_eq!(ids(&shown["timeline"]["events"]), expected);
    let from = shown["timeline"]["prev_batch"].as_str().unwrap();
    let path = format!("/rooms/{}/messages?dir=b&limit=4&from={from}", room.id);
    let before = alice.get(&path).await;
    let mut expected = here[..4].to_vec();
    expected.reverse();
    assert_eq!(ids(&before["chunk"]), expected);
}

#[tokio::test]
async fn u_50_a_change_of_state_is_shown_although_what_ties_it_in_is_filtered_out() {
    let (stage, alice, room) = joined_in_full(RoomVersion::V11).await;
    let id = room.id.as_str();
    let said = alice.say(id, "1").await;
    stage.resident.event(&said).await;
    let name = json!({ "name": "From the other branch" });
    let charlie = stage.resident.user("charlie");
    let name = room.make(&stage.resident, state(&charlie, "m.room.name", "", name));
    for words in ["3", "4"] {
        let said = alice.say(id, words).await;
        stage.resident.event(&said).await;
    }
    stage.tell(&[&name]).await;
    alice.eager().until_event(&name).await;
    let path = format!("/rooms/{id}/send/please_filter_me/5");
    alice.put(&path, json!({ "body": "5" })).await;
    stage
        .resident
        .pdu("the last", |pdu| &*pdu.kind == "please_filter_me")
        .await;
    let filter = json!({ "not_types": ["please_filter_me"], "limit": 1 });
    let shown = filtered(&alice.eager(), &room, filter).await;
    let state = list(&shown["state"]["events"]);
    let named = |event: &Value| event["event_id"] == name.event_id.as_str();
    assert!(state.iter().any(named), "{shown}");
}
