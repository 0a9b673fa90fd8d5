//! Rate limits at the doors where guessing or flooding pays.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering};

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};

use crate::Homeserver;
use crate::config;
use crate::error::{MatrixError, Result};

/// After this many checks the entries of those who have been quiet are dropped.
const SWEEP_EVERY: u64 = 4096;

/// What is limited, each with its own budget for each key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Accounts made, by address.
    Registration,
    /// Login attempts, by address.
    Login,
    /// Password guesses, by account.
    Password,
    /// Events sent, by user.
    Message,
    /// Joins and invites, by user.
    Join,
    /// Joins of other servers' users, by room.
    RemoteJoin,
    /// Uploads, by user.
    Upload,
}

impl Limit {
    const ALL: [Self; 7] = [
        Self::Registration,
        Self::Login,
        Self::Password,
        Self::Message,
        Self::Join,
        Self::RemoteJoin,
        Self::Upload,
    ];

    /// Sustained rate a minute, and burst.
    fn quota(self) -> (u32, u32) {
        match self {
            Self::Registration => (10, 5),
            Self::Login => (20, 10),
            Self::Password => (10, 5),
            Self::Message => (300, 60),
            Self::Join => (30, 20),
            Self::RemoteJoin => (120, 60),
            Self::Upload => (60, 30),
        }
    }
}

pub(crate) struct RateLimits {
    /// In the order of [`Limit::ALL`]; empty when limits are off.
    limiters: Vec<DefaultKeyedRateLimiter<String>>,
    checks: AtomicU64,
}

impl RateLimits {
    pub fn new(config: &config::Limits) -> Self {
        let limiters = Limit::ALL.iter().filter(|_| config.enabled).map(|limit| {
            let (per_minute, burst) = limit.quota();
            let nonzero = |n| NonZeroU32::new(n).unwrap_or(NonZeroU32::MIN);
            RateLimiter::keyed(Quota::per_minute(nonzero(per_minute)).allow_burst(nonzero(burst)))
        });
        Self {
            limiters: limiters.collect(),
            checks: AtomicU64::new(0),
        }
    }

    fn check(&self, limit: Limit, key: &str) -> Result<()> {
        let Some(limiter) = Limit::ALL
            .iter()
            .position(|other| *other == limit)
            .and_then(|place| self.limiters.get(place))
        else {
            return Ok(());
        };
        if self.checks.fetch_add(1, Ordering::Relaxed) % SWEEP_EVERY == SWEEP_EVERY - 1 {
            self.limiters.iter().for_each(RateLimiter::retain_recent);
        }
        limiter.check_key(&key.to_owned()).map_err(|not_until| {
            let wait = not_until.wait_time_from(DefaultClock::default().now());
            MatrixError::limit_exceeded(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX))
        })
    }
}

impl Homeserver {
    /// Takes one from the key's budget, or answers `M_LIMIT_EXCEEDED`.
    pub fn limit(&self, limit: Limit, key: &str) -> Result<()> {
        self.inner.limits.check(limit, key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_then_the_key_has_to_wait() {
        let limits = RateLimits::new(&config::Limits { enabled: true });
        let (_, burst) = Limit::Login.quota();
        for _ in 0..burst {
            limits.check(Limit::Login, "a").unwrap();
        }
        let refused = limits.check(Limit::Login, "a").unwrap_err();
        assert_eq!(
            (refused.status, refused.errcode.as_ref()),
            (429, "M_LIMIT_EXCEEDED")
        );
        assert!(refused.extra.contains_key("retry_after_ms"));
        limits.check(Limit::Login, "b").unwrap();
    }

    #[test]
    fn limits_can_be_lifted() {
        let limits = RateLimits::new(&config::Limits { enabled: false });
        for _ in 0..1000 {
            limits.check(Limit::Login, "a").unwrap();
        }
    }
}
