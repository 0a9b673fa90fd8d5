//! A WriteSet, row by row, in one transaction.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use protocol::id::{EventId, ServerName, UserId};
use protocol::nid::{EventNid, KeyNid, RoomNid};
use protocol::pdu::Pdu;
use protocol::state::StateMap;
use room::effect::{PartialMarker, Place, Stale, StateKey};
use room::write::{
    EventState, FanOut, IntentChange, NewEvent, PartialChange, Rejudged, Verdict, WriteSet,
};

use crate::cache::{Body, Caches};
use crate::driver::{Conn, Error, Result};
use crate::events::{self, Standing, Status};
use crate::names::{Numbered, key_of};
use crate::queues::Queued;
use crate::rooms::{self, RoomRow};
use crate::states::{self, Unstored};
use crate::streams::{self, Stream};
use crate::{
    Sequence, Store, auth_above, devices, event_index, load, names, out_of_band, queues, row,
    state_log,
};

/// Members whose events are looked at in one go.
const MEMBERS_BATCH: usize = 2000;

/// What a commit changed, for whoever wakes others.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Applied {
    pub room: Option<RoomNid>,
    pub revision: u64,
    /// Events that got a place, in the order of the write set.
    pub events: Vec<Placed>,
    /// Where in the events stream the current state changed.
    pub state_position: Option<i64>,
    /// Changes of memberships in the current state, of local and remote users.
    pub memberships: Vec<MembershipChange>,
    /// Our users' out-of-band memberships, with their positions in the memberships stream.
    pub out_of_band: Vec<(UserId, i64)>,
    /// The room's position in that stream.
    pub became_full: Option<i64>,
    /// Servers that have something new to be sent.
    pub destinations: Vec<ServerName>,
    /// Something is to be spread to many others, see [`queues::spread`].
    pub fans_out: bool,
    /// The last position of the device-list stream, when users came into it (P-54).
    pub device_lists: Option<i64>,
}

/// An event that got a place.
#[derive(Clone, Debug, PartialEq)]
pub struct Placed {
    pub nid: EventNid,
    /// In the events stream, below 0 for a backfilled event.
    pub position: i64,
    /// Neither rejected nor soft-failed.
    pub accepted: bool,
    pub pdu: Arc<Pdu>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct MembershipChange {
    pub user: UserId,
    pub local: bool,
    pub before: Option<Arc<str>>,
    pub after: Option<Arc<str>>,
    pub event: Option<EventNid>,
    /// The user was a member before we saw the room, and this is when we learn of it.
    pub revealed: bool,
}

/// Applies a write set: all of it, durably, or nothing.
pub async fn apply(store: &Store, writes: WriteSet) -> Result<Result<Applied, Stale>> {
    let plan = Arc::new(Plan::make(store, writes).await?);
    let working = Arc::clone(&plan);
    match store.write(move |c| working.carry_out(c)).await {
        Ok(applied) => {
            plan.committed(&store.inner.caches, &applied);
            store.inner.names.written(&plan.writes.room, &plan.names);
            Ok(Ok(applied))
        }
        Err(Error::Stale) => {
            if plan.misnamed.load(Ordering::Relaxed) {
                store.inner.names.lost(&plan.writes.room, &plan.names);
            }
            Ok(Err(Stale))
        }
        Err(other) => Err(other),
    }
}

/// All that can be prepared before the transaction, which others wait for.
struct Plan {
    writes: WriteSet,
    own: ServerName,
    /// Servers that an event is queued for at once.
    direct_max: usize,
    nodes: Unstored,
    /// Names whose rows are to be written, those included that the events only refer to.
    names: Numbered,
    /// Somebody else has some of these, or their numbers.
    misnamed: AtomicBool,
    /// What the current state becomes, as seen from the one that was there when this was made.
    change: StateChange,
}

#[derive(Clone, Debug, Default)]
struct StateChange {
    /// The root of the state that this is seen from.
    from: Option<i64>,
    /// Whether the two differ at all.
    differs: bool,
    members: Vec<Member>,
}

/// A change of one user's membership in the current state.
#[derive(Clone, Debug)]
struct Member {
    user: UserId,
    before: Option<Arc<str>>,
    after: Option<(Arc<str>, EventNid)>,
}

impl Plan {
    async fn make(store: &Store, writes: WriteSet) -> Result<Self> {
        let mut nodes = Unstored::default();
        for state in states_of(&writes) {
            nodes.add(state);
        }
        if nodes.len() > 0 {
            nodes.number_from(
                store
                    .numbers(Sequence::StateNodes, nodes.len())
                    .await?
                    .start,
            );
        }
        let mut plan = Self {
            own: store.server_name().clone(),
            direct_max: store.fan_out_direct_max(),
            nodes,
            names: store.inner.names.without_row(&writes),
            misnamed: AtomicBool::new(false),
            change: StateChange::default(),
            writes,
        };
        let referred = plan.referred();
        if !referred.is_empty() || plan.writes.current_state.is_some() {
            let asking = Arc::new(plan);
            let asked = Arc::clone(&asking);
            let (mut new, change) = store
                .read(move |c| {
                    let known = events::nids(c, &referred)?;
                    let new = referred.iter().filter(|id| !known.contains_key(*id));
                    let new: Vec<EventId> = new.cloned().collect();
                    Ok((new, asked.state_change(c)?))
                })
                .await?;
            plan = Arc::into_inner(asking).ok_or(Error::Closed)?;
            plan.change = change;
            let given = store.inner.names.of_events(&new);
            new.retain(|id| !given.contains_key(id));
            let free = store.numbers(Sequence::Events, new.len()).await?;
            let new = new.into_iter().zip(free.map(EventNid));
            plan.names.events.extend(new.chain(given));
        }
        Ok(plan)
    }

