//! What is made for rooms of many members and many servers: the log of a room's state events, and events that
//! are spread to their servers after the commit.

use std::collections::{BTreeMap, BTreeSet};

use protocol::id::{EventId, ServerName};
use protocol::nid::EventNid;
use room::write::{FanOut, WriteSet};
use serde_json::json;
use storage::apply::apply;
use storage::queues::{self, Cargo, Destination, Failed, Patience, Queued};
use storage::{Conn, Store, rooms, state_log};

use super::rooms::{Fixture, outlier, server};
use crate::engines::Database;

/// More than what is looked up one by one.
const EVENTS: usize = 600;

/// The auth chain of all these events and the ids of the same, as the store tells them.
async fn told(
    store: &Store,
    fixture: &Fixture,
    events: &[EventNid],
) -> (Vec<EventNid>, BTreeSet<String>) {
    let (room, events) = (fixture.room.clone(), events.to_vec());
    let told = store.read(move |c| {
        let room = rooms::by_id(c, &room)?.unwrap().nid;
        let mut ids = String::from("[");
        state_log::write_ids(c, room, &events, &mut ids)?;
        Ok((state_log::auth_chain(c, room, &events)?, ids + "]"))
    });
    let (chain, ids) = told.await.unwrap();
    let ids: Vec<String> = serde_json::from_str(&ids.replacen("[,", "[", 1)).unwrap();
    let set: BTreeSet<String> = ids.iter().cloned().collect();
    assert_eq!(set.len(), ids.len(), "an id comes twice");
    (chain, set)
}

pub async fn an_auth_chain_is_the_same_with_and_without_the_log(database: &Database) {
    let fixture = Fixture::joined(database).await;
    // Each on the one in the middle of those before it, and some on one that nobody has.
    let mut pdus = Vec::new();
    for number in 0..EVENTS {
        let who = format!("@user{number}:b.org");
        let mut auth: Vec<EventId> = Vec::new();
        if number > 0 {
            let before: &std::sync::Arc<protocol::pdu::Pdu> = &pdus[number / 2];
            auth.push(before.event_id.clone());
        }
        if number % 100 == 7 {
            auth.push(EventId::parse(&format!("$nowhere{number}")).unwrap());
        }
        let content = json!({ "membership": "join" });
        pdus.push(fixture.draft(&who, "m.room.member", Some(&who), content, &[], &auth, 9));
    }
    let made = fixture.intern(&pdus).await;
    // The last comes in a commit of its own, and one of the middle later than those that stand on it.
    let (late, last) = (40, EVENTS - 1);
    let mut commits = [Vec::new(), vec![last], vec![late]];
    commits[0].extend((0..last).filter(|number| *number != late));
    for (nth, numbers) in commits.iter().enumerate() {
        let mut writes = WriteSet::new(fixture.room.clone(), pdus[0].version);
        writes.events = numbers
            .iter()
            .map(|number| outlier(&made[*number]))
            .collect();
        apply(&fixture.store, writes).await.unwrap().unwrap();
        if nth == 0 {
            // From here on a graph is in memory.
            let nids: Vec<EventNid> = numbers.iter().map(|number| made[*number].nid).collect();
            let (chain, _) = told(&fixture.store, &fixture, &nids).await;
            assert!(!chain.contains(&made[late].nid));
        }
    }
    let nids: Vec<EventNid> = made.iter().map(|made| made.nid).collect();
    let in_chain = (0..EVENTS).filter(|number| number * 2 < EVENTS);
    let expected: BTreeSet<EventNid> = in_chain.map(|number| made[number].nid).collect();
    let expected: Vec<EventNid> = expected.into_iter().collect();
    let ids: BTreeSet<String> = pdus.iter().map(|pdu| pdu.event_id.to_string()).collect();
    let whole = (expected, ids);
    assert_eq!(told(&fixture.store, &fixture, &nids).await, whole);
    if database.lasting {
        assert_eq!(told(&database.open().await, &fixture, &nids).await, whole);
        let drop = |c: &mut dyn Conn| c.execute("DELETE FROM state_log", &[]);
        assert_eq!(fixture.store.write(drop).await.unwrap(), 5);
        assert_eq!(told(&database.open().await, &fixture, &nids).await, whole);
    }
}

