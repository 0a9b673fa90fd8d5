//! The service: what the doors call, and where effects are carried out.
//!
//! This crate knows the store, the wire and the room machines, and no HTTP framework. [`Homeserver`] is the
//! handle that every door holds; each service is a module with its own small type, so that a signature tells
//! what a function can touch.

pub mod account_data;
pub mod accounts;
pub mod appservice;
mod appservice_queue;
mod background;
pub mod backup;
mod boot;
mod checks;
pub mod client_event;
pub mod clock;
mod commit;
mod completion;
pub mod config;
pub mod create_room;
pub mod cross_signing;
pub mod device_keys;
pub mod device_lists;
pub mod devices;
pub mod directory;
mod drive;
pub mod error;
pub mod federation_reads;
pub mod full_state;
mod guests;
mod ignored;
pub mod incoming;
mod invite_permission;
pub mod jobs;
pub mod key_query;
pub mod limits;
pub mod media;
pub mod membership;
pub mod messages;
pub mod metrics;
pub mod notifier;
mod outbound;
pub mod outgoing;
pub mod outside;
mod passwords;
pub mod presence;
pub mod previews;
pub mod processor;
pub mod profiles;
pub mod push;
pub mod push_rules;
pub mod receipts;
pub mod relations;
pub mod report;
pub mod resident;
pub mod room_deletion;
pub mod room_state;
pub mod room_summary;
pub mod room_view;
pub mod rooms;
pub mod search;
pub mod send;
pub mod server_keys;
pub mod server_notices;
pub mod shared_secret;
pub mod sync;
pub mod tasks;
pub mod third_party;
pub mod thumbnails;
pub mod to_device;
pub mod typing;
pub mod uia;
pub mod upgrade;
pub mod user_directory;
pub mod visibility;

use std::sync::Arc;

use federation::{Client, KeyRing, OldKey, Transport, UnixClock};
use protocol::signature::SigningKey;
use room::template::Own;
use storage::Store;

use crate::appservice::Appservices;
use crate::clock::Clock;
use crate::config::Config;
use crate::notifier::Notifier;

/// How this server reaches others, and what it signs with.
pub struct Wire {
    pub transport: Arc<dyn Transport>,
    pub key: SigningKey,
    /// Keys that were ours once; events signed with them are still about.
    pub old_keys: Vec<OldKey>,
}

/// One homeserver. Cheap to clone; all clones are the same server.
#[derive(Clone)]
pub struct Homeserver {
    inner: Arc<Inner>,
}

struct Inner {
    config: Config,
    clock: Arc<dyn Clock>,
    notifier: Notifier,
    store: Store,
    client: Client,
    keys: KeyRing,
    appservices: Appservices,
    passwords: passwords::Hasher,
    uia: uia::Sessions,
    limits: limits::RateLimits,
    nonces: shared_secret::Nonces,
    own: Own,
    background: background::Background,
    queues: outgoing::Queues,
    board: jobs::Board,
    handshakes: rooms::Handshakes,
    running: tasks::Running,
    typing: Arc<typing::Typing>,
    transactions: send::Transactions,
    sync: sync::Memory,
    workers: incoming::Workers,
    fetches: key_query::Fetches,
    push: push::State,
    outbound: outbound::Outbound,
    media: media::State,
    previews: previews::Previews,
    presence: presence::Watch,
    appservice_client: Option<reqwest::Client>,
    noted_devices: accounts::NotedDevices,
    notices: server_notices::Locks,
    deletions: room_deletion::Deletions,
}

impl Homeserver {
    pub fn new(
        config: Config,
        clock: Arc<dyn Clock>,
        store: Store,
        appservices: Appservices,
        wire: Wire,
    ) -> Self {
        let own = Own {
            name: config.server_name.clone(),
            key: Arc::new(wire.key.clone()),
        };
        let client = Client::new(wire.transport, config.server_name.clone(), wire.key);
        let unix_ms: UnixClock = {
            let clock = clock.clone();
            Arc::new(move || clock.unix_ms())
        };
        let keys = KeyRing::new(
            client.clone(),
            Arc::new(server_keys::StoredKeys(store.clone())),
            unix_ms,
            config.trusted_key_servers.clone(),
            wire.old_keys,
            config.join.verification,
        );
        let limits = limits::RateLimits::new(&config.limits);
        let outbound = outbound::Outbound::new(config.outbound_ip_ranges.clone());
        let wants_traffic = appservices.iter().any(|service| service.url.is_some());
        let appservice_client = wants_traffic.then(outbound::trusting_client).flatten();
        let passwords = passwords::Hasher::new(config.processor);
        Self {
            inner: Arc::new(Inner {
                config,
                clock,
                notifier: Notifier::default(),
                store,
                client,
                keys,
                appservices,
                passwords,
                uia: uia::Sessions::default(),
                limits,
                nonces: shared_secret::Nonces::default(),
                own,
                background: background::Background::default(),
                queues: outgoing::Queues::default(),
                board: jobs::Board::default(),
                handshakes: rooms::Handshakes::default(),
                running: tasks::Running::default(),
                typing: Arc::default(),
                transactions: send::Transactions::default(),
                sync: sync::Memory::default(),
                workers: incoming::Workers::default(),
                fetches: key_query::Fetches::default(),
                push: push::State::default(),
                outbound,
                media: media::State::default(),
                previews: previews::Previews::default(),
                presence: presence::Watch::default(),
                appservice_client,
                noted_devices: accounts::NotedDevices::default(),
                notices: server_notices::Locks::default(),
                deletions: room_deletion::Deletions::default(),
            }),
        }
    }

    pub fn store(&self) -> &Store {
        &self.inner.store
    }

    /// Requests to other servers.
    pub fn client(&self) -> &Client {
        &self.inner.client
    }

    /// Signing keys of other servers.
    pub fn keys(&self) -> &KeyRing {
        &self.inner.keys
    }

    pub fn appservices(&self) -> &Appservices {
        &self.inner.appservices
    }

    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    pub fn clock(&self) -> &dyn Clock {
        self.inner.clock.as_ref()
    }

    pub fn notifier(&self) -> &Notifier {
        &self.inner.notifier
    }

    /// Our name and signing key.
    pub fn own(&self) -> &Own {
        &self.inner.own
    }

    pub(crate) fn background(&self) -> &background::Background {
        &self.inner.background
    }

    pub(crate) fn queues(&self) -> &outgoing::Queues {
        &self.inner.queues
    }

    pub(crate) fn board(&self) -> &jobs::Board {
        &self.inner.board
    }

    pub(crate) fn handshakes(&self) -> &rooms::Handshakes {
        &self.inner.handshakes
    }

    pub(crate) fn running(&self) -> &tasks::Running {
        &self.inner.running
    }

    pub(crate) fn workers(&self) -> &incoming::Workers {
        &self.inner.workers
    }

    /// Who is typing.
    pub fn typing(&self) -> &Arc<typing::Typing> {
        &self.inner.typing
    }

    pub(crate) fn transactions(&self) -> &send::Transactions {
        &self.inner.transactions
    }

    pub(crate) fn sync_memory(&self) -> &sync::Memory {
        &self.inner.sync
    }
}
