//! What other servers may read of a room: events, state, auth chains, history (joins.md 2.7).
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#backfilling-and-retrieving-missing-events>

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use futures::Stream;
use protocol::id::{EventId, RoomId, ServerName};
use protocol::nid::{EventNid, KeyNid, RoomNid};
use protocol::pdu::Pdu;
use protocol::power::PowerLevels;
use protocol::redaction;
use protocol::state::StateMap;
use room::acl;
use room::effect::Place;
use serde_json::{Map, Value, json};
use storage::events::{self, Standing, Status};
use storage::federation_reads::{self as reads, Asker};
use storage::{Conn, Store, state_log, states, timeline};

use crate::Homeserver;
use crate::error::{MatrixError, Result};

/// What the id of an event takes in a list, from room version 3 on.
const ID_JSON_BYTES: usize = 47;
/// Events of one get_missing_events answer (F-6).
const MISSING_EVENTS_MAX: usize = 20;
/// Events of one backfill answer (F-7).
const BACKFILL_MAX: usize = 100;
/// Event ids that a request may name.
const NAMED_EVENTS_MAX: usize = 100;
/// Events read for one piece of a streamed answer.
const STREAM_EVENTS: usize = 500;
/// An answer goes out in pieces of about this size: one event for each would cost sixteen times as much.
const STREAM_BYTES: usize = 64 * 1024;

/// Reading on behalf of one other server.
pub struct FederationReads<'a> {
    hs: &'a Homeserver,
    origin: ServerName,
}

/// `GET /backfill`, `GET /event`: events and when they were given out.
#[derive(Clone, Debug)]
pub struct Given {
    pub origin: ServerName,
    pub origin_server_ts: i64,
    /// The federation form, redacted where the asker may not see it.
    pub pdus: Vec<Arc<str>>,
}

/// What `get_missing_events` was asked.
#[derive(Clone, Debug)]
pub struct Gap {
    pub earliest: Vec<EventId>,
    pub latest: Vec<EventId>,
    pub min_depth: i64,
    pub limit: usize,
}

impl Homeserver {
    /// What `origin` may read here.
    pub fn reads_of(&self, origin: ServerName) -> FederationReads<'_> {
        FederationReads { hs: self, origin }
    }
}

fn not_in_room() -> MatrixError {
    MatrixError::forbidden("Your server is not in this room")
}

fn unknown_event() -> MatrixError {
    MatrixError::not_found("This event is not known here")
}

