//! The authorisation rules of every room version.
//!
//! One walk serves all versions, in the order in which `rooms/vN` prints the rules; where versions differ
//! it asks the table in [`crate::room_version`]. Signatures are not looked at here: by the time an event
//! gets this far, every server in [`crate::signature::required_servers`] has signed it (V-15).
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#authorization-rules>

mod create;
mod member;
mod power_levels;
mod selection;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::Arc;

use crate::id::EventId;
use crate::pdu::Pdu;
use crate::power::{Level, PowerLevels};
use crate::room_version::{RoomVersion, Rules};

pub use create::{creator, creators};
pub use selection::{auth_types, auth_types_of};

/// Power levels parsed for one walk over many events. Rooms change them a few hundred times at most.
const CACHE_MAX: usize = 256;

/// Why the rules refuse an event, in words for a log or an error body.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Refused {
    pub reason: Cow<'static, str>,
}

impl Refused {
    pub(crate) fn because(reason: &'static str) -> Self {
        let reason = Cow::Borrowed(reason);
        Self { reason }
    }
}

/// What the rules parse again and again while many events of one room are checked: its power levels.
#[derive(Debug, Default)]
pub struct Cache {
    powers: BTreeMap<(Option<EventId>, Option<EventId>), Arc<PowerLevels>>,
}

impl Cache {
    /// The power levels that these events make, parsed once.
    pub fn power(
        &mut self,
        version: RoomVersion,
        create: Option<&Pdu>,
        power_levels: Option<&Pdu>,
    ) -> Arc<PowerLevels> {
        let id = |pdu: Option<&Pdu>| pdu.map(|pdu| pdu.event_id.clone());
        let key = (id(create), id(power_levels));
        if let Some(known) = self.powers.get(&key) {
            return known.clone();
        }
        if self.powers.len() >= CACHE_MAX {
            self.powers.clear();
        }
        let power = Arc::new(PowerLevels::of(version, create, power_levels));
        self.powers.insert(key, power.clone());
        power
    }
}

/// Check 4 on receipt: the choice of auth events, then the rules against the state they form.
///
/// `auth` holds the event's auth events in order, each with whether it was rejected. `create` is the
/// accepted create event of the room that the event names; versions 1 to 11 find theirs in `auth`.
pub fn check_auth_events(
    version: RoomVersion,
    pdu: &Pdu,
    create: Option<&Pdu>,
    auth: &[(&Pdu, bool)],
) -> Result<(), Refused> {
    check_auth_events_with(&mut Cache::default(), version, pdu, create, auth)
}

/// As [`check_auth_events`], for many events of one room.
pub fn check_auth_events_with(
    cache: &mut Cache,
    version: RoomVersion,
    pdu: &Pdu,
    create: Option<&Pdu>,
    auth: &[(&Pdu, bool)],
) -> Result<(), Refused> {
    let rules = version.rules();
    if &*pdu.kind == "m.room.create" {
        return create::check(rules, pdu);
    }
    if rules.room_id_is_create_hash && !create.is_some_and(|create| names_room(create, pdu)) {
        return refuse("the room id does not name an accepted create event");
    }
    let selection = selection::Selection::of(rules, pdu);
    let mut state = BTreeMap::new();
    for &(event, _) in auth {
        let Some(state_key) = event.state_key.as_deref() else {
            return refuse("an auth event is not a state event");
        };
        if state.insert((&*event.kind, state_key), event).is_some() {
            return refuse("two auth events have the same type and state key");
        }
    }
    if !state.keys().all(|(kind, key)| selection.has(kind, key)) {
        return refuse("an auth event is not among those that the event may have");
    }
    if auth.iter().any(|&(_, rejected)| rejected) {
        return refuse("an auth event was rejected");
    }
    if rules.create_in_auth_events && !state.contains_key(&("m.room.create", "")) {
        return refuse("the create event is not among the auth events");
    }
    if auth.iter().any(|(event, _)| event.room_id != pdu.room_id) {
        return refuse("an auth event is of another room");
    }
    if let (false, Some(create)) = (rules.create_in_auth_events, create) {
        state.insert(("m.room.create", ""), create);
    }
    let get = |kind: &str, key: &str| state.get(&(kind, key)).copied();
    check_rules(cache, version, pdu, &get)
}

/// Checks 5 and 6: the rules against a state, which in every version includes the create event.
///
/// Only keys in [`auth_types`] and the create event are asked for.
pub fn check(
    version: RoomVersion,
    pdu: &Pdu,
    state: &dyn Fn(&str, &str) -> Option<Arc<Pdu>>,
) -> Result<(), Refused> {
    check_rules(&mut Cache::default(), version, pdu, state)
}

