//! The keys of our users' devices: uploading, reading and claiming them.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#key-distribution>

use std::collections::BTreeMap;

use protocol::id::UserId;
use serde_json::{Map, Value, json};
use storage::Conn;
use storage::devices as device_table;
use storage::e2ee as table;
use storage::e2ee::{Signature, UploadedKey, Usage};

use crate::Homeserver;
use crate::device_lists;
use crate::error::{MatrixError, Result};

/// One-time keys of a device that we keep; clients hold about a hundred.
const ONE_TIME_KEYS_MAX: i64 = 1000;
const KEYS_BYTES_MAX: usize = 65_536;

/// The answer's parts about our own users, and the requester's view of signatures.
#[derive(Clone, Debug, Default)]
pub struct LocalKeys {
    pub device_keys: BTreeMap<String, Value>,
    pub master: Option<Value>,
    pub self_signing: Option<Value>,
    /// Only for the user himself.
    pub user_signing: Option<Value>,
}

impl Homeserver {
    /// `POST /keys/upload`; how many one-time keys there are of each algorithm.
    pub async fn upload_keys(
        &self,
        user: &UserId,
        device: &str,
        body: &Map<String, Value>,
    ) -> Result<BTreeMap<String, i64>> {
        let device_keys = match body.get("device_keys") {
            None | Some(Value::Null) => None,
            Some(keys) => Some(check_device_keys(user, device, keys)?),
        };
        let one_time_keys = read_keys(body.get("one_time_keys"))?;
        let fallback = body
            .get("fallback_keys")
            .or_else(|| body.get("org.matrix.msc2732.fallback_keys"));
        let fallback_keys = read_keys(fallback)?;
        let (owner, device) = (user.clone(), device.to_owned());
        let own = self.config().server_name.clone();
        let (counts, audience) = self
            .store()
            .write(move |c| {
                let mut audience = None;
                if let Some(new) = &device_keys {
                    let old = device_table::get(c, &owner, &device)?.and_then(|found| found.keys);
                    if old.as_ref() != Some(new)
                        && device_table::set_keys(c, &owner, &device, Some(new))?
                    {
                        audience = Some(device_lists::record(c, &own, &owner, &[&device])?);
                    }
                }
                let mut fresh = Vec::new();
                for key in &one_time_keys {
                    match table::one_time_key(c, &owner, &device, key)? {
                        None => fresh.push(key.clone()),
                        Some(known) if same_json(&known, &key.json) => {}
                        Some(_) => {
                            let name = format!("{}:{}", key.algorithm, key.key_id);
                            return Err(storage::Error::Refused(format!(
                                "One-time key {name} exists already with other content"
                            )));
                        }
                    }
                }
                let held: i64 = table::one_time_key_counts(c, &owner, &device)?
                    .values()
                    .sum();
                let room = usize::try_from(ONE_TIME_KEYS_MAX - held).unwrap_or(0);
                fresh.truncate(room);
                table::put_one_time_keys(c, &owner, &device, &fresh)?;
                for key in &fallback_keys {
                    table::put_fallback_key(c, &owner, &device, key)?;
                }
                Ok((table::one_time_key_counts(c, &owner, &device)?, audience))
            })
            .await
            .map_err(|error| match error {
                storage::Error::Refused(why) => MatrixError::invalid_param(why),
                other => other.into(),
            })?;
        if let Some(audience) = audience {
            self.tell_device_lists(user, &audience);
        }
        self.notifier().wake_user(user);
        Ok(counts)
    }

    /// Takes a one-time key of each of these devices of ours: `{user: {device: algorithm}}`.
    pub async fn claim_local_keys(
        &self,
        wanted: Vec<(UserId, String, String)>,
    ) -> Result<Map<String, Value>> {
        let taken = self
            .store()
            .write(move |c| {
                let mut taken = Vec::new();
                for (user, device, algorithm) in &wanted {
                    if let Some(key) = table::claim(c, user, device, algorithm)? {
                        taken.push((user.clone(), device.clone(), key));
                    }
                }
                Ok(taken)
            })
            .await?;
        let mut users = Map::new();
        for (user, device, key) in taken {
            let value: Value = serde_json::from_str(&key.json).unwrap_or_default();
            let devices = users.entry(user.as_str()).or_insert_with(|| json!({}));
            devices[&device] = json!({ format!("{}:{}", key.algorithm, key.key_id): value });
            self.notifier().wake_user(&user);
        }
        Ok(users)
    }
}

/// The keys of one of our users as `requester` may see them; another server is nobody in particular. With no
/// `devices` all of them.
pub fn local_keys(
    c: &mut dyn Conn,
    user: &UserId,
    devices: &[String],
    requester: Option<&UserId>,
) -> storage::Result<LocalKeys> {
    let signatures = table::signatures(c, user)?;
    let visible =
        |signature: &&Signature| signature.signer == *user || Some(&signature.signer) == requester;
    let mut found = LocalKeys::default();
    for device in device_table::list(c, user)? {
        let wanted = devices.is_empty() || devices.contains(&device.device_id);
        let Some(mut keys) = device
            .keys
            .filter(|_| wanted)
            .and_then(|keys| object(&keys))
        else {
            continue;
        };
        for signature in signatures
            .iter()
            .filter(|s| s.target == device.device_id)
            .filter(visible)
        {
            add_signature(&mut keys, signature);
        }
        if let Some(name) = device.display_name {
            keys.insert(
                "unsigned".to_owned(),
                json!({ "device_display_name": name }),
            );
        }
        found
            .device_keys
            .insert(device.device_id, Value::Object(keys));
    }
    for usage in Usage::ALL {
        let Some(mut key) = table::cross_signing_key(c, user, usage)?.and_then(|key| object(&key))
        else {
            continue;
        };
        let public = public_part(&key).unwrap_or_default().to_owned();
        for signature in signatures
            .iter()
            .filter(|s| s.target == public)
            .filter(visible)
        {
            add_signature(&mut key, signature);
        }
        let key = Some(Value::Object(key));
        match usage {
            Usage::Master => found.master = key,
            Usage::SelfSigning => found.self_signing = key,
            Usage::UserSigning if requester == Some(user) => found.user_signing = key,
            Usage::UserSigning => {}
        }
    }
    Ok(found)
}

