//! What changed for this device since this token.
//!
//! One answer is read from one snapshot of the store. Nothing new: wait for the notifier and look again,
//! until the client's time is over. Partial rooms: joins.md 3.4 (P-25 to P-38).
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#syncing>

mod build;
mod devices;
pub mod filter;
pub mod lazy;
mod room;
pub mod token;

use std::sync::Arc;
use std::time::Duration;

use protocol::id::{RoomId, UserId};
use protocol::nid::EventNid;
use serde_json::{Map, Value, json};

use crate::Homeserver;
use crate::error::{MatrixError, Result};
use crate::notifier::{Topic, Wakeups};
use crate::room_view::Reader;
use filter::Filter;
use lazy::SentMembers;
use token::SyncToken;

/// A client that wants to wait longer is answered after this.
const TIMEOUT_MAX: Duration = Duration::from_secs(120);
/// How long an answer waits for the counts of what it tells.
const COUNT_MAX: Duration = Duration::from_millis(500);
/// Rooms whose changes end a wait. In a user with more, the rest is seen at the next look.
const WATCHED_ROOMS_MAX: usize = 5_000;

/// A client that knows of partial rooms.
const LAZY: &str = r#"{"room": {"state": {"lazy_load_members": true}}}"#;

/// A request as it came.
#[derive(Clone, Debug, Default)]
pub struct SyncAsked {
    /// A filter id, or a filter.
    pub filter: Option<String>,
    pub since: Option<String>,
    pub full_state: bool,
    pub timeout_ms: u64,
    /// MSC4222
    pub use_state_after: bool,
}

/// A request as it is understood.
#[derive(Clone, Debug)]
pub struct Ask {
    pub reader: Reader,
    pub since: Option<SyncToken>,
    pub filter: Filter,
    pub full_state: bool,
    pub use_state_after: bool,
    pub now_ms: i64,
}

/// The answer to one look.
pub struct Built {
    pub body: Map<String, Value>,
    pub next: SyncToken,
    /// Whether there is anything that the client does not know yet.
    pub anything: bool,
    /// Rooms in which something may happen that this user sees.
    pub rooms: Vec<RoomId>,
    /// Something is told over which the push rules have not been run so far.
    pub uncounted: bool,
    pub sent: Vec<SentNow>,
}

/// Members that an answer tells a device of.
pub struct SentNow {
    pub key: (UserId, String, RoomId),
    pub members: Vec<(UserId, EventNid)>,
}

/// What sync keeps in memory between requests.
#[derive(Default)]
pub struct Memory {
    sent: Arc<SentMembers>,
}

pub async fn sync(homeserver: &Homeserver, reader: &Reader, asked: SyncAsked) -> Result<Value> {
    let since = match asked.since.as_deref().filter(|text| !text.is_empty()) {
        None => None,
        Some(text) => Some(
            SyncToken::parse(text)
                .ok_or_else(|| MatrixError::invalid_param("since is no token of this server"))?,
        ),
    };
    let filter = read_filter(homeserver, &reader.user, asked.filter.as_deref()).await?;
    if let Some(since) = &since {
        acknowledge(homeserver, reader, since).await?;
    }
    let ask = Ask {
        reader: reader.clone(),
        since,
        filter,
        full_state: asked.full_state,
        use_state_after: asked.use_state_after,
        now_ms: homeserver.clock().unix_ms(),
    };
    let wait = Duration::from_millis(asked.timeout_ms).min(TIMEOUT_MAX);
    let built = look_until(homeserver, ask, wait).await?;
    for sent in built.sent {
        let memory = &homeserver.sync_memory().sent;
        memory.record(sent.key, sent.members, built.next.events);
    }
    let mut body = built.body;
    body.insert("next_batch".to_owned(), Value::from(built.next.to_string()));
    Ok(Value::Object(body))
}

/// `GET /keys/changes`: whose devices changed since a sync token, and who is out of sight since. It looks as
/// /sync would, in partial rooms too.
pub async fn key_changes(homeserver: &Homeserver, reader: &Reader, from: &str) -> Result<Value> {
    let since = SyncToken::parse(from)
        .ok_or_else(|| MatrixError::invalid_param("from is no token of this server"))?;
    let ask = Ask {
        reader: reader.clone(),
        since: Some(since),
        filter: Filter::parse(LAZY)?,
        full_state: false,
        use_state_after: false,
        now_ms: homeserver.clock().unix_ms(),
    };
    let mut built = look(homeserver, &Arc::new(ask)).await?;
    let lists = built.body.remove("device_lists");
    Ok(lists.unwrap_or_else(|| json!({ "changed": [], "left": [] })))
}

