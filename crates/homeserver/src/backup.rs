//! Server-side backups of room keys.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#server-side-key-backups>

use protocol::id::UserId;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use storage::Conn;
use storage::backup::{self as table, Key, Version};
pub use storage::backup::{Key as StoredKey, Scope};

use crate::Homeserver;
use crate::error::{MatrixError, Result};

const SESSION_BYTES_MAX: usize = 65_536;

/// A key as clients write it.
#[derive(Clone, Debug, Deserialize)]
pub struct KeyData {
    pub first_message_index: i64,
    pub forwarded_count: i64,
    pub is_verified: bool,
    pub session_data: Map<String, Value>,
}

/// A key with the session that it is for.
#[derive(Clone, Debug)]
pub struct SessionKey {
    pub room_id: String,
    pub session_id: String,
    pub data: KeyData,
}

impl Homeserver {
    pub async fn create_backup(
        &self,
        user: &UserId,
        algorithm: &str,
        auth_data: &Value,
    ) -> Result<String> {
        let (user, algorithm, auth_data) =
            (user.clone(), algorithm.to_owned(), auth_data.to_string());
        let version = self
            .store()
            .write(move |c| table::create(c, &user, &algorithm, &auth_data))
            .await?;
        Ok(version.to_string())
    }

    /// A version, or the newest.
    pub async fn backup(&self, user: &UserId, version: Option<&str>) -> Result<Value> {
        let number = version.map(parse_version).transpose()?;
        let user = user.clone();
        let found = self
            .store()
            .read(move |c| {
                let version = match number {
                    Some(number) => table::get(c, &user, number)?,
                    None => table::current(c, &user)?,
                };
                let Some(version) = version else {
                    return Ok(None);
                };
                let count = table::count(c, &user, version.version)?;
                Ok(Some((version, count)))
            })
            .await?;
        let (version, count) = found.ok_or_else(no_backup)?;
        Ok(json!({
            "version": version.version.to_string(),
            "algorithm": version.algorithm,
            "auth_data": serde_json::from_str::<Value>(&version.auth_data).unwrap_or_default(),
            "etag": version.etag.to_string(),
            "count": count,
        }))
    }

    /// Replaces the auth data of a version; the algorithm stays.
    pub async fn update_backup(
        &self,
        user: &UserId,
        version: &str,
        algorithm: &str,
        auth_data: &Value,
    ) -> Result<()> {
        let number = parse_version(version)?;
        let (user, auth_data, algorithm) =
            (user.clone(), auth_data.to_string(), algorithm.to_owned());
        let same = self
            .store()
            .write(move |c| {
                let Some(known) = table::get(c, &user, number)? else {
                    return Ok(None);
                };
                let same = known.algorithm == algorithm;
                if same {
                    table::set_auth_data(c, &user, number, &auth_data)?;
                }
                Ok(Some(same))
            })
            .await?;
        match same {
            Some(true) => Ok(()),
            Some(false) => Err(MatrixError::invalid_param(
                "The algorithm of a backup stays what it is",
            )),
            None => Err(no_backup()),
        }
    }

    pub async fn delete_backup(&self, user: &UserId, version: &str) -> Result<()> {
        let number = parse_version(version)?;
        let user = user.clone();
        if self
            .store()
            .write(move |c| table::delete(c, &user, number))
            .await?
        {
            return Ok(());
        }
        Err(no_backup())
    }

    /// The keys of a scope, as `{room: {session: key}}`, [`None`] when there are none.
    pub async fn backup_keys(
        &self,
        user: &UserId,
        version: &str,
        scope: Scope,
    ) -> Result<Vec<Key>> {
        let number = parse_version(version)?;
        let user = user.clone();
        let keys = self
            .store()
            .read(move |c| {
                if table::get(c, &user, number)?.is_none() {
                    return Ok(None);
                }
                table::keys(c, &user, number, &scope).map(Some)
            })
            .await?;
        keys.ok_or_else(no_backup)
    }

