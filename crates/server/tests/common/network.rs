//! A network in memory: who can be reached, by name, and what was asked.

use std::collections::{BTreeSet, HashMap};
use std::sync::Mutex;

use axum::Router;
use axum::body::Body;
use federation::transport::{Request, Response};
use federation::{Transport, TransportError};
use futures::StreamExt as _;
use futures::future::BoxFuture;
use protocol::id::ServerName;
use tower::ServiceExt as _;

#[derive(Default)]
pub struct Network {
    servers: Mutex<HashMap<ServerName, Router>>,
    /// Those that nobody can reach for a while.
    cut: Mutex<BTreeSet<ServerName>>,
    asked: Mutex<Vec<String>>,
}

impl Network {
    /// From here on requests to this name come to these doors.
    pub fn add(&self, name: ServerName, router: Router) {
        self.servers.lock().unwrap().insert(name, router);
    }

    /// From here on nobody reaches this server; it reaches others.
    pub fn cut(&self, name: &ServerName) {
        self.cut.lock().unwrap().insert(name.clone());
    }

    pub fn mend(&self, name: &ServerName) {
        self.cut.lock().unwrap().remove(name);
    }

    /// How often a path was asked for.
    pub fn count(&self, path: &str) -> usize {
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|line| line.contains(path)).count()
    }

    fn router(&self, to: &ServerName) -> Result<Router, TransportError> {
        let cut = self.cut.lock().unwrap().contains(to);
        let router = self.servers.lock().unwrap().get(to).cloned();
        let nobody = || TransportError::Connect {
            server: to.clone(),
            reason: "nobody listens".into(),
        };
        router.filter(|_| !cut).ok_or_else(nobody)
    }
}

impl Transport for Network {
    fn reach(&self, to: &ServerName) -> BoxFuture<'_, Result<(), TransportError>> {
        Box::pin(std::future::ready(self.router(to).map(drop)))
    }

    fn send(&self, request: Request) -> BoxFuture<'_, Result<Response, TransportError>> {
        let router = self.router(&request.to);
        let line = format!("{} {}", request.method, request.path_and_query);
        self.asked.lock().unwrap().push(line);
        Box::pin(async move {
            let router = router?;
            let body = Body::from(request.body.unwrap_or_default());
            let mut incoming = axum::http::Request::new(body);
            *incoming.method_mut() = request.method;
            *incoming.uri_mut() = request.path_and_query.parse().unwrap();
            *incoming.headers_mut() = request.headers;
            let (head, body) = router.oneshot(incoming).await.unwrap().into_parts();
            let body = body.into_data_stream();
            Ok(Response {
                status: head.status,
                headers: head.headers,
                body: Box::pin(
                    body.map(|chunk| chunk.map_err(|e| TransportError::Broken(e.to_string()))),
                ),
            })
        })
    }
}
