//! Batches of events: order, ends and depths.

use protocol::dag::{backward_extremities, depth_upon, forward_extremities, topological_order};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use serde_json::json;

use crate::world::{draft, event_id, pdu};

const V10: RoomVersion = RoomVersion::V10;

fn batch(edges: &[(&str, &[&str], &[&str])]) -> Vec<Pdu> {
    edges
        .iter()
        .map(|(id, prev, auth)| {
            let mut event = draft(id, "@a:one", "m.room.message", None, json!({}));
            event.prev = prev.iter().map(|id| (*id).to_owned()).collect();
            event.auth = auth.iter().map(|id| (*id).to_owned()).collect();
            pdu(V10, &event, 1)
        })
        .collect()
}

fn words(batch: &[Pdu]) -> Vec<&str> {
    topological_order(batch)
        .into_iter()
        .map(|place| &batch[place].event_id.as_str()[1..])
        .collect()
}

#[test]
fn j62_what_an_event_stands_on_comes_first() {
    let events = batch(&[
        ("e", &["d"], &["b"]),
        ("d", &["elsewhere"], &["c"]),
        ("c", &[], &["b", "a"]),
        ("a", &[], &[]),
        ("b", &["a"], &["a"]),
    ]);
    assert_eq!(words(&events), ["a", "b", "c", "d", "e"]);
}

#[test]
fn the_order_given_stands_where_nothing_speaks_against_it() {
    let events = batch(&[("c", &[], &[]), ("a", &[], &[]), ("b", &["x"], &[])]);
    assert_eq!(words(&events), ["c", "a", "b"]);
}

#[test]
fn circles_and_doubles_are_left_out() {
    let events = batch(&[
        ("a", &["b"], &[]),
        ("b", &["a"], &[]),
        ("above", &["a"], &[]),
        ("self", &["self"], &[]),
        ("fine", &[], &[]),
        ("fine", &[], &[]),
    ]);
    assert_eq!(words(&events), ["fine"]);
    assert_eq!(words(&[]), [""; 0]);
}

#[test]
fn a_batch_has_two_ends() {
    let events = batch(&[
        ("a", &["before", "long_before"], &[]),
        ("b", &["a", "before"], &["auth"]),
        ("c", &["a"], &[]),
    ]);
    let ids = |words: &[&str]| {
        words
            .iter()
            .map(|word| event_id(V10, word))
            .collect::<Vec<_>>()
    };
    let owned = |found: Vec<&_>| found.into_iter().cloned().collect::<Vec<_>>();
    assert_eq!(owned(forward_extremities(&events)), ids(&["b", "c"]));
    assert_eq!(
        owned(backward_extremities(&events)),
        ids(&["before", "long_before"])
    );
}

#[test]
fn depth_grows_to_the_limit_of_the_version() {
    assert_eq!(depth_upon(V10, []), 1);
    assert_eq!(depth_upon(V10, [4, 9, 2]), 10);
    assert_eq!(depth_upon(V10, [i64::MAX]), (1 << 53) - 1);
    assert_eq!(depth_upon(V10, [i64::MIN]), 1);
    assert_eq!(depth_upon(RoomVersion::V1, [i64::MAX - 1]), i64::MAX);
    assert_eq!(depth_upon(RoomVersion::V1, [i64::MAX]), i64::MAX);
}
