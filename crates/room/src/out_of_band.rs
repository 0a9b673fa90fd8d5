//! Writing down a membership of our user in a room that we are not in.

use std::sync::Arc;

use protocol::id::{ServerName, UserId};
use protocol::pdu::Pdu;

use crate::effect::{Place, StateKey};
use crate::facts::{Facts, Got};
use crate::write::{FanOut, Former, NewEvent, OutOfBand, Verdict, WriteSet};

/// The write set that stores `pdu` as an outlier and makes it this user's membership.
pub(crate) fn writes(
    facts: &Facts,
    pdu: &Arc<Pdu>,
    user: &UserId,
    via: &ServerName,
    stripped_state: Vec<Arc<str>>,
    instead_of: Former,
) -> Got<WriteSet> {
    let key: StateKey = ("m.room.member".into(), user.as_str().into());
    facts.number(pdu.version, [pdu.event_id.clone()], [key])?;
    let nid = facts.nid(&pdu.event_id).expect("just numbered");
    let mut writes = WriteSet::new(facts.room.clone(), pdu.version);
    writes.events = vec![NewEvent {
        nid,
        pdu: pdu.clone(),
        key: facts.key_of(pdu),
        place: Place::Outlier,
        state: None,
        verdict: Verdict::Accepted,
        fan_out: FanOut::Nobody,
        transaction: None,
    }];
    // A ban of somebody who knocked ends as a leave would.
    let membership = pdu
        .membership()
        .filter(|stays| matches!(*stays, "invite" | "knock"))
        .unwrap_or("leave");
    writes.out_of_band = vec![OutOfBand {
        user: user.clone(),
        membership: membership.into(),
        event: nid,
        instead_of,
        stripped_state,
        via: via.clone(),
    }];
    Ok(writes)
}
