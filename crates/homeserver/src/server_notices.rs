//! Words of the server's operators to one of its users, in a room of the two.
//!
//! The room is not recorded anywhere: it is the one that the notices user is in and the other user belongs to.
//! Nobody can log in as the notices user, so it is in no other rooms.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#server-notices>

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use protocol::id::{EventId, RoomId, UserId};
use room::send::Draft;
use room::write::Transaction;
use serde_json::{Map, Value, json};
use storage::{accounts, profiles, sync_reads};

use crate::Homeserver;
use crate::config::ServerNotices;
use crate::create_room::{self, CreateRoom};
use crate::error::{MatrixError, Result};
use crate::rooms::content_of;
use crate::send::state_draft;

/// By this clients know the room.
const TAG: &str = "m.server_notice";

/// What an administrator has to say to a user.
#[derive(Clone, Debug)]
pub struct Notice {
    pub to: UserId,
    pub kind: String,
    pub state_key: Option<String>,
    pub content: Map<String, Value>,
    /// Who asks, and the transaction id: the same again is sent once.
    pub once: Option<(String, String)>,
}

/// Notices under way: one at a time for each user, so that nobody gets two rooms.
#[derive(Default)]
pub struct Locks(Mutex<HashMap<UserId, Weak<tokio::sync::Mutex<()>>>>);

impl Locks {
    fn of(&self, user: &UserId) -> Arc<tokio::sync::Mutex<()>> {
        let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        locks.retain(|_, lock| lock.strong_count() > 0);
        let lock = locks.get(user).and_then(Weak::upgrade).unwrap_or_default();
        locks.insert(user.clone(), Arc::downgrade(&lock));
        lock
    }
}

impl Homeserver {
    /// Sends a notice, into the room of earlier ones if there is one. Who is not in it is invited.
    pub async fn send_server_notice(&self, notice: Notice) -> Result<EventId> {
        let Some(settings) = &self.config().server_notices else {
            return Err(MatrixError::unknown(
                "Server notices are not enabled on this server",
            ));
        };
        if !self.config().is_ours(&notice.to) || notice.to == settings.user {
            return Err(MatrixError::invalid_param(
                "Server notices can only be sent to users of this server",
            ));
        }
        if !self.user_exists(&notice.to).await? {
            return Err(MatrixError::not_found("There is no such user"));
        }
        let lock = self.inner.notices.of(&notice.to);
        let _one_at_a_time = lock.lock().await;
        let room = match self.notices_room(&settings.user, &notice.to).await? {
            Some(room) => room,
            None => self.make_notices_room(settings, &notice.to).await?,
        };
        self.tag_notices_room(&notice.to, &room).await?;
        if let Some((device, txn_id)) = &notice.once
            && let Some(event) =
                crate::send::sent_before(self, &room, &settings.user, device, txn_id).await?
        {
            return Ok(event);
        }
        let drafts = self.notice_drafts(settings, &room, notice).await?;
        let sent = self.rooms().send_all(drafts, &room).await?;
        sent.events
            .into_iter()
            .next_back()
            .map(|event| event.event_id)
            .ok_or_else(|| MatrixError::internal("Nothing was sent"))
    }

    /// Whether a user's invite to this room is one that cannot be refused.
    pub(crate) async fn is_notices_invite(&self, user: &UserId, room: &RoomId) -> Result<bool> {
        let Some(settings) = &self.config().server_notices else {
            return Ok(false);
        };
        let invited = self.rooms().membership(room, user).await?.as_deref() == Some("invite");
        Ok(invited && self.notices_room(&settings.user, user).await?.as_ref() == Some(room))
    }

    /// Whether this is the user that sends notices, whom nobody can invite.
    pub(crate) fn is_notices_user(&self, user: &UserId) -> bool {
        let settings = &self.config().server_notices;
        settings
            .as_ref()
            .is_some_and(|notices| notices.user == *user)
    }

