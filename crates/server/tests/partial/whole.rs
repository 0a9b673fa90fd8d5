//! Residents that leave nothing out, or give a bad copy of something; and a state that nobody gives.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::json;

use crate::dag::{member, message};
use crate::resident::{Gate, Resident};
use crate::stage::Stage;
use crate::world::{User, joined, list, members_in_state};

/// A room that erin of a second server is in, too.
async fn with_erin(change: impl FnOnce(&mut homeserver::config::Config)) -> (Stage, Arc<Resident>) {
    let mut stage = Stage::set_with(&[], change).await;
    let second = stage.second();
    let erin = second.user("erin");
    stage.room.send(&second, member(&erin, &erin, "join"));
    (stage, second)
}

async fn members(user: &User, stage: &Stage) -> BTreeSet<String> {
    let path = format!("/rooms/{}/members", stage.room.id);
    let members = user.get(&path).await;
    let keys = list(&members["chunk"])
        .iter()
        .filter_map(|event| event["state_key"].as_str());
    keys.map(str::to_owned).collect()
}

#[tokio::test]
async fn o_49_the_user_is_in_before_the_members_of_a_whole_answer_are_verified() {
    let (stage, second) = with_erin(|config| config.join.members_first = 0).await;
    let alice = stage.here.register("alice").await;
    stage.resident.give_all_members();
    // Whether erin has joined, nobody can say before that.
    let gate = Gate::new(false);
    second.hold_keys(&gate);
    alice
        .join(stage.room.id.as_str(), &stage.resident.name)
        .await;
    let room = alice.lazy().until_joined(&stage.room.id).await;
    assert!(!members_in_state(&room).contains(&*second.user("erin")));
    let event = alice.say(stage.room.id.as_str(), "hello").await;
    stage.resident.event(&event).await;
    // The servers in the room are those of the members that are not verified so far.
    second.event(&event).await;
    let path = format!("/rooms/{}/members", stage.room.id);
    let waiting = alice.begin("GET", path, json!(null));
    assert!(waiting.is_waiting());

    gate.open();
    waiting.answer().await;
    let all = [
        stage.resident.user("charlie"),
        stage.resident.user("derek"),
        second.user("erin"),
        alice.id.clone(),
    ];
    assert_eq!(members(&alice, &stage).await, BTreeSet::from(all));
    // J-57: nobody was asked for what had been given.
    assert_eq!(stage.resident.take_asked("state"), 0);
    assert_eq!(stage.resident.take_asked("event"), 0);
    stage.end(&alice).await;
    second.leave_of(&alice.id).await;
}

#[tokio::test]
async fn j_57_a_small_whole_answer_makes_a_full_room() {
    let (stage, second) = with_erin(|_| ()).await;
    let root = stage.here.administrator("root").await;
    let alice = stage.here.register("alice").await;
    stage.resident.give_all_members();
    alice
        .join(stage.room.id.as_str(), &stage.resident.name)
        .await;
    let job = root.get("/_vestibule/admin/v1/joins/1").await;
    assert_eq!(job["state"], "full", "{job}");
    // J-79: they meet for the first time.
    stage.resident.edu("m.device_list_update").await;
    second.edu("m.device_list_update").await;
    assert_eq!(members(&alice, &stage).await.len(), 4);
    assert_eq!(stage.resident.take_asked("state"), 0);
    stage.end(&alice).await;
    second.leave_of(&alice.id).await;
}

#[tokio::test]
async fn j_59_a_membership_that_one_server_has_badly_signed_is_had_from_another() {
    let (stage, second) = with_erin(|config| config.join.ask_for_left_out = true).await;
    let alice = stage.here.register("alice").await;
    let derek = stage.resident.user("derek");
    stage.resident.give_all_members();
    stage.resident.forge(&stage.room.member(&derek));
    alice
        .join(stage.room.id.as_str(), &stage.resident.name)
        .await;
    let known = members(&alice, &stage).await;
    assert!(known.contains(&derek), "{known:?}");
    assert_eq!(stage.resident.take_asked("state"), 0);
    second.asked("event").await;
    stage.end(&alice).await;
    second.leave_of(&alice.id).await;
}

#[tokio::test]
async fn a_room_is_lived_in_while_its_state_is_held_back() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let bob = stage.here.register("bob").await;
    let charlie = stage.resident.user("charlie");
    stage.resident.serve_history();
    let old = stage.send(message(&charlie, "before"));
    stage.join(&alice).await;
    let mut lazy = alice.lazy();
    lazy.until_joined(&stage.room.id).await;

    let said = alice.say(stage.room.id.as_str(), "hello").await;
    let said = stage.resident.event(&said).await;
    let heard = stage.send(message(&charlie, "welcome").after(&[&said]));
    stage.tell(&[&heard]).await;
    lazy.until_event(&heard).await;

    let path = format!("/rooms/{}/messages?dir=b&limit=20", stage.room.id);
    let history = alice.get(&path).await;
    let shown = |id: &str| list(&history["chunk"]).iter().any(|e| e["event_id"] == id);
    assert!(shown(old.event_id.as_str()), "{history}");

    // J-74: bob's join is a handshake, too, for as long as nobody here knows all the members.
    stage.resident.take_asked("send_join");
    bob.join(stage.room.id.as_str(), &stage.resident.name).await;
    assert_eq!(stage.resident.take_asked("send_join"), 1);
    alice.leave(stage.room.id.as_str()).await;
    stage.resident.leave_of(&alice.id).await;
    lazy.until_left(&stage.room.id).await;
    alice
        .join(stage.room.id.as_str(), &stage.resident.name)
        .await;
    assert!(joined(&alice.lazy().now().await, &stage.room.id).is_some());
    assert_eq!(stage.resident.take_asked("send_join"), 1);

    stage.release();
    stage.until_full(&alice).await;
    bob.leave(stage.room.id.as_str()).await;
    stage.resident.leave_of(&bob.id).await;
    stage.end(&alice).await;
}
