//! Rooms that let in the members of another room: U-12 to U-18.

use std::sync::Arc;

use protocol::room_version::RoomVersion;
use room::effect::AskError;
use serde_json::{Value, json};

use crate::dag::state;
use crate::network::Network;
use crate::resident::Gate;
use crate::stage::Stage;
use crate::ways::{
    content, forbidden, invite, join_refused, pair, put_out, refusal, set, state_path, until_member,
};
use crate::world::{Server, User, list, start};

const AUTHORISED_BY: &str = "join_authorised_via_users_server";

fn rules(rule: &str, allowed: &str) -> Value {
    json!({
        "join_rule": rule,
        "allow": [{ "type": "m.room_membership", "room_id": allowed, "via": ["a.test"] }],
    })
}

/// A room, and one that lets in its members.
async fn rooms(creator: &User, version: &str, rule: &str) -> (String, String) {
    let allowed = creator.public_room().await;
    let rules = json!({
        "type": "m.room.join_rules",
        "state_key": "",
        "content": rules(rule, &allowed),
    });
    let room = creator.create_room(json!({
        "preset": "public_chat",
        "room_version": version,
        "initial_state": [rules],
    }));
    (allowed, room.await)
}

async fn levels(user: &User, room: &str, invite: i64, users: &[(&User, i64)]) {
    let users: Value = users
        .iter()
        .map(|(user, level)| (user.id.clone(), json!(level)))
        .collect::<serde_json::Map<_, _>>()
        .into();
    let levels = json!({ "invite": invite, "users": users });
    set(user, room, "m.room.power_levels", "", levels).await;
}

/// The life of a room that is restricted, as bob sees it.
async fn check(alice: &User, bob: &User, version: &str, rule: &str) {
    let (allowed, room) = rooms(alice, version, rule).await;
    assert_eq!(join_refused(bob, &room, "a.test").await, forbidden());

    bob.join(&allowed, "a.test").await;
    until_member(alice, &allowed, &bob.id, "join").await;
    bob.join(&room, "a.test").await;
    let join = until_member(alice, &room, &bob.id, "join").await;
    assert_eq!(join[AUTHORISED_BY], alice.id.as_str());
    // Somebody who is in needs nobody's word, and what he says of it is not heard.
    let renamed = json!({
        "membership": "join",
        "displayname": "Bobby",
        AUTHORISED_BY: "unused",
    });
    set(bob, &room, "m.room.member", &bob.id, renamed).await;
    let bobs = state_path(&room, "m.room.member", &bob.id);
    let expected = json!({ "membership": "join", "displayname": "Bobby" });
    assert_eq!(bob.get(&bobs).await, expected);
    crate::world::until("his new name", async || {
        let seen = alice.get(&bobs).await;
        (seen["displayname"] == "Bobby").then_some(())
    })
    .await;

    bob.leave(&room).await;
    bob.leave(&allowed).await;
    until_member(alice, &room, &bob.id, "leave").await;
    until_member(alice, &allowed, &bob.id, "leave").await;
    assert_eq!(join_refused(bob, &room, "a.test").await, forbidden());

    invite(alice, &room, bob).await;
    bob.join(&room, "a.test").await;
    let join = until_member(alice, &room, &bob.id, "join").await;
    assert!(join.get(AUTHORISED_BY).is_none(), "{join}");
    bob.leave(&room).await;
    until_member(alice, &room, &bob.id, "leave").await;
    bob.join(&allowed, "a.test").await;
    until_member(alice, &allowed, &bob.id, "join").await;

    // what is mangled lets nobody in.
    for mangled in [json!(["invalid"]), json!("invalid")] {
        let rules = json!({ "join_rule": rule, "allow": mangled });
        set(alice, &room, "m.room.join_rules", "", rules).await;
        assert_eq!(join_refused(bob, &room, "a.test").await, forbidden());
    }
}

