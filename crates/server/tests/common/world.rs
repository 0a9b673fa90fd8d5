//! Whole servers on a network in memory, and their users as their clients see it.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request};
use homeserver::appservice::{Appservice, Appservices};
use homeserver::clock::SystemClock;
use homeserver::config::{Config, Registration};
use homeserver::{Homeserver, Wire};
use protocol::id::ServerName;
use protocol::pdu::Pdu;
use protocol::signature::SigningKey;
use serde_json::{Value, json};
use storage::Store;
use tower::ServiceExt as _;

use crate::network::Network;

/// Only ever reached by a test that fails.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// An application service that every server has.
pub const BRIDGE_TOKEN: &str = "bridge-token";

const BRIDGE: &str = r##"
id: bridge
url: null
as_token: bridge-token
hs_token: other-token
sender_localpart: bridge
namespaces:
  users: [{ exclusive: true, regex: "@_bridge_.*" }]
"##;

/// What a server signs with.
pub fn key_of(name: &ServerName) -> SigningKey {
    let mut seed = [7; 32];
    seed[..name.as_str().len()].copy_from_slice(name.as_str().as_bytes());
    SigningKey::generate(seed, "1").unwrap()
}

fn homeserver(network: &Arc<Network>, config: Config, store: Store) -> Homeserver {
    let name = &config.server_name;
    let bridge = Appservice::parse(BRIDGE, "bridge.yaml", name).unwrap();
    let wire = Wire {
        transport: network.clone(),
        key: key_of(name),
        old_keys: Vec::new(),
    };
    let appservices = Appservices::new(vec![bridge]).unwrap();
    let clock = Arc::new(SystemClock::default());
    Homeserver::new(config, clock, store, appservices, wire)
}

#[derive(Clone)]
pub struct Server {
    pub name: ServerName,
    network: Arc<Network>,
    life: Arc<Mutex<Life>>,
    /// Keeps the media for as long as the server is there.
    _media: Arc<tempfile::TempDir>,
}

/// What ends when the server is started again.
struct Life {
    homeserver: Homeserver,
    router: Router,
}

impl Life {
    async fn begin(network: &Arc<Network>, config: Config, store: Store) -> Self {
        let name = config.server_name.clone();
        let homeserver = homeserver(network, config, store);
        homeserver.start().await.unwrap();
        let router = vestibule_http::router(homeserver.clone());
        network.add(name, router.clone());
        Self { homeserver, router }
    }
}

/// A server alone in the world.
pub async fn server() -> Server {
    start(&Arc::default(), "a.test").await
}

pub async fn start(network: &Arc<Network>, name: &str) -> Server {
    Server::start(network, name, |_| ()).await
}

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
        config.media_path = media.path().to_owned();
        change(&mut config);
        let life = Life::begin(network, config, store).await;
        Self {
            name,
            network: network.clone(),
            life: Arc::new(Mutex::new(life)),
            _media: Arc::new(media),
        }
    }

    pub fn store(&self) -> Store {
        self.homeserver().store().clone()
    }

    pub fn homeserver(&self) -> Homeserver {
        self.life.lock().unwrap().homeserver.clone()
    }

    /// Ends this life of the server, and begins another one with the same store.
    pub async fn restart(&self) {
        let before = self.homeserver();
        before.stop().await;
        let (config, store) = (before.config().clone(), before.store().clone());
        let after = Life::begin(&self.network, config, store).await;
        *self.life.lock().unwrap() = after;
    }

    /// The same server with other settings, not started; it can reach nobody.
    pub fn restarted(&self, config: Config) -> Homeserver {
        homeserver(&Arc::default(), config, self.homeserver().store().clone())
    }

    pub async fn raw(
        &self,
        method: &str,
        path: &str,
        token: &str,
        kind: &str,
        body: impl Into<Body>,
    ) -> (u16, HeaderMap, Vec<u8>) {
        let mut request = Request::builder().method(method).uri(path);
        if !token.is_empty() {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let request = request
            .header("content-type", kind)
            .body(body.into())
            .unwrap();
        let router = self.life.lock().unwrap().router.clone();
        let Ok(answer) = tokio::time::timeout(PATIENCE, router.oneshot(request)).await else {
            panic!("{method} {path} is not answered");
        };
        let (head, body) = answer.unwrap().into_parts();
        let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap();
        (head.status.as_u16(), head.headers, bytes.to_vec())
    }

    /// A path that does not begin with `/_` is one of the client API.
    pub async fn ask(&self, method: &str, path: &str, token: &str, body: Value) -> (u16, Value) {
        let text = match body.is_null() {
            true => String::new(),
            false => body.to_string(),
        };
        let path = match path.starts_with("/_") {
            true => path.to_owned(),
            false => format!("/_matrix/client/v3{path}"),
        };
        let kind = "application/json";
        let (status, _, bytes) = self.raw(method, &path, token, kind, text).await;
        (status, serde_json::from_slice(&bytes).unwrap_or_default())
    }

    /// As [`Self::ask`], and it must succeed.
    pub async fn get(&self, method: &str, path: &str, token: &str, body: Value) -> Value {
        let (status, answer) = self.ask(method, path, token, body).await;
        assert_eq!(status, 200, "{method} {path}: {answer}");
        answer
    }

    /// Registers a user whose password is `secret`.
    pub async fn register(&self, name: &str) -> User {
        let body = json!({
            "username": name,
            "password": "secret",
            "auth": { "type": "m.login.dummy" },
        });
        let answer = self.get("POST", "/register", "", body).await;
        self.user(&answer)
    }

    pub async fn login(&self, name: &str, password: &str) -> (u16, Value) {
        let body = json!({
            "type": "m.login.password",
            "identifier": { "type": "m.id.user", "user": name },
            "password": password,
        });
        self.ask("POST", "/login", "", body).await
    }

    pub async fn administrator(&self, name: &str) -> User {
        let homeserver = self.homeserver();
        let opened = homeserver.register_by_admin(name, "secret".to_owned(), true);
        let opened = opened.await.unwrap();
        User {
            server: self.clone(),
            id: opened.user.to_string(),
            token: opened.access_token,
            device: opened.device,
        }
    }

    /// The user of a login or registration.
    pub fn user(&self, answer: &Value) -> User {
        let text = |key: &str| answer[key].as_str().unwrap().to_owned();
        User {
            server: self.clone(),
            id: text("user_id"),
            token: text("access_token"),
            device: text("device_id"),
        }
    }
}

