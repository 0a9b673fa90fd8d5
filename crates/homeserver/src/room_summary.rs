//! What a room is, told in a few words: summaries, space hierarchies, entries of room lists.
//!
//! All of it is read from what is known now, without waiting for members (C-20 to C-22).
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#get_matrixclientv1roomsroomidhierarchy>

use std::collections::{BTreeMap, BTreeSet};

use protocol::id::{RoomAlias, RoomId, ServerName, UserId};
use serde_json::{Map, Value, json};
use storage::sync_reads;
use storage::{Conn, states};

use crate::Homeserver;
use crate::error::{MatrixError, Result};
use crate::room_view::{Reader, RoomView};

/// Rooms in one page of a hierarchy.
const PAGE_MAX: usize = 50;
/// Rooms that one walk visits, whatever page is asked for.
const VISITED_MAX: usize = 500;
/// Children of one space that are looked at.
const CHILDREN_MAX: usize = 500;
/// Servers asked about one room that is not known here.
const SERVERS_MAX: usize = 3;

/// A room as it is described to those who may not be in it.
#[derive(Clone, Debug)]
pub struct Described {
    pub room: RoomId,
    /// The keys of a room list entry.
    pub body: Map<String, Value>,
    pub join_rule: String,
    pub allowed: Vec<RoomId>,
    pub world_readable: bool,
    pub is_space: bool,
    /// `m.space.child` events in their order, in the form of `children_state`.
    pub children: Vec<Value>,
}

/// Describes a room that this server is in.
pub fn describe(c: &mut dyn Conn, room: &RoomId) -> storage::Result<Option<Described>> {
    let nobody = Reader {
        user: UserId::parse("@:localhost").map_err(|e| storage::Error::corrupt(e.to_string()))?,
        device: None,
    };
    let Some(mut view) = RoomView::open(c, room, &nobody)? else {
        return Ok(None);
    };
    let (joined, _) = sync_reads::member_counts(view.c, view.room.nid)?;
    if joined == 0 {
        return Ok(None);
    }
    let state = view.room.state.clone();
    let mut body = Map::new();
    let text = |view: &mut RoomView<'_>, kind: &str, key: &str| {
        let event = view.state_event(&state, kind, "")?;
        let value = event.and_then(|event| event.content_get_str(key).map(|t| t.into_owned()));
        Ok::<_, storage::Error>(value.filter(|text| !text.is_empty()))
    };
    for (name, kind, key) in [
        ("name", "m.room.name", "name"),
        ("topic", "m.room.topic", "topic"),
        ("canonical_alias", "m.room.canonical_alias", "alias"),
        ("avatar_url", "m.room.avatar", "url"),
        ("encryption", "m.room.encryption", "algorithm"),
        ("room_type", "m.room.create", "type"),
    ] {
        if let Some(value) = text(&mut view, kind, key)? {
            body.insert(name.to_owned(), Value::from(value));
        }
    }
    let visibility = text(&mut view, "m.room.history_visibility", "history_visibility")?;
    let world_readable = visibility.as_deref() == Some("world_readable");
    let guests = text(&mut view, "m.room.guest_access", "guest_access")?;
    let join_rules = view.state_event(&state, "m.room.join_rules", "")?;
    let join_rule = join_rules
        .as_ref()
        .and_then(|event| event.content_get_str("join_rule"))
        .map_or_else(|| "invite".to_owned(), |rule| rule.into_owned());
    let allowed = match join_rule.as_str() {
        "restricted" | "knock_restricted" => {
            join_rules.map_or_else(Vec::new, |event| allowed_rooms(&event.content_value()))
        }
        _ => Vec::new(),
    };
    let is_space = body.get("room_type").is_some_and(|kind| kind == "m.space");
    body.insert("room_id".to_owned(), Value::from(room.as_str()));
    body.insert("num_joined_members".to_owned(), Value::from(joined));
    body.insert("world_readable".to_owned(), Value::from(world_readable));
    body.insert(
        "guest_can_join".to_owned(),
        Value::from(guests.as_deref() == Some("can_join")),
    );
    body.insert("join_rule".to_owned(), Value::from(join_rule.as_str()));
    body.insert(
        "room_version".to_owned(),
        Value::from(view.room.version.as_str()),
    );
    if matches!(join_rule.as_str(), "restricted" | "knock_restricted") {
        body.insert("allowed_room_ids".to_owned(), json!(allowed));
    }
    let children = if is_space {
        children(&mut view)?
    } else {
        Vec::new()
    };
    Ok(Some(Described {
        room: room.clone(),
        body,
        join_rule,
        allowed,
        world_readable,
        is_space,
        children,
    }))
}

