//! Work that outlives its request, and how it ends with the server.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::Homeserver;

type Work<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// All background work of a server.
#[derive(Default)]
pub(crate) struct Background {
    tracker: TaskTracker,
    stop: CancellationToken,
    /// How much of each kind runs.
    kinds: Mutex<BTreeMap<&'static str, usize>>,
}

impl Background {
    fn kinds(&self) -> MutexGuard<'_, BTreeMap<&'static str, usize>> {
        self.kinds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts a piece of work for as long as it lives, however it ends.
struct Counted {
    hs: Homeserver,
    kind: &'static str,
}

impl Counted {
    fn new(hs: &Homeserver, kind: &'static str) -> Self {
        *hs.background().kinds().entry(kind).or_default() += 1;
        Self {
            hs: hs.clone(),
            kind,
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut kinds = self.hs.background().kinds();
        if let Some(count) = kinds.get_mut(self.kind) {
            *count -= 1;
        }
    }
}

/// Work of which one run goes on at a time, and looks again before it ends when there was more to do meanwhile.
#[derive(Clone, Default)]
pub(crate) struct OneRun(Arc<Mutex<Running>>);

#[derive(Default)]
struct Running {
    running: bool,
    again: bool,
}

/// The run that goes on, for as long as it lives.
pub(crate) struct Run {
    of: OneRun,
    over: bool,
}

impl OneRun {
    /// `None` when a run goes on, which then looks again.
    pub fn begin(&self) -> Option<Run> {
        let mut state = self.lock();
        if state.running {
            state.again = true;
            return None;
        }
        state.running = true;
        Some(Run {
            of: self.clone(),
            over: false,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Running> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Run {
    /// Nothing is left to do, as far as this run has seen. Whether it is over: nothing came in the meantime.
    pub fn end(&mut self) -> bool {
        let mut state = self.of.lock();
        self.over = !std::mem::take(&mut state.again);
        state.running = !self.over;
        self.over
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if !self.over {
            *self.of.lock() = Running::default();
        }
    }
}

impl Homeserver {
    /// Work that a stop waits for. It must be short, or mind the stop itself.
    pub(crate) fn spawn_to_end<F>(&self, kind: &'static str, work: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.spawn(kind, Box::pin(work))
    }

    /// Work that a stop cuts off: the next start takes it up, or nobody misses it. `None` when that happened.
    pub(crate) fn spawn_until_stop<F>(
        &self,
        kind: &'static str,
        work: F,
    ) -> JoinHandle<Option<F::Output>>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        let stop = self.stopping();
        let work: Work<F::Output> = Box::pin(work);
        self.spawn(
            kind,
            Box::pin(async move {
                tokio::select! {
                    // Here and in all of this crate: which of two goes first is never chance.
                    biased;
                    done = work => Some(done),
                    () = stop.cancelled() => None,
                }
            }),
        )
    }

    /// The work is in a box: each future around it would hold it twice, once as it came and once as it runs.
    fn spawn<T: Send + 'static>(&self, kind: &'static str, work: Work<T>) -> JoinHandle<T> {
        let counted = Counted::new(self, kind);
        self.background().tracker.spawn(async move {
            let _counted = counted;
            work.await
        })
    }

    /// Ends when the server stops.
    pub fn stopping(&self) -> CancellationToken {
        self.background().stop.clone()
    }

    /// Ends background work; returns when it has ended. What was under way goes on at the next start.
    pub async fn stop(&self) {
        self.background().stop.cancel();
        self.background().tracker.close();
        self.background().tracker.wait().await;
    }

    /// Background work that runs now: kinds, and how much of each.
    pub fn under_way(&self) -> BTreeMap<&'static str, usize> {
        let mut kinds = self.background().kinds().clone();
        kinds.retain(|_, count| *count > 0);
        kinds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_run_at_a_time_looks_again_for_what_came_meanwhile() {
        let runs = OneRun::default();
        let mut run = runs.begin().unwrap();
        assert!(runs.begin().is_none());
        assert!(!run.end());
        assert!(run.end());
        drop(run);
        let cut_off = runs.begin().unwrap();
        assert!(runs.begin().is_none());
        drop(cut_off);
        let mut run = runs.begin().unwrap();
        assert!(run.end());
    }
}
