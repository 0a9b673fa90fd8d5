//! A server of the room, played by the test: it serves what it is told to, notes what it is sent, and whatever
//! else happens is a fault (T-0c).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use axum::extract::{Path, Query, Request, State};
use axum::http::StatusCode;
use axum::routing::{get, post, put};
use axum::{Json, Router};
use federation::{Body, Call, Client};
use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::pdu::{Pdu, Signature};
use protocol::room_version::RoomVersion;
use protocol::signature::{Keys, POLICY_KEY_ID, SigningKey, VerifyKey, verify_pdu};
use room::effect::{Answer, Ask, AskError, Handshake};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::dag::{Room, VERSION, ids, now_ms};
use crate::network::Network;
use crate::world::{PATIENCE, key_of};

pub struct Resident {
    pub name: ServerName,
    key: SigningKey,
    client: Client,
    rooms: Mutex<BTreeMap<RoomId, Arc<Room>>>,
    script: Mutex<Script>,
    heard: watch::Sender<Heard>,
    numbers: AtomicU64,
    /// Of the device lists of its users, all in one.
    device_stream: AtomicU64,
}

/// What is served beyond the handshake, events and keys.
#[derive(Default)]
struct Script {
    /// By the event that is asked about.
    states: BTreeMap<EventId, ServedState>,
    event_auth: bool,
    /// By the event before which they are missing.
    gaps: BTreeMap<EventId, Vec<Arc<Pdu>>>,
    /// Not served by `/event`.
    hidden: BTreeSet<EventId>,
    devices: bool,
    leaves: bool,
    /// `servers_in_room` names nobody else.
    alone: bool,
    /// Every `/state_ids` gets this status and body, once the gate is open.
    state_ids: Option<(u16, Value, Gate)>,
    make_join: Option<Gate>,
    send_join: Option<Gate>,
    /// Joins are let in by charlie, who is named in them; the joining server has the room already, so it is
    /// given all of it.
    authorises: bool,
    /// It has never heard of partial answers, as most servers have not.
    gives_all: bool,
    keys: Option<Gate>,
    /// Its copy of this event is badly signed.
    forged: Option<EventId>,
    history: bool,
    /// Joins are answered with the whole state, whatever was asked for.
    full: bool,
    /// The test wants to hear of the devices of those who join in full.
    hears_of_devices: bool,
    /// `send_join` is served in its first version only.
    only_v1: bool,
    /// What is answered instead, by the endpoint's name.
    answers: BTreeMap<String, (u16, Value)>,
}

struct ServedState {
    state: Vec<Arc<Pdu>>,
    /// Whether `/state_ids` may be answered; `/state` is, at once (T-0b).
    released: Gate,
}

/// Closed until the test opens it.
#[derive(Clone)]
pub struct Gate(watch::Sender<bool>);

impl Gate {
    pub fn new(open: bool) -> Self {
        Self(watch::Sender::new(open))
    }

    pub fn open(&self) {
        self.0.send_replace(true);
    }

    async fn pass(&self) {
        let _ = self.0.subscribe().wait_for(|open| *open).await;
    }
}

/// What came in and was not yet looked at by the test.
#[derive(Default)]
struct Heard {
    pdus: Vec<Arc<Pdu>>,
    edus: Vec<Value>,
    asked: Vec<String>,
    /// The earliest and the latest of each `get_missing_events`.
    gaps: Vec<(Vec<EventId>, Vec<EventId>)>,
    faults: Vec<String>,
}

type Refusal = (StatusCode, Json<Value>);
type Reply = Result<Json<Value>, Refusal>;

fn refusal(status: StatusCode, errcode: &str, error: &str) -> Refusal {
    (status, Json(json!({ "errcode": errcode, "error": error })))
}

