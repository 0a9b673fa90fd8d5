//! Identifiers: room, event, user, alias and server names.
//!
//! <https://spec.matrix.org/v1.18/appendices/#common-identifier-format>

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An identifier longer than this many bytes is refused everywhere.
pub const ID_BYTES_MAX: usize = 255;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a valid {kind}")]
pub struct IdError {
    pub kind: &'static str,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($text:ty), $kind:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name($text);

        impl $name {
            pub fn parse(text: &str) -> Result<Self, IdError> {
                if text.len() > ID_BYTES_MAX {
                    return Err(IdError { kind: $kind });
                }
                Self::parse_oversized(text)
            }

            /// As `parse`, with the limit counted in code points: for fields of events that are stored as
            /// rejected (V-20).
            pub(crate) fn parse_oversized(text: &str) -> Result<Self, IdError> {
                let check: fn(&str) -> bool = $check;
                let fits = text.len() <= ID_BYTES_MAX || text.chars().count() <= ID_BYTES_MAX;
                if fits && check(text) {
                    Ok(Self(text.into()))
                } else {
                    Err(IdError { kind: $kind })
                }
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
                Self::parse(&text).map_err(serde::de::Error::custom)
            }
        }
    };
}

id!(
    /// `!opaque:server` in room versions 1 to 11, `!hash` from 12 on.
    RoomId(Arc<str>),
    "room id",
    |t| t.len() > 1 && t.starts_with('!') && !t.contains('\0')
);
id!(
    /// `$opaque:server` in room versions 1 and 2, `$hash` from 3 on.
    EventId(HashText),
    "event id",
    |t| t.len() > 1 && t.starts_with('$') && !t.contains('\0')
);
id!(
    /// `@localpart:server`. Historical localparts are accepted.
    UserId(Arc<str>),
    "user id",
    |t| split_domain(t, '@').is_some_and(|(_, domain)| is_server_name(domain))
);
id!(
    /// `#localpart:server`.
    RoomAlias(Arc<str>),
    "room alias",
    |t| split_domain(t, '#').is_some_and(|(local, domain)| !local.is_empty() && is_server_name(domain))
);
id!(
    /// `host[:port]`, the host a DNS name or an IP literal.
    ServerName(Arc<str>),
    "server name",
    is_server_name
);

/// The bytes of an event id from room version 3 on: a sigil and the base64 of a hash.
const HASH_TEXT: usize = 44;

/// The text of an event id, in place when it is as long as a hash. Rooms have hundreds of thousands of them, in
/// ordered maps, where each comparison of texts elsewhere would be a miss of the cache.
#[derive(Clone)]
enum HashText {
    Here([u8; HASH_TEXT]),
    There(Arc<str>),
}

impl From<&str> for HashText {
    fn from(text: &str) -> Self {
        match text.as_bytes().try_into() {
            Ok(bytes) => Self::Here(bytes),
            Err(_) => Self::There(text.into()),
        }
    }
}

impl HashText {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Here(bytes) => bytes,
            Self::There(text) => text.as_bytes(),
        }
    }
}

impl std::ops::Deref for HashText {
    type Target = str;

    fn deref(&self) -> &str {
        match self {
            Self::Here(bytes) => str::from_utf8(bytes).expect("it was made of a text"),
            Self::There(text) => text,
        }
    }
}

impl PartialEq for HashText {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Here(a), Self::Here(b)) => a == b,
            (Self::There(a), Self::There(b)) => a == b,
            // Their lengths differ.
            _ => false,
        }
    }
}

impl Eq for HashText {}

impl PartialOrd for HashText {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for HashText {
    fn cmp(&self, other: &Self) -> Ordering {
        if let (Self::Here(a), Self::Here(b)) = (self, other) {
            // Nearly always two hashes differ in their first bytes.
            let head =
                |bytes: &[u8; HASH_TEXT]| bytes.first_chunk().copied().map(u64::from_be_bytes);
            return head(a).cmp(&head(b)).then_with(|| a.cmp(b));
        }
        self.bytes().cmp(other.bytes())
    }
}

impl Hash for HashText {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(self.bytes());
    }
}

impl UserId {
    /// The text itself, not a copy.
    pub fn shared(&self) -> Arc<str> {
        Arc::clone(&self.0)
    }

    pub fn localpart(&self) -> &str {
        split_domain(&self.0, '@').map_or("", |(local, _)| local)
    }

