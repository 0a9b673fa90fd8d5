//! The laws of the house, as far as whole servers can be held to them (law 2 is the story's: it waits until
//! nothing is owed).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use protocol::auth;
use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::nid::EventNid;
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::signature::{self, Keys, VerifyKey};
use room::effect::Place;
use storage::events::{Standing, Status};
use storage::{Conn, events, queues, rooms, states, timeline};
use tokio::time::Instant;

use super::client::{self, Follower, User};
use super::network::Promise;
use super::server::Server;
use crate::fixture;

/// What a server holds of the room.
pub struct Holding {
    pub state: BTreeMap<(String, String), Arc<Pdu>>,
    pub local_joined: Vec<UserId>,
    pub hosts: BTreeSet<ServerName>,
    pub partial: bool,
}

impl Holding {
    fn ids(&self) -> BTreeMap<&(String, String), &EventId> {
        let ids = self.state.iter();
        ids.map(|(key, pdu)| (key, &pdu.event_id)).collect()
    }

    pub fn member(&self, user: &str) -> Option<&Arc<Pdu>> {
        let key = ("m.room.member".to_owned(), user.to_owned());
        self.state.get(&key)
    }

    fn joined(&self) -> impl Iterator<Item = &str> {
        let members = self.state.iter();
        members
            .filter(|((kind, _), pdu)| kind == "m.room.member" && pdu.membership() == Some("join"))
            .map(|((_, user), _)| user.as_str())
    }
}

async fn read<T: Send + 'static>(
    server: &Server,
    read: impl FnMut(&mut dyn Conn) -> storage::Result<T> + Send + 'static,
) -> Result<T, String> {
    let store = server.store();
    store.read(read).await.map_err(|error| error.to_string())
}

/// `None` for a server that was never in the room.
pub async fn holding(server: &Server, room: &RoomId) -> Result<Option<Holding>, String> {
    let room = room.clone();
    let found = read(server, move |c| {
        let Some(row) = timeline::room(c, &room)? else {
            return Ok(None);
        };
        let entries: Vec<_> = row.state.iter().collect();
        let keys: Vec<_> = entries.iter().map(|(key, _)| *key).collect();
        let nids: Vec<_> = entries.iter().map(|(_, event)| *event).collect();
        let names = states::key_names(c, row.nid, &keys)?;
        let pdus = events::pdus(c, &nids)?;
        let named = entries.iter().filter_map(|(key, event)| {
            let (kind, state_key) = names.get(key)?;
            Some((
                (kind.to_string(), state_key.to_string()),
                pdus.get(event)?.clone(),
            ))
        });
        Ok(Some(Holding {
            state: named.collect(),
            local_joined: rooms::local_joined(c, row.nid)?,
            hosts: rooms::hosts(c, row.nid)?.into_iter().collect(),
            partial: row.partial,
        }))
    });
    found.await
}

/// Law 2: what a server still owes, in words; `None` when nothing.
pub async fn owed(server: &Server) -> Result<Option<String>, String> {
    let name = server.name.clone();
    let found = read(server, move |c| {
        let partial = rooms::partial_rooms(c)?;
        let staged = queues::staged_rooms(c)?;
        let waiting = queues::waiting_servers(c)?;
        let intents = queues::intents(c)?;
        let (debts, joins): (Vec<_>, Vec<_>) =
            intents.into_iter().partition(|intent| intent.owe_leave);
        let mut owed = Vec::new();
        let mut owe = |count: usize, what: &str| {
            if count > 0 {
                owed.push(format!("{count} {what}"));
            }
        };
        owe(partial.len(), "partial rooms");
        owe(staged.len(), "rooms with staged events");
        owe(waiting.len(), "servers with a full outbox");
        owe(joins.len(), "joins");
        owe(debts.len(), "leaves");
        Ok((!owed.is_empty()).then(|| format!("{name} has {}", owed.join(", "))))
    });
    found.await
}