impl FederationReads<'_> {
    /// The room, if we know it and its ACL lets this server ask.
    pub async fn knock_on(&self, room: &RoomId) -> Result<Asker> {
        let (asked, origin) = (room.clone(), self.origin.clone());
        let asker = self
            .hs
            .store()
            .read(move |c| reads::asker(c, &asked, &origin))
            .await?
            .ok_or_else(|| MatrixError::not_found("This room is not known here"))?;
        if !acl::allows(asker.acl.as_deref(), &self.origin) {
            return Err(MatrixError::forbidden(
                "The room's ACL shuts your server out",
            ));
        }
        Ok(asker)
    }

    /// The same, for a server that has a member in it.
    async fn member_of(&self, room: &RoomId) -> Result<Asker> {
        let asker = self.knock_on(room).await?;
        if asker.in_room {
            Ok(asker)
        } else {
            Err(not_in_room())
        }
    }

    /// The state before an event, for a full room (F-3, F-16): the events and their auth chain.
    async fn state_before(
        &self,
        room: &RoomId,
        event: &EventId,
    ) -> Result<(RoomNid, Vec<EventNid>, Vec<EventNid>)> {
        let asker = self.member_of(room).await?;
        if asker.partial {
            return Err(still_partial());
        }
        let (room, event) = (asker.room.nid, event.clone());
        self.hs
            .store()
            .read(move |c| {
                let Some(status) = status(c, room, &event)? else {
                    return Ok(None);
                };
                if status.standing == Standing::Rejected || status.partial {
                    return Ok(None);
                }
                let Some((before, _)) = states::around(c, status.nid)? else {
                    return Ok(None);
                };
                let state: Vec<EventNid> = before.iter().map(|(_, nid)| nid).collect();
                let chain = state_log::auth_chain(c, room, &state)?;
                Ok(Some((room, state, chain)))
            })
            .await?
            .ok_or_else(unknown_event)
    }

    /// `GET /state_ids/{roomId}`: the answer's body.
    pub async fn state_ids(&self, room: &RoomId, event: &EventId) -> Result<String> {
        let (room, state, chain) = self.state_before(room, event).await?;
        let store = self.hs.store();
        let body = store.read(move |c| {
            let mut body = String::with_capacity((state.len() + chain.len() + 1) * ID_JSON_BYTES);
            body.push_str("{\"pdu_ids\":[");
            state_log::write_ids(c, room, &state, &mut body)?;
            body.push_str("],\"auth_chain_ids\":[");
            state_log::write_ids(c, room, &chain, &mut body)?;
            body.push_str("]}");
            Ok(body)
        });
        Ok(body.await?)
    }

    /// `GET /state/{roomId}`, the auth chain first, so that whoever reads along has what it needs to judge an
    /// event when it comes, and need not keep it.
    pub async fn state(&self, room: &RoomId, event: &EventId) -> Result<EventStream> {
        let (_, state, chain) = self.state_before(room, event).await?;
        Ok(EventStream::new(self.hs.store().clone())
            .text("{\"auth_chain\":[")
            .events(chain)
            .text("],\"pdus\":[")
            .events(state)
            .text("]}"))
    }

    /// `GET /event/{eventId}`
    pub async fn event(&self, event: &EventId) -> Result<Given> {
        let (id, origin) = (event.clone(), self.origin.clone());
        let own = self.hs.config().server_name.clone();
        let pdu = self
            .hs
            .store()
            .read(move |c| {
                let found = events::statuses_by_id(c, std::slice::from_ref(&id))?.remove(&id);
                let Some(status) = found else {
                    return Ok(Err(unknown_event()));
                };
                let Some(row) = storage::rooms::by_nid(c, status.room)? else {
                    return Ok(Err(unknown_event()));
                };
                let Some(asker) = reads::asker(c, &row.room_id, &origin)? else {
                    return Ok(Err(unknown_event()));
                };
                if !asker.in_room {
                    return Ok(Err(not_in_room()));
                }
                let Some(body) = events::body(c, status.nid)? else {
                    return Ok(Err(unknown_event()));
                };
                // Outside of a timeline there is only state, which members get anyway with the auth chains.
                if status.place == Place::Outlier && !body.pdu.is_state() {
                    return Ok(Err(unknown_event()));
                }
                if asker.partial && body.pdu.sender.server_str() != own.as_str() {
                    return Ok(Err(still_partial()));
                }
                let mut shown = shown_to(c, &own, &origin, &asker, &[status.nid])?;
                Ok(shown.pop().ok_or_else(unknown_event))
            })
            .await??;
        Ok(self.given(vec![pdu]))
    }

    /// `GET /event_auth/{roomId}/{eventId}`: exactly the event's auth chain (F-17).
    pub async fn event_auth(&self, room: &RoomId, event: &EventId) -> Result<EventStream> {
        let asker = self.member_of(room).await?;
        let own = self.hs.config().server_name.clone();
        let (room, event) = (asker.room.nid, event.clone());
        let chain = self
            .hs
            .store()
            .read(move |c| {
                let Some(status) = status(c, room, &event)? else {
                    return Ok(Err(unknown_event()));
                };
                let ours = events::body(c, status.nid)?
                    .is_some_and(|body| body.pdu.sender.server_str() == own.as_str());
                // What we sent to somebody we also let them check (F-5).
                if asker.partial && !ours {
                    return Ok(Err(still_partial()));
                }
                if status.standing == Standing::Rejected {
                    return Ok(Err(unknown_event()));
                }
                let chain = state_log::auth_chain(c, room, &[status.nid])?;
                Ok(Ok(chain))
            })
            .await??;
        Ok(EventStream::new(self.hs.store().clone())
            .text("{\"auth_chain\":[")
            .events(chain)
            .text("]}"))
    }

    /// `POST /get_missing_events/{roomId}`, oldest first.
    pub async fn missing_events(&self, room: &RoomId, gap: Gap) -> Result<Vec<Arc<str>>> {
        if gap.earliest.len().max(gap.latest.len()) > NAMED_EVENTS_MAX {
            return Err(MatrixError::invalid_param("Too many events are named"));
        }
        let asker = self.member_of(room).await?;
        let limit = gap.limit.min(MISSING_EVENTS_MAX);
        let origin = self.origin.clone();
        let own = self.hs.config().server_name.clone();
        Ok(self
            .hs
            .store()
            .read(move |c| {
                let found = reads::missing_events(
                    c,
                    asker.room.nid,
                    &gap.earliest,
                    &gap.latest,
                    gap.min_depth,
                    limit,
                )?;
                shown_to(c, &own, &origin, &asker, &found)
            })
            .await?)
    }

    /// `GET /backfill/{roomId}`, newest first.
    pub async fn backfill(&self, room: &RoomId, from: Vec<EventId>, limit: usize) -> Result<Given> {
        if from.len() > NAMED_EVENTS_MAX {
            return Err(MatrixError::invalid_param("Too many events are named"));
        }
        let asker = self.member_of(room).await?;
        let limit = limit.min(BACKFILL_MAX);
        let origin = self.origin.clone();
        let own = self.hs.config().server_name.clone();
        let pdus = self
            .hs
            .store()
            .read(move |c| {
                let found = reads::backfill(c, asker.room.nid, &from, limit)?;
                shown_to(c, &own, &origin, &asker, &found)
            })
            .await?;
        Ok(self.given(pdus))
    }

    /// `GET /timestamp_to_event/{roomId}`
    pub async fn timestamp_to_event(
        &self,
        room: &RoomId,
        ts_ms: i64,
        forward: bool,
    ) -> Result<Value> {
        let asker = self.member_of(room).await?;
        let room = asker.room.nid;
        let (_, event_id, ts) = self
            .hs
            .store()
            .read(move |c| reads::closest_event(c, room, ts_ms, forward))
            .await?
            .ok_or_else(|| MatrixError::not_found("There is no event on that side of this time"))?;
        Ok(json!({ "event_id": event_id, "origin_server_ts": ts }))
    }

    fn given(&self, pdus: Vec<Arc<str>>) -> Given {
        Given {
            origin: self.hs.config().server_name.clone(),
            origin_server_ts: self.hs.clock().unix_ms(),
            pdus,
        }
    }
}

