//! Accounts and what belongs to them: devices, profiles, keys, backups, media.

use std::sync::Arc;

use axum::http::StatusCode;
use protocol::signature::SigningKey;
use serde_json::{Value, json};

use crate::network::Network;
use crate::world::{list, server, start};

fn password_auth(session: &Value) -> Value {
    json!({
        "type": "m.login.password",
        "identifier": { "type": "m.id.user", "user": "alice" },
        "password": "secret",
        "session": session,
    })
}

#[tokio::test]
async fn an_account_is_made_once_and_speaks_through_its_token() {
    let server = server().await;
    let (status, challenge) = server.ask("POST", "/register", "", json!({})).await;
    assert_eq!(status, 401);
    assert!(challenge["session"].is_string() && challenge.get("errcode").is_none());
    assert_eq!(challenge["flows"][0]["stages"][0], "m.login.dummy");

    let alice = server.register("Alice").await;
    let me = alice.get("/account/whoami").await;
    assert_eq!(me["user_id"], "@alice:a.test");
    assert_eq!(me["device_id"], alice.device.as_str());

    let errcode = async |username: &str| {
        let body =
            json!({ "username": username, "password": "x", "auth": { "type": "m.login.dummy" } });
        server.ask("POST", "/register", "", body).await.1["errcode"].clone()
    };
    assert_eq!(errcode("alice").await, "M_USER_IN_USE");
    assert_eq!(errcode("us,er").await, "M_INVALID_USERNAME");
    assert_eq!(errcode("_bridge_x").await, "M_INVALID_USERNAME");
    let (status, answer) = server.ask("GET", "/account/whoami", "", Value::Null).await;
    assert_eq!(
        (status, &answer["errcode"]),
        (401, &json!("M_MISSING_TOKEN"))
    );
    let (status, answer) = server
        .ask("GET", "/account/whoami", "no", Value::Null)
        .await;
    assert_eq!(
        (status, &answer["errcode"]),
        (401, &json!("M_UNKNOWN_TOKEN"))
    );
}

#[tokio::test]
async fn a_device_is_deleted_after_the_password_and_its_token_with_it() {
    let server = server().await;
    let alice = server.register("alice").await;
    assert_eq!(server.login("alice", "wrong").await.0, 403);
    assert_eq!(server.login("nobody", "secret").await.0, 403);
    let (_, other) = server.login("@ALICE:a.test", "secret").await;
    let other_token = other["access_token"].as_str().unwrap();
    let path = format!("/devices/{}", other["device_id"].as_str().unwrap());

    let (status, challenge) = server.ask("DELETE", &path, &alice.token, Value::Null).await;
    assert_eq!(status, 401);
    let mut wrong = password_auth(&challenge["session"]);
    wrong["password"] = "wrong".into();
    let (status, answer) = server
        .ask("DELETE", &path, &alice.token, json!({ "auth": wrong }))
        .await;
    assert_eq!((status, &answer["errcode"]), (401, &json!("M_FORBIDDEN")));
    assert!(answer["flows"].is_array() && answer["params"].is_object());

    let right = json!({ "auth": password_auth(&challenge["session"]) });
    server.get("DELETE", &path, &alice.token, right).await;
    assert_eq!(
        server.ask("GET", &path, &alice.token, Value::Null).await.0,
        404
    );
    let (status, _) = server
        .ask("GET", "/account/whoami", other_token, Value::Null)
        .await;
    assert_eq!(status, 401);
}

