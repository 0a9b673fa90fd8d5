//! History: pages of messages, an event with what is around it, single events, events by time.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#getting-events-for-a-room>

use std::collections::BTreeSet;

use protocol::id::{EventId, RoomId, UserId};
use protocol::nid::EventNid;
use protocol::state::StateMap;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use storage::states;
use storage::timeline::{self, Stretch, TimelineEvent};

use crate::Homeserver;
use crate::error::{MatrixError, Result};
use crate::room_view::{Reader, RoomView, Standing};
use crate::sync::filter::{EventFilter, LIMIT_MAX};
use crate::sync::token::PageToken;

/// Events looked at for one page; a filter that passes hardly any ends the search here.
const SCANNED_MAX: usize = 3_000;
/// Times that one request asks other servers for more history.
const BACKFILLS_MAX: usize = 3;
/// Events asked of another server at a time.
const BACKFILL_EVENTS: u32 = 100;

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub enum Direction {
    #[serde(rename = "b")]
    Back,
    #[serde(rename = "f")]
    Forward,
}

pub fn page_limit(asked: Option<u32>, default: u32) -> u32 {
    asked.unwrap_or(default).clamp(1, LIMIT_MAX)
}

/// Between which two tokens to walk, and which way.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub direction: Direction,
    pub from: PageToken,
    pub to: Option<PageToken>,
}

impl Bounds {
    pub fn read(from: Option<&str>, to: Option<&str>, direction: Direction) -> Result<Self> {
        let parse = |text: &str| {
            PageToken::parse(text)
                .ok_or_else(|| MatrixError::invalid_param("This is no token of this server"))
        };
        let everything = PageToken {
            stream: None,
            place: None,
        };
        Ok(Self {
            direction,
            from: from.map(parse).transpose()?.unwrap_or(everything),
            to: to.map(parse).transpose()?,
        })
    }

    /// An end that is a token of /sync bounds the stream, and not the walk: on branches of the DAG, what is
    /// older in one order may be newer in the other.
    pub fn stretch(&self) -> Stretch {
        let end = self.to.filter(|to| to.place.is_none());
        let end = end.and_then(|to| to.stream);
        match self.direction {
            Direction::Back => Stretch {
                after: end.unwrap_or(i64::MIN),
                up_to: self.from.stream.unwrap_or(i64::MAX),
                from: self.from.place.unwrap_or((i64::MAX, i64::MAX)),
            },
            Direction::Forward => Stretch {
                after: self.from.stream.unwrap_or(i64::MIN),
                up_to: end.unwrap_or(i64::MAX),
                from: self.from.place.unwrap_or((i64::MIN, i64::MIN)),
            },
        }
    }

    /// Whether this event of the stretch lies beyond `to`.
    pub fn ends_before(&self, event: &TimelineEvent) -> bool {
        let Some(end) = self.to.and_then(|to| to.place) else {
            return false;
        };
        let place = (event.pdu.depth, event.stream);
        match self.direction {
            Direction::Back => place < end,
            Direction::Forward => place >= end,
        }
    }

    /// The token that goes on after this event.
    pub fn token_at(&self, event: &TimelineEvent) -> PageToken {
        PageToken {
            stream: self.from.stream,
            place: Some(boundary(event, self.direction)),
        }
    }
}

/// The place that a walk this way goes on from when it has passed the event. A place lies just before the
/// event that it names.
fn boundary(event: &TimelineEvent, direction: Direction) -> (i64, i64) {
    match direction {
        Direction::Back => (event.pdu.depth, event.stream),
        Direction::Forward => (event.pdu.depth, event.stream + 1),
    }
}

fn beside(event: &TimelineEvent, direction: Direction) -> PageToken {
    PageToken {
        stream: None,
        place: Some(boundary(event, direction)),
    }
}

#[derive(Clone, Debug)]
pub struct MessagesAsked {
    pub from: Option<String>,
    pub to: Option<String>,
    pub direction: Direction,
    pub limit: Option<u32>,
    pub filter: Option<String>,
}

/// One look at the store.
struct Page {
    kept: Vec<TimelineEvent>,
    /// Where to go on; `None` where nothing was found, not even what the filter left out.
    next: Option<PageToken>,
    /// The walk came to events before which others are missing here.
    hole: bool,
}

