//! Whole servers, asked through the doors that clients use.

mod accounts;
#[path = "../common/network.rs"]
mod network;
mod rooms;
mod server_notices;
mod world;
