//! Which server to ask next: order, hedging, and what a failure means for the rest (joins.md 1.2, 1.5).

use std::collections::BTreeSet;
use std::time::Duration;

use protocol::id::ServerName;
use serde_json::{Map, Value};

use crate::effect::AskError;
use crate::refusal::Refusal;

/// Servers asked for one handshake (J-42). Whoever lists more knows no more about the room.
pub const CANDIDATES_MAX: usize = 20;
/// A slow server costs this interval and not its timeout.
pub const HEDGE: Duration = Duration::from_millis(300);
/// Templates asked for at the same time. More would be rude to the room.
pub const ASKED_AT_ONCE_MAX: usize = 3;

/// Candidates in the order of their sources: no duplicate, not ourselves, not too many (J-12 to J-15).
pub fn order<'a>(
    sources: impl IntoIterator<Item = &'a ServerName>,
    own: &ServerName,
) -> Vec<ServerName> {
    let mut seen = BTreeSet::new();
    sources
        .into_iter()
        .filter(|name| *name != own && seen.insert((*name).clone()))
        .take(CANDIDATES_MAX)
        .cloned()
        .collect()
}

/// Which half of a handshake failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    Make,
    Send,
}

/// What a candidate's failure means.
#[derive(Clone, Debug, PartialEq)]
pub enum Failure {
    /// It could not be reached, or gave nonsense (J-35): the next one may do better.
    Unreachable { reason: String },
    /// It does not know the room (J-36).
    NotFound(Refusal),
    /// It can not vouch for a restricted join; another server may (J-37).
    Unable(Refusal),
    /// It speaks for the room: asking others is no use (J-27, J-38).
    Final(Refusal),
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unreachable { reason } => f.write_str(reason),
            Self::NotFound(refusal) | Self::Unable(refusal) | Self::Final(refusal) => {
                write!(f, "{refusal}")
            }
        }
    }
}

/// Sorts the failure of one candidate by the table in joins.md 1.5.
pub fn classify(half: Half, error: &AskError) -> Failure {
    let AskError::Refused {
        status,
        errcode,
        error,
        body,
    } = error
    else {
        let AskError::Unreachable { reason } = error else {
            unreachable!("AskError has two forms")
        };
        return Failure::Unreachable {
            reason: reason.clone(),
        };
    };
    let refusal = passed_on(half, *status, errcode, error, body);
    match errcode.as_str() {
        "M_UNABLE_TO_AUTHORISE_JOIN" | "M_UNABLE_TO_GRANT_JOIN" => Failure::Unable(refusal),
        "M_NOT_FOUND" if *status == 404 && half == Half::Make => Failure::NotFound(refusal),
        // A server that does not know the endpoint at all says nothing about the room.
        "M_UNRECOGNIZED" => Failure::Unreachable {
            reason: format!("{status} {errcode}"),
        },
        _ if *status == 404 && errcode.is_empty() => Failure::Unreachable {
            reason: "404 without an errcode".to_owned(),
        },
        _ if *status >= 500 => Failure::Unreachable {
            reason: format!("{status} {errcode}"),
        },
        _ => Failure::Final(refusal),
    }
}

/// J-38, J-41: which words of another server our client may hear. Token errors would log it out.
fn passed_on(half: Half, status: u16, errcode: &str, error: &str, body: &str) -> Refusal {
    let about_us = errcode == "M_UNKNOWN_TOKEN"
        || errcode == "M_MISSING_TOKEN"
        || errcode.starts_with("M_USER_")
        || (half == Half::Send && matches!(errcode, "M_MISSING_PARAM" | "M_INVALID_PARAM"));
    if about_us || !matches!(status, 400 | 403 | 404 | 429) {
        return Refusal::bad_gateway(format!("the resident server answered {status} {errcode}"));
    }
    let errcode = if errcode.is_empty() {
        "M_UNKNOWN"
    } else {
        errcode
    };
    let mut refusal = Refusal::new(status, errcode, error);
    let body: Map<String, Value> = serde_json::from_str(body).unwrap_or_default();
    refusal.extra = body
        .into_iter()
        .filter(|(key, _)| key != "errcode" && key != "error")
        .collect();
    refusal
}

/// What all candidates together came to, for the answer when none is left (J-39, J-40).
#[derive(Clone, Debug, Default)]
pub struct Failures {
    unable: Option<Refusal>,
    not_found: Option<Refusal>,
    other: bool,
    /// The first few, as the one who asked may read them.
    said: Vec<String>,
}

/// How many failures the client's error names.
const SAID_MAX: usize = 5;

