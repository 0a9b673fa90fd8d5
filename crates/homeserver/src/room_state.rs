//! Reading a room's state: all of it, one event, its members. What waits for a full room waits here (C-7 to
//! C-13).
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#getting-events-for-a-room>

use protocol::id::{RoomId, UserId};
use protocol::nid::EventNid;
use protocol::state::StateMap;
use serde_json::{Map, Value, json};
use storage::timeline;

use crate::Homeserver;
use crate::error::{MatrixError, Result};
use crate::full_state::full_state;
use crate::room_view::{Reader, RoomView, membership_of};
use crate::sync::token::PageToken;

fn not_in_room() -> MatrixError {
    MatrixError::forbidden("You are not in this room")
}

fn reader(user: &UserId) -> Reader {
    Reader {
        user: user.clone(),
        device: None,
    }
}

/// C-10: the whole state waits for the room to be full.
pub async fn all(homeserver: &Homeserver, user: &UserId, room: &RoomId) -> Result<Vec<Value>> {
    may_read(homeserver, user, room).await?;
    full_state(homeserver, room).await?;
    let (reader, room) = (reader(user), room.clone());
    let now_ms = homeserver.clock().unix_ms();
    homeserver
        .store()
        .read(move |c| {
            let Some(mut view) = RoomView::open(c, &room, &reader)? else {
                return Ok(None);
            };
            let Some(state) = view.readable_state()? else {
                return Ok(None);
            };
            let nids: Vec<EventNid> = state.iter().map(|(_, nid)| nid).collect();
            let events = view.dress_state(&nids, now_ms)?;
            Ok(Some(events.into_iter().map(Value::Object).collect()))
        })
        .await?
        .ok_or_else(not_in_room)
}

async fn may_read(homeserver: &Homeserver, user: &UserId, room: &RoomId) -> Result<()> {
    let (reader, room) = (reader(user), room.clone());
    let may = homeserver
        .store()
        .read(move |c| match RoomView::open(c, &room, &reader)? {
            Some(mut view) => Ok(view.readable_state()?.is_some()),
            None => Ok(false),
        })
        .await?;
    if may { Ok(()) } else { Err(not_in_room()) }
}

/// One state event, in its client form. C-7 to C-9: only a remote user's membership waits.
pub async fn one(
    homeserver: &Homeserver,
    user: &UserId,
    room: &RoomId,
    kind: &str,
    state_key: &str,
) -> Result<Map<String, Value>> {
    let own_server = homeserver.config().server_name.as_str();
    let local_member =
        UserId::parse(state_key).is_ok_and(|member| member.server_str() == own_server);
    if kind == "m.room.member" && !local_member {
        may_read(homeserver, user, room).await?;
        full_state(homeserver, room).await?;
    }
    let (reader, room) = (reader(user), room.clone());
    let (kind, state_key) = (kind.to_owned(), state_key.to_owned());
    let now_ms = homeserver.clock().unix_ms();
    homeserver
        .store()
        .read(move |c| {
            let Some(mut view) = RoomView::open(c, &room, &reader)? else {
                return Ok(Err(not_in_room()));
            };
            let Some(state) = view.readable_state()? else {
                return Ok(Err(not_in_room()));
            };
            let key = storage::states::key(view.c, view.room.nid, &kind, &state_key)?;
            let nid = key.and_then(|key| state.get(key));
            let event = match nid {
                Some(nid) => view.dress_state(&[nid], now_ms)?.pop(),
                None => None,
            };
            Ok(event.ok_or_else(|| MatrixError::not_found("There is no such state event")))
        })
        .await?
}

#[derive(Clone, Debug, Default)]
pub struct MembersAsked {
    pub at: Option<String>,
    pub membership: Option<String>,
    pub not_membership: Option<String>,
}

/// Events that are read and written at a time.
const STRETCH: usize = 500;