#[tokio::test]
async fn an_old_refresh_token_works_until_the_new_tokens_are_used() {
    let server = server().await;
    let body = json!({ "username": "alice", "password": "secret", "refresh_token": true,
        "auth": { "type": "m.login.dummy" } });
    let first = server.get("POST", "/register", "", body).await;
    assert!(first["expires_in_ms"].is_number());
    let refresh = async |token: &Value| {
        server
            .ask("POST", "/refresh", "", json!({ "refresh_token": token }))
            .await
    };
    let (_, second) = refresh(&first["refresh_token"]).await;
    let (status, second_try) = refresh(&first["refresh_token"]).await;
    assert_eq!(status, 200, "the first answer may have been lost");
    let used = second_try["access_token"].as_str().unwrap();
    server
        .get("GET", "/account/whoami", used, Value::Null)
        .await;
    assert_eq!(refresh(&first["refresh_token"]).await.0, 401);
    let old = first["access_token"].as_str().unwrap();
    assert_eq!(
        server
            .ask("GET", "/account/whoami", old, Value::Null)
            .await
            .0,
        401
    );
    assert!(second["access_token"].is_string());
}

#[tokio::test]
async fn a_deactivated_account_is_closed() {
    let server = server().await;
    let alice = server.register("alice").await;
    let auth = json!({ "auth": password_auth(&Value::Null) });
    alice.post("/account/deactivate", auth).await;
    assert_eq!(server.login("alice", "secret").await.0, 403);
    assert_eq!(
        server
            .ask("GET", "/account/whoami", &alice.token, Value::Null)
            .await
            .0,
        401
    );
    let (_, answer) = server
        .ask("GET", "/register/available?username=alice", "", Value::Null)
        .await;
    assert_eq!(answer["errcode"], "M_USER_IN_USE");
}

#[tokio::test]
async fn an_application_service_registers_and_speaks_for_its_users() {
    let server = server().await;
    let service = "bridge-token";
    let body = |username: &str| json!({ "type": "m.login.application_service", "username": username, "inhibit_login": true });
    let made = server
        .get("POST", "/register", service, body("_bridge_bob"))
        .await;
    assert_eq!(made["user_id"], "@_bridge_bob:a.test");
    let (_, answer) = server
        .ask("POST", "/register", service, body("carol"))
        .await;
    assert_eq!(answer["errcode"], "M_EXCLUSIVE");
    let path = "/account/whoami?user_id=@_bridge_bob:a.test";
    let me = server.get("GET", path, service, Value::Null).await;
    assert_eq!(me["user_id"], "@_bridge_bob:a.test");
    let path = "/account/whoami?user_id=@carol:a.test";
    assert_eq!(server.ask("GET", path, service, Value::Null).await.0, 403);
}

#[tokio::test]
async fn profiles_data_filters_and_push_rules_are_kept() {
    let server = server().await;
    let alice = server.register("alice").await;
    let user = "@alice:a.test";
    let profile = format!("/profile/{user}");
    let name = format!("{profile}/displayname");
    alice.put(&name, json!({ "displayname": "Alice" })).await;
    let shown = server.get("GET", &profile, "", Value::Null).await;
    assert_eq!(shown, json!({ "displayname": "Alice" }));
    let (status, _) = server
        .ask("GET", "/profile/@nobody:a.test", "", Value::Null)
        .await;
    assert_eq!(status, 404);

    let data = format!("/user/{user}/account_data/test.key");
    alice.put(&data, json!({ "value": 1 })).await;
    assert_eq!(alice.get(&data).await, json!({ "value": 1 }));
    alice.put(&data, json!({})).await;
    assert_eq!(
        server.ask("GET", &data, &alice.token, Value::Null).await.0,
        404
    );
    let owned = format!("/user/{user}/account_data/m.push_rules");
    assert_eq!(
        server.ask("PUT", &owned, &alice.token, json!({})).await.0,
        405
    );

    let filter = json!({ "room": { "timeline": { "limit": 10 } } });
    let made = alice
        .post(&format!("/user/{user}/filter"), filter.clone())
        .await;
    let path = format!(
        "/user/{user}/filter/{}",
        made["filter_id"].as_str().unwrap()
    );
    assert_eq!(alice.get(&path).await, filter);

    let rule = "/pushrules/global/sender/@bob:a.test";
    alice.put(rule, json!({ "actions": ["dont_notify"] })).await;
    alice
        .put(&format!("{rule}/enabled"), json!({ "enabled": false }))
        .await;
    let rules = alice.get("/pushrules/").await;
    assert_eq!(rules["global"]["sender"][0]["actions"][0], "dont_notify");
    assert_eq!(rules["global"]["sender"][0]["enabled"], false);
    server.get("DELETE", rule, &alice.token, Value::Null).await;
    assert_eq!(
        server.ask("GET", rule, &alice.token, Value::Null).await.0,
        404
    );
}

