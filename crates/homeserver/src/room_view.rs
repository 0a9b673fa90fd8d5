//! One room as one user sees it, in one snapshot of the store.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use protocol::id::{EventId, RoomId, UserId};
use protocol::nid::{EventNid, KeyNid};
use protocol::pdu::Pdu;
use protocol::power::PowerLevels;
use protocol::state::StateMap;
use serde_json::{Map, Value};
use storage::timeline::{self, RoomRow, TimelineEvent};
use storage::{Conn, events, states};

use crate::client_event::{self, MemberText, Unsigned};
use crate::visibility::{Circumstances, HistoryVisibility, visible};

/// Who reads: the user and, for transaction ids, the device.
#[derive(Clone, Debug)]
pub struct Reader {
    pub user: UserId,
    pub device: Option<String>,
}

/// What the reader is to the room now.
#[derive(Clone, Debug, PartialEq)]
pub enum Standing {
    Joined,
    /// Was in the room, or was invited or knocked and is no more. The number is the stream position of the
    /// event that ended it.
    Left {
        at: i64,
        event: EventNid,
        was_joined: bool,
    },
    Invited,
    Knocked,
    Never,
}

/// Invites and rejections of one user that are looked through for the time they were joined.
const MEMBERSHIPS_MAX: usize = 50;

pub struct RoomView<'c> {
    pub c: &'c mut dyn Conn,
    pub room: RoomRow,
    pub reader: Reader,
    pub standing: Standing,
    /// Whose events the reader does not want to see.
    pub ignored: BTreeSet<UserId>,
    visibility_key: Option<KeyNid>,
    own_key: Option<KeyNid>,
    pdus: HashMap<EventNid, Arc<Pdu>>,
}

type Result<T> = storage::Result<T>;

impl<'c> RoomView<'c> {
    /// `None` for a room that this server does not know.
    pub fn open(c: &'c mut dyn Conn, room: &RoomId, reader: &Reader) -> Result<Option<Self>> {
        let Some(room) = timeline::room(c, room)? else {
            return Ok(None);
        };
        Self::of(c, room, reader).map(Some)
    }

    pub fn of(c: &'c mut dyn Conn, room: RoomRow, reader: &Reader) -> Result<Self> {
        let visibility_key = states::key(c, room.nid, "m.room.history_visibility", "")?;
        let own_key = states::key(c, room.nid, "m.room.member", reader.user.as_str())?;
        let ignored = crate::ignored::ignored_users(c, &reader.user)?;
        let mut view = Self {
            c,
            room,
            reader: reader.clone(),
            standing: Standing::Never,
            ignored,
            visibility_key,
            own_key,
            pdus: HashMap::new(),
        };
        view.standing = view.find_standing()?;
        Ok(view)
    }

    fn find_standing(&mut self) -> Result<Standing> {
        let Some(nid) = self.own_key.and_then(|key| self.room.state.get(key)) else {
            return Ok(Standing::Never);
        };
        let own = self.pdu(nid)?;
        Ok(match membership_of(&own) {
            "join" => Standing::Joined,
            "invite" => Standing::Invited,
            "knock" => Standing::Knocked,
            _ => self.find_leave(nid)?,
        })
    }

    /// Walks from the latest membership back to the one that ended the last time the reader was joined.
    fn find_leave(&mut self, mut nid: EventNid) -> Result<Standing> {
        let mut left = Standing::Never;
        for _ in 0..MEMBERSHIPS_MAX {
            let Some(event) = timeline::by_nid(self.c, nid)? else {
                break;
            };
            let before = self.own_key.and_then(|key| event.before.get(key));
            let was_joined = self.membership_in(&event.before)? == "join";
            if was_joined || left == Standing::Never {
                left = Standing::Left {
                    at: event.stream,
                    event: nid,
                    was_joined,
                };
            }
            match before {
                Some(before) if !was_joined => nid = before,
                _ => break,
            }
        }
        Ok(left)
    }