/// C-11, C-12: waits for the room, then answers for the point asked about: the JSON of the whole answer, in
/// pieces.
pub async fn members(
    homeserver: &Homeserver,
    user: &UserId,
    room: &RoomId,
    asked: MembersAsked,
) -> Result<Vec<String>> {
    let at = match asked.at.as_deref().filter(|at| !at.is_empty()) {
        None => None,
        Some(text) => Some(
            PageToken::parse(text)
                .ok_or_else(|| MatrixError::invalid_param("at is no token of this server"))?,
        ),
    };
    may_read(homeserver, user, room).await?;
    full_state(homeserver, room).await?;
    let (reader, room) = (reader(user), room.clone());
    let now_ms = homeserver.clock().unix_ms();
    homeserver
        .store()
        .read(move |c| {
            let Some(mut view) = RoomView::open(c, &room, &reader)? else {
                return Ok(None);
            };
            let Some(mut state) = view.readable_state()? else {
                return Ok(None);
            };
            if let Some(at) = at {
                state = state_at(&mut view, at)?;
            }
            let wanted = |membership: &str| {
                let only = asked.membership.as_deref();
                only.is_none_or(|only| only == membership)
                    && asked.not_membership.as_deref() != Some(membership)
            };
            let members = view.members_in(&state)?;
            let mut nids: Vec<EventNid> = members.into_iter().map(|(_, nid)| nid).collect();
            // As they lie in the store.
            nids.sort_unstable();
            let mut pieces = vec!["{\"chunk\":[".to_owned()];
            for stretch in nids.chunks(STRETCH) {
                let mut piece = String::new();
                view.write_members(stretch, now_ms, wanted, &mut piece)?;
                pieces.push(piece);
            }
            // The first of all has no comma before it.
            if let Some(first) = pieces[1..].iter_mut().find(|piece| !piece.is_empty()) {
                first.remove(0);
            }
            pieces.push("]}".to_owned());
            Ok(Some(pieces))
        })
        .await?
        .ok_or_else(not_in_room)
}

/// The state at a token. Before everything that is known, the first state that has a member.
fn state_at(view: &mut RoomView<'_>, at: PageToken) -> storage::Result<StateMap> {
    let nid = view.room.nid;
    let stretch = timeline::Stretch {
        after: i64::MIN,
        up_to: at.stream.unwrap_or(i64::MAX),
        from: at.place.unwrap_or((i64::MAX, i64::MAX)),
    };
    let last = match at.place {
        Some(_) => timeline::back(view.c, nid, stretch, 1)?.pop(),
        None => timeline::newest(view.c, nid, i64::MIN, stretch.up_to, 1)?.pop(),
    };
    if let Some(last) = last {
        // A place between events of one fork is not the whole room; the newest position is.
        return match at.place {
            Some(_) => Ok(last.after),
            None => {
                let held = storage::states::at_position(view.c, nid, last.stream)?;
                // What was held then may have been partial; the event's state is whole by now (C-11).
                Ok(if held.len() < last.after.len() {
                    last.after
                } else {
                    held
                })
            }
        };
    }
    let first = timeline::Stretch {
        after: i64::MIN,
        up_to: i64::MAX,
        from: (i64::MIN, i64::MIN),
    };
    for event in timeline::forth(view.c, nid, first, 10)? {
        if !view.members_in(&event.before)?.is_empty() {
            return Ok(event.before);
        }
    }
    Ok(StateMap::new())
}

/// C-13: every entry has both keys.
pub async fn joined_members(
    homeserver: &Homeserver,
    user: &UserId,
    room: &RoomId,
) -> Result<Map<String, Value>> {
    let joined = crate::membership::is_joined(homeserver, room, user).await?;
    if !joined {
        return Err(not_in_room());
    }
    full_state(homeserver, room).await?;
    let (reader, room) = (reader(user), room.clone());
    let members = homeserver
        .store()
        .read(move |c| {
            let Some(mut view) = RoomView::open(c, &room, &reader)? else {
                return Ok(Map::new());
            };
            let state = view.room.state.clone();
            let mut joined = Map::new();
            let mut members = view.members_in(&state)?;
            // As they lie in the store.
            members.sort_unstable_by_key(|(_, nid)| *nid);
            for stretch in members.chunks(STRETCH) {
                let nids: Vec<EventNid> = stretch.iter().map(|(_, nid)| *nid).collect();
                let events = storage::events::pdus_once(view.c, &nids)?;
                for (user, nid) in stretch {
                    let Some(event) = events.get(nid).filter(|e| membership_of(e) == "join") else {
                        continue;
                    };
                    let text = |key: &str| event.content_get_str(key);
                    let entry = json!({
                        "display_name": text("displayname"),
                        "avatar_url": text("avatar_url"),
                    });
                    joined.insert(user.to_string(), entry);
                }
            }
            Ok(joined)
        })
        .await?;
    Ok(members)
}
