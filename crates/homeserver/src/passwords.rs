//! Password hashes, made and checked off the async threads.

use std::sync::Arc;

use argon2::Argon2;
use argon2::password_hash::phc::PasswordHash;
use argon2::password_hash::{PasswordHasher, PasswordVerifier};
use tokio::sync::Semaphore;

use crate::error::{MatrixError, Result};
use crate::processor::Processor;

/// Hashes computed at a time: each takes 19 MiB and a core for some tens of milliseconds, and a crowd at the
/// login door must not take all of either.
const HASHES_AT_ONCE: usize = 2;

/// A longer password is refused: hashing it would cost us, and protect nobody.
pub const PASSWORD_BYTES_MAX: usize = 512;

pub(crate) struct Hasher {
    turns: Arc<Semaphore>,
    processor: Processor,
}

impl Hasher {
    pub fn new(processor: Processor) -> Self {
        Self {
            turns: Arc::new(Semaphore::new(HASHES_AT_ONCE)),
            processor,
        }
    }

    /// The hash in PHC format, salt and costs included.
    pub async fn hash(&self, password: String) -> Result<String> {
        if password.len() > PASSWORD_BYTES_MAX {
            return Err(MatrixError::invalid_param("The password is too long"));
        }
        self.run(move || {
            let hash: PasswordHash = Argon2::default().hash_password(password.as_bytes()).ok()?;
            Some(hash.to_string())
        })
        .await?
        .ok_or_else(|| MatrixError::internal("The password could not be hashed"))
    }

    pub async fn matches(&self, password: String, hash: String) -> Result<bool> {
        if password.len() > PASSWORD_BYTES_MAX {
            return Ok(false);
        }
        self.run(move || {
            PasswordHash::new(&hash).is_ok_and(|hash| {
                Argon2::default()
                    .verify_password(password.as_bytes(), &hash)
                    .is_ok()
            })
        })
        .await
    }

    async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let turn = Arc::clone(&self.turns).acquire_owned().await;
        let _turn = turn.map_err(|_| MatrixError::internal("The server is stopping"))?;
        let done = self.processor.run(work).await;
        done.map_err(|_| MatrixError::internal("The password could not be looked at"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_password_matches_its_own_hash_only() {
        let hasher = Hasher::new(Processor::Pool);
        let hash = hasher.hash("übers3kr1t".to_owned()).await.unwrap();
        assert!(
            hasher
                .matches("übers3kr1t".to_owned(), hash.clone())
                .await
                .unwrap()
        );
        assert!(!hasher.matches("ubers3kr1t".to_owned(), hash).await.unwrap());
        assert!(
            !hasher
                .matches("x".to_owned(), "no hash".to_owned())
                .await
                .unwrap()
        );
    }
}
