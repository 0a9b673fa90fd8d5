//! Level 3: whole servers share a room over a bad network; users act through the client API, clients follow
//! by /sync, and servers die and come back.
//!
//! A run has one thread of its own, with paused time and the seed's randomness. It has three parts: *war*, in
//! which users act and faults happen; *peace*, in which the servers get as much time as they want to owe
//! nothing; *talk*, in which each says something, so that all branches of the room meet. Then come the laws.

pub mod client;
pub mod laws;
mod lies;
mod log;
pub mod network;
pub mod server;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use protocol::id::{EventId, RoomId};
use protocol::room_version::RoomVersion;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::chance::Chance;
use crate::{entropy, fixture};
use client::{Follower, User, encode};
use network::{Faults, Network};
use server::{Server, Settings};

/// How long users act, in seconds.
const WAR_S: (u64, u64) = (15, 70);
/// After so long in peace nothing may be owed.
const PATIENCE: Duration = Duration::from_secs(12 * 3600);
/// After so long in peace, users of a room that does not become full see that nothing comes, and leave.
const DESPAIR: Duration = Duration::from_secs(4 * 3600);
/// How often the creator opens the room while somebody waits before it.
const OPEN_EVERY: Duration = Duration::from_secs(60);
/// How often every server speaks in the end.
const ROUNDS_OF_TALK: usize = 3;
/// How often a client sends what is not answered.
const TRIES_MAX: usize = 40;

/// What a run is to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Whatever fails, no law is broken, and when nothing fails any more all is well in the end.
    Safety,
    /// Faults only until some moment, or never: all is well soon.
    Liveness,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Run {
    pub servers_in_room: usize,
    pub promised: usize,
    pub requests: u64,
    pub trace: String,
}

/// Runs one seed. An error is a broken law, with the trace so far; `verbose`: with what the servers logged.
pub fn run(seed: u64, mode: Mode, verbose: bool) -> Result<Run, (String, String)> {
    let body = move || {
        entropy::seed(seed);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime without I/O");
        let result = runtime.block_on(async {
            log::begin(verbose);
            story(seed, mode).await
        });
        drop(runtime);
        let (trace, error) = log::end();
        match (result, error) {
            (Ok(_), Some(error)) => Err((format!("logged: {error}"), trace)),
            (Ok(run), None) => Ok(Run { trace, ..run }),
            (Err(broken), _) => Err((broken, trace)),
        }
    };
    let thread = std::thread::Builder::new().name(format!("seed {seed}"));
    let thread = thread.spawn(body).expect("the system has a thread");
    thread
        .join()
        .unwrap_or_else(|_| Err(("the run panicked".to_owned(), String::new())))
}

async fn story(seed: u64, mode: Mode) -> Result<Run, String> {
    let world = World::new(seed, mode).await?;
    let mut tasks = JoinSet::new();
    let acting = {
        let world = world.clone();
        async move { world.act_out().await }
    };
    tasks.spawn(acting);
    let told = loop {
        tokio::select! {
            biased;
            done = tasks.join_next() => break match done {
                Some(Ok(told)) => told,
                _ => Err("the story panicked".to_owned()),
            },
            () = tokio::time::sleep(Duration::from_secs(1)) => {
                if let Some(broken) = world.broken().or_else(log::error) {
                    break Err(broken);
                }
            }
        }
    };
    tasks.shutdown().await;
    if told.is_err() {
        for server in &world.servers {
            let held = laws::tell(server, &world.room).await?;
            log::detail(|| held);
        }
    }
    world.network.forget_all();
    told
}

/// What all that act in a run share.
struct World {
    mode: Mode,
    chance: Mutex<Chance>,
    network: Arc<Network>,
    servers: Vec<Arc<Server>>,
    /// By server; the first of each follows the room, and nobody puts it out.
    users: Vec<Vec<User>>,
    room: RoomId,
    followers: Vec<Arc<tokio::sync::Mutex<Option<Follower>>>>,
    /// Law 3: what a server said yes to, by server.
    promised: Mutex<BTreeMap<usize, Vec<EventId>>>,
    /// What was said, and how often it may be found.
    said: Mutex<Vec<String>>,
    /// How each server comes into the room.
    ways_in: Mutex<BTreeMap<usize, WayIn>>,
    broken: Mutex<Option<String>>,
    sequence: AtomicU64,
    war_ends: Instant,
    faults_end: Instant,
}

