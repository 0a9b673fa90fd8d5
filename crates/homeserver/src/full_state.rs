//! Waiting for a partial room to become full (C-34 to C-36).

use protocol::id::RoomId;
use storage::timeline;

use crate::Homeserver;
use crate::error::{MatrixError, Result};
use crate::notifier::{Topic, Wakeups};

/// Returns when the room is full, or no longer held at all (S-29). Holds no connection while it waits, and
/// ends with whoever waits for it (C-35).
pub async fn full_state(homeserver: &Homeserver, room: &RoomId) -> Result<()> {
    let deadline = tokio::time::Instant::now() + homeserver.config().full_state_wait_max;
    loop {
        let mut wakeups = Wakeups::new(homeserver.notifier(), [Topic::Room(room.clone())]);
        if !is_partial(homeserver, room).await? {
            return Ok(());
        }
        homeserver.tasks().is_wanted(room);
        tokio::select! {
            biased;
            () = tokio::time::sleep_until(deadline) => {
                return Err(MatrixError::timed_out(
                    "The members of this room are still being fetched from other servers",
                ));
            }
            () = wakeups.next() => {}
        }
    }
}

pub async fn is_partial(homeserver: &Homeserver, room: &RoomId) -> Result<bool> {
    let room = room.clone();
    let partial = homeserver
        .store()
        .read(move |c| timeline::is_partial(c, &room))
        .await?;
    Ok(partial)
}
