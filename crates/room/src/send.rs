//! A local event: build, authorize, sign, append, fan out (joins.md 3.5).
//!
//! Several drafts in one request become events of one commit: that is how a room is created.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use protocol::auth;
use protocol::build::{PduDraft, Reference};
use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::nid::EventNid;
use protocol::pdu::Pdu;
use protocol::power::PowerLevels;
use protocol::room_version::RoomVersion;
use protocol::state::StateMap;
use serde_json::{Map, Value};

use crate::effect::{Effect, Head, Input, Machine, Now, PartialMarker, StateKey};
use crate::facts::{Facts, Got, both};
use crate::policy;
use crate::refusal::Refusal;
use crate::restricted::{self, AllowedRooms, Standing};
use crate::template::{AUTHORISED_BY, Own};
use crate::thinking::{Decide, Decision, Thinker};
use crate::view::{Placed, View};
use crate::write::{FanOut, Transaction, Verdict, WriteSet};

/// An event that one of our users (or a caller on their behalf) wants in a room.
#[derive(Clone, Debug)]
pub struct Draft {
    pub sender: UserId,
    pub kind: String,
    pub state_key: Option<String>,
    pub content: Value,
    pub redacts: Option<EventId>,
    /// `None`: now. Application services may set it.
    pub origin_server_ts: Option<i64>,
    pub transaction: Option<Transaction>,
}

impl Draft {
    pub fn message(sender: UserId, kind: &str, content: Value) -> Self {
        Self {
            sender,
            kind: kind.to_owned(),
            state_key: None,
            content,
            redacts: None,
            origin_server_ts: None,
            transaction: None,
        }
    }

    pub fn state(sender: UserId, kind: &str, state_key: &str, content: Value) -> Self {
        Self {
            state_key: Some(state_key.to_owned()),
            ..Self::message(sender, kind, content)
        }
    }

    /// Ties forward extremities together; no client shows it.
    pub fn dummy(sender: UserId) -> Self {
        Self::message(sender, "org.matrix.dummy_event", Value::Object(Map::new()))
    }
}

/// The type of [`Draft::dummy`]: what clients are not to see.
pub const DUMMY_EVENT: &str = "org.matrix.dummy_event";

#[derive(Clone, Debug, PartialEq)]
pub struct Sent {
    pub room: RoomId,
    pub version: RoomVersion,
    /// One for each draft.
    pub events: Vec<SentEvent>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct SentEvent {
    pub event_id: EventId,
    pub nid: EventNid,
    /// The state was like that already, so there is no new event (R-68, J-5).
    pub unchanged: bool,
}

/// Why nothing was sent.
#[derive(Clone, Debug, PartialEq)]
pub enum Unsent {
    Refused(Refusal),
    /// A restricted join: ask again with how the user stands in these rooms (J-21).
    AskAllowed(Vec<RoomId>),
    /// A restricted join nobody here can grant: the remote handshake, through these servers (J-20).
    JoinRemotely(Vec<ServerName>),
}

impl From<Refusal> for Unsent {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

pub struct Send(Thinker<Sending>);

impl Send {
    /// Adds events to a room that we are in. `allowed` answers an earlier [`Unsent::AskAllowed`].
    pub fn new(
        own: Own,
        room: RoomId,
        drafts: Vec<Draft>,
        allowed: Option<AllowedRooms>,
        now: Now,
    ) -> Self {
        let facts = Facts::new(room);
        Self(Thinker::new(
            Sending {
                own,
                drafts,
                allowed,
                creating: None,
                now,
            },
            facts,
        ))
    }

