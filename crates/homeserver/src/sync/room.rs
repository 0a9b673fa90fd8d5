//! One room in a sync answer: its timeline, and the state that leads up to it.

use std::collections::{BTreeMap, BTreeSet};

use protocol::id::{EventId, UserId};
use protocol::nid::{EventNid, KeyNid};
use protocol::state::StateMap;
use serde_json::{Map, Value, json};
use storage::timeline::{self, Stretch, TimelineEvent};
use storage::{states, sync_reads};

use super::filter::{EventFilter, EventFormat, only_fields};
use super::lazy::SentMembers;
use super::token::PageToken;
use super::{Ask, SentNow};
use crate::room_view::{Reader, RoomView};

type Result<T> = storage::Result<T>;

/// Events looked at for one timeline; a filter that passes hardly any ends the search here.
const SCANNED_MAX: usize = 2000;
/// Members that name a room.
const HEROES: i64 = 5;

/// Which part of a room's life to tell.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// What the client has seen; `None` when it has to be told everything.
    pub after: Option<i64>,
    pub up_to: i64,
    /// The client may hold an older timeline that this one does not continue.
    pub broken: bool,
    /// Whether the room became full or changed members, so that the summary must be told again (O-56).
    pub summary: bool,
}

pub struct Timeline {
    /// Oldest first.
    pub events: Vec<TimelineEvent>,
    pub limited: bool,
    pub prev_batch: PageToken,
}

/// What `/sync` tells of a joined or left room, without account data and ephemeral events.
pub struct Told {
    pub body: Map<String, Value>,
    pub anything: bool,
}

pub fn tell(
    view: &mut RoomView<'_>,
    ask: &Ask,
    span: Span,
    end: &StateMap,
    sent: &SentMembers,
    sent_now: &mut Vec<SentNow>,
) -> Result<Told> {
    let timeline = timeline_of(view, ask, span)?;
    let base = match span.after {
        Some(after) if !ask.full_state => states::at_position(view.c, view.room.nid, after)?,
        _ => StateMap::new(),
    };
    let mut body = Map::new();
    let members_changed = span.after.is_none() || span.summary || members_differ(view, &base, end)?;
    let mut heroes = Vec::new();
    if members_changed && view.is_joined() {
        let (summary, named) = summary(view, end)?;
        heroes = named;
        body.insert("summary".to_owned(), summary);
    }
    let mut chosen = if ask.use_state_after {
        changes(&base, end)
    } else {
        state_before(&base, end, &timeline.events)
    };
    if ask.filter.lazy() {
        let lazy = Lazy {
            ask,
            span,
            sent,
            heroes: &heroes,
        };
        lazy.choose(view, &mut chosen, &timeline.events, end, sent_now)?;
    }
    let state = state_events(view, ask, chosen.into_values().collect())?;
    let events = client_events(view, ask, &timeline.events)?;
    let anything = !events.is_empty() || !state.is_empty() || body.contains_key("summary");
    let state_name = if ask.use_state_after {
        "org.matrix.msc4222.state_after"
    } else {
        "state"
    };
    body.insert(state_name.to_owned(), json!({ "events": state }));
    body.insert(
        "timeline".to_owned(),
        json!({
            "events": events,
            "limited": timeline.limited,
            "prev_batch": timeline.prev_batch.to_string(),
        }),
    );
    Ok(Told { body, anything })
}

