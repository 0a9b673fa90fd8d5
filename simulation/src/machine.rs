//! Level 1: one join, and the resync after it, in a scripted world of faults.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use protocol::id::{EventId, ServerName};
use protocol::pdu::Pdu;
use room::effect::{
    Answer, Ask, AskError, BadPdu, Effect, Fault, Handshake, Input, Machine, Now, RawPdu, Section,
    SentJoin, Tell, Ticket,
};
use room::join::{Intent, Join, JoinOptions, JoinRequest};
use room::rest::Rest;
use room::resync::{Resync, ResyncOptions, Resynced};
use room::send::{Draft, Send};
use room::template::Member;
use serde_json::json;

use crate::chance::Chance;
use crate::fixture::{self, FORGED, Fixture, VERSION};
use crate::store::Store;

/// Inputs of one run; a run that wants more does not end.
const STEPS_MAX: usize = 50_000;
/// Event ids that a liar makes up.
const BOGUS: u64 = 3000;
/// Single events that are asked for in one resync, whatever a liar says.
const EVENTS_ASKED_MAX: u64 = 1500;
/// Faults end here, so that what must happen in the end can.
const PEACE: Duration = Duration::from_secs(3600);

/// What a run came to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    Joined { partial: bool },
    Failed { status: u16, owes_leave: bool },
}

pub struct Run {
    pub end: End,
    /// A line for each effect and input.
    pub trace: String,
}

/// Runs one seed. An error is a broken law.
pub fn run(fixture: &Fixture, seed: u64) -> Result<Run, (String, String)> {
    let mut world = World::new(fixture, seed);
    match world.story() {
        Ok(end) => Ok(Run {
            end,
            trace: world.trace,
        }),
        Err(broken) => Err((broken, world.trace)),
    }
}

struct World<'a> {
    fixture: &'a Fixture,
    chance: Chance,
    faults: u64,
    now: Duration,
    sequence: u64,
    queue: BTreeMap<(Duration, u64), Input>,
    store: Store,
    /// Joins that a resident accepted.
    accepted: BTreeSet<EventId>,
    crashes_left: u64,
    /// Leaves something out of every state that it gives, and makes something up.
    liar: Option<ServerName>,
    /// The residents do not know of partial answers.
    whole_answers: bool,
    /// What the join left to the resync.
    rest: Option<Box<Rest>>,
    /// Since the rest is here, and all is well.
    nobody_need_be_asked: bool,
    /// No notary can be reached until then.
    no_keys_until: Duration,
    /// Single events asked for in one resync.
    events_asked: u64,
    trace: String,
    broken: Option<String>,
}

enum Step<O> {
    Outcome(O),
    Crashed,
}

impl<'a> World<'a> {
    fn new(fixture: &'a Fixture, seed: u64) -> Self {
        let mut chance = Chance::new(seed);
        let crashes_left = chance.below(3);
        Self {
            fixture,
            faults: seed % 40,
            crashes_left: if seed.is_multiple_of(40) {
                0
            } else {
                crashes_left
            },
            chance,
            now: Duration::ZERO,
            sequence: 0,
            queue: BTreeMap::new(),
            store: Store::new(fixture.us.name.clone()),
            accepted: BTreeSet::new(),
            liar: None,
            whole_answers: seed % 5 == 3 || seed.is_multiple_of(80),
            rest: None,
            nobody_need_be_asked: false,
            no_keys_until: Duration::ZERO,
            events_asked: 0,
            trace: String::new(),
            broken: None,
        }
    }

    fn now(&self) -> Now {
        fixture::at(self.now.as_millis() as u64)
    }

    fn fault(&mut self) -> bool {
        self.now < PEACE && self.chance.percent(self.faults)
    }

    // -- the story ---------------------------------------------------------------------------------

    fn story(&mut self) -> Result<End, String> {
        let outcome = self.join()?;
        let end = match outcome {
            Ok(partial) => End::Joined { partial },
            Err(status) => End::Failed {
                status,
                owes_leave: self.here().is_some_and(|room| !room.owed.is_empty()),
            },
        };
        self.check_join(&end)?;
        if end == (End::Joined { partial: true }) {
            self.talk()?;
            self.resync()?;
        }
        Ok(end)
    }

    fn here(&self) -> Option<&crate::store::Room> {
        self.store.room(&self.fixture.room)
    }

