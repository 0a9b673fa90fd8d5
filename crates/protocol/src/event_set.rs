//! A handful of stored events, by number: what resolution and the machines of a room work on.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::nid::{EventNid, KeyNid};
use crate::pdu::Pdu;

/// `(type, state_key)`.
pub type StateKey = (Arc<str>, Arc<str>);

/// Events by number, and the numbers of the state keys that their auth rules may read.
#[derive(Clone, Debug, Default)]
pub struct EventSet {
    pub events: BTreeMap<EventNid, StoredEvent>,
    pub keys: BTreeMap<StateKey, KeyNid>,
    /// Those of the events that are known to stand in the auth chain of an entry which all maps of a
    /// resolution agree on. Such events are in no auth difference; the events alone do not show it.
    /// It matters for what is [in question](crate::state_resolution::in_question).
    pub shared: BTreeSet<EventNid>,
}

#[derive(Clone, Debug)]
pub struct StoredEvent {
    pub pdu: Arc<Pdu>,
    pub auth_events: Vec<EventNid>,
    pub rejected: bool,
}

impl EventSet {
    /// The number of a state key, if this room has ever used it.
    pub fn key(&self, kind: &str, state_key: &str) -> Option<KeyNid> {
        self.keys.get(&(kind.into(), state_key.into())).copied()
    }

    /// The number of the key at which this event stands when it is state.
    pub fn key_of(&self, event: EventNid) -> Option<KeyNid> {
        let pdu = &self.events.get(&event)?.pdu;
        let state_key = pdu.state_key.as_ref()?;
        self.keys
            .get(&(pdu.kind.clone(), state_key.clone()))
            .copied()
    }
}
