//! What a PDU says of itself, taken at its word: nothing is checked, nothing is hashed.
//!
//! For sorting what has come before the work of verifying it. No decision may rest on it.

use std::borrow::Cow;

use serde::Deserialize;

/// The fields of an `m.room.member` event that tell whose membership it is.
#[derive(Debug, PartialEq, Eq)]
pub struct Member<'a> {
    pub user: Cow<'a, str>,
    pub joined: bool,
}

#[derive(Deserialize)]
struct Event<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    state_key: Cow<'a, str>,
    #[serde(borrow)]
    content: Content<'a>,
}

#[derive(Deserialize)]
struct Content<'a> {
    #[serde(borrow, default)]
    membership: Cow<'a, str>,
}

/// `None` for everything that is not clearly an `m.room.member` state event.
pub fn member(raw: &str) -> Option<Member<'_>> {
    let event: Event = serde_json::from_str(raw).ok()?;
    (event.kind == "m.room.member").then(|| Member {
        joined: event.content.membership == "join",
        user: event.state_key,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_membership_is_told_from_all_else() {
        let member_of = |raw| member(raw).map(|member| (member.user.into_owned(), member.joined));
        let ada = Some(("@ada:a.org".to_owned(), true));
        let join = r#"{"content":{"x":[{}],"membership":"join"},"state_key":"@ada:a.org","type":"m.room.member","z":1}"#;
        assert_eq!(member_of(join), ada);
        let escaped = r#"{"content":{"membership":"j\u006fin"},"state_key":"@ad\u0061:a.org","type":"m.room\u002emember"}"#;
        assert_eq!(member_of(escaped), ada);
        let leave = join.replace("join", "leave");
        assert_eq!(member_of(&leave), Some(("@ada:a.org".to_owned(), false)));
        for other in [
            r#"{"content":{"type":"m.room.member"},"state_key":"","type":"m.room.name"}"#,
            r#"{"content":{},"type":"m.room.member"}"#,
            r#"{"content":1,"state_key":"@ada:a.org","type":"m.room.member"}"#,
            r#"{"content":{},"state_key":"@ada:a.org","type":"m.room.member","type":"m.room.name"}"#,
            "[]",
            "{",
        ] {
            assert_eq!(member_of(other), None, "{other}");
        }
    }
}
