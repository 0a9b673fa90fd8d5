//! Our server joins a room whose state is held back: what it does until it has it, and then.
//!
//! The tests are named by the rows of the suite for partial state that they hold (`t_…`), or by what else
//! they show of the same life of a room.

mod dag;
mod devices;
mod directory;
mod joining;
mod leaving;
#[path = "../common/network.rs"]
mod network;
mod outgoing;
mod receiving;
mod refusing;
mod resident;
mod resync;
mod sync;
mod verdicts;
mod waiting;
mod whole;
mod world;