#[tokio::test]
async fn unknown_paths_and_methods_say_so() {
    let server = server().await;
    for (method, path, expected) in [
        ("GET", "/_matrix/unknown", 404),
        ("GET", "/_matrix/client/v1/unknown", 404),
        ("GET", "/_matrix/client/v3/room/unknown", 404),
        ("PUT", "/_matrix/client/v3/login", 405),
        ("GET", "/_matrix/federation/v1/unknown", 404),
        ("PUT", "/_matrix/federation/v1/version", 405),
        ("GET", "/_matrix/key/v2/unknown", 404),
        ("PUT", "/_matrix/key/v2/query", 405),
        ("GET", "/_matrix/media/v3/unknown", 404),
        ("PATCH", "/_matrix/media/v3/upload", 405),
    ] {
        let (status, headers, body) = server.raw(method, path, "", "application/json", "").await;
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        assert_eq!(headers["access-control-allow-origin"], "*", "{path}");
        assert_eq!(
            (status, &body["errcode"]),
            (expected, &json!("M_UNRECOGNIZED")),
            "{method} {path}"
        );
    }
    let (status, headers, _) = server
        .raw(
            "OPTIONS",
            "/_matrix/client/v3/sync",
            "",
            "application/json",
            "",
        )
        .await;
    assert_eq!(status, StatusCode::OK.as_u16());
    assert_eq!(headers["access-control-allow-origin"], "*");
}

#[tokio::test]
async fn keys_are_given_out_in_the_order_of_their_upload() {
    let server = server().await;
    let alice = server.register("alice").await;
    let user = "@alice:a.test";
    let keys = json!({
        "user_id": user, "device_id": alice.device, "algorithms": ["m.olm.v1"],
        "keys": { format!("ed25519:{}", alice.device): "x" }, "signatures": { user: {} },
    });
    let (status, answer) = server
        .ask(
            "POST",
            "/keys/upload",
            &alice.token,
            json!({ "device_keys": { "user_id": user } }),
        )
        .await;
    assert_eq!((status, &answer["errcode"]), (400, &json!("M_BAD_JSON")));
    let upload = async |body: Value| alice.post("/keys/upload", body).await;
    upload(json!({ "device_keys": keys, "one_time_keys": { "signed:2": { "key": "2" } } })).await;
    let counts = upload(
        json!({ "one_time_keys": { "signed:1": { "key": "1" }, "signed:2": { "key": "2" } } }),
    )
    .await;
    assert_eq!(counts["one_time_key_counts"]["signed"], 2);
    upload(json!({ "fallback_keys": { "signed:f": { "key": "f", "fallback": true } } })).await;

    let query = alice
        .post("/keys/query", json!({ "device_keys": { user: [] } }))
        .await;
    assert_eq!(
        query["device_keys"][user][&alice.device]["keys"],
        keys["keys"]
    );
    let wanted = json!({ "one_time_keys": { user: { alice.device.as_str(): "signed" } } });
    for id in ["2", "1", "f", "f"] {
        let claimed = alice.post("/keys/claim", wanted.clone()).await;
        let given = &claimed["one_time_keys"][user][&alice.device];
        assert_eq!(given[format!("signed:{id}")]["key"], id, "{given}");
    }
}

