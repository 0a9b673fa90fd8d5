//! Crafted signatures through single and batch verification: the answers must be equal.
//!
//! A signer who knows its key can add a point of small order to `R`, or to the key itself, so that
//! implementations disagree. Two homeservers that disagree about a signature have different rooms.

use crate::common::Dice;
use curve25519_dalek::constants::{ED25519_BASEPOINT_POINT, EIGHT_TORSION};
use curve25519_dalek::edwards::EdwardsPoint;
use curve25519_dalek::scalar::Scalar;
use protocol::signature::{Item, SigningKey, Verification, VerifyKey, verify_batch};
use sha2::{Digest as _, Sha512};

/// A signer who does as it pleases.
struct Crafty {
    secret: Scalar,
    /// What is added to its public key.
    tail: EdwardsPoint,
}

impl Crafty {
    fn new(dice: &mut Dice, tail: EdwardsPoint) -> Self {
        Self {
            secret: Scalar::from_bytes_mod_order(dice.bytes()),
            tail,
        }
    }

    fn public(&self) -> [u8; 32] {
        (ED25519_BASEPOINT_POINT * self.secret + self.tail)
            .compress()
            .to_bytes()
    }

    fn sign(&self, message: &[u8], r_tail: EdwardsPoint, dice: &mut Dice) -> [u8; 64] {
        let r = Scalar::from_bytes_mod_order(dice.bytes());
        let point = ED25519_BASEPOINT_POINT * r + r_tail;
        self.finish(message, point.compress().to_bytes(), r)
    }

    fn finish(&self, message: &[u8], r_bytes: [u8; 32], r: Scalar) -> [u8; 64] {
        let s = r + challenge(&r_bytes, &self.public(), message) * self.secret;
        joined(r_bytes, s.to_bytes())
    }
}

fn challenge(r: &[u8; 32], key: &[u8; 32], message: &[u8]) -> Scalar {
    let digest: [u8; 64] = Sha512::new()
        .chain_update(r)
        .chain_update(key)
        .chain_update(message)
        .finalize()
        .into();
    Scalar::from_bytes_mod_order_wide(&digest)
}

fn joined(r: [u8; 32], s: [u8; 32]) -> [u8; 64] {
    let mut signature = [0; 64];
    signature[..32].copy_from_slice(&r);
    signature[32..].copy_from_slice(&s);
    signature
}

/// A signature to judge; `right` is the answer where it is certain beforehand.
struct Vector {
    name: &'static str,
    key: VerifyKey,
    message: Vec<u8>,
    signature: [u8; 64],
    right: Option<bool>,
}

/// `s + l`, the same scalar in another encoding.
fn not_reduced(s: &[u8]) -> [u8; 32] {
    const L: [u8; 32] = [
        0xed, 0xd3, 0xf5, 0x5c, 0x1a, 0x63, 0x12, 0x58, 0xd6, 0x9c, 0xf7, 0xa2, 0xde, 0xf9, 0xde,
        0x14, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10,
    ];
    let mut out = [0; 32];
    let mut carry = 0_u16;
    for at in 0..32 {
        carry += u16::from(s[at]) + u16::from(L[at]);
        out[at] = carry.to_le_bytes()[0];
        carry >>= 8;
    }
    out
}

