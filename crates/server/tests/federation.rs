//! Whole servers that talk to each other through their real doors, over a network in memory.

#[path = "common/network.rs"]
#[expect(dead_code, reason = "each test target uses a part of it")]
mod network;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use homeserver::appservice::Appservices;
use homeserver::clock::SystemClock;
use homeserver::config::Config;
use homeserver::rooms::Draft;
use homeserver::rooms::JoinWish;
use homeserver::{Homeserver, Wire};
use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::signature::SigningKey;
use room::effect::{Answer, Ask, AskError, Handshake, RawPdu, Section};
use serde_json::{Value, json};
use storage::Store;
use tower::ServiceExt;

use crate::network::Network;

fn name(text: &str) -> ServerName {
    ServerName::parse(text).unwrap()
}

fn user(text: &str) -> UserId {
    UserId::parse(text).unwrap()
}

async fn start(network: &Arc<Network>, server: &str) -> Homeserver {
    let options = storage::Options {
        server_name: name(server),
        ..storage::Options::default()
    };
    let store = Store::open("sqlite::memory:", options).await.unwrap();
    let mut config = Config::new(name(server));
    config.limits.enabled = false;
    let mut seed = [1; 32];
    seed[..server.len()].copy_from_slice(server.as_bytes());
    let wire = Wire {
        transport: network.clone(),
        key: SigningKey::generate(seed, "1").unwrap(),
        old_keys: Vec::new(),
    };
    let homeserver = Homeserver::new(
        config,
        Arc::new(SystemClock::default()),
        store,
        Appservices::default(),
        wire,
    );
    let router = vestibule_http::router(homeserver.clone());
    network.add(name(server), router);
    homeserver
}

fn draft(sender: &UserId, kind: &str, state_key: Option<&str>, content: Value) -> Draft {
    Draft {
        sender: sender.clone(),
        kind: kind.into(),
        state_key: state_key.map(str::to_owned),
        content,
        redacts: None,
        txn: None,
        origin_server_ts: None,
    }
}

/// A public room of version 11 with this history visibility, made by alice of a.test.
async fn public_room(a: &Homeserver, visibility: &str) -> RoomId {
    let alice = user("@alice:a.test");
    let state = |kind, content| draft(&alice, kind, Some(""), content);
    let drafts = vec![
        state("m.room.create", json!({"room_version": "11"})),
        draft(
            &alice,
            "m.room.member",
            Some(alice.as_str()),
            json!({"membership": "join"}),
        ),
        state(
            "m.room.power_levels",
            json!({"users": {alice.as_str(): 100}}),
        ),
        state("m.room.join_rules", json!({"join_rule": "public"})),
        state(
            "m.room.history_visibility",
            json!({"history_visibility": visibility}),
        ),
    ];
    a.rooms()
        .create(&alice, RoomVersion::V11, drafts)
        .await
        .unwrap()
}

async fn say(a: &Homeserver, room: &RoomId, words: &str) -> EventId {
    let alice = user("@alice:a.test");
    let message = draft(&alice, "m.room.message", None, json!({"body": words}));
    a.rooms().send(message, room).await.unwrap()
}

struct Asked {
    parts: Vec<(Section, RawPdu)>,
    answer: Result<Answer, AskError>,
}

async fn ask(from: &Homeserver, to: &str, ask: Ask) -> Asked {
    let parts = Mutex::new(Vec::new());
    let answer = from
        .client()
        .ask(
            &name(to),
            &ask,
            Duration::from_secs(20),
            async |section, pdus: Vec<RawPdu>| {
                let pdus = pdus.into_iter().map(|pdu| (section, pdu));
                parts.lock().unwrap().extend(pdus);
            },
        )
        .await;
    Asked {
        parts: parts.into_inner().unwrap(),
        answer,
    }
}

fn refused(answer: Result<Answer, AskError>) -> (u16, String) {
    match answer {
        Err(AskError::Refused {
            status, errcode, ..
        }) => (status, errcode),
        other => panic!("{other:?}"),
    }
}

