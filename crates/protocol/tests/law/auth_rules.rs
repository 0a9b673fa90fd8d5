//! Every rule of every room version, by examples that it lets through and that it stops.

use std::collections::BTreeMap;
use std::sync::Arc;

use protocol::auth::{self, Refused};
use protocol::id::{RoomId, ServerName, UserId};
use protocol::pdu::Pdu;
use protocol::power::{Level, PowerLevels};
use protocol::room_version::RoomVersion;
use protocol::signature::SigningKey;
use serde_json::{Map, Value, json};

use crate::world::{Draft, draft, event_id, pdu};

const ALICE: &str = "@alice:one";
const BOB: &str = "@bob:two";
const CAROL: &str = "@carol:two";
const DAVE: &str = "@dave:three";

/// A state, and the versions' differences in how it must look.
#[derive(Clone)]
struct State(Vec<Draft>);

impl State {
    /// Alice's public room, with Bob of level 50 and Carol of none.
    fn new() -> Self {
        let levels = json!({"users": {BOB: 50}});
        Self(vec![
            state(ALICE, "m.room.create", json!({})),
            join(ALICE),
            join(BOB),
            join(CAROL),
            state(ALICE, "m.room.power_levels", levels),
            rule("public"),
        ])
    }

    /// With this event in the place of what has its key.
    fn with(mut self, event: Draft) -> Self {
        self = self.without(&event.kind, event.state_key.as_deref().unwrap());
        self.0.push(event);
        self
    }

    fn without(mut self, kind: &str, key: &str) -> Self {
        self.0
            .retain(|event| event.kind != kind || event.state_key.as_deref() != Some(key));
        self
    }

    fn levels(self, content: Value) -> Self {
        self.with(state(ALICE, "m.room.power_levels", content))
    }

    fn create(self, content: Value) -> Self {
        self.with(state(ALICE, "m.room.create", content))
    }

    fn at(&self, version: RoomVersion) -> BTreeMap<(String, String), Arc<Pdu>> {
        self.0
            .iter()
            .enumerate()
            .map(|(place, event)| {
                let mut event = event.clone();
                event.id = match &*event.kind {
                    "m.room.create" => "create".to_owned(),
                    _ => format!("s{place}"),
                };
                for_version(version, &mut event);
                let key = (event.kind.clone(), event.state_key.clone().unwrap());
                (key, Arc::new(pdu(version, &event, 1)))
            })
            .collect()
    }

    fn check(&self, version: RoomVersion, event: &Draft) -> Result<(), Refused> {
        let state = self.at(version);
        let mut event = event.clone();
        for_version(version, &mut event);
        let pdu = pdu(version, &event, 9);
        auth::check(version, &pdu, &|kind, key| {
            state.get(&(kind.to_owned(), key.to_owned())).cloned()
        })
    }

    /// The versions that let the event through, as `first-last`, with commas between.
    #[track_caller]
    fn allows(&self, event: Draft, versions: &str) {
        let mut allowed = String::new();
        let mut run: Option<(RoomVersion, RoomVersion)> = None;
        let mut close = |run: Option<(RoomVersion, RoomVersion)>| {
            if let Some((first, last)) = run {
                let comma = if allowed.is_empty() { "" } else { "," };
                allowed += &format!("{comma}{first}-{last}");
            }
        };
        for version in RoomVersion::ALL {
            match (self.check(version, &event), run) {
                (Ok(()), Some((first, _))) => run = Some((first, version)),
                (Ok(()), None) => run = Some((version, version)),
                (Err(_), _) => close(run.take()),
            }
        }
        close(run);
        assert_eq!(
            allowed,
            versions,
            "{event:?}: {:?}",
            self.check(RoomVersion::V10, &event)
        );
    }
}

/// What the room's creator writes depends on the version.
fn for_version(version: RoomVersion, event: &mut Draft) {
    if event.kind == "m.room.create" && version <= RoomVersion::V10 {
        let absent = event.content.get("creator").is_none();
        if absent && event.content.get("no_creator").is_none() {
            event.content["creator"] = ALICE.into();
        }
    }
    if event.kind == "m.room.power_levels"
        && version <= RoomVersion::V11
        && let Some(users) = event
            .content
            .get_mut("users")
            .and_then(Value::as_object_mut)
    {
        users.entry(ALICE).or_insert(100.into());
    }
}

fn state(sender: &str, kind: &str, content: Value) -> Draft {
    draft("event", sender, kind, Some(""), content)
}

fn member(sender: &str, target: &str, membership: &str) -> Draft {
    let content = json!({"membership": membership});
    draft("event", sender, "m.room.member", Some(target), content)
}

fn join(user: &str) -> Draft {
    member(user, user, "join")
}

fn rule(rule: &str) -> Draft {
    state(ALICE, "m.room.join_rules", json!({"join_rule": rule}))
}

fn message(sender: &str) -> Draft {
    draft("event", sender, "m.room.message", None, json!({}))
}

