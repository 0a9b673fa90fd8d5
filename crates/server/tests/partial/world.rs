//! Our server, its users as their clients see it, and the stage on which a join becomes partial.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use homeserver::appservice::Appservices;
use homeserver::clock::SystemClock;
use homeserver::config::{Config, Registration};
use homeserver::{Homeserver, Wire};
use protocol::id::ServerName;
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::signature::SigningKey;
use room::effect::AskError;
use serde_json::{Value, json};
use storage::Store;
use tower::ServiceExt as _;

use crate::dag::{Room, member};
use crate::network::Network;
use crate::resident::{Gate, PATIENCE, Resident};

pub struct Server {
    pub name: ServerName,
    network: Arc<Network>,
    homeserver: Mutex<Homeserver>,
    door: Door,
    /// Keeps the media for as long as the server is there.
    _media: tempfile::TempDir,
}

/// Where clients knock; behind it may be another life of the server.
#[derive(Clone)]
struct Door(Arc<Mutex<Router>>);

impl Server {
    pub async fn start(
        network: &Arc<Network>,
        name: &str,
        change: impl FnOnce(&mut Config),
    ) -> Self {
        let name = ServerName::parse(name).unwrap();
        let options = storage::Options {
            server_name: name.clone(),
            ..storage::Options::default()
        };
        let store = Store::open("sqlite::memory:", options).await.unwrap();
        let media = tempfile::tempdir().unwrap();
        let mut config = Config::new(name.clone());
        config.limits.enabled = false;
        config.registration = Registration::Open;
        config.default_room_version = RoomVersion::V11;
        config.media_path = media.path().to_owned();
        // As in the tests of Complement: the residents know only the handshake and the resync.
        config.join.race_send_join = false;
        config.join.ask_for_left_out = false;
        config.join.compare_donors = false;
        config.join.tell_missed_servers = false;
        change(&mut config);
        let homeserver = homeserver(network, config, store);
        homeserver.start().await.unwrap();
        let router = vestibule_http::router(homeserver.clone());
        network.add(name.clone(), router.clone());
        Self {
            name,
            network: network.clone(),
            homeserver: Mutex::new(homeserver),
            door: Door(Arc::new(Mutex::new(router))),
            _media: media,
        }
    }

    pub fn store(&self) -> Store {
        self.homeserver.lock().unwrap().store().clone()
    }

    /// Ends this life of the server, and begins another one with the same store.
    pub async fn restart(&self) {
        let before = self.homeserver.lock().unwrap().clone();
        before.stop().await;
        let config = before.config().clone();
        let after = homeserver(&self.network, config, before.store().clone());
        after.start().await.unwrap();
        let router = vestibule_http::router(after.clone());
        self.network.add(self.name.clone(), router.clone());
        *self.door.0.lock().unwrap() = router;
        *self.homeserver.lock().unwrap() = after;
    }

    pub async fn register(&self, name: &str) -> User {
        let body = json!({
            "username": name,
            "password": "secret",
            "auth": { "type": "m.login.dummy" },
        });
        let (status, answer) = self.door.ask("POST", "/register", "", &body).await;
        assert_eq!(status, 200, "{answer}");
        let text = |key: &str| answer[key].as_str().unwrap().to_owned();
        User {
            door: self.door.clone(),
            id: text("user_id"),
            token: text("access_token"),
            device: text("device_id"),
        }
    }

    pub async fn administrator(&self, name: &str) -> User {
        let homeserver = self.homeserver.lock().unwrap().clone();
        let opened = homeserver.register_by_admin(name, "secret".to_owned(), true);
        let opened = opened.await.unwrap();
        User {
            door: self.door.clone(),
            id: opened.user.to_string(),
            token: opened.access_token,
            device: opened.device,
        }
    }
}

fn homeserver(network: &Arc<Network>, config: Config, store: Store) -> Homeserver {
    let wire = Wire {
        transport: network.clone(),
        key: our_key(),
        old_keys: Vec::new(),
    };
    let clock = Arc::new(SystemClock::default());
    Homeserver::new(config, clock, store, Appservices::default(), wire)
}

/// What our server signs with.
pub fn our_key() -> SigningKey {
    SigningKey::generate([9; 32], "1").unwrap()
}

