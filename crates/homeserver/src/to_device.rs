//! To-device messages: from our users to anybody, and from other servers to our users.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#send-to-device-messaging>

use std::collections::BTreeMap;

use protocol::edu::{DirectToDevice, Edu};
use protocol::id::{ServerName, UserId};
use serde_json::{Value, json};
use storage::Conn;
use storage::to_device as table;

use crate::Homeserver;
use crate::accounts::random_token;
use crate::error::{MatrixError, Result};

/// Content by user and device; `*` is all devices of the user.
pub type Messages = BTreeMap<UserId, BTreeMap<String, Value>>;

/// Messages of one request, over all users and devices.
const MESSAGES_MAX: usize = 20_000;
const CONTENT_BYTES_MAX: usize = 65_536;

impl Homeserver {
    /// `PUT /sendToDevice/{eventType}/{txnId}`. Durable, here and in the outboxes, when it returns; the same
    /// transaction of the same device is carried out once.
    pub async fn send_to_device(
        &self,
        sender: &UserId,
        device: Option<&str>,
        kind: &str,
        txn_id: &str,
        messages: Messages,
    ) -> Result<()> {
        if messages.values().map(BTreeMap::len).sum::<usize>() > MESSAGES_MAX {
            return Err(MatrixError::too_large("Too many messages at once"));
        }
        for content in messages.values().flat_map(BTreeMap::values) {
            if !content.is_object() {
                return Err(MatrixError::bad_json(
                    "The content of a message is an object",
                ));
            }
            if content.to_string().len() > CONTENT_BYTES_MAX {
                return Err(MatrixError::too_large("A message is too large"));
            }
        }
        let (ours, theirs): (Messages, Messages) = messages
            .into_iter()
            .partition(|(user, _)| self.config().is_ours(user));
        let edus = edus(sender, kind, theirs);
        let servers: Vec<ServerName> = edus.iter().map(|(server, _)| server.clone()).collect();
        let requester = format!("{sender}|{}", device.unwrap_or_default());
        let message_id = format!("{kind}|{txn_id}");
        let now_ms = self.clock().unix_ms();
        let (from, kind) = (sender.clone(), kind.to_owned());
        let reached = self
            .store()
            .write(move |c| {
                if !table::first_time(c, &requester, &message_id, now_ms)? {
                    return Ok(None);
                }
                for (server, edu) in &edus {
                    storage::queues::enqueue_edu(c, edu, std::slice::from_ref(server))?;
                }
                deliver(c, &from, &kind, &ours).map(Some)
            })
            .await?;
        let Some(reached) = reached else {
            return Ok(());
        };
        self.outgoing().start(&servers);
        for user in &reached {
            self.notifier().wake_user(user);
        }
        Ok(())
    }

    /// An `m.direct_to_device` from the sender's own server (P-64).
    pub async fn on_direct_to_device(
        &self,
        origin: &ServerName,
        edu: DirectToDevice,
    ) -> Result<()> {
        if edu.sender.server_str() != origin.as_str() {
            tracing::debug!(%origin, sender = %edu.sender, "a to-device message of another server's user");
            return Ok(());
        }
        let DirectToDevice {
            sender,
            kind,
            message_id,
            mut messages,
        } = edu;
        messages.retain(|user, _| self.config().is_ours(user));
        let (origin, now_ms) = (origin.clone(), self.clock().unix_ms());
        let reached = self
            .store()
            .write(move |c| {
                if !table::first_time(c, origin.as_str(), &message_id, now_ms)? {
                    return Ok(Vec::new());
                }
                deliver(c, &sender, &kind, &messages)
            })
            .await?;
        for user in &reached {
            self.notifier().wake_user(user);
        }
        Ok(())
    }
}

/// Puts messages into the inboxes of devices that exist; whose inboxes they were.
fn deliver(
    c: &mut dyn Conn,
    sender: &UserId,
    kind: &str,
    messages: &Messages,
) -> storage::Result<Vec<UserId>> {
    let mut reached = Vec::new();
    for (user, contents) in messages {
        let devices: Vec<String> = storage::devices::list(c, user)?
            .into_iter()
            .map(|device| device.device_id)
            .collect();
        for device in &devices {
            // A message to the very device wins over one to all.
            let Some(content) = contents.get(device).or_else(|| contents.get("*")) else {
                continue;
            };
            let message = json!({ "type": kind, "sender": sender, "content": content }).to_string();
            table::put(c, user, device, &message)?;
        }
        reached.push(user.clone());
    }
    Ok(reached)
}

/// One EDU for each server.
fn edus(sender: &UserId, kind: &str, messages: Messages) -> Vec<(ServerName, String)> {
    let mut by_server: BTreeMap<ServerName, Messages> = BTreeMap::new();
    for (user, devices) in messages {
        by_server
            .entry(user.server_name())
            .or_default()
            .insert(user, devices);
    }
    by_server
        .into_iter()
        .map(|(server, messages)| {
            let edu = Edu::DirectToDevice(DirectToDevice {
                sender: sender.clone(),
                kind: kind.to_owned(),
                message_id: random_token(),
                messages,
            });
            (server, edu.to_value().to_string())
        })
        .collect()
}
