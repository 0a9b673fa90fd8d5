//! Many homeservers, one thread, one seed.
//!
//! Level 1 ([`machine`]) puts one machine into a scripted world of faults, level 2 ([`room`]) lets the machines
//! of several servers share a room; in both the machines and the law are real, and store, network, clock and
//! signatures are made up. Level 3 ([`house`]) is whole servers, from the client's request to SQLite, of which
//! only network and clock are made up. A run is a function of its seed: the seeds of levels 1 and 2 are run
//! twice to prove that, and some of level 3.

pub mod chance;
pub mod entropy;
pub mod fixture;
pub mod house;
pub mod machine;
pub mod room;
pub mod store;
