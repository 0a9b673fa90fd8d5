//! Level 2: several servers share a room over a bad network, and must agree in the end.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use room::effect::{
    Answer, Ask, AskError, BadPdu, Effect, Input, Machine, Now, Place, RawPdu, Section, SentJoin,
    Ticket,
};
use room::join::{Intent, Join, JoinOptions, JoinRequest, Joined};
use room::leave::{Leave, LeaveRequest, Left, Why};
use room::receive::{Incoming, Receive, Received};
use room::refusal::Refusal;
use room::resident::{Accept, AcceptRequest, Accepted, Made, Make, MakeRequest, Unserved};
use room::rest::Rest;
use room::resync::{Resync, ResyncOptions, Resynced};
use room::send::{Draft, Send, Sent, Unsent};
use room::template::{Member, Own};
use serde_json::json;

use crate::chance::Chance;
use crate::fixture::{self, chain_of};
use crate::store::Store;

/// Inputs of one run; a run that wants more does not end.
const STEPS_MAX: usize = 400_000;
/// After this the network is good and nobody acts any more.
const PEACE: Duration = Duration::from_secs(60);
/// By then all that was sent has arrived, and who is refused was put out of the room for good.
const DESPAIR: Duration = Duration::from_secs(600);
/// When a leave that is owed is offered: after the join has failed, or the server has started, and then again.
const PAY_AFTER: Duration = Duration::from_secs(10);
const PAY_AGAIN: Duration = Duration::from_secs(60);
/// In peace every server speaks this often, so that all branches meet.
const ROUNDS_OF_TALK: usize = 3;
/// Events that get_missing_events gives at most.
const MISSING_MAX: usize = 10;

pub struct Run {
    pub servers_in_room: usize,
    pub events: usize,
    pub trace: String,
}

/// Runs one seed. An error is a broken law, with the trace so far.
pub fn run(seed: u64) -> Result<Run, (String, String)> {
    let mut world = World::new(seed);
    match world.story() {
        Ok((servers_in_room, events)) => Ok(Run {
            servers_in_room,
            events,
            trace: world.trace,
        }),
        Err(broken) => {
            world.tell_all();
            Err((broken, world.trace))
        }
    }
}

struct World {
    chance: Chance,
    faults: u64,
    /// The residents do not know of partial answers.
    whole_answers: bool,
    join_options: JoinOptions,
    version: RoomVersion,
    room: RoomId,
    now: Duration,
    sequence: u64,
    queue: BTreeMap<(Duration, u64), Event>,
    servers: Vec<Server>,
    last_task: u64,
    /// Verified once for all.
    by_json: BTreeMap<Arc<str>, Arc<Pdu>>,
    /// Pairs that can not reach each other, and until when.
    partition: Option<(usize, usize, Duration)>,
    /// Law 3: what a server said yes to.
    promised: Vec<(usize, EventId)>,
    trace: String,
    broken: Option<String>,
}

struct Server {
    own: Own,
    users: Vec<UserId>,
    store: Store,
    // -- what a crash takes --
    tasks: BTreeMap<u64, Task>,
    receiving: bool,
    resyncing: bool,
    joining: bool,
    /// Debts by job: when they were taken up, and when a leave was offered last.
    debts: BTreeMap<i64, (Duration, Duration)>,
    // -- what it does not --
    /// Staged events, with who sent them.
    inbox: VecDeque<(usize, Arc<Pdu>)>,
    outbox: BTreeMap<usize, VecDeque<Arc<Pdu>>>,
    /// Joins by job: whose they are.
    jobs: BTreeMap<i64, UserId>,
    /// Whether a [`Event::Pay`] is to come.
    pay_due: bool,
}

enum Task {
    Join(Box<Join>),
    Send(Box<Send>),
    Make(Box<Make>, Reply),
    Accept(Box<Accept>, Reply, bool),
    Receive(Box<Receive>, usize, Vec<Arc<Pdu>>),
    Resync(Box<Resync>),
    Leave(Box<Leave>),
}

/// Whom an answer goes to.
#[derive(Clone)]
struct Reply {
    server: usize,
    task: u64,
    ticket: Ticket,
}

