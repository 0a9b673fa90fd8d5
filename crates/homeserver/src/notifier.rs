//! Wakes whoever waits for something to happen: long-polling syncs, waiters for a full room, senders.
//!
//! A wake-up says only *look again*. What happened is read from the store, so a lost or double wake-up
//! costs a look and never an event. Subscribe first, then look, then wait.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use protocol::id::{RoomId, ServerName, UserId};
use tokio::sync::Notify;

/// What can be waited for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Topic {
    /// Anything that this user's /sync could show, outside of rooms.
    User(UserId),
    /// Anything in this room: events, receipts, typing, the room becoming full.
    Room(RoomId),
    /// The outbox of this destination.
    Destination(ServerName),
    /// Some join job moved.
    Jobs,
    /// Events of any room: for who follows all of them.
    Events,
    /// The content of this media id of ours.
    Media(String),
}

#[derive(Clone, Default)]
pub struct Notifier {
    topics: Arc<Mutex<HashMap<Topic, Arc<Bell>>>>,
}

impl Notifier {
    /// A listener that hears every later [`Notifier::wake`] of the topic.
    pub fn subscribe(&self, topic: Topic) -> Listener {
        let mut topics = self.topics.lock().unwrap_or_else(PoisonError::into_inner);
        let bell = Arc::clone(topics.entry(topic).or_default());
        let heard = bell.rung.load(Ordering::Acquire);
        Listener { bell, heard }
    }

    pub fn wake(&self, topic: &Topic) {
        let mut topics = self.topics.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bell) = topics.get(topic) {
            // Listeners come only under the lock, and this is the one reference that is none of theirs.
            if Arc::strong_count(bell) == 1 {
                topics.remove(topic);
            } else {
                bell.rung.fetch_add(1, Ordering::AcqRel);
                bell.notify.notify_waiters();
            }
        }
    }

    pub fn wake_user(&self, user: &UserId) {
        self.wake(&Topic::User(user.clone()));
    }

    pub fn wake_room(&self, room: &RoomId) {
        self.wake(&Topic::Room(room.clone()));
    }
}

/// Wakes its listeners in the order in which they began to wait (a `watch` channel shuffles them).
#[derive(Default)]
struct Bell {
    rung: AtomicU64,
    notify: Notify,
}

/// Hears one topic.
pub struct Listener {
    bell: Arc<Bell>,
    heard: u64,
}

impl Listener {
    /// Returns when the topic was woken since the last call.
    pub async fn changed(&mut self) {
        loop {
            // It counts from here on, though nobody waits for it yet.
            let notified = self.bell.notify.notified();
            let rung = self.bell.rung.load(Ordering::Acquire);
            if rung != self.heard {
                self.heard = rung;
                return;
            }
            notified.await;
        }
    }
}

/// Several topics at once.
pub struct Wakeups {
    listeners: Vec<Listener>,
}

impl Wakeups {
    pub fn new(notifier: &Notifier, topics: impl IntoIterator<Item = Topic>) -> Self {
        Self {
            listeners: topics
                .into_iter()
                .map(|topic| notifier.subscribe(topic))
                .collect(),
        }
    }

    /// Returns when any of the topics was woken since the last call. Never, without topics.
    pub async fn next(&mut self) {
        if self.listeners.is_empty() {
            std::future::pending::<()>().await;
        }
        let listeners = self.listeners.iter_mut();
        let waits = listeners.map(|listener| Box::pin(listener.changed()));
        let _ = futures::future::select_all(waits).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_wake_between_look_and_wait_is_not_lost() {
        let notifier = Notifier::default();
        let user = UserId::parse("@a:b").expect("valid");
        let mut wakeups = Wakeups::new(&notifier, [Topic::User(user.clone()), Topic::Jobs]);
        notifier.wake_user(&user);
        wakeups.next().await;
    }
}
