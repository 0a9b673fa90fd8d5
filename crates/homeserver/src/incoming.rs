//! Transactions from other servers: answered once, staged durably, and taken room by room, in order.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#transactions>
//!
//! What is answered `{}` is on disk (joins.md P-22a), so a crash loses nothing: each room's worker takes up
//! what is staged. Rooms do not wait for each other, and nothing here waits for a resync (P-22, P-22b).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use protocol::edu::Edu;
use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use room::acl;
use room::effect::{BadPdu, Fault};
use room::receive::{Incoming, Receive, Received};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use storage::queues::{self, Staged};
use storage::{Sequence, federation_reads, rooms};
use tokio::sync::Notify;

use crate::drive::{Run, drive};
use crate::error::{MatrixError, Result};
use crate::{Homeserver, checks};

/// The spec's limits for one transaction.
const PDUS_MAX: usize = 50;
const EDUS_MAX: usize = 100;
/// Staged PDUs that one run of a room's worker takes; they are all of one origin.
const BATCH_MAX: i64 = 50;
/// PDUs staged for one room beyond this many are refused: the sender keeps them and tries again.
const STAGED_MAX: i64 = 20_000;
/// A room whose join of ours is still under way (J-65) waits for the end of that, and looks again this often.
const POSTPONED: Duration = Duration::from_secs(1);
/// A PDU is put off when nobody was reached who knows what it stands on: this long the first time, and four
/// times longer each time after that.
const DEFER_MS: i64 = 2_000;
const DEFER_MS_MAX: i64 = 3_600_000;
/// Then it is given up. Whoever sends something that follows it gives it another chance.
const DEFERRALS_MAX: i64 = 12;
/// So often it is tried again as soon as its sender is heard of; a sender that can speak and never be spoken to
/// would use up its chances in no time.
const RECALLS_MAX: i64 = 3;
const DEFERRED_AGE_MS_MAX: i64 = 24 * 3600 * 1000;
/// A transaction's answer is remembered for a day.
const SEEN_MS: i64 = 24 * 3600 * 1000;

/// Rooms whose worker runs; `true`: something was staged since it last looked.
#[derive(Default)]
pub struct Workers {
    rooms: Mutex<BTreeMap<RoomId, bool>>,
    /// Rooms whose worker is woken at some time, as something is put off until then.
    alarms: Mutex<BTreeMap<RoomId, i64>>,
    /// Servers something of which was put off since they were heard of last.
    awaited: Mutex<BTreeSet<ServerName>>,
    /// A handshake of ours has ended.
    settled: Notify,
}

impl Workers {
    /// What waited for the end of a handshake may go on.
    pub(crate) fn handshake_ended(&self) {
        self.settled.notify_waiters();
    }
}

#[derive(Deserialize)]
struct Transaction<'a> {
    #[serde(borrow, default)]
    pdus: Vec<&'a RawValue>,
    #[serde(default)]
    edus: Vec<Value>,
}

/// What can be read of a PDU before its room's version is known.
#[derive(Deserialize)]
struct Envelope {
    room_id: Option<RoomId>,
}

impl Homeserver {
    /// `PUT /send/{txnId}`. The answer: `pdus`, a result for each event id.
    pub async fn take_transaction(
        &self,
        origin: &ServerName,
        txn_id: &str,
        body: &[u8],
    ) -> Result<Value> {
        let transaction: Transaction<'_> = serde_json::from_slice(body)
            .map_err(|_| MatrixError::bad_json("That is no transaction"))?;
        if transaction.pdus.len() > PDUS_MAX || transaction.edus.len() > EDUS_MAX {
            return Err(MatrixError::bad_json(
                "A transaction holds at most 50 PDUs and 100 EDUs",
            ));
        }
        let (from, txn) = (origin.clone(), txn_id.to_owned());
        let seen = self
            .store()
            .read(move |c| queues::seen_transaction(c, &from, &txn))
            .await?;
        if let Some(answer) = seen {
            return Ok(serde_json::from_str(&answer).unwrap_or_else(|_| json!({ "pdus": {} })));
        }
        self.outgoing().is_back(origin).await;
        self.recall(origin).await?;
        let pdus: Vec<String> = transaction
            .pdus
            .iter()
            .map(|pdu| pdu.get().to_owned())
            .collect();
        let (results, staged) = self.judge(origin, pdus).await?;
        let answer = json!({ "pdus": results });
        self.stage(origin, txn_id, &answer, staged).await?;
        for edu in &transaction.edus {
            if let Some(edu) = Edu::parse(edu)
                && let Err(error) = self.take_edu(origin, edu).await
            {
                tracing::warn!(%origin, %error, "an EDU was lost");
            }
        }
        Ok(answer)
    }