fn still_partial() -> MatrixError {
    MatrixError::partial_state("This server does not yet have the room's whole state")
}

/// A stored event of this room.
fn status(c: &mut dyn Conn, room: RoomNid, event: &EventId) -> storage::Result<Option<Status>> {
    let found = events::statuses_by_id(c, std::slice::from_ref(event))?.remove(event);
    Ok(found.filter(|status| status.room == room))
}

// -- visibility -----------------------------------------------------------------------------------

/// These events, in this order, as this server may see them: in clear or redacted (F-8, F-15, F-17).
fn shown_to(
    c: &mut dyn Conn,
    own: &ServerName,
    origin: &ServerName,
    asker: &Asker,
    nids: &[EventNid],
) -> storage::Result<Vec<Arc<str>>> {
    let pdus = events::pdus(c, nids)?;
    let redacted = redacted_among(c, asker.room.nid, &pdus)?;
    let mut eyes = Eyes::open(c, asker.room.nid, origin)?;
    let states = reads::states_around(c, nids)?;
    let mut shown = Vec::with_capacity(nids.len());
    for nid in nids {
        let Some(pdu) = pdus.get(nid) else {
            continue;
        };
        let clear = if asker.partial {
            // Who may see what others sent can not be told, what we sent went to the approximation.
            pdu.sender.server_str() == own.as_str()
        } else {
            match states.get(nid) {
                Some((before, after)) => eyes.see(c, before)? || eyes.see(c, after)?,
                // State outside of any timeline.
                None => true,
            }
        };
        shown.push(if clear && !redacted.contains(nid) {
            pdu.json.clone()
        } else {
            redacted_form(pdu)
        });
    }
    Ok(shown)
}

