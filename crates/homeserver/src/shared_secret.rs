//! Making accounts from outside with a shared secret, the way existing tools do: a nonce, then a request
//! with an HMAC over it.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use hmac::{Hmac, KeyInit, Mac};
use sha1::Sha1;

use crate::Homeserver;
use crate::accounts::{Opened, random_token};
use crate::error::{MatrixError, Result};

const NONCE_LIFE_MS: i64 = 60_000;
/// Nonces given out and not yet used; nobody needs many.
const NONCES_MAX: usize = 1000;

/// Nonces with the time at which they end.
#[derive(Default)]
pub(crate) struct Nonces(Mutex<BTreeMap<String, i64>>);

/// `POST /_synapse/admin/v1/register`
#[derive(Clone, Debug)]
pub struct Request {
    pub nonce: String,
    pub username: String,
    pub password: String,
    pub admin: bool,
    /// A further field under the MAC when it was given.
    pub user_type: Option<String>,
    /// Hexadecimal.
    pub mac: String,
}

impl Homeserver {
    pub fn registration_nonce(&self) -> Result<String> {
        self.shared_secret()?;
        let now_ms = self.clock().unix_ms();
        let mut nonces = self
            .inner
            .nonces
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        nonces.retain(|_, ends_ms| *ends_ms > now_ms);
        if nonces.len() >= NONCES_MAX {
            return Err(MatrixError::limit_exceeded(NONCE_LIFE_MS.unsigned_abs()));
        }
        let nonce = random_token();
        nonces.insert(nonce.clone(), now_ms + NONCE_LIFE_MS);
        Ok(nonce)
    }

    pub async fn register_with_shared_secret(&self, request: Request) -> Result<Opened> {
        let secret = self.shared_secret()?;
        let now_ms = self.clock().unix_ms();
        let ends_ms = self
            .inner
            .nonces
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&request.nonce);
        if ends_ms.is_none_or(|ends_ms| ends_ms <= now_ms) {
            return Err(MatrixError::unknown("Unknown nonce"));
        }
        if !mac_is_right(secret.as_bytes(), &request) {
            return Err(MatrixError::forbidden("The HMAC is wrong"));
        }
        self.register_by_admin(&request.username, request.password, request.admin)
            .await
    }

    fn shared_secret(&self) -> Result<&str> {
        self.config()
            .registration_shared_secret
            .as_deref()
            .ok_or_else(|| MatrixError::unknown("Registration with a shared secret is not enabled"))
    }
}

fn mac_is_right(secret: &[u8], request: &Request) -> bool {
    let Ok(mut mac) = Hmac::<Sha1>::new_from_slice(secret) else {
        return false;
    };
    let admin = if request.admin { "admin" } else { "notadmin" };
    let mut fields = vec![&request.nonce, &request.username, &request.password]
        .into_iter()
        .map(String::as_str)
        .chain([admin])
        .collect::<Vec<_>>();
    fields.extend(request.user_type.as_deref());
    mac.update(fields.join("\0").as_bytes());
    let Some(given) = from_hex(&request.mac) else {
        return false;
    };
    mac.verify_slice(&given).is_ok()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.is_ascii() || !text.len().is_multiple_of(2) {
        return None;
    }
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mac_covers_every_field() {
        let request = Request {
            nonce: "thisisanonce".to_owned(),
            username: "pepper_roni".to_owned(),
            password: "pizza".to_owned(),
            admin: true,
            user_type: None,
            // printf 'thisisanonce\0pepper_roni\0pizza\0admin' | openssl sha1 -hmac shared_secret
            mac: MAC.to_owned(),
        };
        assert!(mac_is_right(b"shared_secret", &request));
        assert!(!mac_is_right(b"other_secret", &request));
        assert!(!mac_is_right(
            b"shared_secret",
            &Request {
                admin: false,
                ..request.clone()
            }
        ));
        assert!(!mac_is_right(
            b"shared_secret",
            &Request {
                mac: "zz".to_owned(),
                ..request
            }
        ));
    }

    const MAC: &str = "48715842ad67d5dc9a9ee938a3bda4fcfae8d7c7";
}
