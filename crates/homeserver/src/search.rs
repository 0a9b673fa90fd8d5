//! Searching the messages of a user's rooms.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#server-side-search>

use std::collections::BTreeMap;

use protocol::id::RoomId;
use protocol::nid::{EventNid, RoomNid};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use storage::{Conn, event_index, sync_reads, timeline};

use crate::Homeserver;
use crate::error::{MatrixError, Result};
use crate::messages;
use crate::room_view::{Reader, RoomView};
use crate::sync::filter::EventFilter;

/// Events that one search finds; more are not counted.
const FOUND_MAX: i64 = 2_000;
const PAGE_MAX: usize = 100;
const CONTEXT_MAX: usize = 50;

#[derive(Clone, Debug, Deserialize)]
pub struct SearchAsked {
    search_categories: Categories,
}

#[derive(Clone, Debug, Deserialize)]
struct Categories {
    room_events: Option<RoomEvents>,
}

#[derive(Clone, Debug, Deserialize)]
struct RoomEvents {
    search_term: String,
    keys: Option<Vec<String>>,
    #[serde(default)]
    filter: EventFilter,
    order_by: Option<String>,
    event_context: Option<ContextAsked>,
    #[serde(default)]
    include_state: bool,
    groupings: Option<Groupings>,
}

#[derive(Clone, Debug, Deserialize)]
struct ContextAsked {
    before_limit: Option<usize>,
    after_limit: Option<usize>,
    #[serde(default)]
    include_profile: bool,
}

#[derive(Clone, Debug, Deserialize)]
struct Groupings {
    #[serde(default)]
    group_by: Vec<GroupBy>,
}

#[derive(Clone, Debug, Deserialize)]
struct GroupBy {
    key: String,
}

pub async fn search(
    homeserver: &Homeserver,
    reader: &Reader,
    asked: SearchAsked,
    next_batch: Option<String>,
) -> Result<Value> {
    let Some(asked) = asked.search_categories.room_events else {
        return Ok(json!({ "search_categories": {} }));
    };
    if !matches!(asked.order_by.as_deref(), None | Some("rank" | "recent")) {
        return Err(MatrixError::invalid_param("order_by is rank or recent"));
    }
    let skip: usize = match next_batch.as_deref().filter(|token| !token.is_empty()) {
        None => 0,
        Some(token) => token
            .parse()
            .map_err(|_| MatrixError::invalid_param("next_batch is no token of this server"))?,
    };
    let search = Search {
        reader: reader.clone(),
        words: event_index::split_words(&asked.search_term)
            .into_iter()
            .collect(),
        asked,
        skip,
        now_ms: homeserver.clock().unix_ms(),
    };
    let found = homeserver.store().read(move |c| search.answer(c)).await?;
    Ok(json!({ "search_categories": { "room_events": found } }))
}

struct Search {
    reader: Reader,
    words: Vec<String>,
    asked: RoomEvents,
    skip: usize,
    now_ms: i64,
}

impl Search {
    fn answer(&self, c: &mut dyn Conn) -> storage::Result<Value> {
        let rooms = self.rooms(c)?;
        let numbers: Vec<RoomNid> = rooms.keys().copied().collect();
        let all = ["content.body", "content.name", "content.topic"].map(str::to_owned);
        let fields = self.asked.keys.clone().unwrap_or_else(|| all.to_vec());
        let found = storage::search::find(c, &numbers, &self.words, &fields, FOUND_MAX)?;
        let visible = self.visible(c, &rooms, &found)?;
        let limit = self
            .asked
            .filter
            .limit
            .map_or(10, |limit| limit as usize)
            .clamp(1, PAGE_MAX);
        let page: Vec<&(RoomId, EventNid)> = visible.iter().skip(self.skip).take(limit).collect();
        let mut results = Vec::new();
        let mut state = Map::new();
        let mut groups: BTreeMap<&str, Map<String, Value>> = BTreeMap::new();
        for (place, (room, nid)) in page.iter().enumerate() {
            let Some(mut view) = RoomView::open(c, room, &self.reader)? else {
                continue;
            };
            let Some(event) = timeline::by_nid(view.c, *nid)? else {
                continue;
            };
            let shown = view.dress(std::slice::from_ref(&event), self.now_ms)?.pop();
            let mut result = json!({ "rank": 1.0, "result": shown });
            if let Some(context) = &self.asked.event_context {
                result["context"] = self.context(&mut view, &event, context)?;
            }
            if self.asked.include_state && !state.contains_key(room.as_str()) {
                state.insert(room.to_string(), self.state(&mut view)?);
            }
            for (key, name) in [
                ("room_id", room.as_str()),
                ("sender", event.pdu.sender.as_str()),
            ] {
                if self.grouped_by(key) {
                    let group = groups.entry(key).or_default();
                    let entry = group
                        .entry(name.to_owned())
                        .or_insert_with(|| json!({ "results": [], "order": place }));
                    if let Some(list) = entry["results"].as_array_mut() {
                        list.push(Value::from(event.pdu.event_id.as_str()));
                    }
                }
            }
            results.push(result);
        }
        let mut highlights = self.words.clone();
        highlights.sort();
        let full_page = results.len() == limit;
        let mut body = json!({
            "count": visible.len(),
            "results": results,
            "highlights": highlights,
        });
        if full_page {
            body["next_batch"] = Value::from((self.skip + limit).to_string());
        }
        if self.asked.include_state {
            body["state"] = Value::Object(state);
        }
        if !groups.is_empty() {
            body["groups"] = json!(groups);
        }
        Ok(body)
    }