/// `/messages` (C-16): local events at once, older ones from other servers also while the room is partial.
pub async fn messages(
    homeserver: &Homeserver,
    reader: &Reader,
    room: &RoomId,
    asked: MessagesAsked,
) -> Result<Value> {
    homeserver.tasks().is_wanted(room);
    let filter = match &asked.filter {
        Some(text) => EventFilter::parse(text)?,
        None => EventFilter::default(),
    };
    let bounds = Bounds::read(asked.from.as_deref(), asked.to.as_deref(), asked.direction)?;
    let limit = page_limit(asked.limit.or(filter.limit), 10);
    let now_ms = homeserver.clock().unix_ms();
    let mut tries = 0;
    loop {
        let look = Look {
            reader: reader.clone(),
            room: room.clone(),
            filter: filter.clone(),
            bounds,
            limit: limit as usize,
            now_ms,
            // Rather a page that ends at a hole than one that skips it.
            last_try: tries == BACKFILLS_MAX,
        };
        let answer = homeserver.store().read(move |c| look.page(c)).await??;
        let Some(body) = answer else {
            tries += 1;
            let fetched = homeserver.rooms().backfill(room, BACKFILL_EVENTS).await;
            if !matches!(fetched, Ok(true)) {
                tries = BACKFILLS_MAX;
            }
            continue;
        };
        return Ok(body);
    }
}

struct Look {
    reader: Reader,
    room: RoomId,
    filter: EventFilter,
    bounds: Bounds,
    limit: usize,
    now_ms: i64,
    last_try: bool,
}

impl Look {
    /// `None` when other servers must be asked first.
    fn page(&self, c: &mut dyn storage::Conn) -> storage::Result<Result<Option<Value>>> {
        let forbidden = || MatrixError::forbidden("You may not see the history of this room");
        let forgotten = storage::sync_reads::forgotten(c, &self.reader.user)?;
        let Some(mut view) = RoomView::open(c, &self.room, &self.reader)? else {
            return Ok(Err(forbidden()));
        };
        let allowed = match view.standing {
            Standing::Joined => true,
            Standing::Left {
                was_joined: true,
                at,
                ..
            } => !forgotten
                .iter()
                .any(|(room, until)| *room == self.room && at <= *until),
            _ => view.world_readable()?,
        };
        if !allowed {
            return Ok(Err(forbidden()));
        }
        let page = self.walk(&mut view)?;
        if page.hole && !self.last_try && self.bounds.direction == Direction::Back {
            return Ok(Ok(None));
        }
        let mut body = Map::new();
        let state = if self.filter.lazy_load_members {
            self.members(&mut view, &page.kept)?
        } else {
            Vec::new()
        };
        let chunk = view.dress(&page.kept, self.now_ms)?;
        body.insert("chunk".to_owned(), json!(chunk));
        if !state.is_empty() {
            body.insert("state".to_owned(), json!(state));
        }
        body.insert("start".to_owned(), Value::from(self.start(&mut view)?));
        if let Some(next) = page.next {
            body.insert("end".to_owned(), Value::from(next.to_string()));
        }
        Ok(Ok(Some(Value::Object(body))))
    }

    fn start(&self, view: &mut RoomView<'_>) -> storage::Result<String> {
        if self.bounds.from.stream.is_some() || self.bounds.from.place.is_some() {
            return Ok(self.bounds.from.to_string());
        }
        let position = match self.bounds.direction {
            Direction::Back => {
                storage::streams::position(view.c, storage::streams::Stream::Events)?
            }
            Direction::Forward => i64::MIN,
        };
        Ok(PageToken::at_stream(position).to_string())
    }

