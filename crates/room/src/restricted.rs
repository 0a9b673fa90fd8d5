//! Restricted joins: who may come in by being in another room, and who vouches for it (joins.md 2.4, J-20).
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#restricted-rooms>

use std::collections::BTreeMap;
use std::sync::Arc;

use protocol::id::{RoomId, UserId};
use protocol::pdu::Pdu;
use protocol::power::PowerLevels;
use protocol::room_version::RoomVersion;
use protocol::state::StateMap;
use serde_json::Value;

use crate::effect::StateKey;
use crate::facts::{Facts, Got};
use crate::refusal::Refusal;

/// Rooms looked at of one `allow` list.
const ALLOWED_ROOMS_MAX: usize = 50;

/// What we see of a user in a room that a restricted rule allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allowed {
    Joined,
    NotJoined,
    /// We are not in that room, or hold it partially and do not see the user there.
    Unknown,
}

/// The driver's answers about allowed rooms.
pub type AllowedRooms = BTreeMap<RoomId, Allowed>;

/// How a join stands to the join rules.
pub(crate) enum Standing {
    /// No restricted rule applies: the auth rules have the only say.
    Ordinary,
    /// The driver must say how the user stands in these rooms.
    Ask(Vec<RoomId>),
    /// This user of ours vouches for the join.
    GrantedBy(UserId),
    /// Allowed, but nobody here may invite.
    NobodyToGrant,
    Refused(Refusal),
}

pub(crate) fn unable_to_grant() -> Refusal {
    Refusal::new(
        400,
        "M_UNABLE_TO_GRANT_JOIN",
        "nobody on this server may let the user in",
    )
}

/// How this user's join stands to the rules in `state`. `local` are our joined users.
pub(crate) fn standing(
    facts: &Facts,
    version: RoomVersion,
    state: &StateMap,
    user: &UserId,
    local: &[UserId],
    allowed: Option<&AllowedRooms>,
) -> Got<Standing> {
    let keys = keys(user);
    facts.number(version, [], keys.iter().cloned())?;
    let events = facts.state_events(state, &keys)?;
    let at = |index: usize| events.get(&keys[index]).map(|(_, pdu)| pdu);
    let membership = at(3).and_then(|pdu| pdu.membership().map(str::to_owned));
    if matches!(membership.as_deref(), Some("join" | "invite")) {
        return Ok(Standing::Ordinary);
    }
    let Some(rules) = at(1).map(|pdu| pdu.content_value()) else {
        return Ok(Standing::Ordinary);
    };
    let applies = match rules.get("join_rule").and_then(Value::as_str) {
        Some("restricted") => version.rules().restricted,
        Some("knock_restricted") => version.rules().knock_restricted,
        _ => false,
    };
    if !applies {
        return Ok(Standing::Ordinary);
    }
    let rooms = allowed_rooms(&rules);
    let Some(allowed) = allowed else {
        return Ok(Standing::Ask(rooms));
    };
    if let Err(refusal) = admitted(&rooms, allowed) {
        return Ok(Standing::Refused(refusal));
    }
    let granter = at(0).and_then(|create| granter(version, create, at(2), local));
    Ok(granter.map_or(Standing::NobodyToGrant, Standing::GrantedBy))
}

fn keys(user: &UserId) -> [StateKey; 4] {
    [
        ("m.room.create".into(), "".into()),
        ("m.room.join_rules".into(), "".into()),
        ("m.room.power_levels".into(), "".into()),
        ("m.room.member".into(), user.as_str().into()),
    ]
}

/// mangled entries are ignored.
fn allowed_rooms(rules: &Value) -> Vec<RoomId> {
    let entries = rules.get("allow").and_then(Value::as_array);
    entries
        .into_iter()
        .flatten()
        .filter(|entry| entry.get("type").and_then(Value::as_str) == Some("m.room_membership"))
        .filter_map(|entry| RoomId::parse(entry.get("room_id")?.as_str()?).ok())
        .take(ALLOWED_ROOMS_MAX)
        .collect()
}

///
fn admitted(rooms: &[RoomId], allowed: &AllowedRooms) -> Result<(), Refusal> {
    let seen = |room: &RoomId| allowed.get(room).copied().unwrap_or(Allowed::Unknown);
    if rooms.iter().any(|room| seen(room) == Allowed::Joined) {
        return Ok(());
    }
    if rooms.iter().any(|room| seen(room) == Allowed::Unknown) {
        return Err(Refusal::new(
            400,
            "M_UNABLE_TO_AUTHORISE_JOIN",
            "this server can not see whether the user is in an allowed room",
        ));
    }
    Err(Refusal::forbidden(
        "the user is in none of the rooms that would allow the join",
    ))
}

/// One of our joined users who may invite. Creators and power-level holders count alike (J-20).
fn granter(
    version: RoomVersion,
    create: &Arc<Pdu>,
    power_levels: Option<&Arc<Pdu>>,
    local: &[UserId],
) -> Option<UserId> {
    let power = PowerLevels::of(version, Some(create), power_levels.map(|pdu| &**pdu));
    local.iter().find(|user| power.can_invite(user)).cloned()
}
