//! The newest end of a room while a machine adds events to it: forward extremities and current state.

use std::collections::BTreeSet;
use std::sync::Arc;

use protocol::build::Reference;
use protocol::id::EventId;
use protocol::nid::{EventNid, KeyNid};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::state::StateMap;

use crate::effect::{Extremity, Head, Place, StateAt, StoredEvent};
use crate::facts::{self, Facts, Got};
use crate::write::{EventState, FanOut, NewEvent, Transaction, Verdict, WriteSet};

/// Prev events of an event of ours (J-33). Further extremities wait for the next event.
pub(crate) const PREV_EVENTS_MAX: usize = 20;

#[derive(Clone, Debug)]
pub(crate) struct View {
    pub version: RoomVersion,
    pub extremities: Vec<Extremity>,
    pub state: StateMap,
    moved: bool,
}

/// An event whose place, state and verdict are decided.
pub(crate) struct Placed {
    pub nid: EventNid,
    pub key: Option<KeyNid>,
    pub pdu: Arc<Pdu>,
    pub state: EventState,
    pub verdict: Verdict,
}

impl View {
    pub fn of(head: &Head) -> Self {
        Self {
            version: head.version,
            extremities: head.forward_extremities.clone(),
            state: head.state.clone(),
            moved: false,
        }
    }

    /// A room without events.
    pub fn empty(version: RoomVersion) -> Self {
        Self {
            version,
            extremities: Vec::new(),
            state: StateMap::new(),
            moved: false,
        }
    }

    /// The extremities that a new event of ours should name: the deepest, if there are too many.
    pub fn prevs(&self) -> Vec<Extremity> {
        let mut prevs = self.extremities.clone();
        prevs.sort_by(|a, b| b.depth.cmp(&a.depth).then(a.event_id.cmp(&b.event_id)));
        prevs.truncate(PREV_EVENTS_MAX);
        prevs
    }

    /// What a new event writes down of its prev events: their hashes too, where the version has them.
    pub fn references(&self, facts: &Facts, prevs: &[Extremity]) -> Got<Vec<Reference>> {
        if !self.version.rules().reference_pairs {
            let ids = prevs.iter().map(|prev| prev.event_id.clone());
            return Ok(ids.map(Into::into).collect());
        }
        let nids: Vec<_> = prevs.iter().map(|prev| prev.nid).collect();
        let pdus = facts.pdus(&nids)?;
        Ok(pdus.iter().map(|pdu| (&**pdu).into()).collect())
    }

    /// The state that these prev events come to, and whether it is partial (P-5, P-8).
    pub fn before(&self, facts: &mut Facts, prevs: &[EventNid]) -> Got<(StateMap, bool)> {
        let named: BTreeSet<_> = prevs.iter().copied().collect();
        let all: BTreeSet<_> = self.extremities.iter().map(|e| e.nid).collect();
        if !all.is_empty() && named == all {
            let partial = self.extremities.iter().any(|extremity| extremity.partial);
            return Ok((self.state.clone(), partial));
        }
        let states = facts.states(prevs)?;
        let partial = states.iter().flatten().any(|at| at.partial);
        let maps = states.into_iter().flatten().map(|at| at.after).collect();
        Ok((facts.resolve(self.version, maps)?, partial))
    }

    /// Puts an event on top. A rejected or soft-failed one changes nothing but what is known of it.
    pub fn add(&mut self, facts: &mut Facts, placed: &Placed) -> Got<()> {
        let auth_events = placed.pdu.auth_events.iter();
        let auth_events = auth_events.filter_map(|id| facts.nid(id)).collect();
        let rejected = matches!(placed.verdict, Verdict::Rejected(_));
        let stored = StoredEvent {
            pdu: placed.pdu.clone(),
            auth_events,
            rejected,
        };
        facts.add_own(placed.nid, stored);
        let at = StateAt {
            before: placed.state.before.clone(),
            after: placed.state.after.clone(),
            partial: placed.state.partial,
        };
        facts.add_own_state(placed.nid, at);
        if placed.verdict != Verdict::Accepted {
            return Ok(());
        }
        let rest = self.rest(placed);
        let mut maps = states_after(facts, &rest)?;
        maps.push(placed.state.after.clone());
        self.state = facts.resolve(self.version, maps)?;
        self.extremities = rest;
        self.extremities.push(Extremity {
            nid: placed.nid,
            event_id: placed.pdu.event_id.clone(),
            depth: placed.pdu.depth,
            partial: placed.state.partial,
        });
        self.moved = true;
        Ok(())
    }

