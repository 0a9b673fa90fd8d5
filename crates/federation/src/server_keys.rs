//! One server's published keys: reading such an object, and making ours.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#publishing-keys>

use std::collections::BTreeMap;
use std::sync::Arc;

use protocol::id::ServerName;
use protocol::room_version::RoomVersion;
use protocol::signature::{
    JsonClaim, SignatureError, SigningKey, Verification, VerifyKey, verify_jsons,
};
use serde_json::{Map, Value, json};

const DAY_MS: i64 = 24 * 3600 * 1000;
/// Nobody may bind us to a key for longer than this.
const VALIDITY_MAX_MS: i64 = 7 * DAY_MS;
/// How far ahead our own keys are valid: an hour would do, a day spares requests.
const OWN_VALIDITY_MS: i64 = DAY_MS;
/// Real servers have a handful.
const KEYS_MAX: usize = 64;
const KEY_ID_BYTES_MAX: usize = 128;

/// A row of the key store: one key of one server, with the response that it came in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredKey {
    pub server: ServerName,
    pub key_id: String,
    pub key: VerifyKey,
    /// Until when events may have been signed with it; for an old key, when it expired.
    pub valid_until_ms: i64,
    /// From `old_verify_keys`: good for events only.
    pub old: bool,
    pub fetched_at_ms: i64,
    /// The whole self-signed object as JSON, for serving as a notary.
    pub response: Arc<str>,
}

/// A key ready for use.
#[derive(Clone, Debug)]
pub struct KnownKey {
    pub key: VerifyKey,
    pub valid_until_ms: i64,
    pub old: bool,
    pub fetched_at_ms: i64,
    pub response: Arc<str>,
}

impl KnownKey {
    /// Whether an event of this version and time may be signed with it. Versions 1 to 4 ignore time (V-5).
    pub fn is_good_for_event(&self, at_ms: i64, version: RoomVersion) -> bool {
        !version.rules().key_validity_enforced || at_ms <= self.valid_until_ms
    }

    /// Whether a request may be signed with it at this moment.
    pub fn is_good_for_request(&self, now_ms: i64) -> bool {
        !self.old && now_ms <= self.valid_until_ms
    }
}

/// The keys of one server by key id.
pub type KnownKeys = BTreeMap<String, KnownKey>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadKeys {
    #[error("not a key object: {0}")]
    Malformed(&'static str),
    #[error("the keys are another server's")]
    OtherServer,
    #[error("the keys are not signed by themselves")]
    NotSigned,
}

/// A server's key object and whose it is.
pub type KeyObject<'a> = (&'a Map<String, Value>, ServerName);

/// Reads a server's key object and checks that it is signed with a key of its own.
pub fn read(
    object: &Map<String, Value>,
    server: &ServerName,
    now_ms: i64,
) -> Result<Vec<StoredKey>, BadKeys> {
    let keys = parse(object, server, now_ms)?;
    let verdicts = verify_jsons(&keys.claims(object, server), [0; 32], Verification::Single);
    keys.if_signed(verdicts)
}

/// What a notary gave: the keys in each object that is signed with keys of its own, or the first server for whose
/// keys this notary does not vouch.
pub fn read_vouched<'o>(
    objects: &'o [KeyObject<'_>],
    notary: &ServerName,
    notary_keys: &KnownKeys,
    now_ms: i64,
    verification: Verification,
) -> Result<Vec<Result<Vec<StoredKey>, BadKeys>>, &'o ServerName> {
    let read: Vec<_> = objects
        .iter()
        .map(|(object, server)| parse(object, server, now_ms))
        .collect();
    let claims: Vec<Vec<JsonClaim<'_>>> = objects
        .iter()
        .zip(&read)
        .map(|((object, server), read)| {
            let vouches = notary_keys.iter().map(|(key_id, known)| JsonClaim {
                object,
                server: notary,
                key_id,
                key: &known.key,
            });
            let own = read.iter().flat_map(|keys| keys.claims(object, server));
            vouches.chain(own).collect()
        })
        .collect();
    let all = claims.concat();
    let mut verdicts = verify_jsons(&all, rand::random(), verification).into_iter();
    let judged: Vec<(bool, Vec<_>)> = claims
        .iter()
        .map(|claims| {
            let of_notary = verdicts.by_ref().take(notary_keys.len());
            let vouched = of_notary.fold(false, |vouched, verdict| vouched | verdict.is_ok());
            let own = claims.len() - notary_keys.len();
            (vouched, verdicts.by_ref().take(own).collect())
        })
        .collect();
    let unvouched = judged.iter().position(|(vouched, _)| !vouched);
    if let Some(at) = unvouched {
        return Err(&objects[at].1);
    }
    Ok(read
        .into_iter()
        .zip(judged)
        .map(|(read, (_, own))| read?.if_signed(own))
        .collect())
}