/// Laws 1 and 6: who is in the room by the first server's state holds the same state, and knows that it is in
/// the room; who is not in it has no join that the first server does not know. Who is in it.
pub async fn check_states(
    servers: &[Arc<Server>],
    room: &RoomId,
) -> Result<BTreeSet<usize>, String> {
    let reference = holding(&servers[0], room)
        .await?
        .ok_or("the room is gone")?;
    let mut in_room = BTreeSet::new();
    for (n, server) in servers.iter().enumerate() {
        let name = &server.name;
        let Some(theirs) = holding(server, room).await? else {
            if reference.hosts.contains(name) {
                return Err(format!("{name} is in the room, and has none"));
            }
            continue;
        };
        if !reference.hosts.contains(name) {
            check_undone(&servers[0], &theirs, name).await?;
            continue;
        }
        if has_gone(&reference, &theirs, name) {
            check_known(server, &reference, &theirs).await?;
            continue;
        }
        if theirs.local_joined.is_empty() {
            return Err(format!("{name} is in the room, and does not know it"));
        }
        if theirs.partial {
            return Err(format!("{name} stayed partial"));
        }
        if theirs.ids() != reference.ids() {
            return Err(difference(name, &reference, &theirs));
        }
        in_room.insert(n);
    }
    Ok(in_room)
}

/// Resolution can undo a join without an event that says so, and a server that thereby is in the room no more
/// is told nothing. But the join must be known.
async fn check_undone(first: &Server, theirs: &Holding, name: &ServerName) -> Result<(), String> {
    let joins = theirs.local_joined.iter();
    let joins = joins.filter_map(|user| theirs.member(user.as_str()));
    let joins: Vec<EventId> = joins.map(|pdu| pdu.event_id.clone()).collect();
    let found = statuses(first, &joins).await?;
    match joins.iter().find(|id| !found.contains_key(id)) {
        Some(id) => Err(format!("{name} alone knows of the join {id}")),
        None => Ok(()),
    }
}

/// Whether all of a server's users that are in the room elsewhere are out of it at home, by an event of their
/// own that was refused elsewhere (P-19), by somebody else's that resolution has undone elsewhere (P-24), or as
/// resolution has undone their joins at home: the ways in which a server that takes nothing of a room any more can
/// differ from it. The last comes of a join on one branch and join rules on another: these are resolved first, and
/// a join that they do not allow is left out of the state, until what opens the room again is there too. But that
/// comes to a server that is not in the room.
fn has_gone(reference: &Holding, theirs: &Holding, name: &ServerName) -> bool {
    if !theirs.local_joined.is_empty() {
        return false;
    }
    let mut ghosts = reference.joined().filter(|user| {
        user.split_once(':')
            .is_some_and(|(_, of)| of == name.as_str())
    });
    ghosts.all(|user| {
        let member = theirs.member(user);
        member.is_none_or(|pdu| matches!(pdu.membership(), Some("leave" | "ban")))
    })
}

/// But the joins that were undone at home must be known there.
async fn check_known(server: &Server, reference: &Holding, theirs: &Holding) -> Result<(), String> {
    let name = &server.name;
    let ours = |user: &&str| {
        user.split_once(':')
            .is_some_and(|(_, of)| of == name.as_str())
    };
    let undone = reference
        .joined()
        .filter(ours)
        .filter(|user| theirs.member(user).is_none());
    let joins: Vec<EventId> = undone
        .filter_map(|user| Some(reference.member(user)?.event_id.clone()))
        .collect();
    let found = statuses(server, &joins).await?;
    match joins.iter().find(|id| !found.contains_key(id)) {
        Some(id) => Err(format!(
            "{name} is in the room by {id}, and does not know it"
        )),
        None => Ok(()),
    }
}

fn difference(name: &ServerName, ours: &Holding, theirs: &Holding) -> String {
    let keys: BTreeSet<_> = ours.state.keys().chain(theirs.state.keys()).collect();
    let id = |of: &Holding, key| of.state.get(key).map(|pdu| pdu.event_id.to_string());
    let differ: Vec<_> = keys
        .into_iter()
        .filter(|key| id(ours, key) != id(theirs, key))
        .map(|key| format!("{key:?}: {:?}, {:?}", id(ours, key), id(theirs, key)))
        .collect();
    format!(
        "the first server and {name} hold different state: {}",
        differ.join("; ")
    )
}