async fn read_filter(
    homeserver: &Homeserver,
    user: &UserId,
    given: Option<&str>,
) -> Result<Filter> {
    let Some(given) = given else {
        return Ok(Filter::default());
    };
    if given.starts_with('{') {
        return Filter::parse(given);
    }
    let unknown = || MatrixError::invalid_param("No such filter");
    let id: i64 = given.parse().map_err(|_| unknown())?;
    let user = user.clone();
    let text = homeserver
        .store()
        .read(move |c| storage::account_data::get_filter(c, &user, id))
        .await?
        .ok_or_else(unknown)?;
    Filter::parse(&text)
}

/// The token proves that the messages up to it arrived.
async fn acknowledge(homeserver: &Homeserver, reader: &Reader, since: &SyncToken) -> Result<()> {
    let Some(device) = reader.device.clone() else {
        return Ok(());
    };
    let user = reader.user.clone();
    let up_to = since.to_device;
    let (asked_user, asked_device) = (user.clone(), device.clone());
    let waiting = homeserver
        .store()
        .read(move |c| {
            let oldest = storage::to_device::since(c, &asked_user, &asked_device, 0, up_to, 1)?;
            Ok(!oldest.is_empty())
        })
        .await?;
    if waiting {
        homeserver
            .store()
            .write(move |c| storage::to_device::acknowledge(c, &user, &device, up_to))
            .await?;
    }
    Ok(())
}

/// Looks; with nothing to tell, waits and looks again. Subscribes before it looks a last time, so that
/// nothing is missed in between.
async fn look_until(homeserver: &Homeserver, ask: Ask, wait: Duration) -> Result<Built> {
    let deadline = tokio::time::Instant::now() + wait;
    let ask = Arc::new(ask);
    let mut built = look_counted(homeserver, &ask).await?;
    let at_once = wait.is_zero() || ask.since.is_none() || ask.full_state;
    if at_once || built.anything {
        return Ok(built);
    }
    loop {
        let mut wakeups = Wakeups::new(
            homeserver.notifier(),
            topics(&ask.reader.user, &built.rooms),
        );
        built = look_counted(homeserver, &ask).await?;
        if built.anything {
            return Ok(built);
        }
        tokio::select! {
            biased;
            () = tokio::time::sleep_until(deadline) => return look(homeserver, &ask).await,
            () = wakeups.next() => {}
            () = homeserver.stopping().cancelled_owned() => return Ok(built),
        }
    }
}

fn topics(user: &UserId, rooms: &[RoomId]) -> Vec<Topic> {
    let rooms = rooms.iter().take(WATCHED_ROOMS_MAX);
    std::iter::once(Topic::User(user.clone()))
        .chain(rooms.map(|room| Topic::Room(room.clone())))
        .collect()
}

/// What is told is counted, unless that takes too long: who has an event without its count has no reason to
/// ask for it again before the next event.
async fn look_counted(homeserver: &Homeserver, ask: &Arc<Ask>) -> Result<Built> {
    let mut built = look(homeserver, ask).await?;
    let deadline = tokio::time::Instant::now() + COUNT_MAX;
    while built.uncounted {
        let mut wakeups = Wakeups::new(
            homeserver.notifier(),
            topics(&ask.reader.user, &built.rooms),
        );
        built = look(homeserver, ask).await?;
        if !built.uncounted {
            break;
        }
        tokio::select! {
            biased;
            () = tokio::time::sleep_until(deadline) => break,
            () = wakeups.next() => {}
        }
    }
    Ok(built)
}

async fn look(homeserver: &Homeserver, ask: &Arc<Ask>) -> Result<Built> {
    let ask = Arc::clone(ask);
    let typing = Arc::clone(homeserver.typing());
    let sent = Arc::clone(&homeserver.sync_memory().sent);
    let built = homeserver
        .store()
        .read(move |c| build::build(c, &ask, &typing, &sent))
        .await?;
    Ok(built)
}
