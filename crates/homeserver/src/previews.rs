//! Previews of web pages, from their OpenGraph tags.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#get_matrixclientv1mediapreview_url>

use std::time::Duration;

use moka::future::Cache;
use protocol::id::UserId;
use reqwest::Url;
use serde_json::{Map, Value};

use crate::Homeserver;
use crate::error::Result;
use crate::media::Label;
use crate::outbound;
use crate::thumbnails;

/// Tags stand in the head, which is near the beginning.
const PAGE_BYTES_MAX: usize = 2 << 20;
const IMAGE_BYTES_MAX: usize = 10 << 20;
const VALUE_BYTES_MAX: usize = 4096;
const TAGS_MAX: usize = 64;
const KEPT_MAX: u64 = 1000;
const KEPT_FOR: Duration = Duration::from_secs(3600);

pub(crate) struct Previews(Cache<String, Value>);

impl Default for Previews {
    fn default() -> Self {
        Self(
            Cache::builder()
                .max_capacity(KEPT_MAX)
                .time_to_live(KEPT_FOR)
                .build(),
        )
    }
}

impl Homeserver {
    pub async fn preview(&self, user: &UserId, url: &str) -> Result<Value> {
        if let Some(known) = self.inner.previews.0.get(url).await {
            return Ok(known);
        }
        let preview = Value::Object(self.make_preview(user, url).await?);
        self.inner
            .previews
            .0
            .insert(url.to_owned(), preview.clone())
            .await;
        Ok(preview)
    }

    async fn make_preview(&self, user: &UserId, url: &str) -> Result<Map<String, Value>> {
        let response = self.inner.outbound.get(url).await?;
        let base = response.url().clone();
        let kind = response
            .headers()
            .get("content-type")
            .and_then(|value| value.to_str().ok());
        let kind = kind.unwrap_or_default().to_ascii_lowercase();
        if kind.starts_with("image/") {
            let mut tags = Map::new();
            self.add_image(user, base.as_str(), &mut tags).await?;
            return Ok(tags);
        }
        if !kind.starts_with("text/html") && !kind.starts_with("application/xhtml") {
            return Ok(Map::new());
        }
        let page = outbound::body(response, PAGE_BYTES_MAX).await?;
        let mut tags = open_graph(&String::from_utf8_lossy(&page));
        let image = tags
            .remove("og:image")
            .and_then(|image| base.join(image.as_str()?).ok());
        if let Some(image) = image
            && let Err(error) = self.add_image(user, image.as_str(), &mut tags).await
        {
            tracing::debug!(%error, "the image of a preview could not be fetched");
        }
        tags.entry("og:url")
            .or_insert_with(|| Url::to_string(&base).into());
        Ok(tags)
    }

    async fn add_image(
        &self,
        user: &UserId,
        url: &str,
        tags: &mut Map<String, Value>,
    ) -> Result<()> {
        let response = self.inner.outbound.get(url).await?;
        let content_type = response
            .headers()
            .get("content-type")
            .and_then(|value| value.to_str().ok());
        let label = Label {
            content_type: content_type.map(str::to_owned),
            filename: None,
        };
        let bytes = outbound::body(response, IMAGE_BYTES_MAX).await?;
        let Some((width, height)) = thumbnails::dimensions(&bytes) else {
            return Ok(());
        };
        tags.insert("matrix:image:size".to_owned(), bytes.len().into());
        tags.insert("og:image:width".to_owned(), width.into());
        tags.insert("og:image:height".to_owned(), height.into());
        if let Some(kind) = &label.content_type {
            tags.insert("og:image:type".to_owned(), kind.as_str().into());
        }
        let id = self.upload_media(user, label, bytes).await?;
        let uri = format!("mxc://{}/{id}", self.config().server_name);
        tags.insert("og:image".to_owned(), uri.into());
        Ok(())
    }
}

/// The `og:` properties of a page, and its title where it has none.
fn open_graph(page: &str) -> Map<String, Value> {
    let mut tags = Map::new();
    for tag in elements(page, "meta").take(TAGS_MAX) {
        let (mut property, mut content) = (None, None);
        for (name, value) in attributes(tag) {
            match name.to_ascii_lowercase().as_str() {
                "property" => property = Some(value),
                "name" if property.is_none() => property = Some(value),
                "content" => content = Some(value),
                _ => {}
            }
        }
        let (Some(property), Some(content)) = (property, content) else {
            continue;
        };
        let property = if property == "description" {
            "og:description".to_owned()
        } else {
            property
        };
        if property.starts_with("og:") && content.len() <= VALUE_BYTES_MAX {
            tags.entry(property).or_insert_with(|| content.into());
        }
    }
    if !tags.contains_key("og:title")
        && let Some(start) = find_ignoring_case(page, "<title")
        && let Some((_, rest)) = page[start..].split_once('>')
        && let Some((title, _)) = rest.split_once('<')
        && title.len() <= VALUE_BYTES_MAX
    {
        tags.insert("og:title".to_owned(), unescape(title.trim()).into());
    }
    tags
}

fn find_ignoring_case(text: &str, wanted: &str) -> Option<usize> {
    let (text, wanted) = (text.as_bytes(), wanted.as_bytes());
    text.windows(wanted.len())
        .position(|window| window.eq_ignore_ascii_case(wanted))
}

/// What stands between `<name` and `>`, for each such element.
fn elements<'a>(page: &'a str, name: &'a str) -> impl Iterator<Item = &'a str> {
    page.split('<').filter_map(move |element| {
        let (head, rest) = element.split_at_checked(name.len())?;
        let ends = rest.starts_with(|c: char| c.is_ascii_whitespace());
        (head.eq_ignore_ascii_case(name) && ends)
            .then(|| rest.split_once('>').map_or(rest, |(tag, _)| tag))
    })
}

fn attributes(tag: &str) -> Vec<(&str, String)> {
    let mut found = Vec::new();
    let mut rest = tag;
    while let Some((name, value)) = rest.split_once('=') {
        let name = name
            .trim()
            .rsplit(char::is_whitespace)
            .next()
            .unwrap_or_default();
        let value = value.trim_start();
        let (value, after) = match value.chars().next() {
            Some(quote @ ('"' | '\'')) => {
                let inner = &value[1..];
                inner.split_once(quote).unwrap_or((inner, ""))
            }
            _ => value.split_once(char::is_whitespace).unwrap_or((value, "")),
        };
        found.push((name, unescape(value)));
        rest = after;
    }
    found
}

fn unescape(text: &str) -> String {
    let named = [
        ("&lt;", "<"),
        ("&gt;", ">"),
        ("&quot;", "\""),
        ("&#39;", "'"),
        ("&amp;", "&"),
    ];
    named
        .iter()
        .fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_found_however_they_are_written() {
        let page = r#"<html><head><TITLE>The &amp; Rock</TITLE>
            <META content='video.movie' property="og:type"/>
            <meta property="og:url" content=http://example.org/ >
            <meta name="description" content="a &quot;film&quot;">
            <metal property="og:bad" content="no"></head>"#;
        let tags = open_graph(page);
        let tag = |name: &str| tags.get(name).and_then(Value::as_str);
        assert_eq!(tag("og:title"), Some("The & Rock"));
        assert_eq!(tag("og:type"), Some("video.movie"));
        assert_eq!(tag("og:url"), Some("http://example.org/"));
        assert_eq!(tag("og:description"), Some("a \"film\""));
        assert_eq!(tag("og:bad"), None);
    }
}
