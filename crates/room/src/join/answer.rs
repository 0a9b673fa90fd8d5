//! A send_join answer: collecting it, judging it, and the write set it comes to (joins.md 1.7, 1.8).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use protocol::id::{EventId, ServerName, UserId};
use protocol::nid::EventNid;
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::state::StateMap;

use super::held::Held;
use super::{JoinOptions, JoinRequest, Signed};
use crate::effect::{
    BadPdu, Extremity, Fault, Found, Head, PartialMarker, Place, RawPdu, Section, SentJoin,
    StateKey, StoredEvent, Ticket,
};
use crate::facts::{self, Facts, Got, auth_keys, both};
use crate::rest::Rest;
use crate::sift::{self, Pdus, Sifted};
use crate::write::{EventState, FanOut, IntentChange, NewEvent, PartialChange, Verdict, WriteSet};

/// Servers kept of `servers_in_room`; more would make every local event a broadcast to nowhere.
const SERVERS_MAX: usize = 50_000;
/// Events with a wrong signature that others are asked for.
const FORGED_MAX: usize = 1000;

/// One answer, as far as it has come in.
pub(super) struct Reply {
    server: ServerName,
    omit_members: bool,
    checks: BTreeMap<Ticket, Section>,
    event_check: Option<Ticket>,
    /// Ids of the `state` section, in its order.
    state: Vec<EventId>,
    pdus: Pdus,
    bad: u64,
    /// Bad ones of which another copy may be good, by section.
    forged: Vec<(Section, EventId)>,
    held: Held,
    /// What was wrong with the first of the bad ones.
    fault: Option<String>,
    end: Option<SentJoin>,
    event: Option<Result<Arc<Pdu>, String>>,
    asked_for_auth_events: bool,
}

/// What an answer comes to.
pub(super) enum Conclusion {
    Store {
        writes: Box<WriteSet>,
        partial: bool,
        /// What is to be looked at behind the user.
        rest: Option<Box<Rest>>,
    },
    /// Auth events of our join are missing (J-64).
    AskForAuthEvents,
    /// The answer can not be used; another one may (J-35).
    BadCandidate(String),
    /// Our join does not pass the auth rules on this state (J-63).
    Rejected(String),
}

type Judged<T> = Result<T, Conclusion>;

fn bad<T>(reason: &str) -> Judged<T> {
    Err(Conclusion::BadCandidate(reason.to_owned()))
}

// -- collecting -----------------------------------------------------------------------------------

impl Reply {
    pub fn new(server: ServerName, omit_members: bool) -> Self {
        Self {
            server,
            omit_members,
            checks: BTreeMap::new(),
            event_check: None,
            state: Vec::new(),
            pdus: Pdus::new(),
            bad: 0,
            forged: Vec::new(),
            held: Held::default(),
            fault: None,
            end: None,
            event: None,
            asked_for_auth_events: false,
        }
    }

    pub fn server(&self) -> &ServerName {
        &self.server
    }

    pub fn omit_members(&self) -> bool {
        self.omit_members
    }

    pub fn len(&self) -> u64 {
        self.pdus.len() as u64 + self.bad
    }

    /// Sorts a part of the body: what is to be checked at once comes back. With `members_first` the members
    /// beyond that many are held.
    pub fn sort(
        &mut self,
        section: Section,
        pdus: Vec<RawPdu>,
        members_first: Option<usize>,
    ) -> Vec<RawPdu> {
        match members_first {
            Some(pass) => self.held.sort(section, pdus, pass),
            None => pdus,
        }
    }

