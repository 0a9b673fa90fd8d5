//! The wire: speaking to other servers.
//!
//! This crate knows how a server is found and reached, how requests are signed and checked, and which
//! endpoint answers which question. It knows no database and makes no decision about a room.

pub mod discovery;
pub mod dns;
pub mod hyper_transport;
pub mod ip_ranges;
pub mod transport;
