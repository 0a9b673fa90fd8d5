//! Events that a client sends: messages, state, redactions.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#sending-events-to-a-room>

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use protocol::id::{EventId, RoomAlias, RoomId, UserId};
use serde_json::{Map, Value};
use storage::timeline;

use crate::Homeserver;
use crate::error::{MatrixError, Result};
use crate::membership;
use crate::room_view::{Reader, RoomView};
use crate::rooms::{Draft, JoinWish};

/// Who sends.
#[derive(Clone, Debug)]
pub struct Sender {
    pub user: UserId,
    pub device: Option<String>,
    /// Set by application services only.
    pub origin_server_ts: Option<i64>,
}

/// A state event to be, sent by nobody's request in particular.
pub fn state_draft(sender: UserId, kind: &str, state_key: &str, content: Value) -> Draft {
    Draft {
        sender,
        kind: kind.into(),
        state_key: Some(state_key.into()),
        content,
        redacts: None,
        txn: None,
        origin_server_ts: None,
    }
}

pub async fn message(
    homeserver: &Homeserver,
    sender: Sender,
    room: &RoomId,
    kind: String,
    txn_id: String,
    content: Map<String, Value>,
) -> Result<EventId> {
    if kind == "m.room.redaction" {
        let redacts = content.get("redacts").and_then(Value::as_str);
        let redacts = redacts.and_then(|id| EventId::parse(id).ok());
        return once(
            homeserver,
            sender,
            room,
            txn_id,
            kind,
            Value::Object(content),
            redacts,
        )
        .await;
    }
    if kind == "m.room.message"
        || kind == "m.room.encrypted"
        || content.contains_key("m.relates_to")
    {
        check_relation(homeserver, &sender, room, &content).await?;
    }
    once(
        homeserver,
        sender,
        room,
        txn_id,
        kind,
        Value::Object(content),
        None,
    )
    .await
}

pub async fn redact(
    homeserver: &Homeserver,
    sender: Sender,
    room: &RoomId,
    target: EventId,
    txn_id: String,
    reason: Option<String>,
) -> Result<EventId> {
    let mut content = Map::new();
    if let Some(reason) = reason {
        content.insert("reason".to_owned(), Value::from(reason));
    }
    let kind = "m.room.redaction".to_owned();
    once(
        homeserver,
        sender,
        room,
        txn_id,
        kind,
        Value::Object(content),
        Some(target),
    )
    .await
}

/// The transaction ids whose requests are being worked on, each with its lock.
#[derive(Default)]
pub struct Transactions {
    running: Mutex<HashMap<(UserId, String, RoomId, String), Weak<tokio::sync::Mutex<()>>>>,
}

/// Locks of requests that ended are swept out when there are this many.
const SWEEP_AT: usize = 1_000;

impl Transactions {
    fn lock(&self, key: (UserId, String, RoomId, String)) -> Arc<tokio::sync::Mutex<()>> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if running.len() >= SWEEP_AT {
            running.retain(|_, lock| lock.strong_count() > 0);
        }
        if let Some(lock) = running.get(&key).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::default();
        running.insert(key, Arc::downgrade(&lock));
        lock
    }
}

/// Sends what this device has not sent already under this transaction id.
async fn once(
    homeserver: &Homeserver,
    sender: Sender,
    room: &RoomId,
    txn_id: String,
    kind: String,
    content: Value,
    redacts: Option<EventId>,
) -> Result<EventId> {
    let device = sender.device.clone().unwrap_or_default();
    let key = (
        sender.user.clone(),
        device.clone(),
        room.clone(),
        txn_id.clone(),
    );
    let lock = homeserver.transactions().lock(key);
    let _one_at_a_time = lock.lock().await;
    if let Some(event) = sent_before(homeserver, room, &sender.user, &device, &txn_id).await? {
        return Ok(event);
    }
    let draft = Draft {
        sender: sender.user,
        kind,
        state_key: None,
        content,
        redacts,
        txn: Some((device, txn_id)),
        origin_server_ts: sender.origin_server_ts,
    };
    homeserver.rooms().send(draft, room).await
}

