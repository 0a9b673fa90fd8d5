//! Events: format, hashes, ids, redaction and signatures, against the specification's vectors and ruma.

use std::collections::BTreeMap;

use crate::common::{Dice, mutated, written_badly};
use protocol::build::{self, PduDraft, Reference};
use protocol::format;
use protocol::hash;
use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::pdu::{EVENT_BYTES_MAX, Pdu, PduError};
use protocol::redaction::redact;
use protocol::room_version::RoomVersion;
use protocol::signature::{
    Keys, SignatureError, SigningKey, Verification, VerifyKey, needed_keys, required_servers,
    verify_json, verify_pdu, verify_pdus,
};
use ruma_common::CanonicalJsonObject;
use ruma_common::serde::Base64;
use serde_json::{Map, Value, json};

/// Every key of every server in the list is this one.
struct Known(SigningKey, Vec<&'static str>);

impl Keys for Known {
    fn key(
        &self,
        server: &ServerName,
        key_id: &str,
        _at_ms: i64,
        _version: RoomVersion,
    ) -> Option<VerifyKey> {
        let known = self.1.contains(&server.as_str()) && key_id == self.0.key_id();
        known.then(|| self.0.verify_key())
    }
}

/// The key of the specification's vectors.
fn spec_key() -> SigningKey {
    SigningKey::parse("ed25519 1 YJDBA9Xnr2sVqXD9Vj7XVUnmFZcZrlw8Md7kMW+3XA1").unwrap()
}

fn server(name: &str) -> ServerName {
    ServerName::parse(name).unwrap()
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        other => panic!("not an object: {other}"),
    }
}

fn ruma(event: &Map<String, Value>) -> CanonicalJsonObject {
    serde_json::from_value(Value::Object(event.clone())).unwrap()
}

fn ruma_rules(version: RoomVersion) -> ruma_common::room_version_rules::RoomVersionRules {
    ruma_common::RoomVersionId::try_from(version.as_str())
        .unwrap()
        .rules()
        .unwrap()
}

// -- vectors --------------------------------------------------------------------------------------

/// <https://spec.matrix.org/v1.18/appendices/#json-signing>
#[test]
fn the_json_signing_vectors_of_the_specification() {
    for (value, signature) in [
        (
            json!({}),
            "K8280/U9SSy9IVtjBuVeLr+HpOB4BQFWbg+UZaADMtTdGYI7Geitb76LTrr5QV/7Xg4ahLwYGYZzuHGZKM5ZAQ",
        ),
        (
            json!({"one": 1, "two": "Two"}),
            "KqmLSbO39/Bzb0QIYE82zqLwsA+PDzYIpIRA2sRQ4sL53+sN6/fpNSoqE7BP7vBZhG6kYdD13EIMJpvhJI+6Bw",
        ),
    ] {
        let mut signed = object(value);
        let key = spec_key();
        key.sign_json(&mut signed, &server("domain")).unwrap();
        assert_eq!(signed["signatures"]["domain"]["ed25519:1"], signature);
        let check = |object: &Map<String, Value>| {
            verify_json(object, &server("domain"), "ed25519:1", &key.verify_key())
        };
        assert_eq!(check(&signed), Ok(()));
        signed.insert("unsigned".into(), json!({"age": 5}));
        assert_eq!(check(&signed), Ok(()));
        signed.insert("three".into(), json!(3));
        assert!(matches!(check(&signed), Err(SignatureError::Wrong { .. })));
        signed.remove("signatures");
        assert!(matches!(check(&signed), Err(SignatureError::Missing(_))));
    }
}