    fn request(&mut self) -> JoinRequest {
        let mut candidates = self.fixture.residents.clone();
        let kept = 1 + self.chance.below(candidates.len() as u64) as usize;
        candidates.truncate(kept);
        candidates.push(self.fixture.us.name.clone());
        JoinRequest {
            room: self.fixture.room.clone(),
            user: self.fixture.user.clone(),
            candidates,
            member: Member::default(),
            job: 1,
            device_lists_at: 7,
        }
    }

    /// Joins, through crashes. Whether the room is partial, or the status of the refusal.
    fn join(&mut self) -> Result<Result<bool, u16>, String> {
        let request = self.request();
        let options = JoinOptions {
            race_send_join: self.chance.percent(50),
            members_first: self
                .chance
                .percent(80)
                .then(|| self.chance.below(4) as usize),
            ask_for_left_out: self.chance.percent(50),
        };
        loop {
            let own = self.fixture.us.clone();
            let intent = self.here().and_then(|room| room.intents.get(&1).cloned());
            let joined = self.here().is_some_and(|room| room.revision > 0);
            let owed = self.here().is_some_and(|room| !room.owed.is_empty());
            let mut machine = match intent {
                Some(intent) => {
                    let intent = Intent {
                        version: intent.version,
                        event: intent.events.last().expect("an intent has one").clone(),
                        via: intent.via,
                        omit_members: intent.omit_members,
                    };
                    Join::resume(own, request.clone(), options, intent, self.now())
                }
                None if joined => return Ok(Ok(self.here().is_some_and(|r| r.partial.is_some()))),
                None if owed => return Ok(Err(502)),
                None => Join::new(own, request.clone(), options),
            };
            let cancel = self.fault() && self.chance.percent(10);
            let cancel_at = cancel.then(|| self.now + self.chance.millis(1, 2000));
            match self.drive(
                &mut machine,
                cancel_at.map(|at| (at, Join::cancel as fn(&mut Join))),
            )? {
                Step::Outcome(Ok(joined)) => return Ok(Ok(joined.partial)),
                Step::Outcome(Err(refusal)) => return Ok(Err(refusal.status)),
                Step::Crashed => {}
            }
        }
    }

    /// Our user says something while the room is partial.
    fn talk(&mut self) -> Result<(), String> {
        for n in 0..self.chance.below(4) {
            let draft = Draft::message(
                self.fixture.user.clone(),
                "m.room.message",
                json!({ "body": format!("hello {n}"), "msgtype": "m.text" }),
            );
            let (own, room) = (self.fixture.us.clone(), self.fixture.room.clone());
            let mut send = Send::new(own, room, vec![draft], None, self.now());
            match self.drive(&mut send, None)? {
                Step::Outcome(Err(unsent)) => return Err(format!("not sent: {unsent:?}")),
                Step::Outcome(Ok(_)) | Step::Crashed => {}
            }
        }
        Ok(())
    }

    fn resync(&mut self) -> Result<(), String> {
        loop {
            let (own, room) = (self.fixture.us.clone(), self.fixture.room.clone());
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
            // O-46: one liar gets nowhere, unless there is nobody to contradict it.
            let lies = options.compare_donors && self.faults == 0;
            let residents = &self.fixture.residents;
            let liar = self.chance.pick(residents).cloned();
            self.liar = liar.filter(|_| lies);
            self.events_asked = 0;
            // Shorter than the resync's patience.
            let no_keys = self.faults > 0 && self.chance.percent(20);
            self.no_keys_until = self.now + self.chance.millis(0, 20_000) * u32::from(no_keys);
            let mut resync = Resync::new(own, room, options, seed, self.now());
            if let Some(rest) = self.rest.take() {
                resync.take(rest, self.now());
                self.nobody_need_be_asked = self.faults == 0;
            }
            match self.drive(&mut resync, None)? {
                Step::Outcome(Resynced::Full) if self.events_asked <= EVENTS_ASKED_MAX => break,
                Step::Outcome(Resynced::Full) => {
                    return Err(format!("{} events were asked for", self.events_asked));
                }
                Step::Outcome(other) => return Err(format!("the resync came to {other:?}")),
                Step::Crashed => {}
            }
        }
        self.check_full()
    }

    // -- the driver --------------------------------------------------------------------------------