#[tokio::test]
async fn a_message_to_a_device_is_delivered_once() {
    let server = server().await;
    let alice = server.register("alice").await;
    let bob = server.register("bob").await;
    let body =
        json!({ "messages": { "@bob:a.test": { bob.device.as_str(): { "n": 1 }, "GONE": {} } } });
    for _ in 0..2 {
        alice.put("/sendToDevice/my.type/t1", body.clone()).await;
    }
    let seen = bob.get("/sync?timeout=0").await;
    let events = seen["to_device"]["events"].as_array().unwrap();
    assert_eq!(events.len(), 1);
    assert_eq!(events[0]["content"], json!({ "n": 1 }));
    assert_eq!(events[0]["sender"], "@alice:a.test");
    let next = format!(
        "/sync?timeout=0&since={}",
        seen["next_batch"].as_str().unwrap()
    );
    let seen = bob.get(&next).await;
    assert!(
        seen["to_device"]["events"]
            .as_array()
            .is_none_or(Vec::is_empty)
    );
}

#[tokio::test]
async fn a_backup_keeps_the_better_key() {
    let server = server().await;
    let alice = server.register("alice").await;
    let made = json!({ "algorithm": "m.megolm_backup.v1", "auth_data": { "a": "b" } });
    let version = alice.post("/room_keys/version", made).await;
    let version = version["version"].as_str().unwrap();
    let path = format!("/room_keys/keys/!foo:a.test/s?version={version}");
    let key = |index: i64| {
        json!({ "first_message_index": index, "forwarded_count": 1, "is_verified": false,
            "session_data": { "x": "y" } })
    };
    let put = alice.put(&path, key(5)).await;
    assert_eq!(put["count"], 1);
    alice.put(&path, key(9)).await;
    let kept = alice.get(&path).await;
    assert_eq!(kept["first_message_index"], 5);
    let (_, wrong) = server
        .ask(
            "PUT",
            "/room_keys/keys/!foo:a.test/s?version=77",
            &alice.token,
            key(1),
        )
        .await;
    assert_eq!(wrong["errcode"], "M_NOT_FOUND");
}

#[tokio::test]
async fn media_come_back_as_they_went_in() {
    let server = server().await;
    let alice = server.register("alice").await;
    let upload = async |path: &str, kind: &str, body: Vec<u8>| {
        let (status, _, answer) = server.raw("POST", path, &alice.token, kind, body).await;
        assert_eq!(status, 200);
        let answer: Value = serde_json::from_slice(&answer).unwrap();
        answer["content_uri"]
            .as_str()
            .unwrap()
            .strip_prefix("mxc://")
            .unwrap()
            .to_owned()
    };
    let uri = upload(
        "/_matrix/media/v3/upload?filename=a%20b.txt",
        "text/plain",
        b"hello".to_vec(),
    )
    .await;
    for path in [
        format!("/_matrix/client/v1/media/download/{uri}"),
        format!("/_matrix/media/v3/download/{uri}"),
    ] {
        let (status, headers, body) = server.raw("GET", &path, &alice.token, "", "").await;
        assert_eq!(
            (status, body.as_slice()),
            (200, b"hello".as_slice()),
            "{path}"
        );
        assert_eq!(headers["content-type"], "text/plain");
        assert_eq!(
            headers["content-disposition"],
            "inline; filename=\"a b.txt\""
        );
    }
    let path = format!("/_matrix/client/v1/media/download/{uri}");
    assert_eq!(server.raw("GET", &path, "", "", "").await.0, 401);

    let reserved = upload("/_matrix/media/v1/create", "application/json", Vec::new()).await;
    let waiting = format!("/_matrix/media/v3/download/{reserved}?timeout_ms=0");
    let (status, _, body) = server.raw("GET", &waiting, "", "", "").await;
    let body: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(
        (status, &body["errcode"]),
        (504, &json!("M_NOT_YET_UPLOADED"))
    );
    let fill = format!("/_matrix/media/v3/upload/{reserved}");
    assert_eq!(
        server
            .raw("PUT", &fill, &alice.token, "text/plain", "late")
            .await
            .0,
        200
    );
    let (status, _, body) = server
        .raw("PUT", &fill, &alice.token, "text/plain", "later")
        .await;
    let body: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(
        (status, &body["errcode"]),
        (409, &json!("M_CANNOT_OVERWRITE_MEDIA"))
    );
    assert_eq!(server.raw("GET", &waiting, "", "", "").await.2, b"late");
}