/// <https://spec.matrix.org/v1.18/appendices/#event-signing>
#[test]
fn the_event_signing_vectors_of_the_specification() {
    let signed = r#"{"auth_events":[],"content":{},"depth":3,"hashes":{"sha256":"5jM4wQpv6lnBo7CLIghJuHdW+s2CMBJPUOGOC89ncos"},"origin":"domain","origin_server_ts":1000000,"prev_events":[],"room_id":"!x:domain","sender":"@a:domain","signatures":{"domain":{"ed25519:1":"KxwGjPSDEtvnFgU00fwFz+l6d2pJM6XBIaMEn81SXPTRl16AqLAYqfIReFGZlHi5KLjAWbOoMszkwsQma+lYAg"}},"type":"X","unsigned":{"age_ts":1000000}}"#;
    let version = RoomVersion::V6;
    let mut event: Map<String, Value> = serde_json::from_str(signed).unwrap();
    let made = build::sign(event.clone(), &spec_key(), &server("domain"), version).unwrap();
    event.remove("unsigned");
    assert_eq!(*made.json, *Value::Object(event).to_string());
    let read = Pdu::parse(signed, version).unwrap();
    assert_eq!(read, made);
    assert!(!read.redacted);
    verify_pdu(&read, &Known(spec_key(), vec!["domain"])).unwrap();

    // The other vector is not a whole event, so its hash and its signature stand alone.
    let event = object(json!({
        "content": {"body": "Here is the message content"},
        "event_id": "$0:domain",
        "hashes": {"sha256": "onLKD1bGljeBWQhWZ1kaP9SorVmRQNdN5aM2JYU2n/g"},
        "origin": "domain",
        "origin_server_ts": 1_000_000,
        "type": "m.room.message",
        "room_id": "!r:domain",
        "sender": "@u:domain",
        "unsigned": {"age_ts": 1_000_000},
    }));
    let sha256 = hash::content_hash(&event, RoomVersion::V1).unwrap();
    let stated = Base64::<ruma_common::serde::base64::Standard>::parse(
        "onLKD1bGljeBWQhWZ1kaP9SorVmRQNdN5aM2JYU2n/g",
    );
    assert_eq!(stated.unwrap().as_bytes(), sha256);
    let mut redacted = redact(&event, RoomVersion::V1);
    spec_key()
        .sign_json(&mut redacted, &server("domain"))
        .unwrap();
    assert_eq!(
        redacted["signatures"]["domain"]["ed25519:1"],
        "Wm+VzmOUOz08Ds+0NTWb1d4CZrVsJSikkeRxh6aCcUwu6pNC78FunoD7KNWzqFn241eYHYMGCA5McEiVPdhzBA"
    );
}

// -- random events against ruma -------------------------------------------------------------------

const KINDS: [&str; 10] = [
    "m.room.member",
    "m.room.create",
    "m.room.join_rules",
    "m.room.power_levels",
    "m.room.aliases",
    "m.room.history_visibility",
    "m.room.redaction",
    "m.room.message",
    "m.room.name",
    "we\"ird\n",
];

const CONTENT_KEYS: [&str; 24] = [
    "membership",
    "join_authorised_via_users_server",
    "third_party_invite",
    "creator",
    "room_version",
    "join_rule",
    "allow",
    "ban",
    "events",
    "events_default",
    "invite",
    "kick",
    "redact",
    "state_default",
    "users",
    "users_default",
    "notifications",
    "aliases",
    "history_visibility",
    "redacts",
    "body",
    "displayname",
    "reason",
    "\\\"",
];

/// An event with all it needs but hashes and signatures.
fn random_event(dice: &mut Dice, version: RoomVersion) -> Map<String, Value> {
    let rules = version.rules();
    let kind = dice.pick(&KINDS);
    let mut content = Map::new();
    for _ in 0..dice.below(8) {
        let value = match dice.below(4) {
            0 => json!({"signed": {"token": "t"}, "display_name": "n"}),
            1 => json!("join"),
            _ => dice.value(2),
        };
        content.insert(dice.pick(&CONTENT_KEYS).to_owned(), value);
    }
    if kind == "m.room.member" {
        content.insert("membership".into(), json!("join"));
    }
    // A content key that two implementations read differently: only objects are told apart alike.
    if !content
        .get("third_party_invite")
        .is_none_or(Value::is_object)
    {
        content.remove("third_party_invite");
    }
    content.remove("join_authorised_via_users_server");
    if dice.one_in(3) {
        content.insert(
            "join_authorised_via_users_server".into(),
            json!("@auth:domain"),
        );
    }
    let references = |dice: &mut Dice| -> Value {
        (0..dice.below(4))
            .map(|_| {
                let id = json!(format!("${}:domain", dice.roll()));
                if rules.reference_pairs {
                    json!([id, {"sha256": "abc"}])
                } else {
                    id
                }
            })
            .collect()
    };
    let mut event = object(json!({
        "content": content,
        "depth": dice.roll() >> 12,
        "origin_server_ts": dice.roll() >> 20,
        "prev_events": references(dice),
        "auth_events": references(dice),
        "sender": "@someone:domain",
        "type": kind,
    }));
    if dice.one_in(2) {
        event.insert("state_key".into(), json!(dice.text()));
    }
    let creates = kind == "m.room.create" && event.get("state_key") == Some(&json!(""));
    if !(rules.room_id_is_create_hash && creates) {
        event.insert("room_id".into(), json!("!room:domain"));
    }
    for key in [
        "origin",
        "membership",
        "prev_state",
        "age_ts",
        "org.example.key",
        "redacts",
    ] {
        if dice.one_in(3) {
            event.insert(key.into(), json!(dice.text()));
        }
    }
    event
}