    fn drive<M: Machine>(
        &mut self,
        machine: &mut M,
        mut cancel: Option<(Duration, fn(&mut M))>,
    ) -> Result<Step<M::Outcome>, String> {
        self.queue.clear();
        for _ in 0..STEPS_MAX {
            while let Some(effect) = machine.poll_effect() {
                if self.execute(effect) {
                    return Ok(Step::Crashed);
                }
            }
            if let Some(broken) = self.broken.take() {
                return Err(broken);
            }
            if let Some(outcome) = machine.poll_outcome() {
                return Ok(Step::Outcome(outcome));
            }
            let input = self.queue.keys().next().map(|(at, _)| *at);
            let deadline = machine.deadline();
            let next = [input, deadline, cancel.map(|(at, _)| at)];
            let Some(at) = next.into_iter().flatten().min() else {
                return Err("stuck: nothing on its way, and no deadline".to_owned());
            };
            self.now = self.now.max(at);
            if let Some((_, cancel)) = cancel.take_if(|(when, _)| *when == at) {
                self.note(&"cancel");
                cancel(machine);
            } else if input == Some(at) {
                let (_, input) = self.queue.pop_first().expect("just looked at");
                self.note(&brief_input(&input));
                let now = self.now();
                machine.handle(input, now);
            } else {
                let now = self.now();
                machine.handle(Input::Woke, now);
            }
        }
        Err("it does not end".to_owned())
    }

    fn note(&mut self, line: &dyn std::fmt::Display) {
        let millis = self.now.as_millis();
        writeln!(self.trace, "{millis:>8} {line}").expect("a string takes all");
    }

    fn later(&mut self, delay: Duration, input: Input) {
        self.sequence += 1;
        self.queue.insert((self.now + delay, self.sequence), input);
    }

    /// Carries out an effect; `true` is a crash.
    fn execute(&mut self, effect: Effect) -> bool {
        self.note(&brief_effect(&effect));
        let commits = matches!(effect, Effect::Commit { .. });
        if commits && self.crashes_now() {
            return true;
        }
        match effect {
            Effect::Tell(Tell::StartResync { rest, .. }) => self.rest = rest,
            Effect::Ask {
                ticket,
                to,
                ask,
                timeout,
            } => self.ask(ticket, to, ask, timeout),
            Effect::Check {
                ticket,
                version,
                pdus,
            } => {
                let known = &self.fixture.by_json;
                let check = |raw: &RawPdu| match known.get(raw) {
                    Some(pdu) => Ok(pdu.clone()),
                    None => fixture::check(raw, version),
                };
                let keyless = |pdu: Arc<Pdu>| BadPdu {
                    event_id: Some(pdu.event_id.clone()),
                    reason: "no notary".to_owned(),
                    fault: Fault::Unvouched,
                };
                let no_keys = self.now < self.no_keys_until;
                let check = |raw: &RawPdu| match check(raw) {
                    Ok(pdu) if no_keys && &*pdu.kind == "m.room.member" => Err(keyless(pdu)),
                    checked => checked,
                };
                let pdus = pdus.iter().map(check).collect();
                let delay = self.chance.millis(1, 50);
                self.later(delay, Input::Checked { ticket, pdus });
            }
            effect => {
                if let Some(input) = fixture::carry_out(effect, &mut self.store) {
                    if let Some(Err(broken)) =
                        self.here().map(|room| room.check(&self.fixture.us.name))
                    {
                        self.broken = Some(broken);
                    }
                    self.later(Duration::from_millis(1), input);
                }
            }
        }
        self.crashes_now()
    }

    fn crashes_now(&mut self) -> bool {
        if self.crashes_left > 0 && self.fault() && self.chance.percent(10) {
            self.crashes_left -= 1;
            self.note(&"crash");
            return true;
        }
        false
    }

    // -- the network -------------------------------------------------------------------------------

    fn latency(&mut self) -> Duration {
        match self.fault() {
            true => self.chance.millis(0, 40_000),
            false => self.chance.millis(20, 220),
        }
    }