/// Joins bob of b.test by the two requests alone, as a server without a store would.
async fn join_by_hand(b: &Homeserver, room: &RoomId, omit_members: bool) -> (Arc<Pdu>, Asked) {
    let bob = user("@bob:b.test");
    let made = ask(
        b,
        "a.test",
        Ask::Make {
            what: Handshake::Join,
            room: room.clone(),
            user: bob.clone(),
        },
    )
    .await;
    let Ok(Answer::Made {
        room_version,
        event,
    }) = made.answer
    else {
        panic!("{:?}", made.answer);
    };
    assert_eq!(room_version.as_deref(), Some("11"));
    let pdu = sign(b, &event);
    let sent = Ask::Send {
        what: Handshake::Join,
        room: room.clone(),
        event_id: pdu.event_id.clone(),
        event: pdu.json.clone(),
        omit_members,
    };
    (pdu, ask(b, "a.test", sent).await)
}

fn sign(b: &Homeserver, template: &str) -> Arc<Pdu> {
    let Value::Object(map) = serde_json::from_str(template).unwrap() else {
        panic!("{template}");
    };
    let own = b.own();
    let signed = protocol::build::sign(map, &own.key, &own.name, RoomVersion::V11).unwrap();
    Arc::new(signed)
}

fn kinds(parts: &[(Section, RawPdu)], section: Section) -> Vec<String> {
    let mut kinds: Vec<String> = parts
        .iter()
        .filter(|(of, _)| *of == section)
        .map(|(_, pdu)| {
            let pdu: Value = serde_json::from_str(pdu).unwrap();
            let kind = pdu["type"].as_str().unwrap().trim_start_matches("m.room.");
            match pdu["state_key"].as_str() {
                Some("") | None => kind.to_owned(),
                Some(key) => format!("{kind} {key}"),
            }
        })
        .collect();
    kinds.sort_unstable();
    kinds
}

#[tokio::test]
async fn a_join_by_hand_gets_the_room_without_its_members() {
    let network = Arc::new(Network::default());
    let (a, b) = (
        start(&network, "a.test").await,
        start(&network, "b.test").await,
    );
    let room = public_room(&a, "shared").await;
    let (join, sent) = join_by_hand(&b, &room, true).await;
    let Ok(Answer::SentJoin(answer)) = sent.answer else {
        panic!("{:?}", sent.answer);
    };
    assert!(answer.members_omitted);
    assert_eq!(answer.servers_in_room, Some(vec![name("a.test")]));
    let event: Value = serde_json::from_str(&answer.event.unwrap()).unwrap();
    assert_eq!(event["state_key"], join.sender.as_str());
    // without a name the creator is the hero; R-53: the chain adds nothing.
    assert_eq!(
        kinds(&sent.parts, Section::State),
        [
            "create",
            "history_visibility",
            "join_rules",
            "member @alice:a.test",
            "power_levels"
        ]
    );
    assert!(kinds(&sent.parts, Section::AuthChain).is_empty());

    // the same again gets the same, and there is no second join.
    let again = Ask::Send {
        what: Handshake::Join,
        room: room.clone(),
        event_id: join.event_id.clone(),
        event: join.json.clone(),
        omit_members: false,
    };
    let again = ask(&b, "a.test", again).await;
    assert!(matches!(again.answer, Ok(Answer::SentJoin(_))));
    assert_eq!(kinds(&again.parts, Section::State).len(), 5);
    assert_eq!(a.rooms().servers(&room).await.unwrap(), [name("b.test")]);
}

