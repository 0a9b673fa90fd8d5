//! Room state: a persistent map from state key to event.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::nid::{EventNid, KeyNid};

/// State key to event. A clone is cheap; a changed clone shares what did not change.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StateMap {
    entries: Arc<BTreeMap<KeyNid, EventNid>>,
}

impl StateMap {
    pub fn get(&self, key: KeyNid) -> Option<EventNid> {
        self.entries.get(&key).copied()
    }
}
