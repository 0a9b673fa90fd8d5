//! Where the full state comes from, and what happens when it does not.

use std::sync::Arc;

use serde_json::json;

use crate::dag::{member, message, state};
use crate::resident::{Gate, Resident};
use crate::stage::{Stage, plain};
use crate::world::{Server, User, joined, until};

#[tokio::test]
async fn t_20_the_resync_goes_on_after_a_restart() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    stage.join(&alice).await;
    stage.resident.asked("state_ids").await;
    let mut eager = alice.eager();
    assert!(joined(&eager.now().await, &stage.room.id).is_none());

    stage.here.restart().await;
    assert!(joined(&eager.now().await, &stage.room.id).is_none());
    stage.resident.asked("state_ids").await;
    stage.release();
    eager.until_joined(&stage.room.id).await;
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_21_another_server_of_the_room_gives_the_state() {
    let network = Arc::default();
    let first = Server::start(&network, "first.test", plain).await;
    let second = Server::start(&network, "second.test", plain).await;
    let resident = Resident::start(&network, "resident.test");
    let alice = first.register("alice").await;
    let charlie = second.register("charlie").await;
    let room = alice.public_room().await;
    let (room, _) = resident
        .join(&first.name, &room, &resident.user("david"))
        .await;

    // The room is joined by a server that has no state to give.
    let gate = Gate::new(false);
    resident.answer_state_ids(200, json!({}), &gate);
    charlie.join(room.id.as_str(), &resident.name).await;
    let join = room.member(&charlie.id);
    resident.send(&first.name, &[&join], &[]).await;
    alice.lazy().until_event(&join).await;
    resident.asked("state_ids").await;
    let mut eager = charlie.eager();
    assert!(joined(&eager.now().await, &room.id).is_none());

    gate.open();
    eager.until_joined(&room.id).await;
    // S-21: it is asked for no state after that.
    assert_eq!(resident.take_asked("state"), 0);
    resident.assert_quiet();
}

/// The join that an administrator sees, as a path.
async fn job(root: &User, stage: &Stage) -> String {
    let joins = root.get("/_vestibule/admin/v1/joins").await;
    let job = &joins["joins"][0];
    assert_eq!(job["room_id"], stage.room.id.as_str());
    format!("/_vestibule/admin/v1/joins/{}", job["id"])
}

/// Alice joins, and nobody gives the state.
async fn refused_by_all(stage: &Stage) -> User {
    let alice = stage.here.register("alice").await;
    let not_seen = json!({ "errcode": "M_FORBIDDEN", "error": "you are not in the room" });
    let at_once = Gate::new(true);
    stage.resident.answer_state_ids(403, not_seen, &at_once);
    stage.join(&alice).await;
    stage.release();
    stage.resident.asked("state_ids").await;
    alice
}

#[tokio::test]
async fn s_22_a_resync_that_all_refuse_is_made_again_when_an_administrator_wishes() {
    let stage = Stage::set().await;
    let root = stage.here.administrator("root").await;
    let alice = refused_by_all(&stage).await;
    let job = job(&root, &stage).await;
    until("a failed round", async || {
        let shown = root.get(&job).await;
        let reason = shown["last_error"].as_str()?;
        reason.contains("M_FORBIDDEN").then_some(())
    })
    .await;
    // The room can be used meanwhile.
    let said = alice.say(stage.room.id.as_str(), "hello").await;
    stage.resident.event(&said).await;

    stage.resident.serve_state_ids_again();
    root.post(&format!("{job}/retry"), json!({})).await;
    stage.until_full(&alice).await;
    assert_eq!(root.get(&job).await["state"], "full");
    stage.end(&alice).await;
}

#[tokio::test]
async fn s_23_a_server_that_has_not_seen_the_join_is_soon_asked_again() {
    let stage = Stage::set().await;
    let alice = refused_by_all(&stage).await;
    stage.resident.serve_state_ids_again();
    stage.until_full(&alice).await;
    stage.end(&alice).await;
}

/// A stage with a second server in the room that has the state of this moment, for who asks it.
async fn with_a_second(compare: bool) -> (Stage, Arc<Resident>) {
    let mut stage = Stage::set_with(&[], |config| config.join.compare_donors = compare).await;
    let second = stage.second();
    let elsie = second.user("elsie");
    stage.room.send(&second, member(&elsie, &elsie, "join"));
    (stage, second)
}

#[tokio::test]
async fn o_48_an_administrator_names_a_server_that_gives_the_state() {
    let (stage, second) = with_a_second(false).await;
    let root = stage.here.administrator("root").await;
    let alice = stage.here.register("alice").await;
    second.serve_state(&stage.room, &Gate::new(true));
    stage.join(&alice).await;
    stage.resident.asked("state_ids").await;
    let job = job(&root, &stage).await;
    let server = json!({ "server": second.name });
    root.post(&format!("{job}/server"), server).await;
    // The first one has still not answered.
    stage.until_full(&alice).await;
    second.asked("state_ids").await;
    stage.end(&alice).await;
    second.leave_of(&alice.id).await;
}

