//! What is known about each piece of media. The bytes are files, named by their SHA-256.

use protocol::id::UserId;

use crate::driver::{Conn, Result};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Media {
    pub origin: String,
    pub media_id: String,
    /// `None` until the content is uploaded.
    pub sha256: Option<String>,
    pub content_type: Option<String>,
    pub filename: Option<String>,
    pub bytes: i64,
    pub uploader: Option<UserId>,
    pub created_ms: i64,
    pub quarantined: bool,
}

const GET: &str = "SELECT origin, media_id, sha256, content_type, filename, bytes, uploader,
        created_ms, quarantined FROM media WHERE origin = $1 AND media_id = $2";
const CREATE: &str = "INSERT INTO media
        (origin, media_id, sha256, content_type, filename, bytes, uploader, created_ms)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (origin, media_id) DO NOTHING";
const FILL: &str = "UPDATE media SET sha256 = $1, content_type = $2, filename = $3, bytes = $4
    WHERE origin = $5 AND media_id = $6 AND sha256 IS NULL";
const UNFILLED: &str = "SELECT COUNT(*) FROM media
    WHERE uploader = $1 AND sha256 IS NULL AND created_ms > $2";
const QUARANTINE: &str = "UPDATE media SET quarantined = $1 WHERE origin = $2 AND media_id = $3";

pub fn get(c: &mut dyn Conn, origin: &str, media_id: &str) -> Result<Option<Media>> {
    c.query_opt(GET, &[&origin, &media_id], |row| {
        Ok(Media {
            origin: row.string(0)?,
            media_id: row.string(1)?,
            sha256: row.opt_string(2)?,
            content_type: row.opt_string(3)?,
            filename: row.opt_string(4)?,
            bytes: row.int(5)?,
            uploader: row.opt_id(6)?,
            created_ms: row.int(7)?,
            quarantined: row.flag(8)?,
        })
    })
}

/// `false` when this id is taken.
pub fn create(c: &mut dyn Conn, media: &Media) -> Result<bool> {
    let rows = c.execute(
        CREATE,
        &[
            &media.origin,
            &media.media_id,
            &media.sha256,
            &media.content_type,
            &media.filename,
            &media.bytes,
            &media.uploader,
            &media.created_ms,
        ],
    )?;
    Ok(rows == 1)
}

/// Adds the content to an id that was reserved; `false` when it has content.
pub fn fill(c: &mut dyn Conn, media: &Media) -> Result<bool> {
    let rows = c.execute(
        FILL,
        &[
            &media.sha256,
            &media.content_type,
            &media.filename,
            &media.bytes,
            &media.origin,
            &media.media_id,
        ],
    )?;
    Ok(rows == 1)
}

/// How many ids this user has reserved since then and not filled.
pub fn unfilled(c: &mut dyn Conn, user: &UserId, since_ms: i64) -> Result<i64> {
    c.query_one(UNFILLED, &[user, &since_ms], |row| row.int(0))
}

pub fn quarantine(
    c: &mut dyn Conn,
    origin: &str,
    media_id: &str,
    quarantined: bool,
) -> Result<bool> {
    Ok(c.execute(QUARANTINE, &[&quarantined, &origin, &media_id])? == 1)
}