#[tokio::test]
async fn u_12_members_of_the_allowed_room_join_on_the_same_server() {
    let (a, _) = pair().await;
    let (alice, bob) = (a.register("alice").await, a.register("bob").await);
    check(&alice, &bob, "8", "restricted").await;
}

#[tokio::test]
async fn u_12_members_of_the_allowed_room_join_from_another_server() {
    let (a, b) = pair().await;
    let (alice, bob) = (a.register("alice").await, b.register("bob").await);
    check(&alice, &bob, "8", "restricted").await;
}

#[tokio::test]
async fn u_16_the_same_where_one_may_knock() {
    let (a, b) = pair().await;
    let alice = a.register("alice").await;
    for bob in [a.register("bob").await, b.register("bob").await] {
        check(&alice, &bob, "10", "knock_restricted").await;
    }
}

/// J-20: our server is in the room, but nobody of it may invite.
async fn check_remote_join(version: &str, rule: &str) {
    let (a, b) = pair().await;
    let (alice, bob) = (a.register("alice").await, a.register("bob").await);
    let charlie = b.register("charlie").await;
    let (allowed, room) = rooms(&charlie, version, rule).await;
    invite(&charlie, &room, &alice).await;
    alice.join(&room, "b.test").await;
    let invitation = format!("/rooms/{room}/invite");
    let body = json!({ "user_id": bob.id });
    let refused = alice.refused("POST", &invitation, body).await;
    assert_eq!(refused, forbidden());
    join_refused(&bob, &room, "a.test").await;

    bob.join(&allowed, "b.test").await;
    until_member(&charlie, &allowed, &bob.id, "join").await;
    bob.join(&room, "a.test").await;
    let join = until_member(&charlie, &room, &bob.id, "join").await;
    assert_eq!(join[AUTHORISED_BY], charlie.id.as_str());

    // Charlie lets everybody invite, and is gone with his server.
    levels(&charlie, &room, 0, &[(&charlie, 100)]).await;
    charlie.leave(&room).await;
    until_member(&alice, &room, &charlie.id, "leave").await;
    bob.leave(&room).await;
    bob.join(&room, "a.test").await;
    let join = until_member(&alice, &room, &bob.id, "join").await;
    assert_eq!(join[AUTHORISED_BY], alice.id.as_str());
}

#[tokio::test]
async fn u_13_where_nobody_here_may_invite_another_server_is_asked() {
    check_remote_join("8", "restricted").await;
}

#[tokio::test]
async fn u_16_another_server_is_asked_where_one_may_knock() {
    check_remote_join("10", "knock_restricted").await;
}

/// b.test can not let charlie in, or can not tell whether it should: a.test does.
async fn check_fail_over(version: &str, rule: &str) {
    let network = Arc::<Network>::default();
    let [a, b, c] = [
        start(&network, "a.test").await,
        start(&network, "b.test").await,
        start(&network, "c.test").await,
    ];
    let (alice, bob) = (a.register("alice").await, b.register("bob").await);
    let charlie = c.register("charlie").await;
    let (allowed, room) = rooms(&alice, version, rule).await;
    levels(&alice, &room, 100, &[(&alice, 100)]).await;
    bob.join(&allowed, "a.test").await;
    bob.join(&room, "a.test").await;
    charlie.join(&allowed, "a.test").await;
    until_member(&bob, &allowed, &charlie.id, "join").await;

    let both = format!("/join/{room}?via=b.test&via=a.test");
    let by_alice = async || {
        charlie.post(&both, json!({})).await;
        let join = until_member(&bob, &room, &charlie.id, "join").await;
        assert_eq!(join[AUTHORISED_BY], alice.id.as_str());
    };
    // nobody of b.test may invite.
    let refused = join_refused(&charlie, &room, "b.test").await;
    assert_eq!(refused.1, "M_UNABLE_TO_GRANT_JOIN");
    by_alice().await;

    levels(&alice, &room, 100, &[(&alice, 100), (&bob, 100)]).await;
    charlie.leave(&room).await;
    for user in [&alice, &bob] {
        until_member(user, &room, &charlie.id, "leave").await;
    }
    // b.test can not see the allowed room any more.
    bob.leave(&allowed).await;
    until_member(&alice, &allowed, &bob.id, "leave").await;
    let refused = join_refused(&charlie, &room, "b.test").await;
    assert_eq!(refused.1, "M_UNABLE_TO_AUTHORISE_JOIN");
    by_alice().await;
}

