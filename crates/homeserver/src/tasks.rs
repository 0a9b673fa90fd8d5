//! Background work that outlives requests and restarts: resyncs, interrupted joins, and leaves that are
//! owed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use protocol::id::{EventId, RoomId, ServerName, UserId};
use room::effect::Now;
use room::join::{Intent, Join, JoinRequest};
use room::rest::Rest;
use room::resync::{Resync, ResyncOptions, Resynced};
use room::template::Member;
use storage::apply::Applied;
use storage::queues::{self, StoredIntent};
use tokio::sync::mpsc;

use crate::Homeserver;
use crate::drive::{Command, Run, drive};

/// A debt that nobody takes is offered again after this, then twice that, and so on.
const DEBT_PAUSE_MIN: Duration = Duration::from_secs(10);
const DEBT_PAUSE_MAX: Duration = Duration::from_secs(3600);

/// Who has just joined asks for the room, and says something: the resync of a room on at least so many servers, which
/// has work for all cores, begins after.
const LARGE_MIN: usize = 100;
const LARGE_AFTER: Duration = Duration::from_millis(100);
/// Resyncs taken up at a start that fetch at the same time. Those of new joins, and of rooms that somebody
/// waits for, come on top.
const RESUMED_AT_ONCE_MAX: usize = 8;

/// What runs now. One resync for each room at most (S-1).
#[derive(Default)]
pub struct Running {
    resyncs: Mutex<BTreeMap<RoomId, mpsc::Sender<Command<Resync>>>>,
    resumed: Mutex<Resumed>,
    debts: Debts,
}

/// Who pays debts: one task, for as long as there are any.
#[derive(Default)]
struct Debts {
    paying: AtomicBool,
    /// Set with every new debt: the payer looks again, and soon.
    new: AtomicBool,
}

/// A leave that is owed for a join that failed after it was sent.
pub(crate) struct Debt {
    pub job: i64,
    pub room: RoomId,
    pub user: UserId,
    /// Who heard of the join from us.
    pub via: Vec<ServerName>,
    pub joins: Vec<EventId>,
}

/// Rooms that were partial at the start.
#[derive(Default)]
struct Resumed {
    /// Best first.
    waiting: VecDeque<RoomId>,
    running: BTreeSet<RoomId>,
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
    /// Begins the resync of a partial room; one that runs is told to try again at once. With the rest of
    /// an answer to a join nobody need be asked.
    pub fn start_resync(&self, room: RoomId, rest: Option<Box<Rest>>) {
        let commands = {
            let mut resyncs = self.lock();
            if let Some(running) = resyncs.get(&room) {
                let command: Command<Resync> = match rest {
                    Some(rest) => Box::new(|resync, now| resync.take(rest, now)),
                    None => retry(),
                };
                let _busy_already = running.try_send(command);
                return;
            }
            let (sender, commands) = mpsc::channel(4);
            resyncs.insert(room.clone(), sender);
            commands
        };
        let hs = self.hs.clone();
        self.hs.spawn_until_stop("resync", async move {
            if rest.is_none() && is_large(&hs, &room).await {
                tokio::time::sleep(LARGE_AFTER).await;
            }
            resync(&hs, &room, rest, commands).await;
            hs.tasks().lock().remove(&room);
            hs.tasks().resync_pauses(&room);
            // Somebody may have joined between the end and here (S-30).
            if let Ok(Some(head)) = hs.rooms().head(&room).await
                && head.partial.is_some()
            {
                hs.tasks().start_resync(room, None);
            }
        });
    }

    /// Somebody waits for this room: its resync does not wait for its turn.
    pub(crate) fn is_wanted(&self, room: &RoomId) {
        let waited = {
            let mut resumed = self.resumed();
            let place = resumed.waiting.iter().position(|other| other == room);
            place.and_then(|place| resumed.waiting.remove(place))
        };
        if let Some(room) = waited {
            self.start_resync(room, None);
        }
    }

