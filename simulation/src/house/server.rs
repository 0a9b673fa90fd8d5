//! A server of a run: its lives, what lies between them, and its clients' way in.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use homeserver::appservice::{Appservice, Appservices};
use homeserver::clock::Clock;
use homeserver::config::Config;
use homeserver::processor::Processor;
use homeserver::{Homeserver, Wire};
use protocol::id::ServerName;
use protocol::room_version::RoomVersion;
use room::effect::Now;
use serde_json::Value;
use storage::{Executor, Store, Work};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use super::network::{Link, Network};
use crate::chance::Chance;
use crate::fixture;

/// When every run begins: 2023-11-14.
const EPOCH_MS: i64 = 1_700_000_000_000;
/// How long a server that is asked to stop may take.
const GRACE: Duration = Duration::from_secs(20);
/// What the clients' accounts are made with: they need no password, whose hash would take longer than a run.
pub const SERVICE_TOKEN: &str = "service";

pub struct Server {
    pub name: ServerName,
    network: Arc<Network>,
    config: Config,
    begin: Instant,
    /// How far its clock is from the others'.
    skew_ms: i64,
    /// Of 100 closures of the store, how many wait.
    slow_store: u64,
    chance: Arc<Mutex<Chance>>,
    now: Mutex<Situation>,
    booting: tokio::sync::Mutex<()>,
}

struct Situation {
    store: Store,
    life: Option<Life>,
}

/// A life ends with a crash, after which nothing that it does reaches the store or anybody else.
#[derive(Clone)]
struct Life {
    homeserver: Homeserver,
    router: Router,
    end: CancellationToken,
}

pub struct Settings {
    pub version: RoomVersion,
    pub presence: bool,
    pub compare_donors: bool,
    pub race_send_join: bool,
    pub skew_ms: i64,
    pub slow_store: u64,
    pub fan_out_direct_max: usize,
}

impl Server {
    pub async fn start(
        network: &Arc<Network>,
        name: ServerName,
        settings: Settings,
        chance: Chance,
        begin: Instant,
    ) -> Self {
        let chance = Arc::new(Mutex::new(chance));
        let end = CancellationToken::new();
        let options = storage::Options {
            server_name: name.clone(),
            executor: Some(executor(&end, &chance, 0)),
            fan_out_direct_max: settings.fan_out_direct_max,
            ..storage::Options::default()
        };
        let store = Store::open("sqlite::memory:", options).await;
        let mut config = Config::new(name.clone());
        config.limits.enabled = false;
        config.processor = Processor::Caller;
        config.default_room_version = settings.version;
        config.presence = settings.presence;
        config.join.compare_donors = settings.compare_donors;
        config.join.race_send_join = settings.race_send_join;
        let server = Self {
            name,
            network: network.clone(),
            config,
            begin,
            skew_ms: settings.skew_ms,
            slow_store: settings.slow_store,
            chance,
            now: Mutex::new(Situation {
                store: store.expect("a new database opens"),
                life: None,
            }),
            booting: tokio::sync::Mutex::default(),
        };
        server.boot().await;
        server
    }

    fn now(&self) -> std::sync::MutexGuard<'_, Situation> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new life on what the last one left in the store, unless it lives.
    pub async fn boot(&self) {
        let _one_at_a_time = self.booting.lock().await;
        if self.is_up() {
            return;
        }
        let end = CancellationToken::new();
        let executor = executor(&end, &self.chance, self.slow_store);
        let store = {
            let mut now = self.now();
            let store = now.store.after_crash(executor);
            now.store = store.expect("it has an executor");
            now.store.clone()
        };
        let wire = Wire {
            transport: Arc::new(Link {
                network: self.network.clone(),
                own: self.name.clone(),
                end: end.clone(),
            }),
            key: (*fixture::own(self.name.clone()).key).clone(),
            old_keys: Vec::new(),
        };
        let clock = Arc::new(HouseClock {
            start: Instant::now(),
            begin: self.begin,
            epoch_ms: EPOCH_MS + self.skew_ms,
        });
        let services = appservices(&self.name);
        let homeserver = Homeserver::new(self.config.clone(), clock, store, services, wire);
        let started = homeserver.start().await;
        if let Err(error) = started {
            tracing::error!(%error, server = %self.name, "a server does not start");
        }
        let router = vestibule_http::router(homeserver.clone());
        self.network
            .add(self.name.clone(), router.clone(), end.clone());
        self.now().life = Some(Life {
            homeserver,
            router,
            end,
        });
    }