    /// The ids that the events refer to and that are not known from the events themselves.
    fn referred(&self) -> Vec<EventId> {
        let own: BTreeSet<&EventId> = self.writes.events.iter().map(|e| &e.pdu.event_id).collect();
        let mut referred = BTreeSet::new();
        for event in &self.writes.events {
            referred.extend(&event.pdu.auth_events);
            if event.place != Place::Outlier {
                referred.extend(&event.pdu.prev_events);
            }
        }
        referred.difference(&own).map(|id| (*id).clone()).collect()
    }

    // -- Memberships ------------------------------------------------------------------------------

    /// The change from what is the current state on this snapshot.
    fn state_change(&self, c: &mut dyn Conn) -> Result<StateChange> {
        let Some(new) = &self.writes.current_state else {
            return Ok(StateChange::default());
        };
        let row = rooms::by_id(c, &self.writes.room)?;
        let Some(row) = row else {
            // Looked at again in the transaction, when the room has a row.
            return Ok(StateChange::default());
        };
        let old = states::map(c, row.state_root)?;
        let changes = old.diff(new);
        let keys: Vec<KeyNid> = changes.iter().map(|(key, _, _)| *key).collect();
        let here: HashMap<EventNid, &Arc<Pdu>> =
            self.writes.events.iter().map(|e| (e.nid, &e.pdu)).collect();
        let unwritten: HashMap<KeyNid, &StateKey> = self
            .names
            .keys
            .iter()
            .map(|(key, nid)| (*nid, key))
            .collect();
        // Where many change: a room that becomes full has few so far, and any other needs most of its own.
        let all = match changes.len() > MEMBERS_BATCH {
            true => Some(all_memberships(c, row.nid)?),
            false => None,
        };
        let mut before = HashMap::new();
        let mut members = Vec::new();
        for (keys, changes) in keys
            .chunks(MEMBERS_BATCH)
            .zip(changes.chunks(MEMBERS_BATCH))
        {
            let names = states::key_names(c, row.nid, keys)?;
            let wanted: Vec<(UserId, Option<EventNid>)> = changes
                .iter()
                .filter_map(|(key, _, after)| {
                    let (kind, state_key) =
                        names.get(key).or_else(|| unwritten.get(key).copied())?;
                    let user = UserId::parse(state_key).ok()?;
                    (&**kind == "m.room.member").then_some((user, *after))
                })
                .collect();
            let said = &self.writes.memberships;
            let stored: Vec<EventNid> = wanted
                .iter()
                .filter_map(|(_, after)| *after)
                .filter(|nid| !here.contains_key(nid) && !said.contains_key(nid))
                .collect();
            let memberships = events::memberships(c, &stored)?;
            if all.is_none() {
                let users: Vec<UserId> = wanted.iter().map(|(user, _)| user.clone()).collect();
                before = memberships_of(c, row.nid, &users)?;
            }
            for (user, after) in wanted {
                let after = match after {
                    None => None,
                    Some(nid) => {
                        let membership = match (said.get(&nid), here.get(&nid)) {
                            (Some(membership), _) => Some(Arc::clone(membership)),
                            (None, Some(pdu)) => pdu.membership().map(Arc::from),
                            (None, None) => memberships.get(&nid).cloned().ok_or_else(|| {
                                Error::Corrupt(format!("event {} is gone", nid.0))
                            })?,
                        };
                        Some((membership.unwrap_or_else(|| "leave".into()), nid))
                    }
                };
                members.push(Member {
                    before: all.as_ref().unwrap_or(&before).get(&user).cloned(),
                    user,
                    after,
                });
            }
        }
        // Memberships are written in the order of their indexes.
        members.sort_unstable_by(|a, b| a.user.cmp(&b.user));
        Ok(StateChange {
            from: Some(row.state_root),
            differs: !changes.is_empty(),
            members,
        })
    }

    // -- The transaction --------------------------------------------------------------------------

    fn carry_out(&self, c: &mut dyn Conn) -> Result<Applied> {
        let writes = &self.writes;
        if self.moves() {
            // Whoever else is about to give out positions waits here, before any work is done, or collides
            // here and loses none.
            streams::hold(c, Stream::Events)?;
        }
        load::room_row(c, &writes.room, writes.version)?;
        let row = rooms::by_id(c, &writes.room)?
            .ok_or_else(|| Error::corrupt("a room just made is not there"))?;
        if writes
            .expect
            .is_some_and(|expected| expected != row.revision)
        {
            return Err(Error::Stale);
        }
        let mut applied = Applied {
            room: Some(row.nid),
            ..Applied::default()
        };
        self.nodes.write(c)?;
        let others = names::write(c, row.nid, &self.names)?;
        let mut own = writes.events.iter().map(|event| &event.pdu.event_id);
        if others.keys_differ || own.any(|id| others.events.contains_key(id)) {
            self.misnamed.store(true, Ordering::Relaxed);
            return Err(Error::Stale);
        }
        let mut placed_depth = self.store_events(c, &row, &mut applied)?;
        self.rejudge(c, &row)?;
        if let Some(extremities) = &writes.forward_extremities {
            c.later(DROP_EXTREMITIES, &[row![row.nid]])?;
            let rows: Vec<_> = extremities.iter().map(|e| row![row.nid, e.nid]).collect();
            if !rows.is_empty() {
                c.later(INSERT_EXTREMITY, &rows)?;
            }
        }
        let marked_before = rooms::partial_marker(c, row.nid)?;
        if let PartialChange::Mark(marker) = &writes.partial
            && marked_before.is_none()
        {
            mark(c, row.nid, marker)?;
        }
        if let Some(state) = &writes.current_state {
            self.publish(c, &row, state, &mut applied)?;
        }
        if let Some(intent) = &writes.intent {
            change_intent(c, row.nid, intent)?;
        }
        match &writes.partial {
            PartialChange::Keep | PartialChange::Mark(_) => {}
            PartialChange::Clear => clear(c, row.nid, marked_before, &mut applied)?,
            PartialChange::Free => free(c, row.nid)?,
        }
        // P-2: what was made while the room was partial is made anew when it has become full meanwhile.
        if self.makes_partial() && !rooms::is_partial(c, row.nid)? {
            return Err(Error::Stale);
        }
        forget_device_lists(c, row.nid, &applied.memberships)?;
        for new in &writes.out_of_band {
            let position = out_of_band::put(c, row.nid, new)?;
            applied.out_of_band.push((new.user.clone(), position));
        }
        if !writes.staged_done.is_empty() {
            c.execute(UNSTAGE, &[&writes.staged_done])?;
        }
        let guarded = writes.forward_extremities.is_some()
            || writes.current_state.is_some()
            || writes.partial != PartialChange::Keep;
        if let (Some(known), Some(new)) = (row.min_depth, placed_depth) {
            placed_depth = Some(known.min(new));
        }
        applied.revision = row.revision + u64::from(guarded);
        if guarded || placed_depth.is_some() {
            let revision = i64::try_from(applied.revision).expect("a count of commits");
            let root = writes.current_state.as_ref().map(|s| self.nodes.root(s));
            let root = root.unwrap_or(row.state_root);
            let depth = placed_depth.or(row.min_depth);
            c.later(UPDATE_ROOM, &[row![row.nid, revision, root, depth]])?;
        }
        Ok(applied)
    }

