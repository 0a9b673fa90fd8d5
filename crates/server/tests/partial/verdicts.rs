//! Events judged on partial state, and judged again on the full one.

use serde_json::json;

use crate::dag::{member, message, state};
use crate::resident::Gate;
use crate::stage::Stage;

#[tokio::test]
async fn t_24_a_rejected_event_stays_rejected() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let mut lazy = alice.lazy();
    lazy.now().await;
    stage.join(&alice).await;
    stage.resident.serve_event_auth();
    let (charlie, derek) = (stage.resident.user("charlie"), stage.resident.user("derek"));
    let bad = state(&derek, "m.room.test", "", json!({ "body": "bad" }));
    let bad = stage.room.send_forbidden(&stage.resident, bad);
    let sentinel = stage.send(message(&charlie, "sentinel"));
    stage.tell(&[&bad, &sentinel]).await;
    lazy.until_event(&sentinel).await;
    assert!(!alice.can_see(&bad).await);

    let event = stage.send(message(&charlie, "hello"));
    stage.tell(&[&event]).await;
    stage.check_receiving(&alice, &mut lazy, &event).await;
    assert!(!alice.can_see(&bad).await);
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_25_state_that_was_wrongly_accepted_goes() {
    let stage = Stage::empty(&[("derek", 50)], |_| ()).await;
    let alice = stage.here.register("alice").await;
    let mut lazy = alice.lazy();
    lazy.now().await;
    stage.resident.serve_event_auth();
    let (charlie, derek) = (stage.resident.user("charlie"), stage.resident.user("derek"));
    let was_in = stage.send(member(&derek, &derek, "join"));
    stage.send(member(&derek, &derek, "leave"));
    stage.join(&alice).await;

    let room = &stage.room;
    let create = room.state("m.room.create", "");
    let levels = room.state("m.room.power_levels", "");
    let bad = state(&derek, "m.room.test", "", json!({ "body": "bad" }));
    let bad = bad.standing_on(&[&create, &levels, &was_in]);
    let bad = room.send_forbidden(&stage.resident, bad);
    stage.tell(&[&bad]).await;
    lazy.until_event(&bad).await;
    assert!(alice.can_see(&bad).await);

    let event = stage.send(message(&charlie, "hello"));
    stage.tell(&[&event]).await;
    stage.check_receiving(&alice, &mut lazy, &event).await;
    assert!(!alice.can_see(&bad).await);
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_26_state_that_was_wrongly_rejected_comes_back() {
    let stage = Stage::empty(&[("derek", 100), ("elsie", 50)], |_| ()).await;
    let alice = stage.here.register("alice").await;
    let mut lazy = alice.lazy();
    lazy.now().await;
    stage.resident.serve_event_auth();
    let [charlie, derek, elsie] = ["charlie", "derek", "elsie"].map(|who| stage.resident.user(who));
    let derek_was_in = stage.send(member(&derek, &derek, "join"));
    stage.send(member(&derek, &derek, "leave"));
    let elsie_is_in = stage.send(member(&elsie, &elsie, "join"));
    stage.join(&alice).await;

    let room = &stage.room;
    let create = room.state("m.room.create", "");
    let levels = room.state("m.room.power_levels", "");
    let kick = member(&derek, &elsie, "leave");
    let kick = kick.standing_on(&[&create, &levels, &derek_was_in, &elsie_is_in]);
    let kick = room.send_forbidden(&stage.resident, kick);
    let rejected = state(&elsie, "m.room.test", "", json!({ "body": "good" }));
    let rejected = stage.send(rejected.standing_on(&[&create, &levels, &elsie_is_in]));
    let sentinel = stage.send(message(&charlie, "sentinel"));
    stage.tell(&[&kick, &rejected, &sentinel]).await;
    lazy.clone().until_event(&kick).await;
    lazy.until_event(&sentinel).await;
    assert!(!alice.can_see(&rejected).await);

    let event = stage.send(message(&charlie, "hello"));
    stage.tell(&[&event]).await;
    stage.check_receiving(&alice, &mut lazy, &event).await;
    assert!(!alice.can_see(&kick).await);
    assert!(alice.can_see(&rejected).await);
    stage.end(&alice).await;
}

#[tokio::test]
async fn s_18_what_stands_on_a_wrong_verdict_is_judged_again() {
    let stage = Stage::empty(&[("derek", 50)], |_| ()).await;
    let alice = stage.here.register("alice").await;
    let mut lazy = alice.lazy();
    lazy.now().await;
    stage.resident.serve_event_auth();
    let [charlie, derek, elsie] = ["charlie", "derek", "elsie"].map(|who| stage.resident.user(who));
    let derek_was_in = stage.send(member(&derek, &derek, "join"));
    stage.send(member(&derek, &derek, "leave"));
    stage.join(&alice).await;

    // Derek, who is out, opens the gates to elsie's words; hers stand on his.
    let room = &stage.room;
    let create = room.state("m.room.create", "");
    let levels = room.state("m.room.power_levels", "");
    let invite = member(&derek, &elsie, "invite");
    let rules = room.state("m.room.join_rules", "");
    let invite = invite.standing_on(&[&create, &levels, &rules, &derek_was_in]);
    let invite = room.send_forbidden(&stage.resident, invite);
    let entered = member(&elsie, &elsie, "join");
    let entered = entered.standing_on(&[&create, &levels, &rules, &invite]);
    let entered = room.send_forbidden(&stage.resident, entered);
    let words = message(&elsie, "words").standing_on(&[&create, &levels, &entered]);
    let words = room.send_forbidden(&stage.resident, words);
    stage.tell(&[&invite, &entered, &words]).await;
    lazy.until_event(&words).await;

    let event = stage.send(message(&charlie, "hello"));
    stage.tell(&[&event]).await;
    stage.check_receiving(&alice, &mut lazy, &event).await;
    for bad in [&invite, &entered, &words] {
        assert!(!alice.can_see(bad).await, "{}", bad.json);
    }
    stage.end(&alice).await;
}

#[tokio::test]
async fn s_18_an_event_with_full_state_that_stands_on_a_wrong_verdict_is_judged_again() {
    let stage = Stage::empty(&[("derek", 100)], |_| ()).await;
    let alice = stage.here.register("alice").await;
    let mut lazy = alice.lazy();
    lazy.now().await;
    let (charlie, derek) = (stage.resident.user("charlie"), stage.resident.user("derek"));
    stage.resident.serve_event_auth();
    let derek_was_in = stage.send(member(&derek, &derek, "join"));
    stage.send(member(&derek, &derek, "leave"));
    stage.join(&alice).await;

    // Derek, who is out, sets the levels, and we believe it.
    let room = &stage.room;
    let create = room.state("m.room.create", "");
    let levels = room.state("m.room.power_levels", "");
    let users = json!({ "users": { charlie.as_str(): 100, derek.as_str(): 100 }, "kick": 60 });
    let set = state(&derek, "m.room.power_levels", "", users);
    let set = set.standing_on(&[&create, &levels, &derek_was_in]);
    let set = room.send_forbidden(&stage.resident, set);
    stage.tell(&[&set]).await;
    lazy.until_event(&set).await;

    // An event that names his, after one that is not heard of: its state is fetched whole (P-5).
    let unheard = stage.send(message(&charlie, "unheard"));
    let member_of_charlie = room.member(&charlie);
    let words = message(&charlie, "words");
    let words = words.standing_on(&[&create, &set, &member_of_charlie]);
    let words = room.send_forbidden(&stage.resident, words);
    let event = stage.send(message(&charlie, "hello"));
    stage.resident.serve_gap(&event, &[&words]);
    let all = room.all_state();
    stage
        .resident
        .serve_state_at(&unheard, all, &Gate::new(true));
    stage.tell(&[&event]).await;
    lazy.until_event(&event).await;
    assert!(alice.can_see(&words).await);

    stage.release();
    stage.until_full(&alice).await;
    assert!(!alice.can_see(&set).await);
    assert!(!alice.can_see(&words).await);
    assert!(alice.can_see(&event).await);
    stage.end(&alice).await;
}