#[tokio::test]
async fn u_14_a_server_that_can_not_let_in_is_passed_over() {
    check_fail_over("8", "restricted").await;
}

#[tokio::test]
async fn u_16_a_server_is_passed_over_where_one_may_knock() {
    check_fail_over("10", "knock_restricted").await;
}

/// Bob, who is no creator, lets charlie in without asking another server.
async fn check_local_moderator(version: &str, rule: &str) {
    let (a, b) = pair().await;
    let alice = a.register("alice").await;
    let (bob, charlie) = (b.register("bob").await, b.register("charlie").await);
    let (allowed, room) = rooms(&alice, version, rule).await;
    bob.join(&allowed, "a.test").await;
    until_member(&alice, &allowed, &bob.id, "join").await;
    bob.join(&room, "a.test").await;
    let join = until_member(&bob, &room, &bob.id, "join").await;
    assert_eq!(join[AUTHORISED_BY], alice.id.as_str());

    let both = [(&alice, 100), (&bob, 50)];
    // A creator has all power, and is not named among the powerful.
    let named = if version == "12" { &both[1..] } else { &both };
    levels(&alice, &room, 50, named).await;
    crate::world::until("his power", async || {
        let levels = content(&bob, &room, "m.room.power_levels").await;
        (levels["users"][&bob.id] == 50).then_some(())
    })
    .await;
    charlie.join(&allowed, "a.test").await;
    charlie.join(&room, "b.test").await;
    let join = until_member(&bob, &room, &charlie.id, "join").await;
    assert_eq!(join[AUTHORISED_BY], bob.id.as_str());
}

#[tokio::test]
async fn u_15_a_local_moderator_lets_in() {
    for version in ["11", "12"] {
        check_local_moderator(version, "restricted").await;
    }
}

#[tokio::test]
async fn u_17_a_local_moderator_lets_in_where_one_may_knock() {
    for version in ["11", "12"] {
        check_local_moderator(version, "knock_restricted").await;
    }
}

/// A room that lets in the members of another one, and who asks to be let in by the two requests alone.
struct ByHand {
    stage: Stage,
    alice: User,
    allowed: String,
    room: String,
    charlie: String,
}

impl ByHand {
    async fn set() -> Self {
        let stage = Stage::set().await;
        stage.resident.serve_full_joins();
        let alice = stage.here.register("alice").await;
        let (allowed, room) = rooms(&alice, "11", "restricted").await;
        let charlie = stage.resident.user("charlie");
        Self {
            stage,
            alice,
            allowed,
            room,
            charlie,
        }
    }

    async fn make(&self) -> Result<Value, AskError> {
        let path = format!(
            "/_matrix/federation/v1/make_join/{}/{}?ver=11",
            self.room, self.charlie
        );
        let here = &self.stage.here.name;
        self.stage.resident.get(here, &path).await
    }

    async fn send(&self, template: &Value) -> Result<Value, AskError> {
        let join = template.to_string();
        let join = self.stage.resident.sign(&join, RoomVersion::V11);
        let path = format!(
            "/_matrix/federation/v2/send_join/{}/{}",
            self.room, join.event_id
        );
        let body = serde_json::from_str(&join.json).unwrap();
        let here = &self.stage.here.name;
        self.stage.resident.put(here, path, body).await
    }
}

