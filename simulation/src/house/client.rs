//! A user with a client, and a client that follows a room by /sync.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use homeserver::sync::token::SyncToken;
use serde_json::{Value, json};

use super::log;
use super::server::{SERVICE_TOKEN, Server};

/// No client waits longer for an answer.
const PATIENCE: Duration = Duration::from_secs(600);
/// Pages that fill one gap in a timeline.
const PAGES_MAX: usize = 500;

#[derive(Clone)]
pub struct User {
    pub server: Arc<Server>,
    pub id: String,
    token: String,
}

impl User {
    pub async fn register(server: &Arc<Server>, name: &str) -> Result<Self, String> {
        let body = json!({ "type": "m.login.application_service", "username": name });
        let answer = server.ask("POST", "/register", SERVICE_TOKEN, &body).await;
        match answer {
            Some((200, answer)) => Ok(Self {
                server: server.clone(),
                id: answer["user_id"].as_str().unwrap_or_default().to_owned(),
                token: answer["access_token"]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned(),
            }),
            other => Err(format!("{name} can not register: {other:?}")),
        }
    }

    /// `None`: no answer came. A server that says 500 has broken a law.
    pub async fn ask(
        &self,
        method: &str,
        path: &str,
        body: &Value,
    ) -> Result<Option<(u16, Value)>, String> {
        let asking = self.server.ask(method, path, &self.token, body);
        let answer = tokio::time::timeout(PATIENCE, asking).await.ok().flatten();
        if let Some((500, answer)) = &answer {
            return Err(format!("{method} {path} by {} gives {answer}", self.id));
        }
        Ok(answer)
    }

    pub async fn get(&self, path: &str) -> Result<Option<(u16, Value)>, String> {
        self.ask("GET", path, &Value::Null).await
    }

    /// As [`Self::ask`], noted in the trace.
    pub async fn act(
        &self,
        method: &str,
        path: &str,
        body: &Value,
    ) -> Result<Option<(u16, Value)>, String> {
        log::note(|| format!("{} {method} {path} {body}", self.id));
        let answer = self.ask(method, path, body).await?;
        log::note(|| match &answer {
            None => format!("{} {method} {path}: no answer", self.id),
            Some((status, answer)) => {
                let what = match &answer["event_id"] {
                    Value::Null => answer["errcode"].as_str().unwrap_or_default(),
                    id => id.as_str().unwrap_or_default(),
                };
                let error = answer["error"].as_str().unwrap_or_default();
                format!("{} {method} {path}: {status} {what} {error}", self.id)
            }
        });
        Ok(answer)
    }
}

/// A text as a part of a path or query.
pub fn encode(text: &str) -> String {
    let encoded = text.bytes().map(|byte| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b':' | b'!' | b'$' => {
            char::from(byte).to_string()
        }
        _ => format!("%{byte:02X}"),
    });
    encoded.collect()
}

/// What one client knows of the room.
pub struct Follower {
    pub user: User,
    room: String,
    filter: String,
    since: Option<String>,
    /// The token of the last answer that told of the room.
    told: Option<String>,
    /// Event ids as /sync and the pages between gave them, since the room came into view.
    pub seen: Vec<String>,
    known: BTreeSet<String>,
    /// The stream's position when the room came into view: what comes later is told.
    pub from: i64,
    /// Whether it asks for the state after the timeline (MSC4222), and has one name for it.
    pub keeps_state: bool,
    /// Whether it wants only those members that it needs.
    pub lazy: bool,
    /// State as /sync tells it.
    pub state: BTreeMap<(String, String), String>,
    pub in_view: bool,
}

impl Follower {
    pub fn new(user: User, room: &str, lazy: bool, keeps_state: bool, limit: u64) -> Self {
        let filter = json!({ "room": {
            "state": { "lazy_load_members": lazy },
            "timeline": { "lazy_load_members": lazy, "limit": limit },
        }});
        Self {
            user,
            room: room.to_owned(),
            filter: encode(&filter.to_string()),
            since: None,
            told: None,
            seen: Vec::new(),
            known: BTreeSet::new(),
            from: 0,
            keeps_state,
            lazy,
            state: BTreeMap::new(),
            in_view: false,
        }
    }

    /// One /sync. Whether there was an answer, and whether it told anything of the room.
    pub async fn sync(&mut self, timeout_ms: u64) -> Result<Option<bool>, String> {
        let mut path = format!("/sync?timeout={timeout_ms}&filter={}", self.filter);
        if self.keeps_state {
            path.push_str("&org.matrix.msc4222.use_state_after=true");
        }
        if let Some(since) = &self.since {
            path.push_str("&since=");
            path.push_str(since);
        }
        let Some((status, sync)) = self.user.get(&path).await? else {
            return Ok(None);
        };
        if status != 200 {
            return Err(format!("/sync of {} gives {status} {sync}", self.user.id));
        }
        let next = sync["next_batch"].as_str().unwrap_or_default().to_owned();
        let position = self.check_forward(&next)?;
        let rooms = &sync["rooms"];
        let joined = &rooms["join"][&self.room];
        let left = ["leave", "invite", "knock"]
            .iter()
            .any(|section| !rooms[section][&self.room].is_null());
        if !joined.is_null() && !self.take(joined, position).await? {
            // A gap could not be filled: a client that is not sure begins again from the same token.
            return Ok(None);
        }
        if !joined.is_null() {
            self.told = Some(next.clone());
        }
        if left {
            self.in_view = false;
        }
        log::detail(|| {
            let timeline = &joined["timeline"];
            let shown = ids(timeline["events"].as_array().map_or(&[], Vec::as_slice));
            let limited = &timeline["limited"];
            format!(
                "{} syncs to {next}: limited {limited}, {shown:?}",
                self.user.id
            )
        });
        self.since = Some(next);
        Ok(Some(!joined.is_null() || left))
    }