    /// A resync has ended, or rests since no server gives the state: another one may use its place.
    pub(crate) fn resync_pauses(&self, room: &RoomId) {
        self.resumed().running.remove(room);
        self.start_resumed();
    }

    fn start_resumed(&self) {
        loop {
            let room = {
                let mut resumed = self.resumed();
                if resumed.running.len() >= RESUMED_AT_ONCE_MAX {
                    return;
                }
                let Some(room) = resumed.waiting.pop_front() else {
                    return;
                };
                resumed.running.insert(room.clone());
                room
            };
            self.start_resync(room, None);
        }
    }

    fn resumed(&self) -> std::sync::MutexGuard<'_, Resumed> {
        let resumed = self.hs.running().resumed.lock();
        resumed.unwrap_or_else(PoisonError::into_inner)
    }

    /// An admin wants a resync to try again now (O-48). `false` when none runs.
    pub fn retry_resync(&self, room: &RoomId) -> bool {
        self.is_wanted(room);
        self.lock()
            .get(room)
            .is_some_and(|running| running.try_send(retry()).is_ok())
    }

    /// An admin knows a server that may give the state (O-48). `false` when no resync runs.
    pub(crate) fn resync_from(&self, room: &RoomId, server: ServerName) -> bool {
        let command: Command<Resync> = Box::new(move |resync, now| resync.use_server(server, now));
        let resyncs = self.lock();
        resyncs
            .get(room)
            .is_some_and(|running| running.try_send(command).is_ok())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<RoomId, mpsc::Sender<Command<Resync>>>> {
        self.hs
            .running()
            .resyncs
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// At boot: what was under way.
    pub(crate) async fn resume(&self) -> storage::Result<()> {
        let (intents, rooms) = self
            .hs
            .store()
            .read(|c| {
                let mut rooms = Vec::new();
                for (nid, room) in storage::rooms::partial_rooms(c)? {
                    rooms.push((storage::rooms::completion_rank(c, nid)?, room));
                }
                rooms.sort();
                Ok((queues::intents(c)?, rooms))
            })
            .await?;
        for intent in intents.into_iter().filter(|intent| !intent.owe_leave) {
            let hs = self.hs.clone();
            self.hs
                .spawn_until_stop("resume_join", async move { resume_join(&hs, intent).await });
        }
        let rooms = rooms.into_iter().map(|(_, room)| room);
        self.resumed().waiting.extend(rooms);
        self.start_resumed();
        self.pay_debts();
        Ok(())
    }

    /// Offers the leaves that we owe to the servers that may hold us as a member, until they are taken.
    pub fn pay_debts(&self) {
        let debts = &self.hs.running().debts;
        debts.new.store(true, Ordering::SeqCst);
        if debts.paying.swap(true, Ordering::SeqCst) {
            return;
        }
        let hs = self.hs.clone();
        self.hs
            .spawn_until_stop("pay_debts", async move { pay_debts(&hs).await });
    }

    /// A room has become full: what waited for that.
    pub(crate) fn room_is_full(&self, room: &RoomId, _applied: &Applied) {
        self.hs.jobs().close_room(room, "full");
    }
}

fn retry() -> Command<Resync> {
    Box::new(|resync: &mut Resync, now: Now| resync.retry(now))
}

async fn is_large(hs: &Homeserver, room: &RoomId) -> bool {
    let head = hs.rooms().head(room).await.ok().flatten();
    let marker = head.and_then(|head| head.partial);
    marker.is_some_and(|marker| marker.servers_in_room.len() >= LARGE_MIN)
}

async fn resync(
    hs: &Homeserver,
    room: &RoomId,
    rest: Option<Box<Rest>>,
    commands: mpsc::Receiver<Command<Resync>>,
) {
    let mut machine = Resync::new(
        hs.own().clone(),
        room.clone(),
        ResyncOptions {
            compare_donors: hs.config().join.compare_donors,
            ..ResyncOptions::default()
        },
        rand::random(),
        hs.clock().now(),
    );
    if let Some(rest) = rest {
        machine.take(rest, hs.clock().now());
    }
    let run = Run {
        machine,
        job: None,
        commands: Some(commands),
    };
    match drive(hs, run).await {
        Some(Resynced::Full) => tracing::info!(%room, "the room is full"),
        Some(Resynced::Freed) => {
            tracing::info!(%room, "nobody is in the partial room; it was given up");
            hs.jobs().close_room(room, "cancelled");
        }
        Some(Resynced::Gone) => hs.jobs().close_room(room, "cancelled"),
        None => {}
    }
}

/// A join that a crash interrupted after its event may have left: the same event goes again.
async fn resume_join(hs: &Homeserver, stored: StoredIntent) {
    let StoredIntent {
        job,
        room,
        user,
        via,
        ..
    } = stored;
    tracing::info!(%room, %user, job, "taking up an interrupted join");
    let servers = hs.rooms().servers(&room).await.unwrap_or_default();
    let request = JoinRequest {
        room: room.clone(),
        user: user.clone(),
        candidates: std::iter::once(via.clone()).chain(servers).collect(),
        member: Member::default(),
        job,
        device_lists_at: hs.rooms().device_lists_at().await.unwrap_or_default(),
    };
    let intent = Intent {
        version: stored.version,
        event: stored.event.into(),
        via,
        omit_members: stored.omit_members,
    };
    let options = hs.rooms().join_options();
    let machine = Join::resume(hs.own().clone(), request, options, intent, hs.clock().now());
    if let Ok(outcome) = hs.rooms().run_join(machine, job).await {
        let _told_in_the_log = hs.rooms().after_join(&room, &user, job, outcome);
    }
}

async fn pay_debts(hs: &Homeserver) {
    let debts = &hs.running().debts;
    let mut pause = DEBT_PAUSE_MIN;
    // Debts by their jobs, and when this process heard of them first.
    let mut since: BTreeMap<i64, Duration> = BTreeMap::new();
    loop {
        // Not at once: whoever failed to join often tries again, and a join that succeeds settles the debt.
        tokio::time::sleep(pause).await;
        pause = match debts.new.swap(false, Ordering::SeqCst) {
            true => DEBT_PAUSE_MIN,
            false => (pause * 2).min(DEBT_PAUSE_MAX),
        };
        let intents = match hs.store().read(queues::intents).await {
            Ok(intents) => intents,
            Err(error) => {
                tracing::error!(%error, "owed leaves can not be read");
                continue;
            }
        };
        let owed = debts_of(intents);
        since.retain(|job, _| owed.contains_key(job));
        for (job, debt) in owed {
            let since = *since.entry(job).or_insert(hs.clock().now().since_start);
            if let Err(error) = hs.rooms().pay_debt(&debt, since).await {
                tracing::info!(room = %debt.room, user = %debt.user, %error, "an owed leave was not taken");
            }
        }
        if since.is_empty() {
            debts.paying.store(false, Ordering::SeqCst);
            // Whoever came to owe since the look found a payer that was about to go.
            if !debts.new.load(Ordering::SeqCst) || debts.paying.swap(true, Ordering::SeqCst) {
                return;
            }
        }
    }
}

/// One job may have sent more than one event.
fn debts_of(intents: Vec<StoredIntent>) -> BTreeMap<i64, Debt> {
    let mut owed: BTreeMap<i64, Debt> = BTreeMap::new();
    for intent in intents.into_iter().filter(|intent| intent.owe_leave) {
        let debt = owed.entry(intent.job).or_insert_with(|| Debt {
            job: intent.job,
            room: intent.room,
            user: intent.user,
            via: Vec::new(),
            joins: Vec::new(),
        });
        debt.via.push(intent.via);
        debt.joins.push(intent.event_id);
    }
    owed
}
