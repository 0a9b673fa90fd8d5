//! Signatures: making them, and deciding whether an event carries those it must.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#validating-hashes-and-signatures-on-received-events>

mod batch;
mod signing_key;
mod verify_key;

use base64::Engine as _;
use serde_json::{Map, Value};

pub use self::batch::{Item, Verification, verify_batch};
pub use self::signing_key::{BadSigningKey, SigningKey};
pub use self::verify_key::{BadVerifyKey, VerifyKey};
use crate::canonical_json::{JsonError, Object};
use crate::hash::{self, BASE64};
use crate::id::{ServerName, UserId};
use crate::pdu::{Pdu, Signature};
use crate::room_version::RoomVersion;

/// What policy servers sign with: a key that stands in a room's state, and that nobody publishes.
///
/// <https://spec.matrix.org/v1.18/server-server-api/#validating-policy-server-signatures>
pub const POLICY_KEY_ID: &str = "ed25519:policy_server";

/// Keys of other algorithms are left aside.
const ALGORITHM: &str = "ed25519:";

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    #[error("no signature of {0}")]
    Missing(ServerName),
    #[error("no usable key for any signature of {0}")]
    UnknownKey(ServerName),
    #[error("the signature of {server} with {key_id} is wrong")]
    Wrong { server: ServerName, key_id: String },
    #[error("who has to sign can not be told: {0}")]
    Malformed(&'static str),
}

/// Where public keys come from. `None` means unknown, or not valid for an event of that time and version.
pub trait Keys {
    fn key(
        &self,
        server: &ServerName,
        key_id: &str,
        at_ms: i64,
        version: RoomVersion,
    ) -> Option<VerifyKey>;
}

/// The servers whose signatures an event needs (J-59). Nobody's, for a third-party invite of version 3
/// or later.
pub fn required_servers(pdu: &Pdu) -> Result<Vec<ServerName>, SignatureError> {
    let rules = pdu.version.rules();
    let mut servers = Vec::with_capacity(2);
    let membership = pdu.membership();
    let third_party =
        membership == Some("invite") && pdu.content_raw("third_party_invite").is_some();
    if !third_party {
        servers.push(pdu.origin());
    }
    if rules.event_id_server_signs {
        let server = pdu
            .event_id
            .as_str()
            .split_once(':')
            .and_then(|(_, domain)| ServerName::parse(domain).ok())
            .ok_or(SignatureError::Malformed("event_id"))?;
        if !servers.contains(&server) {
            servers.push(server);
        }
    }
    const AUTHORISED: &str = "join_authorised_via_users_server";
    if rules.restricted && membership == Some("join") && pdu.content_raw(AUTHORISED).is_some() {
        let server = pdu
            .content_get_str(AUTHORISED)
            .and_then(|user| UserId::parse(&user).ok())
            .ok_or(SignatureError::Malformed(AUTHORISED))?
            .server_name();
        if !servers.contains(&server) {
            servers.push(server);
        }
    }
    Ok(servers)
}

/// The keys that would have to be known to judge this event: server and key id.
pub fn needed_keys(pdu: &Pdu) -> Vec<(ServerName, String)> {
    let servers = required_servers(pdu).unwrap_or_default();
    pdu.signatures()
        .filter(|signature| is_server_key(signature.key_id))
        .filter_map(|signature| {
            let mut servers = servers.iter();
            let server = servers.find(|server| server.as_str() == signature.server)?;
            Some((server.clone(), signature.key_id.to_owned()))
        })
        .collect()
}

/// Check 2 for one event.
pub fn verify_pdu(pdu: &Pdu, keys: &dyn Keys) -> Result<(), SignatureError> {
    let signed = pdu.signing_bytes();
    let mut found = Vec::new();
    claims(pdu, keys, &mut found)?;
    for claim in found {
        if !claim.key.verify(signed.as_bytes(), &claim.signature) {
            return Err(claim.wrong());
        }
    }
    Ok(())
}

