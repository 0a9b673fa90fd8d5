//! The devices of other servers' users: whose lists are kept, and what our users are told of them.

use std::sync::Arc;

use protocol::pdu::Pdu;
use serde_json::{Value, json};

use crate::dag::{member, message, state};
use crate::stage::Stage;
use crate::world::{Syncs, User, list};

#[tokio::test]
async fn t_10_a_device_update_is_told_of_when_the_room_is_full() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    stage.join(&alice).await;
    let mut lazy = alice.lazy();
    lazy.now().await;
    let derek = stage.resident.user("derek");
    let update = json!({ "device_id": "QBUAZIFURK", "stream_id": 1, "user_id": derek });
    let here = &stage.here.name;
    stage
        .resident
        .edu_to(here, "m.device_list_update", update)
        .await;
    assert!(list(&lazy.now().await["device_lists"]["changed"]).is_empty());

    stage.release();
    let changed = |sync: &Value| {
        let changed = list(&sync["device_lists"]["changed"]);
        (!changed.is_empty()).then(|| changed.to_vec())
    };
    let changed = lazy.until("changed devices", changed).await;
    assert_eq!(changed, [json!(derek)]);
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_11_an_update_of_signing_keys_is_taken() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    stage.join(&alice).await;
    let update = json!({ "user_id": stage.resident.user("derek") });
    let here = &stage.here.name;
    stage
        .resident
        .edu_to(here, "m.signing_key_update", update)
        .await;
    stage.end(&alice).await;
}

/// A stage on which devices are served.
async fn set(levels: &[(&str, i64)]) -> (Stage, User) {
    let stage = Stage::set_with(levels, |_| ()).await;
    stage.resident.serve_event_auth();
    stage.resident.serve_devices();
    let alice = stage.here.register("alice").await;
    (stage, alice)
}

impl Stage {
    /// How many requests for the user's devices a query of alice's makes.
    async fn requests(&self, alice: &User, user: &str) -> usize {
        alice.query_keys(user).await;
        self.resident.take_asked(&format!("devices {user}"))
    }

    async fn assert_fetched(&self, alice: &User, user: &str) {
        assert_eq!(
            self.requests(alice, user).await,
            1,
            "{user} should be asked for"
        );
    }

    async fn assert_kept(&self, alice: &User, user: &str) {
        assert_eq!(
            self.requests(alice, user).await,
            0,
            "{user} should be known"
        );
    }

    async fn assert_first_fetched_then_kept(&self, alice: &User, user: &str) {
        self.assert_fetched(alice, user).await;
        self.assert_kept(alice, user).await;
    }

    /// A user of the resident joins or leaves, and our server hears of it.
    async fn tell_membership(&self, syncs: &mut Syncs, user: &str, membership: &str) -> Arc<Pdu> {
        let event = self.send(member(user, user, membership));
        self.tell(&[&event]).await;
        syncs.until_event(&event).await;
        event
    }

    async fn charlie_speaks(&self, syncs: &mut Syncs, words: &str) {
        let event = self.send(message(&self.resident.user("charlie"), words));
        self.tell(&[&event]).await;
        syncs.until_event(&event).await;
    }
}

