//! Which events of a room a user may see.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#server-behaviour-5>

/// The `history_visibility` of a room at some event. Unknown or missing values mean `shared`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum HistoryVisibility {
    Joined,
    Invited,
    Shared,
    WorldReadable,
}

impl HistoryVisibility {
    pub fn parse(text: Option<&str>) -> Self {
        match text {
            Some("joined") => Self::Joined,
            Some("invited") => Self::Invited,
            Some("world_readable") => Self::WorldReadable,
            _ => Self::Shared,
        }
    }
}

/// What the rules read about one event and its reader. An event that changes the visibility or the reader's
/// membership is judged by the more open of before and after.
#[derive(Clone, Copy, Debug)]
pub struct Circumstances<'a> {
    pub visibility: [HistoryVisibility; 2],
    /// The reader's membership before and after the event.
    pub membership: [&'a str; 2],
    /// Whether the reader was joined at some moment after the event.
    pub joined_later: bool,
    /// Whether the event is about the reader's own membership.
    pub own_membership: bool,
}

pub fn visible(about: Circumstances<'_>) -> bool {
    let visibility = about.visibility[0].max(about.visibility[1]);
    if about.own_membership || visibility == HistoryVisibility::WorldReadable {
        return true;
    }
    if about.membership.contains(&"join") {
        return true;
    }
    match visibility {
        HistoryVisibility::WorldReadable => true,
        HistoryVisibility::Shared => about.joined_later,
        HistoryVisibility::Invited => about.membership.contains(&"invite"),
        HistoryVisibility::Joined => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(visibility: &str, membership: &str, joined_later: bool) -> bool {
        visible(Circumstances {
            visibility: [HistoryVisibility::parse(Some(visibility)); 2],
            membership: [membership; 2],
            joined_later,
            own_membership: false,
        })
    }

    #[test]
    fn history_is_as_open_as_the_room_says() {
        for (visibility, membership, joined_later, seen) in [
            ("world_readable", "leave", false, true),
            ("shared", "leave", true, true),
            ("shared", "leave", false, false),
            ("shared", "invite", false, false),
            ("invited", "invite", true, true),
            ("invited", "leave", true, false),
            ("joined", "invite", true, false),
            ("joined", "join", true, true),
            ("nonsense", "leave", true, true),
        ] {
            let got = judge(visibility, membership, joined_later);
            assert_eq!(got, seen, "{visibility} {membership} {joined_later}");
        }
    }

    #[test]
    fn ones_own_leave_is_always_seen() {
        assert!(visible(Circumstances {
            visibility: [HistoryVisibility::Joined; 2],
            membership: ["invite", "leave"],
            joined_later: false,
            own_membership: true,
        }));
    }
}
