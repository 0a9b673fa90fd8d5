//! What is looked up by an event's content: relations, redactions and words. Filled as events are stored.

use std::collections::BTreeSet;

use protocol::nid::{EventNid, RoomNid};
use protocol::pdu::Pdu;
use serde_json::Value;

use crate::driver::{Conn, Result};
use crate::row;

/// Words of one event beyond this many are not found by search.
const WORDS_MAX: usize = 500;
/// A longer word is cut: it is no word of any language.
const WORD_CHARS_MAX: usize = 64;

const RELATION: &str = "INSERT INTO relations
    (event_nid, parent, rel_type, kind, sender, aggregation_key) VALUES ($1, $2, $3, $4, $5, $6)
    ON CONFLICT (event_nid) DO NOTHING";
const REDACTION: &str = "INSERT INTO redactions (event_nid, target) VALUES ($1, $2)
    ON CONFLICT (event_nid) DO NOTHING";
const WORD: &str =
    "INSERT INTO search_words (word, room_nid, event_nid, field) VALUES ($1, $2, $3, $4)
    ON CONFLICT (word, room_nid, event_nid, field) DO NOTHING";
const FORGET_RELATION: &str =
    "DELETE FROM relations WHERE event_nid IN (SELECT value FROM rarray($1))";
const FORGET_REDACTION: &str =
    "DELETE FROM redactions WHERE event_nid IN (SELECT value FROM rarray($1))";
const FORGET_WORDS: &str =
    "DELETE FROM search_words WHERE event_nid IN (SELECT value FROM rarray($1))";

/// Takes accepted events of the timeline into the indexes.
pub fn add(c: &mut dyn Conn, room: RoomNid, events: &[(EventNid, &Pdu)]) -> Result<()> {
    let mut relations = Vec::new();
    let mut words = Vec::new();
    for (nid, pdu) in events {
        if let Some(target) = pdu
            .redacts
            .as_ref()
            .filter(|_| &*pdu.kind == "m.room.redaction")
        {
            c.execute(REDACTION, &[nid, &**target])?;
        }
        // Most events relate to nothing and hold no text; those need no look inside.
        if pdu.content().contains("m.relates_to") {
            relations.extend(relation(&content(pdu)).map(|relation| (*nid, *pdu, relation)));
        }
        if let Some((field, key)) = searched(&pdu.kind)
            && let Some(text) = content(pdu).get(key).and_then(Value::as_str)
        {
            words.extend(
                split_words(text)
                    .into_iter()
                    .map(|word| (word, *nid, field)),
            );
        }
    }
    let rows: Vec<_> = relations
        .iter()
        .map(|(nid, pdu, relation)| {
            row![
                nid,
                &relation.parent,
                &relation.rel_type,
                &pdu.kind,
                &pdu.sender,
                relation.key.as_ref()
            ]
        })
        .collect();
    if !rows.is_empty() {
        c.later(RELATION, &rows)?;
    }
    let rows: Vec<_> = words
        .iter()
        .map(|(word, nid, field)| row![word, &room, nid, *field])
        .collect();
    if !rows.is_empty() {
        c.later(WORD, &rows)?;
    }
    Ok(())
}

/// Forgets events that turned out to be rejected.
pub fn remove(c: &mut dyn Conn, events: &[EventNid]) -> Result<()> {
    if events.is_empty() {
        return Ok(());
    }
    let numbers: Vec<i64> = events.iter().map(|nid| nid.0).collect();
    for sql in [FORGET_RELATION, FORGET_REDACTION, FORGET_WORDS] {
        c.execute(sql, &[&numbers])?;
    }
    Ok(())
}

fn content(pdu: &Pdu) -> Value {
    serde_json::from_str(pdu.content()).unwrap_or_default()
}

struct Relation {
    parent: String,
    rel_type: String,
    key: Option<String>,
}

fn relation(content: &Value) -> Option<Relation> {
    let relates_to = content.get("m.relates_to")?;
    let text = |key: &str| {
        relates_to
            .get(key)
            .and_then(Value::as_str)
            .map(str::to_owned)
    };
    Some(Relation {
        parent: text("event_id")?,
        rel_type: text("rel_type")?,
        key: text("key"),
    })
}

/// The search key of this event type, and the content key it stands for.
fn searched(kind: &str) -> Option<(&'static str, &'static str)> {
    match kind {
        "m.room.message" => Some(("content.body", "body")),
        "m.room.name" => Some(("content.name", "name")),
        "m.room.topic" => Some(("content.topic", "topic")),
        _ => None,
    }
}

/// The distinct words of a text, in lower case.
pub fn split_words(text: &str) -> BTreeSet<String> {
    text.split(|c: char| !c.is_alphanumeric())
        .filter(|word| !word.is_empty())
        .take(WORDS_MAX)
        .map(|word| word.to_lowercase().chars().take(WORD_CHARS_MAX).collect())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_runs_of_letters_and_digits() {
        let words = split_words("It's a Message, a message №1!");
        let expected: BTreeSet<String> = ["it", "s", "a", "message", "1"].map(str::to_owned).into();
        assert_eq!(words, expected);
    }
}
