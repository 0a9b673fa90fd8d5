//! One-time and fallback keys, cross-signing keys, signatures, and the cached device lists of others.

use std::collections::BTreeMap;

use protocol::id::UserId;

use crate::driver::{Conn, Result};

const GET_OTK: &str = "SELECT key_json FROM one_time_keys
    WHERE user_id = $1 AND device_id = $2 AND algorithm = $3 AND key_id = $4";
const LAST_PLACE: &str =
    "SELECT MAX(place) FROM one_time_keys WHERE user_id = $1 AND device_id = $2";
const PUT_OTK: &str =
    "INSERT INTO one_time_keys (user_id, device_id, algorithm, key_id, key_json, place)
    VALUES ($1, $2, $3, $4, $5, $6)";
const COUNT_OTK: &str = "SELECT algorithm, COUNT(*) FROM one_time_keys
    WHERE user_id = $1 AND device_id = $2 GROUP BY algorithm ORDER BY algorithm";
const FIRST_OTK: &str = "SELECT key_id, key_json FROM one_time_keys
    WHERE user_id = $1 AND device_id = $2 AND algorithm = $3 ORDER BY place LIMIT 1";
const DROP_OTK: &str = "DELETE FROM one_time_keys
    WHERE user_id = $1 AND device_id = $2 AND algorithm = $3 AND key_id = $4";

/// One uploaded key: `signed_curve25519:AAAAAQ` is algorithm and id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UploadedKey {
    pub algorithm: String,
    pub key_id: String,
    /// JSON: a string or an object.
    pub json: String,
}

/// The JSON of a one-time key.
pub fn one_time_key(
    c: &mut dyn Conn,
    user: &UserId,
    device: &str,
    key: &UploadedKey,
) -> Result<Option<String>> {
    c.query_opt(
        GET_OTK,
        &[user, &device, &key.algorithm, &key.key_id],
        |row| row.string(0),
    )
}

/// Appends keys that are not there yet, in this order.
pub fn put_one_time_keys(
    c: &mut dyn Conn,
    user: &UserId,
    device: &str,
    keys: &[UploadedKey],
) -> Result<()> {
    let mut place = c.query_int(LAST_PLACE, &[user, &device])?.unwrap_or(0);
    for key in keys {
        place += 1;
        c.execute(
            PUT_OTK,
            &[
                user,
                &device,
                &key.algorithm,
                &key.key_id,
                &key.json,
                &place,
            ],
        )?;
    }
    Ok(())
}

pub fn one_time_key_counts(
    c: &mut dyn Conn,
    user: &UserId,
    device: &str,
) -> Result<BTreeMap<String, i64>> {
    let counts = c.query_all(COUNT_OTK, &[user, &device], |row| {
        Ok((row.string(0)?, row.int(1)?))
    })?;
    Ok(counts.into_iter().collect())
}

const PUT_FALLBACK: &str =
    "INSERT INTO fallback_keys (user_id, device_id, algorithm, key_id, key_json, used)
    VALUES ($1, $2, $3, $4, $5, 0) ON CONFLICT (user_id, device_id, algorithm)
    DO UPDATE SET key_id = excluded.key_id, key_json = excluded.key_json,
        used = CASE WHEN fallback_keys.key_id = excluded.key_id
            AND fallback_keys.key_json = excluded.key_json THEN fallback_keys.used ELSE 0 END";
const GET_FALLBACK: &str = "SELECT key_id, key_json FROM fallback_keys
    WHERE user_id = $1 AND device_id = $2 AND algorithm = $3";
const USE_FALLBACK: &str = "UPDATE fallback_keys SET used = 1
    WHERE user_id = $1 AND device_id = $2 AND algorithm = $3";
const UNUSED_FALLBACKS: &str = "SELECT algorithm FROM fallback_keys
    WHERE user_id = $1 AND device_id = $2 AND used = 0 ORDER BY algorithm";

