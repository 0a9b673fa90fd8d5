//! Requests of clients that wait for the full state.

use serde_json::Value;

use crate::stage::Stage;
use crate::world::list;

#[tokio::test]
async fn t_19_the_members_at_a_partial_time_are_told_when_they_are_known() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    stage.join(&alice).await;
    let mut lazy = alice.lazy();
    lazy.until_joined(&stage.room.id).await;
    let token = lazy.since.as_deref().unwrap();
    let path = format!("/rooms/{}/members?at={token}", stage.room.id);
    let waiting = alice.begin("GET", path, Value::Null);
    stage.resident.asked("state_ids").await;
    assert!(waiting.is_waiting());

    stage.release();
    let answer = waiting.answer().await;
    let mut members: Vec<&str> = list(&answer["chunk"])
        .iter()
        .filter_map(|event| event["state_key"].as_str())
        .collect();
    members.sort_unstable();
    let (charlie, derek) = (stage.resident.user("charlie"), stage.resident.user("derek"));
    assert_eq!(members, [&*alice.id, &*charlie, &*derek]);
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_29_joined_members_are_told_when_they_are_known() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    stage.join(&alice).await;
    let path = format!("/rooms/{}/joined_members", stage.room.id);
    let waiting = alice.begin("GET", path, Value::Null);
    stage.resident.asked("state_ids").await;
    // Another request of hers is answered meanwhile.
    alice.lazy().until_joined(&stage.room.id).await;
    assert!(waiting.is_waiting());

    stage.release();
    let answer = waiting.answer().await;
    for user in [&alice.id, &stage.resident.user("derek")] {
        let member = answer["joined"][user].as_object().unwrap();
        assert!(member.contains_key("display_name"), "{answer}");
        assert!(member.contains_key("avatar_url"), "{answer}");
    }
    stage.end(&alice).await;
}
