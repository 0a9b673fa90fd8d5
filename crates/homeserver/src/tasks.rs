//! Background work that outlives requests and restarts: resyncs, and leaves that are owed.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use protocol::id::RoomId;
use storage::apply::Applied;

use crate::Homeserver;

/// What runs now. One resync for each room at most (S-1); `true`: wanted once more when it ends.
#[derive(Default)]
pub struct Running {
    resyncs: Mutex<BTreeMap<RoomId, bool>>,
}

pub struct Tasks<'a> {
    hs: &'a Homeserver,
}

impl Homeserver {
    pub fn tasks(&self) -> Tasks<'_> {
        Tasks { hs: self }
    }
}

impl Tasks<'_> {
    /// Begins, or goes on with, the resync of a partial room.
    pub fn start_resync(&self, room: RoomId) {
        let mut resyncs = self
            .hs
            .running()
            .resyncs
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(again) = resyncs.get_mut(&room) {
            *again = true;
            return;
        }
        resyncs.insert(room, false);
    }

    /// At boot: what was under way.
    pub(crate) async fn resume(&self) -> storage::Result<()> {
        let rooms = self.hs.store().read(storage::rooms::partial_rooms).await?;
        for (_, room) in rooms {
            self.start_resync(room);
        }
        self.pay_debts();
        Ok(())
    }

    /// Leaves that we owe to servers which may hold us as a member.
    pub fn pay_debts(&self) {}

    /// A room has become full: what waited for that.
    pub(crate) fn room_is_full(&self, room: &RoomId, _applied: &Applied) {
        self.hs.jobs().close_room(room, "full");
    }
}
