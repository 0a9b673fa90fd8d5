//! The law of rooms, told by examples and held against another implementation of it.

mod dag;
mod oracle;
mod resolution;
mod world;