enum Event {
    Input {
        server: usize,
        task: u64,
        input: Input,
    },
    Wake {
        server: usize,
        task: u64,
    },
    Request {
        to: usize,
        reply: Reply,
        ask: Ask,
    },
    /// The next of `from`'s events for `to` leave.
    Deliver {
        from: usize,
        to: usize,
    },
    /// Take up what is staged.
    Receive {
        server: usize,
    },
    /// Offer the leaves that are owed.
    Pay {
        server: usize,
    },
    Act,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut chance = Chance::new(seed);
        let version = match chance.below(4) {
            0 => RoomVersion::V12,
            1 => RoomVersion::V9,
            _ => RoomVersion::V11,
        };
        let count = 2 + chance.below(4) as usize;
        let servers = (0..count)
            .map(|n| Server::new(fixture::server(n)))
            .collect();
        Self {
            faults: seed % 20,
            whole_answers: matches!(seed % 7, 3 | 6),
            join_options: JoinOptions {
                members_first: Some((seed % 3) as usize),
                ask_for_left_out: seed.is_multiple_of(2),
                ..JoinOptions::default()
            },
            chance,
            version,
            room: RoomId::parse("!room:s0").expect("a plain name"),
            now: Duration::ZERO,
            sequence: 0,
            queue: BTreeMap::new(),
            servers,
            last_task: 0,
            by_json: BTreeMap::new(),
            partition: None,
            promised: Vec::new(),
            trace: String::new(),
            broken: None,
        }
    }

    fn now(&self) -> Now {
        fixture::at(self.now.as_millis() as u64)
    }

    fn at_peace(&self) -> bool {
        self.now >= PEACE
    }

    fn fault(&mut self) -> bool {
        !self.at_peace() && self.chance.percent(self.faults)
    }

    fn later(&mut self, delay: Duration, event: Event) {
        self.sequence += 1;
        self.queue.insert((self.now + delay, self.sequence), event);
    }

    fn note(&mut self, server: usize, line: &str) {
        let millis = self.now.as_millis();
        writeln!(self.trace, "{millis:>8} s{server} {line}").expect("a string takes all");
    }

    /// What every server holds of the room, at the end of the trace of a broken run.
    fn tell_all(&mut self) {
        for (n, server) in self.servers.iter().enumerate() {
            if let Some(room) = server.store.room(&self.room) {
                write!(self.trace, "s{n}:\n{}", room.tell()).expect("a string takes all");
            }
        }
    }

    // -- the story ---------------------------------------------------------------------------------

    fn story(&mut self) -> Result<(usize, usize), String> {
        self.create_room();
        let mut at = Duration::from_millis(100);
        while at < PEACE {
            self.later(at, Event::Act);
            at += self.chance.millis(50, 3000);
        }
        self.run_until_quiet()?;
        self.now = self.now.max(PEACE);
        self.partition = None;
        for _ in 0..ROUNDS_OF_TALK {
            self.restart_all();
            self.run_until_quiet()?;
            for server in 0..self.servers.len() {
                self.say(server, "peace");
                self.run_until_quiet()?;
            }
        }
        self.check_all()
    }

    fn create_room(&mut self) {
        let server = &mut self.servers[0];
        let creator = server.users[0].clone();
        let drafts = fixture::new_room(&creator, self.version);
        let named = !self.version.rules().room_id_is_create_hash;
        let room = named.then(|| self.room.clone());
        let own = server.own.clone();
        let mut create =
            Send::create(own, self.version, room, drafts, fixture::at(0)).expect("good drafts");
        let sent = fixture::run(&mut create, &mut server.store).expect("a good room");
        self.room = sent.room;
    }

    fn run_until_quiet(&mut self) -> Result<(), String> {
        for _ in 0..STEPS_MAX {
            let Some(((at, _), event)) = self.queue.pop_first() else {
                return Ok(());
            };
            self.now = self.now.max(at);
            self.happen(event);
            if let Some(broken) = self.broken.take() {
                return Err(broken);
            }
        }
        Err("it does not end".to_owned())
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Input {
                server,
                task,
                input,
            } => self.input(server, task, input),
            Event::Wake { server, task } => self.input(server, task, Input::Woke),
            Event::Request { to, reply, ask } => self.serve(to, reply, ask),
            Event::Deliver { from, to } => self.deliver(from, to),
            Event::Receive { server } => self.receive(server),
            Event::Pay { server } => self.pay(server),
            Event::Act => self.act(),
        }
    }

    // -- users -------------------------------------------------------------------------------------

    fn act(&mut self) {
        if self.partition.is_some_and(|(.., until)| until < self.now) {
            self.partition = None;
        }
        if self.partition.is_none() && self.fault() {
            let (a, b) = (self.any_server(), self.any_server());
            self.partition = Some((a, b, self.now + self.chance.millis(1000, 20_000)));
        }
        let server = self.any_server();
        if self.fault() && self.chance.percent(50) {
            return self.crash(server);
        }
        match self.chance.below(100) {
            0..35 => self.join(server),
            35..65 => self.say(server, "hello"),
            65..75 => self.set_topic(server),
            75..80 => self.set_power(server),
            80..92 => self.moderate(server),
            _ => self.leave(server),
        }
    }

    fn any_server(&mut self) -> usize {
        self.chance.below(self.servers.len() as u64) as usize
    }

    fn joined_here(&self, server: usize) -> Vec<UserId> {
        let server = &self.servers[server];
        let head = server
            .store
            .room(&self.room)
            .and_then(|r| r.head(&server.own.name));
        head.map(|head| head.local_joined).unwrap_or_default()
    }

    fn actor(&mut self, server: usize) -> Option<UserId> {
        let joined = self.joined_here(server);
        self.chance.pick(&joined).cloned()
    }

    fn say(&mut self, server: usize, body: &str) {
        if let Some(user) = self.actor(server) {
            let content = json!({ "body": body, "msgtype": "m.text" });
            self.send(server, Draft::message(user, "m.room.message", content));
        }
    }

    fn set_topic(&mut self, server: usize) {
        if let Some(user) = self.actor(server) {
            let topic = self.chance.below(1000);
            let content = json!({ "topic": topic.to_string() });
            self.send(server, Draft::state(user, "m.room.topic", "", content));
        }
    }

    /// Makes somebody a moderator, or takes the power of most away from topics.
    fn set_power(&mut self, server: usize) {
        let Some(user) = self.actor(server) else {
            return;
        };
        let creator = self.servers[0].users[0].clone();
        let other = self.any_server();
        let other = self.servers[other].users[0].clone();
        let mut users = json!({ other.as_str(): 50 });
        if self.version.rules().privileged_creators {
            if other == creator {
                return;
            }
        } else {
            users[creator.as_str()] = 100.into();
        }
        let level = if self.chance.percent(50) { 0 } else { 50 };
        let content = json!({ "users": users, "events": { "m.room.topic": level } });
        self.send(
            server,
            Draft::state(user, "m.room.power_levels", "", content),
        );
    }

    fn moderate(&mut self, server: usize) {
        let Some(user) = self.actor(server) else {
            return;
        };
        let target = 1 + self.chance.below(self.servers.len() as u64 - 1) as usize;
        let users = self.servers[target].users.clone();
        let Some(target) = self.chance.pick(&users).cloned() else {
            return;
        };
        let membership = *self
            .chance
            .pick(&["leave", "ban", "leave"])
            .expect("not empty");
        let content = json!({ "membership": membership });
        let draft = Draft::state(user, "m.room.member", target.as_str(), content);
        self.send(server, draft);
    }

    fn leave(&mut self, server: usize) {
        // Server 0 stays, so that there is a room to come back to.
        if server == 0 {
            return;
        }
        if let Some(user) = self.actor(server) {
            let key = user.to_string();
            let content = json!({ "membership": "leave" });
            self.send(server, Draft::state(user, "m.room.member", &key, content));
        }
    }

    /// All refuse to tell a server of a room that it is in only by its own lights: the event that put it out
    /// was lost, and nobody will send it again. The resync goes on asking rarely, as it must (S-22); what ends
    /// the matter are the users, who see that nothing comes, and leave.
    fn despair(&mut self, server: usize) {
        let name = &self.servers[server].own.name;
        let reference = &self.servers[0];
        let in_room = reference
            .store
            .room(&self.room)
            .is_some_and(|room| room.hosts(&reference.own.name).contains(name));
        if self.now < DESPAIR || server == 0 || in_room {
            return;
        }
        for user in self.joined_here(server) {
            let key = user.to_string();
            let content = json!({ "membership": "leave" });
            self.send(server, Draft::state(user, "m.room.member", &key, content));
        }
    }

    fn send(&mut self, server: usize, draft: Draft) {
        let what = format!(
            "send {} {:?} by {}",
            draft.kind, draft.state_key, draft.sender
        );
        self.note(server, &what);
        let own = self.servers[server].own.clone();
        let send = Send::new(own, self.room.clone(), vec![draft], None, self.now());
        self.start(server, Task::Send(Box::new(send)));
    }

    fn join(&mut self, server: usize) {
        let joined = self.joined_here(server);
        let away: Vec<_> = self.servers[server]
            .users
            .iter()
            .filter(|user| !joined.contains(user))
            .cloned()
            .collect();
        let Some(user) = self.chance.pick(&away).cloned() else {
            return;
        };
        let partial = self.servers[server]
            .store
            .room(&self.room)
            .is_some_and(|room| room.partial.is_some());
        if !joined.is_empty() && !partial {
            let key = user.to_string();
            let content = json!({ "membership": "join" });
            self.send(server, Draft::state(user, "m.room.member", &key, content));
        } else if !self.servers[server].joining && !self.servers[server].is_paying() {
            self.join_remotely(server, user);
        }
    }

    fn join_remotely(&mut self, server: usize, user: UserId) {
        let first = self.any_server();
        let candidates: Vec<_> = [first, 0]
            .into_iter()
            .map(|n| self.servers[n].own.name.clone())
            .collect();
        self.note(server, &format!("join by {user} via {candidates:?}"));
        self.last_task += 1;
        let job = self.last_task as i64;
        self.servers[server].jobs.insert(job, user.clone());
        let request = self.join_request(user, candidates, job);
        let options = JoinOptions {
            race_send_join: self.chance.percent(50),
            ..self.join_options
        };
        self.servers[server].joining = true;
        let join = Join::new(self.servers[server].own.clone(), request, options);
        self.start(server, Task::Join(Box::new(join)));
    }

    fn join_request(&self, user: UserId, candidates: Vec<ServerName>, job: i64) -> JoinRequest {
        JoinRequest {
            room: self.room.clone(),
            user,
            candidates,
            member: Member::default(),
            job,
            device_lists_at: 0,
        }
    }

    // -- tasks -------------------------------------------------------------------------------------

    fn start(&mut self, server: usize, task: Task) {
        self.last_task += 1;
        let id = self.last_task;
        self.servers[server].tasks.insert(id, task);
        self.settle(server, id);
    }

    fn input(&mut self, server: usize, id: u64, input: Input) {
        let now = self.now();
        // A task that is over, or was lost in a crash, hears nothing.
        if let Some(task) = self.servers[server].tasks.get_mut(&id) {
            task.handle(input, now);
            self.settle(server, id);
        }
    }

    /// Carries out what a task wants, and what follows when it is over.
    fn settle(&mut self, server: usize, id: u64) {
        let Some(mut task) = self.servers[server].tasks.remove(&id) else {
            return;
        };
        while let Some(effect) = task.poll_effect() {
            self.execute(server, id, effect);
        }
        if let Some(end) = task.poll_end() {
            return self.end(server, task, end);
        }
        if let Some(deadline) = task.deadline() {
            let delay = deadline.saturating_sub(self.now);
            self.later(delay, Event::Wake { server, task: id });
        }
        self.servers[server].tasks.insert(id, task);
    }

    fn execute(&mut self, server: usize, task: u64, effect: Effect) {
        let input = match effect {
            Effect::Ask {
                ticket, to, ask, ..
            } => return self.ask(server, task, ticket, &to, ask),
            Effect::Check {
                ticket,
                version,
                pdus,
            } => Input::Checked {
                ticket,
                pdus: pdus
                    .into_iter()
                    .map(|raw| self.check(raw, version))
                    .collect(),
            },
            Effect::Load { ticket, room, load } => Input::Loaded {
                ticket,
                loaded: self.servers[server].store.load(&room, load),
            },
            Effect::Commit { ticket, writes } => {
                let committed = self.servers[server].store.commit(*writes);
                let outcome = self.committed(server, committed);
                Input::Committed { ticket, outcome }
            }
            Effect::Tell(room::effect::Tell::StartResync { rest, .. }) => {
                return self.start_resync(server, rest);
            }
            Effect::Tell(room::effect::Tell::Progress {
                step: room::effect::Step::Retrying { .. },
                ..
            }) => return self.despair(server),
            Effect::Tell(_) => return,
        };
        let delay = self.chance.millis(0, 3);
        self.later(
            delay,
            Event::Input {
                server,
                task,
                input,
            },
        );
    }

    fn committed(
        &mut self,
        server: usize,
        committed: Result<crate::store::Outgoing, room::effect::Stale>,
    ) -> Result<(), room::effect::Stale> {
        if let Some(room) = self.servers[server].store.room(&self.room)
            && let Err(broken) = room.check(&self.servers[server].own.name)
        {
            self.broken = Some(format!("s{server}: {broken}"));
        }
        for (servers, pdu) in committed? {
            for to in servers {
                let Some(to) = self.number(&to) else {
                    continue;
                };
                let outbox = self.servers[server].outbox.entry(to).or_default();
                outbox.push_back(pdu.clone());
                let delay = self.chance.millis(5, 50);
                self.later(delay, Event::Deliver { from: server, to });
            }
        }
        Ok(())
    }

    fn number(&self, name: &ServerName) -> Option<usize> {
        self.servers
            .iter()
            .position(|server| server.own.name == *name)
    }

    fn check(&mut self, raw: RawPdu, version: RoomVersion) -> Result<Arc<Pdu>, BadPdu> {
        if let Some(pdu) = self.by_json.get(&raw) {
            return Ok(pdu.clone());
        }
        let pdu = fixture::check(&raw, version)?;
        self.by_json.insert(raw, pdu.clone());
        Ok(pdu)
    }

    fn end(&mut self, server: usize, task: Task, end: End) {
        match (task, end) {
            (Task::Make(_, reply), End::Made(made)) => {
                let answer = made.map(|made| Answer::Made {
                    room_version: Some(made.version.as_str().to_owned()),
                    event: made.event.to_string().into(),
                });
                self.reply(server, reply, Vec::new(), answer.map_err(unserved));
            }
            (Task::Accept(_, reply, omit), End::Accepted(Ok(accepted))) => {
                self.accepted(server, reply, omit, accepted);
            }
            (Task::Accept(_, reply, _), End::Accepted(Err(refused))) => {
                self.reply(server, reply, Vec::new(), Err(unserved(refused)));
            }
            (Task::Receive(_, from, batch), End::Received(received)) => {
                self.received(server, from, batch, received);
            }
            (Task::Join(_), End::Joined(joined)) => {
                self.servers[server].joining = false;
                self.forgive(server);
                let how = match joined {
                    Ok(joined) => format!("joined, partial: {}", joined.partial),
                    Err(refusal) => format!("not joined: {refusal}"),
                };
                self.note(server, &how);
                self.later(Duration::from_millis(1), Event::Receive { server });
                self.pay_later(server, PAY_AFTER);
            }
            (Task::Resync(_), End::Resynced(resynced)) => {
                self.servers[server].resyncing = false;
                self.note(server, &format!("resynced: {resynced:?}"));
            }
            (Task::Send(_), End::Sent(Err(unsent))) => {
                self.note(server, &format!("not sent: {unsent:?}"));
            }
            (Task::Leave(_), End::Left(left)) => {
                match left {
                    Ok(_left) => self.note(server, "a debt is paid"),
                    Err(refusal) => self.note(server, &format!("a debt is not paid: {refusal}")),
                }
                self.pay_later(server, PAY_AGAIN);
            }
            (_, _) => {}
        }
    }

    /// Whoever is in the room owes it no leave.
    fn forgive(&mut self, server: usize) {
        let joined = self.joined_here(server);
        let here = &mut self.servers[server];
        if let Some(room) = here.store.rooms.get_mut(&self.room) {
            room.owed.retain(|job, _| !joined.contains(&here.jobs[job]));
        }
    }

    fn received(
        &mut self,
        server: usize,
        from: usize,
        batch: Vec<Arc<Pdu>>,
        received: Vec<(EventId, Received)>,
    ) {
        let mut postponed = false;
        for pdu in batch.into_iter().rev() {
            let what = received.iter().find(|(id, _)| *id == pdu.event_id);
            if let Some((_, what)) = what {
                self.note(server, &format!("received {} {what:?}", pdu.event_id));
            }
            if what.is_none_or(|(_, what)| *what == Received::Postponed) {
                postponed = true;
                self.servers[server].inbox.push_front((from, pdu));
            }
        }
        self.servers[server].receiving = false;
        let delay = match postponed {
            true => Duration::from_secs(1),
            false => Duration::ZERO,
        };
        self.later(delay, Event::Receive { server });
    }

    fn start_resync(&mut self, server: usize, rest: Option<Box<Rest>>) {
        if self.servers[server].resyncing {
            let now = self.now();
            for task in self.servers[server].tasks.values_mut() {
                if let (Task::Resync(resync), Some(rest)) = (task, rest.clone()) {
                    resync.take(rest, now);
                }
            }
            return;
        }
        self.servers[server].resyncing = true;
        let own = self.servers[server].own.clone();
        let seed = self.chance.draw();
        let options = ResyncOptions {
            compare_donors: seed.is_multiple_of(2),
            chunk: 3 + (seed / 2 % 40) as usize,
            state_at_once_from: if seed.is_multiple_of(3) {
                usize::MAX
            } else {
                0
            },
        };
        let mut resync = Resync::new(own, self.room.clone(), options, seed, self.now());
        if let Some(rest) = rest {
            resync.take(rest, self.now());
        }
        self.start(server, Task::Resync(Box::new(resync)));
    }

    // -- crashes -----------------------------------------------------------------------------------

    fn crash(&mut self, server: usize) {
        self.note(server, "crash");
        let crashed = &mut self.servers[server];
        // Staged events are on disk until they are dealt with.
        for task in std::mem::take(&mut crashed.tasks).into_values() {
            if let Task::Receive(_, from, batch) = task {
                for pdu in batch.into_iter().rev() {
                    crashed.inbox.push_front((from, pdu));
                }
            }
        }
        crashed.receiving = false;
        crashed.resyncing = false;
        crashed.joining = false;
        crashed.debts.clear();
        self.restart(server);
    }

    fn restart_all(&mut self) {
        for server in 0..self.servers.len() {
            self.restart(server);
        }
    }

    /// What a server does at boot: it takes up what its rows say.
    fn restart(&mut self, server: usize) {
        let Some(room) = self.servers[server].store.room(&self.room) else {
            return;
        };
        let partial = room.partial.is_some();
        let intents = room.intents.clone();
        for (job, intent) in intents {
            if self.servers[server].joining {
                continue;
            }
            let candidates = vec![intent.via.clone(), self.servers[0].own.name.clone()];
            let request = self.join_request(intent.user.clone(), candidates, job);
            let intent = Intent {
                version: intent.version,
                event: intent.events.last().expect("an intent has one").clone(),
                via: intent.via,
                omit_members: intent.omit_members,
            };
            let (own, now) = (self.servers[server].own.clone(), self.now());
            self.servers[server].joining = true;
            let join = Join::resume(own, request, self.join_options, intent, now);
            self.start(server, Task::Join(Box::new(join)));
        }
        if partial {
            self.start_resync(server, None);
        }
        self.pay_later(server, PAY_AFTER);
        for to in 0..self.servers.len() {
            self.later(
                Duration::from_millis(10),
                Event::Deliver { from: server, to },
            );
        }
        self.later(Duration::from_millis(10), Event::Receive { server });
    }

    fn pay_later(&mut self, server: usize, delay: Duration) {
        if !std::mem::replace(&mut self.servers[server].pay_due, true) {
            self.later(delay, Event::Pay { server });
        }
    }

    /// Offers the leave that was not offered for the longest time. Whoever joins or pays comes back here in the end.
    fn pay(&mut self, server: usize) {
        self.forgive(server);
        let candidates = self.servers.iter().map(|s| s.own.name.clone()).collect();
        let now = self.now;
        let here = &mut self.servers[server];
        here.pay_due = false;
        let Some(room) = here.store.room(&self.room) else {
            return;
        };
        if here.joining || here.is_paying() {
            return;
        }
        here.debts.retain(|job, _| room.owed.contains_key(job));
        for job in room.owed.keys() {
            here.debts.entry(*job).or_insert((now, now));
        }
        let next = here.debts.iter_mut().min_by_key(|(_, debt)| debt.1);
        let Some((job, (since, offered))) = next else {
            return;
        };
        *offered = now;
        let request = LeaveRequest {
            room: self.room.clone(),
            user: here.jobs[job].clone(),
            reason: None,
            why: Why::Owed {
                job: *job,
                candidates,
                joins: room.owed[job].clone(),
                since: *since,
            },
        };
        let own = here.own.clone();
        let leave = Leave::new(own, request, self.now());
        self.start(server, Task::Leave(Box::new(leave)));
    }

    // -- the network -------------------------------------------------------------------------------

    fn latency(&mut self) -> Duration {
        match self.fault() {
            true => self.chance.millis(0, 30_000),
            false => self.chance.millis(5, 100),
        }
    }

    fn cut(&self, a: usize, b: usize) -> bool {
        let between = |(x, y, until): (usize, usize, Duration)| {
            ((x, y) == (a, b) || (x, y) == (b, a)) && self.now < until
        };
        !self.at_peace() && self.partition.is_some_and(between)
    }

    fn ask(&mut self, server: usize, task: u64, ticket: Ticket, to: &ServerName, ask: Ask) {
        let reply = Reply {
            server,
            task,
            ticket,
        };
        let word = format!("{ask:?}");
        let word = word.split([' ', '{']).next().unwrap_or_default().to_owned();
        self.note(server, &format!("asks {to} {word}"));
        let Some(to) = self.number(to).filter(|to| *to != server) else {
            self.broken = Some(format!("s{server} asks {to}"));
            return;
        };
        if self.cut(server, to) || self.fault() {
            let reason = "timeout".to_owned();
            return self.reply(to, reply, Vec::new(), Err(AskError::Unreachable { reason }));
        }
        let delay = self.latency();
        self.later(delay, Event::Request { to, reply, ask });
    }

    fn reply(
        &mut self,
        from: usize,
        reply: Reply,
        parts: Vec<(Section, Vec<RawPdu>)>,
        answer: Result<Answer, AskError>,
    ) {
        let from = self.servers[from].own.name.clone();
        let (server, task, ticket) = (reply.server, reply.task, reply.ticket);
        let mut delay = self.latency();
        let truncated = self.fault();
        for (section, pdus) in parts {
            let part = Input::Part {
                ticket,
                from: from.clone(),
                section,
                pdus,
            };
            let input = part;
            self.later(
                delay,
                Event::Input {
                    server,
                    task,
                    input,
                },
            );
            delay += Duration::from_millis(1);
        }
        let answer = match truncated {
            true => Err(AskError::Unreachable {
                reason: "cut short".to_owned(),
            }),
            false => answer,
        };
        let input = Input::Answered {
            ticket,
            from,
            answer,
        };
        self.later(
            delay,
            Event::Input {
                server,
                task,
                input,
            },
        );
    }

    /// Events leave one batch at a time, in order, and again until they have arrived.
    fn deliver(&mut self, from: usize, to: usize) {
        let Some(waiting) = self.servers[from]
            .outbox
            .get_mut(&to)
            .filter(|w| !w.is_empty())
        else {
            return;
        };
        let batch: Vec<_> = waiting.iter().take(50).cloned().collect();
        if self.cut(from, to) || self.fault() {
            let delay = self.chance.millis(500, 5000);
            return self.later(delay, Event::Deliver { from, to });
        }
        // The answer may be lost though the events have come: then they come twice.
        if !self.fault() {
            let waiting = self.servers[from].outbox.get_mut(&to).expect("just there");
            waiting.drain(..batch.len());
        } else {
            let delay = self.chance.millis(500, 5000);
            self.later(delay, Event::Deliver { from, to });
        }
        let inbox = batch.into_iter().map(|pdu| (from, pdu));
        self.servers[to].inbox.extend(inbox);
        let delay = self.latency();
        self.later(delay, Event::Receive { server: to });
    }

    fn receive(&mut self, server: usize) {
        let here = &mut self.servers[server];
        let (false, Some((from, _))) = (here.receiving, here.inbox.front().cloned()) else {
            return;
        };
        let mut batch = Vec::new();
        while batch.len() < 50 && here.inbox.front().is_some_and(|(other, _)| *other == from) {
            batch.extend(here.inbox.pop_front().map(|(_, pdu)| pdu));
        }
        here.receiving = true;
        let own = here.own.clone();
        let incoming = batch.iter().map(|pdu| Incoming {
            pdu: pdu.clone(),
            staged: None,
        });
        let incoming = incoming.collect();
        let origin = self.servers[from].own.name.clone();
        let receive = Receive::new(own, self.room.clone(), origin, incoming, self.now());
        self.start(server, Task::Receive(Box::new(receive), from, batch));
    }

    // -- answering ---------------------------------------------------------------------------------

    fn serve(&mut self, server: usize, reply: Reply, ask: Ask) {
        let origin = self.servers[reply.server].own.name.clone();
        let own = self.servers[server].own.clone();
        match ask {
            Ask::Make { what, user, .. } => {
                let request = MakeRequest {
                    what,
                    room: self.room.clone(),
                    user,
                    origin,
                    versions: vec![self.version.as_str().to_owned()],
                    allowed: None,
                };
                let make = Make::new(own, request, self.now());
                self.start(server, Task::Make(Box::new(make), reply));
            }
            Ask::Send {
                what,
                event_id,
                event,
                omit_members,
                ..
            } => {
                let request = AcceptRequest {
                    what,
                    room: self.room.clone(),
                    event_id: event_id.to_string(),
                    origin,
                    event,
                    allowed: None,
                };
                let accept = Accept::new(own, request);
                let task = Task::Accept(Box::new(accept), reply, omit_members);
                self.start(server, task);
            }
            ask => {
                let (parts, answer) = self.look_up(server, &origin, &ask);
                self.reply(server, reply, parts, answer);
            }
        }
    }

    fn accepted(&mut self, server: usize, reply: Reply, omit: bool, accepted: Accepted) {
        let event_id = accepted.event.event_id.clone();
        self.note(server, &format!("took {event_id}"));
        self.promised.push((server, event_id));
        if accepted.extremities > 1
            && let Some(user) = self.actor(server)
        {
            self.send(server, Draft::dummy(user));
        }
        if accepted.event.membership() != Some("join") {
            return self.reply(server, reply, Vec::new(), Ok(Answer::SentLeave));
        }
        let store = &self.servers[server].store;
        let room = store.room(&self.room).expect("it accepted a join to it");
        let mut state: Vec<_> = room
            .names(&accepted.state_before)
            .values()
            .map(|id| room.row(id).expect("state is stored").pdu.clone())
            .collect();
        let omit = omit && !self.whole_answers;
        if omit {
            let own_key = accepted.event.state_key.clone();
            state.retain(|pdu| &*pdu.kind != "m.room.member" || pdu.state_key == own_key);
        }
        let chain = chain_of(store, &self.room, &state);
        let raw = |pdus: &[Arc<Pdu>]| pdus.iter().map(|pdu| pdu.json.clone()).collect();
        let parts = vec![
            (Section::State, raw(&state)),
            (Section::AuthChain, raw(&chain)),
        ];
        let end = SentJoin {
            event: Some(accepted.event.json.clone()),
            members_omitted: omit,
            servers_in_room: Some(accepted.servers_before),
        };
        self.reply(server, reply, parts, Ok(Answer::SentJoin(end)));
    }

    fn look_up(
        &self,
        server: usize,
        origin: &ServerName,
        ask: &Ask,
    ) -> (Vec<(Section, Vec<RawPdu>)>, Result<Answer, AskError>) {
        let none = Vec::new();
        let store = &self.servers[server].store;
        let Some(room) = store.room(&self.room) else {
            return (none, Err(refused(404, "M_NOT_FOUND")));
        };
        let raw = |pdus: &[Arc<Pdu>]| pdus.iter().map(|pdu| pdu.json.clone()).collect();
        match ask {
            Ask::StateIds { event_id, .. } | Ask::State { event_id, .. } => {
                let state = match self.state_for(server, origin, event_id) {
                    Ok(state) => state,
                    Err(error) => return (none, Err(error)),
                };
                let chain = chain_of(store, &self.room, &state);
                if matches!(ask, Ask::State { .. }) {
                    let parts = vec![
                        (Section::State, raw(&state)),
                        (Section::AuthChain, raw(&chain)),
                    ];
                    return (parts, Ok(Answer::State));
                }
                let ids = |pdus: &[Arc<Pdu>]| pdus.iter().map(|pdu| pdu.event_id.clone()).collect();
                let answer = Answer::StateIds {
                    pdu_ids: ids(&state),
                    auth_chain_ids: ids(&chain),
                };
                (none, Ok(answer))
            }
            Ask::Event { event_id } => match room.row(event_id) {
                Some(row) => (none, Ok(Answer::Pdus(vec![row.pdu.json.clone()]))),
                None => (none, Err(refused(404, "M_NOT_FOUND"))),
            },
            Ask::EventAuth { event_id, .. } => match room.row(event_id) {
                Some(row) => {
                    let chain = chain_of(store, &self.room, std::slice::from_ref(&row.pdu));
                    (none, Ok(Answer::Pdus(raw(&chain))))
                }
                None => (none, Err(refused(404, "M_NOT_FOUND"))),
            },
            Ask::GetMissingEvents {
                earliest, latest, ..
            } => (
                none,
                Ok(Answer::Pdus(raw(&missing(room, earliest, latest)))),
            ),
            _ => (none, Err(refused(404, "M_UNRECOGNIZED"))),
        }
    }

    /// State before an event, for a server in the room, at events that are not partial (F-3, F-16).
    fn state_for(
        &self,
        server: usize,
        origin: &ServerName,
        event_id: &EventId,
    ) -> Result<Vec<Arc<Pdu>>, AskError> {
        let here = &self.servers[server];
        let room = here
            .store
            .room(&self.room)
            .ok_or(refused(404, "M_NOT_FOUND"))?;
        if !room.hosts(&here.own.name).contains(origin) {
            return Err(refused(403, "M_FORBIDDEN"));
        }
        let state = room
            .row(event_id)
            .filter(|row| !matches!(row.verdict, room::write::Verdict::Rejected(_)))
            .and_then(|row| row.state.as_ref())
            .ok_or(refused(404, "M_NOT_FOUND"))?;
        if state.partial {
            return Err(refused(403, "M_UNABLE_DUE_TO_PARTIAL_STATE"));
        }
        let names = room.names(&state.before);
        let stored = names.values().filter_map(|id| room.row(id));
        Ok(stored.map(|row| row.pdu.clone()).collect())
    }

    // -- the laws ----------------------------------------------------------------------------------

    fn check_all(&mut self) -> Result<(usize, usize), String> {
        let reference = self.servers[0]
            .store
            .room(&self.room)
            .ok_or("the room is gone")?;
        let state = reference.state();
        let own = &self.servers[0].own.name;
        let mut in_room: BTreeSet<ServerName> = reference.hosts(own).into_iter().collect();
        in_room.insert(own.clone());
        for (n, server) in self.servers.iter().enumerate() {
            let Some(room) = server.store.room(&self.room) else {
                continue;
            };
            room.check(&server.own.name)
                .map_err(|broken| format!("s{n}: {broken}"))?;
            if room.partial.is_some() && !self.joined_here(n).is_empty() {
                return Err(format!("s{n} stayed partial"));
            }
            if !room.intents.is_empty() {
                return Err(format!("s{n} left a join unfinished"));
            }
            if !room.owed.is_empty() {
                return Err(format!("s{n} owes a leave"));
            }
        }
        in_room.retain(|name| {
            let n = self.number(name);
            !n.is_some_and(|n| self.said_farewell(reference, n) || self.was_put_out(reference, n))
        });
        for name in &in_room {
            let n = self.number(name).ok_or("a member of no server")?;
            if self.joined_here(n).is_empty() {
                return Err(format!("s{n} is in the room for s0, and does not know it"));
            }
            let theirs = self.servers[n]
                .store
                .room(&self.room)
                .map(crate::store::Room::state);
            let theirs = theirs.ok_or("a member without a room")?;
            if theirs != state {
                return Err(difference(n, &state, &theirs));
            }
        }
        self.check_states(reference, &in_room)?;
        for (server, id) in &self.promised {
            let room = self.servers[*server].store.room(&self.room);
            let row = room.and_then(|room| room.row(id));
            if row.is_none_or(|row| row.place == Place::Outlier) {
                return Err(format!("s{server} took {id} and does not have it"));
            }
        }
        Ok((in_room.len(), reference.events.len()))
    }
}

