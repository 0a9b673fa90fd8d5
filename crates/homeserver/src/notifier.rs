//! Wakes whoever waits for something to happen: long-polling syncs, waiters for a full room, senders.
//!
//! A wake-up says only *look again*. What happened is read from the store, so a lost or double wake-up
//! costs a look and never an event. Subscribe first, then look, then wait.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use protocol::id::{RoomId, ServerName, UserId};
use tokio::sync::watch;

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
    topics: Arc<Mutex<HashMap<Topic, watch::Sender<u64>>>>,
}

impl Notifier {
    /// A receiver that changes at every later [`Notifier::wake`] of the topic.
    pub fn subscribe(&self, topic: Topic) -> watch::Receiver<u64> {
        let mut topics = self.topics.lock().unwrap_or_else(PoisonError::into_inner);
        topics
            .entry(topic)
            .or_insert_with(|| watch::channel(0).0)
            .subscribe()
    }

    pub fn wake(&self, topic: &Topic) {
        let mut topics = self.topics.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sender) = topics.get(topic) {
            if sender.receiver_count() == 0 {
                topics.remove(topic);
            } else {
                sender.send_modify(|count| *count += 1);
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

/// Several topics at once.
pub struct Wakeups {
    receivers: Vec<watch::Receiver<u64>>,
}

impl Wakeups {
    pub fn new(notifier: &Notifier, topics: impl IntoIterator<Item = Topic>) -> Self {
        Self {
            receivers: topics
                .into_iter()
                .map(|topic| notifier.subscribe(topic))
                .collect(),
        }
    }

    /// Returns when any of the topics was woken since the last call. Never, without topics.
    pub async fn next(&mut self) {
        if self.receivers.is_empty() {
            std::future::pending::<()>().await;
        }
        let waits = self
            .receivers
            .iter_mut()
            .map(|receiver| Box::pin(receiver.changed()));
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