    /// Puts keys into the newest version; `{etag, count}`.
    pub async fn put_backup_keys(
        &self,
        user: &UserId,
        version: &str,
        keys: Vec<SessionKey>,
    ) -> Result<Value> {
        let number = parse_version(version)?;
        let keys: Vec<Key> = keys.into_iter().map(to_row).collect::<Result<_>>()?;
        self.change_backup(user, number, true, move |c, user| {
            let mut changed = false;
            for key in &keys {
                let scope = Scope {
                    room_id: Some(key.room_id.clone()),
                    session_id: Some(key.session_id.clone()),
                };
                let known = table::keys(c, user, number, &scope)?.pop();
                if known.is_none_or(|known| is_better(key, &known)) {
                    table::put_key(c, user, number, key)?;
                    changed = true;
                }
            }
            Ok(changed)
        })
        .await
    }

    /// Removes the keys of a scope; `{etag, count}`.
    pub async fn delete_backup_keys(
        &self,
        user: &UserId,
        version: &str,
        scope: Scope,
    ) -> Result<Value> {
        let number = parse_version(version)?;
        self.change_backup(user, number, false, move |c, user| {
            Ok(table::remove_keys(c, user, number, &scope)? > 0)
        })
        .await
    }

    async fn change_backup(
        &self,
        user: &UserId,
        number: i64,
        newest_only: bool,
        mut change: impl FnMut(&mut dyn Conn, &UserId) -> storage::Result<bool> + Send + 'static,
    ) -> Result<Value> {
        let user = user.clone();
        let outcome = self
            .store()
            .write(move |c| {
                if table::get(c, &user, number)?.is_none() {
                    return Ok(Err(no_backup()));
                }
                if newest_only
                    && let Some(Version { version, .. }) = table::current(c, &user)?
                    && version != number
                {
                    let wrong = MatrixError::new(
                        403,
                        "M_WRONG_ROOM_KEYS_VERSION",
                        "There is a newer backup",
                    );
                    return Ok(Err(wrong.with("current_version", version.to_string())));
                }
                if change(c, &user)? {
                    table::bump(c, &user, number)?;
                }
                let etag = table::get(c, &user, number)?.map_or(0, |version| version.etag);
                Ok(Ok((etag, table::count(c, &user, number)?)))
            })
            .await?;
        let (etag, count) = outcome?;
        Ok(json!({ "etag": etag.to_string(), "count": count }))
    }
}

fn parse_version(version: &str) -> Result<i64> {
    version.parse().map_err(|_| no_backup())
}

fn no_backup() -> MatrixError {
    MatrixError::not_found("There is no such backup")
}

fn to_row(key: SessionKey) -> Result<Key> {
    let session_data = Value::Object(key.data.session_data).to_string();
    if session_data.len() > SESSION_BYTES_MAX {
        return Err(MatrixError::too_large("A key is too large"));
    }
    Ok(Key {
        room_id: key.room_id,
        session_id: key.session_id,
        first_message_index: key.data.first_message_index,
        forwarded_count: key.data.forwarded_count,
        is_verified: key.data.is_verified,
        session_data,
    })
}

/// Which of two keys of one session is kept: the verified one, then the one that reads more of the session,
/// then the one that went through fewer hands.
fn is_better(new: &Key, known: &Key) -> bool {
    let rank = |key: &Key| {
        (
            !key.is_verified,
            key.first_message_index,
            key.forwarded_count,
        )
    };
    rank(new) < rank(known)
}

/// A key as the API shows it.
pub fn to_json(key: &Key) -> Value {
    json!({
        "first_message_index": key.first_message_index,
        "forwarded_count": key.forwarded_count,
        "is_verified": key.is_verified,
        "session_data": serde_json::from_str::<Value>(&key.session_data).unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verified_key_then_a_lower_index_then_fewer_hands_win() {
        let key = |is_verified, first_message_index, forwarded_count| Key {
            room_id: String::new(),
            session_id: String::new(),
            first_message_index,
            forwarded_count,
            is_verified,
            session_data: String::new(),
        };
        assert!(is_better(&key(true, 20, 9), &key(false, 10, 5)));
        assert!(is_better(&key(false, 9, 9), &key(false, 10, 5)));
        assert!(is_better(&key(false, 10, 4), &key(false, 10, 5)));
        assert!(!is_better(&key(false, 10, 5), &key(false, 10, 5)));
        assert!(!is_better(&key(false, 1, 1), &key(true, 10, 5)));
    }
}
