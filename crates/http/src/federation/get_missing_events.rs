//! `POST /get_missing_events`: what lies between two sets of events.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#post_matrixfederationv1get_missing_eventsroomid>

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use homeserver::Homeserver;
use homeserver::federation_reads::Gap;
use protocol::id::{EventId, RoomId};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::raw;
use super::signed::Signed;
use crate::error::Result;
use crate::extract::Path;

const LIMIT_DEFAULT: usize = 10;

#[derive(Deserialize)]
struct Body {
    #[serde(default)]
    earliest_events: Vec<EventId>,
    #[serde(default)]
    latest_events: Vec<EventId>,
    limit: Option<usize>,
    min_depth: Option<i64>,
}

#[derive(Serialize)]
struct Answer {
    events: Vec<Box<RawValue>>,
}

pub async fn handle(
    State(homeserver): State<Homeserver>,
    Path(room): Path<RoomId>,
    signed: Signed,
) -> Result<Response> {
    let body: Body = signed.json()?;
    let gap = Gap {
        earliest: body.earliest_events,
        latest: body.latest_events,
        min_depth: body.min_depth.unwrap_or(0),
        limit: body.limit.unwrap_or(LIMIT_DEFAULT),
    };
    let found = homeserver
        .reads_of(signed.origin)
        .missing_events(&room, gap)
        .await?;
    let events = found.iter().filter_map(|pdu| raw(pdu)).collect();
    Ok(Json(Answer { events }).into_response())
}