    /// Law 5: tokens only go forward. The position in the stream of events.
    fn check_forward(&self, next: &str) -> Result<i64, String> {
        let parse = |text: &str| {
            SyncToken::parse(text).ok_or_else(|| format!("{text} is no token of ours"))
        };
        let next = parse(next)?;
        let Some(since) = &self.since else {
            return Ok(next.events);
        };
        let since = parse(since)?;
        let forward = since.events <= next.events
            && since.receipts <= next.receipts
            && since.account_data <= next.account_data
            && since.to_device <= next.to_device
            && since.device_lists <= next.device_lists
            && since.presence <= next.presence
            && since.became_full <= next.became_full
            && since.memberships <= next.memberships;
        match forward {
            true => Ok(next.events),
            false => Err(format!(
                "the token of {} went back from {since} to {next}",
                self.user.id
            )),
        }
    }

    async fn take(&mut self, joined: &Value, position: i64) -> Result<bool, String> {
        let timeline = &joined["timeline"];
        let events = timeline["events"].as_array().cloned().unwrap_or_default();
        if !self.in_view {
            self.seen.clear();
            self.known.clear();
            self.state.clear();
            self.from = position;
        } else if timeline["limited"] == true {
            let from = timeline["prev_batch"].as_str().unwrap_or_default();
            match self.between(from).await? {
                Some(older) => self.see(&older)?,
                None => return Ok(false),
            }
        }
        self.see(&events)?;
        self.in_view = true;
        let told = joined["org.matrix.msc4222.state_after"]["events"].as_array();
        for event in told.into_iter().flatten() {
            if let (Some(kind), Some(key), Some(id)) = (
                event["type"].as_str(),
                event["state_key"].as_str(),
                event["event_id"].as_str(),
            ) {
                let key = (kind.to_owned(), key.to_owned());
                self.state.insert(key, id.to_owned());
            }
        }
        Ok(true)
    }

    /// Law 5: nothing is shown twice.
    fn see(&mut self, events: &[Value]) -> Result<(), String> {
        for id in ids(events) {
            if !self.known.insert(id.clone()) {
                return Err(format!("{} was shown {id} twice", self.user.id));
            }
            self.seen.push(id);
        }
        Ok(())
    }

    /// What a limited timeline left out, oldest first. It begins where the room was last told of, which may be
    /// before `since`: a resolution can undo the user's join, and another bring it back, and of what came in
    /// between only the second tells, as of a gap. Then what was shown may lie, by its depth, among what was not.
    async fn between(&self, from: &str) -> Result<Option<Vec<Value>>, String> {
        let to = self.told.as_deref().unwrap_or_default();
        let Some(walk) = walk(&self.user, &self.room, Some(from), Some(to)).await? else {
            return Ok(None);
        };
        let again = self.told != self.since;
        let shown = |event: &Value| {
            let id = event["event_id"].as_str().unwrap_or_default();
            again && self.known.contains(id)
        };
        let oldest_first = walk.into_iter().rev();
        Ok(Some(oldest_first.filter(|event| !shown(event)).collect()))
    }
}

fn ids(events: &[Value]) -> Vec<String> {
    let ids = events.iter().filter_map(|event| event["event_id"].as_str());
    ids.map(str::to_owned).collect()
}

/// Pages of /messages back to the end, newest first; `None` where one is not answered.
pub async fn walk(
    user: &User,
    room: &str,
    from: Option<&str>,
    to: Option<&str>,
) -> Result<Option<Vec<Value>>, String> {
    let mut all = Vec::new();
    let mut from = from.map(str::to_owned);
    for _ in 0..PAGES_MAX {
        let mut path = format!("/rooms/{}/messages?dir=b&limit=20", encode(room));
        if let Some(from) = &from {
            path.push_str(&format!("&from={from}"));
        }
        if let Some(to) = to {
            path.push_str(&format!("&to={to}"));
        }
        let (status, page) = match user.get(&path).await? {
            Some(answer) => answer,
            None => return Ok(None),
        };
        if status != 200 {
            log::note(|| format!("{} GET {path}: {status} {page}", user.id));
            return Ok(None);
        }
        all.extend(page["chunk"].as_array().cloned().unwrap_or_default());
        match page["end"].as_str() {
            Some(end) => from = Some(end.to_owned()),
            None => return Ok(Some(all)),
        }
    }
    Err(format!("/messages of {} does not end", user.id))
}
