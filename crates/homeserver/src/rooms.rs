//! What users do to rooms: join, leave, send, create; and which servers a room has.
//!
//! No rule is decided here. A request is turned into a machine of `crates/room` and driven; what remains is
//! the order of the steps: alias, lock, local or remote, and the answers that one room gives about another.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use protocol::id::{EventId, RoomAlias, RoomId, ServerName, UserId};
use protocol::room_version::RoomVersion;
use rand::RngExt as _;
use rand::distr::Alphanumeric;
use room::candidates;
use room::effect::{Head, Load, Loaded};
use room::join::{Join, JoinOptions, JoinRequest, Joined};
use room::refusal::Refusal;
use room::restricted::{Allowed, AllowedRooms};
use room::send::{self, Send, Sent, Unsent};
use room::template::Member;
use room::write::Transaction;
use serde_json::{Map, Value};
use storage::load;

use crate::Homeserver;
use crate::drive::{Command, Run, drive};
use crate::error::{MatrixError, Result};

/// Characters of chance in a room id of versions 1 to 11.
const ROOM_ID_CHARS: usize = 18;
/// Times that a restricted join is asked anew because the rule changed under it.
const RULE_ROUNDS_MAX: u32 = 3;

/// An event that a client wants in a room.
#[derive(Clone, Debug)]
pub struct Draft {
    pub sender: UserId,
    pub kind: String,
    pub state_key: Option<String>,
    pub content: Value,
    pub redacts: Option<EventId>,
    /// Device and txn id of the request.
    pub txn: Option<(String, String)>,
    pub origin_server_ts: Option<i64>,
}

impl From<Draft> for send::Draft {
    fn from(draft: Draft) -> Self {
        let user = draft.sender.clone();
        Self {
            sender: draft.sender,
            kind: draft.kind,
            state_key: draft.state_key,
            content: draft.content,
            redacts: draft.redacts,
            origin_server_ts: draft.origin_server_ts,
            transaction: draft.txn.map(|(device, txn_id)| Transaction {
                user,
                device,
                txn_id,
            }),
        }
    }
}

/// Handshakes under way: one at a time for each room (J-22), and the way to cancel each.
#[derive(Default)]
pub struct Handshakes {
    locks: Mutex<HashMap<RoomId, Weak<tokio::sync::Mutex<()>>>>,
    commands: Mutex<HashMap<i64, tokio::sync::mpsc::Sender<Command<Join>>>>,
}

impl Handshakes {
    pub(crate) fn lock_of(&self, room: &RoomId) -> Arc<tokio::sync::Mutex<()>> {
        let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        locks.retain(|_, lock| lock.strong_count() > 0);
        let lock = locks.get(room).and_then(Weak::upgrade).unwrap_or_default();
        locks.insert(room.clone(), Arc::downgrade(&lock));
        lock
    }
}

pub struct Rooms<'a> {
    pub(crate) hs: &'a Homeserver,
}

impl Homeserver {
    pub fn rooms(&self) -> Rooms<'_> {
        Rooms { hs: self }
    }
}

impl From<Refusal> for MatrixError {
    fn from(refusal: Refusal) -> Self {
        let mut error = Self::new(refusal.status, refusal.errcode, refusal.message);
        error.extra = refusal.extra;
        error
    }
}

/// The server stops; the client may ask the next one.
pub(crate) fn stopping() -> MatrixError {
    MatrixError::new(503, "M_UNKNOWN", "The server is stopping")
}

// -- reading --------------------------------------------------------------------------------------

