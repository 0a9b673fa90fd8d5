//! What of a full answer to a join was put off until the user is in.
//!
//! A resident that knows nothing of faster joins gives every member. Then the room is opened on what is
//! needed to judge by, as if the members had been left out, and these are verified and stored behind the
//! user, without a word to anybody. It lives in memory: after a crash the resync asks for the state instead.

use std::sync::Arc;

use protocol::id::{EventId, ServerName};
use protocol::pdu::Pdu;

use crate::effect::{RawPdu, Section};

/// The rest of one send_join answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Rest {
    /// Our join; the answer's state is that before it.
    pub join: EventId,
    pub from: ServerName,
    /// Ids of the answer's state that are known so far, good or bad.
    pub state: Vec<EventId>,
    /// Events that came with a wrong signature, to be had from somebody else (J-59).
    pub bad: Vec<EventId>,
    /// Verified, but not stored, as auth events are missing.
    pub left_out: Vec<Arc<Pdu>>,
    /// Not looked at.
    pub held: Vec<(Section, RawPdu)>,
}
