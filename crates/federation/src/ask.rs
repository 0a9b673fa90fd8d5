//! Each Ask to its endpoint: one match, the whole client.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/>

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use protocol::id::{EventId, RoomId, ServerName};
use protocol::room_version::RoomVersion;
use room::effect::{Answer, Ask, AskError, Handshake, RawPdu, Section, SentJoin};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::client::{Body, Call, Client, Failure, uri, with_query};
use crate::room_body::{BodyKind, RoomBody};

const V1: &str = "/_matrix/federation/v1";
const V2: &str = "/_matrix/federation/v2";
const POLICY_SIGN: &str = "/_matrix/policy/v1/sign";

/// One event and what stands around it.
const SMALL_BYTES_MAX: usize = 2 << 20;
/// 200,000 ids twice.
const IDS_BYTES_MAX: usize = 64 << 20;
/// An auth chain; with every membership of a big room it is long.
const CHAIN_BYTES_MAX: usize = 200 << 20;
/// 100 events of the largest size, with room for escapes.
const EVENTS_BYTES_MAX: usize = 32 << 20;
/// Events in one such answer; nobody asks for more than 100.
const EVENTS_MAX: usize = 1000;

impl Client {
    /// Asks, and gives the answer. The PDUs of a send_join or /state body go to `on_part` as they arrive,
    /// and reading waits for it, so that what is not yet dealt with stays with the sender.
    pub async fn ask<F, Done>(
        &self,
        to: &ServerName,
        ask: &Ask,
        timeout: Duration,
        on_part: F,
    ) -> Result<Answer, AskError>
    where
        F: FnMut(Section, Vec<RawPdu>) -> Done + Send,
        Done: Future<Output = ()> + Send,
    {
        Ok(self.try_ask(to, ask, timeout, on_part).await?)
    }