impl Door {
    /// A path that does not begin with `/_` is one of the client API.
    async fn ask(&self, method: &str, path: &str, token: &str, body: &Value) -> (u16, Value) {
        let path = match path.starts_with("/_") {
            true => path.to_owned(),
            false => format!("/_matrix/client/v3{path}"),
        };
        let body = match body.is_null() {
            true => Body::empty(),
            false => Body::from(body.to_string()),
        };
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", "application/json");
        if !token.is_empty() {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let router = self.0.lock().unwrap().clone();
        let answer = router.oneshot(request.body(body).unwrap()).await.unwrap();
        let status = answer.status().as_u16();
        let bytes = axum::body::to_bytes(answer.into_body(), usize::MAX).await;
        let bytes = bytes.unwrap();
        (status, serde_json::from_slice(&bytes).unwrap_or_default())
    }
}

/// A user of ours, logged in.
#[derive(Clone)]
pub struct User {
    door: Door,
    pub id: String,
    token: String,
    pub device: String,
}

impl User {
    pub async fn ask(&self, method: &str, path: &str, body: Value) -> (u16, Value) {
        let asked = self.door.ask(method, path, &self.token, &body);
        let Ok(answer) = tokio::time::timeout(PATIENCE, asked).await else {
            panic!("{method} {path} is not answered");
        };
        answer
    }

    async fn must(&self, method: &str, path: &str, body: Value) -> Value {
        let (status, answer) = self.ask(method, path, body).await;
        assert_eq!(status, 200, "{method} {path}: {answer}");
        answer
    }

