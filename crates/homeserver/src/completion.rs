//! What a room's completion owes besides the room: device lists and events for servers that were left out.

use std::collections::BTreeSet;

use protocol::id::{RoomId, ServerName, UserId};
use protocol::state::StateMap;
use room::effect::{Head, PartialMarker};
use room::write::{PartialChange, WriteSet};
use storage::queues::Queued;
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
        self.catch_up_device_lists(
            left_out.all.into_iter().collect(),
            local_joined,
            marker.device_lists_at,
        )
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
        let at_once = self.store().fan_out_direct_max();
        let queued = self
            .store()
            .write(move |c| {
                let Some(row) = rooms::by_id(c, &room)? else {
                    return Ok(None);
                };
                match events::newest_of_server(c, row.nid, &own)? {
                    // Whoever told them of the room told them of our join.
                    Some((_, id)) if id == join => Ok(None),
                    Some((nid, _)) => queues::enqueue_event(c, nid, &servers, at_once).map(Some),
                    None => Ok(None),
                }
            })
            .await?;
        match queued {
            Some(Queued::Waiting) => self.outgoing().start(&missed),
            Some(Queued::ToBeSpread) => self.outgoing().spread(),
            None => {}
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
        let told = marker.servers_in_room.iter().chain([&marker.joined_via]);
        let told = told.chain([&self.config().server_name]);
        let told: BTreeSet<String> = told.map(ToString::to_string).collect();
        self.store()
            .read(move |c| {
                let Some(row) = rooms::by_id(c, &room)? else {
                    return Ok(LeftOut::default());
                };
                let at_join = match events::nids(c, std::slice::from_ref(&join))?.get(&join) {
                    Some(nid) => states::around(c, *nid)?.map(|(_, after)| after),
                    None => None,
                };
                let at_join = at_join.unwrap_or_default();
                let mut left_out = LeftOut::default();
                let mut members = Vec::new();
                for (key, user) in states::keys_of_kind(c, row.nid, "m.room.member")? {
                    let Ok(user) = UserId::parse(&user) else {
                        continue;
                    };
                    if told.contains(user.server_str()) {
                        continue;
                    }
                    let nid = current.get(key);
                    if nid != at_join.get(key) {
                        left_out.all.insert(user.server_name());
                    }
                    members.extend(nid.map(|nid| (nid, user.server_name())));
                }
                for members in members.chunks(MEMBERS_BATCH) {
                    let nids: Vec<_> = members.iter().map(|(nid, _)| *nid).collect();
                    let memberships = events::memberships(c, &nids)?;
                    let joined =
                        |nid| matches!(memberships.get(nid), Some(Some(m)) if &**m == "join");
                    let joined = members.iter().filter(|(nid, _)| joined(nid));
                    left_out
                        .in_room
                        .extend(joined.map(|(_, server)| server.clone()));
                }
                left_out.all.extend(left_out.in_room.iter().cloned());
                Ok(left_out)
            })
            .await
    }
}

/// Servers that the join list does not have.
#[derive(Default)]
struct LeftOut {
    all: BTreeSet<ServerName>,
    in_room: BTreeSet<ServerName>,
}

/// Members whose events are looked at in one go.
const MEMBERS_BATCH: usize = 2000;
