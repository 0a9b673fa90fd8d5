//! Servers on a network in memory, and the users that ask them.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request};
use homeserver::appservice::{Appservice, Appservices};
use homeserver::clock::SystemClock;
use homeserver::config::{Config, Registration};
use homeserver::{Homeserver, Wire};
use protocol::id::ServerName;
use protocol::signature::SigningKey;
use serde_json::{Value, json};
use storage::Store;
use tower::ServiceExt as _;

pub use crate::network::Network;

/// Syncs that a test waits through for what it wants to see.
const SYNCS_MAX: usize = 20;

const BRIDGE: &str = r##"
id: bridge
url: null
as_token: bridge-token
hs_token: other-token
sender_localpart: bridge
namespaces:
  users: [{ exclusive: true, regex: "@_bridge_.*" }]
"##;

fn homeserver(network: Arc<Network>, config: Config, store: Store) -> Homeserver {
    let name = &config.server_name;
    let bridge = Appservice::parse(BRIDGE, "bridge.yaml", name).unwrap();
    let wire = Wire {
        transport: network,
        key: SigningKey::generate([name.as_str().as_bytes()[0]; 32], "1").unwrap(),
        old_keys: Vec::new(),
    };
    let appservices = Appservices::new(vec![bridge]).unwrap();
    Homeserver::new(
        config,
        Arc::new(SystemClock::default()),
        store,
        appservices,
        wire,
    )
}

pub struct Server {
    pub homeserver: Homeserver,
    router: Router,
    /// Keeps the media for as long as the server is there.
    _media: tempfile::TempDir,
}

/// A server alone in the world.
pub async fn server() -> Server {
    start(&Arc::default(), "a.test").await
}

pub async fn start(network: &Arc<Network>, name: &str) -> Server {
    start_with(network, name, |_| ()).await
}

pub async fn start_with(
    network: &Arc<Network>,
    name: &str,
    change: impl FnOnce(&mut Config),
) -> Server {
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
    let homeserver = homeserver(network.clone(), config, store);
    homeserver.start().await.unwrap();
    let router = vestibule_http::router(homeserver.clone());
    network.add(name, router.clone());
    Server {
        homeserver,
        router,
        _media: media,
    }
}

impl Server {
    /// The same server with other settings, not started; it can reach nobody.
    pub fn restarted(&self, config: Config) -> Homeserver {
        homeserver(Arc::default(), config, self.homeserver.store().clone())
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
        let answer = self.router.clone().oneshot(request).await.unwrap();
        let (head, body) = answer.into_parts();
        let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap();
        (head.status.as_u16(), head.headers, bytes.to_vec())
    }

    /// A path that does not begin with `/_` is one of the client API.
    pub async fn ask(&self, method: &str, path: &str, token: &str, body: Value) -> (u16, Value) {
        let text = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        let path = match path.starts_with("/_") {
            true => path.to_owned(),
            false => format!("/_matrix/client/v3{path}"),
        };
        let (status, _, bytes) = self
            .raw(method, &path, token, "application/json", text)
            .await;
        (status, serde_json::from_slice(&bytes).unwrap_or_default())
    }

    /// As [`Self::ask`], and it must succeed.
    pub async fn get(&self, method: &str, path: &str, token: &str, body: Value) -> Value {
        let (status, answer) = self.ask(method, path, token, body).await;
        assert_eq!(status, 200, "{method} {path}: {answer}");
        answer
    }

    /// Registers a user whose password is `secret`.
    pub async fn register(&self, name: &str) -> User<'_> {
        let body =
            json!({ "username": name, "password": "secret", "auth": { "type": "m.login.dummy" } });
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

    pub async fn administrator(&self, name: &str) -> User<'_> {
        let opened = self
            .homeserver
            .register_by_admin(name, "secret".to_owned(), true)
            .await
            .unwrap();
        User {
            server: self,
            id: opened.user.to_string(),
            token: opened.access_token,
            device: opened.device,
        }
    }

    /// The user of a login or registration.
    pub fn user(&self, answer: &Value) -> User<'_> {
        let text = |key: &str| answer[key].as_str().unwrap().to_owned();
        User {
            server: self,
            id: text("user_id"),
            token: text("access_token"),
            device: text("device_id"),
        }
    }
}

/// One of a server's users, logged in.
pub struct User<'a> {
    pub server: &'a Server,
    pub id: String,
    pub token: String,
    pub device: String,
}

impl User<'_> {
    pub async fn get(&self, path: &str) -> Value {
        self.server.get("GET", path, &self.token, Value::Null).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Value {
        self.server.get("POST", path, &self.token, body).await
    }

    pub async fn put(&self, path: &str, body: Value) -> Value {
        self.server.get("PUT", path, &self.token, body).await
    }

    /// The status and errcode of a request that must fail.
    pub async fn refused(&self, method: &str, path: &str, body: Value) -> (u16, String) {
        let (status, answer) = self.server.ask(method, path, &self.token, body).await;
        assert_ne!(status, 200, "{method} {path}: {answer}");
        let errcode = answer["errcode"].as_str().unwrap_or_default();
        (status, errcode.to_owned())
    }

    pub async fn create_room(&self, request: Value) -> String {
        let made = self.post("/createRoom", request).await;
        made["room_id"].as_str().unwrap().to_owned()
    }

    /// Joins a room, through a server that knows it.
    pub async fn join(&self, room: &str, via: &str) {
        self.post(&format!("/join/{room}?via={via}"), json!({}))
            .await;
    }

    /// Syncs until there is what `look` finds; with it comes the token from there on.
    pub async fn sync_until<T>(
        &self,
        since: Option<&str>,
        look: impl Fn(&Value) -> Option<T>,
    ) -> (T, String) {
        let mut since = since.map(str::to_owned);
        for _ in 0..SYNCS_MAX {
            let from = since
                .map(|since| format!("&since={since}"))
                .unwrap_or_default();
            let body = self.get(&format!("/sync?timeout=2000{from}")).await;
            let next = body["next_batch"].as_str().unwrap().to_owned();
            if let Some(found) = look(&body) {
                return (found, next);
            }
            since = Some(next);
        }
        panic!("{} never sees it", self.id);
    }
}

/// The items of a list, none if it is not there.
pub fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}
