//! Replacing a room by one of another version, and what users carry over into it.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#room-upgrades>

use protocol::id::{EventId, RoomId, UserId};
use protocol::nid::EventNid;
use protocol::room_version::RoomVersion;
use serde_json::{Map, Value, json};
use storage::streams::{self, Stream};
use storage::timeline;

use crate::Homeserver;
use crate::create_room::{additional_creators, privileged_creators, profile_of};
use crate::error::{MatrixError, Result};
use crate::room_view::{Reader, RoomView, membership_of};
use crate::rooms::Draft;
use crate::send::state_draft;

/// State that is copied as it is.
const COPIED: [&str; 9] = [
    "m.room.join_rules",
    "m.room.history_visibility",
    "m.room.guest_access",
    "m.room.name",
    "m.room.topic",
    "m.room.avatar",
    "m.room.encryption",
    "m.room.server_acl",
    "m.room.policy",
];

/// What the old room hands down.
struct Old {
    create: Map<String, Value>,
    creators: Vec<UserId>,
    levels: Map<String, Value>,
    copied: Vec<(String, String, Value)>,
    canonical_alias: Option<Value>,
    last_event: Option<EventId>,
}

/// C-28: at once, also in a partial room; bans are copied as far as they are known.
pub async fn upgrade(
    homeserver: &Homeserver,
    user: &UserId,
    room: &RoomId,
    new_version: &str,
    new_creators: Vec<UserId>,
) -> Result<RoomId> {
    let version = RoomVersion::parse(new_version).ok_or_else(|| {
        MatrixError::unsupported_room_version(format!(
            "Room version {new_version:?} is not supported"
        ))
    })?;
    let old = read_old(homeserver, user, room).await?;
    let levels = new_levels(&old, user, version, &new_creators);
    let drafts = drafts(homeserver, user, room, version, &old, &levels, new_creators).await?;
    let new_room = homeserver.rooms().create(user, version, drafts).await?;
    move_names(homeserver, user, room, &new_room, &old).await?;
    let tombstone = json!({
        "body": "This room has been replaced",
        "replacement_room": new_room,
    });
    let draft = state_draft(user.clone(), "m.room.tombstone", "", tombstone);
    homeserver.rooms().send(draft, room).await?;
    quieten(homeserver, user, room, &old).await;
    carry_over(homeserver, user, &new_room).await?;
    Ok(new_room)
}

async fn read_old(homeserver: &Homeserver, user: &UserId, room: &RoomId) -> Result<Old> {
    let reader = Reader {
        user: user.clone(),
        device: None,
    };
    let room = room.clone();
    homeserver
        .store()
        .read(move |c| {
            let Some(mut view) = RoomView::open(c, &room, &reader)? else {
                return Ok(Err(MatrixError::not_found("There is no such room")));
            };
            if !view.is_joined() {
                return Ok(Err(MatrixError::forbidden("You are not in this room")));
            }
            let state = view.room.state.clone();
            let levels = view.power_levels(&state)?;
            if !levels.can_send(&reader.user, "m.room.tombstone", true) {
                return Ok(Err(MatrixError::forbidden("You may not replace this room")));
            }
            let content = |view: &mut RoomView<'_>, kind: &str| {
                let event = view.state_event(&state, kind, "")?;
                Ok::<_, storage::Error>(match event.map(|event| event.content_value()) {
                    Some(Value::Object(content)) => Some(content),
                    _ => None,
                })
            };
            let create = content(&mut view, "m.room.create")?.unwrap_or_default();
            let own_levels = content(&mut view, "m.room.power_levels")?.unwrap_or_default();
            let canonical_alias = content(&mut view, "m.room.canonical_alias")?.map(Value::Object);
            let mut copied = Vec::new();
            for kind in COPIED {
                if let Some(content) = content(&mut view, kind)? {
                    copied.push((kind.to_owned(), String::new(), Value::Object(content)));
                }
            }
            let nids: Vec<EventNid> = state.iter().map(|(_, nid)| nid).collect();
            for pdu in view.pdus(&nids)? {
                let child = matches!(&*pdu.kind, "m.space.child" | "m.space.parent")
                    && pdu.content_get("via").is_some();
                let banned = &*pdu.kind == "m.room.member" && membership_of(&pdu) == "ban";
                if let Some(state_key) = pdu.state_key.as_ref().filter(|_| child || banned) {
                    let content = pdu.content_value();
                    copied.push((pdu.kind.to_string(), state_key.to_string(), content));
                }
            }
            let position = streams::position(view.c, Stream::Events)?;
            let last = timeline::newest(view.c, view.room.nid, i64::MIN, position, 1)?.pop();
            Ok(Ok(Old {
                creators: levels.creators().to_vec(),
                create,
                levels: own_levels,
                copied,
                canonical_alias,
                last_event: last.map(|event| event.pdu.event_id.clone()),
            }))
        })
        .await?
}