    /// Of what is held, that which must be checked before the answer can be judged; by section.
    pub fn release(&mut self, signed: &Signed) -> Vec<(Section, Vec<RawPdu>)> {
        if self.held.is_empty() {
            return Vec::new();
        }
        let omitted = self.end.as_ref().is_some_and(|end| end.members_omitted);
        let released = match omitted {
            // These are the few that are needed, or ought to be.
            true => self.held.release_all(),
            false => {
                let mut users = self.users_needed(signed);
                users.extend(self.held.users_of(&signed.pdu.sender.server_name()));
                self.held.release(&users)
            }
        };
        let (state, chain): (Vec<_>, Vec<_>) = released
            .into_iter()
            .partition(|(section, _)| *section == Section::State);
        [(Section::State, state), (Section::AuthChain, chain)]
            .into_iter()
            .filter(|(_, pdus)| !pdus.is_empty())
            .map(|(section, pdus)| (section, pdus.into_iter().map(|(_, pdu)| pdu).collect()))
            .collect()
    }

    /// Whose memberships the auth rules look at for what is here (J-62), and those of our own users, for
    /// their clients.
    fn users_needed(&self, signed: &Signed) -> BTreeSet<Arc<str>> {
        let mut users: BTreeSet<Arc<str>> = BTreeSet::new();
        let missing = |id: &EventId| !self.pdus.contains_key(id);
        for pdu in self.pdus.values() {
            if pdu.auth_events.iter().any(missing) {
                users.insert(pdu.sender.as_str().into());
                users.extend(pdu.state_key.clone());
            }
        }
        let join = &signed.pdu;
        users.insert(join.sender.as_str().into());
        let authorising = join.content_get_str("join_authorised_via_users_server");
        users.extend(authorising.map(|user| user.as_ref().into()));
        users
    }

    /// How many checks of it run.
    pub fn checks(&self) -> usize {
        self.checks.len()
    }

    pub fn await_part(&mut self, check: Ticket, section: Section) {
        self.checks.insert(check, section);
    }

    pub fn end(&mut self, end: SentJoin, event_check: Option<Ticket>) {
        self.end = Some(end);
        self.event_check = event_check;
    }

    pub fn awaits(&self, check: Ticket) -> bool {
        self.checks.contains_key(&check) || self.event_check == Some(check)
    }

    pub fn on_checked(&mut self, check: Ticket, pdus: Vec<Result<Arc<Pdu>, BadPdu>>) {
        if self.event_check == Some(check) {
            self.event_check = None;
            self.event = pdus
                .into_iter()
                .next()
                .map(|event| event.map_err(|bad| bad.reason));
            return;
        }
        let Some(section) = self.checks.remove(&check) else {
            return;
        };
        for pdu in pdus {
            match pdu {
                Ok(pdu) => self.add(section, pdu),
                // Left out; the join goes on (J-59).
                Err(bad) => {
                    self.bad += 1;
                    if bad.fault == Fault::Signature
                        && self.forged.len() < FORGED_MAX
                        && let Some(id) = bad.event_id
                    {
                        self.forged.push((section, id));
                    }
                    self.fault.get_or_insert(bad.reason);
                }
            }
        }
    }

    pub fn add_to_chain(&mut self, pdus: Vec<Result<Arc<Pdu>, BadPdu>>) {
        self.asked_for_auth_events = true;
        for pdu in pdus.into_iter().flatten() {
            self.add(Section::AuthChain, pdu);
        }
    }

    fn add(&mut self, section: Section, pdu: Arc<Pdu>) {
        if section == Section::State {
            self.state.push(pdu.event_id.clone());
        }
        self.pdus.insert(pdu.event_id.clone(), pdu);
    }

    pub fn complete(&self) -> bool {
        self.end.is_some() && self.checks.is_empty() && self.event_check.is_none()
    }
}

// -- judging --------------------------------------------------------------------------------------

/// All that is decided about an answer before our own join is looked at.
struct Room {
    version: RoomVersion,
    join: Arc<Pdu>,
    create: Arc<Pdu>,
    partial: bool,
    /// Whether it is partial by our own choice.
    put_off: bool,
    servers: Vec<ServerName>,
}

