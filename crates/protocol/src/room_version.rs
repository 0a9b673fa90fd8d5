//! Room version to rules: one table (joins.md part 7).
//!
//! <https://spec.matrix.org/v1.18/rooms/>

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A room version this server knows. Anything else is refused, never guessed (V-14).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RoomVersion {
    V1,
    V2,
    V3,
    V4,
    V5,
    V6,
    V7,
    V8,
    V9,
    V10,
    V11,
    V12,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateResolution {
    V1,
    V2,
    /// Starts from the empty map and takes in the conflicted state subgraph.
    V2_1,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventIdFormat {
    /// `$opaque:domain`, a key of the event itself.
    Opaque,
    /// `$` and the reference hash in unpadded standard base64; not a key of the event.
    Base64,
    /// The same in the URL-safe alphabet.
    UrlSafe,
}

/// One field for each thing in which room versions differ.
#[derive(Debug, PartialEq, Eq)]
pub struct Rules {
    // -- format
    pub event_id: EventIdFormat,
    /// `prev_events` and `auth_events` are pairs of an id and its hash; else plain ids.
    pub reference_pairs: bool,
    /// Integers within ±(2^53 − 1), no floats, no key twice.
    pub strict_json: bool,
    pub depth_max: i64,
    /// A field of more than 255 bytes is refused; else only one of more than 255 code points (V-20).
    pub strict_byte_limits: bool,
    /// The room id is the create event's id with another sigil, and the create event names no room.
    pub room_id_is_create_hash: bool,
    /// A redaction names its target in `content.redacts`; else in `redacts` at the top level.
    pub redacts_in_content: bool,

    // -- signatures
    /// The server in the event id must sign too.
    pub event_id_server_signs: bool,
    /// A key must be valid at the event's `origin_server_ts`.
    pub key_validity_enforced: bool,

    // -- redaction
    /// Keeps `origin`, `membership` and `prev_state` at the top level.
    pub keeps_legacy_keys: bool,
    /// Keeps `content.aliases` of `m.room.aliases`.
    pub keeps_aliases: bool,
    /// Keeps `content.allow` of `m.room.join_rules`.
    pub keeps_join_rule_allow: bool,
    /// Keeps `content.join_authorised_via_users_server` of `m.room.member`.
    pub keeps_join_authorised: bool,
    /// Keeps `content.third_party_invite.signed` of `m.room.member`.
    pub keeps_third_party_signed: bool,
    /// Keeps the whole content of `m.room.create`; else only `creator`.
    pub keeps_create_content: bool,
    /// Keeps `content.invite` of `m.room.power_levels`.
    pub keeps_invite_level: bool,
    /// Keeps `content.redacts` of `m.room.redaction`.
    pub keeps_redacts: bool,

    // -- auth rules
    /// `m.room.aliases` may be sent by any user of the server that is its state key.
    pub aliases_rule: bool,
    /// Whether a redaction applies is an auth rule; else it is looked at when applying it.
    pub redaction_rule: bool,
    /// The room's creator is `content.creator` of the create event; else its sender.
    pub creator_in_content: bool,
    /// The create event is named in `auth_events`; else the room id stands for it.
    pub create_in_auth_events: bool,
    /// The creators (sender and `additional_creators`) have infinite power and no place in `users`.
    pub privileged_creators: bool,
    /// Changes of `notifications` levels need the power for it.
    pub notification_levels: bool,
    /// Power levels must be JSON integers; else integers in strings and floats pass.
    pub integer_levels: bool,
    pub knock: bool,
    pub restricted: bool,
    pub knock_restricted: bool,

    // -- state resolution
    pub state_resolution: StateResolution,
}

const V1: Rules = Rules {
    event_id: EventIdFormat::Opaque,
    reference_pairs: true,
    strict_json: false,
    depth_max: i64::MAX,
    strict_byte_limits: false,
    room_id_is_create_hash: false,
    redacts_in_content: false,
    event_id_server_signs: true,
    key_validity_enforced: false,
    keeps_legacy_keys: true,
    keeps_aliases: true,
    keeps_join_rule_allow: false,
    keeps_join_authorised: false,
    keeps_third_party_signed: false,
    keeps_create_content: false,
    keeps_invite_level: false,
    keeps_redacts: false,
    aliases_rule: true,
    redaction_rule: true,
    creator_in_content: true,
    create_in_auth_events: true,
    privileged_creators: false,
    notification_levels: false,
    integer_levels: false,
    knock: false,
    restricted: false,
    knock_restricted: false,
    state_resolution: StateResolution::V1,
};

const V2: Rules = Rules {
    state_resolution: StateResolution::V2,
    ..V1
};

const V3: Rules = Rules {
    event_id: EventIdFormat::Base64,
    reference_pairs: false,
    event_id_server_signs: false,
    redaction_rule: false,
    ..V2
};

const V4: Rules = Rules {
    event_id: EventIdFormat::UrlSafe,
    ..V3
};

const V5: Rules = Rules {
    key_validity_enforced: true,
    ..V4
};

const V6: Rules = Rules {
    strict_json: true,
    depth_max: crate::canonical_json::INTEGER_MAX,
    keeps_aliases: false,
    aliases_rule: false,
    notification_levels: true,
    ..V5
};

const V7: Rules = Rules { knock: true, ..V6 };

const V8: Rules = Rules {
    keeps_join_rule_allow: true,
    restricted: true,
    ..V7
};

const V9: Rules = Rules {
    keeps_join_authorised: true,
    ..V8
};

const V10: Rules = Rules {
    integer_levels: true,
    knock_restricted: true,
    ..V9
};

const V11: Rules = Rules {
    strict_byte_limits: true,
    redacts_in_content: true,
    keeps_legacy_keys: false,
    keeps_third_party_signed: true,
    keeps_create_content: true,
    keeps_invite_level: true,
    keeps_redacts: true,
    creator_in_content: false,
    ..V10
};

const V12: Rules = Rules {
    room_id_is_create_hash: true,
    create_in_auth_events: false,
    privileged_creators: true,
    state_resolution: StateResolution::V2_1,
    ..V11
};

impl RoomVersion {
    pub const ALL: [Self; 12] = [
        Self::V1,
        Self::V2,
        Self::V3,
        Self::V4,
        Self::V5,
        Self::V6,
        Self::V7,
        Self::V8,
        Self::V9,
        Self::V10,
        Self::V11,
        Self::V12,
    ];

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|version| version.as_str() == text)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::V1 => "1",
            Self::V2 => "2",
            Self::V3 => "3",
            Self::V4 => "4",
            Self::V5 => "5",
            Self::V6 => "6",
            Self::V7 => "7",
            Self::V8 => "8",
            Self::V9 => "9",
            Self::V10 => "10",
            Self::V11 => "11",
            Self::V12 => "12",
        }
    }

    pub fn rules(self) -> &'static Rules {
        match self {
            Self::V1 => &V1,
            Self::V2 => &V2,
            Self::V3 => &V3,
            Self::V4 => &V4,
            Self::V5 => &V5,
            Self::V6 => &V6,
            Self::V7 => &V7,
            Self::V8 => &V8,
            Self::V9 => &V9,
            Self::V10 => &V10,
            Self::V11 => &V11,
            Self::V12 => &V12,
        }
    }
}

