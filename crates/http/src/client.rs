//! The client-server API: one topic, one file.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/>

mod account;
mod account_data;
mod aliases;
mod ban;
mod capabilities;
mod context;
mod create_room;
mod devices;
mod event;
mod filter;
mod forget;
mod hierarchy;
mod invite;
mod join;
mod joined_rooms;
mod keys;
mod kick;
mod knock;
mod leave;
mod login;
mod members;
mod messages;
mod presence;
mod profile;
mod public_rooms;
mod push_rules;
mod read_markers;
mod receipt;
mod redact;
pub mod register;
mod relations;
mod report;
mod room_keys;
mod search;
mod send;
mod send_to_device;
mod state;
mod summary;
mod sync;
mod timestamp_to_event;
mod typing;
mod unban;
mod upgrade;
mod user_directory;
mod versions;

use axum::Router;
use homeserver::Homeserver;
use protocol::id::ServerName;

use crate::extract::QueryPairs;

/// Servers that a client may name for one room.
const VIA_MAX: usize = 50;

/// All endpoints under `/_matrix/client`.
///
/// `r0`, `v1` and `v3` serve the same routes: which of the three an endpoint lives under is history, and
/// clients in the wild use all of them. Each topic's `routes()` names its paths from after the version on.
pub fn routes() -> Router<Homeserver> {
    let versioned = Router::new()
        .merge(account::routes())
        .merge(account_data::routes())
        .merge(aliases::routes())
        .merge(ban::routes())
        .merge(capabilities::routes())
        .merge(context::routes())
        .merge(create_room::routes())
        .merge(devices::routes())
        .merge(event::routes())
        .merge(filter::routes())
        .merge(forget::routes())
        .merge(hierarchy::routes())
        .merge(invite::routes())
        .merge(join::routes())
        .merge(joined_rooms::routes())
        .merge(keys::routes())
        .merge(kick::routes())
        .merge(knock::routes())
        .merge(leave::routes())
        .merge(login::routes())
        .merge(members::routes())
        .merge(messages::routes())
        .merge(presence::routes())
        .merge(profile::routes())
        .merge(public_rooms::routes())
        .merge(push_rules::routes())
        .merge(read_markers::routes())
        .merge(receipt::routes())
        .merge(redact::routes())
        .merge(register::routes())
        .merge(relations::routes())
        .merge(report::routes())
        .merge(room_keys::routes())
        .merge(search::routes())
        .merge(send::routes())
        .merge(send_to_device::routes())
        .merge(state::routes())
        .merge(summary::routes())
        .merge(sync::routes())
        .merge(timestamp_to_event::routes())
        .merge(typing::routes())
        .merge(unban::routes())
        .merge(upgrade::routes())
        .merge(user_directory::routes());
    Router::new()
        .nest("/_matrix/client/r0", versioned.clone())
        .nest("/_matrix/client/v1", versioned.clone())
        .nest("/_matrix/client/v3", versioned)
        .merge(account_data::unstable_routes())
        .merge(versions::routes())
}

/// The servers that a client names to reach a room by (J-2); `server_name` only where `via` is absent.
fn via(query: &QueryPairs) -> Vec<ServerName> {
    let servers = |name: &str| -> Vec<ServerName> {
        query
            .all(name)
            .filter_map(|server| ServerName::parse(server).ok())
            .take(VIA_MAX)
            .collect()
    };
    let via = servers("via");
    if via.is_empty() {
        servers("server_name")
    } else {
        via
    }
}
