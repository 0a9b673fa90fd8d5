//! The law: pure functions over Matrix values.
//!
//! This crate knows no socket, file, thread, clock or source of chance, and no async. Whoever calls
//! it hands in the bytes, the keys and the events; it answers with values.

pub mod auth;
pub mod auth_chain;
pub mod build;
pub mod canonical_json;
pub mod dag;
pub mod edu;
pub mod event_set;
pub mod format;
pub mod glance;
pub mod hash;
pub mod id;
pub mod nid;
pub mod pdu;
pub mod power;
pub mod redaction;
pub mod room_version;
pub mod signature;
pub mod state;
pub mod state_resolution;