/// rooms whose members may join; what is mangled is no room.
fn allowed_rooms(content: &Value) -> Vec<RoomId> {
    let Some(allow) = content.get("allow").and_then(Value::as_array) else {
        return Vec::new();
    };
    allow
        .iter()
        .filter(|entry| {
            entry
                .get("type")
                .is_some_and(|kind| kind == "m.room_membership")
        })
        .filter_map(|entry| RoomId::parse(entry.get("room_id")?.as_str()?).ok())
        .collect()
}

fn children(view: &mut RoomView<'_>) -> storage::Result<Vec<Value>> {
    let state = view.room.state.clone();
    let keys = states::keys_of_kind(view.c, view.room.nid, "m.space.child")?;
    let nids: Vec<_> = keys
        .into_iter()
        .filter_map(|(key, _)| state.get(key))
        .take(CHILDREN_MAX)
        .collect();
    let mut children: Vec<Value> = view
        .pdus(&nids)?
        .iter()
        .filter_map(|pdu| {
            let content = pdu.content_value();
            let via = content.get("via").and_then(Value::as_array)?;
            (!via.is_empty()).then(|| {
                json!({
                    "type": "m.space.child",
                    "state_key": pdu.state_key,
                    "sender": pdu.sender,
                    "origin_server_ts": pdu.origin_server_ts,
                    "content": content,
                })
            })
        })
        .collect();
    children.sort_by_cached_key(order_of);
    Ok(children)
}

/// Children with a valid `order` first, then by age, then by room id.
fn order_of(child: &Value) -> (bool, String, i64, String) {
    let order = child["content"].get("order").and_then(Value::as_str);
    let valid = order.filter(|order| {
        !order.is_empty() && order.len() <= 50 && order.bytes().all(|b| (0x20..=0x7e).contains(&b))
    });
    (
        valid.is_none(),
        valid.unwrap_or_default().to_owned(),
        child["origin_server_ts"].as_i64().unwrap_or(i64::MAX),
        child["state_key"].as_str().unwrap_or_default().to_owned(),
    )
}

/// Whether a room may be shown to a user: who is in it or could come in, or everybody may look.
pub fn may_know(
    c: &mut dyn Conn,
    described: &Described,
    user: Option<&UserId>,
) -> storage::Result<bool> {
    let open = described.world_readable
        || matches!(
            described.join_rule.as_str(),
            "public" | "knock" | "knock_restricted"
        );
    if open {
        return Ok(true);
    }
    let Some(user) = user else {
        return Ok(false);
    };
    let memberships = sync_reads::memberships(c, user)?;
    Ok(memberships.iter().any(|known| {
        let here = known.room == described.room
            && matches!(known.membership.as_str(), "join" | "invite" | "knock");
        let allowed = known.membership == "join"
            && described.join_rule == "restricted"
            && described.allowed.contains(&known.room);
        here || allowed
    }))
}

