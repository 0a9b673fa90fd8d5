//! Finding events by the words in them.

use protocol::nid::{EventNid, RoomNid};

use crate::driver::{Conn, Result, texts};

const FIND: &str = "SELECT e.nid FROM events e JOIN event_ids i ON i.nid = e.nid
    WHERE e.place > 0 AND e.verdict = 0 AND e.nid IN (
        SELECT event_nid FROM search_words
        WHERE word IN (SELECT value FROM rarray_text($1))
        AND room_nid IN (SELECT value FROM rarray($2))
        AND field IN (SELECT value FROM rarray_text($3))
        GROUP BY event_nid HAVING COUNT(DISTINCT word) = $4)
    AND NOT EXISTS (SELECT 1 FROM redactions d WHERE d.target = i.event_id)
    ORDER BY e.position DESC LIMIT $5";

/// Events of these rooms that hold all of these words in one of these fields, newest first. Redacted
/// events are not found.
pub fn find(
    c: &mut dyn Conn,
    rooms: &[RoomNid],
    words: &[String],
    fields: &[String],
    limit: i64,
) -> Result<Vec<EventNid>> {
    if words.is_empty() || rooms.is_empty() {
        return Ok(Vec::new());
    }
    let rooms: Vec<i64> = rooms.iter().map(|room| room.0).collect();
    let (words, fields) = (words.to_vec(), fields.to_vec());
    let count = i64::try_from(words.len()).unwrap_or(i64::MAX);
    c.query_all(
        FIND,
        &[&texts(&words), &rooms, &texts(&fields), &count, &limit],
        |row| row.event_nid(0),
    )
}
