//! The store of one server, in memory: what Load and Commit mean, and the laws that must hold in it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use protocol::event_set::{EventSet, StateKey, StoredEvent};
use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::nid::{EventNid, KeyNid};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::state::StateMap;
use room::effect::{
    Child, Extremity, Found, Head, Known, Load, Loaded, PartialMarker, Place, ReadyEvent, Stale,
    StateAt, StoredOutOfBand,
};
use room::write::{
    EventState, FanOut, Former, IntentChange, NewEvent, OutOfBand, PartialChange, Verdict, WriteSet,
};

#[derive(Clone, Debug)]
pub struct Store {
    pub own: ServerName,
    pub rooms: BTreeMap<RoomId, Room>,
}

#[derive(Clone, Debug, Default)]
pub struct Room {
    pub version: Option<RoomVersion>,
    pub revision: u64,
    nids: BTreeMap<EventId, EventNid>,
    keys: BTreeMap<StateKey, KeyNid>,
    pub events: BTreeMap<EventNid, Row>,
    pub extremities: Vec<Extremity>,
    pub current: StateMap,
    pub partial: Option<PartialMarker>,
    pub intents: BTreeMap<i64, Intent>,
    /// Leaves that are owed, by job: the joins that were sent.
    pub owed: BTreeMap<i64, Vec<EventId>>,
    pub out_of_band: BTreeMap<UserId, StoredOutOfBand>,
    last_position: u64,
    /// What a commit broke, for the next check to tell.
    broken: Option<String>,
}

/// A join that may be known elsewhere.
#[derive(Clone, Debug)]
pub struct Intent {
    pub version: RoomVersion,
    pub user: UserId,
    /// Every event that was about to be sent for it, newest last.
    pub events: Vec<Arc<str>>,
    pub via: ServerName,
    pub omit_members: bool,
}

impl Intent {
    fn joins(self) -> Vec<EventId> {
        let parsed = |json: &Arc<str>| Pdu::parse(json, self.version).expect("it was made here");
        self.events
            .iter()
            .map(|json| parsed(json).event_id)
            .collect()
    }
}

#[derive(Clone, Debug)]
pub struct Row {
    pub pdu: Arc<Pdu>,
    pub key: Option<KeyNid>,
    pub place: Place,
    pub state: Option<EventState>,
    pub verdict: Verdict,
    /// Place in the order of storing; timeline events only.
    pub position: u64,
    /// Judged on partial state that never became full. An outlier for whatever has to be decided.
    given_up: bool,
}

impl Row {
    fn rejected(&self) -> bool {
        matches!(self.verdict, Verdict::Rejected(_))
    }

    fn soft_failed(&self) -> bool {
        matches!(self.verdict, Verdict::SoftFailed(_))
    }

    fn partial(&self) -> bool {
        self.state.as_ref().is_some_and(|state| state.partial)
    }
}

/// What a commit asks others to be told.
pub type Outgoing = Vec<(Vec<ServerName>, Arc<Pdu>)>;

impl Store {
    pub fn new(own: ServerName) -> Self {
        Self {
            own,
            rooms: BTreeMap::new(),
        }
    }

    pub fn room(&self, room: &RoomId) -> Option<&Room> {
        self.rooms.get(room)
    }