/// Check 2 for many events, each with the bytes that are signed (see `Pdu::parse_with_signed`). Answers
/// in order, exactly as [`verify_pdu`] would. `entropy` must be fresh and nobody else's to know.
pub fn verify_pdus(
    pdus: &[(&Pdu, &str)],
    keys: &dyn Keys,
    entropy: [u8; 32],
    verification: Verification,
) -> Vec<Result<(), SignatureError>> {
    let mut claimed = Vec::with_capacity(pdus.len());
    let counts: Vec<_> = pdus
        .iter()
        .map(|(pdu, _)| {
            let before = claimed.len();
            claims(pdu, keys, &mut claimed).map(|()| claimed.len() - before)
        })
        .collect();
    let messages = counts.iter().zip(pdus).flat_map(|(count, (_, signed))| {
        std::iter::repeat_n(signed.as_bytes(), *count.as_ref().unwrap_or(&0))
    });
    let items: Vec<Item<'_>> = claimed
        .iter()
        .zip(messages)
        .map(|(claim, message)| Item {
            key: &claim.key,
            message,
            signature: &claim.signature,
        })
        .collect();
    let verdicts = verify_batch(&items, entropy, verification);
    let mut judged = claimed.iter().zip(verdicts);
    counts
        .into_iter()
        .map(|count| {
            let mut wrong = judged.by_ref().take(count?).filter(|(_, right)| !right);
            let first = wrong.next();
            wrong.for_each(drop);
            first.map_or(Ok(()), |(claim, _)| Err(claim.wrong()))
        })
        .collect()
}

/// A signature whose key is known.
struct Claim<'p> {
    server: ServerName,
    key_id: &'p str,
    key: VerifyKey,
    signature: [u8; 64],
}

impl Claim<'_> {
    fn wrong(&self) -> SignatureError {
        SignatureError::Wrong {
            server: self.server.clone(),
            key_id: self.key_id.to_owned(),
        }
    }
}

/// Adds what has to be verified for an event: of each required server every signature whose key is known,
/// which must be at least one. Nothing is added with an error.
fn claims<'p>(
    pdu: &'p Pdu,
    keys: &dyn Keys,
    claims: &mut Vec<Claim<'p>>,
) -> Result<(), SignatureError> {
    let all_before = claims.len();
    let outcome = add_claims(pdu, keys, claims);
    if outcome.is_err() {
        claims.truncate(all_before);
    }
    outcome
}

fn add_claims<'p>(
    pdu: &'p Pdu,
    keys: &dyn Keys,
    claims: &mut Vec<Claim<'p>>,
) -> Result<(), SignatureError> {
    for required in required_servers(pdu)? {
        let before = claims.len();
        let mut signed = false;
        let by_it = |signature: &Signature<'_>| signature.server == required.as_str();
        for Signature { key_id, text, .. } in pdu.signatures().filter(by_it) {
            if !is_server_key(key_id) {
                continue;
            }
            signed = true;
            let Some(key) = keys.key(&required, key_id, pdu.origin_server_ts, pdu.version) else {
                continue;
            };
            let Some(signature) = decode(&text) else {
                return Err(SignatureError::Wrong {
                    key_id: key_id.to_owned(),
                    server: required,
                });
            };
            claims.push(Claim {
                server: required.clone(),
                key_id,
                key,
                signature,
            });
        }
        if !signed {
            return Err(SignatureError::Missing(required));
        }
        if claims.len() == before {
            return Err(SignatureError::UnknownKey(required));
        }
    }
    Ok(())
}

/// A policy server's own events bear two signatures in its name.
fn is_server_key(key_id: &str) -> bool {
    key_id.starts_with(ALGORITHM) && key_id != POLICY_KEY_ID
}

