//! What events mean to our users: notification counts, and telling push gateways.
//!
//! The rules are run over a room's events once, before the room's syncs are woken, so that a client sees an
//! event and its count together. <https://spec.matrix.org/v1.18/client-server-api/#push-notifications>

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use protocol::id::{EventId, RoomId, UserId};
use protocol::pdu::Pdu;
use ruma_common::power_levels::NotificationPowerLevels;
use ruma_common::push::{
    FlattenedJson, PushConditionPowerLevelsCtx, PushConditionRoomCtx, Ruleset,
};
use ruma_common::room_version_rules::RoomPowerLevelsRules;
use ruma_common::serde::Raw;
use ruma_common::{OwnedRoomId, OwnedUserId, RoomVersionId};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use storage::account_data::GLOBAL;
use storage::push::{self as table, Action, EVENTS_BACK_MAX, Pusher};
use storage::{Conn, streams, timeline};

use crate::Homeserver;
use crate::client_event::{Unsigned, client_event};
use crate::error::{MatrixError, Result};
use crate::outbound;
use crate::push_rules::{self, PUSH_RULES};

/// Events of a room looked at in one go; a room that was away for long is caught up with in several.
const EVENTS_AT_ONCE: i64 = 100;
/// Notifications of one page of `/notifications`.
const LISTED_DEFAULT: i64 = 50;
const LISTED_MAX: i64 = 500;
/// Notifications sent to a gateway in one go.
const PUSHES_AT_ONCE: i64 = 50;
/// Pauses between tries; after the last one the next event begins anew.
const GATEWAY_PAUSES_S: [u64; 5] = [1, 5, 30, 120, 600];
const GATEWAY_ANSWER_BYTES_MAX: usize = 64 << 10;

#[derive(Default)]
pub(crate) struct State {
    /// Rooms whose events are being looked at, and whether more have come since.
    rooms: Mutex<HashMap<RoomId, bool>>,
    /// Users whose gateways are being told.
    sending: Mutex<HashSet<UserId>>,
}

/// One round over a room: what there is to be judged, and for whom.
struct Round {
    events: Vec<(Arc<Pdu>, i64)>,
    listeners: Vec<Listener>,
    up_to: i64,
    more: bool,
}

/// The one run over a room that is under way.
struct Run {
    hs: Homeserver,
    room: RoomId,
    over: bool,
}

impl Run {
    /// It is over, unless something came in the meantime.
    fn end(&mut self) {
        let mut rooms = lock(&self.hs.inner.push.rooms);
        match rooms.get_mut(&self.room) {
            Some(more) if *more => *more = false,
            _ => {
                rooms.remove(&self.room);
                self.over = true;
            }
        }
    }
}

/// Should it die of an event, the next event begins another one, and nobody sleeps on.
impl Drop for Run {
    fn drop(&mut self) {
        if !self.over {
            lock(&self.hs.inner.push.rooms).remove(&self.room);
            self.hs.notifier().wake_room(&self.room);
        }
    }
}

struct Listener {
    user: UserId,
    rules: Ruleset,
    ignored: HashSet<String>,
    context: PushConditionRoomCtx,
    /// Invited only: hears of the invite and of nothing else.
    invited: bool,
}

impl Homeserver {
    /// Runs the push rules over what is new in a room, then wakes its users: so a client sees an event and
    /// its count together. Whoever sent the event does not wait for it.
    pub(crate) fn count_then_wake(&self, room: &RoomId) {
        {
            let mut rooms = lock(&self.inner.push.rooms);
            if let Some(more) = rooms.get_mut(room) {
                *more = true;
                return;
            }
            rooms.insert(room.clone(), false);
        }
        let mut run = Run {
            hs: self.clone(),
            room: room.clone(),
            over: false,
        };
        self.spawn_until_stop("count", async move {
            while !run.over {
                let more = run.hs.count_next(&run.room).await;
                let more = more.unwrap_or_else(|error| {
                    tracing::warn!(room = %run.room, %error, "the push rules could not be run");
                    false
                });
                run.hs.notifier().wake_room(&run.room);
                if !more {
                    run.end();
                }
            }
        });
    }

