//! Cross-signing: uploading the three keys, and signatures on keys.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#cross-signing>

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use protocol::canonical_json::to_canonical;
use protocol::id::UserId;
use protocol::signature::VerifyKey;
use serde_json::{Map, Value, json};
use storage::e2ee::{self as table, Signature, Usage};

use crate::Homeserver;
use crate::device_keys::public_part;
use crate::device_lists;
use crate::error::{MatrixError, Result};

/// Signed objects of one upload: a user signs devices and people by hand.
const SIGNATURES_MAX: usize = 1000;

/// An upload that was looked at and may be stored.
#[derive(Clone, Debug)]
pub struct SigningKeys(Vec<(Usage, Map<String, Value>)>);

impl Homeserver {
    /// Reads the body of `POST /keys/device_signing/upload`.
    pub async fn check_signing_keys(
        &self,
        user: &UserId,
        body: &Map<String, Value>,
    ) -> Result<SigningKeys> {
        let names = [
            (Usage::Master, "master_key"),
            (Usage::SelfSigning, "self_signing_key"),
            (Usage::UserSigning, "user_signing_key"),
        ];
        let mut keys = Vec::new();
        for (usage, name) in names {
            match body.get(name) {
                None | Some(Value::Null) => {}
                Some(Value::Object(key)) => {
                    check_key(user, usage, key)?;
                    keys.push((usage, key.clone()));
                }
                Some(_) => return Err(MatrixError::bad_json(format!("{name} is no object"))),
            }
        }
        let given = keys
            .iter()
            .find(|(usage, _)| *usage == Usage::Master)
            .map(|(_, key)| key.clone());
        let master = match given {
            Some(key) => Some(key),
            None => self.signing_key(user, Usage::Master).await?,
        };
        for (usage, key) in keys.iter().filter(|(usage, _)| *usage != Usage::Master) {
            let Some(master) = &master else {
                return Err(MatrixError::missing_param("There is no master key"));
            };
            if !is_signed_by(key, user, master) {
                let words = format!("The {} key is not signed by the master key", usage.as_str());
                return Err(MatrixError::new(400, "M_INVALID_SIGNATURE", words));
            }
        }
        Ok(SigningKeys(keys))
    }