/// The power levels of the new room: who was above all by being a creator is given a level where the new
/// version has no such creators, and the new creators are in no list where it has.
fn new_levels(
    old: &Old,
    user: &UserId,
    version: RoomVersion,
    new_creators: &[UserId],
) -> Map<String, Value> {
    let mut levels = old.levels.clone();
    let mut users = match levels.remove("users") {
        Some(Value::Object(users)) => users,
        _ => Map::new(),
    };
    if privileged_creators(version) {
        users.remove(user.as_str());
        for creator in new_creators {
            users.remove(creator.as_str());
        }
        let state_default = levels
            .get("state_default")
            .and_then(Value::as_i64)
            .unwrap_or(50);
        let events = levels
            .entry("events")
            .or_insert_with(|| json!({}))
            .as_object_mut();
        if let Some(events) = events {
            let tombstone = events.get("m.room.tombstone").and_then(Value::as_i64);
            let wanted = 150.max(state_default + 1);
            if tombstone.is_none_or(|level| level < wanted) {
                events.insert("m.room.tombstone".to_owned(), Value::from(wanted));
            }
        }
    } else {
        for creator in &old.creators {
            users.entry(creator.to_string()).or_insert(Value::from(100));
        }
    }
    levels.insert("users".to_owned(), Value::Object(users));
    levels
}

async fn drafts(
    homeserver: &Homeserver,
    user: &UserId,
    room: &RoomId,
    version: RoomVersion,
    old: &Old,
    levels: &Map<String, Value>,
    mut new_creators: Vec<UserId>,
) -> Result<Vec<Draft>> {
    let privileged = privileged_creators(version);
    let mut create = Map::new();
    for key in ["type", "m.federate"] {
        if let Some(value) = old.create.get(key) {
            create.insert(key.to_owned(), value.clone());
        }
    }
    create.insert("room_version".to_owned(), Value::from(version.as_str()));
    let mut predecessor = json!({ "room_id": room });
    // U-40: a room that is named by its create event has its end in no event id.
    if let Some(last) = old.last_event.as_ref().filter(|_| !privileged) {
        predecessor["event_id"] = Value::from(last.as_str());
    }
    create.insert("predecessor".to_owned(), predecessor);
    if version < RoomVersion::V11 {
        create.insert("creator".to_owned(), Value::from(user.as_str()));
    }
    new_creators.retain(|creator| creator != user);
    if privileged && !new_creators.is_empty() {
        create.insert("additional_creators".to_owned(), json!(new_creators));
        additional_creators(&create)?;
    }
    let (displayname, avatar_url) = profile_of(homeserver, user).await?;
    let mut member = json!({ "membership": "join" });
    for (key, value) in [("displayname", displayname), ("avatar_url", avatar_url)] {
        if let Some(value) = value {
            member[key] = Value::from(value);
        }
    }
    let draft = |kind: &str, state_key: &str, content: Value| {
        state_draft(user.clone(), kind, state_key, content)
    };
    let mut drafts = vec![
        draft("m.room.create", "", Value::Object(create)),
        draft("m.room.member", user.as_str(), member),
    ];
    let final_levels = Value::Object(levels.clone());
    // The upgrader must be able to send what follows, whatever their level is to be in the end.
    let mut first_levels = final_levels.clone();
    if !privileged {
        let own = first_levels["users"]
            .get(user.as_str())
            .and_then(Value::as_i64);
        if own.is_none_or(|level| level < 100) {
            first_levels["users"][user.as_str()] = Value::from(100);
        }
    }
    drafts.push(draft("m.room.power_levels", "", first_levels.clone()));
    for (kind, state_key, content) in &old.copied {
        if state_key != user.as_str() {
            drafts.push(draft(kind, state_key, content.clone()));
        }
    }
    if first_levels != final_levels {
        drafts.push(draft("m.room.power_levels", "", final_levels));
    }
    Ok(drafts)
}