/// An invite that comes by `/invite` alone to a server that is in the room by then is answered with an event
/// that stands on it (J-77), in a state that nobody can know before the invite comes as an event: others may
/// see it otherwise. So a server's first user is invited, or others of it join, not both.
#[derive(Clone, Copy, PartialEq, Eq)]
enum WayIn {
    Open,
    Invited,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    async fn new(seed: u64, mode: Mode) -> Result<Arc<Self>, String> {
        let mut chance = Chance::new(seed);
        let begin = Instant::now();
        let faults = Faults::of(&mut chance);
        let war = chance.millis(WAR_S.0 * 1000, WAR_S.1 * 1000);
        let faults_end = match mode {
            Mode::Safety => war,
            Mode::Liveness if chance.percent(50) => Duration::ZERO,
            Mode::Liveness => chance.millis(0, 20_000),
        };
        let quiet = Chance::new(chance.draw());
        let network = Arc::new(Network::new(quiet, Faults::default()));
        let version = match chance.below(4) {
            0 => RoomVersion::V12,
            1 => RoomVersion::V10,
            _ => RoomVersion::V11,
        };
        let (slow_store, presence) = (chance.below(40), chance.percent(10));
        let mut servers = Vec::new();
        for n in 0..2 + chance.below(3) as usize {
            let settings = Settings {
                version,
                presence,
                compare_donors: chance.percent(70),
                race_send_join: chance.percent(70),
                skew_ms: chance.below(4000) as i64 - 2000,
                slow_store,
                // Every third house sends each event that goes to two servers as others do what goes to hundreds.
                fan_out_direct_max: if seed.is_multiple_of(3) { 1 } else { 64 },
            };
            let own = Chance::new(chance.draw());
            let server = Server::start(&network, fixture::server(n), settings, own, begin).await;
            servers.push(Arc::new(server));
        }
        let members = match chance.percent(10) {
            true => 20 + chance.below(21),
            false => 5 + chance.below(8),
        };
        let mut users: Vec<Vec<User>> = servers.iter().map(|_| Vec::new()).collect();
        for n in 0..members as usize {
            // The first server has the larger half: state that others must fetch.
            let at = match n {
                n if n < servers.len() => n,
                _ if chance.percent(50) => 0,
                _ => chance.below(servers.len() as u64) as usize,
            };
            users[at].push(User::register(&servers[at], &format!("u{n}")).await?);
        }
        for server in &servers {
            let others = servers.iter().filter(|other| other.name != server.name);
            server.meet(others.map(|other| other.name.clone()).collect());
        }
        tokio::time::sleep(Duration::from_secs(5)).await;
        let room = create_room(&users[0][0]).await?;
        for user in &users[0][1..] {
            let path = format!("/join/{}", encode(room.as_str()));
            user.act("POST", &path, &json!({})).await?;
        }
        let followers = users.iter().map(|users| {
            let (lazy, keeps_state) = (chance.percent(75), chance.percent(50));
            let limit = 1 + chance.below(20);
            let user = users[0].clone();
            let follower = Follower::new(user, room.as_str(), lazy, keeps_state, limit);
            Arc::new(tokio::sync::Mutex::new(Some(follower)))
        });
        let followers = followers.collect();
        log::note(|| {
            format!(
                "seed {seed}, {mode:?}, version {version:?}, {faults:?}, slow store {slow_store}"
            )
        });
        let began = Instant::now();
        if !faults_end.is_zero() {
            network.make_war(faults);
        }
        Ok(Arc::new(Self {
            mode,
            chance: Mutex::new(chance),
            network,
            servers,
            users,
            room,
            followers,
            promised: Mutex::default(),
            said: Mutex::default(),
            ways_in: Mutex::default(),
            broken: Mutex::default(),
            sequence: AtomicU64::new(0),
            war_ends: began + war,
            faults_end: began + faults_end,
        }))
    }

