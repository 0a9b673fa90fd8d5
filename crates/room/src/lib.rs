//! The decisions: one sans-IO machine for each thing that happens to a room.
//!
//! A machine is a plain value. It never acts: it asks for one of five effects ([`effect::Effect`]) and is
//! told the result ([`effect::Input`]). It knows no SQL, no HTTP, no clock, no chance and no async; time
//! arrives with every input. To read one, start at its `handle`: the table of states and inputs there *is*
//! the machine.

mod chance;
mod exchange;
mod facts;
mod fetch;
mod judge;
mod out_of_band;
mod outbox;
mod policy;
mod sift;
mod thinking;
mod view;

pub mod acl;
pub mod backfill;
pub mod candidates;
pub mod effect;
pub mod invite;
pub mod join;
pub mod knock;
pub mod leave;
pub mod receive;
pub mod refusal;
pub mod resident;
pub mod rest;
pub mod restricted;
pub mod resync;
pub mod send;
pub mod template;
pub mod write;
