//! The network between the servers of a run: a transport in memory, and what goes wrong on it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use bytes::Bytes;
use federation::transport::{HeaderMap, Request, Response, StatusCode};
use federation::{Transport, TransportError};
use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use protocol::id::{EventId, ServerName};
use serde_json::Value;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use super::lies::Lies;
use super::log;
use crate::chance::Chance;

/// How often what goes wrong, in percent.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// A request that never arrives.
    pub loss: u64,
    /// An answer that never arrives.
    pub lost_answer: u64,
    /// Seconds on the way instead of milliseconds.
    pub delay: u64,
    /// A request that arrives twice.
    pub duplication: u64,
    /// A 502 from something in front of the server.
    pub refusal: u64,
    /// A body that comes in drops.
    pub slow_body: u64,
    /// A body that ends too early.
    pub truncated_body: u64,
    /// Of a user's acts: two servers lose sight of each other.
    pub partition: u64,
    /// Of a user's acts: a server dies.
    pub crash: u64,
    /// An answer with a PDU whose signature is not its server's.
    pub forged_signature: u64,
    /// A state without one of the events that it stands on.
    pub missing_auth_event: u64,
    /// A template that names another room version.
    pub wrong_version: u64,
    /// An answer to a join that has all members, and says that it has not.
    pub members_omitted: u64,
    /// One without members, and without the servers in the room.
    pub servers_unnamed: u64,
}

impl Faults {
    pub fn of(chance: &mut Chance) -> Self {
        // Some runs are mild and some are bad, and most have a fault that they like best.
        let most = [0, 3, 6, 12][chance.below(4) as usize];
        let mut ratio = || match chance.below(4) {
            0 => 0,
            1 => chance.below(2 * most + 1),
            _ => chance.below(most + 1),
        };
        Self {
            loss: ratio(),
            lost_answer: ratio(),
            delay: ratio(),
            duplication: ratio(),
            refusal: ratio(),
            slow_body: ratio(),
            truncated_body: ratio(),
            partition: ratio(),
            crash: ratio(),
            forged_signature: ratio(),
            missing_auth_event: ratio(),
            wrong_version: ratio(),
            members_omitted: ratio(),
            servers_unnamed: ratio(),
        }
    }
}

/// Pieces of a body that comes in drops.
const DROPS_MAX: usize = 8;

/// What it takes to see that somebody listens.
const CONNECTS_IN: Duration = Duration::from_millis(20);

pub struct Network {
    state: Mutex<State>,
}

struct State {
    chance: Chance,
    faults: Faults,
    servers: BTreeMap<ServerName, Doors>,
    /// Who can not reach whom, and until when.
    partition: Option<(ServerName, ServerName, Instant)>,
    requests: u64,
    /// Law 3: what each server said yes to, whether or not the answer arrived.
    promises: BTreeMap<ServerName, Vec<Promise>>,
}

/// An event that a server took from another one.
#[derive(Clone, Debug)]
pub struct Promise {
    pub event: EventId,
    pub at: Instant,
    /// Whether it came by the handshake of a join, leave or knock, and not in a transaction.
    pub handshake: bool,
}

/// A life of a server, as others see it.
#[derive(Clone)]
struct Doors {
    router: Router,
    end: CancellationToken,
}

/// What will happen to one request.
struct Fate {
    number: u64,
    doors: Option<Doors>,
    there: Duration,
    back: Duration,
    again: Option<Duration>,
    lost: bool,
    answer_lost: bool,
    refused: bool,
    drops: Option<Duration>,
    cut_at: Option<u64>,
    lies: Lies,
}

impl State {
    /// What one server finds when it knocks at another's.
    fn doors(&self, from: &ServerName, to: &ServerName) -> Option<Doors> {
        let apart = self.partition.as_ref().is_some_and(|(a, b, until)| {
            ((a, b) == (from, to) || (a, b) == (to, from)) && Instant::now() < *until
        });
        self.servers.get(to).cloned().filter(|_| !apart)
    }
}