#[tokio::test]
async fn handshakes_are_refused_with_the_codes_of_the_paper() {
    let network = Arc::new(Network::default());
    let (a, b) = (
        start(&network, "a.test").await,
        start(&network, "b.test").await,
    );
    let room = public_room(&a, "shared").await;
    let make = |room: &RoomId, who: &str| Ask::Make {
        what: Handshake::Join,
        room: room.clone(),
        user: user(who),
    };
    let unknown = RoomId::parse("!unknown:a.test").unwrap();
    for (question, status, errcode) in [
        (make(&unknown, "@bob:b.test"), 404, "M_NOT_FOUND"),
        (make(&room, "@carol:c.test"), 403, "M_FORBIDDEN"),
    ] {
        let answer = ask(&b, "a.test", question).await.answer;
        assert_eq!(refused(answer), (status, errcode.to_owned()));
    }

    // after an ACL nobody of b.test comes in.
    let alice = user("@alice:a.test");
    let acl = json!({"allow": ["*"], "deny": ["b.*"]});
    let acl = draft(&alice, "m.room.server_acl", Some(""), acl);
    a.rooms().send(acl, &room).await.unwrap();
    let answer = ask(&b, "a.test", make(&room, "@bob:b.test")).await.answer;
    assert_eq!(refused(answer), (403, "M_FORBIDDEN".to_owned()));
}

#[tokio::test]
async fn a_server_reads_what_its_members_may_see() {
    let network = Arc::new(Network::default());
    let (a, b) = (
        start(&network, "a.test").await,
        start(&network, "b.test").await,
    );
    let c = start(&network, "c.test").await;
    for (visibility, clear) in [("shared", true), ("joined", false), ("invited", false)] {
        let room = public_room(&a, visibility).await;
        let before = say(&a, &room, "before").await;
        let (join, _) = join_by_hand(&b, &room, true).await;
        let after = say(&a, &room, "after").await;

        let events = async |question: Ask| match ask(&b, "a.test", question).await.answer {
            Ok(Answer::Pdus(pdus)) => pdus
                .iter()
                .map(|pdu| serde_json::from_str::<Value>(pdu).unwrap())
                .collect::<Vec<_>>(),
            other => panic!("{other:?}"),
        };
        let one = |event_id: &EventId| Ask::Event {
            event_id: event_id.clone(),
        };
        let hidden = events(one(&before)).await;
        assert_eq!(
            hidden[0]["content"]["body"].is_string(),
            clear,
            "{visibility}"
        );
        assert_eq!(events(one(&after)).await[0]["content"]["body"], "after");

        let gap = events(Ask::GetMissingEvents {
            room: room.clone(),
            earliest: Vec::new(),
            latest: vec![join.event_id.clone()],
            limit: 3,
            min_depth: 0,
        })
        .await;
        let seen: Vec<&str> = gap.iter().map(|e| e["type"].as_str().unwrap()).collect();
        assert_eq!(
            seen,
            [
                "m.room.join_rules",
                "m.room.history_visibility",
                "m.room.message"
            ]
        );
        assert_eq!(gap[2]["content"]["body"].is_string(), clear);

        let back = events(Ask::Backfill {
            room: room.clone(),
            from: vec![after.clone()],
            limit: 3,
        })
        .await;
        let seen: Vec<&str> = back.iter().map(|e| e["type"].as_str().unwrap()).collect();
        assert_eq!(seen, ["m.room.message", "m.room.member", "m.room.message"]);

        // A stranger reads nothing.
        for question in [
            one(&after),
            Ask::Backfill {
                room: room.clone(),
                from: vec![after.clone()],
                limit: 3,
            },
            Ask::StateIds {
                room: room.clone(),
                event_id: after.clone(),
            },
        ] {
            let answer = ask(&c, "a.test", question).await.answer;
            assert_eq!(refused(answer), (403, "M_FORBIDDEN".to_owned()));
        }
    }
}