impl Resident {
    /// Puts a server with this name on the network.
    pub fn start(network: &Arc<Network>, name: &str) -> Arc<Self> {
        let name = ServerName::parse(name).unwrap();
        let key = key_of(&name);
        let resident = Arc::new(Self {
            client: Client::new(network.clone(), name.clone(), key.clone()),
            name: name.clone(),
            key,
            rooms: Mutex::default(),
            script: Mutex::default(),
            heard: watch::Sender::default(),
            numbers: AtomicU64::default(),
            device_stream: AtomicU64::new(2),
        });
        let v1 = |path: &str| format!("/_matrix/federation/v1{path}");
        let router = Router::new()
            .route("/_matrix/key/v2/server", get(keys))
            .route(&v1("/make_join/{room}/{user}"), get(make_join))
            .route(&v1("/send_join/{room}/{event}"), put(send_join_v1))
            .route(
                "/_matrix/federation/v2/send_join/{room}/{event}",
                put(send_join),
            )
            .route(&v1("/make_leave/{room}/{user}"), get(make_leave))
            .route(
                "/_matrix/federation/v2/send_leave/{room}/{event}",
                put(send_leave),
            )
            .route(&v1("/event/{event}"), get(event))
            .route(&v1("/event_auth/{room}/{event}"), get(event_auth))
            .route(&v1("/state_ids/{room}"), get(state_ids))
            .route(&v1("/state/{room}"), get(whole_state))
            .route(&v1("/get_missing_events/{room}"), post(missing_events))
            .route(&v1("/backfill/{room}"), get(backfill))
            .route(&v1("/send/{txn}"), put(transaction))
            .route("/_matrix/policy/v1/sign", post(policy_sign))
            .route("/_matrix/federation/v2/invite/{room}/{event}", put(invite))
            .route(&v1("/user/devices/{user}"), get(user_devices))
            .route(&v1("/user/keys/query"), post(keys_query))
            .fallback(unexpected)
            .with_state(resident.clone());
        network.add(name, router);
        resident
    }

    /// Somebody who says to be this server, and has not its key.
    pub fn impostor(network: &Arc<Network>, name: &str) -> Client {
        let name = ServerName::parse(name).unwrap();
        let key = SigningKey::generate([99; 32], "1").unwrap();
        Client::new(network.clone(), name, key)
    }

    pub fn user(&self, localpart: &str) -> String {
        format!("@{localpart}:{}", self.name)
    }

    pub fn key(&self) -> &SigningKey {
        &self.key
    }

    /// What it signs with as a policy server.
    pub fn policy_key(&self) -> SigningKey {
        SigningKey::generate([42; 32], "policy_server").unwrap()
    }

    /// The event with its word as a policy server.
    pub fn policy_signed(&self, pdu: &Pdu) -> Arc<Pdu> {
        let signed = protocol::build::cosign(pdu, &self.policy_key(), &self.name);
        Arc::new(signed.unwrap())
    }

    pub fn next_number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// From here on it knows of the room.
    pub fn holds(&self, room: &Arc<Room>) {
        let mut rooms = self.rooms.lock().unwrap();
        rooms.insert(room.id.clone(), room.clone());
    }

    fn room(&self, id: &str) -> Result<Arc<Room>, Refusal> {
        let rooms = self.rooms.lock().unwrap();
        let found = RoomId::parse(id)
            .ok()
            .and_then(|id| rooms.get(&id).cloned());
        found.ok_or_else(|| refusal(StatusCode::NOT_FOUND, "M_NOT_FOUND", "no such room"))
    }

    fn fault(&self, what: String) -> Refusal {
        let refusal = refusal(StatusCode::INTERNAL_SERVER_ERROR, "M_UNKNOWN", &what);
        self.heard.send_modify(|heard| heard.faults.push(what));
        refusal
    }

    fn note(&self, what: String) {
        self.heard.send_modify(|heard| heard.asked.push(what));
    }

    // -- The script ------------------------------------------------------------------------------

    /// Serves the room's state of this moment as the state after its newest event. `/state_ids` waits for
    /// the gate.
    pub fn serve_state(&self, room: &Room, released: &Gate) {
        self.serve_state_at(&room.tip(), room.all_state(), released);
    }

    pub fn serve_state_at(&self, at: &Pdu, state: Vec<Arc<Pdu>>, released: &Gate) {
        let served = ServedState {
            state,
            released: released.clone(),
        };
        let mut script = self.script.lock().unwrap();
        script.states.insert(at.event_id.clone(), served);
    }

    pub fn serve_event_auth(&self) {
        self.script.lock().unwrap().event_auth = true;
    }

    /// From here on `/event` does not give this.
    pub fn hide(&self, pdu: &Pdu) {
        let mut script = self.script.lock().unwrap();
        script.hidden.insert(pdu.event_id.clone());
    }

    /// Serves `get_missing_events` before this event, and before no other that is not named so.
    pub fn serve_gap(&self, latest: &Pdu, events: &[&Arc<Pdu>]) {
        let events = events.iter().map(|pdu| (*pdu).clone()).collect();
        let mut script = self.script.lock().unwrap();
        script.gaps.insert(latest.event_id.clone(), events);
    }

