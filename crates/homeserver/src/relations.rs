//! Events that relate to events: lists of them, threads, and what is bundled with a parent.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#forming-relationships-between-events>

use std::collections::{BTreeMap, BTreeSet};

use protocol::id::{EventId, RoomId, UserId};
use protocol::nid::EventNid;
use serde_json::{Map, Value, json};
use storage::relations::{Child, Related};
use storage::timeline;

use crate::Homeserver;
use crate::client_event::{self, Unsigned};
use crate::error::{MatrixError, Result};
use crate::messages::{Bounds, Direction, page_limit};
use crate::room_view::{Reader, RoomView};
use crate::sync::token::PageToken;

/// Children looked at for the bundles of one page of events.
const CHILDREN_MAX: i64 = 10_000;
/// Entries of an `m.reference` bundle.
const REFERENCES_MAX: usize = 100;
/// Threads looked through for those the reader took part in.
const THREADS_MAX: i64 = 1_000;

#[derive(Clone, Debug)]
pub struct RelationsAsked {
    pub parent: EventId,
    pub rel_type: Option<String>,
    pub kind: Option<String>,
    pub from: Option<String>,
    pub to: Option<String>,
    pub direction: Direction,
    pub limit: Option<u32>,
    pub recurse: bool,
}

pub async fn relations(
    homeserver: &Homeserver,
    reader: &Reader,
    room: &RoomId,
    asked: RelationsAsked,
) -> Result<Value> {
    let bounds = Bounds::read(asked.from.as_deref(), asked.to.as_deref(), asked.direction)?;
    let limit = page_limit(asked.limit, 5);
    let (reader, room) = (reader.clone(), room.clone());
    let now_ms = homeserver.clock().unix_ms();
    homeserver
        .store()
        .read(move |c| {
            let Some(mut view) = RoomView::open(c, &room, &reader)? else {
                return Ok(Err(unknown()));
            };
            match timeline::by_id(view.c, view.room.nid, &asked.parent)? {
                Some(parent) if view.sees(&parent)? => {}
                _ => return Ok(Err(unknown())),
            }
            let forth = asked.direction == Direction::Forward;
            let mut kept = Vec::new();
            let mut last = None;
            let related = Related {
                parent: &asked.parent,
                rel_type: asked.rel_type.as_deref().unwrap_or(""),
                kind: asked.kind.as_deref().unwrap_or(""),
            };
            let wanted = i64::from(limit) + 1;
            let nid = view.room.nid;
            for event in
                storage::relations::page(view.c, nid, related, bounds.stretch(), forth, wanted)?
            {
                if bounds.ends_before(&event) {
                    break;
                }
                if kept.len() == limit as usize {
                    last = kept.last().map(|event| bounds.token_at(event));
                    break;
                }
                if view.sees(&event)? {
                    kept.push(event);
                }
            }
            let chunk = view.dress(&kept, now_ms)?;
            let mut body = json!({ "chunk": chunk });
            if let Some(token) = last {
                body["next_batch"] = Value::from(token.to_string());
            }
            if let Some(from) = &asked.from {
                body["prev_batch"] = Value::from(from.as_str());
            }
            if asked.recurse {
                body["recursion_depth"] = Value::from(1);
            }
            Ok(Ok(body))
        })
        .await?
}

fn unknown() -> MatrixError {
    MatrixError::not_found("There is no such event that you may see")
}

pub async fn threads(
    homeserver: &Homeserver,
    reader: &Reader,
    room: &RoomId,
    participated: bool,
    from: Option<String>,
    limit: Option<u32>,
) -> Result<Value> {
    let before = match from.as_deref() {
        None => i64::MAX,
        Some(text) => PageToken::parse(text)
            .and_then(|token| token.stream)
            .ok_or_else(|| MatrixError::invalid_param("from is no token of this server"))?,
    };
    let limit = page_limit(limit, 10) as usize;
    let (reader, room) = (reader.clone(), room.clone());
    let now_ms = homeserver.clock().unix_ms();
    homeserver
        .store()
        .read(move |c| {
            let Some(mut view) = RoomView::open(c, &room, &reader)? else {
                return Ok(Err(MatrixError::forbidden("You are not in this room")));
            };
            if view.readable_state()?.is_none() {
                return Ok(Err(MatrixError::forbidden("You are not in this room")));
            }
            let nid = view.room.nid;
            let mut roots = Vec::new();
            let mut next = None;
            for (root, latest) in storage::relations::threads(view.c, nid, before, THREADS_MAX)? {
                let Some(root) = timeline::by_id(view.c, nid, &root)? else {
                    continue;
                };
                if !view.sees(&root)? || (participated && !takes_part(&mut view, &root)?) {
                    continue;
                }
                if roots.len() == limit {
                    next = Some(PageToken::at_stream(latest + 1));
                    break;
                }
                roots.push(root);
            }
            let chunk = view.dress(&roots, now_ms)?;
            let mut body = json!({ "chunk": chunk });
            if let Some(next) = next {
                body["next_batch"] = Value::from(next.to_string());
            }
            Ok(Ok(body))
        })
        .await?
}

