//! The Check effect: parse, hash and verify PDUs, with keys fetched as needed.

use std::sync::Arc;
use std::time::Duration;

use federation::keys::Wanted;
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::signature::{self, SignatureError};
use room::effect::{BadPdu, Fault, RawPdu};

use crate::Homeserver;

/// PDUs of one verification batch; larger ones gain nothing more (they are the window of a body, too).
const BATCH_MAX: usize = 4096;
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
    let parsed = on_cpu(hs, move || {
        pdus.into_iter()
            .map(|raw| parse(&raw, version))
            .collect::<Vec<_>>()
    })
    .await;
    let mut wanted: Vec<_> = parsed
        .iter()
        .flatten()
        .flat_map(|(pdu, _)| needed(pdu))
        .collect();
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
        let good: Vec<(&Pdu, &str)> = parsed
            .iter()
            .flatten()
            .map(|(pdu, signed)| (pdu.as_ref(), signed.as_str()))
            .collect();
        let mut verdicts = signature::verify_pdus(&good, &keys, entropy, mode).into_iter();
        parsed
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

/// The PDU, and the bytes that its signatures are made over.
fn parse(raw: &str, version: RoomVersion) -> Result<(Arc<Pdu>, String), BadPdu> {
    let parsed = Pdu::parse_with_signed(raw, version);
    parsed
        .map(|(pdu, signed)| (Arc::new(pdu), signed))
        .map_err(|error| BadPdu {
            event_id: None,
            reason: error.to_string(),
            fault: Fault::Form,
        })
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
