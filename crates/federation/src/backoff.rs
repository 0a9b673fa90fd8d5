//! How each destination has fared lately. Only a record: whether it keeps anyone from asking is for the
//! caller to say, and the resync says no (S-24).

use std::time::Duration;

use protocol::id::ServerName;
use tokio::time::Instant;

/// After the first failure.
const BACKOFF_MIN: Duration = Duration::from_secs(10);
const BACKOFF_MAX: Duration = Duration::from_secs(3600);
/// Destinations remembered; the longest unused are forgotten.
const DESTINATIONS_MAX: u64 = 50_000;

/// Cheap to clone; all clones share one record.
#[derive(Clone)]
pub struct Backoff {
    failing: moka::sync::Cache<ServerName, Failing>,
    alive: moka::sync::Cache<ServerName, ()>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failing {
    pub times: u32,
    pub last: Instant,
    /// Before this, only those that must should ask.
    pub until: Instant,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            failing: moka::sync::Cache::new(DESTINATIONS_MAX),
            alive: moka::sync::Cache::new(DESTINATIONS_MAX),
        }
    }
}

impl Backoff {
    /// Whether a request that can wait should be sent.
    pub fn is_ready(&self, server: &ServerName) -> bool {
        self.failing(server)
            .is_none_or(|failing| failing.until <= Instant::now())
    }

    /// How it fails, if its last request failed.
    pub fn failing(&self, server: &ServerName) -> Option<Failing> {
        self.failing.get(server)
    }

    /// Whether it has answered or asked us something in this life of ours, and has not failed since.
    pub fn is_alive(&self, server: &ServerName) -> bool {
        self.alive.contains_key(server)
    }

    pub fn failed(&self, server: &ServerName) {
        self.alive.invalidate(server);
        let last = Instant::now();
        let before = self.failing.get(server);
        // Requests in flight together fail together: that is one failure.
        if before.is_some_and(|b| b.times > 0 && last < b.last + BACKOFF_MIN / 2) {
            return;
        }
        let times = before.map_or(1, |b| b.times.saturating_add(1));
        let wait = BACKOFF_MIN
            .saturating_mul(1 << (times - 1).min(16))
            .min(BACKOFF_MAX);
        // Up to a tenth more, so that those who wait for one server do not come together.
        let wait = wait.mul_f64(1.0 + rand::random::<f64>() / 10.0);
        self.failing.insert(
            server.clone(),
            Failing {
                times,
                last,
                until: last + wait,
            },
        );
    }

    /// It failed in an earlier life of ours, and is to be left alone for so long.
    pub fn resume(&self, server: &ServerName, wait: Duration) {
        let last = Instant::now();
        let failing = Failing {
            times: 1,
            last,
            until: last + wait.min(BACKOFF_MAX),
        };
        self.failing.insert(server.clone(), failing);
    }

    /// It answered, or asked us something: it lives.
    pub fn reset(&self, server: &ServerName) {
        self.failing.invalidate(server);
        if !self.alive.contains_key(server) {
            self.alive.insert(server.clone(), ());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn waits_grow_to_a_limit_and_life_resets_them() {
        let backoff = Backoff::default();
        let server = ServerName::parse("a.org:1").unwrap();
        let other_port = ServerName::parse("a.org:2").unwrap();
        let mut waits = Vec::new();
        for _ in 0..14 {
            backoff.failed(&server);
            assert!(!backoff.is_ready(&server));
            let failing = backoff.failing(&server).unwrap();
            waits.push(failing.until - failing.last);
            tokio::time::advance(failing.until - failing.last).await;
            assert!(backoff.is_ready(&server));
        }
        assert!(waits[0] < Duration::from_secs(12));
        assert!(waits[1] > waits[0] && waits[5] > waits[4]);
        assert!(waits.iter().all(|w| *w <= BACKOFF_MAX.mul_f64(1.1)));
        assert!(backoff.is_ready(&other_port));
        backoff.failed(&server);
        assert!(!backoff.is_alive(&server));
        backoff.reset(&server);
        assert!(backoff.is_ready(&server) && backoff.is_alive(&server));
        backoff.failed(&server);
        assert!(!backoff.is_alive(&server));
    }

    #[tokio::test(start_paused = true)]
    async fn failures_at_one_moment_count_once() {
        let backoff = Backoff::default();
        let server = ServerName::parse("a.org").unwrap();
        for _ in 0..5 {
            backoff.failed(&server);
        }
        assert_eq!(backoff.failing(&server).unwrap().times, 1);
    }
}