    /// One round; whether there is more.
    async fn count_next(&self, room: &RoomId) -> Result<bool> {
        let asked = room.clone();
        let round = self.store().read(move |c| gather(c, &asked)).await?;
        let Some(round) = round else {
            return Ok(false);
        };
        let mut actions = Vec::new();
        for (pdu, position) in &round.events {
            judge(room, pdu, *position, &round.listeners, &mut actions).await;
            // A thousand listeners take milliseconds, and others want this thread.
            tokio::task::yield_now().await;
        }
        let users: HashSet<UserId> = actions
            .iter()
            .map(|action: &Action| action.user.clone())
            .collect();
        let (name, up_to) = (room.as_str().to_owned(), round.up_to);
        self.store()
            .write(move |c| {
                table::put_actions(c, &actions)?;
                table::set_progress(c, &name, up_to)
            })
            .await?;
        for user in users {
            self.start_pushing(&user);
        }
        Ok(round.more)
    }

    /// The user has read everything in the room up to this event.
    pub(crate) async fn forget_pushes(
        &self,
        user: &UserId,
        room: &RoomId,
        event: &EventId,
    ) -> Result<()> {
        let (user, room, event) = (user.clone(), room.clone(), event.clone());
        let forgotten = self.store().write(move |c| {
            let Some(row) = timeline::room(c, &room)? else {
                return Ok(());
            };
            match timeline::by_id(c, row.nid, &event)? {
                Some(event) => table::drop_up_to(c, &user, room.as_str(), event.stream),
                None => Ok(()),
            }
        });
        Ok(forgotten.await?)
    }

    /// `GET /notifications`: what notified the user and is not read, newest first.
    pub async fn notifications(
        &self,
        user: &UserId,
        from: Option<&str>,
        limit: Option<i64>,
        only_highlights: bool,
    ) -> Result<Value> {
        let before = match from {
            None => i64::MAX,
            Some(token) => token
                .parse()
                .map_err(|_| MatrixError::invalid_param("from is no token of this endpoint"))?,
        };
        let limit = limit.unwrap_or(LISTED_DEFAULT).clamp(1, LISTED_MAX);
        let owner = user.clone();
        let found = self.store().read(move |c| {
            let actions = table::before(c, &owner, before, only_highlights, limit)?;
            actions
                .into_iter()
                .map(|action| Ok((event_of(c, &action)?, action)))
                .collect::<storage::Result<Vec<_>>>()
        });
        let found = found.await?;
        let full = i64::try_from(found.len()).unwrap_or(i64::MAX) == limit;
        let next = found
            .last()
            .map(|(_, action)| action.position)
            .filter(|_| full);
        let notifications: Vec<Value> = found
            .into_iter()
            .filter_map(|(event, action)| {
                let event = event?;
                Some(json!({
                    "actions": serde_json::from_str::<Value>(&action.actions).unwrap_or_default(),
                    "event": client_event(&event, &Unsigned::default()),
                    "read": false,
                    "room_id": action.room_id,
                    "ts": event.origin_server_ts,
                }))
            })
            .collect();
        let mut answer = json!({ "notifications": notifications });
        if let Some(next) = next {
            answer["next_token"] = next.to_string().into();
        }
        Ok(answer)
    }

    pub async fn pushers(&self, user: &UserId) -> Result<Vec<Value>> {
        let user = user.clone();
        let pushers = self.store().read(move |c| table::of_user(c, &user)).await?;
        Ok(pushers
            .iter()
            .filter_map(|pusher| serde_json::from_str(&pusher.json).ok())
            .collect())
    }