/// The end of the span that fits the filter's limit. Broken where events are missing: what came before
/// such a gap was not followed by what came after it.
fn timeline_of(view: &mut RoomView<'_>, ask: &Ask, span: Span) -> Result<Timeline> {
    let filter = &ask.filter.room.timeline;
    let limit = filter.limit() as usize;
    let batch = i64::try_from(limit * 2).unwrap_or(i64::MAX).clamp(20, 200);
    let mut kept: Vec<TimelineEvent> = Vec::new();
    let mut limited = span.broken;
    let mut scanned = 0;
    // Newly seen rooms are told in the order of the DAG; what happened since, in the order it came.
    let mut place = (i64::MAX, i64::MAX);
    let mut up_to = span.up_to;
    'search: loop {
        let page = match span.after {
            Some(after) => timeline::newest(view.c, view.room.nid, after, up_to, batch)?,
            None => {
                let stretch = Stretch {
                    after: 0,
                    up_to: span.up_to,
                    from: place,
                };
                timeline::back(view.c, view.room.nid, stretch, batch)?
            }
        };
        let last_page = page.len() < usize::try_from(batch).unwrap_or(usize::MAX);
        for event in page {
            scanned += 1;
            place = (event.pdu.depth, event.stream);
            up_to = event.stream - 1;
            let gap = event.gap;
            if wanted(view, filter, &event)? {
                if kept.len() == limit {
                    limited = true;
                    break 'search;
                }
                kept.push(event);
            }
            if gap || scanned >= SCANNED_MAX {
                limited = true;
                break 'search;
            }
        }
        if last_page {
            break;
        }
    }
    kept.reverse();
    let prev_batch = match (kept.first(), span.after) {
        (Some(first), None) => PageToken {
            stream: Some(span.up_to),
            place: Some((first.pdu.depth, first.stream)),
        },
        (Some(first), Some(_)) => PageToken::at_stream(first.stream - 1),
        (None, _) => PageToken::at_stream(span.up_to),
    };
    Ok(Timeline {
        events: kept,
        limited,
        prev_batch,
    })
}

fn wanted(view: &mut RoomView<'_>, filter: &EventFilter, event: &TimelineEvent) -> Result<bool> {
    let pdu = &event.pdu;
    if !pdu.is_state() && view.ignored.contains(&pdu.sender) {
        return Ok(false);
    }
    let passes = filter.passes_all()
        || filter.wants(&pdu.kind, Some(pdu.sender.as_str()), &pdu.content_value());
    Ok(passes && view.sees(event)?)
}

/// What leads from `base` to the start of the timeline, and what the timeline then does not tell. A fork of
/// the DAG can change the state without a timeline event that does.
fn state_before(
    base: &StateMap,
    end: &StateMap,
    timeline: &[TimelineEvent],
) -> BTreeMap<KeyNid, EventNid> {
    let told: BTreeSet<EventNid> = timeline.iter().map(|event| event.nid).collect();
    let keys: BTreeSet<KeyNid> = timeline.iter().filter_map(|event| event.key).collect();
    let start = timeline.first().map_or(end, |event| &event.before);
    let mut chosen = changes(base, end);
    chosen.retain(|key, event| !keys.contains(key) && !told.contains(event));
    let at_start = changes(base, start);
    chosen.extend(
        at_start
            .into_iter()
            .filter(|(key, event)| keys.contains(key) && !told.contains(event)),
    );
    chosen
}

fn changes(base: &StateMap, end: &StateMap) -> BTreeMap<KeyNid, EventNid> {
    base.diff(end)
        .into_iter()
        .filter_map(|(key, _, event)| Some((key, event?)))
        .collect()
}

fn members_differ(view: &mut RoomView<'_>, base: &StateMap, end: &StateMap) -> Result<bool> {
    let events: Vec<EventNid> = changes(base, end).into_values().collect();
    let pdus = view.pdus(&events)?;
    Ok(pdus.iter().any(|pdu| &*pdu.kind == "m.room.member"))
}

/// The summary, and the heroes that it names.
fn summary(view: &mut RoomView<'_>, end: &StateMap) -> Result<(Value, Vec<(UserId, EventNid)>)> {
    let (joined, invited) = sync_reads::member_counts(view.c, view.room.nid)?;
    let mut summary = json!({
        "m.joined_member_count": joined,
        "m.invited_member_count": invited,
    });
    let mut named = false;
    for (kind, key) in [("m.room.name", "name"), ("m.room.canonical_alias", "alias")] {
        let event = view.state_event(end, kind, "")?;
        let text = event.as_ref().and_then(|event| event.content_get_str(key));
        named |= text.is_some_and(|text| !text.is_empty());
    }
    if named {
        return Ok((summary, Vec::new()));
    }
    let me = view.reader.user.clone();
    let heroes = sync_reads::heroes(view.c, view.room.nid, &me, HEROES)?;
    let users: Vec<&UserId> = heroes.iter().map(|(user, _)| user).collect();
    summary["m.heroes"] = json!(users);
    Ok((summary, heroes))
}

