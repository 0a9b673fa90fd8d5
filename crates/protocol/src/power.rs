//! Power levels: who may do what.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#mroompower_levels>

use std::collections::BTreeMap;

use serde_json::Value;

use crate::auth::{Refused, creators};
use crate::id::UserId;
use crate::pdu::Pdu;
use crate::room_version::{RoomVersion, Rules};

/// What the creator has in a room without power levels (V-23).
const CREATOR_LEVEL: i64 = 100;

/// The power of one user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Of(i64),
    /// A creator's, from version 12 on.
    Infinite,
}

impl PartialEq<i64> for Level {
    fn eq(&self, other: &i64) -> bool {
        *self == Self::Of(*other)
    }
}

impl PartialOrd<i64> for Level {
    fn partial_cmp(&self, other: &i64) -> Option<std::cmp::Ordering> {
        Some(self.cmp(&Self::Of(*other)))
    }
}

/// The power levels of a room at some point.
///
/// The plain getters never fail: where a level can not be read (before version 10 nothing kept odd values
/// out of the state) the requirement is beyond everybody and the user's power is none.
#[derive(Clone, Debug)]
pub struct PowerLevels {
    /// `None` in a room without the event.
    levels: Option<Levels>,
    creators: Vec<UserId>,
    privileged: bool,
}

impl PowerLevels {
    /// Made from the room's create event and, if there is one, its `m.room.power_levels`.
    pub fn of(version: RoomVersion, create: Option<&Pdu>, power_levels: Option<&Pdu>) -> Self {
        let rules = version.rules();
        Self {
            levels: power_levels.map(|event| Levels::parse(rules, event)),
            creators: create.map_or(Vec::new(), |create| creators(version, create)),
            privileged: rules.privileged_creators,
        }
    }

    pub fn user(&self, user: &UserId) -> Level {
        self.read_user(user.as_str()).unwrap_or(Level::Of(i64::MIN))
    }

    /// What sending an event of this type takes.
    pub fn event(&self, kind: &str, is_state: bool) -> i64 {
        self.read_event(kind, is_state).unwrap_or(i64::MAX)
    }

    pub fn ban(&self) -> i64 {
        self.read_ban().unwrap_or(i64::MAX)
    }

    pub fn kick(&self) -> i64 {
        self.read_kick().unwrap_or(i64::MAX)
    }

    pub fn invite(&self) -> i64 {
        self.read_invite().unwrap_or(i64::MAX)
    }

    pub fn redact(&self) -> i64 {
        self.read_redact().unwrap_or(i64::MAX)
    }

    /// What notifying this way takes, `room` for the whole room.
    pub fn notification(&self, name: &str) -> i64 {
        self.levels
            .as_ref()
            .and_then(|levels| levels.notifications.read().ok()?.get(name).copied())
            .unwrap_or(50)
    }

    pub fn users_default(&self) -> i64 {
        self.read_named(Named::UsersDefault).unwrap_or(i64::MIN)
    }

    pub fn can_send(&self, user: &UserId, kind: &str, is_state: bool) -> bool {
        self.user(user) >= self.event(kind, is_state)
    }

    /// Whether the user has the power to invite, and so to authorise a restricted join (J-20, R-44).
    /// That they are in the room is another question.
    pub fn can_invite(&self, user: &UserId) -> bool {
        self.user(user) >= self.invite()
    }

    pub fn can_redact(&self, user: &UserId) -> bool {
        self.user(user) >= self.redact()
    }

    /// Whether users of whom the levels say nothing may invite.
    pub fn anyone_can_invite(&self) -> bool {
        self.users_default() >= self.invite()
    }

    /// Those named in the levels or as creators who may invite, the most powerful first (J-20).
    pub fn users_able_to_invite(&self) -> Vec<UserId> {
        let mut able = self.named_users();
        able.retain(|(_, level)| *level >= self.invite());
        able.into_iter().map(|(user, _)| user).collect()
    }

    /// Everybody who is named in the levels or as a creator, the most powerful first.
    pub fn named_users(&self) -> Vec<(UserId, Level)> {
        let listed = self
            .levels
            .iter()
            .filter_map(|levels| levels.users.read().ok())
            .flat_map(|table| table.keys())
            .filter_map(|user| UserId::parse(user).ok());
        let mut users: Vec<_> = self.creators.iter().cloned().chain(listed).collect();
        users.sort();
        users.dedup();
        let mut users: Vec<_> = users
            .into_iter()
            .map(|user| (self.user(&user), user))
            .map(|(level, user)| (user, level))
            .collect();
        users.sort_by_key(|(_, level)| std::cmp::Reverse(*level));
        users
    }

    pub fn creators(&self) -> &[UserId] {
        &self.creators
    }

    pub(crate) fn levels(&self) -> Option<&Levels> {
        self.levels.as_ref()
    }

    pub(crate) fn read_user(&self, user: &str) -> Result<Level, Refused> {
        let is_creator = self.creators.iter().any(|creator| creator.as_str() == user);
        if is_creator && self.privileged {
            return Ok(Level::Infinite);
        }
        let Some(levels) = &self.levels else {
            return Ok(Level::Of(if is_creator { CREATOR_LEVEL } else { 0 }));
        };
        match levels.users.read()?.get(user) {
            Some(level) => Ok(Level::Of(*level)),
            None => self.read_named(Named::UsersDefault).map(Level::Of),
        }
    }