/// Whether an event bears a right signature of this server with this very key.
pub fn is_signed_by(pdu: &Pdu, server: &ServerName, key_id: &str, key: &VerifyKey) -> bool {
    let mut signatures = pdu.signatures();
    let found = signatures.find(|one| one.server == server.as_str() && one.key_id == key_id);
    let signature = found.and_then(|found| decode(&found.text));
    signature.is_some_and(|signature| key.verify(pdu.signing_bytes().as_bytes(), &signature))
}

fn decode(signature: &str) -> Option<[u8; 64]> {
    BASE64.decode(signature).ok()?.try_into().ok()
}

/// Whether `object` carries a right signature of `server` with this key. For requests and key lists;
/// events are redacted first, see [`verify_pdu`].
pub fn verify_json(
    object: &Map<String, Value>,
    server: &ServerName,
    key_id: &str,
    key: &VerifyKey,
) -> Result<(), SignatureError> {
    let claim = JsonClaim {
        object,
        server,
        key_id,
        key,
    };
    let mut verdicts = verify_jsons(&[claim], [0; 32], Verification::Single);
    verdicts.pop().expect("one verdict for one claim")
}

/// One signature that an object may carry.
#[derive(Clone, Copy, Debug)]
pub struct JsonClaim<'a> {
    pub object: &'a Map<String, Value>,
    pub server: &'a ServerName,
    pub key_id: &'a str,
    pub key: &'a VerifyKey,
}

impl JsonClaim<'_> {
    fn wrong(&self) -> SignatureError {
        SignatureError::Wrong {
            server: self.server.clone(),
            key_id: self.key_id.to_owned(),
        }
    }

    fn signature(&self) -> Result<[u8; 64], SignatureError> {
        let signatures = self.object.get("signatures");
        let text = signatures
            .and_then(|signatures| {
                signatures
                    .get(self.server.as_str())?
                    .get(self.key_id)?
                    .as_str()
            })
            .ok_or_else(|| SignatureError::Missing(self.server.clone()))?;
        decode(text).ok_or_else(|| self.wrong())
    }
}

/// [`verify_json`] for many signatures, best with those of one object side by side. Answers in order. `entropy` must
/// be fresh and nobody else's to know.
pub fn verify_jsons(
    claims: &[JsonClaim<'_>],
    entropy: [u8; 32],
    verification: Verification,
) -> Vec<Result<(), SignatureError>> {
    let mut forms: Vec<Option<String>> = Vec::new();
    let mut object = std::ptr::null();
    let read: Vec<Result<(usize, [u8; 64]), SignatureError>> = claims
        .iter()
        .map(|claim| {
            let signature = claim.signature()?;
            if !std::ptr::eq(object, claim.object) {
                object = claim.object;
                forms.push(signed_form(claim.object).ok());
            }
            Ok((forms.len() - 1, signature))
        })
        .collect();
    let items = claims.iter().zip(&read).filter_map(|(claim, read)| {
        let (form, signature) = read.as_ref().ok()?;
        let message = forms[*form].as_ref()?.as_bytes();
        let key = claim.key;
        Some(Item {
            key,
            message,
            signature,
        })
    });
    let items: Vec<_> = items.collect();
    let mut verdicts = verify_batch(&items, entropy, verification).into_iter();
    claims
        .iter()
        .zip(&read)
        .map(|(claim, read)| {
            let (form, _) = read.as_ref().map_err(Clone::clone)?;
            match forms[*form].is_some() && verdicts.next() == Some(true) {
                true => Ok(()),
                false => Err(claim.wrong()),
            }
        })
        .collect()
}

/// The canonical object without `signatures` and `unsigned`. Lenient, since a request may carry floats in
/// EDUs and in events of old room versions, and its sender signed it so.
fn signed_form(object: &Map<String, Value>) -> Result<String, JsonError> {
    let raw = serde_json::to_string(object).map_err(|_| JsonError::NotAnObject)?;
    let object = Object::parse(&raw, false)?;
    Ok(hash::without(&object, &["signatures", "unsigned"]))
}