/// Replaces the fallback key of the algorithm.
pub fn put_fallback_key(
    c: &mut dyn Conn,
    user: &UserId,
    device: &str,
    key: &UploadedKey,
) -> Result<()> {
    c.execute(
        PUT_FALLBACK,
        &[user, &device, &key.algorithm, &key.key_id, &key.json],
    )
    .map(drop)
}

pub fn unused_fallback_types(c: &mut dyn Conn, user: &UserId, device: &str) -> Result<Vec<String>> {
    c.query_all(UNUSED_FALLBACKS, &[user, &device], |row| row.string(0))
}

/// Takes the oldest one-time key, or the fallback key when none is left.
pub fn claim(
    c: &mut dyn Conn,
    user: &UserId,
    device: &str,
    algorithm: &str,
) -> Result<Option<UploadedKey>> {
    let read = |row: &dyn crate::driver::Row| {
        Ok(UploadedKey {
            algorithm: algorithm.to_owned(),
            key_id: row.string(0)?,
            json: row.string(1)?,
        })
    };
    if let Some(key) = c.query_opt(FIRST_OTK, &[user, &device, &algorithm], read)? {
        c.execute(DROP_OTK, &[user, &device, &algorithm, &key.key_id])?;
        return Ok(Some(key));
    }
    let fallback = c.query_opt(GET_FALLBACK, &[user, &device, &algorithm], read)?;
    if fallback.is_some() {
        c.execute(USE_FALLBACK, &[user, &device, &algorithm])?;
    }
    Ok(fallback)
}

/// Which of the three cross-signing keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Usage {
    Master,
    SelfSigning,
    UserSigning,
}

impl Usage {
    pub const ALL: [Self; 3] = [Self::Master, Self::SelfSigning, Self::UserSigning];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Master => "master",
            Self::SelfSigning => "self_signing",
            Self::UserSigning => "user_signing",
        }
    }
}

const GET_CROSS: &str = "SELECT key_json FROM cross_signing_keys WHERE user_id = $1 AND usage = $2";
const PUT_CROSS: &str = "INSERT INTO cross_signing_keys (user_id, usage, key_json)
    VALUES ($1, $2, $3) ON CONFLICT (user_id, usage) DO UPDATE SET key_json = excluded.key_json";
const DROP_CROSS: &str = "DELETE FROM cross_signing_keys WHERE user_id = $1";

pub fn cross_signing_key(c: &mut dyn Conn, user: &UserId, usage: Usage) -> Result<Option<String>> {
    c.query_opt(GET_CROSS, &[user, &usage.as_str()], |row| row.string(0))
}

pub fn put_cross_signing_key(
    c: &mut dyn Conn,
    user: &UserId,
    usage: Usage,
    json: &str,
) -> Result<()> {
    c.execute(PUT_CROSS, &[user, &usage.as_str(), &json])
        .map(drop)
}

pub fn drop_cross_signing_keys(c: &mut dyn Conn, user: &UserId) -> Result<()> {
    c.execute(DROP_CROSS, &[user]).map(drop)
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    /// A device id, or the public part of a cross-signing key.
    pub target: String,
    pub signer: UserId,
    pub signer_key: String,
    pub signature: String,
}

const SIGNATURES: &str = "SELECT target, signer, signer_key, signature FROM key_signatures
    WHERE target_user = $1 ORDER BY target, signer, signer_key";
const PUT_SIGNATURE: &str =
    "INSERT INTO key_signatures (target_user, target, signer, signer_key, signature)
    VALUES ($1, $2, $3, $4, $5) ON CONFLICT (target_user, target, signer, signer_key)
    DO UPDATE SET signature = excluded.signature";

/// Every signature on keys of this user.
pub fn signatures(c: &mut dyn Conn, target_user: &UserId) -> Result<Vec<Signature>> {
    c.query_all(SIGNATURES, &[target_user], |row| {
        Ok(Signature {
            target: row.string(0)?,
            signer: row.id(1)?,
            signer_key: row.string(2)?,
            signature: row.string(3)?,
        })
    })
}

pub fn put_signature(c: &mut dyn Conn, target_user: &UserId, new: &Signature) -> Result<()> {
    c.execute(
        PUT_SIGNATURE,
        &[
            target_user,
            &new.target,
            &new.signer,
            &new.signer_key,
            &new.signature,
        ],
    )
    .map(drop)
}