/// Law 3: what a server said yes to, it has, with a place.
pub async fn check_promised(server: &Server, promised: &[EventId]) -> Result<(), String> {
    let found = statuses(server, promised).await?;
    for id in promised {
        if found
            .get(id)
            .is_none_or(|status| status.place == Place::Outlier && !status.given_up)
        {
            let name = &server.name;
            return Err(format!("{name} took {id} and has {:?}", found.get(id)));
        }
    }
    Ok(())
}

/// Law 3 between servers, before anybody looks into the past. A handshake that was answered is an event with a
/// place, whatever became of the room. What comes in a transaction is dropped by a server that is not in the room
/// (P-24), and for now by one that has the room only from later on, or can not get what the event stands on (P-14,
/// P-19). But since `peace` there is nothing that could excuse a server in the room. Of all that came before it
/// is asked once a client has walked back through the history.
pub async fn check_taken(
    server: &Server,
    promises: &[Promise],
    in_room: bool,
    peace: Instant,
) -> Result<(), String> {
    let firm = promises
        .iter()
        .filter(|promise| promise.handshake || in_room && promise.at >= peace);
    let firm: Vec<_> = firm.map(|promise| promise.event.clone()).collect();
    check_promised(server, &firm).await
}

/// The states that a server has of a room that is full.
struct States {
    version: RoomVersion,
    current: Vec<EventNid>,
    /// What is in them, and what that stands on.
    events: BTreeMap<EventNid, (Arc<Pdu>, Status)>,
    /// What is in the current one, or in that before or after an event that was not judged on less.
    all: BTreeSet<EventNid>,
}

async fn states_of(server: &Server, room: &RoomId) -> Result<Option<States>, String> {
    let room = room.clone();
    let found = read(server, move |c| {
        let Some(row) = timeline::room(c, &room)?.filter(|row| !row.partial) else {
            return Ok(None);
        };
        let current: Vec<_> = row.state.iter().map(|(_, event)| event).collect();
        let mut all: BTreeSet<_> = current.iter().copied().collect();
        let placed = timeline::newest(c, row.nid, i64::MIN, i64::MAX, i64::MAX)?;
        let nids: Vec<_> = placed.iter().map(|event| event.nid).collect();
        let mut firm = events::statuses(c, &nids)?;
        firm.retain(|_, status| !status.partial && !status.given_up);
        for event in placed.iter().filter(|event| firm.contains_key(&event.nid)) {
            let states = event.before.iter().chain(event.after.iter());
            all.extend(states.map(|(_, event)| event));
        }
        let mut pdus = events::pdus(c, &all.iter().copied().collect::<Vec<_>>())?;
        let stood_on = pdus.values().flat_map(|pdu| pdu.auth_events.clone());
        let stood_on: BTreeSet<EventId> = stood_on.collect();
        let stood_on = events::nids(c, &stood_on.into_iter().collect::<Vec<_>>())?;
        pdus.extend(events::pdus(
            c,
            &stood_on.into_values().collect::<Vec<_>>(),
        )?);
        let stands = events::statuses(c, &pdus.keys().copied().collect::<Vec<_>>())?;
        let events = pdus.into_iter();
        let events = events.filter_map(|(nid, pdu)| Some((nid, (pdu, *stands.get(&nid)?))));
        Ok(Some(States {
            version: row.version,
            current,
            events: events.collect(),
            all,
        }))
    });
    found.await
}

