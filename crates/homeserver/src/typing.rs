//! Who is typing: in memory, forgotten at a restart.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#typing-notifications>

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use protocol::id::{RoomId, UserId};
use serde_json::json;

use crate::Homeserver;
use crate::error::{MatrixError, Result};

/// A client that says for how long is believed up to this.
const LOCAL_MAX: Duration = Duration::from_secs(120);
/// A client that does not say types for this long.
const LOCAL_DEFAULT: Duration = Duration::from_secs(30);
/// How long a remote user types when nothing more is heard. Servers repeat theirs every 40 s or so.
const REMOTE: Duration = Duration::from_secs(60);
/// Typing users of one room beyond this many are not shown.
const USERS_MAX: usize = 200;

#[derive(Default)]
pub struct Typing {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    position: i64,
    rooms: HashMap<RoomId, Room>,
}

#[derive(Default)]
struct Room {
    changed_at: i64,
    /// Until when, by the monotonic clock.
    users: BTreeMap<UserId, Duration>,
}

impl Typing {
    /// The stream's position. Grows with every change.
    pub fn position(&self) -> i64 {
        self.lock().position
    }

    /// Who types in the room, if that changed after `since`.
    pub fn changed(&self, room: &RoomId, since: i64) -> Option<Vec<UserId>> {
        let inner = self.lock();
        let room = inner.rooms.get(room)?;
        (room.changed_at > since).then(|| room.users.keys().cloned().collect())
    }

    /// `true` when this changes who is typing.
    fn set(&self, room: &RoomId, user: &UserId, until: Option<Duration>) -> bool {
        let mut inner = self.lock();
        let next = inner.position + 1;
        let entry = inner.rooms.entry(room.clone()).or_default();
        let changed = match until {
            Some(until) => {
                if !entry.users.contains_key(user) && entry.users.len() >= USERS_MAX {
                    return false;
                }
                entry.users.insert(user.clone(), until).is_none()
            }
            None => entry.users.remove(user).is_some(),
        };
        if changed {
            entry.changed_at = next;
            inner.position = next;
        }
        changed
    }

    /// Drops whoever's time is over. `true` when that changes who is typing.
    fn expire(&self, room: &RoomId, now: Duration) -> bool {
        let mut inner = self.lock();
        let next = inner.position + 1;
        let Some(entry) = inner.rooms.get_mut(room) else {
            return false;
        };
        let before = entry.users.len();
        entry.users.retain(|_, until| *until > now);
        let changed = entry.users.len() != before;
        if changed {
            entry.changed_at = next;
            inner.position = next;
        }
        changed
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A local user begins or stops typing (C-6: at once, also in a partial room).
pub async fn set(
    homeserver: &Homeserver,
    room: &RoomId,
    user: &UserId,
    typing: bool,
    lasts: Option<Duration>,
) -> Result<()> {
    if !crate::membership::is_joined(homeserver, room, user).await? {
        return Err(MatrixError::forbidden("You are not in this room"));
    }
    let lasts = lasts.unwrap_or(LOCAL_DEFAULT).min(LOCAL_MAX);
    let changed = put(homeserver, room, user, typing.then_some(lasts));
    if changed {
        tell_servers(homeserver, room, user, typing).await;
    }
    Ok(())
}

/// A remote user begins or stops typing (P-62). The caller has checked that the user is of the origin.
pub fn set_remote(homeserver: &Homeserver, room: &RoomId, user: &UserId, typing: bool) {
    put(homeserver, room, user, typing.then_some(REMOTE));
}

fn put(homeserver: &Homeserver, room: &RoomId, user: &UserId, lasts: Option<Duration>) -> bool {
    let now = homeserver.clock().now().since_start;
    let changed = homeserver
        .typing()
        .set(room, user, lasts.map(|lasts| now + lasts));
    if changed {
        homeserver.notifier().wake_room(room);
    }
    if let Some(lasts) = lasts {
        let homeserver = homeserver.clone();
        let room = room.clone();
        tokio::spawn(async move {
            tokio::time::sleep(lasts + Duration::from_millis(1)).await;
            let now = homeserver.clock().now().since_start;
            if homeserver.typing().expire(&room, now) {
                homeserver.notifier().wake_room(&room);
            }
        });
    }
    changed
}

async fn tell_servers(homeserver: &Homeserver, room: &RoomId, user: &UserId, typing: bool) {
    let content = json!({ "room_id": room, "user_id": user, "typing": typing });
    homeserver
        .outgoing()
        .edu_to_room(room, "m.typing", content)
        .await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_moves_only_when_someone_begins_or_stops() {
        let typing = Typing::default();
        let room = RoomId::parse("!r:x").unwrap();
        let user = UserId::parse("@a:x").unwrap();
        assert!(typing.set(&room, &user, Some(Duration::from_secs(5))));
        assert!(!typing.set(&room, &user, Some(Duration::from_secs(9))));
        assert_eq!(typing.changed(&room, 0), Some(vec![user.clone()]));
        assert_eq!(typing.changed(&room, 1), None);
        assert!(
            !typing.expire(&room, Duration::from_secs(6)),
            "it was made longer"
        );
        assert!(typing.expire(&room, Duration::from_secs(9)));
        assert_eq!(typing.changed(&room, 1), Some(vec![]));
    }
}
