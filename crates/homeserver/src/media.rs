//! The content repository: bytes in files named by their SHA-256, everything else in the store.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#content-repository>

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use federation::media::MediaContent;
use protocol::id::{ServerName, UserId};
use sha2::{Digest, Sha256};
use storage::media as table;
use storage::media::Media;

use crate::Homeserver;
use crate::accounts::random_token;
use crate::error::{MatrixError, Result};
use crate::limits::Limit;
use crate::notifier::Topic;
use crate::outbound;
use crate::thumbnails::{self, Size};

/// Ids that one user may hold without content.
const UNFILLED_MAX: i64 = 50;
/// So long an id without content is kept for its maker.
const UNFILLED_LIFE_MS: i64 = 24 * 3600 * 1000;
/// How long a download waits for content that is not there yet.
const WAIT_DEFAULT: Duration = Duration::from_secs(20);
const WAIT_MAX: Duration = Duration::from_secs(60);
const REMOTE_TIMEOUT: Duration = Duration::from_secs(60);
const FILENAME_BYTES_MAX: usize = 255;

/// One fetch of a piece of remote media at a time.
type Fetch = Arc<tokio::sync::Mutex<()>>;

#[derive(Default)]
pub(crate) struct State {
    fetches: Mutex<HashMap<String, Fetch>>,
}

/// Content on its way to a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    pub bytes: Bytes,
    pub content_type: String,
    pub filename: Option<String>,
}

/// What an upload says of itself.
#[derive(Clone, Debug, Default)]
pub struct Label {
    pub content_type: Option<String>,
    pub filename: Option<String>,
}

impl Homeserver {
    /// `POST /upload`; the media id.
    pub async fn upload_media(&self, user: &UserId, label: Label, bytes: Bytes) -> Result<String> {
        self.limit(Limit::Upload, user.as_str())?;
        let media = self.new_media(Some(user), label);
        let media = self.write_file(media, bytes).await?;
        let id = media.media_id.clone();
        self.store()
            .write(move |c| table::create(c, &media))
            .await?;
        Ok(id)
    }

    /// `POST /create`: an id for content that comes later; with the time until which it may come.
    pub async fn reserve_media(&self, user: &UserId) -> Result<(String, i64)> {
        self.limit(Limit::Upload, user.as_str())?;
        let media = self.new_media(Some(user), Label::default());
        let (id, ends_ms) = (media.media_id.clone(), media.created_ms + UNFILLED_LIFE_MS);
        let (owner, since_ms) = (user.clone(), media.created_ms - UNFILLED_LIFE_MS);
        let reserved = self.store().write(move |c| {
            if table::unfilled(c, &owner, since_ms)? >= UNFILLED_MAX {
                return Ok(false);
            }
            table::create(c, &media)
        });
        if !reserved.await? {
            return Err(MatrixError::limit_exceeded(60_000));
        }
        Ok((id, ends_ms))
    }

    /// `PUT /upload/{serverName}/{mediaId}`
    pub async fn fill_media(
        &self,
        user: &UserId,
        server: &ServerName,
        media_id: &str,
        label: Label,
        bytes: Bytes,
    ) -> Result<()> {
        if *server != self.config().server_name {
            return Err(MatrixError::forbidden(
                "This media belongs to another server",
            ));
        }
        let taken = || {
            MatrixError::new(
                409,
                "M_CANNOT_OVERWRITE_MEDIA",
                "This media has its content",
            )
        };
        let known = self.media_row(server.as_str(), media_id).await?;
        let known = known.ok_or_else(|| MatrixError::not_found("There is no such media"))?;
        if known.sha256.is_some() {
            return Err(taken());
        }
        if known.uploader.as_ref() != Some(user) {
            return Err(MatrixError::forbidden("Somebody else made this media id"));
        }
        if known.created_ms + UNFILLED_LIFE_MS < self.clock().unix_ms() {
            return Err(MatrixError::not_found("The media id has expired"));
        }
        let labelled = Media {
            media_id: known.media_id,
            ..self.new_media(Some(user), label)
        };
        let media = self.write_file(labelled, bytes).await?;
        if !self.store().write(move |c| table::fill(c, &media)).await? {
            return Err(taken());
        }
        self.notifier().wake(&Topic::Media(media_id.to_owned()));
        Ok(())
    }

    /// A download; of remote media too, if `remote`.
    pub async fn media(
        &self,
        server: &ServerName,
        media_id: &str,
        wait: Option<Duration>,
        remote: bool,
    ) -> Result<Content> {
        let media = self.find_media(server, media_id, wait, remote).await?;
        let path = self.media_file(&media)?;
        let bytes = read_file(path).await?;
        Ok(Content {
            bytes,
            content_type: media
                .content_type
                .unwrap_or_else(|| "application/octet-stream".to_owned()),
            filename: media.filename,
        })
    }

