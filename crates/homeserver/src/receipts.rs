//! Read receipts and the fully-read marker.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#receipts>

use protocol::id::{EventId, RoomId, UserId};
use serde_json::{Map, Value, json};
use storage::receipts::Receipt;

use crate::Homeserver;
use crate::error::{MatrixError, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    Read,
    ReadPrivate,
    FullyRead,
}

/// A local user has read up to an event (C-6: at once, also in a partial room).
pub async fn set(
    homeserver: &Homeserver,
    user: &UserId,
    room: &RoomId,
    mark: Mark,
    event: &EventId,
    thread: Option<String>,
) -> Result<()> {
    if thread.as_deref() == Some("") {
        return Err(MatrixError::invalid_param("thread_id may not be empty"));
    }
    if thread.is_some() && mark == Mark::FullyRead {
        return Err(MatrixError::invalid_param(
            "The fully-read marker has no thread",
        ));
    }
    if !crate::membership::is_joined(homeserver, room, user).await? {
        return Err(MatrixError::forbidden("You are not in this room"));
    }
    let kind = match mark {
        Mark::FullyRead => {
            let content = json!({ "event_id": event });
            return homeserver
                .write_account_data(user, Some(room), "m.fully_read", content.to_string())
                .await;
        }
        Mark::Read => "m.read",
        Mark::ReadPrivate => "m.read.private",
    };
    homeserver.tasks().is_wanted(room);
    let receipt = Receipt {
        room: room.clone(),
        user: user.clone(),
        kind: kind.to_owned(),
        thread,
        event: event.to_string(),
        ts: homeserver.clock().unix_ms(),
    };
    store(homeserver, receipt.clone()).await?;
    if receipt.thread.is_none() {
        homeserver.forget_pushes(user, room, event).await?;
    }
    if mark == Mark::Read {
        let content = json!({ room.as_str(): { "m.read": { user.as_str(): {
            "data": data(&receipt), "event_ids": [event],
        }}}});
        homeserver
            .outgoing()
            .edu_to_room(room, "m.receipt", content)
            .await;
    }
    Ok(())
}

/// Takes a receipt of another server's user (P-63: the event need not be known). The caller has checked
/// that the user is of the origin, and that the origin is in the room.
pub async fn take_remote(homeserver: &Homeserver, receipt: protocol::edu::Receipt) -> Result<()> {
    let receipt = Receipt {
        room: receipt.room_id,
        user: receipt.user_id,
        kind: receipt.kind,
        thread: receipt.thread_id,
        event: receipt.event_id,
        ts: receipt.ts.unwrap_or(0),
    };
    store(homeserver, receipt).await
}

async fn store(homeserver: &Homeserver, receipt: Receipt) -> Result<()> {
    let room = receipt.room.clone();
    homeserver
        .store()
        .write(move |c| storage::receipts::put(c, &receipt))
        .await?;
    homeserver.notifier().wake_room(&room);
    Ok(())
}

fn data(receipt: &Receipt) -> Value {
    let mut data = json!({ "ts": receipt.ts });
    if let Some(thread) = &receipt.thread {
        data["thread_id"] = Value::from(thread.as_str());
    }
    data
}

/// The `m.receipt` event that shows these to a user; others' private receipts are left out.
///
/// One user's threaded and unthreaded receipt for the same event cannot both be shown: the unthreaded one
/// is, since it says more (MSC4102).
pub fn client_event(receipts: &[Receipt], reader: &UserId) -> Option<Value> {
    let mut content = Map::new();
    for receipt in receipts {
        if receipt.kind == "m.read.private" && receipt.user != *reader {
            continue;
        }
        let users = content
            .entry(receipt.event.clone())
            .or_insert_with(|| json!({}))
            .as_object_mut()?
            .entry(receipt.kind.clone())
            .or_insert_with(|| json!({}))
            .as_object_mut()?;
        let unthreaded = users
            .get(receipt.user.as_str())
            .is_some_and(|data| data.get("thread_id").is_none());
        if !unthreaded {
            users.insert(receipt.user.to_string(), data(receipt));
        }
    }
    (!content.is_empty()).then(|| json!({ "type": "m.receipt", "content": content }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receipt(user: &str, kind: &str, thread: Option<&str>) -> Receipt {
        Receipt {
            room: RoomId::parse("!r:x").unwrap(),
            user: UserId::parse(user).unwrap(),
            kind: kind.to_owned(),
            thread: thread.map(str::to_owned),
            event: "$e".to_owned(),
            ts: 1,
        }
    }

    #[test]
    fn an_unthreaded_receipt_hides_the_threaded_one_of_the_same_event() {
        let reader = UserId::parse("@me:x").unwrap();
        for order in [[None, Some("$t")], [Some("$t"), None]] {
            let receipts = order.map(|thread| receipt("@a:x", "m.read", thread));
            let event = client_event(&receipts, &reader).unwrap();
            assert_eq!(event["content"]["$e"]["m.read"]["@a:x"], json!({"ts": 1}));
        }
    }

    #[test]
    fn private_receipts_are_shown_to_their_owner_only() {
        let receipts = [receipt("@a:x", "m.read.private", None)];
        let show = |who: &str| client_event(&receipts, &UserId::parse(who).unwrap());
        assert!(show("@a:x").is_some());
        assert!(show("@b:x").is_none());
    }
}
