//! Runs any room machine: the only place in the house where a room effect is carried out.
//!
//! A run goes on when whoever started it has gone away; it ends with its machine, or with the server. Then
//! what was committed is on disk, and whatever was under way begins again from there.

use std::time::Duration;

use protocol::id::RoomId;
use room::effect::{Effect, Input, Load, Loaded, Machine, Now, Tell, Ticket};
use tokio::sync::{mpsc, watch};

use crate::Homeserver;
use crate::checks;

/// Inputs that wait for the machine; beyond that, whoever brings them waits. Bounds the window of a body
/// that streams in: a part holds at most 256 events.
const INPUTS_MAX: usize = 16;
/// With more PDUs than this in one input the machine runs off the async threads.
const INLINE_PDUS_MAX: usize = 64;

/// Commits of one run that may be stale one after the other before the next one waits, twice as long each time: a
/// room changes fast, but a commit that can never succeed must not take the machine for itself.
const STALE_AT_ONCE_MAX: u32 = 8;
const STALE_PAUSE_MIN: Duration = Duration::from_millis(5);
const STALE_PAUSE_MAX: Duration = Duration::from_secs(5);

/// Something to do to a machine from outside, such as a cancel.
pub type Command<M> = Box<dyn FnOnce(&mut M, Now) + Send>;

/// What a run needs beside its machine.
pub struct Run<M> {
    pub machine: M,
    /// The join job that this run's progress is told of.
    pub job: Option<i64>,
    pub commands: Option<mpsc::Receiver<Command<M>>>,
}

impl<M> Run<M> {
    pub fn of(machine: M) -> Self {
        Self {
            machine,
            job: None,
            commands: None,
        }
    }
}

/// Runs the machine to its outcome. `None` when the server stops first.
pub async fn drive<M>(hs: &Homeserver, run: Run<M>) -> Option<M::Outcome>
where
    M: Machine + Send + 'static,
    M::Outcome: Send + 'static,
{
    let machine = hs.clone();
    let running = hs.spawn_until_stop("machine", async move { turn(&machine, run).await });
    running.await.ok().flatten()
}

async fn turn<M>(hs: &Homeserver, run: Run<M>) -> M::Outcome
where
    M: Machine + Send + 'static,
    M::Outcome: Send + 'static,
{
    let Run {
        mut machine,
        job,
        mut commands,
    } = run;
    let (sender, mut inputs) = mpsc::channel(INPUTS_MAX);
    let mut asks = tokio::task::JoinSet::new();
    let wants_parts = watch::Sender::new(true);
    let mut stale = 0;
    loop {
        let mut looks = Vec::new();
        while let Some(effect) = machine.poll_effect() {
            match effect {
                Effect::Load { ticket, room, load } if !matches!(load, Load::Intern { .. }) => {
                    looks.push((ticket, room, load));
                }
                effect => {
                    let pause = stale_pause(stale);
                    execute(hs, effect, job, pause, &sender, &wants_parts, &mut asks);
                }
            }
        }
        if !looks.is_empty() {
            asks.spawn(look(hs.clone(), looks, sender.clone()));
        }
        wants_parts.send_if_modified(|wants| {
            let before = std::mem::replace(wants, machine.wants_parts());
            before != *wants
        });
        if let Some(outcome) = machine.poll_outcome() {
            return outcome;
        }
        let woken = wait_until(hs, machine.deadline());
        let command = next_command(&mut commands);
        let input = tokio::select! {
            biased;
            Some(command) = command => {
                command(&mut machine, hs.clock().now());
                continue;
            }
            Some(input) = inputs.recv() => input,
            () = woken => Input::Woke,
        };
        while asks.try_join_next().is_some() {}
        if let Input::Committed { outcome, .. } = &input {
            stale = outcome.map_or(stale.saturating_add(1), |()| 0);
        }
        let now = hs.clock().now();
        if weight(&input) <= INLINE_PDUS_MAX {
            machine.handle(input, now);
        } else {
            let handled = hs.config().processor.run(move || {
                machine.handle(input, now);
                machine
            });
            machine = handled.await.expect("a machine does not panic");
        }
    }
}

/// All that a machine looks up at one time, in one go.
async fn look(hs: Homeserver, looks: Vec<(Ticket, RoomId, Load)>, inputs: mpsc::Sender<Input>) {
    let apart = |(ticket, room, load)| (ticket, (room, load));
    let (tickets, questions): (Vec<_>, Vec<_>) = looks.into_iter().map(apart).unzip();
    let answers = persist(tickets[0], || {
        storage::load::load_all(hs.store(), questions.clone())
    });
    for (ticket, loaded) in tickets.into_iter().zip(answers.await) {
        let _machine_is_done = inputs.send(Input::Loaded { ticket, loaded }).await;
    }
}

async fn next_command<M>(commands: &mut Option<mpsc::Receiver<Command<M>>>) -> Option<Command<M>> {
    let command = match commands {
        Some(receiver) => receiver.recv().await,
        None => std::future::pending().await,
    };
    if command.is_none() {
        *commands = None;
    }
    command
}

