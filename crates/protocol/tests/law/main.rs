//! The law of rooms, told by examples and held against another implementation of it.

mod auth_rules;
mod dag;
mod oracle;
mod resolution;
mod world;