    fn broken(&self) -> Option<String> {
        lock(&self.broken).clone()
    }

    fn breaks(&self, what: String) {
        lock(&self.broken).get_or_insert(what);
    }

    fn below(&self, n: usize) -> usize {
        lock(&self.chance).below(n as u64) as usize
    }

    fn percent(&self, percent: u64) -> bool {
        lock(&self.chance).percent(percent)
    }

    fn millis(&self, from: u64, to: u64) -> Duration {
        lock(&self.chance).millis(from, to)
    }

    fn any_user(&self) -> (usize, User) {
        let server = self.below(self.servers.len());
        let user = self.below(self.users[server].len());
        (server, self.users[server][user].clone())
    }

    fn at_war(&self) -> bool {
        Instant::now() < self.war_ends
    }

    // -- the story ---------------------------------------------------------------------------------

    async fn act_out(self: &Arc<Self>) -> Result<Run, String> {
        let mut following = JoinSet::new();
        for n in 0..self.servers.len() {
            let world = self.clone();
            following.spawn(async move { world.follow(n).await });
        }
        let (mut acts, mut joins) = (JoinSet::new(), JoinSet::new());
        for n in 1..self.servers.len() {
            let world = self.clone();
            joins.spawn(async move { world.come_in(n).await });
        }
        self.make_war(&mut acts).await;
        self.network.make_peace();
        log::note(|| "peace".to_owned());
        for server in &self.servers {
            server.boot().await;
        }
        while let Some(done) = acts.join_next().await {
            done.map_err(|error| format!("an act panicked: {error}"))?;
        }
        self.let_in(joins).await?;
        self.settle().await?;
        let peace = Instant::now();
        for _ in 0..ROUNDS_OF_TALK {
            for n in 0..self.servers.len() {
                self.talk(n).await?;
            }
            self.settle().await?;
        }
        following.shutdown().await;
        self.judge(peace).await
    }

    async fn make_war(self: &Arc<Self>, acts: &mut JoinSet<()>) {
        while self.at_war() {
            tokio::time::sleep(self.millis(100, 4000)).await;
            if Instant::now() >= self.faults_end {
                self.network.make_peace();
            }
            let faults = self.network.faults();
            if self.percent(faults.partition) {
                let (a, b) = (
                    self.below(self.servers.len()),
                    self.below(self.servers.len()),
                );
                let time = self.millis(1000, 30_000);
                log::note(|| format!("s{a} and s{b} are parted for {time:?}"));
                self.network
                    .part(&self.servers[a].name, &self.servers[b].name, time);
            }
            let crash = self.percent(faults.crash);
            let world = self.clone();
            acts.spawn(async move {
                let acted = match crash {
                    true => world.crash().await,
                    false => world.act().await,
                };
                if let Err(broken) = acted {
                    world.breaks(broken);
                }
            });
        }
    }

    async fn crash(&self) -> Result<(), String> {
        let n = self.below(self.servers.len());
        let server = &self.servers[n];
        if !server.is_up() {
            return Ok(());
        }
        match self.percent(75) {
            true => {
                log::note(|| format!("s{n} crashes"));
                server.crash();
            }
            false => {
                log::note(|| format!("s{n} is stopped"));
                server.stop().await;
            }
        }
        tokio::time::sleep(self.millis(0, 15_000)).await;
        log::note(|| format!("s{n} starts"));
        server.boot().await;
        Ok(())
    }

    // -- users -------------------------------------------------------------------------------------

    async fn act(&self) -> Result<(), String> {
        let (n, user) = self.any_user();
        match self.below(100) {
            0..25 => self.join_too(n, &user).await,
            25..60 => self.say(n, &user, "hello").await,
            60..70 => {
                let name = format!("name {}", self.number());
                self.set(n, &user, "m.room.name", "", json!({ "name": name }))
                    .await
            }
            70..75 => self.set_power(n, &user).await,
            75..80 => {
                let rule = ["public", "public", "invite", "knock"][self.below(4)];
                let content = json!({ "join_rule": rule });
                self.set(n, &user, "m.room.join_rules", "", content).await
            }
            80..92 => self.moderate(&user).await,
            92..96 => self.redact(n, &user).await,
            _ => self.leave(&user).await,
        }
    }

