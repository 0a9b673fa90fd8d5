//! Whole servers, asked through the doors that clients use.

mod accounts;
mod rooms;
mod server_notices;
mod world;