    /// Whether any event of this is partial.
    fn makes_partial(&self) -> bool {
        let new = self.writes.events.iter();
        let new = new.filter_map(|event| event.state.as_ref());
        let again = self.writes.rejudged.iter().map(|event| &event.state);
        new.chain(again).any(|state| state.partial)
    }

    /// Whether this may give out positions of the events stream.
    fn moves(&self) -> bool {
        let writes = &self.writes;
        let mut places = writes.events.iter().map(|event| event.place);
        writes.current_state.is_some() || places.any(|place| place == Place::Timeline)
    }

    /// Stores events and gives places; the smallest depth that got one.
    fn store_events(
        &self,
        c: &mut dyn Conn,
        row: &RoomRow,
        applied: &mut Applied,
    ) -> Result<Option<i64>> {
        if self.writes.events.is_empty() {
            return Ok(None);
        }
        let numbers = self.numbers(c)?;
        let Sorted {
            stored,
            upgraded,
            afresh,
            back,
        } = self.sort_out(c, row.nid)?;
        let placed: Vec<&NewEvent> = stored
            .iter()
            .chain(&upgraded)
            .copied()
            .filter(|event| event.place != Place::Outlier)
            .collect();
        // In the order of the write set, which is that of the DAG.
        let order: HashMap<EventNid, usize> = self
            .writes
            .events
            .iter()
            .enumerate()
            .map(|(place, event)| (event.nid, place))
            .collect();
        let mut placed = placed;
        placed.sort_by_key(|event| order[&event.nid]);
        // Who comes back to its place is not news (S-15).
        let fresh: Vec<&NewEvent> = placed
            .iter()
            .filter(|event| !back.contains(&event.nid))
            .copied()
            .collect();
        let positions = give_positions(c, &fresh)?;
        self.insert(c, row.nid, &stored, &numbers, &positions)?;
        self.upgrade(c, &upgraded, &numbers, &positions)?;
        look_afresh(c, &afresh)?;
        link(c, row.nid, &placed, &numbers)?;
        let shown: Vec<(EventNid, &Pdu)> = placed
            .iter()
            .filter(|event| event.verdict == Verdict::Accepted)
            .map(|event| (event.nid, &*event.pdu))
            .collect();
        event_index::add(c, row.nid, &shown)?;
        let hidden = placed
            .iter()
            .filter(|event| event.verdict != Verdict::Accepted && back.contains(&event.nid));
        let hidden: Vec<EventNid> = hidden.map(|event| event.nid).collect();
        event_index::remove(c, &hidden)?;
        self.fan_out(c, &placed, applied)?;
        for event in &placed {
            if let Some(done) = &event.transaction {
                c.execute(
                    INSERT_TRANSACTION,
                    &[&done.user, &done.device, &row.nid, &done.txn_id, &event.nid],
                )?;
            }
        }
        applied.events = fresh
            .iter()
            .map(|event| Placed {
                nid: event.nid,
                position: positions[&event.nid],
                accepted: event.verdict == Verdict::Accepted,
                pdu: Arc::clone(&event.pdu),
            })
            .collect();
        Ok(placed.iter().map(|event| event.pdu.depth).min())
    }

    /// The number of every id that the events refer to.
    fn numbers(&self, c: &mut dyn Conn) -> Result<HashMap<EventId, EventNid>> {
        let mut numbers = events::nids(c, &self.referred())?;
        for event in &self.writes.events {
            numbers.insert(event.pdu.event_id.clone(), event.nid);
        }
        Ok(numbers)
    }

    fn sort_out(&self, c: &mut dyn Conn, room: RoomNid) -> Result<Sorted<'_>> {
        let nids: Vec<EventNid> = self.writes.events.iter().map(|event| event.nid).collect();
        let known = events::statuses(c, &nids)?;
        let mut sorted = Sorted::default();
        let mut seen = BTreeSet::new();
        for event in &self.writes.events {
            if !seen.insert(event.nid) {
                continue;
            }
            match known.get(&event.nid) {
                None => sorted.stored.push(event),
                Some(Status { room: other, .. }) if *other != room => {
                    tracing::warn!(event_id = %event.pdu.event_id, "an event id is in use in two rooms");
                }
                Some(status) if status.place == Place::Outlier && event.place != Place::Outlier => {
                    sorted.upgraded.push(event);
                    if status.position.is_some() {
                        sorted.back.insert(event.nid);
                    }
                }
                Some(status) if status.is_forgotten() => sorted.afresh.push(event),
                Some(_) => {}
            }
        }
        Ok(sorted)
    }