impl Reply {
    /// What the answer comes to, or which facts are lacking to say so.
    pub fn conclude(
        &self,
        request: &JoinRequest,
        options: &JoinOptions,
        signed: &Signed,
        facts: &mut Facts,
    ) -> Got<Conclusion> {
        let mut room = match self.inspect(request, signed) {
            Ok(room) => room,
            Err(conclusion) => return Ok(conclusion),
        };
        let head = facts.head()?;
        let in_room = head
            .as_ref()
            .is_some_and(|head| !head.local_joined.is_empty());
        let full_here = head.as_ref().is_some_and(|head| head.partial.is_none());
        if room.partial && in_room && full_here {
            // The room must not fall back to partial (S-37); a full answer is what helps.
            return Ok(Conclusion::BadCandidate("the room is full here".to_owned()));
        }
        if let Some(conclusion) = here_already(request, &room, facts)? {
            return Ok(conclusion);
        }
        let stored = self.known(&room, facts)?;
        let missing = |id: &EventId| !self.pdus.contains_key(id) && !stored.contains_key(id);
        if room.join.auth_events.iter().any(missing) {
            return Ok(match self.asked_for_auth_events {
                false => Conclusion::AskForAuthEvents,
                true => Conclusion::BadCandidate("auth events of the join are missing".to_owned()),
            });
        }
        let create = Some(&room.create);
        let sifted = sift::sift(room.version, &request.room, &self.pdus, &stored, create);
        publish(&sifted, facts);
        let lacks = !self.forged.is_empty() || !sifted.left_out.is_empty();
        if lacks && options.ask_for_left_out && !room.partial && !(in_room && full_here) {
            self.put_off(&mut room);
        }
        let auth = match self.join_auth(&room, &sifted, &stored, facts) {
            Ok(auth) => auth,
            Err(conclusion) => return Ok(conclusion),
        };
        let answered = self.state_map(&sifted, &stored, facts);
        let standing = match head.filter(|_| in_room) {
            Some(head) => Standing::beside(head, &room, answered, &stored, facts)?,
            None => Standing::alone(answered),
        };
        let passes = match room.partial {
            true => facts.check_against_partial(&room.join, &standing.before, &auth)?,
            false => facts.check_against(&room.join, &standing.before)?,
        };
        if let Err(reason) = passes {
            return Ok(Conclusion::Rejected(reason));
        }
        let rest = room.put_off.then(|| Box::new(self.rest(&room, &sifted)));
        let writes = self.writes(request, &room, sifted, &standing, facts)?;
        Ok(Conclusion::Store {
            partial: room.partial,
            writes: Box::new(writes),
            rest,
        })
    }

    /// Not all of a full answer is here, or not so far: the room is opened as if the members had been left
    /// out.
    fn put_off(&self, room: &mut Room) {
        let joined = self.state.iter().filter_map(|id| {
            let pdu = &self.pdus[id];
            let user = pdu.state_key.as_deref()?;
            (pdu.membership() == Some("join")).then(|| UserId::parse(user).ok())?
        });
        room.put_off = true;
        room.partial = true;
        room.servers.extend(
            joined
                .map(|user| user.server_name())
                .chain(self.held.servers().iter().cloned()),
        );
    }

    fn rest(&self, room: &Room, sifted: &Sifted) -> Rest {
        let bad_state = self.forged.iter().filter(|(s, _)| *s == Section::State);
        let bad_state = bad_state.map(|(_, id)| id.clone());
        Rest {
            join: room.join.event_id.clone(),
            from: self.server.clone(),
            state: self.state.iter().cloned().chain(bad_state).collect(),
            bad: self.forged.iter().map(|(_, id)| id.clone()).collect(),
            left_out: sifted
                .left_out
                .iter()
                .map(|id| self.pdus[id].clone())
                .collect(),
            held: self.held.rest().collect(),
        }
    }

    /// J-53, with what may be the reason: nobody's keys to be had, say.
    fn no_create_event(&self) -> Conclusion {
        let mut reason = "the state has no create event".to_owned();
        if let Some(fault) = &self.fault {
            reason += &format!("; {} events are bad, the first: {fault}", self.bad);
        }
        Conclusion::BadCandidate(reason)
    }