    /// The account that notices come from, with the profile of the settings. Its rooms see a changed profile
    /// with the next notice.
    pub(crate) async fn create_notices_user(&self) -> Result<()> {
        let Some(settings) = self.config().server_notices.clone() else {
            return Ok(());
        };
        let now_ms = self.clock().unix_ms();
        let free = self
            .store()
            .write(move |c| {
                let new = accounts::User {
                    created_ms: now_ms,
                    ..accounts::User::default()
                };
                if !accounts::create(c, &settings.user, &new)? && !is_unused(c, &settings.user)? {
                    return Ok(false);
                }
                let fields = [
                    ("displayname", &settings.display_name),
                    ("avatar_url", &settings.avatar_url),
                ];
                for (name, value) in fields {
                    match value {
                        Some(value) => {
                            let value = Value::from(value.as_str()).to_string();
                            profiles::set(c, &settings.user, name, &value)?;
                        }
                        None => profiles::remove(c, &settings.user, name)?,
                    }
                }
                Ok(true)
            })
            .await?;
        match free {
            true => Ok(()),
            false => Err(MatrixError::user_in_use(
                "server_notices.localpart names an account that somebody uses",
            )),
        }
    }

    async fn notices_room(&self, sender: &UserId, user: &UserId) -> Result<Option<RoomId>> {
        let (sender, user) = (sender.clone(), user.clone());
        Ok(self
            .store()
            .read(move |c| sync_reads::room_with(c, &sender, &user))
            .await?)
    }

    /// Only the notices user can say anything in it, and it never leaves this server.
    async fn make_notices_room(&self, settings: &ServerNotices, user: &UserId) -> Result<RoomId> {
        let Value::Object(levels) = json!({
            "events": {},
            "events_default": 100,
            "state_default": 100,
            "invite": 100,
            "kick": 100,
            "ban": 100,
            "redact": 100,
        }) else {
            return Err(MatrixError::internal("power levels are an object"));
        };
        let request = CreateRoom {
            name: settings.room_name.clone(),
            topic: settings.room_topic.clone(),
            creation_content: Some(Map::from_iter([("m.federate".to_owned(), false.into())])),
            power_level_content_override: Some(levels),
            ..CreateRoom::default()
        };
        let member = self.rooms().member(user, None).await?;
        // In one commit with the room, which would not be found again without it.
        let invite = state_draft(
            settings.user.clone(),
            "m.room.member",
            user.as_str(),
            content_of("invite", &member),
        );
        create_room::create_with(self, &settings.user, &request, vec![invite]).await
    }

    async fn tag_notices_room(&self, user: &UserId, room: &RoomId) -> Result<()> {
        if self.tags(user, room).await?.contains_key(TAG) {
            return Ok(());
        }
        self.set_tag(user, room, TAG, Some(Map::new())).await
    }

    /// The notice, after what has changed since the last one: the settings' names, and who is in the room.
    async fn notice_drafts(
        &self,
        settings: &ServerNotices,
        room: &RoomId,
        notice: Notice,
    ) -> Result<Vec<Draft>> {
        let state = |kind: &str, state_key: &str, content: Value| {
            Draft::state(settings.user.clone(), kind, state_key, content)
        };
        let rooms = self.rooms();
        let own = content_of("join", &rooms.member(&settings.user, None).await?);
        let mut drafts = vec![state("m.room.member", settings.user.as_str(), own)];
        if let Some(name) = &settings.room_name {
            drafts.push(state("m.room.name", "", json!({ "name": name })));
        }
        if let Some(topic) = &settings.room_topic {
            drafts.push(state("m.room.topic", "", create_room::topic_content(topic)));
        }
        let membership = rooms.membership(room, &notice.to).await?;
        if !matches!(membership.as_deref(), Some("join" | "invite")) {
            let invite = content_of("invite", &rooms.member(&notice.to, None).await?);
            drafts.push(state("m.room.member", notice.to.as_str(), invite));
        }
        let words = Value::Object(notice.content);
        let mut draft = Draft::message(settings.user.clone(), &notice.kind, words);
        draft.state_key = notice.state_key;
        draft.transaction = notice.once.map(|(device, txn_id)| Transaction {
            user: settings.user.clone(),
            device,
            txn_id,
        });
        drafts.push(draft);
        Ok(drafts)
    }
}

/// Whether nobody can log in to this account.
fn is_unused(c: &mut dyn storage::Conn, user: &UserId) -> storage::Result<bool> {
    let account = accounts::get(c, user)?;
    Ok(account.is_some_and(|account| {
        let none = account.password_hash.is_none() && account.appservice.is_none();
        none && !account.guest && !account.deactivated
    }))
}
