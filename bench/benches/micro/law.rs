//! The pure steps: reading, hashing, verifying, judging and resolving events.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::hint::black_box;
use std::sync::Arc;

use anyhow::{Context, ensure};
use curve25519_dalek::constants::ED25519_BASEPOINT_POINT;
use curve25519_dalek::edwards::{CompressedEdwardsY, EdwardsPoint};
use curve25519_dalek::scalar::Scalar;
use curve25519_dalek::traits::VartimeMultiscalarMul as _;
use ed25519_dalek::{Signature, Verifier as _, VerifyingKey};
use protocol::auth;
use protocol::canonical_json::canonicalise_str;
use protocol::event_set::{EventSet, StateKey, StoredEvent};
use protocol::id::{EventId, ServerName, UserId};
use protocol::nid::{EventNid, KeyNid};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::signature::{Verification, verify_pdu, verify_pdus};
use protocol::state::StateMap;
use protocol::state_resolution::resolve;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::json;
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256, Sha512};

use crate::corpus::{self, Corpus, VERSION};
use crate::report::{Report, time};

pub fn measure(report: &mut Report<'_>) -> anyhow::Result<()> {
    let corpus = corpus::make()?;
    reading(report, &corpus);
    signatures(report, &corpus)?;
    judging(report)?;
    resolving(report)
}

/// What of an event has to be looked at, by serde_json and without a copy.
#[derive(Deserialize)]
struct Fields<'a> {
    #[serde(borrow, rename = "type")]
    _kind: Cow<'a, str>,
    #[serde(borrow, rename = "room_id")]
    _room: Cow<'a, str>,
    #[serde(borrow, rename = "sender")]
    _sender: Cow<'a, str>,
    #[serde(borrow, rename = "state_key")]
    _state_key: Cow<'a, str>,
    #[serde(borrow, rename = "content")]
    _content: &'a RawValue,
    #[serde(rename = "depth")]
    _depth: i64,
    #[serde(rename = "origin_server_ts")]
    _sent: i64,
    #[serde(borrow, rename = "prev_events")]
    _prev: Vec<Cow<'a, str>>,
    #[serde(borrow, rename = "auth_events")]
    _auth: Vec<Cow<'a, str>>,
    #[serde(borrow, rename = "hashes")]
    _hashes: &'a RawValue,
    #[serde(borrow, rename = "signatures")]
    _signatures: BTreeMap<Cow<'a, str>, BTreeMap<Cow<'a, str>, Cow<'a, str>>>,
}

fn fields(raw: &str) -> Option<Fields<'_>> {
    serde_json::from_str(raw).ok()
}

fn reading(report: &mut Report<'_>, corpus: &Corpus) {
    let (raw, count) = (&corpus.raw, corpus.raw.len());
    let over_raw = |work: &dyn Fn(&str)| time(|| raw.iter().for_each(|raw| work(raw)));
    let over_pdus = |work: &dyn Fn(&Pdu)| time(|| corpus.pdus.iter().for_each(work));
    report.pair(
        "canonical form",
        count,
        &mut || over_raw(&|raw| drop(black_box(canonicalise_str(raw, true)))),
        "serde_json skips it, and a copy",
        &mut || {
            over_raw(&|raw| {
                black_box(serde_json::from_str::<IgnoredAny>(raw).is_ok());
                drop(black_box(raw.to_owned()));
            })
        },
    );
    report.pair(
        "event from the wire: form, limits, both hashes, id",
        count,
        &mut || {
            over_raw(&|raw| {
                let mut signed = String::new();
                drop(black_box(Pdu::parse_with_signed(raw, VERSION, &mut signed)));
            })
        },
        "serde_json reads its fields, SHA-256 of it twice",
        &mut || {
            let hashed = corpus.signed.iter().zip(&corpus.pdus);
            let hash = |text: &str| {
                black_box(Sha256::digest(text));
            };
            time(|| {
                raw.iter().for_each(|raw| drop(black_box(fields(raw))));
                hashed.clone().for_each(|(signed, pdu)| {
                    hash(signed);
                    // Without hashes and signatures; what is left is about as much.
                    hash(&pdu.json[..pdu.json.len().saturating_sub(200)]);
                });
            })
        },
    );
    report.pair(
        "event from the store",
        count,
        &mut || {
            over_pdus(&|pdu| {
                let id = pdu.event_id.clone();
                drop(black_box(Pdu::parse_trusted(&pdu.json, VERSION, id, false)));
            })
        },
        "serde_json reads its fields",
        &mut || over_pdus(&|pdu| drop(black_box(fields(&pdu.json)))),
    );
    report.pair(
        "reference hash of a parsed event",
        count,
        &mut || {
            over_pdus(&|pdu| {
                black_box(pdu.reference_hash());
            })
        },
        "SHA-256 of the same bytes",
        &mut || {
            time(|| {
                corpus.signed.iter().for_each(|signed| {
                    black_box(Sha256::digest(signed));
                });
            })
        },
    );
}

