//! What others are sent while the room is partial, and what those get who were forgotten meanwhile.

use std::sync::Arc;

use protocol::pdu::Pdu;
use serde_json::json;

use crate::dag::{member, state};
use crate::resident::Resident;
use crate::stage::Stage;
use crate::world::{Syncs, User};

const UPDATE: &str = "m.device_list_update";

#[tokio::test]
async fn t_05_a_message_is_sent_at_once() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    stage.join(&alice).await;
    let said = alice.say(stage.room.id.as_str(), "hello").await;
    let pdu = stage.resident.event(&said).await;
    assert_eq!(&*pdu.kind, "m.room.message");
    assert_eq!(pdu.sender.as_str(), alice.id);
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_52_a_new_display_name_is_sent_at_once() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    stage.join(&alice).await;
    let path = format!("/profile/{}/displayname", alice.id);
    alice.put(&path, json!({ "displayname": "Alice 2" })).await;
    let named = |pdu: &Pdu| {
        let name = pdu.content_get_str("displayname");
        pdu.is("m.room.member", &alice.id) && name.as_deref() == Some("Alice 2")
    };
    let pdu = stage.resident.pdu("the new name", named).await;
    assert_eq!(pdu.membership(), Some("join"));
    stage.end(&alice).await;
}

/// A stage with a second server, which is in the room or will be, and alice.
async fn two_residents(stage: &mut Stage) -> (User, Arc<Resident>) {
    let second = stage.second();
    stage.resident.serve_event_auth();
    second.serve_event_auth();
    (stage.here.register("alice").await, second)
}

/// Elsie of the second server joins; our server is told if it is there yet.
fn elsie_joins(stage: &Stage, second: &Resident) -> Arc<Pdu> {
    let elsie = second.user("elsie");
    stage.room.send(second, member(&elsie, &elsie, "join"))
}

/// A change of a device reaches exactly these. That it does not reach the others is seen from a later message,
/// as all that is sent to a server arrives in order.
async fn check_update(alice: &User, name: &str, reaches: &[&Resident], not: &[&Resident]) {
    alice.rename_device(name).await;
    for resident in reaches {
        let update = resident.edu(UPDATE).await;
        assert_eq!(update["device_display_name"], name);
    }
    for resident in not {
        pass_fence(alice, resident, name).await;
        assert_eq!(resident.edus(UPDATE), 0);
    }
}

/// All that was sent to the server before has arrived when this returns.
async fn pass_fence(alice: &User, resident: &Resident, name: &str) {
    let path = format!("/sendToDevice/m.fence/{}", name.replace(' ', "_"));
    let messages = json!({ resident.user("elsie"): { "*": {} } });
    alice.put(&path, json!({ "messages": messages })).await;
    resident.edu("m.direct_to_device").await;
}

/// The resync ends; then alice leaves, and the second server hears of it, too.
async fn end_for_both(stage: &Stage, alice: &User, second: &Resident) {
    stage.end(alice).await;
    second.leave_of(&alice.id).await;
}

/// The resync ends; then alice leaves, and the second server does not hear of it.
async fn end_for_one(stage: &Stage, alice: &User, second: &Resident) {
    stage.end(alice).await;
    pass_fence(alice, second, "the end").await;
    second.assert_quiet();
}

#[tokio::test]
async fn t_32_device_updates_reach_all_servers_of_the_room() {
    let mut stage = Stage::set().await;
    let (alice, second) = two_residents(&mut stage).await;
    elsie_joins(&stage, &second);
    stage.join(&alice).await;
    check_update(&alice, "one", &[&stage.resident, &second], &[]).await;
    stage.release();
    stage.until_full(&alice).await;
    check_update(&alice, "two", &[&stage.resident, &second], &[]).await;
    end_for_both(&stage, &alice, &second).await;
}

#[tokio::test]
async fn t_33_device_updates_reach_servers_that_join_later() {
    let mut stage = Stage::set().await;
    let (alice, second) = two_residents(&mut stage).await;
    stage.join(&alice).await;
    check_update(&alice, "one", &[&stage.resident], &[&second]).await;
    let join = elsie_joins(&stage, &second);
    stage.tell(&[&join]).await;
    alice.lazy().until_event(&join).await;
    check_update(&alice, "two", &[&stage.resident, &second], &[]).await;
    stage.release();
    stage.until_full(&alice).await;
    // P-51: as the second server is not of the join list, it is told again.
    assert_eq!(second.edu(UPDATE).await["device_display_name"], "two");
    check_update(&alice, "three", &[&stage.resident, &second], &[]).await;
    end_for_both(&stage, &alice, &second).await;
}

#[tokio::test]
async fn t_34_device_updates_reach_no_departed_server_once_the_room_is_full() {
    let mut stage = Stage::set().await;
    let (alice, second) = two_residents(&mut stage).await;
    elsie_joins(&stage, &second);
    stage.join(&alice).await;
    let elsie = second.user("elsie");
    let leave = stage.room.send(&second, member(&elsie, &elsie, "leave"));
    stage.tell(&[&leave]).await;
    alice.lazy().until_event(&leave).await;
    // She may not have been the last of her server.
    check_update(&alice, "one", &[&stage.resident, &second], &[]).await;
    stage.release();
    stage.until_full(&alice).await;
    check_update(&alice, "two", &[&stage.resident], &[&second]).await;
    end_for_one(&stage, &alice, &second).await;
}

