//! `/keys/query` and `/keys/claim`: of our users from the store, of others from the cache or their server.
//!
//! A remote user's list is kept only while some server tells us of its changes (P-57 to P-61). Everybody else
//! is asked about each time.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _, stream};
use protocol::id::{ServerName, UserId};
use serde_json::{Map, Value, json};
use storage::devices as device_table;
use storage::e2ee::{self, RemoteDevice, RemoteList, Signature, Usage};
use storage::streams::{self, Stream};

use crate::Homeserver;
use crate::device_keys::{LocalKeys, add_signature, local_keys, public_part};
use crate::device_lists::{belongs_to, put_signing_keys};
use crate::error::{MatrixError, Result};

/// Users and devices of one request: clients ask for a room at a time.
const USERS_MAX: usize = 10_000;
/// Servers and lists asked at a time for one request.
const REQUESTS_AT_ONCE: usize = 16;
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);
const TIMEOUT_MAX: Duration = Duration::from_secs(30);

/// One fetch of a user's list at a time: whoever comes second waits and finds the list (P-61).
#[derive(Default)]
pub(crate) struct Fetches(Mutex<HashMap<UserId, Arc<tokio::sync::Mutex<()>>>>);

impl Fetches {
    fn of(&self, user: &UserId) -> Arc<tokio::sync::Mutex<()>> {
        let mut fetches = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        fetches.retain(|_, fetch| Arc::strong_count(fetch) > 1);
        Arc::clone(fetches.entry(user.clone()).or_default())
    }
}

/// What is asked of whom: the devices, all of them when none is named.
pub type Wanted = BTreeMap<UserId, Vec<String>>;

#[derive(Default)]
struct Found {
    device_keys: Map<String, Value>,
    master_keys: Map<String, Value>,
    self_signing_keys: Map<String, Value>,
    user_signing_keys: Map<String, Value>,
    failures: Map<String, Value>,
}

impl Found {
    fn add(&mut self, user: &UserId, keys: LocalKeys) {
        let name = user.as_str().to_owned();
        self.device_keys
            .insert(name.clone(), json!(keys.device_keys));
        let lists = [
            (keys.master, &mut self.master_keys),
            (keys.self_signing, &mut self.self_signing_keys),
            (keys.user_signing, &mut self.user_signing_keys),
        ];
        for (key, list) in lists {
            if let Some(key) = key {
                list.insert(name.clone(), key);
            }
        }
    }

    fn into_json(self) -> Value {
        json!({
            "device_keys": self.device_keys,
            "master_keys": self.master_keys,
            "self_signing_keys": self.self_signing_keys,
            "user_signing_keys": self.user_signing_keys,
            "failures": self.failures,
        })
    }
}

/// Algorithms by user and device.
type Claims = BTreeMap<UserId, BTreeMap<String, String>>;

/// A server's answer to a claim, `None` when there was none.
type Claimed = (ServerName, Claims, Option<Value>);

/// What one round of asking other servers brought.
enum Answer {
    List(UserId, LocalKeys),
    Keys(ServerName, Value),
    Failed(ServerName),
}

impl Homeserver {
    /// `POST /keys/query`
    pub async fn query_keys(
        &self,
        requester: &UserId,
        wanted: Wanted,
        timeout: Option<Duration>,
    ) -> Result<Value> {
        if wanted.len() > USERS_MAX {
            return Err(MatrixError::too_large("Too many users at once"));
        }
        let timeout = timeout.unwrap_or(TIMEOUT_DEFAULT).min(TIMEOUT_MAX);
        let (ours, theirs): (Wanted, Wanted) = wanted
            .into_iter()
            .partition(|(user, _)| self.config().is_ours(user));
        let mut found = Found::default();
        for (user, keys) in self.query_local_keys(ours, Some(requester)).await? {
            found.add(&user, keys);
        }
        let (cached, tracked, untracked) = self.look_up_cached(theirs).await?;
        for (user, keys) in cached {
            found.add(&user, keys);
        }
        let mut by_server: BTreeMap<ServerName, Wanted> = BTreeMap::new();
        for (user, devices) in untracked {
            by_server
                .entry(user.server_name())
                .or_default()
                .insert(user, devices);
        }
        let mut asks: Vec<BoxFuture<'static, Answer>> = Vec::new();
        for (user, devices) in tracked {
            let hs = self.clone();
            asks.push(async move { hs.fetch_list(&user, &devices, timeout).await }.boxed());
        }
        for (server, users) in by_server.clone() {
            let hs = self.clone();
            asks.push(async move { hs.ask_keys(&server, &users, timeout).await }.boxed());
        }
        let answers: Vec<Answer> = stream::iter(asks)
            .buffer_unordered(REQUESTS_AT_ONCE)
            .collect()
            .await;
        for answer in answers {
            match answer {
                Answer::List(user, keys) => found.add(&user, keys),
                Answer::Failed(server) => {
                    drop(found.failures.insert(server.as_str().to_owned(), json!({})))
                }
                Answer::Keys(server, body) => {
                    let users = by_server
                        .get(&server)
                        .map(|users| users.keys())
                        .into_iter()
                        .flatten();
                    for user in users {
                        found.add(user, keys_of_answer(&body, user));
                    }
                }
            }
        }
        self.add_own_signatures(requester, &mut found).await?;
        Ok(found.into_json())
    }

