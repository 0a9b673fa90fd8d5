//! A public key of some server, and the single rule by which a signature is right.
//!
//! The rule is libsodium's, so Synapse's: the equation without cofactor, `R` compared as bytes, and
//! neither `R` nor the key of small order, the key in canonical encoding.

use std::sync::{Arc, LazyLock};

use base64::Engine as _;
use curve25519_dalek::constants::EIGHT_TORSION;
use curve25519_dalek::edwards::EdwardsPoint;
use curve25519_dalek::scalar::Scalar;
use ed25519_dalek::{Signature, Verifier as _, VerifyingKey};

use crate::hash::BASE64;

/// A point of the curve that has been looked at once; cheap to clone.
#[derive(Clone)]
pub struct VerifyKey(Arc<Inner>);

struct Inner {
    key: VerifyingKey,
    /// Of small order or not canonical: nothing it signed is right.
    refused: bool,
    /// Whether it lies in the prime-order subgroup, so that the batch's answer is the single one's.
    torsion_free: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an Ed25519 public key")]
pub struct BadVerifyKey;

impl VerifyKey {
    /// Reads base64, padded or not. Takes some 50 µs, so do it once for each key.
    pub fn parse(base64: &str) -> Result<Self, BadVerifyKey> {
        let bytes = BASE64.decode(base64).map_err(|_| BadVerifyKey)?;
        Self::from_bytes(bytes.try_into().map_err(|_| BadVerifyKey)?)
    }

    pub fn from_bytes(bytes: [u8; 32]) -> Result<Self, BadVerifyKey> {
        let key = VerifyingKey::from_bytes(&bytes).map_err(|_| BadVerifyKey)?;
        let point = key.to_edwards();
        Ok(Self(Arc::new(Inner {
            key,
            refused: point.is_small_order() || point.compress().to_bytes() != bytes,
            torsion_free: is_torsion_free(&point),
        })))
    }

    pub fn as_bytes(&self) -> &[u8; 32] {
        self.0.key.as_bytes()
    }

    pub fn to_base64(&self) -> String {
        BASE64.encode(self.as_bytes())
    }

    /// The single verification: what it says is so.
    pub fn verify(&self, message: &[u8], signature: &[u8; 64]) -> bool {
        if self.0.refused || is_small_order(signature) {
            return false;
        }
        self.0
            .key
            .verify(message, &Signature::from_bytes(signature))
            .is_ok()
    }

    /// The point, if signatures under it may be verified in a batch.
    pub(super) fn batch_point(&self) -> Option<EdwardsPoint> {
        let inner = &*self.0;
        (!inner.refused && inner.torsion_free).then(|| inner.key.to_edwards())
    }
}

impl PartialEq for VerifyKey {
    fn eq(&self, other: &Self) -> bool {
        self.as_bytes() == other.as_bytes()
    }
}

impl Eq for VerifyKey {}

impl std::fmt::Debug for VerifyKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VerifyKey({})", self.to_base64())
    }
}

/// Whether a point lies in the prime-order subgroup, in variable time: what is asked about is public. Of the group's
/// order L only L - 1 is a scalar.
pub(super) fn is_torsion_free(point: &EdwardsPoint) -> bool {
    let times = EdwardsPoint::vartime_double_scalar_mul_basepoint;
    times(&-Scalar::ONE, point, &Scalar::ZERO) == -point
}

/// Whether the `R` of a signature is one of the eight points of small order, sign bit aside. Other
/// encodings of them are not canonical, so never equal to an `R` that was computed.
pub(super) fn is_small_order(signature: &[u8; 64]) -> bool {
    static SMALL: LazyLock<[[u8; 32]; 8]> = LazyLock::new(|| {
        EIGHT_TORSION.map(|point| {
            let mut bytes = point.compress().to_bytes();
            bytes[31] &= 0x7f;
            bytes
        })
    });
    let last = signature[31] & 0x7f;
    SMALL
        .iter()
        .any(|small| small[..31] == signature[..31] && small[31] == last)
}