    /// Serves devices of anybody, and counts who asks.
    pub fn serve_devices(&self) {
        self.script.lock().unwrap().devices = true;
    }

    /// Serves the handshake of a leave, which only a debt is paid by.
    pub fn serve_leaves(&self) {
        self.script.lock().unwrap().leaves = true;
    }

    pub fn claim_to_be_alone(&self) {
        self.script.lock().unwrap().alone = true;
    }

    pub fn answer_state_ids(&self, status: u16, body: Value, gate: &Gate) {
        self.script.lock().unwrap().state_ids = Some((status, body, gate.clone()));
    }

    pub fn serve_state_ids_again(&self) {
        self.script.lock().unwrap().state_ids = None;
    }

    pub fn hold_make_join(&self, gate: &Gate) {
        self.script.lock().unwrap().make_join = Some(gate.clone());
    }

    /// Holds back the answer; the join is taken at once.
    pub fn hold_send_join(&self, gate: &Gate) {
        self.script.lock().unwrap().send_join = Some(gate.clone());
    }

    /// From here on joins stand on a word of charlie's, and are answered in full.
    pub fn authorise_joins(&self) {
        self.script.lock().unwrap().authorises = true;
    }

    /// It ignores `omit_members`, and does not name the servers in the room.
    pub fn give_all_members(&self) {
        self.script.lock().unwrap().gives_all = true;
    }

    pub fn hold_keys(&self, gate: &Gate) {
        self.script.lock().unwrap().keys = Some(gate.clone());
    }

    pub fn forge(&self, event: &Pdu) {
        self.script.lock().unwrap().forged = Some(event.event_id.clone());
    }

    pub fn serve_history(&self) {
        self.script.lock().unwrap().history = true;
    }

    pub fn serve_full_joins(&self) {
        self.script.lock().unwrap().full = true;
    }

    pub fn hear_of_devices(&self) {
        self.script.lock().unwrap().hears_of_devices = true;
    }

    pub fn serve_only_v1_joins(&self) {
        let mut script = self.script.lock().unwrap();
        (script.only_v1, script.full) = (true, true);
    }

    /// From here on it does not know of the room.
    pub fn forget(&self, room: &Room) {
        self.rooms.lock().unwrap().remove(&room.id);
    }

    /// `make_join`, `send_join`, `invite` or `sign` gets this answer, whatever it asks.
    pub fn answer(&self, endpoint: &str, status: u16, body: Value) {
        let mut script = self.script.lock().unwrap();
        script.answers.insert(endpoint.to_owned(), (status, body));
    }

    pub fn answer_as_usual(&self, endpoint: &str) {
        self.script.lock().unwrap().answers.remove(endpoint);
    }

    fn scripted(&self, endpoint: &str) -> Option<Reply> {
        let script = self.script.lock().unwrap();
        let (status, body) = script.answers.get(endpoint)?.clone();
        let status = StatusCode::from_u16(status).unwrap();
        Some(match status.is_success() {
            true => Ok(Json(body)),
            false => Err((status, Json(body))),
        })
    }

    // -- What was heard --------------------------------------------------------------------------

    async fn hear<T>(&self, what: &str, take: impl Fn(&mut Heard) -> Option<T>) -> T {
        let mut changes = self.heard.subscribe();
        let found = async {
            loop {
                changes.mark_unchanged();
                let mut found = None;
                self.heard.send_if_modified(|heard| {
                    found = take(heard);
                    false
                });
                if let Some(found) = found {
                    return found;
                }
                changes.changed().await.unwrap();
            }
        };
        match tokio::time::timeout(PATIENCE, found).await {
            Ok(found) => found,
            Err(_) => panic!("{} never hears {what}: {}", self.name, self.summary()),
        }
    }

    /// The one PDU that is so, once it has come.
    pub async fn pdu(&self, what: &str, is_it: impl Fn(&Pdu) -> bool) -> Arc<Pdu> {
        self.hear(what, |heard| {
            let at = heard.pdus.iter().position(|pdu| is_it(pdu))?;
            Some(heard.pdus.remove(at))
        })
        .await
    }

    pub async fn event(&self, id: &str) -> Arc<Pdu> {
        self.pdu(id, |pdu| pdu.event_id.as_str() == id).await
    }