    /// `POST /_matrix/federation/v1/user/keys/query`
    pub async fn federation_query_keys(&self, wanted: Wanted) -> Result<Value> {
        let ours: Wanted = wanted
            .into_iter()
            .take(USERS_MAX)
            .filter(|(user, _)| self.config().is_ours(user))
            .collect();
        let mut found = Found::default();
        for (user, keys) in self.query_local_keys(ours, None).await? {
            found.add(&user, keys);
        }
        Ok(json!({
            "device_keys": found.device_keys,
            "master_keys": found.master_keys,
            "self_signing_keys": found.self_signing_keys,
        }))
    }

    async fn query_local_keys(
        &self,
        users: Wanted,
        requester: Option<&UserId>,
    ) -> Result<Vec<(UserId, LocalKeys)>> {
        if users.is_empty() {
            return Ok(Vec::new());
        }
        let requester = requester.cloned();
        let found = self.store().read(move |c| {
            let keys = users.iter().map(|(user, devices)| {
                Ok((
                    user.clone(),
                    local_keys(c, user, devices, requester.as_ref())?,
                ))
            });
            keys.collect::<storage::Result<Vec<_>>>()
        });
        Ok(found.await?)
    }

    /// What the cache has; then who is tracked but not there, and who is not tracked.
    async fn look_up_cached(
        &self,
        users: Wanted,
    ) -> Result<(Vec<(UserId, LocalKeys)>, Wanted, Wanted)> {
        if users.is_empty() {
            return Ok(Default::default());
        }
        let found = self.store().read(move |c| {
            let (mut cached, mut tracked, mut untracked) =
                (Vec::new(), Wanted::new(), Wanted::new());
            for (user, devices) in &users {
                if !device_table::is_tracked(c, user)? {
                    untracked.insert(user.clone(), devices.clone());
                } else if let Some(keys) = cached_keys(c, user, devices)? {
                    cached.push((user.clone(), keys));
                } else {
                    tracked.insert(user.clone(), devices.clone());
                }
            }
            Ok((cached, tracked, untracked))
        });
        Ok(found.await?)
    }

    async fn fetch_list(&self, user: &UserId, devices: &[String], timeout: Duration) -> Answer {
        let server = user.server_name();
        let fetch = self.inner.fetches.of(user);
        let fetched = tokio::time::timeout(timeout, async {
            let _turn = fetch.lock().await;
            let (who, wanted) = (user.clone(), devices.to_vec());
            let (cached, before) = self
                .store()
                .read(move |c| {
                    Ok((
                        cached_keys(c, &who, &wanted)?,
                        streams::position(c, Stream::DeviceLists)?,
                    ))
                })
                .await?;
            if let Some(keys) = cached {
                return Ok(keys);
            }
            let answer = self.client().user_devices(&server, user).await;
            let answer = answer.map_err(|error| MatrixError::bad_gateway(format!("{error:?}")))?;
            self.keep_list(user, &answer, before).await?;
            Ok::<_, MatrixError>(list_of_answer(&answer, user, devices))
        });
        match fetched.await {
            Ok(Ok(keys)) => Answer::List(user.clone(), keys),
            Ok(Err(error)) => {
                tracing::debug!(%user, %error, "the device list could not be fetched");
                Answer::Failed(server)
            }
            Err(_) => Answer::Failed(server),
        }
    }

