//! What a server that knows only a part of a room says to those who want to come in by it.

use protocol::id::UserId;
use room::effect::{Ask, AskError, Handshake};
use serde_json::Value;

use crate::dag::{Room, member};
use crate::resident::Resident;
use crate::stage::Stage;
use crate::world::User;

/// A stage while the room is partial, with a stranger who knocks at our doors.
async fn with_a_stranger() -> (Stage, User, std::sync::Arc<Resident>) {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    stage.join(&alice).await;
    let stranger = Resident::start(&stage.network, "stranger.test");
    (stage, alice, stranger)
}

fn assert_not_found<T: std::fmt::Debug>(answer: Result<T, AskError>) {
    match answer {
        Err(AskError::Refused {
            status, errcode, ..
        }) => {
            assert_eq!((status, errcode.as_str()), (404, "M_NOT_FOUND"));
        }
        other => panic!("{other:?}"),
    }
}

async fn check_make(what: Handshake) {
    let (stage, alice, stranger) = with_a_stranger().await;
    let make = Ask::Make {
        what,
        room: stage.room.id.clone(),
        user: UserId::parse(&stranger.user("daniel")).unwrap(),
    };
    assert_not_found(stranger.ask(&stage.here.name, make).await);
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_27_make_join_is_refused() {
    check_make(Handshake::Join).await;
}

#[tokio::test]
async fn t_30_make_knock_is_refused() {
    check_make(Handshake::Knock).await;
}

/// The join of daniel, who asked the resident for a template.
fn join_of_daniel(room: &Room, stranger: &Resident) -> (String, Value) {
    let daniel = stranger.user("daniel");
    let join = room.make(stranger, member(&daniel, &daniel, "join"));
    let path = format!("/{}/{}", room.id, join.event_id);
    (path, serde_json::from_str(&join.json).unwrap())
}

async fn check_send(endpoint: &str) {
    let (stage, alice, stranger) = with_a_stranger().await;
    let (path, join) = join_of_daniel(&stage.room, &stranger);
    let path = format!("/_matrix/federation/{endpoint}{path}");
    assert_not_found(stranger.put(&stage.here.name, path, join).await);
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_28_send_join_is_refused() {
    for endpoint in ["v2/send_join", "v1/send_join"] {
        check_send(endpoint).await;
    }
}

#[tokio::test]
async fn t_31_send_knock_is_refused() {
    check_send("v1/send_knock").await;
}
