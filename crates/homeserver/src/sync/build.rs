//! One look at the store: everything that a sync answer holds.

use std::collections::{BTreeMap, BTreeSet};

use protocol::id::{RoomId, UserId};
use protocol::nid::RoomNid;
use serde_json::{Map, Value, json};
use storage::sync_reads::{self, Membership};
use storage::timeline;
use storage::{Conn, states, streams};

use super::lazy::SentMembers;
use super::room::{self, Span};
use super::token::{PageToken, SyncToken};
use super::{Ask, Built, SentNow, devices};
use crate::invite_permission::Permission;
use crate::receipts;
use crate::room_view::{RoomView, Standing, membership_of};
use crate::typing::Typing;

type Result<T> = storage::Result<T>;

/// To-device messages in one answer; the rest comes with the next.
const TO_DEVICE_MAX: i64 = 100;
/// Receipts of one room in one answer.
const RECEIPTS_MAX: i64 = 5_000;

pub fn build(c: &mut dyn Conn, ask: &Ask, typing: &Typing, sent: &SentMembers) -> Result<Built> {
    let next = now(c, typing)?;
    let memberships = sync_reads::memberships(c, &ask.reader.user)?;
    let ignored = crate::ignored::ignored_users(c, &ask.reader.user)?;
    let mut look = Look {
        c,
        ask,
        typing,
        sent,
        next,
        sent_now: Vec::new(),
        full: BTreeSet::new(),
        account_data: BTreeMap::new(),
        came: Vec::new(),
        went: Vec::new(),
        stirred: None,
        ignored,
        uncounted: false,
    };
    look.read_account_data()?;
    if let Some(since) = ask.since {
        let full = sync_reads::became_full(look.c, since.became_full, next.became_full)?;
        look.full = full.into_iter().collect();
        if !ask.full_state {
            look.stirred = Some((
                sync_reads::rooms_with_events(look.c, since.events, next.events)?,
                sync_reads::rooms_with_receipts(look.c, since.receipts, next.receipts)?,
            ));
        }
    }
    let forgotten: BTreeMap<RoomId, i64> = sync_reads::forgotten(look.c, &ask.reader.user)?
        .into_iter()
        .collect();

    let mut join = Map::new();
    let mut leave = Map::new();
    let mut invite = Map::new();
    let mut knock = Map::new();
    let mut watched = Vec::new();
    for membership in &memberships {
        let name = membership.room.to_string();
        if membership.membership == "join" {
            watched.push(membership.room.clone());
        }
        if !ask.filter.wants_room(&name) {
            continue;
        }
        match membership.membership.as_str() {
            "join" => join.extend(look.joined(membership)?.map(|told| (name, told))),
            "invite" => invite.extend(look.invited(membership)?.map(|told| (name, told))),
            "knock" => knock.extend(look.knocked(membership)?.map(|told| (name, told))),
            _ => {
                let forgotten = forgotten
                    .get(&membership.room)
                    .is_some_and(|until| membership.position <= *until);
                leave.extend(look.left(membership, forgotten)?.map(|told| (name, told)));
            }
        }
    }
    let mut body = Map::new();
    let mut rooms = Map::new();
    for (name, section) in [
        ("join", join),
        ("leave", leave),
        ("invite", invite),
        ("knock", knock),
    ] {
        if !section.is_empty() {
            rooms.insert(name.to_owned(), Value::Object(section));
        }
    }
    let mut anything = !rooms.is_empty();
    if !rooms.is_empty() {
        body.insert("rooms".to_owned(), Value::Object(rooms));
    }
    anything |= look.global_account_data(&mut body);
    anything |= look.presence(&mut body)?;
    anything |= look.add_to_device(&mut body)?;
    anything |= look.devices(&mut body)?;
    Ok(Built {
        body,
        next: look.next,
        anything,
        rooms: watched,
        uncounted: look.uncounted,
        sent: look.sent_now,
    })
}

/// The positions that this snapshot shows.
fn now(c: &mut dyn Conn, typing: &Typing) -> Result<SyncToken> {
    let mut token = SyncToken {
        // Read before what is typed is, so that what comes between is told twice and not never.
        typing: typing.position(),
        ..SyncToken::default()
    };
    let positions = streams::positions(c)?;
    for (stream, position) in streams::Stream::ALL.into_iter().zip(positions) {
        match stream {
            streams::Stream::Events => token.events = position,
            streams::Stream::Receipts => token.receipts = position,
            streams::Stream::AccountData => token.account_data = position,
            streams::Stream::ToDevice => token.to_device = position,
            streams::Stream::DeviceLists => token.device_lists = position,
            streams::Stream::Presence => token.presence = position,
            streams::Stream::BecameFull => token.became_full = position,
            streams::Stream::Memberships => token.memberships = position,
            streams::Stream::Backfilled => {}
        }
    }
    Ok(token)
}