#[test]
fn random_events_have_the_hashes_ids_and_signatures_that_ruma_gives() {
    let key = spec_key();
    let public: BTreeMap<String, BTreeMap<String, Base64>> = BTreeMap::from([(
        "domain".to_owned(),
        BTreeMap::from([(
            "ed25519:1".to_owned(),
            Base64::parse(key.public_base64()).unwrap(),
        )]),
    )]);
    for version in RoomVersion::ALL {
        let rules = ruma_rules(version);
        for seed in 0..100 {
            let mut dice = Dice(seed);
            let event = random_event(&mut dice, version);
            let pdu = build::sign(event, &key, &server("domain"), version).unwrap();
            let signed: Map<String, Value> = serde_json::from_str(&pdu.json).unwrap();
            let theirs = ruma(&signed);

            // The whole of it is canonical, and however it is written it reads the same.
            assert_eq!(*pdu.json, *serde_json::to_string(&theirs).unwrap());
            let bad = written_badly(&Value::Object(signed.clone()), &mut dice);
            assert_eq!(Pdu::parse(&bad, version).as_ref(), Ok(&pdu));
            let trusted = Pdu::parse_trusted(&pdu.json, version, pdu.event_id.clone(), false);
            assert_eq!(trusted.as_ref(), Ok(&pdu));

            // Hashes, id and signature.
            let content = ruma_signatures::content_hash(&theirs).unwrap();
            assert_eq!(
                content.as_bytes(),
                hash::content_hash(&signed, version).unwrap()
            );
            assert_eq!(signed["hashes"]["sha256"], content.encode());
            let reference = ruma_signatures::reference_hash(&theirs, &rules).unwrap();
            if version >= RoomVersion::V3 {
                assert_eq!(pdu.event_id.as_str(), format!("${reference}"));
                let id = hash::event_id(&signed, version).unwrap();
                assert_eq!(id.as_ref(), Some(&pdu.event_id));
            }
            assert_eq!(
                pdu.reference_hash(),
                hash::reference_hash(&signed, version).unwrap()
            );
            let verified = ruma_signatures::verify_event(&public, &theirs, &rules).unwrap();
            assert_eq!(verified, ruma_signatures::Verified::All);
            assert_eq!(
                verify_pdu(&pdu, &Known(key.clone(), vec!["domain"])),
                Ok(())
            );

            // Redaction, and that it changes neither id nor signature.
            let redacted = redact(&signed, version);
            let redacted_by_ruma =
                ruma_common::canonical_json::redact(theirs, &rules.redaction, None).unwrap();
            assert_eq!(ruma(&redacted), redacted_by_ruma);
            let text = Value::Object(redacted).to_string();
            let again = Pdu::parse(&text, version).unwrap();
            assert_eq!(
                (&again.event_id, &again.room_id),
                (&pdu.event_id, &pdu.room_id)
            );
            assert_eq!(again.signing_bytes(), pdu.signing_bytes());
            assert_eq!(*again.json, *text);
        }
    }
}

