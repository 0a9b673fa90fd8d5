//! `PUT /send_join`, both versions: a signed join comes in, the room's state goes out.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#put_matrixfederationv2send_joinroomideventid>

use axum::extract::State;
use axum::response::Response;
use homeserver::Homeserver;
use homeserver::error::MatrixError;
use homeserver::resident::{Handshake, JoinAnswer, SendQuestion};
use protocol::id::RoomId;

use super::signed::Signed;
use super::streamed;
use crate::error::Result;
use crate::extract::{Path, QueryPairs};

pub async fn v2(
    State(homeserver): State<Homeserver>,
    Path(path): Path<(RoomId, String)>,
    query: QueryPairs,
    signed: Signed,
) -> Result<Response> {
    let omit_members = match query.first("omit_members") {
        None | Some("false") => false,
        Some("true") => true,
        Some(_) => {
            let error = MatrixError::invalid_param("omit_members is neither true nor false");
            return Err(error.into());
        }
    };
    let answer = JoinAnswer {
        omit_members,
        v1: false,
    };
    send_join(&homeserver, path, &signed, answer).await
}

/// Always the whole state, in a list after the status.
pub async fn v1(
    State(homeserver): State<Homeserver>,
    Path(path): Path<(RoomId, String)>,
    signed: Signed,
) -> Result<Response> {
    let answer = JoinAnswer {
        omit_members: false,
        v1: true,
    };
    send_join(&homeserver, path, &signed, answer).await
}

async fn send_join(
    homeserver: &Homeserver,
    (room, event_id): (RoomId, String),
    signed: &Signed,
    answer: JoinAnswer,
) -> Result<Response> {
    let question = SendQuestion {
        what: Handshake::Join,
        room,
        event_id,
        origin: signed.origin.clone(),
        event: signed.text()?.into(),
    };
    Ok(streamed(homeserver.send_join(question, answer).await?))
}
