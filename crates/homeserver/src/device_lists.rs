//! Device lists: telling others of our users' devices, and keeping up with theirs.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#device-management>

use protocol::edu::{DeviceListUpdate, Edu, SigningKeyUpdate};
use protocol::id::{ServerName, UserId};
use serde_json::Value;
use storage::Conn;
use storage::devices as table;
use storage::e2ee::{self, RemoteDevice, RemoteList, Usage};

use crate::Homeserver;
use crate::device_keys::{self, local_keys};
use crate::error::Result;

/// Whom a change of a user's devices concerns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Audience {
    /// Other servers; what they are told is in their outbox already.
    pub servers: Vec<ServerName>,
    /// Our users who share a room.
    pub users: Vec<UserId>,
}

/// Records changes of a user's devices, for our syncs and for other servers (P-49, P-50): in the transaction
/// that makes the change, so that neither is without the other.
pub(crate) fn record(
    c: &mut dyn Conn,
    own: &ServerName,
    user: &UserId,
    devices: &[&str],
) -> storage::Result<Audience> {
    let audience = audience(c, own, user)?;
    for device in devices {
        let before = table::last_change(c, user)?;
        let position = table::changed(c, user, device)?;
        if !audience.servers.is_empty() {
            let edu = update(c, user, device, position, before)?;
            storage::queues::enqueue_edu(c, &edu.to_value().to_string(), &audience.servers)?;
        }
    }
    Ok(audience)
}

/// As [`record`], for the user's cross-signing keys.
pub(crate) fn record_signing_keys(
    c: &mut dyn Conn,
    own: &ServerName,
    user: &UserId,
) -> storage::Result<Audience> {
    let audience = audience(c, own, user)?;
    table::changed(c, user, "")?;
    if !audience.servers.is_empty() {
        let keys = local_keys(c, user, &[], None)?;
        let edu = Edu::SigningKeyUpdate(SigningKeyUpdate {
            user_id: user.clone(),
            master_key: keys.master,
            self_signing_key: keys.self_signing,
        });
        storage::queues::enqueue_edu(c, &edu.to_value().to_string(), &audience.servers)?;
    }
    Ok(audience)
}

fn audience(c: &mut dyn Conn, own: &ServerName, user: &UserId) -> storage::Result<Audience> {
    let mut servers = table::audience(c, user)?;
    servers.retain(|server| server != own);
    Ok(Audience {
        servers,
        users: table::local_sharing(c, user)?,
    })
}

fn update(
    c: &mut dyn Conn,
    user: &UserId,
    device: &str,
    position: i64,
    before: i64,
) -> storage::Result<Edu> {
    let found = device_keys::device_for_edu(c, user, device)?;
    let deleted = found.is_none();
    let (keys, device_display_name) = found.unwrap_or_default();
    Ok(Edu::DeviceListUpdate(DeviceListUpdate {
        user_id: user.clone(),
        device_id: device.to_owned(),
        stream_id: position,
        prev_id: (before > 0).then_some(before).into_iter().collect(),
        deleted,
        device_display_name,
        keys,
    }))
}

impl Homeserver {
    /// Wakes those whom a recorded change concerns.
    pub(crate) fn tell_device_lists(&self, user: &UserId, audience: &Audience) {
        self.outgoing().start(&audience.servers);
        self.notifier().wake_user(user);
        for other in &audience.users {
            self.notifier().wake_user(other);
        }
    }

    /// Servers that had no part in what these users of ours told of their devices are sent what changed
    /// since a position of the stream (P-51, P-52).
    pub(crate) async fn catch_up_device_lists(
        &self,
        servers: Vec<ServerName>,
        users: Vec<UserId>,
        since: i64,
    ) -> Result<()> {
        let own = &self.config().server_name;
        let servers: Vec<ServerName> = servers.into_iter().filter(|server| server != own).collect();
        if servers.is_empty() {
            return Ok(());
        }
        let to = servers.clone();
        self.store()
            .write(move |c| {
                for user in &users {
                    for (device, position) in table::changes_of(c, user, since)? {
                        if device.is_empty() {
                            continue;
                        }
                        // Without prev_id: they have seen none of the earlier ones.
                        let edu = update(c, user, &device, position, 0)?;
                        storage::queues::enqueue_edu(c, &edu.to_value().to_string(), &to)?;
                    }
                }
                Ok(())
            })
            .await?;
        self.outgoing().start(&servers);
        Ok(())
    }

