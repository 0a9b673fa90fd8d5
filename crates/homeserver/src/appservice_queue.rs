//! Telling application services of events, and asking them about names of theirs.
//!
//! <https://spec.matrix.org/v1.18/application-service-api/#homeserver-application-service-api>

use std::sync::Arc;
use std::time::Duration;

use protocol::id::{RoomAlias, RoomId, UserId};
use protocol::pdu::Pdu;
use serde_json::{Value, json};
use storage::appservices::{self as table, Progress};
use storage::streams::{self, Stream};
use storage::{Conn, directory, timeline};

use crate::Homeserver;
use crate::appservice::Appservice;
use crate::client_event::{Unsigned, client_event};
use crate::error::Result;
use crate::notifier::Topic;

/// Events looked at for one transaction; those that are of interest are sent.
const EVENTS_AT_ONCE: i64 = 100;
const TIMEOUT: Duration = Duration::from_secs(60);
const QUERY_TIMEOUT: Duration = Duration::from_secs(10);
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// A bridge that was away is noticed again within this time.
const PAUSE_MAX: Duration = Duration::from_secs(300);

/// What there is to tell, up to a position.
struct Batch {
    events: Vec<Value>,
    up_to: i64,
}

impl Homeserver {
    /// One worker for each application service that wants traffic, until the server stops.
    pub(crate) fn tell_appservices(&self) {
        for service in self
            .appservices()
            .iter()
            .filter(|service| service.url.is_some())
        {
            let (hs, service) = (self.clone(), Arc::clone(service));
            self.spawn_until_stop(
                "appservice",
                async move { hs.follow_events(&service).await },
            );
        }
    }

    async fn follow_events(&self, service: &Appservice) {
        let mut moved = self.notifier().subscribe(Topic::Events);
        let mut pause = PAUSE_MIN;
        loop {
            match self.tell_next(service).await {
                Ok(Told::Nothing) => {
                    pause = PAUSE_MIN;
                    moved.changed().await;
                }
                Ok(Told::Something) => pause = PAUSE_MIN,
                Ok(Told::Unheard) => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                }
                Err(error) => {
                    tracing::warn!(service = service.id, %error, "events could not be looked up");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                }
            }
        }
    }

    /// One transaction. It has the same id until the service has taken it.
    async fn tell_next(&self, service: &Appservice) -> Result<Told> {
        let id = service.id.clone();
        let asked = self.appservices().with_token(&service.as_token).cloned();
        let Some(asked) = asked else {
            return Ok(Told::Nothing);
        };
        let begun = self.store().read(move |c| table::progress(c, &id)).await?;
        let progress = match begun {
            Some(progress) => progress,
            None => self.begin_telling(service).await?,
        };
        let batch = self
            .store()
            .read(move |c| gather(c, &asked, progress.position))
            .await?;
        let Some(batch) = batch else {
            return Ok(Told::Nothing);
        };
        if !batch.events.is_empty()
            && !self
                .send_to_appservice(service, progress.txn_id, batch.events)
                .await
        {
            return Ok(Told::Unheard);
        }
        let (id, next) = (
            service.id.clone(),
            Progress {
                position: batch.up_to,
                txn_id: progress.txn_id + 1,
            },
        );
        self.store()
            .write(move |c| table::set_progress(c, &id, next))
            .await?;
        Ok(Told::Something)
    }

    /// A service that is here for the first time hears of what comes, not of what was.
    async fn begin_telling(&self, service: &Appservice) -> Result<Progress> {
        let id = service.id.clone();
        let begun = self.store().write(move |c| {
            let progress = Progress {
                position: streams::position(c, Stream::Events)?,
                txn_id: 1,
            };
            table::set_progress(c, &id, progress)?;
            Ok(progress)
        });
        Ok(begun.await?)
    }

    /// `PUT /_matrix/app/v1/transactions/{txnId}`; `false` when the service did not take it.
    async fn send_to_appservice(
        &self,
        service: &Appservice,
        txn_id: i64,
        events: Vec<Value>,
    ) -> bool {
        let (Some(url), Some(client)) = (&service.url, &self.inner.appservice_client) else {
            return false;
        };
        let url = format!("{url}/_matrix/app/v1/transactions/{txn_id}");
        let request = client
            .put(url)
            .bearer_auth(&service.hs_token)
            .timeout(TIMEOUT)
            .json(&json!({ "events": events }));
        match request.send().await {
            Ok(answer) if answer.status().is_success() => true,
            Ok(answer) => {
                let status = answer.status().as_u16();
                tracing::info!(
                    service = service.id,
                    txn_id,
                    status,
                    "an application service refused events"
                );
                false
            }
            Err(error) => {
                tracing::info!(service = service.id, txn_id, %error, "an application service is away");
                false
            }
        }
    }

    /// Asks the services whose namespace the alias is in to make it; whether one says it did.
    pub async fn ask_appservices_for_alias(&self, alias: &RoomAlias) -> bool {
        for service in self.appservices().iter() {
            if service.is_interested_in_alias(alias.as_str())
                && self.ask(service, "rooms", alias.as_str()).await
            {
                return true;
            }
        }
        false
    }

    /// Asks the services whose namespace the user is in to make the account; whether one says it did.
    pub async fn ask_appservices_for_user(&self, user: &UserId) -> bool {
        for service in self.appservices().iter() {
            if service.is_interested_in_user(user)
                && self.ask(service, "users", user.as_str()).await
            {
                return true;
            }
        }
        false
    }

    async fn ask(&self, service: &Appservice, what: &str, name: &str) -> bool {
        let (Some(url), Some(client)) = (&service.url, &self.inner.appservice_client) else {
            return false;
        };
        let Ok(mut url) = reqwest::Url::parse(&format!("{url}/_matrix/app/v1/{what}")) else {
            return false;
        };
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.push(name);
        }
        let request = client
            .get(url)
            .bearer_auth(&service.hs_token)
            .timeout(QUERY_TIMEOUT);
        request
            .send()
            .await
            .is_ok_and(|answer| answer.status().is_success())
    }
}

