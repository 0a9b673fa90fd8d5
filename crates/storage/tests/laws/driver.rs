//! Transactions, parameters, streams and numbers.

use std::sync::mpsc;

use storage::streams::{self, Stream};
use storage::{Conn, Error, Result, Sequence, row, texts};

use crate::engines::Database;

const CREATE: &str = "CREATE TABLE scratch (a BIGINT PRIMARY KEY, b TEXT, c BYTEA)";
const INSERT: &str = "INSERT INTO scratch (a, b) VALUES ($1, $2)";
const COUNT: &str = "SELECT COUNT(*) FROM scratch";

async fn scratch(database: &Database) -> storage::Store {
    let store = database.open().await;
    // BYTEA is a word of the schema files; a column of it holds bytes in SQLite too.
    store.write(|c| c.execute(CREATE, &[])).await.unwrap();
    store
}

fn count(c: &mut dyn Conn) -> Result<i64> {
    c.query_one(COUNT, &[], |row| row.int(0))
}

pub async fn a_failed_write_leaves_nothing(database: &Database) {
    let store = scratch(database).await;
    let outcome: Result<()> = store
        .write(|c| {
            c.execute(INSERT, &[&1_i64, &"one"])?;
            Err(Error::Refused("no".to_owned()))
        })
        .await;
    assert!(matches!(outcome, Err(Error::Refused(_))));
    let outcome = store
        .write(|c| {
            c.execute(INSERT, &[&2_i64, &"two"])?;
            c.execute(INSERT, &[&2_i64, &"again"])
        })
        .await;
    assert!(matches!(outcome, Err(Error::Constraint(_))), "{outcome:?}");
    assert_eq!(store.read(count).await.unwrap(), 0);
}

pub async fn what_goes_wrong_later_undoes_all(database: &Database) {
    let store = scratch(database).await;
    let twice = |c: &mut dyn Conn, n: i64| {
        c.later(INSERT, &[row![n, "once"]])?;
        c.later(INSERT, &[row![n, "again"]])
    };
    let outcome = store.write(move |c| twice(c, 1)).await;
    assert!(matches!(outcome, Err(Error::Constraint(_))), "{outcome:?}");
    let looked = store.write(move |c| twice(c, 1).and_then(|()| count(c)));
    let looked = looked.await;
    assert!(matches!(looked, Err(Error::Constraint(_))), "{looked:?}");
    let counted = store.write(|c| {
        c.later(INSERT, &[row![1_i64, "one"], row![2_i64, "two"]])?;
        count(c)
    });
    assert_eq!(counted.await.unwrap(), 2);
    // So many that they share a transaction, and more in one than may be under way.
    let writes = (0..60).map(|n| {
        store.write(move |c| {
            for m in 0..100 {
                c.later(INSERT, &[row![1_000 * (n + 1) + m, "one"]])?;
            }
            if n == 20 { twice(c, 10) } else { Ok(()) }
        })
    });
    for (n, outcome) in futures::future::join_all(writes).await.iter().enumerate() {
        assert_eq!(outcome.is_err(), n == 20, "{n}: {outcome:?}");
    }
    assert_eq!(store.read(count).await.unwrap(), 2 + 59 * 100);
}

pub async fn a_panic_leaves_the_store_alive(database: &Database) {
    let store = scratch(database).await;
    for _ in 0..20 {
        let outcome: Result<()> = store
            .write(|c| {
                c.execute(INSERT, &[&1_i64, &"one"])?;
                panic!("on purpose")
            })
            .await;
        assert!(matches!(outcome, Err(Error::Panicked(text)) if text == "on purpose"));
        let outcome: Result<()> = store.read(|_| panic!("on purpose")).await;
        assert!(matches!(outcome, Err(Error::Panicked(_))));
    }
    assert_eq!(store.read(count).await.unwrap(), 0);
}

pub async fn a_reader_sees_one_snapshot(database: &Database) {
    let store = scratch(database).await;
    if !database.lasting {
        // In memory there is one connection: nothing runs beside a reader.
        return;
    }
    let (in_snapshot, reader_began) = mpsc::channel();
    let (written, writer_ended) = mpsc::channel();
    let reader = store.clone();
    let reading = tokio::spawn(async move {
        reader
            .read(move |c| {
                let before = count(c)?;
                in_snapshot.send(()).unwrap();
                writer_ended.recv().unwrap();
                Ok((before, count(c)?))
            })
            .await
    });
    tokio::task::spawn_blocking(move || reader_began.recv())
        .await
        .unwrap()
        .unwrap();
    store
        .write(|c| c.execute(INSERT, &[&1_i64, &"one"]))
        .await
        .unwrap();
    written.send(()).unwrap();
    assert_eq!(reading.await.unwrap().unwrap(), (0, 0));
    assert_eq!(store.read(count).await.unwrap(), 1);
}

