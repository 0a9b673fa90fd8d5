//! Answering make_join and send_join, and their leave and knock kin (joins.md part 2).
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#joining-rooms>

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use protocol::auth;
use protocol::build::{self, PduDraft};
use protocol::format;
use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::nid::EventNid;
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::state::StateMap;
use serde_json::{Map, Value, json};

use crate::acl;
use crate::effect::{
    Answer, Ask, Effect, Handshake, Head, Input, Machine, Now, Place, RawPdu, StateKey, Ticket,
};
use crate::facts::{Facts, Got, auth_keys, both};
use crate::outbox::Outbox;
use crate::policy;
use crate::refusal::Refusal;
use crate::restricted::{self, AllowedRooms, Standing};
use crate::sift;
use crate::template::Own;
use crate::thinking::{Decide, Decision, Thinker, Thinking};
use crate::view::{Placed, View, split_prevs};
use crate::write::{FanOut, Verdict, WriteSet};

/// Why a handshake was not served.
#[derive(Clone, Debug, PartialEq)]
pub enum Unserved {
    Refused(Refusal),
    /// A restricted join: ask again with how the user stands in these rooms.
    AskAllowed(Vec<RoomId>),
    /// The event comes after some that were not here, and that another server of the room has given: ask again
    /// when they have been received.
    Behind {
        from: ServerName,
        events: Vec<Arc<Pdu>>,
    },
}

/// Servers of the room that are asked for prev events that are not here, one after another.
const DONORS_MAX: usize = 3;
/// The joining server waits meanwhile.
const PREV_EVENT_TIMEOUT: Duration = Duration::from_secs(8);

impl From<Refusal> for Unserved {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

fn unknown_room() -> Refusal {
    Refusal::not_found("the room is not known here")
}

/// The room as a resident may speak for it: known, full, and with one of us in it (R-5, R-9, R-10, F-1).
fn resident_head(head: Option<Arc<Head>>) -> Result<Arc<Head>, Refusal> {
    head.filter(|head| head.partial.is_none() && !head.local_joined.is_empty())
        .ok_or_else(unknown_room)
}

fn create_key() -> StateKey {
    ("m.room.create".into(), "".into())
}

///
fn acl_allows(facts: &Facts, head: &Head, origin: &ServerName) -> Got<Result<(), Refusal>> {
    let key: StateKey = ("m.room.server_acl".into(), "".into());
    facts.number(head.version, [], [key.clone(), create_key()])?;
    let events = facts.state_events(&head.state, std::slice::from_ref(&key))?;
    let acl = events.get(&key).map(|(_, pdu)| &**pdu);
    Ok(match acl::allows(acl, origin) {
        true => Ok(()),
        false => Err(Refusal::forbidden("the room's ACL shuts this server out")),
    })
}

// -- make_join, make_leave, make_knock ------------------------------------------------------------

#[derive(Clone, Debug)]
pub struct MakeRequest {
    pub what: Handshake,
    pub room: RoomId,
    pub user: UserId,
    /// Who asks, by the request's signature.
    pub origin: ServerName,
    /// `ver`, as it came; empty means version 1. Not looked at for make_leave.
    pub versions: Vec<String>,
    /// The answers to an earlier [`Unserved::AskAllowed`].
    pub allowed: Option<AllowedRooms>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Made {
    pub version: RoomVersion,
    /// The template event.
    pub event: Value,
}

/// Makes a template. Nothing is stored.
pub struct Make(Thinker<Making>);

impl Make {
    pub fn new(own: Own, request: MakeRequest, now: Now) -> Self {
        let facts = Facts::new(request.room.clone());
        Self(Thinker::new(Making { own, request, now }, facts))
    }
}

impl Machine for Make {
    type Outcome = Result<Made, Unserved>;

    fn handle(&mut self, input: Input, now: Now) {
        self.0.handle(input, now);
    }

    fn poll_effect(&mut self) -> Option<Effect> {
        self.0.poll_effect()
    }