    fn walk(&self, view: &mut RoomView<'_>) -> storage::Result<Page> {
        let mut page = Page {
            kept: Vec::new(),
            next: None,
            hole: false,
        };
        let batch = i64::try_from(self.limit * 2)
            .unwrap_or(i64::MAX)
            .clamp(20, 200);
        let mut stretch = self.bounds.stretch();
        let mut scanned = 0;
        loop {
            let events = match self.bounds.direction {
                Direction::Back => timeline::back(view.c, view.room.nid, stretch, batch)?,
                Direction::Forward => timeline::forth(view.c, view.room.nid, stretch, batch)?,
            };
            let last_batch = events.len() < usize::try_from(batch).unwrap_or(usize::MAX);
            for event in events {
                if self.bounds.ends_before(&event) {
                    return Ok(page);
                }
                scanned += 1;
                stretch.from = boundary(&event, self.bounds.direction);
                page.next = Some(self.bounds.token_at(&event));
                let hole = event.hole;
                if self.wants(view, &event)? {
                    page.kept.push(event);
                }
                // What comes before is missing: fetch it before going past, though the page be full, as the
                // next one does not see this event. On the last try it goes on from here.
                if hole && self.bounds.direction == Direction::Back {
                    page.hole = true;
                    if !self.last_try {
                        return Ok(page);
                    }
                }
                if page.kept.len() == self.limit || scanned >= SCANNED_MAX {
                    return Ok(page);
                }
            }
            if last_batch {
                return Ok(page);
            }
        }
    }

    fn wants(&self, view: &mut RoomView<'_>, event: &TimelineEvent) -> storage::Result<bool> {
        let pdu = &event.pdu;
        if !pdu.is_state() && view.ignored.contains(&pdu.sender) {
            return Ok(false);
        }
        let passes = self.filter.passes_all()
            || self
                .filter
                .wants(&pdu.kind, Some(pdu.sender.as_str()), &pdu.content_value());
        Ok(passes && view.sees(event)?)
    }

    /// Members that sent these events; P-27's rule where the state lacks them (O-53).
    fn members(
        &self,
        view: &mut RoomView<'_>,
        events: &[TimelineEvent],
    ) -> storage::Result<Vec<Value>> {
        let Some(first) = events.first() else {
            return Ok(Vec::new());
        };
        let nids = sender_members(view, events, &first.after)?;
        let members = view.dress_state(&nids, self.now_ms)?;
        Ok(members.into_iter().map(Value::Object).collect())
    }
}

/// The memberships of the senders of these events, in a state or from the events' own auth events.
fn sender_members(
    view: &mut RoomView<'_>,
    events: &[TimelineEvent],
    state: &StateMap,
) -> storage::Result<Vec<EventNid>> {
    let senders: BTreeSet<UserId> = events.iter().map(|e| e.pdu.sender.clone()).collect();
    let mut nids = Vec::new();
    for sender in senders {
        let key = states::key(view.c, view.room.nid, "m.room.member", sender.as_str())?;
        nids.extend(key.and_then(|key| state.get(key)));
    }
    for nid in view.members_from_auth_events(events, state)? {
        if !nids.contains(&nid) {
            nids.push(nid);
        }
    }
    Ok(nids)
}

/// `/event/{id}` (C-14): what is rejected, unknown or an outlier is not found.
pub async fn event(
    homeserver: &Homeserver,
    reader: &Reader,
    room: &RoomId,
    event: &EventId,
) -> Result<Map<String, Value>> {
    let (reader, room, event) = (reader.clone(), room.clone(), event.clone());
    let now_ms = homeserver.clock().unix_ms();
    homeserver
        .store()
        .read(move |c| {
            let Some(mut view) = RoomView::open(c, &room, &reader)? else {
                return Ok(None);
            };
            let Some(event) = visible_event(&mut view, &event)? else {
                return Ok(None);
            };
            Ok(view.dress(&[event], now_ms)?.pop())
        })
        .await?
        .ok_or_else(no_event)
}

fn no_event() -> MatrixError {
    MatrixError::not_found("There is no such event that you may see")
}

fn visible_event(view: &mut RoomView<'_>, id: &EventId) -> storage::Result<Option<TimelineEvent>> {
    let Some(event) = timeline::by_id(view.c, view.room.nid, id)? else {
        return Ok(None);
    };
    Ok(view.sees(&event)?.then_some(event))
}

