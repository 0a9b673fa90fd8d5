//! Walks for other servers, shared rooms, leases, and forgetting a room.

use protocol::id::EventId;
use room::effect::{Load, Loaded};
use room::write::Verdict;
use serde_json::json;
use storage::{federation_reads, leases, purge, queues, rooms, sync_reads};

use crate::engines::Database;
use crate::laws::rooms::{Fixture, placed, server, user};

/// Ten messages in a row upon a joined room; the ids, oldest first.
async fn line(fixture: &mut Fixture) -> Vec<EventId> {
    let mut ids = Vec::new();
    for n in 0..10 {
        let (made, _) = fixture
            .say("@alice:localhost", "m.text", None, json!({"n": n}))
            .await;
        ids.push(made.pdu.event_id.clone());
    }
    ids
}

pub async fn missing_events_lie_between(database: &Database) {
    let mut fixture = Fixture::joined(database).await;
    let ids = line(&mut fixture).await;
    let room = fixture.room.clone();
    let asked = ids.clone();
    let (between, shallow, few, history) = fixture
        .store
        .read(move |c| {
            let room = rooms::by_id(c, &room)?.unwrap().nid;
            let (earliest, latest) = (&asked[1..2], &asked[8..9]);
            Ok((
                federation_reads::missing_events(c, room, earliest, latest, 0, 100)?.len(),
                federation_reads::missing_events(c, room, earliest, latest, 9, 100)?.len(),
                federation_reads::missing_events(c, room, earliest, latest, 0, 2)?,
                federation_reads::backfill(c, room, latest, 100)?,
            ))
        })
        .await
        .unwrap();
    // Messages have depths 3 to 12.
    assert_eq!((between, shallow), (6, 2));
    assert_eq!(few.len(), 2);
    let text = fixture
        .store
        .read(move |c| storage::events::ids(c, &few))
        .await
        .unwrap();
    assert!(
        text.values().all(|id| ids[6..8].contains(id)),
        "the newest first"
    );
    assert_eq!(
        history.len(),
        11,
        "nine messages, the join and the create event"
    );
}

pub async fn rejected_events_are_not_served(database: &Database) {
    let mut fixture = Fixture::joined(database).await;
    let (made, state) = fixture
        .make("@alice:localhost", "m.text", None, json!({}))
        .await;
    let mut writes = fixture.writes();
    let mut event = placed(&made, state);
    event.verdict = Verdict::Rejected("no".to_owned());
    writes.events.push(event);
    fixture.commit(writes).await.unwrap();
    let room = fixture.room.clone();
    let from = vec![made.pdu.event_id.clone()];
    let found = fixture
        .store
        .read(move |c| {
            let room = rooms::by_id(c, &room)?.unwrap().nid;
            federation_reads::backfill(c, room, &from, 10)
        })
        .await
        .unwrap();
    assert_eq!(found.len(), 2, "the join and the create event");
    assert!(!found.contains(&made.nid));
}

pub async fn members_are_found_by_room_user_and_server(database: &Database) {
    let mut fixture = Fixture::joined(database).await;
    for name in [
        "@bob:b.org",
        "@carol:b.org",
        "@dave:B.org",
        "@erin:localhost",
    ] {
        fixture.join(name).await;
    }
    fixture
        .say(
            "@carol:b.org",
            "m.room.member",
            Some("@carol:b.org"),
            json!({"membership": "leave"}),
        )
        .await;
    let room = fixture.room.clone();
    fixture
        .store
        .read(move |c| {
            let nid = rooms::by_id(c, &room)?.unwrap().nid;
            assert_eq!(sync_reads::joined_users(c, nid)?.len(), 4);
            assert_eq!(sync_reads::member_counts(c, nid)?, (4, 0));
            assert!(sync_reads::is_joined(c, &room, &user("@bob:b.org"))?);
            assert!(!sync_reads::is_joined(c, &room, &user("@carol:b.org"))?);
            let sharing = sync_reads::all_sharing(c, &user("@erin:localhost"))?;
            assert!(sharing.contains(&user("@bob:b.org")));
            assert!(!sharing.contains(&user("@carol:b.org")));
            let hosts = rooms::hosts(c, nid)?;
            assert_eq!(
                hosts,
                [server("B.org"), server("b.org"), server("localhost")]
            );
            let keys = federation_reads::member_keys_of(c, nid, &server("b.org"))?;
            assert_eq!(keys.len(), 2, "in small letters only");
            Ok(())
        })
        .await
        .unwrap();
}

