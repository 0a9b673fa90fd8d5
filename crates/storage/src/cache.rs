//! What is kept in memory: state nodes, event bodies, numbers and auth graphs. Nothing of it ever changes; a graph grows.

use std::sync::Arc;

use protocol::event_set::StateKey;
use protocol::id::{EventId, RoomId};
use protocol::nid::{EventNid, KeyNid, RoomNid};
use protocol::pdu::Pdu;
use protocol::state::Node;
use quick_cache::Weighter;
use quick_cache::sync::Cache;

use crate::state_log::Graph;

/// The bytes that a node takes beside its slots.
const NODE_OVERHEAD: u64 = 96;
/// The bytes that an event's parsed fields take beside its JSON, roughly.
const EVENT_OVERHEAD: u64 = 640;
/// Numbers of events kept by id, about 150 bytes each.
const IDS_MAX: usize = 100_000;

/// Numbers of rooms kept by id.
const ROOMS_MAX: usize = 10_000;
/// Numbers of state keys kept by name, about 150 bytes each.
const KEYS_MAX: usize = 50_000;

#[derive(Clone, Debug)]
pub struct CacheBytes {
    pub state_nodes: u64,
    pub events: u64,
    pub auth_edges: u64,
    pub graphs: u64,
}

impl Default for CacheBytes {
    fn default() -> Self {
        Self {
            state_nodes: 64 << 20,
            events: 128 << 20,
            auth_edges: 8 << 20,
            graphs: 32 << 20,
        }
    }
}

/// What of a stored event never changes.
#[derive(Clone, Debug)]
pub struct Body {
    pub room: RoomNid,
    pub key: Option<KeyNid>,
    pub auth: Arc<[EventNid]>,
    pub pdu: Arc<Pdu>,
}

pub struct Caches {
    pub(crate) nodes: Cache<i64, Arc<Node>, NodeWeight>,
    pub(crate) bodies: Cache<EventNid, Body, BodyWeight>,
    pub(crate) auth: Cache<EventNid, Arc<[EventNid]>, EdgeWeight>,
    pub(crate) graphs: Cache<RoomNid, Arc<Graph>, GraphWeight>,
    pub(crate) ids: Cache<EventId, EventNid>,
    pub(crate) rooms: Cache<RoomId, RoomNid>,
    pub(crate) keys: Cache<(RoomNid, StateKey), KeyNid>,
}

impl Caches {
    pub(crate) fn new(bytes: &CacheBytes) -> Self {
        let items = |total: u64, each: u64| usize::try_from(total / each).unwrap_or(usize::MAX);
        Self {
            nodes: Cache::with_weighter(
                items(bytes.state_nodes, 300),
                bytes.state_nodes,
                NodeWeight,
            ),
            bodies: Cache::with_weighter(items(bytes.events, 2000), bytes.events, BodyWeight),
            auth: Cache::with_weighter(items(bytes.auth_edges, 64), bytes.auth_edges, EdgeWeight),
            graphs: Cache::with_weighter(items(bytes.graphs, 100_000), bytes.graphs, GraphWeight),
            ids: Cache::new(IDS_MAX),
            rooms: Cache::new(ROOMS_MAX),
            keys: Cache::new(KEYS_MAX),
        }
    }
}

#[derive(Clone)]
pub(crate) struct NodeWeight;

impl Weighter<i64, Arc<Node>> for NodeWeight {
    fn weight(&self, _: &i64, node: &Arc<Node>) -> u64 {
        let slots = node.children().len().max(node.count().min(32)) as u64;
        NODE_OVERHEAD + slots * 8
    }
}

#[derive(Clone)]
pub(crate) struct BodyWeight;

impl Weighter<EventNid, Body> for BodyWeight {
    fn weight(&self, _: &EventNid, body: &Body) -> u64 {
        EVENT_OVERHEAD + body.pdu.json.len() as u64
    }
}

#[derive(Clone)]
pub(crate) struct EdgeWeight;

impl Weighter<EventNid, Arc<[EventNid]>> for EdgeWeight {
    fn weight(&self, _: &EventNid, auth: &Arc<[EventNid]>) -> u64 {
        48 + 8 * auth.len() as u64
    }
}

#[derive(Clone)]
pub(crate) struct GraphWeight;

impl Weighter<RoomNid, Arc<Graph>> for GraphWeight {
    fn weight(&self, _: &RoomNid, graph: &Arc<Graph>) -> u64 {
        graph.weight()
    }
}

/// A connection's way to the caches. A writer only reads them: what it sees may yet be undone.
#[derive(Clone)]
pub struct Cached {
    pub(crate) caches: Arc<Caches>,
    pub(crate) fill: bool,
}

impl Cached {
    pub(crate) fn keep_node(&self, nid: i64, node: &Arc<Node>) {
        if self.fill {
            self.caches.nodes.insert(nid, Arc::clone(node));
        }
    }

    pub(crate) fn keep_body(&self, nid: EventNid, body: &Body) {
        if self.fill {
            self.caches.bodies.insert(nid, body.clone());
        }
    }

    pub(crate) fn keep_auth(&self, nid: EventNid, auth: &Arc<[EventNid]>) {
        if self.fill {
            self.caches.auth.insert(nid, Arc::clone(auth));
        }
    }
}
