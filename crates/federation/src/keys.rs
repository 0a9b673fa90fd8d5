//! Signing keys of other servers: fetched, verified, remembered; and notary service for others.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#retrieving-server-keys>

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::channel::oneshot;
use futures::future::{BoxFuture, FutureExt, Shared, join_all};
use protocol::id::ServerName;
use protocol::room_version::RoomVersion;
use protocol::signature::{Keys, Verification, VerifyKey};
use serde_json::{Map, Value, json};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::client::{Body, Call, Client, Failure, uri};
use crate::request_auth::{AuthError, XMatrix};
use crate::server_keys::{self, KnownKey, KnownKeys, OldKey, StoredKey};
use crate::transport::TransportError;

/// A key object is a few hundred bytes; a notary's answer one for each server asked for.
const KEYS_BYTES_MAX: usize = 256 << 10;
const NOTARY_BYTES_MAX: usize = 16 << 20;
const FETCH_TIMEOUT: Duration = Duration::from_secs(10);
/// Servers asked at one time.
const FETCHES_MAX: usize = 64;
/// Answers that are being stored at one time.
const SAVES_MAX: usize = 64;
/// A fetch that fails sooner is tried again, once, after a moment.
const FAILS_FAST: Duration = Duration::from_secs(2);
const RETRY_AFTER: Duration = Duration::from_millis(200);
/// A notary is asked for those that have not answered by then.
const NOTARY_AFTER: Duration = Duration::from_secs(3);
/// Servers that we ask on behalf of one question to us; of the others it is told what is known. Anyone may ask.
const NOTARY_FLIGHTS_MAX: usize = 200;
/// Servers named in one question to a notary.
const NOTARY_SERVERS_MAX: usize = 200;
/// Of its answer so many objects are verified before other work of the same thread goes on.
const VERIFIED_AT_ONCE: usize = 200;
/// Of more servers than this a notary is asked first, which takes one question where they take hundreds of
/// connections, most of them to servers that are gone.
const PREFETCH_DIRECT_MAX: usize = 50;
/// Questions to one notary at a time, for one who wants keys.
const NOTARY_QUESTIONS_MAX: usize = 3;
/// Servers whose keys are held in memory.
const SERVERS_MAX: u64 = 50_000;
/// Answered, but not with the key wanted: asking again at once is of no use.
const FETCH_AGAIN_AFTER: Duration = Duration::from_secs(60);
/// The same, but what it signed is younger than its answer: it may have another key by now.
const RENEWED_AFTER: Duration = Duration::from_secs(5);
/// Did not answer, and events of it wait.
const DEAD_FOR_EVENTS: Duration = Duration::from_secs(60);
/// Did not answer, yet it asks or answers us something, so it lives.
const DEAD_FOR_REQUESTS: Duration = Duration::from_secs(2);
/// For one inbound request; the sender waits.
const REQUEST_DEADLINE: Duration = Duration::from_secs(15);

/// Where keys outlive a restart.
pub trait KeyStore: Send + Sync + 'static {
    /// Every row of these servers.
    fn load(&self, servers: Vec<ServerName>) -> BoxFuture<'_, Result<Vec<StoredKey>, String>>;
    /// Inserts, or replaces the row of the same server and key id.
    fn save(&self, keys: Vec<StoredKey>) -> BoxFuture<'_, Result<(), String>>;
}

/// Milliseconds since the Unix epoch.
pub type UnixClock = Arc<dyn Fn() -> i64 + Send + Sync>;

/// One key that an event needs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Wanted {
    pub server: ServerName,
    pub key_id: String,
    /// The event's `origin_server_ts`; 0 where the room version does not look at validity.
    pub at_ms: i64,
}

impl Wanted {
    pub fn new(server: ServerName, key_id: String, at_ms: i64, version: RoomVersion) -> Self {
        let enforced = version.rules().key_validity_enforced;
        let at_ms = if enforced { at_ms } else { 0 };
        Self {
            server,
            key_id,
            at_ms,
        }
    }
}

/// Finds keys. Cheap to clone.
#[derive(Clone)]
pub struct KeyRing {
    inner: Arc<Inner>,
}

struct Inner {
    client: Client,
    store: Arc<dyn KeyStore>,
    clock: UnixClock,
    notaries: Vec<ServerName>,
    own_old: Vec<OldKey>,
    verification: Verification,
    known: moka::sync::Cache<ServerName, Arc<KnownKeys>>,
    asked: moka::sync::Cache<ServerName, Asked>,
    flights: Mutex<HashMap<ServerName, Flight>>,
    /// Questions to notaries, by the servers that they are about.
    questions: Mutex<HashMap<ServerName, Flight>>,
    fetches: Semaphore,
    saves: Arc<Semaphore>,
}

type Flight = Shared<BoxFuture<'static, ()>>;

/// Keys that are wanted, by server; none named means whatever the server has.
type Missing = BTreeMap<ServerName, Vec<Wanted>>;

/// A question to notaries about some servers, for as long as it lives. Others wait for its end.
struct Question {
    ring: KeyRing,
    servers: Vec<ServerName>,
    _ends: oneshot::Sender<()>,
}

impl Question {
    fn begin(ring: &KeyRing, servers: &Missing) -> Self {
        let (ends, end) = oneshot::channel();
        let flight = end.map(|_| ()).boxed().shared();
        let mut questions = lock(&ring.inner.questions);
        let mut ours = Vec::new();
        for server in servers.keys() {
            if !questions.contains_key(server) {
                questions.insert(server.clone(), flight.clone());
                ours.push(server.clone());
            }
        }
        Self {
            ring: ring.clone(),
            servers: ours,
            _ends: ends,
        }
    }
}