#[test]
fn an_event_of_ruma_verifies_here_and_its_required_servers_agree() {
    for version in RoomVersion::ALL {
        let rules = ruma_rules(version);
        for seed in 0..100 {
            let mut dice = Dice(seed);
            let mut event = random_event(&mut dice, version);
            event.insert("content".into(), {
                let mut content = Map::new();
                content.insert(
                    "membership".into(),
                    json!(dice.pick(&["join", "invite", "leave"])),
                );
                if dice.one_in(2) {
                    content.insert("third_party_invite".into(), json!({"signed": {}}));
                }
                if dice.one_in(2) && content["membership"] == "join" {
                    content.insert("join_authorised_via_users_server".into(), json!("@a:third"));
                }
                Value::Object(content)
            });
            let pdu = build::sign(event, &spec_key(), &server("domain"), version).unwrap();
            let theirs = ruma(&serde_json::from_str(&pdu.json).unwrap());
            let wanted: Vec<String> = ruma_signatures::required_server_signatures_to_verify_event(
                &theirs,
                &rules.signatures,
            )
            .unwrap()
            .into_iter()
            .map(|server| server.to_string())
            .collect();
            // ruma does not look at the type.
            if &*pdu.kind == "m.room.member" {
                let mut ours: Vec<String> = required_servers(&pdu)
                    .unwrap()
                    .iter()
                    .map(ToString::to_string)
                    .collect();
                ours.sort();
                assert_eq!(ours, wanted);
            }
        }
    }
}

// -- format ---------------------------------------------------------------------------------------

fn message(version: RoomVersion) -> Map<String, Value> {
    let mut event = object(json!({
        "type": "m.room.message",
        "room_id": "!r:domain",
        "sender": "@u:domain",
        "content": {"body": "hello"},
        "depth": 5,
        "origin_server_ts": 1,
        "prev_events": [],
        "auth_events": [],
    }));
    if version <= RoomVersion::V2 {
        event.insert("event_id".into(), json!("$x:domain"));
    }
    event
}

fn parse(event: &Map<String, Value>, version: RoomVersion) -> Result<Pdu, PduError> {
    Pdu::parse(&serde_json::to_string(event).unwrap(), version)
}

#[test]
fn a_missing_or_wrongly_typed_key_is_a_format_error() {
    for version in RoomVersion::ALL {
        assert!(parse(&message(version), version).is_ok());
        for key in [
            "type",
            "room_id",
            "sender",
            "content",
            "depth",
            "origin_server_ts",
            "prev_events",
            "auth_events",
        ] {
            let mut event = message(version);
            event.remove(key);
            assert_eq!(parse(&event, version), Err(PduError::Format(key)));
            for wrong in [
                json!(null),
                json!(true),
                json!([1]),
                json!("x"),
                json!({"a": 1}),
                json!([["$a"]]),
            ] {
                if (key == "type" && wrong.is_string()) || (key == "content" && wrong.is_object()) {
                    continue;
                }
                event.insert(key.into(), wrong.clone());
                assert_eq!(
                    parse(&event, version),
                    Err(PduError::Format(key)),
                    "{key}: {wrong}"
                );
            }
        }
        for key in ["hashes", "signatures", "state_key"] {
            let mut event = message(version);
            event.insert(key.into(), json!([]));
            assert_eq!(parse(&event, version), Err(PduError::Format(key)));
        }
        let mut event = message(version);
        event.insert("event_id".into(), json!("$y:domain"));
        let wanted = if version <= RoomVersion::V2 {
            Ok(())
        } else {
            Err(PduError::Format("event_id"))
        };
        assert_eq!(parse(&event, version).map(|_| ()), wanted);
    }
    for raw in ["[]", "3", "\"x\"", "null"] {
        let result = Pdu::parse(raw, RoomVersion::V11);
        assert_eq!(
            result,
            Err(PduError::Json(
                protocol::canonical_json::JsonError::NotAnObject
            ))
        );
    }
}

#[test]
fn r27_without_hashes_and_signatures_it_is_a_redacted_event_that_nobody_signed() {
    let pdu = parse(&message(RoomVersion::V11), RoomVersion::V11).unwrap();
    assert!(pdu.redacted);
    assert_eq!(pdu.content(), "{}");
    let known = Known(spec_key(), vec!["domain"]);
    assert_eq!(
        verify_pdu(&pdu, &known),
        Err(SignatureError::Missing(server("domain")))
    );
}