struct Lazy<'a> {
    ask: &'a Ask,
    span: Span,
    sent: &'a SentMembers,
    heroes: &'a [(UserId, EventNid)],
}

impl Lazy<'_> {
    /// Of all memberships leaves those that the timeline needs, and adds those it needs that did not change.
    fn choose(
        &self,
        view: &mut RoomView<'_>,
        chosen: &mut BTreeMap<KeyNid, EventNid>,
        timeline: &[TimelineEvent],
        end: &StateMap,
        sent_now: &mut Vec<SentNow>,
    ) -> Result<()> {
        let me = view.reader.user.clone();
        let mut needed: BTreeSet<UserId> = timeline
            .iter()
            .map(|event| event.pdu.sender.clone())
            .collect();
        needed.extend(self.heroes.iter().map(|(user, _)| user.clone()));
        let whole = self.span.after.is_none() || self.ask.full_state;
        if whole {
            needed.insert(me.clone());
        }
        let mut members = BTreeMap::new();
        let events: Vec<EventNid> = chosen.values().copied().collect();
        let pdus = view.pdus(&events)?;
        for (key, pdu) in chosen.keys().copied().zip(&pdus) {
            if &*pdu.kind == "m.room.member" {
                members.insert(key, pdu.state_key.clone());
            }
        }
        chosen.retain(|key, _| match members.get(key) {
            Some(Some(user)) => {
                **user == *me.as_str() || needed.iter().any(|n| n.as_str() == &**user)
            }
            Some(None) => false,
            None => true,
        });
        let in_timeline: BTreeSet<KeyNid> = timeline.iter().filter_map(|event| event.key).collect();
        let start = timeline.first().map_or(end, |event| &event.before);
        let cache_key = (
            me.clone(),
            view.reader.device.clone().unwrap_or_default(),
            view.room.room.clone(),
        );
        let mut told: Vec<(UserId, EventNid)> = timeline
            .iter()
            .filter(|event| &*event.pdu.kind == "m.room.member")
            .filter_map(|event| {
                let user = UserId::parse(event.pdu.state_key.as_deref()?).ok()?;
                Some((user, event.nid))
            })
            .collect();
        for user in needed {
            let key = states::key(view.c, view.room.nid, "m.room.member", user.as_str())?;
            let Some(key) = key else {
                continue;
            };
            if let Some(event) = chosen.get(&key) {
                told.push((user, *event));
                continue;
            }
            let Some(event) = start.get(key).or_else(|| end.get(key)) else {
                continue;
            };
            // A membership that begins in the timeline needs no earlier one, unless something was sent before.
            let begins = in_timeline.contains(&key) && start.get(key).is_none();
            let known = !whole
                && !self.ask.filter.room.state.include_redundant_members
                && self
                    .sent
                    .has(&cache_key, &user, event, self.span.after.unwrap_or(0));
            if !begins && !known && !timeline.iter().any(|e| e.nid == event) {
                chosen.insert(key, event);
                told.push((user, event));
            }
        }
        if view.room.partial {
            // P-27
            for event in view.members_from_auth_events(timeline, start)? {
                let pdu = view.pdu(event)?;
                let Some(user) = pdu.state_key.as_deref().and_then(|u| UserId::parse(u).ok())
                else {
                    continue;
                };
                let key = states::key(view.c, view.room.nid, "m.room.member", user.as_str())?;
                let known = !whole
                    && self
                        .sent
                        .has(&cache_key, &user, event, self.span.after.unwrap_or(0));
                if !known {
                    // A membership that was never state here has no key of its own.
                    let place = u32::try_from(told.len()).unwrap_or(u32::MAX);
                    let key = key.unwrap_or(KeyNid(u32::MAX - place));
                    chosen.entry(key).or_insert(event);
                    told.push((user, event));
                }
            }
        }
        sent_now.push(SentNow {
            key: cache_key,
            members: told,
        });
        Ok(())
    }
}