#[tokio::test]
async fn signing_keys_need_the_password_only_to_become_others() {
    let server = server().await;
    let alice = server.register("alice").await;
    let key = |seed: u8| {
        let public = SigningKey::generate([seed; 32], "x")
            .unwrap()
            .public_base64();
        json!({ "master_key": { "user_id": "@alice:a.test", "usage": ["master"],
            "keys": { format!("ed25519:{public}"): public } } })
    };
    let path = "/keys/device_signing/upload";
    alice.post(path, key(1)).await;
    alice.post(path, key(1)).await;
    let (status, challenge) = server.ask("POST", path, &alice.token, key(2)).await;
    assert_eq!(status, 401);
    let mut again = key(2);
    again["auth"] = password_auth(&challenge["session"]);
    alice.post(path, again).await;
    let query = json!({ "device_keys": { "@alice:a.test": [] } });
    let found = alice.post("/keys/query", query).await;
    assert_eq!(
        found["master_keys"]["@alice:a.test"]["keys"],
        key(2)["master_key"]["keys"]
    );
}

fn names(list_of: &Value, user: &str) -> Option<()> {
    list(list_of)
        .iter()
        .any(|named| named == user)
        .then_some(())
}

#[tokio::test]
async fn p57_to_p61_a_list_is_cached_while_its_user_shares_a_room() {
    let network = Arc::<Network>::default();
    let (a, b) = (
        start(&network, "a.test").await,
        start(&network, "b.test").await,
    );
    let (alice, bob) = (a.register("alice").await, b.register("bob").await);
    let device = &alice.device;
    let keys = json!({
        "user_id": alice.id, "device_id": device, "algorithms": ["m.olm.v1"],
        "keys": { format!("ed25519:{device}"): "x" }, "signatures": { &alice.id: {} },
    });
    alice
        .post("/keys/upload", json!({ "device_keys": keys }))
        .await;
    let query = async || {
        let body = json!({ "device_keys": { &alice.id: [] } });
        let found = bob.post("/keys/query", body).await;
        found["device_keys"][&alice.id][device].clone()
    };
    let fetched = || network.count("/user/devices/");
    assert!(query().await.is_object());
    assert_eq!(
        (fetched(), network.count("/user/keys/query")),
        (0, 1),
        "a stranger is asked about"
    );

    let room = alice.create_room(json!({ "preset": "public_chat" })).await;
    bob.join(&room, "a.test").await;
    bob.get(&format!("/rooms/{room}/members")).await;
    let (_, since) = bob
        .sync_until(None, |body| body["rooms"]["join"].get(&room).cloned())
        .await;
    query().await;
    query().await;
    assert_eq!(fetched(), 1, "the second answer is from the cache");

    let name = json!({ "display_name": "Alice's telephone" });
    alice.put(&format!("/devices/{device}"), name).await;
    let (_, since) = bob
        .sync_until(Some(&since), |body| {
            names(&body["device_lists"]["changed"], &alice.id)
        })
        .await;
    let unsigned = query().await["unsigned"].clone();
    assert_eq!(unsigned["device_display_name"], "Alice's telephone");
    assert_eq!(fetched(), 1, "an update without a gap is taken as it is");

    alice.post(&format!("/rooms/{room}/leave"), json!({})).await;
    bob.sync_until(Some(&since), |body| {
        names(&body["device_lists"]["left"], &alice.id)
    })
    .await;
    let asked = network.count("/user/keys/query");
    query().await;
    assert_eq!(
        network.count("/user/keys/query"),
        asked + 1,
        "a list that nobody keeps is not used"
    );
}