impl World {
    /// Whether all of a server's users left by events that the other server refused, because it could not
    /// ask for what came before them (P-19). Nobody sends such an event again, and nothing else comes from
    /// there that would bring it along.
    fn said_farewell(&self, other: &crate::store::Room, n: usize) -> bool {
        let name = &self.servers[n].own.name;
        let ghosts = other.joined();
        let mut ghosts = ghosts.iter().filter(|user| user.server_name() == *name);
        let Some(here) = self.servers[n].store.room(&self.room) else {
            return false;
        };
        let state = here.state();
        ghosts.all(|user| {
            let member = state.get(&("m.room.member".to_owned(), user.to_string()));
            let left = member.and_then(|id| here.row(id)).filter(|row| {
                row.pdu.membership() == Some("leave") && row.pdu.sender.server_name() == *name
            });
            left.is_some_and(|row| other.row(&row.pdu.event_id).is_none())
        })
    }

    /// Whether all of a server's users that the other one has in the room were put out by somebody, which the
    /// other one's resolution has undone since. A server without users in a room takes nothing of it (P-24),
    /// so it cannot know; its users find out when they join again.
    fn was_put_out(&self, other: &crate::store::Room, n: usize) -> bool {
        let name = &self.servers[n].own.name;
        let Some(here) = self.servers[n].store.room(&self.room) else {
            return false;
        };
        if !self.joined_here(n).is_empty() {
            return false;
        }
        let (state, joined) = (here.state(), other.joined());
        let mut ghosts = joined.iter().filter(|user| user.server_name() == *name);
        ghosts.all(|user| {
            let member = state.get(&("m.room.member".to_owned(), user.to_string()));
            let row = member.and_then(|id| here.row(id));
            row.is_some_and(|row| {
                let put_out = matches!(row.pdu.membership(), Some("leave" | "ban"));
                put_out && row.pdu.sender != *user && other.row(&row.pdu.event_id).is_some()
            })
        })
    }