    fn grouped_by(&self, key: &str) -> bool {
        let groupings = self.asked.groupings.as_ref();
        groupings.is_some_and(|groupings| groupings.group_by.iter().any(|by| by.key == key))
    }

    /// Rooms the reader is or was in, as far as the filter wants them.
    fn rooms(&self, c: &mut dyn Conn) -> storage::Result<BTreeMap<RoomNid, RoomId>> {
        let memberships = sync_reads::memberships(c, &self.reader.user)?;
        Ok(memberships
            .into_iter()
            .filter(|known| known.out_of_band.is_none())
            .filter(|known| matches!(known.membership.as_str(), "join" | "leave" | "ban"))
            .filter(|known| self.asked.filter.wants_room(known.room.as_str()))
            .map(|known| (known.nid, known.room))
            .collect())
    }

    fn visible(
        &self,
        c: &mut dyn Conn,
        rooms: &BTreeMap<RoomNid, RoomId>,
        found: &[EventNid],
    ) -> storage::Result<Vec<(RoomId, EventNid)>> {
        let mut by_room: BTreeMap<RoomId, Vec<EventNid>> = BTreeMap::new();
        let bodies = storage::events::bodies(c, found)?;
        for nid in found {
            let room = bodies.get(nid).and_then(|body| rooms.get(&body.room));
            if let Some(room) = room {
                by_room.entry(room.clone()).or_default().push(*nid);
            }
        }
        let mut seen = Vec::new();
        for (room, nids) in by_room {
            let Some(mut view) = RoomView::open(c, &room, &self.reader)? else {
                continue;
            };
            for event in timeline::by_nids(view.c, &nids)? {
                let filter = &self.asked.filter;
                let pdu = &event.pdu;
                let passes =
                    filter.wants(&pdu.kind, Some(pdu.sender.as_str()), &pdu.content_value());
                if passes && view.sees(&event)? {
                    seen.push((event.stream, room.clone(), event.nid));
                }
            }
        }
        seen.sort_by_key(|(stream, _, _)| std::cmp::Reverse(*stream));
        Ok(seen.into_iter().map(|(_, room, nid)| (room, nid)).collect())
    }

    fn context(
        &self,
        view: &mut RoomView<'_>,
        event: &timeline::TimelineEvent,
        asked: &ContextAsked,
    ) -> storage::Result<Value> {
        let before = asked.before_limit.unwrap_or(5).min(CONTEXT_MAX);
        let after = asked.after_limit.unwrap_or(5).min(CONTEXT_MAX);
        let (before, after, [start, end]) =
            messages::context_of(view, event, before, after, self.now_ms)?;
        let mut context = json!({ "start": start.to_string(), "end": end.to_string() });
        if asked.include_profile {
            let mut profiles = Map::new();
            for event in before.iter().chain(&after) {
                let Some(sender) = event["sender"].as_str() else {
                    continue;
                };
                let state = view.room.state.clone();
                if let Some(member) = view.state_event(&state, "m.room.member", sender)? {
                    let profile = json!({
                        "displayname": member.content_get_str("displayname"),
                        "avatar_url": member.content_get_str("avatar_url"),
                    });
                    profiles.insert(sender.to_owned(), profile);
                }
            }
            context["profile_info"] = Value::Object(profiles);
        }
        context["events_before"] = json!(before);
        context["events_after"] = json!(after);
        Ok(context)
    }

    /// C-27: in a partial room without the members that are missing.
    fn state(&self, view: &mut RoomView<'_>) -> storage::Result<Value> {
        let state = view.readable_state()?.unwrap_or_default();
        let nids: Vec<EventNid> = state.iter().map(|(_, nid)| nid).collect();
        Ok(json!(view.dress_state(&nids, self.now_ms)?))
    }
}
