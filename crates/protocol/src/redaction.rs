//! Redaction: what of an event survives.
//!
//! <https://spec.matrix.org/v1.18/rooms/v11/#redactions>

use serde_json::{Map, Value};

use crate::canonical_json::{self, Object};
use crate::room_version::{RoomVersion, Rules};

/// The event without what its room version lets go. Keeps `signatures`, drops `unsigned`.
pub fn redact(event: &Map<String, Value>, version: RoomVersion) -> Map<String, Value> {
    let rules = version.rules();
    let kind = event.get("type").and_then(Value::as_str).unwrap_or("");
    let mut kept: Map<String, Value> = event
        .iter()
        .filter(|(key, _)| keeps(key, rules))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    if let Some(Value::Object(content)) = kept.get_mut("content") {
        *content = redact_content(content, kind, version);
    }
    kept
}

/// The content that an event of this type keeps.
pub fn redact_content(
    content: &Map<String, Value>,
    kind: &str,
    version: RoomVersion,
) -> Map<String, Value> {
    let rules = version.rules();
    let mut kept = Map::new();
    for (key, value) in content {
        match content_key(kind, key, rules) {
            Kept::No => {}
            Kept::Yes => {
                kept.insert(key.clone(), value.clone());
            }
            Kept::OnlySigned => {
                if let Value::Object(invite) = value {
                    let signed = invite
                        .get_key_value("signed")
                        .map(|(key, value)| (key.clone(), value.clone()));
                    kept.insert(key.clone(), Value::Object(signed.into_iter().collect()));
                }
            }
        }
    }
    kept
}

/// The canonical redacted event, with or without its signatures. Without them it is what is signed and
/// what the event id is the hash of.
pub(crate) fn redacted(event: &Object, kind: &str, rules: &Rules, with_signatures: bool) -> String {
    let mut out = String::with_capacity(event.text.len());
    write_redacted(&mut out, event, kind, rules, with_signatures);
    out
}

/// The same, at the end of `out`.
pub(crate) fn write_redacted(
    out: &mut String,
    event: &Object,
    kind: &str,
    rules: &Rules,
    with_signatures: bool,
) {
    let text = &event.text;
    out.push('{');
    let empty = out.len();
    for member in &event.members {
        let key = member.key(text);
        if !keeps(key, rules) || (key == "signatures" && !with_signatures) {
            continue;
        }
        if out.len() > empty {
            out.push(',');
        }
        if key == "content" {
            out.push_str("\"content\":");
            write_content(out, member.value(text), kind, rules);
        } else {
            out.push_str(member.whole(text));
        }
    }
    out.push('}');
}

fn write_content(out: &mut String, content: &str, kind: &str, rules: &Rules) {
    if kind == "m.room.create" && rules.keeps_create_content {
        out.push_str(content);
        return;
    }
    out.push('{');
    // Most types keep nothing, so that their content need not be looked at.
    if HAS_KEPT_CONTENT.contains(&kind) {
        let empty = out.len();
        for member in canonical_json::members(content) {
            let kept = content_key(kind, member.key(content), rules);
            let value = member.value(content);
            if kept == Kept::No || (kept == Kept::OnlySigned && !value.starts_with('{')) {
                continue;
            }
            if out.len() > empty {
                out.push(',');
            }
            if kept == Kept::Yes {
                out.push_str(member.whole(content));
                continue;
            }
            out.push_str("\"third_party_invite\":{");
            if let Some(signed) = canonical_json::get(value, "signed") {
                out.push_str("\"signed\":");
                out.push_str(signed);
            }
            out.push('}');
        }
    }
    out.push('}');
}

fn keeps(key: &str, rules: &Rules) -> bool {
    match key {
        "event_id" | "type" | "room_id" | "sender" | "state_key" | "content" | "hashes"
        | "signatures" | "depth" | "prev_events" | "auth_events" | "origin_server_ts" => true,
        "origin" | "membership" | "prev_state" => rules.keeps_legacy_keys,
        _ => false,
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kept {
    No,
    Yes,
    /// An object of which the key `signed` is kept.
    OnlySigned,
}

/// The types of which `content_key` may keep something.
const HAS_KEPT_CONTENT: [&str; 7] = [
    "m.room.member",
    "m.room.create",
    "m.room.join_rules",
    "m.room.power_levels",
    "m.room.aliases",
    "m.room.history_visibility",
    "m.room.redaction",
];

fn content_key(kind: &str, key: &str, rules: &Rules) -> Kept {
    let kept = match (kind, key) {
        ("m.room.member", "third_party_invite") if rules.keeps_third_party_signed => {
            return Kept::OnlySigned;
        }
        ("m.room.member", "membership")
        | ("m.room.join_rules", "join_rule")
        | ("m.room.history_visibility", "history_visibility")
        | (
            "m.room.power_levels",
            "ban" | "events" | "events_default" | "kick" | "redact" | "state_default" | "users"
            | "users_default",
        ) => true,
        ("m.room.member", "join_authorised_via_users_server") => rules.keeps_join_authorised,
        ("m.room.create", key) => rules.keeps_create_content || key == "creator",
        ("m.room.join_rules", "allow") => rules.keeps_join_rule_allow,
        ("m.room.power_levels", "invite") => rules.keeps_invite_level,
        ("m.room.aliases", "aliases") => rules.keeps_aliases,
        ("m.room.redaction", "redacts") => rules.keeps_redacts,
        _ => false,
    };
    if kept { Kept::Yes } else { Kept::No }
}