fn redacted_form(pdu: &Pdu) -> Arc<str> {
    if pdu.redacted {
        return pdu.json.clone();
    }
    let whole: Map<String, Value> =
        serde_json::from_str(&pdu.json).expect("a stored event is an object");
    Value::Object(redaction::redact(&whole, pdu.version))
        .to_string()
        .into()
}

/// History visibility for a server: what stands in a state, and whether one of its users was there.
struct Eyes {
    visibility: Option<KeyNid>,
    members: Vec<KeyNid>,
    /// `history_visibility` by event.
    levels: BTreeMap<EventNid, String>,
    memberships: BTreeMap<EventNid, Option<String>>,
}

impl Eyes {
    fn open(c: &mut dyn Conn, room: RoomNid, server: &ServerName) -> storage::Result<Self> {
        Ok(Self {
            visibility: states::key(c, room, "m.room.history_visibility", "")?,
            members: reads::member_keys_of(c, room, server)?,
            levels: BTreeMap::new(),
            memberships: BTreeMap::new(),
        })
    }

    fn see(&mut self, c: &mut dyn Conn, state: &StateMap) -> storage::Result<bool> {
        let level = match self.visibility.and_then(|key| state.get(key)) {
            Some(nid) => self.level(c, nid)?,
            None => "shared".to_owned(),
        };
        let enough: &[&str] = match level.as_str() {
            "invited" => &["join", "invite"],
            "joined" => &["join"],
            _ => return Ok(true),
        };
        let present: Vec<EventNid> = self
            .members
            .iter()
            .filter_map(|key| state.get(*key))
            .collect();
        self.read_memberships(c, &present)?;
        Ok(present.iter().any(|nid| {
            let membership = self.memberships.get(nid).and_then(Option::as_deref);
            membership.is_some_and(|m| enough.contains(&m))
        }))
    }

    fn level(&mut self, c: &mut dyn Conn, nid: EventNid) -> storage::Result<String> {
        if let Some(level) = self.levels.get(&nid) {
            return Ok(level.clone());
        }
        let body = events::body(c, nid)?;
        let level = body
            .and_then(|body| {
                let level = body.pdu.content_get_str("history_visibility")?;
                Some(level.into_owned())
            })
            .unwrap_or_default();
        self.levels.insert(nid, level.clone());
        Ok(level)
    }

    fn read_memberships(&mut self, c: &mut dyn Conn, nids: &[EventNid]) -> storage::Result<()> {
        let unknown: Vec<EventNid> = nids
            .iter()
            .filter(|nid| !self.memberships.contains_key(nid))
            .copied()
            .collect();
        for (nid, pdu) in events::pdus(c, &unknown)? {
            self.memberships
                .insert(nid, pdu.membership().map(str::to_owned));
        }
        Ok(())
    }
}

/// Those of these events that somebody redacted who may.
///
/// <https://spec.matrix.org/v1.18/rooms/v11/#handling-redactions>
fn redacted_among<'p>(
    c: &mut dyn Conn,
    room: RoomNid,
    pdus: impl IntoIterator<Item = (&'p EventNid, &'p Arc<Pdu>)>,
) -> storage::Result<BTreeSet<EventNid>> {
    let by_id: BTreeMap<&EventId, (EventNid, &Pdu)> = pdus
        .into_iter()
        .map(|(nid, pdu)| (&pdu.event_id, (*nid, &**pdu)))
        .collect();
    let ids: Vec<EventId> = by_id.keys().map(|id| (*id).clone()).collect();
    let mut redacted = BTreeSet::new();
    for redaction in timeline::redactions_of(c, room, &ids)? {
        let target = redaction.pdu.redacts.as_deref().and_then(|t| by_id.get(t));
        let Some((nid, target)) = target else {
            continue;
        };
        if &*target.kind == "m.room.create" || redacted.contains(nid) {
            continue;
        }
        let sender = &redaction.pdu.sender;
        let same_server = sender.server_str() == target.sender.server_str();
        if same_server || power_in(c, room, &redaction)?.can_redact(sender) {
            redacted.insert(*nid);
        }
    }
    Ok(redacted)
}