#[tokio::test]
async fn r_28_a_join_is_let_in_at_the_moment_when_it_comes() {
    let by_hand = ByHand::set().await;
    let (resident, here) = (&by_hand.stage.resident, &by_hand.stage.here.name);
    // all allowed rooms are known here.
    assert_eq!(refusal(by_hand.make().await), forbidden());
    resident
        .join(here, &by_hand.allowed, &by_hand.charlie)
        .await;
    let template = by_hand.make().await.unwrap()["event"].clone();
    assert_eq!(
        template["content"][AUTHORISED_BY],
        by_hand.alice.id.as_str()
    );

    //
    let mut elsewhere = template.clone();
    elsewhere["content"][AUTHORISED_BY] = json!("@somebody:elsewhere.test");
    assert_eq!(refusal(by_hand.send(&elsewhere).await).0, 400);

    // He is put out of the allowed room meanwhile.
    put_out(&by_hand.alice, "kick", &by_hand.allowed, &by_hand.charlie).await;
    assert_eq!(refusal(by_hand.send(&template).await), forbidden());
    let kicked = resident.pdu("the kick", |pdu| pdu.is("m.room.member", &by_hand.charlie));
    assert_eq!(kicked.await.membership(), Some("leave"));

    // And comes back.: we vouch for him by our signature.
    resident
        .join(here, &by_hand.allowed, &by_hand.charlie)
        .await;
    let answer = by_hand.send(&template).await.unwrap();
    let signatures = &answer["event"]["signatures"];
    assert!(signatures["here.test"].is_object(), "{signatures}");
    assert!(signatures["resident.test"].is_object(), "{signatures}");

    // who is in needs nobody.
    let again = by_hand.make().await.unwrap()["event"].clone();
    assert!(again["content"].get(AUTHORISED_BY).is_none(), "{again}");
}

#[tokio::test]
async fn r_48_when_the_last_who_could_invite_is_gone_nobody_grants_a_join() {
    let by_hand = ByHand::set().await;
    let (resident, here) = (&by_hand.stage.resident, &by_hand.stage.here.name);
    let bob = by_hand.stage.here.register("bob").await;
    bob.join(&by_hand.allowed, "here.test").await;
    bob.join(&by_hand.room, "here.test").await;
    resident
        .join(here, &by_hand.allowed, &by_hand.charlie)
        .await;
    let granted = by_hand.make().await.unwrap();
    by_hand.alice.leave(&by_hand.room).await;
    let unable = (400, "M_UNABLE_TO_GRANT_JOIN".to_owned());
    assert_eq!(refusal(by_hand.make().await), unable);
    assert_eq!(refusal(by_hand.send(&granted["event"]).await), unable);
}

#[tokio::test]
async fn r_46_who_is_in_a_partial_room_can_not_be_told() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    stage.join(&alice).await;
    let rules = json!({
        "type": "m.room.join_rules",
        "state_key": "",
        "content": rules("restricted", stage.room.id.as_str()),
    });
    let request = json!({ "preset": "public_chat", "initial_state": [rules] });
    let room = alice.create_room(request).await;
    let ask = async |user: &str| {
        let user = stage.resident.user(user);
        let path = format!("/_matrix/federation/v1/make_join/{room}/{user}?ver=11");
        stage.resident.get(&stage.here.name, &path).await
    };
    let unable = (400, "M_UNABLE_TO_AUTHORISE_JOIN".to_owned());
    for user in ["derek", "nobody"] {
        assert_eq!(refusal(ask(user).await), unable, "{user}");
    }
    stage.release();
    stage.until_full(&alice).await;
    ask("derek").await.unwrap();
    assert_eq!(refusal(ask("nobody").await), forbidden());
    stage.end(&alice).await;
}

