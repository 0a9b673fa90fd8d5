//! Presence: who is online, told to those who share a room.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#presence>

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use protocol::edu::{Edu, Presence as State, PresenceUpdate};
use protocol::id::{ServerName, UserId};
use serde_json::{Value, json};
use storage::presence::{self as table, Presence};
use storage::sync_reads;

use crate::Homeserver;
use crate::error::{MatrixError, Result};

/// A user whose clients have not asked for so long is offline.
const SILENCE: Duration = Duration::from_secs(30);
const SWEEP_EVERY: Duration = Duration::from_secs(5);
/// Activity within this time is the same activity, and no news.
const ACTIVE_MS: i64 = 60_000;
const STATUS_BYTES_MAX: usize = 1024;
/// Entries of one EDU that are looked at.
const UPDATES_MAX: usize = 500;

/// When each of our users was last heard of, since the start. Whoever is offline has no entry.
#[derive(Default)]
pub(crate) struct Watch(Mutex<HashMap<UserId, Duration>>);

impl Homeserver {
    /// `GET /presence/{userId}/status`
    pub async fn presence(&self, requester: &UserId, user: &UserId) -> Result<Value> {
        let (who, asker) = (user.clone(), requester.clone());
        let (shares, found) = self
            .store()
            .read(move |c| {
                let among = std::slice::from_ref(&who);
                let shares =
                    who == asker || !storage::sync_reads::sharing(c, &asker, among)?.is_empty();
                Ok((shares, table::get(c, &who)?))
            })
            .await?;
        if !shares {
            return Err(MatrixError::forbidden("You share no room with this user"));
        }
        let Some(found) = found else {
            return Ok(json!({ "presence": "offline" }));
        };
        let mut answer = json!({
            "presence": found.state,
            "last_active_ago": (self.clock().unix_ms() - found.last_active_ms).max(0),
            "currently_active": found.currently_active,
        });
        if let Some(status) = found.status_msg {
            answer["status_msg"] = status.into();
        }
        Ok(answer)
    }

    /// `PUT /presence/{userId}/status`
    pub async fn set_presence(
        &self,
        user: &UserId,
        state: &str,
        status_msg: Option<String>,
    ) -> Result<()> {
        check_state(state)?;
        if status_msg
            .as_ref()
            .is_some_and(|status| status.len() > STATUS_BYTES_MAX)
        {
            return Err(MatrixError::invalid_param("The status message is too long"));
        }
        self.heard_of(user, state);
        self.change_presence(user, state, Some(status_msg)).await
    }

    /// A client asks for news: its user is about, in the state that the request names.
    pub async fn presence_of_sync(&self, user: &UserId, state: Option<&str>) -> Result<()> {
        let state = state.unwrap_or("online");
        check_state(state)?;
        self.heard_of(user, state);
        self.change_presence(user, state, None).await
    }

    fn heard_of(&self, user: &UserId, state: &str) {
        let mut watch = self
            .inner
            .presence
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if state == "offline" {
            watch.remove(user);
        } else {
            watch.insert(user.clone(), self.clock().now().since_start);
        }
    }

    /// Stores the state and tells those whom it concerns, if it is news. `status_msg` is kept when `None`.
    async fn change_presence(
        &self,
        user: &UserId,
        state: &str,
        status_msg: Option<Option<String>>,
    ) -> Result<()> {
        if !self.config().presence {
            return Ok(());
        }
        let now_ms = self.clock().unix_ms();
        let who = user.clone();
        let before = self.store().read(move |c| table::get(c, &who)).await?;
        let kept = before.as_ref().and_then(|before| before.status_msg.clone());
        let after = Presence {
            user: user.clone(),
            state: state.to_owned(),
            status_msg: status_msg.unwrap_or(kept),
            last_active_ms: match &before {
                Some(before) if state != "online" => before.last_active_ms,
                _ => now_ms,
            },
            currently_active: state == "online",
        };
        let news = before.is_none_or(|before| {
            before.state != after.state
                || before.status_msg != after.status_msg
                || after.last_active_ms - before.last_active_ms > ACTIVE_MS
        });
        if !news {
            return Ok(());
        }
        let edu = Edu::Presence(vec![update(&after, now_ms)]);
        let (servers, users) = self
            .store()
            .write(move |c| {
                table::set(c, &after)?;
                let servers = storage::devices::audience(c, &after.user)?;
                Ok((servers, storage::devices::local_sharing(c, &after.user)?))
            })
            .await?;
        self.notifier().wake_user(user);
        for other in &users {
            self.notifier().wake_user(other);
        }
        let content = edu.to_value()["content"].take();
        self.outgoing().passing(&servers, edu.edu_type(), content);
        Ok(())
    }