/// Whether a server may be shown a room: as [`may_know`], for any of its users.
pub fn server_may_know(
    c: &mut dyn Conn,
    described: &Described,
    server: &ServerName,
) -> storage::Result<bool> {
    let open = described.world_readable
        || matches!(
            described.join_rule.as_str(),
            "public" | "knock" | "knock_restricted"
        );
    if open {
        return Ok(true);
    }
    let mut rooms = vec![&described.room];
    if described.join_rule == "restricted" {
        rooms.extend(&described.allowed);
    }
    for room in rooms {
        if let Some(room) = storage::timeline::room(c, room)?
            && sync_reads::servers(c, room.nid)?.contains(server)
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The answer to another server's `GET /hierarchy/{roomId}`.
pub async fn for_server(
    homeserver: &Homeserver,
    server: &ServerName,
    room: &RoomId,
    suggested_only: bool,
) -> Result<Value> {
    let (server, room) = (server.clone(), room.clone());
    let answer = homeserver
        .store()
        .read(move |c| {
            let Some(described) = describe(c, &room)? else {
                return Ok(None);
            };
            if !server_may_know(c, &described, &server)? {
                return Ok(None);
            }
            let mut children = Vec::new();
            let mut inaccessible = Vec::new();
            for child in wanted_children(&described, suggested_only) {
                let Some(id) = child_room(child) else {
                    continue;
                };
                let Some(child) = describe(c, &id)? else {
                    continue;
                };
                if server_may_know(c, &child, &server)? {
                    children.push(child.body);
                } else {
                    inaccessible.push(id);
                }
            }
            Ok(Some(json!({
                "room": entry(&described, suggested_only),
                "children": children,
                "inaccessible_children": inaccessible,
            })))
        })
        .await?;
    answer.ok_or_else(|| MatrixError::not_found("There is no such room that you may see"))
}

fn wanted_children(described: &Described, suggested_only: bool) -> impl Iterator<Item = &Value> {
    described.children.iter().filter(move |child| {
        !suggested_only || child["content"].get("suggested") == Some(&Value::Bool(true))
    })
}

fn child_room(child: &Value) -> Option<RoomId> {
    RoomId::parse(child.get("state_key")?.as_str()?).ok()
}

/// An entry of a hierarchy.
fn entry(described: &Described, suggested_only: bool) -> Value {
    let mut body = described.body.clone();
    let children: Vec<&Value> = wanted_children(described, suggested_only).collect();
    body.insert("children_state".to_owned(), json!(children));
    Value::Object(body)
}

#[derive(Clone, Debug, Default)]
pub struct HierarchyAsked {
    pub suggested_only: bool,
    pub limit: Option<usize>,
    pub max_depth: Option<usize>,
    /// How many rooms earlier pages have shown.
    pub from: Option<String>,
}

/// A space and what is below it, depth first.
pub async fn hierarchy(
    homeserver: &Homeserver,
    user: &UserId,
    root: &RoomId,
    asked: HierarchyAsked,
) -> Result<Value> {
    let skip: usize = match asked.from.as_deref() {
        None => 0,
        Some(from) => from
            .parse()
            .map_err(|_| MatrixError::invalid_param("from is no token of this server"))?,
    };
    let limit = asked.limit.unwrap_or(PAGE_MAX).clamp(1, PAGE_MAX);
    let mut walk = Walk {
        homeserver,
        user,
        suggested_only: asked.suggested_only,
        remote: BTreeMap::new(),
    };
    let mut found = Vec::new();
    let mut seen = BTreeSet::from([root.clone()]);
    let mut stack = vec![(root.clone(), Vec::new(), 0_usize)];
    let mut more = false;
    while let Some((room, via, depth)) = stack.pop() {
        if found.len() >= (skip + limit).min(VISITED_MAX) {
            more = found.len() < VISITED_MAX;
            break;
        }
        let Some(described) = walk.describe(&room, &via).await? else {
            if room == *root {
                return Err(MatrixError::forbidden(
                    "There is no such space that you may see",
                ));
            }
            continue;
        };
        if described.is_space && asked.max_depth.is_none_or(|max| depth < max) {
            let children: Vec<&Value> = wanted_children(&described, asked.suggested_only).collect();
            // Put down in reverse, so that the first is taken first.
            for child in children.into_iter().rev() {
                if let Some(id) = child_room(child)
                    && !seen.contains(&id)
                {
                    stack.push((id, via_of(child), depth + 1));
                }
            }
            let mut known = BTreeSet::new();
            stack.reverse();
            stack.retain(|(room, _, _)| known.insert(room.clone()) || room == root);
            stack.reverse();
        }
        seen.insert(room);
        found.push(entry(&described, asked.suggested_only));
    }
    let rooms: Vec<Value> = found.into_iter().skip(skip).collect();
    let mut body = json!({ "rooms": rooms });
    if more {
        body["next_batch"] = Value::from((skip + limit).to_string());
    }
    Ok(body)
}

fn via_of(child: &Value) -> Vec<ServerName> {
    let via = child["content"].get("via").and_then(Value::as_array);
    via.into_iter()
        .flatten()
        .filter_map(|server| ServerName::parse(server.as_str()?).ok())
        .take(SERVERS_MAX)
        .collect()
}

struct Walk<'a> {
    homeserver: &'a Homeserver,
    user: &'a UserId,
    suggested_only: bool,
    /// What other servers told of children already.
    remote: BTreeMap<RoomId, Described>,
}

impl Walk<'_> {
    /// `None` for what the user may not see.
    async fn describe(&mut self, room: &RoomId, via: &[ServerName]) -> Result<Option<Described>> {
        let local = known_here(self.homeserver, room).await?;
        let described = match local {
            Some(described) => described,
            None => match self.fetch(room, via).await {
                Some(described) => described,
                None => return Ok(None),
            },
        };
        let user = self.user.clone();
        let (judged, may) = self
            .homeserver
            .store()
            .read(move |c| {
                let may = may_know(c, &described, Some(&user))?;
                Ok((described.clone(), may))
            })
            .await?;
        Ok(may.then_some(judged))
    }

    async fn fetch(&mut self, room: &RoomId, via: &[ServerName]) -> Option<Described> {
        let known = self.remote.get(room).cloned();
        // A room that is no space has nothing more to tell than its parent's server told.
        if known.as_ref().is_some_and(|known| !known.is_space) {
            return known;
        }
        let (described, children) = fetch(self.homeserver, room, via, self.suggested_only)
            .await
            .or_else(|| known.map(|k| (k, Vec::new())))?;
        for child in children {
            self.remote.entry(child.room.clone()).or_insert(child);
        }
        Some(described)
    }
}