    /// The result of each PDU, and which are to be staged, in their order.
    async fn judge(
        &self,
        origin: &ServerName,
        pdus: Vec<String>,
    ) -> Result<(Map<String, Value>, Vec<(RoomId, String)>)> {
        let mut doors: BTreeMap<RoomId, Option<Door>> = BTreeMap::new();
        let mut by_version: BTreeMap<RoomVersion, Vec<(usize, RoomId)>> = BTreeMap::new();
        for (at, pdu) in pdus.iter().enumerate() {
            let Ok(Envelope {
                room_id: Some(room),
            }) = serde_json::from_str::<Envelope>(pdu)
            else {
                continue;
            };
            if !doors.contains_key(&room) {
                let door = self.door(&room, origin).await?;
                doors.insert(room.clone(), door);
            }
            // A room we know nothing of: nothing to say, nothing to keep (P-24).
            if let Some(Some(door)) = doors.get(&room) {
                by_version.entry(door.version).or_default().push((at, room));
            }
        }
        let mut results = Map::new();
        let mut staged: BTreeMap<usize, (RoomId, String)> = BTreeMap::new();
        for (version, entries) in by_version {
            let raw = entries
                .iter()
                .map(|(at, _)| pdus[*at].as_str().into())
                .collect();
            let checked = checks::check(self, version, raw).await;
            for ((at, room), verdict) in entries.into_iter().zip(checked) {
                let open = matches!(doors.get(&room), Some(Some(door)) if door.open);
                let (event_id, result) = judge_one(&pdus[at], version, verdict, open);
                if result.is_none() {
                    staged.insert(at, (room, pdus[at].clone()));
                }
                if let Some(event_id) = event_id {
                    let result = result
                        .flatten()
                        .map_or_else(|| json!({}), |error| json!({ "error": error }));
                    results.insert(event_id.to_string(), result);
                }
            }
        }
        Ok((results, staged.into_values().collect()))
    }

    /// The room's version, and whether its ACL lets this server in.
    async fn door(&self, room: &RoomId, origin: &ServerName) -> Result<Option<Door>> {
        let (asked, from) = (room.clone(), origin.clone());
        let found = self
            .store()
            .read(move |c| {
                let row = rooms::by_id(c, &asked)?;
                Ok((row, federation_reads::asker(c, &asked, &from)?))
            })
            .await?;
        let (Some(row), asker) = found else {
            return Ok(None);
        };
        let acl = asker.and_then(|asker| asker.acl);
        Ok(Some(Door {
            version: row.version,
            open: acl::allows(acl.as_deref(), origin),
        }))
    }

    async fn stage(
        &self,
        origin: &ServerName,
        txn_id: &str,
        answer: &Value,
        staged: Vec<(RoomId, String)>,
    ) -> Result<()> {
        let first = self
            .store()
            .numbers(Sequence::Other, staged.len())
            .await?
            .start;
        let rows: Vec<(i64, RoomId, String)> = staged
            .into_iter()
            .zip(first..)
            .map(|((room, pdu), number)| (number, room, pdu))
            .collect();
        let rooms: BTreeSet<RoomId> = rows.iter().map(|(_, room, _)| room.clone()).collect();
        let (origin, txn_id, answer) = (origin.clone(), txn_id.to_owned(), answer.to_string());
        let now = self.clock().unix_ms();
        let checked = rooms.clone();
        self.store()
            .write(move |c| {
                for room in &checked {
                    if queues::staged_count(c, room)? > STAGED_MAX {
                        return Err(storage::Error::Refused("too much is waiting".to_owned()));
                    }
                }
                queues::take_transaction(c, &origin, &txn_id, &answer, &rows, now)
            })
            .await
            .map_err(|error| match error {
                storage::Error::Refused(_) => MatrixError::limit_exceeded(10_000),
                error => error.into(),
            })?;
        for room in rooms {
            self.work_room(room);
        }
        Ok(())
    }

    /// At boot: what was staged and not taken. And what need not be remembered any more.
    pub(crate) async fn resume_incoming(&self) -> storage::Result<()> {
        let before = self.clock().unix_ms() - SEEN_MS;
        self.store()
            .write(move |c| queues::drop_transactions_before(c, before))
            .await?;
        for room in self.store().read(queues::staged_rooms).await? {
            self.work_room(room);
        }
        Ok(())
    }

    /// Makes sure that somebody takes what is staged for this room.
    fn work_room(&self, room: RoomId) {
        {
            let mut rooms = lock(&self.workers().rooms);
            if let Some(more) = rooms.get_mut(&room) {
                *more = true;
                return;
            }
            rooms.insert(room.clone(), false);
        }
        let hs = self.clone();
        self.spawn_until_stop("incoming", async move { work(&hs, &room).await });
    }