    fn number(&self) -> u64 {
        self.sequence.fetch_add(1, Ordering::Relaxed)
    }

    fn path(&self, rest: &str) -> String {
        format!("/rooms/{}{rest}", encode(self.room.as_str()))
    }

    async fn join(&self, user: &User) -> Result<bool, String> {
        let vias = [self.below(self.servers.len()), 0];
        let vias = vias.map(|n| format!("via={}", self.servers[n].name));
        let path = format!("/join/{}?{}", encode(self.room.as_str()), vias.join("&"));
        let answer = user.act("POST", &path, &json!({})).await?;
        Ok(matches!(answer, Some((200, _))))
    }

    /// Somebody joins, perhaps beside the first user of the same server.
    async fn join_too(&self, n: usize, user: &User) -> Result<(), String> {
        if n > 0 && self.way_in(n, WayIn::Open) != WayIn::Open && self.is_in(n).await? != Some(true)
        {
            return Ok(());
        }
        self.join(user).await.map(drop)
    }

    /// The way that was taken first.
    fn way_in(&self, n: usize, way: WayIn) -> WayIn {
        *lock(&self.ways_in).entry(n).or_insert(way)
    }

    /// Whether a server is in the room; `None` while it is down, when its store never answers.
    async fn is_in(&self, n: usize) -> Result<Option<bool>, String> {
        let holding = laws::holding(&self.servers[n], &self.room);
        let Ok(holding) = tokio::time::timeout(Duration::from_secs(1), holding).await else {
            return Ok(None);
        };
        let joined = |holding: laws::Holding| !holding.local_joined.is_empty();
        Ok(Some(holding?.is_some_and(joined)))
    }

    /// The first user of a server joins, however often it takes.
    async fn come_in(&self, n: usize) {
        tokio::time::sleep(self.millis(0, 20_000)).await;
        for _ in 0..TRIES_MAX {
            match self.join(&self.users[n][0]).await {
                Ok(true) => return,
                Ok(false) => tokio::time::sleep(self.millis(500, 20_000)).await,
                Err(broken) => return self.breaks(broken),
            }
        }
        self.breaks(format!("{} never comes in", self.users[n][0].id));
    }

    async fn say(&self, n: usize, user: &User, words: &str) -> Result<(), String> {
        let words = format!("{words} {}", self.number());
        let content = json!({ "msgtype": "m.text", "body": words });
        let path = self.path(&format!("/send/m.room.message/{}", encode(&words)));
        lock(&self.said).push(words);
        self.send(n, user, &path, content).await
    }

    async fn set(
        &self,
        n: usize,
        user: &User,
        kind: &str,
        key: &str,
        content: Value,
    ) -> Result<(), String> {
        let path = self.path(&format!("/state/{kind}/{key}"));
        self.send(n, user, &path, content).await
    }

    async fn redact(&self, n: usize, user: &User) -> Result<(), String> {
        let target = {
            let promised = lock(&self.promised);
            let all: Vec<&EventId> = promised.values().flatten().collect();
            lock(&self.chance).pick(&all).map(ToString::to_string)
        };
        let Some(target) = target else {
            return Ok(());
        };
        let path = self.path(&format!("/redact/{}/{}", encode(&target), self.number()));
        self.send(n, user, &path, json!({})).await
    }

    /// Until there is an answer: with one transaction id it is one event, however often it is sent.
    async fn send(&self, n: usize, user: &User, path: &str, content: Value) -> Result<(), String> {
        for _ in 0..TRIES_MAX {
            match user.act("PUT", path, &content).await? {
                Some((200, answer)) => {
                    let id = answer["event_id"].as_str().map(EventId::parse);
                    let Some(Ok(id)) = id else {
                        return Err(format!("{path} was answered with {answer}"));
                    };
                    lock(&self.promised).entry(n).or_default().push(id);
                    return Ok(());
                }
                Some((status, _)) if status < 500 => return Ok(()),
                _ => tokio::time::sleep(self.millis(200, 5000)).await,
            }
        }
        Ok(())
    }