    fn insert(
        &self,
        c: &mut dyn Conn,
        room: RoomNid,
        new: &[&NewEvent],
        numbers: &HashMap<EventId, EventNid>,
        positions: &HashMap<EventNid, i64>,
    ) -> Result<()> {
        if new.is_empty() {
            return Ok(());
        }
        let packed: Vec<(Vec<u8>, Option<Vec<u8>>)> = new
            .iter()
            .map(|event| {
                let auth = pack_ids(&event.pdu.auth_events, numbers)?;
                let prevs = match event.place {
                    Place::Outlier => None,
                    _ => Some(pack_ids(&event.pdu.prev_events, numbers)?),
                };
                Ok((auth, prevs))
            })
            .collect::<Result<_>>()?;
        for (new, packed) in new.chunks(ROWS_AT_ONCE).zip(packed.chunks(ROWS_AT_ONCE)) {
            let rows = new.iter().zip(packed).map(|(event, (auth, prevs))| {
                let pdu = &event.pdu;
                let (before, after, partial) = self.roots(event.state.as_ref());
                row![
                    event.nid,
                    room,
                    event.key,
                    events::place_code(event.place),
                    verdict_code(&event.verdict),
                    partial,
                    positions.get(&event.nid).copied(),
                    pdu.depth,
                    pdu.origin_server_ts,
                    before,
                    after,
                    prevs.as_ref(),
                    auth,
                    pdu.redacted,
                    &pdu.kind,
                    pdu.state_key.as_ref(),
                    &pdu.sender,
                    reason(&event.verdict),
                    &pdu.json,
                ]
            });
            let rows: Vec<_> = rows.collect();
            c.later(INSERT_EVENT, &rows)?;
        }
        let edges = new.iter().zip(&packed);
        let edges = edges.filter_map(|(event, (auth, _))| Some((event.nid, event.key?, &**auth)));
        auth_above::add(c, edges)?;
        let state = new.iter().zip(&packed);
        let state = state.filter(|(event, _)| event.pdu.is_state());
        let state = state.map(|(event, (auth, _))| (event.nid, &event.pdu.event_id, &**auth));
        state_log::add(c, room, state)
    }

    fn upgrade(
        &self,
        c: &mut dyn Conn,
        upgraded: &[&NewEvent],
        numbers: &HashMap<EventId, EventNid>,
        positions: &HashMap<EventNid, i64>,
    ) -> Result<()> {
        for event in upgraded {
            let (before, after, partial) = self.roots(event.state.as_ref());
            c.execute(
                UPGRADE_EVENT,
                &[
                    &event.nid,
                    &events::place_code(event.place),
                    &verdict_code(&event.verdict),
                    &partial,
                    &positions.get(&event.nid).copied(),
                    &before,
                    &after,
                    &pack_ids(&event.pdu.prev_events, numbers)?,
                    &reason(&event.verdict),
                    &event.key,
                    &event.pdu.json,
                    &event.pdu.redacted,
                ],
            )?;
        }
        Ok(())
    }

    fn roots(&self, state: Option<&EventState>) -> (Option<i64>, Option<i64>, bool) {
        match state {
            None => (None, None, false),
            Some(state) => (
                Some(self.nodes.root(&state.before)),
                Some(self.nodes.root(&state.after)),
                state.partial,
            ),
        }
    }

    fn fan_out(&self, c: &mut dyn Conn, placed: &[&NewEvent], applied: &mut Applied) -> Result<()> {
        let mut destinations = BTreeSet::new();
        for event in placed {
            let FanOut::Servers(servers) = &event.fan_out else {
                continue;
            };
            let servers: BTreeSet<&ServerName> = servers
                .iter()
                .filter(|server| **server != self.own)
                .collect();
            let servers: Vec<ServerName> = servers.into_iter().cloned().collect();
            match queues::enqueue_event(c, event.nid, &servers, self.direct_max)? {
                Queued::Waiting => destinations.extend(servers),
                Queued::ToBeSpread => applied.fans_out = true,
            }
        }
        applied.destinations = destinations.into_iter().collect();
        Ok(())
    }

    /// S-9: new state and verdict, mark removed; S-13 and S-14 for what follows from a verdict.
    fn rejudge(&self, c: &mut dyn Conn, row: &RoomRow) -> Result<()> {
        let again = &self.writes.rejudged;
        if again.is_empty() {
            return Ok(());
        }
        let nids: Vec<EventNid> = again.iter().map(|event| event.nid).collect();
        let before = events::statuses(c, &nids)?;
        let placed = |event: &&Rejudged| {
            before
                .get(&event.nid)
                .is_some_and(|status| status.room == row.nid && status.place != Place::Outlier)
        };
        let judged: Vec<&Rejudged> = again.iter().filter(placed).collect();
        let rows: Vec<_> = judged
            .iter()
            .map(|event| {
                let (root_before, root_after, partial) = self.roots(Some(&event.state));
                row![
                    event.nid,
                    verdict_code(&event.verdict),
                    reason(&event.verdict),
                    partial,
                    root_before,
                    root_after
                ]
            })
            .collect();
        if rows.is_empty() {
            return Ok(());
        }
        c.execute_many(REJUDGE_EVENT, &rows)?;
        let was_accepted = |event: &Rejudged| before[&event.nid].standing == Standing::Accepted;
        let now_accepted = |event: &Rejudged| event.verdict == Verdict::Accepted;
        let raised: Vec<EventNid> = judged
            .iter()
            .filter(|event| now_accepted(event) && !was_accepted(event))
            .map(|event| event.nid)
            .collect();
        let fallen: Vec<EventNid> = judged
            .iter()
            .filter(|event| !now_accepted(event) && was_accepted(event))
            .map(|event| event.nid)
            .collect();
        let pdus = events::pdus(c, &raised)?;
        let shown: Vec<(EventNid, &Pdu)> = pdus.iter().map(|(nid, pdu)| (*nid, &**pdu)).collect();
        event_index::add(c, row.nid, &shown)?;
        event_index::remove(c, &fallen)?;
        // Whose membership was judged wrongly was out of the room, or in it, at a time when we did not know:
        // changes of their devices may have been missed.
        let fallen = events::pdus(c, &fallen)?;
        for pdu in pdus.values().chain(fallen.values()) {
            let Some(user) = pdu
                .state_key
                .as_deref()
                .filter(|_| &*pdu.kind == "m.room.member")
            else {
                continue;
            };
            if let Ok(user) = UserId::parse(user)
                && user.server_str() != self.own.as_str()
                && crate::e2ee::remote_list(c, &user)?.is_some()
            {
                crate::e2ee::drop_remote_list(c, &user)?;
                // Clients have them, too.
                devices::changed(c, &user, "")?;
            }
        }
        Ok(())
    }