pub async fn what_goes_to_many_servers_is_spread_after_the_commit(database: &Database) {
    let mut fixture = Fixture::joined(database).await;
    let servers: Vec<ServerName> = (0..1_200).map(|n| server(&format!("s{n}.org"))).collect();
    let mut sent = Vec::new();
    for n in 0..2 {
        let content = json!({ "n": n });
        let alice = "@alice:localhost";
        let (made, state) = fixture.make(alice, "m.room.message", None, content).await;
        let mut writes = fixture.appending(&made, state);
        // Somebody may be named twice.
        let named = servers.iter().chain(&servers[..3]).cloned();
        writes.events[0].fan_out = FanOut::Servers(named.collect());
        let applied = fixture.commit(writes).await.unwrap();
        assert!(applied.fans_out && applied.destinations.is_empty());
        sent.push(made);
    }
    // What is queued later comes later, also where it overtakes.
    let (newest, few) = (sent[1].nid, [&servers[..3], &servers[..1]].concat());
    let queued = fixture
        .store
        .write(move |c| queues::enqueue_event(c, newest, &few, 64));
    assert_eq!(queued.await.unwrap(), Queued::Waiting);
    let spread = async |from: i64, wanted: fn(&ServerName) -> bool| {
        let spread = fixture
            .store
            .write(move |c| queues::spread(c, from, &wanted));
        spread.await.unwrap()
    };
    // Some first, of each event; then the others.
    let nines = |server: &ServerName| server.as_str().ends_with("9.org");
    let first = spread(0, nines).await.unwrap();
    assert_eq!((first.servers.len(), first.left.len()), (120, 1_080));
    assert!(first.servers.iter().all(nines) && !first.left.iter().any(nines) && !first.is_full());
    let second = spread(first.number + 1, nines).await.unwrap();
    assert_eq!(second.servers, first.servers);
    assert_eq!(spread(second.number + 1, nines).await, None);
    assert!(spread(0, nines).await.unwrap().servers.is_empty());
    for left in [580, 80, 0, 580, 80, 0] {
        let spread = spread(0, |_| true).await.unwrap();
        assert_eq!((spread.left.len(), spread.is_full()), (left, left > 0));
    }
    assert_eq!(spread(0, |_| true).await, None);
    let pdu = |nth: usize| Cargo::Pdu(sent[nth].pdu.json.to_string());
    let expected = [
        (0, vec![0, 1, 1]),
        (2, vec![0, 1, 1]),
        (9, vec![0, 1]),
        (1_198, vec![0, 1]),
    ];
    for (server, expected) in expected {
        let asked = servers[server].clone();
        let waiting = fixture.store.read(move |c| queues::waiting(c, &asked, 10));
        let waiting: Vec<Cargo> = waiting.await.unwrap().into_iter().map(|w| w.what).collect();
        let expected: Vec<Cargo> = expected.into_iter().map(pdu).collect();
        assert_eq!(waiting, expected);
    }
}

pub async fn failures_of_many_destinations_are_recorded_at_once(database: &Database) {
    const PATIENCE: Patience = Patience {
        first_ms: 10,
        stranger_ms: 100,
        max_ms: 250,
        keep: 3,
    };
    let mut fixture = Fixture::joined(database).await;
    let [known, stranger, idle, far_behind] =
        ["known.org", "stranger.org", "idle.org", "behind.org"].map(server);
    let mut sent = Vec::new();
    for n in 0..4 {
        let content = json!({ "n": n });
        let alice = "@alice:localhost";
        let (made, state) = fixture.make(alice, "m.room.message", None, content).await;
        let mut writes = fixture.appending(&made, state);
        let some = [known.clone(), stranger.clone()];
        let few = some.into_iter().filter(|_| n == 0);
        writes.events[0].fan_out = FanOut::Servers(few.chain([far_behind.clone()]).collect());
        fixture.commit(writes).await.unwrap();
        sent.push(made);
    }
    let answered = Destination {
        last_success_ms: Some(1),
        ..Destination::default()
    };
    let (name, state) = (known.clone(), answered.clone());
    let save = fixture
        .store
        .write(move |c| queues::save_destination(c, &name, &state));
    save.await.unwrap();
    let all = [known, stranger, idle, far_behind];
    for (now_ms, pauses) in [
        (1_000, [10, 100, 100, 100]),
        (2_000, [20, 200, 200, 200]),
        (3_000, [40, 250, 250, 250]),
    ] {
        let servers = all.clone();
        let failed = move |c: &mut dyn Conn| queues::failed(c, &servers, now_ms, PATIENCE);
        let failed = fixture.store.write(failed).await.unwrap();
        let waits = [true, true, false, true];
        let expected = pauses.into_iter().zip(waits);
        let expected: Vec<_> = expected
            .map(|(pause_ms, waits)| Failed { pause_ms, waits })
            .collect();
        assert_eq!(failed, expected);
        let stored = fixture.store.read(queues::destinations).await.unwrap();
        let stored: BTreeMap<_, _> = stored.into_iter().collect();
        for (server, pause_ms) in all.iter().zip(pauses) {
            let expected = Destination {
                failing_since_ms: Some(1_000),
                retry_at_ms: Some(now_ms + pause_ms),
                interval_ms: Some(pause_ms),
                last_success_ms: answered.last_success_ms.filter(|_| *server == all[0]),
            };
            assert_eq!(stored[server], expected, "{server}");
        }
    }
    // Of more than is kept only the newest of a room stays.
    for (server, expected) in [(&all[0], vec![0]), (&all[3], vec![3])] {
        let asked = server.clone();
        let waiting = fixture.store.read(move |c| queues::waiting(c, &asked, 10));
        let waiting: Vec<Cargo> = waiting.await.unwrap().into_iter().map(|w| w.what).collect();
        let pdu = |nth: usize| Cargo::Pdu(sent[nth].pdu.json.to_string());
        assert_eq!(waiting, expected.into_iter().map(pdu).collect::<Vec<_>>());
    }
}