    pub fn is_joined(&self) -> bool {
        self.standing == Standing::Joined
    }

    /// The state that this reader may ask about: the current one, or the one when they left.
    pub fn readable_state(&mut self) -> Result<Option<StateMap>> {
        match self.standing.clone() {
            Standing::Joined => Ok(Some(self.room.state.clone())),
            Standing::Left {
                event,
                was_joined: true,
                ..
            } => Ok(timeline::by_nid(self.c, event)?.map(|event| event.after)),
            _ if self.world_readable()? => Ok(Some(self.room.state.clone())),
            _ => Ok(None),
        }
    }

    pub fn world_readable(&mut self) -> Result<bool> {
        let state = self.room.state.clone();
        Ok(self.visibility_in(&state)? == HistoryVisibility::WorldReadable)
    }

    /// An event by number; it is known to be stored.
    pub fn pdu(&mut self, nid: EventNid) -> Result<Arc<Pdu>> {
        if let Some(pdu) = self.pdus.get(&nid) {
            return Ok(pdu.clone());
        }
        let pdu = events::pdus(self.c, &[nid])?
            .remove(&nid)
            .ok_or_else(|| storage::Error::corrupt(format!("event {} is gone", nid.0)))?;
        self.pdus.insert(nid, pdu.clone());
        Ok(pdu)
    }

    /// Many events by number, in the order asked.
    pub fn pdus(&mut self, nids: &[EventNid]) -> Result<Vec<Arc<Pdu>>> {
        let missing: Vec<EventNid> = nids
            .iter()
            .copied()
            .filter(|nid| !self.pdus.contains_key(nid))
            .collect();
        self.pdus.extend(events::pdus(self.c, &missing)?);
        nids.iter().map(|nid| self.pdu(*nid)).collect()
    }

    /// What stands at a key of a state.
    pub fn state_event(
        &mut self,
        state: &StateMap,
        kind: &str,
        state_key: &str,
    ) -> Result<Option<Arc<Pdu>>> {
        let Some(key) = states::key(self.c, self.room.nid, kind, state_key)? else {
            return Ok(None);
        };
        state.get(key).map(|nid| self.pdu(nid)).transpose()
    }