impl Rooms<'_> {
    pub(crate) async fn head(&self, room: &RoomId) -> storage::Result<Option<Box<Head>>> {
        match load::load(self.hs.store(), room, Load::Head).await? {
            Loaded::Head(head) => Ok(head),
            _ => Ok(None),
        }
    }

    /// The other servers in a room; for a partial one the approximation: the join list and whoever is
    /// known to have a member (P-1: the list is read first).
    pub async fn servers(&self, room: &RoomId) -> storage::Result<Vec<ServerName>> {
        let head = self.head(room).await?;
        let mut servers: std::collections::BTreeSet<ServerName> = match &head {
            Some(head) => head
                .partial
                .iter()
                .flat_map(|marker| marker.servers_in_room.iter().chain([&marker.joined_via]))
                .cloned()
                .collect(),
            None => return Ok(Vec::new()),
        };
        if let Loaded::Hosts(hosts) = load::load(self.hs.store(), room, Load::Hosts).await? {
            servers.extend(hosts);
        }
        servers.remove(&self.hs.config().server_name);
        Ok(servers.into_iter().collect())
    }

    /// The membership of a user in the current state, or out of band.
    pub(crate) async fn membership(
        &self,
        room: &RoomId,
        user: &UserId,
    ) -> storage::Result<Option<String>> {
        let (room, user) = (room.clone(), user.clone());
        self.hs
            .store()
            .read(move |c| {
                let all = storage::sync_reads::memberships(c, &user)?;
                Ok(all
                    .into_iter()
                    .find(|m| m.room == room)
                    .map(|m| m.membership))
            })
            .await
    }

    /// How a user stands in the rooms that a restricted rule allows.
    pub(crate) async fn allowed(
        &self,
        user: &UserId,
        rooms: Vec<RoomId>,
    ) -> storage::Result<AllowedRooms> {
        let mut allowed = BTreeMap::new();
        for room in rooms {
            let seen = match self.head(&room).await? {
                Some(head) if !head.local_joined.is_empty() => {
                    let (asked, who) = (room.clone(), user.clone());
                    let joined = self
                        .hs
                        .store()
                        .read(move |c| storage::sync_reads::is_joined(c, &asked, &who))
                        .await?;
                    match (joined, head.partial) {
                        (true, _) => Allowed::Joined,
                        (false, None) => Allowed::NotJoined,
                        (false, Some(_)) => Allowed::Unknown,
                    }
                }
                _ => Allowed::Unknown,
            };
            allowed.insert(room, seen);
        }
        Ok(allowed)
    }
}

// -- sending --------------------------------------------------------------------------------------

