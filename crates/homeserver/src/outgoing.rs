//! What other servers are to be sent: a queue for each, on disk, with backoff and catch-up.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#transactions>
//!
//! A destination has a worker while something waits for it. PDUs, and EDUs that must not be lost, wait in the
//! store; typing, receipts and presence wait in memory and are dropped where nobody answers.
//!
//! A large room names thousands of servers that are gone for good. So for one that is not known to be alive nothing
//! is read or signed before it is seen that somebody listens there, and failures are recorded many at a time.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use protocol::id::{RoomId, ServerName};
use room::effect::AskError;
use serde_json::{Value, json};
use storage::queues::{self, Cargo, Destination, Failed, Outgoing as Waiting, Patience};
use tokio::sync::oneshot;

use crate::Homeserver;
use crate::background::{OneRun, Run};
use crate::notifier::{Topic, Wakeups};

/// PDUs and EDUs of one transaction (the spec's limits).
const PDUS_MAX: usize = 50;
const EDUS_MAX: usize = 100;
/// EDUs that may wait in memory for one destination; older ones go.
const PASSING_MAX: usize = 200;
/// How long destinations that do not answer are left alone, and how much is kept for one of them (P-44).
const PATIENCE: Patience = Patience {
    first_ms: 1_000,
    // A large room names many that never answer.
    stranger_ms: 60_000,
    max_ms: 3_600_000,
    keep: 500,
};
/// Failures within this time are recorded together, at most so many in one commit.
const RECORD_WITHIN: Duration = Duration::from_millis(100);
const RECORD_MAX: usize = 1_000;
/// At a start, servers that did not answer before are tried again over so long at least, and not all at once.
const RESUMED_WITHIN_MS: i64 = 30_000;
/// Destinations beyond those that an event is queued for at once begin later: beginning with one costs so much, waking
/// one that has begun costs 1, and when so much is spent there is a pause. At most two thousand begin in a second.
const BEGIN_COST: usize = 64;
const BEGIN_SPENT_MAX: usize = 4 * BEGIN_COST;
const BEGIN_PAUSE: Duration = Duration::from_millis(2);
/// An event that goes to many servers goes at once to those that are known to be alive. The others, most of which are
/// gone for good in a large room, wait so long: whoever joins or says something has an answer first.
const STRANGERS_AFTER: Duration = Duration::from_millis(500);
/// The store did not take it, or did not give it.
const STORE_AGAIN: Duration = Duration::from_secs(1);
/// A worker with nothing to do ends after this.
const IDLE_MAX: Duration = Duration::from_secs(30);

#[derive(Clone, Default)]
pub struct Queues {
    workers: Arc<Mutex<HashMap<ServerName, Worker>>>,
    /// One who gives events to many servers their places in the outboxes of those that are alive.
    spreading: OneRun,
    /// And one who does so for the others.
    spreading_on: OneRun,
    spread: Arc<Mutex<SpreadSoFar>>,
    later: Arc<Mutex<Later>>,
    /// One who begins with those.
    beginning: OneRun,
    failures: Arc<Mutex<Vec<Failure>>>,
    /// One who records these.
    recording: OneRun,
}

#[derive(Default)]
struct Worker {
    /// EDUs that may be lost.
    passing: VecDeque<Value>,
    /// Until a time, or until the server is heard of. It looks for what came meanwhile by itself.
    rests: bool,
}

#[derive(Default)]
struct SpreadSoFar {
    /// Events up to this number went to those that are alive.
    number: i64,
    /// Those that an earlier event has not gone to: a later one must not overtake it.
    strangers: Arc<HashSet<ServerName>>,
}

/// Destinations that are to begin.
#[derive(Default)]
struct Later {
    servers: VecDeque<ServerName>,
    /// The same ones: none waits twice.
    waiting: HashSet<ServerName>,
}

