//! Settings: files laid over each other, then the environment, checked against one table.
//!
//! [`SETTINGS`] is the only list of keys. `generate-config` prints it, unknown keys are refused by it, and
//! a test holds it against the structs below.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::Deserialize;
use toml::{Table, Value};

/// The prefix of environment variables: `VESTIBULE__SERVER__NAME` sets `server.name`.
const ENV_PREFIX: &str = "VESTIBULE__";

/// One key: its place, its default as TOML (empty: none), and what it means.
pub struct Setting {
    pub key: &'static str,
    pub default: &'static str,
    pub help: &'static str,
}

macro_rules! settings {
    ($($key:literal = $default:literal, $help:literal;)*) => {
        &[$(Setting { key: $key, default: $default, help: $help }),*]
    };
}

pub const SETTINGS: &[Setting] = settings! {
    "server.name" = "", "The name in user ids and aliases, such as \"example.org\". It can not be changed later.";
    "server.public_base_url" = "", "Where clients reach the client API, told in /.well-known/matrix/client.";
    "server.federation_address" = "", "host:port told to other servers in /.well-known/matrix/server. Unset: the well-known answers with server.name and port 443 only when this is set.";
    "server.signing_key_path" = "\"data/signing.key\"", "The key that signs our events, made at the first start. Keep a copy of it.";
    "server.default_room_version" = "\"12\"", "The version of new rooms.";
    "server.presence" = "true", "Whether to tell and take who is online.";
    "database.url" = "\"sqlite:data/vestibule.db\"", "sqlite:PATH, or postgres://USER:PASSWORD@HOST/DATABASE.";
    "media.path" = "\"data/media\"", "Where uploads are kept.";
    "media.max_upload_bytes" = "52428800", "The largest upload taken, in bytes.";
    "client.listen" = "[\"127.0.0.1:8008\"]", "Addresses of the client API, plain HTTP; put a reverse proxy with TLS before it.";
    "client.federation" = "true", "Whether these listeners also answer federation paths, for a proxy that serves both.";
    "federation.listen" = "[\"127.0.0.1:8448\"]", "Addresses of the federation API, with TLS. Empty: none.";
    "federation.tls_certificate" = "", "PEM file of the certificate chain. Unset: a self-signed certificate is made, good for trying out only.";
    "federation.tls_private_key" = "", "PEM file of its private key.";
    "federation.allow_ip_ranges" = "[]", "Private address ranges that may be contacted, such as [\"127.0.0.0/8\"]. Public addresses always may.";
    "federation.trusted_key_servers" = "[\"matrix.org\"]", "Notaries asked for the keys of servers that do not answer.";
    "federation.extra_ca" = "", "PEM file with further certificate authorities to trust.";
    "federation.verify_tls" = "true", "Whether other servers' certificates are checked. Switch it off in test networks only.";
    "registration.mode" = "\"closed\"", "\"closed\", \"open\", or \"token\" (with registration.token).";
    "registration.token" = "", "The token that registration asks for when the mode is \"token\".";
    "registration.shared_secret" = "", "Enables /_synapse/admin/v1/register for whoever knows this secret.";
    "appservices.files" = "[]", "Registration files (YAML) of application services.";
    "server_notices.localpart" = "", "The user that notices of the operators come from, the part before the colon. Unset: no notices. It must not be an account that somebody uses.";
    "server_notices.display_name" = "\"Server notices\"", "The display name of that user.";
    "server_notices.avatar_url" = "", "Its avatar, mxc://…";
    "server_notices.room_name" = "\"Server notices\"", "The name of the room in which a user gets notices.";
    "server_notices.room_topic" = "", "The topic of that room.";
    "limits.enabled" = "true", "Rate limits on logins, registrations, messages and joins.";
    "limits.full_state_wait_seconds" = "120", "How long a request that needs every member of a room may wait while the room is being completed.";
    "join.race_send_join" = "true", "Send a join to a second server when the first is silent for some seconds.";
    "join.members_first" = "1000", "When a server gives all members of a room at the join, this many are verified before the user is in, and the others behind.";
    "join.ask_for_left_out" = "true", "Ask other servers for events that an answer to a join has badly signed, or without their auth events.";
    "join.compare_donors" = "true", "Ask two servers for the full state of a room, and believe neither alone when they differ.";
    "join.tell_missed_servers" = "true", "After a resync, send our newest event to servers that it found in the room, so that they can ask for the rest.";
    "join.verification" = "\"batch\"", "\"batch\" verifies signatures in exact batches, \"single\" one at a time.";
    "metrics.listen" = "[]", "Addresses of a listener of its own for Prometheus, such as [\"127.0.0.1:9090\"]; GET /metrics.";
    "log.level" = "\"info\"", "error, warn, info, debug or trace, or a filter such as \"info,room=debug\".";
    "log.format" = "\"text\"", "\"text\" or \"json\".";
};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    pub server: Server,
    pub database: Database,
    pub media: Media,
    pub client: Client,
    pub federation: Federation,
    pub registration: Registration,
    pub appservices: Appservices,
    pub server_notices: ServerNotices,
    pub limits: Limits,
    pub join: Join,
    pub metrics: Metrics,
    pub log: Log,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    pub listen: Vec<SocketAddr>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Server {
    pub name: Option<String>,
    pub public_base_url: Option<String>,
    pub federation_address: Option<String>,
    pub signing_key_path: PathBuf,
    pub default_room_version: String,
    pub presence: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Database {
    pub url: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Media {
    pub path: PathBuf,
    pub max_upload_bytes: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Client {
    pub listen: Vec<SocketAddr>,
    pub federation: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Federation {
    pub listen: Vec<SocketAddr>,
    pub tls_certificate: Option<PathBuf>,
    pub tls_private_key: Option<PathBuf>,
    pub allow_ip_ranges: Vec<String>,
    pub trusted_key_servers: Vec<String>,
    pub extra_ca: Option<PathBuf>,
    pub verify_tls: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registration {
    pub mode: RegistrationMode,
    pub token: Option<String>,
    pub shared_secret: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RegistrationMode {
    Closed,
    Open,
    Token,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Appservices {
    pub files: Vec<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerNotices {
    pub localpart: Option<String>,
    pub display_name: Option<String>,
    pub avatar_url: Option<String>,
    pub room_name: Option<String>,
    pub room_topic: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    pub enabled: bool,
    pub full_state_wait_seconds: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Join {
    pub race_send_join: bool,
    pub members_first: usize,
    pub ask_for_left_out: bool,
    pub compare_donors: bool,
    pub tell_missed_servers: bool,
    pub verification: Verification,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verification {
    Batch,
    Single,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    pub level: String,
    pub format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

/// Reads the files in order, later ones over earlier ones, then the environment.
pub fn load(
    files: &[PathBuf],
    environment: impl Iterator<Item = (String, String)>,
) -> anyhow::Result<Settings> {
    let mut table = defaults();
    for file in files {
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("cannot read {}", file.display()))?;
        let layer: Table =
            toml::from_str(&text).with_context(|| format!("{} is not TOML", file.display()))?;
        refuse_unknown(&layer).with_context(|| format!("in {}", file.display()))?;
        lay_over(&mut table, layer);
    }
    for (name, value) in environment {
        if let Some(path) = name.strip_prefix(ENV_PREFIX) {
            let layer = from_environment(path, &value);
            refuse_unknown(&layer)
                .with_context(|| format!("in the environment variable {name}"))?;
            lay_over(&mut table, layer);
        }
    }
    let settings: Settings = Value::Table(table)
        .try_into()
        .context("a setting has the wrong type")?;
    check(&settings)?;
    Ok(settings)
}

fn check(settings: &Settings) -> anyhow::Result<()> {
    let Some(name) = &settings.server.name else {
        bail!("server.name is not set");
    };
    protocol::id::ServerName::parse(name).with_context(|| format!("server.name {name:?}"))?;
    if protocol::room_version::RoomVersion::parse(&settings.server.default_room_version).is_none() {
        bail!(
            "server.default_room_version {:?} is not a known version",
            settings.server.default_room_version
        );
    }
    if settings.registration.mode == RegistrationMode::Token
        && settings.registration.token.is_none()
    {
        bail!("registration.mode is \"token\", but registration.token is not set");
    }
    if settings.federation.tls_certificate.is_some()
        != settings.federation.tls_private_key.is_some()
    {
        bail!("federation.tls_certificate and federation.tls_private_key go together");
    }
    Ok(())
}

/// The annotated file that `generate-config` prints.
pub fn annotated(server_name: Option<&str>) -> String {
    let mut text = String::from(
        "# Settings of a Vestibule homeserver. What is commented out is unset; the rest shows the default.\n",
    );
    let mut section = "";
    for setting in SETTINGS {
        let (of, key) = setting
            .key
            .split_once('.')
            .expect("every key has a section");
        if of != section {
            section = of;
            text += &format!("\n[{section}]\n");
        }
        text += &format!("# {}\n", setting.help);
        text += &match (setting.key, server_name) {
            ("server.name", Some(name)) => format!("name = {}\n", Value::from(name)),
            _ if setting.default.is_empty() => format!("#{key} = \n"),
            _ => format!("{key} = {}\n", setting.default),
        };
    }
    text
}

fn defaults() -> Table {
    let mut table = Table::new();
    for setting in SETTINGS {
        let (section, key) = setting
            .key
            .split_once('.')
            .expect("every key has a section");
        let section = table
            .entry(section)
            .or_insert_with(|| Value::Table(Table::new()));
        if !setting.default.is_empty() {
            let value: Table =
                toml::from_str(&format!("{key} = {}", setting.default)).expect("defaults are TOML");
            lay_over(section.as_table_mut().expect("sections are tables"), value);
        }
    }
    table
}

fn lay_over(under: &mut Table, over: Table) {
    for (key, value) in over {
        match (under.get_mut(&key), value) {
            (Some(Value::Table(under)), Value::Table(over)) => lay_over(under, over),
            (_, value) => {
                under.insert(key, value);
            }
        }
    }
}

/// `SERVER__NAME` and `x` to `[server] name = "x"`. What reads as TOML is TOML, the rest is a string.
fn from_environment(path: &str, text: &str) -> Table {
    let path = path.to_ascii_lowercase();
    let (section, key) = path.split_once("__").unwrap_or((&path, ""));
    let parsed = toml::from_str::<Table>(&format!("value = {text}"))
        .ok()
        .and_then(|mut t| t.remove("value"));
    let value = match parsed {
        Some(value) if !matches!(value, Value::Datetime(_)) => value,
        _ => Value::from(text),
    };
    let section_table = Table::from_iter([(key.to_owned(), value)]);
    Table::from_iter([(section.to_owned(), Value::Table(section_table))])
}

fn refuse_unknown(layer: &Table) -> anyhow::Result<()> {
    for (section, value) in layer {
        let Some(keys) = value.as_table() else {
            bail!(
                "{section:?} stands outside of any section; {}",
                nearest(section)
            );
        };
        for key in keys.keys() {
            let path = format!("{section}.{key}");
            if !SETTINGS.iter().any(|setting| setting.key == path) {
                bail!("unknown setting {path}; {}", nearest(&path));
            }
        }
        if keys.is_empty()
            && !SETTINGS
                .iter()
                .any(|s| s.key.starts_with(&format!("{section}.")))
        {
            bail!("unknown section [{section}]; {}", nearest(section));
        }
    }
    Ok(())
}

fn nearest(path: &str) -> String {
    let best = SETTINGS.iter().min_by_key(|setting| {
        let key_only = setting
            .key
            .split_once('.')
            .map_or(setting.key, |(_, key)| key);
        let wanted_key = path.split_once('.').map_or(path, |(_, key)| key);
        (
            distance(setting.key, path).min(distance(key_only, wanted_key) + 1),
            setting.key,
        )
    });
    best.map_or_else(String::new, |setting| {
        format!("did you mean {}?", setting.key)
    })
}

/// Levenshtein's distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut corner = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = (corner + usize::from(x != *y))
                .min(above + 1)
                .min(row[j] + 1);
            corner = above;
        }
    }
    row[b.len()]
}

/// The files to read when none are named: `vestibule.toml`, if it is there.
pub fn default_files() -> Vec<PathBuf> {
    let file = Path::new("vestibule.toml");
    if file.exists() {
        vec![file.to_owned()]
    } else {
        Vec::new()
    }
}

/// The environment, sorted, so that a message about it is always the same.
pub fn environment() -> BTreeMap<String, String> {
    std::env::vars()
        .filter(|(name, _)| name.starts_with(ENV_PREFIX))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, text).expect("a temporary file");
        path
    }

    #[test]
    fn the_annotated_file_is_a_valid_config_of_all_defaults() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = write(dir.path(), "a.toml", &annotated(Some("example.org")));
        let settings = load(&[file], std::iter::empty()).expect("valid");
        assert_eq!(settings.server.name.as_deref(), Some("example.org"));
        assert!(settings.limits.enabled);
        for setting in SETTINGS {
            assert!(annotated(None).contains(setting.help), "{}", setting.key);
        }
    }

    #[test]
    fn later_files_and_the_environment_win() {
        let dir = tempfile::tempdir().expect("a directory");
        let one = write(
            dir.path(),
            "1.toml",
            "[server]\nname = \"a.org\"\n[log]\nlevel = \"warn\"\n",
        );
        let two = write(dir.path(), "2.toml", "[server]\nname = \"b.org\"\n");
        let env = [("VESTIBULE__LIMITS__ENABLED".to_owned(), "false".to_owned())];
        let settings = load(&[one, two], env.into_iter()).expect("valid");
        assert_eq!(settings.server.name.as_deref(), Some("b.org"));
        assert_eq!(settings.log.level, "warn");
        assert!(!settings.limits.enabled);
    }

    #[test]
    fn a_misspelt_key_is_refused_with_the_right_one() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = write(dir.path(), "a.toml", "[server]\nnaem = \"a.org\"\n");
        let error = format!(
            "{:#}",
            load(&[file], std::iter::empty()).expect_err("refused")
        );
        assert!(
            error.contains("server.naem") && error.contains("did you mean server.name?"),
            "{error}"
        );
    }
}
