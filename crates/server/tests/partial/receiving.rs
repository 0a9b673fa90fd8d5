//! What others send while the room is partial.

use serde_json::{Value, json};

use crate::dag::{message, state};
use crate::resident::Gate;
use crate::stage::Stage;
use crate::world::{joined, list, until};

/// What of the room's ephemeral events is of this kind.
fn ephemeral(sync: &Value, stage: &Stage, kind: &str) -> Option<Value> {
    let room = joined(sync, &stage.room.id)?;
    let mut events = list(&room["ephemeral"]["events"]).iter();
    let found = events.find(|event| event["type"] == kind)?;
    Some(found["content"].clone())
}

#[tokio::test]
async fn t_06_typing_is_seen() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    stage.join(&alice).await;
    let derek = stage.resident.user("derek");
    let types = async |typing: bool| {
        let content = json!({
            "room_id": stage.room.id,
            "user_id": derek,
            "typing": typing,
        });
        let here = &stage.here.name;
        stage.resident.edu_to(here, "m.typing", content).await;
    };
    let who = |who: Value| {
        let stage = &stage;
        move |sync: &Value| {
            let typing = ephemeral(sync, stage, "m.typing")?;
            (typing["user_ids"] == who).then_some(())
        }
    };
    types(true).await;
    let mut lazy = alice.lazy();
    lazy.until("derek typing", who(json!([derek]))).await;

    let charlie = stage.resident.user("charlie");
    let news = stage.send(message(&charlie, "news"));
    stage.tell(&[&news]).await;
    lazy.until_event(&news).await;

    stage.release();
    types(false).await;
    lazy.until("nobody typing", who(json!([]))).await;
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_07_presence_is_seen() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    stage.join(&alice).await;
    let derek = stage.resident.user("derek");
    let online = json!({
        "user_id": derek,
        "presence": "online",
        "last_active_ago": 100,
    });
    let here = &stage.here.name;
    let push = json!({ "push": [online] });
    stage.resident.edu_to(here, "m.presence", push).await;
    let seen = |sync: &Value| {
        let mut events = list(&sync["presence"]["events"]).iter();
        let found = events.find(|event| event["sender"] == *derek)?;
        Some(found["content"]["presence"].clone())
    };
    let presence = alice.lazy().until("derek's presence", seen).await;
    assert_eq!(presence, "online");
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_08_a_message_to_a_device_arrives() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    stage.join(&alice).await;
    let derek = stage.resident.user("derek");
    let content = json!({
        "message_id": "one",
        "sender": derek,
        "type": "m.test",
        "messages": { &alice.id: { "*": { "word": "yes" } } },
    });
    let here = &stage.here.name;
    stage
        .resident
        .edu_to(here, "m.direct_to_device", content)
        .await;
    let seen = |sync: &Value| list(&sync["to_device"]["events"]).first().cloned();
    let event = alice.lazy().until("the message", seen).await;
    assert_eq!(event["sender"], *derek);
    assert_eq!(event["content"]["word"], "yes");
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_09_a_receipt_is_seen() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    stage.join(&alice).await;
    let derek = stage.resident.user("derek");
    let read = json!({ "data": { "ts": 1_436_451_550_453_u64 }, "event_ids": ["unheard-of"] });
    let content = json!({ stage.room.id.as_str(): { "m.read": { &derek: read } } });
    let here = &stage.here.name;
    stage.resident.edu_to(here, "m.receipt", content).await;
    let seen = |sync: &Value| ephemeral(sync, &stage, "m.receipt");
    let receipts = alice.lazy().until("the receipt", seen).await;
    let ts = &receipts["unheard-of"]["m.read"][&derek]["ts"];
    assert_eq!(*ts, 1_436_451_550_453_u64);
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_12_a_message_of_a_member_not_heard_of_is_received() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let mut lazy = alice.lazy();
    lazy.now().await;
    stage.join(&alice).await;
    stage.resident.serve_event_auth();
    let derek = stage.resident.user("derek");
    let event = stage.send(message(&derek, "hello"));
    stage.tell(&[&event]).await;
    stage.check_receiving(&alice, &mut lazy, &event).await;
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_13_an_event_whose_parent_is_missing_is_received() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let mut lazy = alice.lazy();
    lazy.now().await;
    stage.join(&alice).await;
    stage.resident.serve_event_auth();
    let derek = stage.resident.user("derek");
    let a = stage.send(message(&derek, "a"));
    let b = stage.send(message(&derek, "b"));
    stage.resident.serve_gap(&b, &[&a]);
    stage.tell(&[&b]).await;
    stage.check_receiving(&alice, &mut lazy, &b).await;
    // Only the state before the join was asked for.
    assert_eq!(stage.resident.take_asked("state_ids"), 1);
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_14_an_event_one_of_whose_parents_is_missing_is_received() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let mut lazy = alice.lazy();
    lazy.now().await;
    stage.join(&alice).await;
    stage.resident.serve_event_auth();
    let derek = stage.resident.user("derek");
    let m = stage.room.member(&alice.id);
    let a = stage.send(message(&derek, "a"));
    let b = stage.send(message(&derek, "b").after(&[&a, &m]));
    stage.resident.serve_gap(&b, &[&a]);
    stage.tell(&[&b]).await;
    stage.check_receiving(&alice, &mut lazy, &b).await;
    assert_eq!(stage.resident.take_asked("state_ids"), 1);
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_15_an_event_one_of_whose_grandparents_is_missing_is_received() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let mut lazy = alice.lazy();
    lazy.now().await;
    stage.join(&alice).await;
    let derek = stage.resident.user("derek");
    let m = stage.room.member(&alice.id);
    let a = stage.send(message(&derek, "a"));
    let b = stage.send(message(&derek, "b").after(&[&a, &m]));
    let c = stage.send(message(&derek, "c"));
    stage.resident.serve_gap(&c, &[&b]);
    let state = stage.room.all_state();
    stage.resident.serve_state_at(&a, state, &Gate::new(true));
    stage.tell(&[&c]).await;
    stage.check_receiving(&alice, &mut lazy, &c).await;
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_23_the_resync_ends_where_events_came_before_those_they_follow() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let mut lazy = alice.lazy();
    lazy.now().await;
    stage.join(&alice).await;
    let charlie = stage.resident.user("charlie");
    let late = stage.send(message(&charlie, "late"));
    let outliers: Vec<_> = (0..100)
        .map(|number| {
            let key = format!("state_{number}");
            stage.send(state(
                &charlie,
                "outlier",
                &key,
                json!({ "number": number }),
            ))
        })
        .collect();
    let first = stage.send(message(&charlie, "first"));
    let second = stage.send(message(&charlie, "second"));
    stage.resident.serve_gap(&second, &[&first]);
    let newest = outliers.last().unwrap();
    let state = stage.room.all_state();
    stage
        .resident
        .serve_state_at(newest, state, &Gate::new(true));
    stage.tell(&[&second]).await;
    // P-12: both are shown, though the room is partial.
    lazy.until_event(&second).await;
    assert!(alice.can_see(&first).await);

    stage.tell(&[&late]).await;
    for half in outliers.chunks(50) {
        stage.tell(&half.iter().collect::<Vec<_>>()).await;
    }
    for event in outliers.iter().step_by(10).chain([newest]) {
        until("an outlier in the timeline", async || {
            alice.can_see(event).await.then_some(())
        })
        .await;
    }
    stage.release();
    alice.eager().until_joined(&stage.room.id).await;
    stage.end(&alice).await;
}
