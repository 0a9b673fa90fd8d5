//! Application services: who they are, and which names are theirs.
//!
//! <https://spec.matrix.org/v1.18/application-service-api/#registration>

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use protocol::id::{ServerName, UserId};
use regex::Regex;
use serde::Deserialize;
use subtle::ConstantTimeEq;

/// One registration file, ready to be asked.
#[derive(Debug)]
pub struct Appservice {
    pub id: String,
    /// Without a trailing slash; `None`: it wants no traffic.
    pub url: Option<String>,
    pub as_token: String,
    pub hs_token: String,
    /// The service's own user.
    pub sender: UserId,
    pub rate_limited: bool,
    pub receive_ephemeral: bool,
    pub protocols: Vec<String>,
    users: Vec<Namespace>,
    rooms: Vec<Namespace>,
    aliases: Vec<Namespace>,
}

#[derive(Debug)]
struct Namespace {
    exclusive: bool,
    pattern: Regex,
}

#[derive(Debug, thiserror::Error)]
pub enum RegistrationError {
    #[error("{path}: {error}")]
    Unreadable { path: String, error: std::io::Error },
    #[error("{path}: {error}")]
    Malformed {
        path: String,
        error: serde_norway::Error,
    },
    #[error("{path}: {error}")]
    Pattern { path: String, error: regex::Error },
    #[error("{path}: sender_localpart makes no user id")]
    Sender { path: String },
    #[error("two application services have the same {what}: {id}")]
    Double { what: &'static str, id: String },
}

#[derive(Deserialize)]
struct RawRegistration {
    id: String,
    url: Option<String>,
    as_token: String,
    hs_token: String,
    sender_localpart: String,
    rate_limited: Option<bool>,
    #[serde(default)]
    receive_ephemeral: bool,
    /// The same under its names of earlier days; a file may have all of them.
    #[serde(default)]
    push_ephemeral: bool,
    #[serde(default, rename = "de.sorunome.msc2409.push_ephemeral")]
    unstable_push_ephemeral: bool,
    #[serde(default)]
    protocols: Option<Vec<String>>,
    #[serde(default)]
    namespaces: RawNamespaces,
}

#[derive(Default, Deserialize)]
struct RawNamespaces {
    #[serde(default)]
    users: Option<Vec<RawNamespace>>,
    #[serde(default)]
    rooms: Option<Vec<RawNamespace>>,
    #[serde(default)]
    aliases: Option<Vec<RawNamespace>>,
}

#[derive(Deserialize)]
struct RawNamespace {
    #[serde(default)]
    exclusive: bool,
    regex: String,
}

impl Appservice {
    /// `path` is only for error messages.
    pub fn parse(yaml: &str, path: &str, own: &ServerName) -> Result<Self, RegistrationError> {
        let raw: RawRegistration =
            serde_norway::from_str(yaml).map_err(|error| RegistrationError::Malformed {
                path: path.to_owned(),
                error,
            })?;
        let namespaces = |raw: Option<Vec<RawNamespace>>| {
            raw.unwrap_or_default()
                .into_iter()
                .map(|RawNamespace { exclusive, regex }| {
                    let pattern = Regex::new(&format!("^(?:{regex})$"))?;
                    Ok(Namespace { exclusive, pattern })
                })
                .collect::<Result<Vec<_>, _>>()
                .map_err(|error| RegistrationError::Pattern {
                    path: path.to_owned(),
                    error,
                })
        };
        let sender = UserId::parse(&format!("@{}:{own}", raw.sender_localpart)).map_err(|_| {
            RegistrationError::Sender {
                path: path.to_owned(),
            }
        })?;
        Ok(Self {
            id: raw.id,
            url: raw
                .url
                .map(|url| url.trim_end_matches('/').to_owned())
                .filter(|url| !url.is_empty()),
            as_token: raw.as_token,
            hs_token: raw.hs_token,
            sender,
            rate_limited: raw.rate_limited.unwrap_or(true),
            receive_ephemeral: raw.receive_ephemeral
                || raw.push_ephemeral
                || raw.unstable_push_ephemeral,
            protocols: raw.protocols.unwrap_or_default(),
            users: namespaces(raw.namespaces.users)?,
            rooms: namespaces(raw.namespaces.rooms)?,
            aliases: namespaces(raw.namespaces.aliases)?,
        })
    }

    /// Whether this is the service's own user or one of its namespaces.
    pub fn is_interested_in_user(&self, user: &UserId) -> bool {
        *user == self.sender || matches(&self.users, user.as_str())
    }

    pub fn is_interested_in_room(&self, room: &str) -> bool {
        matches(&self.rooms, room)
    }

    pub fn is_interested_in_alias(&self, alias: &str) -> bool {
        matches(&self.aliases, alias)
    }

    fn owns_user(&self, user: &UserId) -> bool {
        *user == self.sender || owns(&self.users, user.as_str())
    }

