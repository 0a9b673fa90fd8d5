//! A joining server that lies: each refused with its code, nothing stored (joins.md R-16 to R-32b).

use std::sync::Arc;
use std::time::Duration;

use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::signature::SigningKey;
use room::effect::{Answer, Ask, AskError, Handshake};
use serde_json::{Value, json};

use crate::network::Network;
use crate::ways::refusal;
use crate::world::{Server, start};

const RESIDENT: &str = "a.test";
const JOINER: &str = "b.test";

struct Stage {
    a: Server,
    b: Server,
    room: RoomId,
    other_room: RoomId,
}

impl Stage {
    async fn set() -> Self {
        let network: Arc<Network> = Arc::default();
        let a = start(&network, RESIDENT).await;
        let b = start(&network, JOINER).await;
        let request = json!({ "preset": "public_chat", "room_version": "11" });
        let alice = a.register("alice").await;
        let room = alice.create_room(request.clone()).await;
        let other_room = alice.create_room(request).await;
        Self {
            room: RoomId::parse(&room).unwrap(),
            other_room: RoomId::parse(&other_room).unwrap(),
            a,
            b,
        }
    }

    async fn ask(&self, ask: Ask) -> Result<Answer, AskError> {
        let homeserver = self.b.homeserver();
        let client = homeserver.client();
        let to = ServerName::parse(RESIDENT).unwrap();
        let limit = Duration::from_secs(60);
        client.ask(&to, &ask, limit, async |_, _| ()).await
    }

    /// The template of a join, as the resident makes it.
    async fn template(&self, room: &RoomId, user: &str) -> Value {
        let made = self
            .ask(Ask::Make {
                what: Handshake::Join,
                room: room.clone(),
                user: UserId::parse(user).unwrap(),
            })
            .await;
        let Ok(Answer::Made { event, .. }) = made else {
            panic!("{made:?}");
        };
        serde_json::from_str(&event).unwrap()
    }

    fn sign(&self, template: &Value) -> Pdu {
        let homeserver = self.b.homeserver();
        sign_with(&homeserver.own().key, template)
    }

    async fn send(&self, event_id: &EventId, event: &str) -> Result<Answer, AskError> {
        self.ask(Ask::Send {
            what: Handshake::Join,
            room: self.room.clone(),
            event_id: event_id.clone(),
            event: event.into(),
            omit_members: false,
        })
        .await
    }

    /// All that is stored about events.
    async fn stored(&self) -> i64 {
        let homeserver = self.a.homeserver();
        let store = homeserver.store();
        let count = |c: &mut dyn storage::Conn| {
            c.query_one("SELECT COUNT(*) FROM events", &[], |row| row.int(0))
        };
        store.read(count).await.unwrap()
    }
}

fn sign_with(key: &SigningKey, template: &Value) -> Pdu {
    let map = template.as_object().unwrap().clone();
    let name = ServerName::parse(JOINER).unwrap();
    protocol::build::sign(map, key, &name, RoomVersion::V11).unwrap()
}

fn changed(event: &Value, change: impl FnOnce(&mut Value)) -> Value {
    let mut event = event.clone();
    change(&mut event);
    event
}

