//! What a machine wants done and nobody has fetched so far.

use std::collections::VecDeque;
use std::time::Duration;

use protocol::id::{RoomId, ServerName};
use protocol::room_version::RoomVersion;

use crate::effect::{Ask, Effect, Load, RawPdu, Tell, Ticket};
use crate::write::WriteSet;

#[derive(Debug, Default)]
pub(crate) struct Outbox {
    last_ticket: u64,
    effects: VecDeque<Effect>,
}

impl Outbox {
    pub fn next(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    pub fn ask(&mut self, to: &ServerName, ask: Ask, timeout: Duration) -> Ticket {
        let ticket = self.ticket();
        let to = to.clone();
        self.effects.push_back(Effect::Ask {
            ticket,
            to,
            ask,
            timeout,
        });
        ticket
    }

    pub fn load(&mut self, room: &RoomId, load: Load) -> Ticket {
        let ticket = self.ticket();
        let room = room.clone();
        self.effects.push_back(Effect::Load { ticket, room, load });
        ticket
    }

    pub fn check(&mut self, version: RoomVersion, pdus: Vec<RawPdu>) -> Ticket {
        let ticket = self.ticket();
        self.effects.push_back(Effect::Check {
            ticket,
            version,
            pdus,
        });
        ticket
    }

    pub fn commit(&mut self, writes: WriteSet) -> Ticket {
        let ticket = self.ticket();
        let writes = Box::new(writes);
        self.effects.push_back(Effect::Commit { ticket, writes });
        ticket
    }

    pub fn tell(&mut self, tell: Tell) {
        self.effects.push_back(Effect::Tell(tell));
    }

    fn ticket(&mut self) -> Ticket {
        self.last_ticket += 1;
        Ticket(self.last_ticket)
    }
}