    // -- The current state ------------------------------------------------------------------------

    fn publish(
        &self,
        c: &mut dyn Conn,
        row: &RoomRow,
        state: &StateMap,
        applied: &mut Applied,
    ) -> Result<()> {
        let again;
        let change = if self.change.from == Some(row.state_root) {
            &self.change
        } else {
            again = self.state_change(c)?;
            &again
        };
        if !change.differs {
            return Ok(());
        }
        let newest = applied.events.iter().map(|placed| placed.position).max();
        let newest = newest.filter(|position| *position > 0);
        let position = match newest {
            Some(position) => position,
            None => streams::next(c, Stream::Events)?,
        };
        let root = self.nodes.root(state);
        c.later(INSERT_ROOM_STATE, &[row![row.nid, position, root]])?;
        applied.state_position = Some(position);
        self.publish_members(c, row.nid, &change.members, position, applied)
    }

    fn publish_members(
        &self,
        c: &mut dyn Conn,
        room: RoomNid,
        members: &[Member],
        position: i64,
        applied: &mut Applied,
    ) -> Result<()> {
        let nids: Vec<EventNid> = members
            .iter()
            .filter_map(|member| member.after.as_ref().map(|(_, nid)| *nid))
            .collect();
        let shown = events::in_timeline(c, &nids)?;
        let here: HashMap<EventNid, i64> = applied
            .events
            .iter()
            .map(|placed| (placed.nid, placed.position))
            .collect();
        let mut hosts: BTreeMap<&str, i64> = BTreeMap::new();
        let (mut added, mut changed, mut gone) = (Vec::new(), Vec::new(), Vec::new());
        for member in members {
            let local = member.user.server_str() == self.own.as_str();
            let joined = |membership: Option<&str>| i64::from(membership == Some("join"));
            let before = member.before.as_deref();
            let after = member.after.as_ref().map(|(membership, _)| &**membership);
            let count = joined(after) - joined(before);
            if count != 0 {
                *hosts.entry(member.user.server_str()).or_default() += count;
            }
            let mut revealed = false;
            match &member.after {
                None => gone.push(member),
                Some((membership, nid)) => {
                    let at = here.get(nid).copied().filter(|at| *at > 0);
                    revealed = at.is_none() && !shown.contains(nid) && before.is_none();
                    let at = at.unwrap_or(if revealed { 0 } else { position });
                    let entry = (&member.user, membership, *nid, at, local);
                    if before.is_none() {
                        added.push(entry);
                    } else {
                        changed.push(entry);
                    }
                }
            }
            if local {
                out_of_band::remove(c, room, &member.user)?;
            }
            applied.memberships.push(MembershipChange {
                user: member.user.clone(),
                local,
                before: member.before.clone(),
                after: member.after.as_ref().map(|(m, _)| Arc::clone(m)),
                event: member.after.as_ref().map(|(_, nid)| *nid),
                revealed,
            });
        }
        for (sql, entries) in [(INSERT_MEMBERSHIP, added), (UPSERT_MEMBERSHIP, changed)] {
            for entries in entries.chunks(ROWS_AT_ONCE) {
                let rows: Vec<_> = entries
                    .iter()
                    .map(|(user, said, nid, at, local)| row![room, *user, *said, *nid, *at, *local])
                    .collect();
                c.later(sql, &rows)?;
            }
        }
        if !gone.is_empty() {
            let rows: Vec<_> = gone.iter().map(|member| row![room, &member.user]).collect();
            c.execute_many(DELETE_MEMBERSHIP, &rows)?;
        }
        let rows: Vec<_> = hosts
            .iter()
            .map(|(server, n)| row![room, *server, *n])
            .collect();
        if !rows.is_empty() {
            c.later(ADD_HOST, &rows)?;
            let touched: Vec<&str> = hosts.into_keys().collect();
            c.later(DROP_HOSTS, &[row![room, &crate::texts(&touched)]])?;
        }
        Ok(())
    }

    // -- Afterwards -------------------------------------------------------------------------------

    /// The transaction is on disk: what it wrote may be kept in memory.
    fn committed(&self, caches: &Caches, applied: &Applied) {
        self.nodes.committed(caches);
        let Some(room) = applied.room else { return };
        let placed: BTreeSet<EventNid> = applied.events.iter().map(|placed| placed.nid).collect();
        let few = self.writes.events.len() <= names::FEW;
        for event in &self.writes.events {
            caches.ids.insert(event.pdu.event_id.clone(), event.nid);
            if few && let Some((key, number)) = key_of(event) {
                caches.keys.insert((room, key), number);
            }
            let was_cached =
                event.place != Place::Outlier && caches.bodies.remove(&event.nid).is_some();
            if was_cached || !placed.contains(&event.nid) {
                // Another copy of it was stored before: whichever stays will be read.
                continue;
            }
            let auth_events = event.pdu.auth_events.iter();
            let auth: Option<Vec<EventNid>> = auth_events.map(|id| caches.ids.get(id)).collect();
            if let (Some(auth), false) = (auth, event.pdu.redacted) {
                let body = Body {
                    room,
                    key: event.key,
                    auth: auth.into(),
                    pdu: Arc::clone(&event.pdu),
                };
                caches.bodies.insert(event.nid, body);
            }
        }
    }
}