    fn owns_alias(&self, alias: &str) -> bool {
        owns(&self.aliases, alias)
    }
}

fn matches(namespaces: &[Namespace], name: &str) -> bool {
    namespaces.iter().any(|n| n.pattern.is_match(name))
}

fn owns(namespaces: &[Namespace], name: &str) -> bool {
    namespaces
        .iter()
        .any(|n| n.exclusive && n.pattern.is_match(name))
}

/// All application services of this server.
#[derive(Clone, Debug, Default)]
pub struct Appservices {
    by_id: Arc<BTreeMap<String, Arc<Appservice>>>,
}

impl Appservices {
    pub fn load<P: AsRef<Path>>(files: &[P], own: &ServerName) -> Result<Self, RegistrationError> {
        let parsed = files.iter().map(|file| {
            let path = file.as_ref().display().to_string();
            let yaml =
                std::fs::read_to_string(file).map_err(|error| RegistrationError::Unreadable {
                    path: path.clone(),
                    error,
                })?;
            Appservice::parse(&yaml, &path, own)
        });
        Self::new(parsed.collect::<Result<Vec<_>, _>>()?)
    }

    pub fn new(services: Vec<Appservice>) -> Result<Self, RegistrationError> {
        let mut by_id = BTreeMap::new();
        for service in services {
            let double = |what| RegistrationError::Double {
                what,
                id: service.id.clone(),
            };
            if by_id
                .values()
                .any(|other: &Arc<Appservice>| other.as_token == service.as_token)
            {
                return Err(double("as_token"));
            }
            if by_id.contains_key(&service.id) {
                return Err(double("id"));
            }
            by_id.insert(service.id.clone(), Arc::new(service));
        }
        Ok(Self {
            by_id: Arc::new(by_id),
        })
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<Appservice>> {
        self.by_id.values()
    }

    /// The service that this token belongs to, compared in constant time.
    pub fn with_token(&self, token: &str) -> Option<&Arc<Appservice>> {
        self.iter()
            .find(|service| bool::from(service.as_token.as_bytes().ct_eq(token.as_bytes())))
    }

    /// Whether somebody other than `caller` has claimed this user id for itself alone.
    pub fn user_is_reserved(&self, user: &UserId, caller: Option<&Appservice>) -> bool {
        self.others(caller).any(|service| service.owns_user(user))
    }

    /// Whether somebody other than `caller` has claimed this alias for itself alone.
    pub fn alias_is_reserved(&self, alias: &str, caller: Option<&Appservice>) -> bool {
        self.others(caller).any(|service| service.owns_alias(alias))
    }

    fn others<'a>(
        &'a self,
        caller: Option<&'a Appservice>,
    ) -> impl Iterator<Item = &'a Arc<Appservice>> {
        self.iter()
            .filter(move |service| caller.is_none_or(|caller| caller.id != service.id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BRIDGE: &str = r##"
id: "IRC Bridge"
url: "http://127.0.0.1:1234/"
as_token: "in"
hs_token: "out"
sender_localpart: "_irc_bot"
rate_limited: false
de.sorunome.msc2409.push_ephemeral: true
namespaces:
  users:
    - exclusive: true
      regex: "@_irc_bridge_.*"
  aliases:
    - exclusive: false
      regex: "#_irc_bridge_.*"
  rooms: []
"##;

    fn services() -> Appservices {
        let own = ServerName::parse("example.org").unwrap();
        let bridge = Appservice::parse(BRIDGE, "bridge.yaml", &own).unwrap();
        Appservices::new(vec![bridge]).unwrap()
    }

    #[test]
    fn an_exclusive_namespace_is_closed_to_others() {
        let services = services();
        let bridge = services.with_token("in").unwrap().clone();
        assert!(services.with_token("out").is_none());
        let theirs = UserId::parse("@_irc_bridge_bob:example.org").unwrap();
        let free = UserId::parse("@bob:example.org").unwrap();
        assert!(services.user_is_reserved(&theirs, None));
        assert!(services.user_is_reserved(&bridge.sender, None));
        assert!(!services.user_is_reserved(&theirs, Some(&bridge)));
        assert!(!services.user_is_reserved(&free, None));
        assert!(!services.alias_is_reserved("#_irc_bridge_x:example.org", None));
        assert!(bridge.is_interested_in_alias("#_irc_bridge_x:example.org"));
        assert_eq!(bridge.url.as_deref(), Some("http://127.0.0.1:1234"));
        assert!(bridge.receive_ephemeral);
    }

    #[test]
    fn two_services_may_not_share_an_id() {
        let own = ServerName::parse("example.org").unwrap();
        let one = Appservice::parse(BRIDGE, "a", &own).unwrap();
        let two = Appservice::parse(&BRIDGE.replace("\"in\"", "\"in2\""), "b", &own).unwrap();
        assert!(Appservices::new(vec![one, two]).is_err());
    }
}
