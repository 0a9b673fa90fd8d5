//! Verifying many signatures at once, with exactly the answers of single verification.
//!
//! The batch equation multiplies by the cofactor, so it would accept what single verification refuses:
//! an `R` or a key with a part of small order. Servers that answer differently end up with different
//! rooms, so only what lies in the prime-order subgroup enters a batch: keys are looked at once when
//! made, and all `R`s by 64 random subset sums (one that is outside survives them with chance 2^-64).
//! And only single verification ever refuses: a batch that fails is halved twice, then done singly.

use curve25519_dalek::constants::ED25519_BASEPOINT_POINT;
use curve25519_dalek::edwards::{CompressedEdwardsY, EdwardsPoint};
use curve25519_dalek::scalar::Scalar;
use curve25519_dalek::traits::{Identity as _, IsIdentity as _, VartimeMultiscalarMul as _};
use sha2::{Digest as _, Sha512};

use super::VerifyKey;
use super::verify_key::{is_small_order, is_torsion_free};

/// Enough to amortise the multiplication, small enough that one bad signature spoils little.
const BATCH_MAX: usize = 4096;

/// Below this many the subset sums cost more than the batch saves.
const BATCH_MIN: usize = 128;

/// How often a failed batch is halved before its rest is verified singly.
const HALVINGS: u32 = 2;

/// Subset sums of all `R`s.
const SUMS: u32 = 64;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verification {
    #[default]
    Batch,
    /// One by one, for those who want no cleverness.
    Single,
}

/// One signature to verify.
#[derive(Clone, Copy, Debug)]
pub struct Item<'a> {
    pub key: &'a VerifyKey,
    pub message: &'a [u8],
    pub signature: &'a [u8; 64],
}

impl Item<'_> {
    fn verify(&self) -> bool {
        self.key.verify(self.message, self.signature)
    }
}