/// Derek, an administrator who has left, puts elsie out, and we believe it.
async fn kicked_wrongly(stage: &Stage, alice: &User, second: &Resident) -> Syncs {
    let room = &stage.room;
    let (derek, elsie) = (stage.resident.user("derek"), second.user("elsie"));
    let charlie = stage.resident.user("charlie");
    let levels = json!({ "users": { charlie.as_str(): 100, derek.as_str(): 100 } });
    stage.send(state(&charlie, "m.room.power_levels", "", levels));
    let derek_was_in = room.member(&derek);
    stage.send(member(&derek, &derek, "leave"));
    stage.join(alice).await;

    let join = elsie_joins(stage, second);
    stage.tell(&[&join]).await;
    let mut lazy = alice.lazy();
    lazy.until_event(&join).await;
    check_update(alice, "one", &[&stage.resident, second], &[]).await;

    let create = room.state("m.room.create", "");
    let levels = room.state("m.room.power_levels", "");
    let kick = member(&derek, &elsie, "leave").standing_on(&[&create, &levels, &derek_was_in]);
    let kick = room.send_forbidden(&stage.resident, kick);
    stage.tell(&[&kick]).await;
    lazy.until_event(&kick).await;
    lazy
}

/// We believe that the second server is not in the room. It gets what it missed when the room is full, also if
/// elsie goes before that; then the server stays in touch by another room.
async fn check_missed(stage: &Stage, alice: &User, second: &Resident, mut lazy: Syncs, goes: bool) {
    check_update(alice, "two", &[&stage.resident], &[second]).await;
    let mut shared = None;
    if goes {
        let other = alice.public_room().await;
        let elsie = second.user("elsie");
        let (_, join) = second.join(&stage.here.name, &other, &elsie).await;
        lazy.until_event(&join).await;
        let leave = stage.room.send(second, member(&elsie, &elsie, "leave"));
        stage.tell(&[&leave]).await;
        lazy.until_event(&leave).await;
        shared = Some(other);
    }
    stage.release();
    stage.until_full(alice).await;
    let missed = second.edu(UPDATE).await;
    assert_eq!(missed["device_display_name"], "two");
    check_update(alice, "three", &[&stage.resident, second], &[]).await;
    let Some(shared) = shared else {
        return end_for_both(stage, alice, second).await;
    };
    alice.leave(&shared).await;
    second.leave_of(&alice.id).await;
    end_for_one(stage, alice, second).await;
}

#[tokio::test]
async fn t_35_device_updates_reach_a_wrongly_kicked_server_in_the_end() {
    let mut stage = Stage::set().await;
    let (alice, second) = two_residents(&mut stage).await;
    let lazy = kicked_wrongly(&stage, &alice, &second).await;
    check_missed(&stage, &alice, &second, lazy, false).await;
}

#[tokio::test]
async fn t_36_device_updates_reach_a_wrongly_kicked_server_that_has_left() {
    let mut stage = Stage::set().await;
    let (alice, second) = two_residents(&mut stage).await;
    let lazy = kicked_wrongly(&stage, &alice, &second).await;
    check_missed(&stage, &alice, &second, lazy, true).await;
}

/// Elsie is in the room, and nobody tells us.
async fn left_out(stage: &Stage, alice: &User, second: &Resident) -> Syncs {
    elsie_joins(stage, second);
    stage.resident.claim_to_be_alone();
    stage.join(alice).await;
    let mut lazy = alice.lazy();
    lazy.until_joined(&stage.room.id).await;
    lazy
}

#[tokio::test]
async fn t_37_device_updates_reach_a_server_that_was_left_out_in_the_end() {
    let mut stage = Stage::set().await;
    let (alice, second) = two_residents(&mut stage).await;
    let lazy = left_out(&stage, &alice, &second).await;
    check_missed(&stage, &alice, &second, lazy, false).await;
}

#[tokio::test]
async fn t_38_device_updates_reach_a_server_that_was_left_out_and_has_left() {
    let mut stage = Stage::set().await;
    let (alice, second) = two_residents(&mut stage).await;
    let lazy = left_out(&stage, &alice, &second).await;
    check_missed(&stage, &alice, &second, lazy, true).await;
}

#[tokio::test]
async fn o_02_a_server_that_was_left_out_is_sent_our_newest_event() {
    let mut stage = Stage::set_with(&[], |config| config.join.tell_missed_servers = true).await;
    let (alice, second) = two_residents(&mut stage).await;
    left_out(&stage, &alice, &second).await;
    let older = alice.say(stage.room.id.as_str(), "older").await;
    stage.resident.event(&older).await;
    let newest = alice.say(stage.room.id.as_str(), "newest").await;
    stage.resident.event(&newest).await;
    pass_fence(&alice, &second, "before").await;
    second.assert_quiet();

    stage.release();
    second.event(&newest).await;
    end_for_both(&stage, &alice, &second).await;
}