fn crafted(dice: &mut Dice) -> Vec<Vector> {
    let none = EIGHT_TORSION[0];
    let mut vectors = Vec::new();
    let mut add = |name, key: [u8; 32], message: &[u8], signature, right| {
        // A key that is no point is no key at all.
        if let Ok(key) = VerifyKey::from_bytes(key) {
            let message = message.to_vec();
            vectors.push(Vector {
                name,
                key,
                message,
                signature,
                right,
            });
        }
    };
    for round in 0..8_u8 {
        let message = [round; 40];
        let honest = Crafty::new(dice, none);
        let good = honest.sign(&message, none, dice);
        add("honest", honest.public(), &message, good, Some(true));
        add(
            "honest, other message",
            honest.public(),
            b"other",
            good,
            Some(false),
        );
        for (order, tail) in [("order 8", 1), ("order 4", 2), ("order 2", 4)] {
            let tail = EIGHT_TORSION[tail];
            add(
                order,
                honest.public(),
                &message,
                honest.sign(&message, tail, dice),
                Some(false),
            );
            // A mixed-order key: one in `order` is accepted without the cofactor.
            let mixed = Crafty::new(dice, tail);
            add(
                "mixed key",
                mixed.public(),
                &message,
                mixed.sign(&message, none, dice),
                None,
            );
            add(
                "mixed key, mixed R",
                mixed.public(),
                &message,
                mixed.sign(&message, tail, dice),
                None,
            );
            add(
                "mixed key, R against it",
                mixed.public(),
                &message,
                mixed.sign(&message, -tail, dice),
                None,
            );
        }
        for small in EIGHT_TORSION {
            let bytes = small.compress().to_bytes();
            // R of small order: S then is h a, which all but libsodium may take for R = identity.
            add(
                "small R",
                honest.public(),
                &message,
                honest.finish(&message, bytes, Scalar::ZERO),
                Some(false),
            );
            // A key of small order: R = s B is right for one message in eight, or for all.
            let s = Scalar::from_bytes_mod_order(dice.bytes());
            let r = (ED25519_BASEPOINT_POINT * s).compress().to_bytes();
            add(
                "small key",
                bytes,
                &message,
                joined(r, s.to_bytes()),
                Some(false),
            );
            add(
                "small key, small R",
                bytes,
                &message,
                joined(bytes, [0; 32]),
                Some(false),
            );
        }
        // S not reduced.
        let mut high = good;
        let s = not_reduced(&good[32..]);
        high[32..].copy_from_slice(&s);
        add(
            "S not reduced",
            honest.public(),
            &message,
            high,
            Some(false),
        );
        let mut top = good;
        top[63] |= 0x80;
        add(
            "S with its top bit",
            honest.public(),
            &message,
            top,
            Some(false),
        );
        // Encodings that are not canonical: y + p where that fits, and signs of x = 0.
        let p_plus = |y: u8| {
            let mut bytes = [0xff; 32];
            bytes[0] = 0xed + y;
            bytes[31] = 0x7f;
            bytes
        };
        for y in 0..19 {
            for sign in [0, 0x80] {
                let mut bytes = p_plus(y);
                bytes[31] |= sign;
                add(
                    "R not canonical",
                    honest.public(),
                    &message,
                    honest.finish(&message, bytes, Scalar::ZERO),
                    Some(false),
                );
                let s = Scalar::from_bytes_mod_order(dice.bytes());
                let r = (ED25519_BASEPOINT_POINT * s).compress().to_bytes();
                add(
                    "key not canonical",
                    bytes,
                    &message,
                    joined(r, s.to_bytes()),
                    Some(false),
                );
            }
        }
        let mut identity = [0; 32];
        identity[0] = 1;
        for sign in [0, 0x80] {
            identity[31] = sign;
            add(
                "identity R",
                honest.public(),
                &message,
                honest.finish(&message, identity, Scalar::ZERO),
                Some(false),
            );
        }
        let mut minus_one = p_plus(0);
        minus_one[0] = 0xec;
        minus_one[31] |= 0x80;
        add(
            "R = (0, -1) with a sign",
            honest.public(),
            &message,
            honest.finish(&message, minus_one, Scalar::ZERO),
            Some(false),
        );
        let mut no_point = good;
        no_point[..32].copy_from_slice(&[2; 32]);
        add(
            "R somewhere else",
            honest.public(),
            &message,
            no_point,
            Some(false),
        );
        add("zeros", honest.public(), &message, [0; 64], Some(false));
        add("ones", honest.public(), &message, [0xff; 64], Some(false));
    }
    vectors
}

fn item(vector: &Vector) -> Item<'_> {
    Item {
        key: &vector.key,
        message: &vector.message,
        signature: &vector.signature,
    }
}

/// Good signatures of a few servers, to hide others among.
fn honest(count: usize) -> Vec<Vector> {
    let keys: Vec<SigningKey> = (0..7)
        .map(|seed| SigningKey::generate([seed; 32], "1").expect("a good version"))
        .collect();
    (0..count)
        .map(|at| {
            let message = at.to_le_bytes().to_vec();
            let key = &keys[at % keys.len()];
            let signature = base64::Engine::decode(
                &base64::engine::general_purpose::STANDARD_NO_PAD,
                key.sign(&message),
            );
            Vector {
                name: "honest",
                key: key.verify_key(),
                message,
                signature: signature.expect("base64").try_into().expect("64 bytes"),
                right: Some(true),
            }
        })
        .collect()
}