    /// J-51 to J-58: what needs no look into the store.
    fn inspect(&self, request: &JoinRequest, signed: &Signed) -> Judged<Room> {
        let end = self.end.clone().unwrap_or_default();
        let join = self.accepted_join(signed)?;
        if join.room_id != request.room {
            return bad("the join names another room");
        }
        let create = match sift::create_event(&self.pdus) {
            Ok(Some(create)) if self.state.contains(&create.event_id) => create,
            Ok(_) => return Err(self.no_create_event()),
            Err(reason) => return Err(Conclusion::BadCandidate(reason)),
        };
        if create.room_id != request.room {
            return bad("the create event is that of another room");
        }
        let version = version_of(&create, signed)?;
        let servers = end.servers_in_room.unwrap_or_default();
        if end.members_omitted && !self.omit_members {
            return bad("members are omitted though all were asked for");
        }
        if end.members_omitted && servers.is_empty() {
            return bad("members are omitted, and no servers named");
        }
        let mut room = Room {
            version,
            join,
            create,
            partial: end.members_omitted,
            put_off: false,
            servers,
        };
        if !self.held.is_empty() {
            self.put_off(&mut room);
        }
        Ok(room)
    }

    /// J-51, J-52: the join as the resident holds it.
    fn accepted_join(&self, signed: &Signed) -> Judged<Arc<Pdu>> {
        match &self.event {
            Some(Ok(event)) if event.event_id == signed.pdu.event_id => Ok(event.clone()),
            Some(Ok(_)) => bad("the answer is about another join"),
            Some(Err(reason)) => bad(reason),
            None if signed.restricted => bad("the authorising server did not sign the join"),
            None => Ok(signed.pdu.clone()),
        }
    }

    /// Numbers for all that will be stored, and what the answer leaves to the store.
    fn known(&self, room: &Room, facts: &Facts) -> Got<BTreeMap<EventId, Found>> {
        let mut ids = sift::outside(&self.pdus);
        let own_auth = room.join.auth_events.iter();
        ids.extend(own_auth.filter(|id| !self.pdus.contains_key(*id)).cloned());
        ids.extend(room.join.prev_events.iter().cloned());
        ids.extend(self.forged.iter().map(|(_, id)| id.clone()));
        let ids: Vec<_> = ids.into_iter().collect();
        let events = self.pdus.keys().chain([&room.join.event_id]).cloned();
        let keys = self.pdus.values().filter_map(|pdu| state_key(pdu));
        let keys = keys
            .chain(auth_keys(&room.join))
            .chain(state_key(&room.join));
        let (found, ()) = both(facts.find(&ids), facts.number(room.version, events, keys))?;
        let found = ids.into_iter().zip(found);
        Ok(found.filter_map(|(id, found)| Some((id, found?))).collect())
    }

    /// J-63 (a): the join against its own auth events.
    fn join_auth(
        &self,
        room: &Room,
        sifted: &Sifted,
        stored: &BTreeMap<EventId, Found>,
        facts: &Facts,
    ) -> Judged<Vec<(EventNid, Arc<Pdu>)>> {
        let verdicts = sifted.verdicts();
        let mut auth: Vec<(Arc<Pdu>, bool)> = Vec::new();
        for id in &room.join.auth_events {
            match (self.pdus.get(id), stored.get(id)) {
                (Some(pdu), _) => match verdicts.get(id) {
                    Some(verdict) => auth.push((pdu.clone(), **verdict != Verdict::Accepted)),
                    None => return bad("an auth event of the join can not be used"),
                },
                (None, Some(found)) => auth.push((found.pdu.clone(), found.known.rejected)),
                (None, None) => return bad("an auth event of the join is missing"),
            }
        }
        let by_ref: Vec<_> = auth
            .iter()
            .map(|(pdu, rejected)| (&**pdu, *rejected))
            .collect();
        match sift::match_auth(room.version, &room.join, Some(&room.create), &by_ref) {
            Verdict::Accepted => {}
            Verdict::Rejected(reason) | Verdict::SoftFailed(reason) => {
                return Err(Conclusion::Rejected(reason));
            }
        }
        let numbered = auth
            .into_iter()
            .filter_map(|(pdu, _)| Some((facts.nid(&pdu.event_id)?, pdu)));
        Ok(numbered.collect())
    }