/// Aliases of this server and the place in the room list go to the new room.
async fn move_names(
    homeserver: &Homeserver,
    user: &UserId,
    room: &RoomId,
    new_room: &RoomId,
    old: &Old,
) -> Result<()> {
    let (from, to) = (room.clone(), new_room.clone());
    let moved = homeserver
        .store()
        .write(move |c| {
            let aliases = storage::directory::aliases_of(c, &from)?;
            storage::directory::move_aliases(c, &from, &to)?;
            if storage::directory::is_listed(c, &from)? {
                storage::directory::set_listed(c, &from, false)?;
                storage::directory::set_listed(c, &to, true)?;
            }
            Ok(!aliases.is_empty())
        })
        .await?;
    if let Some(canonical) = old.canonical_alias.as_ref().filter(|_| moved) {
        let kind = "m.room.canonical_alias";
        let cleared = state_draft(user.clone(), kind, "", json!({}));
        if let Err(error) = homeserver.rooms().send(cleared, room).await {
            tracing::info!(%room, %error, "the old room keeps its canonical alias");
        }
        let set = state_draft(user.clone(), kind, "", canonical.clone());
        homeserver.rooms().send(set, new_room).await?;
    }
    Ok(())
}

/// Ordinary members of the old room may talk no more, if the user can have it so.
async fn quieten(homeserver: &Homeserver, user: &UserId, room: &RoomId, old: &Old) {
    let mut levels = old.levels.clone();
    let number = |key: &str, default: i64| {
        old.levels
            .get(key)
            .and_then(Value::as_i64)
            .unwrap_or(default)
    };
    let quiet = 50.max(number("users_default", 0) + 1);
    let mut changed = false;
    for (key, default) in [("events_default", 0), ("invite", 0)] {
        if number(key, default) < quiet {
            levels.insert(key.to_owned(), Value::from(quiet));
            changed = true;
        }
    }
    if !changed {
        return;
    }
    let draft = state_draft(
        user.clone(),
        "m.room.power_levels",
        "",
        Value::Object(levels),
    );
    if let Err(error) = homeserver.rooms().send(draft, room).await {
        tracing::info!(%room, %error, "the old room stays open for messages");
    }
}

/// Gives a user who came into a replacement of a room the tags and push rules of the old one.
pub async fn carry_over(homeserver: &Homeserver, user: &UserId, room: &RoomId) -> Result<()> {
    let reader = Reader {
        user: user.clone(),
        device: None,
    };
    let asked = room.clone();
    let predecessor = homeserver
        .store()
        .read(move |c| {
            let Some(mut view) = RoomView::open(c, &asked, &reader)? else {
                return Ok(None);
            };
            let state = view.room.state.clone();
            let create = view.state_event(&state, "m.room.create", "")?;
            let predecessor = create.and_then(|create| create.content_get("predecessor"));
            Ok(predecessor.and_then(|p| RoomId::parse(p.get("room_id")?.as_str()?).ok()))
        })
        .await?;
    let Some(old) = predecessor else {
        return Ok(());
    };
    if let Some(tags) = stored(homeserver, user, Some(&old), "m.tag").await?
        && stored(homeserver, user, Some(room), "m.tag")
            .await?
            .is_none()
    {
        homeserver
            .write_account_data(user, Some(room), "m.tag", tags.to_string())
            .await?;
    }
    if let Some(mut rules) = stored(homeserver, user, None, "m.push_rules").await?
        && copy_rules(&mut rules, old.as_str(), room.as_str())
    {
        homeserver
            .write_account_data(user, None, "m.push_rules", rules.to_string())
            .await?;
    }
    if let Some(mut direct) = stored(homeserver, user, None, "m.direct").await?
        && copy_direct(&mut direct, old.as_str(), room.as_str())
    {
        homeserver
            .write_account_data(user, None, "m.direct", direct.to_string())
            .await?;
    }
    Ok(())
}

