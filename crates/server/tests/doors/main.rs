//! Whole servers, asked through the doors that clients use.

mod accounts;
#[path = "../common/network.rs"]
#[expect(dead_code, reason = "each test target uses a part of it")]
mod network;
mod rooms;
mod server_notices;
#[path = "../common/world.rs"]
#[expect(dead_code, reason = "each test target uses a part of it")]
mod world;