    /// The reader's membership in a state, `leave` when there is none.
    pub fn membership_in(&mut self, state: &StateMap) -> Result<&'static str> {
        let Some(nid) = self.own_key.and_then(|key| state.get(key)) else {
            return Ok("leave");
        };
        Ok(membership_of(&*self.pdu(nid)?))
    }

    fn visibility_in(&mut self, state: &StateMap) -> Result<HistoryVisibility> {
        let Some(nid) = self.visibility_key.and_then(|key| state.get(key)) else {
            return Ok(HistoryVisibility::Shared);
        };
        let content = self.pdu(nid)?.content_value();
        let value = content.get("history_visibility").and_then(Value::as_str);
        Ok(HistoryVisibility::parse(value))
    }

    /// Whether the reader may see this event.
    pub fn sees(&mut self, event: &TimelineEvent) -> Result<bool> {
        let own_membership = &*event.pdu.kind == "m.room.member"
            && event.pdu.state_key.as_deref() == Some(self.reader.user.as_str());
        let joined_later = match self.standing {
            Standing::Joined => true,
            Standing::Left { at, was_joined, .. } => was_joined && event.stream <= at,
            _ => false,
        };
        let visibility = [
            self.visibility_in(&event.before)?,
            self.visibility_in(&event.after)?,
        ];
        let membership = [
            self.membership_in(&event.before)?,
            self.membership_in(&event.after)?,
        ];
        Ok(visible(Circumstances {
            visibility,
            membership,
            joined_later,
            own_membership,
        }))
    }

    /// The client forms of timeline events, with everything that belongs in `unsigned`.
    pub fn dress(
        &mut self,
        events: &[TimelineEvent],
        now_ms: i64,
    ) -> Result<Vec<Map<String, Value>>> {
        let ids: Vec<EventId> = events.iter().map(|e| e.pdu.event_id.clone()).collect();
        let redactions = self.redactions(events.iter().map(|e| &e.pdu))?;
        let mut relations = crate::relations::bundles(self, &ids)?;
        let mut dressed = Vec::with_capacity(events.len());
        for event in events {
            let replaced = match (event.key, &event.pdu.state_key) {
                (Some(key), Some(_)) => {
                    event.before.get(key).map(|nid| self.pdu(nid)).transpose()?
                }
                _ => None,
            };
            let membership = self.membership_in(&event.after)?;
            let redacted_because = redactions.get(&event.pdu.event_id).cloned();
            let unsigned = Unsigned {
                age: Some((now_ms - event.pdu.origin_server_ts).max(0)),
                transaction_id: self.transaction_of(event),
                replaced,
                relations: relations
                    .remove(&event.pdu.event_id)
                    .filter(|_| redacted_because.is_none()),
                redacted_because,
                membership: Some(membership.to_owned()),
            };
            dressed.push(client_event::client_event(&event.pdu, &unsigned));
        }
        Ok(dressed)
    }

    /// The client forms of state events, which need no more than their redactions.
    pub fn dress_state(
        &mut self,
        nids: &[EventNid],
        now_ms: i64,
    ) -> Result<Vec<Map<String, Value>>> {
        let pdus = self.pdus(nids)?;
        let redactions = self.redactions(pdus.iter())?;
        Ok(pdus
            .iter()
            .map(|pdu| {
                let unsigned = Unsigned {
                    age: Some((now_ms - pdu.origin_server_ts).max(0)),
                    redacted_because: redactions.get(&pdu.event_id).cloned(),
                    ..Unsigned::default()
                };
                client_event::client_event(pdu, &unsigned)
            })
            .collect())
    }

    /// The client forms of those of these member events whose membership is wanted, as JSON with a comma
    /// before each.
    pub fn write_members(
        &mut self,
        nids: &[EventNid],
        now_ms: i64,
        wanted: impl Fn(&str) -> bool,
        out: &mut String,
    ) -> Result<()> {
        let begin = out.len();
        let mut written = Vec::new();
        let room = self.room.room.clone();
        events::texts_of(self.c, nids, &mut |id, json| {
            let event = MemberText::read(json)
                .ok_or_else(|| storage::Error::corrupt(format!("{id} is no member event")))?;
            if wanted(standing(event.membership)) {
                out.push(',');
                event.write(&id, &room, now_ms, out);
                written.push(id);
            }
            Ok(())
        })?;
        // Hardly ever. What a redaction leaves of an event is not for a text to say.
        if timeline::redactions_of(self.c, self.room.nid, &written)?.is_empty() {
            return Ok(());
        }
        out.truncate(begin);
        self.write_redacted_members(nids, now_ms, wanted, out)
    }

    fn write_redacted_members(
        &mut self,
        nids: &[EventNid],
        now_ms: i64,
        wanted: impl Fn(&str) -> bool,
        out: &mut String,
    ) -> Result<()> {
        let pdus = events::pdus_once(self.c, nids)?;
        let pdus: Vec<_> = nids
            .iter()
            .filter_map(|nid| pdus.get(nid))
            .filter(|pdu| wanted(membership_of(pdu)))
            .collect();
        let redactions = self.redactions(pdus.iter().copied())?;
        for pdu in pdus {
            let unsigned = Unsigned {
                age: Some((now_ms - pdu.origin_server_ts).max(0)),
                redacted_because: redactions.get(&pdu.event_id).cloned(),
                ..Unsigned::default()
            };
            out.push(',');
            client_event::write_state_event(pdu, &unsigned, out);
        }
        Ok(())
    }

    fn transaction_of(&self, event: &TimelineEvent) -> Option<String> {
        let transaction = event.transaction.as_ref()?;
        let device = self.reader.device.as_deref()?;
        (transaction.user == self.reader.user && transaction.device == device)
            .then(|| transaction.txn_id.clone())
    }

    /// The redactions of these events that count: by the sender's own server, or with the power to redact.
    ///
    /// <https://spec.matrix.org/v1.18/rooms/v11/#handling-redactions>
    fn redactions<'p>(
        &mut self,
        of: impl Iterator<Item = &'p Arc<Pdu>>,
    ) -> Result<BTreeMap<EventId, Arc<Pdu>>> {
        let senders: BTreeMap<EventId, Arc<Pdu>> =
            of.map(|pdu| (pdu.event_id.clone(), pdu.clone())).collect();
        let ids: Vec<EventId> = senders.keys().cloned().collect();
        let mut found = BTreeMap::new();
        for redaction in timeline::redactions_of(self.c, self.room.nid, &ids)? {
            let Some(target) = redaction.pdu.redacts.as_deref().cloned() else {
                continue;
            };
            let Some(redacted) = senders.get(&target) else {
                continue;
            };
            // The create event of a room is never redacted, and neither is a redaction by a lesser one.
            if &*redacted.kind == "m.room.create" || found.contains_key(&target) {
                continue;
            }
            let same_server = redaction.pdu.sender.server_str() == redacted.sender.server_str();
            if same_server || self.may_redact(&redaction)? {
                found.insert(target, redaction.pdu);
            }
        }
        Ok(found)
    }

    fn may_redact(&mut self, redaction: &TimelineEvent) -> Result<bool> {
        let state = redaction.before.clone();
        Ok(self.power_levels(&state)?.can_redact(&redaction.pdu.sender))
    }

    /// The power levels that hold in a state.
    pub fn power_levels(&mut self, state: &StateMap) -> Result<PowerLevels> {
        let create = self.state_event(state, "m.room.create", "")?;
        let levels = self.state_event(state, "m.room.power_levels", "")?;
        Ok(PowerLevels::of(
            self.room.version,
            create.as_deref(),
            levels.as_deref(),
        ))
    }

    /// Every membership of a state: user and event.
    pub fn members_in(&mut self, state: &StateMap) -> Result<Vec<(UserId, EventNid)>> {
        let keys = states::keys_of_kind(self.c, self.room.nid, "m.room.member")?;
        let mut members: Vec<(UserId, EventNid)> = keys
            .into_iter()
            .filter_map(|(key, user)| Some((UserId::parse(&user).ok()?, state.get(key)?)))
            .collect();
        members.sort_unstable();
        Ok(members)
    }

    /// P-27: memberships of senders that a partial state lacks, from the auth events of each one's first
    /// event in the batch.
    pub fn members_from_auth_events(
        &mut self,
        batch: &[TimelineEvent],
        state: &StateMap,
    ) -> Result<Vec<EventNid>> {
        let mut seen = BTreeSet::new();
        let mut found = Vec::new();
        for event in batch {
            let sender = &event.pdu.sender;
            if !seen.insert(sender.clone()) {
                continue;
            }
            let key = states::key(self.c, self.room.nid, "m.room.member", sender.as_str())?;
            if key.is_some_and(|key| state.get(key).is_some()) {
                continue;
            }
            found.extend(timeline::member_among(
                self.c,
                &event.pdu.auth_events,
                sender,
            )?);
        }
        Ok(found)
    }
}

/// The `membership` of a member event, `leave` for anything else.
pub fn membership_of(pdu: &Pdu) -> &'static str {
    standing(pdu.membership())
}

fn standing(membership: Option<&str>) -> &'static str {
    match membership {
        Some("join") => "join",
        Some("invite") => "invite",
        Some("knock") => "knock",
        Some("ban") => "ban",
        _ => "leave",
    }
}
