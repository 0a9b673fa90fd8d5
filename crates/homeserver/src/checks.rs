//! The Check effect: parse, hash and verify PDUs, with keys fetched as needed.

use std::collections::BTreeSet;
use std::sync::Arc;

use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::signature::{self, Verification};
use room::effect::{BadPdu, RawPdu};

use crate::Homeserver;

/// PDUs of one verification batch; larger ones gain nothing more (they are the window of a body, too).
const BATCH_MAX: usize = 4096;

/// One verdict for each PDU, in order.
pub async fn check(hs: &Homeserver, version: RoomVersion, pdus: Vec<RawPdu>) -> Vec<Result<Arc<Pdu>, BadPdu>> {
    let mut verdicts = Vec::with_capacity(pdus.len());
    let mut rest = pdus;
    while !rest.is_empty() {
        let tail = rest.split_off(rest.len().min(BATCH_MAX));
        let batch = std::mem::replace(&mut rest, tail);
        verdicts.extend(check_batch(hs, version, batch).await);
    }
    verdicts
}

async fn check_batch(hs: &Homeserver, version: RoomVersion, pdus: Vec<RawPdu>) -> Vec<Result<Arc<Pdu>, BadPdu>> {
    let parsed = on_cpu(move || pdus.iter().map(|raw| parse(raw, version)).collect::<Vec<_>>()).await;
    let wanted: BTreeSet<_> = parsed.iter().flatten().flat_map(|pdu| needed_keys(pdu)).collect();
    let keys = hs.keys().for_events(version, wanted.into_iter().collect()).await;
    let mode = if hs.config().join.batch_verification { Verification::Batch } else { Verification::Single };
    let entropy: [u8; 32] = rand::random();
    on_cpu(move || {
        let good: Vec<&Pdu> = parsed.iter().flatten().map(Arc::as_ref).collect();
        let mut verdicts = signature::verify_pdus(&good, &keys, mode, entropy).into_iter();
        parsed
            .into_iter()
            .map(|pdu| {
                let pdu = pdu?;
                match verdicts.next().expect("one verdict for each parsed PDU") {
                    Ok(()) => Ok(pdu),
                    Err(error) => {
                        Err(BadPdu { event_id: Some(pdu.event_id.clone()), reason: error.to_string(), signature: true })
                    }
                }
            })
            .collect()
    })
    .await
}

fn parse(raw: &str, version: RoomVersion) -> Result<Arc<Pdu>, BadPdu> {
    Pdu::parse(raw, version).map(Arc::new).map_err(|error| BadPdu {
        event_id: None,
        reason: error.to_string(),
        signature: false,
    })
}

/// `(server, key id, origin_server_ts)` for each signature that counts.
fn signing_keys(pdu: &Pdu) -> Vec<(protocol::id::ServerName, String, i64)> {
    let required = signature::required_servers(pdu);
    pdu.signatures
        .iter()
        .filter(|(server, _, _)| required.contains(server))
        .map(|(server, key_id, _)| (server.clone(), key_id.clone(), pdu.origin_server_ts))
        .collect()
}

/// Runs work for the processor off the async threads.
pub async fn on_cpu<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.expect("checks do not panic")
}