    async fn try_ask<F, Done>(
        &self,
        to: &ServerName,
        ask: &Ask,
        timeout: Duration,
        on_part: F,
    ) -> Result<Answer, Failure>
    where
        F: FnMut(Section, Vec<RawPdu>) -> Done + Send,
        Done: Future<Output = ()> + Send,
    {
        match ask {
            Ask::Make { what, room, user } => {
                let path = format!("{V1}/make_{}", what.word());
                let mut uri = uri(&path, &[room.as_str(), user.as_str()]);
                if *what != Handshake::Leave {
                    for version in RoomVersion::ALL {
                        uri = with_query(uri, "ver", version.as_str());
                    }
                }
                let made: Made = self.get(to, uri, timeout, SMALL_BYTES_MAX).await?;
                Ok(Answer::Made {
                    room_version: made.room_version,
                    event: object(&made.event)?,
                })
            }
            Ask::Send {
                what: Handshake::Join,
                room,
                event_id,
                event,
                omit_members,
            } => {
                let sent = SendJoin {
                    to,
                    room,
                    event_id,
                    event,
                    omit_members: *omit_members,
                    timeout,
                };
                Ok(Answer::SentJoin(self.send_join(sent, on_part).await?))
            }
            Ask::Send {
                what: Handshake::Leave,
                room,
                event_id,
                event,
                ..
            } => {
                let segments = [room.as_str(), event_id.as_str()];
                let v2 = uri(&format!("{V2}/send_leave"), &segments);
                let v1 = uri(&format!("{V1}/send_leave"), &segments);
                match self.put::<Value>(to, v2, event, timeout).await {
                    Err(failure) if failure.is_unknown_endpoint() => {
                        self.put::<Value>(to, v1, event, timeout).await?;
                    }
                    answer => {
                        answer?;
                    }
                }
                Ok(Answer::SentLeave)
            }
            Ask::Send {
                what: Handshake::Knock,
                room,
                event_id,
                event,
                ..
            } => {
                let path = format!("{V1}/send_knock");
                let uri = uri(&path, &[room.as_str(), event_id.as_str()]);
                let sent: SentKnock = self.put(to, uri, event, timeout).await?;
                // Bad entries are dropped, the knock stands (R-60).
                let entries = sent.knock_room_state.unwrap_or_default();
                Ok(Answer::SentKnock {
                    room_state: entries.iter().filter_map(|e| object(e).ok()).collect(),
                })
            }
            Ask::StateIds { room, event_id } => {
                let uri = uri(&format!("{V1}/state_ids"), &[room.as_str()]);
                let uri = with_query(uri, "event_id", event_id.as_str());
                let ids: StateIds = self.get(to, uri, timeout, IDS_BYTES_MAX).await?;
                Ok(Answer::StateIds {
                    pdu_ids: ids.pdu_ids.unwrap_or_default(),
                    auth_chain_ids: ids.auth_chain_ids.unwrap_or_default(),
                })
            }
            Ask::State { room, event_id } => {
                let uri = uri(&format!("{V1}/state"), &[room.as_str()]);
                let uri = with_query(uri, "event_id", event_id.as_str());
                let call = Call::get(to, uri, timeout);
                self.room_body(call, BodyKind::State, on_part).await?;
                Ok(Answer::State)
            }
            Ask::Event { event_id } => {
                let uri = uri(&format!("{V1}/event"), &[event_id.as_str()]);
                let answer: Pdus = self.get(to, uri, timeout, SMALL_BYTES_MAX).await?;
                pdus(answer.pdus)
            }
            Ask::EventAuth { room, event_id } => {
                let path = format!("{V1}/event_auth");
                let uri = uri(&path, &[room.as_str(), event_id.as_str()]);
                let answer: AuthChain = self.get(to, uri, timeout, CHAIN_BYTES_MAX).await?;
                raw_pdus(answer.auth_chain, usize::MAX)
            }
            Ask::GetMissingEvents {
                room,
                earliest,
                latest,
                limit,
                min_depth,
            } => {
                let uri = uri(&format!("{V1}/get_missing_events"), &[room.as_str()]);
                let body = json!({
                    "earliest_events": earliest,
                    "latest_events": latest,
                    "limit": limit,
                    "min_depth": min_depth,
                });
                let call = Call::post(to, uri, Body::Json(body), timeout);
                let answer: Events = self.json(call, EVENTS_BYTES_MAX).await?;
                pdus(answer.events)
            }
            Ask::Backfill { room, from, limit } => {
                let mut uri = uri(&format!("{V1}/backfill"), &[room.as_str()]);
                for event_id in from {
                    uri = with_query(uri, "v", event_id.as_str());
                }
                uri = with_query(uri, "limit", &limit.to_string());
                let answer: Pdus = self.get(to, uri, timeout, EVENTS_BYTES_MAX).await?;
                pdus(answer.pdus)
            }
            Ask::PolicySign { event } => {
                let uri = POLICY_SIGN.to_owned();
                let call = Call::post(to, uri, Body::Raw(event), timeout);
                let signatures = self.json(call, SMALL_BYTES_MAX).await?;
                Ok(Answer::PolicySigned { signatures })
            }
            Ask::Invite {
                room,
                event_id,
                version,
                event,
                stripped_state,
            } => {
                let segments = [room.as_str(), event_id.as_str()];
                let v2 = uri(&format!("{V2}/invite"), &segments);
                let body = invite_body(*version, event, stripped_state)?;
                let event = match self.put::<Invited>(to, v2, &body, timeout).await {
                    // Version 1 of the endpoint knows no room version, so it is for these two only.
                    Err(failure)
                        if failure.is_unknown_endpoint()
                            && matches!(version, RoomVersion::V1 | RoomVersion::V2) =>
                    {
                        let v1 = uri(&format!("{V1}/invite"), &segments);
                        let body = invite_body_v1(event, stripped_state)?;
                        let (_, invited): (u16, Invited) = self.put(to, v1, &body, timeout).await?;
                        invited.event
                    }
                    answer => answer?.event,
                };
                Ok(Answer::Invited {
                    event: object(&event)?,
                })
            }
        }
    }

    /// Version 2, and version 1 where that is not known (J-46, J-47).
    async fn send_join<F, Done>(
        &self,
        sent: SendJoin<'_>,
        mut on_part: F,
    ) -> Result<SentJoin, Failure>
    where
        F: FnMut(Section, Vec<RawPdu>) -> Done + Send,
        Done: Future<Output = ()> + Send,
    {
        let segments = [sent.room.as_str(), sent.event_id.as_str()];
        let v2 = uri(&format!("{V2}/send_join"), &segments);
        let omit = if sent.omit_members { "true" } else { "false" };
        let call = |uri| Call::put(sent.to, uri, Body::Raw(sent.event), sent.timeout);
        let v2 = call(with_query(v2, "omit_members", omit));
        match self.room_body(v2, BodyKind::SendJoinV2, &mut on_part).await {
            Err(failure) if failure.is_unknown_endpoint() => {
                let v1 = call(uri(&format!("{V1}/send_join"), &segments));
                self.room_body(v1, BodyKind::SendJoinV1, on_part).await
            }
            answer => answer,
        }
    }

