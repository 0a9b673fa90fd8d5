//! A client of one user.

use std::time::Duration;

use anyhow::{Context, ensure};
use protocol::id::UserId;
use serde_json::{Value, json};

use crate::servers::Server;

/// How long a sync waits for news, in ms.
const SYNC_WAIT_MS: u32 = 20_000;
/// Of a sync that shows no more of a room than somebody looks at.
const LAZY: &str = r#"{"room":{"state":{"lazy_load_members":true},"timeline":{"limit":20}}}"#;

#[derive(Clone)]
pub struct Client {
    pub http: reqwest::Client,
    pub url: String,
    pub token: String,
}

/// For loopback, where certificates are made up.
pub fn http() -> anyhow::Result<reqwest::Client> {
    let client = reqwest::Client::builder()
        .no_proxy()
        .tls_danger_accept_invalid_certs(true)
        .pool_idle_timeout(Duration::from_secs(300));
    Ok(client.build()?)
}

impl Client {
    pub async fn log_in(
        http: &reqwest::Client,
        server: &Server,
        user: &UserId,
        password: &str,
    ) -> anyhow::Result<Self> {
        let login = json!({
            "type": "m.login.password",
            "identifier": { "type": "m.id.user", "user": user },
            "password": password,
        });
        let answer = Self::nobody(http, server).post("login", login).await?;
        Self::of(http, server, &answer)
    }

    /// A new account on a server that is open to all.
    pub async fn register(
        http: &reqwest::Client,
        server: &Server,
        name: &str,
        password: &str,
    ) -> anyhow::Result<Self> {
        let wanted = json!({
            "username": name,
            "password": password,
            "auth": { "type": "m.login.dummy" },
        });
        let answer = Self::nobody(http, server).post("register", wanted).await?;
        Self::of(http, server, &answer)
    }

    fn nobody(http: &reqwest::Client, server: &Server) -> Self {
        Self {
            http: http.clone(),
            url: server.url.clone(),
            token: String::new(),
        }
    }

    fn of(http: &reqwest::Client, server: &Server, answer: &Value) -> anyhow::Result<Self> {
        let token = answer["access_token"].as_str();
        Ok(Self {
            token: token.context("a login without a token")?.to_owned(),
            ..Self::nobody(http, server)
        })
    }

    /// The path is what comes after `/_matrix/client/v3/`.
    pub async fn post(&self, path: &str, body: Value) -> anyhow::Result<Value> {
        let request = self.http.post(self.in_full(path));
        answer(self.signed(request).json(&body)).await
    }

    pub async fn put(&self, path: &str, body: Value) -> anyhow::Result<Value> {
        let request = self.http.put(self.in_full(path));
        answer(self.signed(request).json(&body)).await
    }

    pub async fn get(&self, path: &str) -> anyhow::Result<Value> {
        answer(self.signed(self.http.get(self.in_full(path)))).await
    }

    /// The answer's bytes.
    pub async fn get_raw(&self, path: &str) -> anyhow::Result<Vec<u8>> {
        let request = self.signed(self.http.get(self.in_full(path)));
        let answer = request.send().await?;
        let status = answer.status();
        let body = answer.bytes().await?;
        let start = || String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
        ensure!(status.is_success(), "{path}: {status}: {}", start());
        Ok(body.to_vec())
    }

    /// A lazy one; from the beginning or from where another one ended.
    pub async fn sync(&self, since: Option<&str>) -> anyhow::Result<Value> {
        let mut query = format!("sync?filter={}", escaped(LAZY));
        if let Some(since) = since {
            query += &format!("&since={}&timeout={SYNC_WAIT_MS}", escaped(since));
        }
        self.get(&query).await
    }

    /// Syncs until something is seen.
    pub async fn sync_until(
        &self,
        mut since: String,
        seen: impl Fn(&Value) -> bool,
    ) -> anyhow::Result<()> {
        loop {
            let news = self.sync(Some(&since)).await?;
            if seen(&news) {
                return Ok(());
            }
            since = next_batch(&news)?;
        }
    }

    fn in_full(&self, path: &str) -> String {
        format!("{}/_matrix/client/v3/{path}", self.url)
    }

    fn signed(&self, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
        match self.token.is_empty() {
            true => request,
            false => request.bearer_auth(&self.token),
        }
    }
}

pub fn next_batch(sync: &Value) -> anyhow::Result<String> {
    let next = sync["next_batch"].as_str();
    Ok(next.context("a sync without an end")?.to_owned())
}

pub async fn answer(request: reqwest::RequestBuilder) -> anyhow::Result<Value> {
    let answer = request.send().await?;
    let (status, url) = (answer.status(), answer.url().path().to_owned());
    let body = answer.text().await?;
    ensure!(status.is_success(), "{url}: {status}: {body}");
    Ok(serde_json::from_str(&body)?)
}

/// For a segment of a path or a value in a query.
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                out.push(char::from(byte));
            }
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}