#[tokio::test]
async fn state_and_auth_chain_are_those_of_the_event() {
    let network = Arc::new(Network::default());
    let (a, b) = (
        start(&network, "a.test").await,
        start(&network, "b.test").await,
    );
    let room = public_room(&a, "shared").await;
    let (join, _) = join_by_hand(&b, &room, true).await;
    let after = say(&a, &room, "after").await;

    let ids = |event_id: &EventId| Ask::StateIds {
        room: room.clone(),
        event_id: event_id.clone(),
    };
    let counts = async |event_id: &EventId| match ask(&b, "a.test", ids(event_id)).await.answer {
        Ok(Answer::StateIds {
            pdu_ids,
            auth_chain_ids,
        }) => (pdu_ids.len(), auth_chain_ids.len()),
        other => panic!("{other:?}"),
    };
    // The state before each; the chains are create, member, power levels and join rules.
    assert_eq!(counts(&join.event_id).await, (5, 3));
    assert_eq!(counts(&after).await, (6, 4));
    let unknown = EventId::parse("$unknown").unwrap();
    let answer = ask(&b, "a.test", ids(&unknown)).await.answer;
    assert_eq!(refused(answer), (404, "M_NOT_FOUND".to_owned()));

    let whole = ask(
        &b,
        "a.test",
        Ask::State {
            room: room.clone(),
            event_id: after.clone(),
        },
    )
    .await;
    assert!(matches!(whole.answer, Ok(Answer::State)));
    assert_eq!(kinds(&whole.parts, Section::State).len(), 6);
    assert_eq!(kinds(&whole.parts, Section::AuthChain).len(), 4);

    let chain = ask(
        &b,
        "a.test",
        Ask::EventAuth {
            room: room.clone(),
            event_id: join.event_id.clone(),
        },
    )
    .await;
    let Ok(Answer::Pdus(chain)) = chain.answer else {
        panic!("{:?}", chain.answer);
    };
    assert_eq!(chain.len(), 4);
}

#[tokio::test]
async fn a_request_that_is_not_signed_gets_in_nowhere() {
    let network = Arc::new(Network::default());
    let a = start(&network, "a.test").await;
    let room = public_room(&a, "shared").await;
    let router = vestibule_http::router(a);
    for (method, path) in [
        ("GET", format!("state_ids/{room}?event_id=%24x")),
        ("GET", format!("make_join/{room}/@bob:b.test?ver=11")),
        ("PUT", format!("send_join/{room}/%24x")),
        ("POST", format!("get_missing_events/{room}")),
        ("GET", "query/profile?user_id=@alice:a.test".to_owned()),
    ] {
        let request = axum::http::Request::builder()
            .method(method)
            .uri(format!("/_matrix/federation/v1/{path}"))
            .body(Body::from("{}"))
            .unwrap();
        let answer = router.clone().oneshot(request).await.unwrap();
        assert_eq!(answer.status(), 401, "{path}");
        let body = axum::body::to_bytes(answer.into_body(), 10_000)
            .await
            .unwrap();
        let body: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["errcode"], "M_UNAUTHORIZED");
    }
    let get = |path: &str| {
        let request = axum::http::Request::builder()
            .uri(path)
            .body(Body::from(Bytes::new()))
            .unwrap();
        router.clone().oneshot(request)
    };
    for (path, status) in [
        ("/_matrix/federation/v1/version", 200),
        ("/_matrix/key/v2/server", 200),
        ("/_matrix/key/v2/query/a.test", 200),
        ("/_matrix/key/v2/query", 405),
        ("/_matrix/federation/v1/unknown", 404),
        ("/_matrix/federation/unknown", 404),
    ] {
        assert_eq!(get(path).await.unwrap().status(), status, "{path}");
    }
}

#[tokio::test]
async fn a_user_joins_over_federation() {
    let network = Arc::new(Network::default());
    let (a, b) = (
        start(&network, "a.test").await,
        start(&network, "b.test").await,
    );
    let room = public_room(&a, "shared").await;
    let bob = user("@bob:b.test");
    let wish = JoinWish {
        via: vec![name("a.test")],
        ..JoinWish::default()
    };
    b.rooms().join(&bob, room.as_str(), wish).await.unwrap();
    assert_eq!(a.rooms().servers(&room).await.unwrap(), [name("b.test")]);
    assert_eq!(b.rooms().servers(&room).await.unwrap(), [name("a.test")]);
    assert_eq!(network.count("send_join"), 1);
}