/// The cached list of a remote user whose changes we are sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteList {
    pub stream_id: i64,
    /// An update was missed: fetch before the list is used again.
    pub stale: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteDevice {
    pub device_id: String,
    pub display_name: Option<String>,
    pub keys: Option<String>,
}

const REMOTE_LIST: &str = "SELECT stream_id, stale FROM remote_device_lists WHERE user_id = $1";
const PUT_REMOTE_LIST: &str = "INSERT INTO remote_device_lists (user_id, stream_id, stale)
    VALUES ($1, $2, $3) ON CONFLICT (user_id)
    DO UPDATE SET stream_id = excluded.stream_id, stale = excluded.stale";
const STALE_REMOTE_LIST: &str = "UPDATE remote_device_lists SET stale = 1 WHERE user_id = $1";
const DROP_REMOTE_LIST: &str = "DELETE FROM remote_device_lists WHERE user_id = $1";
const REMOTE_DEVICES: &str = "SELECT device_id, display_name, keys FROM remote_devices
    WHERE user_id = $1 ORDER BY device_id";
const PUT_REMOTE_DEVICE: &str =
    "INSERT INTO remote_devices (user_id, device_id, display_name, keys)
    VALUES ($1, $2, $3, $4) ON CONFLICT (user_id, device_id)
    DO UPDATE SET display_name = excluded.display_name, keys = excluded.keys";
const DROP_REMOTE_DEVICE: &str = "DELETE FROM remote_devices WHERE user_id = $1 AND device_id = $2";
const DROP_REMOTE_DEVICES: &str = "DELETE FROM remote_devices WHERE user_id = $1";

pub fn remote_list(c: &mut dyn Conn, user: &UserId) -> Result<Option<RemoteList>> {
    c.query_opt(REMOTE_LIST, &[user], |row| {
        Ok(RemoteList {
            stream_id: row.int(0)?,
            stale: row.flag(1)?,
        })
    })
}

pub fn set_remote_list(c: &mut dyn Conn, user: &UserId, list: &RemoteList) -> Result<()> {
    c.execute(PUT_REMOTE_LIST, &[user, &list.stream_id, &list.stale])
        .map(drop)
}

pub fn mark_remote_list_stale(c: &mut dyn Conn, user: &UserId) -> Result<()> {
    c.execute(STALE_REMOTE_LIST, &[user]).map(drop)
}

/// Forgets the cached list of a user and all that came with it.
pub fn drop_remote_list(c: &mut dyn Conn, user: &UserId) -> Result<()> {
    c.execute(DROP_REMOTE_LIST, &[user])?;
    c.execute(DROP_REMOTE_DEVICES, &[user])?;
    drop_cross_signing_keys(c, user)
}

pub fn remote_devices(c: &mut dyn Conn, user: &UserId) -> Result<Vec<RemoteDevice>> {
    c.query_all(REMOTE_DEVICES, &[user], |row| {
        Ok(RemoteDevice {
            device_id: row.string(0)?,
            display_name: row.opt_string(1)?,
            keys: row.opt_string(2)?,
        })
    })
}

pub fn put_remote_device(c: &mut dyn Conn, user: &UserId, device: &RemoteDevice) -> Result<()> {
    c.execute(
        PUT_REMOTE_DEVICE,
        &[user, &device.device_id, &device.display_name, &device.keys],
    )
    .map(drop)
}

pub fn drop_remote_device(c: &mut dyn Conn, user: &UserId, device: &str) -> Result<()> {
    c.execute(DROP_REMOTE_DEVICE, &[user, &device]).map(drop)
}

/// Replaces the whole list.
pub fn replace_remote_devices(
    c: &mut dyn Conn,
    user: &UserId,
    devices: &[RemoteDevice],
) -> Result<()> {
    c.execute(DROP_REMOTE_DEVICES, &[user])?;
    for device in devices {
        put_remote_device(c, user, device)?;
    }
    Ok(())
}