/// `/context/{id}` (C-15): no part of it waits for a full state.
pub async fn context(
    homeserver: &Homeserver,
    reader: &Reader,
    room: &RoomId,
    event: &EventId,
    limit: Option<u32>,
    filter: Option<&str>,
) -> Result<Value> {
    let filter = match filter {
        Some(text) => EventFilter::parse(text)?,
        None => EventFilter::default(),
    };
    let limit = limit.or(filter.limit).unwrap_or(10).min(LIMIT_MAX) as usize;
    let look = Context {
        event: event.clone(),
        before: limit.div_ceil(2),
        after: limit / 2,
        look: Look {
            reader: reader.clone(),
            room: room.clone(),
            filter,
            bounds: Bounds::read(None, None, Direction::Back)?,
            limit,
            now_ms: homeserver.clock().unix_ms(),
            last_try: true,
        },
    };
    homeserver
        .store()
        .read(move |c| look.answer(c))
        .await?
        .ok_or_else(no_event)
}

struct Context {
    event: EventId,
    before: usize,
    after: usize,
    look: Look,
}

impl Context {
    fn answer(&self, c: &mut dyn storage::Conn) -> storage::Result<Option<Value>> {
        let look = &self.look;
        let Some(mut view) = RoomView::open(c, &look.room, &look.reader)? else {
            return Ok(None);
        };
        let Some(event) = visible_event(&mut view, &self.event)? else {
            return Ok(None);
        };
        let around = around(&mut view, look, &event, self.before, self.after)?;
        let mut all = vec![event.clone()];
        all.extend(around.before.iter().cloned());
        all.extend(around.after.iter().cloned());
        let state = around.after.last().unwrap_or(&event).after.clone();
        let nids = if look.filter.lazy_load_members {
            let mut nids = sender_members(&mut view, &all, &state)?;
            for (_, nid) in state.iter() {
                if &*view.pdu(nid)?.kind != "m.room.member" {
                    nids.push(nid);
                }
            }
            nids
        } else {
            let mut nids: Vec<EventNid> = state.iter().map(|(_, nid)| nid).collect();
            nids.extend(
                sender_members(&mut view, &all, &state)?
                    .into_iter()
                    .filter(|nid| !nids.contains(nid))
                    .collect::<Vec<_>>(),
            );
            nids
        };
        let now_ms = look.now_ms;
        let shown = view.dress(std::slice::from_ref(&event), now_ms)?.pop();
        let start = around.before.last().unwrap_or(&event);
        let end = around.after.last().unwrap_or(&event);
        Ok(Some(json!({
            "event": shown,
            "events_before": view.dress(&around.before, now_ms)?,
            "events_after": view.dress(&around.after, now_ms)?,
            "state": view.dress_state(&nids, now_ms)?,
            "start": beside(start, Direction::Back).to_string(),
            "end": beside(end, Direction::Forward).to_string(),
        })))
    }
}

struct Around {
    before: Vec<TimelineEvent>,
    after: Vec<TimelineEvent>,
}

fn around(
    view: &mut RoomView<'_>,
    look: &Look,
    event: &TimelineEvent,
    before: usize,
    after: usize,
) -> storage::Result<Around> {
    let mut side = |direction: Direction, limit: usize| {
        if limit == 0 {
            return Ok(Vec::new());
        }
        let look = Look {
            bounds: Bounds {
                direction,
                from: beside(event, direction),
                to: None,
            },
            limit,
            reader: look.reader.clone(),
            room: look.room.clone(),
            filter: look.filter.clone(),
            now_ms: look.now_ms,
            last_try: true,
        };
        Ok::<_, storage::Error>(look.walk(view)?.kept)
    };
    Ok(Around {
        before: side(Direction::Back, before)?,
        after: side(Direction::Forward, after)?,
    })
}

/// The events before and after, and the tokens beyond them.
pub type Surroundings = (
    Vec<Map<String, Value>>,
    Vec<Map<String, Value>>,
    [PageToken; 2],
);

/// Events before and after an event, nearest first, for search results: client forms and two tokens.
pub fn context_of(
    view: &mut RoomView<'_>,
    event: &TimelineEvent,
    before: usize,
    after: usize,
    now_ms: i64,
) -> storage::Result<Surroundings> {
    let everything = PageToken {
        stream: None,
        place: None,
    };
    let look = Look {
        reader: view.reader.clone(),
        room: view.room.room.clone(),
        filter: EventFilter::default(),
        bounds: Bounds {
            direction: Direction::Back,
            from: everything,
            to: None,
        },
        limit: 0,
        now_ms,
        last_try: true,
    };
    let around = around(view, &look, event, before, after)?;
    let tokens = [
        beside(around.before.last().unwrap_or(event), Direction::Back),
        beside(around.after.last().unwrap_or(event), Direction::Forward),
    ];
    Ok((
        view.dress(&around.before, now_ms)?,
        view.dress(&around.after, now_ms)?,
        tokens,
    ))
}