fn levels(sender: &str, content: Value) -> Draft {
    state(sender, "m.room.power_levels", content)
}

const ALL: &str = "1-12";
const NONE: &str = "";

// -- Create ---------------------------------------------------------------------------------------

#[test]
fn v21_create() {
    let nothing = State(Vec::new());
    nothing.allows(state(ALICE, "m.room.create", json!({})), ALL);
    let mut late = state(ALICE, "m.room.create", json!({}));
    late.prev = vec!["other".to_owned()];
    nothing.allows(late, NONE);
    // The room id is `!room:one`, or from version 12 on the event's own.
    nothing.allows(state(BOB, "m.room.create", json!({})), "12-12");
    nothing.allows(
        state(ALICE, "m.room.create", json!({"room_version": "5"})),
        ALL,
    );
    for version in [json!("nine"), json!(5), Value::Null] {
        nothing.allows(
            state(ALICE, "m.room.create", json!({"room_version": version})),
            NONE,
        );
    }
    nothing.allows(
        state(ALICE, "m.room.create", json!({"no_creator": 1})),
        "11-12",
    );
    for more in [
        json!([BOB, "bob"]),
        json!(BOB),
        json!([1]),
        json!({}),
        Value::Null,
    ] {
        let content = json!({"additional_creators": more});
        nothing.allows(state(ALICE, "m.room.create", content), "1-11");
    }
    for more in [json!([BOB, CAROL]), json!([])] {
        let content = json!({"additional_creators": more});
        nothing.allows(state(ALICE, "m.room.create", content), ALL);
    }
}

