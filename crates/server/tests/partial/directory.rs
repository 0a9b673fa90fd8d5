//! Aliases, the list of rooms and the directory of users.

use serde_json::{Value, json};

use crate::dag::member;
use crate::stage::Stage;
use crate::world::{list, until};

const ALIAS: &str = "/directory/room/%23room:here.test";

#[tokio::test]
async fn t_49_an_alias_can_be_made_and_looked_up() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    stage.join(&alice).await;
    let target = json!({ "room_id": stage.room.id });
    alice.put(ALIAS, target.clone()).await;
    // T-0j: a body is no harm.
    let (status, found) = alice.ask("GET", ALIAS, target).await;
    assert_eq!(status, 200, "{found}");
    assert_eq!(found["room_id"], stage.room.id.as_str());
    let mut servers: Vec<&str> = list(&found["servers"])
        .iter()
        .filter_map(Value::as_str)
        .collect();
    servers.sort_unstable();
    assert_eq!(servers, ["here.test", "resident.test"]);
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_50_an_alias_can_be_made_and_deleted() {
    let stage = Stage::set().await;
    let alice = stage.here.register("alice").await;
    stage.join(&alice).await;
    alice.put(ALIAS, json!({ "room_id": stage.room.id })).await;
    alice.delete(ALIAS).await;
    let gone = alice.refused("GET", ALIAS, Value::Null).await;
    assert_eq!(gone, (404, "M_NOT_FOUND".to_owned()));
    stage.end(&alice).await;
}

#[tokio::test]
async fn t_60_the_list_of_rooms_counts_all_members_when_the_room_is_full() {
    let stage = Stage::set().await;
    let terry = stage.here.administrator("terry").await;
    stage.join(&terry).await;
    let path = format!("/directory/list/room/{}", stage.room.id);
    terry.put(&path, json!({ "visibility": "public" })).await;
    let counts = async || {
        let rooms = terry.get("/publicRooms").await;
        let room = &rooms["chunk"][0];
        assert_eq!(room["room_id"], stage.room.id.as_str());
        room["num_joined_members"].clone()
    };
    assert_eq!(counts().await, 1);
    stage.release();
    stage.until_full(&terry).await;
    until("three members", async || {
        (counts().await == 3).then_some(())
    })
    .await;
    stage.end(&terry).await;
}

#[tokio::test]
async fn t_61_the_directory_of_users_has_all_members_when_the_room_is_full() {
    let stage = Stage::set().await;
    let rocky = stage.here.register("user-1-rocky").await;
    let [rod, todd] = ["rod", "todd"].map(|who| {
        let user = stage.resident.user(who);
        stage.send(member(&user, &user, "join"));
        user
    });
    stage.join(&rocky).await;
    let finds = async |term: &str| {
        let search = json!({ "search_term": term });
        let found = rocky.post("/user_directory/search", search).await;
        found["results"].as_array().unwrap().clone()
    };
    assert_eq!(finds("rocky").await[0]["user_id"], *rocky.id);
    assert!(finds("rod").await.is_empty());
    stage.release();
    stage.until_full(&rocky).await;
    for (term, user) in [("rod", &rod), ("todd", &todd)] {
        until(term, async || {
            let found = finds(term).await;
            (found.first()?["user_id"] == **user).then_some(())
        })
        .await;
    }
    stage.end(&rocky).await;
}