/// Events looked at for one that the reader may see.
const NEAR_TIME_MAX: i64 = 100;

/// The event nearest to a time, on one side of it (C-17).
pub async fn timestamp_to_event(
    homeserver: &Homeserver,
    user: &UserId,
    room: &RoomId,
    ts: i64,
    direction: Direction,
) -> Result<(EventId, i64)> {
    let reader = Reader {
        user: user.clone(),
        device: None,
    };
    let asked = room.clone();
    let found = homeserver
        .store()
        .read(move |c| {
            let Some(mut view) = RoomView::open(c, &asked, &reader)? else {
                return Ok(Err(MatrixError::forbidden("You are not in this room")));
            };
            if view.readable_state()?.is_none() {
                return Ok(Err(MatrixError::forbidden("You are not in this room")));
            }
            let forth = direction == Direction::Forward;
            let nid = view.room.nid;
            for event in timeline::at_time(view.c, nid, ts, forth, NEAR_TIME_MAX)? {
                if view.sees(&event)? {
                    let near_gap = event.gap || event.stream < 0;
                    let found = (event.pdu.event_id.clone(), event.pdu.origin_server_ts);
                    return Ok(Ok(Some((found, near_gap))));
                }
            }
            Ok(Ok(None))
        })
        .await??;
    if let Some((found, false)) = &found {
        return Ok(found.clone());
    }
    let local = found.map(|(found, _)| found);
    let rooms = homeserver.rooms();
    let remote = rooms
        .timestamp_to_event(room, ts, direction == Direction::Forward)
        .await
        .unwrap_or_default()
        .filter(|remote| is_nearer(remote.ts_ms, local.as_ref(), ts));
    let Some(remote) = remote else {
        return local
            .ok_or_else(|| MatrixError::not_found("There is no event on that side of the time"));
    };
    // The client will want to read on from there.
    if let Err(error) = rooms
        .backfill_at(room, &remote.event_id, &remote.server)
        .await
    {
        tracing::debug!(%room, event = %remote.event_id, %error, "not fetched");
    }
    Ok((remote.event_id, remote.ts_ms))
}

fn is_nearer(remote_ts: i64, local: Option<&(EventId, i64)>, ts: i64) -> bool {
    local.is_none_or(|local| remote_ts.abs_diff(ts) < local.1.abs_diff(ts))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sync_token_ends_a_walk_in_the_stream_and_not_in_the_dag() {
        let token = Some("s24_0_0_0_0_0_0_0_0");
        let back = Bounds::read(None, token, Direction::Back).unwrap();
        assert_eq!((back.stretch().after, back.stretch().up_to), (24, i64::MAX));
        let forward = Bounds::read(None, token, Direction::Forward).unwrap();
        let stretch = forward.stretch();
        assert_eq!((stretch.after, stretch.up_to), (i64::MIN, 24));
    }

    #[test]
    fn a_page_that_began_at_a_sync_token_keeps_its_bound() {
        let bounds = Bounds::read(Some("t50"), None, Direction::Back).unwrap();
        let stretch = bounds.stretch();
        assert_eq!((stretch.up_to, stretch.from), (50, (i64::MAX, i64::MAX)));
        let bounds = Bounds::read(Some("p50_7_3"), None, Direction::Back).unwrap();
        let stretch = bounds.stretch();
        assert_eq!((stretch.up_to, stretch.from), (50, (7, 3)));
    }

    #[test]
    fn foreign_tokens_are_refused() {
        assert!(Bounds::read(Some("nonsense"), None, Direction::Back).is_err());
        assert!(Bounds::read(None, Some("x"), Direction::Forward).is_err());
    }

    #[test]
    fn the_nearer_event_wins() {
        let local = (EventId::parse("$e").unwrap(), 5);
        assert!(is_nearer(8, Some(&local), 9));
        assert!(!is_nearer(0, Some(&local), 9));
        assert!(is_nearer(0, None, 9));
    }
}
