//! Coming and going while the room is partial.

use serde_json::{Value, json};

use crate::dag::member;
use crate::stage::Stage;
use crate::world::{Syncs, list};

/// Until somebody's membership is in the room's timeline, or in its state.
async fn until_member(syncs: &mut Syncs, stage: &Stage, user: &str, membership: &str) {
    let what = format!("{user}: {membership}");
    let look = |sync: &Value| {
        let rooms = &sync["rooms"];
        let shown = ["join", "leave"].iter().any(|section| {
            let room = &rooms[*section][stage.room.id.as_str()];
            let events = ["timeline", "state"].map(|part| list(&room[part]["events"]));
            events.into_iter().flatten().any(|event| {
                event["state_key"] == user && event["content"]["membership"] == membership
            })
        });
        shown.then_some(())
    };
    syncs.until(&what, look).await;
}

#[tokio::test]
async fn t_51_a_second_user_joins_while_the_room_is_partial() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let bob = stage.here.register("bob").await;
    stage.join(&alice).await;
    let mut lazy = alice.lazy();
    until_member(&mut lazy, &stage, &alice.id, "join").await;
    bob.join(stage.room.id.as_str(), &stage.resident.name).await;
    until_member(&mut lazy, &stage, &bob.id, "join").await;
    until_member(&mut bob.lazy(), &stage, &bob.id, "join").await;
    // J-17: the resident was asked again.
    assert_eq!(stage.resident.take_asked("send_join"), 2);
    stage.release();
    stage.until_full(&bob).await;
    bob.leave(stage.room.id.as_str()).await;
    stage.resident.leave_of(&bob.id).await;
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_53_a_leave_during_the_resync_is_seen_after_it() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    stage.join(&alice).await;
    let mut lazy = alice.lazy();
    lazy.until_joined(&stage.room.id).await;
    let path = format!("/rooms/{}/leave", stage.room.id);
    let leaving = alice.begin("POST", path, json!({}));
    stage.release();
    leaving.answer().await;
    lazy.until_left(&stage.room.id).await;
    stage.resident.leave_of(&alice.id).await;
    // C-12, C-2: the members are told, and a second leave is none.
    stage.until_full(&alice).await;
    alice.leave(stage.room.id.as_str()).await;
}

#[tokio::test]
async fn t_54_a_leave_does_not_wait_for_the_resync() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    stage.join(&alice).await;
    let mut lazy = alice.lazy();
    lazy.until_joined(&stage.room.id).await;
    let room = &stage.room;
    let mut auth = [
        room.state("m.room.create", ""),
        room.state("m.room.power_levels", ""),
        room.member(&alice.id),
    ]
    .map(|pdu| pdu.event_id.clone());
    alice.leave(room.id.as_str()).await;
    lazy.until_left(&stage.room.id).await;
    let leave = stage.resident.leave_of(&alice.id).await;
    // P-45: it is an event of ours like any other, and stands on no join rules.
    let mut names = leave.auth_events.clone();
    names.sort_unstable();
    auth.sort_unstable();
    assert_eq!(names, auth);
    assert_eq!(stage.network.count("send_leave"), 0);
    stage.release();
    stage.until_full(&alice).await;
    alice.leave(stage.room.id.as_str()).await;
}

#[tokio::test]
async fn t_55_the_first_leaves_after_a_second_partial_join() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let bob = stage.here.register("bob").await;
    stage.join(&alice).await;
    let mut lazy = alice.lazy();
    lazy.until_joined(&stage.room.id).await;
    bob.join(stage.room.id.as_str(), &stage.resident.name).await;
    let mut of_bob = bob.lazy();
    of_bob.until_joined(&stage.room.id).await;
    alice.leave(stage.room.id.as_str()).await;
    lazy.until_left(&stage.room.id).await;
    until_member(&mut of_bob, &stage, &alice.id, "leave").await;
    stage.resident.leave_of(&alice.id).await;
    stage.end(&bob).await;
}

