//! The laws of a store, the same for every engine: SQLite in a file, SQLite in memory, and PostgreSQL where
//! `VESTIBULE_TEST_POSTGRES` names a server (`postgres://…`) on which databases may be created.

mod engines;
mod laws;

macro_rules! laws {
    ($($law:ident),* $(,)?) => {
        mod sqlite_memory {
            $(#[tokio::test]
            async fn $law() {
                crate::laws::$law(&crate::engines::Database::memory()).await;
            })*
        }
        mod sqlite_file {
            $(#[tokio::test]
            async fn $law() {
                crate::laws::$law(&crate::engines::Database::file()).await;
            })*
        }
        mod postgres {
            $(#[tokio::test]
            async fn $law() {
                if let Some(database) = crate::engines::Database::postgres().await {
                    crate::laws::$law(&database).await;
                }
            })*
        }
    };
}

laws!(
    a_closure_has_what_a_resolution_needs,
    a_failed_write_leaves_nothing,
    a_lease_has_one_holder,
    a_number_is_written_with_what_bears_it,
    a_number_that_another_process_overtook_is_never_stored,
    a_panic_leaves_the_store_alive,
    a_partial_room_becomes_full,
    a_purged_room_can_be_joined_again,
    a_read_that_asks_nothing_leaves_no_snapshot_behind,
    a_reader_sees_one_snapshot,
    a_room_has_the_version_that_its_state_came_with,
    a_room_reads_back_as_it_was_written,
    a_second_marker_changes_nothing_and_a_freed_room_has_none,
    a_stale_write_set_writes_nothing,
    a_state_change_in_a_big_room_costs_little,
    a_verdict_can_change,
    a_whole_copy_takes_the_place_of_a_redacted_one,
    an_auth_chain_is_the_same_with_and_without_the_log,
    an_event_that_was_taken_for_new_is_found_when_it_is_stored,
    an_out_of_band_membership_ends_with_a_real_one,
    an_outlier_can_be_given_a_place_once,
    colliding_writes_add_up,
    every_statement_is_one_that_the_engine_takes,
    failures_of_many_destinations_are_recorded_at_once,
    history_has_positions_below_zero,
    how_much_of_a_state_is_stored_is_known,
    lists_are_parameters,
    many_numbers_go_round_those_that_wait,
    many_rows_are_written_at_once,
    many_rows_may_be_there_already,
    many_writes_at_once_fail_one_by_one,
    members_are_found_by_room_user_and_server,
    missing_events_lie_between,
    numbers_are_never_given_twice,
    our_users_are_found_without_reading_the_others,
    parameters_may_stand_in_any_order,
    positions_rise_without_gaps,
    rejected_events_are_not_served,
    states_are_kept_at_every_event,
    texts_and_bytes_come_back_as_they_were,
    two_processes_that_give_the_same_number_are_told_apart,
    two_processes_that_number_one_event_agree_in_the_end,
    what_a_purged_room_owes_is_still_sent,
    what_agreed_entries_stand_on_is_found_from_below,
    what_goes_to_many_servers_is_spread_after_the_commit,
    what_goes_wrong_later_undoes_all,
    what_is_sent_waits_in_the_outbox,
    what_was_committed_survives_a_crash,
    what_was_partial_in_a_freed_room_is_not_trusted,
    what_was_written_survives_a_reopening,
);
