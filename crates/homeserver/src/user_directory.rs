//! Finding users that one shares a room with, or that are in public rooms (C-26).
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#user-directory>

use std::collections::{BTreeMap, BTreeSet};

use protocol::id::{RoomId, ServerName, UserId};
use protocol::nid::RoomNid;
use serde_json::{Value, json};
use storage::user_directory::{Place, candidates, places};
use storage::{Conn, events, sync_reads};

use crate::Homeserver;
use crate::error::Result;
use crate::room_summary::describe;

const LIMIT_DEFAULT: usize = 10;
const LIMIT_MAX: usize = 50;
/// Users that are looked at closely for one search.
const CANDIDATES_MAX: i64 = 300;
/// A longer search term is cut.
const TERM_CHARS_MAX: usize = 100;

pub async fn search(
    homeserver: &Homeserver,
    user: &UserId,
    term: &str,
    limit: Option<usize>,
) -> Result<Value> {
    let term: String = term
        .trim()
        .to_lowercase()
        .chars()
        .take(TERM_CHARS_MAX)
        .collect();
    let limit = limit.unwrap_or(LIMIT_DEFAULT).clamp(1, LIMIT_MAX);
    if term.is_empty() {
        return Ok(json!({ "results": [], "limited": false }));
    }
    let search = Search {
        user: user.clone(),
        own: homeserver.config().server_name.clone(),
        term,
    };
    let mut results = homeserver.store().read(move |c| search.answer(c)).await?;
    let limited = results.len() > limit;
    results.truncate(limit);
    Ok(json!({ "results": results, "limited": limited }))
}

struct Search {
    user: UserId,
    own: ServerName,
    term: String,
}

impl Search {
    fn answer(&self, c: &mut dyn Conn) -> storage::Result<Vec<Value>> {
        let users = candidates(c, &self.term, CANDIDATES_MAX)?;
        let mut by_user: BTreeMap<UserId, Vec<Place>> = BTreeMap::new();
        for place in places(c, &users)? {
            by_user.entry(place.user.clone()).or_default().push(place);
        }
        let mine: BTreeSet<RoomNid> = sync_reads::memberships(c, &self.user)?
            .into_iter()
            .filter(|known| known.membership == "join")
            .map(|known| known.nid)
            .collect();
        let mut public = BTreeMap::new();
        let mut results = Vec::new();
        for (user, places) in by_user {
            let mut shown = None;
            for place in &places {
                let shared = mine.contains(&place.nid) && user != self.user;
                if shared || is_public(c, &mut public, &place.room)? {
                    shown = Some(place);
                    break;
                }
            }
            let Some(place) = shown else {
                continue;
            };
            let (name, avatar) = self.profile(c, &user, place)?;
            if !self.matches(&user, name.as_deref()) {
                continue;
            }
            let mut result = json!({ "user_id": user });
            if let Some(name) = name {
                result["display_name"] = Value::from(name);
            }
            if let Some(avatar) = avatar {
                result["avatar_url"] = Value::from(avatar);
            }
            results.push(result);
        }
        Ok(results)
    }

    /// Of our users the profile that everybody may see, of others what they are called in that room.
    fn profile(
        &self,
        c: &mut dyn Conn,
        user: &UserId,
        place: &Place,
    ) -> storage::Result<(Option<String>, Option<String>)> {
        if user.server_str() == self.own.as_str() {
            let mut field = |name: &str| {
                let value = storage::profiles::get(c, user, name)?;
                Ok::<_, storage::Error>(
                    value.and_then(|json| serde_json::from_str::<String>(&json).ok()),
                )
            };
            return Ok((field("displayname")?, field("avatar_url")?));
        }
        let member = events::pdus(c, &[place.event])?.remove(&place.event);
        let text = |key: &str| {
            let value = member.as_ref()?.content_get_str(key)?;
            Some(value.into_owned())
        };
        Ok((text("displayname"), text("avatar_url")))
    }

    fn matches(&self, user: &UserId, name: Option<&str>) -> bool {
        user.as_str().to_lowercase().contains(&self.term)
            || name.is_some_and(|name| name.to_lowercase().contains(&self.term))
    }
}

/// Whether anybody may enter the room or look into it.
fn is_public(
    c: &mut dyn Conn,
    known: &mut BTreeMap<RoomId, bool>,
    room: &RoomId,
) -> storage::Result<bool> {
    if let Some(public) = known.get(room) {
        return Ok(*public);
    }
    let public =
        describe(c, room)?.is_some_and(|room| room.join_rule == "public" || room.world_readable);
    known.insert(room.clone(), public);
    Ok(public)
}