    /// A server is heard of: what it sent and was put off may be taken now.
    async fn recall(&self, origin: &ServerName) -> Result<()> {
        if !lock(&self.workers().awaited).remove(origin) {
            return Ok(());
        }
        let origin = origin.clone();
        let rooms = self
            .store()
            .write(move |c| queues::recall(c, &origin, RECALLS_MAX))
            .await?;
        for room in rooms {
            self.work_room(room);
        }
        Ok(())
    }

    /// Has the room's worker look again when what was put off is due.
    async fn set_alarm(&self, room: &RoomId) -> storage::Result<()> {
        let asked = room.clone();
        let due = self
            .store()
            .read(move |c| queues::next_due(c, &asked))
            .await?;
        let Some(due) = due else {
            return Ok(());
        };
        {
            let mut alarms = lock(&self.workers().alarms);
            if alarms.get(room).is_some_and(|at| *at <= due) {
                return Ok(());
            }
            alarms.insert(room.clone(), due);
        }
        let (hs, room) = (self.clone(), room.clone());
        self.spawn_until_stop("incoming_alarm", async move {
            let wait = u64::try_from(due - hs.clock().unix_ms()).unwrap_or(0);
            tokio::time::sleep(Duration::from_millis(wait)).await;
            {
                let mut alarms = lock(&hs.workers().alarms);
                if alarms.get(&room) == Some(&due) {
                    alarms.remove(&room);
                }
            }
            hs.work_room(room);
        });
        Ok(())
    }

    async fn take_edu(&self, origin: &ServerName, edu: Edu) -> Result<()> {
        match edu {
            Edu::DeviceListUpdate(update) => self.on_device_list_update(origin, update).await,
            Edu::SigningKeyUpdate(update) => self.on_signing_key_update(origin, update).await,
            Edu::DirectToDevice(message) => self.on_direct_to_device(origin, message).await,
            Edu::Presence(updates) => self.on_presence(origin, updates).await,
            Edu::Typing(typing) => {
                let room = &typing.room_id;
                if self.may_tell(origin, room, &typing.user_id).await? {
                    crate::typing::set_remote(self, room, &typing.user_id, typing.typing);
                }
                Ok(())
            }
            Edu::Receipts(receipts) => {
                for receipt in receipts {
                    if self
                        .may_tell(origin, &receipt.room_id, &receipt.user_id)
                        .await?
                    {
                        crate::receipts::take_remote(self, receipt).await?;
                    }
                }
                Ok(())
            }
        }
    }
}

impl Homeserver {
    /// Whether a server may say what its user does in a room: it is in the room, as far as we can see, and
    /// the room's ACL lets it (P-62, P-63, MSC4163).
    async fn may_tell(&self, origin: &ServerName, room: &RoomId, user: &UserId) -> Result<bool> {
        if user.server_str() != origin.as_str() {
            return Ok(false);
        }
        let open = self.door(room, origin).await?.is_some_and(|door| door.open);
        Ok(open && self.rooms().servers(room).await?.contains(origin))
    }
}

struct Door {
    version: RoomVersion,
    open: bool,
}

/// The id under which the result goes, and the result: `None` to stage it, `Some(None)` for `{}`.
fn judge_one(
    raw: &str,
    version: RoomVersion,
    verdict: std::result::Result<Arc<Pdu>, BadPdu>,
    open: bool,
) -> (Option<EventId>, Option<Option<String>>) {
    match verdict {
        Ok(pdu) if open => (Some(pdu.event_id.clone()), None),
        Ok(pdu) => (
            Some(pdu.event_id.clone()),
            Some(Some("the room's ACL shuts your server out".to_owned())),
        ),
        Err(bad) if bad.fault != Fault::Form => {
            let event_id = bad
                .event_id
                .or_else(|| Pdu::parse(raw, version).ok().map(|pdu| pdu.event_id));
            (event_id, Some(Some(bad.reason)))
        }
        // Malformed: dropped without a word, as the spec wants (P-22).
        Err(bad) => (bad.event_id, Some(None)),
    }
}

