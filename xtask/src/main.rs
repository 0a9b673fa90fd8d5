//! Checks of the house that no compiler makes: `cargo xtask tidy`.
//!
//! Each check is of absence: what a crate may not depend on, which words may not stand where.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// A crate, and the only crates of the house that it may name as a dependency.
const ARROWS: &[(&str, &[&str])] = &[
    ("crates/protocol", &[]),
    ("crates/room", &["protocol"]),
    ("crates/storage", &["protocol", "room"]),
    ("crates/federation", &["protocol", "room"]),
    (
        "crates/homeserver",
        &["protocol", "room", "storage", "federation"],
    ),
    ("crates/http", &["protocol", "homeserver"]),
];

const HOUSE: &[&str] = &[
    "protocol",
    "room",
    "storage",
    "federation",
    "homeserver",
    "vestibule_http",
];

/// Dependencies that the sans-IO crates must not have: a runtime, I/O or chance.
const NOT_SANS_IO: &[&str] = &[
    "tokio",
    "hyper",
    "rand",
    "getrandom",
    "rusqlite",
    "reqwest",
    "futures",
    "crossbeam-channel",
    "rayon",
];

/// Words that must not stand in the code of the sans-IO crates, tests apart.
const SANS_IO_WORDS: &[(&str, &str)] = &[
    ("HashMap", "its order is chance: use BTreeMap"),
    ("HashSet", "its order is chance: use BTreeSet"),
    ("std::net::Tcp", "no sockets here"),
    ("std::net::Udp", "no sockets here"),
    ("std::fs", "no files here"),
    ("std::thread", "no threads here"),
    ("Instant", "time is an argument"),
    ("SystemTime", "time is an argument"),
    ("async fn", "machines do not wait"),
];

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("tidy") => report(&tidy(&root())),
        _ => {
            eprintln!("usage: cargo xtask tidy");
            ExitCode::FAILURE
        }
    }
}

fn report(faults: &[String]) -> ExitCode {
    for fault in faults {
        eprintln!("{fault}");
    }
    println!("tidy: {} faults", faults.len());
    if faults.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask lies in the workspace")
        .to_owned()
}

fn tidy(root: &Path) -> Vec<String> {
    let mut faults = Vec::new();
    for (member, allowed) in ARROWS {
        check_arrows(root, member, allowed, &mut faults);
    }
    for member in ["crates/protocol", "crates/room"] {
        check_dependencies(root, member, &mut faults);
        for file in rust_files(&root.join(member).join("src")) {
            check_words(&file, SANS_IO_WORDS, &mut faults);
        }
    }
    for file in rust_files(&root.join("crates")) {
        check_engines(&file, &mut faults);
        check_head(&file, &mut faults);
    }
    faults
}

fn manifest(root: &Path, member: &str) -> String {
    fs::read_to_string(root.join(member).join("Cargo.toml")).unwrap_or_default()
}

/// The names in `[dependencies]`; dev-dependencies may be what they like.
fn dependencies(manifest: &str) -> Vec<&str> {
    manifest
        .lines()
        .skip_while(|line| line.trim() != "[dependencies]")
        .skip(1)
        .take_while(|line| !line.starts_with('['))
        .filter_map(|line| line.split(['.', '=', ' ']).next())
        .filter(|name| !name.is_empty() && !name.starts_with('#'))
        .collect()
}

fn check_arrows(root: &Path, member: &str, allowed: &[&str], faults: &mut Vec<String>) {
    for name in dependencies(&manifest(root, member)) {
        if HOUSE.contains(&name) && !allowed.contains(&name) {
            faults.push(format!(
                "{member}/Cargo.toml: an arrow upwards or sideways, to {name}"
            ));
        }
    }
}

fn check_dependencies(root: &Path, member: &str, faults: &mut Vec<String>) {
    for name in dependencies(&manifest(root, member)) {
        if NOT_SANS_IO.contains(&name) {
            faults.push(format!(
                "{member}/Cargo.toml: {name} has no place in a sans-IO crate"
            ));
        }
    }
}

/// The lines of a file before its test module, without comments.
fn production_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines()
        .take_while(|line| !line.starts_with("#[cfg(test)]"))
        .enumerate()
        .map(|(at, line)| (at + 1, line))
        .filter(|(_, line)| !line.trim_start().starts_with("//"))
}

fn check_words(file: &Path, words: &[(&str, &str)], faults: &mut Vec<String>) {
    let text = fs::read_to_string(file).unwrap_or_default();
    for (at, line) in production_lines(&text) {
        for (word, reason) in words {
            if line.contains(word) {
                faults.push(format!("{}:{at}: {word}: {reason}", file.display()));
            }
        }
    }
}

/// Only the two driver files name an engine's crate.
fn check_engines(file: &Path, faults: &mut Vec<String>) {
    let in_tests = file.components().any(|part| part.as_os_str() == "tests");
    if in_tests
        || file.ends_with("storage/src/sqlite.rs")
        || file.ends_with("storage/src/postgres.rs")
    {
        return;
    }
    check_words(
        file,
        &[
            ("rusqlite::", "only storage/src/sqlite.rs"),
            ("tokio_postgres::", "only storage/src/postgres.rs"),
        ],
        faults,
    );
}

/// Every file opens by saying what it is.
fn check_head(file: &Path, faults: &mut Vec<String>) {
    let text = fs::read_to_string(file).unwrap_or_default();
    let is_source = file.components().any(|part| part.as_os_str() == "src");
    if is_source && !text.starts_with("//!") {
        faults.push(format!(
            "{}: opens without a sentence on what it is",
            file.display()
        ));
    }
}

fn rust_files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(directory) = open.pop() {
        let Ok(entries) = fs::read_dir(&directory) else {
            continue;
        };
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_house_is_tidy() {
        assert_eq!(tidy(&root()), Vec::<String>::new());
    }

    #[test]
    fn an_arrow_upwards_is_a_fault() {
        assert_eq!(
            dependencies(
                "[dependencies]\nroom.workspace = true\nserde = \"1\"\n[dev-dependencies]\nx = \"1\""
            ),
            ["room", "serde"]
        );
    }
}