    /// Keeps a fetched list. If an update came meanwhile, nobody knows which is newer: it is stale at once.
    async fn keep_list(&self, user: &UserId, answer: &Value, before: i64) -> Result<()> {
        let user = user.clone();
        let stream_id = answer["stream_id"].as_i64().unwrap_or(0);
        let devices: Vec<RemoteDevice> = entries_of_list(answer, &user)
            .map(|(device_id, entry)| RemoteDevice {
                device_id: device_id.to_owned(),
                display_name: entry["device_display_name"].as_str().map(str::to_owned),
                keys: Some(entry["keys"].to_string()),
            })
            .collect();
        let (master, self_signing) = (
            answer.get("master_key").cloned(),
            answer.get("self_signing_key").cloned(),
        );
        self.store()
            .write(move |c| {
                if !device_table::is_tracked(c, &user)? {
                    return Ok(());
                }
                let stale = device_table::changed_since(c, &user, before)?;
                e2ee::replace_remote_devices(c, &user, &devices)?;
                e2ee::drop_cross_signing_keys(c, &user)?;
                put_signing_keys(c, &user, master.as_ref(), self_signing.as_ref())?;
                e2ee::set_remote_list(c, &user, &RemoteList { stream_id, stale })
            })
            .await?;
        Ok(())
    }

    async fn ask_keys(&self, server: &ServerName, users: &Wanted, timeout: Duration) -> Answer {
        let body = json!({ "device_keys": users });
        match tokio::time::timeout(timeout, self.client().user_keys_query(server, body)).await {
            Ok(Ok(answer)) => Answer::Keys(server.clone(), answer),
            Ok(Err(error)) => {
                tracing::debug!(%server, ?error, "keys could not be fetched");
                Answer::Failed(server.clone())
            }
            Err(_) => Answer::Failed(server.clone()),
        }
    }

    /// What the requester himself has signed of other people's keys is his to see.
    async fn add_own_signatures(&self, requester: &UserId, found: &mut Found) -> Result<()> {
        let masters: Vec<(UserId, String)> = found
            .master_keys
            .iter()
            .filter_map(|(user, key)| {
                Some((
                    UserId::parse(user).ok()?,
                    public_part(key.as_object()?)?.to_owned(),
                ))
            })
            .filter(|(user, _)| !self.config().is_ours(user))
            .collect();
        if masters.is_empty() {
            return Ok(());
        }
        let requester = requester.clone();
        let signed = self
            .store()
            .read(move |c| {
                let mut signed: Vec<(UserId, Signature)> = Vec::new();
                for (user, public) in &masters {
                    let of_requester = e2ee::signatures(c, user)?.into_iter().filter(|signature| {
                        signature.signer == requester && signature.target == *public
                    });
                    signed.extend(of_requester.map(|signature| (user.clone(), signature)));
                }
                Ok(signed)
            })
            .await?;
        for (user, signature) in signed {
            if let Some(key) = found
                .master_keys
                .get_mut(user.as_str())
                .and_then(Value::as_object_mut)
            {
                add_signature(key, &signature);
            }
        }
        Ok(())
    }

    /// `POST /keys/claim`: `{user: {device: algorithm}}`.
    pub async fn claim_keys(&self, wanted: Claims, timeout: Option<Duration>) -> Result<Value> {
        if wanted.len() > USERS_MAX {
            return Err(MatrixError::too_large("Too many users at once"));
        }
        let timeout = timeout.unwrap_or(TIMEOUT_DEFAULT).min(TIMEOUT_MAX);
        let (ours, theirs): (BTreeMap<_, _>, BTreeMap<_, _>) = wanted
            .into_iter()
            .partition(|(user, _)| self.config().is_ours(user));
        let mut keys = self.claim_local_keys(flatten(ours)).await?;
        let mut by_server: BTreeMap<ServerName, Claims> = BTreeMap::new();
        for (user, devices) in theirs {
            by_server
                .entry(user.server_name())
                .or_default()
                .insert(user, devices);
        }
        let mut claims: Vec<BoxFuture<'static, Claimed>> = Vec::new();
        for (server, users) in by_server {
            let hs = self.clone();
            let claim = async move {
                let body = json!({ "one_time_keys": users });
                let claim = hs.client().user_keys_claim(&server, body);
                let answer = tokio::time::timeout(timeout, claim).await;
                (server, users, answer.ok().and_then(std::result::Result::ok))
            };
            claims.push(claim.boxed());
        }
        let mut claims = stream::iter(claims).buffer_unordered(REQUESTS_AT_ONCE);
        let mut failures = Map::new();
        while let Some((server, users, answer)) = claims.next().await {
            let Some(answer) = answer else {
                failures.insert(server.as_str().to_owned(), json!({}));
                continue;
            };
            for user in users.keys() {
                let of_user = answer["one_time_keys"]
                    .get(user.as_str())
                    .filter(|keys| keys.is_object());
                if let Some(of_user) = of_user {
                    keys.insert(user.as_str().to_owned(), of_user.clone());
                }
            }
        }
        Ok(json!({ "one_time_keys": keys, "failures": failures }))
    }