    pub async fn get(&self, path: &str) -> Value {
        self.must("GET", path, Value::Null).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Value {
        self.must("POST", path, body).await
    }

    pub async fn put(&self, path: &str, body: Value) -> Value {
        self.must("PUT", path, body).await
    }

    pub async fn delete(&self, path: &str) -> Value {
        self.must("DELETE", path, json!({})).await
    }

    /// The status and errcode of a request that must fail.
    pub async fn refused(&self, method: &str, path: &str, body: Value) -> (u16, String) {
        let (status, answer) = self.ask(method, path, body).await;
        assert_ne!(status, 200, "{method} {path}: {answer}");
        let errcode = answer["errcode"].as_str().unwrap_or_default();
        (status, errcode.to_owned())
    }

    /// A request that goes on by itself.
    pub fn begin(&self, method: &'static str, path: String, body: Value) -> Begun {
        let user = self.clone();
        Begun(tokio::spawn(
            async move { user.ask(method, &path, body).await },
        ))
    }

    pub async fn join(&self, room: &str, via: &ServerName) {
        let path = format!("/join/{room}?via={via}");
        self.post(&path, json!({})).await;
    }

    pub async fn leave(&self, room: &str) {
        self.post(&format!("/rooms/{room}/leave"), json!({})).await;
    }

    pub async fn say(&self, room: &str, words: &str) -> String {
        let content = json!({ "msgtype": "m.text", "body": words });
        let path = format!("/rooms/{room}/send/m.room.message/{words}");
        let sent = self.put(&path, content).await;
        sent["event_id"].as_str().unwrap().to_owned()
    }

    pub async fn public_room(&self) -> String {
        let made = self.post("/createRoom", json!({ "preset": "public_chat" }));
        made.await["room_id"].as_str().unwrap().to_owned()
    }

    /// Whether `/event` shows it; where not, it says so as it should (T-0g).
    pub async fn can_see(&self, event: &Pdu) -> bool {
        let path = format!(
            "/_matrix/client/r0/rooms/{}/event/{}",
            event.room_id, event.event_id
        );
        match self.ask("GET", &path, Value::Null).await {
            (200, _) => true,
            (404, answer) if answer["errcode"] == "M_NOT_FOUND" => false,
            other => panic!("{path}: {other:?}"),
        }
    }

    pub async fn rename_device(&self, name: &str) {
        let path = format!("/devices/{}", self.device);
        self.put(&path, json!({ "display_name": name })).await;
    }

    pub async fn query_keys(&self, of: &str) {
        let query = json!({ "device_keys": { of: [] } });
        self.post("/keys/query", query).await;
    }

    /// Syncs from the beginning with all members.
    pub fn eager(&self) -> Syncs {
        self.syncs("")
    }

    /// Syncs from the beginning with those members that are needed.
    pub fn lazy(&self) -> Syncs {
        self.syncs(r#"{"room":{"state":{"lazy_load_members":true},"timeline":{"lazy_load_members":true}}}"#)
    }

    fn syncs(&self, filter: &str) -> Syncs {
        let encoded: String = filter.bytes().map(|byte| format!("%{byte:02X}")).collect();
        Syncs {
            user: self.clone(),
            filter: encoded,
            since: None,
        }
    }
}

/// A request under way.
pub struct Begun(tokio::task::JoinHandle<(u16, Value)>);

impl Begun {
    pub fn is_waiting(&self) -> bool {
        !self.0.is_finished()
    }

    /// What it is answered with, which is success.
    pub async fn answer(self) -> Value {
        let (status, answer) = self.0.await.unwrap();
        assert_eq!(status, 200, "{answer}");
        answer
    }

    pub async fn status(self) -> u16 {
        self.0.await.unwrap().0
    }
}

/// One client that syncs, always from where it was.
#[derive(Clone)]
pub struct Syncs {
    user: User,
    filter: String,
    pub since: Option<String>,
}

impl Syncs {
    /// The same from here on, with at most one event in each timeline.
    pub fn gappy(&self) -> Self {
        let filter = r#"{"room":{"state":{"lazy_load_members":true},"timeline":{"limit":1}}}"#;
        Self {
            since: self.since.clone(),
            ..self.user.syncs(filter)
        }
    }

    fn path(&self, timeout_ms: u32) -> String {
        let mut path = format!("/sync?timeout={timeout_ms}");
        if !self.filter.is_empty() {
            path.push_str("&filter=");
            path.push_str(&self.filter);
        }
        if let Some(since) = &self.since {
            path.push_str("&since=");
            path.push_str(since);
        }
        path
    }

    async fn once(&mut self, timeout_ms: u32) -> Value {
        let sync = self.user.get(&self.path(timeout_ms)).await;
        self.since = sync["next_batch"].as_str().map(str::to_owned);
        sync
    }

    /// What there is at this moment.
    pub async fn now(&mut self) -> Value {
        self.once(0).await
    }

    /// A long poll from here on that goes on by itself.
    pub fn begin(&self) -> Begun {
        self.user.begin("GET", self.path(60_000), Value::Null)
    }

    /// Syncs until there is what `look` finds.
    pub async fn until<T>(&mut self, what: &str, look: impl Fn(&Value) -> Option<T>) -> T {
        let mut seen = Vec::new();
        let found = async {
            loop {
                let sync = self.once(10_000).await;
                if let Some(found) = look(&sync) {
                    return found;
                }
                seen.push(sync);
            }
        };
        match tokio::time::timeout(PATIENCE, found).await {
            Ok(found) => found,
            Err(_) => panic!("{what} is never seen, only {seen:?}"),
        }
    }

    pub async fn until_joined(&mut self, room: &Room) -> Value {
        let found = |sync: &Value| joined(sync, room).cloned();
        self.until("the room", found).await
    }

    /// Until the event is in the room's timeline. The whole answer.
    pub async fn until_event(&mut self, event: &Pdu) -> Value {
        let (room, id) = (event.room_id.as_str(), event.event_id.as_str());
        self.until(id, |sync| {
            let rooms = &sync["rooms"];
            let shown = ["join", "leave"].iter().any(|section| {
                let timeline = &rooms[*section][room]["timeline"]["events"];
                list(timeline).iter().any(|event| event["event_id"] == id)
            });
            shown.then(|| sync.clone())
        })
        .await
    }

    pub async fn until_left(&mut self, room: &Room) -> Value {
        let found = |sync: &Value| sync["rooms"]["leave"].get(room.id.as_str()).cloned();
        self.until("the end of it", found).await
    }

    /// Until the user is in `changed` or `left`; `/keys/changes` says the same.
    pub async fn until_devices(&mut self, section: &str, user: &str) {
        let from = self.since.clone().unwrap();
        let has = |lists: &Value| list(&lists[section]).iter().any(|of| of == user);
        let what = format!("{user} in {section}");
        let look = |sync: &Value| has(&sync["device_lists"]).then_some(());
        self.until(&what, look).await;
        let to = self.since.as_deref().unwrap();
        let path = format!("/keys/changes?from={from}&to={to}");
        let changes = self.user.get(&path).await;
        assert!(has(&changes), "{what}: {changes}");
    }
}

pub fn joined<'a>(sync: &'a Value, room: &Room) -> Option<&'a Value> {
    sync["rooms"]["join"].get(room.id.as_str())
}

/// The items of a list, none if it is not there.
pub fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// The users whose membership is among the events of a room's `state`.
pub fn members_in_state(room: &Value) -> BTreeSet<&str> {
    let state = list(&room["state"]["events"]).iter();
    let members = state.filter(|event| event["type"] == "m.room.member");
    members
        .filter_map(|event| event["state_key"].as_str())
        .collect()
}

/// A room of a resident, with charlie and derek in it, and our server, which is not yet.
pub struct Stage {
    pub network: Arc<Network>,
    pub here: Server,
    pub resident: Arc<Resident>,
    pub room: Arc<Room>,
    /// Other residents, if the test wants some.
    pub others: Vec<Arc<Resident>>,
    gate: Gate,
}

impl Stage {
    pub async fn set() -> Self {
        Self::set_with(&[], |_| ()).await
    }

