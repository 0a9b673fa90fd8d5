//! What each room version makes of the same event: ids, redactions and who must sign (V-1 to V-12).
//!
//! The hashes were made by a few lines of Python from the text of the specification, not by this code.

use protocol::hash;
use protocol::id::{RoomId, ServerName};
use protocol::pdu::Pdu;
use protocol::redaction::redact;
use protocol::room_version::RoomVersion;
use protocol::signature::required_servers;
use serde_json::{Map, Value, json};

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        other => panic!("not an object: {other}"),
    }
}

/// A restricted join with keys that only some versions keep when it is redacted.
fn join(version: RoomVersion) -> Map<String, Value> {
    let mut event = object(json!({
        "auth_events": [],
        "content": {
            "displayname": "Dave",
            "join_authorised_via_users_server": "@carol:example.org",
            "membership": "join",
            "third_party_invite": {
                "display_name": "d",
                "signed": {"mxid": "@dave:example.net", "token": "abc"},
            },
        },
        "depth": 7,
        "hashes": {"sha256": "zxI8WPchISg+53N/dtbfkSFxq+sIb527QnXh8s0wzkE"},
        "membership": "join",
        "origin": "example.net",
        "origin_server_ts": 1_700_000_000_015_i64,
        "prev_events": [],
        "prev_state": [],
        "room_id": "!room:example.org",
        "sender": "@dave:example.net",
        "state_key": "@dave:example.net",
        "type": "m.room.member",
    }));
    if version <= RoomVersion::V2 {
        event.insert("event_id".into(), json!("$opaque:example.net"));
        event["hashes"]["sha256"] = "P4AS5ddo38N60Vb84Dui4777z+w8Hi3lQqTJPmW+2LM".into();
    }
    event
}

#[test]
fn v1_to_v12_the_id_of_one_event() {
    for (version, id) in [
        (RoomVersion::V1, "$opaque:example.net"),
        (RoomVersion::V2, "$opaque:example.net"),
        (
            RoomVersion::V3,
            "$LjyFYno5iiQY7hWgKgO/h5h+EUGYYe3/P2EUlKMpBA0",
        ),
        (
            RoomVersion::V4,
            "$LjyFYno5iiQY7hWgKgO_h5h-EUGYYe3_P2EUlKMpBA0",
        ),
        (
            RoomVersion::V5,
            "$LjyFYno5iiQY7hWgKgO_h5h-EUGYYe3_P2EUlKMpBA0",
        ),
        (
            RoomVersion::V6,
            "$LjyFYno5iiQY7hWgKgO_h5h-EUGYYe3_P2EUlKMpBA0",
        ),
        (
            RoomVersion::V7,
            "$LjyFYno5iiQY7hWgKgO_h5h-EUGYYe3_P2EUlKMpBA0",
        ),
        (
            RoomVersion::V8,
            "$LjyFYno5iiQY7hWgKgO_h5h-EUGYYe3_P2EUlKMpBA0",
        ),
        (
            RoomVersion::V9,
            "$noIKwZkIG3k2lE9WF_-zGpfOg6v2hW6phEYtEl8k6YY",
        ),
        (
            RoomVersion::V10,
            "$noIKwZkIG3k2lE9WF_-zGpfOg6v2hW6phEYtEl8k6YY",
        ),
        (
            RoomVersion::V11,
            "$_33ctkd4pEqpkblnE79Sckqt_Z22vQ9psFB-Hj0NJVk",
        ),
        (
            RoomVersion::V12,
            "$_33ctkd4pEqpkblnE79Sckqt_Z22vQ9psFB-Hj0NJVk",
        ),
    ] {
        let event = join(version);
        let text = serde_json::to_string(&event).unwrap();
        let pdu = Pdu::parse(&text, version).unwrap();
        assert_eq!(pdu.event_id.as_str(), id, "{version}");
        assert!(!pdu.redacted, "{version}: the content hash is right");
        // A byte of what is redacted changes the content hash and not the id.
        let forged = text.replace("\"Dave\"", "\"Eve\"");
        let forged = Pdu::parse(&forged, version).unwrap();
        assert!(forged.redacted, "{version}");
        assert_eq!(forged.event_id.as_str(), id, "{version}");
        // A byte of what is kept changes the id, where that is a hash.
        let moved = text.replace("\"depth\":7", "\"depth\":8");
        let moved = Pdu::parse(&moved, version).unwrap();
        assert_eq!(moved.event_id.as_str() == id, version <= RoomVersion::V2);
    }
}

