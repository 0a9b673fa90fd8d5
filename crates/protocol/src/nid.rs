//! The numbers that stand for names inside the house. Names are for the doors.

use serde::{Deserialize, Serialize};

/// A room's number, given by the store when the room is first heard of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RoomNid(pub i64);

/// An event's number, unique in the store. Numbers say nothing of order in the DAG.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct EventNid(pub i64);

/// The number of a `(type, state_key)` pair *within one room*, dense from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct KeyNid(pub u32);
