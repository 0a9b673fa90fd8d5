//! The handshake when it is cut off: taken back, or caught by a restart.

use room::effect::PartialMarker;
use room::write::{PartialChange, WriteSet};
use serde_json::json;

use crate::dag::{VERSION, member};
use crate::resident::Gate;
use crate::stage::Stage;
use crate::world::{Begun, User, until};

/// Alice begins to join, and the resident holds an answer back.
fn begin(stage: &Stage, alice: &User) -> Begun {
    let path = format!("/join/{}?via={}", stage.room.id, stage.resident.name);
    alice.begin("POST", path, json!({}))
}

/// An administrator takes the join back.
async fn cancel(root: &User) {
    let joins = root.get("/_vestibule/admin/v1/joins").await;
    let path = format!("/_vestibule/admin/v1/joins/{}", joins["joins"][0]["id"]);
    root.delete(&path).await;
    until("the end of the join", async || {
        let job = root.get(&path).await;
        (!job["finished_ts"].is_null()).then_some(())
    })
    .await;
}

async fn rooms_of(user: &User) -> usize {
    let rooms = user.get("/joined_rooms").await;
    rooms["joined_rooms"].as_array().unwrap().len()
}

#[tokio::test]
async fn a_join_that_is_taken_back_before_it_was_sent_leaves_nothing() {
    let stage = Stage::set().await;
    let root = stage.here.administrator("root").await;
    let alice = stage.here.register("alice").await;
    let gate = Gate::new(false);
    stage.resident.hold_make_join(&gate);
    let joining = begin(&stage, &alice);
    stage.resident.asked("make_join").await;
    cancel(&root).await;
    assert_eq!(joining.status().await, 502);
    gate.open();
    assert_eq!(rooms_of(&alice).await, 0);

    // Nothing is under way, so she can join as if nothing had been.
    stage.join(&alice).await;
    assert_eq!(stage.resident.take_asked("send_join"), 1);
    stage.end(&alice).await;
}

#[tokio::test]
async fn a_join_that_is_taken_back_after_it_was_sent_is_followed_by_a_leave() {
    let stage = Stage::set().await;
    stage.resident.serve_leaves();
    let root = stage.here.administrator("root").await;
    let alice = stage.here.register("alice").await;
    let gate = Gate::new(false);
    stage.resident.hold_send_join(&gate);
    let joining = begin(&stage, &alice);
    stage.resident.asked("send_join").await;
    cancel(&root).await;
    assert_eq!(joining.status().await, 502);
    gate.open();
    assert_eq!(rooms_of(&alice).await, 0);
    // The resident holds her as a member until the debt is paid.
    let leave = stage.resident.leave_of(&alice.id).await;
    assert_eq!(leave.sender.as_str(), alice.id);
    stage.resident.asked("make_leave").await;
}

#[tokio::test]
async fn s_35_a_join_that_a_restart_cuts_off_is_taken_up_with_the_same_event() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let before = Gate::new(false);
    stage.resident.hold_send_join(&before);
    let state = Gate::new(false);
    stage.resident.serve_state(&stage.room, &state);
    let joining = begin(&stage, &alice);
    stage.resident.asked("send_join").await;
    let join = stage.room.member(&alice.id);

    stage.here.restart().await;
    assert_ne!(joining.status().await, 200);
    before.open();
    stage.resident.asked("send_join").await;
    let mut lazy = alice.lazy();
    lazy.until_event(&join).await;
    assert_eq!(stage.room.member(&alice.id).event_id, join.event_id);
    state.open();
    stage.end(&alice).await;
}

#[tokio::test]
async fn o_48_an_administrator_names_a_server_to_join_through() {
    let mut stage = Stage::set().await;
    let second = stage.second();
    let elsie = second.user("elsie");
    stage.room.send(&second, member(&elsie, &elsie, "join"));
    let state = Gate::new(true);
    second.serve_state(&stage.room, &state);
    let root = stage.here.administrator("root").await;
    let alice = stage.here.register("alice").await;
    let never = Gate::new(false);
    stage.resident.hold_make_join(&never);
    let joining = begin(&stage, &alice);
    stage.resident.asked("make_join").await;

    let joins = root.get("/_vestibule/admin/v1/joins").await;
    let path = format!(
        "/_vestibule/admin/v1/joins/{}/server",
        joins["joins"][0]["id"]
    );
    root.post(&path, json!({ "server": second.name })).await;
    joining.answer().await;
    second.asked("send_join").await;
    stage.end(&alice).await;
    second.leave_of(&alice.id).await;
}

/// A marker and its join are one commit here; another version of this server may have left one without.
#[tokio::test]
async fn s_35_a_marker_without_its_join_is_gone_after_a_restart() {
    let stage = Stage::set().await;
    let mut writes = WriteSet::new(stage.room.id.clone(), VERSION);
    writes.partial = PartialChange::Mark(PartialMarker {
        servers_in_room: vec![stage.resident.name.clone()],
        joined_via: stage.resident.name.clone(),
        join_event: stage.room.tip().event_id.clone(),
        device_lists_at: 0,
    });
    let store = stage.here.store();
    storage::apply::apply(&store, writes)
        .await
        .unwrap()
        .unwrap();
    let partial = async || {
        store
            .read(storage::rooms::partial_rooms)
            .await
            .unwrap()
            .len()
    };
    assert_eq!(partial().await, 1);

    stage.here.restart().await;
    until("the end of the marker", async || {
        (partial().await == 0).then_some(())
    })
    .await;
    assert_eq!(stage.resident.take_asked("state"), 0);
    let alice = stage.here.register("alice").await;
    stage.join(&alice).await;
    stage.end(&alice).await;
}