    fn deadline(&self) -> Option<Duration> {
        self.0.deadline()
    }

    fn poll_outcome(&mut self) -> Option<Self::Outcome> {
        self.0.poll_outcome()
    }
}

struct Making {
    own: Own,
    request: MakeRequest,
    now: Now,
}

impl Decide for Making {
    type Outcome = Result<Made, Unserved>;

    fn wants_proof(outcome: &Self::Outcome) -> bool {
        outcome.is_err()
    }

    fn decide(&self, facts: &mut Facts) -> Got<Decision<Self::Outcome>> {
        Ok(Decision::Done(self.make(facts)?))
    }
}

impl Making {
    fn make(&self, facts: &mut Facts) -> Got<Result<Made, Unserved>> {
        let head = match resident_head(facts.head()?) {
            Ok(head) => head,
            Err(refusal) => return Ok(Err(refusal.into())),
        };
        if let Err(refusal) = acl_allows(facts, &head, &self.request.origin)? {
            return Ok(Err(refusal.into()));
        }
        if let Err(refusal) = self.inspect(&head) {
            return Ok(Err(refusal.into()));
        }
        let content = match self.content(facts, &head)? {
            Ok(content) => content,
            Err(unserved) => return Ok(Err(unserved)),
        };
        self.template(facts, &head, content)
    }

    ///
    fn inspect(&self, head: &Head) -> Result<(), Refusal> {
        let request = &self.request;
        let named = |version: &String| version == head.version.as_str();
        let understood = match request.versions.is_empty() {
            true => head.version == RoomVersion::V1,
            false => request.versions.iter().any(named),
        };
        if !understood && request.what != Handshake::Leave {
            return Err(Refusal::incompatible_version(head.version));
        }
        if request.what == Handshake::Knock && !head.version.rules().knock {
            return Err(Refusal::forbidden("this room's version has no knocking"));
        }
        if request.user.server_str() != request.origin.as_str() {
            return Err(Refusal::forbidden("the user is not one of your server's"));
        }
        Ok(())
    }

    fn content(&self, facts: &Facts, head: &Head) -> Got<Result<Value, Unserved>> {
        let mut content = json!({ "membership": self.request.what.membership() });
        if self.request.what != Handshake::Join {
            return Ok(Ok(content));
        }
        let by = match granted(
            facts,
            head,
            &self.request.user,
            self.request.allowed.as_ref(),
        )? {
            Ok(by) => by,
            Err(unserved) => return Ok(Err(unserved)),
        };
        if let Some(by) = by {
            content["join_authorised_via_users_server"] = by.as_str().into();
        }
        Ok(Ok(content))
    }