/// Whether each signature is right, in order. `entropy` must be fresh and unknown to those who signed.
pub fn verify_batch(
    items: &[Item<'_>],
    entropy: [u8; 32],
    verification: Verification,
) -> Vec<bool> {
    if verification == Verification::Single {
        return items.iter().map(Item::verify).collect();
    }
    let mut verdicts = vec![false; items.len()];
    // A server's signatures stand together: a bad server spoils the fewest batches, and equal keys are one term of
    // the equation.
    let mut order: Vec<([u8; 32], usize)> = items
        .iter()
        .enumerate()
        .map(|(at, item)| (*item.key.as_bytes(), at))
        .collect();
    order.sort_unstable();
    let mut entries = Vec::with_capacity(items.len());
    for (_, at) in order {
        match Entry::new(at, &items[at]) {
            Some(entry) => entries.push(entry),
            None => verdicts[at] = items[at].verify(),
        }
    }
    let mut chance = Chance::new(entropy);
    // Batches of equal size rather than a small rest.
    let batches = entries.len().div_ceil(BATCH_MAX).max(1);
    let size = entries.len().div_ceil(batches).max(1);
    for batch in entries.chunks(size) {
        judge(items, batch, HALVINGS, &mut chance, &mut verdicts);
    }
    verdicts
}

fn judge(
    items: &[Item<'_>],
    entries: &[Entry],
    halvings: u32,
    chance: &mut Chance,
    verdicts: &mut [bool],
) {
    if entries.len() >= BATCH_MIN {
        if in_subgroup(entries, chance) && equation_holds(items, entries, chance) {
            for entry in entries {
                verdicts[entry.at] = true;
            }
            return;
        }
        if halvings > 0 {
            let (left, right) = entries.split_at(entries.len() / 2);
            judge(items, left, halvings - 1, chance, verdicts);
            judge(items, right, halvings - 1, chance, verdicts);
            return;
        }
    }
    for entry in entries {
        verdicts[entry.at] = items[entry.at].verify();
    }
}

/// A signature that may enter a batch.
struct Entry {
    /// Its place among the items.
    at: usize,
    r: EdwardsPoint,
    s: Scalar,
}

impl Entry {
    fn new(at: usize, item: &Item<'_>) -> Option<Self> {
        item.key.batch_point()?;
        let (r, s) = item.signature.split_at(32);
        let r: [u8; 32] = r.try_into().ok()?;
        // With the points of small order gone, an encoding is canonical if its y is below p.
        if !is_reduced(&r) || is_small_order(item.signature) {
            return None;
        }
        Some(Self {
            at,
            r: CompressedEdwardsY(r).decompress()?,
            s: Option::from(Scalar::from_canonical_bytes(s.try_into().ok()?))?,
        })
    }
}

/// Whether y is below p = 2^255 - 19, sign bit aside.
fn is_reduced(r: &[u8; 32]) -> bool {
    r[0] < 0xed || r[31] & 0x7f != 0x7f || r[1..31].iter().any(|byte| *byte != 0xff)
}

/// `8 (Σ z s) B = 8 Σ z R + 8 Σ (z h) A`, for random z of 128 bits.
fn equation_holds(items: &[Item<'_>], entries: &[Entry], chance: &mut Chance) -> bool {
    let mut scalars = Vec::with_capacity(2 * entries.len() + 1);
    let mut keys = Vec::new();
    let mut key_scalars = Vec::new();
    let mut base = Scalar::ZERO;
    // Entries are sorted by key.
    let key_of = |entry: &Entry| items[entry.at].key;
    for of_one_key in entries.chunk_by(|a, b| key_of(a) == key_of(b)) {
        let Some(key) = key_of(&of_one_key[0]).batch_point() else {
            return false;
        };
        let mut key_scalar = Scalar::ZERO;
        for entry in of_one_key {
            let item = &items[entry.at];
            let challenge: [u8; 64] = Sha512::new()
                .chain_update(&item.signature[..32])
                .chain_update(item.key.as_bytes())
                .chain_update(item.message)
                .finalize()
                .into();
            let z = Scalar::from(chance.next_u128());
            key_scalar += z * Scalar::from_bytes_mod_order_wide(&challenge);
            base -= z * entry.s;
            scalars.push(z);
        }
        keys.push(key);
        key_scalars.push(key_scalar);
    }
    scalars.append(&mut key_scalars);
    scalars.push(base);
    let points = entries.iter().map(|entry| &entry.r).chain(&keys);
    EdwardsPoint::vartime_multiscalar_mul(&scalars, points.chain([&ED25519_BASEPOINT_POINT]))
        .mul_by_cofactor()
        .is_identity()
}

/// Whether every `R` lies in the prime-order subgroup, but for a chance of 2^-64.
///
/// Which sums an `R` is in is drawn for some of them at a time. All with the same draw come into one heap, and the
/// sums are made of heaps: for eight sums, 4,096 additions and twice 256.
fn in_subgroup(entries: &[Entry], chance: &mut Chance) -> bool {
    let at_a_time: u32 = if entries.len() < 512 { 4 } else { 8 };
    let mut heaps = vec![EdwardsPoint::identity(); 1 << at_a_time];
    for _ in 0..SUMS / at_a_time {
        heaps.fill(EdwardsPoint::identity());
        for drawn in entries.chunks((u64::BITS / at_a_time) as usize) {
            let mut draws = chance.next_u64();
            for entry in drawn {
                let draw = (draws as usize) & (heaps.len() - 1);
                draws >>= at_a_time;
                if draw != 0 {
                    heaps[draw] += entry.r;
                }
            }
        }
        // The upper half of what is left has the sum of the highest bit; without that bit it is part of the lower.
        let mut left = heaps.as_mut_slice();
        while left.len() > 1 {
            let (lower, upper) = left.split_at_mut(left.len() / 2);
            let sum: EdwardsPoint = upper.iter().sum();
            if !is_torsion_free(&sum) {
                return false;
            }
            for (lower, upper) in lower.iter_mut().zip(&*upper) {
                *lower += upper;
            }
            left = lower;
        }
    }
    true
}

/// Chance drawn out of the caller's entropy: SHA-512 in counter mode.
struct Chance {
    entropy: [u8; 32],
    counter: u64,
    block: [u8; 64],
    used: usize,
}

impl Chance {
    fn new(entropy: [u8; 32]) -> Self {
        Self {
            entropy,
            counter: 0,
            block: [0; 64],
            used: 64,
        }
    }

    fn next_u64(&mut self) -> u64 {
        if self.used == self.block.len() {
            self.block = Sha512::new()
                .chain_update(b"vestibule batch")
                .chain_update(self.entropy)
                .chain_update(self.counter.to_le_bytes())
                .finalize()
                .into();
            self.counter += 1;
            self.used = 0;
        }
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.block[self.used..self.used + 8]);
        self.used += 8;
        u64::from_le_bytes(bytes)
    }

    fn next_u128(&mut self) -> u128 {
        u128::from(self.next_u64()) << 64 | u128::from(self.next_u64())
    }
}