impl Rooms<'_> {
    /// Sends one event of a local user into a room we are in. A state event that says what the state says
    /// already yields the id of the present one.
    pub async fn send(&self, draft: Draft, room: &RoomId) -> Result<EventId> {
        let sent = self.send_all(vec![draft.into()], room).await?;
        sent.events
            .into_iter()
            .next_back()
            .map(|event| event.event_id)
            .ok_or_else(|| MatrixError::internal("Nothing was sent"))
    }

    /// Ties the room's forward extremities together by an event of one of our users.
    pub(crate) async fn send_dummy(&self, room: &RoomId) -> Result<()> {
        let head = self.head(room).await?;
        let Some(user) = head.and_then(|head| head.local_joined.first().cloned()) else {
            return Ok(());
        };
        self.send_all(vec![send::Draft::dummy(user)], room)
            .await
            .map(drop)
    }

    pub(crate) async fn send_all(&self, drafts: Vec<send::Draft>, room: &RoomId) -> Result<Sent> {
        match self.try_send(drafts, room).await? {
            Ok(sent) => Ok(sent),
            Err(Unsent::Refused(refusal)) => Err(refusal.into()),
            Err(Unsent::AskAllowed(_) | Unsent::JoinRemotely(_)) => Err(MatrixError::forbidden(
                "The room's join rules do not let you in",
            )),
        }
    }

    /// Sends, answering what a restricted join wants to know of other rooms.
    async fn try_send(
        &self,
        drafts: Vec<send::Draft>,
        room: &RoomId,
    ) -> Result<std::result::Result<Sent, Unsent>> {
        let mut allowed = None;
        for _ in 0..RULE_ROUNDS_MAX {
            let machine = Send::new(
                self.hs.own().clone(),
                room.clone(),
                drafts.clone(),
                allowed.take(),
                self.hs.clock().now(),
            );
            let sent = drive(self.hs, Run::of(machine))
                .await
                .ok_or_else(stopping)?;
            match (sent, drafts.first()) {
                (Err(Unsent::AskAllowed(rooms)), Some(first)) => {
                    allowed = Some(self.allowed(&first.sender, rooms).await?);
                }
                (sent, _) => return Ok(sent),
            }
        }
        Err(MatrixError::forbidden(
            "The room's join rules keep changing",
        ))
    }

    /// Makes a room. The first draft is its create event; all are stored in one commit.
    pub async fn create(
        &self,
        creator: &UserId,
        version: RoomVersion,
        drafts: Vec<Draft>,
    ) -> Result<RoomId> {
        let name = &self.hs.config().server_name;
        let room = match version.rules().room_id_is_create_hash {
            true => None,
            false => {
                let opaque: String = rand::rng()
                    .sample_iter(Alphanumeric)
                    .take(ROOM_ID_CHARS)
                    .map(char::from)
                    .collect();
                let room = RoomId::parse(&format!("!{opaque}:{name}"));
                Some(room.map_err(|_| {
                    MatrixError::internal("The server's name is too long for a room id")
                })?)
            }
        };
        tracing::debug!(%creator, version = version.as_str(), "creating a room");
        let drafts = drafts.into_iter().map(Into::into).collect();
        let machine = Send::create(
            self.hs.own().clone(),
            version,
            room,
            drafts,
            self.hs.clock().now(),
        )?;
        match drive(self.hs, Run::of(machine))
            .await
            .ok_or_else(stopping)?
        {
            Ok(sent) => Ok(sent.room),
            Err(Unsent::Refused(refusal)) => Err(refusal.into()),
            Err(_) => Err(MatrixError::internal("A new room asked for other rooms")),
        }
    }

    /// Tells every room of a user about a changed profile (J-18: never waits for a resync).
    pub async fn update_profile(&self, user: &UserId) -> Result<()> {
        let who = user.clone();
        let rooms = self
            .hs
            .store()
            .read(move |c| storage::sync_reads::memberships(c, &who))
            .await?;
        let member = self.member(user, None).await?;
        for joined in rooms.into_iter().filter(|m| m.membership == "join") {
            let draft = send::Draft::state(
                user.clone(),
                "m.room.member",
                user.as_str(),
                content_of("join", &member),
            );
            if let Err(error) = self.send_all(vec![draft], &joined.room).await {
                tracing::warn!(%user, room = %joined.room, %error, "a room did not take the new profile");
            }
        }
        Ok(())
    }

    /// What our user puts into member events. A user without a profile joins all the same (J-34).
    pub(crate) async fn member(&self, user: &UserId, reason: Option<String>) -> Result<Member> {
        let profile = self.hs.local_profile(user).await?.unwrap_or_default();
        let text = |key: &str| profile.get(key).and_then(Value::as_str).map(str::to_owned);
        Ok(Member {
            displayname: text("displayname"),
            avatar_url: text("avatar_url"),
            reason,
            extra: Map::new(),
        })
    }
}

pub(crate) fn content_of(membership: &str, member: &Member) -> Value {
    Value::Object(member.content(membership))
}

// -- joining --------------------------------------------------------------------------------------

/// What a client may say along with a join.
#[derive(Clone, Debug, Default)]
pub struct JoinWish {
    /// Servers to ask besides those that the target names.
    pub via: Vec<ServerName>,
    pub reason: Option<String>,
    /// What an identity server signed for the holder of an invite by identifier (J-82).
    pub third_party_signed: Option<Value>,
    /// Further keys for the membership event.
    pub extra: Map<String, Value>,
}

/// What comes of an attempt to join without another server.
enum Local {
    Joined,
    /// It takes a handshake; these servers may be in the room.
    Handshake(Vec<ServerName>),
}