fn state_events(view: &mut RoomView<'_>, ask: &Ask, nids: Vec<EventNid>) -> Result<Vec<Value>> {
    let filter = &ask.filter.room.state;
    let mut wanted = Vec::with_capacity(nids.len());
    let pdus = view.pdus(&nids)?;
    for (nid, pdu) in nids.into_iter().zip(&pdus) {
        let passes = filter.passes_all()
            || filter.wants(&pdu.kind, Some(pdu.sender.as_str()), &pdu.content_value());
        if passes {
            wanted.push(nid);
        }
    }
    let events = view.dress_state(&wanted, ask.now_ms)?;
    Ok(events.into_iter().map(|event| shape(ask, event)).collect())
}

fn client_events(
    view: &mut RoomView<'_>,
    ask: &Ask,
    events: &[TimelineEvent],
) -> Result<Vec<Value>> {
    if ask.filter.event_format == EventFormat::Federation {
        return Ok(events
            .iter()
            .map(|event| serde_json::from_str(&event.pdu.json).unwrap_or_default())
            .collect());
    }
    let events = view.dress(events, ask.now_ms)?;
    Ok(events.into_iter().map(|event| shape(ask, event)).collect())
}

/// Inside `/sync` events have no `room_id`, and only the fields that the filter leaves.
fn shape(ask: &Ask, mut event: Map<String, Value>) -> Value {
    event.remove("room_id");
    Value::Object(match &ask.filter.event_fields {
        Some(fields) => only_fields(event, fields),
        None => event,
    })
}

/// The stripped state of a room that the reader is invited to, from the room itself.
pub fn stripped_state(view: &mut RoomView<'_>, own: EventNid) -> Result<Vec<Value>> {
    let state = view.room.state.clone();
    let own = view.pdu(own)?;
    let mut events = Vec::new();
    for kind in [
        "m.room.create",
        "m.room.name",
        "m.room.avatar",
        "m.room.topic",
        "m.room.join_rules",
        "m.room.canonical_alias",
        "m.room.encryption",
    ] {
        events.extend(view.state_event(&state, kind, "")?);
    }
    events.extend(view.state_event(&state, "m.room.member", own.sender.as_str())?);
    let mut stripped: Vec<Value> = events
        .iter()
        .filter(|event| event.event_id != own.event_id)
        .map(|event| crate::client_event::stripped_pdu(event))
        .collect();
    stripped.push(crate::client_event::stripped_pdu(&own));
    Ok(stripped)
}

/// Counts of what waits to be read: for the main timeline or the whole room, and for each thread.
pub fn unread(view: &mut RoomView<'_>, by_thread: bool) -> Result<(Value, Option<Value>)> {
    let Reader { user, .. } = view.reader.clone();
    let room = view.room.room.clone();
    let mut read_up_to: BTreeMap<String, i64> = BTreeMap::new();
    let mut everywhere = 0;
    for receipt in storage::receipts::of_user(view.c, &room, &user)? {
        let Ok(read) = EventId::parse(&receipt.event) else {
            continue;
        };
        let Some(event) = timeline::by_id(view.c, view.room.nid, &read)? else {
            continue;
        };
        match receipt.thread {
            None => everywhere = everywhere.max(event.stream),
            Some(thread) => {
                let main = if thread == "main" {
                    String::new()
                } else {
                    thread
                };
                let position = read_up_to.entry(main).or_insert(0);
                *position = event.stream.max(*position);
            }
        }
    }
    let waiting = storage::push::waiting(view.c, &user, room.as_str(), everywhere, i64::MAX)?;
    let mut counts: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    for (thread, position, highlight) in waiting {
        if position > read_up_to.get(&thread).copied().unwrap_or(0) {
            let of_thread = if by_thread { thread } else { String::new() };
            let count = counts.entry(of_thread).or_default();
            count.0 += 1;
            count.1 += u64::from(highlight);
        }
    }
    let shown = |(notifications, highlights): (u64, u64)| json!({ "notification_count": notifications, "highlight_count": highlights });
    let main = shown(counts.remove("").unwrap_or_default());
    let threads: Map<String, Value> = counts
        .into_iter()
        .map(|(thread, count)| (thread, shown(count)))
        .collect();
    Ok((
        main,
        (!threads.is_empty()).then_some(Value::Object(threads)),
    ))
}