// -- Signatures -------------------------------------------------------------------------------------

fn signatures(report: &mut Report<'_>, corpus: &Corpus) -> anyhow::Result<()> {
    let count = corpus.pdus.len();
    let bare: Vec<Bare> = corpus
        .pdus
        .iter()
        .zip(&corpus.signed)
        .map(|(pdu, signed)| Bare::of(pdu, signed, corpus))
        .collect::<anyhow::Result<_>>()?;
    // The fewest that are worth the time of a pass.
    let few = 64;
    report.pair(
        "signature, one event",
        few,
        &mut || {
            let all = corpus.pdus[..few].iter();
            time(|| all.for_each(|pdu| drop(black_box(verify_pdu(pdu, &corpus.keys)))))
        },
        "ed25519-dalek verifies it, key and bytes at hand",
        &mut || {
            time(|| {
                bare[..few].iter().for_each(|bare| {
                    black_box(bare.key.verify(bare.message, &bare.signature).is_ok());
                });
            })
        },
    );
    let items: Vec<(&Pdu, &str)> = corpus
        .pdus
        .iter()
        .zip(&corpus.signed)
        .map(|(pdu, signed)| (pdu, signed.as_str()))
        .collect();
    let batch = |verification| verify_pdus(&items, &corpus.keys, [7; 32], verification);
    ensure!(batch(Verification::Batch).iter().all(Result::is_ok));
    report.pair(
        "signature, in a batch of 2,048 by 200 servers",
        count,
        &mut || time(|| batch(Verification::Batch)),
        "the batch equation alone, which accepts too much",
        &mut || time(|| equation(&bare)),
    );
    Ok(())
}

/// A signature without anything around it.
struct Bare<'a> {
    key: VerifyingKey,
    point: EdwardsPoint,
    message: &'a [u8],
    signature: Signature,
}

impl<'a> Bare<'a> {
    fn of(pdu: &Pdu, signed: &'a str, corpus: &Corpus) -> anyhow::Result<Self> {
        let signed_by = pdu.signatures().next().context("unsigned")?;
        let server = ServerName::parse(signed_by.server)?;
        let key = corpus.keys.0.get(&server).context("no key")?;
        let key = VerifyingKey::from_bytes(key.as_bytes())?;
        let signature = decode(&signed_by.text).context("no base64")?;
        Ok(Self {
            point: key.to_edwards(),
            key,
            message: signed.as_bytes(),
            signature: Signature::from_slice(&signature)?,
        })
    }
}

/// Unpadded base64.
fn decode(text: &str) -> Option<Vec<u8>> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bytes, mut bits, mut held) = (Vec::new(), 0_u32, 0);
    for digit in text.bytes() {
        bits = bits << 6 | u32::try_from(DIGITS.iter().position(|d| *d == digit)?).ok()?;
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
        }
    }
    Some(bytes)
}