#[test]
fn references_have_the_shape_of_their_version() {
    let plain = json!(["$a", "$b"]);
    let pairs = json!([["$a:x", {"sha256": "h"}], ["$b:x", {}]]);
    for version in RoomVersion::ALL {
        for key in ["prev_events", "auth_events"] {
            let mut event = message(version);
            let (good, bad) = if version <= RoomVersion::V2 {
                (&pairs, &plain)
            } else {
                (&plain, &pairs)
            };
            event.insert(key.into(), good.clone());
            let pdu = parse(&event, version).unwrap();
            let list = if key == "prev_events" {
                pdu.prev_events
            } else {
                pdu.auth_events
            };
            assert_eq!(list.len(), 2);
            assert!(list[0].as_str().starts_with("$a"));
            event.insert(key.into(), bad.clone());
            assert_eq!(parse(&event, version), Err(PduError::Format(key)));
        }
    }
    for bad in [
        json!([["$a:x"]]),
        json!([["$a:x", {}, {}]]),
        json!([["$a:x", "h"]]),
        json!([[1, {}]]),
        json!([["a", {}]]),
    ] {
        let mut event = message(RoomVersion::V1);
        event.insert("prev_events".into(), bad);
        assert_eq!(
            parse(&event, RoomVersion::V1),
            Err(PduError::Format("prev_events"))
        );
    }
}

#[test]
fn depth_and_numbers_are_as_wide_as_the_version_allows() {
    for version in RoomVersion::ALL {
        let strict = version >= RoomVersion::V6;
        let mut event = message(version);
        event.insert("depth".into(), json!(version.rules().depth_max));
        assert!(parse(&event, version).is_ok());
        event.insert("depth".into(), json!(-1));
        assert_eq!(parse(&event, version), Err(PduError::Format("depth")));
        event.insert("depth".into(), json!(i64::MAX));
        assert_eq!(parse(&event, version).is_err(), strict);
        let mut event = message(version);
        event.insert("content".into(), json!({"x": 1.5}));
        assert_eq!(parse(&event, version).is_err(), strict);
        event.insert("content".into(), json!({"x": u64::MAX}));
        assert_eq!(parse(&event, version).is_err(), strict);
    }
}

#[test]
fn v20_a_field_too_long_in_code_points_is_refused_in_bytes_only_noted_before_v11() {
    let wide = |count: usize| "é".repeat(count);
    for version in RoomVersion::ALL {
        let strict = version >= RoomVersion::V11;
        for key in ["type", "state_key", "sender", "room_id", "event_id"] {
            if key == "event_id" && version > RoomVersion::V2 {
                continue;
            }
            let with = |characters: usize| {
                let mut event = message(version);
                let text = match key {
                    "sender" => format!("@{}:domain", wide(characters - 8)),
                    "room_id" => format!("!{}", wide(characters - 1)),
                    "event_id" => format!("${}", wide(characters - 1)),
                    _ => wide(characters),
                };
                assert_eq!(text.chars().count(), characters);
                event.insert(key.into(), json!(text));
                parse(&event, version)
            };
            assert!(!with(100).unwrap().oversized_field, "{key}");
            match with(255) {
                Ok(pdu) => assert!(pdu.oversized_field && !strict, "{key}"),
                Err(error) => assert!(
                    strict && error == PduError::FieldTooLong(key),
                    "{key} {error}"
                ),
            }
            assert_eq!(with(256), Err(PduError::FieldTooLong(key)));
        }
    }
}

#[test]
fn v20_an_event_has_65536_bytes_at_most_without_unsigned() {
    let version = RoomVersion::V11;
    let key = spec_key();
    let of_size = |extra: usize| {
        let mut event = message(version);
        event.insert("content".into(), json!({"body": "x".repeat(extra)}));
        build::sign(event, &key, &server("domain"), version)
    };
    let base = of_size(0).unwrap().json.len();
    let full = of_size(EVENT_BYTES_MAX - base).unwrap();
    assert_eq!(full.json.len(), EVENT_BYTES_MAX);
    assert_eq!(of_size(EVENT_BYTES_MAX - base + 1), Err(PduError::TooLarge));
    let mut event: Map<String, Value> = serde_json::from_str(&full.json).unwrap();
    event.insert("unsigned".into(), json!({"age": "x".repeat(1000)}));
    assert_eq!(parse(&event, version).as_ref(), Ok(&full));
    let padded = format!("  {}\n", full.json);
    assert_eq!(Pdu::parse(&padded, version).as_ref(), Ok(&full));
}