    fn ask(&mut self, ticket: Ticket, to: ServerName, ask: Ask, timeout: Duration) {
        if to == self.fixture.us.name {
            self.broken = Some("we ask ourselves".to_owned());
        }
        let lost = AskError::Unreachable {
            reason: "timeout".to_owned(),
        };
        if self.fault() {
            return self.answer(ticket, &to, Err(lost), timeout);
        }
        let (parts, answer) = self.serve(&to, &ask);
        let mut delay = self.latency();
        let truncated = self.fault();
        for (section, pdus) in parts {
            if truncated && self.chance.percent(50) {
                break;
            }
            let from = to.clone();
            let part = Input::Part {
                ticket,
                from,
                section,
                pdus,
            };
            if self.fault() {
                self.later(delay, part.clone());
            }
            self.later(delay, part);
            delay += self.chance.millis(1, 30);
        }
        if truncated {
            return self.answer(ticket, &to, Err(lost), timeout);
        }
        if self.fault() {
            let again = delay + self.latency();
            self.later(
                again,
                Input::Answered {
                    ticket,
                    from: to.clone(),
                    answer: answer.clone(),
                },
            );
        }
        self.answer(ticket, &to, answer, delay.min(timeout));
    }

    fn answer(
        &mut self,
        ticket: Ticket,
        from: &ServerName,
        answer: Result<Answer, AskError>,
        delay: Duration,
    ) {
        let from = from.clone();
        let answered = Input::Answered {
            ticket,
            from,
            answer,
        };
        self.later(delay, answered);
    }

    /// A resident, sometimes a liar.
    fn serve(&mut self, to: &ServerName, ask: &Ask) -> Served {
        if self.chance.percent(2) && self.fault()
            || self.faults > 0 && self.fault() && self.chance.percent(30)
        {
            return (Vec::new(), Err(self.refusal()));
        }
        match ask {
            Ask::Make {
                what: Handshake::Join,
                ..
            } => self.serve_make_join(),
            Ask::Send {
                event,
                event_id,
                omit_members,
                ..
            } => self.serve_send_join(to, event, event_id, *omit_members),
            Ask::StateIds { .. } => {
                if self.nobody_need_be_asked {
                    self.broken = Some("asked for the state, which is here".to_owned());
                }
                self.serve_state_ids(to)
            }
            Ask::State { .. } => {
                let mut parts = self.parts(Section::State, &self.fixture.state.clone());
                parts.extend(self.parts(Section::AuthChain, &self.fixture.chain.clone()));
                (parts, Ok(Answer::State))
            }
            Ask::Event { event_id } => {
                self.events_asked += 1;
                self.serve_event(event_id)
            }
            _ => {
                let reason = "nothing else is served here".to_owned();
                (Vec::new(), Err(AskError::Unreachable { reason }))
            }
        }
    }