/// Law 4: a room that is full has no rejected event in any state, and no forged one. What is in its current state
/// passes the auth rules against its own auth events.
pub async fn check_auth(server: &Server, room: &RoomId) -> Result<(), String> {
    let name = &server.name;
    let Some(states) = states_of(server, room).await? else {
        return Ok(());
    };
    for nid in &states.all {
        let found = states.events.get(nid);
        let (pdu, status) = found.ok_or_else(|| format!("{name} has {nid:?} in a state alone"))?;
        if status.standing == Standing::Rejected {
            return Err(format!("{name} has {} in a state, rejected", pdu.event_id));
        }
        signature::verify_pdu(pdu, &AllKeys)
            .map_err(|error| format!("{name} has {} in a state: {error}", pdu.event_id))?;
    }
    let events = states.events.values();
    let by_id: BTreeMap<&EventId, (&Pdu, bool)> = events
        .map(|(pdu, status)| {
            (
                &pdu.event_id,
                (&**pdu, status.standing == Standing::Rejected),
            )
        })
        .collect();
    let current = states.current.iter().map(|nid| &*states.events[nid].0);
    let create = current.clone().find(|pdu| &*pdu.kind == "m.room.create");
    for pdu in current {
        let id = &pdu.event_id;
        let auth: Option<Vec<_>> = pdu
            .auth_events
            .iter()
            .map(|id| by_id.get(id).copied())
            .collect();
        let auth = auth.ok_or_else(|| format!("{name} has {id} without its auth events"))?;
        auth::check_auth_events(states.version, pdu, create, &auth)
            .map_err(|refused| format!("{name} has {id} in its state: {refused}"))?;
    }
    Ok(())
}

/// Every server's key is known.
struct AllKeys;

impl Keys for AllKeys {
    fn key(
        &self,
        server: &ServerName,
        key_id: &str,
        _at_ms: i64,
        _version: RoomVersion,
    ) -> Option<VerifyKey> {
        let key = fixture::own(server.clone()).key;
        (key.key_id() == key_id).then(|| key.verify_key())
    }
}

async fn statuses(server: &Server, ids: &[EventId]) -> Result<BTreeMap<EventId, Status>, String> {
    let ids = ids.to_vec();
    read(server, move |c| events::statuses_by_id(c, &ids)).await
}

/// Law 5: a client that followed the room has seen everything that came by its server's stream since, and
/// nothing else.
pub async fn check_view(follower: &Follower, room: &RoomId) -> Result<(), String> {
    let name = &follower.user.id;
    let stream = stream(&follower.user.server, room).await?;
    let seen: BTreeSet<&str> = follower.seen.iter().map(String::as_str).collect();
    for (id, position) in &stream {
        if *position > follower.from && !seen.contains(id.as_str()) {
            return Err(format!("{name} was never shown {id}"));
        }
    }
    let unknown: Vec<EventId> = seen
        .iter()
        .filter(|id| !stream.contains_key(**id))
        .filter_map(|id| EventId::parse(id).ok())
        .collect();
    let found = statuses(&follower.user.server, &unknown).await?;
    for id in unknown {
        // What was shown while the room was partial may have been refused since.
        let refused = found
            .get(&id)
            .is_some_and(|status| status.standing != Standing::Accepted || status.given_up);
        if !refused {
            return Err(format!(
                "{name} was shown {id}, which is {:?}",
                found.get(&id)
            ));
        }
    }
    Ok(())
}

/// What the server holds of the room, in words.
pub async fn tell(server: &Server, room: &RoomId) -> Result<String, String> {
    let (room, asked) = (room.clone(), room.clone());
    let found = read(server, move |c| {
        let Some(row) = rooms::by_id(c, &room)? else {
            return Ok(Vec::new());
        };
        timeline::newest(c, row.nid, i64::MIN, i64::MAX, i64::MAX)
    });
    let lines = found.await?.into_iter().rev().map(|event| {
        let pdu = &event.pdu;
        let (id, position, depth) = (&pdu.event_id, event.stream, pdu.depth);
        let (kind, key, sender) = (&pdu.kind, pdu.state_key.as_deref(), &pdu.sender);
        let before: Vec<_> = pdu.prev_events.iter().map(EventId::as_str).collect();
        format!("{position:>5} {depth:>4} {id} {kind} {key:?} by {sender} after {before:?}\n")
    });
    let holding = holding(server, &asked).await?;
    let state = holding.iter().flat_map(|holding| holding.ids());
    let state = state.map(|((kind, key), id)| format!("{kind} {key:?}: {id}\n"));
    let (lines, state): (String, String) = (lines.collect(), state.collect());
    Ok(format!("{}:\n{lines}its state:\n{state}", server.name))
}

