//! A secret key of ours.

use base64::Engine as _;
use ed25519_dalek::Signer as _;
use serde_json::{Map, Value};

use super::{ALGORITHM, VerifyKey, signed_form};
use crate::canonical_json::JsonError;
use crate::hash::BASE64;
use crate::id::ServerName;

/// An Ed25519 key with the version that names it.
#[derive(Clone)]
pub struct SigningKey {
    key: ed25519_dalek::SigningKey,
    key_id: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a signing key: expected `ed25519 VERSION SEED`")]
pub struct BadSigningKey;

impl SigningKey {
    /// A key from a seed that the caller drew. The version is letters, digits and underscores.
    pub fn generate(seed: [u8; 32], version: &str) -> Result<Self, BadSigningKey> {
        let named = !version.is_empty()
            && version.len() <= 64
            && version
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        if !named {
            return Err(BadSigningKey);
        }
        Ok(Self {
            key: ed25519_dalek::SigningKey::from_bytes(&seed),
            key_id: format!("{ALGORITHM}{version}"),
        })
    }

    /// Reads `ed25519 VERSION SEED`, the line that Synapse keeps in its key file.
    pub fn parse(line: &str) -> Result<Self, BadSigningKey> {
        let mut words = line.split_ascii_whitespace();
        let (Some("ed25519"), Some(version), Some(seed), None) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            return Err(BadSigningKey);
        };
        let seed = BASE64.decode(seed).map_err(|_| BadSigningKey)?;
        Self::generate(seed.try_into().map_err(|_| BadSigningKey)?, version)
    }

    pub fn to_line(&self) -> String {
        let version = &self.key_id[ALGORITHM.len()..];
        format!("ed25519 {version} {}", BASE64.encode(self.key.to_bytes()))
    }

    /// `ed25519:VERSION`
    pub fn key_id(&self) -> &str {
        &self.key_id
    }

    pub fn public_base64(&self) -> String {
        BASE64.encode(self.key.verifying_key().as_bytes())
    }

    pub fn verify_key(&self) -> VerifyKey {
        VerifyKey::from_bytes(self.key.verifying_key().to_bytes())
            .expect("a public key made from a secret one is a point")
    }

    /// Unpadded base64 of the signature of these bytes.
    pub fn sign(&self, message: &[u8]) -> String {
        BASE64.encode(self.key.sign(message).to_bytes())
    }

    /// Adds our signature to an object that is no event.
    pub fn sign_json(
        &self,
        object: &mut Map<String, Value>,
        server: &ServerName,
    ) -> Result<(), JsonError> {
        let signature = self.sign(signed_form(object)?.as_bytes());
        self.add_signature(object, server, signature);
        Ok(())
    }

    /// Puts a signature beside those of others.
    pub(crate) fn add_signature(
        &self,
        object: &mut Map<String, Value>,
        server: &ServerName,
        signature: String,
    ) {
        let mut signatures = object_at(object, "signatures");
        let mut ours = object_at(&mut signatures, server.as_str());
        ours.insert(self.key_id.clone(), Value::String(signature));
        signatures.insert(server.as_str().to_owned(), Value::Object(ours));
        object.insert("signatures".to_owned(), Value::Object(signatures));
    }
}

/// Takes the object out that is to be extended; anything else there is dropped.
fn object_at(map: &mut Map<String, Value>, key: &str) -> Map<String, Value> {
    match map.remove(key) {
        Some(Value::Object(object)) => object,
        _ => Map::new(),
    }
}

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The secret stays out of logs.
        write!(f, "SigningKey({})", self.key_id)
    }
}
