//! The record of joins: how far each is, where it hangs, and what it still owes.
//!
//! A job is a row that outlives restarts; what changes with every event of a resync is kept in memory and
//! written when something worth keeping happens.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use protocol::id::{RoomId, ServerName, UserId};
use room::effect::Step;
use serde_json::{Value, json};
use storage::queues::{self, Job};
use storage::{Conn, Sequence, sync_reads, timeline};
use tokio::sync::broadcast;

use crate::Homeserver;
use crate::error::{MatrixError, Result};
use crate::metrics;
use crate::notifier::Topic;

/// Progress lines that a slow listener may lag behind before it loses some.
const FEED_MAX: usize = 256;
/// Jobs that can be under way.
const OPEN_MAX: i64 = 10_000;
/// Tries of one job that are shown.
const ATTEMPTS_SHOWN: i64 = 50;

/// The states of a job that has not ended.
pub(crate) const STATES_UNDER_WAY: [&str; 6] = [
    "resolving",
    "asking",
    "accepted",
    "verifying",
    "usable",
    "resyncing",
];

#[derive(Clone)]
pub struct Board {
    open: Arc<Mutex<HashMap<i64, Job>>>,
    feed: broadcast::Sender<Arc<Job>>,
}

impl Default for Board {
    fn default() -> Self {
        Self {
            open: Arc::default(),
            feed: broadcast::channel(FEED_MAX).0,
        }
    }
}

pub struct Jobs<'a> {
    hs: &'a Homeserver,
}

impl Homeserver {
    pub fn jobs(&self) -> Jobs<'_> {
        Jobs { hs: self }
    }
}