/// An object whose signatures are not checked so far.
struct Parsed {
    keys: Vec<StoredKey>,
    /// How many of these are in use today, all in front: it must be signed with one of them, and rightly with all that
    /// signed it.
    current: usize,
}

impl Parsed {
    fn claims<'a>(
        &'a self,
        object: &'a Map<String, Value>,
        server: &'a ServerName,
    ) -> Vec<JsonClaim<'a>> {
        let current = self.keys[..self.current].iter();
        let claims = current.map(|stored| JsonClaim {
            object,
            server,
            key_id: &stored.key_id,
            key: &stored.key,
        });
        claims.collect()
    }

    fn if_signed(
        self,
        verdicts: Vec<Result<(), SignatureError>>,
    ) -> Result<Vec<StoredKey>, BadKeys> {
        let wrong = |verdict: &Result<_, _>| matches!(verdict, Err(error) if !matches!(error, SignatureError::Missing(_)));
        if verdicts.iter().any(wrong) || !verdicts.iter().any(Result::is_ok) {
            return Err(BadKeys::NotSigned);
        }
        Ok(self.keys)
    }
}

fn parse(object: &Map<String, Value>, server: &ServerName, now_ms: i64) -> Result<Parsed, BadKeys> {
    use BadKeys::{Malformed, OtherServer};
    if object.get("server_name").and_then(Value::as_str) != Some(server.as_str()) {
        return Err(OtherServer);
    }
    let valid_until_ms = object
        .get("valid_until_ts")
        .and_then(Value::as_i64)
        .ok_or(Malformed("valid_until_ts"))?
        .min(now_ms.saturating_add(VALIDITY_MAX_MS));
    let verify_keys = object
        .get("verify_keys")
        .and_then(Value::as_object)
        .ok_or(Malformed("verify_keys"))?;
    let nothing = Map::new();
    let old_keys = match object.get("old_verify_keys") {
        None | Some(Value::Null) => &nothing,
        Some(old) => old.as_object().ok_or(Malformed("old_verify_keys"))?,
    };
    if verify_keys.len() + old_keys.len() > KEYS_MAX {
        return Err(Malformed("too many keys"));
    }

    let mut keys = Vec::new();
    let response: Arc<str> = Value::Object(object.clone()).to_string().into();
    let row = |key_id: &str, key: VerifyKey, valid_until_ms, old| StoredKey {
        server: server.clone(),
        key_id: key_id.to_owned(),
        key,
        valid_until_ms,
        old,
        fetched_at_ms: now_ms,
        response: response.clone(),
    };
    for (key_id, entry) in verify_keys {
        if let Some(key) = public_key(key_id, entry) {
            keys.push(row(key_id, key, valid_until_ms, false));
        }
    }
    let current = keys.len();
    for (key_id, entry) in old_keys {
        let expired = entry.get("expired_ts").and_then(Value::as_i64);
        if let (Some(key), Some(expired)) = (public_key(key_id, entry), expired)
            && !verify_keys.contains_key(key_id)
        {
            keys.push(row(key_id, key, expired, true));
        }
    }
    Ok(Parsed { keys, current })
}

/// Keys of other algorithms are left out.
fn public_key(key_id: &str, entry: &Value) -> Option<VerifyKey> {
    if !key_id.starts_with("ed25519:") || key_id.len() > KEY_ID_BYTES_MAX {
        return None;
    }
    VerifyKey::parse(entry.get("key")?.as_str()?).ok()
}

/// A key that was ours once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OldKey {
    pub key_id: String,
    pub public_key: String,
    pub expired_ms: i64,
}

