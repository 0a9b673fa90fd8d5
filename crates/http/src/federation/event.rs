//! `GET /event`: one event.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#get_matrixfederationv1eventeventid>

use axum::extract::State;
use axum::response::Response;
use homeserver::Homeserver;
use protocol::id::EventId;

use super::signed::Origin;
use super::transaction;
use crate::error::Result;
use crate::extract::Path;

pub async fn handle(
    State(homeserver): State<Homeserver>,
    Path(event): Path<EventId>,
    Origin(origin): Origin,
) -> Result<Response> {
    Ok(transaction(
        homeserver.reads_of(origin).event(&event).await?,
    ))
}
