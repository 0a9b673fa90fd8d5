//! Our server joins a room whose state is held back: what it does until it has it, and then.
//!
//! The tests are named by the rows of the suite for partial state that they hold (`t_…`), or by what else
//! they show of the same life of a room.

#[path = "../common/dag.rs"]
#[expect(dead_code, reason = "each test target uses a part of it")]
mod dag;
mod devices;
mod directory;
mod joining;
mod leaving;
#[path = "../common/network.rs"]
#[expect(dead_code, reason = "each test target uses a part of it")]
mod network;
mod outgoing;
mod receiving;
mod refusing;
#[path = "../common/resident.rs"]
#[expect(dead_code, reason = "each test target uses a part of it")]
mod resident;
mod resync;
#[path = "../common/stage.rs"]
mod stage;
mod sync;
mod verdicts;
mod waiting;
mod whole;
#[path = "../common/world.rs"]
#[expect(dead_code, reason = "each test target uses a part of it")]
mod world;