    /// The auth rules are put to a signed copy; the template is that without signatures.
    fn template(
        &self,
        facts: &mut Facts,
        head: &Head,
        content: Value,
    ) -> Got<Result<Made, Unserved>> {
        let request = &self.request;
        let view = View::of(head);
        let prevs = view.prevs();
        let nids: Vec<_> = prevs.iter().map(|prev| prev.nid).collect();
        let (before, _) = view.before(facts, &nids)?;
        let prev_events = view.references(facts, &prevs)?;
        let user = request.user.as_str();
        let keys = auth::auth_types(
            head.version,
            "m.room.member",
            &request.user,
            Some(user),
            &content,
        );
        let own_key = ("m.room.member".into(), user.into());
        facts.number(head.version, [], keys.iter().chain([&own_key]).cloned())?;
        let auth_events = facts.state_events(&before, &keys)?;
        let depth = prevs.iter().map(|prev| prev.depth).max().unwrap_or(0) + 1;
        let draft = PduDraft {
            room_id: Some(request.room.clone()),
            sender: request.user.clone(),
            kind: "m.room.member".to_owned(),
            state_key: Some(user.to_owned()),
            content,
            prev_events,
            auth_events: auth_events
                .values()
                .map(|(_, pdu)| (&**pdu).into())
                .collect(),
            depth,
            origin_server_ts: self.now.unix_ms,
            redacts: None,
            extra: Map::from_iter([("origin".to_owned(), self.own.name.as_str().into())]),
        };
        let pdu = match draft.sign(&self.own.key, &self.own.name, head.version) {
            Ok(pdu) => pdu,
            Err(error) => return Ok(Err(Refusal::forbidden(error.to_string()).into())),
        };
        if let Err(reason) = facts.check_against(&pdu, &before)? {
            return Ok(Err(Refusal::forbidden(reason).into()));
        }
        let mut event: Map<String, Value> = serde_json::from_str(&pdu.json).unwrap_or_default();
        for of_ours in ["event_id", "hashes", "signatures"] {
            event.remove(of_ours);
        }
        Ok(Ok(Made {
            version: head.version,
            event: event.into(),
        }))
    }
}

/// who vouches for a join, if somebody must.
fn granted(
    facts: &Facts,
    head: &Head,
    user: &UserId,
    allowed: Option<&AllowedRooms>,
) -> Got<Result<Option<UserId>, Unserved>> {
    let local = &head.local_joined;
    let standing = restricted::standing(facts, head.version, &head.state, user, local, allowed)?;
    Ok(match standing {
        Standing::Ordinary => Ok(None),
        Standing::GrantedBy(by) => Ok(Some(by)),
        Standing::Ask(rooms) => Err(Unserved::AskAllowed(rooms)),
        Standing::NobodyToGrant => Err(restricted::unable_to_grant().into()),
        Standing::Refused(refusal) => Err(refusal.into()),
    })
}

// -- send_join, send_leave, send_knock ------------------------------------------------------------

#[derive(Clone, Debug)]
pub struct AcceptRequest {
    pub what: Handshake,
    pub room: RoomId,
    /// As the path names it.
    pub event_id: String,
    pub origin: ServerName,
    /// The request's body.
    pub event: Arc<str>,
    /// The answers to an earlier [`Unserved::AskAllowed`].
    pub allowed: Option<AllowedRooms>,
}

/// What the answer is made from: one snapshot, the one the event was judged on.
#[derive(Clone, Debug)]
pub struct Accepted {
    /// With our signature where it was needed.
    pub event: Arc<Pdu>,
    pub version: RoomVersion,
    /// State before the event.
    pub state_before: StateMap,
    /// Servers with a joined member before the event, ours included.
    pub servers_before: Vec<ServerName>,
    /// Forward extremities after it. More than one: send a [`crate::send::Draft::dummy`].
    pub extremities: usize,
}

/// Takes a signed membership event of another server's user.
pub struct Accept {
    own: Own,
    request: AcceptRequest,
    /// The room's, once it is looked up.
    version: Option<RoomVersion>,
    state: AcceptState,
    out: Outbox,
    outcome: Option<Result<Accepted, Unserved>>,
}

enum AcceptState {
    /// The room's version decides how the event is to be read.
    Opening(Box<Facts>),
    Checking(Ticket, Box<Facts>),
    Deciding(Box<Thinking<Accepting>>),
    Fetching(Box<Fetching>),
    Done,
}

/// Prev events that are not here, on their way from another server of the room.
struct Fetching {
    wanted: Vec<EventId>,
    /// Who is asked, and who may be asked next.
    donor: ServerName,
    others: VecDeque<ServerName>,
    asks: BTreeSet<Ticket>,
    given: Vec<RawPdu>,
    check: Option<Ticket>,
}

impl Accept {
    pub fn new(own: Own, request: AcceptRequest) -> Self {
        let facts = Box::new(Facts::new(request.room.clone()));
        let mut this = Self {
            own,
            request,
            version: None,
            state: AcceptState::Done,
            out: Outbox::default(),
            outcome: None,
        };
        this.state = this.open(facts);
        this
    }

