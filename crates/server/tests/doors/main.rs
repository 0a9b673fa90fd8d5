//! Whole servers, asked through the doors that clients use.

mod server_notices;
mod world;