#[tokio::test]
async fn t_56_a_rejoin_needs_no_end_of_the_resync() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    stage.join(&alice).await;
    let mut lazy = alice.lazy();
    lazy.until_joined(&stage.room.id).await;
    alice.leave(stage.room.id.as_str()).await;
    lazy.until_left(&stage.room.id).await;
    stage.resident.leave_of(&alice.id).await;
    alice
        .join(stage.room.id.as_str(), &stage.resident.name)
        .await;
    lazy.until_joined(&stage.room.id).await;
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_57_another_joins_after_the_first_has_left() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let bob = stage.here.register("bob").await;
    stage.join(&alice).await;
    let mut lazy = alice.lazy();
    lazy.until_joined(&stage.room.id).await;
    alice.leave(stage.room.id.as_str()).await;
    lazy.until_left(&stage.room.id).await;
    stage.resident.leave_of(&alice.id).await;
    bob.join(stage.room.id.as_str(), &stage.resident.name).await;
    let room = bob.lazy().until_joined(&stage.room.id).await;
    // His first timeline goes back over his own join to the stay of alice.
    let memberships = |part: &str| -> Vec<Value> {
        let events = list(&room[part]["events"]).iter();
        let hers = events.filter(|event| event["state_key"] == *alice.id);
        hers.map(|event| event["content"]["membership"].clone())
            .collect()
    };
    let (state, timeline) = (memberships("state"), memberships("timeline"));
    assert!(timeline.contains(&json!("leave")), "{room}");
    assert!(
        timeline.contains(&json!("join")) || state.contains(&json!("join")),
        "{room}"
    );
    stage.end(&bob).await;
}

/// T-58 and T-59: charlie puts alice out while the room is partial.
async fn check_put_out(membership: &str) {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    stage.join(&alice).await;
    let mut lazy = alice.lazy();
    lazy.until_joined(&stage.room.id).await;
    let charlie = stage.resident.user("charlie");
    let room = &stage.room;
    let auth = [
        &*room.state("m.room.create", ""),
        &*room.state("m.room.power_levels", ""),
        &*room.member(&alice.id),
        &*room.member(&charlie),
    ];
    let out = member(&charlie, &alice.id, membership).standing_on(&auth);
    let out = stage.send(out);
    stage.tell(&[&out]).await;
    lazy.until_left(&stage.room.id).await;
    if membership == "ban" {
        let path = format!("/join/{}?via={}", stage.room.id, stage.resident.name);
        let refused = alice.refused("POST", &path, json!({})).await;
        assert_eq!(refused, (403, "M_FORBIDDEN".to_owned()));
    }
    // The resync ends quietly: who was put out is told the members when it has.
    stage.resident.asked("state_ids").await;
    stage.release();
    stage.until_full(&alice).await;
}

#[tokio::test]
async fn t_58_a_kick_ends_a_stay() {
    check_put_out("leave").await;
}

#[tokio::test]
async fn t_59_a_ban_ends_a_stay() {
    check_put_out("ban").await;
}

#[tokio::test]
async fn t_62_a_purge_ends_all_of_it() {
    let stage = Stage::set().await;
    let alice = stage.here.administrator("alice").await;
    stage.join(&alice).await;
    alice.lazy().until_joined(&stage.room.id).await;
    stage.resident.asked("state_ids").await;
    let path = format!("/_synapse/admin/v1/rooms/{}", stage.room.id);
    alice.delete(&path).await;
    let sync = alice.lazy().now().await;
    let rooms = ["join", "leave"].map(|section| sync["rooms"][section].get(stage.room.id.as_str()));
    assert_eq!(rooms, [None, None]);
    // The late answer does no harm, and the room can be joined anew.
    stage.release();
    stage.resident.leave_of(&alice.id).await;
    let bob = stage.here.register("bob").await;
    stage.join(&bob).await;
    stage.end(&bob).await;
}
