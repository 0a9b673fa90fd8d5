//! Fetching media of other servers.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#content-repository>

use std::time::Duration;

use bytes::Bytes;
use protocol::id::ServerName;
use room::effect::AskError;

use crate::client::{Call, Client, Failure, uri, with_query};
use crate::transport::{HeaderMap, TransportError, collect, header};

/// The metadata part and the headers around the media.
const MULTIPART_OVERHEAD_MAX: usize = 64 << 10;

#[derive(Clone, Debug, PartialEq)]
pub struct Media {
    pub content_type: Option<String>,
    pub content_disposition: Option<String>,
    pub content: MediaContent,
}

#[derive(Clone, Debug, PartialEq)]
pub enum MediaContent {
    Bytes(Bytes),
    /// Where the media may be fetched instead, by plain HTTPS.
    Elsewhere(String),
}

/// What kind of thumbnail is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThumbnailSize {
    pub width: u32,
    pub height: u32,
    /// Cut to the size, or scaled into it.
    pub crop: bool,
    pub animated: Option<bool>,
}

impl Client {
    /// `GET /_matrix/federation/v1/media/download/{mediaId}`, and the unauthenticated endpoint of the
    /// client API where that is not known.
    pub async fn download_media(
        &self,
        to: &ServerName,
        media_id: &str,
        timeout: Duration,
        bytes_max: usize,
    ) -> Result<Media, AskError> {
        let path = uri("/_matrix/federation/v1/media/download", &[media_id]);
        let old = uri("/_matrix/media/v3/download", &[to.as_str(), media_id]);
        self.media(to, (path, old), timeout, bytes_max).await
    }

    /// `GET /_matrix/federation/v1/media/thumbnail/{mediaId}`, likewise.
    pub async fn thumbnail_media(
        &self,
        to: &ServerName,
        media_id: &str,
        size: ThumbnailSize,
        timeout: Duration,
        bytes_max: usize,
    ) -> Result<Media, AskError> {
        let sized = |uri: String| {
            let uri = with_query(uri, "width", &size.width.to_string());
            let uri = with_query(uri, "height", &size.height.to_string());
            let uri = with_query(uri, "method", if size.crop { "crop" } else { "scale" });
            match size.animated {
                Some(animated) => with_query(uri, "animated", &animated.to_string()),
                None => uri,
            }
        };
        let path = uri("/_matrix/federation/v1/media/thumbnail", &[media_id]);
        let old = uri("/_matrix/media/v3/thumbnail", &[to.as_str(), media_id]);
        self.media(to, (sized(path), sized(old)), timeout, bytes_max)
            .await
    }

    async fn media(
        &self,
        to: &ServerName,
        (path, old): (String, String),
        timeout: Duration,
        bytes_max: usize,
    ) -> Result<Media, AskError> {
        let wait = with_query(path, "timeout_ms", &timeout.as_millis().to_string());
        match self.open(Call::get(to, wait, timeout)).await {
            Ok(response) => {
                let content_type = text(&response.headers, &header::CONTENT_TYPE);
                let body = collect(response, bytes_max + MULTIPART_OVERHEAD_MAX)
                    .await
                    .map_err(Failure::Transport)?;
                let media = read_multipart(&content_type.unwrap_or_default(), &body)
                    .ok_or_else(|| Failure::Malformed("not the two parts of media".into()))?;
                if let MediaContent::Bytes(bytes) = &media.content
                    && bytes.len() > bytes_max
                {
                    return Err(too_large(bytes_max).into());
                }
                Ok(media)
            }
            Err(failure) if failure.is_unknown_endpoint() || failure.is_no_matrix_error() => {
                let old = with_query(old, "allow_remote", "false");
                let mut call = Call::get(to, old, timeout);
                call.signed = false;
                let response = self.open(call).await?;
                let content_type = text(&response.headers, &header::CONTENT_TYPE);
                let content_disposition = text(&response.headers, &header::CONTENT_DISPOSITION);
                let body = collect(response, bytes_max)
                    .await
                    .map_err(Failure::Transport)?;
                Ok(Media {
                    content_type,
                    content_disposition,
                    content: MediaContent::Bytes(body),
                })
            }
            Err(failure) => Err(failure.into()),
        }
    }
}

fn too_large(bytes_max: usize) -> Failure {
    Failure::Transport(TransportError::Broken(format!(
        "media of more than {bytes_max} bytes"
    )))
}