    /// The `state` section as a map. Rejected and left-out events are not state (J-60, J-61). Of what came forged
    /// the true one may be here already (J-59).
    fn state_map(
        &self,
        sifted: &Sifted,
        stored: &BTreeMap<EventId, Found>,
        facts: &Facts,
    ) -> StateMap {
        let verdicts = sifted.verdicts();
        let mut map = StateMap::new();
        for id in &self.state {
            let pdu = &self.pdus[id];
            let accepted = verdicts.get(id).is_some_and(|v| **v == Verdict::Accepted);
            if let (true, Some(key), Some(nid)) = (accepted, facts.key_of(pdu), facts.nid(id))
                && map.get(key).is_none()
            {
                map.insert(key, nid);
            }
        }
        let forged = self.forged.iter().filter(|(s, _)| *s == Section::State);
        for (_, id) in forged {
            if let Some(Found { known, .. }) = stored.get(id)
                && let (false, Some(key)) = (known.rejected, known.key)
                && map.get(key).is_none()
            {
                map.insert(key, known.nid);
            }
        }
        map
    }

    fn writes(
        &self,
        request: &JoinRequest,
        room: &Room,
        sifted: Sifted,
        standing: &Standing,
        facts: &mut Facts,
    ) -> Got<WriteSet> {
        let nid = facts.nid(&room.join.event_id).expect("numbered before");
        let key = facts.key_of(&room.join);
        let after = facts::after(&standing.before, key, nid, true);
        let auth_events = room.join.auth_events.iter();
        let stored = StoredEvent {
            pdu: room.join.clone(),
            auth_events: auth_events.filter_map(|id| facts.nid(id)).collect(),
            rejected: false,
        };
        facts.add_own(nid, stored);
        let mut maps = standing.others.clone();
        maps.push(after.clone());
        let current = facts.resolve(room.version, maps)?;
        let mut writes = WriteSet::new(request.room.clone(), room.version);
        writes.expect = Some(facts.head()?.map_or(0, |head| head.revision));
        writes.events = sifted
            .usable
            .into_iter()
            .map(|(pdu, verdict)| outlier(pdu, verdict, facts))
            .collect();
        writes.events.push(NewEvent {
            nid,
            pdu: room.join.clone(),
            key,
            place: Place::Timeline,
            state: Some(EventState {
                before: standing.before.clone(),
                after,
                partial: room.partial,
            }),
            verdict: Verdict::Accepted,
            fan_out: FanOut::Nobody,
            transaction: None,
        });
        let mut extremities = standing.extremities.clone();
        extremities.push(Extremity {
            nid,
            event_id: room.join.event_id.clone(),
            depth: room.join.depth,
            partial: room.partial,
        });
        writes.forward_extremities = Some(extremities);
        writes.current_state = Some(current);
        if room.partial {
            writes.partial = PartialChange::Mark(self.marker(request, room));
        }
        writes.intent = Some(IntentChange::Fulfil { job: request.job });
        Ok(writes)
    }

    fn marker(&self, request: &JoinRequest, room: &Room) -> PartialMarker {
        let mut servers: BTreeSet<_> = room.servers.iter().take(SERVERS_MAX).cloned().collect();
        servers.insert(self.server.clone());
        // We are not in the room yet; asking ourselves about it would lead nowhere.
        servers.remove(&request.user.server_name());
        PartialMarker {
            servers_in_room: servers.into_iter().collect(),
            joined_via: self.server.clone(),
            join_event: room.join.event_id.clone(),
            device_lists_at: request.device_lists_at,
        }
    }
}

/// Where our join stands in the DAG we hold.
struct Standing {
    before: StateMap,
    /// Forward extremities that stay beside the join, and the states after them.
    extremities: Vec<Extremity>,
    others: Vec<StateMap>,
}

impl Standing {
    /// We were not in the room: what we held of it before gives way (J-66).
    fn alone(answered: StateMap) -> Self {
        Self {
            before: answered,
            extremities: Vec::new(),
            others: Vec::new(),
        }
    }