fn single(vectors: &[Vector]) -> Vec<bool> {
    let items: Vec<Item<'_>> = vectors.iter().map(item).collect();
    verify_batch(&items, [0; 32], Verification::Single)
}

#[test]
fn the_single_rule_refuses_what_libsodium_refuses() {
    let vectors = crafted(&mut Dice(1));
    let mut mixed = 0;
    for (vector, accepted) in vectors.iter().zip(single(&vectors)) {
        match vector.right {
            Some(right) => assert_eq!(accepted, right, "{}", vector.name),
            None => mixed += usize::from(accepted),
        }
    }
    assert!(
        mixed > 0,
        "some mixed-order keys verify, as in every implementation without the cofactor"
    );
}

#[test]
fn a_batch_gives_every_crafted_signature_the_answer_of_single_verification() {
    for seed in 0..3 {
        let vectors = crafted(&mut Dice(seed));
        let expected = single(&vectors);
        let items: Vec<Item<'_>> = vectors.iter().map(item).collect();
        assert!(items.len() > 500);
        let entropy = Dice(seed + 100).bytes();
        assert_eq!(verify_batch(&items, entropy, Verification::Batch), expected);
    }
}

#[test]
fn one_crafted_signature_hidden_in_an_honest_batch_is_found() {
    let vectors = crafted(&mut Dice(5));
    let mut batch = honest(300);
    let mut of_name = std::collections::BTreeMap::new();
    for (number, vector) in vectors.into_iter().enumerate() {
        let seen: &mut u32 = of_name.entry(vector.name).or_default();
        *seen += 1;
        if *seen > 6 {
            continue;
        }
        let expected = single(std::slice::from_ref(&vector))[0];
        let name = vector.name;
        let at = number % batch.len();
        let before = std::mem::replace(&mut batch[at], vector);
        let items: Vec<Item<'_>> = batch.iter().map(item).collect();
        let entropy = Dice(number as u64).bytes();
        for (place, accepted) in verify_batch(&items, entropy, Verification::Batch)
            .into_iter()
            .enumerate()
        {
            assert_eq!(accepted, place != at || expected, "{name} at {place}");
        }
        drop(items);
        batch[at] = before;
    }
}

#[test]
fn mixed_order_points_that_cancel_each_other_do_not_pass() {
    // Two signatures whose small-order parts add up to nothing: only a subset sees them.
    let mut dice = Dice(9);
    let signer = Crafty::new(&mut dice, EIGHT_TORSION[0]);
    let mut batch = honest(200);
    for round in 0..20 {
        for (at, tail) in [(10, EIGHT_TORSION[1]), (11, -EIGHT_TORSION[1])] {
            let message = vec![round; 9];
            batch[at] = Vector {
                name: "pair",
                key: VerifyKey::from_bytes(signer.public()).expect("a point"),
                signature: signer.sign(&message, tail, &mut dice),
                message,
                right: Some(false),
            };
        }
        let items: Vec<Item<'_>> = batch.iter().map(item).collect();
        let verdicts = verify_batch(&items, [round; 32], Verification::Batch);
        let refused: Vec<usize> = (0..verdicts.len()).filter(|at| !verdicts[*at]).collect();
        assert_eq!(refused, [10, 11]);
    }
}

#[test]
fn batches_of_every_size_are_accepted_when_honest_and_answered_in_order() {
    let mut all = honest(1100);
    for size in [0, 1, 2, 127, 128, 129, 1100] {
        let items: Vec<Item<'_>> = all[..size].iter().map(item).collect();
        let verdicts = verify_batch(&items, [4; 32], Verification::Batch);
        assert_eq!(verdicts, vec![true; size]);
    }
    for at in (0..all.len()).step_by(97) {
        all[at].message.push(1);
    }
    let items: Vec<Item<'_>> = all.iter().map(item).collect();
    let verdicts = verify_batch(&items, [4; 32], Verification::Batch);
    for (at, accepted) in verdicts.into_iter().enumerate() {
        assert_eq!(accepted, at % 97 != 0);
    }
}