/// The power levels at an event.
fn power_in(
    c: &mut dyn Conn,
    room: RoomNid,
    event: &timeline::TimelineEvent,
) -> storage::Result<PowerLevels> {
    let mut at = |kind: &str| -> storage::Result<Option<Arc<Pdu>>> {
        let key = states::key(c, room, kind, "")?;
        match key.and_then(|key| event.before.get(key)) {
            Some(nid) => Ok(events::body(c, nid)?.map(|body| body.pdu)),
            None => Ok(None),
        }
    };
    let (create, levels) = (at("m.room.create")?, at("m.room.power_levels")?);
    Ok(PowerLevels::of(
        event.pdu.version,
        create.as_deref(),
        levels.as_deref(),
    ))
}

// -- large answers --------------------------------------------------------------------------------

/// A JSON answer with long lists of events, read from the store as it goes out. Events never change, so it
/// needs no snapshot and holds no reader while the other side is slow.
pub struct EventStream {
    store: Store,
    parts: std::collections::VecDeque<Part>,
}

enum Part {
    Text(String),
    Events(std::vec::IntoIter<EventNid>, bool),
}

impl EventStream {
    pub(crate) fn new(store: Store) -> Self {
        Self {
            store,
            parts: std::collections::VecDeque::new(),
        }
    }

    pub(crate) fn text(mut self, text: impl Into<String>) -> Self {
        self.parts.push_back(Part::Text(text.into()));
        self
    }

    /// The elements of a list, without its brackets.
    pub(crate) fn events(mut self, events: Vec<EventNid>) -> Self {
        self.parts
            .push_back(Part::Events(events.into_iter(), false));
        self
    }

    /// The answer in pieces. An error cuts it off, which the other side notices.
    pub fn into_stream(self) -> impl Stream<Item = storage::Result<Bytes>> + Send {
        futures::stream::try_unfold(self, |mut this| async move {
            let mut piece = String::new();
            while piece.len() < STREAM_BYTES {
                if !this.write_some(&mut piece).await? {
                    break;
                }
            }
            Ok((!piece.is_empty()).then(|| (Bytes::from(piece), this)))
        })
    }

    /// `false` at the end.
    async fn write_some(&mut self, piece: &mut String) -> storage::Result<bool> {
        match self.parts.front_mut() {
            None => return Ok(false),
            Some(Part::Text(text)) => {
                piece.push_str(text);
                self.parts.pop_front();
            }
            Some(Part::Events(events, begun)) => {
                let batch: Vec<EventNid> = events.by_ref().take(STREAM_EVENTS).collect();
                if batch.is_empty() {
                    self.parts.pop_front();
                    return Ok(true);
                }
                for json in self
                    .store
                    .read(move |c| federation_forms(c, &batch))
                    .await?
                {
                    if *begun {
                        piece.push(',');
                    }
                    *begun = true;
                    piece.push_str(&json);
                }
            }
        }
        Ok(true)
    }
}

/// The federation form of events, redacted ones redacted, without a look into the others.
fn federation_forms(c: &mut dyn Conn, nids: &[EventNid]) -> storage::Result<Vec<Arc<str>>> {
    let mut forms = events::json(c, nids)?;
    let targets = reads::redaction_targets(c, nids)?;
    if !targets.is_empty() {
        let pdus = events::pdus(c, &targets)?;
        let room = match targets.first() {
            Some(first) => storage::rooms::of_event(c, *first)?,
            None => None,
        };
        if let Some(room) = room {
            let redacted = redacted_among(c, room, &pdus)?;
            for (nid, json) in &mut forms {
                if redacted.contains(nid)
                    && let Some(pdu) = pdus.get(nid)
                {
                    *json = redacted_form(pdu);
                }
            }
        }
    }
    Ok(forms.into_iter().map(|(_, json)| json).collect())
}
