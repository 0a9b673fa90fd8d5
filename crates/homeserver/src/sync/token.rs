//! Sync and pagination tokens: how far a client has seen each stream.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#syncing>

use std::fmt;

/// A token longer than this was not made here.
const TOKEN_BYTES_MAX: usize = 200;

/// Positions in every stream that `/sync` reads. Written as `s` and the numbers in the order of the fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SyncToken {
    pub events: i64,
    pub receipts: i64,
    pub account_data: i64,
    pub to_device: i64,
    pub device_lists: i64,
    pub presence: i64,
    /// "Room became full" (P-31).
    pub became_full: i64,
    /// Memberships of ours in rooms we are not in.
    pub memberships: i64,
    pub typing: i64,
}

impl SyncToken {
    /// `None` for text that is not one of our tokens.
    pub fn parse(text: &str) -> Option<Self> {
        let numbers = numbers(text.strip_prefix('s')?)?;
        let [
            events,
            receipts,
            account_data,
            to_device,
            device_lists,
            presence,
            became_full,
            memberships,
            typing,
        ] = numbers[..]
        else {
            return None;
        };
        Some(Self {
            events,
            receipts,
            account_data,
            to_device,
            device_lists,
            presence,
            became_full,
            memberships,
            typing,
        })
    }
}

impl fmt::Display for SyncToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "s{}_{}_{}_{}_{}_{}_{}_{}_{}",
            self.events,
            self.receipts,
            self.account_data,
            self.to_device,
            self.device_lists,
            self.presence,
            self.became_full,
            self.memberships,
            self.typing
        )
    }
}

/// A place in one room's history, between two events.
///
/// History is walked in order of `(depth, stream)`; a token from `/sync` bounds it by stream instead, since
/// that is what the client has seen. A page that began at such a token carries both, so that a late event of
/// a low depth is neither shown twice nor skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageToken {
    /// Only events up to here in stream order (walking back), or after it (walking forward).
    pub stream: Option<i64>,
    /// Walking back: only events before this; walking forward: only events after it.
    pub place: Option<(i64, i64)>,
}

impl PageToken {
    pub fn at_stream(stream: i64) -> Self {
        Self {
            stream: Some(stream),
            place: None,
        }
    }

    /// Accepts the tokens of `/sync` also.
    pub fn parse(text: &str) -> Option<Self> {
        if text.starts_with('s') {
            return SyncToken::parse(text).map(|token| Self::at_stream(token.events));
        }
        if let Some(rest) = text.strip_prefix('p') {
            let [stream, depth, order] = numbers(rest)?[..] else {
                return None;
            };
            return Some(Self {
                stream: Some(stream),
                place: Some((depth, order)),
            });
        }
        match numbers(text.strip_prefix('t')?)?[..] {
            [stream] => Some(Self::at_stream(stream)),
            [depth, order] => Some(Self {
                stream: None,
                place: Some((depth, order)),
            }),
            _ => None,
        }
    }
}

impl fmt::Display for PageToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.stream, self.place) {
            (Some(stream), Some((depth, order))) => write!(f, "p{stream}_{depth}_{order}"),
            (Some(stream), None) => write!(f, "t{stream}"),
            (None, Some((depth, order))) => write!(f, "t{depth}_{order}"),
            (None, None) => write!(f, "t{}", i64::MAX),
        }
    }
}

fn numbers(text: &str) -> Option<Vec<i64>> {
    if text.len() > TOKEN_BYTES_MAX {
        return None;
    }
    text.split('_').map(|part| part.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sync_token_reads_back_as_it_was_written() {
        let token = SyncToken {
            events: 17,
            typing: 3,
            became_full: 2,
            ..SyncToken::default()
        };
        assert_eq!(SyncToken::parse(&token.to_string()), Some(token));
    }

    #[test]
    fn foreign_tokens_are_refused() {
        for bad in [
            "",
            "s",
            "s1",
            "s1_2_3_4_5_6_7_8_x",
            "x1_2",
            "s1_2_3_4_5_6_7_8_9_10",
        ] {
            assert_eq!(SyncToken::parse(bad), None, "{bad}");
        }
        let long = format!("t{}", "1".repeat(TOKEN_BYTES_MAX + 1));
        assert_eq!(PageToken::parse(&long), None);
        assert_eq!(PageToken::parse("t1_2_3"), None);
    }

    #[test]
    fn page_tokens_read_back_as_they_were_written() {
        for token in [
            PageToken::at_stream(-4),
            PageToken {
                stream: None,
                place: Some((7, -2)),
            },
            PageToken {
                stream: Some(9),
                place: Some((7, 2)),
            },
        ] {
            assert_eq!(PageToken::parse(&token.to_string()), Some(token));
        }
    }

    #[test]
    fn a_sync_token_serves_as_a_page_token() {
        let token = SyncToken {
            events: 5,
            ..SyncToken::default()
        };
        assert_eq!(
            PageToken::parse(&token.to_string()),
            Some(PageToken::at_stream(5))
        );
    }
}
