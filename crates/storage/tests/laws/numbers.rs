//! Numbers are given out before they are written.

use protocol::nid::EventNid;
use room::effect::{Load, Loaded, Stale, StateKey};
use serde_json::json;
use storage::apply::apply;
use storage::load::load;
use storage::{Store, events, states};

use super::rooms::{Fixture, Made, outlier};
use crate::engines::Database;

/// What another process sees that has the same database.
async fn another(fixture: &Fixture, database: &Database) -> Fixture {
    let mut other = Fixture::new(database).await;
    other.revision = fixture.revision;
    other.state = fixture.state.clone();
    other.tips = fixture.tips.clone();
    other
}

async fn written(store: &Store, made: &Made) -> Option<EventNid> {
    let id = made.pdu.event_id.clone();
    let found = store.read(move |c| events::nids(c, std::slice::from_ref(&id)));
    found.await.unwrap().into_values().next()
}

async fn made(fixture: &mut Fixture, user: &str) -> Made {
    let content = json!({"membership": "join"});
    fixture
        .make(user, "m.room.member", Some(user), content)
        .await
        .0
}

/// Stores it as an outlier.
async fn store(fixture: &Fixture, made: &Made) -> Result<(), Stale> {
    let mut writes = fixture.writes();
    writes.expect = None;
    writes.events.push(outlier(made));
    apply(&fixture.store, writes).await.unwrap().map(drop)
}

pub async fn a_number_is_written_with_what_bears_it(database: &Database) {
    let mut fixture = Fixture::joined(database).await;
    let carol = made(&mut fixture, "@carol:c.org").await;
    let dave = made(&mut fixture, "@dave:d.org").await;
    assert_ne!((carol.nid, carol.key), (dave.nid, dave.key));
    let again = fixture.intern(std::slice::from_ref(&carol.pdu)).await;
    assert_eq!((again[0].nid, again[0].key), (carol.nid, carol.key));
    assert_eq!(written(&fixture.store, &carol).await, None);
    store(&fixture, &carol).await.unwrap();
    assert_eq!(written(&fixture.store, &carol).await, Some(carol.nid));
    assert_eq!(written(&fixture.store, &dave).await, None);
    // One that is written, one that waits, and a new one.
    let content = json!({"membership": "join"});
    let erin = fixture.draft(
        "@e:e.org",
        "m.room.member",
        Some("@e:e.org"),
        content,
        &[],
        &[],
        9,
    );
    let all = [carol.pdu.clone(), dave.pdu.clone(), erin];
    let again = fixture.intern(&all).await;
    assert_eq!((again[0].nid, again[0].key), (carol.nid, carol.key));
    assert_eq!((again[1].nid, again[1].key), (dave.nid, dave.key));
    let new = (again[2].nid, again[2].key);
    assert!(new.0 > dave.nid && new.1 > dave.key);
}

/// What many are given at once leaves alone what one was given before.
pub async fn many_numbers_go_round_those_that_wait(database: &Database) {
    let mut fixture = Fixture::joined(database).await;
    let carol = made(&mut fixture, "@carol:c.org").await;
    let mut many = Vec::new();
    for n in 0..100 {
        let user = format!("@u{n}:u.org");
        let content = json!({"membership": "join"});
        many.push(fixture.draft(&user, "m.room.member", Some(&user), content, &[], &[], 9));
    }
    many.push(carol.pdu.clone());
    let mut numbered = fixture.intern(&many).await;
    let last = numbered.pop().unwrap();
    assert_eq!((last.nid, last.key), (carol.nid, carol.key));
    assert!(numbered.iter().all(|other| other.key != carol.key));
    let erin = made(&mut fixture, "@erin:e.org").await;
    assert!(numbered.iter().all(|other| other.key != erin.key));
    for made in [&numbered[5], &carol, &erin] {
        store(&fixture, made).await.unwrap();
        assert_eq!(written(&fixture.store, made).await, Some(made.nid));
    }
}

