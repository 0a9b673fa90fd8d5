//! What other servers are to be sent: a queue for each, on disk, with backoff and catch-up.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#transactions>
//!
//! A destination has a worker while something waits for it. PDUs, and EDUs that must not be lost, wait in the
//! store; typing, receipts and presence wait in memory and are dropped where nobody answers.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use protocol::id::{RoomId, ServerName};
use serde_json::{Value, json};
use storage::queues::{self, Cargo, Destination, Outgoing as Waiting};

use crate::Homeserver;
use crate::notifier::{Topic, Wakeups};

/// PDUs and EDUs of one transaction (the spec's limits).
const PDUS_MAX: usize = 50;
const EDUS_MAX: usize = 100;
/// EDUs that may wait in memory for one destination; older ones go.
const PASSING_MAX: usize = 200;
/// While a destination is away, so many PDUs are kept for it; beyond, the newest of each room (P-44).
const KEEP_MAX: i64 = 500;
/// The first pause after a failure, doubled each time up to the longest.
const PAUSE_FIRST_MS: i64 = 1_000;
/// The same for a server that has never answered. A large room names many such, most of them gone for good.
const PAUSE_STRANGER_MS: i64 = 10_000;
const PAUSE_MAX_MS: i64 = 3_600_000;
/// At a start, servers that did not answer before are tried again over so long at least, and not all at once.
const RESUMED_WITHIN_MS: i64 = 30_000;
/// Destinations beyond those that an event is queued for at once begin later: beginning with one costs so much, waking
/// one that has begun costs 1, and when so much is spent there is a pause. At most two thousand begin in a second.
const BEGIN_COST: usize = 64;
const BEGIN_SPENT_MAX: usize = 4 * BEGIN_COST;
const BEGIN_PAUSE: Duration = Duration::from_millis(2);
/// The store did not take it.
const SPREAD_AGAIN: Duration = Duration::from_secs(1);
/// A worker with nothing to do ends after this.
const IDLE_MAX: Duration = Duration::from_secs(30);

#[derive(Clone, Default)]
pub struct Queues {
    workers: Arc<Mutex<HashMap<ServerName, VecDeque<Value>>>>,
    spread: Arc<Mutex<Spread>>,
    later: Arc<Mutex<Later>>,
}

/// Destinations that are to begin, and whether somebody sees to it.
#[derive(Default)]
struct Later {
    servers: VecDeque<ServerName>,
    /// The same ones: none waits twice.
    waiting: HashSet<ServerName>,
    running: bool,
}

/// Whether events are being spread, and whether more came meanwhile.
#[derive(Default)]
struct Spread {
    running: bool,
    again: bool,
}

/// The outgoing queues of one homeserver.
pub struct Outgoing<'a> {
    hs: &'a Homeserver,
}

impl Homeserver {
    pub fn outgoing(&self) -> Outgoing<'_> {
        Outgoing { hs: self }
    }
}