/// What this device has sent under this transaction id.
pub(crate) async fn sent_before(
    homeserver: &Homeserver,
    room: &RoomId,
    user: &UserId,
    device: &str,
    txn_id: &str,
) -> Result<Option<EventId>> {
    let room = room.clone();
    let sent = timeline::Sent {
        user: user.clone(),
        device: device.to_owned(),
        txn_id: txn_id.to_owned(),
    };
    let event = homeserver
        .store()
        .read(move |c| match timeline::room(c, &room)? {
            Some(room) => timeline::by_transaction(c, room.nid, &sent),
            None => Ok(None),
        })
        .await?;
    Ok(event)
}

/// One annotation of a kind per user and event; no thread upon a relation.
async fn check_relation(
    homeserver: &Homeserver,
    sender: &Sender,
    room: &RoomId,
    content: &Map<String, Value>,
) -> Result<()> {
    let Some(relates_to) = content.get("m.relates_to").and_then(Value::as_object) else {
        return Ok(());
    };
    let text = |key: &str| {
        relates_to
            .get(key)
            .and_then(Value::as_str)
            .map(str::to_owned)
    };
    let (Some(rel_type), Some(parent)) = (text("rel_type"), text("event_id")) else {
        return Ok(());
    };
    let Ok(parent) = EventId::parse(&parent) else {
        return Ok(());
    };
    let (room, user, key) = (room.clone(), sender.user.clone(), text("key"));
    let refusal = homeserver
        .store()
        .read(move |c| {
            let Some(room) = timeline::room(c, &room)? else {
                return Ok(None);
            };
            match (rel_type.as_str(), &key) {
                ("m.annotation", Some(key)) => {
                    let twice = storage::relations::has_annotation(c, &parent, &user, key)?;
                    Ok(twice.then_some((
                        "M_DUPLICATE_ANNOTATION",
                        "You have sent this reaction already",
                    )))
                }
                ("m.thread", _) => {
                    let root = timeline::by_id(c, room.nid, &parent)?;
                    let nested = root.is_some_and(|root| {
                        let content = root.pdu.content_value();
                        let relation = content.get("m.relates_to").and_then(|r| r.get("rel_type"));
                        relation.is_some_and(Value::is_string)
                    });
                    Ok(nested.then_some(("M_UNKNOWN", "A thread cannot begin at a relation")))
                }
                _ => Ok(None),
            }
        })
        .await?;
    match refusal {
        Some((errcode, words)) => Err(MatrixError::new(400, errcode, words)),
        None => Ok(()),
    }
}

pub async fn state(
    homeserver: &Homeserver,
    sender: Sender,
    room: &RoomId,
    kind: String,
    state_key: String,
    content: Map<String, Value>,
) -> Result<EventId> {
    match kind.as_str() {
        // U-41
        "m.room.create" => {
            return Err(MatrixError::bad_json("A room is created only once"));
        }
        "m.room.member" => return member(homeserver, sender, room, &state_key, content).await,
        "m.room.canonical_alias" => {
            check_aliases(homeserver, &sender.user, room, &content).await?;
        }
        _ => {}
    }
    let mut draft = state_draft(sender.user, &kind, &state_key, Value::Object(content));
    draft.origin_server_ts = sender.origin_server_ts;
    homeserver.rooms().send(draft, room).await
}

