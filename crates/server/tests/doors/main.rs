//! Whole servers, asked through the doors that clients use.

mod accounts;
mod server_notices;
mod world;