fn verdict(received: &Received) -> &'static str {
    match received {
        Received::Accepted => "accepted",
        Received::Known => "known",
        Received::OutOfBand => "out_of_band",
        Received::Postponed => "postponed",
        Received::Unreached => "unreached",
        Received::Rejected(_) => "rejected",
        Received::SoftFailed(_) => "soft_failed",
        Received::Refused(_) => "refused",
        Received::Dropped => "dropped",
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn work(hs: &Homeserver, room: &RoomId) {
    loop {
        let settled = hs.workers().settled.notified();
        tokio::pin!(settled);
        settled.as_mut().enable();
        match take_some(hs, room).await {
            Ok(Taken::Some) => continue,
            Ok(Taken::Nothing) => {}
            Ok(Taken::Postponed) => {
                let _told_or_not = tokio::time::timeout(POSTPONED, settled).await;
                continue;
            }
            Err(error) => {
                tracing::error!(%room, %error, "staged PDUs can not be taken");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        }
        if let Err(error) = hs.set_alarm(room).await {
            tracing::error!(%room, %error, "what is put off waits for the next PDU");
        }
        let mut rooms = lock(&hs.workers().rooms);
        match rooms.get_mut(room) {
            Some(more) if *more => *more = false,
            _ => {
                rooms.remove(room);
                return;
            }
        }
    }
}

enum Taken {
    Some,
    Nothing,
    Postponed,
}

/// Takes the oldest staged PDUs of one origin.
async fn take_some(hs: &Homeserver, room: &RoomId) -> Result<Taken> {
    let asked = room.clone();
    let now_ms = hs.clock().unix_ms();
    let (mut staged, row) = hs
        .store()
        .read(move |c| {
            Ok((
                queues::staged(c, &asked, BATCH_MAX, now_ms)?,
                rooms::by_id(c, &asked)?,
            ))
        })
        .await?;
    let (Some(origin), Some(row)) = (staged.first().map(|first| first.origin.clone()), row) else {
        return unstage(hs, staged).await;
    };
    let others = staged.iter().position(|one| one.origin != origin);
    staged.truncate(others.unwrap_or(staged.len()));
    // Their signatures were checked before they were staged.
    let parsed = staged
        .iter()
        .map(|one| (one.number, Pdu::parse(&one.pdu, row.version)));
    let events: Vec<Incoming> = parsed
        .filter_map(|(number, pdu)| {
            Some(Incoming {
                pdu: Arc::new(pdu.ok()?),
                staged: Some(number),
            })
        })
        .collect();
    if events.is_empty() {
        return unstage(hs, staged).await;
    }
    let numbers: BTreeMap<EventId, i64> = events
        .iter()
        .filter_map(|event| Some((event.pdu.event_id.clone(), event.staged?)))
        .collect();
    let machine = Receive::new(
        hs.own().clone(),
        room.clone(),
        origin.clone(),
        events,
        hs.clock().now(),
    );
    let Some(received) = drive(hs, Run::of(machine)).await else {
        return Ok(Taken::Nothing);
    };
    let mut postponed = false;
    let mut unreached: BTreeSet<i64> = BTreeSet::new();
    for (event_id, received) in &received {
        crate::metrics::pdu_received(verdict(received));
        match received {
            Received::Accepted | Received::Known | Received::OutOfBand => {}
            Received::Postponed => postponed = true,
            Received::Unreached => unreached.extend(numbers.get(event_id)),
            other => tracing::info!(%room, %origin, %event_id, ?other, "a PDU was not accepted"),
        }
    }
    let (put_off, dealt_with) = staged
        .into_iter()
        .partition(|one| unreached.contains(&one.number));
    defer(hs, put_off).await?;
    if postponed {
        return Ok(Taken::Postponed);
    }
    // The machine settles each row with the commit that deals with it; what is left has no commit.
    unstage(hs, dealt_with).await?;
    Ok(Taken::Some)
}

/// Puts these off, but for those that were put off for too long.
async fn defer(hs: &Homeserver, staged: Vec<Staged>) -> Result<()> {
    let now = hs.clock().unix_ms();
    let (again, given_up): (Vec<_>, Vec<_>) = staged.into_iter().partition(|one| {
        one.attempts < DEFERRALS_MAX && now - one.received_ms < DEFERRED_AGE_MS_MAX
    });
    for one in &given_up {
        tracing::info!(origin = %one.origin, "a PDU is given up: nobody knows what it stands on");
    }
    unstage(hs, given_up).await?;
    let Some(first) = again.first() else {
        return Ok(());
    };
    lock(&hs.workers().awaited).insert(first.origin.clone());
    hs.store()
        .write(move |c| {
            for one in &again {
                let exponent = u32::try_from(one.attempts).unwrap_or(u32::MAX);
                let pause = 4_i64.saturating_pow(exponent).saturating_mul(DEFER_MS);
                queues::defer(c, one.number, now + pause.min(DEFER_MS_MAX))?;
            }
            Ok(())
        })
        .await?;
    Ok(())
}

async fn unstage(hs: &Homeserver, staged: Vec<Staged>) -> Result<Taken> {
    if staged.is_empty() {
        return Ok(Taken::Nothing);
    }
    let numbers: Vec<i64> = staged.iter().map(|one| one.number).collect();
    hs.store()
        .write(move |c| queues::unstage(c, &numbers))
        .await?;
    Ok(Taken::Some)
}