impl Rooms<'_> {
    /// `POST /join/{roomIdOrAlias}`. Returns when the room is usable; the rest is opened behind.
    pub async fn join(&self, user: &UserId, target: &str, wish: JoinWish) -> Result<RoomId> {
        let (room, servers) = self.resolve(target, wish.via).await?;
        let guest = self.hs.check_guest(user, &room).await?;
        if self.hs.room_blocked_by(&room).await?.is_some() {
            return Err(MatrixError::forbidden(
                "This room has been blocked on this server",
            ));
        }
        if let Some(signed) = wish.third_party_signed {
            self.hs.redeem_for(&room, user, signed).await?;
        }
        let mut member = self.member(user, wish.reason).await?;
        member.extra = wish.extra;
        if guest {
            member.extra.insert("kind".to_owned(), "guest".into());
        }
        let room = self.enter(room, user, member, servers).await?;
        if guest {
            // The door may have been shut meanwhile.
            self.hs.send_guests_out(room.clone()).await;
        }
        Ok(room)
    }

    async fn enter(
        &self,
        room: RoomId,
        user: &UserId,
        member: Member,
        servers: Vec<ServerName>,
    ) -> Result<RoomId> {
        match self.join_locally(&room, user, &member, &servers).await? {
            Local::Joined => return Ok(room),
            Local::Handshake(_) => {}
        }
        let lock = self.hs.handshakes().lock_of(&room);
        let _one_at_a_time = lock.lock_owned().await;
        // Another user of ours may have opened the door meanwhile (J-22), or the room may have become full.
        let servers = match self.join_locally(&room, user, &member, &servers).await? {
            Local::Joined => return Ok(room),
            Local::Handshake(servers) => servers,
        };
        let head = self.head(&room).await?;
        let candidates = self
            .candidates(&room, user, servers, head.as_deref())
            .await?;
        self.join_remotely(room, user, member, candidates).await
    }

    /// Joins without another server, where that can be (J-16 to J-20).
    async fn join_locally(
        &self,
        room: &RoomId,
        user: &UserId,
        member: &Member,
        via: &[ServerName],
    ) -> Result<Local> {
        let elsewhere = || Ok(Local::Handshake(via.to_vec()));
        let Some(head) = self
            .head(room)
            .await?
            .filter(|head| !head.local_joined.is_empty())
        else {
            return elsewhere();
        };
        let membership = self.membership(room, user).await?;
        if membership.as_deref() == Some("ban") {
            return Err(MatrixError::forbidden("You are banned from this room"));
        }
        // What we see of a partial room may hide a ban: a full server must vet the join (J-17).
        if head.partial.is_some() && membership.as_deref() != Some("join") {
            return elsewhere();
        }
        let draft = send::Draft::state(
            user.clone(),
            "m.room.member",
            user.as_str(),
            content_of("join", member),
        );
        match self.try_send(vec![draft], room).await? {
            Ok(_) => Ok(Local::Joined),
            Err(Unsent::JoinRemotely(mut servers)) => {
                servers.extend_from_slice(via);
                Ok(Local::Handshake(servers))
            }
            Err(Unsent::Refused(refusal)) => Err(refusal.into()),
            Err(Unsent::AskAllowed(_)) => Err(MatrixError::forbidden("You may not join this room")),
        }
    }

    /// Who may be asked, best first (J-12 to J-17).
    pub(crate) async fn candidates(
        &self,
        room: &RoomId,
        user: &UserId,
        servers: Vec<ServerName>,
        head: Option<&Head>,
    ) -> Result<Vec<ServerName>> {
        let mut sources = servers;
        if let Some(marker) = head.and_then(|head| head.partial.as_ref()) {
            sources.push(marker.joined_via.clone());
            sources.extend(marker.servers_in_room.iter().cloned());
        }
        let load = Load::OutOfBand { user: user.clone() };
        if let Loaded::OutOfBand(Some(invite)) = load::load(self.hs.store(), room, load).await?
            && &*invite.membership == "invite"
        {
            // J-13: whoever invites is, as a rule, in the room.
            sources.push(invite.pdu.sender.server_name());
            sources.push(invite.via.clone());
        }
        let own = &self.hs.config().server_name;
        if sources.iter().all(|server| server == own) {
            sources.extend(room.server_name());
        }
        Ok(candidates::order(&sources, own))
    }

    async fn join_remotely(
        &self,
        room: RoomId,
        user: &UserId,
        member: Member,
        candidates: Vec<ServerName>,
    ) -> Result<RoomId> {
        if candidates.is_empty() {
            return Err(MatrixError::not_found(
                "No servers that are in the room have been provided",
            ));
        }
        let job = self.hs.jobs().open(&room, user).await?;
        let request = JoinRequest {
            room: room.clone(),
            user: user.clone(),
            candidates,
            member,
            job,
            device_lists_at: self.device_lists_at().await?,
        };
        let machine = Join::new(self.hs.own().clone(), request, self.join_options());
        let outcome = self.run_join(machine, job).await?;
        self.after_join(&room, user, job, outcome).map(|()| room)
    }

    pub(crate) async fn device_lists_at(&self) -> storage::Result<i64> {
        use storage::streams::{Stream, position};
        self.hs
            .store()
            .read(|c| position(c, Stream::DeviceLists))
            .await
    }

    pub(crate) fn join_options(&self) -> JoinOptions {
        let settings = &self.hs.config().join;
        JoinOptions {
            race_send_join: settings.race_send_join,
            members_first: Some(settings.members_first),
            ask_for_left_out: settings.ask_for_left_out,
        }
    }

    pub(crate) async fn run_join(
        &self,
        machine: Join,
        job: i64,
    ) -> Result<std::result::Result<Joined, Refusal>> {
        let (sender, commands) = tokio::sync::mpsc::channel(1);
        let running = &self.hs.handshakes().commands;
        running
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(job, sender);
        let outcome = drive(
            self.hs,
            Run {
                machine,
                job: Some(job),
                commands: Some(commands),
            },
        )
        .await;
        running
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&job);
        self.hs.workers().handshake_ended();
        outcome.ok_or_else(stopping)
    }

    /// Takes a handshake back as far as it still can be. `false` when none is under way.
    pub(crate) fn cancel_join(&self, job: i64) -> bool {
        self.command_join(job, Box::new(|join: &mut Join, _now| join.cancel()))
    }

    /// Has a handshake ask this server next. `false` when none is under way.
    pub(crate) fn join_through(&self, job: i64, server: ServerName) -> bool {
        let command: Command<Join> = Box::new(move |join, now| join.use_server(server, now));
        self.command_join(job, command)
    }

    fn command_join(&self, job: i64, command: Command<Join>) -> bool {
        let handshakes = self.hs.handshakes();
        let commands = handshakes.commands.lock();
        let commands = commands.unwrap_or_else(PoisonError::into_inner);
        let sender = commands.get(&job);
        sender.is_some_and(|sender| sender.try_send(command).is_ok())
    }

    pub(crate) fn after_join(
        &self,
        room: &RoomId,
        user: &UserId,
        job: i64,
        outcome: std::result::Result<Joined, Refusal>,
    ) -> Result<()> {
        match outcome {
            Ok(joined) => {
                tracing::info!(%room, %user, partial = joined.partial, "joined");
                if joined.partial {
                    self.hs.tasks().start_resync(room.clone(), None);
                } else {
                    self.hs.jobs().close(job, "full", None);
                }
                Ok(())
            }
            Err(refusal) => {
                tracing::info!(%room, %user, %refusal, "a join failed");
                self.hs
                    .jobs()
                    .close(job, "failed", Some(refusal.to_string()));
                self.hs.tasks().pay_debts();
                Err(refusal.into())
            }
        }
    }

    /// The room behind an id or alias, and who may know it, best first.
    pub(crate) async fn resolve(
        &self,
        target: &str,
        via: Vec<ServerName>,
    ) -> Result<(RoomId, Vec<ServerName>)> {
        if target.starts_with('!') {
            let room = RoomId::parse(target)
                .map_err(|_| MatrixError::invalid_param("That is no room id"))?;
            return Ok((room, via));
        }
        let alias = RoomAlias::parse(target).map_err(|_| {
            MatrixError::invalid_param("That is neither a room id nor a room alias")
        })?;
        let (room, mut servers) = self.hs.directory().resolve(&alias).await?;
        // The directory server knows the room, if it says so itself (J-10); the client's own hints come last.
        let directory = alias.server_name();
        if let Some(at) = servers.iter().position(|server| *server == directory) {
            servers[..=at].rotate_right(1);
        }
        servers.extend(via);
        Ok((room, servers))
    }
}