    pub async fn leave_of(&self, user: &str) -> Arc<Pdu> {
        self.pdu("a leave", |pdu| {
            pdu.is("m.room.member", user) && pdu.membership() == Some("leave")
        })
        .await
    }

    pub async fn edu(&self, kind: &str) -> Value {
        self.hear(kind, |heard| {
            let at = heard.edus.iter().position(|edu| edu["edu_type"] == kind)?;
            Some(heard.edus.remove(at)["content"].take())
        })
        .await
    }

    pub fn edus(&self, kind: &str) -> usize {
        let heard = self.heard.borrow();
        let edus = heard.edus.iter();
        edus.filter(|edu| edu["edu_type"] == kind).count()
    }

    /// Waits for a request, the first or, after some, the next.
    pub async fn asked(&self, what: &str) -> String {
        self.hear(what, |heard| {
            let at = heard.asked.iter().position(|line| line.starts_with(what))?;
            Some(heard.asked.remove(at))
        })
        .await
    }

    /// How many such requests came that the test did not wait for; they are forgotten.
    pub fn take_asked(&self, what: &str) -> usize {
        let mut count = 0;
        self.heard.send_if_modified(|heard| {
            let before = heard.asked.len();
            heard.asked.retain(|line| !line.starts_with(what));
            count = before - heard.asked.len();
            false
        });
        count
    }

    /// What each `get_missing_events` asked for: from where, to where.
    pub fn gaps_asked(&self) -> Vec<(Vec<EventId>, Vec<EventId>)> {
        self.heard.borrow().gaps.clone()
    }

    fn summary(&self) -> String {
        let heard = self.heard.borrow();
        let pdus: Vec<&str> = heard.pdus.iter().map(|pdu| &*pdu.json).collect();
        format!(
            "heard {pdus:?} {:?}, was asked {:?}, faults {:?}",
            heard.edus, heard.asked, heard.faults
        )
    }

    /// Nothing came that the test did not ask for (T-0c).
    pub fn assert_quiet(&self) {
        let heard = self.heard.borrow();
        let quiet = heard.pdus.is_empty() && heard.edus.is_empty() && heard.faults.is_empty();
        drop(heard);
        assert!(quiet, "{}: {}", self.name, self.summary());
    }

    // -- What it asks ----------------------------------------------------------------------------

    /// Sends a transaction, and each of its PDUs is taken.
    pub async fn send(&self, to: &ServerName, pdus: &[&Arc<Pdu>], edus: &[Value]) {
        let pdus: Vec<Value> = pdus
            .iter()
            .map(|pdu| serde_json::from_str(&pdu.json).unwrap())
            .collect();
        let body = json!({
            "origin": self.name,
            "origin_server_ts": now_ms(),
            "pdus": pdus,
            "edus": edus,
        })
        .to_string();
        let txn = self.next_number().to_string();
        let sent = self.client.send_transaction(to, &txn, &body);
        let answer = sent.await.unwrap();
        for result in answer["pdus"].as_object().into_iter().flatten() {
            assert_eq!(*result.1, json!({}), "{}", result.0);
        }
    }

    pub async fn edu_to(&self, to: &ServerName, kind: &str, content: Value) {
        let edu = json!({ "edu_type": kind, "content": content });
        self.send(to, &[], &[edu]).await;
    }

    /// Tells of a change of a user's device, and that another one before it was not heard (P-61).
    pub async fn update_device(&self, to: &ServerName, user: &str) {
        let stream_id = self.device_stream.fetch_add(2, Ordering::Relaxed) + 2;
        let update = json!({
            "user_id": user,
            "device_id": device_id(user),
            "stream_id": stream_id,
            "prev_id": [stream_id - 1],
            "keys": device_keys(user),
        });
        self.edu_to(to, "m.device_list_update", update).await;
    }

    pub async fn ask(&self, to: &ServerName, ask: Ask) -> Result<Answer, AskError> {
        self.client.ask(to, &ask, PATIENCE, async |_, _| {}).await
    }

    pub async fn put(&self, to: &ServerName, path: String, body: Value) -> Result<Value, AskError> {
        let call = Call::put(to, path, Body::Json(body), PATIENCE);
        self.client.request(call, usize::MAX).await
    }

    pub async fn get(&self, to: &ServerName, path: &str) -> Result<Value, AskError> {
        let call = Call::get(to, path.to_owned(), PATIENCE);
        self.client.request(call, usize::MAX).await
    }