#[tokio::test]
async fn u_45_every_kind_of_bad_join_is_refused_and_nothing_is_stored() {
    let stage = Stage::set().await;
    let template = stage.template(&stage.room, "@mallory:b.test").await;
    let good = stage.sign(&template);
    let signed: Value = serde_json::from_str(&good.json).unwrap();
    let other_key = SigningKey::generate([7; 32], "1").unwrap();
    let of_other_room = stage.template(&stage.other_room, "@mallory:b.test").await;
    let resigned = |change: fn(&mut Value)| {
        let pdu = stage.sign(&changed(&template, change));
        (pdu.event_id.clone(), pdu.json.to_string())
    };
    let as_is = |event: &Value| (good.event_id.clone(), event.to_string());
    let pdu = |pdu: &Pdu| (pdu.event_id.clone(), pdu.json.to_string());
    let wrong_id = EventId::parse("$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA").unwrap();
    let long = "x".repeat(70_000);

    let before = stage.stored().await;
    for (what, (event_id, event), status, errcode) in [
        (
            "unsigned (R-27)",
            as_is(&changed(&signed, |e| {
                e.as_object_mut().unwrap().remove("signatures");
            })),
            403,
            "M_FORBIDDEN",
        ),
        (
            "signed with a key that is not the server's (R-27)",
            pdu(&sign_with(&other_key, &template)),
            403,
            "M_FORBIDDEN",
        ),
        (
            "somebody else's join (R-25)",
            resigned(|e| {
                e["sender"] = json!("@carol:c.test");
                e["state_key"] = json!("@carol:c.test");
            }),
            403,
            "M_FORBIDDEN",
        ),
        (
            "a join of another than the sender (R-23)",
            resigned(|e| e["state_key"] = json!("@other:b.test")),
            400,
            "M_BAD_JSON",
        ),
        (
            "a join for another room (R-18)",
            pdu(&stage.sign(&of_other_room)),
            400,
            "M_BAD_JSON",
        ),
        (
            "no room (R-17)",
            as_is(&changed(&signed, |e| {
                e.as_object_mut().unwrap().remove("room_id");
            })),
            400,
            "M_MISSING_PARAM",
        ),
        (
            "another event's id in the path (R-24)",
            (wrong_id, good.json.to_string()),
            400,
            "M_BAD_JSON",
        ),
        (
            "no membership (R-20)",
            resigned(|e| e["type"] = json!("m.room.topic")),
            400,
            "M_BAD_JSON",
        ),
        (
            "a leave (R-21)",
            resigned(|e| e["content"]["membership"] = json!("leave")),
            400,
            "M_BAD_JSON",
        ),
        (
            "a number that is no integer (R-16)",
            as_is(&changed(&signed, |e| e["depth"] = json!(1.5))),
            400,
            "M_BAD_JSON",
        ),
        ("no object (R-16)", as_is(&json!([1])), 400, "M_BAD_JSON"),
        (
            "more than 65,536 bytes",
            as_is(&changed(&signed, |e| e["content"]["x"] = json!(long))),
            413,
            "M_TOO_LARGE",
        ),
    ] {
        let answer = refusal(stage.send(&event_id, &event).await);
        assert_eq!(answer, (status, errcode.to_owned()), "{what}");
        assert_eq!(stage.stored().await, before, "{what}");
    }

    // R-32b: what was refused did not spoil the good one.
    let joined = stage.send(&good.event_id, &good.json).await;
    assert!(matches!(joined, Ok(Answer::SentJoin(_))), "{joined:?}");
    assert_eq!(stage.stored().await, before + 1);
}

#[tokio::test]
async fn r_36_a_hundred_joins_of_one_user_at_once_are_one_join() {
    let stage = Stage::set().await;
    let template = stage.template(&stage.room, "@mallory:b.test").await;
    let good = stage.sign(&template);
    let before = stage.stored().await;
    let same = (0..100).map(|_| stage.send(&good.event_id, &good.json));
    for answer in futures::future::join_all(same).await {
        assert!(matches!(answer, Ok(Answer::SentJoin(_))), "{answer:?}");
    }
    // R-36; no dummy events either.
    assert_eq!(stage.stored().await, before + 1);

    let others: Vec<_> = (0..20)
        .map(|n| {
            stage.sign(&changed(&template, |e| {
                e["origin_server_ts"] = json!(1000 + n)
            }))
        })
        .collect();
    let others = others
        .iter()
        .map(|pdu| stage.send(&pdu.event_id, &pdu.json));
    for answer in futures::future::join_all(others).await {
        let fine = matches!(&answer, Ok(Answer::SentJoin(_)))
            || matches!(&answer, Err(AskError::Refused { status, .. }) if *status < 500);
        assert!(fine, "{answer:?}");
    }
    let members = stage.a.register("carol").await;
    members.join(stage.room.as_str(), RESIDENT).await;
    let path = format!("/rooms/{}/joined_members", stage.room);
    let joined = members.get(&path).await;
    assert_eq!(joined["joined"].as_object().unwrap().len(), 3);
}