impl Outgoing<'_> {
    /// An EDU that may be lost, to every other server in the room (in a partial room: the approximation,
    /// P-66).
    pub async fn edu_to_room(&self, room: &RoomId, kind: &str, content: Value) {
        match self.hs.rooms().servers(room).await {
            Ok(servers) => self.passing(&servers, kind, content),
            Err(error) => tracing::warn!(%room, %error, "cannot tell who is in the room"),
        }
    }

    /// An EDU that may be lost.
    pub fn passing(&self, servers: &[ServerName], kind: &str, content: Value) {
        let edu = json!({ "edu_type": kind, "content": content });
        for server in self.others(servers) {
            let mut workers = lock(&self.hs.queues().workers);
            if let Some(queue) = workers.get_mut(&server) {
                if queue.len() == PASSING_MAX {
                    queue.pop_front();
                }
                queue.push_back(edu.clone());
                drop(workers);
                self.hs.notifier().wake(&Topic::Destination(server));
            } else {
                workers.insert(server.clone(), VecDeque::from([edu.clone()]));
                drop(workers);
                self.spawn(server, None);
            }
        }
    }

    /// An EDU that must arrive: it is on disk when this returns.
    pub async fn lasting(
        &self,
        servers: &[ServerName],
        kind: &str,
        content: Value,
    ) -> storage::Result<()> {
        let servers = self.others(servers);
        let edu = json!({ "edu_type": kind, "content": content }).to_string();
        let to = servers.clone();
        self.hs
            .store()
            .write(move |c| queues::enqueue_edu(c, &edu, &to))
            .await?;
        self.start(&servers);
        Ok(())
    }

    fn others(&self, servers: &[ServerName]) -> Vec<ServerName> {
        let own = &self.hs.config().server_name;
        servers
            .iter()
            .filter(|server| *server != own)
            .cloned()
            .collect()
    }

    /// Makes sure that these destinations have a worker, and wakes it. Where they are many, those that are known
    /// to be alive come first, and most of them some time later.
    pub(crate) fn start(&self, servers: &[ServerName]) {
        let at_once = self.hs.store().fan_out_direct_max();
        if servers.len() <= at_once {
            for server in servers {
                self.start_one(server);
            }
            return;
        }
        let backoff = self.hs.client().backoff();
        let (alive, others): (Vec<_>, Vec<_>) =
            servers.iter().partition(|server| backoff.is_alive(server));
        let mut servers = alive.into_iter().chain(others);
        for server in servers.by_ref().take(at_once) {
            self.start_one(server);
        }
        let mut later = lock(&self.hs.queues().later);
        for server in servers {
            if later.waiting.insert(server.clone()) {
                later.servers.push_back(server.clone());
            }
        }
        if !std::mem::replace(&mut later.running, true) {
            let hs = self.hs.clone();
            self.hs
                .spawn_until_stop("outgoing_start", async move { start_later(&hs).await });
        }
    }

    /// Whether it had none.
    fn start_one(&self, server: &ServerName) -> bool {
        let mut workers = lock(&self.hs.queues().workers);
        let running = workers.contains_key(server);
        if !running {
            workers.insert(server.clone(), VecDeque::new());
        }
        drop(workers);
        if running {
            self.hs.notifier().wake(&Topic::Destination(server.clone()));
        } else {
            self.spawn(server.clone(), None);
        }
        !running
    }

    /// Gives events that go to many servers their places in the outboxes, and these their workers.
    pub(crate) fn spread(&self) {
        if let Some(spreading) = Spreading::begin(self.hs) {
            self.hs.spawn_until_stop("fan_out", spreading.run());
        }
    }

    /// At boot: whatever is left in the outbox goes on. Who did not answer before is not asked sooner for that.
    pub async fn resume(&self) -> storage::Result<()> {
        self.spread();
        let servers = self.hs.store().read(queues::waiting_servers).await?;
        let now = self.hs.clock().unix_ms();
        for (server, retry_at) in servers {
            let wait = retry_at.map(|at| {
                let wait = (at - now).clamp(0, PAUSE_MAX_MS);
                millis(wait + rand::random_range(0..=RESUMED_WITHIN_MS))
            });
            if let Some(wait) = wait {
                self.hs.client().backoff().resume(&server, wait);
            }
            lock(&self.hs.queues().workers).insert(server.clone(), VecDeque::new());
            self.spawn(server, wait);
        }
        Ok(())
    }

    /// The server is heard of again: what waits for it need not wait longer.
    pub async fn is_back(&self, server: &ServerName) {
        self.hs.client().backoff().reset(server);
        self.hs.notifier().wake(&Topic::Destination(server.clone()));
    }

    /// A worker that begins after a pause, if there is one.
    fn spawn(&self, server: ServerName, pause: Option<Duration>) {
        let hs = self.hs.clone();
        self.hs
            .spawn_until_stop("outgoing", async move { work(&hs, server, pause).await });
    }
}

/// Some at a time: thousands that begin at once keep everybody else from the processor and the store.
async fn start_later(hs: &Homeserver) {
    loop {
        let mut spent = 0;
        while spent < BEGIN_SPENT_MAX {
            let mut later = lock(&hs.queues().later);
            let Some(server) = later.servers.pop_front() else {
                later.running = false;
                return;
            };
            later.waiting.remove(&server);
            drop(later);
            spent += match hs.outgoing().start_one(&server) {
                true => BEGIN_COST,
                false => 1,
            };
        }
        tokio::time::sleep(BEGIN_PAUSE).await;
    }
}

/// The one task that spreads events, for as long as it lives.
struct Spreading {
    hs: Homeserver,
    /// Nothing was left, and that it does not run any more is noted.
    ended: bool,
}

impl Spreading {
    /// `None` when there is one, which then looks again before it ends.
    fn begin(hs: &Homeserver) -> Option<Self> {
        let mut spread = lock(&hs.queues().spread);
        if spread.running {
            spread.again = true;
            return None;
        }
        spread.running = true;
        Some(Self {
            hs: hs.clone(),
            ended: false,
        })
    }

