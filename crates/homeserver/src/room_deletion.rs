//! What an administrator does about a whole room: everybody out, block it, delete it (joins.md P-69).
//!
//! The paths and bodies are those of Synapse's admin API, which existing tools speak.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use protocol::id::{RoomAlias, RoomId, UserId};
use room::send::Draft;
use serde::{Deserialize, Serialize};
use serde_json::json;
use storage::{blocked, directory, purge, rooms, sync_reads};

use crate::Homeserver;
use crate::create_room::{CreateRoom, Preset, create_room};
use crate::error::{MatrixError, Result};
use crate::rooms::JoinWish;

/// Deletions that are remembered after their end.
const REMEMBERED_MAX: usize = 1000;
const ROOM_NAME: &str = "Content Violation Notification";
const MESSAGE: &str = "Sharing illegal content on this server is not permitted and rooms in violation will be blocked.";

/// How a room is to be deleted.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct Deletion {
    /// Who makes a room to which the users are moved; without one they are only put out.
    pub new_room_user_id: Option<UserId>,
    pub room_name: Option<String>,
    pub message: Option<String>,
    pub block: bool,
    /// `false`: the room is emptied, but kept.
    pub purge: bool,
    /// Delete even if somebody could not be put out.
    pub force_purge: bool,
}

impl Default for Deletion {
    fn default() -> Self {
        Self {
            new_room_user_id: None,
            room_name: None,
            message: None,
            block: false,
            purge: true,
            force_purge: false,
        }
    }
}

/// What became of it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Deleted {
    pub kicked_users: Vec<UserId>,
    pub failed_to_kick_users: Vec<UserId>,
    pub local_aliases: Vec<RoomAlias>,
    pub new_room_id: Option<RoomId>,
}

/// A deletion that somebody asked for without waiting.
#[derive(Clone, Debug, Serialize)]
pub struct DeletionStatus {
    pub delete_id: String,
    pub room_id: RoomId,
    /// `active`, `complete` or `failed`.
    pub status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    pub shutdown_room: Deleted,
}

/// The deletions since the start, the oldest first.
#[derive(Default)]
pub struct Deletions(Mutex<VecDeque<DeletionStatus>>);