/// What came of one round.
enum Told {
    Something,
    Nothing,
    /// The service did not take it; it has to be tried again.
    Unheard,
}

fn gather(c: &mut dyn Conn, service: &Appservice, position: i64) -> storage::Result<Option<Batch>> {
    let found = table::events_after(c, position, EVENTS_AT_ONCE)?;
    let Some((_, up_to, _)) = found.last() else {
        return Ok(None);
    };
    let up_to = *up_to;
    let nids: Vec<_> = found.iter().map(|(nid, _, _)| *nid).collect();
    let pdus = storage::events::pdus(c, &nids)?;
    let mut events = Vec::new();
    for (nid, _, room) in &found {
        let Some(pdu) = pdus.get(nid) else { continue };
        if is_of_interest(c, service, room, pdu)? {
            events.push(Value::Object(client_event(pdu, &Unsigned::default())));
        }
    }
    Ok(Some(Batch { events, up_to }))
}

/// By the room, one of its aliases, the users that the event is about, or a local member (P-67).
fn is_of_interest(
    c: &mut dyn Conn,
    service: &Appservice,
    room: &RoomId,
    pdu: &Pdu,
) -> storage::Result<bool> {
    if service.is_interested_in_room(room.as_str()) || service.is_interested_in_user(&pdu.sender) {
        return Ok(true);
    }
    let target = pdu
        .state_key
        .as_deref()
        .filter(|_| &*pdu.kind == "m.room.member");
    if target
        .and_then(|user| UserId::parse(user).ok())
        .is_some_and(|user| service.is_interested_in_user(&user))
    {
        return Ok(true);
    }
    let aliases = directory::aliases_of(c, room)?;
    if aliases
        .iter()
        .any(|alias| service.is_interested_in_alias(alias.as_str()))
    {
        return Ok(true);
    }
    let Some(row) = timeline::room(c, room)? else {
        return Ok(false);
    };
    let members = storage::rooms::local_joined(c, row.nid)?;
    Ok(members
        .iter()
        .any(|user| service.is_interested_in_user(user)))
}
