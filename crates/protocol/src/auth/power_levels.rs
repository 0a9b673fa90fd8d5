//! Changes of power levels: nobody gives or takes what they have not got.

use std::collections::BTreeSet;

use super::{Refused, enough, refuse};
use crate::id::UserId;
use crate::pdu::Pdu;
use crate::power::{Level, Levels, Named, PowerLevels, Table};
use crate::room_version::Rules;

/// Rule 10 of version 12 and its forerunners.
pub(super) fn check(
    rules: &Rules,
    pdu: &Pdu,
    power: &PowerLevels,
    level: Level,
) -> Result<(), Refused> {
    let new = Levels::parse(rules, pdu);
    for name in Named::ALL {
        new.named(name)?;
    }
    let new_events = new.events.read()?;
    let new_notifications = match rules.notification_levels {
        true => new.notifications.read()?,
        false => &Table::EMPTY,
    };
    let new_users = new.users.read()?;
    if !new_users.keys().all(|user| UserId::parse(user).is_ok()) {
        return refuse("the levels of users name somebody who is no user");
    }
    if rules.privileged_creators
        && power
            .creators()
            .iter()
            .any(|creator| new_users.contains_key(creator.as_str()))
    {
        return refuse("the levels of users name a creator of the room");
    }
    let Some(old) = power.levels() else {
        return Ok(());
    };
    for name in Named::ALL {
        let (before, after) = (old.named(name)?, new.named(name)?);
        if before == after {
            continue;
        }
        for value in [before, after] {
            let value = Level::Of(value.unwrap_or(name.default_value()));
            enough(value <= level, "to change a level")?;
        }
    }
    changes(old.events.read()?, new_events, |_, before, after| {
        before.is_none_or(|before| before <= level) && after.is_none_or(|after| after <= level)
    })?;
    if rules.notification_levels {
        let old_notifications = old.notifications.read()?;
        changes(old_notifications, new_notifications, |_, before, after| {
            before.is_none_or(|before| before <= level) && after.is_none_or(|after| after <= level)
        })?;
    }
    changes(old.users.read()?, new_users, |user, before, after| {
        let own = user == pdu.sender.as_str();
        before.is_none_or(|before| own || before < level)
            && after.is_none_or(|after| after <= level)
    })
}

/// Every entry added, changed or removed must be allowed.
fn changes(
    old: &Table,
    new: &Table,
    allowed: impl Fn(&str, Option<Level>, Option<Level>) -> bool,
) -> Result<(), Refused> {
    let names: BTreeSet<_> = old.keys().chain(new.keys()).collect();
    for name in names {
        let level = |table: &Table| table.get(name).copied().map(Level::Of);
        let (before, after) = (level(old), level(new));
        if before != after && !allowed(name, before, after) {
            return enough(false, "to change a level");
        }
    }
    Ok(())
}
