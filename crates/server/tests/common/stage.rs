//! The stage on which a join becomes partial: a resident of the test's with a room, and our server.

use std::collections::BTreeSet;
use std::sync::Arc;

use homeserver::config::Config;
use protocol::pdu::Pdu;
use room::effect::AskError;
use serde_json::Value;

use crate::dag::{New, Room, VERSION, member};
use crate::network::Network;
use crate::resident::{Gate, Resident};
use crate::world::{Server, Syncs, User};

/// As in the tests of Complement: the residents know only the handshake and the resync.
pub fn plain(config: &mut Config) {
    config.default_room_version = VERSION;
    config.join.race_send_join = false;
    config.join.ask_for_left_out = false;
    config.join.compare_donors = false;
    config.join.tell_missed_servers = false;
}

/// A room of a resident, with charlie and derek in it, and our server, which is not yet.
pub struct Stage {
    pub network: Arc<Network>,
    pub here: Server,
    pub resident: Arc<Resident>,
    pub room: Arc<Room>,
    /// Other residents, if the test wants some.
    pub others: Vec<Arc<Resident>>,
    gate: Gate,
}

impl Stage {
    pub async fn set() -> Self {
        Self::set_with(&[], |_| ()).await
    }

    /// As [`Self::set`], with these levels of power and settings.
    pub async fn set_with(levels: &[(&str, i64)], change: impl FnOnce(&mut Config)) -> Self {
        let stage = Self::empty(levels, change).await;
        let derek = stage.resident.user("derek");
        stage.send(member(&derek, &derek, "join"));
        stage
    }

    /// With charlie alone in the room.
    pub async fn empty(levels: &[(&str, i64)], change: impl FnOnce(&mut Config)) -> Self {
        let network = Arc::new(Network::default());
        let here = Server::start(&network, "here.test", |config| {
            plain(config);
            change(config);
        })
        .await;
        let resident = Resident::start(&network, "resident.test");
        let room = Room::new(&resident, levels);
        Self {
            network,
            here,
            resident,
            room,
            others: Vec::new(),
            gate: Gate::new(false),
        }
    }

    /// Another server, which holds the same room.
    pub fn second(&mut self) -> Arc<Resident> {
        let second = Resident::start(&self.network, "second.test");
        second.holds(&self.room);
        self.others.push(second.clone());
        second
    }

    /// An event by a user of the resident, which our server is not told of.
    pub fn send(&self, new: New) -> Arc<Pdu> {
        self.room.send(&self.resident, new)
    }

    /// The resident sends these to our server.
    pub async fn tell(&self, pdus: &[&Arc<Pdu>]) {
        self.resident.send(&self.here.name, pdus, &[]).await;
    }

    /// The user joins. The state before the join is asked for, and held back.
    pub async fn join(&self, user: &User) {
        self.resident.serve_state(&self.room, &self.gate);
        user.join(self.room.id.as_str(), &self.resident.name).await;
    }

    /// From here on the state before the join is answered.
    pub fn release(&self) {
        self.gate.open();
    }

    /// Waits until the room is full.
    pub async fn until_full(&self, user: &User) {
        user.get(&format!("/rooms/{}/members", self.room.id)).await;
    }

    /// The end of most tests (T-0d): the resync ends, the user leaves, and the resident hears of it.
    pub async fn end(&self, user: &User) {
        self.release();
        self.until_full(user).await;
        user.leave(self.room.id.as_str()).await;
        self.resident.leave_of(&user.id).await;
    }

    /// T-0f: the event has come, and the room is partial; in the end the state at the event is that of the
    /// residents.
    pub async fn check_receiving(&self, user: &User, lazy: &mut Syncs, event: &Pdu) {
        lazy.until_event(event).await;
        let asked = self.resident.state_ids(&self.here.name, &self.room, event);
        let refused = asked.await;
        assert!(
            matches!(refused, Err(AskError::Refused { status: 403, .. })),
            "{refused:?}"
        );
        self.release();
        user.eager().until_joined(&self.room.id).await;
        let somebody = format!(
            "/rooms/{}/state/m.room.member/@nobody:elsewhere.test",
            self.room.id
        );
        user.ask("GET", &somebody, Value::Null).await;
        let asked = self.resident.state_ids(&self.here.name, &self.room, event);
        let state: BTreeSet<String> = asked.await.unwrap().into_iter().collect();
        let expected = self.room.all_state().into_iter();
        let expected = expected.map(|pdu| pdu.event_id.to_string()).collect();
        assert_eq!(state, expected);
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.resident.assert_quiet();
            for other in &self.others {
                other.assert_quiet();
            }
        }
    }
}