    /// Creates a room; the first draft is the create event. `room` is the new id, `None` exactly for
    /// version 12 and later, where the create event makes it.
    pub fn create(
        own: Own,
        version: RoomVersion,
        room: Option<RoomId>,
        drafts: Vec<Draft>,
        now: Now,
    ) -> Result<Self, Refusal> {
        let mut this = Sending {
            own,
            drafts,
            allowed: None,
            creating: Some(version),
            now,
        };
        let create = this
            .drafts
            .first()
            .ok_or_else(|| Refusal::invalid_param("a room needs a create event"))?;
        let create = this.sign(version, room, create, Vec::new(), Vec::new(), 1)?;
        // What is signed once stays: in version 12 the room's id hangs on it.
        this.drafts[0].origin_server_ts = Some(create.origin_server_ts);
        let facts = Facts::new(create.room_id.clone());
        Ok(Self(Thinker::new(this, facts)))
    }
}

impl Machine for Send {
    type Outcome = Result<Sent, Unsent>;

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

struct Sending {
    own: Own,
    drafts: Vec<Draft>,
    allowed: Option<AllowedRooms>,
    creating: Option<RoomVersion>,
    now: Now,
}

/// What the drafts have come to so far.
struct Progress {
    view: View,
    head: Option<Arc<Head>>,
    hosts: Vec<ServerName>,
    writes: WriteSet,
    events: Vec<SentEvent>,
}

enum Composed {
    Unchanged(SentEvent),
    New(Composition),
}

struct Composition {
    pdu: Arc<Pdu>,
    before: StateMap,
    partial: bool,
    /// What stood at its state key.
    was: Option<Arc<Pdu>>,
}

/// An event of ours for this room as it stands, signed and allowed, but not to be stored so far; the whole
/// state before it comes with it. `None`: the state says the same already.
pub(crate) fn compose(
    own: &Own,
    facts: &mut Facts,
    draft: &Draft,
    now: Now,
) -> Got<Result<Option<(Arc<Pdu>, StateMap)>, Unsent>> {
    let (head, hosts) = both(facts.head(), facts.hosts())?;
    let sending = Sending {
        own: own.clone(),
        drafts: Vec::new(),
        allowed: None,
        creating: None,
        now,
    };
    let progress = match sending.begin(facts, head, hosts) {
        Ok(progress) => progress,
        Err(unsent) => return Ok(Err(unsent)),
    };
    Ok(match sending.compose(facts, &progress, draft)? {
        Ok(Composed::New(composed)) => Ok(Some((composed.pdu, composed.before))),
        Ok(Composed::Unchanged(_)) => Ok(None),
        Err(unsent) => Err(unsent),
    })
}

impl Decide for Sending {
    type Outcome = Result<Sent, Unsent>;

    fn wants_proof(outcome: &Self::Outcome) -> bool {
        outcome.is_err()
    }

    fn decide(&self, facts: &mut Facts) -> Got<Decision<Self::Outcome>> {
        let (head, hosts) = both(facts.head(), facts.hosts())?;
        let mut progress = match self.begin(facts, head, hosts) {
            Ok(progress) => progress,
            Err(unsent) => return Ok(Decision::Done(Err(unsent))),
        };
        for draft in &self.drafts {
            if let Err(unsent) = self.add(facts, &mut progress, draft)? {
                return Ok(Decision::Done(Err(unsent)));
            }
        }
        let sent = Sent {
            room: facts.room.clone(),
            version: progress.view.version,
            events: progress.events,
        };
        let mut writes = progress.writes;
        if writes.events.is_empty() {
            return Ok(Decision::Done(Ok(sent)));
        }
        progress.view.write(&mut writes);
        Ok(Decision::Commit {
            writes: Box::new(writes),
            outcome: Ok(sent),
            tell: Vec::new(),
        })
    }
}

impl Sending {
    fn begin(
        &self,
        facts: &Facts,
        head: Option<Arc<Head>>,
        hosts: Vec<ServerName>,
    ) -> Result<Progress, Unsent> {
        let view = match (&head, self.creating) {
            (Some(head), None) => View::of(head),
            (None, Some(version)) => View::empty(version),
            (None, None) => return Err(Refusal::not_found("the room is not known").into()),
            (Some(_), Some(_)) => {
                return Err(Refusal::new(400, "M_ROOM_IN_USE", "the room id is taken").into());
            }
        };
        let mut writes = WriteSet::new(facts.room.clone(), view.version);
        writes.expect = Some(head.as_ref().map_or(0, |head| head.revision));
        Ok(Progress {
            view,
            hosts,
            writes,
            events: Vec::new(),
            head,
        })
    }

