//! What a room's completion owes besides the room: device lists for servers that were left out.

use std::collections::BTreeSet;

use protocol::id::{RoomId, ServerName, UserId};
use protocol::state::StateMap;
use room::effect::{Head, PartialMarker};
use room::write::{PartialChange, WriteSet};
use storage::{events, rooms, states};

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
        let servers = self.left_out(&writes.room, &marker, current).await?;
        self.catch_up_device_lists(servers, local_joined, marker.device_lists_at)
            .await
    }

    /// P-51: the servers of users whose membership changed between our join and now, and of those in the
    /// room now, less the join list.
    async fn left_out(
        &self,
        room: &RoomId,
        marker: &PartialMarker,
        current: StateMap,
    ) -> storage::Result<Vec<ServerName>> {
        let (room, join) = (room.clone(), marker.join_event.clone());
        let users: BTreeSet<UserId> = self
            .store()
            .read(move |c| {
                let Some(row) = rooms::by_id(c, &room)? else {
                    return Ok(BTreeSet::new());
                };
                let at_join = match events::nids(c, std::slice::from_ref(&join))?.get(&join) {
                    Some(nid) => states::around(c, *nid)?.map(|(_, after)| after),
                    None => None,
                };
                let changed = at_join.unwrap_or_default().diff(&current);
                let mut keys: Vec<_> = changed.into_iter().map(|(key, _, _)| key).collect();
                let joined = members_joined(c, &current)?;
                keys.extend(joined);
                keys.sort_unstable();
                keys.dedup();
                let names = states::key_names(c, row.nid, &keys)?;
                Ok(names
                    .into_values()
                    .filter(|(kind, _)| &**kind == "m.room.member")
                    .filter_map(|(_, user)| UserId::parse(&user).ok())
                    .collect())
            })
            .await?;
        let told: BTreeSet<&ServerName> = marker
            .servers_in_room
            .iter()
            .chain([&marker.joined_via])
            .collect();
        let own = &self.config().server_name;
        let servers: BTreeSet<ServerName> = users.iter().map(UserId::server_name).collect();
        Ok(servers
            .into_iter()
            .filter(|server| server != own && !told.contains(server))
            .collect())
    }
}

/// The keys at which a member is joined.
fn members_joined(
    c: &mut dyn storage::Conn,
    state: &StateMap,
) -> storage::Result<Vec<protocol::nid::KeyNid>> {
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
