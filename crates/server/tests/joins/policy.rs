//! Rooms with a policy server: R-67.

use std::sync::Arc;

use protocol::pdu::Pdu;
use protocol::signature::{POLICY_KEY_ID, SigningKey};
use serde_json::{Value, json};

use crate::dag::{Room, member, message};
use crate::resident::Resident;
use crate::stage::Stage;
use crate::ways::{forbidden, invite, refusal, set, state_path, until_member};
use crate::world::{User, until};

/// A room of alice's that charlie of a policy server is in, and erin of a server like any other.
struct Watched {
    stage: Stage,
    alice: User,
    room: String,
    /// As the residents know it.
    theirs: Arc<Room>,
    watch: Arc<Resident>,
    erins: Arc<Resident>,
}

impl Watched {
    async fn set(version: &str) -> Self {
        let stage = Stage::set().await;
        let alice = stage.here.register("alice").await;
        let request = json!({ "preset": "public_chat", "room_version": version });
        let room = alice.create_room(request).await;
        let watch = stage.resident.clone();
        let erins = Resident::start(&stage.network, "erins.test");
        for resident in [&watch, &erins] {
            resident.serve_full_joins();
        }
        let here = &stage.here.name;
        erins.join(here, &room, &erins.user("erin")).await;
        let (theirs, join) = watch.join(here, &room, &watch.user("charlie")).await;
        erins.event(join.event_id.as_str()).await;
        erins.holds(&theirs);
        let policy = json!({
            "via": watch.name,
            "public_keys": { "ed25519": watch.policy_key().public_base64() },
        });
        let policy = set(&alice, &room, "m.room.policy", "", policy).await;
        for resident in [&watch, &erins] {
            resident.event(&policy).await;
        }
        // The policy server is not asked about itself.
        assert_eq!(watch.take_asked("sign"), 0);
        Self {
            stage,
            alice,
            room,
            theirs,
            watch,
            erins,
        }
    }

    /// What erin says, as her server makes it.
    fn says(&self, words: &str) -> Arc<Pdu> {
        let said = message(&self.erins.user("erin"), words);
        self.theirs.send(&self.erins, said)
    }

    /// Erin's server sends this to ours.
    async fn tell(&self, pdu: &Arc<Pdu>) {
        self.erins.send(&self.stage.here.name, &[pdu], &[]).await;
    }

    async fn until_seen(&self, pdu: &Pdu) {
        until("the event", async || {
            self.alice.can_see(pdu).await.then_some(())
        })
        .await;
    }
}

fn bears_word(pdu: &Pdu) -> bool {
    pdu.signatures().any(|one| one.key_id == POLICY_KEY_ID)
}

#[tokio::test]
async fn r_67_what_our_users_send_is_signed_by_the_policy_server() {
    let watched = Watched::set("11").await;
    let said = watched.alice.say(&watched.room, "hello").await;
    assert_eq!(watched.watch.take_asked("sign"), 1);
    for resident in [&watched.watch, &watched.erins] {
        let heard = resident.event(&said).await;
        assert!(bears_word(&heard), "{}", heard.json);
        assert!(heard.signatures().any(|one| one.server == "here.test"));
    }
}

#[tokio::test]
async fn r_67_what_the_policy_server_refuses_is_not_sent() {
    let watched = Watched::set("12").await;
    let spam = json!({ "errcode": "M_FORBIDDEN", "error": "spam", "org.test.why": "words" });
    watched.watch.answer("sign", 400, spam.clone());
    let path = format!("/rooms/{}/send/m.room.message/1", watched.room);
    let words = json!({ "msgtype": "m.text", "body": "spam" });
    let (status, answer) = watched.alice.ask("PUT", &path, words).await;
    assert_eq!((status, answer), (400, spam));
    // A word that is nobody's is no word.
    let wrong = json!({ watched.watch.name.as_str(): { POLICY_KEY_ID: "A".repeat(86) } });
    watched.watch.answer("sign", 200, wrong);
    let path = format!("/rooms/{}/send/m.room.message/2", watched.room);
    let words = json!({ "msgtype": "m.text", "body": "spam" });
    let refused = watched.alice.refused("PUT", &path, words).await;
    assert_eq!(refused, forbidden());
    // Invites are events, too.
    let bob = watched.stage.here.register("bob").await;
    let path = format!("/rooms/{}/invite", watched.room);
    let refused = watched
        .alice
        .refused("POST", &path, json!({ "user_id": bob.id }));
    assert_eq!(refused.await, forbidden());
    let path = format!("/rooms/{}/invite", watched.room);
    let carol = json!({ "user_id": watched.erins.user("carol") });
    let refused = watched.alice.refused("POST", &path, carol).await;
    assert_eq!(refused, forbidden());

    // The way out is open.
    set(
        &watched.alice,
        &watched.room,
        "m.room.policy",
        "",
        json!({}),
    )
    .await;
    invite(&watched.alice, &watched.room, &bob).await;
    watched.alice.say(&watched.room, "free").await;
    for resident in [&watched.watch, &watched.erins] {
        for kind in ["m.room.policy", "m.room.member", "m.room.message"] {
            resident.pdu(kind, |pdu| &*pdu.kind == kind).await;
        }
    }
}

