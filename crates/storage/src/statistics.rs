//! What SQLite's planner is told of the sizes of tables. Without that it takes ten rows for what it finds under
//! any key, and so reads a whole room's timeline where an index has it all under one room. The figures are those
//! of a server with rooms of all sizes, whatever a database holds, so that a statement's plan is the same
//! everywhere. (PostgreSQL counts by itself.)

use crate::driver::{Conn, Result};
use crate::row;

/// Table, index, and as the column `stat` of `sqlite_stat1` has it: how many rows there are, then how many of
/// them are alike in the first column of the index, in the first two, and so on.
const FIGURES: &[(&str, Option<&str>, &str)] = &[
    ("events", None, "1000000"),
    ("events", Some("events_by_depth"), "500000 5000 2 1"),
    ("events", Some("events_by_position"), "500000 1"),
    ("events", Some("events_by_time"), "500000 5000 2"),
    ("events", Some("events_of_room"), "500000 5000 1"),
    ("events", Some("events_partial"), "1000 100 1"),
    ("fan_outs", None, "10"),
    (
        "memberships",
        Some("memberships_by_position"),
        "1000000 10000 10",
    ),
    ("memberships", Some("memberships_invited"), "1000 10 10"),
    ("memberships", Some("memberships_local"), "1000 10 5 1"),
    ("memberships", Some("memberships_of_user"), "1000000 3 2"),
    (
        "memberships",
        Some("sqlite_autoindex_memberships_1"),
        "1000000 10000 1",
    ),
    ("outbox", Some("sqlite_autoindex_outbox_1"), "1000 10 1"),
    ("partial_rooms", None, "10"),
    (
        "partial_servers",
        Some("sqlite_autoindex_partial_servers_1"),
        "100 10 1",
    ),
    ("relations", Some("relations_by_parent"), "100000 3 2 2"),
    ("room_hosts", Some("room_hosts_by_server"), "100000 20"),
    (
        "room_hosts",
        Some("sqlite_autoindex_room_hosts_1"),
        "100000 1000 1",
    ),
    (
        "state_keys",
        Some("sqlite_autoindex_state_keys_1"),
        "1000000 10000 1",
    ),
    (
        "state_keys",
        Some("state_keys_by_name"),
        "1000000 10000 5000 1",
    ),
];

/// Makes the table if it is not there, and has the connection read it.
const READ: &str = "ANALYZE sqlite_schema";
const ALL: &str = "SELECT tbl, idx, stat FROM sqlite_stat1 ORDER BY tbl, idx";
const EMPTY: &str = "DELETE FROM sqlite_stat1";
const INSERT: &str = "INSERT INTO sqlite_stat1 (tbl, idx, stat) VALUES ($1, $2, $3)";

/// Writes the figures where others stand. Connections that have read the schema before do not see them.
pub(crate) fn write(c: &mut dyn Conn) -> Result<()> {
    c.execute(READ, &[])?;
    let there = c.query_all(ALL, &[], |row| {
        Ok((row.string(0)?, row.opt_string(1)?, row.string(2)?))
    })?;
    let there = there
        .iter()
        .map(|(table, index, stat)| (table.as_str(), index.as_deref(), stat.as_str()));
    if there.eq(FIGURES.iter().copied()) {
        return Ok(());
    }
    c.execute(EMPTY, &[])?;
    let rows: Vec<_> = FIGURES
        .iter()
        .map(|(table, index, stat)| row![*table, *index, *stat])
        .collect();
    c.execute_many(INSERT, &rows)?;
    c.execute(READ, &[]).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::{Param, Value};
    use crate::{Options, Store};

    async fn plan(store: &Store, sql: &'static str) -> String {
        let steps = store.read(move |c| {
            let asked = format!("EXPLAIN QUERY PLAN {sql}");
            let named = (1..).take_while(|n| sql.contains(&format!("${n}")));
            let nulls: Vec<&dyn Param> = named.map(|_| &Value::Null as &dyn Param).collect();
            c.query_all(&asked, &nulls, |row| row.string(3))
        });
        steps.await.unwrap().join("\n")
    }

    async fn store() -> (Store, tempfile::TempDir) {
        let home = tempfile::tempdir().unwrap();
        let url = format!("sqlite:{}", home.path().join("a.db").display());
        (Store::open(&url, Options::default()).await.unwrap(), home)
    }

    /// What is known by number, or by what it relates to, is not looked for in the timeline of a room.
    #[tokio::test]
    async fn no_timeline_is_read_for_a_few_events() {
        let (store, _home) = store().await;
        for sql in [
            crate::load::STATES,
            crate::load::CHILDREN,
            crate::load::DEPENDENTS,
            crate::relations::CHILDREN,
            crate::relations::BACK,
            crate::relations::FORTH,
            crate::federation_reads::PLACED,
            crate::apply::BUILT_ON,
        ] {
            let plan = plan(&store, sql).await;
            let by_number = plan.lines().any(|step| {
                step.ends_with("USING INTEGER PRIMARY KEY (rowid=?)")
                    && (step.contains(" e ") || step.contains(" events "))
            });
            assert!(by_number, "{sql}\n{plan}");
        }
    }

    /// A page of a timeline is read in its order, and not sorted out of all of it.
    #[tokio::test]
    async fn a_page_of_a_timeline_is_read_in_order() {
        let (store, _home) = store().await;
        for sql in [
            crate::timeline::NEWEST,
            crate::timeline::BACK,
            crate::timeline::FORTH,
        ] {
            let plan = plan(&store, sql).await;
            assert!(!plan.contains("ORDER BY"), "{sql}\n{plan}");
        }
    }

    #[tokio::test]
    async fn the_figures_stay_over_a_restart() {
        let (store, home) = store().await;
        drop(store);
        let url = format!("sqlite:{}", home.path().join("a.db").display());
        let store = Store::open(&url, Options::default()).await.unwrap();
        let count = store.read(|c| c.query_int("SELECT COUNT(*) FROM sqlite_stat1", &[]));
        assert_eq!(count.await.unwrap(), Some(FIGURES.len() as i64));
    }
}