    /// Makes somebody a moderator, or takes the power of most away from names.
    async fn set_power(&self, n: usize, user: &User) -> Result<(), String> {
        let path = self.path("/state/m.room.power_levels");
        let Some((200, mut content)) = user.get(&path).await? else {
            return Ok(());
        };
        let (_, other) = self.any_user();
        if other.id != self.users[0][0].id {
            content["users"][&other.id] = 50.into();
        }
        content["events"]["m.room.name"] = [0, 50][self.below(2)].into();
        self.set(n, user, "m.room.power_levels", "", content).await
    }

    async fn moderate(&self, user: &User) -> Result<(), String> {
        let (n, target) = self.any_user();
        let follows = self.users[n][0].id == target.id;
        let action = ["kick", "ban", "unban", "invite", "invite"][self.below(5)];
        // Half of the time it is the creator, who may.
        let by = match self.percent(50) {
            true => &self.users[0][0],
            false => user,
        };
        let may = match action {
            "invite" if by.server.name == target.server.name => true,
            "invite" => {
                follows
                    && self.way_in(n, WayIn::Invited) == WayIn::Invited
                    && self.is_in(n).await? == Some(false)
            }
            _ => !follows,
        };
        if !may {
            return Ok(());
        }
        let path = self.path(&format!("/{action}"));
        by.act("POST", &path, &json!({ "user_id": target.id }))
            .await?;
        Ok(())
    }

    async fn leave(&self, user: &User) -> Result<(), String> {
        if self.users.iter().any(|users| users[0].id == user.id) {
            return Ok(());
        }
        user.act("POST", &self.path("/leave"), &json!({})).await?;
        Ok(())
    }

    async fn follow(&self, n: usize) {
        loop {
            let mut place = self.followers[n].lock().await;
            let Some(follower) = place.as_mut() else {
                return;
            };
            let synced = follower.sync(30_000).await;
            drop(place);
            match synced {
                Ok(Some(_)) => {}
                Ok(None) => tokio::time::sleep(Duration::from_secs(1)).await,
                Err(broken) => return self.breaks(broken),
            }
            // A client that is slow now and then.
            if self.at_war() && self.percent(20) {
                tokio::time::sleep(self.millis(0, 10_000)).await;
            }
        }
    }

    // -- peace -------------------------------------------------------------------------------------

    /// Until those who follow have come in. The creator opens the room more than once: a moderator may have closed
    /// it, and the creator's server takes it for open until it hears of that.
    async fn let_in(&self, mut joins: JoinSet<()>) -> Result<(), String> {
        loop {
            self.open_the_room().await?;
            let all = async {
                while let Some(done) = joins.join_next().await {
                    done.map_err(|error| format!("a join panicked: {error}"))?;
                }
                Ok(())
            };
            if let Ok(done) = tokio::time::timeout(OPEN_EVERY, all).await {
                return done;
            }
        }
    }

    /// The creator lets everybody in again, so that those who follow can come back.
    async fn open_the_room(&self) -> Result<(), String> {
        let content = json!({ "join_rule": "public" });
        self.set(0, &self.users[0][0], "m.room.join_rules", "", content)
            .await
    }