    /// `POST /_matrix/federation/v1/user/keys/claim`
    pub async fn federation_claim_keys(&self, wanted: Claims) -> Result<Value> {
        let ours = wanted
            .into_iter()
            .take(USERS_MAX)
            .filter(|(user, _)| self.config().is_ours(user))
            .collect();
        Ok(json!({ "one_time_keys": self.claim_local_keys(flatten(ours)).await? }))
    }
}

fn flatten(wanted: Claims) -> Vec<(UserId, String, String)> {
    wanted
        .into_iter()
        .flat_map(|(user, devices)| {
            devices
                .into_iter()
                .map(move |(device, algorithm)| (user.clone(), device, algorithm))
        })
        .collect()
}

/// The cached list, unless it is stale.
fn cached_keys(
    c: &mut dyn storage::Conn,
    user: &UserId,
    devices: &[String],
) -> storage::Result<Option<LocalKeys>> {
    if e2ee::remote_list(c, user)?.is_none_or(|list| list.stale) {
        return Ok(None);
    }
    let mut found = LocalKeys::default();
    for device in e2ee::remote_devices(c, user)? {
        let wanted = devices.is_empty() || devices.contains(&device.device_id);
        let keys = device
            .keys
            .filter(|_| wanted)
            .and_then(|keys| serde_json::from_str::<Value>(&keys).ok());
        let Some(mut keys) = keys else { continue };
        if let Some(name) = device.display_name {
            keys["unsigned"] = json!({ "device_display_name": name });
        }
        found.device_keys.insert(device.device_id, keys);
    }
    let parse = |key: Option<String>| key.and_then(|key| serde_json::from_str(&key).ok());
    found.master = parse(e2ee::cross_signing_key(c, user, Usage::Master)?);
    found.self_signing = parse(e2ee::cross_signing_key(c, user, Usage::SelfSigning)?);
    Ok(Some(found))
}

/// The entries of a `/user/devices` answer that are in order.
fn entries_of_list<'a>(
    answer: &'a Value,
    user: &'a UserId,
) -> impl Iterator<Item = (&'a str, &'a Value)> {
    answer["devices"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(move |entry| {
            let device = entry["device_id"].as_str()?;
            belongs_to(&entry["keys"], user, device).then_some((device, entry))
        })
}

fn list_of_answer(answer: &Value, user: &UserId, devices: &[String]) -> LocalKeys {
    let device_keys = entries_of_list(answer, user)
        .filter(|(device, _)| devices.is_empty() || devices.iter().any(|wanted| wanted == device))
        .map(|(device, entry)| {
            let mut keys = entry["keys"].clone();
            if let Some(name) = entry["device_display_name"].as_str() {
                keys["unsigned"] = json!({ "device_display_name": name });
            }
            (device.to_owned(), keys)
        })
        .collect();
    LocalKeys {
        device_keys,
        master: owned_key(answer.get("master_key"), user),
        self_signing: owned_key(answer.get("self_signing_key"), user),
        user_signing: None,
    }
}

/// One user's part of a `/user/keys/query` answer, what is in order of it.
fn keys_of_answer(answer: &Value, user: &UserId) -> LocalKeys {
    let devices = answer["device_keys"]
        .get(user.as_str())
        .and_then(Value::as_object);
    let device_keys = devices
        .into_iter()
        .flatten()
        .filter(|(device, keys)| belongs_to(keys, user, device))
        .map(|(device, keys)| (device.clone(), keys.clone()))
        .collect();
    LocalKeys {
        device_keys,
        master: owned_key(answer["master_keys"].get(user.as_str()), user),
        self_signing: owned_key(answer["self_signing_keys"].get(user.as_str()), user),
        user_signing: None,
    }
}

fn owned_key(key: Option<&Value>, user: &UserId) -> Option<Value> {
    key.filter(|key| key.get("user_id").and_then(Value::as_str) == Some(user.as_str()))
        .cloned()
}