#[test]
fn v21_a_version_12_create_event_names_no_room() {
    let event = state(ALICE, "m.room.create", json!({}));
    let mut pdu = pdu(RoomVersion::V12, &event, 1);
    assert!(auth::check_auth_events(RoomVersion::V12, &pdu, None, &[]).is_ok());
    pdu.json = pdu.json.replace('{', r#"{"room_id":"!x","#).into();
    assert!(auth::check_auth_events(RoomVersion::V12, &pdu, None, &[]).is_err());
}

#[test]
fn without_a_create_event_nothing_is_allowed() {
    State::new()
        .without("m.room.create", "")
        .allows(message(ALICE), NONE);
}

#[test]
fn v22_a_room_that_is_not_federated_is_for_one_server() {
    let closed = State::new().create(json!({"m.federate": false}));
    closed.allows(message(ALICE), ALL);
    closed.allows(message(BOB), NONE);
    closed.allows(join(DAVE), NONE);
    State::new()
        .create(json!({"m.federate": true}))
        .allows(message(BOB), ALL);
}

// -- Aliases, redactions ----------------------------------------------------------------------------

#[test]
fn v1_to_v5_aliases_are_their_servers_own() {
    let aliases =
        |sender: &str, key: Option<&str>| draft("event", sender, "m.room.aliases", key, json!({}));
    // Dave is not even in the room.
    State::new().allows(aliases(DAVE, Some("three")), "1-5");
    State::new().allows(aliases(DAVE, Some("one")), NONE);
    State::new().allows(aliases(DAVE, None), NONE);
    // From version 6 on it is a state event like any other.
    State::new().allows(aliases(BOB, Some("three")), "6-12");
}

#[test]
fn v1_and_v2_a_redaction_needs_power_or_the_same_server() {
    let redaction = |sender: &str, target: &str| {
        let mut event = draft(
            "event:two",
            sender,
            "m.room.redaction",
            None,
            json!({"redacts": target}),
        );
        event.id = "event:two".to_owned();
        event
    };
    State::new().allows(redaction(CAROL, "$old:two"), ALL);
    State::new().allows(redaction(CAROL, "$old:one"), "3-12");
    State::new().allows(redaction(BOB, "$old:one"), ALL);
    let mut without = redaction(CAROL, "$old:one");
    without.content = json!({});
    State::new().allows(without, "3-12");
}

// -- Membership -------------------------------------------------------------------------------------

#[test]
fn v21_a_membership_needs_a_key_and_a_known_value() {
    let mut event = join(DAVE);
    event.state_key = None;
    State::new().allows(event, NONE);
    for content in [
        json!({}),
        json!({"membership": 1}),
        json!({"membership": null}),
    ] {
        let mut event = join(DAVE);
        event.content = content;
        State::new().allows(event, NONE);
    }
    State::new().allows(member(DAVE, DAVE, "dance"), NONE);
}

#[test]
fn v15_the_creator_joins_first() {
    let only_create = State(vec![state(
        ALICE,
        "m.room.create",
        json!({"additional_creators": [CAROL]}),
    )]);
    let upon = |user: &str, prev: &[&str]| {
        let mut event = join(user);
        event.prev = prev.iter().map(|id| (*id).to_owned()).collect();
        event
    };
    only_create.allows(upon(ALICE, &["create"]), ALL);
    only_create.allows(upon(ALICE, &["create", "other"]), NONE);
    only_create.allows(upon(ALICE, &["other"]), NONE);
    only_create.allows(upon(ALICE, &[]), NONE);
    // Not the additional ones.
    only_create.allows(upon(CAROL, &["create"]), NONE);
    // Who the creator is, version 11 says otherwise.
    let other = State::new()
        .create(json!({"creator": DAVE}))
        .with(rule("invite"));
    other.allows(upon(DAVE, &["create"]), "1-10");
}

#[test]
fn v15_joining_a_public_room() {
    State::new().allows(join(DAVE), ALL);
    State::new().allows(member(ALICE, DAVE, "join"), NONE);
    State::new()
        .with(member(ALICE, DAVE, "ban"))
        .allows(join(DAVE), NONE);
}

#[test]
fn v15_the_join_rules_that_a_version_has() {
    let invited = member(ALICE, DAVE, "invite");
    for (join_rule, stranger, guest) in [
        ("public", ALL, ALL),
        ("invite", NONE, ALL),
        ("knock", NONE, "7-12"),
        ("restricted", NONE, "8-12"),
        ("knock_restricted", NONE, "10-12"),
        ("private", NONE, NONE),
        ("dance", NONE, NONE),
    ] {
        let room = State::new().with(rule(join_rule));
        room.allows(join(DAVE), stranger);
        room.clone().with(invited.clone()).allows(join(DAVE), guest);
        // Who is in the room may say so again.
        room.allows(join(BOB), guest);
        room.with(member(ALICE, DAVE, "ban"))
            .allows(join(DAVE), NONE);
    }
}

#[test]
fn v23_without_a_join_rule_one_must_be_invited() {
    let mut empty = rule("x");
    empty.content = json!({});
    let mut odd = rule("x");
    odd.content = json!({"join_rule": ["public"]});
    let none = State::new().without("m.room.join_rules", "");
    for room in [none, State::new().with(empty)] {
        room.allows(join(DAVE), NONE);
        room.with(member(ALICE, DAVE, "invite"))
            .allows(join(DAVE), ALL);
    }
    State::new()
        .with(odd)
        .with(member(ALICE, DAVE, "invite"))
        .allows(join(DAVE), NONE);
}

#[test]
fn v15_a_restricted_join_needs_somebody_who_may_invite() {
    let via = |user: Value| {
        let mut event = join(DAVE);
        event.content["join_authorised_via_users_server"] = user;
        event
    };
    for (join_rule, versions) in [("restricted", "8-12"), ("knock_restricted", "10-12")] {
        let room = State::new().with(rule(join_rule));
        room.allows(via(json!(CAROL)), versions);
        room.allows(via(json!("@erin:four")), NONE);
        room.allows(via(json!("carol")), NONE);
        room.allows(via(json!(7)), NONE);
        room.clone()
            .with(member(CAROL, CAROL, "leave"))
            .allows(via(json!(CAROL)), NONE);
        let strict = room.levels(json!({"users": {BOB: 50}, "invite": 50}));
        strict.allows(via(json!(CAROL)), NONE);
        strict.allows(via(json!(BOB)), versions);
        strict.allows(via(json!(ALICE)), versions);
        strict
            .with(member(ALICE, DAVE, "invite"))
            .allows(join(DAVE), versions);
    }
    // Where anybody may join it does not matter.
    State::new().allows(via(json!("@erin:four")), ALL);
}

#[test]
fn v21_inviting() {
    State::new().allows(member(CAROL, DAVE, "invite"), ALL);
    State::new().allows(member(DAVE, "@erin:four", "invite"), NONE);
    State::new().allows(member(CAROL, BOB, "invite"), NONE);
    State::new()
        .with(member(ALICE, DAVE, "ban"))
        .allows(member(ALICE, DAVE, "invite"), NONE);
    State::new()
        .with(member(DAVE, DAVE, "knock"))
        .allows(member(ALICE, DAVE, "invite"), ALL);
    let strict = State::new().levels(json!({"users": {BOB: 50}, "invite": 50}));
    strict.allows(member(CAROL, DAVE, "invite"), NONE);
    strict.allows(member(BOB, DAVE, "invite"), ALL);
}

#[test]
fn v21_inviting_by_a_third_party() {
    let server = ServerName::parse("id.example").unwrap();
    let key = SigningKey::generate([7; 32], "0").unwrap();
    let wrong_key = SigningKey::generate([8; 32], "0").unwrap();
    let signed = |key: &SigningKey, mxid: &str| {
        let Value::Object(mut signed) =
            json!({"mxid": mxid, "token": "abc", "unsigned": {"age": 1}})
        else {
            unreachable!()
        };
        key.sign_json(&mut signed, &server).unwrap();
        signed
    };
    let invite = |third: Value| {
        let mut event = member(CAROL, DAVE, "invite");
        event.content["third_party_invite"] = third;
        event
    };
    let by = |sender: &str, content: Value| {
        draft(
            "event",
            sender,
            "m.room.third_party_invite",
            Some("abc"),
            content,
        )
    };
    let good = invite(json!({"signed": signed(&key, DAVE)}));
    let single = json!({"public_key": key.public_base64()});
    let room = State::new().with(by(CAROL, single.clone()));
    room.allows(good.clone(), ALL);
    let listed = json!({
        "public_key": wrong_key.public_base64(),
        "public_keys": [{"public_key": 3}, 4, {"public_key": key.public_base64() + "="}],
    });
    State::new()
        .with(by(CAROL, listed))
        .allows(good.clone(), ALL);
    // Who sends it need not be in the room any more, who is invited may be.
    let gone = room
        .clone()
        .with(member(CAROL, CAROL, "leave"))
        .with(join(DAVE));
    gone.allows(good.clone(), ALL);

    room.clone()
        .with(member(ALICE, DAVE, "ban"))
        .allows(good.clone(), NONE);
    State::new().allows(good.clone(), NONE);
    State::new()
        .with(by(BOB, single))
        .allows(good.clone(), NONE);
    for content in [
        json!({"public_key": wrong_key.public_base64()}),
        json!({"public_key": 5, "public_keys": {}}),
        json!({}),
    ] {
        State::new()
            .with(by(CAROL, content))
            .allows(good.clone(), NONE);
    }
    let mut other = signed(&key, DAVE);
    other.insert("token".to_owned(), "def".into());
    let no_mxid = json!({"token": "abc", "signatures": {}});
    for third in [
        json!(null),
        json!({}),
        json!({"signed": "x"}),
        json!({"signed": {}}),
        json!({"signed": no_mxid}),
        json!({"signed": signed(&key, BOB)}),
        json!({"signed": signed(&wrong_key, DAVE)}),
        json!({"signed": other}),
        json!({"signed": {"mxid": DAVE, "token": "abc"}}),
        json!({"signed": {"mxid": DAVE, "token": "abc", "signatures": {"x": {"ed25519:0": 1, "y": "z"}, "w": 2}}}),
    ] {
        room.allows(invite(third), NONE);
    }
}

#[test]
fn v21_leaving() {
    State::new().allows(member(CAROL, CAROL, "leave"), ALL);
    State::new().allows(member(DAVE, DAVE, "leave"), NONE);
    let as_dave = |membership: &str| State::new().with(member(DAVE, DAVE, membership));
    as_dave("invite").allows(member(DAVE, DAVE, "leave"), ALL);
    as_dave("knock").allows(member(DAVE, DAVE, "leave"), "7-12");
    as_dave("ban").allows(member(DAVE, DAVE, "leave"), NONE);
    as_dave("leave").allows(member(DAVE, DAVE, "leave"), NONE);
}

#[test]
fn v21_kicking_and_lifting_bans() {
    State::new().allows(member(BOB, CAROL, "leave"), ALL);
    State::new().allows(member(CAROL, DAVE, "leave"), NONE);
    State::new().allows(member(BOB, ALICE, "leave"), NONE);
    State::new().allows(member(DAVE, CAROL, "leave"), NONE);
    let two = json!({"users": {BOB: 50, CAROL: 50}});
    State::new()
        .levels(two)
        .allows(member(BOB, CAROL, "leave"), NONE);
    let banned = State::new().with(member(ALICE, DAVE, "ban"));
    banned.allows(member(BOB, DAVE, "leave"), ALL);
    banned.allows(member(CAROL, DAVE, "leave"), NONE);
    let hard = banned
        .clone()
        .levels(json!({"users": {BOB: 50}, "ban": 60}));
    hard.allows(member(BOB, DAVE, "leave"), NONE);
    hard.allows(member(ALICE, DAVE, "leave"), ALL);
    let soft = banned.levels(json!({"users": {BOB: 50}, "ban": 0, "kick": 60}));
    soft.allows(member(BOB, DAVE, "leave"), NONE);
}

#[test]
fn v21_banning() {
    State::new().allows(member(BOB, CAROL, "ban"), ALL);
    State::new().allows(member(BOB, DAVE, "ban"), ALL);
    State::new().allows(member(CAROL, DAVE, "ban"), NONE);
    State::new().allows(member(BOB, BOB, "ban"), NONE);
    State::new().allows(member(BOB, ALICE, "ban"), NONE);
    State::new().allows(member(DAVE, CAROL, "ban"), NONE);
}

#[test]
fn v16_knocking() {
    for (join_rule, versions) in [
        ("public", NONE),
        ("invite", NONE),
        ("knock", "7-12"),
        ("restricted", NONE),
        ("knock_restricted", "10-12"),
    ] {
        let room = State::new().with(rule(join_rule));
        room.allows(member(DAVE, DAVE, "knock"), versions);
        room.allows(member(BOB, DAVE, "knock"), NONE);
        for (membership, again) in [
            ("ban", NONE),
            ("invite", NONE),
            ("join", NONE),
            ("leave", versions),
            ("knock", versions),
        ] {
            let known = room.clone().with(member(DAVE, DAVE, membership));
            known.allows(member(DAVE, DAVE, "knock"), again);
        }
    }
}

// -- Other events -----------------------------------------------------------------------------------

#[test]
fn v21_only_members_send() {
    State::new().allows(message(CAROL), ALL);
    for membership in ["leave", "invite", "ban", "knock", "dance"] {
        State::new()
            .with(member(DAVE, DAVE, membership))
            .allows(message(DAVE), NONE);
    }
    State::new().allows(message(DAVE), NONE);
}

#[test]
fn v21_a_third_party_invite_takes_the_power_to_invite() {
    let event = |sender| {
        draft(
            "event",
            sender,
            "m.room.third_party_invite",
            Some("@t"),
            json!({}),
        )
    };
    State::new().allows(event(CAROL), ALL);
    let strict =
        State::new().levels(json!({"users": {BOB: 50}, "invite": 50, "state_default": 99}));
    strict.allows(event(CAROL), NONE);
    strict.allows(event(BOB), ALL);
}

#[test]
fn v23_what_an_event_takes() {
    let topic = |sender| state(sender, "m.room.topic", json!({}));
    State::new().allows(topic(BOB), ALL);
    State::new().allows(topic(CAROL), NONE);
    let listed = json!({"users": {BOB: 50}, "events": {"m.room.topic": 0, "m.room.message": 51}});
    let room = State::new().levels(listed);
    room.allows(topic(CAROL), ALL);
    room.allows(message(BOB), NONE);
    room.allows(message(ALICE), ALL);
    let room =
        State::new().levels(json!({"users_default": 10, "events_default": 11, "state_default": 9}));
    room.allows(topic(CAROL), ALL);
    room.allows(message(CAROL), NONE);
    // Creators are beyond levels from version 12 on, and else 100 only where there are none.
    let high = json!({"events": {"m.room.topic": 1000}});
    State::new().levels(high).allows(topic(ALICE), "12-12");
    let none = State::new().without("m.room.power_levels", "");
    none.allows(topic(ALICE), ALL);
    none.allows(topic(BOB), NONE);
    none.allows(message(BOB), ALL);
    none.allows(member(ALICE, BOB, "ban"), ALL);
    none.allows(member(BOB, DAVE, "ban"), NONE);
    State::new().levels(json!({})).allows(topic(ALICE), "12-12");
}

#[test]
fn v12_additional_creators_are_creators() {
    let room = State::new().create(json!({"additional_creators": [CAROL]}));
    room.allows(member(CAROL, BOB, "ban"), "12-12");
    room.allows(member(CAROL, ALICE, "leave"), NONE);
    room.allows(levels(CAROL, json!({"users": {BOB: 5000}})), "12-12");
}

#[test]
fn v21_a_state_key_with_a_users_name_is_that_users() {
    let event = |key: &str| draft("event", BOB, "m.custom", Some(key), json!({}));
    State::new().allows(event(BOB), ALL);
    State::new().allows(event(CAROL), NONE);
    State::new().allows(event("@"), NONE);
    State::new().allows(event("two"), ALL);
}

// -- Power levels -----------------------------------------------------------------------------------

#[test]
fn v21_what_levels_may_be() {
    let first = State::new().without("m.room.power_levels", "");
    let strict = |content: Value, versions: &str| first.allows(levels(ALICE, content), versions);
    strict(json!({"users": {BOB: 50}}), ALL);
    strict(json!({}), ALL);
    for key in [
        "users_default",
        "events_default",
        "state_default",
        "ban",
        "redact",
        "kick",
        "invite",
    ] {
        strict(json!({key: 1}), ALL);
        strict(json!({key: " +0012 "}), "1-9");
        strict(json!({key: null}), "1-9");
        for odd in [
            json!("x"),
            json!([1]),
            json!({}),
            json!("1.5"),
            json!(""),
            json!("+"),
            json!(true),
        ] {
            strict(json!({key: odd}), NONE);
        }
    }
    // Only lenient JSON has them, so the newer versions never see them.
    strict(json!({"users": {BOB: 50.57}}), "1-9");
    strict(json!({"users": {BOB: "-12"}}), "1-9");
    for users in [
        json!(null),
        json!([]),
        json!({BOB: null}),
        json!({BOB: "a"}),
        json!({"bob": 1}),
    ] {
        strict(json!({"users": users}), NONE);
    }
    for events in [json!(7), json!({"m.x": []})] {
        strict(json!({"events": events}), NONE);
    }
    // Before version 6 nobody looked at these.
    strict(json!({"notifications": {"room": []}}), "1-5");
    strict(json!({"notifications": {"room": "7"}}), "1-9");
}

#[test]
fn v12_creators_have_no_place_in_the_levels() {
    let room = State::new().create(json!({"additional_creators": [CAROL]}));
    for creator in [ALICE, CAROL] {
        room.allows(
            levels(ALICE, json!({"users": {BOB: 50, creator: 100}})),
            "1-11",
        );
    }
}

#[test]
fn v21_nobody_gives_or_takes_more_than_they_have() {
    let base = json!({
        "users": {BOB: 50, "@erin:four": 50, "@fay:four": 49},
        "events": {"m.x": 50, "m.high": 51},
        "notifications": {"room": 50, "high": 51},
        "ban": 50,
        "kick": 51,
    });
    let room = State::new().levels(base.clone());
    let change = |section: &str, key: &str, value: Value| {
        let mut content = base.clone();
        let place = match section {
            "" => &mut content,
            section => &mut content[section],
        };
        match value {
            Value::Null => {
                place.as_object_mut().unwrap().remove(key);
            }
            value => place[key] = value,
        }
        levels(BOB, content)
    };
    room.allows(levels(BOB, base.clone()), ALL);
    for (section, key, value, versions) in [
        ("", "ban", json!(0), ALL),
        ("", "ban", json!(51), NONE),
        ("", "ban", Value::Null, ALL),
        ("", "kick", json!(0), NONE),
        ("", "kick", Value::Null, NONE),
        ("", "invite", json!(50), ALL),
        ("", "invite", json!(51), NONE),
        ("events", "m.x", json!(1), ALL),
        ("events", "m.x", json!(51), NONE),
        ("events", "m.x", Value::Null, ALL),
        ("events", "m.high", json!(1), NONE),
        ("events", "m.high", Value::Null, NONE),
        ("events", "m.y", json!(50), ALL),
        ("events", "m.y", json!(51), NONE),
        ("notifications", "room", json!(51), "1-5"),
        ("notifications", "room", json!(50), ALL),
        ("notifications", "high", Value::Null, "1-5"),
        ("notifications", "other", json!(9), ALL),
        ("users", "@fay:four", json!(50), ALL),
        ("users", "@fay:four", json!(51), NONE),
        ("users", "@fay:four", Value::Null, ALL),
        ("users", "@erin:four", json!(49), NONE),
        ("users", "@erin:four", Value::Null, NONE),
        ("users", BOB, json!(49), ALL),
        ("users", BOB, Value::Null, ALL),
        ("users", BOB, json!(51), NONE),
        ("users", DAVE, json!(50), ALL),
        ("users", DAVE, json!(51), NONE),
    ] {
        room.allows(change(section, key, value), versions);
    }
}

#[test]
fn levels_that_say_the_same_in_other_words_are_no_change() {
    let room =
        State::new().levels(json!({"users": {BOB: 50}, "ban": "60", "events": {"m.x": "70"}}));
    room.allows(
        levels(
            BOB,
            json!({"users": {BOB: "50"}, "ban": 60, "events": {"m.x": 70}}),
        ),
        "1-9",
    );
}

#[test]
fn levels_that_can_not_be_read_stop_what_asks_for_them_and_nothing_else() {
    let odd = State::new().levels(json!({"users": {BOB: 50}, "ban": [1], "events": {}}));
    odd.allows(message(CAROL), ALL);
    odd.allows(member(BOB, CAROL, "leave"), ALL);
    odd.allows(member(ALICE, CAROL, "ban"), NONE);
    let odd = State::new().levels(json!({"users": [], "events": 3}));
    odd.allows(message(CAROL), NONE);
    odd.allows(join(DAVE), ALL);
}

// -- Auth events ------------------------------------------------------------------------------------

/// The verdict on Carol's message, upon these of the room's events.
fn by_auth(version: RoomVersion, change: impl Fn(&mut Vec<(Pdu, bool)>)) -> Result<(), Refused> {
    let state = State::new().at(version);
    let create = state[&("m.room.create".to_owned(), String::new())].clone();
    let event = pdu(version, &message(CAROL), 9);
    let mut auth: Vec<_> = auth::auth_types_of(&event)
        .into_iter()
        .map(|(kind, key)| state[&(kind.to_string(), key.to_string())].as_ref().clone())
        .map(|pdu| (pdu, false))
        .collect();
    change(&mut auth);
    let auth: Vec<_> = auth
        .iter()
        .map(|(pdu, rejected)| (pdu, *rejected))
        .collect();
    auth::check_auth_events(version, &event, Some(&create), &auth)
}

/// What a fetch keeps of a former membership says the same to the rules as the event does.
#[test]
fn a_bare_member_stands_for_its_event() {
    for version in RoomVersion::ALL {
        for word in ["invite", "join", "leave", "ban", "knock", "odd"] {
            let swapped = |bare: bool| {
                by_auth(version, |auth| {
                    let carol = auth
                        .iter_mut()
                        .find(|(pdu, _)| pdu.is("m.room.member", CAROL));
                    let (standing, _) = carol.expect("her membership is among them");
                    let said = pdu(version, &member(CAROL, CAROL, word), 2);
                    *standing = match bare {
                        true => Pdu::bare_member(
                            version,
                            &said.event_id,
                            said.room_id.clone(),
                            said.state_key.clone().unwrap(),
                            said.membership(),
                        ),
                        false => said,
                    };
                })
            };
            assert_eq!(swapped(true), swapped(false), "{version} {word}");
            assert_eq!(swapped(true).is_ok(), word == "join", "{version} {word}");
        }
    }
}

#[test]
fn v17_p15_what_may_stand_in_auth_events() {
    for version in RoomVersion::ALL {
        assert!(by_auth(version, |_| {}).is_ok(), "{version}");
        let refused = |change: &dyn Fn(&mut Vec<(Pdu, bool)>)| {
            assert!(by_auth(version, change).is_err(), "{version}");
        };
        // Twice the same, and twice the same key.
        refused(&|auth| auth.push(auth[0].clone()));
        refused(&|auth| {
            let mut other = auth[0].clone();
            other.0.event_id = event_id(version, "other");
            auth.push(other);
        });
        // What the event does not ask for.
        for event in [
            rule("public"),
            join(BOB),
            message(BOB),
            state(BOB, "m.room.topic", json!({})),
        ] {
            refused(&|auth| auth.push((pdu(version, &event, 1), false)));
        }
        // A rejected one, one of another room.
        for place in 0..2 {
            refused(&|auth| auth[place].1 = true);
            refused(&|auth| auth[place].0.room_id = RoomId::parse("!other:one").unwrap());
        }
        // The sender's membership is not there, so they are not in the room.
        refused(&|auth| auth.retain(|(pdu, _)| &*pdu.kind != "m.room.member"));
        // Without levels a message is anybody's.
        assert!(
            by_auth(version, |auth| auth
                .retain(|(pdu, _)| &*pdu.kind != "m.room.power_levels"))
            .is_ok()
        );
    }
}

#[test]
fn v17_the_create_event_is_named_by_the_auth_events_or_by_the_room_id() {
    for version in RoomVersion::ALL {
        let event = pdu(version, &message(CAROL), 9);
        let names = auth::auth_types_of(&event)
            .iter()
            .any(|(kind, _)| &**kind == "m.room.create");
        assert_eq!(names, version <= RoomVersion::V11);
        let without = by_auth(version, |auth| {
            auth.retain(|(pdu, _)| &*pdu.kind != "m.room.create")
        });
        assert_eq!(without.is_ok(), version == RoomVersion::V12);
    }
    let with = by_auth(RoomVersion::V12, |auth| {
        auth.push((
            pdu(
                RoomVersion::V12,
                &state(ALICE, "m.room.create", json!({})),
                1,
            ),
            false,
        ));
    });
    assert!(with.is_err());
    let state = State::new().at(RoomVersion::V12);
    let get = |kind: &str, key: &str| &*state[&(kind.to_owned(), key.to_owned())];
    let event = pdu(RoomVersion::V12, &message(CAROL), 9);
    let auth = [
        (get("m.room.power_levels", ""), false),
        (get("m.room.member", CAROL), false),
    ];
    let check = |create| auth::check_auth_events(RoomVersion::V12, &event, create, &auth);
    let create = get("m.room.create", "");
    assert!(check(Some(create)).is_ok());
    assert!(check(None).is_err(), "not there or rejected");
    let mut other = create.clone();
    other.event_id = event_id(RoomVersion::V12, "other");
    assert!(check(Some(&other)).is_err());
    assert!(check(Some(auth[0].0)).is_err());
}

#[test]
fn v17_the_choice_of_auth_events() {
    let choice = |version: RoomVersion, event: &Draft| {
        let sender = UserId::parse(&event.sender).unwrap();
        let key = event.state_key.as_deref();
        let types = auth::auth_types(version, &event.kind, &sender, key, &event.content);
        assert_eq!(types, auth::auth_types_of(&pdu(version, event, 1)));
        let mut types: Vec<_> = types
            .iter()
            .map(|(kind, key)| format!("{}{key}", kind.trim_start_matches("m.room.")))
            .collect();
        types.sort();
        types.join(" ")
    };
    let v11 = |event: Draft| choice(RoomVersion::V11, &event);
    assert_eq!(v11(state(ALICE, "m.room.create", json!({}))), "");
    assert_eq!(v11(message(CAROL)), "create member@carol:two power_levels");
    assert_eq!(
        choice(RoomVersion::V12, &message(CAROL)),
        "member@carol:two power_levels"
    );
    assert_eq!(
        v11(join(DAVE)),
        "create join_rules member@dave:three power_levels"
    );
    assert_eq!(
        v11(member(BOB, CAROL, "ban")),
        "create member@bob:two member@carol:two power_levels"
    );
    assert_eq!(
        v11(member(CAROL, CAROL, "knock")),
        "create join_rules member@carol:two power_levels"
    );
    let mut via = join(DAVE);
    via.content["join_authorised_via_users_server"] = BOB.into();
    assert_eq!(
        choice(RoomVersion::V8, &via),
        "create join_rules member@bob:two member@dave:three power_levels"
    );
    assert_eq!(
        choice(RoomVersion::V7, &via),
        "create join_rules member@dave:three power_levels"
    );
    let mut third = member(BOB, DAVE, "invite");
    third.content["join_authorised_via_users_server"] = CAROL.into();
    third.content["third_party_invite"] = json!({"signed": {"token": "abc"}});
    assert_eq!(
        v11(third),
        "create join_rules member@bob:two member@dave:three power_levels third_party_inviteabc"
    );
}

// -- Power, asked from outside ----------------------------------------------------------------------

fn power(version: RoomVersion, create: Value, content: Option<Value>) -> PowerLevels {
    let mut room = State::new().create(create);
    room = match content {
        Some(content) => room.levels(content),
        None => room.without("m.room.power_levels", ""),
    };
    let state = room.at(version);
    let get = |kind: &str| {
        state
            .get(&(kind.to_owned(), String::new()))
            .map(|pdu| &**pdu)
    };
    PowerLevels::of(version, get("m.room.create"), get("m.room.power_levels"))
}

fn user(id: &str) -> UserId {
    UserId::parse(id).unwrap()
}

#[test]
fn j20_r44_who_is_able_to_invite() {
    let content = json!({"users": {BOB: 50, CAROL: 49}, "invite": 50});
    let create = json!({"additional_creators": [DAVE]});
    let v11 = power(RoomVersion::V11, create.clone(), Some(content.clone()));
    assert_eq!(v11.users_able_to_invite(), [user(ALICE), user(BOB)]);
    assert!(!v11.can_invite(&user(CAROL)) && !v11.can_invite(&user(DAVE)));
    assert!(!v11.anyone_can_invite());
    let v12 = power(RoomVersion::V12, create.clone(), Some(content));
    assert_eq!(
        v12.users_able_to_invite(),
        [user(ALICE), user(DAVE), user(BOB)]
    );
    assert_eq!(v12.user(&user(DAVE)), Level::Infinite);
    assert!(v12.can_invite(&user(DAVE)));
    let open = power(RoomVersion::V11, create, None);
    assert!(open.anyone_can_invite() && open.can_invite(&user("@x:y")));
    assert_eq!(open.user(&user(ALICE)), 100);
    assert_eq!(open.users_able_to_invite(), [user(ALICE)]);
}

#[test]
fn v23_the_defaults() {
    for content in [None, Some(json!({}))] {
        let power = power(RoomVersion::V10, json!({}), content);
        assert_eq!([power.ban(), power.kick(), power.redact()], [50; 3]);
        assert_eq!([power.invite(), power.users_default()], [0; 2]);
        assert_eq!(
            (power.event("m.x", true), power.event("m.x", false)),
            (50, 0)
        );
        assert_eq!(power.notification("room"), 50);
        assert_eq!(power.user(&user(BOB)), 0);
        assert!(power.can_send(&user(BOB), "m.x", false) && !power.can_redact(&user(BOB)));
    }
}

#[test]
fn odd_levels_give_nobody_anything() {
    for odd in [json!([]), json!("x"), json!(1e300), json!({})] {
        let all: Map<String, Value> = [
            "users",
            "events",
            "notifications",
            "users_default",
            "events_default",
            "state_default",
            "ban",
            "kick",
            "redact",
            "invite",
        ]
        .into_iter()
        .map(|key| (key.to_owned(), odd.clone()))
        .collect();
        let power = power(RoomVersion::V12, json!({}), Some(Value::Object(all)));
        assert!(!power.can_invite(&user(BOB)) && !power.can_send(&user(BOB), "m.x", true));
        assert!(power.can_invite(&user(ALICE)));
    }
}

#[test]
fn content_of_any_shape_is_judged_without_a_panic() {
    let shapes = [
        json!(null),
        json!(true),
        json!(-1),
        json!(1e300),
        json!("@a:b"),
        json!([[]]),
        json!({"signed": []}),
        json!({"a": {"b": []}}),
        json!(""),
        json!({"@a:b": "99999999999999999999999"}),
    ];
    let keys = [
        "membership",
        "third_party_invite",
        "join_authorised_via_users_server",
        "users",
        "events",
        "ban",
        "join_rule",
        "creator",
        "additional_creators",
        "m.federate",
        "public_keys",
        "room_version",
    ];
    let kinds = [
        "m.room.create",
        "m.room.power_levels",
        "m.room.join_rules",
        "m.room.member",
    ];
    for (shape, key) in shapes.iter().flat_map(|shape| keys.map(|key| (shape, key))) {
        for kind in kinds {
            let mut content = json!({"membership": "join", key: shape});
            content["users"] = content["users"].take();
            let odd = state(ALICE, kind, content.clone());
            let mut as_invite = member(BOB, DAVE, "invite");
            as_invite.content[key] = shape.clone();
            for version in [RoomVersion::V1, RoomVersion::V9, RoomVersion::V12] {
                let room = State::new().with(odd.clone());
                for event in [
                    &odd,
                    &as_invite,
                    &join(DAVE),
                    &message(BOB),
                    &levels(BOB, content.clone()),
                ] {
                    // Any verdict will do.
                    let _ = room.check(version, event);
                    let _ = State::new().check(version, event);
                }
            }
        }
    }
}
