//! The Check effect: parse, hash and verify PDUs, with keys fetched as needed.

use std::sync::Arc;
use std::time::Duration;

use federation::keys::Wanted;
use federation::room_body::WINDOW_EVENTS;
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::signature::{self, SignatureError};
use room::effect::{BadPdu, Fault, RawPdu};

use crate::Homeserver;

/// PDUs of one verification batch.
const BATCH_MAX: usize = WINDOW_EVENTS;
/// Events whose keys do not come by then are left out; the fetch goes on for the next time.
const KEYS_DEADLINE: Duration = Duration::from_secs(15);

/// One verdict for each PDU, in order.
pub async fn check(
    hs: &Homeserver,
    version: RoomVersion,
    pdus: Vec<RawPdu>,
) -> Vec<Result<Arc<Pdu>, BadPdu>> {
    let mut verdicts = Vec::with_capacity(pdus.len());
    let mut rest = pdus;
    while !rest.is_empty() {
        let tail = rest.split_off(rest.len().min(BATCH_MAX));
        let batch = std::mem::replace(&mut rest, tail);
        verdicts.extend(check_batch(hs, version, batch).await);
    }
    verdicts
}

async fn check_batch(
    hs: &Homeserver,
    version: RoomVersion,
    pdus: Vec<RawPdu>,
) -> Vec<Result<Arc<Pdu>, BadPdu>> {
    let parsed = on_cpu(hs, move || Parsed::of(pdus, version)).await;
    let mut wanted: Vec<_> = parsed.pdus().flat_map(needed).collect();
    wanted.sort_unstable();
    // A key that is good for the latest event that it signed is good for those before.
    wanted.dedup_by(|later, kept| {
        let same = later.server == kept.server && later.key_id == kept.key_id;
        if same {
            kept.at_ms = later.at_ms;
        }
        same
    });
    let keys = hs.keys().keys_for_events(&wanted, KEYS_DEADLINE).await;
    let mode = hs.config().join.verification;
    let unvouched = keys.is_unvouched();
    let entropy: [u8; 32] = rand::random();
    on_cpu(hs, move || {
        let good: Vec<(&Pdu, &str)> = parsed.pdus().zip(parsed.signed()).collect();
        let mut verdicts = signature::verify_pdus(&good, &keys, entropy, mode).into_iter();
        parsed
            .all
            .into_iter()
            .map(|pdu| {
                let (pdu, _) = pdu?;
                match verdicts.next().expect("one verdict for each parsed PDU") {
                    Ok(()) => Ok(pdu),
                    Err(error) => Err(BadPdu {
                        event_id: Some(pdu.event_id.clone()),
                        reason: error.to_string(),
                        fault: match error {
                            SignatureError::UnknownKey(_) if unvouched => Fault::Unvouched,
                            SignatureError::UnknownKey(_) => Fault::NoKey,
                            _ => Fault::Signature,
                        },
                    }),
                }
            })
            .collect()
    })
    .await
}

/// PDUs of the right form, and the bytes that their signatures are made over, all in one text.
struct Parsed {
    /// With where these bytes end.
    all: Vec<Result<(Arc<Pdu>, usize), BadPdu>>,
    signed: String,
}

impl Parsed {
    fn of(pdus: Vec<RawPdu>, version: RoomVersion) -> Self {
        let mut signed = String::with_capacity(pdus.iter().map(|raw| raw.len()).sum());
        let parse = |raw: RawPdu| {
            let pdu = Pdu::parse_with_signed(&raw, version, &mut signed);
            pdu.map(|pdu| (Arc::new(pdu), signed.len()))
                .map_err(|error| BadPdu {
                    event_id: None,
                    reason: error.to_string(),
                    fault: Fault::Form,
                })
        };
        let all = pdus.into_iter().map(parse).collect();
        Self { all, signed }
    }

    fn pdus(&self) -> impl Iterator<Item = &Pdu> {
        self.all.iter().flatten().map(|(pdu, _)| pdu.as_ref())
    }

    /// In the same order.
    fn signed(&self) -> impl Iterator<Item = &str> {
        let mut from = 0;
        let ends = self.all.iter().flatten().map(|(_, end)| *end);
        ends.map(move |end| &self.signed[std::mem::replace(&mut from, end)..end])
    }
}

fn needed(pdu: &Pdu) -> Vec<Wanted> {
    signature::needed_keys(pdu)
        .into_iter()
        .map(|(server, key_id)| Wanted::new(server, key_id, pdu.origin_server_ts, pdu.version))
        .collect()
}

async fn on_cpu<T: Send + 'static>(
    hs: &Homeserver,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    let processor = hs.config().processor;
    processor.run(work).await.expect("checks do not panic")
}