    /// Until nobody owes anything.
    async fn settle(&self) -> Result<(), String> {
        let began = Instant::now();
        let mut pause = Duration::from_secs(2);
        let mut despaired = false;
        loop {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(300));
            let mut owed = Vec::new();
            for server in &self.servers {
                owed.extend(laws::owed(server).await?);
            }
            if owed.is_empty() {
                return Ok(());
            }
            let waited = began.elapsed();
            if self.mode == Mode::Safety && waited > DESPAIR && !despaired {
                despaired = true;
                self.despair().await?;
            }
            if waited > PATIENCE {
                return Err(format!("it does not end: {}", owed.join("; ")));
            }
        }
    }

    /// All refuse to tell a server of a room that it is in only by its own lights: the resync asks rarely and
    /// for ever, as it must (S-22), and what ends the matter are its users.
    async fn despair(&self) -> Result<(), String> {
        let reference = laws::holding(&self.servers[0], &self.room).await?;
        let reference = reference.ok_or("the room is gone")?;
        for (n, server) in self.servers.iter().enumerate() {
            let Some(here) = laws::holding(server, &self.room).await? else {
                continue;
            };
            if !here.partial || reference.hosts.contains(&server.name) {
                continue;
            }
            log::note(|| format!("s{n} despairs"));
            for user in &self.users[n] {
                if here
                    .local_joined
                    .iter()
                    .any(|joined| joined.as_str() == user.id)
                {
                    user.act("POST", &self.path("/leave"), &json!({})).await?;
                }
            }
        }
        Ok(())
    }

    async fn talk(&self, n: usize) -> Result<(), String> {
        let Some(here) = laws::holding(&self.servers[n], &self.room).await? else {
            return Ok(());
        };
        let joined = |user: &&User| here.local_joined.iter().any(|id| id.as_str() == user.id);
        for user in self.users[n].iter().filter(joined) {
            self.say(n, user, "peace").await?;
        }
        Ok(())
    }

    /// Until there is nothing more to tell.
    async fn catch_up(&self, follower: &mut Follower) -> Result<(), String> {
        for _ in 0..TRIES_MAX {
            if follower.sync(0).await? == Some(false) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        Err(format!("{} never catches up", follower.user.id))
    }

    // -- the laws ----------------------------------------------------------------------------------

    /// `peace`: since when nothing was owed.
    async fn judge(&self, peace: Instant) -> Result<Run, String> {
        if let Some(broken) = self.broken() {
            return Err(broken);
        }
        let in_room = laws::check_states(&self.servers, &self.room).await?;
        let promised = lock(&self.promised).clone();
        for (n, ids) in &promised {
            laws::check_promised(&self.servers[*n], ids).await?;
        }
        for (n, server) in self.servers.iter().enumerate() {
            laws::check_auth(server, &self.room).await?;
            let taken = self.network.promises(&server.name);
            laws::check_taken(server, &taken, in_room.contains(&n), peace).await?;
        }
        let mut all = Vec::new();
        for n in &in_room {
            all.extend(promised.get(n).into_iter().flatten().cloned());
        }
        for (n, place) in self.followers.iter().enumerate() {
            let Some(mut follower) = place.lock().await.take() else {
                continue;
            };
            self.catch_up(&mut follower).await?;
            let here = laws::holding(&self.servers[n], &self.room).await?;
            let joined = here.as_ref().is_some_and(|here| {
                let mut joined = here.local_joined.iter();
                joined.any(|user| user.as_str() == follower.user.id)
            });
            // A join that resolution has undone leaves no event behind with which /sync could tell of it.
            let member = here.as_ref().map(|here| here.member(&follower.user.id));
            let undone = member.is_some_and(|member| member.is_none());
            if joined != follower.in_view && !undone {
                let is = if joined { "joined" } else { "not joined" };
                return Err(format!(
                    "{} is {is}, and is told otherwise",
                    follower.user.id
                ));
            }
            if !joined || !in_room.contains(&n) {
                continue;
            }
            laws::check_view(&follower, &self.room).await?;
            laws::check_told_state(&follower, &self.room).await?;
            laws::check_history(&follower.user, &self.room, &all).await?;
            // What could not be used as it came has been fetched as history by then.
            let taken = self.network.promises(&self.servers[n].name);
            let taken: Vec<_> = taken.into_iter().map(|promise| promise.event).collect();
            laws::check_promised(&self.servers[n], &taken).await?;
        }
        let said = lock(&self.said).clone();
        laws::check_said_once(&self.servers[0], &self.room, &said).await?;
        Ok(Run {
            servers_in_room: in_room.len(),
            promised: all.len(),
            requests: self.network.requests(),
            trace: String::new(),
        })
    }
}

async fn create_room(creator: &User) -> Result<RoomId, String> {
    let body = json!({ "preset": "public_chat", "name": "the room" });
    match creator.act("POST", "/createRoom", &body).await? {
        Some((200, answer)) => {
            let id = answer["room_id"].as_str().unwrap_or_default();
            RoomId::parse(id).map_err(|_| format!("{answer} has no room id"))
        }
        other => Err(format!("no room is made: {other:?}")),
    }
}