    fn add(
        &self,
        facts: &mut Facts,
        progress: &mut Progress,
        draft: &Draft,
    ) -> Got<Result<(), Unsent>> {
        let composed = match self.compose(facts, progress, draft)? {
            Ok(Composed::New(composed)) => composed,
            Ok(Composed::Unchanged(same)) => {
                progress.events.push(same);
                return Ok(Ok(()));
            }
            Err(unsent) => return Ok(Err(unsent)),
        };
        let Composition {
            pdu,
            before,
            partial,
            was,
        } = composed;
        let marker = progress
            .head
            .as_ref()
            .and_then(|head| head.partial.as_ref());
        let hosts = &progress.hosts;
        let fan_out = destinations(&pdu, was.as_deref(), hosts, marker, &self.own.name);
        let placed = Placed::new(facts, pdu.clone(), before, partial, Verdict::Accepted);
        progress.view.add(facts, &placed)?;
        progress.events.push(SentEvent {
            event_id: pdu.event_id.clone(),
            nid: placed.nid,
            unchanged: false,
        });
        let event = placed.into_event(fan_out, draft.transaction.clone());
        progress.writes.events.push(event);
        Ok(Ok(()))
    }

    /// From draft to signed event that passes the auth rules, numbered.
    fn compose(
        &self,
        facts: &mut Facts,
        progress: &Progress,
        draft: &Draft,
    ) -> Got<Result<Composed, Unsent>> {
        let version = progress.view.version;
        let prevs = progress.view.prevs();
        let nids: Vec<_> = prevs.iter().map(|prev| prev.nid).collect();
        let (mut before, partial) = progress.view.before(facts, &nids)?;
        let mut prev_events = progress.view.references(facts, &prevs)?;
        let mut depth = prevs.iter().map(|p| p.depth).max().unwrap_or(0);
        let own_key = state_key(draft);
        let keys = [create_key(), policy::key()];
        facts.number(version, [], own_key.iter().chain(&keys).cloned())?;
        if let Some(invite) = own_invite(facts, &before, draft, &self.own)? {
            depth = depth.max(invite.depth);
            prev_events.push((&*invite).into());
            before = with_invite(facts, before, &invite);
        }
        let draft = match self.completed(facts, progress, &before, draft)? {
            Ok(draft) => draft,
            Err(unsent) => return Ok(Err(unsent)),
        };
        if let Some(same) = unchanged(facts, &before, &draft)? {
            return Ok(Ok(Composed::Unchanged(same)));
        }
        let keys = draft_auth_keys(version, &draft);
        facts.number(version, [], keys.iter().cloned())?;
        let events = facts.state_events(&before, &keys)?;
        let auth_events = events.values().map(|(_, pdu)| (&**pdu).into()).collect();
        let room = Some(facts.room.clone());
        let signed = self.sign(version, room, &draft, prev_events, auth_events, depth + 1);
        let pdu = match signed {
            Ok(pdu) => Arc::new(pdu),
            Err(refusal) => return Ok(Err(refusal.into())),
        };
        facts.add_made(&pdu.event_id);
        facts.number(version, [pdu.event_id.clone()], [])?;
        if let Err(reason) = facts.check_against(&pdu, &before)? {
            let create = facts.state_events(&before, &[create_key()])?;
            let create = create.values().next().map(|(_, pdu)| &**pdu);
            return Ok(Err(match names_creator(&pdu, create) {
                true => Refusal::bad_json(reason).into(),
                false => Refusal::forbidden(reason).into(),
            }));
        }
        let vetted = match &progress.head {
            Some(head) => policy::vet(facts, &self.own, head, &pdu)?,
            None => Ok(pdu),
        };
        let pdu = match vetted {
            Ok(pdu) => pdu,
            Err(refusal) => return Ok(Err(refusal.into())),
        };
        let previous = facts.state_events(&before, own_key.as_slice())?;
        let was = previous.into_values().next().map(|(_, pdu)| pdu);
        Ok(Ok(Composed::New(Composition {
            pdu,
            before,
            partial,
            was,
        })))
    }