    /// Answers a load.
    pub fn load(&mut self, id: &RoomId, load: Load) -> Loaded {
        let own = self.own.clone();
        let room = self.rooms.entry(id.clone()).or_default();
        match load {
            Load::Head => Loaded::Head(room.head(&own).map(Box::new)),
            Load::Known { ids } => Loaded::Known(
                room.found(ids)
                    .map(|(id, found)| (id, found.known))
                    .collect(),
            ),
            Load::Find { ids } => Loaded::Found(room.found(ids).collect()),
            Load::Intern { ids, keys, .. } => Loaded::Interned {
                events: ids.into_iter().map(|id| room.nid(id)).collect(),
                keys: keys.into_iter().map(|key| room.key(key)).collect(),
            },
            Load::States { events } => Loaded::States(
                events
                    .into_iter()
                    .filter_map(|nid| Some((nid, room.state_at(nid)?)))
                    .collect(),
            ),
            Load::StateEvents { state, keys } => Loaded::StateEvents(
                keys.into_iter()
                    .filter_map(|key| {
                        let nid = state.get(*room.keys.get(&key)?)?;
                        Some((key, (nid, room.events.get(&nid)?.pdu.clone())))
                    })
                    .collect(),
            ),
            // The whole room is more than enough.
            Load::Closure { .. } => Loaded::Closure(room.set(|_| true)),
            Load::Events { events } => {
                let wanted: BTreeSet<_> = events.into_iter().collect();
                Loaded::Closure(room.set(|nid| wanted.contains(&nid)))
            }
            Load::ReadyPartial { limit } => Loaded::Ready(room.ready(limit as usize)),
            Load::Children { events } => Loaded::Children(room.children(&events)),
            Load::AuthDependents { events } => Loaded::Ready(room.auth_dependents(&events)),
            Load::OutOfBand { user } => {
                Loaded::OutOfBand(room.out_of_band.get(&user).cloned().map(Box::new))
            }
            Load::HandshakeRunning => Loaded::HandshakeRunning(!room.intents.is_empty()),
            Load::Hosts => Loaded::Hosts(room.hosts(&own)),
            Load::StateStored => Loaded::StateStored(room.state_stored()),
            Load::BackwardExtremities => Loaded::BackwardExtremities(room.backward_extremities()),
        }
    }

    /// Applies a write set, all of it or nothing.
    pub fn commit(&mut self, writes: WriteSet) -> Result<Outgoing, Stale> {
        let own = self.own.clone();
        let room = self.rooms.entry(writes.room.clone()).or_default();
        let mut next = room.clone();
        let outgoing = next.apply(writes, &own)?;
        *room = next;
        Ok(outgoing)
    }
}

impl Room {
    fn nid(&mut self, id: EventId) -> EventNid {
        let next = EventNid(self.nids.len() as i64 + 1);
        *self.nids.entry(id).or_insert(next)
    }

    fn key(&mut self, key: StateKey) -> KeyNid {
        let next = KeyNid(self.keys.len() as u32);
        *self.keys.entry(key).or_insert(next)
    }

    pub fn row(&self, id: &EventId) -> Option<&Row> {
        self.events.get(self.nids.get(id)?)
    }