    pub async fn post(&self, to: &ServerName, path: &str, body: Value) -> Result<Value, AskError> {
        let call = Call::post(to, path.to_owned(), Body::Json(body), PATIENCE);
        self.client.request(call, usize::MAX).await
    }

    pub async fn state_ids(
        &self,
        to: &ServerName,
        room: &Room,
        event: &Pdu,
    ) -> Result<Vec<String>, AskError> {
        let ask = Ask::StateIds {
            room: room.id.clone(),
            event_id: event.event_id.clone(),
        };
        match self.ask(to, ask).await? {
            Answer::StateIds { pdu_ids, .. } => {
                Ok(pdu_ids.iter().map(ToString::to_string).collect())
            }
            other => panic!("{other:?}"),
        }
    }

    /// Joins a user of its own to a room of another server, which it holds from then on.
    pub async fn join(&self, at: &ServerName, room: &str, user: &str) -> (Arc<Room>, Arc<Pdu>) {
        let id = RoomId::parse(room).unwrap();
        let make = Ask::Make {
            what: Handshake::Join,
            room: id.clone(),
            user: UserId::parse(user).unwrap(),
        };
        let Answer::Made {
            room_version,
            event,
        } = self.ask(at, make).await.unwrap()
        else {
            panic!("no template");
        };
        let version = RoomVersion::parse(&room_version.unwrap()).unwrap();
        let join = self.sign(&event, version);
        let send = Ask::Send {
            what: Handshake::Join,
            room: id.clone(),
            event_id: join.event_id.clone(),
            event: join.json.clone(),
            omit_members: false,
        };
        let parts = Mutex::new(Vec::new());
        let sent = self.client.ask(at, &send, PATIENCE, async |section, pdus| {
            parts.lock().unwrap().push((section, pdus));
        });
        sent.await.unwrap();
        let room = Room::of(id, join.version, parts.into_inner().unwrap());
        room.add(&join);
        self.holds(&room);
        (room, join)
    }

    pub fn sign(&self, template: &str, version: RoomVersion) -> Arc<Pdu> {
        let Value::Object(mut event) = serde_json::from_str(template).unwrap() else {
            panic!("{template}");
        };
        event.insert("origin_server_ts".to_owned(), now_ms().into());
        Arc::new(protocol::build::sign(event, &self.key, &self.name, version).unwrap())
    }
}

impl Resident {
    /// An event that our server has made and signed. A join that charlie authorises is signed here, too.
    fn read(&self, pdu: &str) -> Pdu {
        let mut pdu = Pdu::parse(pdu, self.version_of(pdu)).unwrap();
        assert!(!pdu.redacted, "a wrong hash: {}", pdu.json);
        if self.script.lock().unwrap().authorises && pdu.membership() == Some("join") {
            pdu = protocol::build::cosign(&pdu, &self.key, &self.name).unwrap();
        }
        verify_pdu(&pdu, self).unwrap();
        pdu
    }
}

impl Resident {
    /// That of the room of this event.
    fn version_of(&self, pdu: &str) -> RoomVersion {
        let pdu: Value = serde_json::from_str(pdu).unwrap();
        let room = self.room(pdu["room_id"].as_str().unwrap_or_default());
        room.map_or(VERSION, |room| room.version)
    }
}

impl Keys for Resident {
    fn key(&self, of: &ServerName, _: &str, _: i64, _: RoomVersion) -> Option<VerifyKey> {
        Some(key_of(of).verify_key())
    }
}

// -- The doors ---------------------------------------------------------------------------------------

type Here = State<Arc<Resident>>;

async fn unexpected(State(here): Here, request: Request) -> Refusal {
    here.fault(format!("{} {}", request.method(), request.uri()))
}

async fn keys(State(here): Here) -> Json<Value> {
    let gate = here.script.lock().unwrap().keys.clone();
    if let Some(gate) = gate {
        gate.pass().await;
    }
    let object = federation::server_keys::own(&here.name, &here.key, &[], now_ms());
    Json(Value::Object(object))
}

async fn make_join(State(here): Here, Path((room, user)): Path<(String, String)>) -> Reply {
    here.note(format!("make_join {user}"));
    if let Some(scripted) = here.scripted("make_join") {
        return scripted;
    }
    let gate = here.script.lock().unwrap().make_join.clone();
    if let Some(gate) = gate {
        gate.pass().await;
    }
    let user = UserId::parse(&user).unwrap();
    let mut content = json!({ "membership": "join" });
    if here.script.lock().unwrap().authorises {
        content["join_authorised_via_users_server"] = here.user("charlie").into();
    }
    let room = here.room(&room)?;
    let event = room.template(&user, content);
    Ok(Json(
        json!({ "room_version": room.version.as_str(), "event": event }),
    ))
}