    /// As [`Self::set`], with these levels of power and settings.
    pub async fn set_with(levels: &[(&str, i64)], change: impl FnOnce(&mut Config)) -> Self {
        let stage = Self::empty(levels, change).await;
        let derek = stage.resident.user("derek");
        stage.send(member(&derek, &derek, "join"));
        stage
    }

    /// With charlie alone in the room.
    pub async fn empty(levels: &[(&str, i64)], change: impl FnOnce(&mut Config)) -> Self {
        let network = Arc::new(Network::default());
        let here = Server::start(&network, "here.test", change).await;
        let resident = Resident::start(&network, "resident.test");
        let room = Room::new(&resident, levels);
        Self {
            network,
            here,
            resident,
            room,
            others: Vec::new(),
            gate: Gate::new(false),
        }
    }

    /// Another server, which holds the same room.
    pub fn second(&mut self) -> Arc<Resident> {
        let second = Resident::start(&self.network, "second.test");
        second.holds(&self.room);
        self.others.push(second.clone());
        second
    }

    /// An event by a user of the resident, which our server is not told of.
    pub fn send(&self, new: crate::dag::New) -> Arc<Pdu> {
        self.room.send(&self.resident, new)
    }

    /// The resident sends these to our server.
    pub async fn tell(&self, pdus: &[&Arc<Pdu>]) {
        self.resident.send(&self.here.name, pdus, &[]).await;
    }

    /// The user joins. The state before the join is asked for, and held back.
    pub async fn join(&self, user: &User) {
        self.resident.serve_state(&self.room, &self.gate);
        user.join(self.room.id.as_str(), &self.resident.name).await;
    }

    /// From here on the state before the join is answered.
    pub fn release(&self) {
        self.gate.open();
    }

    /// Waits until the room is full.
    pub async fn until_full(&self, user: &User) {
        user.get(&format!("/rooms/{}/members", self.room.id)).await;
    }

    /// The end of most tests (T-0d): the resync ends, the user leaves, and the resident hears of it.
    pub async fn end(&self, user: &User) {
        self.release();
        self.until_full(user).await;
        user.leave(self.room.id.as_str()).await;
        self.resident.leave_of(&user.id).await;
    }

    /// T-0f: the event has come, and the room is partial; in the end the state at the event is that of the
    /// residents.
    pub async fn check_receiving(&self, user: &User, lazy: &mut Syncs, event: &Pdu) {
        lazy.until_event(event).await;
        let asked = self.resident.state_ids(&self.here.name, &self.room, event);
        let refused = asked.await;
        assert!(
            matches!(refused, Err(AskError::Refused { status: 403, .. })),
            "{refused:?}"
        );
        self.release();
        user.eager().until_joined(&self.room).await;
        let somebody = format!(
            "/rooms/{}/state/m.room.member/@nobody:elsewhere.test",
            self.room.id
        );
        user.ask("GET", &somebody, Value::Null).await;
        let asked = self.resident.state_ids(&self.here.name, &self.room, event);
        let state: BTreeSet<String> = asked.await.unwrap().into_iter().collect();
        let expected = self.room.all_state().into_iter();
        let expected = expected.map(|pdu| pdu.event_id.to_string()).collect();
        assert_eq!(state, expected);
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.resident.assert_quiet();
            for other in &self.others {
                other.assert_quiet();
            }
        }
    }
}

/// Asks again and again; what is waited for is not announced.
pub async fn until<T>(what: &str, look: impl AsyncFn() -> Option<T>) -> T {
    let found = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::task::yield_now().await;
        }
    };
    match tokio::time::timeout(PATIENCE, found).await {
        Ok(found) => found,
        Err(_) => panic!("{what} is never true"),
    }
}