    /// `POST /pushers/set`
    pub async fn set_pusher(
        &self,
        user: &UserId,
        device: &str,
        body: &Map<String, Value>,
    ) -> Result<()> {
        let text = |name: &str| {
            body.get(name)
                .and_then(Value::as_str)
                .map(str::to_owned)
                .ok_or_else(|| MatrixError::missing_param(format!("{name} is missing")))
        };
        let (app_id, pushkey) = (text("app_id")?, text("pushkey")?);
        if app_id.len() > 64 || pushkey.len() > 512 {
            return Err(MatrixError::invalid_param("app_id or pushkey is too long"));
        }
        let Some(kind) = body.get("kind") else {
            return Err(MatrixError::missing_param("kind is missing"));
        };
        let owner = user.clone();
        if kind.is_null() {
            return Ok(self
                .store()
                .write(move |c| table::remove(c, &owner, &app_id, &pushkey))
                .await?);
        }
        if kind != "http" {
            return Err(MatrixError::invalid_param(
                "Only pushers of kind http are known here",
            ));
        }
        for name in ["app_display_name", "device_display_name", "lang"] {
            text(name)?;
        }
        let url = body
            .get("data")
            .and_then(|data| data.get("url"))
            .and_then(Value::as_str);
        let url = url.ok_or_else(|| MatrixError::missing_param("data.url is missing"))?;
        let parsed = reqwest::Url::parse(url).ok().filter(|url| {
            matches!(url.scheme(), "http" | "https") && url.path() == "/_matrix/push/v1/notify"
        });
        if parsed.is_none() {
            return Err(MatrixError::invalid_param(
                "data.url is no URL of a push gateway",
            ));
        }
        let append = body.get("append").and_then(Value::as_bool).unwrap_or(false);
        let shown: Map<String, Value> = body
            .iter()
            .filter(|(name, _)| SHOWN.contains(&name.as_str()))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        let (json, device_id) = (Value::Object(shown).to_string(), device.to_owned());
        self.store()
            .write(move |c| {
                if !append {
                    table::remove_of_others(c, &owner, &app_id, &pushkey)?;
                }
                let position = streams::position(c, streams::Stream::Events)?;
                let pusher = Pusher {
                    user: owner.clone(),
                    app_id: app_id.clone(),
                    pushkey: pushkey.clone(),
                    device_id: device_id.clone(),
                    json: json.clone(),
                    position,
                };
                table::put(c, &pusher)
            })
            .await?;
        Ok(())
    }

    /// At boot: events that were not counted, and gateways that were not told, before the server stopped.
    pub async fn resume_pushing(&self) -> Result<()> {
        let newest = self.store().read(|c| {
            let end = streams::position(c, streams::Stream::Events)?;
            storage::appservices::events_after(c, end - EVENTS_BACK_MAX, EVENTS_BACK_MAX)
        });
        let rooms: BTreeSet<RoomId> = newest.await?.into_iter().map(|(_, _, room)| room).collect();
        for room in rooms {
            self.count_then_wake(&room);
        }
        let pushers = self.store().read(table::all).await?;
        for pusher in pushers {
            self.start_pushing(&pusher.user);
        }
        Ok(())
    }

    fn start_pushing(&self, user: &UserId) {
        let mut sending = lock(&self.inner.push.sending);
        if !sending.insert(user.clone()) {
            return;
        }
        let (hs, user) = (self.clone(), user.clone());
        self.spawn_until_stop("push", async move {
            hs.push_all(&user).await;
            lock(&hs.inner.push.sending).remove(&user);
        });
    }

