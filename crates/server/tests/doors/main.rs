//! Whole servers, asked through the doors that clients use.

mod accounts;
mod hostile_joins;
#[path = "../common/network.rs"]
mod network;
mod rooms;
mod server_notices;
#[path = "../common/world.rs"]
#[expect(dead_code, reason = "each test target uses a part of it")]
mod world;