/// J-22, and J-20: those who wait for their turn see a partial room when they come and a full one when it is
/// theirs; then nobody here may let them in.
#[tokio::test]
async fn a_join_does_not_wait_for_itself_when_its_room_turns_full_meanwhile() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    let bob = stage.here.register("bob").await;
    stage.join(&alice).await;
    stage.resident.take_asked("make_join");
    let charlie = stage.resident.user("charlie");
    let rules = rules("restricted", "!elsewhere:elsewhere.test");
    let rules = stage.send(state(&charlie, "m.room.join_rules", "", rules));
    stage.tell(&[&rules]).await;
    alice.lazy().until_event(&rules).await;

    stage.resident.authorise_joins();
    stage.resident.serve_full_joins();
    let gate = Gate::new(false);
    stage.resident.hold_make_join(&gate);
    let path = format!("/join/{}?via=resident.test", stage.room.id);
    let mut joins = vec![bob.begin("POST", path.clone(), json!({}))];
    stage.resident.asked("make_join").await;
    for name in ["carol", "dora", "eve"] {
        let user = stage.here.register(name).await;
        joins.push(user.begin("POST", path.clone(), json!({})));
    }
    stage.release();
    stage.until_full(&alice).await;
    gate.open();
    for join in joins {
        assert_eq!(join.status().await, 200);
    }
}

/// A space that everybody may look into, and its child, which lets in the members of the space.
async fn space(alice: &User, child_of: &User, via: &Server) -> (String, String) {
    let visible = json!({
        "type": "m.room.history_visibility",
        "state_key": "",
        "content": { "history_visibility": "world_readable" },
    });
    let space = alice
        .create_room(json!({
            "preset": "public_chat",
            "creation_content": { "type": "m.space" },
            "initial_state": [visible],
        }))
        .await;
    let rules = json!({
        "type": "m.room.join_rules",
        "state_key": "",
        "content": rules("restricted", &space),
    });
    let room = child_of
        .create_room(json!({
            "preset": "public_chat",
            "room_version": "8",
            "initial_state": [rules],
        }))
        .await;
    let child = json!({ "via": [via.name] });
    set(alice, &space, "m.space.child", &room, child).await;
    (space, room)
}

async fn hierarchy(user: &User, space: &str) -> Vec<String> {
    let path = format!("/_matrix/client/v1/rooms/{space}/hierarchy");
    let hierarchy = user.get(&path).await;
    let rooms = list(&hierarchy["rooms"]).iter();
    rooms
        .map(|room| room["room_id"].as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn u_18_a_hierarchy_shows_a_restricted_room_to_those_whom_it_lets_in() {
    let (a, _) = pair().await;
    let (alice, bob) = (a.register("alice").await, a.register("bob").await);
    let (space, room) = space(&alice, &alice, &a).await;
    assert_eq!(hierarchy(&bob, &space).await, [space.as_str()]);
    bob.join(&space, "a.test").await;
    let both = [space.as_str(), room.as_str()];
    assert_eq!(hierarchy(&bob, &space).await, both);
    put_out(&alice, "kick", &space, &bob.id).await;
    assert_eq!(hierarchy(&bob, &space).await, [space.as_str()]);
}

#[tokio::test]
async fn u_18_a_hierarchy_shows_a_restricted_room_of_another_server() {
    let (a, b) = pair().await;
    let (alice, bob) = (a.register("alice").await, a.register("bob").await);
    let charlie = b.register("charlie").await;
    let (space, room) = space(&alice, &charlie, &b).await;
    // b.test does not know the space, and so not who is in it.
    for user in [&alice, &bob] {
        assert_eq!(hierarchy(user, &space).await, [space.as_str()]);
    }
    charlie.join(&space, "a.test").await;
    until_member(&charlie, &space, &alice.id, "join").await;
    let both = [space.as_str(), room.as_str()];
    assert_eq!(hierarchy(&alice, &space).await, both);
    assert_eq!(hierarchy(&bob, &space).await, [space.as_str()]);
}
