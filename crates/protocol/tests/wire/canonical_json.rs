//! Canonical JSON against the specification's vectors, ruma, and bytes at random.

use crate::common::{Dice, mutated, written_badly};
use proptest::prelude::*;
use protocol::canonical_json::{DEPTH_MAX, JsonError, canonicalise, to_canonical};
use ruma_common::CanonicalJsonValue;
use serde_json::{Value, json};

fn strict(raw: &str) -> Result<String, JsonError> {
    canonicalise(raw.as_bytes(), true).map(|bytes| String::from_utf8(bytes).unwrap())
}

fn lenient(raw: &str) -> Result<String, JsonError> {
    canonicalise(raw.as_bytes(), false).map(|bytes| String::from_utf8(bytes).unwrap())
}

/// <https://spec.matrix.org/v1.18/appendices/#examples>
#[test]
fn the_examples_of_the_specification() {
    for (raw, canonical) in [
        ("{}", "{}"),
        (r#"{ "one": 1, "two": "Two" }"#, r#"{"one":1,"two":"Two"}"#),
        (r#"{ "b": "2", "a": "1" }"#, r#"{"a":"1","b":"2"}"#),
        (r#"{"b":"2","a":"1"}"#, r#"{"a":"1","b":"2"}"#),
        (
            r#"{ "auth": { "success": true, "mxid": "@john.doe:example.com", "profile": {
                "display_name": "John Doe", "three_pids": [
                    { "medium": "email", "address": "john.doe@example.org" },
                    { "medium": "msisdn", "address": "123456789" } ] } } }"#,
            r#"{"auth":{"mxid":"@john.doe:example.com","profile":{"display_name":"John Doe","three_pids":[{"address":"john.doe@example.org","medium":"email"},{"address":"123456789","medium":"msisdn"}]},"success":true}}"#,
        ),
        (r#"{ "a": "日本語" }"#, r#"{"a":"日本語"}"#),
        (r#"{ "本": 2, "日": 1 }"#, r#"{"日":1,"本":2}"#),
        (r#"{ "a": "\u65E5" }"#, r#"{"a":"日"}"#),
        (r#"{ "a": null }"#, r#"{"a":null}"#),
    ] {
        assert_eq!(strict(raw).as_deref(), Ok(canonical));
        assert_eq!(lenient(raw).as_deref(), Ok(canonical));
    }
    // The one example whose input is not allowed in events of version 6 and later.
    let raw = r#"{ "a": -0, "b": 1e10 }"#;
    assert_eq!(lenient(raw).as_deref(), Ok(r#"{"a":0,"b":10000000000}"#));
    assert_eq!(strict(raw), Err(JsonError::Number(7)));
}

#[test]
fn strict_numbers_are_integers_that_a_double_holds() {
    for good in ["0", "1", "-1", "9007199254740991", "-9007199254740991"] {
        assert_eq!(strict(good).as_deref(), Ok(good));
    }
    for bad in [
        "-0",
        "0.0",
        "1.0",
        "1e0",
        "1E2",
        "9007199254740992",
        "-9007199254740992",
        "99999999999999999999999999",
    ] {
        assert!(matches!(strict(bad), Err(JsonError::Number(_))), "{bad}");
    }
    for bad in [
        "01", "-", "+1", ".5", "1.", "1e", "1e+", "-01", "0x1", "NaN", "Infinity",
    ] {
        assert!(matches!(strict(bad), Err(JsonError::Syntax(_))), "{bad}");
        assert!(matches!(lenient(bad), Err(JsonError::Syntax(_))), "{bad}");
    }
}

/// What Python prints: `json.dumps(json.loads(text))`.
#[test]
fn lenient_numbers_are_written_as_python_writes_them() {
    for (raw, written) in [
        ("50.57", "50.57"),
        ("1.0", "1.0"),
        ("1.10", "1.1"),
        ("-0.0", "-0.0"),
        ("0.0001", "0.0001"),
        ("0.00001", "1e-05"),
        ("1.5e-7", "1.5e-07"),
        ("1234567890123456.5", "1234567890123456.5"),
        ("9999999999999998.0", "9999999999999998.0"),
        ("10000000000000000.0", "1e+16"),
        ("1.7976931348623157e308", "1.7976931348623157e+308"),
        ("5e-324", "5e-324"),
        ("9007199254740993", "9007199254740993"),
        (
            "123456789012345678901234567890",
            "123456789012345678901234567890",
        ),
        ("-0", "0"),
    ] {
        assert_eq!(lenient(raw).as_deref(), Ok(written), "{raw}");
        assert_eq!(lenient(written).as_deref(), Ok(written), "{raw} twice");
    }
    assert!(lenient("1e400").is_err());
    assert!(lenient(&"9".repeat(301)).is_err());
}

#[test]
fn a_key_that_stands_twice_is_refused_or_the_last_counts() {
    for raw in [
        r#"{"a":1,"a":2}"#,
        r#"{"a":1,"\u0061":2}"#,
        r#"{"a":1,"b":{},"a":2}"#,
        r#"{"z":[{"k":1,"k":1}]}"#,
    ] {
        assert!(
            matches!(strict(raw), Err(JsonError::DuplicateKey(_))),
            "{raw}"
        );
        let python: Value = serde_json::from_str(raw).unwrap();
        assert_eq!(lenient(raw).unwrap(), python.to_string());
    }
}

#[test]
fn keys_are_sorted_by_code_point_not_by_escape_or_utf16() {
    // Escaped, a quote begins with a backslash, and a control character does too.
    let raw =
        r#"{"\\":1,"\"":2,"a":3,"Z":4,"!":5,"\u0001":6,"\n":7,"":8,"\uffff":9,"\ud83e\udd80":10}"#;
    let sorted = "{\"\":8,\"\\u0001\":6,\"\\n\":7,\"!\":5,\"\\\"\":2,\"Z\":4,\"\\\\\":1,\"a\":3,\"\u{ffff}\":9,\"🦀\":10}";
    assert_eq!(strict(raw).as_deref(), Ok(sorted));
}

#[test]
fn strings_lose_needless_escapes_and_keep_the_needed_ones() {
    let raw = r#""\/\u002f\b\f\n\r\t\u0008\u000B\u001F\u007f\u00e9\uD83E\uDD80""#;
    assert_eq!(
        strict(raw).as_deref(),
        Ok("\"//\\b\\f\\n\\r\\t\\b\\u000b\\u001f\u{7f}é🦀\"")
    );
    for half in [
        r#""\ud83e""#,
        r#""\udd80""#,
        r#""\ud83ex""#,
        r#""\ud83e\n""#,
        r#""\ud83e\ud83e""#,
        r#""\udd80\ud83e""#,
    ] {
        assert!(
            matches!(strict(half), Err(JsonError::Surrogate(_))),
            "{half}"
        );
        assert!(
            matches!(lenient(half), Err(JsonError::Surrogate(_))),
            "{half}"
        );
    }
    for bad in [
        "\"\n\"",
        "\"\u{1}\"",
        r#""\x""#,
        r#""\u12""#,
        r#""\u12g4""#,
        "\"",
        "\"\\",
        "\"\\u",
    ] {
        assert!(matches!(strict(bad), Err(JsonError::Syntax(_))), "{bad}");
    }
    assert_eq!(canonicalise(b"\"\xff\"", false), Err(JsonError::Utf8));
    assert_eq!(
        canonicalise(b"\"\xed\xa0\x80\"", false),
        Err(JsonError::Utf8)
    );
}

#[test]
fn what_is_not_one_json_value_is_refused() {
    for bad in [
        "",
        " ",
        "{",
        "}",
        "[1,]",
        "{,}",
        "{\"a\":1,}",
        "{\"a\" 1}",
        "{a:1}",
        "tru",
        "nulll",
        "{} {}",
        "[1 2]",
        "{\"a\":}",
        "'a'",
        "\u{feff}{}",
        "[1,2",
        "{\"a\":1]",
    ] {
        assert!(matches!(strict(bad), Err(JsonError::Syntax(_))), "{bad}");
        assert!(matches!(lenient(bad), Err(JsonError::Syntax(_))), "{bad}");
    }
}

#[test]
fn depth_is_bounded() {
    let nested = |levels: usize| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
    assert!(strict(&nested(DEPTH_MAX)).is_ok());
    assert_eq!(strict(&nested(DEPTH_MAX + 1)), Err(JsonError::Depth));
    assert_eq!(lenient(&nested(1_000_000)), Err(JsonError::Depth));
    let objects = |levels: usize| format!("{}1{}", "{\"a\":".repeat(levels), "}".repeat(levels));
    assert!(strict(&objects(DEPTH_MAX)).is_ok());
    assert_eq!(strict(&objects(DEPTH_MAX + 1)), Err(JsonError::Depth));
}

fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-9_007_199_254_740_991_i64..=9_007_199_254_740_991).prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 64, 8, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..8).prop_map(Value::from),
            prop::collection::vec((any::<String>(), inner), 0..8)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

fn of_ruma(raw: &str) -> Option<String> {
    let value: CanonicalJsonValue = serde_json::from_str(raw).ok()?;
    Some(value.to_string())
}

proptest! {
    #[test]
    fn any_writing_of_a_value_has_the_form_that_ruma_gives(value in any_value(), seed in any::<u64>()) {
        let raw = written_badly(&value, &mut Dice(seed));
        let canonical = strict(&raw).expect("a good value");
        prop_assert_eq!(Some(canonical.clone()), of_ruma(&raw));
        prop_assert_eq!(&lenient(&raw).expect("a good value"), &canonical);
        prop_assert_eq!(&strict(&canonical).expect("canonical"), &canonical);
        prop_assert_eq!(&to_canonical(&value).expect("a good value"), &canonical);
    }

    #[test]
    fn random_bytes_are_answered_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = canonicalise(&bytes, true);
        let _ = canonicalise(&bytes, false);
    }
}

/// 1e3 becomes 1000, which serde_json holds for another number.
fn as_doubles(value: Value) -> Value {
    match value {
        Value::Number(number) => json!(number.as_f64().map(|number| number + 0.0)),
        Value::Array(list) => list.into_iter().map(as_doubles).collect(),
        Value::Object(map) => map
            .into_iter()
            .map(|(key, value)| (key, as_doubles(value)))
            .collect(),
        other => other,
    }
}

/// Where both accept, both say the same; what we accept strictly, ruma accepts; what ruma accepts and we
/// do not is a key that stands twice or too deep.
#[test]
fn mutated_json_is_judged_as_ruma_judges_it() {
    let mut accepted = 0;
    for seed in 0..20_000 {
        let mut dice = Dice(seed);
        let raw = written_badly(&dice.value(4), &mut dice);
        let bytes = mutated(&raw, &mut dice);
        let ours = canonicalise(&bytes, true);
        let Ok(text) = std::str::from_utf8(&bytes) else {
            assert_eq!(ours, Err(JsonError::Utf8));
            continue;
        };
        let theirs = of_ruma(text);
        match (ours, theirs) {
            (Ok(ours), Some(theirs)) => {
                accepted += 1;
                assert_eq!(String::from_utf8(ours).unwrap(), theirs);
            }
            (Err(JsonError::DuplicateKey(_)), Some(_)) | (Err(_), None) => {}
            (ours, theirs) => panic!("{text}: {ours:?} but {theirs:?}"),
        }
        // Lenient accepts all that serde_json does and a double can hold.
        if let Ok(value) = serde_json::from_str::<Value>(text) {
            let lenient = canonicalise(&bytes, false).expect("JSON is accepted");
            let again: Value = serde_json::from_slice(&lenient).expect("and stays JSON");
            assert_eq!(as_doubles(again), as_doubles(value), "{text}");
        }
    }
    assert!(accepted > 1000, "only {accepted} mutations were harmless");
}