#[test]
fn v1_v2_the_hash_with_which_others_refer_to_an_event() {
    for version in [RoomVersion::V1, RoomVersion::V2] {
        let event = join(version);
        let wanted = "h05BBgzmzliOefHjw85PpwfF/ow0aD1OjdQRyJxgPk4";
        let found = hash::reference_hash(&event, version).unwrap();
        let parsed =
            ruma_common::serde::Base64::<ruma_common::serde::base64::Standard>::parse(wanted);
        assert_eq!(parsed.unwrap().as_bytes(), found);
        assert_eq!(hash::event_id(&event, version).unwrap(), None);
    }
}

#[test]
fn v12_the_room_id_is_the_hash_of_the_create_event() {
    let create = json!({
        "auth_events": [],
        "content": {"additional_creators": ["@carol:example.org"], "room_version": "12"},
        "depth": 1,
        "hashes": {"sha256": "V5S8j52TezD5mkPu58oNAPmBq7LkT3HCGzpI0ZiJNSo"},
        "origin_server_ts": 1_700_000_000_015_i64,
        "prev_events": [],
        "sender": "@dave:example.net",
        "state_key": "",
        "type": "m.room.create",
    });
    let pdu = Pdu::parse(&create.to_string(), RoomVersion::V12).unwrap();
    assert!(!pdu.redacted);
    let room = RoomId::parse("!kq2jt7Qh1CcyQ6HLDbUeXNDtu9jL0lTyHcWBQmFMMVs").unwrap();
    assert_eq!(pdu.room_id, room);
    assert_eq!(pdu.event_id.as_str()[1..], room.as_str()[1..]);
    assert_eq!(hash::create_of(&room), Some(pdu.event_id));
    // Before that it must name its room, and is no room's name.
    for version in RoomVersion::ALL
        .into_iter()
        .filter(|v| *v < RoomVersion::V12)
    {
        assert!(
            Pdu::parse(&create.to_string(), version).is_err(),
            "{version}"
        );
    }
}

/// The versions in which this holds, as `first-last` or nothing.
#[track_caller]
fn check(what: &str, versions: &str, holds: impl Fn(RoomVersion) -> bool) {
    let found: Vec<_> = RoomVersion::ALL.into_iter().filter(|v| holds(*v)).collect();
    let shown = match (found.first(), found.last()) {
        (Some(first), Some(last)) => format!("{first}-{last}"),
        _ => String::new(),
    };
    assert_eq!(shown, versions, "{what}");
    let all = RoomVersion::ALL.into_iter();
    let between = all.filter(|v| found.first() <= Some(v) && Some(v) <= found.last());
    assert_eq!(found, between.collect::<Vec<_>>(), "{what}");
}

#[test]
fn v1_to_v12_what_a_redaction_keeps_at_the_top() {
    for (key, versions) in [
        ("event_id", "1-12"),
        ("type", "1-12"),
        ("room_id", "1-12"),
        ("sender", "1-12"),
        ("state_key", "1-12"),
        ("content", "1-12"),
        ("hashes", "1-12"),
        ("signatures", "1-12"),
        ("depth", "1-12"),
        ("prev_events", "1-12"),
        ("auth_events", "1-12"),
        ("origin_server_ts", "1-12"),
        ("origin", "1-10"),
        ("membership", "1-10"),
        ("prev_state", "1-10"),
        ("redacts", ""),
        ("unsigned", ""),
        ("age_ts", ""),
        ("org.example", ""),
    ] {
        let mut event = object(json!({"type": "m.room.redaction", "content": {}}));
        event.insert(
            key.to_owned(),
            event.get(key).cloned().unwrap_or(json!("kept")),
        );
        check(key, versions, |version| {
            redact(&event, version).get(key) == event.get(key)
        });
    }
}

