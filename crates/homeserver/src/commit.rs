//! One commit of a room, and who is to be woken by it.

use protocol::id::{RoomId, UserId};
use room::effect::Stale;
use room::write::{PartialChange, WriteSet};
use storage::apply::{self, Applied};

use crate::Homeserver;
use crate::error::Result;
use crate::notifier::Topic;

impl Homeserver {
    /// Applies a write set and wakes whom it concerns.
    pub(crate) async fn commit(
        &self,
        writes: WriteSet,
    ) -> storage::Result<std::result::Result<(), Stale>> {
        let room = writes.room.clone();
        let clears = matches!(writes.partial, PartialChange::Clear | PartialChange::Free);
        if let Err(error) = self.before_completion(&writes).await {
            tracing::error!(%room, %error, "device lists for servers that were left out are not sent");
        }
        let applied = match apply::apply(self.store(), writes).await? {
            Ok(applied) => applied,
            Err(stale) => return Ok(Err(stale)),
        };
        self.outgoing().start(&applied.destinations);
        if applied.fans_out {
            self.outgoing().spread();
        }
        for (user, _) in &applied.out_of_band {
            self.notifier().wake_user(user);
        }
        for change in applied.memberships.iter().filter(|change| change.local) {
            self.notifier().wake_user(&change.user);
        }
        if applied.events.iter().any(|placed| placed.position > 0) {
            self.count_then_wake(&room);
            self.notifier().wake(&Topic::Events);
        } else if moved(&applied) || clears {
            self.notifier().wake_room(&room);
        }
        self.mind_guests(&room, &applied);
        if applied.room.is_some() && !clears {
            self.introduce_devices(&room, &applied);
        }
        self.carry_over(&room, &applied);
        if applied.became_full.is_some() {
            self.tasks().room_is_full(&room, &applied);
        }
        Ok(Ok(()))
    }
}

impl Homeserver {
    /// Our users that came into a replacement of a room they know keep what they had there.
    fn carry_over(&self, room: &RoomId, applied: &Applied) {
        for change in &applied.memberships {
            let came =
                change.after.as_deref() == Some("join") && change.before.as_deref() != Some("join");
            if !change.local || !came {
                continue;
            }
            let (hs, room, user) = (self.clone(), room.clone(), change.user.clone());
            self.spawn_to_end("carry_over", async move {
                if let Err(error) = crate::upgrade::carry_over(&hs, &user, &room).await {
                    tracing::warn!(%room, %user, %error, "nothing was carried over from the old room");
                }
            });
        }
    }

    /// J-79: servers that meet one of our users for the first time hear of their devices. Not while the
    /// room is partial: the first real change brings those up to date.
    fn introduce_devices(&self, room: &RoomId, applied: &Applied) {
        let joined: Vec<_> = applied
            .memberships
            .iter()
            .filter(|change| change.local && change.after.as_deref() == Some("join"))
            .filter(|change| change.before.as_deref() != Some("join"))
            .map(|change| change.user.clone())
            .collect();
        if joined.is_empty() {
            return;
        }
        let (hs, room) = (self.clone(), room.clone());
        self.spawn_to_end("introduce_devices", async move {
            let full =
                matches!(hs.rooms().head(&room).await, Ok(Some(head)) if head.partial.is_none());
            if !full {
                return;
            }
            for user in joined {
                if let Err(error) = hs.introduce(&room, &user).await {
                    tracing::warn!(%room, %user, %error, "devices were not introduced");
                }
            }
        });
    }

    async fn introduce(&self, room: &RoomId, user: &UserId) -> Result<()> {
        let (asked, who) = (room.clone(), user.clone());
        let strangers = self
            .store()
            .read(move |c| match storage::rooms::by_id(c, &asked)? {
                Some(row) => storage::devices::newly_met(c, row.nid, &who),
                None => Ok(Vec::new()),
            })
            .await?;
        self.catch_up_device_lists(strangers, vec![user.clone()], 0)
            .await
    }
}

fn moved(applied: &Applied) -> bool {
    !applied.events.is_empty() || applied.state_position.is_some() || applied.became_full.is_some()
}