    async fn run(mut self) {
        loop {
            match self.hs.store().write(queues::spread).await {
                Ok(servers) if servers.is_empty() => {
                    let mut spread = lock(&self.hs.queues().spread);
                    if !std::mem::take(&mut spread.again) {
                        spread.running = false;
                        self.ended = true;
                        return;
                    }
                }
                Ok(servers) => self.hs.outgoing().start(&servers),
                Err(error) => {
                    tracing::error!(%error, "an event can not be spread to its servers");
                    tokio::time::sleep(SPREAD_AGAIN).await;
                }
            }
        }
    }
}

impl Drop for Spreading {
    fn drop(&mut self) {
        if !self.ended {
            lock(&self.hs.queues().spread).running = false;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn work(hs: &Homeserver, server: ServerName, pause: Option<Duration>) {
    let mut wakeups = Wakeups::new(hs.notifier(), [Topic::Destination(server.clone())]);
    let mut counter: u64 = 0;
    if let Some(pause) = pause {
        rest(hs, &server, pause, &mut wakeups).await;
    }
    loop {
        // In a box, so that a worker that rests takes hundreds of bytes and not thousands.
        let sent = match Box::pin(deliver(hs, &server, &mut counter)).await {
            Ok(sent) => sent,
            Err(error) => {
                tracing::error!(%server, %error, "the outbox can not be read");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        match sent {
            Sent::Something => {}
            Sent::Nothing => {
                if tokio::time::timeout(IDLE_MAX, wakeups.next())
                    .await
                    .is_err()
                    && retire(hs, &server)
                {
                    return;
                }
            }
            Sent::Failed(pause) => rest(hs, &server, pause, &mut wakeups).await,
        }
    }
}

/// Waits, or until somebody hears of the server.
async fn rest(hs: &Homeserver, server: &ServerName, pause: Duration, wakeups: &mut Wakeups) {
    tokio::select! {
        biased;
        () = tokio::time::sleep(pause) => {}
        () = heard_of(hs, server, wakeups) => {}
    }
}

/// Returns when the server is no longer taken for dead: somebody heard of it.
async fn heard_of(hs: &Homeserver, server: &ServerName, wakeups: &mut Wakeups) {
    loop {
        wakeups.next().await;
        if hs.client().backoff().failing(server).is_none() {
            return;
        }
    }
}

/// Ends the worker unless something came in between.
fn retire(hs: &Homeserver, server: &ServerName) -> bool {
    let mut workers = lock(&hs.queues().workers);
    match workers.get(server) {
        Some(queue) if !queue.is_empty() => false,
        _ => {
            workers.remove(server);
            true
        }
    }
}

enum Sent {
    Something,
    Nothing,
    Failed(Duration),
}

async fn deliver(hs: &Homeserver, server: &ServerName, counter: &mut u64) -> storage::Result<Sent> {
    let asked = server.clone();
    let limit = i64::try_from(PDUS_MAX + EDUS_MAX).unwrap_or(i64::MAX);
    let waiting = hs
        .store()
        .read(move |c| queues::waiting(c, &asked, limit))
        .await?;
    let all_there_is = waiting.len() < PDUS_MAX + EDUS_MAX;
    let batch = Batch::of(waiting);
    let passing: Vec<Value> = {
        let mut workers = lock(&hs.queues().workers);
        let queue = workers.entry(server.clone()).or_default();
        let room = EDUS_MAX.saturating_sub(batch.edus.len()).min(queue.len());
        queue.drain(..room).collect()
    };
    if batch.is_empty() && passing.is_empty() {
        return Ok(Sent::Nothing);
    }
    *counter += 1;
    // The time makes it different from those of an earlier life of this server.
    let txn_id = format!("{}-{}", hs.clock().unix_ms(), counter);
    let body = batch.body(&hs.config().server_name, hs.clock().unix_ms(), passing);
    match hs.client().send_transaction(server, &txn_id, &body).await {
        Ok(answer) => {
            crate::metrics::transaction_sent("ok");
            complain(server, &answer);
            settle(hs, server, batch.numbers).await?;
            Ok(Sent::Something)
        }
        Err(error) => {
            crate::metrics::transaction_sent("failed");
            let pause = failed(hs, server, batch.is_empty(), all_there_is).await?;
            tracing::info!(%server, ?error, pause_ms = pause.as_millis(), "a transaction did not arrive");
            Ok(Sent::Failed(pause))
        }
    }
}

/// What one transaction takes of the outbox, in order: up to the first thing that does not fit.
#[derive(Default)]
struct Batch {
    numbers: Vec<i64>,
    pdus: Vec<String>,
    edus: Vec<String>,
}

impl Batch {
    fn of(waiting: Vec<Waiting>) -> Self {
        let mut batch = Self::default();
        for Waiting { number, what } in waiting {
            match what {
                Cargo::Pdu(pdu) if batch.pdus.len() < PDUS_MAX => {
                    // Empty: purged while it waited.
                    batch.pdus.extend(Some(pdu).filter(|pdu| !pdu.is_empty()));
                }
                Cargo::Edu(edu) if batch.edus.len() < EDUS_MAX => batch.edus.push(edu),
                _ => break,
            }
            batch.numbers.push(number);
        }
        batch
    }

    fn is_empty(&self) -> bool {
        self.numbers.is_empty()
    }

    fn body(&self, origin: &ServerName, now_ms: i64, passing: Vec<Value>) -> String {
        let mut edus = self.edus.clone();
        edus.extend(passing.iter().map(Value::to_string));
        format!(
            "{{\"origin\":{},\"origin_server_ts\":{now_ms},\"pdus\":[{}],\"edus\":[{}]}}",
            Value::from(origin.as_str()),
            self.pdus.join(","),
            edus.join(",")
        )
    }
}

/// The peer took the transaction but not all of its PDUs: worth a line, nothing can be done.
fn complain(server: &ServerName, answer: &Value) {
    let results = answer.get("pdus").and_then(Value::as_object);
    for (event_id, result) in results.into_iter().flatten() {
        if let Some(error) = result.get("error").and_then(Value::as_str) {
            tracing::info!(%server, event_id, error, "a PDU of ours was refused");
        }
    }
}

async fn settle(hs: &Homeserver, server: &ServerName, numbers: Vec<i64>) -> storage::Result<()> {
    let server = server.clone();
    let now = hs.clock().unix_ms();
    hs.store()
        .write(move |c| {
            queues::sent(c, &server, &numbers)?;
            let fine = Destination {
                last_success_ms: Some(now),
                ..Destination::default()
            };
            match queues::destination(c, &server)? {
                Some(state) if state.failing_since_ms.is_none() && !numbers.is_empty() => Ok(()),
                _ => queues::save_destination(c, &server, &fine),
            }
        })
        .await
}

/// Records the failure; how long to pause.
async fn failed(
    hs: &Homeserver,
    server: &ServerName,
    only_passing: bool,
    all_there_is: bool,
) -> storage::Result<Duration> {
    let to = server.clone();
    let now = hs.clock().unix_ms();
    let interval = hs
        .store()
        .write(move |c| {
            let mut state = queues::destination(c, &to)?.unwrap_or_default();
            let first = match state.last_success_ms {
                Some(_) => PAUSE_FIRST_MS,
                None => PAUSE_STRANGER_MS,
            };
            let interval = state
                .interval_ms
                .map_or(first, |last| (last * 2).min(PAUSE_MAX_MS));
            state.failing_since_ms.get_or_insert(now);
            state.interval_ms = Some(interval);
            state.retry_at_ms = Some(now + interval);
            queues::save_destination(c, &to, &state)?;
            if !all_there_is {
                queues::trim(c, &to, KEEP_MAX)?;
            }
            Ok(interval)
        })
        .await?;
    if only_passing {
        // Nothing on disk waits for it; the next EDU starts a worker again.
        lock(&hs.queues().workers)
            .entry(server.clone())
            .or_default()
            .clear();
    }
    // Some spread, so that not all servers of a dead proxy are tried in the same second.
    let spread = rand::random_range(0..=interval / 4);
    Ok(millis(interval + spread))
}

fn millis(ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(ms).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_keeps_the_order_and_the_limits() {
        let pdu = |number| Waiting {
            number,
            what: Cargo::Pdu("{}".to_owned()),
        };
        let edu = |number| Waiting {
            number,
            what: Cargo::Edu("{}".to_owned()),
        };
        let waiting: Vec<_> = (0..60).map(pdu).chain([edu(60)]).collect();
        let batch = Batch::of(waiting);
        assert_eq!((batch.pdus.len(), batch.edus.len()), (50, 0));
        assert_eq!(batch.numbers, (0..50).collect::<Vec<_>>());
        let purged = Batch::of(vec![
            Waiting {
                number: 1,
                what: Cargo::Pdu(String::new()),
            },
            edu(2),
        ]);
        assert_eq!(
            (purged.pdus.len(), purged.edus.len(), purged.numbers.len()),
            (0, 1, 2)
        );
    }
}