/// The events of a write set, by what is stored of them. Those not here are stored as they should be.
#[derive(Default)]
struct Sorted<'a> {
    /// To be inserted.
    stored: Vec<&'a NewEvent>,
    /// Outliers to be given a place.
    upgraded: Vec<&'a NewEvent>,
    /// Outliers of which nothing is known but a verdict that does not count.
    afresh: Vec<&'a NewEvent>,
    /// Those of the upgraded that come back to the place they had before they were given up.
    back: BTreeSet<EventNid>,
}

/// Every state of a write set.
fn states_of(writes: &WriteSet) -> impl Iterator<Item = &StateMap> {
    let new = writes
        .events
        .iter()
        .filter_map(|event| event.state.as_ref());
    let again = writes.rejudged.iter().map(|event| &event.state);
    new.chain(again)
        .flat_map(|state| [&state.before, &state.after])
        .chain(&writes.current_state)
}

fn verdict_code(verdict: &Verdict) -> i64 {
    match verdict {
        Verdict::Accepted => 0,
        Verdict::Rejected(_) => 1,
        Verdict::SoftFailed(_) => 2,
    }
}

fn reason(verdict: &Verdict) -> Option<&str> {
    match verdict {
        Verdict::Accepted => None,
        Verdict::Rejected(reason) | Verdict::SoftFailed(reason) => Some(reason),
    }
}

fn pack_ids(ids: &[EventId], numbers: &HashMap<EventId, EventNid>) -> Result<Vec<u8>> {
    let nids: Vec<EventNid> = ids
        .iter()
        .map(|id| {
            let number = numbers.get(id).copied();
            // Taken away between the plan and this transaction: there is another run for that.
            number.ok_or_else(|| Error::Conflict(format!("{id} lost its number")))
        })
        .collect::<Result<_>>()?;
    Ok(events::pack(&nids))
}

const INSERT_EVENT: &str = "INSERT INTO events (nid, room_nid, key_nid, place, verdict, partial, position,
    depth, origin_ts, before_root, after_root, prevs, auth, redacted, kind, state_key, sender, reason, json)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19)";
/// A copy with a wrong content hash gives way to a right one, never the other way round. An event that was
/// given up comes back to the place it had.
const UPGRADE_EVENT: &str =
    "UPDATE events SET place = CASE WHEN position IS NULL THEN $2 ELSE place END,
    verdict = $3, partial = $4, position = COALESCE(position, $5),
    before_root = $6, after_root = $7, prevs = $8, reason = $9, key_nid = $10,
    json = CASE WHEN redacted = 1 THEN $11 ELSE json END,
    redacted = CASE WHEN redacted = 1 THEN $12 ELSE 0 END WHERE nid = $1";
const REJUDGE_EVENT: &str = "UPDATE events SET verdict = $2, reason = $3, partial = $4,
    before_root = $5, after_root = $6 WHERE nid = $1";
const LOOK_AFRESH: &str = "UPDATE events SET place = 0, verdict = $2, reason = $3, partial = 0,
    position = NULL, before_root = NULL, after_root = NULL, prevs = NULL WHERE nid = $1";
const DROP_EXTREMITIES: &str = "DELETE FROM forward_extremities WHERE room_nid = $1";
const INSERT_EXTREMITY: &str =
    "INSERT INTO forward_extremities (room_nid, event_nid) VALUES ($1, $2)
    ON CONFLICT (room_nid, event_nid) DO NOTHING";
const UPDATE_ROOM: &str =
    "UPDATE rooms SET revision = $2, state_root = $3, min_depth = $4 WHERE nid = $1";
const INSERT_TRANSACTION: &str = "INSERT INTO client_transactions
    (user_id, device, room_nid, txn_id, event_nid) VALUES ($1, $2, $3, $4, $5)
    ON CONFLICT (user_id, device, room_nid, txn_id) DO NOTHING";
const UNSTAGE: &str = "DELETE FROM staged_pdus WHERE number IN (SELECT value FROM rarray($1))";

/// Positions for events that get a place, in order: the timeline's rise; of backfilled ones, the oldest
/// gets the lowest.
fn give_positions(c: &mut dyn Conn, placed: &[&NewEvent]) -> Result<HashMap<EventNid, i64>> {
    let mut positions = HashMap::new();
    for (place, stream) in [
        (Place::Timeline, Stream::Events),
        (Place::Backfilled, Stream::Backfilled),
    ] {
        let here: Vec<EventNid> = placed
            .iter()
            .filter(|event| event.place == place)
            .map(|event| event.nid)
            .collect();
        if here.is_empty() {
            continue;
        }
        let count = i64::try_from(here.len()).expect("a count of things in memory");
        let first = streams::advance(c, stream, count)?;
        if place == Place::Timeline {
            positions.extend(here.into_iter().zip(first..));
        } else {
            positions.extend(here.into_iter().rev().zip((first..).map(|n| -n)));
        }
    }
    Ok(positions)
}

/// A rejected event that was given up becomes an outlier like any other.
fn look_afresh(c: &mut dyn Conn, events: &[&NewEvent]) -> Result<()> {
    let rows: Vec<_> = events
        .iter()
        .map(|event| {
            row![
                event.nid,
                verdict_code(&event.verdict),
                reason(&event.verdict)
            ]
        })
        .collect();
    if !rows.is_empty() {
        c.execute_many(LOOK_AFRESH, &rows)?;
    }
    Ok(())
}

const INSERT_CHILD: &str = "INSERT INTO event_children (prev_nid, event_nid) VALUES ($1, $2)
    ON CONFLICT (prev_nid, event_nid) DO NOTHING";
const INSERT_DEPENDENT: &str = "INSERT INTO auth_dependents (auth_nid, event_nid) VALUES ($1, $2)
    ON CONFLICT (auth_nid, event_nid) DO NOTHING";
const PLACED: &str = "DELETE FROM backward_extremities
    WHERE room_nid = $1 AND event_nid IN (SELECT value FROM rarray($2))";