async fn make_leave(State(here): Here, Path((room, user)): Path<(String, String)>) -> Reply {
    if !here.script.lock().unwrap().leaves {
        return Err(here.fault(format!("make_leave {user}")));
    }
    here.note(format!("make_leave {user}"));
    let user = UserId::parse(&user).unwrap();
    let room = here.room(&room)?;
    let event = room.template(&user, json!({ "membership": "leave" }));
    Ok(Json(
        json!({ "room_version": room.version.as_str(), "event": event }),
    ))
}

async fn send_leave(
    State(here): Here,
    Path((room, _)): Path<(String, String)>,
    body: String,
) -> Reply {
    let room = here.room(&room)?;
    let leave = Arc::new(here.read(&body));
    room.add(&leave);
    here.heard.send_modify(|heard| heard.pdus.push(leave));
    Ok(Json(json!({})))
}

#[derive(serde::Deserialize)]
struct Omit {
    omit_members: Option<String>,
}

async fn send_join(
    State(here): Here,
    Path((room, _)): Path<(String, String)>,
    Query(omit): Query<Omit>,
    body: String,
) -> Reply {
    if here.script.lock().unwrap().only_v1 {
        let unrecognized = refusal(StatusCode::NOT_FOUND, "M_UNRECOGNIZED", "");
        return Err(unrecognized);
    }
    let omitted = omit.omit_members.as_deref() == Some("true");
    let (authorises, full, gives_all) = {
        let script = here.script.lock().unwrap();
        (script.authorises, script.full, script.gives_all)
    };
    if omitted == authorises && !full {
        return Err(here.fault(format!("a send_join with members omitted: {omitted}")));
    }
    let omitted = omitted && !full && !gives_all;
    here.take_join(&room, &body, omitted).await.map(Json)
}

/// As it was before partial state: the status, and all of the room.
async fn send_join_v1(
    State(here): Here,
    Path((room, _)): Path<(String, String)>,
    body: String,
) -> Reply {
    if !here.script.lock().unwrap().only_v1 {
        return Err(here.fault("version 1 of send_join".to_owned()));
    }
    let answer = here.take_join(&room, &body, false).await?;
    Ok(Json(json!([200, answer])))
}

impl Resident {
    async fn take_join(&self, room: &str, body: &str, omitted: bool) -> Result<Value, Refusal> {
        self.note("send_join".to_owned());
        let room = self.room(room)?;
        let join = Arc::new(self.read(body));
        let mut state = room.all_state();
        state.retain(|pdu| !omitted || &*pdu.kind != "m.room.member");
        let auth_chain = room.auth_chain(&state);
        let (alone, authorises, gives_all, gate) = {
            let script = self.script.lock().unwrap();
            let gate = script.send_join.clone();
            (script.alone, script.authorises, script.gives_all, gate)
        };
        let servers = match alone {
            true => [self.name.clone()].into(),
            false => room.servers(),
        };
        room.add(&join);
        if let Some(gate) = gate {
            gate.pass().await;
        }
        if let Some(scripted) = self.scripted("send_join") {
            return scripted.map(|Json(answer)| answer);
        }
        let mut answer = json!({
            "state": self.copies(&state),
            "auth_chain": self.copies(&auth_chain),
        });
        if !gives_all {
            answer["members_omitted"] = omitted.into();
            answer["servers_in_room"] = json!(servers);
        }
        if authorises {
            answer["event"] = bodies(&[join]).remove(0);
        }
        Ok(answer)
    }
}

impl Resident {
    /// Its own copies of these, one of which may be badly signed.
    fn copies(&self, pdus: &[Arc<Pdu>]) -> Vec<Value> {
        let forged = self.script.lock().unwrap().forged.clone();
        let mut copies = bodies(pdus);
        for (copy, pdu) in copies.iter_mut().zip(pdus) {
            if Some(&pdu.event_id) == forged.as_ref() {
                let signatures = copy["signatures"][pdu.sender.server_name().as_str()].take();
                let (id, _) = signatures.as_object().unwrap().iter().next().unwrap();
                let wrong = "A".repeat(86);
                copy["signatures"][pdu.sender.server_name().as_str()] = json!({ id: wrong });
            }
        }
        copies
    }
}

