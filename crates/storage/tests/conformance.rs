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
    a_failed_write_leaves_nothing,
    a_panic_leaves_the_store_alive,
    a_reader_sees_one_snapshot,
    colliding_writes_add_up,
    lists_are_parameters,
    many_rows_are_written_at_once,
    numbers_are_never_given_twice,
    parameters_may_stand_in_any_order,
    positions_rise_without_gaps,
    texts_and_bytes_come_back_as_they_were,
    what_was_written_survives_a_reopening,
);
