//! What each Ask says on the wire, and what is made of the answers.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use federation::transport::{HeaderMap, Request, Response, StatusCode, header};
use federation::{Client, Transport, TransportError};
use futures::future::BoxFuture;
use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::room_version::RoomVersion;
use protocol::signature::SigningKey;
use room::effect::{Answer, Ask, AskError, Handshake, RawPdu, Section};
use serde_json::{Value, json};

/// Answers in turn, and writes down what was asked.
#[derive(Default)]
struct Script {
    answers: Mutex<VecDeque<(u16, String)>>,
    asked: Mutex<Vec<(String, Option<Value>)>>,
}

impl Transport for Script {
    fn send(&self, request: Request) -> BoxFuture<'_, Result<Response, TransportError>> {
        let authorization = request.headers[header::AUTHORIZATION].to_str().unwrap();
        assert!(authorization.starts_with(r#"X-Matrix origin="us.org",destination="a.org""#));
        let line = format!("{} {}", request.method, request.path_and_query);
        let body = request.body.map(|b| serde_json::from_slice(&b).unwrap());
        self.asked.lock().unwrap().push((line, body));
        let answer = self.answers.lock().unwrap().pop_front();
        Box::pin(async move {
            let Some((status, body)) = answer else {
                return Err(TransportError::Timeout("no answer"));
            };
            let chunks: Vec<_> = body
                .as_bytes()
                .chunks(7)
                .map(|c| Ok(Bytes::copy_from_slice(c)))
                .collect();
            Ok(Response {
                status: StatusCode::from_u16(status).unwrap(),
                headers: HeaderMap::new(),
                body: Box::pin(futures::stream::iter(chunks)),
            })
        })
    }
}

struct Heard {
    asked: Vec<(String, Option<Value>)>,
    parts: Vec<(Section, RawPdu)>,
    answer: Result<Answer, AskError>,
}

async fn ask(ask: Ask, answers: &[(u16, Value)]) -> Heard {
    let texts: Vec<(u16, String)> = answers.iter().map(|(s, v)| (*s, v.to_string())).collect();
    ask_text(ask, &texts).await
}

async fn ask_text(ask: Ask, answers: &[(u16, String)]) -> Heard {
    let script = Arc::new(Script::default());
    script.answers.lock().unwrap().extend(answers.to_vec());
    let key = SigningKey::generate([1; 32], "1").unwrap();
    let client = Client::new(script.clone(), name("us.org"), key);
    let parts = Mutex::new(Vec::new());
    let answer = client
        .ask(
            &name("a.org"),
            &ask,
            Duration::from_secs(5),
            async |section, pdus: Vec<RawPdu>| {
                let pdus = pdus.into_iter().map(|p| (section, p));
                parts.lock().unwrap().extend(pdus);
            },
        )
        .await;
    let asked = std::mem::take(&mut *script.asked.lock().unwrap());
    Heard {
        asked,
        parts: parts.into_inner().unwrap(),
        answer,
    }
}

fn name(text: &str) -> ServerName {
    ServerName::parse(text).unwrap()
}

fn room() -> RoomId {
    RoomId::parse("!r:a.org").unwrap()
}

fn event_id() -> EventId {
    EventId::parse("$e/1").unwrap()
}

fn lines(heard: &Heard) -> Vec<&str> {
    heard.asked.iter().map(|(line, _)| line.as_str()).collect()
}

fn send(what: Handshake) -> Ask {
    Ask::Send {
        what,
        room: room(),
        event_id: event_id(),
        event: r#"{"type":"m.room.member","depth":1}"#.into(),
        omit_members: true,
    }
}

fn make(what: Handshake) -> Ask {
    Ask::Make {
        what,
        room: room(),
        user: UserId::parse("@u:us.org").unwrap(),
    }
}

#[tokio::test]
async fn make_join_offers_every_version() {
    let heard = ask(
        make(Handshake::Join),
        &[(200, json!({"room_version": "9", "event": {"a": 1}}))],
    )
    .await;
    let versions: Vec<String> = RoomVersion::ALL
        .iter()
        .map(|v| format!("ver={}", v.as_str()))
        .collect();
    assert_eq!(
        lines(&heard),
        [format!(
            "GET /_matrix/federation/v1/make_join/%21r%3Aa.org/%40u%3Aus.org?{}",
            versions.join("&")
        )]
    );
    let Ok(Answer::Made {
        room_version,
        event,
    }) = heard.answer
    else {
        panic!("{:?}", heard.answer);
    };
    assert_eq!(
        (room_version.as_deref(), &*event),
        (Some("9"), r#"{"a":1}"#)
    );
}

#[tokio::test]
async fn make_leave_names_no_version() {
    let heard = ask(make(Handshake::Leave), &[(200, json!({"event": {}}))]).await;
    assert_eq!(
        lines(&heard),
        ["GET /_matrix/federation/v1/make_leave/%21r%3Aa.org/%40u%3Aus.org"]
    );
    assert!(matches!(
        heard.answer,
        Ok(Answer::Made {
            room_version: None,
            ..
        })
    ));
}

const V2: &str = "PUT /_matrix/federation/v2/send_join/%21r%3Aa.org/%24e%2F1?omit_members=true";
const V1: &str = "PUT /_matrix/federation/v1/send_join/%21r%3Aa.org/%24e%2F1";

#[tokio::test]
async fn send_join_gives_parts_and_then_the_end() {
    let body = json!({
        "state": [{"s": 1}, {"s": 2}], "auth_chain": [{"c": 1}],
        "members_omitted": true, "servers_in_room": ["a.org"], "event": {"e": 1},
    });
    let heard = ask(send(Handshake::Join), &[(200, body)]).await;
    assert_eq!(lines(&heard), [V2]);
    assert_eq!(
        heard.asked[0].1,
        Some(json!({"type": "m.room.member", "depth": 1}))
    );
    let mut parts: Vec<(bool, &str)> = heard
        .parts
        .iter()
        .map(|(section, pdu)| (*section == Section::State, &**pdu))
        .collect();
    parts.sort_unstable();
    assert_eq!(
        parts,
        [
            (false, r#"{"c":1}"#),
            (true, r#"{"s":1}"#),
            (true, r#"{"s":2}"#)
        ]
    );
    let Ok(Answer::SentJoin(sent)) = heard.answer else {
        panic!("{:?}", heard.answer);
    };
    assert!(sent.members_omitted);
    assert_eq!(sent.servers_in_room, Some(vec![name("a.org")]));
    assert_eq!(sent.event.as_deref(), Some(r#"{"e":1}"#));
}

#[tokio::test]
async fn j_46_an_unknown_v2_is_tried_as_v1_and_a_refusal_is_not() {
    let v1 = json!([200, {"state": [], "auth_chain": [{}], "origin": "a.org"}]);
    for unknown in [
        (404, "not found".to_owned()),
        (405, json!({"errcode": "M_UNRECOGNIZED"}).to_string()),
        (400, json!({"errcode": "M_UNRECOGNIZED"}).to_string()),
    ] {
        let heard = ask_text(send(Handshake::Join), &[unknown, (200, v1.to_string())]).await;
        assert_eq!(lines(&heard), [V2, V1]);
        assert_eq!(heard.parts.len(), 1);
        assert!(matches!(heard.answer, Ok(Answer::SentJoin(_))));
    }
    let refusal = json!({"errcode": "M_NOT_FOUND", "error": "who?", "extra": 1});
    let heard = ask(send(Handshake::Join), &[(404, refusal.clone())]).await;
    assert_eq!(lines(&heard), [V2]);
    let Err(AskError::Refused { status, body, .. }) = heard.answer else {
        panic!("{:?}", heard.answer);
    };
    assert_eq!(status, 404);
    assert_eq!(serde_json::from_str::<Value>(&body).unwrap(), refusal);
}

#[tokio::test]
async fn what_is_no_answer_is_unreachable() {
    let whole = json!({"state": [{"a": 1}], "auth_chain": []}).to_string();
    for answers in [
        vec![],
        vec![(500, json!({"errcode": "M_X"}).to_string())],
        vec![(403, "<html>".to_owned())],
        vec![(200, whole[..whole.len() - 1].to_owned())],
        vec![(200, "{}".to_owned())],
    ] {
        let heard = ask_text(send(Handshake::Join), &answers).await;
        assert!(
            matches!(heard.answer, Err(AskError::Unreachable { .. })),
            "{answers:?}"
        );
    }
}

#[tokio::test]
async fn send_leave_falls_back_and_send_knock_drops_bad_entries() {
    let unknown = (404, json!({"errcode": "M_UNRECOGNIZED"}));
    let heard = ask(send(Handshake::Leave), &[unknown, (200, json!([200, {}]))]).await;
    assert_eq!(
        lines(&heard),
        [
            "PUT /_matrix/federation/v2/send_leave/%21r%3Aa.org/%24e%2F1",
            "PUT /_matrix/federation/v1/send_leave/%21r%3Aa.org/%24e%2F1"
        ]
    );
    assert!(matches!(heard.answer, Ok(Answer::SentLeave)));

    let state = json!({"knock_room_state": [{"type": "x"}, 5, {"type": "y"}]});
    let heard = ask(send(Handshake::Knock), &[(200, state)]).await;
    assert_eq!(
        lines(&heard),
        ["PUT /_matrix/federation/v1/send_knock/%21r%3Aa.org/%24e%2F1"]
    );
    let Ok(Answer::SentKnock { room_state }) = heard.answer else {
        panic!("{:?}", heard.answer);
    };
    assert_eq!(room_state.len(), 2);
}

#[tokio::test]
async fn look_ups_of_events_and_state() {
    let (room, event_id) = (room(), event_id());
    let one = || json!({"pdus": [{"e": 1}]});
    let cases = [
        (
            Ask::StateIds {
                room: room.clone(),
                event_id: event_id.clone(),
            },
            "GET /_matrix/federation/v1/state_ids/%21r%3Aa.org?event_id=%24e%2F1",
            json!({"pdu_ids": ["$a"], "auth_chain_ids": ["$b", "$c"]}),
            3,
        ),
        (
            Ask::State {
                room: room.clone(),
                event_id: event_id.clone(),
            },
            "GET /_matrix/federation/v1/state/%21r%3Aa.org?event_id=%24e%2F1",
            json!({"pdus": [{}], "auth_chain": [{}, {}]}),
            3,
        ),
        (
            Ask::Event {
                event_id: event_id.clone(),
            },
            "GET /_matrix/federation/v1/event/%24e%2F1",
            one(),
            1,
        ),
        (
            Ask::EventAuth {
                room: room.clone(),
                event_id: event_id.clone(),
            },
            "GET /_matrix/federation/v1/event_auth/%21r%3Aa.org/%24e%2F1",
            json!({"auth_chain": [{}]}),
            1,
        ),
        (
            Ask::Backfill {
                room: room.clone(),
                from: vec![event_id.clone(), EventId::parse("$f").unwrap()],
                limit: 5,
            },
            "GET /_matrix/federation/v1/backfill/%21r%3Aa.org?v=%24e%2F1&v=%24f&limit=5",
            one(),
            1,
        ),
        (
            Ask::GetMissingEvents {
                room,
                earliest: vec![event_id.clone()],
                latest: vec![],
                limit: 10,
                min_depth: 3,
            },
            "POST /_matrix/federation/v1/get_missing_events/%21r%3Aa.org",
            json!({"events": [{}, {}]}),
            2,
        ),
    ];
    for (what, line, body, count) in cases {
        let heard = ask(what, &[(200, body)]).await;
        assert_eq!(lines(&heard), [line]);
        let found = match heard.answer.unwrap() {
            Answer::StateIds {
                pdu_ids,
                auth_chain_ids,
            } => pdu_ids.len() + auth_chain_ids.len(),
            Answer::State => heard.parts.len(),
            Answer::Pdus(pdus) => pdus.len(),
            other => panic!("{other:?}"),
        };
        assert_eq!(found, count, "{line}");
    }
}

#[tokio::test]
async fn an_invite_falls_back_to_v1_for_the_first_two_versions_only() {
    let invite = |version| Ask::Invite {
        room: room(),
        event_id: event_id(),
        version,
        event: r#"{"type":"m.room.member"}"#.into(),
        stripped_state: vec![r#"{"type":"m.room.name"}"#.into()],
    };
    let unknown = (404, json!({"errcode": "M_UNRECOGNIZED"}));
    let answers = [
        unknown.clone(),
        (200, json!([200, {"event": {"signed": true}}])),
    ];
    let heard = ask(invite(RoomVersion::V1), &answers).await;
    assert_eq!(
        lines(&heard),
        [
            "PUT /_matrix/federation/v2/invite/%21r%3Aa.org/%24e%2F1",
            "PUT /_matrix/federation/v1/invite/%21r%3Aa.org/%24e%2F1"
        ]
    );
    assert_eq!(
        heard.asked[0].1,
        Some(json!({
            "room_version": "1", "event": {"type": "m.room.member"},
            "invite_room_state": [{"type": "m.room.name"}],
        }))
    );
    assert_eq!(
        heard.asked[1].1,
        Some(json!({
            "type": "m.room.member", "unsigned": {"invite_room_state": [{"type": "m.room.name"}]},
        }))
    );
    assert!(matches!(heard.answer, Ok(Answer::Invited { .. })));

    let heard = ask(invite(RoomVersion::V6), &answers).await;
    assert_eq!(heard.asked.len(), 1);
    assert!(matches!(
        heard.answer,
        Err(AskError::Refused { status: 404, .. })
    ));
}
