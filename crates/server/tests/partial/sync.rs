//! What clients see in `/sync` while the room is partial, and when it becomes full.

use serde_json::Value;

use crate::dag::message;
use crate::stage::Stage;
use crate::world::{Syncs, User, joined, list, members_in_state};

/// T-1 and T-2: an eager client is not shown the room before it is full, and then at once.
async fn check_eager(incremental: bool) {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let mut eager = alice.eager();
    eager.now().await;
    let from_before = |eager: &mut Syncs| match incremental {
        true => eager.clone(),
        false => alice.eager(),
    };
    stage.join(&alice).await;
    let mut lazy = alice.lazy();
    lazy.until_joined(&stage.room.id).await;
    let sync = from_before(&mut eager).now().await;
    assert!(joined(&sync, &stage.room.id).is_none());

    let said = alice.say(stage.room.id.as_str(), "hello").await;
    let said = stage.resident.event(&said).await;
    lazy.until_event(&said).await;
    let mut eager = from_before(&mut eager);
    let sync = eager.now().await;
    assert!(joined(&sync, &stage.room.id).is_none());

    stage.resident.asked("state_ids").await;
    stage.release();
    stage.until_full(&alice).await;
    let sync = from_before(&mut eager).now().await;
    let room = joined(&sync, &stage.room.id).expect("the room is full");
    let members = members_in_state(room);
    for name in ["charlie", "derek"] {
        assert!(members.contains(&*stage.resident.user(name)), "{room}");
    }
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_01_an_eager_initial_sync_leaves_the_room_out() {
    check_eager(false).await;
}

#[tokio::test]
async fn t_02_an_eager_incremental_sync_leaves_the_room_out() {
    check_eager(true).await;
}

#[tokio::test]
async fn t_03_an_eager_long_poll_is_woken_by_the_end_of_the_resync() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    stage.join(&alice).await;
    let mut eager = alice.eager();
    assert!(joined(&eager.now().await, &stage.room.id).is_none());
    let poll = eager.begin();
    stage.resident.asked("state_ids").await;

    // What goes on in the room does not end it: a lazy client sees it and the poll goes on.
    let charlie = stage.resident.user("charlie");
    let news = stage.send(message(&charlie, "news"));
    stage.tell(&[&news]).await;
    alice.lazy().until_event(&news).await;
    assert!(poll.is_waiting());

    stage.release();
    let sync = poll.answer().await;
    assert!(joined(&sync, &stage.room.id).is_some(), "{sync}");
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_04_a_lazy_sync_shows_the_room_while_it_is_partial() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    stage.join(&alice).await;
    let room = alice.lazy().until_joined(&stage.room.id).await;
    let state = list(&room["state"]["events"]).iter();
    let timeline = list(&room["timeline"]["events"]).iter();
    let kinds: Vec<&Value> = state.chain(timeline).map(|event| &event["type"]).collect();
    for kind in ["m.room.create", "m.room.power_levels", "m.room.join_rules"] {
        assert!(kinds.iter().any(|is| **is == kind), "{room}");
    }
    stage.end(&alice).await;
}

async fn derek_speaks(
    stage: &Stage,
    alice: &User,
) -> (Syncs, [std::sync::Arc<protocol::pdu::Pdu>; 2]) {
    stage.join(alice).await;
    let mut lazy = alice.lazy();
    lazy.until_joined(&stage.room.id).await;
    stage.resident.serve_event_auth();
    let derek = stage.resident.user("derek");
    let first = stage.send(message(&derek, "first"));
    let second = stage.send(message(&derek, "second"));
    stage.tell(&[&first, &second]).await;
    lazy.clone().until_event(&second).await;
    (lazy, [first, second])
}

#[tokio::test]
async fn t_16_a_lazy_initial_sync_has_the_member_who_speaks() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    derek_speaks(&stage, &alice).await;
    let sync = alice.lazy().now().await;
    let room = joined(&sync, &stage.room.id).unwrap();
    assert!(members_in_state(room).contains(&*stage.resident.user("derek")));
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_17_a_lazy_gappy_sync_has_the_member_who_speaks() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let (lazy, [_, second]) = derek_speaks(&stage, &alice).await;
    let sync = lazy.gappy().now().await;
    let room = joined(&sync, &stage.room.id).unwrap();
    assert_eq!(room["timeline"]["limited"], true);
    assert_eq!(timeline_ids(room), [second.event_id.as_str()]);
    assert!(members_in_state(room).contains(&*stage.resident.user("derek")));
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_18_a_lazy_incremental_sync_has_the_member_who_speaks() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let (mut lazy, _) = derek_speaks(&stage, &alice).await;
    let sync = lazy.now().await;
    let room = joined(&sync, &stage.room.id).unwrap();
    assert!(members_in_state(room).contains(&*stage.resident.user("derek")));
    stage.end(&alice).await;
}

fn timeline_ids(room: &Value) -> Vec<&str> {
    let events = list(&room["timeline"]["events"]).iter();
    events
        .filter_map(|event| event["event_id"].as_str())
        .collect()
}

#[tokio::test]
async fn t_22_a_gappy_sync_over_the_end_of_the_resync_has_the_member_who_speaks() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    stage.join(&alice).await;
    let mut lazy = alice.lazy();
    lazy.until_joined(&stage.room.id).await;
    stage.release();
    alice.eager().until_joined(&stage.room.id).await;

    let derek = stage.resident.user("derek");
    let first = stage.send(message(&derek, "first"));
    stage.tell(&[&first]).await;
    let last = stage.send(message(&derek, "last"));
    stage.tell(&[&last]).await;
    alice.eager().until_event(&last).await;
    let sync = lazy.gappy().now().await;
    let room = joined(&sync, &stage.room.id).unwrap();
    assert_eq!(timeline_ids(room), [last.event_id.as_str()]);
    assert!(members_in_state(room).contains(&*derek), "{room}");
    stage.end(&alice).await;
}

#[tokio::test]
async fn p_31_an_eager_client_is_shown_a_room_that_becomes_full_as_a_new_one_and_once() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    stage.join(&alice).await;
    let (charlie, derek) = (stage.resident.user("charlie"), stage.resident.user("derek"));
    let mut eager = alice.eager();
    eager.now().await;
    let mut lazy = alice.lazy();
    lazy.until_joined(&stage.room.id).await;
    stage.release();
    stage.until_full(&alice).await;

    let again = eager.clone();
    for mut device in [eager.clone(), again] {
        let sync = device.now().await;
        let room = joined(&sync, &stage.room.id).unwrap();
        assert_eq!(room["timeline"]["limited"], true, "{room}");
        let members = members_in_state(room);
        assert!(
            members.contains(&*charlie) && members.contains(&*derek),
            "{room}"
        );
        let changed = list(&sync["device_lists"]["changed"]);
        for user in [&charlie, &derek] {
            assert!(changed.iter().any(|of| of == &**user), "{sync}");
        }
        assert!(joined(&device.now().await, &stage.room.id).is_none());
    }
    // O-56: a lazy client is told how many they are.
    let sync = lazy.now().await;
    let room = joined(&sync, &stage.room.id).unwrap();
    assert_eq!(room["summary"]["m.joined_member_count"], 3);
    assert!(list(&sync["device_lists"]["changed"]).is_empty());
    stage.end(&alice).await;
}