/// `Σ z R + Σ (z h) A - (Σ z s) B`, keys merged, as any batch must compute it.
fn equation(all: &[Bare<'_>]) -> Option<EdwardsPoint> {
    let mut of_keys: BTreeMap<[u8; 32], (Scalar, EdwardsPoint)> = BTreeMap::new();
    let (mut scalars, mut points) = (Vec::new(), Vec::new());
    let mut base = Scalar::ZERO;
    for (n, bare) in all.iter().enumerate() {
        let r = *bare.signature.r_bytes();
        let challenge: [u8; 64] = Sha512::new()
            .chain_update(r)
            .chain_update(bare.key.as_bytes())
            .chain_update(bare.message)
            .finalize()
            .into();
        // 128 bits, of which nobody is to be convinced here.
        let z =
            Scalar::from((n as u128 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835));
        let s: Option<Scalar> = Scalar::from_canonical_bytes(*bare.signature.s_bytes()).into();
        base -= z * s?;
        scalars.push(z);
        points.push(CompressedEdwardsY(r).decompress()?);
        let of_key = of_keys.entry(*bare.key.as_bytes());
        let (scalar, _) = of_key.or_insert((Scalar::ZERO, bare.point));
        *scalar += z * Scalar::from_bytes_mod_order_wide(&challenge);
    }
    let (of_scalars, of_points): (Vec<_>, Vec<_>) = of_keys.into_values().unzip();
    scalars.extend(of_scalars);
    points.extend(of_points);
    scalars.push(base);
    points.push(ED25519_BASEPOINT_POINT);
    Some(EdwardsPoint::vartime_multiscalar_mul(&scalars, &points))
}

// -- Rules ------------------------------------------------------------------------------------------

const ALICE: &str = "@alice:example.org";
const SERVER: &str = "example.org";
const MODERATORS: usize = 20;
/// Entries of the states beside those that matter.
const OTHERS: u32 = 10_000;

/// Some events of a room and what stands on what.
struct World {
    version: RoomVersion,
    set: EventSet,
    state: BTreeMap<StateKey, Arc<Pdu>>,
    ids: BTreeMap<EventId, EventNid>,
}

fn moderator(n: usize) -> String {
    format!("@moderator{n}:{SERVER}")
}

impl World {
    fn new(version: RoomVersion) -> anyhow::Result<Self> {
        let mut world = Self {
            version,
            set: EventSet::default(),
            state: BTreeMap::new(),
            ids: BTreeMap::new(),
        };
        let mut users = serde_json::Map::new();
        users.extend((0..MODERATORS).map(|n| (moderator(n), json!(50))));
        if version < RoomVersion::V12 {
            users.insert(ALICE.to_owned(), json!(100));
        }
        let create = json!({"creator": ALICE, "room_version": version.as_str()});
        let join = || json!({"membership": "join"});
        world.add(ALICE, "m.room.create", "", create, true)?;
        world.add(ALICE, "m.room.member", ALICE, join(), true)?;
        world.add(
            ALICE,
            "m.room.power_levels",
            "",
            json!({"users": users}),
            true,
        )?;
        let rule = json!({"join_rule": "public"});
        world.add(ALICE, "m.room.join_rules", "", rule, true)?;
        for n in 0..MODERATORS {
            let user = moderator(n);
            world.add(&user, "m.room.member", &user, join(), true)?;
        }
        Ok(world)
    }

    fn pdu(
        &self,
        sender: &str,
        kind: &str,
        state_key: &str,
        content: serde_json::Value,
    ) -> anyhow::Result<Pdu> {
        let sender = UserId::parse(sender)?;
        let named = auth::auth_types(self.version, kind, &sender, Some(state_key), &content);
        let named = named.iter().filter_map(|key| self.state.get(key));
        let named: Vec<&EventId> = named.map(|pdu| &pdu.event_id).collect();
        let number = self.ids.len();
        let mut event = json!({
            "auth_events": named,
            "content": content,
            "depth": number,
            "origin_server_ts": 1_700_000_000_000_i64 + number as i64,
            "prev_events": [],
            "sender": sender,
            "state_key": state_key,
            "type": kind,
        });
        if kind != "m.room.create" || self.version < RoomVersion::V12 {
            event["room_id"] = format!("!0:{SERVER}").into();
        }
        let id = EventId::parse(&format!("${number}:{SERVER}"))?;
        Ok(Pdu::parse_trusted(
            &event.to_string(),
            self.version,
            id,
            false,
        )?)
    }

    /// An event, which is to stand in the state or only beside it.
    fn add(
        &mut self,
        sender: &str,
        kind: &str,
        state_key: &str,
        content: serde_json::Value,
        stands: bool,
    ) -> anyhow::Result<(KeyNid, EventNid)> {
        let pdu = Arc::new(self.pdu(sender, kind, state_key, content)?);
        let nid = EventNid(i64::try_from(self.ids.len())? + 1);
        let key: StateKey = (kind.into(), state_key.into());
        let next = KeyNid(u32::try_from(self.set.keys.len())?);
        let key_nid = *self.set.keys.entry(key.clone()).or_insert(next);
        let auth_events = pdu.auth_events.iter().filter_map(|id| self.ids.get(id));
        let stored = StoredEvent {
            auth_events: auth_events.copied().collect(),
            pdu: pdu.clone(),
            rejected: false,
        };
        self.ids.insert(pdu.event_id.clone(), nid);
        self.set.events.insert(nid, stored);
        if stands {
            self.state.insert(key, pdu);
        }
        Ok((key_nid, nid))
    }

    /// Finds what the rules ask for, and no more; `keys` are those that the event names.
    fn look_up(&self, keys: &[StateKey]) {
        for key in keys {
            black_box(self.state.get(key).cloned());
        }
    }

    fn allows(&self, pdu: &Pdu) -> bool {
        let get = |kind: &str, key: &str| self.state.get(&(kind.into(), key.into())).cloned();
        auth::check(self.version, pdu, &get).is_ok()
    }
}

fn judging(report: &mut Report<'_>) -> anyhow::Result<()> {
    let world = World::new(VERSION)?;
    let joins: Vec<Pdu> = (0..512)
        .map(|n| {
            let user = format!("@user{n}:{SERVER}");
            world.pdu(&user, "m.room.member", &user, json!({"membership": "join"}))
        })
        .collect::<anyhow::Result<_>>()?;
    ensure!(joins.iter().all(|join| world.allows(join)));
    let asked: Vec<Vec<StateKey>> = joins.iter().map(auth::auth_types_of).collect();
    report.pair(
        "auth rules, a join of a public room",
        joins.len(),
        &mut || time(|| joins.iter().filter(|join| world.allows(join)).count()),
        "finding the events that they ask for",
        &mut || time(|| asked.iter().for_each(|keys| world.look_up(keys))),
    );
    Ok(())
}

fn resolving(report: &mut Report<'_>) -> anyhow::Result<()> {
    for (version, what) in [
        (RoomVersion::V11, "state resolution 2, ten keys of 10,000"),
        (RoomVersion::V12, "state resolution 2.1, ten keys of 10,000"),
    ] {
        let mut world = World::new(version)?;
        let server = ServerName::parse(SERVER)?;
        let mut base: StateMap = world
            .set
            .events
            .keys()
            .filter_map(|nid| Some((world.set.key_of(*nid)?, *nid)))
            .collect();
        let mut forks = Vec::new();
        for side in 0..2 {
            let mut fork = Vec::new();
            for n in 0..10 {
                let content = json!({"by": server, "side": side});
                let sender = moderator(2 * n + side);
                fork.push(world.add(&sender, "m.bench", &n.to_string(), content, false)?);
            }
            forks.push(fork);
        }
        base.extend((0..OTHERS).map(|n| (KeyNid(1000 + n), EventNid(1_000_000 + i64::from(n)))));
        let maps: Vec<StateMap> = forks
            .iter()
            .map(|fork| {
                let mut map = base.clone();
                map.extend(fork.iter().copied());
                map
            })
            .collect();
        let conflicted: BTreeSet<EventNid> = forks.iter().flatten().map(|(_, nid)| *nid).collect();
        let resolved = resolve(version, &maps, &world.set);
        ensure!(
            resolved.len() == maps[0].len(),
            "{} entries",
            resolved.len()
        );
        let asked: Vec<Vec<StateKey>> = conflicted
            .iter()
            .map(|nid| auth::auth_types_of(&world.set.events[nid].pdu))
            .collect();
        report.pair(
            what,
            1,
            &mut || time(|| resolve(version, &maps, &world.set)),
            "finding the keys, and once what the rules ask for",
            &mut || {
                time(|| {
                    black_box(maps[0].diff(&maps[1]));
                    asked.iter().for_each(|keys| world.look_up(keys));
                })
            },
        );
    }
    Ok(())
}