    /// Whether the user must prove again who he is: only when keys that exist are to become others
    /// (MSC3967).
    pub async fn signing_keys_need_proof(&self, user: &UserId, keys: &SigningKeys) -> Result<bool> {
        if self.signing_key(user, Usage::Master).await?.is_none() {
            return Ok(false);
        }
        for (usage, key) in &keys.0 {
            if self
                .signing_key(user, *usage)
                .await?
                .is_none_or(|known| known.get("keys") != key.get("keys"))
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn signing_key(&self, user: &UserId, usage: Usage) -> Result<Option<Map<String, Value>>> {
        let user = user.clone();
        let key = self
            .store()
            .read(move |c| table::cross_signing_key(c, &user, usage))
            .await?;
        Ok(key.and_then(|key| serde_json::from_str(&key).ok()))
    }

    pub async fn store_signing_keys(&self, user: &UserId, keys: SigningKeys) -> Result<()> {
        let (owner, own) = (user.clone(), self.config().server_name.clone());
        let audience = self
            .store()
            .write(move |c| {
                let mut changed = false;
                for (usage, key) in &keys.0 {
                    let text = Value::Object(key.clone()).to_string();
                    if table::cross_signing_key(c, &owner, *usage)?.as_ref() != Some(&text) {
                        table::put_cross_signing_key(c, &owner, *usage, &text)?;
                        changed = true;
                    }
                }
                if !changed {
                    return Ok(None);
                }
                device_lists::record_signing_keys(c, &own, &owner).map(Some)
            })
            .await?;
        if let Some(audience) = audience {
            self.tell_device_lists(user, &audience);
        }
        Ok(())
    }

    /// `POST /keys/signatures/upload`; what could not be taken, by user and key.
    pub async fn upload_signatures(
        &self,
        signer: &UserId,
        body: &Map<String, Value>,
    ) -> Result<Map<String, Value>> {
        let mut failures: Map<String, Value> = Map::new();
        let mut count = 0;
        let (mut own_devices, mut own_keys) = (Vec::new(), false);
        let mut concerned = Vec::new();
        for (user, objects) in body {
            let (Ok(user), Some(objects)) = (UserId::parse(user), objects.as_object()) else {
                return Err(MatrixError::bad_json(
                    "Signatures are objects by user and key",
                ));
            };
            for (target, object) in objects {
                count += 1;
                if count > SIGNATURES_MAX {
                    return Err(MatrixError::too_large("Too many signatures at once"));
                }
                match self.take_signature(signer, &user, target, object).await {
                    Ok(Target::Device) => own_devices.push(target.clone()),
                    Ok(Target::MasterKey) if user == *signer => own_keys = true,
                    Ok(Target::MasterKey) => concerned.push(user.clone()),
                    Err(error) => {
                        failures.entry(user.as_str()).or_insert_with(|| json!({}))[target] =
                            error.body();
                    }
                }
            }
        }
        let (owner, own) = (signer.clone(), self.config().server_name.clone());
        let audience = self
            .store()
            .write(move |c| {
                let devices: Vec<&str> = own_devices.iter().map(String::as_str).collect();
                let mut audience = device_lists::record(c, &own, &owner, &devices)?;
                if own_keys {
                    audience = device_lists::record_signing_keys(c, &own, &owner)?;
                }
                // What somebody signed of another's key only he sees, but he does look again.
                for user in &concerned {
                    storage::devices::changed(c, user, "")?;
                }
                Ok(audience)
            })
            .await?;
        self.tell_device_lists(signer, &audience);
        Ok(failures)
    }

    async fn take_signature(
        &self,
        signer: &UserId,
        user: &UserId,
        target: &str,
        object: &Value,
    ) -> Result<Target> {
        let Some(object) = object.as_object() else {
            return Err(MatrixError::bad_json("A signed key is an object"));
        };
        let signed = object
            .get("signatures")
            .and_then(|all| all.get(signer.as_str()))
            .and_then(Value::as_object);
        let Some(signatures) = signed.filter(|signatures| !signatures.is_empty()) else {
            return Err(MatrixError::new(
                400,
                "M_INVALID_SIGNATURE",
                "The signature is missing",
            ));
        };
        let not_found = || MatrixError::not_found("There is no such key");
        let device = if user == signer {
            let (owner, id) = (user.clone(), target.to_owned());
            self.store()
                .read(move |c| storage::devices::get(c, &owner, &id))
                .await?
                .and_then(|d| d.keys)
        } else {
            None
        };
        let (kind, known) = match device {
            Some(keys) => (
                Target::Device,
                serde_json::from_str(&keys).map_err(|_| not_found())?,
            ),
            None => {
                let master = self.master_key_of(user).await?.ok_or_else(not_found)?;
                if public_part(&master) != Some(target) {
                    return Err(not_found());
                }
                (Target::MasterKey, master)
            }
        };
        if bare(&known) != bare(object) {
            return Err(MatrixError::new(
                400,
                "M_INVALID_SIGNATURE",
                "The signed key is not the one known here",
            ));
        }
        let mut right = Vec::new();
        for (key_id, signature) in signatures {
            let Some(public) = self.signing_public_key(signer, key_id).await? else {
                continue;
            };
            if verify(object, signer, key_id, &public)
                && let Some(signature) = signature.as_str()
            {
                right.push(Signature {
                    target: target.to_owned(),
                    signer: signer.clone(),
                    signer_key: key_id.clone(),
                    signature: signature.to_owned(),
                });
            }
        }
        if right.is_empty() {
            return Err(MatrixError::new(
                400,
                "M_INVALID_SIGNATURE",
                "The signature is wrong",
            ));
        }
        let user = user.clone();
        self.store()
            .write(move |c| {
                right
                    .iter()
                    .try_for_each(|signature| table::put_signature(c, &user, signature))
            })
            .await?;
        Ok(kind)
    }

    async fn master_key_of(&self, user: &UserId) -> Result<Option<Map<String, Value>>> {
        if let Some(key) = self.signing_key(user, Usage::Master).await? {
            return Ok(Some(key));
        }
        if self.config().is_ours(user) {
            return Ok(None);
        }
        let answer = self
            .query_keys(user, [(user.clone(), Vec::new())].into(), None)
            .await?;
        Ok(answer["master_keys"]
            .get(user.as_str())
            .and_then(Value::as_object)
            .cloned())
    }

    /// The public key behind `ed25519:X` of one of our users: a cross-signing key or a device.
    async fn signing_public_key(&self, user: &UserId, key_id: &str) -> Result<Option<String>> {
        let Some(id) = key_id.strip_prefix("ed25519:") else {
            return Ok(None);
        };
        for usage in Usage::ALL {
            if let Some(key) = self.signing_key(user, usage).await?
                && public_part(&key) == Some(id)
            {
                return Ok(Some(id.to_owned()));
            }
        }
        let (owner, device) = (user.clone(), id.to_owned());
        let device = self
            .store()
            .read(move |c| storage::devices::get(c, &owner, &device))
            .await?;
        let keys = device
            .and_then(|device| device.keys)
            .and_then(|keys| serde_json::from_str::<Value>(&keys).ok());
        Ok(keys.and_then(|keys| Some(keys["keys"].get(key_id)?.as_str()?.to_owned())))
    }
}

enum Target {
    Device,
    MasterKey,
}

/// Without what a signature does not cover.
fn bare(object: &Map<String, Value>) -> Map<String, Value> {
    let mut bare = object.clone();
    bare.remove("signatures");
    bare.remove("unsigned");
    bare
}

fn check_key(user: &UserId, usage: Usage, key: &Map<String, Value>) -> Result<()> {
    let wrong =
        |what: &str| MatrixError::invalid_param(format!("The {} key {what}", usage.as_str()));
    if key.get("user_id").and_then(Value::as_str) != Some(user.as_str()) {
        return Err(wrong("belongs to another user"));
    }
    let usages = key.get("usage").and_then(Value::as_array);
    if !usages.is_some_and(|usages| usages.iter().any(|named| named == usage.as_str())) {
        return Err(wrong("is meant for another usage"));
    }
    let Some(public) = public_part(key) else {
        return Err(wrong("is not exactly one public key"));
    };
    let named = key
        .get("keys")
        .and_then(Value::as_object)
        .is_some_and(|keys| keys.contains_key(&format!("ed25519:{public}")));
    if !named {
        return Err(wrong("does not have its public part as its id"));
    }
    Ok(())
}

fn is_signed_by(key: &Map<String, Value>, user: &UserId, master: &Map<String, Value>) -> bool {
    public_part(master)
        .is_some_and(|public| verify(key, user, &format!("ed25519:{public}"), public))
}

/// Whether `object` carries this user's signature with this key.
fn verify(object: &Map<String, Value>, signer: &UserId, key_id: &str, public: &str) -> bool {
    let signature = object
        .get("signatures")
        .and_then(|all| all.get(signer.as_str())?.get(key_id)?.as_str())
        .and_then(|text| STANDARD_NO_PAD.decode(text.trim_end_matches('=')).ok())
        .and_then(|bytes| <[u8; 64]>::try_from(bytes).ok());
    let (Some(signature), Ok(key)) = (signature, VerifyKey::parse(public)) else {
        return false;
    };
    to_canonical(&Value::Object(bare(object)))
        .is_ok_and(|signed| key.verify(signed.as_bytes(), &signature))
}

#[cfg(test)]
mod tests {
    use protocol::signature::SigningKey;

    use super::*;

    #[test]
    fn a_key_signed_by_the_master_key_is_told_from_one_that_is_not() {
        let user = UserId::parse("@alice:example.org").unwrap();
        let pair = SigningKey::generate([7; 32], "x").unwrap();
        let public = pair.public_base64();
        let master = json!({ "user_id": user, "usage": ["master"], "keys": { format!("ed25519:{public}"): public } });
        let mut key =
            json!({ "user_id": user, "usage": ["self_signing"], "keys": { "ed25519:B": "B" } });
        let text = pair.sign(to_canonical(&key).unwrap().as_bytes());
        key["signatures"] = json!({ user.as_str(): { format!("ed25519:{public}"): text } });
        let (master, mut key) = (
            master.as_object().unwrap().clone(),
            key.as_object().unwrap().clone(),
        );
        check_key(&user, Usage::Master, &master).unwrap();
        assert!(is_signed_by(&key, &user, &master));
        key.insert("usage".to_owned(), json!(["user_signing"]));
        assert!(!is_signed_by(&key, &user, &master));
    }
}