/// A destination that did not answer, and the worker that waits to hear what becomes of it.
struct Failure {
    server: ServerName,
    recorded: oneshot::Sender<Failed>,
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
            let running = workers.contains_key(&server);
            let worker = workers.entry(server.clone()).or_default();
            if worker.passing.len() == PASSING_MAX {
                worker.passing.pop_front();
            }
            worker.passing.push_back(edu.clone());
            let rests = worker.rests;
            drop(workers);
            self.start_or_wake(&server, running, rests);
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
        drop(later);
        if let Some(run) = self.hs.queues().beginning.begin() {
            let hs = self.hs.clone();
            self.hs
                .spawn_until_stop("outgoing_start", async move { start_later(&hs, run).await });
        }
    }

    /// Whether it had none.
    fn start_one(&self, server: &ServerName) -> bool {
        let mut workers = lock(&self.hs.queues().workers);
        let running = workers.contains_key(server);
        let rests = workers.entry(server.clone()).or_default().rests;
        drop(workers);
        self.start_or_wake(server, running, rests);
        !running
    }

    fn start_or_wake(&self, server: &ServerName, running: bool, rests: bool) {
        let taken_for_dead = || self.hs.client().backoff().failing(server).is_some();
        match running {
            true if rests && taken_for_dead() => {}
            true => self.hs.notifier().wake(&Topic::Destination(server.clone())),
            false => self.spawn(server.clone(), None),
        }
    }

    /// Gives events that go to many servers their places in the outboxes, and these their workers.
    pub(crate) fn spread(&self) {
        if let Some(run) = self.hs.queues().spreading.begin() {
            let hs = self.hs.clone();
            self.hs
                .spawn_until_stop("fan_out", async move { spread(&hs, run).await });
        }
    }

    fn spread_on(&self) {
        if let Some(run) = self.hs.queues().spreading_on.begin() {
            let hs = self.hs.clone();
            self.hs
                .spawn_until_stop("fan_out_on", async move { spread_on(&hs, run).await });
        }
    }

    /// At boot: whatever is left in the outbox goes on. Who did not answer before is not asked sooner for that.
    pub async fn resume(&self) -> storage::Result<()> {
        self.spread();
        let servers = self.hs.store().read(queues::waiting_servers).await?;
        let now = self.hs.clock().unix_ms();
        for (server, retry_at) in servers {
            let wait = retry_at.map(|at| {
                let wait = (at - now).clamp(0, PATIENCE.max_ms);
                millis(wait + rand::random_range(0..=RESUMED_WITHIN_MS))
            });
            if let Some(wait) = wait {
                self.hs.client().backoff().resume(&server, wait);
            }
            lock(&self.hs.queues().workers).insert(server.clone(), Worker::default());
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
async fn start_later(hs: &Homeserver, mut run: Run) {
    loop {
        let mut spent = 0;
        while spent < BEGIN_SPENT_MAX {
            let mut later = lock(&hs.queues().later);
            let next = later.servers.pop_front();
            if let Some(server) = &next {
                later.waiting.remove(server);
            }
            drop(later);
            match next {
                Some(server) if hs.outgoing().start_one(&server) => spent += BEGIN_COST,
                Some(_) => spent += 1,
                None if run.end() => return,
                None => {}
            }
        }
        tokio::time::sleep(BEGIN_PAUSE).await;
    }
}

async fn spread(hs: &Homeserver, mut run: Run) {
    loop {
        let (from, strangers) = {
            let so_far = lock(&hs.queues().spread);
            (so_far.number + 1, so_far.strangers.clone())
        };
        let backoff = hs.client().backoff().clone();
        let spread = hs.store().write(move |c| {
            let ready = |server: &_| backoff.is_alive(server) && !strangers.contains(server);
            queues::spread(c, from, &ready)
        });
        match spread.await {
            Ok(None) if run.end() => return,
            Ok(None) => {}
            Ok(Some(spread)) => {
                hs.outgoing().start(&spread.servers);
                if !spread.is_full() {
                    let strangers = !spread.left.is_empty();
                    let mut so_far = lock(&hs.queues().spread);
                    so_far.number = spread.number;
                    Arc::make_mut(&mut so_far.strangers).extend(spread.left);
                    drop(so_far);
                    if strangers {
                        hs.outgoing().spread_on();
                    }
                }
            }
            Err(error) => not_spread(&error).await,
        }
    }
}

/// To all that are left, some time later.
async fn spread_on(hs: &Homeserver, mut run: Run) {
    loop {
        tokio::time::sleep(STRANGERS_AFTER).await;
        loop {
            let before = lock(&hs.queues().spread).number;
            let spread = hs.store().write(|c| queues::spread(c, 0, &|_| true));
            match spread.await {
                Ok(Some(spread)) => hs.outgoing().start(&spread.servers),
                Ok(None) => {
                    let mut so_far = lock(&hs.queues().spread);
                    if so_far.number == before {
                        so_far.strangers = Arc::default();
                    }
                    break;
                }
                Err(error) => not_spread(&error).await,
            }
        }
        if run.end() {
            return;
        }
    }
}

async fn not_spread(error: &storage::Error) {
    tracing::error!(%error, "an event can not be spread to its servers");
    tokio::time::sleep(STORE_AGAIN).await;
}

fn first_of(failures: &mut Vec<Failure>) -> Vec<Failure> {
    let count = failures.len().min(RECORD_MAX);
    failures.drain(..count).collect()
}

/// Records failures some time after they come, so that one commit takes many. Whoever waits for one that could not
/// be recorded hears nothing of it.
async fn record(hs: &Homeserver, mut run: Run) {
    loop {
        tokio::time::sleep(RECORD_WITHIN).await;
        let batch = first_of(&mut lock(&hs.queues().failures));
        if batch.is_empty() {
            if run.end() {
                return;
            }
            continue;
        }
        let servers: Vec<_> = batch.iter().map(|failure| failure.server.clone()).collect();
        let now = hs.clock().unix_ms();
        let recorded = hs
            .store()
            .write(move |c| queues::failed(c, &servers, now, PATIENCE))
            .await;
        match recorded {
            Ok(recorded) => {
                for (failure, recorded) in batch.into_iter().zip(recorded) {
                    // A stop may have cut it off.
                    let _gone = failure.recorded.send(recorded);
                }
            }
            Err(error) => tracing::error!(%error, "failures of destinations can not be recorded"),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn work(hs: &Homeserver, server: ServerName, pause: Option<Duration>) {
    let mut wakeups = Wakeups::new(hs.notifier(), [Topic::Destination(server.clone())]);
    let mut counter: u64 = 0;
    // Whether there is something to send, as far as is known.
    let mut waits = true;
    if let Some(pause) = pause {
        rest(hs, &server, pause, &mut wakeups).await;
    }
    loop {
        // In a box, so that a worker that rests takes hundreds of bytes and not thousands.
        let sent = match Box::pin(deliver(hs, &server, waits, &mut counter)).await {
            Ok(sent) => sent,
            Err(error) => {
                tracing::error!(%server, %error, "the store gives nothing to send, or does not take how it went");
                tokio::time::sleep(STORE_AGAIN).await;
                continue;
            }
        };
        waits = true;
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
            Sent::Failed(failed) => {
                waits = failed.waits;
                rest(hs, &server, with_spread(failed.pause_ms), &mut wakeups).await;
            }
        }
    }
}

/// Waits, or until somebody hears of the server.
async fn rest(hs: &Homeserver, server: &ServerName, pause: Duration, wakeups: &mut Wakeups) {
    let note = |rests| {
        if let Some(worker) = lock(&hs.queues().workers).get_mut(server) {
            worker.rests = rests;
        }
    };
    note(true);
    tokio::select! {
        biased;
        () = tokio::time::sleep(pause) => {}
        () = heard_of(hs, server, wakeups) => {}
    }
    note(false);
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
        Some(worker) if !worker.passing.is_empty() => false,
        _ => {
            workers.remove(server);
            true
        }
    }
}

enum Sent {
    Something,
    Nothing,
    Failed(Failed),
}

async fn deliver(
    hs: &Homeserver,
    server: &ServerName,
    waits: bool,
    counter: &mut u64,
) -> storage::Result<Sent> {
    if waits
        && !hs.client().backoff().is_alive(server)
        && let Err(error) = hs.client().reach(server).await
    {
        return failed(hs, server, &error).await;
    }
    let asked = server.clone();
    let limit = i64::try_from(PDUS_MAX + EDUS_MAX).unwrap_or(i64::MAX);
    let waiting = hs
        .store()
        .read(move |c| queues::waiting(c, &asked, limit))
        .await?;
    let batch = Batch::of(waiting);
    let passing: Vec<Value> = {
        let mut workers = lock(&hs.queues().workers);
        let queue = &mut workers.entry(server.clone()).or_default().passing;
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
            failed(hs, server, &error).await
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

/// Has the failure recorded, and drops what may be lost when nothing else waits.
async fn failed(hs: &Homeserver, server: &ServerName, error: &AskError) -> storage::Result<Sent> {
    let (recorded, hear) = oneshot::channel();
    lock(&hs.queues().failures).push(Failure {
        server: server.clone(),
        recorded,
    });
    if let Some(run) = hs.queues().recording.begin() {
        let recorder = hs.clone();
        hs.spawn_until_stop("failures", async move { record(&recorder, run).await });
    }
    let failed = hear.await.map_err(|_| storage::Error::Closed)?;
    if !failed.waits {
        // The next EDU starts a worker again.
        lock(&hs.queues().workers)
            .entry(server.clone())
            .or_default()
            .passing
            .clear();
    }
    tracing::info!(%server, ?error, pause_ms = failed.pause_ms, "a destination did not answer");
    Ok(Sent::Failed(failed))
}

/// Not all servers of a dead proxy are tried in the same second.
fn with_spread(pause_ms: i64) -> Duration {
    millis(pause_ms + rand::random_range(0..=pause_ms / 4))
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
