//! Checks 4 and 5 for an event whose whole state is known.

use std::sync::Arc;

use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::state::StateMap;

use crate::effect::StateKey;
use crate::facts::{Facts, Got, auth_keys, both};
use crate::sift;
use crate::write::Verdict;

/// The verdict on an event by its auth events and the full state before it; `None` when an auth event is
/// not here. The event and the keys it needs are numbered on the way.
pub(crate) fn on_full_state(
    facts: &Facts,
    version: RoomVersion,
    pdu: &Arc<Pdu>,
    before: &StateMap,
) -> Got<Option<Verdict>> {
    let own_key = pdu.state_key.clone().map(|key| (pdu.kind.clone(), key));
    let keys = auth_keys(pdu).into_iter().chain(own_key);
    let numbered = facts.number(version, [pdu.event_id.clone()], keys);
    let (auth, ()) = both(facts.auth_of(pdu), numbered)?;
    let Some(auth) = auth else {
        return Ok(None);
    };
    let create_key: StateKey = ("m.room.create".into(), "".into());
    let create = facts.state_events(before, &[create_key])?;
    let create = create.values().next().map(|(_, pdu)| &**pdu);
    let by_ref: Vec<_> = auth
        .iter()
        .map(|(_, pdu, rejected)| (&**pdu, *rejected))
        .collect();
    let verdict = sift::match_auth(version, pdu, create, &by_ref);
    if verdict != Verdict::Accepted {
        return Ok(Some(verdict));
    }
    Ok(Some(match facts.check_against(pdu, before)? {
        Ok(()) => Verdict::Accepted,
        Err(reason) => Verdict::Rejected(reason),
    }))
}
