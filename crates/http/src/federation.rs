//! The server-server API under `/_matrix/federation`: one endpoint, one file.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/>

mod backfill;
mod event;
mod event_auth;
mod get_missing_events;
mod hierarchy;
mod invite;
mod make_membership;
mod media;
mod openid_userinfo;
mod public_rooms;
mod query_directory;
mod query_profile;
mod send;
mod send_join;
mod send_knock;
mod send_leave;
mod signed;
mod state;
mod state_ids;
mod third_party;
mod timestamp_to_event;
mod user_devices;
mod user_keys;
mod version;

use axum::Router;
use axum::body::Body;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use homeserver::Homeserver;
use homeserver::federation_reads::{EventStream, Given};
use serde_json::value::RawValue;

/// Whole paths, and no nesting: a nested router sees a shortened URI, and the whole one is what is signed.
pub fn routes() -> Router<Homeserver> {
    let v1 = |path: &str| format!("/_matrix/federation/v1/{path}");
    let v2 = |path: &str| format!("/_matrix/federation/v2/{path}");
    Router::new()
        .route(&v1("backfill/{room}"), get(backfill::handle))
        .route(&v1("event/{event}"), get(event::handle))
        .route(&v1("event_auth/{room}/{event}"), get(event_auth::handle))
        .route(
            &v1("exchange_third_party_invite/{room}"),
            put(third_party::exchange),
        )
        .route(&v1("3pid/onbind"), put(third_party::onbind))
        .route(
            &v1("get_missing_events/{room}"),
            post(get_missing_events::handle),
        )
        .route(&v1("invite/{room}/{event}"), put(invite::v1))
        .route(&v2("invite/{room}/{event}"), put(invite::v2))
        .route(&v1("hierarchy/{room}"), get(hierarchy::handle))
        .route(&v1("make_join/{room}/{user}"), get(make_membership::join))
        .route(&v1("make_knock/{room}/{user}"), get(make_membership::knock))
        .route(&v1("make_leave/{room}/{user}"), get(make_membership::leave))
        .route(&v1("media/download/{media}"), get(media::download))
        .route(&v1("media/thumbnail/{media}"), get(media::thumbnail))
        .route(&v1("openid/userinfo"), get(openid_userinfo::handle))
        .route(
            &v1("publicRooms"),
            get(public_rooms::list).post(public_rooms::search),
        )
        .route(&v1("query/directory"), get(query_directory::handle))
        .route(&v1("query/profile"), get(query_profile::handle))
        .route(&v1("send/{txn}"), put(send::handle))
        .route(&v1("send_join/{room}/{event}"), put(send_join::v1))
        .route(&v2("send_join/{room}/{event}"), put(send_join::v2))
        .route(&v1("send_knock/{room}/{event}"), put(send_knock::handle))
        .route(&v1("send_leave/{room}/{event}"), put(send_leave::v1))
        .route(&v2("send_leave/{room}/{event}"), put(send_leave::v2))
        .route(&v1("state/{room}"), get(state::handle))
        .route(&v1("state_ids/{room}"), get(state_ids::handle))
        .route(
            &v1("timestamp_to_event/{room}"),
            get(timestamp_to_event::handle),
        )
        .route(&v1("user/devices/{user}"), get(user_devices::handle))
        .route(&v1("user/keys/claim"), post(user_keys::claim))
        .route(&v1("user/keys/query"), post(user_keys::query))
        .route(&v1("version"), get(version::handle))
}

/// An answer that is read from the store as it goes out.
fn streamed(events: EventStream) -> Response {
    let json = [(header::CONTENT_TYPE, "application/json")];
    (json, Body::from_stream(events.into_stream())).into_response()
}

/// The shape of /event and /backfill answers.
fn transaction(given: Given) -> Response {
    let pdus: Vec<Box<RawValue>> = given.pdus.iter().filter_map(|pdu| raw(pdu)).collect();
    axum::Json(Transaction {
        origin: given.origin.as_str(),
        origin_server_ts: given.origin_server_ts,
        pdus,
    })
    .into_response()
}

#[derive(serde::Serialize)]
struct Transaction<'a> {
    origin: &'a str,
    origin_server_ts: i64,
    pdus: Vec<Box<RawValue>>,
}

/// Stored JSON as it stands.
fn raw(json: &str) -> Option<Box<RawValue>> {
    RawValue::from_string(json.to_owned()).ok()
}