    fn found(&self, ids: Vec<EventId>) -> impl Iterator<Item = (EventId, Found)> + '_ {
        ids.into_iter().filter_map(|id| {
            let nid = *self.nids.get(&id)?;
            let row = self.events.get(&nid)?;
            // It was refused on state that nobody can vouch for, so it has to be looked at afresh.
            if row.given_up && row.rejected() {
                return None;
            }
            let known = Known {
                nid,
                key: row.key,
                place: row.place,
                rejected: row.rejected(),
                partial: row.partial(),
            };
            let pdu = row.pdu.clone();
            Some((id, Found { known, pdu }))
        })
    }

    pub fn head(&self, own: &ServerName) -> Option<Head> {
        let version = self.version.filter(|_| self.revision > 0)?;
        Some(Head {
            version,
            revision: self.revision,
            partial: self.partial.clone(),
            forward_extremities: self.extremities.clone(),
            state: self.current.clone(),
            local_joined: self
                .joined()
                .into_iter()
                .filter(|user| user.server_name() == *own)
                .collect(),
            min_depth: self
                .timeline()
                .map(|(_, row)| row.pdu.depth)
                .min()
                .unwrap_or(1),
            handshake_running: !self.intents.is_empty(),
        })
    }

    fn timeline(&self) -> impl Iterator<Item = (EventNid, &Row)> {
        self.events
            .iter()
            .filter(|(_, row)| row.place != Place::Outlier)
            .map(|(nid, row)| (*nid, row))
    }

    /// Current state, by name.
    pub fn state(&self) -> BTreeMap<(String, String), EventId> {
        self.names(&self.current)
    }

    pub fn names(&self, map: &StateMap) -> BTreeMap<(String, String), EventId> {
        map.iter()
            .map(|(_, nid)| {
                let pdu = &self.events[&nid].pdu;
                let state_key = pdu.state_key.as_deref().unwrap_or_default();
                let key = (pdu.kind.to_string(), state_key.to_owned());
                (key, pdu.event_id.clone())
            })
            .collect()
    }

    pub fn joined(&self) -> Vec<UserId> {
        self.current
            .iter()
            .filter_map(|(_, nid)| self.events.get(&nid))
            .filter(|row| &*row.pdu.kind == "m.room.member" && row.pdu.membership() == Some("join"))
            .filter_map(|row| UserId::parse(row.pdu.state_key.as_deref()?).ok())
            .collect()
    }

    pub fn hosts(&self, own: &ServerName) -> Vec<ServerName> {
        let hosts: BTreeSet<_> = self.joined().iter().map(UserId::server_name).collect();
        hosts.into_iter().filter(|host| host != own).collect()
    }

    fn state_stored(&self) -> u64 {
        let state = self.events.values().filter(|row| row.key.is_some());
        state.count() as u64
    }

    fn state_at(&self, nid: EventNid) -> Option<StateAt> {
        let state = self.events.get(&nid)?.state.clone()?;
        Some(StateAt {
            before: state.before,
            after: state.after,
            partial: state.partial,
        })
    }

    fn set(&self, wanted: impl Fn(EventNid) -> bool) -> EventSet {
        let stored = |row: &Row| StoredEvent {
            pdu: row.pdu.clone(),
            auth_events: self.nids_of(&row.pdu.auth_events),
            rejected: row.rejected(),
        };
        EventSet {
            events: self
                .events
                .iter()
                .filter(|(nid, _)| wanted(**nid))
                .map(|(nid, row)| (*nid, stored(row)))
                .collect(),
            keys: self.keys.clone(),
            ..EventSet::default()
        }
    }

    fn nids_of(&self, ids: &[EventId]) -> Vec<EventNid> {
        ids.iter()
            .filter_map(|id| self.nids.get(id).copied())
            .collect()
    }

    fn place(&self, id: &EventId) -> Option<(EventNid, &Row)> {
        let nid = *self.nids.get(id)?;
        let row = self.events.get(&nid)?;
        (row.place != Place::Outlier).then_some((nid, row))
    }

    fn ready(&self, limit: usize) -> Vec<ReadyEvent> {
        let mut partial: Vec<_> = self.timeline().filter(|(_, row)| row.partial()).collect();
        partial.sort_by_key(|(_, row)| row.position);
        let mut taken = BTreeSet::new();
        let mut ready = Vec::new();
        loop {
            let next = partial.iter().position(|(_, row)| {
                row.pdu.prev_events.iter().all(|id| match self.place(id) {
                    Some((nid, prev)) => !prev.partial() || taken.contains(&nid),
                    None => true,
                })
            });
            let (Some(next), true) = (next, ready.len() < limit) else {
                return ready;
            };
            let (nid, row) = partial.remove(next);
            taken.insert(nid);
            ready.push(self.ready_event(nid, row));
        }
    }

    fn ready_event(&self, nid: EventNid, row: &Row) -> ReadyEvent {
        let prevs = &row.pdu.prev_events;
        ReadyEvent {
            nid,
            pdu: row.pdu.clone(),
            key: row.key,
            rejected: row.rejected(),
            soft_failed: row.soft_failed(),
            known_prevs: prevs
                .iter()
                .filter_map(|id| Some(self.place(id)?.0))
                .collect(),
            unknown_prevs: prevs
                .iter()
                .filter(|id| self.place(id).is_none())
                .cloned()
                .collect(),
        }
    }

    fn children(&self, events: &[EventNid]) -> BTreeMap<EventNid, Vec<Child>> {
        let mut children: BTreeMap<EventNid, Vec<Child>> = BTreeMap::new();
        for (nid, row) in self.timeline() {
            for prev in self.nids_of(&row.pdu.prev_events) {
                if events.contains(&prev) {
                    children.entry(prev).or_default().push(Child {
                        nid,
                        rejected: row.rejected(),
                        soft_failed: row.soft_failed(),
                    });
                }
            }
        }
        children
    }

    fn auth_dependents(&self, events: &[EventNid]) -> Vec<ReadyEvent> {
        let mut dependents: Vec<_> = self
            .timeline()
            .filter(|(_, row)| !row.partial())
            .filter(|(_, row)| {
                let auth = self.nids_of(&row.pdu.auth_events);
                auth.iter().any(|nid| events.contains(nid))
            })
            .collect();
        dependents.sort_by_key(|(_, row)| row.position);
        dependents
            .into_iter()
            .map(|(nid, row)| self.ready_event(nid, row))
            .collect()
    }

    fn backward_extremities(&self) -> Vec<(EventId, i64)> {
        let mut missing: BTreeMap<EventId, i64> = BTreeMap::new();
        for (_, row) in self.timeline() {
            for prev in &row.pdu.prev_events {
                if self.place(prev).is_none() {
                    let depth = missing.entry(prev.clone()).or_default();
                    *depth = (*depth).max(row.pdu.depth - 1);
                }
            }
        }
        let mut missing: Vec<_> = missing.into_iter().collect();
        missing.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
        missing
    }

    // -- commit ------------------------------------------------------------------------------------

    fn apply(&mut self, writes: WriteSet, own: &ServerName) -> Result<Outgoing, Stale> {
        if writes
            .expect
            .is_some_and(|expected| expected != self.revision)
        {
            return Err(Stale);
        }
        let mut outgoing = Outgoing::new();
        let moves = writes.forward_extremities.is_some()
            || writes.current_state.is_some()
            || writes.partial != PartialChange::Keep;
        let full_with_us = self
            .head(own)
            .is_some_and(|head| head.partial.is_none() && !head.local_joined.is_empty());
        for event in writes.events {
            if let FanOut::Servers(servers) = &event.fan_out {
                outgoing.push((servers.clone(), event.pdu.clone()));
            }
            self.store(event);
        }
        for judged in writes.rejudged {
            let row = self
                .events
                .get_mut(&judged.nid)
                .expect("only stored events are judged again");
            row.state = Some(judged.state);
            row.verdict = judged.verdict;
        }
        if let Some(extremities) = writes.forward_extremities {
            self.extremities = extremities;
        }
        if let Some(state) = writes.current_state {
            self.current = state;
        }
        if let Some(intent) = writes.intent {
            self.settle(writes.version, intent);
        }
        for stored in writes.out_of_band {
            self.store_out_of_band(stored)?;
        }
        self.change_partial(writes.partial, full_with_us)?;
        if moves {
            self.version = Some(writes.version);
            self.revision += 1;
        }
        Ok(outgoing)
    }

    fn store(&mut self, event: NewEvent) {
        assert_eq!(
            event.state.is_none(),
            event.place == Place::Outlier,
            "state exactly off the outliers"
        );
        self.nids.insert(event.pdu.event_id.clone(), event.nid);
        let stored = self.events.get(&event.nid);
        if event.place == Place::Outlier
            && stored.is_some_and(|row| !(row.given_up && row.rejected()))
        {
            return;
        }
        if self
            .events
            .get(&event.nid)
            .is_some_and(|row| row.place != Place::Outlier)
        {
            self.broken = Some(format!("{} is placed twice", event.pdu.event_id));
        }
        self.last_position += 1;
        let row = Row {
            pdu: event.pdu,
            key: event.key,
            place: event.place,
            state: event.state,
            verdict: event.verdict,
            position: self.last_position,
            given_up: false,
        };
        self.events.insert(event.nid, row);
    }

    fn settle(&mut self, version: RoomVersion, change: IntentChange) {
        match change {
            IntentChange::Intend {
                job,
                user,
                event,
                via,
                omit_members,
                ..
            } => {
                let intent = self.intents.entry(job).or_insert(Intent {
                    version,
                    user,
                    events: Vec::new(),
                    via: via.clone(),
                    omit_members,
                });
                intent.version = version;
                intent.via = via;
                intent.omit_members = omit_members;
                intent.events.push(event);
            }
            IntentChange::Fulfil { job } | IntentChange::Forget { job } => {
                self.intents.remove(&job);
                self.owed.remove(&job);
            }
            IntentChange::OweLeave { job } => {
                let sent = self.intents.remove(&job);
                self.owed
                    .insert(job, sent.map_or_else(Vec::new, Intent::joins));
            }
        }
    }

    fn store_out_of_band(&mut self, stored: OutOfBand) -> Result<(), Stale> {
        let there = self.out_of_band.get(&stored.user);
        if let Former::Only(former) = stored.instead_of
            && there.map(|there| there.nid) != former
        {
            return Err(Stale);
        }
        let pdu = self.events[&stored.event].pdu.clone();
        self.out_of_band.insert(
            stored.user,
            StoredOutOfBand {
                membership: stored.membership,
                nid: stored.event,
                pdu,
                via: stored.via,
                stripped_state: stored.stripped_state,
            },
        );
        Ok(())
    }

    fn change_partial(&mut self, change: PartialChange, full_with_us: bool) -> Result<(), Stale> {
        match change {
            PartialChange::Keep => {}
            PartialChange::Mark(_) if full_with_us => return Err(Stale),
            PartialChange::Mark(marker) => {
                self.partial.get_or_insert(marker);
            }
            PartialChange::Clear => {
                let partial = self.timeline().any(|(_, row)| row.partial());
                if partial || !self.intents.is_empty() {
                    return Err(Stale);
                }
                self.partial = None;
            }
            PartialChange::Free => {
                if !self.intents.is_empty() {
                    return Err(Stale);
                }
                self.partial = None;
                self.give_up();
            }
        }
        Ok(())
    }

    /// What was judged on partial state, and what was built on that, has no state from here on and is no end
    /// of the room.
    fn give_up(&mut self) {
        let partial = self.timeline().filter(|(_, row)| row.partial());
        let mut gone: BTreeSet<_> = partial.map(|(nid, _)| nid).collect();
        loop {
            let stands_on_it = |row: &Row| {
                let named = row.pdu.prev_events.iter().chain(&row.pdu.auth_events);
                named
                    .filter_map(|id| self.nids.get(id))
                    .any(|nid| gone.contains(nid))
            };
            let more = self.timeline().filter(|(_, row)| stands_on_it(row));
            let more: Vec<_> = more
                .map(|(nid, _)| nid)
                .filter(|nid| !gone.contains(nid))
                .collect();
            if more.is_empty() {
                break;
            }
            gone.extend(more);
        }
        for nid in gone {
            let row = self.events.get_mut(&nid).expect("just found there");
            row.place = Place::Outlier;
            row.state = None;
            row.given_up = true;
        }
        self.extremities.clear();
    }

    // -- telling -----------------------------------------------------------------------------------

    /// All events and the newest end of the room, for whoever reads a broken run.
    pub fn tell(&self) -> String {
        let mut told = String::new();
        let list = |ids: &[EventId]| {
            let ids = ids
                .iter()
                .map(|id| id.as_str().get(..6).unwrap_or_default());
            ids.collect::<Vec<_>>().join(" ")
        };
        for (nid, row) in &self.events {
            let pdu = &row.pdu;
            let partial = if row.partial() { " partial" } else { "" };
            let content: String = pdu.content_value().to_string().chars().take(60).collect();
            let line = format!(
                "{:>4} {} {:?} {:?}{partial} depth {} {} {} {:?} {content} prev [{}] auth [{}]",
                nid.0,
                list(std::slice::from_ref(&pdu.event_id)),
                row.place,
                row.verdict,
                pdu.depth,
                pdu.sender,
                pdu.kind,
                pdu.state_key,
                list(&pdu.prev_events),
                list(&pdu.auth_events),
            );
            told.push_str(&line);
            told.push('\n');
            if let Some(state) = &row.state {
                let at = |map: &StateMap| {
                    let nids = map.iter().map(|(_, nid)| nid.0.to_string());
                    nids.collect::<Vec<_>>().join(" ")
                };
                told.push_str(&format!(
                    "       before [{}] after [{}]\n",
                    at(&state.before),
                    at(&state.after)
                ));
            }
        }
        let nids = |nids: Vec<i64>| format!("{nids:?}");
        told.push_str(&format!(
            "extremities {} current {} partial {:?}\n",
            nids(self.extremities.iter().map(|e| e.nid.0).collect()),
            nids(self.current.iter().map(|(_, nid)| nid.0).collect()),
            self.partial,
        ));
        told
    }

    // -- laws --------------------------------------------------------------------------------------

    /// What must hold in every store at every moment.
    pub fn check(&self, own: &ServerName) -> Result<(), String> {
        if let Some(broken) = &self.broken {
            return Err(broken.clone());
        }
        for (nid, row) in &self.events {
            if row.partial() && self.partial.is_none() {
                return Err(format!("{} is partial in a full room", row.pdu.event_id));
            }
            if let Some(state) = &row.state {
                for (_, at) in state.after.iter().chain(state.before.iter()) {
                    self.is_good_state(at, &row.pdu.event_id)?;
                }
                if state.after != state.before && row.rejected() {
                    return Err(format!("{nid:?} is rejected and changes the state"));
                }
            }
        }
        // With nobody of ours in the room the current state is what it was when the last one left (S-17): what
        // the resync finds out after that is not put into it, and the next join brings its own.
        let joined = self.joined();
        let here = joined.iter().any(|user| user.server_name() == *own);
        for (_, nid) in self.current.iter().filter(|_| here) {
            self.is_good_state_here(nid)?;
        }
        for extremity in &self.extremities {
            let row = self.events.get(&extremity.nid);
            let row = row.ok_or("a forward extremity is not stored")?;
            if row.verdict != Verdict::Accepted
                && self.partial.is_none()
                && self.extremities.len() > 1
            {
                return Err(format!(
                    "{} is an extremity, and {:?}",
                    extremity.event_id, row.verdict
                ));
            }
            if row.partial() != extremity.partial {
                return Err(format!(
                    "the mark of extremity {} is wrong",
                    extremity.event_id
                ));
            }
        }
        Ok(())
    }

    fn is_good_state(&self, nid: EventNid, at: &EventId) -> Result<(), String> {
        match self.events.get(&nid) {
            None => Err(format!(
                "the state at {at} names an event that is not stored"
            )),
            Some(_) => Ok(()),
        }
    }

    /// Law 4.
    fn is_good_state_here(&self, nid: EventNid) -> Result<(), String> {
        match self.events.get(&nid) {
            None => Err("current state names an event that is not stored".to_owned()),
            Some(row) if row.rejected() && self.partial.is_none() => Err(format!(
                "{} is rejected and current state",
                row.pdu.event_id
            )),
            Some(row) if row.pdu.state_key.is_none() => {
                Err(format!("{} is no state event", row.pdu.event_id))
            }
            Some(_) => Ok(()),
        }
    }
}