/// The accepted events that came by the stream, and where.
async fn stream(server: &Server, room: &RoomId) -> Result<BTreeMap<String, i64>, String> {
    let room = room.clone();
    let found = read(server, move |c| {
        let Some(row) = rooms::by_id(c, &room)? else {
            return Ok(Vec::new());
        };
        timeline::newest(c, row.nid, 0, i64::MAX, i64::MAX)
    });
    let events = found.await?.into_iter();
    Ok(events
        .map(|event| (event.pdu.event_id.to_string(), event.stream))
        .collect())
}

/// The state that /sync told a client of, key by key, is the state that there is. A client that wants few
/// members is not told what becomes of the others; and what resolution takes away without putting anything in
/// its place can not be told.
pub async fn check_told_state(follower: &Follower, room: &RoomId) -> Result<(), String> {
    if !follower.keeps_state {
        return Ok(());
    }
    let name = &follower.user.id;
    let holding = holding(&follower.user.server, room)
        .await?
        .ok_or_else(|| format!("{name} follows a room that is not there"))?;
    let wanted = |key: &(String, String)| !follower.lazy || key.0 != "m.room.member";
    for (key, told) in follower.state.iter().filter(|(key, _)| wanted(key)) {
        let id = holding.state.get(key).map(|pdu| pdu.event_id.as_str());
        if id.is_some_and(|id| id != told) {
            return Err(format!(
                "{name} was told {told} for {key:?}, which is {id:?}"
            ));
        }
    }
    for key in holding.state.keys() {
        if wanted(key) && !follower.state.contains_key(key) {
            return Err(format!("{name} was never told {key:?}"));
        }
    }
    Ok(())
}

/// A client that walks back through all of the history meets each of these, unless its server has judged it
/// otherwise, and none twice.
pub async fn check_history(user: &User, room: &RoomId, promised: &[EventId]) -> Result<(), String> {
    let Some(walked) = client::walk(user, room.as_str(), None, None).await? else {
        return Err(format!("{} can not walk through the history", user.id));
    };
    let mut met = BTreeSet::new();
    for event in &walked {
        let id = event["event_id"].as_str().unwrap_or_default();
        if !met.insert(id) {
            return Err(format!("{} met {id} twice in the history", user.id));
        }
    }
    let missed: Vec<EventId> = promised
        .iter()
        .filter(|id| !met.contains(id.as_str()))
        .cloned()
        .collect();
    let found = statuses(&user.server, &missed).await?;
    for id in missed {
        let judged = found
            .get(&id)
            .is_some_and(|status| status.standing != Standing::Accepted);
        if !judged {
            return Err(format!(
                "{} did not meet {id} in the history: {:?}",
                user.id,
                found.get(&id)
            ));
        }
    }
    Ok(())
}

/// A client that sends again what was not answered, under the same transaction id, has said it once.
pub async fn check_said_once(
    server: &Server,
    room: &RoomId,
    said: &[String],
) -> Result<(), String> {
    let room = room.clone();
    let found = read(server, move |c| {
        let Some(row) = rooms::by_id(c, &room)? else {
            return Ok(Vec::new());
        };
        timeline::newest(c, row.nid, i64::MIN, i64::MAX, i64::MAX)
    });
    let events = found.await?;
    let mut times: BTreeMap<String, usize> = BTreeMap::new();
    for event in events {
        if let Some(body) = event.pdu.content_value()["body"].as_str() {
            *times.entry(body.to_owned()).or_default() += 1;
        }
    }
    match said
        .iter()
        .find(|words| times.get(*words).is_some_and(|times| *times > 1))
    {
        Some(words) => Err(format!("{words:?} was said once, and is there twice")),
        None => Ok(()),
    }
}