fn takes_part(view: &mut RoomView<'_>, root: &timeline::TimelineEvent) -> storage::Result<bool> {
    if root.pdu.sender == view.reader.user {
        return Ok(true);
    }
    let parents = [root.pdu.event_id.clone()];
    let children = storage::relations::children(view.c, view.room.nid, &parents, CHILDREN_MAX)?;
    Ok(children
        .iter()
        .any(|child| child.rel_type == "m.thread" && child.sender == view.reader.user))
}

/// What stands in `m.relations` of these events.
pub fn bundles(
    view: &mut RoomView<'_>,
    parents: &[EventId],
) -> storage::Result<BTreeMap<EventId, Value>> {
    let children = storage::relations::children(view.c, view.room.nid, parents, CHILDREN_MAX)?;
    let mut by_parent: BTreeMap<EventId, Vec<Child>> = BTreeMap::new();
    for child in children {
        by_parent
            .entry(child.parent.clone())
            .or_default()
            .push(child);
    }
    let mut bundles = BTreeMap::new();
    for (parent, children) in by_parent {
        let bundle = bundle(view, &parent, &children)?;
        if !bundle.is_empty() {
            bundles.insert(parent, Value::Object(bundle));
        }
    }
    Ok(bundles)
}

fn bundle(
    view: &mut RoomView<'_>,
    parent: &EventId,
    children: &[Child],
) -> storage::Result<Map<String, Value>> {
    let mut bundle = Map::new();
    let of = |rel_type: &str| -> Vec<&Child> {
        children
            .iter()
            .filter(|child| child.rel_type == rel_type)
            .collect()
    };
    let edits = of("m.replace");
    if !edits.is_empty()
        && let Some(edited) = timeline::by_id(view.c, view.room.nid, parent)?
        && !edited.pdu.is_state()
    {
        let latest = edits
            .iter()
            .rev()
            .find(|edit| edit.sender == edited.pdu.sender && *edit.kind == *edited.pdu.kind);
        if let Some(edit) = latest {
            bundle.insert("m.replace".to_owned(), plain(view, edit.nid)?);
        }
    }
    let thread = of("m.thread");
    if let Some(latest) = thread.last() {
        let me: &UserId = &view.reader.user;
        let root_is_mine = timeline::by_id(view.c, view.room.nid, parent)?
            .is_some_and(|root| root.pdu.sender == *me);
        let mine = root_is_mine || thread.iter().any(|child| child.sender == *me);
        let summary = json!({
            "count": thread.len(),
            "current_user_participated": mine,
            "latest_event": plain(view, latest.nid)?,
        });
        bundle.insert("m.thread".to_owned(), summary);
    }
    let references: BTreeSet<EventNid> = of("m.reference").iter().map(|child| child.nid).collect();
    if !references.is_empty() {
        let nids: Vec<EventNid> = references.into_iter().take(REFERENCES_MAX).collect();
        let chunk: Vec<Value> = view
            .pdus(&nids)?
            .iter()
            .map(|pdu| json!({ "event_id": pdu.event_id }))
            .collect();
        bundle.insert("m.reference".to_owned(), json!({ "chunk": chunk }));
    }
    Ok(bundle)
}

/// An event inside a bundle, without bundles of its own.
fn plain(view: &mut RoomView<'_>, nid: EventNid) -> storage::Result<Value> {
    let pdu = view.pdu(nid)?;
    let event = client_event::client_event(&pdu, &Unsigned::default());
    Ok(Value::Object(event))
}