impl Drop for Question {
    fn drop(&mut self) {
        let mut questions = lock(&self.ring.inner.questions);
        for server in &self.servers {
            questions.remove(server);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The last time that a server was asked for its keys.
#[derive(Clone, Copy)]
struct Asked {
    at: Instant,
    /// Milliseconds since the Unix epoch, before the question.
    began_ms: i64,
    answered: bool,
}

/// The time for which the latest of these keys is wanted, in milliseconds since the Unix epoch.
fn latest(wanted: &[Wanted]) -> Option<i64> {
    wanted.iter().map(|want| want.at_ms).max()
}

/// Keys at hand, for verifying. What is not in it could not be had in time.
#[derive(Clone, Debug, Default)]
pub struct KeySet {
    servers: BTreeMap<ServerName, Arc<KnownKeys>>,
    unvouched: bool,
}

impl KeySet {
    /// Whether keys are lacking since no notary could be asked for them: later there may be more.
    pub fn is_unvouched(&self) -> bool {
        self.unvouched
    }

    pub fn get(&self, server: &ServerName, key_id: &str) -> Option<&KnownKey> {
        self.servers.get(server)?.get(key_id)
    }
}

impl Keys for KeySet {
    fn key(
        &self,
        server: &ServerName,
        key_id: &str,
        at_ms: i64,
        version: RoomVersion,
    ) -> Option<VerifyKey> {
        self.get(server, key_id)
            .filter(|key| key.is_good_for_event(at_ms, version))
            .map(|key| key.key.clone())
    }
}

/// Why a server did not give its keys.
struct Unfetched {
    /// The connection broke in the middle.
    broke: bool,
    reason: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Events,
    Requests,
}

impl KeyRing {
    pub fn new(
        client: Client,
        store: Arc<dyn KeyStore>,
        clock: UnixClock,
        notaries: Vec<ServerName>,
        own_old: Vec<OldKey>,
        verification: Verification,
    ) -> Self {
        let own = client.own_name().clone();
        Self {
            inner: Arc::new(Inner {
                client,
                store,
                clock,
                notaries: notaries.into_iter().filter(|n| *n != own).collect(),
                own_old,
                verification,
                known: moka::sync::Cache::new(SERVERS_MAX),
                asked: moka::sync::Cache::new(SERVERS_MAX),
                flights: Mutex::new(HashMap::new()),
                questions: Mutex::new(HashMap::new()),
                fetches: Semaphore::new(FETCHES_MAX),
                saves: Arc::new(Semaphore::new(SAVES_MAX)),
            }),
        }
    }

    fn own(&self) -> &ServerName {
        self.inner.client.own_name()
    }

    fn now_ms(&self) -> i64 {
        (self.inner.clock)()
    }

    /// What of this could be had within `deadline`. Fetches that take longer go on, for the next time.
    pub async fn keys_for_events(&self, wanted: &[Wanted], deadline: Duration) -> KeySet {
        self.have(wanted, deadline, Purpose::Events).await
    }

    /// Fetches the keys of servers whose events will come, unless they are known: from the servers themselves,
    /// and from notaries those of servers that do not answer, or of all when they are many. Returns at once.
    pub fn prefetch(&self, servers: Vec<ServerName>) {
        let ring = self.clone();
        tokio::spawn(async move {
            ring.load(&servers).await;
            let unknown: Missing = servers
                .into_iter()
                .map(|server| (server, Vec::new()))
                .collect();
            let mut unknown = ring.still_missing(unknown, Purpose::Requests);
            let heard = AtomicBool::new(false);
            let many = unknown.len() > PREFETCH_DIRECT_MAX;
            if many {
                ring.ask_notaries(unknown.clone(), &heard).await;
                unknown = ring.still_missing(unknown, Purpose::Requests);
            }
            let flights = unknown.keys();
            let flights: Vec<Flight> = flights
                .filter_map(|server| ring.flight(server, Purpose::Events, None))
                .collect();
            if many || ring.inner.notaries.is_empty() {
                return;
            }
            let _ = tokio::time::timeout(NOTARY_AFTER, join_all(flights)).await;
            let unknown = ring.still_missing(unknown, Purpose::Requests);
            ring.ask_notaries(unknown, &heard).await;
        });
    }

    /// Whether the request comes from whom it says, and who that is (R-2, R-2a). `header` is the value of
    /// `Authorization`, `uri` the path and query as they came.
    pub async fn verify_request(
        &self,
        header: Option<&str>,
        method: &str,
        uri: &str,
        body: &[u8],
    ) -> Result<ServerName, AuthError> {
        let header = XMatrix::parse(header.ok_or(AuthError::Missing)?)?;
        if let Some(destination) = &header.destination
            && destination != self.own()
        {
            return Err(AuthError::WrongDestination(destination.clone()));
        }
        let content = match body {
            [] => None,
            body => Some(serde_json::from_slice(body).map_err(|_| AuthError::NotJson)?),
        };
        let now_ms = self.now_ms();
        let wanted = Wanted {
            server: header.origin.clone(),
            key_id: header.key.clone(),
            at_ms: now_ms,
        };
        let keys = self
            .have(&[wanted], REQUEST_DEADLINE, Purpose::Requests)
            .await;
        let key = keys
            .get(&header.origin, &header.key)
            .filter(|key| key.is_good_for_request(now_ms))
            .ok_or_else(|| AuthError::UnknownKey {
                server: header.origin.clone(),
                key: header.key.clone(),
            })?;
        header.verify(&key.key, method, uri, self.own(), content)?;
        // It is alive, so what waits for it need not.
        self.inner.client.backoff().reset(&header.origin);
        Ok(header.origin)
    }

    /// The body of `GET /_matrix/key/v2/server`.
    pub fn own_keys(&self) -> Value {
        Value::Object(self.own_object())
    }

    /// The body of a notary's answer: for each server its self-signed keys with our signature added.
    /// Keys named are wanted valid until the time given with them, by default now; none named: all.
    pub async fn notarise(
        &self,
        wanted: BTreeMap<ServerName, BTreeMap<String, Option<i64>>>,
    ) -> Value {
        let now_ms = self.now_ms();
        let servers: Vec<ServerName> = wanted.keys().cloned().collect();
        let others: Vec<ServerName> = servers
            .iter()
            .filter(|server| *server != self.own())
            .cloned()
            .collect();
        self.load(&others).await;
        let stale = wanted.iter().filter(|(server, keys)| {
            let known = self.known(server).unwrap_or_default();
            let until = |min: Option<i64>| min.unwrap_or(now_ms);
            if keys.is_empty() {
                !known.values().any(|key| key.is_good_for_request(now_ms))
            } else {
                keys.iter().any(|(key_id, min)| {
                    known
                        .get(key_id)
                        .is_none_or(|key| key.valid_until_ms < until(*min) && !key.old)
                })
            }
        });
        let flights: Vec<Flight> = stale
            .filter_map(|(server, _)| self.flight(server, Purpose::Events, None))
            .take(NOTARY_FLIGHTS_MAX)
            .collect();
        // What does not answer is served from what we hold.
        let _ = tokio::time::timeout(FETCH_TIMEOUT, join_all(flights)).await;

        let mut objects = Vec::new();
        for server in &servers {
            if server == self.own() {
                objects.push(self.own_keys());
                continue;
            }
            let known = self.known(server).unwrap_or_default();
            let named = &wanted[server];
            let responses: BTreeSet<&Arc<str>> = known
                .iter()
                .filter(|(key_id, _)| named.is_empty() || named.contains_key(*key_id))
                .map(|(_, key)| &key.response)
                .collect();
            for response in responses {
                let Ok(Value::Object(mut object)) = serde_json::from_str(response) else {
                    continue;
                };
                let key = self.inner.client.signing_key();
                if key.sign_json(&mut object, self.own()).is_ok() {
                    objects.push(Value::Object(object));
                }
            }
        }
        json!({ "server_keys": objects })
    }

    fn own_object(&self) -> Map<String, Value> {
        let key = self.inner.client.signing_key();
        server_keys::own(self.own(), key, &self.inner.own_old, self.now_ms())
    }

    async fn have(&self, wanted: &[Wanted], deadline: Duration, purpose: Purpose) -> KeySet {
        let until = Instant::now() + deadline;
        let servers: BTreeSet<ServerName> = wanted.iter().map(|w| w.server.clone()).collect();
        let servers: Vec<ServerName> = servers.into_iter().collect();
        self.load(&servers).await;

        let mut missing = self.missing(wanted, purpose);
        if purpose == Purpose::Events {
            // Another one's question may be answered by what this one needs. A notary that hangs must not take
            // the time in which the servers could be asked.
            let asked = join_all(self.questions_about(&missing));
            let patience = until.min(Instant::now() + NOTARY_AFTER);
            let _ = tokio::time::timeout_at(patience, asked).await;
            missing = self.missing(wanted, purpose);
        }
        let mut unvouched = false;
        if !missing.is_empty() {
            let flights: Vec<Flight> = missing
                .iter()
                .filter_map(|(server, wanted)| self.flight(server, purpose, latest(wanted)))
                .collect();
            let patience = if self.inner.notaries.is_empty() {
                until
            } else {
                until.min(Instant::now() + NOTARY_AFTER)
            };
            let direct = join_all(flights).shared();
            let _ = tokio::time::timeout_at(patience, direct.clone()).await;
            let missing = self.missing(wanted, purpose);
            if !missing.is_empty() && !self.inner.notaries.is_empty() {
                // As above; questions may have come up since.
                let asked = join_all(self.questions_about(&missing));
                let _ = tokio::time::timeout_at(until, asked).await;
            }
            let missing = self.missing(wanted, purpose);
            if !missing.is_empty() && !self.inner.notaries.is_empty() {
                let heard = AtomicBool::new(false);
                let both = futures::future::join(direct, self.ask_notaries(missing, &heard));
                let _ = tokio::time::timeout_at(until, both).await;
                unvouched = !heard.load(Ordering::Relaxed);
            }
        }
        KeySet {
            servers: servers
                .into_iter()
                .filter_map(|server| Some((server.clone(), self.known(&server)?)))
                .collect(),
            unvouched,
        }
    }

    /// What of this is not known, or not for so late a time, by server.
    fn missing(&self, wanted: &[Wanted], purpose: Purpose) -> Missing {
        let mut missing = Missing::new();
        let mut last: Option<(&ServerName, Option<Arc<KnownKeys>>)> = None;
        for want in wanted {
            if last
                .as_ref()
                .is_none_or(|(server, _)| **server != want.server)
            {
                last = Some((&want.server, self.known(&want.server)));
            }
            let keys = last.as_ref().and_then(|(_, keys)| keys.as_ref());
            let enough = keys.and_then(|k| k.get(&want.key_id)).is_some_and(|key| {
                match purpose {
                    Purpose::Requests => key.is_good_for_request(want.at_ms),
                    // An old key will never be valid for longer.
                    Purpose::Events => key.old || want.at_ms <= key.valid_until_ms,
                }
            });
            if !enough {
                missing
                    .entry(want.server.clone())
                    .or_default()
                    .push(want.clone());
            }
        }
        missing
    }

    /// What of this is not known by now.
    fn still_missing(&self, missing: Missing, purpose: Purpose) -> Missing {
        let now_ms = self.now_ms();
        let (any, some): (Missing, Missing) = missing
            .into_iter()
            .partition(|(_, wanted)| wanted.is_empty());
        let wanted: Vec<Wanted> = some.into_values().flatten().collect();
        let mut missing = self.missing(&wanted, purpose);
        let fresh = |server: &ServerName| {
            let known = self.known(server);
            known.is_some_and(|keys| keys.values().any(|key| key.is_good_for_request(now_ms)))
        };
        missing.extend(any.into_iter().filter(|(server, _)| !fresh(server)));
        missing
    }

    fn known(&self, server: &ServerName) -> Option<Arc<KnownKeys>> {
        if server == self.own() {
            return Some(Arc::new(self.own_known()));
        }
        self.inner.known.get(server)
    }

    /// Our own keys never run out for ourselves.
    fn own_known(&self) -> KnownKeys {
        let now_ms = self.now_ms();
        let entry = |key, valid_until_ms, old| KnownKey {
            key,
            valid_until_ms,
            old,
            fetched_at_ms: now_ms,
            response: "{}".into(),
        };
        let key = self.inner.client.signing_key();
        let mut known = KnownKeys::new();
        for old in &self.inner.own_old {
            if let Ok(key) = VerifyKey::parse(&old.public_key) {
                known.insert(old.key_id.clone(), entry(key, old.expired_ms, true));
            }
        }
        known.insert(
            key.key_id().to_owned(),
            entry(key.verify_key(), i64::MAX, false),
        );
        known
    }

    /// Takes from the store what is not in memory.
    async fn load(&self, servers: &[ServerName]) {
        let unknown: Vec<ServerName> = servers
            .iter()
            .filter(|s| *s != self.own() && !self.inner.known.contains_key(*s))
            .cloned()
            .collect();
        if unknown.is_empty() {
            return;
        }
        match self.inner.store.load(unknown).await {
            Ok(rows) => self.remember(rows),
            Err(error) => tracing::warn!(error, "stored keys cannot be read"),
        }
    }

    /// Adds to what is known; of two rows for one key the later fetched wins.
    fn remember(&self, rows: Vec<StoredKey>) {
        let mut by_server: BTreeMap<ServerName, Vec<StoredKey>> = BTreeMap::new();
        for row in rows {
            by_server.entry(row.server.clone()).or_default().push(row);
        }
        for (server, rows) in by_server {
            let fresh: KnownKeys = rows
                .into_iter()
                .map(|row| {
                    let known = KnownKey {
                        key: row.key,
                        valid_until_ms: row.valid_until_ms,
                        old: row.old,
                        fetched_at_ms: row.fetched_at_ms,
                        response: row.response,
                    };
                    (row.key_id, known)
                })
                .collect();
            self.inner.known.entry(server).and_upsert_with(|held| {
                let mut keys = held.map_or_else(KnownKeys::new, |h| h.value().as_ref().clone());
                for (key_id, key) in fresh {
                    match keys.get(&key_id) {
                        Some(held) if held.fetched_at_ms > key.fetched_at_ms => {}
                        _ => {
                            keys.insert(key_id, key);
                        }
                    }
                }
                Arc::new(keys)
            });
        }
    }

    /// Whoever waits for keys does not wait for the store: what a crash loses is fetched again.
    async fn learn(&self, rows: Vec<StoredKey>) {
        self.remember(rows.clone());
        let permit = self.inner.saves.clone().acquire_owned().await;
        let permit = permit.expect("the semaphore is never closed");
        let store = self.inner.store.clone();
        tokio::spawn(async move {
            if let Err(error) = store.save(rows).await {
                tracing::warn!(error, "fetched keys cannot be stored");
            }
            drop(permit);
        });
    }

    /// The one fetch of this server's keys that is under way, begun if there is none; `None` if it was
    /// asked only just now. A key is wanted for `at_ms`, or for no time in particular.
    fn flight(&self, server: &ServerName, purpose: Purpose, at_ms: Option<i64>) -> Option<Flight> {
        if server == self.own() {
            return None;
        }
        let mut flights = lock(&self.inner.flights);
        if let Some(flight) = flights.get(server) {
            return Some(flight.clone());
        }
        // Whoever answers us a join is alive, whatever it was a minute ago.
        let lives = || self.inner.client.backoff().is_alive(server);
        let rest = |asked: Asked| match (asked.answered, purpose) {
            (true, _) if at_ms.is_some_and(|at_ms| at_ms > asked.began_ms) => RENEWED_AFTER,
            (true, _) => FETCH_AGAIN_AFTER,
            (false, Purpose::Events) if !lives() => DEAD_FOR_EVENTS,
            (false, _) => DEAD_FOR_REQUESTS,
        };
        if let Some(asked) = self.inner.asked.get(server)
            && asked.at.elapsed() < rest(asked)
        {
            return None;
        }
        let ring = self.clone();
        let name = server.clone();
        let task = tokio::spawn(async move { ring.fetch(&name).await });
        let flight = task.map(|_| ()).boxed().shared();
        flights.insert(server.clone(), flight.clone());
        Some(flight)
    }

    async fn fetch(&self, server: &ServerName) {
        let _permit = self
            .inner
            .fetches
            .acquire()
            .await
            .expect("the semaphore is never closed");
        let (began, began_ms) = (Instant::now(), self.now_ms());
        let mut fetched = self.fetch_from_itself(server).await;
        // A connection can break at any time, and on these keys hangs whether anything of a server's can be
        // believed for the next minute. Who can not be reached, or took long to fail, is not asked twice.
        if matches!(fetched, Err(Unfetched { broke: true, .. })) && began.elapsed() < FAILS_FAST {
            tokio::time::sleep(RETRY_AFTER).await;
            fetched = self.fetch_from_itself(server).await;
        }
        let answered = fetched.is_ok();
        match fetched {
            Ok(rows) => self.learn(rows).await,
            Err(Unfetched { reason, .. }) => {
                tracing::debug!(%server, reason, "keys could not be fetched");
            }
        }
        let asked = Asked {
            at: Instant::now(),
            began_ms,
            answered,
        };
        self.inner.asked.insert(server.clone(), asked);
        lock(&self.inner.flights).remove(server);
    }

    async fn fetch_from_itself(&self, server: &ServerName) -> Result<Vec<StoredKey>, Unfetched> {
        let uri = "/_matrix/key/v2/server".to_owned();
        let mut call = Call::get(server, uri, FETCH_TIMEOUT);
        call.signed = false;
        let object = self.inner.client.json(call, KEYS_BYTES_MAX).await;
        let object: Map<String, Value> = object.map_err(|failure| Unfetched {
            broke: matches!(failure, Failure::Transport(TransportError::Broken(_))),
            reason: format!("{:?}", room::effect::AskError::from(failure)),
        })?;
        server_keys::read(&object, server, self.now_ms()).map_err(|error| Unfetched {
            broke: false,
            reason: error.to_string(),
        })
    }

    /// The questions to notaries that are under way about any of these.
    fn questions_about(&self, servers: &Missing) -> Vec<Flight> {
        let questions = lock(&self.inner.questions);
        servers
            .keys()
            .filter_map(|server| questions.get(server).cloned())
            .collect()
    }

    /// Asks one notary after the other for what is still missing.
    /// `heard` is set once a notary has told all that it knows.
    async fn ask_notaries(&self, mut missing: Missing, heard: &AtomicBool) {
        for notary in &self.inner.notaries {
            // Nobody vouches for itself this way.
            missing.remove(notary);
            if missing.is_empty() {
                return;
            }
            let all: Vec<_> = missing.clone().into_iter().collect();
            let questions = all.chunks(NOTARY_SERVERS_MAX).map(|some| {
                let servers: Missing = some.iter().cloned().collect();
                let question = Question::begin(self, &servers);
                let (ring, notary) = (self.clone(), notary.clone());
                async move {
                    // As tasks, so that the answer to one is verified while that to another is.
                    let told = tokio::spawn(async move {
                        ring.ask_until_heard(&notary, servers, question).await
                    });
                    told.await.unwrap_or(false)
                }
                .boxed()
            });
            let questions: Vec<_> = questions.collect();
            let told_all = futures::stream::iter(questions)
                .buffer_unordered(NOTARY_QUESTIONS_MAX)
                .fold(true, |all, told| std::future::ready(all && told))
                .await;
            heard.fetch_or(told_all, Ordering::Relaxed);
            missing = self.still_missing(missing, Purpose::Events);
        }
    }

    /// One question; whether it was answered.
    async fn ask_until_heard(
        &self,
        notary: &ServerName,
        servers: Missing,
        _question: Question,
    ) -> bool {
        let began = Instant::now();
        let mut given = self.ask_notary(notary, &servers).await;
        // As in `fetch`, but on this hang many servers' events.
        if matches!(given, Err(Unfetched { broke: true, .. })) && began.elapsed() < FAILS_FAST {
            tokio::time::sleep(RETRY_AFTER).await;
            given = self.ask_notary(notary, &servers).await;
        }
        match given {
            Ok(rows) => {
                self.learn(rows).await;
                true
            }
            Err(Unfetched { reason, .. }) => {
                tracing::debug!(%notary, reason, "a notary is of no help");
                false
            }
        }
    }

    async fn ask_notary(
        &self,
        notary: &ServerName,
        servers: &Missing,
    ) -> Result<Vec<StoredKey>, Unfetched> {
        // With no key named, all that the server has are asked for.
        let mut wanted: BTreeMap<&str, BTreeMap<&str, Value>> = BTreeMap::new();
        for (server, keys) in servers {
            let named = wanted.entry(server.as_str()).or_default();
            for want in keys {
                // Never in the future, which no key can promise.
                let until = want.at_ms.min(self.now_ms());
                named.insert(&want.key_id, json!({ "minimum_valid_until_ts": until }));
            }
        }
        let body = Body::Json(json!({ "server_keys": wanted }));
        let uri = uri("/_matrix/key/v2", &["query"]);
        let call = Call::post(notary, uri, body, FETCH_TIMEOUT);
        let answer: Value = self
            .inner
            .client
            .json(call, NOTARY_BYTES_MAX)
            .await
            .map_err(|failure| Unfetched {
                broke: matches!(failure, Failure::Transport(TransportError::Broken(_))),
                reason: format!("{:?}", room::effect::AskError::from(failure)),
            })?;
        let useless = |reason: String| Unfetched {
            broke: false,
            reason,
        };
        let objects = answer["server_keys"].as_array();
        let objects = objects.ok_or_else(|| useless("no server_keys".to_owned()))?;
        let notary_keys = self.notary_keys(notary).await.map_err(useless)?;
        let objects = objects.iter().filter_map(|object| {
            let object = object.as_object()?;
            let name = object.get("server_name")?.as_str()?;
            let server = ServerName::parse(name).ok()?;
            wanted.contains_key(name).then_some((object, server))
        });
        let objects: Vec<_> = objects.collect();
        let mut rows = Vec::new();
        for some in objects.chunks(VERIFIED_AT_ONCE) {
            let (now_ms, verification) = (self.now_ms(), self.inner.verification);
            let read = server_keys::read_vouched(some, notary, &notary_keys, now_ms, verification);
            let read = read.map_err(|of| useless(format!("it did not sign the keys of {of}")))?;
            for ((_, server), found) in some.iter().zip(read) {
                match found {
                    Ok(found) => rows.extend(found),
                    Err(error) => tracing::debug!(%server, %error, "a notary gave bad keys"),
                }
            }
            tokio::task::yield_now().await;
        }
        Ok(rows)
    }

    async fn notary_keys(&self, notary: &ServerName) -> Result<Arc<KnownKeys>, String> {
        self.load(std::slice::from_ref(notary)).await;
        let now_ms = self.now_ms();
        let usable = |keys: &Arc<KnownKeys>| keys.values().any(|k| k.is_good_for_request(now_ms));
        if let Some(keys) = self.known(notary).filter(usable) {
            return Ok(keys);
        }
        if let Some(flight) = self.flight(notary, Purpose::Requests, None) {
            flight.await;
        }
        self.known(notary)
            .filter(usable)
            .ok_or_else(|| "its own keys cannot be had".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use protocol::signature::SigningKey;

    use protocol::signature::verify_json;

    use super::*;
    use crate::transport::{Method, Request, Response, StatusCode, Transport, TransportError};

    const NOW: i64 = 1_700_000_000_000;

    fn name(text: &str) -> ServerName {
        ServerName::parse(text).unwrap()
    }

    fn key_of(server: &str) -> SigningKey {
        let mut seed = [7; 32];
        seed[..server.len()].copy_from_slice(server.as_bytes());
        SigningKey::generate(seed, "1").unwrap()
    }

    /// Servers by name: those `up` give their keys, those `notaries` speak for everyone. The first connection
    /// to `shaky` breaks.
    #[derive(Default)]
    struct World {
        up: Vec<&'static str>,
        notaries: Vec<&'static str>,
        asked: Mutex<Vec<String>>,
    }

    fn answer(value: Value) -> Response {
        Response {
            status: StatusCode::OK,
            headers: Default::default(),
            body: Box::pin(futures::stream::iter([Ok(Bytes::from(value.to_string()))])),
        }
    }

    impl Transport for World {
        fn send(&self, request: Request) -> BoxFuture<'_, Result<Response, TransportError>> {
            let to = request.to.as_str().to_owned();
            let what = format!("{} {}", to, request.path_and_query);
            self.asked.lock().unwrap().push(what);
            Box::pin(async move {
                // A round trip, so that two who ask at the same time can meet.
                tokio::task::yield_now().await;
                if to == "mute" {
                    std::future::pending::<()>().await;
                }
                let so_far = self.asked.lock().unwrap().clone();
                let shaky = so_far
                    .iter()
                    .filter(|asked| asked.starts_with("shaky "))
                    .count();
                if to == "shaky" && shaky == 1 {
                    return Err(TransportError::Broken("in the middle".into()));
                }
                if !self.up.contains(&to.as_str()) {
                    return Err(TransportError::Connect {
                        server: request.to,
                        reason: "down".into(),
                    });
                }
                if request.method == Method::GET {
                    let own = server_keys::own(&request.to, &key_of(&to), &[], NOW);
                    return Ok(answer(Value::Object(own)));
                }
                assert!(self.notaries.contains(&to.as_str()));
                let body: Value = serde_json::from_slice(&request.body.unwrap()).unwrap();
                let objects: Vec<Value> = body["server_keys"]
                    .as_object()
                    .unwrap()
                    .keys()
                    .map(|server| {
                        let mut object = server_keys::own(&name(server), &key_of(server), &[], NOW);
                        let liar = to == "liar";
                        let signer = if liar { key_of("x") } else { key_of(&to) };
                        signer.sign_json(&mut object, &request.to).unwrap();
                        Value::Object(object)
                    })
                    .collect();
                Ok(answer(json!({ "server_keys": objects })))
            })
        }
    }

    #[derive(Default)]
    struct Memory(Mutex<Vec<StoredKey>>);

    impl KeyStore for Memory {
        fn load(&self, servers: Vec<ServerName>) -> BoxFuture<'_, Result<Vec<StoredKey>, String>> {
            let rows = self.0.lock().unwrap();
            let found = rows
                .iter()
                .filter(|row| servers.contains(&row.server))
                .cloned()
                .collect();
            Box::pin(async move { Ok(found) })
        }

        fn save(&self, keys: Vec<StoredKey>) -> BoxFuture<'_, Result<(), String>> {
            self.0.lock().unwrap().extend(keys);
            Box::pin(async { Ok(()) })
        }
    }

    fn ring(own: &str, world: &Arc<World>, store: &Arc<Memory>, notaries: &[&str]) -> KeyRing {
        let client = Client::new(world.clone(), name(own), key_of(own));
        let notaries = notaries.iter().map(|n| name(n)).collect();
        let clock: UnixClock = Arc::new(|| NOW);
        KeyRing::new(
            client,
            store.clone(),
            clock,
            notaries,
            Vec::new(),
            Verification::Batch,
        )
    }

    fn want(server: &str, at_ms: i64) -> Wanted {
        Wanted {
            server: name(server),
            key_id: "ed25519:1".into(),
            at_ms,
        }
    }

    async fn found(ring: &KeyRing, server: &str, at_ms: i64) -> bool {
        let deadline = Duration::from_secs(30);
        let keys = ring.keys_for_events(&[want(server, at_ms)], deadline).await;
        keys.key(&name(server), "ed25519:1", at_ms, RoomVersion::V6)
            .is_some_and(|key| key.as_bytes() == key_of(server).verify_key().as_bytes())
    }

    fn world(up: &[&'static str], notaries: &[&'static str]) -> Arc<World> {
        Arc::new(World {
            up: up.to_vec(),
            notaries: notaries.to_vec(),
            asked: Mutex::default(),
        })
    }

    fn asked(world: &World) -> Vec<String> {
        std::mem::take(&mut *world.asked.lock().unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn keys_come_from_the_server_once_and_then_from_memory_and_store() {
        let (world, store) = (world(&["a"], &[]), Arc::default());
        let one = ring("us", &world, &store, &[]);
        assert!(found(&one, "a", NOW).await);
        assert!(found(&one, "a", NOW - 1).await);
        assert_eq!(asked(&world), ["a /_matrix/key/v2/server"]);
        let restarted = ring("us", &world, &store, &[]);
        assert!(found(&restarted, "a", NOW).await);
        assert!(asked(&world).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn two_who_want_one_servers_keys_ask_once() {
        let (world, store) = (world(&["a"], &[]), Arc::default());
        let ring = ring("us", &world, &store, &[]);
        let (one, two) = tokio::join!(found(&ring, "a", NOW), found(&ring, "a", NOW));
        assert!(one && two);
        assert_eq!(asked(&world).len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn our_own_key_needs_no_asking() {
        let (world, store) = (world(&[], &[]), Arc::default());
        let ring = ring("us", &world, &store, &[]);
        assert!(found(&ring, "us", NOW + (1 << 40)).await);
        assert!(asked(&world).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_notary_speaks_for_a_dead_server() {
        let (world, store) = (world(&["n"], &["n"]), Arc::default());
        let ring = ring("us", &world, &store, &["n"]);
        assert!(found(&ring, "dead", NOW).await);
        assert_eq!(
            asked(&world),
            [
                "dead /_matrix/key/v2/server",
                "n /_matrix/key/v2/query",
                "n /_matrix/key/v2/server"
            ]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn keys_that_will_be_needed_are_asked_of_a_notary_once_whoever_wants_them_meanwhile() {
        let (world, store) = (world(&["n"], &["n"]), Arc::default());
        let ring = ring("us", &world, &store, &["n"]);
        let dead: Vec<String> = (0..500).map(|n| format!("dead{n}")).collect();
        ring.prefetch(dead.iter().map(|server| name(server)).collect());
        let mut all = Vec::new();
        while all.is_empty() {
            tokio::task::yield_now().await;
            all = asked(&world);
        }
        let wanted: Vec<Wanted> = dead.iter().map(|server| want(server, NOW)).collect();
        let deadline = Duration::from_secs(30);
        let askers = (0..4).map(|_| ring.keys_for_events(&wanted, deadline));
        for keys in join_all(askers).await {
            assert_eq!(keys.servers.len(), dead.len());
        }
        // And nobody else: they are many.
        let questions = dead.len().div_ceil(NOTARY_SERVERS_MAX);
        let mut expected = vec!["n /_matrix/key/v2/query"; questions];
        expected.push("n /_matrix/key/v2/server");
        all.extend(asked(&world));
        all.sort();
        assert_eq!(all, expected);
    }

    #[tokio::test(start_paused = true)]
    async fn a_notary_that_hangs_does_not_keep_a_living_servers_keys_away() {
        let (world, store) = (world(&["alive"], &["mute"]), Arc::default());
        let ring = ring("us", &world, &store, &["mute"]);
        let names = (0..500).map(|n| format!("dead{n}"));
        let mut servers: Vec<_> = names.map(|server| name(&server)).collect();
        servers.push(name("alive"));
        ring.prefetch(servers);
        while asked(&world).is_empty() {
            tokio::task::yield_now().await;
        }
        let deadline = Duration::from_secs(8);
        let keys = ring.keys_for_events(&[want("alive", NOW)], deadline).await;
        let key = keys.key(&name("alive"), "ed25519:1", NOW, RoomVersion::V6);
        assert_eq!(key, Some(key_of("alive").verify_key()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_notary_that_does_not_sign_is_not_believed() {
        let (world, store) = (world(&["liar"], &["liar"]), Arc::default());
        let ring = ring("us", &world, &store, &["liar"]);
        assert!(!found(&ring, "dead", NOW).await);
        assert!(
            store
                .0
                .lock()
                .unwrap()
                .iter()
                .all(|r| r.server == name("liar"))
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_breaks_is_made_again() {
        let (world, store) = (world(&["shaky"], &[]), Arc::default());
        let ring = ring("us", &world, &store, &[]);
        assert!(found(&ring, "shaky", NOW).await);
        assert_eq!(asked(&world).len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_notary_whose_connection_breaks_is_asked_again() {
        let (world, store) = (world(&["shaky"], &["shaky"]), Arc::default());
        let ring = ring("us", &world, &store, &["shaky"]);
        assert!(found(&ring, "dead", NOW).await);
        let query = "shaky /_matrix/key/v2/query";
        let asked = asked(&world);
        assert_eq!(asked[1..3], [query, query]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_dead_server_is_left_alone_for_a_while() {
        let (world, store) = (world(&[], &[]), Arc::default());
        let ring = ring("us", &world, &store, &[]);
        assert!(!found(&ring, "dead", NOW).await);
        assert!(!found(&ring, "dead", NOW).await);
        assert_eq!(asked(&world).len(), 1);
        tokio::time::advance(DEAD_FOR_EVENTS).await;
        assert!(!found(&ring, "dead", NOW).await);
        assert_eq!(asked(&world).len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_dead_server_that_is_heard_of_is_asked_again() {
        let (world, store) = (world(&[], &[]), Arc::default());
        let ring = ring("us", &world, &store, &[]);
        assert!(!found(&ring, "dead", NOW).await);
        ring.inner.client.backoff().reset(&name("dead"));
        assert!(!found(&ring, "dead", NOW).await);
        assert_eq!(asked(&world).len(), 1);
        tokio::time::advance(DEAD_FOR_REQUESTS).await;
        assert!(!found(&ring, "dead", NOW).await);
        assert_eq!(asked(&world).len(), 1);
        // That it failed now counts.
        tokio::time::advance(DEAD_FOR_REQUESTS).await;
        assert!(!found(&ring, "dead", NOW).await);
        assert!(asked(&world).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_answered_is_asked_again_soon_for_what_it_signed_since() {
        let (world, store) = (world(&["a"], &[]), Arc::default());
        let ring = ring("us", &world, &store, &[]);
        assert!(found(&ring, "a", NOW).await);
        let asked_for = async |at_ms: i64| {
            let renewed = Wanted {
                key_id: "ed25519:2".into(),
                ..want("a", at_ms)
            };
            ring.keys_for_events(&[renewed], Duration::from_secs(1))
                .await;
            asked(&world).len()
        };
        asked(&world);
        assert_eq!(asked_for(NOW + 1).await, 0);
        tokio::time::advance(RENEWED_AFTER).await;
        // What is older than its answer was signed with a key that it does not tell.
        assert_eq!(asked_for(NOW).await, 0);
        assert_eq!(asked_for(NOW + 1).await, 1);
        assert_eq!(asked_for(NOW + 1).await, 0);
        tokio::time::advance(FETCH_AGAIN_AFTER).await;
        assert_eq!(asked_for(NOW).await, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn an_event_after_the_keys_validity_has_no_key_from_version_5_on() {
        let (world, store) = (world(&["a"], &[]), Arc::default());
        let ring = ring("us", &world, &store, &[]);
        let later = NOW + 8 * 24 * 3600 * 1000;
        assert!(!found(&ring, "a", later).await);
        let keys = ring
            .keys_for_events(&[want("a", 0)], Duration::from_secs(1))
            .await;
        let key = |version| keys.key(&name("a"), "ed25519:1", later, version);
        assert!(key(RoomVersion::V4).is_some());
        assert!(key(RoomVersion::V5).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_is_taken_for_the_server_that_signed_it() {
        let (world, store) = (world(&["a"], &[]), Arc::default());
        let ring = ring("us", &world, &store, &[]);
        let uri = "/_matrix/federation/v1/send/1";
        let body = json!({"pdus": []});
        let sign = |key: &SigningKey, to: &str| {
            crate::request_auth::sign(key, "PUT", uri, &name("a"), &name(to), Some(body.clone()))
                .unwrap()
                .to_header()
        };
        let text = body.to_string();
        let verify = async |header: Option<&str>, body: &str| {
            ring.verify_request(header, "PUT", uri, body.as_bytes())
                .await
        };
        let good = sign(&key_of("a"), "us");
        assert_eq!(verify(Some(&good), &text).await, Ok(name("a")));
        let forged = sign(&key_of("b"), "us");
        assert_eq!(
            verify(Some(&forged), &text).await,
            Err(AuthError::BadSignature(name("a")))
        );
        assert_eq!(
            verify(Some(&good), "{}").await,
            Err(AuthError::BadSignature(name("a")))
        );
        assert_eq!(
            verify(Some(&sign(&key_of("a"), "them")), &text).await,
            Err(AuthError::WrongDestination(name("them")))
        );
        assert_eq!(verify(None, &text).await, Err(AuthError::Missing));
        assert_eq!(verify(Some(&good), "x").await, Err(AuthError::NotJson));
    }

    #[tokio::test(start_paused = true)]
    async fn as_a_notary_we_add_our_signature_to_what_others_signed() {
        let (world, store) = (world(&["a"], &[]), Arc::default());
        let ring = ring("us", &world, &store, &[]);
        let wanted = BTreeMap::from([
            (name("a"), BTreeMap::new()),
            (name("dead"), BTreeMap::new()),
            (name("us"), BTreeMap::new()),
        ]);
        let answer = ring.notarise(wanted).await;
        let objects = answer["server_keys"].as_array().unwrap();
        assert_eq!(objects.len(), 2);
        let object = objects[0].as_object().unwrap();
        for signer in ["a", "us"] {
            verify_json(
                object,
                &name(signer),
                "ed25519:1",
                &key_of(signer).verify_key(),
            )
            .unwrap();
        }
    }
}
