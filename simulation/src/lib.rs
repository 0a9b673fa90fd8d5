//! Many homeservers, one thread, one seed.
//!
//! The machines and the law are real; store, network, clock and signatures are made up. Level 1
//! ([`machine`]) puts one machine into a scripted world of faults, level 2 ([`room`]) lets several servers
//! share a room. A run is a function of its seed, and each seed is run twice to prove that.

pub mod chance;
pub mod fixture;
pub mod machine;
pub mod room;
pub mod store;