async fn stored(
    homeserver: &Homeserver,
    user: &UserId,
    room: Option<&RoomId>,
    kind: &str,
) -> Result<Option<Value>> {
    let (user, kind) = (user.clone(), kind.to_owned());
    let room = room.map_or_else(String::new, ToString::to_string);
    let text = homeserver
        .store()
        .read(move |c| storage::account_data::get(c, &user, &room, &kind))
        .await?;
    Ok(text.and_then(|text| serde_json::from_str(&text).ok()))
}

/// Adds room rules for the new room as they are for the old one. `false` when there is nothing to add.
fn copy_rules(rules: &mut Value, old: &str, new: &str) -> bool {
    let Some(list) = rules
        .get_mut("global")
        .and_then(|global| global.get_mut("room"))
        .and_then(Value::as_array_mut)
    else {
        return false;
    };
    let of = |room: &str| list.iter().find(|rule| rule["rule_id"] == room).cloned();
    let (Some(mut rule), None) = (of(old), of(new)) else {
        return false;
    };
    rule["rule_id"] = Value::from(new);
    list.insert(0, rule);
    true
}

fn copy_direct(direct: &mut Value, old: &str, new: &str) -> bool {
    let mut changed = false;
    for rooms in direct
        .as_object_mut()
        .into_iter()
        .flat_map(|map| map.values_mut())
    {
        let Some(rooms) = rooms.as_array_mut() else {
            continue;
        };
        if rooms.iter().any(|room| room == old) && !rooms.iter().any(|room| room == new) {
            rooms.push(Value::from(new));
            changed = true;
        }
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn old(levels: Value, creators: &[&str]) -> Old {
        let Value::Object(levels) = levels else {
            unreachable!()
        };
        Old {
            create: Map::new(),
            creators: creators
                .iter()
                .map(|user| UserId::parse(user).unwrap())
                .collect(),
            levels,
            copied: Vec::new(),
            canonical_alias: None,
            last_event: None,
        }
    }

    #[test]
    fn new_creators_are_in_no_power_levels() {
        let old = old(
            json!({"users": {"@a:x": 100, "@b:x": 100, "@c:x": 50}}),
            &[],
        );
        let user = |name: &str| UserId::parse(name).unwrap();
        let levels = new_levels(&old, &user("@a:x"), RoomVersion::V12, &[user("@b:x")]);
        assert_eq!(levels["users"], json!({"@c:x": 50}));
        assert_eq!(levels["events"]["m.room.tombstone"], 150);
    }

    #[test]
    fn old_creators_get_a_level_where_creators_have_none() {
        let old = old(json!({"users": {}}), &["@a:x"]);
        let user = UserId::parse("@b:x").unwrap();
        let levels = new_levels(&old, &user, RoomVersion::V11, &[]);
        assert_eq!(levels["users"], json!({"@a:x": 100}));
    }

    #[test]
    fn push_rules_follow_the_room_once() {
        let mut rules =
            json!({"global": {"room": [{"rule_id": "!old:x", "actions": ["dont_notify"]}]}});
        assert!(copy_rules(&mut rules, "!old:x", "!new:x"));
        assert_eq!(rules["global"]["room"][0]["rule_id"], "!new:x");
        assert!(!copy_rules(&mut rules, "!old:x", "!new:x"));
    }
}
