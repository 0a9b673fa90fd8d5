//! Seeds that once broke a law. Each is named for what was wrong.

use simulation::fixture::Fixture;
use simulation::house::{self, Mode};
use simulation::{machine, room};

fn check_room(seed: u64) {
    if let Err((broken, _)) = room::run(seed) {
        panic!("room seed {seed}: {broken}");
    }
}

fn check_house(seed: u64) {
    if let Err((broken, _)) = house::run(seed, Mode::Safety, false) {
        panic!("house seed {seed}: {broken}");
    }
}

#[test]
fn a_lost_event_answer_left_a_hole_in_the_full_state() {
    for seed in [9, 35, 36] {
        check_room(seed);
    }
}

#[test]
fn a_join_that_came_as_an_event_before_its_answer_was_placed_twice() {
    check_room(87);
}

#[test]
fn version_12_auth_events_were_rejected_for_want_of_the_create_event() {
    check_room(208);
}

#[test]
fn a_second_join_was_left_out_of_the_state_it_made() {
    check_room(265);
}

#[test]
fn a_room_given_up_left_reduced_state_that_a_later_join_took_for_full() {
    for seed in [432, 1118, 1423] {
        check_room(seed);
    }
}

#[test]
fn a_join_known_as_an_outlier_was_taken_and_not_stored() {
    check_room(3911);
}

#[test]
fn a_ban_in_the_middle_of_a_gap_hid_what_came_after_it() {
    for seed in [5675, 6326, 12828] {
        check_room(seed);
    }
}

/// The event that put a server out of the room was lost, and after that all refused it its state.
#[test]
fn a_server_that_only_thinks_it_is_in_the_room_asks_rarely_until_its_users_leave() {
    for seed in [876, 1478, 1919] {
        check_room(seed);
    }
}

#[test]
fn a_leave_whose_past_could_not_be_asked_for_was_refused_and_is_not_sent_again() {
    check_room(2693);
}

#[test]
fn the_state_of_a_room_that_nobody_is_in_was_held_to_verdicts_found_later() {
    check_room(12172);
}

/// A send_join was held up for longer than the debt of its join was offered.
#[test]
fn a_join_that_came_in_after_its_debt_was_settled_left_a_ghost() {
    check_room(700_995);
}

#[test]
fn a_template_of_a_wrong_version_named_the_version_of_the_room_for_good() {
    for seed in [27, 110] {
        check_house(seed);
    }
}

#[test]
fn one_seed_of_whole_servers_gives_one_trace() {
    for seed in [3, 4] {
        let run = || house::run(seed, Mode::Safety, false);
        assert_eq!(run(), run());
    }
}

#[test]
fn one_seed_gives_one_trace() {
    let fixture = Fixture::new();
    for seed in [1, 17, 39] {
        let trace = || {
            machine::run(&fixture, seed)
                .map(|run| run.trace)
                .expect("the laws hold")
        };
        assert_eq!(trace(), trace());
        let trace = || {
            room::run(seed)
                .map(|run| run.trace)
                .map_err(|(broken, _)| broken)
        };
        assert_eq!(trace(), trace());
    }
}
