//! The service: what the doors call, and where effects are carried out.
//!
//! This crate knows the store, the wire and the room machines, and no HTTP framework. [`Homeserver`] is the
//! handle that every door holds; each service is a module with its own small type, so that a signature tells
//! what a function can touch.

pub mod accounts;
pub mod appservice;
pub mod clock;
pub mod config;
pub mod error;
pub mod notifier;

use std::sync::Arc;

use crate::clock::Clock;
use crate::config::Config;
use crate::notifier::Notifier;

/// One homeserver. Cheap to clone; all clones are the same server.
#[derive(Clone)]
pub struct Homeserver {
    inner: Arc<Inner>,
}

struct Inner {
    config: Config,
    clock: Arc<dyn Clock>,
    notifier: Notifier,
}

impl Homeserver {
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    pub fn clock(&self) -> &dyn Clock {
        self.inner.clock.as_ref()
    }

    pub fn notifier(&self) -> &Notifier {
        &self.inner.notifier
    }
}