async fn known_here(homeserver: &Homeserver, room: &RoomId) -> Result<Option<Described>> {
    let room = room.clone();
    let own = homeserver.config().server_name.clone();
    let described = homeserver
        .store()
        .read(move |c| {
            // A room that we left is better described by those who are in it.
            match storage::timeline::room(c, &room)? {
                Some(row) if sync_reads::servers(c, row.nid)?.contains(&own) => describe(c, &room),
                _ => Ok(None),
            }
        })
        .await?;
    Ok(described)
}

/// Asks other servers for a room and its children.
async fn fetch(
    homeserver: &Homeserver,
    room: &RoomId,
    via: &[ServerName],
    suggested_only: bool,
) -> Option<(Described, Vec<Described>)> {
    let own = &homeserver.config().server_name;
    for server in via.iter().filter(|server| *server != own).take(SERVERS_MAX) {
        let Ok(answer) = homeserver
            .client()
            .hierarchy(server, room, suggested_only)
            .await
        else {
            continue;
        };
        let Some(described) = answer.get("room").and_then(from_remote) else {
            continue;
        };
        if described.room != *room {
            continue;
        }
        let children = answer.get("children").and_then(Value::as_array);
        let children = children.into_iter().flatten().take(CHILDREN_MAX);
        return Some((described, children.filter_map(from_remote).collect()));
    }
    None
}