#[test]
fn f17_the_number_of_references_is_checked_only_when_asked() {
    let version = RoomVersion::V11;
    let ids = |count: usize| -> Value { (0..count).map(|at| json!(format!("${at}"))).collect() };
    for (prev, auth, good) in [
        (20, 10, true),
        (21, 10, false),
        (20, 11, false),
        (500, 500, false),
    ] {
        let mut event = message(version);
        event.insert("prev_events".into(), ids(prev));
        event.insert("auth_events".into(), ids(auth));
        let pdu = parse(&event, version).unwrap();
        assert_eq!(format::check_limits(&pdu).is_ok(), good);
    }
}

#[test]
fn j33_an_event_of_ours_keeps_every_limit() {
    let version = RoomVersion::V6;
    let sign = |event| build::sign(event, &spec_key(), &server("domain"), version).map(|_| ());
    let mut event = message(version);
    event.insert("state_key".into(), json!("é".repeat(127)));
    assert_eq!(sign(event.clone()), Ok(()));
    event.insert("state_key".into(), json!("é".repeat(128)));
    assert!(matches!(sign(event), Err(PduError::FieldTooLong(_))));
    let mut event = message(version);
    event.insert("prev_events".into(), json!(vec!["$x"; 21]));
    assert_eq!(sign(event), Err(PduError::TooMany("prev_events")));
}

// -- hashes, rooms, redactions --------------------------------------------------------------------

#[test]
fn a_wrong_content_hash_leaves_the_redacted_event_with_the_same_id_and_signature() {
    for version in RoomVersion::ALL {
        let mut event = message(version);
        event.insert("org.example".into(), json!(1));
        event.insert("unsigned".into(), json!({"age": 1}));
        let pdu = build::sign(event, &spec_key(), &server("domain"), version).unwrap();
        assert!(!pdu.redacted);
        let forged = pdu.json.replace("hello", "HELLO");
        let mut signed = "before".to_owned();
        let redacted = Pdu::parse_with_signed(&forged, version, &mut signed).unwrap();
        assert!(redacted.redacted);
        assert_eq!(redacted.content(), "{}");
        assert_eq!(redacted.event_id, pdu.event_id);
        assert_eq!(redacted.raw("org.example"), None);
        assert_eq!(signed, format!("before{}", pdu.signing_bytes()));
        let broken = forged.replace("depth", "deep");
        assert!(Pdu::parse_with_signed(&broken, version, &mut signed).is_err());
        assert_eq!(signed, format!("before{}", pdu.signing_bytes()));
        assert_eq!(
            verify_pdu(&redacted, &Known(spec_key(), vec!["domain"])),
            Ok(())
        );
        // Stored and read again it is what it was.
        let stored = Pdu::parse_trusted(&redacted.json, version, redacted.event_id.clone(), true);
        assert_eq!(stored.as_ref(), Ok(&redacted));
        assert_eq!(Pdu::parse(&redacted.json, version).as_ref(), Ok(&redacted));
    }
}

#[test]
fn a_room_of_version_12_is_named_after_its_create_event() {
    let version = RoomVersion::V12;
    let draft = |room_id: Option<RoomId>| PduDraft {
        room_id,
        sender: UserId::parse("@u:domain").unwrap(),
        kind: "m.room.create".into(),
        state_key: Some(String::new()),
        content: json!({"room_version": "12"}),
        prev_events: vec![],
        auth_events: vec![],
        depth: 1,
        origin_server_ts: 1,
        redacts: None,
        extra: Map::new(),
    };
    let key = spec_key();
    let create = draft(None).sign(&key, &server("domain"), version).unwrap();
    assert_eq!(create.room_id.as_str()[1..], create.event_id.as_str()[1..]);
    assert_eq!(create.raw("room_id"), None);
    assert_eq!(
        hash::create_of(&create.room_id),
        Some(create.event_id.clone())
    );
    let named = draft(Some(create.room_id.clone())).sign(&key, &server("domain"), version);
    assert_eq!(named, Err(PduError::Format("room_id")));
    // In other versions the room id is needed.
    let unnamed = draft(None).sign(&key, &server("domain"), RoomVersion::V11);
    assert_eq!(unnamed, Err(PduError::Format("room_id")));
}