#[tokio::test]
async fn o_46_who_leaves_a_ban_out_of_the_state_gets_nowhere() {
    let (stage, second) = with_a_second(true).await;
    let alice = stage.here.register("alice").await;
    let (charlie, derek) = (stage.resident.user("charlie"), stage.resident.user("derek"));
    let honest = stage.room.member(&derek);
    let ban = stage.send(member(&charlie, &derek, "ban"));
    second.serve_state(&stage.room, &Gate::new(true));
    let mut lie = stage.room.all_state();
    lie.retain(|pdu| pdu.event_id != ban.event_id);
    lie.push(honest);
    let at = stage.room.tip();
    stage.resident.serve_state_at(&at, lie, &Gate::new(true));
    alice
        .join(stage.room.id.as_str(), &stage.resident.name)
        .await;

    stage.until_full(&alice).await;
    second.asked("state_ids").await;
    let path = format!("/rooms/{}/state/m.room.member/{derek}", stage.room.id);
    assert_eq!(alice.get(&path).await["membership"], "ban");
    stage.end(&alice).await;
    second.leave_of(&alice.id).await;
}

#[tokio::test]
async fn s_37_a_full_room_stays_full_when_another_joins() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let bob = stage.here.register("bob").await;
    stage.join(&alice).await;
    stage.release();
    stage.until_full(&alice).await;
    assert_eq!(stage.resident.take_asked("send_join"), 1);

    bob.join(stage.room.id.as_str(), &stage.resident.name).await;
    let join = |pdu: &protocol::pdu::Pdu| pdu.is("m.room.member", &bob.id);
    stage.resident.pdu("bob's join", join).await;
    // J-79: they meet for the first time.
    let devices = stage.resident.edu("m.device_list_update").await;
    assert_eq!(devices["user_id"], *bob.id);
    let sync = bob.eager().now().await;
    assert!(joined(&sync, &stage.room.id).is_some());
    assert_eq!(stage.resident.take_asked("send_join"), 0);
    assert_eq!(stage.resident.take_asked("state_ids"), 1);
    let members = format!("/rooms/{}/joined_members", stage.room.id);
    let members = bob.get(&members).await;
    assert_eq!(members["joined"].as_object().unwrap().len(), 4);
    bob.leave(stage.room.id.as_str()).await;
    stage.resident.leave_of(&bob.id).await;
    stage.end(&alice).await;
}

#[tokio::test]
async fn s_37_a_full_room_stays_full_when_another_server_lets_somebody_in() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let bob = stage.here.register("bob").await;
    let club = bob.public_room().await;
    // The members of a club may come in, where charlie says so: alice may not invite.
    let charlie = stage.resident.user("charlie");
    let levels = json!({ "users": { charlie.as_str(): 100 }, "invite": 50 });
    stage.send(state(&charlie, "m.room.power_levels", "", levels));
    stage.join(&alice).await;
    stage.release();
    stage.until_full(&alice).await;
    let allow = json!([{ "type": "m.room_membership", "room_id": club }]);
    let rules = json!({ "join_rule": "restricted", "allow": allow });
    let rules = stage.send(state(&charlie, "m.room.join_rules", "", rules));
    stage.tell(&[&rules]).await;
    assert_eq!(stage.resident.take_asked("send_join"), 1);

    // J-45: all members are asked for, as we have them, and the room is not partial again.
    stage.resident.authorise_joins();
    bob.join(stage.room.id.as_str(), &stage.resident.name).await;
    assert_eq!(stage.resident.take_asked("send_join"), 1);
    let sync = bob.eager().now().await;
    assert!(joined(&sync, &stage.room.id).is_some());
    assert_eq!(stage.resident.take_asked("state_ids"), 1);
    let devices = stage.resident.edu("m.device_list_update").await;
    assert_eq!(devices["user_id"], *bob.id);
    bob.leave(stage.room.id.as_str()).await;
    stage.resident.leave_of(&bob.id).await;
    stage.end(&alice).await;
}

#[tokio::test]
async fn s_28_a_second_join_is_taken_up_by_the_same_resync() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let bob = stage.here.register("bob").await;
    stage.join(&alice).await;
    bob.join(stage.room.id.as_str(), &stage.resident.name).await;
    let charlie = stage.resident.user("charlie");
    let news = stage.send(message(&charlie, "news"));
    stage.tell(&[&news]).await;
    alice.lazy().until_event(&news).await;
    stage.release();
    stage.until_full(&bob).await;
    // Only the state before the first join was asked for.
    assert_eq!(stage.resident.take_asked("state_ids"), 1);
    bob.leave(stage.room.id.as_str()).await;
    stage.resident.leave_of(&bob.id).await;
    stage.end(&alice).await;
}

#[tokio::test]
async fn s_29_a_resync_that_all_refuse_is_given_up_when_nobody_is_left() {
    let stage = Stage::set().await;
    let root = stage.here.administrator("root").await;
    let alice = stage.here.register("alice").await;
    let gate = Gate::new(false);
    let left = json!({ "errcode": "M_FORBIDDEN", "error": "you are not in the room" });
    stage.resident.answer_state_ids(403, left, &gate);
    stage.join(&alice).await;
    stage.resident.asked("state_ids").await;
    let job = job(&root, &stage).await;
    alice.leave(stage.room.id.as_str()).await;
    stage.resident.leave_of(&alice.id).await;
    gate.open();
    until("the end of the resync", async || {
        let shown = root.get(&job).await;
        (shown["state"] == "cancelled").then_some(())
    })
    .await;
    // C-12: who has left is told the members that are known.
    stage.until_full(&alice).await;

    // A join after that is a first join again.
    stage.resident.serve_state_ids_again();
    let bob = stage.here.register("bob").await;
    stage.join(&bob).await;
    bob.lazy().until_joined(&stage.room.id).await;
    stage.end(&bob).await;
}