    /// An `m.device_list_update` from the user's own server.
    pub async fn on_device_list_update(
        &self,
        origin: &ServerName,
        update: DeviceListUpdate,
    ) -> Result<()> {
        if update.user_id.server_str() != origin.as_str() {
            tracing::debug!(%origin, user = %update.user_id, "a device list update about a user of another server");
            return Ok(());
        }
        let user = update.user_id.clone();
        let users = self
            .store()
            .write(move |c| {
                if table::any_partial_room(c)? {
                    table::pend(c, &update.user_id)?;
                }
                let users = table::local_sharing(c, &update.user_id)?;
                if users.is_empty() {
                    return Ok(users);
                }
                if take(c, &update)? {
                    table::changed(c, &update.user_id, &update.device_id)?;
                }
                Ok(users)
            })
            .await?;
        self.wake_device_lists(&user, &users);
        Ok(())
    }

    /// An `m.signing_key_update` from the user's own server.
    pub async fn on_signing_key_update(
        &self,
        origin: &ServerName,
        update: SigningKeyUpdate,
    ) -> Result<()> {
        if update.user_id.server_str() != origin.as_str() {
            tracing::debug!(%origin, user = %update.user_id, "signing keys of a user of another server");
            return Ok(());
        }
        let user = update.user_id.clone();
        let users = self
            .store()
            .write(move |c| {
                let user = &update.user_id;
                if table::any_partial_room(c)? {
                    table::pend(c, user)?;
                }
                let users = table::local_sharing(c, user)?;
                if users.is_empty() {
                    return Ok(users);
                }
                if e2ee::remote_list(c, user)?.is_some() {
                    put_signing_keys(
                        c,
                        user,
                        update.master_key.as_ref(),
                        update.self_signing_key.as_ref(),
                    )?;
                }
                table::changed(c, user, "")?;
                Ok(users)
            })
            .await?;
        self.wake_device_lists(&user, &users);
        Ok(())
    }

    fn wake_device_lists(&self, user: &UserId, users: &[UserId]) {
        tracing::trace!(%user, concerned = users.len(), "the devices of a remote user changed");
        for other in users {
            self.notifier().wake_user(other);
        }
    }
}

/// Puts an update into the cached list, if there is one; `false` when it was there before. A gap makes the
/// list stale: it is fetched when somebody asks for it (P-61).
fn take(c: &mut dyn Conn, update: &DeviceListUpdate) -> storage::Result<bool> {
    let user = &update.user_id;
    let Some(list) = e2ee::remote_list(c, user)? else {
        return Ok(true);
    };
    if update.stream_id <= list.stream_id {
        return Ok(false);
    }
    let gapless = update
        .prev_id
        .iter()
        .all(|before| *before <= list.stream_id);
    if list.stale || !gapless {
        e2ee::mark_remote_list_stale(c, user)?;
        return Ok(true);
    }
    if update.deleted {
        e2ee::drop_remote_device(c, user, &update.device_id)?;
    } else {
        let keys = update
            .keys
            .as_ref()
            .filter(|keys| belongs_to(keys, user, &update.device_id));
        let device = RemoteDevice {
            device_id: update.device_id.clone(),
            display_name: update.device_display_name.clone(),
            keys: keys.map(Value::to_string),
        };
        e2ee::put_remote_device(c, user, &device)?;
    }
    e2ee::set_remote_list(
        c,
        user,
        &RemoteList {
            stream_id: update.stream_id,
            stale: false,
        },
    )?;
    Ok(true)
}

/// Whether identity keys name this user and device: a server could mix them up, or try to.
pub(crate) fn belongs_to(keys: &Value, user: &UserId, device: &str) -> bool {
    keys.get("user_id").and_then(Value::as_str) == Some(user.as_str())
        && keys.get("device_id").and_then(Value::as_str) == Some(device)
}

/// Stores a remote user's cross-signing keys, those that are this user's.
pub(crate) fn put_signing_keys(
    c: &mut dyn Conn,
    user: &UserId,
    master: Option<&Value>,
    self_signing: Option<&Value>,
) -> storage::Result<()> {
    for (usage, key) in [(Usage::Master, master), (Usage::SelfSigning, self_signing)] {
        let key =
            key.filter(|key| key.get("user_id").and_then(Value::as_str) == Some(user.as_str()));
        if let Some(key) = key {
            e2ee::put_cross_signing_key(c, user, usage, &key.to_string())?;
        }
    }
    Ok(())
}