#[tokio::test]
async fn t_39_the_lists_of_those_who_were_there_are_kept_when_the_room_is_full() {
    let (stage, alice) = set(&[]).await;
    let (charlie, derek) = (stage.resident.user("charlie"), stage.resident.user("derek"));
    stage.join(&alice).await;
    for user in [&charlie, &derek, &charlie, &derek] {
        stage.assert_fetched(&alice, user).await;
    }
    let mut lazy = alice.lazy();
    stage.charlie_speaks(&mut lazy, "one").await;
    stage
        .resident
        .update_device(&stage.here.name, &charlie)
        .await;
    stage.charlie_speaks(&mut lazy.clone(), "two").await;
    // P-57: he is not tracked, though he was seen.
    stage.assert_fetched(&alice, &charlie).await;

    stage.release();
    stage.until_full(&alice).await;
    lazy.until_devices("changed", &charlie).await;
    for user in [&charlie, &derek] {
        stage.assert_first_fetched_then_kept(&alice, user).await;
    }
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_40_who_was_there_and_joins_another_room_is_told_of() {
    let (stage, alice) = set(&[]).await;
    let charlie = stage.resident.user("charlie");
    stage.join(&alice).await;
    let mut lazy = alice.lazy();
    stage.charlie_speaks(&mut lazy, "one").await;
    stage
        .resident
        .update_device(&stage.here.name, &charlie)
        .await;
    let other = alice.public_room().await;
    stage
        .resident
        .join(&stage.here.name, &other, &charlie)
        .await;
    lazy.until_devices("changed", &charlie).await;
    alice.leave(&other).await;
    let left = |pdu: &Pdu| pdu.room_id.as_str() == other;
    stage.resident.pdu("the end of the other room", left).await;
    stage.end(&alice).await;
}

/// Elsie joins, and her list is kept.
async fn elsie_is_tracked(stage: &Stage, alice: &User) -> (Syncs, String) {
    stage.join(alice).await;
    let mut lazy = alice.lazy();
    lazy.now().await;
    let elsie = stage.resident.user("elsie");
    stage
        .tell_membership(&mut lazy.clone(), &elsie, "join")
        .await;
    lazy.until_devices("changed", &elsie).await;
    stage.assert_first_fetched_then_kept(alice, &elsie).await;
    (lazy, elsie)
}

#[tokio::test]
async fn t_41_the_list_of_a_new_member_is_kept() {
    let (stage, alice) = set(&[]).await;
    let (mut lazy, elsie) = elsie_is_tracked(&stage, &alice).await;
    stage.resident.update_device(&stage.here.name, &elsie).await;
    lazy.until_devices("changed", &elsie).await;
    stage.assert_first_fetched_then_kept(&alice, &elsie).await;
    stage.release();
    stage.until_full(&alice).await;
    stage.assert_kept(&alice, &elsie).await;
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_42_the_list_of_a_new_member_who_leaves_is_dropped() {
    let (stage, alice) = set(&[]).await;
    let (mut lazy, elsie) = elsie_is_tracked(&stage, &alice).await;
    stage
        .tell_membership(&mut lazy.clone(), &elsie, "leave")
        .await;
    lazy.until_devices("left", &elsie).await;
    stage.assert_fetched(&alice, &elsie).await;
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_43_the_list_of_a_new_member_is_dropped_when_we_leave() {
    let (stage, alice) = set(&[]).await;
    let (mut lazy, elsie) = elsie_is_tracked(&stage, &alice).await;
    alice.leave(stage.room.id.as_str()).await;
    lazy.until_devices("left", &elsie).await;
    stage.assert_fetched(&alice, &elsie).await;
    stage.resident.leave_of(&alice.id).await;
}

#[tokio::test]
async fn t_44_the_list_of_a_new_member_is_dropped_when_the_join_is_taken_back() {
    let (stage, alice) = set(&[]).await;
    let root = stage.here.administrator("root").await;
    let (mut lazy, elsie) = elsie_is_tracked(&stage, &alice).await;
    let joins = root.get("/_vestibule/admin/v1/joins").await;
    let job = &joins["joins"][0];
    assert_eq!(job["room_id"], stage.room.id.as_str());
    root.delete(&format!("/_vestibule/admin/v1/joins/{}", job["id"]))
        .await;
    lazy.until_devices("left", &elsie).await;
    stage.assert_fetched(&alice, &elsie).await;
    stage.resident.leave_of(&alice.id).await;
}

/// Fred, who has left, bans derek, and we believe it; so we do not believe derek when he puts elsie out.
async fn elsie_seems_in(stage: &Stage, alice: &User) -> (Syncs, [Arc<Pdu>; 2]) {
    let room = &stage.room;
    let [charlie, derek, elsie, fred] =
        ["charlie", "derek", "elsie", "fred"].map(|who| stage.resident.user(who));
    let users = json!({ charlie.as_str(): 100, derek.as_str(): 50, fred.as_str(): 100 });
    let levels = state(
        &charlie,
        "m.room.power_levels",
        "",
        json!({ "users": users }),
    );
    stage.send(levels);
    let fred_was_in = stage.send(member(&fred, &fred, "join"));
    stage.send(member(&fred, &fred, "leave"));
    stage.join(alice).await;

    let mut lazy = alice.lazy();
    stage.tell_membership(&mut lazy, &elsie, "join").await;
    let create = room.state("m.room.create", "");
    let levels = room.state("m.room.power_levels", "");
    let ban = member(&fred, &derek, "ban").standing_on(&[&create, &levels, &fred_was_in]);
    let ban = room.send_forbidden(&stage.resident, ban);
    stage.tell(&[&ban]).await;
    lazy.until_event(&ban).await;
    let kick = stage.send(member(&derek, &elsie, "leave"));
    stage.tell(&[&kick]).await;
    stage.charlie_speaks(&mut lazy, "sentinel").await;
    assert!(alice.can_see(&ban).await);
    assert!(!alice.can_see(&kick).await);
    stage.assert_first_fetched_then_kept(alice, &elsie).await;
    (lazy, [ban, kick])
}

/// The room becomes full, and both verdicts are turned round.
async fn until_truth(stage: &Stage, alice: &User, [ban, kick]: &[Arc<Pdu>; 2]) {
    stage.release();
    stage.until_full(alice).await;
    assert!(!alice.can_see(ban).await);
    assert!(alice.can_see(kick).await);
}

#[tokio::test]
async fn t_45_the_list_of_who_only_seemed_to_be_there_is_dropped() {
    let (stage, alice) = set(&[]).await;
    let elsie = stage.resident.user("elsie");
    let (mut lazy, verdicts) = elsie_seems_in(&stage, &alice).await;
    until_truth(&stage, &alice, &verdicts).await;
    lazy.until_devices("left", &elsie).await;
    stage.assert_fetched(&alice, &elsie).await;
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_46_the_list_of_who_was_out_for_a_while_is_fetched_anew() {
    let (stage, alice) = set(&[]).await;
    let elsie = stage.resident.user("elsie");
    let (mut lazy, verdicts) = elsie_seems_in(&stage, &alice).await;
    stage.tell_membership(&mut lazy, &elsie, "join").await;
    stage.assert_kept(&alice, &elsie).await;
    until_truth(&stage, &alice, &verdicts).await;
    stage.assert_fetched(&alice, &elsie).await;
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_47_the_list_of_who_comes_back_afterwards_is_fetched_anew() {
    let (stage, alice) = set(&[]).await;
    let elsie = stage.resident.user("elsie");
    let (mut lazy, verdicts) = elsie_seems_in(&stage, &alice).await;
    until_truth(&stage, &alice, &verdicts).await;
    lazy.until_devices("left", &elsie).await;
    stage.tell_membership(&mut lazy, &elsie, "join").await;
    stage.assert_fetched(&alice, &elsie).await;
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_48_the_list_of_who_comes_to_another_room_meanwhile_is_fetched_anew() {
    let (stage, alice) = set(&[]).await;
    let elsie = stage.resident.user("elsie");
    let (mut lazy, verdicts) = elsie_seems_in(&stage, &alice).await;
    let other = alice.public_room().await;
    let (_, join) = stage.resident.join(&stage.here.name, &other, &elsie).await;
    lazy.until_event(&join).await;
    stage.assert_kept(&alice, &elsie).await;
    until_truth(&stage, &alice, &verdicts).await;
    lazy.until_devices("changed", &elsie).await;
    stage.assert_fetched(&alice, &elsie).await;
    alice.leave(&other).await;
    let left = |pdu: &Pdu| pdu.room_id.as_str() == other;
    stage.resident.pdu("the end of the other room", left).await;
    stage.end(&alice).await;
}