    /// An `m.presence` from the users' own server (P-65).
    pub async fn on_presence(
        &self,
        origin: &ServerName,
        updates: Vec<PresenceUpdate>,
    ) -> Result<()> {
        if !self.config().presence {
            return Ok(());
        }
        let now_ms = self.clock().unix_ms();
        let theirs: Vec<Presence> = updates
            .into_iter()
            .take(UPDATES_MAX)
            .filter(|update| update.user_id.server_str() == origin.as_str())
            .map(|update| Presence {
                state: state_name(update.presence).to_owned(),
                status_msg: update
                    .status_msg
                    .filter(|status| status.len() <= STATUS_BYTES_MAX),
                last_active_ms: now_ms - update.last_active_ago.unwrap_or(0).clamp(0, now_ms),
                currently_active: update.currently_active.unwrap_or(false),
                user: update.user_id,
            })
            .collect();
        let origin = origin.clone();
        let users = self
            .store()
            .write(move |c| {
                let mut concerned = Vec::new();
                // P-65: who of them is in a partial room is not known so far, but any may be.
                let in_partial_rooms = sync_reads::in_partial_rooms_with(c, &origin)?;
                for presence in &theirs {
                    let mut users = storage::devices::local_sharing(c, &presence.user)?;
                    users.extend(in_partial_rooms.iter().cloned());
                    if !users.is_empty() {
                        table::set(c, presence)?;
                        concerned.extend(users);
                    }
                }
                concerned.sort();
                concerned.dedup();
                Ok(concerned)
            })
            .await?;
        for user in &users {
            self.notifier().wake_user(user);
        }
        Ok(())
    }

    /// Takes silent users offline, until the server stops.
    pub(crate) fn watch_presence(&self) {
        if !self.config().presence {
            return;
        }
        let hs = self.clone();
        self.spawn_until_stop("presence", async move {
            loop {
                tokio::time::sleep(SWEEP_EVERY).await;
                for user in hs.silent_users() {
                    if let Err(error) = hs.change_presence(&user, "offline", None).await {
                        tracing::warn!(%user, %error, "a user could not be taken offline");
                    }
                }
            }
        });
    }

    fn silent_users(&self) -> Vec<UserId> {
        let now = self.clock().now().since_start;
        let mut watch = self
            .inner
            .presence
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let silent = |heard: &Duration| now.saturating_sub(*heard) > SILENCE;
        let users: Vec<UserId> = watch
            .iter()
            .filter(|(_, heard)| silent(heard))
            .map(|(user, _)| user.clone())
            .collect();
        for user in &users {
            watch.remove(user);
        }
        users
    }
}

fn check_state(state: &str) -> Result<()> {
    if ["online", "unavailable", "offline"].contains(&state) {
        return Ok(());
    }
    Err(MatrixError::invalid_param(
        "Presence is online, unavailable or offline",
    ))
}

fn state_name(state: State) -> &'static str {
    match state {
        State::Online => "online",
        State::Unavailable => "unavailable",
        State::Offline => "offline",
    }
}

fn update(presence: &Presence, now_ms: i64) -> PresenceUpdate {
    PresenceUpdate {
        user_id: presence.user.clone(),
        presence: match presence.state.as_str() {
            "online" => State::Online,
            "unavailable" => State::Unavailable,
            _ => State::Offline,
        },
        status_msg: presence.status_msg.clone(),
        last_active_ago: Some((now_ms - presence.last_active_ms).max(0)),
        currently_active: Some(presence.currently_active),
    }
}