    fn open(&mut self, mut facts: Box<Facts>) -> AcceptState {
        match self.inspect(&facts) {
            Err(lacking) => {
                facts.request(lacking, &mut self.out);
                AcceptState::Opening(facts)
            }
            Ok(Err(refusal)) => self.done(Err(refusal.into())),
            Ok(Ok(pdu)) => {
                self.version = Some(pdu.version);
                let check = self.out.check(pdu.version, vec![pdu.json.clone()]);
                AcceptState::Checking(check, facts)
            }
        }
    }

    /// but for the signature itself.
    fn inspect(&self, facts: &Facts) -> Got<Result<Pdu, Refusal>> {
        let body = match serde_json::from_str::<Map<String, Value>>(&self.request.event) {
            Ok(body) => body,
            Err(_) => return Ok(Err(Refusal::bad_json("the body is not an object"))),
        };
        if let Err(refusal) = self.names_room(&body) {
            return Ok(Err(refusal));
        }
        let head = match resident_head(facts.head()?) {
            Ok(head) => head,
            Err(refusal) => return Ok(Err(refusal)),
        };
        if let Err(refusal) = self.is_wanted_kind(&body, head.version) {
            return Ok(Err(refusal));
        }
        if let Err(refusal) = acl_allows(facts, &head, &self.request.origin)? {
            return Ok(Err(refusal));
        }
        Ok(self.parse(head.version))
    }

    ///
    fn names_room(&self, body: &Map<String, Value>) -> Result<(), Refusal> {
        match body.get("room_id") {
            None => Err(Refusal::missing_param("room_id is missing")),
            Some(room) if room.as_str() == Some(self.request.room.as_str()) => Ok(()),
            Some(_) => Err(Refusal::bad_json("room_id is not the room of the path")),
        }
    }

    ///
    fn is_wanted_kind(
        &self,
        body: &Map<String, Value>,
        version: RoomVersion,
    ) -> Result<(), Refusal> {
        let what = self.request.what;
        if what == Handshake::Knock && !version.rules().knock {
            return Err(Refusal::forbidden("this room's version has no knocking"));
        }
        let text = |key: &str| body.get(key).and_then(Value::as_str);
        if text("type") != Some("m.room.member") || text("state_key").is_none() {
            return Err(Refusal::bad_json("not a membership event"));
        }
        let content = body.get("content");
        let membership = content.and_then(|content| content.get("membership"));
        if membership.and_then(Value::as_str) != Some(what.membership()) {
            return Err(Refusal::bad_json("the event has another membership"));
        }
        if text("sender") != text("state_key") {
            return Err(Refusal::bad_json("sender and state_key differ"));
        }
        Ok(())
    }

    ///
    fn parse(&self, version: RoomVersion) -> Result<Pdu, Refusal> {
        let pdu = Pdu::parse(&self.request.event, version)
            .and_then(|pdu| format::check_limits(&pdu).map(|()| pdu))
            .map_err(|error| Refusal::bad_event(&error))?;
        if pdu.event_id.as_str() != self.request.event_id {
            return Err(Refusal::bad_json("the event id is not that of the path"));
        }
        if pdu.sender.server_str() != self.request.origin.as_str() {
            return Err(Refusal::forbidden("the event is another server's"));
        }
        let by = match self.request.what {
            Handshake::Join => pdu.content_get_str("join_authorised_via_users_server"),
            Handshake::Leave | Handshake::Knock => None,
        };
        let Some(by) = by.filter(|_| version.rules().restricted) else {
            return Ok(pdu);
        };
        match UserId::parse(&by) {
            Ok(by) if by.server_name() == self.own.name => {
                build::cosign(&pdu, &self.own.key, &self.own.name)
                    .map_err(|error| Refusal::bad_json(error.to_string()))
            }
            _ => Err(Refusal::invalid_param(
                "the authorising user is not one of this server's",
            )),
        }
    }

    fn done(&mut self, outcome: Result<Accepted, Unserved>) -> AcceptState {
        self.outcome = Some(outcome);
        AcceptState::Done
    }