/// One of a server's users, logged in.
#[derive(Clone)]
pub struct User {
    pub server: Server,
    pub id: String,
    pub token: String,
    pub device: String,
}

impl User {
    pub async fn ask(&self, method: &str, path: &str, body: Value) -> (u16, Value) {
        self.server.ask(method, path, &self.token, body).await
    }

    pub async fn get(&self, path: &str) -> Value {
        self.server.get("GET", path, &self.token, Value::Null).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Value {
        self.server.get("POST", path, &self.token, body).await
    }

    pub async fn put(&self, path: &str, body: Value) -> Value {
        self.server.get("PUT", path, &self.token, body).await
    }

    pub async fn delete(&self, path: &str) -> Value {
        self.server
            .get("DELETE", path, &self.token, json!({}))
            .await
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

    pub async fn create_room(&self, request: Value) -> String {
        let made = self.post("/createRoom", request).await;
        made["room_id"].as_str().unwrap().to_owned()
    }

    pub async fn public_room(&self) -> String {
        self.create_room(json!({ "preset": "public_chat" })).await
    }

    /// Joins a room, through a server that knows it.
    pub async fn join(&self, room: &str, via: impl AsRef<str>) {
        let path = format!("/join/{room}?via={}", via.as_ref());
        self.post(&path, json!({})).await;
    }

    pub async fn leave(&self, room: &str) {
        self.post(&format!("/rooms/{room}/leave"), json!({})).await;
    }

    /// Sends a message with these words, which the user has not said before.
    pub async fn say(&self, room: &str, words: &str) -> String {
        let content = json!({ "msgtype": "m.text", "body": words });
        let path = format!("/rooms/{room}/send/m.room.message/{words}");
        let sent = self.put(&path, content).await;
        sent["event_id"].as_str().unwrap().to_owned()
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

    pub async fn query_keys(&self, of: &str) -> Value {
        let query = json!({ "device_keys": { of: [] } });
        self.post("/keys/query", query).await
    }

    /// Syncs until there is what `look` finds; with it comes the token from there on.
    pub async fn sync_until<T>(
        &self,
        since: Option<&str>,
        look: impl Fn(&Value) -> Option<T>,
    ) -> (T, String) {
        let mut syncs = Syncs {
            since: since.map(str::to_owned),
            ..self.eager()
        };
        let found = syncs.until("what is looked for", look).await;
        let since = syncs.since.expect("a sync has a token");
        (found, since)
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

    /// The same from here on, with this filter.
    pub fn filtered(&self, filter: &Value) -> Self {
        Self {
            since: self.since.clone(),
            ..self.user.syncs(&filter.to_string())
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

    pub async fn until_joined(&mut self, room: impl AsRef<str>) -> Value {
        let found = |sync: &Value| joined(sync, &room).cloned();
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

    pub async fn until_left(&mut self, room: impl AsRef<str>) -> Value {
        let found = |sync: &Value| sync["rooms"]["leave"].get(room.as_ref()).cloned();
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

pub fn joined(sync: &Value, room: impl AsRef<str>) -> Option<&Value> {
    sync["rooms"]["join"].get(room.as_ref())
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
