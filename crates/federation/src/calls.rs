//! Requests that concern no room machine: look-ups, devices, directory, transactions.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/>

use std::time::Duration;

use protocol::id::{EventId, RoomAlias, RoomId, ServerName, UserId};
use room::effect::AskError;
use serde::Deserialize;
use serde_json::Value;

use crate::client::{Body, Call, Client, uri, with_query};

const V1: &str = "/_matrix/federation/v1";

/// A user waits for these.
const QUERY_TIMEOUT: Duration = Duration::from_secs(10);
/// A server may take some time over 50 events.
const TRANSACTION_TIMEOUT: Duration = Duration::from_secs(60);
const SMALL_BYTES_MAX: usize = 1 << 20;
/// Devices of many users; a page of a directory; a hierarchy.
const LARGE_BYTES_MAX: usize = 16 << 20;

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct DirectoryAnswer {
    pub room_id: RoomId,
    #[serde(default)]
    pub servers: Vec<ServerName>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct EventAtTime {
    pub event_id: EventId,
    pub origin_server_ts: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Forward,
    Backward,
}

impl Client {
    /// `GET /query/directory`
    pub async fn query_directory(
        &self,
        to: &ServerName,
        alias: &RoomAlias,
    ) -> Result<DirectoryAnswer, AskError> {
        let uri = with_query(
            format!("{V1}/query/directory"),
            "room_alias",
            alias.as_str(),
        );
        self.query(to, uri).await
    }

    /// `GET /query/profile`; the whole profile, or an object with this field alone.
    pub async fn query_profile(
        &self,
        to: &ServerName,
        user: &UserId,
        field: Option<&str>,
    ) -> Result<Value, AskError> {
        let mut uri = with_query(format!("{V1}/query/profile"), "user_id", user.as_str());
        if let Some(field) = field {
            uri = with_query(uri, "field", field);
        }
        self.query(to, uri).await
    }

    /// `GET /user/devices/{userId}`
    pub async fn user_devices(&self, to: &ServerName, user: &UserId) -> Result<Value, AskError> {
        self.query(to, uri(&format!("{V1}/user/devices"), &[user.as_str()]))
            .await
    }

    /// `POST /user/keys/query`
    pub async fn user_keys_query(&self, to: &ServerName, body: Value) -> Result<Value, AskError> {
        self.post(to, format!("{V1}/user/keys/query"), body, QUERY_TIMEOUT)
            .await
    }

    /// `POST /user/keys/claim`
    pub async fn user_keys_claim(&self, to: &ServerName, body: Value) -> Result<Value, AskError> {
        self.post(to, format!("{V1}/user/keys/claim"), body, QUERY_TIMEOUT)
            .await
    }

    /// `POST /publicRooms`, with `limit`, `since`, `filter` and so on in the body.
    pub async fn public_rooms(&self, to: &ServerName, body: Value) -> Result<Value, AskError> {
        self.post(to, format!("{V1}/publicRooms"), body, QUERY_TIMEOUT)
            .await
    }

    /// `GET /hierarchy/{roomId}`
    pub async fn hierarchy(
        &self,
        to: &ServerName,
        room: &RoomId,
        suggested_only: bool,
    ) -> Result<Value, AskError> {
        let uri = uri(&format!("{V1}/hierarchy"), &[room.as_str()]);
        let suggested = if suggested_only { "true" } else { "false" };
        self.query(to, with_query(uri, "suggested_only", suggested))
            .await
    }

    /// `GET /timestamp_to_event/{roomId}`
    pub async fn timestamp_to_event(
        &self,
        to: &ServerName,
        room: &RoomId,
        ts_ms: i64,
        direction: Direction,
    ) -> Result<EventAtTime, AskError> {
        let uri = uri(&format!("{V1}/timestamp_to_event"), &[room.as_str()]);
        let uri = with_query(uri, "ts", &ts_ms.to_string());
        let direction = match direction {
            Direction::Forward => "f",
            Direction::Backward => "b",
        };
        self.query(to, with_query(uri, "dir", direction)).await
    }

    /// `PUT /send/{txnId}`; `body` is `{origin, origin_server_ts, pdus, edus}` as JSON text. The answer is
    /// a result for each PDU.
    pub async fn send_transaction(
        &self,
        to: &ServerName,
        txn_id: &str,
        body: &str,
    ) -> Result<Value, AskError> {
        let uri = uri(&format!("{V1}/send"), &[txn_id]);
        let call = Call::put(to, uri, Body::Raw(body), TRANSACTION_TIMEOUT);
        self.request(call, SMALL_BYTES_MAX).await
    }

    /// `PUT /exchange_third_party_invite/{roomId}`
    pub async fn exchange_third_party_invite(
        &self,
        to: &ServerName,
        room: &RoomId,
        event: &str,
    ) -> Result<(), AskError> {
        let uri = uri(
            &format!("{V1}/exchange_third_party_invite"),
            &[room.as_str()],
        );
        let call = Call::put(to, uri, Body::Raw(event), QUERY_TIMEOUT);
        self.request::<Value>(call, SMALL_BYTES_MAX).await.map(drop)
    }

    /// `POST /_matrix/policy/v1/sign`: a policy server's signatures for this event.
    pub async fn policy_sign(&self, to: &ServerName, event: &str) -> Result<Value, AskError> {
        let uri = "/_matrix/policy/v1/sign".to_owned();
        let call = Call::post(to, uri, Body::Raw(event), QUERY_TIMEOUT);
        self.request(call, SMALL_BYTES_MAX).await
    }

    async fn query<T: serde::de::DeserializeOwned>(
        &self,
        to: &ServerName,
        uri: String,
    ) -> Result<T, AskError> {
        self.request(Call::get(to, uri, QUERY_TIMEOUT), LARGE_BYTES_MAX)
            .await
    }

    async fn post(
        &self,
        to: &ServerName,
        uri: String,
        body: Value,
        timeout: Duration,
    ) -> Result<Value, AskError> {
        let call = Call::post(to, uri, Body::Json(body), timeout);
        self.request(call, LARGE_BYTES_MAX).await
    }
}