#[test]
fn a_redaction_names_its_target_where_its_version_has_it() {
    for version in RoomVersion::ALL {
        let target = EventId::parse("$target").unwrap();
        let draft = PduDraft {
            room_id: Some(RoomId::parse("!r:domain").unwrap()),
            sender: UserId::parse("@u:domain").unwrap(),
            kind: "m.room.redaction".into(),
            state_key: None,
            content: json!({"reason": "x"}),
            prev_events: vec![Reference::from(EventId::parse("$p:domain").unwrap())],
            auth_events: vec![],
            depth: i64::MAX,
            origin_server_ts: 1,
            redacts: Some(target.clone()),
            extra: object(json!({"origin": "domain", "sender": "@liar:domain"})),
        };
        let pdu = draft.sign(&spec_key(), &server("domain"), version).unwrap();
        assert_eq!(pdu.redacts.as_deref(), Some(&target));
        assert_eq!(pdu.raw("redacts").is_some(), version < RoomVersion::V11);
        assert_eq!(
            pdu.content_raw("redacts").is_some(),
            version >= RoomVersion::V11
        );
        assert_eq!(pdu.depth, version.rules().depth_max);
        assert_eq!(pdu.sender.as_str(), "@u:domain");
        assert_eq!(pdu.raw("origin"), Some("\"domain\""));
    }
}

#[test]
fn versions_1_and_2_write_references_with_the_hash_of_the_event() {
    let version = RoomVersion::V1;
    let first = build::sign(message(version), &spec_key(), &server("domain"), version).unwrap();
    let mut event = message(version);
    event.insert("origin_server_ts".into(), json!(2));
    let second = build::sign(event, &spec_key(), &server("domain"), version).unwrap();
    assert_ne!(first.event_id, second.event_id);
    assert!(first.event_id.as_str().ends_with(":domain"));
    let reference = Reference::from(&first);
    let draft = PduDraft {
        room_id: Some(first.room_id.clone()),
        sender: first.sender.clone(),
        kind: "m.room.message".into(),
        state_key: None,
        content: json!({}),
        prev_events: vec![reference],
        auth_events: vec![Reference::from(second.event_id.clone())],
        depth: 6,
        origin_server_ts: 3,
        redacts: None,
        extra: Map::new(),
    };
    let pdu = draft.sign(&spec_key(), &server("domain"), version).unwrap();
    let written: Value = serde_json::from_str(&pdu.json).unwrap();
    let theirs = ruma(&serde_json::from_str(&first.json).unwrap());
    let hash = ruma_signatures::reference_hash(&theirs, &ruma_rules(version)).unwrap();
    assert_eq!(
        written["prev_events"],
        json!([[first.event_id, {"sha256": hash}]])
    );
    assert_eq!(written["auth_events"], json!([[second.event_id, {}]]));
}

// -- signatures -----------------------------------------------------------------------------------

#[test]
fn j59_every_known_signature_of_a_required_server_must_be_right_and_one_must_be_known() {
    let version = RoomVersion::V10;
    let (ours, theirs) = (spec_key(), SigningKey::generate([9; 32], "1").unwrap());
    let mut event = message(version);
    event.insert("type".into(), json!("m.room.member"));
    event.insert("state_key".into(), json!("@u:domain"));
    event.insert(
        "content".into(),
        json!({"membership": "join", "join_authorised_via_users_server": "@a:resident"}),
    );
    let alone = build::sign(event, &ours, &server("domain"), version).unwrap();
    let known = Known(ours.clone(), vec!["domain", "resident"]);
    assert_eq!(
        verify_pdu(&alone, &known),
        Err(SignatureError::Missing(server("resident")))
    );
    let both = build::cosign(&alone, &ours, &server("resident")).unwrap();
    assert_eq!(both.event_id, alone.event_id);
    assert_eq!(both.signatures().count(), 2);
    assert_eq!(needed_keys(&both).len(), 2);
    assert_eq!(verify_pdu(&both, &known), Ok(()));
    let half_known = Known(ours.clone(), vec!["domain"]);
    assert_eq!(
        verify_pdu(&both, &half_known),
        Err(SignatureError::UnknownKey(server("resident")))
    );
    let wrong = build::cosign(&alone, &theirs, &server("resident")).unwrap();
    assert!(matches!(
        verify_pdu(&wrong, &known),
        Err(SignatureError::Wrong { .. })
    ));
    // A signature of somebody who need not sign is nobody's business.
    let bystander = build::cosign(&both, &theirs, &server("bystander")).unwrap();
    assert_eq!(verify_pdu(&bystander, &known), Ok(()));
    // Before version 8 nobody authorises.
    let mut event: Map<String, Value> = serde_json::from_str(&alone.json).unwrap();
    event.remove("signatures");
    let old = build::sign(event, &ours, &server("domain"), RoomVersion::V7).unwrap();
    assert_eq!(required_servers(&old), Ok(vec![server("domain")]));
}