fn object(text: &str) -> Option<Map<String, Value>> {
    serde_json::from_str(text).ok()
}

pub(crate) fn add_signature(keys: &mut Map<String, Value>, signature: &Signature) {
    let all = keys.entry("signatures").or_insert_with(|| json!({}));
    if !all.is_object() {
        *all = json!({});
    }
    let of_signer = &mut all[signature.signer.as_str()];
    if !of_signer.is_object() {
        *of_signer = json!({});
    }
    of_signer[&signature.signer_key] = signature.signature.as_str().into();
}

/// The one public key of a cross-signing key.
pub(crate) fn public_part(key: &Map<String, Value>) -> Option<&str> {
    let mut keys = key.get("keys")?.as_object()?.values();
    let first = keys.next()?.as_str();
    if keys.next().is_some() {
        return None;
    }
    first
}

/// The canonical text of identity keys that have all they must.
fn check_device_keys(user: &UserId, device: &str, keys: &Value) -> Result<String> {
    let wrong = |what: &str| MatrixError::bad_json(format!("device_keys: {what}"));
    let text = |name: &str| keys.get(name).and_then(Value::as_str);
    if text("user_id") != Some(user.as_str()) || text("device_id") != Some(device) {
        return Err(wrong("they belong to another user or device"));
    }
    let strings = keys.get("algorithms").and_then(Value::as_array);
    if !strings.is_some_and(|list| list.iter().all(Value::is_string)) {
        return Err(wrong("algorithms is no list of strings"));
    }
    let public_keys = keys.get("keys").and_then(Value::as_object);
    if !public_keys.is_some_and(|keys| keys.values().all(Value::is_string)) {
        return Err(wrong("keys is no object of strings"));
    }
    if !keys.get("signatures").is_some_and(Value::is_object) {
        return Err(wrong("signatures is no object"));
    }
    let text = keys.to_string();
    if text.len() > KEYS_BYTES_MAX {
        return Err(MatrixError::too_large("The device keys are too large"));
    }
    Ok(text)
}

fn read_keys(keys: Option<&Value>) -> Result<Vec<UploadedKey>> {
    let keys = match keys {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(keys)) => keys,
        Some(_) => return Err(MatrixError::bad_json("Keys are an object")),
    };
    keys.iter()
        .map(|(name, key)| {
            let (algorithm, key_id) = name.split_once(':').ok_or_else(|| {
                MatrixError::invalid_param("A key's name is an algorithm and an id")
            })?;
            if !key.is_string() && !key.is_object() {
                return Err(MatrixError::bad_json("A key is a string or an object"));
            }
            let json = key.to_string();
            if json.len() > KEYS_BYTES_MAX {
                return Err(MatrixError::too_large("A key is too large"));
            }
            Ok(UploadedKey {
                algorithm: algorithm.to_owned(),
                key_id: key_id.to_owned(),
                json,
            })
        })
        .collect()
}

fn same_json(one: &str, other: &str) -> bool {
    let parse = |text| serde_json::from_str::<Value>(text).ok();
    parse(one) == parse(other)
}

/// What a federation EDU says about one device now.
pub(crate) fn device_for_edu(
    c: &mut dyn Conn,
    user: &UserId,
    device: &str,
) -> storage::Result<Option<(Option<Value>, Option<String>)>> {
    let Some(found) = device_table::get(c, user, device)? else {
        return Ok(None);
    };
    let keys = local_keys(c, user, &[device.to_owned()], None)?;
    let keys = keys.device_keys.into_values().next().map(|mut keys| {
        if let Some(keys) = keys.as_object_mut() {
            keys.remove("unsigned");
        }
        keys
    });
    Ok(Some((keys, found.display_name)))
}

/// What other servers ask.
impl Homeserver {
    /// `GET /_matrix/federation/v1/user/devices/{userId}`
    pub async fn federation_user_devices(&self, user: &UserId) -> Result<Value> {
        if !self.config().is_ours(user) || !self.user_exists(user).await? {
            return Err(MatrixError::not_found("There is no such user"));
        }
        let who = user.clone();
        let (keys, names, stream_id) = self
            .store()
            .read(move |c| {
                Ok((
                    local_keys(c, &who, &[], None)?,
                    device_table::list(c, &who)?,
                    device_table::last_change(c, &who)?,
                ))
            })
            .await?;
        let mut device_keys = keys.device_keys;
        let devices: Vec<Value> = names
            .into_iter()
            .filter_map(|device| {
                let mut keys = device_keys.remove(&device.device_id)?;
                keys.as_object_mut()?.remove("unsigned");
                let mut entry = json!({ "device_id": device.device_id, "keys": keys });
                if let Some(name) = device.display_name {
                    entry["device_display_name"] = name.into();
                }
                Some(entry)
            })
            .collect();
        let mut answer = json!({ "user_id": user, "stream_id": stream_id, "devices": devices });
        if let Some(key) = keys.master {
            answer["master_key"] = key;
        }
        if let Some(key) = keys.self_signing {
            answer["self_signing_key"] = key;
        }
        Ok(answer)
    }
}