const WANTED: &str =
    "INSERT INTO backward_extremities (room_nid, event_nid, depth) VALUES ($1, $2, $3)
    ON CONFLICT (room_nid, event_nid) DO UPDATE SET depth = CASE
    WHEN excluded.depth > backward_extremities.depth THEN excluded.depth
    ELSE backward_extremities.depth END";

/// The edges of events that got a place, and what is missing behind them.
fn link(
    c: &mut dyn Conn,
    room: RoomNid,
    placed: &[&NewEvent],
    numbers: &HashMap<EventId, EventNid>,
) -> Result<()> {
    if placed.is_empty() {
        return Ok(());
    }
    let edges = |ids: fn(&Pdu) -> &[EventId]| -> Vec<(EventNid, &NewEvent)> {
        let of = |event: &&'_ NewEvent| {
            let nids = ids(&event.pdu).iter().filter_map(|id| numbers.get(id));
            nids.copied().collect::<Vec<_>>()
        };
        placed
            .iter()
            .flat_map(|event| of(event).into_iter().map(|nid| (nid, *event)))
            .collect()
    };
    let prevs = edges(|pdu| &pdu.prev_events);
    let rows: Vec<_> = prevs.iter().map(|(prev, e)| row![*prev, e.nid]).collect();
    if !rows.is_empty() {
        c.later(INSERT_CHILD, &rows)?;
    }
    let auth = edges(|pdu| &pdu.auth_events);
    let rows: Vec<_> = auth.iter().map(|(auth, e)| row![*auth, e.nid]).collect();
    if !rows.is_empty() {
        c.later(INSERT_DEPENDENT, &rows)?;
    }
    let here: Vec<EventNid> = placed.iter().map(|event| event.nid).collect();
    c.later(PLACED, &[row![room, &events::raw(&here)]])?;
    let named: BTreeSet<EventNid> = prevs.iter().map(|(prev, _)| *prev).collect();
    let named: Vec<EventNid> = named.into_iter().collect();
    let statuses = events::statuses(c, &named)?;
    let missing = |nid: &EventNid| {
        !statuses
            .get(nid)
            .is_some_and(|status| status.room == room && status.place != Place::Outlier)
    };
    let rows: Vec<_> = prevs
        .iter()
        .filter(|(prev, event)| missing(prev) && !matches!(event.verdict, Verdict::Rejected(_)))
        .map(|(prev, event)| row![room, *prev, event.pdu.depth])
        .collect();
    if !rows.is_empty() {
        c.later(WANTED, &rows)?;
    }
    Ok(())
}

const MEMBERSHIPS: &str = "SELECT user_id, membership FROM memberships
    WHERE room_nid = $1 AND user_id IN (SELECT value FROM rarray_text($2))";
const ALL_MEMBERSHIPS: &str = "SELECT user_id, membership FROM memberships WHERE room_nid = $1";
const INSERT_ROOM_STATE: &str =
    "INSERT INTO room_states (room_nid, position, root) VALUES ($1, $2, $3)
    ON CONFLICT (room_nid, position) DO UPDATE SET root = excluded.root";
/// Rows that are in memory as parameters at one time.
const ROWS_AT_ONCE: usize = 1000;
const INSERT_MEMBERSHIP: &str = "INSERT INTO memberships
    (room_nid, user_id, membership, event_nid, position, local) VALUES ($1, $2, $3, $4, $5, $6)";
const UPSERT_MEMBERSHIP: &str = "INSERT INTO memberships
    (room_nid, user_id, membership, event_nid, position, local) VALUES ($1, $2, $3, $4, $5, $6)
    ON CONFLICT (room_nid, user_id) DO UPDATE SET membership = excluded.membership,
    event_nid = excluded.event_nid, position = excluded.position";
const DELETE_MEMBERSHIP: &str = "DELETE FROM memberships WHERE room_nid = $1 AND user_id = $2";
const ADD_HOST: &str = "INSERT INTO room_hosts (room_nid, server, joined) VALUES ($1, $2, $3)
    ON CONFLICT (room_nid, server) DO UPDATE SET joined = room_hosts.joined + excluded.joined";
const DROP_HOSTS: &str = "DELETE FROM room_hosts WHERE room_nid = $1
    AND server IN (SELECT value FROM rarray_text($2)) AND joined <= 0";

fn memberships_of(
    c: &mut dyn Conn,
    room: RoomNid,
    users: &[UserId],
) -> Result<HashMap<UserId, Arc<str>>> {
    let rows = c.query_all(
        MEMBERSHIPS,
        &[&room, &crate::texts(&users.to_vec())],
        |row| Ok((row.id(0)?, row.shared(1)?)),
    )?;
    Ok(rows.into_iter().collect())
}

fn all_memberships(c: &mut dyn Conn, room: RoomNid) -> Result<HashMap<UserId, Arc<str>>> {
    let rows = c.query_all(ALL_MEMBERSHIPS, &[&room], |row| {
        Ok((row.id(0)?, row.shared(1)?))
    })?;
    Ok(rows.into_iter().collect())
}

const LOCAL_JOINED: &str = "SELECT 1 FROM memberships
    WHERE room_nid = $1 AND local = 1 AND membership = 'join'";
const INSERT_MARKER: &str =
    "INSERT INTO partial_rooms (room_nid, joined_via, join_event, device_lists_at)
    VALUES ($1, $2, $3, $4)";
/// No two of these collide, which PostgreSQL makes use of.
const INSERT_SERVER: &str =
    "INSERT INTO partial_servers (room_nid, server, place) VALUES ($1, $2, $3)";