pub async fn colliding_writes_add_up(database: &Database) {
    let store = scratch(database).await;
    store
        .write(|c| c.execute(INSERT, &[&1_i64, &"0"]))
        .await
        .unwrap();
    // Each reads, then writes what it read plus one: lost updates unless transactions are serialised.
    let tasks: Vec<_> = (0..40)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move {
                store
                    .write(|c| {
                        let read = "SELECT b FROM scratch WHERE a = 1";
                        let found = c.query_one(read, &[], |row| row.string(0))?;
                        let next = found.parse::<i64>().unwrap() + 1;
                        c.execute(
                            "UPDATE scratch SET b = $1 WHERE a = 1",
                            &[&next.to_string()],
                        )
                    })
                    .await
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    let last = store
        .read(|c| c.query_one("SELECT b FROM scratch", &[], |row| row.string(0)))
        .await
        .unwrap();
    assert_eq!(last, "40");
}

/// Engines take several waiting writes into one commit; each still stands or falls by itself.
pub async fn many_writes_at_once_fail_one_by_one(database: &Database) {
    let store = scratch(database).await;
    let tasks: Vec<_> = (0..300_i64)
        .map(|n| {
            let store = store.clone();
            tokio::spawn(async move {
                let outcome: Result<()> = store
                    .write(move |c| {
                        if n % 10 == 4 {
                            // Nothing at all is one of the things that a write may do.
                            return Ok(());
                        }
                        c.execute(INSERT, &[&n, &"mine"])?;
                        match n % 10 {
                            1 => Err(Error::Refused("no".to_owned())),
                            2 => c.execute(INSERT, &[&n, &"again"]).map(drop),
                            3 => panic!("on purpose"),
                            _ => Ok(()),
                        }
                    })
                    .await;
                match n % 10 {
                    1 => assert!(matches!(outcome, Err(Error::Refused(_))), "{outcome:?}"),
                    2 => assert!(matches!(outcome, Err(Error::Constraint(_))), "{outcome:?}"),
                    3 => assert!(matches!(outcome, Err(Error::Panicked(_))), "{outcome:?}"),
                    _ => outcome.unwrap(),
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let kept = store
        .read(|c| c.query_all("SELECT a FROM scratch ORDER BY a", &[], |row| row.int(0)))
        .await
        .unwrap();
    let expected: Vec<i64> = (0..300).filter(|n| !(1..=4).contains(&(n % 10))).collect();
    assert_eq!(kept, expected);
}

pub async fn a_read_that_asks_nothing_leaves_no_snapshot_behind(database: &Database) {
    let store = scratch(database).await;
    for n in 0..50_i64 {
        let asked = store.read(count);
        let silent = store.read(|_| Ok(()));
        let (asked, silent) = tokio::join!(asked, silent);
        silent.unwrap();
        assert_eq!(asked.unwrap(), n);
        store
            .write(move |c| c.execute(INSERT, &[&n, &"one"]))
            .await
            .unwrap();
    }
}

pub async fn lists_are_parameters(database: &Database) {
    let store = scratch(database).await;
    let found = store
        .write(|c| {
            for (a, b) in [(1_i64, "one"), (2, "two"), (3, "three")] {
                c.execute(INSERT, &[&a, &b])?;
            }
            let by_number =
                "SELECT a FROM scratch WHERE a IN (SELECT value FROM rarray($1)) ORDER BY a";
            let by_text =
                "SELECT a FROM scratch WHERE b IN (SELECT value FROM rarray_text($1)) ORDER BY a";
            let numbers = vec![3_i64, 1, 7];
            let names = vec!["two".to_owned(), "three".to_owned()];
            Ok((
                c.query_all(by_number, &[&numbers], |row| row.int(0))?,
                c.query_all(by_text, &[&texts(&names)], |row| row.int(0))?,
                c.query_all(by_number, &[&Vec::<i64>::new()], |row| row.int(0))?,
            ))
        })
        .await
        .unwrap();
    assert_eq!(found, (vec![1, 3], vec![2, 3], vec![]));
}

pub async fn many_rows_are_written_at_once(database: &Database) {
    let store = scratch(database).await;
    let changed = store
        .write(|c| {
            let names: Vec<String> = (0..3000).map(|n| format!("name {n}")).collect();
            let rows: Vec<_> = names
                .iter()
                .enumerate()
                .map(|(n, name)| row![i64::try_from(n).unwrap(), name])
                .collect();
            c.execute_many(INSERT, &rows)
        })
        .await
        .unwrap();
    assert_eq!(changed, 3000);
    let last = store
        .read(|c| c.query_one("SELECT b FROM scratch WHERE a = 2999", &[], |r| r.string(0)))
        .await
        .unwrap();
    assert_eq!(last, "name 2999");
}

pub async fn many_rows_may_be_there_already(database: &Database) {
    let store = scratch(database).await;
    const KEEP: &str = "INSERT INTO scratch (a, b) VALUES ($1, $2) ON CONFLICT (a) DO NOTHING";
    const REPLACE: &str = "INSERT INTO scratch (a, b) VALUES ($1, $2)
        ON CONFLICT (a) DO UPDATE SET b = excluded.b";
    for count in [5_i64, 100, 3000] {
        let (kept, replaced, found) = store
            .write(move |c| {
                c.execute("DELETE FROM scratch", &[])?;
                let twice = (0..count).chain(0..count);
                let all: Vec<_> = twice.map(|n| row![n, "first"]).collect();
                let kept = c.execute_many(KEEP, &all)?;
                let some: Vec<_> = (0..count * 2)
                    .map(|n| row![n, (n % 2 == 0).then_some("second")])
                    .collect();
                c.execute_many(KEEP, &some)?;
                let again: Vec<_> = [1, 2, 3, 1].map(|n| row![n, "third"]).into();
                let replaced = c.execute_many(REPLACE, &again)?;
                let sql = "SELECT b FROM scratch ORDER BY a";
                let found = c.query_all(sql, &[], |row| row.opt_string(0))?;
                Ok((kept, replaced, found))
            })
            .await
            .unwrap();
        assert_eq!((kept, replaced), (u64::try_from(count).unwrap(), 4));
        let expected: Vec<Option<&str>> = (0..count * 2)
            .map(|n| match n {
                1..=3 => Some("third"),
                n if n < count => Some("first"),
                n if n % 2 == 0 => Some("second"),
                _ => None,
            })
            .collect();
        let found: Vec<Option<&str>> = found.iter().map(Option::as_deref).collect();
        assert_eq!(found, expected);
    }
}

pub async fn numbers_are_never_given_twice(database: &Database) {
    let store = database.open().await;
    let first = store.numbers(Sequence::Events, 10).await.unwrap();
    let second = store.numbers(Sequence::Events, 5000).await.unwrap();
    let third = store.number(Sequence::Events).await.unwrap();
    assert_eq!((first.start, first.end), (1, 11));
    assert!(second.start >= first.end && third >= second.end);
    assert_eq!(store.number(Sequence::Rooms).await.unwrap(), 1);
    if database.lasting {
        drop(store);
        let store = database.open().await;
        assert!(store.number(Sequence::Events).await.unwrap() > third);
    }
}

pub async fn parameters_may_stand_in_any_order(database: &Database) {
    let store = scratch(database).await;
    let found = store
        .write(|c| {
            c.execute(
                "INSERT INTO scratch (b, a) VALUES ($2, $1)",
                &[&5_i64, &"five"],
            )?;
            let sql = "SELECT b FROM scratch WHERE b = $2 AND a = $1 AND b = $2";
            c.query_opt(sql, &[&5_i64, &"five"], |row| row.string(0))
        })
        .await
        .unwrap();
    assert_eq!(found.as_deref(), Some("five"));
}

pub async fn positions_rise_without_gaps(database: &Database) {
    let store = database.open().await;
    let outcome: Result<i64> = store
        .write(|c| {
            streams::advance(c, Stream::Events, 3)?;
            Err(Error::Refused("undone".to_owned()))
        })
        .await;
    assert!(outcome.is_err());
    let tasks: Vec<_> = (0..20)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move { store.write(|c| streams::next(c, Stream::Events)).await })
        })
        .collect();
    let mut given = Vec::new();
    for task in tasks {
        given.push(task.await.unwrap().unwrap());
    }
    given.sort_unstable();
    assert_eq!(given, (1..=20).collect::<Vec<i64>>());
    let (first, other, all) = store
        .write(|c| {
            Ok((
                streams::advance(c, Stream::Events, 5)?,
                streams::position(c, Stream::Receipts)?,
                streams::positions(c)?,
            ))
        })
        .await
        .unwrap();
    assert_eq!((first, other, all[0]), (21, 0, 25));
}

pub async fn texts_and_bytes_come_back_as_they_were(database: &Database) {
    let store = scratch(database).await;
    let text = "é \0 \u{10FFFF}0 \" '";
    let bytes: Vec<u8> = (0..=255).collect();
    let written = bytes.clone();
    store
        .write(move |c| {
            c.execute(
                "INSERT INTO scratch (a, b, c) VALUES ($1, $2, $3)",
                &[&i64::MIN, &text, &written],
            )?;
            c.execute(INSERT, &[&i64::MAX, &None::<String>])
        })
        .await
        .unwrap();
    let rows = store
        .read(|c| {
            c.query_all("SELECT a, b, c FROM scratch ORDER BY a", &[], |row| {
                Ok((
                    row.int(0)?,
                    row.opt_string(1)?,
                    row.opt_blob(2)?.map(<[u8]>::to_vec),
                ))
            })
        })
        .await
        .unwrap();
    let wanted = [
        (i64::MIN, Some(text.to_owned()), Some(bytes)),
        (i64::MAX, None, None),
    ];
    assert_eq!(rows, wanted);
}

pub async fn what_was_written_survives_a_reopening(database: &Database) {
    if !database.lasting {
        return;
    }
    let store = scratch(database).await;
    store
        .write(|c| c.execute(INSERT, &[&1_i64, &"one"]))
        .await
        .unwrap();
    // A second store on the same database, opened while the first one was never closed.
    let again = database.open().await;
    assert_eq!(again.read(count).await.unwrap(), 1);
    drop(store);
    assert_eq!(database.open().await.read(count).await.unwrap(), 1);
}
