//! The service: what the doors call, and where effects are carried out.
//!
//! This crate knows the store, the wire and the room machines, and no HTTP framework. [`Homeserver`] is the
//! handle that every door holds; each service is a module with its own small type, so that a signature tells
//! what a function can touch.

pub mod account_data;
pub mod accounts;
pub mod appservice;
pub mod clock;
pub mod config;
pub mod devices;
pub mod error;
pub mod limits;
pub mod notifier;
mod passwords;
pub mod profiles;
pub mod shared_secret;
pub mod uia;

use std::sync::Arc;

use storage::Store;

use crate::appservice::Appservices;
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
    store: Store,
    appservices: Appservices,
    passwords: passwords::Hasher,
    uia: uia::Sessions,
    limits: limits::RateLimits,
    nonces: shared_secret::Nonces,
}

impl Homeserver {
    pub fn new(
        config: Config,
        clock: Arc<dyn Clock>,
        store: Store,
        appservices: Appservices,
    ) -> Self {
        let limits = limits::RateLimits::new(&config.limits);
        Self {
            inner: Arc::new(Inner {
                config,
                clock,
                notifier: Notifier::default(),
                store,
                appservices,
                passwords: passwords::Hasher::default(),
                uia: uia::Sessions::default(),
                limits,
                nonces: shared_secret::Nonces::default(),
            }),
        }
    }

    pub fn store(&self) -> &Store {
        &self.inner.store
    }

    pub fn appservices(&self) -> &Appservices {
        &self.inner.appservices
    }

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
