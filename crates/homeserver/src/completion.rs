//! What a room's completion owes besides the room: device lists and events for servers that were left out.

use std::collections::{BTreeMap, BTreeSet};

use protocol::id::{RoomId, ServerName, UserId};
use protocol::nid::KeyNid;
use protocol::state::StateMap;
use room::effect::{Head, PartialMarker};
use room::write::{PartialChange, WriteSet};
use storage::{events, queues, rooms, states};

use crate::Homeserver;
use crate::error::Result;

impl Homeserver {
    /// To be done before the commit that makes a room full, since the marker goes with it; harmless when
    /// that commit has to be made anew (S-11).
    pub(crate) async fn before_completion(&self, writes: &WriteSet) -> Result<()> {
        if writes.partial != PartialChange::Clear {
            return Ok(());
        }
        let Some(head) = self.rooms().head(&writes.room).await? else {
            return Ok(());
        };
        let Head {
            partial: Some(marker),
            local_joined,
            ..
        } = *head
        else {
            return Ok(());
        };
        if local_joined.is_empty() {
            return Ok(());
        }
        let current = writes.current_state.clone().unwrap_or(head.state);
        // Who was served while the room was partial (P-41).
        let served = self.rooms().servers(&writes.room).await?;
        let left_out = self.left_out(&writes.room, &marker, current).await?;
        let missed = left_out.in_room.into_iter();
        let missed: Vec<_> = missed.filter(|server| !served.contains(server)).collect();
        if self.config().join.tell_missed_servers && !missed.is_empty() {
            self.tell_missed(&writes.room, &marker, missed).await?;
        }
        self.catch_up_device_lists(left_out.all, local_joined, marker.device_lists_at)
            .await
    }

    /// O-2: servers that our events did not go to, as we did not know that they are in the room, get the
    /// newest of them, and so learn that there is something to ask us for.
    async fn tell_missed(
        &self,
        room: &RoomId,
        marker: &PartialMarker,
        missed: Vec<ServerName>,
    ) -> Result<()> {
        let (room, join) = (room.clone(), marker.join_event.clone());
        let (own, servers) = (self.config().server_name.clone(), missed.clone());
        let told = self
            .store()
            .write(move |c| {
                let Some(row) = rooms::by_id(c, &room)? else {
                    return Ok(false);
                };
                match events::newest_of_server(c, row.nid, &own)? {
                    // Whoever told them of the room told them of our join.
                    Some((_, id)) if id == join => Ok(false),
                    Some((nid, _)) => queues::enqueue_event(c, nid, &servers).map(|()| true),
                    None => Ok(false),
                }
            })
            .await?;
        if told {
            self.outgoing().start(self, &missed);
        }
        Ok(())
    }

    /// P-51: the servers of users whose membership changed between our join and now, and of those in the
    /// room now, less the join list.
    async fn left_out(
        &self,
        room: &RoomId,
        marker: &PartialMarker,
        current: StateMap,
    ) -> storage::Result<LeftOut> {
        let (room, join) = (room.clone(), marker.join_event.clone());
        let (users, joined): (BTreeSet<UserId>, BTreeSet<UserId>) = self
            .store()
            .read(move |c| {
                let Some(row) = rooms::by_id(c, &room)? else {
                    return Ok((BTreeSet::new(), BTreeSet::new()));
                };
                let at_join = match events::nids(c, std::slice::from_ref(&join))?.get(&join) {
                    Some(nid) => states::around(c, *nid)?.map(|(_, after)| after),
                    None => None,
                };
                let changed = at_join.unwrap_or_default().diff(&current);
                let mut keys: Vec<_> = changed.into_iter().map(|(key, _, _)| key).collect();
                let joined = members_joined(c, &current)?;
                keys.extend(&joined);
                keys.sort_unstable();
                keys.dedup();
                let names = states::key_names(c, row.nid, &keys)?;
                let users: BTreeMap<KeyNid, UserId> = names
                    .into_iter()
                    .filter(|(_, (kind, _))| &**kind == "m.room.member")
                    .filter_map(|(key, (_, user))| Some((key, UserId::parse(&user).ok()?)))
                    .collect();
                let joined = joined.iter().filter_map(|key| users.get(key).cloned());
                let joined = joined.collect();
                Ok((users.into_values().collect(), joined))
            })
            .await?;
        let told: BTreeSet<&ServerName> = marker
            .servers_in_room
            .iter()
            .chain([&marker.joined_via])
            .collect();
        let own = &self.config().server_name;
        let others = |users: BTreeSet<UserId>| {
            let servers: BTreeSet<ServerName> = users.iter().map(UserId::server_name).collect();
            let servers = servers.into_iter();
            servers
                .filter(|server| server != own && !told.contains(server))
                .collect()
        };
        Ok(LeftOut {
            all: others(users),
            in_room: others(joined),
        })
    }
}

/// Servers that the join list does not have.
struct LeftOut {
    all: Vec<ServerName>,
    in_room: Vec<ServerName>,
}

/// The keys at which a member is joined.
fn members_joined(c: &mut dyn storage::Conn, state: &StateMap) -> storage::Result<Vec<KeyNid>> {
    let entries: Vec<_> = state.iter().collect();
    let mut keys = Vec::new();
    for chunk in entries.chunks(MEMBERS_BATCH) {
        let nids: Vec<_> = chunk.iter().map(|(_, nid)| *nid).collect();
        let pdus = events::pdus(c, &nids)?;
        keys.extend(chunk.iter().filter_map(|(key, nid)| {
            let joined = pdus.get(nid)?.membership() == Some("join");
            joined.then_some(*key)
        }));
    }
    Ok(keys)
}

/// Members whose events are looked at in one go.
const MEMBERS_BATCH: usize = 2000;