    /// Gets the others' signing keys. A state event whose key is not to be had is left out for good (J-59, S-6a),
    /// and then no two servers need hold the same state: so these have met before.
    pub fn meet(&self, others: Vec<ServerName>) {
        if let Some(life) = &self.now().life {
            life.homeserver.keys().prefetch(others);
        }
    }

    /// The power fails.
    pub fn crash(&self) {
        self.network.remove(&self.name);
        if let Some(life) = self.now().life.take() {
            life.end.cancel();
            // Only so that the dead do not pile up: nothing that they do can be seen.
            life.homeserver.stopping().cancel();
        }
    }

    /// The operator stops it, as far as it stops.
    pub async fn stop(&self) {
        self.network.remove(&self.name);
        let life = self.now().life.clone();
        if let Some(life) = life {
            let _stopped = tokio::time::timeout(GRACE, life.homeserver.stop()).await;
        }
        self.crash();
    }

    pub fn is_up(&self) -> bool {
        self.now().life.is_some()
    }

    pub fn store(&self) -> Store {
        self.now().store.clone()
    }

    /// `None` when no answer comes since the server is down, or dies meanwhile.
    pub async fn ask(
        &self,
        method: &str,
        path: &str,
        token: &str,
        body: &Value,
    ) -> Option<(u16, Value)> {
        let life = self.now().life.clone()?;
        let body = match body.is_null() {
            true => Body::empty(),
            false => Body::from(body.to_string()),
        };
        let request = axum::http::Request::builder()
            .method(method)
            .uri(format!("/_matrix/client/v3{path}"))
            .header("content-type", "application/json")
            .header("authorization", format!("Bearer {token}"))
            .body(body)
            .expect("a plain request");
        let asking = async {
            let answer = life.router.oneshot(request).await;
            let answer = answer.unwrap_or_else(|never| match never {});
            let status = answer.status().as_u16();
            let bytes = axum::body::to_bytes(answer.into_body(), usize::MAX).await;
            let bytes = bytes.unwrap_or_default();
            (status, serde_json::from_slice(&bytes).unwrap_or_default())
        };
        tokio::select! {
            biased;
            () = life.end.cancelled() => None,
            answer = asking => Some(answer),
        }
    }
}

/// Some closures run at once and some after a while, as on a disk that others use too; none after the end.
fn executor(end: &CancellationToken, chance: &Arc<Mutex<Chance>>, slow: u64) -> Executor {
    let (end, chance) = (end.clone(), chance.clone());
    Executor::new(move |work: Work| {
        let pause = {
            let mut chance = chance.lock().unwrap_or_else(PoisonError::into_inner);
            chance.percent(slow).then(|| chance.millis(1, 6))
        };
        if pause.is_none() && !end.is_cancelled() {
            return work();
        }
        let end = end.clone();
        tokio::spawn(async move {
            tokio::time::sleep(pause.unwrap_or_default()).await;
            if !end.is_cancelled() {
                return work();
            }
            let _never_run = work;
            std::future::pending().await
        });
    })
}

fn appservices(own: &ServerName) -> Appservices {
    let yaml = format!(
        "{{id: s, as_token: {SERVICE_TOKEN}, hs_token: h, sender_localpart: service, rate_limited: false,
        namespaces: {{users: [{{exclusive: false, regex: '@.*'}}]}}}}"
    );
    let service = Appservice::parse(&yaml, "service", own).expect("a good registration");
    Appservices::new(vec![service]).expect("one is not double")
}

/// The runtime's paused clock.
struct HouseClock {
    start: Instant,
    begin: Instant,
    epoch_ms: i64,
}

impl Clock for HouseClock {
    fn now(&self) -> Now {
        let now = Instant::now();
        let since_begin = now.duration_since(self.begin).as_millis();
        Now {
            since_start: now.duration_since(self.start),
            unix_ms: self.epoch_ms + i64::try_from(since_begin).expect("a run is short"),
        }
    }
}