    fn refusal(&mut self) -> AskError {
        let (status, errcode) = *self
            .chance
            .pick(&[
                (403, "M_FORBIDDEN"),
                (404, "M_NOT_FOUND"),
                (400, "M_UNABLE_TO_GRANT_JOIN"),
                (429, "M_LIMIT_EXCEEDED"),
                (401, "M_UNKNOWN_TOKEN"),
                (500, "M_UNKNOWN"),
            ])
            .expect("not empty");
        AskError::Refused {
            status,
            errcode: errcode.to_owned(),
            error: "no".to_owned(),
            body: format!(r#"{{"errcode":"{errcode}","error":"no"}}"#).into(),
        }
    }

    fn serve_make_join(&mut self) -> Served {
        let mut event = self.fixture.template.clone();
        let mut room_version = Some(VERSION.as_str().to_owned());
        if self.fault() {
            match self.chance.below(4) {
                0 => event = "{}".into(),
                1 => event = event.replace("alice", "mallory").into(),
                2 => room_version = Some("9".to_owned()),
                _ => room_version = Some("nonsense".to_owned()),
            }
        }
        let made = Answer::Made {
            room_version,
            event,
        };
        (Vec::new(), Ok(made))
    }

    fn serve_send_join(
        &mut self,
        to: &ServerName,
        event: &Arc<str>,
        event_id: &EventId,
        omit_members: bool,
    ) -> Served {
        let durable = self.here().is_some_and(|room| {
            room.intents
                .values()
                .any(|intent| intent.events.contains(event))
        });
        if !durable {
            self.broken = Some("sent before the intent was durable".to_owned());
        }
        self.accepted.insert(event_id.clone());
        let full = self.whole_answers || self.fault();
        let mut state = self.fixture.state.clone();
        let mut chain = self.fixture.chain.clone();
        let mut end = SentJoin {
            event: self.chance.percent(50).then(|| event.clone()),
            members_omitted: omit_members && !full,
            servers_in_room: Some(self.fixture.residents.clone()),
        };
        if end.members_omitted {
            let (members, rest): (Vec<_>, Vec<_>) = state
                .into_iter()
                .partition(|pdu| &*pdu.kind == "m.room.member");
            state = rest;
            let needed = fixture::chain_of(&self.fixture.store, &self.fixture.room, &state);
            chain = members
                .into_iter()
                .filter(|member| needed.contains(member))
                .chain(chain)
                .collect();
        }
        if self.fault() {
            match self.chance.below(5) {
                0 => end.servers_in_room = None,
                1 => end.members_omitted = true,
                2 => state.retain(|pdu| &*pdu.kind != "m.room.create"),
                3 => chain.clear(),
                _ => end.event = Some(self.fixture.state[0].json.clone()),
            }
        }
        let _ = to;
        let mut parts = self.parts(Section::State, &state);
        parts.extend(self.parts(Section::AuthChain, &chain));
        (parts, Ok(Answer::SentJoin(end)))
    }

    /// In small parts, now and then with a forged event among them.
    fn parts(&mut self, section: Section, pdus: &[Arc<Pdu>]) -> Vec<(Section, Vec<RawPdu>)> {
        let mut raw = Vec::new();
        for pdu in pdus {
            let vital = pdu.state_key.as_deref() == Some("") && &*pdu.kind != "m.room.name";
            raw.push(match !vital && self.fault() && self.chance.percent(20) {
                true => format!("{FORGED} {}", pdu.json).into(),
                false => pdu.json.clone(),
            });
        }
        raw.chunks(7)
            .map(|chunk| (section, chunk.to_vec()))
            .collect()
    }

    fn serve_state_ids(&mut self, by: &ServerName) -> Served {
        let ids = |pdus: &[Arc<Pdu>]| pdus.iter().map(|pdu| pdu.event_id.clone()).collect();
        let mut pdu_ids: Vec<EventId> = ids(&self.fixture.state);
        if self.fault() && self.chance.percent(20) {
            pdu_ids.clear();
        }
        if self.liar.as_ref() == Some(by) {
            let create = |pdu: &Arc<Pdu>| &*pdu.kind == "m.room.create";
            let create = self.fixture.state.iter().position(create);
            let left_out = self.chance.below(pdu_ids.len() as u64) as usize;
            if create != Some(left_out) {
                pdu_ids.remove(left_out);
            }
            // And names what nobody has.
            for n in 0..self.chance.below(2) * BOGUS {
                let id = format!("$bogus{n}");
                pdu_ids.push(EventId::parse(&id).expect("a plain id"));
            }
        }
        let answer = Answer::StateIds {
            pdu_ids,
            auth_chain_ids: ids(&self.fixture.chain),
        };
        (Vec::new(), Ok(answer))
    }

    fn serve_event(&mut self, id: &EventId) -> Served {
        let row = self
            .fixture
            .store
            .room(&self.fixture.room)
            .and_then(|room| room.row(id));
        let answer = match row {
            Some(row) => Ok(Answer::Pdus(vec![row.pdu.json.clone()])),
            None => Err(AskError::Refused {
                status: 404,
                errcode: "M_NOT_FOUND".to_owned(),
                error: "no".to_owned(),
                body: "{}".into(),
            }),
        };
        (Vec::new(), answer)
    }

    // -- the laws ----------------------------------------------------------------------------------

    fn check_join(&self, end: &End) -> Result<(), String> {
        match end {
            End::Joined { partial } => self.check_joined(*partial),
            End::Failed { owes_leave, .. } => {
                let stored = self.here().is_some_and(|room| room.revision > 0);
                if stored {
                    return Err("a failed join left a room".to_owned());
                }
                if !self.accepted.is_empty() && !owes_leave {
                    return Err("a ghost join nobody will clean up".to_owned());
                }
                if self.here().is_some_and(|room| !room.intents.is_empty()) {
                    return Err("a failed join left an intent".to_owned());
                }
                match self.faults {
                    0 => Err("no faults, and no join".to_owned()),
                    _ => Ok(()),
                }
            }
        }
    }

    fn check_joined(&self, partial: bool) -> Result<(), String> {
        let room = self.here().ok_or("joined a room that is not stored")?;
        if room.partial.is_some() != partial {
            return Err("the marker is not what the outcome says".to_owned());
        }
        if !room.intents.is_empty() {
            return Err("the intent outlived its join".to_owned());
        }
        let state = room.state();
        let key = ("m.room.member".to_owned(), self.fixture.user.to_string());
        let join = state.get(&key).ok_or("our join is not in the state")?;
        if !self.accepted.contains(join) {
            return Err("joined without a resident".to_owned());
        }
        if !state.contains_key(&("m.room.create".to_owned(), String::new())) {
            return Err("a room without a create event".to_owned());
        }
        if let Some(marker) = &room.partial
            && (!marker.servers_in_room.contains(&marker.joined_via) || marker.join_event != *join)
        {
            return Err("a marker that names the wrong servers".to_owned());
        }
        room.check(&self.fixture.us.name)
    }

    /// Laws 1 and 2: the room is full, and its state is what the residents hold.
    fn check_full(&self) -> Result<(), String> {
        let room = self.here().ok_or("the room is gone")?;
        room.check(&self.fixture.us.name)?;
        if room.partial.is_some() {
            return Err("the room stayed partial".to_owned());
        }
        let state = room.state();
        let key = ("m.room.member".to_owned(), self.fixture.user.to_string());
        let join = state.get(&key).ok_or("our join is not in the full state")?;
        let truth = self.fixture.truth(join);
        for (key, id) in &truth {
            match state.get(key) {
                Some(here) if here == id => {}
                Some(_) => return Err(format!("another event stands at {key:?}")),
                // An event that nobody could give leaves a hole (S-6a), but only while there are faults.
                None if self.now < PEACE && self.faults > 0 => {}
                None => return Err(format!("nothing stands at {key:?}")),
            }
        }
        match state.keys().find(|key| !truth.contains_key(*key)) {
            Some(key) => Err(format!("{key:?} is state here alone")),
            None => Ok(()),
        }
    }
}

type Served = (Vec<(Section, Vec<RawPdu>)>, Result<Answer, AskError>);

fn brief_effect(effect: &Effect) -> String {
    match effect {
        Effect::Ask { to, ask, .. } => format!("ask {to} {}", brief_ask(ask)),
        Effect::Load { load, .. } => {
            let mut name = format!("{load:?}");
            name.truncate(name.find([' ', '{']).unwrap_or(name.len()));
            format!("load {name}")
        }
        Effect::Check { pdus, .. } => format!("check {}", pdus.len()),
        Effect::Commit { writes, .. } => format!(
            "commit {} events, {} judged, partial {}, intent {}",
            writes.events.len(),
            writes.rejudged.len(),
            word(&writes.partial),
            writes
                .intent
                .as_ref()
                .map_or_else(|| "-".to_owned(), |intent| word(intent)),
        ),
        Effect::Tell(Tell::StartResync { rest, .. }) => {
            let held = rest.as_ref().map(|rest| rest.held.len());
            format!("tell StartResync, held {held:?}")
        }
        Effect::Tell(tell) => format!("tell {tell:?}"),
    }
}

fn word(value: &dyn std::fmt::Debug) -> String {
    let mut text = format!("{value:?}");
    text.truncate(text.find([' ', '(', '{']).unwrap_or(text.len()));
    text
}

fn brief_ask(ask: &Ask) -> String {
    match ask {
        Ask::Send {
            event_id,
            omit_members,
            ..
        } => format!("Send {event_id} omit_members={omit_members}"),
        Ask::StateIds { event_id, .. } | Ask::State { event_id, .. } => {
            format!("{} {event_id}", word(ask))
        }
        Ask::Event { event_id } => format!("Event {event_id}"),
        ask => word(ask),
    }
}

fn brief_input(input: &Input) -> String {
    match input {
        Input::Part { from, pdus, .. } => format!("    part of {} from {from}", pdus.len()),
        Input::Answered { from, answer, .. } => match answer {
            Ok(answer) => format!("    {from} answers {}", word(answer)),
            Err(AskError::Refused {
                status, errcode, ..
            }) => format!("    {from} refuses {status} {errcode}"),
            Err(error) => format!("    {from} {error:?}"),
        },
        Input::Loaded { .. } => "    loaded".to_owned(),
        Input::Checked { pdus, .. } => {
            let good = pdus.iter().filter(|pdu| pdu.is_ok()).count();
            format!("    checked {good} of {}", pdus.len())
        }
        Input::Committed { outcome, .. } => format!("    committed {outcome:?}"),
        Input::Woke => "    woke".to_owned(),
    }
}