    /// The draft with what only the server may put in: who authorises a restricted join (J-4, J-20).
    fn completed(
        &self,
        facts: &Facts,
        progress: &Progress,
        before: &StateMap,
        draft: &Draft,
    ) -> Got<Result<Draft, Unsent>> {
        let mut draft = draft.clone();
        let joins = is_member(&draft) && membership(&draft) == Some("join");
        if is_member(&draft)
            && let Some(content) = draft.content.as_object_mut()
        {
            content.remove(AUTHORISED_BY);
        }
        let (true, Some(head)) = (joins, &progress.head) else {
            return Ok(Ok(draft));
        };
        let (user, allowed) = (draft.sender.clone(), self.allowed.as_ref());
        let version = progress.view.version;
        let standing =
            restricted::standing(facts, version, before, &user, &head.local_joined, allowed)?;
        Ok(match standing {
            Standing::Ordinary => Ok(draft),
            Standing::Ask(rooms) => Err(Unsent::AskAllowed(rooms)),
            Standing::Refused(refusal) if refusal.status == 403 => Err(refusal.into()),
            Standing::Refused(_) | Standing::NobodyToGrant => {
                Err(Unsent::JoinRemotely(progress.hosts.clone()))
            }
            Standing::GrantedBy(by) => {
                if let Some(content) = draft.content.as_object_mut() {
                    content.insert(AUTHORISED_BY.to_owned(), by.as_str().into());
                }
                Ok(draft)
            }
        })
    }