fn bodies(pdus: &[Arc<Pdu>]) -> Vec<Value> {
    let pdus = pdus.iter();
    pdus.map(|pdu| serde_json::from_str(&pdu.json).unwrap())
        .collect()
}

async fn event(State(here): Here, Path(event): Path<String>) -> Reply {
    here.note(format!("event {event}"));
    let id = EventId::parse(&event).unwrap();
    let hidden = here.script.lock().unwrap().hidden.contains(&id);
    let rooms: Vec<_> = here.rooms.lock().unwrap().values().cloned().collect();
    let pdu = rooms.iter().find_map(|room| room.event(&id));
    let Some(pdu) = pdu.filter(|_| !hidden) else {
        return Err(refusal(
            StatusCode::NOT_FOUND,
            "M_NOT_FOUND",
            "no such event",
        ));
    };
    Ok(Json(json!({
        "origin": here.name,
        "origin_server_ts": now_ms(),
        "pdus": here.copies(&[pdu]),
    })))
}

#[derive(serde::Deserialize)]
struct Before {
    v: String,
}

/// The event and those before it, newest first.
async fn backfill(
    State(here): Here,
    Path(room): Path<String>,
    Query(before): Query<Before>,
) -> Reply {
    if !here.script.lock().unwrap().history {
        return Err(here.fault(format!("backfill from {}", before.v)));
    }
    let room = here.room(&room)?;
    let mut next = EventId::parse(&before.v).ok();
    let events = std::iter::from_fn(|| {
        let pdu = room.event(&next.take()?)?;
        next = pdu.prev_events.first().cloned();
        Some(pdu)
    });
    let events: Vec<_> = events.collect();
    Ok(Json(json!({
        "origin": here.name,
        "origin_server_ts": now_ms(),
        "pdus": bodies(&events),
    })))
}

async fn event_auth(State(here): Here, Path((room, event)): Path<(String, String)>) -> Reply {
    if !here.script.lock().unwrap().event_auth {
        return Err(here.fault(format!("event_auth of {event}")));
    }
    let room = here.room(&room)?;
    let pdu = room.event(&EventId::parse(&event).unwrap());
    let chain = room.auth_chain(&pdu);
    Ok(Json(json!({ "auth_chain": bodies(&chain) })))
}

#[derive(serde::Deserialize)]
struct At {
    event_id: String,
}

async fn state_ids(State(here): Here, Path(room): Path<String>, Query(at): Query<At>) -> Reply {
    here.note(format!("state_ids {}", at.event_id));
    let scripted = here.script.lock().unwrap().state_ids.clone();
    if let Some((status, body, gate)) = scripted {
        gate.pass().await;
        let status = StatusCode::from_u16(status).unwrap();
        return Err((status, Json(body)));
    }
    let (state, released) = here.state_at(&at.event_id)?;
    released.pass().await;
    let room = here.room(&room)?;
    Ok(Json(json!({
        "pdu_ids": ids(&state),
        "auth_chain_ids": ids(&room.auth_chain(&state)),
    })))
}

async fn whole_state(State(here): Here, Path(room): Path<String>, Query(at): Query<At>) -> Reply {
    here.note(format!("state {}", at.event_id));
    let (state, _) = here.state_at(&at.event_id)?;
    let room = here.room(&room)?;
    Ok(Json(json!({
        "pdus": bodies(&state),
        "auth_chain": bodies(&room.auth_chain(&state)),
    })))
}

impl Resident {
    fn state_at(&self, event: &str) -> Result<(Vec<Arc<Pdu>>, Gate), Refusal> {
        let id = EventId::parse(event).unwrap();
        let script = self.script.lock().unwrap();
        let Some(served) = script.states.get(&id) else {
            drop(script);
            return Err(self.fault(format!("the state at {event}")));
        };
        Ok((served.state.clone(), served.released.clone()))
    }
}

#[derive(serde::Deserialize)]
struct Gap {
    earliest_events: Vec<EventId>,
    latest_events: Vec<EventId>,
}