fn text(headers: &HeaderMap, name: &header::HeaderName) -> Option<String> {
    Some(headers.get(name)?.to_str().ok()?.to_owned())
}

/// The second part of a multipart/mixed body; the first is metadata without content yet.
fn read_multipart(content_type: &str, body: &Bytes) -> Option<Media> {
    let boundary = boundary(content_type)?;
    let mut line = b"--".to_vec();
    line.extend_from_slice(boundary.as_bytes());
    let mut delimiter = b"\r\n".to_vec();
    delimiter.extend_from_slice(&line);

    // A delimiter belongs with the line break before it, except at the very beginning.
    let first = if body.starts_with(&line) {
        line.len()
    } else {
        memchr::memmem::find(body, &delimiter)? + delimiter.len()
    };
    let metadata_end = first + memchr::memmem::find(&body[first..], &delimiter)?;
    let start = metadata_end + delimiter.len();
    let end = start + memchr::memmem::find(&body[start..], &delimiter)?;
    let start = start + memchr::memmem::find(&body[start..end], b"\n")? + 1;
    let part = &body[start..end];
    let (head, content_start) = if part.starts_with(b"\r\n") {
        (&part[..0], 2)
    } else {
        let head_end = memchr::memmem::find(part, b"\r\n\r\n")?;
        (&part[..head_end], head_end + 4)
    };
    let head = std::str::from_utf8(head).ok()?;
    let field = |wanted: &str| {
        head.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.trim()
                .eq_ignore_ascii_case(wanted)
                .then(|| value.trim().to_owned())
        })
    };
    let content = match field("Location") {
        Some(location) => MediaContent::Elsewhere(location),
        None => MediaContent::Bytes(body.slice(start + content_start..end)),
    };
    Some(Media {
        content_type: field("Content-Type"),
        content_disposition: field("Content-Disposition"),
        content,
    })
}

fn boundary(content_type: &str) -> Option<&str> {
    let (kind, parameters) = content_type.split_once(';')?;
    if !kind.trim().eq_ignore_ascii_case("multipart/mixed") {
        return None;
    }
    let boundary = parameters.split(';').find_map(|parameter| {
        let (name, value) = parameter.split_once('=')?;
        name.trim()
            .eq_ignore_ascii_case("boundary")
            .then(|| value.trim().trim_matches('"'))
    })?;
    (!boundary.is_empty() && boundary.len() <= 70).then_some(boundary)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(content_type: &str, body: &str, expected: Option<(&str, MediaContent)>) {
        let got = read_multipart(content_type, &Bytes::copy_from_slice(body.as_bytes()));
        let got = got.map(|m| (m.content_type.unwrap_or_default(), m.content));
        let expected = expected.map(|(t, c)| (t.to_owned(), c));
        assert_eq!(got, expected, "{body:?}");
    }

    #[test]
    fn the_second_part_is_the_media() {
        let content = |text: &'static str| MediaContent::Bytes(Bytes::from_static(text.as_bytes()));
        let kind = "multipart/mixed; boundary=xx";
        check(
            kind,
            "--xx\r\nContent-Type: application/json\r\n\r\n{}\r\n--xx\r\n\
             content-type: text/plain\r\nContent-Disposition: inline\r\n\r\na\r\n--x\r\n--xx--\r\n",
            Some(("text/plain", content("a\r\n--x"))),
        );
        check(
            "Multipart/Mixed; charset=a; boundary=\"xx\"",
            "\r\n--xx\r\n\r\n{}\r\n--xx\r\n\r\nbody\r\n--xx--",
            Some(("", content("body"))),
        );
        check(
            kind,
            "--xx\r\n\r\n{}\r\n--xx\r\nLocation: https://a.org/b\r\n\r\n\r\n--xx--",
            Some(("", MediaContent::Elsewhere("https://a.org/b".into()))),
        );
    }

    #[test]
    fn what_is_cut_off_or_no_multipart_is_no_media() {
        let kind = "multipart/mixed; boundary=xx";
        let whole = "--xx\r\n\r\n{}\r\n--xx\r\nContent-Type: a\r\n\r\nbody\r\n--xx";
        for end in 0..whole.len() {
            check(kind, &whole[..end], None);
        }
        check("application/json", whole, None);
        check("multipart/mixed", whole, None);
    }
}