impl Failures {
    pub fn note(&mut self, server: &ServerName, failure: Failure) {
        if self.said.len() < SAID_MAX {
            self.said.push(format!("{server}: {failure}"));
        }
        match failure {
            Failure::Unable(refusal) => self.unable = Some(refusal),
            Failure::NotFound(refusal) => self.not_found = Some(refusal),
            Failure::Unreachable { .. } | Failure::Final(_) => self.other = true,
        }
    }

    /// The error for the client once the list is exhausted.
    pub fn sum_up(&self, what: &str) -> Refusal {
        match (&self.unable, &self.not_found, self.other) {
            (Some(refusal), None, false) | (None, Some(refusal), false) => refusal.clone(),
            _ if self.said.is_empty() => {
                Refusal::bad_gateway(format!("there is no server through which to {what}"))
            }
            _ => Refusal::bad_gateway(format!(
                "no server could be used to {what} ({})",
                self.said.join("; ")
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(name: &str) -> ServerName {
        ServerName::parse(name).unwrap()
    }

    fn refused(status: u16, errcode: &str) -> AskError {
        let body = format!(r#"{{"errcode":"{errcode}","error":"no","room_version":"9"}}"#);
        AskError::Refused {
            status,
            errcode: errcode.to_owned(),
            error: "no".to_owned(),
            body: body.into(),
        }
    }

    #[test]
    fn order_keeps_the_first_of_each_and_never_asks_ourselves() {
        let names: Vec<_> = ["b", "us", "a", "b", "c"].map(server).into();
        let ordered = order(&names, &server("us"));
        assert_eq!(ordered, ["b", "a", "c"].map(server));
        let many: Vec<_> = (0..100).map(|n| server(&format!("s{n}"))).collect();
        assert_eq!(order(&many, &server("us")).len(), CANDIDATES_MAX);
    }

    #[test]
    fn failures_go_where_the_table_of_1_5_sends_them() {
        let at = |half, status, errcode| classify(half, &refused(status, errcode));
        assert!(matches!(
            at(Half::Make, 404, "M_NOT_FOUND"),
            Failure::NotFound(_)
        ));
        assert!(matches!(
            at(Half::Send, 404, "M_NOT_FOUND"),
            Failure::Final(_)
        ));
        assert!(matches!(
            at(Half::Make, 400, "M_UNABLE_TO_GRANT_JOIN"),
            Failure::Unable(_)
        ));
        assert!(matches!(
            at(Half::Send, 400, "M_UNABLE_TO_AUTHORISE_JOIN"),
            Failure::Unable(_)
        ));
        assert!(matches!(
            at(Half::Make, 500, "M_UNKNOWN"),
            Failure::Unreachable { .. }
        ));
    }

    #[test]
    fn a_residents_words_are_passed_on_with_their_extra_keys() {
        let Failure::Final(refusal) =
            classify(Half::Make, &refused(400, "M_INCOMPATIBLE_ROOM_VERSION"))
        else {
            panic!("not final");
        };
        assert_eq!(
            (refusal.status, refusal.extra["room_version"].as_str()),
            (400, Some("9"))
        );
    }

    #[test]
    fn a_resident_can_not_log_our_user_out() {
        for (status, errcode) in [
            (401, "M_UNKNOWN_TOKEN"),
            (403, "M_USER_DEACTIVATED"),
            (302, "M_X"),
        ] {
            let Failure::Final(refusal) = classify(Half::Make, &refused(status, errcode)) else {
                panic!("{errcode} is not final");
            };
            assert_eq!(
                (refusal.status, refusal.errcode.as_str()),
                (502, "M_UNKNOWN")
            );
        }
    }

    #[test]
    fn a_bad_event_of_ours_is_not_the_clients_fault() {
        let Failure::Final(refusal) = classify(Half::Send, &refused(400, "M_INVALID_PARAM")) else {
            panic!("not final");
        };
        assert_eq!(refusal.status, 502);
    }

    #[test]
    fn the_last_word_is_the_kindest_that_is_true() {
        let mut failures = Failures::default();
        assert_eq!(failures.sum_up("join").status, 502);
        let a = server("a");
        failures.note(&a, classify(Half::Make, &refused(404, "M_NOT_FOUND")));
        assert_eq!(failures.sum_up("join").status, 404);
        let reason = "dns".to_owned();
        failures.note(&a, Failure::Unreachable { reason });
        let last = failures.sum_up("join");
        assert_eq!(last.status, 502);
        assert!(last.message.contains("a: dns"), "{}", last.message);
    }
}