/// A membership set as state takes the same way as by its own endpoint where that does more than send.
async fn member(
    homeserver: &Homeserver,
    sender: Sender,
    room: &RoomId,
    target: &str,
    content: Map<String, Value>,
) -> Result<EventId> {
    let Ok(target) = UserId::parse(target) else {
        return Err(MatrixError::bad_json(
            "The state key of a membership is a user id",
        ));
    };
    let text = |key: &str| content.get(key).and_then(Value::as_str).map(str::to_owned);
    let wanted = text("membership")
        .ok_or_else(|| MatrixError::bad_json("A membership event needs a membership"))?;
    let joined = membership::is_joined(homeserver, room, &sender.user).await?;
    let own = target == sender.user;
    match wanted.as_str() {
        "join" if own && !joined => {
            let mut extra = content.clone();
            extra.retain(|key, _| key != "reason");
            let wish = JoinWish {
                reason: text("reason"),
                extra,
                ..JoinWish::default()
            };
            let rooms = homeserver.rooms();
            rooms.join(&target, room.as_str(), wish).await?;
        }
        "leave" if own => {
            membership::leave(homeserver, &target, room, text("reason")).await?;
        }
        "invite" => {
            let direct = content
                .get("is_direct")
                .and_then(Value::as_bool)
                .unwrap_or(false);
            let rooms = homeserver.rooms();
            rooms
                .invite(&sender.user, room, &target, text("reason"), direct)
                .await?;
        }
        _ => {
            let state_key = target.as_str();
            let kind = "m.room.member";
            let content = membership::client_member_content(content);
            let mut draft = state_draft(sender.user, kind, state_key, content);
            draft.origin_server_ts = sender.origin_server_ts;
            return homeserver.rooms().send(draft, room).await;
        }
    }
    let (room, target) = (room.clone(), target.to_string());
    let event = homeserver
        .store()
        .read(move |c| {
            let reader = Reader {
                user: sender.user.clone(),
                device: None,
            };
            let Some(mut view) = RoomView::open(c, &room, &reader)? else {
                return Ok(None);
            };
            let state = view.room.state.clone();
            view.state_event(&state, "m.room.member", &target)
        })
        .await?;
    event
        .map(|event| event.event_id.clone())
        .ok_or_else(|| MatrixError::internal("The membership was not stored"))
}

/// Aliases that a canonical alias event newly names must be valid and lead to this room.
///
/// <https://spec.matrix.org/v1.18/client-server-api/#mroomcanonical_alias>
async fn check_aliases(
    homeserver: &Homeserver,
    user: &UserId,
    room: &RoomId,
    content: &Map<String, Value>,
) -> Result<()> {
    let named = aliases_in(content)?;
    if named.is_empty() {
        return Ok(());
    }
    let reader = Reader {
        user: user.clone(),
        device: None,
    };
    let asked = room.clone();
    let before = homeserver
        .store()
        .read(move |c| {
            let Some(mut view) = RoomView::open(c, &asked, &reader)? else {
                return Ok(None);
            };
            let state = view.room.state.clone();
            view.state_event(&state, "m.room.canonical_alias", "")
        })
        .await?;
    let before = before.map(|event| event.content_value());
    let known = match before.as_ref().and_then(Value::as_object) {
        Some(content) => aliases_in(content).unwrap_or_default(),
        None => Vec::new(),
    };
    for alias in named.into_iter().filter(|alias| !known.contains(alias)) {
        let bad = || {
            MatrixError::new(
                400,
                "M_BAD_ALIAS",
                format!("{alias} does not lead to this room"),
            )
        };
        let (target, _) = homeserver
            .directory()
            .resolve(&alias)
            .await
            .map_err(|_| bad())?;
        if target != *room {
            return Err(bad());
        }
    }
    Ok(())
}

fn aliases_in(content: &Map<String, Value>) -> Result<Vec<RoomAlias>> {
    let bad = || MatrixError::invalid_param("This is no room alias");
    let mut named = Vec::new();
    match content.get("alias") {
        None | Some(Value::Null) => {}
        Some(Value::String(alias)) if alias.is_empty() => {}
        Some(Value::String(alias)) => named.push(RoomAlias::parse(alias).map_err(|_| bad())?),
        Some(_) => return Err(bad()),
    }
    match content.get("alt_aliases") {
        None | Some(Value::Null) => {}
        Some(Value::Array(aliases)) => {
            for alias in aliases {
                let alias = alias.as_str().ok_or_else(bad)?;
                named.push(RoomAlias::parse(alias).map_err(|_| bad())?);
            }
        }
        Some(_) => return Err(bad()),
    }
    Ok(named)
}