/// Reads what another server says of a room; only keys that are known are kept.
fn from_remote(value: &Value) -> Option<Described> {
    let text = |key: &str| value.get(key).and_then(Value::as_str);
    let room = RoomId::parse(text("room_id")?).ok()?;
    let mut body = Map::new();
    for key in [
        "room_id",
        "name",
        "topic",
        "canonical_alias",
        "avatar_url",
        "encryption",
        "room_type",
        "num_joined_members",
        "world_readable",
        "guest_can_join",
        "join_rule",
        "room_version",
        "allowed_room_ids",
    ] {
        if let Some(value) = value.get(key).filter(|value| !value.is_null()) {
            body.insert(key.to_owned(), value.clone());
        }
    }
    let join_rule = text("join_rule").unwrap_or("public").to_owned();
    body.entry("join_rule")
        .or_insert_with(|| Value::from(join_rule.as_str()));
    let allowed = value.get("allowed_room_ids").and_then(Value::as_array);
    let allowed = allowed
        .into_iter()
        .flatten()
        .filter_map(|id| RoomId::parse(id.as_str()?).ok())
        .collect();
    let children = value.get("children_state").and_then(Value::as_array);
    let mut children: Vec<Value> = children
        .into_iter()
        .flatten()
        .filter(|child| {
            child.get("content").is_some_and(Value::is_object) && child_room(child).is_some()
        })
        .take(CHILDREN_MAX)
        .cloned()
        .collect();
    children.sort_by_cached_key(order_of);
    Some(Described {
        room,
        is_space: text("room_type") == Some("m.space"),
        world_readable: value.get("world_readable") == Some(&Value::Bool(true)),
        join_rule,
        allowed,
        body,
        children,
    })
}

/// `/room_summary/{roomIdOrAlias}`
pub async fn summary(
    homeserver: &Homeserver,
    user: Option<&UserId>,
    room: &str,
    mut via: Vec<ServerName>,
) -> Result<Value> {
    let room = if let Ok(alias) = RoomAlias::parse(room) {
        let (room, servers) = homeserver.directory().resolve(&alias).await?;
        via.extend(servers);
        room
    } else {
        RoomId::parse(room)
            .map_err(|_| MatrixError::invalid_param("This is neither a room id nor an alias"))?
    };
    let described = match known_here(homeserver, &room).await? {
        Some(described) => Some(described),
        None => {
            via.extend(room.server_name());
            fetch(homeserver, &room, &via, false)
                .await
                .map(|(described, _)| described)
        }
    };
    let hidden = || MatrixError::not_found("There is no such room that you may see");
    let described = described.ok_or_else(hidden)?;
    let user = user.cloned();
    let (mut body, may) = homeserver
        .store()
        .read(move |c| {
            let may = may_know(c, &described, user.as_ref())?;
            let mut body = described.body.clone();
            if let Some(user) = &user {
                let memberships = sync_reads::memberships(c, user)?;
                let own = memberships
                    .into_iter()
                    .find(|known| known.room == described.room);
                let membership = own.map_or_else(|| "leave".to_owned(), |own| own.membership);
                body.insert("membership".to_owned(), Value::from(membership));
            }
            Ok((body, may))
        })
        .await?;
    if !may {
        return Err(hidden());
    }
    // The unstable name that clients of MSC3266 look for.
    if let Some(version) = body.get("room_version").cloned() {
        body.insert("im.nheko.summary.room_version".to_owned(), version);
    }
    Ok(Value::Object(body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_with_an_order_come_first() {
        let child = |room: &str, order: Option<&str>, ts: i64| {
            let mut content = json!({"via": ["x"]});
            if let Some(order) = order {
                content["order"] = Value::from(order);
            }
            json!({"state_key": room, "origin_server_ts": ts, "content": content})
        };
        let mut children = [
            child("!late:x", None, 9),
            child("!early:x", None, 1),
            child("!b:x", Some("b"), 5),
            child("!a:x", Some("a"), 7),
            child("!bad:x", Some("é"), 5),
        ];
        children.sort_by_cached_key(order_of);
        let rooms = children.map(|child| child["state_key"].as_str().unwrap().to_owned());
        assert_eq!(rooms, ["!a:x", "!b:x", "!early:x", "!bad:x", "!late:x"]);
    }

    #[test]
    fn mangled_allow_entries_are_no_rooms() {
        let content = json!({"allow": [
            {"type": "m.room_membership", "room_id": "!a:x"},
            {"type": "m.room_membership", "room_id": 7},
            {"type": "other", "room_id": "!b:x"},
            "nonsense",
        ]});
        assert_eq!(allowed_rooms(&content), [RoomId::parse("!a:x").unwrap()]);
        assert!(allowed_rooms(&json!({"allow": "x"})).is_empty());
    }
}