    /// A thumbnail, or the media itself when it is small already.
    pub async fn thumbnail(
        &self,
        server: &ServerName,
        media_id: &str,
        wanted: Size,
        wait: Option<Duration>,
        remote: bool,
    ) -> Result<Content> {
        let media = self.find_media(server, media_id, wait, remote).await?;
        let original = self.media_file(&media)?;
        let size = wanted.normal();
        let kept = self.config().media_path.join("thumbnails").join(format!(
            "{}-{size}",
            media.sha256.as_deref().unwrap_or_default()
        ));
        let made = thumbnails::get_or_make(original, kept, size).await?;
        Ok(Content {
            bytes: made.bytes,
            content_type: made.content_type.to_owned(),
            filename: None,
        })
    }

    fn new_media(&self, uploader: Option<&UserId>, label: Label) -> Media {
        let mut id = random_token();
        id.truncate(24);
        Media {
            origin: self.config().server_name.as_str().to_owned(),
            media_id: id,
            sha256: None,
            content_type: label.content_type,
            filename: label.filename.map(shorten).filter(|name| !name.is_empty()),
            bytes: 0,
            uploader: uploader.cloned(),
            created_ms: self.clock().unix_ms(),
            quarantined: false,
        }
    }

    async fn media_row(&self, origin: &str, media_id: &str) -> Result<Option<Media>> {
        let (origin, media_id) = (origin.to_owned(), media_id.to_owned());
        Ok(self
            .store()
            .read(move |c| table::get(c, &origin, &media_id))
            .await?)
    }

    async fn find_media(
        &self,
        server: &ServerName,
        media_id: &str,
        wait: Option<Duration>,
        remote: bool,
    ) -> Result<Media> {
        let missing = || MatrixError::not_found("There is no such media");
        let media = if *server == self.config().server_name {
            self.wait_for_content(media_id, wait).await?
        } else if let Some(known) = self.media_row(server.as_str(), media_id).await? {
            known
        } else if remote {
            self.fetch_media(server, media_id).await?
        } else {
            return Err(missing());
        };
        if media.quarantined {
            return Err(missing());
        }
        Ok(media)
    }

    async fn wait_for_content(&self, media_id: &str, wait: Option<Duration>) -> Result<Media> {
        let mut woken = self.notifier().subscribe(Topic::Media(media_id.to_owned()));
        let own = self.config().server_name.as_str().to_owned();
        let look = || async {
            let found = self.media_row(&own, media_id).await?;
            found.ok_or_else(|| MatrixError::not_found("There is no such media"))
        };
        let mut media = look().await?;
        if media.sha256.is_none() {
            let wait = wait.unwrap_or(WAIT_DEFAULT).min(WAIT_MAX);
            // Whether woken or tired of waiting, the row tells.
            let _woken = tokio::time::timeout(wait, woken.changed()).await;
            media = look().await?;
        }
        if media.sha256.is_none() {
            return Err(MatrixError::new(
                504,
                "M_NOT_YET_UPLOADED",
                "The media is not yet uploaded",
            ));
        }
        Ok(media)
    }

    async fn fetch_media(&self, server: &ServerName, media_id: &str) -> Result<Media> {
        let fetch = {
            let mut fetches = self
                .inner
                .media
                .fetches
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            fetches.retain(|_, fetch| Arc::strong_count(fetch) > 1);
            Arc::clone(fetches.entry(format!("{server}/{media_id}")).or_default())
        };
        let _turn = fetch.lock().await;
        if let Some(known) = self.media_row(server.as_str(), media_id).await? {
            return Ok(known);
        }
        let bytes_max = self.media_bytes_max();
        let fetched = self
            .client()
            .download_media(server, media_id, REMOTE_TIMEOUT, bytes_max)
            .await;
        let fetched = fetched.map_err(|error| match error {
            room::effect::AskError::Refused { status: 404, .. } => {
                MatrixError::not_found("There is no such media")
            }
            other => {
                tracing::debug!(%server, media_id, error = ?other, "remote media could not be fetched");
                MatrixError::bad_gateway("The media could not be fetched from its server")
            }
        })?;
        let mut label = Label {
            content_type: fetched.content_type,
            filename: fetched
                .content_disposition
                .as_deref()
                .and_then(disposition_filename),
        };
        let bytes = match fetched.content {
            MediaContent::Bytes(bytes) => bytes,
            MediaContent::Elsewhere(url) => {
                let response = self.inner.outbound.get(&url).await?;
                let header = response.headers().get("content-type");
                label.content_type = label
                    .content_type
                    .or_else(|| Some(header?.to_str().ok()?.to_owned()));
                outbound::body(response, bytes_max).await?
            }
        };
        let media = Media {
            origin: server.as_str().to_owned(),
            media_id: media_id.to_owned(),
            ..self.new_media(None, label)
        };
        let media = self.write_file(media, bytes).await?;
        let row = media.clone();
        self.store().write(move |c| table::create(c, &row)).await?;
        Ok(media)
    }

    pub fn media_bytes_max(&self) -> usize {
        usize::try_from(self.config().media_upload_bytes_max).unwrap_or(usize::MAX)
    }