    fn on_checked(
        &mut self,
        verdict: Option<Result<Arc<Pdu>, crate::effect::BadPdu>>,
        facts: Facts,
    ) -> AcceptState {
        match verdict {
            Some(Ok(pdu)) => {
                let accepting = Accepting {
                    own: self.own.clone(),
                    request: self.request.clone(),
                    pdu,
                };
                let thinking = Thinking::new(accepting, facts, &mut self.out);
                self.settle(Box::new(thinking))
            }
            Some(Err(bad)) => self.done(Err(Refusal::forbidden(bad.reason).into())),
            None => self.done(Err(Refusal::forbidden("the event was not judged").into())),
        }
    }

    fn settle(&mut self, mut thinking: Box<Thinking<Accepting>>) -> AcceptState {
        match thinking.take_outcome() {
            Some(Ok(accepted)) => self.done(Ok(accepted)),
            Some(Err(NotAccepted::Unserved(unserved))) => self.done(Err(unserved)),
            Some(Err(NotAccepted::LacksPrevs { ids, hosts })) => self.fetch(ids, hosts.into()),
            None => AcceptState::Deciding(thinking),
        }
    }

    /// Asks the next server of the room for these. The one that sends the event has only seen a template.
    fn fetch(&mut self, wanted: Vec<EventId>, mut others: VecDeque<ServerName>) -> AcceptState {
        let Some(donor) = others.pop_front() else {
            let refusal = Refusal::new(500, "M_UNKNOWN", "the event's prev events are not known");
            return self.done(Err(refusal.into()));
        };
        let asks = wanted.iter().map(|event_id| {
            let ask = Ask::Event {
                event_id: event_id.clone(),
            };
            self.out.ask(&donor, ask, PREV_EVENT_TIMEOUT)
        });
        let asks = asks.collect();
        AcceptState::Fetching(Box::new(Fetching {
            wanted,
            donor,
            others,
            asks,
            given: Vec::new(),
            check: None,
        }))
    }

    fn on_fetch(&mut self, mut s: Box<Fetching>, input: Input) -> AcceptState {
        match input {
            Input::Answered { ticket, answer, .. } if s.asks.remove(&ticket) => {
                if let Ok(Answer::Pdus(pdus)) = answer {
                    s.given.extend(pdus.into_iter().take(1));
                }
                if !s.asks.is_empty() {
                    return AcceptState::Fetching(s);
                }
                if s.given.is_empty() {
                    return self.fetch(s.wanted, s.others);
                }
                let given = std::mem::take(&mut s.given);
                s.check = self.version.map(|version| self.out.check(version, given));
                AcceptState::Fetching(s)
            }
            Input::Checked { ticket, pdus } if s.check == Some(ticket) => {
                let mut events: Vec<Arc<Pdu>> = pdus.into_iter().flatten().collect();
                events.retain(|pdu| {
                    pdu.room_id == self.request.room && s.wanted.contains(&pdu.event_id)
                });
                if events.is_empty() {
                    return self.fetch(s.wanted, s.others);
                }
                events.sort_by_key(|pdu| pdu.depth);
                self.done(Err(Unserved::Behind {
                    from: s.donor,
                    events,
                }))
            }
            _late_or_double => AcceptState::Fetching(s),
        }
    }
}

impl Machine for Accept {
    type Outcome = Result<Accepted, Unserved>;

    fn handle(&mut self, input: Input, _: Now) {
        let state = std::mem::replace(&mut self.state, AcceptState::Done);
        self.state = match (state, input) {
            (AcceptState::Opening(mut facts), Input::Loaded { ticket, loaded }) => {
                match facts.hear(ticket, loaded) {
                    true => self.open(facts),
                    false => AcceptState::Opening(facts),
                }
            }
            (AcceptState::Checking(t, facts), Input::Checked { ticket, pdus }) if t == ticket => {
                self.on_checked(pdus.into_iter().next(), *facts)
            }
            (AcceptState::Deciding(mut thinking), input) => {
                thinking.handle(input, &mut self.out);
                self.settle(thinking)
            }
            (AcceptState::Fetching(s), input) => self.on_fetch(s, input),
            (state, _late_or_double) => state,
        };
    }