    /// What every server in the room must say the same of: the verdict on an event, and the state before it,
    /// where it is full in two places.
    fn check_states(
        &self,
        reference: &crate::store::Room,
        in_room: &BTreeSet<ServerName>,
    ) -> Result<(), String> {
        for name in in_room {
            let n = self.number(name).ok_or("a member of no server")?;
            let room = self.servers[n].store.room(&self.room);
            let room = room.ok_or("a member without a room")?;
            for row in room.events.values() {
                let id = &row.pdu.event_id;
                let full = |row: &&crate::store::Row| {
                    row.place == Place::Timeline
                        && row.state.as_ref().is_some_and(|state| !state.partial)
                };
                let (Some(ours), true) = (reference.row(id).filter(full), full(&row)) else {
                    continue;
                };
                let rejected = |row: &crate::store::Row| {
                    matches!(row.verdict, room::write::Verdict::Rejected(_))
                };
                if rejected(ours) != rejected(row) {
                    return Err(format!(
                        "{id} is {:?} for s0 and {:?} for s{n}",
                        ours.verdict, row.verdict
                    ));
                }
                let before = |room: &crate::store::Room, row: &crate::store::Row| {
                    room.names(&row.state.as_ref().expect("it is full").before)
                };
                let (ours, theirs) = (before(reference, ours), before(room, row));
                if ours != theirs {
                    return Err(format!("at {id} {}", difference(n, &ours, &theirs)));
                }
            }
        }
        Ok(())
    }
}