    /// Tells the user's gateways until nothing waits or one will not listen.
    async fn push_all(&self, user: &UserId) {
        for pause_s in std::iter::once(0).chain(GATEWAY_PAUSES_S) {
            tokio::time::sleep(Duration::from_secs(pause_s)).await;
            match self.push_waiting(user).await {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(%user, %error, "notifications could not be looked up");
                    return;
                }
            }
        }
    }

    /// `false` when a gateway has to be tried again.
    async fn push_waiting(&self, user: &UserId) -> Result<bool> {
        let owner = user.clone();
        let pushers = self
            .store()
            .read(move |c| table::of_user(c, &owner))
            .await?;
        let mut done = true;
        for mut pusher in pushers {
            loop {
                let (owner, from) = (user.clone(), pusher.position);
                let (waiting, unread) = self
                    .store()
                    .read(move |c| {
                        let waiting = table::after(c, &owner, from, PUSHES_AT_ONCE)?;
                        let waiting = waiting
                            .into_iter()
                            .map(|action| Ok((event_of(c, &action)?, action)))
                            .collect::<storage::Result<Vec<_>>>()?;
                        Ok((waiting, table::count_unread(c, &owner)?))
                    })
                    .await?;
                if waiting.is_empty() {
                    break;
                }
                let mut heard = true;
                for (event, action) in waiting {
                    if let Some(event) = event {
                        heard = self.notify_gateway(&pusher, &event, &action, unread).await;
                    }
                    if !heard {
                        break;
                    }
                    pusher.position = action.position;
                }
                let (told, position) = (pusher.clone(), pusher.position);
                self.store()
                    .write(move |c| table::advance(c, &told, position))
                    .await?;
                if !heard {
                    done = false;
                    break;
                }
            }
        }
        Ok(done)
    }

    /// <https://spec.matrix.org/v1.18/push-gateway-api/>; `false` when it has to be tried again.
    async fn notify_gateway(
        &self,
        pusher: &Pusher,
        event: &Pdu,
        action: &Action,
        unread: i64,
    ) -> bool {
        let shown: Value = serde_json::from_str(&pusher.json).unwrap_or_default();
        let Some(url) = shown["data"]["url"].as_str() else {
            return true;
        };
        let body = notification(pusher, &shown, event, action, unread);
        let answer = match self.inner.outbound.post(url, &body).await {
            Ok(answer) if answer.status().is_success() => answer,
            Ok(answer) if answer.status().is_client_error() => return true,
            Ok(answer) => {
                tracing::debug!(status = answer.status().as_u16(), "a push gateway failed");
                return false;
            }
            Err(error) => {
                tracing::debug!(%error, "a push gateway could not be reached");
                return false;
            }
        };
        let Ok(answer) = outbound::body(answer, GATEWAY_ANSWER_BYTES_MAX).await else {
            return true;
        };
        let rejected = serde_json::from_slice::<Value>(&answer).ok();
        let rejected = rejected
            .as_ref()
            .and_then(|answer| answer["rejected"].as_array());
        if rejected.is_some_and(|keys| keys.iter().any(|key| key == pusher.pushkey.as_str())) {
            let gone = pusher.clone();
            let removed = self
                .store()
                .write(move |c| table::remove(c, &gone.user, &gone.app_id, &gone.pushkey));
            if let Err(error) = removed.await {
                tracing::warn!(%error, "a rejected pusher could not be removed");
            }
        }
        true
    }
}

/// The fields of a pusher that are stored and shown.
const SHOWN: [&str; 8] = [
    "pushkey",
    "kind",
    "app_id",
    "app_display_name",
    "device_display_name",
    "profile_tag",
    "lang",
    "data",
];

fn event_of(c: &mut dyn Conn, action: &Action) -> storage::Result<Option<Arc<Pdu>>> {
    let (Ok(room), Ok(id)) = (
        RoomId::parse(&action.room_id),
        EventId::parse(&action.event_id),
    ) else {
        return Ok(None);
    };
    let Some(room) = timeline::room(c, &room)? else {
        return Ok(None);
    };
    Ok(timeline::by_id(c, room.nid, &id)?.map(|event| event.pdu))
}

fn notification(
    pusher: &Pusher,
    shown: &Value,
    event: &Pdu,
    action: &Action,
    unread: i64,
) -> Value {
    let actions: Value = serde_json::from_str(&action.actions).unwrap_or_default();
    let mut data = shown["data"].clone();
    let id_only = data["format"] == "event_id_only";
    if let Some(data) = data.as_object_mut() {
        data.remove("url");
    }
    let mut device = json!({
        "app_id": pusher.app_id,
        "pushkey": pusher.pushkey,
        "data": data,
    });
    let mut notification = json!({
        "event_id": action.event_id,
        "room_id": action.room_id,
        "counts": { "unread": unread },
    });
    if !id_only {
        device["tweaks"] = push_rules::tweaks(&actions).into();
        notification["type"] = (*event.kind).into();
        notification["sender"] = event.sender.as_str().into();
        notification["content"] = serde_json::from_str(event.content()).unwrap_or_default();
        if event.state_key.as_deref() == Some(pusher.user.as_str()) {
            notification["user_is_target"] = true.into();
        }
        notification["prio"] = "high".into();
    }
    notification["devices"] = json!([device]);
    json!({ "notification": notification })
}