pub async fn two_processes_that_give_the_same_number_are_told_apart(database: &Database) {
    if !database.lasting {
        return;
    }
    let mut one = Fixture::joined(database).await;
    let mut two = another(&one, database).await;
    let carol = made(&mut one, "@carol:c.org").await;
    let dave = made(&mut two, "@dave:d.org").await;
    assert_eq!(carol.key, dave.key, "neither knows of the other");
    store(&one, &carol).await.unwrap();
    assert_eq!(store(&two, &dave).await, Err(Stale));
    assert_eq!(written(&one.store, &dave).await, None);
    let dave = two.intern(&[dave.pdu]).await.remove(0);
    assert_ne!(carol.key, dave.key);
    store(&two, &dave).await.unwrap();
    let keys: Vec<StateKey> = [&carol, &dave]
        .map(|made| (made.pdu.kind.clone(), made.pdu.state_key.clone().unwrap()))
        .to_vec();
    let room = one.room.clone();
    let found = one.store.read(move |c| {
        let row = storage::rooms::by_id(c, &room)?.unwrap();
        states::keys(c, row.nid, &keys)
    });
    let found: Vec<_> = found.await.unwrap().into_values().map(Some).collect();
    assert_eq!(found, [carol.key, dave.key]);
}

/// Whoever asks for many hears of the other number; whoever was given one before still holds it.
pub async fn a_number_that_another_process_overtook_is_never_stored(database: &Database) {
    if !database.lasting {
        return;
    }
    let mut one = Fixture::joined(database).await;
    let two = another(&one, database).await;
    let here = made(&mut one, "@carol:c.org").await;
    let there = two.intern(std::slice::from_ref(&here.pdu)).await.remove(0);
    store(&one, &here).await.unwrap();
    let mut many = Vec::new();
    for n in 0..100 {
        many.push(two.draft("@u:u.org", "m.room.message", None, json!({}), &[], &[], n));
    }
    many.push(here.pdu.clone());
    assert_eq!(two.intern(&many).await.pop().unwrap().nid, here.nid);
    assert_eq!(store(&two, &there).await, Err(Stale));
}

/// What is said to be new is not looked for. Should it have a number after all, nothing is stored.
pub async fn an_event_that_was_taken_for_new_is_found_when_it_is_stored(database: &Database) {
    if !database.lasting {
        return;
    }
    let mut one = Fixture::joined(database).await;
    let two = another(&one, database).await;
    let carol = made(&mut one, "@carol:c.org").await;
    store(&one, &carol).await.unwrap();
    let pdus = [carol.pdu.clone()];
    // The room is not known to it.
    assert_eq!(two.number(&pdus, true).await[0].nid, carol.nid);
    let two = another(&one, database).await;
    let (c, leave) = ("@carol:c.org", json!({"membership": "leave"}));
    let other = two.draft(c, "m.room.member", Some(c), leave, &[], &[], 9);
    assert_eq!(two.intern(&[other]).await[0].key, carol.key);
    let guess = two.number(&pdus, true).await.remove(0);
    assert!(guess.nid != carol.nid && guess.key == carol.key);
    assert_eq!(store(&two, &guess).await, Err(Stale));
    let found = two.number(&pdus, false).await.remove(0);
    assert_eq!((found.nid, found.key), (carol.nid, carol.key));
    store(&two, &found).await.unwrap();
}

pub async fn two_processes_that_number_one_event_agree_in_the_end(database: &Database) {
    if !database.lasting {
        return;
    }
    let mut one = Fixture::joined(database).await;
    let two = another(&one, database).await;
    let here = made(&mut one, "@carol:c.org").await;
    let there = two.intern(std::slice::from_ref(&here.pdu)).await.remove(0);
    assert_ne!(here.nid, there.nid);
    store(&one, &here).await.unwrap();
    assert_eq!(store(&two, &there).await, Err(Stale));
    let there = two.intern(&[there.pdu]).await.remove(0);
    assert_eq!((here.nid, here.key), (there.nid, there.key));
    // It is there already.
    store(&two, &there).await.unwrap();
    let question = Load::Known {
        ids: vec![here.pdu.event_id.clone()],
    };
    let Loaded::Known(known) = load(&two.store, &two.room, question).await.unwrap() else {
        panic!()
    };
    assert_eq!(known[&here.pdu.event_id].nid, here.nid);
}