fn difference(
    n: usize,
    ours: &BTreeMap<(String, String), EventId>,
    theirs: &BTreeMap<(String, String), EventId>,
) -> String {
    let keys: BTreeSet<_> = ours.keys().chain(theirs.keys()).collect();
    let differ: Vec<_> = keys
        .into_iter()
        .filter(|key| ours.get(*key) != theirs.get(*key))
        .map(|key| format!("{key:?}: {:?}, {:?}", ours.get(key), theirs.get(key)))
        .collect();
    format!("s0 and s{n} hold different state: {}", differ.join("; "))
}

/// Breadth first from the latest back to the earliest, the oldest first in the answer.
fn missing(room: &crate::store::Room, earliest: &[EventId], latest: &[EventId]) -> Vec<Arc<Pdu>> {
    let mut seen: BTreeSet<EventId> = earliest.iter().chain(latest).cloned().collect();
    let prevs = |id: &EventId| {
        let row = room.row(id).filter(|row| row.place != Place::Outlier);
        row.map(|row| row.pdu.prev_events.clone())
            .unwrap_or_default()
    };
    let mut left: VecDeque<EventId> = latest.iter().flat_map(prevs).collect();
    let mut found = Vec::new();
    while let Some(id) = left.pop_front() {
        let row = room.row(&id).filter(|row| row.place != Place::Outlier);
        if let Some(row) = row
            && seen.insert(id.clone())
            && found.len() < MISSING_MAX
        {
            found.push(row.pdu.clone());
            left.extend(prevs(&id));
        }
    }
    found.reverse();
    found
}