async fn missing_events(State(here): Here, Json(gap): Json<Gap>) -> Reply {
    here.note(format!("get_missing_events {:?}", gap.latest_events));
    let events = match &*gap.latest_events {
        [latest] => here.script.lock().unwrap().gaps.get(latest).cloned(),
        _ => None,
    };
    let answer = match events {
        Some(events) => Ok(Json(json!({ "events": bodies(&events) }))),
        None => Err(here.fault(format!("get_missing_events {:?}", gap.latest_events))),
    };
    let gap = (gap.earliest_events, gap.latest_events);
    here.heard.send_modify(|heard| heard.gaps.push(gap));
    answer
}

async fn transaction(State(here): Here, Json(body): Json<Value>) -> Reply {
    let mut results = serde_json::Map::new();
    for pdu in body["pdus"].as_array().into_iter().flatten() {
        let pdu = Arc::new(here.read(&pdu.to_string()));
        results.insert(pdu.event_id.to_string(), json!({}));
        if let Ok(room) = here.room(pdu.room_id.as_str()) {
            room.add(&pdu);
        }
        here.heard.send_modify(|heard| heard.pdus.push(pdu));
    }
    for edu in body["edus"].as_array().into_iter().flatten() {
        // Whoever shares a room with somebody may be told how he is, and what devices he has.
        let deaf = {
            let script = here.script.lock().unwrap();
            script.full && !script.hears_of_devices
        };
        let devices = edu["edu_type"] == "m.device_list_update";
        if edu["edu_type"] != "m.presence" && !(deaf && devices) {
            here.heard.send_modify(|heard| heard.edus.push(edu.clone()));
        }
    }
    Ok(Json(json!({ "pdus": results })))
}

/// Taken and signed, unless the test has another answer.
async fn invite(State(here): Here, Json(body): Json<Value>) -> Reply {
    if let Some(scripted) = here.scripted("invite") {
        return scripted;
    }
    let version = body["room_version"].as_str().unwrap();
    let version = RoomVersion::parse(version).unwrap();
    let invite = Pdu::parse(&body["event"].to_string(), version).unwrap();
    verify_pdu(&invite, &*here).unwrap();
    here.note(format!("invite {}", invite.event_id));
    let signed = protocol::build::cosign(&invite, &here.key, &here.name).unwrap();
    Ok(Json(json!({ "event": bodies(&[Arc::new(signed)])[0] })))
}

async fn policy_sign(State(here): Here, body: String) -> Reply {
    let pdu = Pdu::parse(&body, here.version_of(&body)).unwrap();
    here.note(format!("sign {}", pdu.event_id));
    if let Some(scripted) = here.scripted("sign") {
        return scripted;
    }
    let signed = here.policy_signed(&pdu);
    let ours =
        |one: &Signature<'_>| one.server == here.name.as_str() && one.key_id == POLICY_KEY_ID;
    let signature = signed.signatures().find(ours).unwrap().text;
    Ok(Json(
        json!({ here.name.as_str(): { POLICY_KEY_ID: signature } }),
    ))
}

/// Nobody checks these, so nothing is signed.
fn device_keys(user: &str) -> Value {
    json!({
        "user_id": user,
        "device_id": device_id(user),
        "algorithms": ["m.megolm.v1.aes-sha2"],
        "keys": { format!("ed25519:{}", device_id(user)): "lEuiRJBit0IG6nUf5pUzWTUEsRVVe/HJkoKuEww9ULI" },
        "signatures": {},
    })
}

pub fn device_id(user: &str) -> String {
    let localpart = user.trim_start_matches('@').split(':').next();
    format!("{}_device", localpart.unwrap_or_default())
}

async fn user_devices(State(here): Here, Path(user): Path<String>) -> Reply {
    if !here.script.lock().unwrap().devices {
        return Err(here.fault(format!("devices of {user}")));
    }
    here.note(format!("devices {user}"));
    let device = json!({ "device_id": device_id(&user), "keys": device_keys(&user) });
    Ok(Json(json!({
        "user_id": user,
        "stream_id": here.device_stream.load(Ordering::Relaxed),
        "devices": [device],
    })))
}

async fn keys_query(State(here): Here, Json(body): Json<Value>) -> Reply {
    if !here.script.lock().unwrap().devices {
        return Err(here.fault(format!("keys {body}")));
    }
    let mut found = serde_json::Map::new();
    for user in body["device_keys"].as_object().into_iter().flatten() {
        here.note(format!("devices {}", user.0));
        let devices = json!({ device_id(user.0): device_keys(user.0) });
        found.insert(user.0.clone(), devices);
    }
    Ok(Json(json!({ "device_keys": found })))
}