    fn sign(
        &self,
        version: RoomVersion,
        room: Option<RoomId>,
        draft: &Draft,
        prev_events: Vec<Reference>,
        auth_events: Vec<Reference>,
        depth: i64,
    ) -> Result<Pdu, Refusal> {
        let is_create = draft.kind == "m.room.create";
        let hashed_id = version.rules().room_id_is_create_hash;
        PduDraft {
            room_id: room.filter(|_| !(is_create && hashed_id)),
            sender: draft.sender.clone(),
            kind: draft.kind.clone(),
            state_key: draft.state_key.clone(),
            content: draft.content.clone(),
            prev_events,
            auth_events,
            depth,
            origin_server_ts: draft.origin_server_ts.unwrap_or(self.now.unix_ms),
            redacts: draft.redacts.clone(),
            extra: Map::new(),
        }
        .sign(&self.own.key, &self.own.name, version)
        .map_err(|error| Refusal::bad_event(&error))
    }
}

fn create_key() -> StateKey {
    ("m.room.create".into(), "".into())
}

fn state_key(draft: &Draft) -> Option<StateKey> {
    Some((
        draft.kind.as_str().into(),
        draft.state_key.as_deref()?.into(),
    ))
}

fn draft_auth_keys(version: RoomVersion, draft: &Draft) -> Vec<StateKey> {
    auth::auth_types(
        version,
        &draft.kind,
        &draft.sender,
        draft.state_key.as_deref(),
        &draft.content,
    )
}

fn is_member(draft: &Draft) -> bool {
    draft.kind == "m.room.member" && draft.state_key.is_some()
}

fn membership(draft: &Draft) -> Option<&str> {
    draft.content.get("membership").and_then(Value::as_str)
}

/// The event that says the same already, from the same sender.
fn unchanged(facts: &Facts, state: &StateMap, draft: &Draft) -> Got<Option<SentEvent>> {
    let Some(key) = state_key(draft) else {
        return Ok(None);
    };
    let events = facts.state_events(state, std::slice::from_ref(&key))?;
    let same = events
        .get(&key)
        .filter(|(_, pdu)| pdu.sender == draft.sender && same_content(pdu, draft));
    Ok(same.map(|(nid, pdu)| SentEvent {
        event_id: pdu.event_id.clone(),
        nid: *nid,
        unchanged: true,
    }))
}

/// Who authorised an earlier join does not make a later one another.
fn same_content(pdu: &Pdu, draft: &Draft) -> bool {
    let mut content = pdu.content_value();
    if is_member(draft)
        && let Some(content) = content.as_object_mut()
    {
        let mut wanted = draft.content.clone();
        if let Some(wanted) = wanted.as_object_mut() {
            wanted.remove(AUTHORISED_BY);
        }
        content.remove(AUTHORISED_BY);
        return Value::Object(content.clone()) == wanted;
    }
    content == draft.content
}

/// J-77: an invite that reached us by `/invite` alone. Our user's answer to it stands on it.
fn own_invite(facts: &Facts, before: &StateMap, draft: &Draft, own: &Own) -> Got<Option<Arc<Pdu>>> {
    let answers = is_member(draft)
        && draft.state_key.as_deref() == Some(draft.sender.as_str())
        && draft.sender.server_str() == own.name.as_str()
        && matches!(membership(draft), Some("join" | "leave"));
    if !answers {
        return Ok(None);
    }
    let key = state_key(draft).expect("a member event has one");
    let now = facts.state_events(before, std::slice::from_ref(&key))?;
    let membership = now.get(&key).and_then(|(_, pdu)| pdu.membership());
    if matches!(membership, Some("join" | "invite" | "ban")) {
        return Ok(None);
    }
    let stored = facts.out_of_band(&draft.sender)?;
    let invite = stored.filter(|stored| &*stored.membership == "invite");
    let Some(invite) = invite else {
        return Ok(None);
    };
    // Its number and its key come with the look-up.
    facts.find(std::slice::from_ref(&invite.pdu.event_id))?;
    Ok(Some(invite.pdu.clone()))
}

fn with_invite(facts: &mut Facts, mut state: StateMap, invite: &Arc<Pdu>) -> StateMap {
    if let (Some(key), Some(nid)) = (facts.key_of(invite), facts.nid(&invite.event_id)) {
        state.insert(key, nid);
    }
    state
}

/// P-41, R-63: the servers in the room, in a partial room also those that were there when we joined; and
/// the server of somebody whose invite or knock this takes back.
pub(crate) fn destinations(
    pdu: &Pdu,
    was: Option<&Pdu>,
    hosts: &[ServerName],
    partial: Option<&PartialMarker>,
    own: &ServerName,
) -> FanOut {
    let mut servers: BTreeSet<ServerName> = hosts.iter().cloned().collect();
    servers.extend(
        partial
            .into_iter()
            .flat_map(|p| p.servers_in_room.iter().cloned()),
    );
    let taken_back = was.is_some_and(|was| matches!(was.membership(), Some("invite" | "knock")));
    if taken_back
        && pdu.is_state()
        && &*pdu.kind == "m.room.member"
        && let Some(Ok(target)) = pdu.state_key.as_deref().map(UserId::parse)
    {
        servers.insert(target.server_name());
    }
    servers.remove(own);
    match servers.is_empty() {
        true => FanOut::Nobody,
        false => FanOut::Servers(servers.into_iter().collect()),
    }
}

/// Whether power levels list a creator, who is above all levels: a slip in the event, not a lack of power
/// (U-35, version 12).
fn names_creator(pdu: &Pdu, create: Option<&Pdu>) -> bool {
    if &*pdu.kind != "m.room.power_levels" || !pdu.version.rules().privileged_creators {
        return false;
    }
    let content = pdu.content_value();
    let users = content.get("users").and_then(Value::as_object);
    let power = PowerLevels::of(pdu.version, create, None);
    users.is_some_and(|users| {
        power
            .creators()
            .iter()
            .any(|creator| users.contains_key(creator.as_str()))
    })
}