const DROP_MARKER: &str = "DELETE FROM partial_rooms WHERE room_nid = $1";
const DROP_SERVERS: &str = "DELETE FROM partial_servers WHERE room_nid = $1";
const PARTIAL_EVENTS: &str = "SELECT nid FROM events WHERE room_nid = $1 AND partial = 1";
pub(crate) const BUILT_ON: &str = "SELECT nid FROM events
    WHERE room_nid = $1 AND place > 0 AND partial = 0 AND nid IN (
        SELECT event_nid FROM event_children WHERE prev_nid IN (SELECT value FROM rarray($2))
        UNION SELECT event_nid FROM auth_dependents WHERE auth_nid IN (SELECT value FROM rarray($2)))";
const GIVE_UP: &str = "UPDATE events SET partial = 2 WHERE nid IN (SELECT value FROM rarray($1))";
const OLDEST_NEEDED: &str = "SELECT MIN(device_lists_at) FROM partial_rooms";
const BECAME_FULL: &str = "INSERT INTO became_full (position, room_nid) VALUES ($1, $2)";
const JOINED_AMONG: &str = "SELECT user_id FROM memberships WHERE room_nid = $1
    AND membership = 'join' AND user_id IN (SELECT value FROM rarray_text($2)) ORDER BY user_id";

/// Marks a room that has no marker.
fn mark(c: &mut dyn Conn, room: RoomNid, marker: &PartialMarker) -> Result<()> {
    // S-37: what was full stays full while somebody of ours is in it.
    if c.exists(LOCAL_JOINED, &[&room])? {
        return Err(Error::Stale);
    }
    c.execute(
        INSERT_MARKER,
        &[
            &room,
            &marker.joined_via,
            &marker.join_event,
            &marker.device_lists_at,
        ],
    )?;
    let servers = (0_i64..).zip(queues::once(&marker.servers_in_room));
    let rows: Vec<_> = servers
        .map(|(place, server)| row![room, server, place])
        .collect();
    if !rows.is_empty() {
        c.execute_many(INSERT_SERVER, &rows)?;
    }
    Ok(())
}

/// Cached device lists go with the last room that is shared with their user.
fn forget_device_lists(
    c: &mut dyn Conn,
    room: RoomNid,
    changes: &[MembershipChange],
) -> Result<()> {
    let left = |change: &&MembershipChange| {
        change.before.as_deref() == Some("join") && change.after.as_deref() != Some("join")
    };
    let (ours, theirs): (Vec<_>, Vec<_>) = changes.iter().filter(left).partition(|c| c.local);
    let theirs: Vec<UserId> = theirs
        .into_iter()
        .map(|change| change.user.clone())
        .collect();
    devices::forget_untracked(c, &theirs)?;
    if !ours.is_empty() {
        devices::forget_untracked_in(c, room)?;
    }
    Ok(())
}

fn clear(
    c: &mut dyn Conn,
    room: RoomNid,
    marker: Option<PartialMarker>,
    applied: &mut Applied,
) -> Result<()> {
    if rooms::partial_events_left(c, room)? > 0 || rooms::handshake_running(c, room)? {
        return Err(Error::Stale);
    }
    let Some(marker) = marker else {
        return Ok(());
    };
    // P-54: updates that came for somebody who is found to be in the room.
    let pended = devices::pending_since(c, marker.device_lists_at)?;
    let members: Vec<UserId> =
        c.query_all(JOINED_AMONG, &[&room, &crate::texts(&pended)], |row| {
            row.id(0)
        })?;
    for user in members {
        applied.device_lists = Some(devices::changed(c, &user, "")?);
    }
    drop_marker(c, room)?;
    let position = streams::next(c, Stream::BecameFull)?;
    c.execute(BECAME_FULL, &[&position, &room])?;
    applied.became_full = Some(position);
    Ok(())
}

/// What was judged on partial state, and what was built on that, has no state from here on and is no end of
/// the room.
fn free(c: &mut dyn Conn, room: RoomNid) -> Result<()> {
    // The join that is under way counts on what is here (S-29).
    if rooms::handshake_running(c, room)? {
        return Err(Error::Stale);
    }
    let mut edge = c.query_all(PARTIAL_EVENTS, &[&room], |row| row.event_nid(0))?;
    let mut gone: BTreeSet<EventNid> = edge.iter().copied().collect();
    while !edge.is_empty() {
        edge = c.query_all(BUILT_ON, &[&room, &events::raw(&edge)], |row| {
            row.event_nid(0)
        })?;
        edge.retain(|nid| gone.insert(*nid));
    }
    let gone: Vec<EventNid> = gone.into_iter().collect();
    c.execute(GIVE_UP, &[&events::raw(&gone)])?;
    c.execute(DROP_EXTREMITIES, &[&room])?;
    drop_marker(c, room)
}

/// Marker, join list, and the pending device updates that no other partial room needs (P-56).
fn drop_marker(c: &mut dyn Conn, room: RoomNid) -> Result<()> {
    c.execute(DROP_MARKER, &[&room])?;
    c.execute(DROP_SERVERS, &[&room])?;
    let oldest = c.query_int(OLDEST_NEEDED, &[])?;
    devices::drop_pending(c, oldest.unwrap_or(i64::MAX))
}

const INTEND: &str = "INSERT INTO intents
    (job, via, event_id, room_nid, user_id, event, omit_members, owe_leave)
    VALUES ($1, $2, $3, $4, $5, $6, $7, 0) ON CONFLICT (job, via, event_id) DO NOTHING";
const DROP_INTENT: &str = "DELETE FROM intents WHERE job = $1";
const OWE_LEAVE: &str = "UPDATE intents SET owe_leave = 1 WHERE job = $1";

fn change_intent(c: &mut dyn Conn, room: RoomNid, change: &IntentChange) -> Result<()> {
    match change {
        IntentChange::Intend {
            job,
            user,
            event_id,
            event,
            via,
            omit_members,
        } => c.execute(
            INTEND,
            &[job, via, event_id, &room, user, event, omit_members],
        ),
        IntentChange::Fulfil { job } | IntentChange::Forget { job } => {
            c.execute(DROP_INTENT, &[job])
        }
        IntentChange::OweLeave { job } => c.execute(OWE_LEAVE, &[job]),
    }
    .map(drop)
}