    fn poll_effect(&mut self) -> Option<Effect> {
        self.out.next()
    }

    fn deadline(&self) -> Option<Duration> {
        None
    }

    fn poll_outcome(&mut self) -> Option<Self::Outcome> {
        self.outcome.take()
    }
}

struct Accepting {
    own: Own,
    request: AcceptRequest,
    pdu: Arc<Pdu>,
}

enum NotAccepted {
    Unserved(Unserved),
    LacksPrevs {
        ids: Vec<EventId>,
        /// Who may have them.
        hosts: Vec<ServerName>,
    },
}

impl From<Refusal> for NotAccepted {
    fn from(refusal: Refusal) -> Self {
        Self::Unserved(refusal.into())
    }
}

impl Decide for Accepting {
    type Outcome = Result<Accepted, NotAccepted>;

    fn wants_proof(outcome: &Self::Outcome) -> bool {
        outcome.is_err()
    }

    fn decide(&self, facts: &mut Facts) -> Got<Decision<Self::Outcome>> {
        // All that will be asked for, at once.
        let pdu = &self.pdu;
        let ids = pdu.auth_events.iter().chain(&pdu.prev_events);
        let ids: Vec<_> = ids.chain([&pdu.event_id]).cloned().collect();
        let ((head, hosts), _) = both(both(facts.head(), facts.hosts()), facts.find(&ids))?;
        let head = match resident_head(head) {
            Ok(head) => head,
            Err(refusal) => return Ok(Decision::Done(Err(refusal.into()))),
        };
        let servers_before: Vec<_> = hosts.iter().chain([&self.own.name]).cloned().collect();
        if let Some(before) = self.accepted_before(facts)? {
            return Ok(Decision::Done(Ok(Accepted {
                event: self.pdu.clone(),
                version: head.version,
                state_before: before,
                servers_before,
                extremities: head.forward_extremities.len(),
            })));
        }
        if self.request.what == Handshake::Join
            && let Err(unserved) = granted(
                facts,
                &head,
                &self.pdu.sender,
                self.request.allowed.as_ref(),
            )?
        {
            return Ok(Decision::Done(Err(NotAccepted::Unserved(unserved))));
        }
        let (known, unknown) = split_prevs(facts, &self.pdu.prev_events)?;
        if !unknown.is_empty() {
            let mut hosts = hosts;
            hosts.retain(|host| *host != self.request.origin);
            hosts.truncate(DONORS_MAX);
            let lacks = NotAccepted::LacksPrevs {
                ids: unknown,
                hosts,
            };
            return Ok(Decision::Done(Err(lacks)));
        }
        let mut placed = match self.place(facts, &head, &known)? {
            Ok(placed) => placed,
            Err(refusal) => return Ok(Decision::Done(Err(refusal.into()))),
        };
        // what would be soft-failed is refused, as by R-29a, so that nobody believes to be in.
        match policy::vet(facts, &self.own, &head, &placed.pdu)? {
            Ok(vetted) => placed.pdu = vetted,
            Err(refusal) => return Ok(Decision::Done(Err(refusal.into()))),
        }
        let mut view = View::of(&head);
        view.add(facts, &placed)?;
        let accepted = Accepted {
            event: placed.pdu.clone(),
            version: head.version,
            state_before: placed.state.before.clone(),
            servers_before,
            extremities: view.extremities.len(),
        };
        let mut writes = WriteSet::new(self.request.room.clone(), head.version);
        writes.expect = Some(head.revision);
        writes.events = vec![placed.into_event(self.fan_out(hosts), None)];
        view.write(&mut writes);
        Ok(Decision::Commit {
            writes: Box::new(writes),
            outcome: Ok(accepted),
            tell: Vec::new(),
        })
    }
}

impl Accepting {
    /// the same event again gets the same answer.
    fn accepted_before(&self, facts: &Facts) -> Got<Option<StateMap>> {
        let found = facts.find(std::slice::from_ref(&self.pdu.event_id))?;
        let Some(found) = found.into_iter().next().flatten() else {
            return Ok(None);
        };
        // An outlier was never accepted, whatever the facts say of the state it is about to have.
        if found.known.rejected || found.known.place == Place::Outlier {
            return Ok(None);
        }
        let states = facts.states(&[found.known.nid])?;
        Ok(states.into_iter().next().flatten().map(|at| at.before))
    }