struct Look<'a> {
    c: &'a mut dyn Conn,
    ask: &'a Ask,
    typing: &'a Typing,
    sent: &'a SentMembers,
    next: SyncToken,
    sent_now: Vec<SentNow>,
    /// Rooms that became full since the token (P-31).
    full: BTreeSet<RoomNid>,
    /// What changed since the token, by room; the global ones under no room.
    account_data: BTreeMap<String, Vec<Value>>,
    /// Rooms that the user was not in at the token, and those that the user is not in any more.
    came: Vec<RoomNid>,
    went: Vec<(RoomNid, i64)>,
    /// Rooms in which there are events or receipts since the token; `None` for everything.
    stirred: Option<(BTreeSet<RoomNid>, BTreeSet<RoomId>)>,
    /// Whose events the user does not want to see.
    ignored: BTreeSet<UserId>,
    /// Something is told over which the push rules have not been run so far.
    uncounted: bool,
}

impl Look<'_> {
    fn read_account_data(&mut self) -> Result<()> {
        let from = self.ask.since.map_or(0, |since| since.account_data);
        let user = &self.ask.reader.user;
        for entry in storage::account_data::since(self.c, user, from, self.next.account_data)? {
            let content: Value = serde_json::from_str(&entry.content).unwrap_or_default();
            let event = json!({ "type": entry.kind, "content": content });
            self.account_data
                .entry(entry.room_id)
                .or_default()
                .push(event);
        }
        Ok(())
    }

    fn joined(&mut self, membership: &Membership) -> Result<Option<Value>> {
        let ask = self.ask;
        if self.nothing_stirred(membership) {
            return Ok(None);
        }
        let Some(row) = timeline::room(self.c, &membership.room)? else {
            return Ok(None);
        };
        // P-30: who does not load members lazily sees a room when it is full.
        if row.partial && !ask.filter.lazy() {
            return Ok(None);
        }
        let nid = row.nid;
        let name = membership.room.to_string();
        let became_full = self.full.contains(&nid);
        let mut view = RoomView::of(self.c, row, &ask.reader)?;
        let was_joined = match ask.since {
            None => false,
            Some(since) => {
                let state = states::at_position(view.c, nid, since.events)?;
                view.membership_in(&state)? == "join"
            }
        };
        // P-31; P-33: a client that loads lazily has the room already.
        let newly = ask.since.is_some() && (!was_joined || (became_full && !ask.filter.lazy()));
        let fresh = ask.since.is_none() || newly;
        let span = Span {
            after: ask.since.filter(|_| !fresh).map(|since| since.events),
            up_to: self.next.events,
            broken: newly,
            summary: became_full,
        };
        let end = view.room.state.clone();
        let mut told = room::tell(&mut view, ask, span, &end, self.sent, &mut self.sent_now)?;
        if fresh || told.anything {
            let up_to = self.next.events;
            self.uncounted |= storage::push::is_behind(view.c, nid, &membership.room, up_to)?;
        }
        let by_thread = ask.filter.room.timeline.unread_thread_notifications;
        let (unread, threads) = room::unread(&mut view, by_thread)?;
        told.body.insert("unread_notifications".to_owned(), unread);
        if let Some(threads) = threads.filter(|_| by_thread) {
            told.body
                .insert("unread_thread_notifications".to_owned(), threads);
        }
        if newly {
            // All members are told as changed to a client that did not see the room so far (P-31).
            self.came.push(nid);
        }
        let ephemeral = self.ephemeral(&membership.room, fresh)?;
        let account_data = self.room_account_data(&name, fresh)?;
        let anything = fresh
            || told.anything
            || ask.full_state
            || !ephemeral.is_empty()
            || !account_data.is_empty();
        told.body
            .insert("ephemeral".to_owned(), json!({ "events": ephemeral }));
        told.body
            .insert("account_data".to_owned(), json!({ "events": account_data }));
        Ok(anything.then_some(Value::Object(told.body)))
    }

    /// Most rooms of most users are silent between two requests; those need no closer look.
    fn nothing_stirred(&self, membership: &Membership) -> bool {
        let (Some(since), Some((events, receipts))) = (self.ask.since, &self.stirred) else {
            return false;
        };
        !events.contains(&membership.nid)
            && !receipts.contains(&membership.room)
            && !self.full.contains(&membership.nid)
            && !self.account_data.contains_key(membership.room.as_str())
            && self
                .typing
                .changed(&membership.room, since.typing)
                .is_none()
    }

    fn ephemeral(&mut self, room: &RoomId, fresh: bool) -> Result<Vec<Value>> {
        let ask = self.ask;
        let filter = &ask.filter.room.ephemeral;
        let mut events = Vec::new();
        if !filter.wants_room(room.as_str()) {
            return Ok(events);
        }
        let since = ask.since.filter(|_| !fresh).unwrap_or_default();
        if filter.wants_type("m.receipt") {
            let changed = storage::receipts::since(
                self.c,
                room,
                since.receipts,
                self.next.receipts,
                RECEIPTS_MAX,
            )?;
            let wanted: Vec<_> = changed
                .into_iter()
                .filter(|receipt| !self.ignored.contains(&receipt.user))
                .collect();
            events.extend(receipts::client_event(&wanted, &ask.reader.user));
        }
        if filter.wants_type("m.typing")
            && let Some(users) = self.typing.changed(room, since.typing)
            && !(fresh && users.is_empty())
        {
            let users: Vec<&UserId> = users
                .iter()
                .filter(|user| !self.ignored.contains(user))
                .collect();
            events.push(json!({ "type": "m.typing", "content": { "user_ids": users } }));
        }
        Ok(events)
    }

    fn room_account_data(&mut self, room: &str, fresh: bool) -> Result<Vec<Value>> {
        let filter = &self.ask.filter.room.account_data;
        if !filter.wants_room(room) {
            return Ok(Vec::new());
        }
        let mut events = self.account_data.remove(room).unwrap_or_default();
        if fresh && self.ask.since.is_some() {
            let all = storage::account_data::of_room(self.c, &self.ask.reader.user, room)?;
            events = all
                .into_iter()
                .map(|entry| {
                    let content: Value = serde_json::from_str(&entry.content).unwrap_or_default();
                    json!({ "type": entry.kind, "content": content })
                })
                .collect();
        }
        events.retain(|event| {
            event["type"]
                .as_str()
                .is_some_and(|kind| filter.wants_type(kind))
        });
        Ok(events)
    }

    fn left(&mut self, membership: &Membership, forgotten: bool) -> Result<Option<Value>> {
        let ask = self.ask;
        let since = match &membership.out_of_band {
            Some(_) => ask.since.map(|since| since.memberships),
            None => ask.since.map(|since| since.events),
        };
        let news = since.is_some_and(|since| membership.position > since);
        let archived = (since.is_none() || ask.full_state) && !forgotten;
        if !news && !archived {
            return Ok(None);
        }
        if !news && !ask.filter.room.include_leave && !self.was_put_out(membership)? {
            return Ok(None);
        }
        if membership.out_of_band.is_some() {
            return self.only_the_end(membership).map(Some);
        }
        let Some(mut view) = RoomView::open(self.c, &membership.room, &ask.reader)? else {
            return Ok(None);
        };
        let Standing::Left {
            at,
            event,
            was_joined: true,
        } = view.standing
        else {
            return self.only_the_end(membership).map(Some);
        };
        let Some(end) = timeline::by_nid(view.c, event)? else {
            return Ok(None);
        };
        let nid = view.room.nid;
        let was_joined = match ask.since {
            None => false,
            Some(since) => {
                let state = states::at_position(view.c, nid, since.events)?;
                view.membership_in(&state)? == "join"
            }
        };
        // Left before the token, and something else since: a ban, or the room told again for full_state.
        if at != membership.position && !was_joined && news {
            return self.only_the_end(membership).map(Some);
        }
        let span = Span {
            after: ask.since.filter(|_| was_joined).map(|since| since.events),
            up_to: at,
            broken: false,
            summary: false,
        };
        let told = room::tell(
            &mut view,
            ask,
            span,
            &end.after,
            self.sent,
            &mut self.sent_now,
        )?;
        if was_joined {
            self.went.push((nid, at));
        }
        let mut body = told.body;
        body.insert("account_data".to_owned(), json!({ "events": [] }));
        Ok(Some(Value::Object(body)))
    }

    /// Whether somebody else ended the membership. A client hears of that also when it asks for everything
    /// but left rooms: the user may not know.
    fn was_put_out(&mut self, membership: &Membership) -> Result<bool> {
        let event = membership.event;
        let pdu = storage::events::pdus(self.c, &[event])?.remove(&event);
        Ok(pdu.is_some_and(|pdu| pdu.sender != self.ask.reader.user))
    }

    /// A room the user was never in, and is not invited to any more: only the event that says so.
    fn only_the_end(&mut self, membership: &Membership) -> Result<Value> {
        let pdu = storage::events::pdus(self.c, &[membership.event])?.remove(&membership.event);
        let events: Vec<Value> = pdu
            .iter()
            .filter(|pdu| {
                let filter = &self.ask.filter.room.timeline;
                filter.wants(&pdu.kind, Some(pdu.sender.as_str()), &pdu.content_value())
            })
            .map(|pdu| {
                let unsigned = crate::client_event::Unsigned {
                    age: Some((self.ask.now_ms - pdu.origin_server_ts).max(0)),
                    ..Default::default()
                };
                Value::Object(crate::client_event::without_room_id(pdu, &unsigned))
            })
            .collect();
        let prev_batch = PageToken::at_stream(self.next.events).to_string();
        Ok(json!({
            "state": { "events": [] },
            "timeline": { "events": events, "limited": false, "prev_batch": prev_batch },
            "account_data": { "events": [] },
        }))
    }

    fn invited(&mut self, membership: &Membership) -> Result<Option<Value>> {
        let Some((events, sender)) = self.stripped(membership)? else {
            return Ok(None);
        };
        let wanted = Permission::of(self.c, &self.ask.reader.user, &sender)?;
        if self.ignored.contains(&sender) || wanted != Permission::Allowed {
            return Ok(None);
        }
        Ok(Some(json!({ "invite_state": { "events": events } })))
    }

    fn knocked(&mut self, membership: &Membership) -> Result<Option<Value>> {
        let told = self.stripped(membership)?;
        Ok(told.map(|(events, _)| json!({ "knock_state": { "events": events } })))
    }

    /// What the user may know of a room they are not in, if that is news; and who sent the membership.
    fn stripped(&mut self, membership: &Membership) -> Result<Option<(Vec<Value>, UserId)>> {
        let ask = self.ask;
        let since = ask.since.map_or(0, |since| match membership.out_of_band {
            Some(_) => since.memberships,
            None => since.events,
        });
        if membership.position <= since && !ask.full_state && ask.since.is_some() {
            return Ok(None);
        }
        let Some(own) =
            storage::events::pdus(self.c, &[membership.event])?.remove(&membership.event)
        else {
            return Ok(None);
        };
        let events = match &membership.out_of_band {
            Some(entries) => {
                let mut events: Vec<Value> = entries
                    .iter()
                    .filter_map(|entry| crate::client_event::stripped(entry))
                    .filter(|event| {
                        event["type"] != "m.room.member"
                            || event["state_key"] != ask.reader.user.as_str()
                    })
                    .collect();
                events.push(crate::client_event::stripped_pdu(&own));
                events
            }
            None => {
                let Some(mut view) = RoomView::open(self.c, &membership.room, &ask.reader)? else {
                    return Ok(None);
                };
                room::stripped_state(&mut view, membership.event)?
            }
        };
        Ok(Some((events, own.sender.clone())))
    }

    fn global_account_data(&mut self, body: &mut Map<String, Value>) -> bool {
        let mut events = self.account_data.remove("").unwrap_or_default();
        let filter = &self.ask.filter.account_data;
        events.retain(|event| {
            event["type"]
                .as_str()
                .is_some_and(|kind| filter.wants_type(kind))
        });
        if events.is_empty() {
            return false;
        }
        body.insert("account_data".to_owned(), json!({ "events": events }));
        true
    }

    fn presence(&mut self, body: &mut Map<String, Value>) -> Result<bool> {
        let ask = self.ask;
        if !ask.filter.presence.wants_type("m.presence") {
            return Ok(false);
        }
        let me = &ask.reader.user;
        let changed = match ask.since {
            None => Vec::new(),
            Some(since) => {
                sync_reads::presence_changed(self.c, since.presence, self.next.presence)?
            }
        };
        let mut users: BTreeSet<UserId> = match ask.since {
            None => sync_reads::all_sharing(self.c, me)?,
            Some(_) => sync_reads::sharing(self.c, me, &changed)?,
        }
        .into_iter()
        .collect();
        // P-65: in a partial room most members are not known so far.
        if ask.since.is_none() || !changed.is_empty() {
            let servers = sync_reads::partial_servers_of(self.c, me)?;
            let may_share = |user: &UserId| servers.contains(&user.server_name());
            let told = match ask.since.is_none() && !servers.is_empty() {
                true => sync_reads::presence_changed(self.c, 0, self.next.presence)?,
                false => changed,
            };
            users.extend(told.into_iter().filter(may_share));
        }
        for user in devices::newcomers(self.c, ask, &self.came, self.next.events)? {
            users.insert(user);
        }
        let mut events = Vec::new();
        let mut others = false;
        for user in users {
            if !ask.filter.presence.wants_sender(user.as_str()) || self.ignored.contains(&user) {
                continue;
            }
            if let Some(presence) = storage::presence::get(self.c, &user)? {
                others |= user != *me;
                events.push(presence_event(&presence, ask.now_ms));
            }
        }
        if events.is_empty() {
            return Ok(false);
        }
        body.insert("presence".to_owned(), json!({ "events": events }));
        // One's own presence is told, but it is no news to wake a client for (T-3).
        Ok(others)
    }

    fn add_to_device(&mut self, body: &mut Map<String, Value>) -> Result<bool> {
        let Some(device) = &self.ask.reader.device else {
            return Ok(false);
        };
        let user = &self.ask.reader.user;
        let from = self.ask.since.map_or(0, |since| since.to_device);
        let to = self.next.to_device;
        let messages = storage::to_device::since(self.c, user, device, from, to, TO_DEVICE_MAX)?;
        if messages.len() as i64 == TO_DEVICE_MAX
            && let Some((position, _)) = messages.last()
        {
            self.next.to_device = *position;
        }
        let events: Vec<Value> = messages
            .iter()
            .filter_map(|(_, message)| serde_json::from_str(message).ok())
            .collect();
        if events.is_empty() {
            return Ok(false);
        }
        body.insert("to_device".to_owned(), json!({ "events": events }));
        Ok(true)
    }

    fn devices(&mut self, body: &mut Map<String, Value>) -> Result<bool> {
        let reader = &self.ask.reader;
        if let Some(device) = &reader.device {
            let mut counts: Map<String, Value> =
                storage::e2ee::one_time_key_counts(self.c, &reader.user, device)?
                    .into_iter()
                    .map(|(algorithm, count)| (algorithm, Value::from(count)))
                    .collect();
            counts.entry("signed_curve25519").or_insert(Value::from(0));
            body.insert(
                "device_one_time_keys_count".to_owned(),
                Value::Object(counts),
            );
            let unused = storage::e2ee::unused_fallback_types(self.c, &reader.user, device)?;
            body.insert("device_unused_fallback_key_types".to_owned(), json!(unused));
        }
        let Some(since) = self.ask.since else {
            return Ok(false);
        };
        let (changed, left) =
            devices::lists(self.c, self.ask, since, self.next, &self.came, &self.went)?;
        if changed.is_empty() && left.is_empty() {
            return Ok(false);
        }
        body.insert(
            "device_lists".to_owned(),
            json!({ "changed": changed, "left": left }),
        );
        Ok(true)
    }
}

/// <https://spec.matrix.org/v1.18/client-server-api/#mpresence>
fn presence_event(presence: &storage::presence::Presence, now_ms: i64) -> Value {
    let mut content = json!({
        "presence": presence.state,
        "last_active_ago": (now_ms - presence.last_active_ms).max(0),
        "currently_active": presence.currently_active,
    });
    if let Some(words) = &presence.status_msg {
        content["status_msg"] = Value::from(words.as_str());
    }
    json!({ "type": "m.presence", "sender": presence.user, "content": content })
}

/// Whether this is a change to `join` from something else.
pub(super) fn begins(view: &mut RoomView<'_>, event: &timeline::TimelineEvent) -> Result<bool> {
    let before = match event.key.and_then(|key| event.before.get(key)) {
        Some(nid) => membership_of(&*view.pdu(nid)?),
        None => "leave",
    };
    Ok(before != "join" && membership_of(&event.pdu) == "join")
}