/// Our own key object, freshly signed.
pub fn own(
    server: &ServerName,
    key: &SigningKey,
    old: &[OldKey],
    now_ms: i64,
) -> Map<String, Value> {
    let old: Map<String, Value> = old
        .iter()
        .map(|k| {
            let entry = json!({"key": k.public_key, "expired_ts": k.expired_ms});
            (k.key_id.clone(), entry)
        })
        .collect();
    let mut object = Map::new();
    object.insert("server_name".into(), server.as_str().into());
    object.insert(
        "valid_until_ts".into(),
        now_ms.saturating_add(OWN_VALIDITY_MS).into(),
    );
    object.insert(
        "verify_keys".into(),
        json!({key.key_id(): {"key": key.public_base64()}}),
    );
    object.insert("old_verify_keys".into(), Value::Object(old));
    key.sign_json(&mut object, server)
        .expect("names, base64 and times have a canonical form");
    object
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_700_000_000_000;

    fn name() -> ServerName {
        ServerName::parse("a.org").unwrap()
    }

    fn key(seed: u8) -> SigningKey {
        SigningKey::generate([seed; 32], &format!("k{seed}")).unwrap()
    }

    #[test]
    fn our_own_keys_are_read_as_those_of_another_server_would_be() {
        let old = OldKey {
            key_id: key(2).key_id().into(),
            public_key: key(2).public_base64(),
            expired_ms: 5,
        };
        let rows = read(&own(&name(), &key(1), &[old], NOW), &name(), NOW).unwrap();
        let seen: Vec<_> = rows
            .iter()
            .map(|r| (r.key_id.as_str(), r.valid_until_ms, r.old))
            .collect();
        assert_eq!(
            seen,
            [
                ("ed25519:k1", NOW + OWN_VALIDITY_MS, false),
                ("ed25519:k2", 5, true)
            ]
        );
    }

    #[test]
    fn a_long_validity_is_cut_to_a_week() {
        let mut object = own(&name(), &key(1), &[], NOW);
        object["valid_until_ts"] = json!(i64::MAX >> 12);
        object.remove("signatures");
        key(1).sign_json(&mut object, &name()).unwrap();
        let rows = read(&object, &name(), NOW).unwrap();
        assert_eq!(rows[0].valid_until_ms, NOW + VALIDITY_MAX_MS);
    }

    #[test]
    fn keys_that_are_not_the_servers_own_are_refused() {
        let good = own(&name(), &key(1), &[], NOW);
        let other = ServerName::parse("b.org").unwrap();
        assert_eq!(read(&good, &other, NOW), Err(BadKeys::OtherServer));
        let mut unsigned = good.clone();
        unsigned.remove("signatures");
        assert_eq!(read(&unsigned, &name(), NOW), Err(BadKeys::NotSigned));
        let mut changed = good.clone();
        changed["valid_until_ts"] = json!(NOW + 1);
        assert_eq!(read(&changed, &name(), NOW), Err(BadKeys::NotSigned));
        // Signed, but by a key that is not in it.
        let mut foreign = good;
        foreign.remove("signatures");
        key(3).sign_json(&mut foreign, &name()).unwrap();
        assert_eq!(read(&foreign, &name(), NOW), Err(BadKeys::NotSigned));
    }

    #[test]
    fn a_notary_gives_the_keys_of_many_at_once() {
        let notary = ServerName::parse("notary.org").unwrap();
        let vouching = key(200);
        let known = KnownKey {
            key: vouching.verify_key(),
            valid_until_ms: NOW,
            old: false,
            fetched_at_ms: NOW,
            response: "{}".into(),
        };
        let known = KnownKeys::from([(vouching.key_id().to_owned(), known)]);
        let mut objects = Vec::new();
        for number in 0..100 {
            let server = ServerName::parse(&format!("s{number}.org")).unwrap();
            let mut object = own(&server, &key(number), &[], NOW);
            match number {
                // It is vouched for, but not signed by itself.
                40 => object["signatures"][server.as_str()] = json!({}),
                41 => object["signatures"] = own(&server, &key(42), &[], NOW)["signatures"].clone(),
                // Signed by itself, and with another object's signature.
                43 => {
                    let other = own(&server, &key(number), &[], NOW - 1);
                    object["signatures"] = other["signatures"].clone();
                }
                _ => {}
            }
            vouching.sign_json(&mut object, &notary).unwrap();
            objects.push((object, server));
        }
        let read = |objects: &[(Map<String, Value>, ServerName)], verification| {
            let objects: Vec<_> = objects.iter().map(|(o, s)| (o, s.clone())).collect();
            let read = read_vouched(&objects, &notary, &known, NOW, verification);
            read.map_err(Clone::clone)
        };
        for verification in [Verification::Batch, Verification::Single] {
            let found = read(&objects, verification).unwrap();
            for (number, found) in found.iter().enumerate() {
                let expected = read_one(&objects[number]);
                assert_eq!(*found, expected, "{number}");
                assert_eq!(found.is_err(), [40, 41, 43].contains(&number), "{number}");
            }
            let mut unvouched = objects.clone();
            unvouched[7].0["signatures"]["notary.org"] = json!({});
            assert_eq!(read(&unvouched, verification), Err(objects[7].1.clone()));
        }
    }

    fn read_one(
        (object, server): &(Map<String, Value>, ServerName),
    ) -> Result<Vec<StoredKey>, BadKeys> {
        read(object, server, NOW)
    }

    #[test]
    fn an_old_key_is_for_events_of_its_time_and_for_no_request() {
        let known = |old, valid_until_ms| KnownKey {
            key: key(1).verify_key(),
            valid_until_ms,
            old,
            fetched_at_ms: NOW,
            response: "{}".into(),
        };
        let old = known(true, 10);
        assert!(old.is_good_for_event(10, RoomVersion::V5));
        assert!(!old.is_good_for_event(11, RoomVersion::V5));
        assert!(old.is_good_for_event(11, RoomVersion::V4));
        assert!(!old.is_good_for_request(9));
        assert!(known(false, 10).is_good_for_request(10));
        assert!(!known(false, 10).is_good_for_request(11));
    }
}