    /// R-29, R-29a, R-30. A refused event is not stored (R-32b).
    fn place(
        &self,
        facts: &mut Facts,
        head: &Head,
        prevs: &[EventNid],
    ) -> Got<Result<Placed, Refusal>> {
        let pdu = &self.pdu;
        if prevs.is_empty() {
            return Ok(Err(Refusal::forbidden("the event comes after no other")));
        }
        let keys = auth_keys(pdu).into_iter();
        let own_key = pdu.state_key.clone().map(|key| (pdu.kind.clone(), key));
        let ids = [pdu.event_id.clone()];
        let numbered = facts.number(
            head.version,
            ids,
            keys.chain(own_key).chain([create_key(), policy::key()]),
        );
        let ((), auth) = both(numbered, facts.find(&pdu.auth_events))?;
        let Some(auth) = auth.into_iter().collect::<Option<Vec<_>>>() else {
            return Ok(Err(Refusal::forbidden(
                "the event's auth events are not known",
            )));
        };
        let auth: Vec<_> = auth
            .iter()
            .map(|found| (&*found.pdu, found.known.rejected))
            .collect();
        let create = facts.state_events(&head.state, &[create_key()])?;
        let create = create.values().next().map(|(_, pdu)| &**pdu);
        if let Verdict::Rejected(reason) = sift::match_auth(head.version, pdu, create, &auth) {
            return Ok(Err(Refusal::forbidden(reason)));
        }
        let (before, partial) = View::of(head).before(facts, prevs)?;
        for state in [&before, &head.state] {
            if let Err(reason) = facts.check_against(pdu, state)? {
                return Ok(Err(Refusal::forbidden(reason)));
            }
        }
        let pdu = pdu.clone();
        Ok(Ok(Placed::new(
            facts,
            pdu,
            before,
            partial,
            Verdict::Accepted,
        )))
    }

    /// all other servers in the room, but not the one it came from.
    fn fan_out(&self, mut hosts: Vec<ServerName>) -> FanOut {
        hosts.retain(|host| *host != self.request.origin && *host != self.own.name);
        match hosts.is_empty() {
            true => FanOut::Nobody,
            false => FanOut::Servers(hosts),
        }
    }
}

/// The state events that a knocker or an invitee is shown of a room, if they are there. The
/// create event is a must.
pub const SHOWN_STATE: [&str; 7] = [
    "m.room.create",
    "m.room.join_rules",
    "m.room.canonical_alias",
    "m.room.name",
    "m.room.avatar",
    "m.room.topic",
    "m.room.encryption",
];

/// The PDUs of [`SHOWN_STATE`], and of the members in `also`, from a state.
pub(crate) fn shown_state(
    facts: &Facts,
    version: RoomVersion,
    state: &StateMap,
    also: &[&UserId],
) -> Got<Vec<Arc<str>>> {
    let kinds = SHOWN_STATE.iter().map(|kind| ((*kind).into(), "".into()));
    let members = also
        .iter()
        .map(|user| ("m.room.member".into(), user.as_str().into()));
    let keys: Vec<StateKey> = kinds.chain(members).collect();
    facts.number(version, [], keys.iter().cloned())?;
    let events: BTreeMap<_, _> = facts.state_events(state, &keys)?;
    Ok(keys
        .iter()
        .filter_map(|key| Some(events.get(key)?.1.json.clone()))
        .collect())
}