/// What is new in a room, and who listens. `None` when there is nothing.
fn gather(c: &mut dyn Conn, room_id: &RoomId) -> storage::Result<Option<Round>> {
    let Some(room) = timeline::room(c, room_id)? else {
        return Ok(None);
    };
    let end = streams::position(c, streams::Stream::Events)?;
    let begin = table::progress(c, room_id.as_str())?.unwrap_or(0);
    if begin >= end {
        return Ok(None);
    }
    let mut newest = timeline::newest(c, room.nid, begin, end, EVENTS_BACK_MAX)?;
    if newest.is_empty() {
        return Ok(None);
    }
    newest.reverse();
    let more = newest.len() > usize::try_from(EVENTS_AT_ONCE).unwrap_or(usize::MAX);
    newest.truncate(usize::try_from(EVENTS_AT_ONCE).unwrap_or(usize::MAX));
    let up_to = newest.last().map_or(end, |event| event.stream);
    let events: Vec<(Arc<Pdu>, i64)> = newest
        .into_iter()
        .map(|event| (event.pdu, event.stream))
        .collect();
    let mut listeners = Vec::new();
    let joined = storage::rooms::local_joined(c, room.nid)?;
    let invited = events
        .iter()
        .filter(|(pdu, _)| &*pdu.kind == "m.room.member");
    let invited: Vec<UserId> = invited
        .filter_map(|(pdu, _)| UserId::parse(pdu.state_key.as_deref()?).ok())
        .filter(|user| !joined.contains(user))
        .collect();
    let shared = Shared::read(c, &room)?;
    for user in joined {
        listeners.extend(listener(c, &room, &shared, user, false)?);
    }
    for user in invited {
        if storage::accounts::get(c, &user)?.is_some() {
            listeners.extend(listener(c, &room, &shared, user, true)?);
        }
    }
    Ok(Some(Round {
        events,
        listeners,
        up_to,
        more,
    }))
}

/// What the conditions of all listeners share.
struct Shared {
    room: OwnedRoomId,
    members: u32,
    power: Option<PushConditionPowerLevelsCtx>,
}

impl Shared {
    fn read(c: &mut dyn Conn, room: &timeline::RoomRow) -> storage::Result<Option<Self>> {
        let Ok(id) = OwnedRoomId::try_from(room.room.as_str()) else {
            return Ok(None);
        };
        let (joined, _) = storage::sync_reads::member_counts(c, room.nid)?;
        let create = state_event(c, room, "m.room.create", "")?;
        let levels = state_event(c, room, "m.room.power_levels", "")?;
        let power = create
            .and_then(|create| power_levels(room.version.as_str(), &create, levels.as_deref()));
        Ok(Some(Self {
            room: id,
            members: u32::try_from(joined).unwrap_or(u32::MAX),
            power,
        }))
    }
}

fn state_event(
    c: &mut dyn Conn,
    room: &timeline::RoomRow,
    kind: &str,
    state_key: &str,
) -> storage::Result<Option<Arc<Pdu>>> {
    let Some(key) = storage::states::key(c, room.nid, kind, state_key)? else {
        return Ok(None);
    };
    let Some(nid) = room.state.get(key) else {
        return Ok(None);
    };
    Ok(storage::events::pdus(c, &[nid])?.remove(&nid))
}

fn power_levels(
    version: &str,
    create: &Pdu,
    levels: Option<&Pdu>,
) -> Option<PushConditionPowerLevelsCtx> {
    let rules = RoomVersionId::try_from(version).ok()?.rules()?;
    let create_content: Value = serde_json::from_str(create.content()).ok()?;
    let also = create_content["additional_creators"]
        .as_array()
        .into_iter()
        .flatten();
    let creators: Vec<OwnedUserId> = also
        .filter_map(Value::as_str)
        .chain([create.sender.as_str()])
        .filter_map(|user| OwnedUserId::try_from(user).ok())
        .collect();
    let content: Value = levels
        .and_then(|pdu| serde_json::from_str(pdu.content()).ok())
        .unwrap_or_default();
    let mut users: BTreeMap<OwnedUserId, _> = content["users"]
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(|(user, value)| {
            Some((OwnedUserId::try_from(user.as_str()).ok()?, level(value)?))
        })
        .collect();
    if levels.is_none() {
        users.extend(
            creators
                .iter()
                .cloned()
                .filter_map(|user| Some((user, level(&json!(100))?))),
        );
    }
    let mut notifications = NotificationPowerLevels::new();
    if let Some(room) = level(&content["notifications"]["room"]) {
        notifications.room = room;
    }
    let privileged = RoomPowerLevelsRules::new(&rules.authorization, creators);
    let default = level(&content["users_default"]).unwrap_or_default();
    Some(PushConditionPowerLevelsCtx::new(
        users,
        default,
        notifications,
        privileged,
    ))
}

