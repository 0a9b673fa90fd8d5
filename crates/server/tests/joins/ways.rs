//! What the tests of joins do again and again, and how they wait for it.

use std::sync::Arc;

use room::effect::AskError;
use serde_json::{Value, json};

use crate::network::Network;
use crate::world::{Server, User, list, start, until};

/// Two servers that can reach each other: a.test and b.test.
pub async fn pair() -> (Server, Server) {
    let network = Arc::<Network>::default();
    (
        start(&network, "a.test").await,
        start(&network, "b.test").await,
    )
}

pub fn state_path(room: &str, kind: &str, key: &str) -> String {
    format!("/rooms/{room}/state/{kind}/{key}")
}

/// Sets a piece of state. The event's id.
pub async fn set(user: &User, room: &str, kind: &str, key: &str, content: Value) -> String {
    let set = user.put(&state_path(room, kind, key), content).await;
    set["event_id"].as_str().unwrap().to_owned()
}

/// The content of a piece of state.
pub async fn content(user: &User, room: &str, kind: &str) -> Value {
    user.get(&state_path(room, kind, "")).await
}

/// Waits until somebody's membership is this one, as the user sees it. Its content.
pub async fn until_member(user: &User, room: &str, of: &str, membership: &str) -> Value {
    let path = state_path(room, "m.room.member", of);
    let what = format!("{membership} of {of} at {}", user.id);
    until(&what, async || {
        let (_, content) = user.ask("GET", &path, Value::Null).await;
        (content["membership"] == membership).then_some(content)
    })
    .await
}

/// Waits until an event is to be had.
pub async fn until_event(user: &User, room: &str, event: &str) -> Value {
    let path = format!("/rooms/{room}/event/{}", event.replace('/', "%2F"));
    until(event, async || {
        let (status, event) = user.ask("GET", &path, Value::Null).await;
        (status == 200).then_some(event)
    })
    .await
}

/// Waits for an invite. What the invitee is shown of the room.
pub async fn until_invited(user: &User, room: &str) -> Vec<Value> {
    let look = |sync: &Value| {
        let invite = sync["rooms"]["invite"].get(room)?;
        Some(list(&invite["invite_state"]["events"]).to_vec())
    };
    user.eager().until("the invite", look).await
}

/// The status and errcode of a join that must fail.
pub async fn join_refused(user: &User, room: &str, via: &str) -> (u16, String) {
    let path = format!("/join/{room}?via={via}");
    user.refused("POST", &path, json!({})).await
}

pub async fn invite(user: &User, room: &str, whom: &User) {
    let path = format!("/rooms/{room}/invite");
    user.post(&path, json!({ "user_id": whom.id })).await;
}

/// `kick`, `ban` or `unban`.
pub async fn put_out(user: &User, how: &str, room: &str, whom: &str) {
    let path = format!("/rooms/{room}/{how}");
    user.post(&path, json!({ "user_id": whom })).await;
}

/// The status and errcode of a request to our server that must fail.
pub fn refusal<T: std::fmt::Debug>(answer: Result<T, AskError>) -> (u16, String) {
    match answer {
        Err(AskError::Refused {
            status, errcode, ..
        }) => (status, errcode),
        other => panic!("not refused: {other:?}"),
    }
}

pub fn forbidden() -> (u16, String) {
    (403, "M_FORBIDDEN".to_owned())
}