    pub(crate) fn read_event(&self, kind: &str, is_state: bool) -> Result<i64, Refused> {
        if let Some(levels) = &self.levels
            && let Some(level) = levels.events.read()?.get(kind)
        {
            return Ok(*level);
        }
        self.read_named(match is_state {
            true => Named::StateDefault,
            false => Named::EventsDefault,
        })
    }

    pub(crate) fn read_ban(&self) -> Result<i64, Refused> {
        self.read_named(Named::Ban)
    }

    pub(crate) fn read_kick(&self) -> Result<i64, Refused> {
        self.read_named(Named::Kick)
    }

    pub(crate) fn read_invite(&self) -> Result<i64, Refused> {
        self.read_named(Named::Invite)
    }

    pub(crate) fn read_redact(&self) -> Result<i64, Refused> {
        self.read_named(Named::Redact)
    }

    fn read_named(&self, name: Named) -> Result<i64, Refused> {
        let stated = match &self.levels {
            Some(levels) => levels.named(name)?,
            None => None,
        };
        Ok(stated.unwrap_or(name.default_value()))
    }
}

/// The levels that stand by themselves in the content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Named {
    UsersDefault,
    EventsDefault,
    StateDefault,
    Ban,
    Redact,
    Kick,
    Invite,
}

impl Named {
    pub(crate) const ALL: [Self; 7] = [
        Self::UsersDefault,
        Self::EventsDefault,
        Self::StateDefault,
        Self::Ban,
        Self::Redact,
        Self::Kick,
        Self::Invite,
    ];

    fn key(self) -> &'static str {
        match self {
            Self::UsersDefault => "users_default",
            Self::EventsDefault => "events_default",
            Self::StateDefault => "state_default",
            Self::Ban => "ban",
            Self::Redact => "redact",
            Self::Kick => "kick",
            Self::Invite => "invite",
        }
    }

    /// V-23.
    pub(crate) fn default_value(self) -> i64 {
        match self {
            Self::UsersDefault | Self::EventsDefault | Self::Invite => 0,
            Self::StateDefault | Self::Ban | Self::Redact | Self::Kick => 50,
        }
    }
}

/// The content of one `m.room.power_levels` event. What can not be read stays in its place as such: it
/// matters only to who asks for it.
#[derive(Clone, Debug)]
pub(crate) struct Levels {
    named: [Result<Option<i64>, Unreadable>; 7],
    pub(crate) events: Readable,
    pub(crate) notifications: Readable,
    pub(crate) users: Readable,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Unreadable;

#[derive(Clone, Debug)]
pub(crate) struct Readable(Result<Table, Unreadable>);

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Table(BTreeMap<String, i64>);

impl Table {
    pub(crate) const EMPTY: Self = Self(BTreeMap::new());
}

impl std::ops::Deref for Table {
    type Target = BTreeMap<String, i64>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl Readable {
    pub(crate) fn read(&self) -> Result<&Table, Refused> {
        self.0.as_ref().map_err(|_| unreadable())
    }
}

impl Levels {
    pub(crate) fn parse(rules: &Rules, pdu: &Pdu) -> Self {
        // Lenient JSON has numbers that no double holds; with one of them the whole is unreadable.
        let Ok(content) = serde_json::from_str::<Value>(pdu.content()) else {
            let nothing = Readable(Err(Unreadable));
            return Self {
                named: [Err(Unreadable); 7],
                events: nothing.clone(),
                notifications: nothing.clone(),
                users: nothing,
            };
        };
        // Before version 10 a null in most places was as good as nothing.
        let absent = |value: &Value| value.is_null() && !rules.integer_levels;
        let named = Named::ALL.map(|name| match content.get(name.key()) {
            None => Ok(None),
            Some(value) if absent(value) => Ok(None),
            Some(value) => integer(rules, value).map(Some).ok_or(Unreadable),
        });
        let table = |key: &str, absent: &dyn Fn(&Value) -> bool| {
            let Some(value) = content.get(key) else {
                return Readable(Ok(Table::EMPTY));
            };
            let read = |entries: &serde_json::Map<String, Value>| {
                entries
                    .iter()
                    .filter(|(_, value)| !absent(value))
                    .map(|(name, value)| Some((name.clone(), integer(rules, value)?)))
                    .collect::<Option<BTreeMap<_, _>>>()
            };
            let table = value.as_object().and_then(read);
            Readable(table.map(Table).ok_or(Unreadable))
        };
        Self {
            named,
            events: table("events", &absent),
            notifications: table("notifications", &absent),
            users: table("users", &|_| false),
        }
    }

    /// `None` where nothing is said.
    pub(crate) fn named(&self, name: Named) -> Result<Option<i64>, Refused> {
        self.named[name as usize].map_err(|_| unreadable())
    }
}

fn unreadable() -> Refused {
    Refused::because("a power level is not an integer")
}

/// A level as the version reads it. Before version 10 also integers in strings and, where JSON is lenient
/// enough to have them, floats, cut off at the point. What is out of our range stays at its end.
fn integer(rules: &Rules, value: &Value) -> Option<i64> {
    match value {
        Value::Number(number) => {
            if let Some(integer) = number.as_i64() {
                return Some(integer);
            }
            if number.as_u64().is_some() {
                return (!rules.integer_levels).then_some(i64::MAX);
            }
            let float = number.as_f64().filter(|float| float.is_finite())?;
            (!rules.integer_levels).then_some(float as i64)
        }
        Value::String(text) if !rules.integer_levels => {
            let text = text.trim();
            let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
            if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
                return None;
            }
            let end = if text.starts_with('-') {
                i64::MIN
            } else {
                i64::MAX
            };
            Some(text.parse().unwrap_or(end))
        }
        _ => None,
    }
}