    /// Puts an event below what was built on it before it came. What it stands on is no end of the room any more:
    /// left there, a state of long ago would be resolved with today's, and undo what has happened since. In a
    /// partial room it stays: a partial state need not have the members that an older one has, ours among them.
    pub fn add_below(&mut self, facts: &mut Facts, placed: &Placed) -> Got<()> {
        let rest = self.rest(placed);
        let moves = !rest.is_empty() && rest.len() < self.extremities.len();
        let partial = placed.state.partial || self.extremities.iter().any(|e| e.partial);
        if placed.verdict != Verdict::Accepted || !moves || partial {
            return Ok(());
        }
        let maps = states_after(facts, &rest)?;
        self.state = facts.resolve(self.version, maps)?;
        self.extremities = rest;
        self.moved = true;
        Ok(())
    }

    /// The extremities that stay when this event has a place.
    fn rest(&self, placed: &Placed) -> Vec<Extremity> {
        let prevs = &placed.pdu.prev_events;
        let stays = |e: &&Extremity| !prevs.contains(&e.event_id) && e.nid != placed.nid;
        self.extremities.iter().filter(stays).cloned().collect()
    }

    /// Writes extremities and current state, if they moved.
    pub fn write(self, writes: &mut WriteSet) {
        if self.moved {
            writes.forward_extremities = Some(self.extremities);
            writes.current_state = Some(self.state);
        }
    }
}

fn states_after(facts: &Facts, extremities: &[Extremity]) -> Got<Vec<StateMap>> {
    let nids: Vec<_> = extremities.iter().map(|e| e.nid).collect();
    let states = facts.states(&nids)?;
    Ok(states.into_iter().flatten().map(|at| at.after).collect())
}

impl Placed {
    /// `before` is the state before the event; the state after follows from the verdict.
    pub fn new(
        facts: &Facts,
        pdu: Arc<Pdu>,
        before: StateMap,
        partial: bool,
        verdict: Verdict,
    ) -> Self {
        let nid = facts.nid(&pdu.event_id).expect("numbered before");
        let key = facts.key_of(&pdu);
        let accepted = !matches!(verdict, Verdict::Rejected(_));
        let after = facts::after(&before, key, nid, accepted);
        let state = EventState {
            before,
            after,
            partial,
        };
        Self {
            nid,
            key,
            pdu,
            state,
            verdict,
        }
    }

    pub fn into_event(self, fan_out: FanOut, transaction: Option<Transaction>) -> NewEvent {
        NewEvent {
            nid: self.nid,
            pdu: self.pdu,
            key: self.key,
            place: Place::Timeline,
            state: Some(self.state),
            verdict: self.verdict,
            fan_out,
            transaction,
        }
    }
}

/// The numbers of prev events that have a place in the DAG, and the ids of those that have none.
pub(crate) fn split_prevs(facts: &Facts, prevs: &[EventId]) -> Got<(Vec<EventNid>, Vec<EventId>)> {
    let mut known = Vec::new();
    let mut unknown = Vec::new();
    for (id, found) in prevs.iter().zip(facts.find(prevs)?) {
        match found {
            Some(found) if found.known.place != Place::Outlier => known.push(found.known.nid),
            _ => unknown.push(id.clone()),
        }
    }
    Ok((known, unknown))
}