fn refused(status: u16, errcode: &str) -> AskError {
    AskError::Refused {
        status,
        errcode: errcode.to_owned(),
        error: "no".to_owned(),
        body: "{}".into(),
    }
}

fn unserved(unserved: Unserved) -> AskError {
    match unserved {
        Unserved::Refused(refusal) => refused(refusal.status, &refusal.errcode),
        Unserved::AskAllowed(_) => refused(403, "M_FORBIDDEN"),
        Unserved::Behind { .. } => refused(500, "M_UNKNOWN"),
    }
}

impl Server {
    fn new(name: ServerName) -> Self {
        let users = ["ann", "bob"].map(|user| fixture::user(user, &name));
        Self {
            store: Store::new(name.clone()),
            own: fixture::own(name),
            users: users.into(),
            tasks: BTreeMap::new(),
            receiving: false,
            resyncing: false,
            joining: false,
            debts: BTreeMap::new(),
            inbox: VecDeque::new(),
            outbox: BTreeMap::new(),
            jobs: BTreeMap::new(),
            pay_due: false,
        }
    }
}

impl Server {
    fn is_paying(&self) -> bool {
        let mut tasks = self.tasks.values();
        tasks.any(|task| matches!(task, Task::Leave(_)))
    }
}

/// What a task came to.
enum End {
    Joined(Result<Joined, Refusal>),
    Sent(Result<Sent, Unsent>),
    Made(Result<Made, Unserved>),
    Accepted(Result<Accepted, Unserved>),
    Received(Vec<(EventId, Received)>),
    Resynced(Resynced),
    Left(Result<Left, Refusal>),
}