#[test]
fn many_events_are_judged_in_a_batch_as_they_are_one_by_one() {
    let key = spec_key();
    let known = Known(key.clone(), vec!["domain"]);
    let version = RoomVersion::V11;
    let pdus: Vec<(Pdu, String)> = (0..400)
        .map(|seed| {
            let mut dice = Dice(seed);
            let event = random_event(&mut dice, version);
            let signer = if dice.one_in(40) {
                SigningKey::generate([1; 32], "1").unwrap()
            } else {
                key.clone()
            };
            let pdu = build::sign(event, &signer, &server("domain"), version).unwrap();
            let signed = pdu.signing_bytes();
            (pdu, signed)
        })
        .collect();
    let items: Vec<(&Pdu, &str)> = pdus
        .iter()
        .map(|(pdu, signed)| (pdu, signed.as_str()))
        .collect();
    let single: Vec<_> = pdus
        .iter()
        .map(|(pdu, _)| verify_pdu(pdu, &known))
        .collect();
    assert!(single.iter().any(Result::is_ok) && single.iter().any(Result::is_err));
    for verification in [Verification::Batch, Verification::Single] {
        assert_eq!(verify_pdus(&items, &known, [7; 32], verification), single);
    }
}

#[test]
fn a_signing_key_is_read_as_it_was_written() {
    let key = spec_key();
    // The specification's base64 ends in a stray bit.
    assert_eq!(
        key.to_line(),
        "ed25519 1 YJDBA9Xnr2sVqXD9Vj7XVUnmFZcZrlw8Md7kMW+3XA0"
    );
    assert_eq!(key.key_id(), "ed25519:1");
    assert_eq!(
        key.public_base64(),
        "XGX0JRS2Af3be3knz2fBiRbApjm2Dh61gXDJA8kcJNI"
    );
    assert!(!format!("{key:?}").contains("YJDB"));
    for bad in [
        "",
        "ed25519 1",
        "rsa 1 AAAA",
        "ed25519 1 AAAA",
        "ed25519 a:b YJDBA9Xnr2sVqXD9Vj7XVUnmFZcZrlw8Md7kMW+3XA1",
        "ed25519 1 x y",
    ] {
        assert!(SigningKey::parse(bad).is_err(), "{bad}");
    }
}

// -- no panic -------------------------------------------------------------------------------------

#[test]
fn no_bytes_make_the_parsers_panic() {
    let known = Known(spec_key(), vec!["domain"]);
    for seed in 0..1_000 {
        let mut dice = Dice(seed);
        let version = RoomVersion::ALL[dice.below(12)];
        let event = random_event(&mut dice, version);
        let whole = build::sign(event, &spec_key(), &server("domain"), version).unwrap();
        for _ in 0..20 {
            let bytes = mutated(&whole.json, &mut dice);
            let text = String::from_utf8_lossy(&bytes);
            // The store's own rows are not checked, but must not panic either.
            let _ = Pdu::parse_trusted(&text, version, whole.event_id.clone(), false);
            let Ok(pdu) = Pdu::parse(&text, version) else {
                continue;
            };
            let mut again = Pdu::parse(&pdu.json, version).expect("what was accepted stays so");
            // What was added in vain is gone, and with it the wrong hash.
            assert!(pdu.redacted || !again.redacted);
            again.redacted = pdu.redacted;
            assert_eq!(again, pdu);
            let _ = (
                verify_pdu(&pdu, &known),
                pdu.membership(),
                pdu.content_value(),
            );
        }
    }
}