    async fn write_file(&self, mut media: Media, bytes: Bytes) -> Result<Media> {
        if bytes.len() > self.media_bytes_max() {
            return Err(MatrixError::too_large("The media is too large"));
        }
        let root = self.config().media_path.clone();
        media.bytes = i64::try_from(bytes.len()).unwrap_or(i64::MAX);
        let written = tokio::task::spawn_blocking(move || write_bytes(&root, &bytes)).await;
        match written {
            Ok(Ok(sha256)) => {
                media.sha256 = Some(sha256);
                Ok(media)
            }
            failed => {
                tracing::error!(?failed, "media could not be written");
                Err(MatrixError::internal("The media could not be stored"))
            }
        }
    }

    fn media_file(&self, media: &Media) -> Result<PathBuf> {
        let sha256 = media.sha256.as_deref();
        let sha256 = sha256.ok_or_else(|| MatrixError::not_found("The media has no content"))?;
        Ok(file_of(&self.config().media_path, sha256))
    }
}

fn shorten(mut name: String) -> String {
    let mut end = name.len().min(FILENAME_BYTES_MAX);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    name.truncate(end);
    name
}

/// `ab/cdef…`, so that no directory gets too long.
fn file_of(root: &Path, sha256: &str) -> PathBuf {
    let (first, rest) = sha256.split_at_checked(2).unwrap_or((sha256, ""));
    root.join(first).join(rest)
}

/// Writes the bytes unless they are there; their SHA-256.
fn write_bytes(root: &Path, bytes: &[u8]) -> std::io::Result<String> {
    let sha256: String = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let path = file_of(root, &sha256);
    if !path.exists() {
        write_whole(&path, bytes)?;
    }
    Ok(sha256)
}

/// Under another name first, so that the file is whole or not there.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let parent = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent)?;
    let partial = parent.join(format!(".{}", random_token()));
    std::fs::write(&partial, bytes)?;
    std::fs::rename(partial, path)
}

async fn read_file(path: PathBuf) -> Result<Bytes> {
    tokio::fs::read(&path)
        .await
        .map(Bytes::from)
        .map_err(|error| {
            tracing::error!(%error, path = %path.display(), "media could not be read");
            MatrixError::internal("The media could not be read")
        })
}

/// The file name that a Content-Disposition header gives, RFC 6266.
pub fn disposition_filename(header: &str) -> Option<String> {
    let (mut plain, mut extended) = (None, None);
    for parameter in split_parameters(header).skip(1) {
        let Some((name, value)) = parameter.split_once('=') else {
            continue;
        };
        let value = value.trim();
        match name.trim().to_ascii_lowercase().as_str() {
            "filename*" => {
                let mut parts = value.splitn(3, '\'');
                let charset = parts.next().unwrap_or_default();
                if let (true, Some(encoded)) = (charset.eq_ignore_ascii_case("utf-8"), parts.nth(1))
                {
                    extended = percent_decode(encoded);
                }
            }
            "filename" => plain = Some(unquote(value)),
            _ => {}
        }
    }
    extended.or(plain).filter(|name| !name.is_empty())
}

/// Splits at semicolons outside of quotes.
fn split_parameters(header: &str) -> impl Iterator<Item = &str> {
    let (mut quoted, mut escaped) = (false, false);
    header.split(move |c| {
        if escaped {
            escaped = false;
            return false;
        }
        match c {
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            ';' => return !quoted,
            _ => {}
        }
        false
    })
}

fn unquote(value: &str) -> String {
    let Some(inner) = value
        .strip_prefix('"')
        .and_then(|rest| rest.strip_suffix('"'))
    else {
        return value.to_owned();
    };
    let mut text = String::with_capacity(inner.len());
    let mut chars = inner.chars();
    while let Some(c) = chars.next() {
        text.extend(if c == '\\' { chars.next() } else { Some(c) });
    }
    text
}

fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let hex = |byte: &u8| char::from(*byte).to_digit(16);
        match (first, tail) {
            (b'%', [high, low, tail @ ..]) => {
                bytes.push(u8::try_from(hex(high)? * 16 + hex(low)?).ok()?);
                rest = tail;
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_name_is_read_in_each_of_its_forms() {
        let check = |header: &str, name: Option<&str>| {
            assert_eq!(disposition_filename(header).as_deref(), name, "{header}");
        };
        check("inline", None);
        check("attachment; filename=ascii", Some("ascii"));
        check(
            r#"attachment; filename="name;with;semicolons""#,
            Some("name;with;semicolons"),
        );
        check(r#"inline; filename="a \"b\"""#, Some("a \"b\""));
        check("inline; filename=x; filename*=utf-8''%E2%98%95", Some("☕"));
        check("inline; filename*=utf-8''%zz; filename=x", Some("x"));
    }

    #[test]
    fn the_same_bytes_are_one_file() {
        let root = tempfile::tempdir().unwrap();
        let one = write_bytes(root.path(), b"hello").unwrap();
        assert_eq!(write_bytes(root.path(), b"hello").unwrap(), one);
        assert_eq!(std::fs::read(file_of(root.path(), &one)).unwrap(), b"hello");
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1);
    }
}
