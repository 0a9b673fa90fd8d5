//! Which members a device has been sent already, so that lazy loading need not repeat them (P-28).
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#lazy-loading-room-members>

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use protocol::id::{RoomId, UserId};
use protocol::nid::EventNid;
use quick_cache::sync::Cache;

/// Devices and rooms that are remembered; the others are sent members again, which does no harm.
const ENTRIES_MAX: usize = 20_000;
/// Members remembered for one device in one room.
const MEMBERS_MAX: usize = 5_000;

type Key = (UserId, String, RoomId);
/// The member event sent, and the events position of the token that the answer gave.
type Members = HashMap<UserId, (EventNid, i64)>;

pub struct SentMembers {
    cache: Cache<Key, Arc<Mutex<Members>>>,
}

impl Default for SentMembers {
    fn default() -> Self {
        Self {
            cache: Cache::new(ENTRIES_MAX),
        }
    }
}

impl SentMembers {
    /// Whether the device has this membership. It has it only when it came back with a token of an answer
    /// that held it: an answer may have been lost on the way.
    pub fn has(&self, key: &Key, member: &UserId, event: EventNid, since: i64) -> bool {
        let Some(members) = self.cache.get(key) else {
            return false;
        };
        let members = members.lock().unwrap_or_else(PoisonError::into_inner);
        members
            .get(member)
            .is_some_and(|(sent, at)| *sent == event && *at <= since)
    }

    pub fn record(&self, key: Key, sent: Vec<(UserId, EventNid)>, at: i64) {
        let Ok(members) = self
            .cache
            .get_or_insert_with(&key, || Ok::<_, ()>(Arc::default()))
        else {
            return;
        };
        let mut members = members.lock().unwrap_or_else(PoisonError::into_inner);
        if members.len() + sent.len() > MEMBERS_MAX {
            members.clear();
        }
        for (user, event) in sent {
            let entry = members.entry(user).or_insert((event, at));
            // The same membership in an earlier answer counts from there.
            if entry.0 != event || entry.1 > at {
                *entry = (event, at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_counts_as_sent_once_the_token_came_back() {
        let sent = SentMembers::default();
        let user = UserId::parse("@a:x").unwrap();
        let key = (user.clone(), "D".to_owned(), RoomId::parse("!r:x").unwrap());
        sent.record(key.clone(), vec![(user.clone(), EventNid(1))], 10);
        assert!(
            !sent.has(&key, &user, EventNid(1), 9),
            "the answer was lost"
        );
        assert!(sent.has(&key, &user, EventNid(1), 10));
        assert!(
            !sent.has(&key, &user, EventNid(2), 10),
            "the membership changed"
        );
    }
}
