//! Room version to rules: one table (joins.md part 7).
//!
//! <https://spec.matrix.org/v1.18/rooms/>

use serde::{Deserialize, Serialize};

/// A room version this server knows. Anything else is refused, never guessed (V-14).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum RoomVersion {
    V1,
    V2,
    V3,
    V4,
    V5,
    V6,
    V7,
    V8,
    V9,
    V10,
    V11,
    V12,
}