/// A power level, which old rooms may write as a string.
fn level<T: DeserializeOwned>(value: &Value) -> Option<T> {
    let number = value
        .as_i64()
        .or_else(|| value.as_str()?.trim().parse().ok())?;
    serde_json::from_value(number.into()).ok()
}

fn listener(
    c: &mut dyn Conn,
    room: &timeline::RoomRow,
    shared: &Option<Shared>,
    user: UserId,
    invited: bool,
) -> storage::Result<Option<Listener>> {
    let (Some(shared), Ok(id)) = (shared, OwnedUserId::try_from(user.as_str())) else {
        return Ok(None);
    };
    let stored = storage::account_data::get(c, &user, GLOBAL, PUSH_RULES)?;
    let rules = push_rules::read(&user, stored.as_deref());
    let ignored = storage::account_data::get(c, &user, GLOBAL, "m.ignored_user_list")?
        .and_then(|text| serde_json::from_str::<Value>(&text).ok())
        .and_then(|list| Some(list["ignored_users"].as_object()?.keys().cloned().collect()))
        .unwrap_or_default();
    let member = state_event(c, room, "m.room.member", user.as_str())?;
    let name = member.and_then(|pdu| Some(pdu.content_get_str("displayname")?.into_owned()));
    let mut context = PushConditionRoomCtx::new(
        shared.room.clone(),
        shared.members.into(),
        id,
        name.unwrap_or_else(|| user.localpart().to_owned()),
    );
    if let Some(power) = &shared.power {
        context = context.with_power_levels(power.clone());
    }
    Ok(Some(Listener {
        user,
        rules,
        ignored,
        context,
        invited,
    }))
}

/// Adds what one event means to each listener.
async fn judge(
    room: &RoomId,
    pdu: &Pdu,
    position: i64,
    listeners: &[Listener],
    actions: &mut Vec<Action>,
) {
    let Ok(raw) = Raw::<Value>::from_json_string(pdu.json.to_string()) else {
        return;
    };
    // For all listeners: it costs ten times what the rules do.
    let event = FlattenedJson::from_raw(&raw);
    for listener in listeners {
        let about_invite = &*pdu.kind == "m.room.member"
            && pdu.state_key.as_deref() == Some(listener.user.as_str());
        let deaf = listener.invited && !about_invite;
        let own = pdu.sender == listener.user;
        if deaf || own || listener.ignored.contains(pdu.sender.as_str()) {
            continue;
        }
        let found = matching(&listener.rules, &event, &listener.context).await;
        if !found.iter().any(ruma_common::push::Action::should_notify) {
            continue;
        }
        actions.push(Action {
            user: listener.user.clone(),
            room_id: room.as_str().to_owned(),
            position,
            event_id: pdu.event_id.as_str().to_owned(),
            thread_id: thread_of(pdu).unwrap_or_default(),
            highlight: found.iter().any(ruma_common::push::Action::is_highlight),
            actions: push_rules::actions_json(found).to_string(),
        });
    }
}

/// The actions of the first rule that fits.
async fn matching<'a>(
    rules: &'a Ruleset,
    event: &FlattenedJson,
    context: &PushConditionRoomCtx,
) -> &'a [ruma_common::push::Action] {
    for rule in rules {
        if rule.applies(event, context).await {
            return rule.actions();
        }
    }
    &[]
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The root of the thread that an event says it is in.
fn thread_of(pdu: &Pdu) -> Option<String> {
    #[derive(Deserialize)]
    struct Relation {
        rel_type: Option<String>,
        event_id: Option<String>,
    }
    let relation = Relation::deserialize(pdu.content_get("m.relates_to")?).ok()?;
    relation
        .event_id
        .filter(|_| relation.rel_type.as_deref() == Some("m.thread"))
}