impl Network {
    pub fn new(chance: Chance, faults: Faults) -> Self {
        Self {
            state: Mutex::new(State {
                chance,
                faults,
                servers: BTreeMap::new(),
                partition: None,
                requests: 0,
                promises: BTreeMap::new(),
            }),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn add(&self, name: ServerName, router: Router, end: CancellationToken) {
        self.lock().servers.insert(name, Doors { router, end });
    }

    pub fn remove(&self, name: &ServerName) {
        self.lock().servers.remove(name);
    }

    pub fn make_war(&self, faults: Faults) {
        self.lock().faults = faults;
    }

    pub fn make_peace(&self) {
        let mut state = self.lock();
        state.faults = Faults::default();
        state.partition = None;
    }

    /// Servers know the network, and it knows them; one must forget the other, or both stay for ever.
    pub fn forget_all(&self) {
        self.lock().servers.clear();
    }

    pub fn faults(&self) -> Faults {
        self.lock().faults
    }

    pub fn requests(&self) -> u64 {
        self.lock().requests
    }

    pub fn promises(&self, by: &ServerName) -> Vec<Promise> {
        self.lock().promises.get(by).cloned().unwrap_or_default()
    }

    /// A server answered 200.
    fn hear(&self, by: ServerName, path: &str, body: &Bytes) {
        let (events, handshake) = taken(path, body);
        let at = Instant::now();
        let promises = events.into_iter().map(|event| Promise {
            event,
            at,
            handshake,
        });
        self.lock().promises.entry(by).or_default().extend(promises);
    }

    /// Two servers can not reach each other for so long.
    pub fn part(&self, one: &ServerName, other: &ServerName, time: Duration) {
        self.lock().partition = Some((one.clone(), other.clone(), Instant::now() + time));
    }

    /// All of a request's chance is drawn at once, so that what becomes of one does not depend on how the
    /// others fare.
    fn fate(&self, from: &ServerName, to: &ServerName) -> Fate {
        let mut state = self.lock();
        state.requests += 1;
        let number = state.requests;
        let doors = state.doors(from, to);
        let (faults, chance) = (state.faults, &mut state.chance);
        let way = |chance: &mut Chance| match chance.percent(faults.delay) {
            true => chance.millis(0, 40_000),
            false => chance.millis(1, 80),
        };
        Fate {
            number,
            doors,
            there: way(chance),
            back: way(chance),
            again: chance
                .percent(faults.duplication)
                .then(|| chance.millis(0, 5_000)),
            lost: chance.percent(faults.loss),
            answer_lost: chance.percent(faults.lost_answer),
            refused: chance.percent(faults.refusal),
            drops: chance
                .percent(faults.slow_body)
                .then(|| chance.millis(0, 8_000)),
            cut_at: chance
                .percent(faults.truncated_body)
                .then(|| chance.below(100)),
            lies: Lies::draw(&faults, chance),
        }
    }
}

/// One life of a server on the network.
pub struct Link {
    pub network: Arc<Network>,
    pub own: ServerName,
    pub end: CancellationToken,
}

impl Transport for Link {
    fn send(&self, request: Request) -> BoxFuture<'_, Result<Response, TransportError>> {
        Box::pin(async move {
            if self.end.is_cancelled() {
                std::future::pending::<()>().await;
            }
            let fate = self.network.fate(&self.own, &request.to);
            let number = fate.number;
            log::note(|| {
                let Request {
                    to,
                    method,
                    path_and_query: path,
                    ..
                } = &request;
                format!("#{number} {} asks {to} {method} {path}", self.own)
            });
            let patience = request.timeout;
            let answer = tokio::time::timeout(patience, carry(self, fate, request));
            let answer = answer
                .await
                .unwrap_or(Err(TransportError::Timeout("no answer")));
            log::note(|| match &answer {
                Ok(response) => format!("#{number} {}", response.status),
                Err(error) => format!("#{number} {error}"),
            });
            answer
        })
    }

    fn reach(&self, to: &ServerName) -> BoxFuture<'_, Result<(), TransportError>> {
        let to = to.clone();
        Box::pin(async move {
            if self.end.is_cancelled() {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(CONNECTS_IN).await;
            let doors = self.network.lock().doors(&self.own, &to);
            match doors {
                Some(doors) if !doors.end.is_cancelled() => Ok(()),
                _ => Err(nobody_listens(to)),
            }
        })
    }
}

fn nobody_listens(server: ServerName) -> TransportError {
    TransportError::Connect {
        server,
        reason: "nobody listens".into(),
    }
}

async fn carry(link: &Link, fate: Fate, request: Request) -> Result<Response, TransportError> {
    tokio::time::sleep(fate.there).await;
    let Some(doors) = fate.doors.filter(|doors| !doors.end.is_cancelled()) else {
        return Err(nobody_listens(request.to));
    };
    if fate.refused {
        return Ok(bad_gateway());
    }
    if fate.lost {
        std::future::pending::<()>().await;
    }
    let patience = request.timeout;
    if let Some(later) = fate.again {
        let serving = link.serve(doors.clone(), request.clone());
        tokio::spawn(async move {
            tokio::time::sleep(later).await;
            let _nobody_waits = serving.await;
        });
    }
    let path = request.path_and_query.clone();
    // The server goes on when whoever asked has lost patience.
    let serving = tokio::spawn(link.serve(doors.clone(), request));
    let (status, headers, mut body) = serving.await.unwrap_or_else(|_| Err(broken()))?;
    if status == StatusCode::OK
        && let Some((instead, lies)) = fate.lies.tell(&path, &body)
    {
        log::note(|| format!("#{} {}", fate.number, lies.join(", ")));
        body = instead;
    }
    if fate.answer_lost {
        std::future::pending::<()>().await;
    }
    tokio::time::sleep(fate.back).await;
    let pieces = pieces(&body, fate.drops.is_some(), fate.cut_at);
    let drop_every = fate.drops.unwrap_or_default();
    let end = doors.end;
    let body = futures::stream::iter(pieces).then(move |piece| {
        let end = end.clone();
        async move {
            if tokio::time::timeout(patience, tokio::time::sleep(drop_every))
                .await
                .is_err()
            {
                return Err(TransportError::Timeout("no more of the body"));
            }
            match end.is_cancelled() {
                true => Err(broken()),
                false => piece,
            }
        }
    });
    let body: BoxStream<'static, _> = body.boxed();
    Ok(Response {
        status,
        headers,
        body,
    })
}

type Served = Result<(StatusCode, HeaderMap, Bytes), TransportError>;

impl Link {
    /// Has a request of ours served, and notes what it was answered.
    fn serve(&self, doors: Doors, request: Request) -> impl Future<Output = Served> + use<> {
        let network = self.network.clone();
        async move {
            let (by, path) = (request.to.clone(), request.path_and_query.clone());
            let served = doors.serve(request).await;
            if let Ok((StatusCode::OK, _, body)) = &served {
                network.hear(by, &path, body);
            }
            served
        }
    }
}

/// The events that an answer says yes to, and whether they came by a handshake.
fn taken(path: &str, body: &Bytes) -> (Vec<EventId>, bool) {
    let mut path = path.trim_start_matches("/_matrix/federation/").split('/');
    match path.nth(1) {
        Some("send_join" | "send_leave" | "send_knock") => {
            let id = path.nth(1).and_then(|id| id.split('?').next());
            let id = id.map(|id| id.replace("%24", "$").replace("%2F", "/"));
            let id = id.and_then(|id| EventId::parse(&id).ok());
            (id.into_iter().collect(), true)
        }
        Some("send") => {
            let answer: Value = serde_json::from_slice(body).unwrap_or_default();
            let results = answer["pdus"].as_object().into_iter().flatten();
            let taken = results.filter(|(_, result)| result["error"].is_null());
            let ids = taken.filter_map(|(id, _)| EventId::parse(id).ok());
            (ids.collect(), false)
        }
        _ => (Vec::new(), false),
    }
}

impl Doors {
    async fn serve(&self, request: Request) -> Served {
        let body = Body::from(request.body.unwrap_or_default());
        let mut incoming = axum::http::Request::new(body);
        *incoming.method_mut() = request.method;
        *incoming.uri_mut() = request
            .path_and_query
            .parse()
            .map_err(|_| TransportError::Broken("that is no path".to_owned()))?;
        *incoming.headers_mut() = request.headers;
        let serving = async {
            let answer = self.router.clone().oneshot(incoming).await;
            let (head, body) = answer.unwrap_or_else(|never| match never {}).into_parts();
            let body = axum::body::to_bytes(body, usize::MAX).await;
            (head, body)
        };
        tokio::select! {
            biased;
            () = self.end.cancelled() => Err(broken()),
            (head, body) = serving => {
                let body = body.map_err(|error| TransportError::Broken(error.to_string()))?;
                Ok((head.status, head.headers, body))
            }
        }
    }
}

/// A body as it arrives: in one piece or in several, whole or not.
fn pieces(body: &Bytes, in_drops: bool, cut_at: Option<u64>) -> Vec<Result<Bytes, TransportError>> {
    let end = match cut_at {
        Some(percent) => body.len() * percent as usize / 100,
        None => body.len(),
    };
    let size = match in_drops {
        true => body.len() / DROPS_MAX + 1,
        false => body.len().max(1),
    };
    let starts = (0..end).step_by(size);
    let mut pieces: Vec<_> = starts
        .map(|start| Ok(body.slice(start..end.min(start + size))))
        .collect();
    if cut_at.is_some() {
        pieces.push(Err(broken()));
    }
    pieces
}

fn broken() -> TransportError {
    TransportError::Broken("reset by peer".to_owned())
}

fn bad_gateway() -> Response {
    let body = futures::stream::iter([Ok(Bytes::from_static(b"<h1>Bad Gateway</h1>"))]);
    Response {
        status: StatusCode::BAD_GATEWAY,
        headers: HeaderMap::new(),
        body: body.boxed(),
    }
}