    async fn room_body<F, Done>(
        &self,
        call: Call<'_>,
        kind: BodyKind,
        mut on_part: F,
    ) -> Result<SentJoin, Failure>
    where
        F: FnMut(Section, Vec<RawPdu>) -> Done + Send,
        Done: Future<Output = ()> + Send,
    {
        let malformed = |error: crate::room_body::BodyError| Failure::Malformed(error.to_string());
        let mut response = self.open(call).await?;
        let mut reader = RoomBody::new(kind);
        while let Some(chunk) = response.body.next().await {
            let chunk = chunk.map_err(Failure::Transport)?;
            reader.feed(&chunk).map_err(malformed)?;
            for (section, pdus) in reader.take_ready() {
                on_part(section, pdus).await;
            }
        }
        let (rest, sent) = reader.finish().map_err(malformed)?;
        for (section, pdus) in rest {
            on_part(section, pdus).await;
        }
        Ok(sent)
    }

    async fn get<T: DeserializeOwned>(
        &self,
        to: &ServerName,
        uri: String,
        timeout: Duration,
        bytes_max: usize,
    ) -> Result<T, Failure> {
        self.json(Call::get(to, uri, timeout), bytes_max).await
    }

    async fn put<T: DeserializeOwned>(
        &self,
        to: &ServerName,
        uri: String,
        body: &str,
        timeout: Duration,
    ) -> Result<T, Failure> {
        let call = Call::put(to, uri, Body::Raw(body), timeout);
        self.json(call, SMALL_BYTES_MAX).await
    }
}

struct SendJoin<'a> {
    to: &'a ServerName,
    room: &'a RoomId,
    event_id: &'a EventId,
    event: &'a Arc<str>,
    omit_members: bool,
    timeout: Duration,
}

trait Word {
    fn word(self) -> &'static str;
}

impl Word for Handshake {
    fn word(self) -> &'static str {
        match self {
            Self::Join => "join",
            Self::Leave => "leave",
            Self::Knock => "knock",
        }
    }
}

#[derive(Deserialize)]
struct Made {
    room_version: Option<String>,
    event: Box<RawValue>,
}

#[derive(Deserialize)]
struct SentKnock {
    knock_room_state: Option<Vec<Box<RawValue>>>,
}

#[derive(Deserialize)]
struct StateIds {
    pdu_ids: Option<Vec<EventId>>,
    auth_chain_ids: Option<Vec<EventId>>,
}

#[derive(Deserialize)]
struct Pdus {
    pdus: Option<Vec<Box<RawValue>>>,
}

#[derive(Deserialize)]
struct Events {
    events: Option<Vec<Box<RawValue>>>,
}

#[derive(Deserialize)]
struct AuthChain {
    auth_chain: Option<Vec<Box<RawValue>>>,
}

#[derive(Deserialize)]
struct Invited {
    event: Box<RawValue>,
}

fn object(raw: &RawValue) -> Result<Arc<str>, Failure> {
    if raw.get().starts_with('{') {
        Ok(raw.get().into())
    } else {
        Err(Failure::Malformed("an event that is no object".into()))
    }
}

/// What is no object is left for the checks to refuse; it must not spoil the rest.
fn raw_pdus(found: Option<Vec<Box<RawValue>>>, max: usize) -> Result<Answer, Failure> {
    let found = found.unwrap_or_default();
    if found.len() > max {
        return Err(Failure::Malformed(format!("{} events", found.len())));
    }
    Ok(Answer::Pdus(
        found.iter().map(|pdu| pdu.get().into()).collect(),
    ))
}

fn pdus(found: Option<Vec<Box<RawValue>>>) -> Result<Answer, Failure> {
    raw_pdus(found, EVENTS_MAX)
}

fn invite_body(
    version: RoomVersion,
    event: &str,
    stripped_state: &[Arc<str>],
) -> Result<String, Failure> {
    let version = serde_json::to_string(version.as_str()).map_err(|_| Failure::Unsignable)?;
    Ok(format!(
        r#"{{"room_version":{version},"event":{event},"invite_room_state":[{}]}}"#,
        stripped_state.join(",")
    ))
}

fn invite_body_v1(event: &str, stripped_state: &[Arc<str>]) -> Result<String, Failure> {
    let unsignable = |_| Failure::Unsignable;
    let mut event: Value = serde_json::from_str(event).map_err(unsignable)?;
    let entries: Vec<Value> = stripped_state
        .iter()
        .map(|entry| serde_json::from_str(entry).map_err(unsignable))
        .collect::<Result<_, _>>()?;
    event["unsigned"]["invite_room_state"] = Value::Array(entries);
    Ok(event.to_string())
}