#[tokio::test]
async fn r_67_what_others_send_is_shown_with_the_policy_servers_word() {
    let watched = Watched::set("11").await;
    // Signed already: nobody is asked.
    let signed = watched.watch.policy_signed(&watched.says("signed"));
    watched.tell(&signed).await;
    watched.until_seen(&signed).await;
    assert_eq!(watched.watch.take_asked("sign"), 0);
    // Not signed: asked once.
    let unsigned = watched.says("unsigned");
    watched.tell(&unsigned).await;
    watched.until_seen(&unsigned).await;
    assert_eq!(watched.watch.take_asked("sign"), 1);
    // Signed with another key: the same.
    let other = SigningKey::generate([3; 32], "policy_server").unwrap();
    let wrong = watched.says("wrong");
    let wrong = protocol::build::cosign(&wrong, &other, &watched.watch.name).unwrap();
    let wrong = Arc::new(wrong);
    assert!(bears_word(&wrong));
    watched.tell(&wrong).await;
    watched.until_seen(&wrong).await;
    assert_eq!(watched.watch.take_asked("sign"), 1);
}

#[tokio::test]
async fn r_67_what_others_send_without_that_word_is_soft_failed() {
    let watched = Watched::set("12").await;
    let before = watched.theirs.tip();
    let refused = json!({ "errcode": "M_FORBIDDEN", "error": "spam" });
    watched.watch.answer("sign", 400, refused);
    let spam = watched.says("spam");
    watched.tell(&spam).await;
    watched.watch.asked("sign").await;
    let name = crate::dag::state(
        &watched.erins.user("erin"),
        "m.room.member",
        &watched.erins.user("erin"),
        json!({ "membership": "join", "displayname": "Spam" }),
    );
    let name = watched.theirs.make(&watched.erins, name.after(&[&before]));
    watched.tell(&name).await;
    watched.watch.asked("sign").await;

    watched.watch.answer_as_usual("sign");
    let good = message(&watched.erins.user("erin"), "good").after(&[&before]);
    let good = watched.theirs.make(&watched.erins, good);
    watched.tell(&good).await;
    watched.until_seen(&good).await;
    assert!(!watched.alice.can_see(&spam).await);
    let path = state_path(&watched.room, "m.room.member", &watched.erins.user("erin"));
    let member = watched.alice.get(&path).await;
    assert_eq!(member.get("displayname"), None, "{member}");
}

#[tokio::test]
async fn r_67_who_joins_needs_the_policy_servers_word() {
    let watched = Watched::set("11").await;
    let (here, erins) = (&watched.stage.here.name, &watched.erins);
    let dora = erins.user("dora");
    let join = async || {
        let path = format!(
            "/_matrix/federation/v1/make_join/{}/{dora}?ver=11",
            watched.room
        );
        let made = erins.get(here, &path).await.unwrap();
        let join = erins.sign(&made["event"].to_string(), watched.theirs.version);
        let path = format!(
            "/_matrix/federation/v2/send_join/{}/{}",
            watched.room, join.event_id
        );
        let body: Value = serde_json::from_str(&join.json).unwrap();
        erins.put(here, path, body).await
    };
    let refused = json!({ "errcode": "M_FORBIDDEN", "error": "a spammer" });
    watched.watch.answer("sign", 403, refused);
    assert_eq!(refusal(join().await), forbidden());
    watched.watch.answer_as_usual("sign");
    join().await.unwrap();
    until_member(&watched.alice, &watched.room, &dora, "join").await;
    let heard = watched
        .watch
        .pdu("dora's join", |pdu| pdu.is("m.room.member", &dora))
        .await;
    assert!(bears_word(&heard), "{}", heard.json);
}

#[tokio::test]
async fn r_67_a_policy_server_that_is_not_in_the_room_is_none() {
    let watched = Watched::set("11").await;
    let charlie = watched.watch.user("charlie");
    let leave = member(&charlie, &charlie, "leave");
    let leave = watched.theirs.send(&watched.watch, leave);
    let leave = watched.watch.policy_signed(&leave);
    watched
        .watch
        .send(&watched.stage.here.name, &[&leave], &[])
        .await;
    until_member(&watched.alice, &watched.room, &charlie, "leave").await;
    watched.watch.take_asked("sign");
    let said = watched.alice.say(&watched.room, "hello").await;
    let heard = watched.erins.event(&said).await;
    assert!(!bears_word(&heard));
    assert_eq!(watched.watch.take_asked("sign"), 0);
}

#[tokio::test]
async fn r_67_a_partial_room_goes_by_the_list_of_its_servers() {
    let stage = Stage::set().await;
    let charlie = stage.resident.user("charlie");
    let policy = json!({
        "via": stage.resident.name,
        "public_keys": { "ed25519": stage.resident.policy_key().public_base64() },
    });
    stage.send(crate::dag::state(&charlie, "m.room.policy", "", policy));
    let alice = stage.here.register("alice").await;
    stage.join(&alice).await;
    let said = alice.say(stage.room.id.as_str(), "hello").await;
    let heard = stage.resident.event(&said).await;
    assert!(bears_word(&heard), "{}", heard.json);
    stage.end(&alice).await;
}