/// As [`check`], for many events of one room.
pub fn check_with(
    cache: &mut Cache,
    version: RoomVersion,
    pdu: &Pdu,
    state: &dyn Fn(&str, &str) -> Option<Arc<Pdu>>,
) -> Result<(), Refused> {
    check_rules(cache, version, pdu, state)
}

/// The rules but for those on `auth_events`.
pub(crate) fn check_rules<P: Deref<Target = Pdu>>(
    cache: &mut Cache,
    version: RoomVersion,
    pdu: &Pdu,
    get: &dyn Fn(&str, &str) -> Option<P>,
) -> Result<(), Refused> {
    let rules = version.rules();
    if &*pdu.kind == "m.room.create" {
        return create::check(rules, pdu);
    }
    let Some(create) = get("m.room.create", "") else {
        return refuse("there is no create event in the state");
    };
    let mut room = Room {
        version,
        rules,
        create: &create,
        get,
        cache,
    };
    if create.content_raw("m.federate") == Some("false")
        && pdu.sender.server_str() != create.sender.server_str()
    {
        return refuse("the room is not federated and the sender is of another server");
    }
    if rules.aliases_rule && &*pdu.kind == "m.room.aliases" {
        if pdu.state_key.as_deref() != Some(pdu.sender.server_str()) {
            return refuse("the state key is not the sender's server");
        }
        return Ok(());
    }
    if &*pdu.kind == "m.room.member" {
        return member::check(&mut room, pdu);
    }
    if room.membership(pdu.sender.as_str()) != Membership::Join {
        return refuse("the sender is not in the room");
    }
    let power = room.power();
    let level = power.read_user(pdu.sender.as_str())?;
    if &*pdu.kind == "m.room.third_party_invite" {
        return enough(level >= power.read_invite()?, "to invite");
    }
    let needed = power.read_event(&pdu.kind, pdu.is_state())?;
    enough(level >= needed, "for this type of event")?;
    if let Some(state_key) = &pdu.state_key
        && state_key.starts_with('@')
        && **state_key != *pdu.sender.as_str()
    {
        return refuse("the state key is another user's id");
    }
    if &*pdu.kind == "m.room.power_levels" {
        return power_levels::check(rules, pdu, &power, level);
    }
    if rules.redaction_rule && &*pdu.kind == "m.room.redaction" {
        return check_redaction(pdu, &power, level);
    }
    Ok(())
}

/// Versions 1 and 2.
fn check_redaction(pdu: &Pdu, power: &PowerLevels, level: Level) -> Result<(), Refused> {
    if level >= power.read_redact()? {
        return Ok(());
    }
    let domain = |id: &EventId| id.as_str().split_once(':').map(|(_, d)| d.to_owned());
    let theirs = pdu.redacts.as_deref().and_then(domain);
    if theirs.is_some() && theirs == domain(&pdu.event_id) {
        return Ok(());
    }
    refuse("the sender may redact only events of their own server")
}

/// The state that one event is held against.
struct Room<'a, P> {
    version: RoomVersion,
    rules: &'static Rules,
    create: &'a Pdu,
    get: &'a dyn Fn(&str, &str) -> Option<P>,
    cache: &'a mut Cache,
}

impl<P: Deref<Target = Pdu>> Room<'_, P> {
    fn membership(&self, user: &str) -> Membership {
        match (self.get)("m.room.member", user) {
            None => Membership::Leave,
            Some(event) => Membership::of(&event),
        }
    }

    fn power(&mut self) -> Arc<PowerLevels> {
        let event = (self.get)("m.room.power_levels", "");
        self.cache
            .power(self.version, Some(self.create), event.as_deref())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Membership {
    Invite,
    Join,
    Leave,
    Ban,
    Knock,
    /// Not one that any version knows.
    Unknown,
}

impl Membership {
    fn of(pdu: &Pdu) -> Self {
        match pdu.membership() {
            Some("invite") => Self::Invite,
            Some("join") => Self::Join,
            Some("leave") => Self::Leave,
            Some("ban") => Self::Ban,
            Some("knock") => Self::Knock,
            _ => Self::Unknown,
        }
    }
}

/// Whether `create` is the create event for which the room of `pdu` is named (version 12).
fn names_room(create: &Pdu, pdu: &Pdu) -> bool {
    &*create.kind == "m.room.create"
        && create.event_id.as_str().get(1..) == pdu.room_id.as_str().get(1..)
}

fn refuse<T>(reason: &'static str) -> Result<T, Refused> {
    Err(Refused::because(reason))
}

fn enough(is: bool, what_for: &'static str) -> Result<(), Refused> {
    if is {
        return Ok(());
    }
    Err(Refused {
        reason: format!("the sender has not the power {what_for}").into(),
    })
}