    /// Another of our users is in the room (J-74).
    fn beside(
        head: Arc<Head>,
        room: &Room,
        answered: StateMap,
        stored: &BTreeMap<EventId, Found>,
        facts: &mut Facts,
    ) -> Got<Self> {
        let prevs = &room.join.prev_events;
        let known: Vec<_> = prevs
            .iter()
            .filter_map(|id| Some(stored.get(id)?.known))
            .filter(|known| known.place != Place::Outlier)
            .map(|known| known.nid)
            .collect();
        let extremities: Vec<_> = head
            .forward_extremities
            .iter()
            .filter(|extremity| !prevs.contains(&extremity.event_id))
            .cloned()
            .collect();
        let nids: Vec<_> = extremities.iter().map(|e| e.nid).collect();
        let (at_prevs, at_others) = both(facts.states(&known), facts.states(&nids))?;
        let after = |states: Vec<Option<crate::effect::StateAt>>| -> Vec<StateMap> {
            states.into_iter().flatten().map(|at| at.after).collect()
        };
        let before = match room.partial {
            true => {
                let all_known = known.len() == prevs.len();
                let mut maps = after(at_prevs);
                maps.extend((!all_known || maps.is_empty()).then_some(answered));
                facts.resolve(room.version, maps)?
            }
            false => answered,
        };
        Ok(Self {
            before,
            extremities,
            others: after(at_others),
        })
    }
}

/// Another of our users is in the room, so the join can have come to us as any event does, and been judged
/// as one, before the answer was here.
fn here_already(request: &JoinRequest, room: &Room, facts: &Facts) -> Got<Option<Conclusion>> {
    let found = facts.find(std::slice::from_ref(&room.join.event_id))?;
    let Some(found) = found
        .into_iter()
        .flatten()
        .find(|found| found.known.place != Place::Outlier)
    else {
        return Ok(None);
    };
    if found.known.rejected {
        return Ok(Some(Conclusion::Rejected(
            "it did not pass here".to_owned(),
        )));
    }
    let mut writes = WriteSet::new(request.room.clone(), room.version);
    writes.intent = Some(IntentChange::Fulfil { job: request.job });
    Ok(Some(Conclusion::Store {
        writes: Box::new(writes),
        partial: found.known.partial,
        rest: None,
    }))
}

/// J-54, J-25.
fn version_of(create: &Pdu, signed: &Signed) -> Judged<RoomVersion> {
    let content = create.content_value();
    let named = content
        .get("room_version")
        .map_or(Some("1"), |version| version.as_str());
    let version = named.and_then(RoomVersion::parse);
    match version {
        Some(version) if version == signed.pdu.version => Ok(version),
        Some(version @ RoomVersion::V2) if !signed.version_named => Ok(version),
        _ => bad("the create event's room version is not the template's"),
    }
}

/// Lets the facts speak of the answer's events as if they were stored.
fn publish(sifted: &Sifted, facts: &mut Facts) {
    for (pdu, verdict) in &sifted.usable {
        let nid = facts.nid(&pdu.event_id).expect("numbered before");
        let auth_events = pdu.auth_events.iter().filter_map(|id| facts.nid(id));
        let event = StoredEvent {
            pdu: pdu.clone(),
            auth_events: auth_events.collect(),
            rejected: *verdict != Verdict::Accepted,
        };
        facts.add_own(nid, event);
    }
}

fn outlier(pdu: Arc<Pdu>, verdict: Verdict, facts: &Facts) -> NewEvent {
    NewEvent {
        nid: facts.nid(&pdu.event_id).expect("numbered before"),
        key: facts.key_of(&pdu),
        pdu,
        place: Place::Outlier,
        state: None,
        verdict,
        fan_out: FanOut::Nobody,
        transaction: None,
    }
}

fn state_key(pdu: &Pdu) -> Option<StateKey> {
    Some((pdu.kind.clone(), pdu.state_key.clone()?))
}
