//! The Content-Disposition header: what is shown in place, and under which name it is saved.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#serving-inline-content>

/// Types that no browser runs, as the specification lists them.
const INLINE: [&str; 26] = [
    "text/css",
    "text/plain",
    "text/csv",
    "application/json",
    "application/ld+json",
    "image/jpeg",
    "image/gif",
    "image/png",
    "image/apng",
    "image/webp",
    "image/avif",
    "video/mp4",
    "video/webm",
    "video/ogg",
    "video/quicktime",
    "audio/mp4",
    "audio/webm",
    "audio/aac",
    "audio/mpeg",
    "audio/ogg",
    "audio/wave",
    "audio/wav",
    "audio/x-wav",
    "audio/x-pn-wav",
    "audio/flac",
    "audio/x-flac",
];

pub fn header(content_type: &str, filename: Option<&str>) -> String {
    let kind = content_type
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    let how = if INLINE.contains(&kind.as_str()) {
        "inline"
    } else {
        "attachment"
    };
    let Some(name) = filename.filter(|name| !name.is_empty()) else {
        return how.to_owned();
    };
    if name.bytes().all(is_token) {
        return format!("{how}; filename={name}");
    }
    if name
        .bytes()
        .all(|byte| byte == b' ' || byte.is_ascii_graphic())
    {
        let quoted = name.replace('\\', "\\\\").replace('"', "\\\"");
        return format!("{how}; filename=\"{quoted}\"");
    }
    let mut encoded = String::new();
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    format!("{how}; filename*=utf-8''{encoded}")
}

/// A token of RFC 7230, which needs no quotes.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$&+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_and_only_harmless_types_are_shown() {
        assert_eq!(header("image/png", Some("ascii")), "inline; filename=ascii");
        assert_eq!(header("Text/Plain; charset=utf-8", None), "inline");
        assert_eq!(header("image/svg", None), "attachment");
        assert_eq!(
            header("text/html", Some("a;b \"c\"")),
            "attachment; filename=\"a;b \\\"c\\\"\""
        );
        assert_eq!(
            header("image/png", Some("☕")),
            "inline; filename*=utf-8''%E2%98%95"
        );
        assert_eq!(
            header("image/png", Some("a\r\nb")),
            "inline; filename*=utf-8''a%0D%0Ab"
        );
    }
}
