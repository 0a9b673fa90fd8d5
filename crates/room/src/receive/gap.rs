//! Missing prev events: get_missing_events, and what may come of it (joins.md P-16, P-17, P-20).
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#retrieving-events-and-state>

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use protocol::id::{EventId, RoomId};
use protocol::pdu::Pdu;

use crate::effect::{Answer, Ask, AskError, BadPdu, Head, RawPdu};

pub(super) const TIMEOUT: Duration = Duration::from_secs(60);
/// Others are asked when the sender did not answer, and that took its time.
pub(super) const TIMEOUT_OF_OTHERS: Duration = Duration::from_secs(15);
/// Events asked for, and taken.
const EVENTS_MAX: usize = 10;

pub(super) fn ask<'a>(
    room: &RoomId,
    head: &'a Head,
    latest: &Pdu,
    known_prevs: impl Iterator<Item = &'a EventId>,
) -> Ask {
    let extremities = head.forward_extremities.iter().map(|e| &e.event_id);
    let earliest: BTreeSet<&EventId> = extremities.chain(known_prevs).collect();
    Ask::GetMissingEvents {
        room: room.clone(),
        earliest: earliest.into_iter().cloned().collect(),
        latest: vec![latest.event_id.clone()],
        limit: EVENTS_MAX as u32,
        min_depth: head.min_depth,
    }
}

pub(super) fn answered(answer: Result<Answer, AskError>) -> Vec<RawPdu> {
    match answer {
        Ok(Answer::Pdus(mut pdus)) => {
            pdus.truncate(EVENTS_MAX);
            pdus
        }
        _ => Vec::new(),
    }
}

/// The good ones, the oldest first. Bad ones are dropped; the gap then stays open (P-21).
pub(super) fn pulled(latest: &Pdu, pdus: Vec<Result<Arc<Pdu>, BadPdu>>) -> Vec<Arc<Pdu>> {
    let mut seen = BTreeSet::from([latest.event_id.clone()]);
    let mut pulled: Vec<_> = pdus
        .into_iter()
        .flatten()
        .filter(|pdu| pdu.room_id == latest.room_id && seen.insert(pdu.event_id.clone()))
        .collect();
    pulled.sort_by(|a, b| a.depth.cmp(&b.depth).then(a.event_id.cmp(&b.event_id)));
    pulled
}