#[tokio::test]
async fn p64_messages_go_to_devices_of_other_servers_and_keys_are_claimed_there() {
    let network = Arc::<Network>::default();
    let (a, b) = (
        start(&network, "a.test").await,
        start(&network, "b.test").await,
    );
    let (alice, bob) = (a.register("alice").await, b.register("bob").await);
    let device = alice.device.as_str();
    let keys = json!({ "one_time_keys": { "signed:1": { "key": "1" } } });
    alice.post("/keys/upload", keys).await;
    let wanted = json!({ "one_time_keys": { &alice.id: { device: "signed" } } });
    let claimed = bob.post("/keys/claim", wanted).await;
    let given = &claimed["one_time_keys"][&alice.id][device];
    assert_eq!(given["signed:1"]["key"], "1");

    let body = json!({ "messages": { &alice.id: { "*": { "n": 1 } } } });
    bob.put("/sendToDevice/my.type/t1", body).await;
    alice
        .sync_until(None, |body| {
            (body["to_device"]["events"][0]["content"]["n"] == 1).then_some(())
        })
        .await;
}

#[tokio::test]
async fn j83_a_guest_joins_only_where_guests_may_and_leaves_when_they_may_no_more() {
    let server = server().await;
    let alice = server.register("alice").await;
    let answer = server
        .get("POST", "/register?kind=guest", "", json!({}))
        .await;
    let guest = server.user(&answer);
    let forbidden = (403, "M_GUEST_ACCESS_FORBIDDEN".to_owned());
    let member = |room: &str| format!("/rooms/{room}/state/m.room.member/{}", guest.id);

    let closed = alice.create_room(json!({ "preset": "public_chat" })).await;
    let unknown = "!unknown:elsewhere.test";
    for (method, path) in [
        ("POST", format!("/join/{closed}")),
        ("POST", format!("/rooms/{closed}/join")),
        ("PUT", member(&closed)),
        ("POST", format!("/join/{unknown}?via=elsewhere.test")),
    ] {
        let refused = guest
            .refused(method, &path, json!({ "membership": "join" }))
            .await;
        assert_eq!(refused, forbidden, "{path}");
    }

    let open = alice.create_room(json!({ "preset": "public_chat" })).await;
    let access = format!("/rooms/{open}/state/m.room.guest_access");
    alice
        .put(&access, json!({ "guest_access": "can_join" }))
        .await;
    guest.join(&open, "a.test").await;
    assert_eq!(alice.get(&member(&open)).await["kind"], "guest");
    let (_, since) = guest
        .sync_until(None, |body| body["rooms"]["join"].get(&open).cloned())
        .await;
    alice
        .put(&access, json!({ "guest_access": "forbidden" }))
        .await;
    guest
        .sync_until(Some(&since), |body| {
            body["rooms"]["leave"].get(&open).cloned()
        })
        .await;
    let left = alice.get(&member(&open)).await;
    assert_eq!(left["membership"], "leave");
    let refused = guest
        .refused("POST", &format!("/join/{open}"), json!({}))
        .await;
    assert_eq!(refused, forbidden);
    let members = alice.get(&format!("/rooms/{open}/joined_members")).await;
    assert!(members["joined"].get(&alice.id).is_some());
}

#[tokio::test]
async fn a_guest_may_set_only_a_display_name() {
    let server = server().await;
    let answer = server
        .get("POST", "/register?kind=guest", "", json!({}))
        .await;
    let guest = server.user(&answer);
    let field = |name: &str| format!("/profile/{}/{name}", guest.id);
    guest
        .put(&field("displayname"), json!({ "displayname": "Guest" }))
        .await;
    let refused = guest
        .refused(
            "PUT",
            &field("avatar_url"),
            json!({ "avatar_url": "mxc://a.test/x" }),
        )
        .await;
    assert_eq!(refused, (403, "M_GUEST_ACCESS_FORBIDDEN".to_owned()));
    let refused = guest.refused("POST", "/createRoom", json!({})).await;
    assert_eq!(refused, (403, "M_GUEST_ACCESS_FORBIDDEN".to_owned()));
}