    pub fn server_name(&self) -> ServerName {
        ServerName(self.server_str().into())
    }

    /// The server's name without a copy.
    pub fn server_str(&self) -> &str {
        split_domain(&self.0, '@').map_or("", |(_, domain)| domain)
    }
}

impl RoomAlias {
    pub fn server_name(&self) -> ServerName {
        ServerName(
            split_domain(&self.0, '#')
                .map_or("", |(_, domain)| domain)
                .into(),
        )
    }
}

impl RoomId {
    /// The domain of a room id of versions 1 to 11; `None` for a hash.
    pub fn server_name(&self) -> Option<ServerName> {
        let (_, domain) = split_domain(&self.0, '!')?;
        ServerName::parse(domain).ok()
    }
}

impl ServerName {
    /// The name without its port, as ACLs see it (joins.md R-3).
    pub fn host(&self) -> &str {
        host_and_port(&self.0).map_or(&self.0, |(host, _)| host)
    }

    pub fn port(&self) -> Option<u16> {
        host_and_port(&self.0).and_then(|(_, port)| port)
    }
}

fn split_domain(text: &str, sigil: char) -> Option<(&str, &str)> {
    if text.contains('\0') {
        return None;
    }
    text.strip_prefix(sigil)?.split_once(':')
}

fn is_server_name(text: &str) -> bool {
    text.len() <= 230 && host_and_port(text).is_some()
}

fn host_and_port(text: &str) -> Option<(&str, Option<u16>)> {
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let (literal, port) = rest.split_once(']')?;
        literal.parse::<std::net::Ipv6Addr>().ok()?;
        let port = match port.strip_prefix(':') {
            None if !port.is_empty() => return None,
            port => port,
        };
        (&text[..literal.len() + 2], port)
    } else {
        match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        }
    };
    let named = host.starts_with('[')
        || (!host.is_empty()
            && host
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.'));
    if !named {
        return None;
    }
    match port {
        None => Some((host, None)),
        Some(digits) if digits.len() <= 5 && digits.bytes().all(|b| b.is_ascii_digit()) => {
            Some((host, Some(digits.parse().ok()?)))
        }
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_names_are_told_from_nonsense() {
        for good in [
            "a",
            "example.org",
            "example.org:8448",
            "127.0.0.1:80",
            "[::1]",
            "[::1]:8448",
        ] {
            assert!(ServerName::parse(good).is_ok(), "{good}");
        }
        for bad in [
            "", "a b", "a:", "a:123456", "[::1", "[::1]x", "a:80:80", "é.org", "a_b",
        ] {
            assert!(ServerName::parse(bad).is_err(), "{bad}");
        }
        assert_eq!(ServerName::parse("[::1]:8448").unwrap().host(), "[::1]");
        assert_eq!(ServerName::parse("[::1]:8448").unwrap().port(), Some(8448));
    }

    #[test]
    fn a_user_id_has_a_localpart_and_a_server() {
        let user = UserId::parse("@alice:example.org:8448").unwrap();
        assert_eq!(
            (user.localpart(), user.server_str()),
            ("alice", "example.org:8448")
        );
        assert!(UserId::parse("@alice").is_err());
        assert!(UserId::parse("alice:example.org").is_err());
    }

    #[test]
    fn event_ids_of_all_lengths_are_ordered_as_texts() {
        let hash = "abcdefghijklmnopqrstuvwxyz0123456789-_ABCDE";
        let texts = [
            "$a".to_owned(),
            format!("${hash}"),
            format!("${hash}F"),
            format!("${}F", &hash[..42]),
            format!("$Z{}", &hash[1..]),
            format!("${}", &hash[..42]),
            "$abc:example.org".to_owned(),
            format!("$é{}", &hash[2..]),
        ];
        for one in &texts {
            for other in &texts {
                let (a, b) = (EventId::parse(one).unwrap(), EventId::parse(other).unwrap());
                assert_eq!(a.cmp(&b), one.cmp(other), "{one} {other}");
                assert_eq!(a == b, one == other, "{one} {other}");
                assert_eq!(a.as_str(), one);
            }
        }
    }

    #[test]
    fn a_hash_room_id_has_no_domain() {
        assert_eq!(RoomId::parse("!abc").unwrap().server_name(), None);
        assert!(
            RoomId::parse("!abc:example.org")
                .unwrap()
                .server_name()
                .is_some()
        );
    }
}