impl fmt::Display for RoomVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for RoomVersion {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for RoomVersion {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
        Self::parse(&text).ok_or_else(|| serde::de::Error::custom("unknown room version"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn v14_an_unknown_version_is_not_guessed() {
        for version in RoomVersion::ALL {
            assert_eq!(RoomVersion::parse(version.as_str()), Some(version));
        }
        for text in ["", "0", "01", "13", "1.0", "org.matrix.msc3757.10"] {
            assert_eq!(RoomVersion::parse(text), None, "{text}");
        }
    }

    #[test]
    fn the_table_agrees_with_its_own_history() {
        let since = |of: fn(&Rules) -> bool| {
            RoomVersion::ALL
                .into_iter()
                .find(|version| of(version.rules()))
        };
        for (of, first) in [
            (
                (|r| r.key_validity_enforced) as fn(&Rules) -> bool,
                RoomVersion::V5,
            ),
            (|r| r.strict_json, RoomVersion::V6),
            (|r| r.notification_levels, RoomVersion::V6),
            (|r| r.knock, RoomVersion::V7),
            (|r| r.restricted, RoomVersion::V8),
            (|r| r.keeps_join_authorised, RoomVersion::V9),
            (|r| r.integer_levels, RoomVersion::V10),
            (|r| r.knock_restricted, RoomVersion::V10),
            (|r| r.redacts_in_content, RoomVersion::V11),
            (|r| r.strict_byte_limits, RoomVersion::V11),
            (|r| r.privileged_creators, RoomVersion::V12),
        ] {
            assert_eq!(since(of), Some(first));
        }
        for version in RoomVersion::ALL {
            let rules = version.rules();
            assert_eq!(rules.reference_pairs, version <= RoomVersion::V2);
            assert_eq!(rules.redaction_rule, version <= RoomVersion::V2);
            assert_eq!(rules.aliases_rule, version <= RoomVersion::V5);
            assert_eq!(rules.creator_in_content, version <= RoomVersion::V10);
            assert_eq!(rules.create_in_auth_events, version <= RoomVersion::V11);
        }
    }
}