async fn wait_until(hs: &Homeserver, deadline: Option<Duration>) {
    let Some(deadline) = deadline else {
        return std::future::pending().await;
    };
    let wait = deadline.saturating_sub(hs.clock().now().since_start);
    // A deadline in the past still lets inputs that are here already go first.
    tokio::time::sleep(wait.max(Duration::from_micros(1))).await;
}

/// How many PDUs the machine will look at for this input, roughly.
fn weight(input: &Input) -> usize {
    match input {
        Input::Checked { pdus, .. } => pdus.len(),
        Input::Loaded { loaded, .. } => match loaded {
            Loaded::Interned { events, .. } => events.len(),
            Loaded::Known(known) => known.len(),
            Loaded::Found(found) => found.len(),
            Loaded::Closure(set) => set.events.len(),
            Loaded::Ready(ready) => ready.len(),
            _ => 1,
        },
        // A fetch thinks about what has come so far.
        Input::Woke => INLINE_PDUS_MAX + 1,
        _ => 1,
    }
}

fn execute(
    hs: &Homeserver,
    effect: Effect,
    job: Option<i64>,
    pause: Duration,
    inputs: &mpsc::Sender<Input>,
    wants_parts: &watch::Sender<bool>,
    asks: &mut tokio::task::JoinSet<()>,
) {
    let (hs, inputs) = (hs.clone(), inputs.clone());
    match effect {
        Effect::Ask {
            ticket,
            to,
            ask,
            timeout,
        } => {
            let wants_parts = wants_parts.subscribe();
            asks.spawn(async move {
                let parts = inputs.clone();
                let from = to.clone();
                let answer = hs
                    .client()
                    .ask(&to, &ask, timeout, |section, pdus| {
                        let part = Input::Part {
                            ticket,
                            from: from.clone(),
                            section,
                            pdus,
                        };
                        let (parts, mut wants_parts) = (parts.clone(), wants_parts.clone());
                        async move {
                            drop(wants_parts.wait_for(|wants| *wants).await);
                            let _machine_is_done = parts.send(part).await;
                        }
                    })
                    .await;
                let _machine_is_done = inputs
                    .send(Input::Answered {
                        ticket,
                        from: to,
                        answer,
                    })
                    .await;
            });
        }
        // Numbers, which may take several looks; the others look together.
        Effect::Load { ticket, room, load } => {
            asks.spawn(async move {
                let loaded = persist(ticket, || {
                    storage::load::load(hs.store(), &room, load.clone())
                })
                .await;
                let _machine_is_done = inputs.send(Input::Loaded { ticket, loaded }).await;
            });
        }
        Effect::Check {
            ticket,
            version,
            pdus,
        } => {
            asks.spawn(async move {
                let pdus = checks::check(&hs, version, pdus).await;
                let _machine_is_done = inputs.send(Input::Checked { ticket, pdus }).await;
            });
        }
        // Not among the asks: a commit under way is finished and followed up even if the run ends.
        Effect::Commit { ticket, writes } => {
            let store = hs.clone();
            hs.spawn_to_end("commit", async move {
                if !pause.is_zero() {
                    tracing::warn!(room = %writes.room, ?pause, "a commit was stale again and again");
                    tokio::time::sleep(pause).await;
                }
                let outcome = persist(ticket, || store.commit((*writes).clone())).await;
                let _machine_is_done = inputs.send(Input::Committed { ticket, outcome }).await;
            });
        }
        Effect::Tell(tell) => hs.tell(job, tell),
    }
}

/// How long the next commit waits after so many stale ones.
fn stale_pause(stale: u32) -> Duration {
    match stale.checked_sub(STALE_AT_ONCE_MAX) {
        None | Some(0) => Duration::ZERO,
        Some(beyond) => {
            let doubled = STALE_PAUSE_MIN * 2u32.saturating_pow(beyond - 1).min(1 << 10);
            doubled.min(STALE_PAUSE_MAX)
        }
    }
}

/// The store is the ground we stand on: while it fails, machines wait, and try again with growing pauses.
async fn persist<T, F>(ticket: Ticket, mut attempt: impl FnMut() -> F) -> T
where
    F: Future<Output = storage::Result<T>>,
{
    let mut pause = Duration::from_millis(50);
    loop {
        match attempt().await {
            Ok(value) => return value,
            Err(error) => {
                tracing::error!(?ticket, %error, "the store failed; trying again");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(10));
            }
        }
    }
}

impl Homeserver {
    /// What a machine has to tell.
    fn tell(&self, job: Option<i64>, tell: Tell) {
        match tell {
            Tell::Progress { room, step } => self.jobs().progress(&room, job, step),
            Tell::StartResync { room, rest } => self.tasks().start_resync(room, rest),
            Tell::PrefetchKeys { servers } => self.keys().prefetch(servers),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_that_is_stale_again_and_again_waits_longer_and_longer_and_never_for_ever() {
        let pauses: Vec<Duration> = (0..40).map(stale_pause).collect();
        let at_once = usize::try_from(STALE_AT_ONCE_MAX).unwrap();
        assert!(pauses[..=at_once].iter().all(Duration::is_zero));
        assert_eq!(pauses[at_once + 1], STALE_PAUSE_MIN);
        assert!(pauses.is_sorted());
        assert_eq!(stale_pause(u32::MAX), STALE_PAUSE_MAX);
    }
}
