//! Whole servers, asked through the doors that clients use.

mod accounts;
mod hostile_joins;
#[path = "../common/network.rs"]
mod network;
mod rooms;
mod server_notices;
mod world;