impl Task {
    fn handle(&mut self, input: Input, now: Now) {
        match self {
            Self::Join(machine) => machine.handle(input, now),
            Self::Send(machine) => machine.handle(input, now),
            Self::Make(machine, _) => machine.handle(input, now),
            Self::Accept(machine, ..) => machine.handle(input, now),
            Self::Receive(machine, ..) => machine.handle(input, now),
            Self::Resync(machine) => machine.handle(input, now),
            Self::Leave(machine) => machine.handle(input, now),
        }
    }

    fn poll_effect(&mut self) -> Option<Effect> {
        match self {
            Self::Join(machine) => machine.poll_effect(),
            Self::Send(machine) => machine.poll_effect(),
            Self::Make(machine, _) => machine.poll_effect(),
            Self::Accept(machine, ..) => machine.poll_effect(),
            Self::Receive(machine, ..) => machine.poll_effect(),
            Self::Resync(machine) => machine.poll_effect(),
            Self::Leave(machine) => machine.poll_effect(),
        }
    }

    fn deadline(&self) -> Option<Duration> {
        match self {
            Self::Join(machine) => machine.deadline(),
            Self::Resync(machine) => machine.deadline(),
            _ => None,
        }
    }

    fn poll_end(&mut self) -> Option<End> {
        match self {
            Self::Join(machine) => machine.poll_outcome().map(End::Joined),
            Self::Send(machine) => machine.poll_outcome().map(End::Sent),
            Self::Make(machine, _) => machine.poll_outcome().map(End::Made),
            Self::Accept(machine, ..) => machine.poll_outcome().map(End::Accepted),
            Self::Receive(machine, ..) => machine.poll_outcome().map(End::Received),
            Self::Resync(machine) => machine.poll_outcome().map(End::Resynced),
            Self::Leave(machine) => machine.poll_outcome().map(End::Left),
        }
    }
}