#[test]
fn v1_to_v12_what_a_redaction_keeps_of_the_content() {
    for (kind, key, versions) in [
        ("m.room.member", "membership", "1-12"),
        ("m.room.member", "join_authorised_via_users_server", "9-12"),
        ("m.room.member", "displayname", ""),
        ("m.room.member", "reason", ""),
        ("m.room.create", "creator", "1-12"),
        ("m.room.create", "room_version", "11-12"),
        ("m.room.create", "m.federate", "11-12"),
        ("m.room.create", "additional_creators", "11-12"),
        ("m.room.join_rules", "join_rule", "1-12"),
        ("m.room.join_rules", "allow", "8-12"),
        ("m.room.join_rules", "org.example", ""),
        ("m.room.power_levels", "ban", "1-12"),
        ("m.room.power_levels", "events", "1-12"),
        ("m.room.power_levels", "events_default", "1-12"),
        ("m.room.power_levels", "kick", "1-12"),
        ("m.room.power_levels", "redact", "1-12"),
        ("m.room.power_levels", "state_default", "1-12"),
        ("m.room.power_levels", "users", "1-12"),
        ("m.room.power_levels", "users_default", "1-12"),
        ("m.room.power_levels", "invite", "11-12"),
        ("m.room.power_levels", "notifications", ""),
        ("m.room.aliases", "aliases", "1-5"),
        ("m.room.history_visibility", "history_visibility", "1-12"),
        ("m.room.redaction", "redacts", "11-12"),
        ("m.room.redaction", "reason", ""),
        ("m.room.message", "body", ""),
        ("m.room.name", "name", ""),
        ("m.room.third_party_invite", "public_key", ""),
    ] {
        let content = json!({key: {"some": ["thing"]}});
        let event = object(json!({"type": kind, "content": content}));
        check(&format!("{kind} {key}"), versions, |version| {
            let redacted = redact(&event, version);
            let whole = redacted["content"] == content;
            assert!(whole || redacted["content"] == json!({}), "{kind} {key}");
            whole
        });
    }
}

#[test]
fn v11_of_a_third_party_invite_what_was_signed_stays() {
    let with = |third: Value| {
        let content = json!({"membership": "invite", "third_party_invite": third});
        object(json!({"type": "m.room.member", "content": content}))
    };
    let kept = |third: Value, version| {
        let redacted = redact(&with(third), version);
        redacted["content"].get("third_party_invite").cloned()
    };
    let signed = json!({"mxid": "@dave:example.net"});
    let third = json!({"display_name": "d", "signed": signed});
    check("signed", "11-12", |version| {
        kept(third.clone(), version) == Some(json!({"signed": signed}))
    });
    check("nothing", "1-10", |version| {
        kept(third.clone(), version).is_none()
    });
}

#[test]
fn v1_v8_who_must_sign() {
    let servers = |event: &Map<String, Value>, version| -> Vec<String> {
        let text = serde_json::to_string(event).unwrap();
        let pdu = Pdu::parse(&text, version).unwrap();
        let servers = required_servers(&pdu).unwrap();
        servers
            .iter()
            .map(|server| server.as_str().to_owned())
            .collect()
    };
    // The server of the authorising user.
    check("authorised", "8-12", |version| {
        servers(&join(version), version).contains(&"example.org".to_owned())
    });
    let leave = |version| {
        let mut event = join(version);
        event["content"]["membership"] = "leave".into();
        event
    };
    // Whatever it says, only of a join; where the wrong hash redacts the event, before version 9 it says nothing.
    check("left", "", |version| {
        servers(&leave(version), version).contains(&"example.org".to_owned())
    });
    // The server of the event's id.
    check("id", "1-2", |version| {
        let mut event = leave(version);
        if version <= RoomVersion::V2 {
            event.insert("event_id".into(), json!("$opaque:example.com"));
        }
        servers(&event, version).contains(&"example.com".to_owned())
    });
    check("sender", "1-12", |version| {
        let own = ServerName::parse("example.net").unwrap();
        servers(&leave(version), version).contains(&own.as_str().to_owned())
    });
}
