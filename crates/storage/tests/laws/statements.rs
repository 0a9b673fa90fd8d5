//! Every SQL constant of the crate, looked at by the engine.

use std::path::Path;

use crate::engines::Database;

pub async fn every_statement_is_one_that_the_engine_takes(database: &Database) {
    let store = database.open().await;
    let mut statements = Vec::new();
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for entry in std::fs::read_dir(sources).unwrap() {
        let path = entry.unwrap().path();
        // The drivers' own texts are no statements of the common kind.
        let own = ["sqlite.rs", "statistics.rs", "postgres.rs", "migrations.rs"];
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if name.ends_with(".rs") && !own.contains(&&*name) {
            let text = std::fs::read_to_string(&path).unwrap();
            statements.extend(constants(&text).into_iter().map(|sql| (name.clone(), sql)));
        }
    }
    assert!(statements.len() > 100, "only {} found", statements.len());
    let mut refused = Vec::new();
    for (name, sql) in statements {
        let asked = sql.clone();
        if let Err(error) = store.write(move |c| c.prepare(&asked)).await {
            refused.push(format!("{name}: {sql}\n  {error}"));
        }
    }
    assert!(refused.is_empty(), "{}", refused.join("\n"));
}

pub async fn our_users_are_found_without_reading_the_others(database: &Database) {
    if !database.is_sqlite() {
        return;
    }
    let store = database.open().await;
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/rooms.rs");
    let text = std::fs::read_to_string(source).unwrap();
    let ours = |sql: &String| sql.contains("FROM memberships") && sql.contains("local = 1");
    let statements: Vec<String> = constants(&text).into_iter().filter(ours).collect();
    assert!(!statements.is_empty());
    for sql in statements {
        let asked = format!("EXPLAIN QUERY PLAN {sql}");
        let plan = store
            .read(move |c| c.query_all(&asked, &[&1_i64], |row| Ok(row.text(3)?.to_owned())))
            .await
            .unwrap();
        // A statement may ask other tables, too; none is read from end to end.
        let ours = |step: &&String| step.contains("memberships");
        let uses = |step: &String| step.contains("memberships_local (room_nid=? AND membership=?)");
        assert!(plan.iter().filter(ours).count() == 1, "{sql}: {plan:?}");
        assert!(plan.iter().filter(ours).all(uses), "{sql}: {plan:?}");
        assert!(
            !plan.iter().any(|step| step.starts_with("SCAN")),
            "{sql}: {plan:?}"
        );
    }
}

/// The string constants of a source text that are SQL.
fn constants(source: &str) -> Vec<String> {
    let mut found = Vec::new();
    for part in source.split(": &str =").skip(1) {
        let Some(literal) = part.trim_start().strip_prefix('"') else {
            continue;
        };
        let mut text = String::new();
        let mut chars = literal.chars();
        while let Some(c) = chars.next() {
            match c {
                '"' => break,
                '\\' => text.extend(chars.next()),
                other => text.push(other),
            }
        }
        let verbs = ["SELECT", "INSERT", "UPDATE", "DELETE", "WITH"];
        if verbs.iter().any(|verb| text.starts_with(verb)) {
            found.push(text);
        }
    }
    found
}
