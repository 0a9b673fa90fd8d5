//! Reports of content, kept for administrators.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#reporting-content>

use protocol::id::{EventId, RoomId, UserId};
use storage::Sequence;
use storage::reports::{self, Report};

use crate::Homeserver;
use crate::error::{MatrixError, Result};
use crate::room_view::Reader;

/// A longer reason is cut.
const REASON_CHARS_MAX: usize = 2_000;

pub enum Subject {
    Event(RoomId, EventId),
    Room(RoomId),
    User(UserId),
}

pub async fn report(
    homeserver: &Homeserver,
    reporter: &UserId,
    subject: Subject,
    reason: Option<String>,
) -> Result<()> {
    if let Subject::Event(room, event) = &subject {
        let reader = Reader {
            user: reporter.clone(),
            device: None,
        };
        // Who may not see an event can not learn from an answer that it is there.
        crate::messages::event(homeserver, &reader, room, event)
            .await
            .map_err(|_| MatrixError::not_found("There is no such event that you may see"))?;
    }
    let (room, event, user) = match subject {
        Subject::Event(room, event) => (Some(room), Some(event), None),
        Subject::Room(room) => (Some(room), None, None),
        Subject::User(user) => (None, None, Some(user)),
    };
    let report = Report {
        reporter: reporter.clone(),
        room,
        event,
        user,
        reason: reason.map(|text| text.chars().take(REASON_CHARS_MAX).collect()),
        ts: homeserver.clock().unix_ms(),
    };
    let number = homeserver.store().number(Sequence::Other).await?;
    homeserver
        .store()
        .write(move |c| reports::add(c, number, &report))
        .await?;
    Ok(())
}
