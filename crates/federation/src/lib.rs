//! The wire: speaking to other servers.
//!
//! This crate knows how a server is found and reached, how requests are signed and checked, and which
//! endpoint answers which question. It knows no database and makes no decision about a room.

pub mod ask;
pub mod backoff;
pub mod calls;
pub mod client;
pub mod discovery;
pub mod dns;
pub mod hyper_transport;
pub mod ip_ranges;
pub mod keys;
pub mod media;
pub mod request_auth;
pub mod room_body;
pub mod server_keys;
pub mod transport;

pub use calls::{Direction, DirectoryAnswer, EventAtTime};
pub use client::{Body, Call, Client};
pub use hyper_transport::{HyperTransport, TransportOptions};
pub use ip_ranges::IpRanges;
pub use keys::{KeyRing, KeySet, KeyStore, UnixClock, Wanted};
pub use request_auth::AuthError;
pub use server_keys::{OldKey, StoredKey};
pub use transport::{Transport, TransportError};
