//! Time as an argument: the one place where the service reads a clock.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use room::effect::Now;

/// Tells the time. Simulations bring their own.
pub trait Clock: Send + Sync + 'static {
    fn now(&self) -> Now;

    /// Milliseconds since the Unix epoch.
    fn unix_ms(&self) -> i64 {
        self.now().unix_ms
    }
}

/// The machine's own clocks.
pub struct SystemClock {
    start: Instant,
}

#[expect(
    clippy::disallowed_methods,
    reason = "this is the clock that everybody is told to ask"
)]
impl Default for SystemClock {
    fn default() -> Self {
        Self {
            start: Instant::now(),
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "this is the clock that everybody is told to ask"
)]
impl Clock for SystemClock {
    fn now(&self) -> Now {
        let since_epoch = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or(Duration::ZERO);
        Now {
            since_start: self.start.elapsed(),
            unix_ms: i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX),
        }
    }
}
