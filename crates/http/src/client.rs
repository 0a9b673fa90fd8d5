//! The client-server API: one topic, one file.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/>

mod account;
mod account_data;
mod capabilities;
mod devices;
mod filter;
mod keys;
mod login;
mod presence;
mod profile;
mod push_rules;
pub mod register;
mod room_keys;
mod send_to_device;
mod versions;

use axum::Router;
use homeserver::Homeserver;

/// All endpoints under `/_matrix/client`.
///
/// `r0`, `v1` and `v3` serve the same routes: which of the three an endpoint lives under is history, and
/// clients in the wild use all of them. Each topic's `routes()` names its paths from after the version on.
pub fn routes() -> Router<Homeserver> {
    let versioned = Router::new()
        .merge(account::routes())
        .merge(account_data::routes())
        .merge(capabilities::routes())
        .merge(devices::routes())
        .merge(filter::routes())
        .merge(keys::routes())
        .merge(login::routes())
        .merge(presence::routes())
        .merge(profile::routes())
        .merge(push_rules::routes())
        .merge(register::routes())
        .merge(room_keys::routes())
        .merge(send_to_device::routes());
    Router::new()
        .nest("/_matrix/client/r0", versioned.clone())
        .nest("/_matrix/client/v1", versioned.clone())
        .nest("/_matrix/client/v3", versioned)
        .merge(account_data::unstable_routes())
        .merge(versions::routes())
}
