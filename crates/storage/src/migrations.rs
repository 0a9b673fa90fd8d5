//! Brings a database up to date, one numbered file after another.

use crate::auth_above;
use crate::driver::{Conn, Error, Result};

/// Every schema file, in order. A file that was released is never changed; a change is another file.
const FILES: &[(i64, &str, &str)] = &[
    (1, "rooms", include_str!("schema/001_rooms.sql")),
    (2, "accounts", include_str!("schema/002_accounts.sql")),
    (3, "rooms_extra", include_str!("schema/003_rooms_extra.sql")),
    (
        4,
        "blocked_rooms",
        include_str!("schema/004_blocked_rooms.sql"),
    ),
    (
        AUTH_ABOVE,
        "auth_above",
        include_str!("schema/005_auth_above.sql"),
    ),
    (
        6,
        "local_members",
        include_str!("schema/006_local_members.sql"),
    ),
    (
        7,
        "deferred_pdus",
        include_str!("schema/007_deferred_pdus.sql"),
    ),
    (
        8,
        "invited_members",
        include_str!("schema/008_invited_members.sql"),
    ),
    (9, "state_log", include_str!("schema/009_state_log.sql")),
];

/// Its table is filled from others, which takes more than a statement.
const AUTH_ABOVE: i64 = 5;

const CREATE: &str =
    "CREATE TABLE IF NOT EXISTS migrations (number BIGINT PRIMARY KEY, name TEXT NOT NULL)";
const LAST: &str = "SELECT MAX(number) FROM migrations";
const RECORD: &str = "INSERT INTO migrations (number, name) VALUES ($1, $2)";

/// The number of the newest schema file.
pub fn newest() -> i64 {
    FILES.last().map_or(0, |(number, _, _)| *number)
}

/// Applies the files that are missing, all in this one transaction.
pub(crate) fn run(c: &mut dyn Conn, dialect: fn(&str) -> String) -> Result<()> {
    c.execute(CREATE, &[])?;
    let last = c.query_int(LAST, &[])?.unwrap_or(0);
    let newest = newest();
    if last > newest {
        return Err(Error::Refused(format!(
            "the database has schema {last}, this program knows {newest}: it was made by a later version"
        )));
    }
    for (number, name, text) in FILES.iter().filter(|(number, _, _)| *number > last) {
        for statement in statements(&dialect(text)) {
            c.execute(&statement, &[])?;
        }
        if *number == AUTH_ABOVE {
            auth_above::fill(c)?;
        }
        c.execute(RECORD, &[number, name])?;
    }
    Ok(())
}

/// The statements of a schema file, without comments (`--` to the end of the line).
fn statements(text: &str) -> Vec<String> {
    let bare: String = text
        .lines()
        .map(|line| line.split_once("--").map_or(line, |(sql, _)| sql))
        .collect::<Vec<_>>()
        .join("\n");
    bare.split(';')
        .map(str::trim)
        .filter(|statement| !statement.is_empty())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_numbered_without_gaps() {
        for (place, (number, _, _)) in FILES.iter().enumerate() {
            assert_eq!(*number, i64::try_from(place).unwrap() + 1);
        }
    }

    #[test]
    fn comments_and_blank_statements_are_dropped() {
        let found = statements("-- a; b\nCREATE TABLE a (b TEXT); -- c;\n\n;\nCREATE INDEX x");
        assert_eq!(found, ["CREATE TABLE a (b TEXT)", "CREATE INDEX x"]);
    }
}
