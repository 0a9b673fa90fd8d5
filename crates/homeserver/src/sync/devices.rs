//! Whose devices a client must look at again, and whose it may forget.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#extensions-to-sync-1>

use std::collections::BTreeSet;

use protocol::id::UserId;
use protocol::nid::RoomNid;
use storage::Conn;
use storage::sync_reads;
use storage::timeline;

use super::Ask;
use super::build::begins;
use super::token::SyncToken;
use crate::room_view::{RoomView, membership_of};

type Result<T> = storage::Result<T>;

/// Membership changes of one room that are looked through in one answer.
const CHANGES_MAX: i64 = 2_000;

/// Users that came into the user's rooms since the token; all members of rooms that are new to the client.
pub fn newcomers(
    c: &mut dyn Conn,
    ask: &Ask,
    came: &[RoomNid],
    up_to: i64,
) -> Result<BTreeSet<UserId>> {
    let mut users = BTreeSet::new();
    for room in came {
        users.extend(sync_reads::joined_users(c, *room)?);
    }
    if let Some(since) = ask.since {
        users.extend(moves(c, ask, since.events, up_to)?.0);
    }
    Ok(users)
}

/// Who joined the user's rooms between two positions, and who left them.
fn moves(
    c: &mut dyn Conn,
    ask: &Ask,
    after: i64,
    up_to: i64,
) -> Result<(BTreeSet<UserId>, BTreeSet<UserId>)> {
    let mut joined = BTreeSet::new();
    let mut left = BTreeSet::new();
    if after >= up_to {
        return Ok((joined, left));
    }
    let grown = sync_reads::rooms_with_events(c, after, up_to)?;
    for membership in sync_reads::memberships(c, &ask.reader.user)? {
        if membership.membership != "join" || !grown.contains(&membership.nid) {
            continue;
        }
        let events = timeline::member_events(c, membership.nid, after, up_to, CHANGES_MAX)?;
        if events.is_empty() {
            continue;
        }
        let Some(mut view) = RoomView::open(c, &membership.room, &ask.reader)? else {
            continue;
        };
        for event in events {
            let Some(user) = event
                .pdu
                .state_key
                .as_deref()
                .and_then(|u| UserId::parse(u).ok())
            else {
                continue;
            };
            if begins(&mut view, &event)? {
                joined.insert(user);
            } else if matches!(membership_of(&event.pdu), "leave" | "ban") {
                left.insert(user);
            }
        }
    }
    Ok((joined, left))
}

/// `changed` and `left` between two tokens.
pub fn lists(
    c: &mut dyn Conn,
    ask: &Ask,
    since: SyncToken,
    next: SyncToken,
    came: &[RoomNid],
    went: &[(RoomNid, i64)],
) -> Result<(Vec<UserId>, Vec<UserId>)> {
    let me = &ask.reader.user;
    let (mut candidates, mut gone) = moves(c, ask, since.events, next.events)?;
    candidates.remove(me);
    // In a room that is new to the user, the user is too: the other devices may have to know.
    for room in came {
        candidates.extend(sync_reads::joined_users(c, *room)?);
    }
    for (room, _) in went {
        gone.extend(sync_reads::joined_users(c, *room)?);
    }
    // P-60: no event of the timeline tells who was found not to be in a room when it became full.
    for room in sync_reads::became_full(c, since.became_full, next.became_full)? {
        gone.extend(sync_reads::gone_from(
            c,
            room,
            me,
            since.events,
            next.events,
        )?);
    }
    let updated = storage::devices::changed_between(c, since.device_lists, next.device_lists)?;
    candidates.extend(updated);
    let mine = candidates.contains(me);
    let candidates: Vec<UserId> = candidates.into_iter().filter(|user| user != me).collect();
    let mut changed: BTreeSet<UserId> = sync_reads::sharing(c, me, &candidates)?
        .into_iter()
        .collect();
    if mine {
        changed.insert(me.clone());
    }
    gone.remove(me);
    let gone: Vec<UserId> = gone.into_iter().collect();
    let still: BTreeSet<UserId> = sync_reads::sharing(c, me, &gone)?.into_iter().collect();
    let left = gone
        .into_iter()
        .filter(|user| !still.contains(user))
        .collect();
    Ok((changed.into_iter().collect(), left))
}