impl Jobs<'_> {
    /// Every change of every job from now on.
    pub fn follow(&self) -> broadcast::Receiver<Arc<Job>> {
        self.hs.board().feed.subscribe()
    }

    pub(crate) async fn open(&self, room: &RoomId, user: &UserId) -> storage::Result<i64> {
        let store = self.hs.store();
        let number = store.number(Sequence::Jobs).await?;
        let now = self.hs.clock().unix_ms();
        let job = Job {
            number,
            kind: "join".to_owned(),
            room_id: room.clone(),
            user_id: Some(user.clone()),
            state: "resolving".to_owned(),
            donor: None,
            last_error: None,
            progress: "{}".to_owned(),
            created_ms: now,
            updated_ms: now,
            finished_ms: None,
        };
        let (room, user) = (room.clone(), user.clone());
        store
            .write(move |c| {
                queues::create_job(c, number, "join", &room, Some(&user), "resolving", now)
            })
            .await?;
        self.lock().insert(number, job);
        Ok(number)
    }

    /// At boot: the jobs that go on. Those that ended in the moment of the stop are recorded as ended.
    pub(crate) async fn resume(&self) -> storage::Result<()> {
        let now = self.hs.clock().unix_ms();
        let open = self
            .hs
            .store()
            .write(move |c| {
                let mut open = Vec::new();
                let intended: Vec<i64> = queues::intents(c)?.iter().map(|i| i.job).collect();
                for mut job in queues::jobs(c, true, OPEN_MAX)? {
                    if !intended.contains(&job.number)
                        && let Some(state) = ended(c, &job)?
                    {
                        job.state = state.to_owned();
                        job.finished_ms = Some(now);
                        queues::update_job(c, &job)?;
                    } else {
                        open.push(job);
                    }
                }
                Ok(open)
            })
            .await?;
        self.lock()
            .extend(open.into_iter().map(|job| (job.number, job)));
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<i64, Job>> {
        self.hs
            .board()
            .open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The state of each job that goes on.
    pub(crate) fn states(&self) -> Vec<String> {
        self.lock().values().map(|job| job.state.clone()).collect()
    }

    /// All that go on, and the last that ended.
    pub async fn list(&self, limit: i64) -> storage::Result<Vec<Job>> {
        let mut jobs = self
            .hs
            .store()
            .read(move |c| queues::jobs(c, false, limit))
            .await?;
        let open = self.lock();
        for job in &mut jobs {
            if let Some(newer) = open.get(&job.number) {
                *job = newer.clone();
            }
        }
        Ok(jobs)
    }

    pub async fn one(&self, number: i64) -> storage::Result<Option<Job>> {
        if let Some(job) = self.lock().get(&number) {
            return Ok(Some(job.clone()));
        }
        self.hs.store().read(move |c| queues::job(c, number)).await
    }

    /// One job with its last tries, as the admin API shows it.
    pub async fn describe(&self, number: i64) -> Result<Value> {
        let job = self
            .one(number)
            .await?
            .ok_or_else(|| MatrixError::not_found("There is no such join"))?;
        let tries = self
            .hs
            .store()
            .read(move |c| queues::attempts(c, number, ATTEMPTS_SHOWN))
            .await?;
        let tries: Vec<Value> = tries
            .into_iter()
            .map(|try_| json!({ "server": try_.server, "ts": try_.at_ms, "outcome": try_.outcome }))
            .collect();
        let mut shown = to_json(&job);
        shown["attempts"] = tries.into();
        Ok(shown)
    }

    /// Makes the resync behind a job try again now. `false` when none runs.
    pub async fn retry(&self, number: i64) -> Result<bool> {
        let job = self
            .one(number)
            .await?
            .ok_or_else(|| MatrixError::not_found("There is no such join"))?;
        Ok(self.hs.tasks().retry_resync(&job.room_id))
    }

    /// Takes a join back as far as it still can be: before `send_join` nothing remains, after it a leave is
    /// owed, and who is in the room already leaves it. `false` when the join has ended.
    pub async fn cancel(&self, number: i64) -> Result<bool> {
        let job = self.under_way(number).await?;
        if self.hs.rooms().cancel_join(number) {
            return Ok(true);
        }
        let (Some(job), true) = (job.as_ref(), job.as_ref().is_some_and(is_usable)) else {
            return Ok(false);
        };
        if let Some(user) = &job.user_id {
            self.hs.rooms().leave(user, &job.room_id, None).await?;
        }
        self.close(number, "cancelled", None);
        Ok(true)
    }

    /// Has a join, or the resync behind it, ask this server next. `false` when nothing of it runs.
    pub async fn use_server(&self, number: i64, server: ServerName) -> Result<bool> {
        let Some(job) = self.under_way(number).await? else {
            return Ok(false);
        };
        let joins = self.hs.rooms().join_through(number, server.clone());
        Ok(joins || self.hs.tasks().resync_from(&job.room_id, server))
    }

    /// `None` when the job has ended; an error when there never was one.
    async fn under_way(&self, number: i64) -> Result<Option<Job>> {
        let job = self.one(number).await?;
        let job = job.ok_or_else(|| MatrixError::not_found("There is no such join"))?;
        Ok(Some(job).filter(|job| job.finished_ms.is_none()))
    }

    /// The job under which a room is being completed.
    fn of_room(&self, room: &RoomId) -> Option<i64> {
        let open = self.lock();
        let mut found: Vec<_> = open
            .values()
            .filter(|job| job.room_id == *room)
            .map(|job| job.number)
            .collect();
        found.sort_unstable();
        found.first().copied()
    }

    /// A machine says how far it is.
    pub(crate) fn progress(&self, room: &RoomId, job: Option<i64>, step: Step) {
        tracing::info!(%room, ?job, ?step, "join");
        if matches!(step, Step::Retrying { .. }) {
            self.hs.tasks().resync_pauses(room);
        }
        let Some(number) = job.or_else(|| self.of_room(room)) else {
            return;
        };
        let mut attempt = None;
        let now = self.hs.clock().unix_ms();
        self.change(number, |job| match step {
            Step::Asking { server, nth, of } => {
                job.state = "asking".to_owned();
                job.donor = Some(server.to_string());
                job.progress = json!({ "nth": nth, "of": of }).to_string();
                attempt = Some((server.to_string(), "asked".to_owned()));
            }
            Step::Failed { server, reason } => {
                job.last_error = Some(format!("{server}: {reason}"));
                attempt = Some((server.to_string(), reason));
            }
            Step::Accepted { by } => {
                job.state = "accepted".to_owned();
                job.donor = Some(by.to_string());
            }
            Step::Verifying { have } => {
                job.state = "verifying".to_owned();
                job.progress = json!({ "have": have }).to_string();
            }
            Step::Usable { partial } => {
                job.state = if partial { "usable" } else { "full" }.to_owned();
                let outcome = if partial { "partial" } else { "full" };
                metrics::join_ended(outcome, since(job.created_ms, now));
            }
            Step::Resyncing { from, have, want } => {
                job.state = "resyncing".to_owned();
                job.donor = Some(from.to_string());
                job.progress = json!({ "have": have, "want": want }).to_string();
            }
            Step::Retrying { reason, in_ms } => {
                metrics::resync_round_failed();
                job.last_error = Some(reason.clone());
                job.progress = json!({ "next_attempt_in_ms": in_ms }).to_string();
                attempt = Some((job.donor.clone().unwrap_or_default(), reason));
            }
            Step::Full => job.state = "full".to_owned(),
        });
        if let Some((server, outcome)) = attempt {
            let store = self.hs.store().clone();
            self.hs.spawn_to_end("record_attempt", async move {
                let recorded = store
                    .write(move |c| queues::record_attempt(c, number, &server, now, &outcome))
                    .await;
                if let Err(error) = recorded {
                    tracing::warn!(%error, "an attempt was not recorded");
                }
            });
        }
        let full = self
            .lock()
            .get(&number)
            .is_some_and(|job| job.state == "full");
        if full {
            self.close_room(room, "full");
        }
    }

    /// All open jobs of a room end together: it is full, or gone.
    pub(crate) fn close_room(&self, room: &RoomId, state: &str) {
        let numbers: Vec<i64> = self
            .lock()
            .values()
            .filter(|job| job.room_id == *room)
            .map(|job| job.number)
            .collect();
        for number in numbers {
            self.close(number, state, None);
        }
    }

    /// The join ended otherwise than in a partial room.
    pub(crate) fn close(&self, number: i64, state: &str, error: Option<String>) {
        let now = self.hs.clock().unix_ms();
        self.change(number, |job| {
            match state {
                "failed" => metrics::join_ended("failed", since(job.created_ms, now)),
                "full" => metrics::room_became_full(since(job.created_ms, now)),
                _ => {}
            }
            job.state = state.to_owned();
            job.last_error = error.or(job.last_error.take());
            job.finished_ms = Some(now);
        });
        self.lock().remove(&number);
    }

    fn change(&self, number: i64, change: impl FnOnce(&mut Job)) {
        let now = self.hs.clock().unix_ms();
        let changed = {
            let mut open = self.lock();
            let Some(job) = open.get_mut(&number) else {
                return;
            };
            let before = job.state.clone();
            change(job);
            job.updated_ms = now;
            (job.clone(), before != job.state)
        };
        let (job, keep) = changed;
        // Nobody may be listening.
        let _listeners = self.hs.board().feed.send(Arc::new(job.clone()));
        self.hs.notifier().wake(&Topic::Jobs);
        if keep {
            let store = self.hs.store().clone();
            self.hs.spawn_to_end("record_progress", async move {
                if let Err(error) = store.write(move |c| queues::update_job(c, &job)).await {
                    tracing::warn!(%error, "a job's progress was not recorded");
                }
            });
        }
    }
}

/// What became of a join that nothing is on its way for: `None` when its room is being completed.
fn ended(c: &mut dyn Conn, job: &Job) -> storage::Result<Option<&'static str>> {
    if timeline::is_partial(c, &job.room_id)? {
        return Ok(None);
    }
    let joined = match &job.user_id {
        Some(user) => sync_reads::is_joined(c, &job.room_id, user)?,
        None => false,
    };
    Ok(Some(if joined { "full" } else { "cancelled" }))
}

fn is_usable(job: &Job) -> bool {
    matches!(job.state.as_str(), "usable" | "resyncing")
}

fn since(then_ms: i64, now_ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(now_ms - then_ms).unwrap_or(0))
}

/// A job as the admin API shows it.
pub fn to_json(job: &Job) -> Value {
    let progress: Value = serde_json::from_str(&job.progress).unwrap_or(Value::Null);
    json!({
        "id": job.number,
        "kind": job.kind,
        "room_id": job.room_id,
        "user_id": job.user_id,
        "state": job.state,
        "donor": job.donor,
        "last_error": job.last_error,
        "progress": progress,
        "created_ts": job.created_ms,
        "updated_ts": job.updated_ms,
        "finished_ts": job.finished_ms,
    })
}