pub async fn a_lease_has_one_holder(database: &Database) {
    let store = database.open().await;
    store
        .write(|c| {
            let first = leases::acquire(c, "room", "a", 0, 100)?.unwrap();
            assert_eq!(leases::acquire(c, "room", "b", 50, 100)?, None);
            let renewed = leases::acquire(c, "room", "a", 50, 100)?.unwrap();
            assert_eq!((renewed.token, renewed.expires_ms), (first.token, 150));
            assert!(leases::still_held(c, &first)?);
            let taken = leases::acquire(c, "room", "b", 200, 100)?.unwrap();
            assert!(taken.token > first.token);
            assert!(!leases::still_held(c, &first)?);
            leases::release(c, &first)?;
            assert_eq!(leases::acquire(c, "room", "a", 250, 100)?, None);
            leases::release(c, &taken)?;
            assert!(leases::acquire(c, "room", "a", 250, 100)?.is_some());
            Ok(())
        })
        .await
        .unwrap();
}

pub async fn what_a_purged_room_owes_is_still_sent(database: &Database) {
    let mut fixture = Fixture::joined(database).await;
    line(&mut fixture).await;
    let room = fixture.room.clone();
    let newest = fixture.head().await.forward_extremities[0].nid;
    let (join, _) = fixture.join("@bob:b.org").await;
    let many: Vec<_> = (0..100).map(|n| server(&format!("s{n}.org"))).collect();
    let (of_one, of_many, left) = fixture
        .store
        .write(move |c| {
            queues::enqueue_event(c, newest, &[server("owed.org")], 64)?;
            let queued = queues::enqueue_event(c, join.nid, &many, 64)?;
            assert_eq!(queued, queues::Queued::ToBeSpread);
            purge::room(c, &room)?;
            let spread = queues::spread(c, 0, &|_| true)?;
            assert_eq!(spread.map(|spread| spread.servers), Some(many.clone()));
            let left = c.query_one("SELECT COUNT(*) FROM events", &[], |row| row.int(0))?;
            let of_many = queues::waiting(c, &many[99], 10)?;
            Ok((queues::waiting(c, &server("owed.org"), 10)?, of_many, left))
        })
        .await
        .unwrap();
    assert_eq!((of_one.len(), of_many.len(), left), (1, 1, 2));
    for waiting in of_one.iter().chain(&of_many) {
        assert!(matches!(&waiting.what, queues::Cargo::Pdu(pdu) if !pdu.is_empty()));
    }
    assert!(matches!(fixture.load(Load::Head).await, Loaded::Head(None)));
}

pub async fn a_purged_room_can_be_joined_again(database: &Database) {
    let mut fixture = Fixture::joined(database).await;
    line(&mut fixture).await;
    let room = fixture.room.clone();
    assert!(
        fixture
            .store
            .write(move |c| purge::room(c, &room))
            .await
            .unwrap()
    );
    assert!(matches!(fixture.load(Load::Head).await, Loaded::Head(None)));
    let Loaded::Hosts(hosts) = fixture.load(Load::Hosts).await else {
        panic!()
    };
    assert!(hosts.is_empty());
    let left = fixture
        .store
        .read(|c| c.query_one("SELECT COUNT(*) FROM events", &[], |row| row.int(0)))
        .await
        .unwrap();
    assert_eq!(left, 0);
    let mut again = Fixture::new(database).await;
    again.store = fixture.store.clone();
    again
        .say(
            "@alice:localhost",
            "m.room.create",
            Some(""),
            json!({"room_version": "11"}),
        )
        .await;
    again.join("@alice:localhost").await;
    assert_eq!(again.head().await.local_joined.len(), 1);
}