impl Deletions {
    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<DeletionStatus>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Homeserver {
    /// Puts all of our users out of a room, takes its aliases away, and forgets it. A resync that runs finds
    /// the room gone and ends; what the leaves owe to other servers is still sent.
    pub async fn delete_room(&self, room: &RoomId, by: &UserId, how: Deletion) -> Result<Deleted> {
        if how.block {
            self.block_room(room, by, true).await?;
        }
        let mut deleted = Deleted {
            local_aliases: self.aliases_of_room(room).await?,
            ..Deleted::default()
        };
        let users = self.users_in(room).await?;
        if let Some(creator) = &how.new_room_user_id {
            deleted.new_room_id = Some(self.make_refuge(creator, &how).await?);
        }
        for user in users {
            match self
                .put_out(room, &user, deleted.new_room_id.as_ref())
                .await
            {
                Ok(()) => deleted.kicked_users.push(user),
                Err(error) => {
                    tracing::warn!(%room, %user, %error, "a user could not be put out");
                    deleted.failed_to_kick_users.push(user);
                }
            }
        }
        self.move_aliases(room, deleted.new_room_id.as_ref())
            .await?;
        if how.purge {
            if !deleted.failed_to_kick_users.is_empty() && !how.force_purge {
                return Err(MatrixError::unknown(
                    "Not all users could be put out; force_purge deletes the room all the same",
                ));
            }
            self.purge_room(room).await?;
        }
        tracing::info!(%room, %by, purge = how.purge, block = how.block, users = deleted.kicked_users.len(), "a room was deleted");
        Ok(deleted)
    }

    /// Begins a deletion, and gives the id under which its status is found.
    pub fn begin_deletion(&self, room: RoomId, by: UserId, how: Deletion) -> Result<String> {
        let delete_id: String = std::iter::repeat_with(|| rand::random_range(b'a'..=b'z'))
            .take(16)
            .map(char::from)
            .collect();
        {
            let mut deletions = self.inner.deletions.lock();
            let active = |d: &DeletionStatus| d.room_id == room && d.status == "active";
            if deletions.iter().any(active) {
                return Err(MatrixError::unknown("This room is being deleted already"));
            }
            if deletions.len() == REMEMBERED_MAX {
                deletions.pop_front();
            }
            deletions.push_back(DeletionStatus {
                delete_id: delete_id.clone(),
                room_id: room.clone(),
                status: "active",
                error: None,
                shutdown_room: Deleted::default(),
            });
        }
        let (hs, id) = (self.clone(), delete_id.clone());
        self.spawn_until_stop("delete_room", async move {
            let ended = hs.delete_room(&room, &by, how).await;
            let mut deletions = hs.inner.deletions.lock();
            if let Some(status) = deletions.iter_mut().find(|d| d.delete_id == id) {
                match ended {
                    Ok(deleted) => {
                        status.status = "complete";
                        status.shutdown_room = deleted;
                    }
                    Err(error) => {
                        status.status = "failed";
                        status.error = Some(error.to_string());
                    }
                }
            }
        });
        Ok(delete_id)
    }

    pub fn deletion(&self, delete_id: &str) -> Option<DeletionStatus> {
        let deletions = self.inner.deletions.lock();
        deletions.iter().find(|d| d.delete_id == delete_id).cloned()
    }

    pub fn deletions_of(&self, room: &RoomId) -> Vec<DeletionStatus> {
        let deletions = self.inner.deletions.lock();
        deletions
            .iter()
            .filter(|d| d.room_id == *room)
            .cloned()
            .collect()
    }

    /// Nobody of ours gets into a blocked room.
    pub async fn block_room(&self, room: &RoomId, by: &UserId, blocked: bool) -> Result<()> {
        let (room, by) = (room.clone(), by.clone());
        self.store()
            .write(move |c| match blocked {
                true => blocked::block(c, &room, &by),
                false => blocked::unblock(c, &room),
            })
            .await?;
        Ok(())
    }

    /// Who blocked the room; `None` when it is open.
    pub async fn room_blocked_by(&self, room: &RoomId) -> Result<Option<UserId>> {
        let room = room.clone();
        let by = self.store().read(move |c| blocked::blocked_by(c, &room));
        Ok(by.await?)
    }

    async fn aliases_of_room(&self, room: &RoomId) -> Result<Vec<RoomAlias>> {
        let room = room.clone();
        let aliases = self.store().read(move |c| directory::aliases_of(c, &room));
        Ok(aliases.await?)
    }

    /// Our users that are in the room, or may come in.
    async fn users_in(&self, room: &RoomId) -> Result<Vec<UserId>> {
        let room = room.clone();
        let users = self.store().read(move |c| {
            let Some(row) = rooms::known(c, &room)? else {
                return Ok(None);
            };
            sync_reads::local_members(c, row.nid).map(Some)
        });
        users
            .await?
            .ok_or_else(|| MatrixError::not_found("This server does not know the room"))
    }

    async fn make_refuge(&self, creator: &UserId, how: &Deletion) -> Result<RoomId> {
        if !self.config().is_ours(creator) {
            return Err(MatrixError::invalid_param(
                "new_room_user_id is not a user of this server",
            ));
        }
        let request = CreateRoom {
            preset: Some(Preset::PublicChat),
            name: Some(
                how.room_name
                    .clone()
                    .unwrap_or_else(|| ROOM_NAME.to_owned()),
            ),
            power_level_content_override: json!({ "users_default": -10 }).as_object().cloned(),
            ..CreateRoom::default()
        };
        let room = create_room(self, creator, request).await?;
        let text = how.message.as_deref().unwrap_or(MESSAGE);
        let content = json!({ "msgtype": "m.text", "body": text });
        let draft = Draft::message(creator.clone(), "m.room.message", content);
        self.rooms().send_all(vec![draft], &room).await?;
        Ok(room)
    }

    async fn put_out(&self, room: &RoomId, user: &UserId, refuge: Option<&RoomId>) -> Result<()> {
        self.rooms().leave(user, room, None).await?;
        if let Some(refuge) = refuge {
            let rooms = self.rooms();
            rooms
                .join(user, refuge.as_str(), JoinWish::default())
                .await?;
        }
        let (user, room) = (user.clone(), room.clone());
        self.store()
            .write(move |c| {
                let at = storage::streams::position(c, storage::streams::Stream::Events)?;
                sync_reads::forget(c, &user, &room, at)
            })
            .await?;
        Ok(())
    }

    async fn move_aliases(&self, room: &RoomId, refuge: Option<&RoomId>) -> Result<()> {
        let (room, refuge) = (room.clone(), refuge.cloned());
        self.store()
            .write(move |c| match &refuge {
                Some(refuge) => directory::move_aliases(c, &room, refuge),
                None => {
                    for alias in directory::aliases_of(c, &room)? {
                        directory::remove_alias(c, &alias)?;
                    }
                    Ok(())
                }
            })
            .await?;
        Ok(())
    }

    async fn purge_room(&self, room: &RoomId) -> Result<()> {
        // Not under the feet of a join.
        let lock = self.handshakes().lock_of(room);
        let _no_join_meanwhile = lock.lock_owned().await;
        let purged = room.clone();
        self.store().write(move |c| purge::room(c, &purged)).await?;
        self.tasks().retry_resync(room);
        self.jobs().close_room(room, "cancelled");
        self.notifier().wake_room(room);
        Ok(())
    }
}
