//! What a server says that is not so, or something on the way from it.
//!
//! Only answers: whoever sends a transaction that is forged has lost its events for good. And not those of
//! `/event`, which is how a good copy is asked for when a forged one came: an event of which everybody asked has
//! given a forged copy is left out of the state for good (S-6a), and then no two servers need agree.

use bytes::Bytes;
use protocol::room_version::RoomVersion;
use serde_json::{Value, json};

use super::network::Faults;
use crate::chance::Chance;

/// A version that nobody knows.
const UNHEARD_OF: &str = "org.example.99";

/// What is wrong with one answer, if it is of a kind that can have that.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lies {
    /// Which of its PDUs has a forged signature.
    forged: Option<u64>,
    /// Which of the events of its auth chain is left out.
    left_out: Option<u64>,
    /// Which room version is named instead of the right one.
    version: Option<u64>,
    /// All members are there, and it says that they are not.
    members_omitted: bool,
    /// It does not say who is in the room.
    servers_unnamed: bool,
}

impl Lies {
    pub fn draw(faults: &Faults, chance: &mut Chance) -> Self {
        let which =
            |percent: u64, chance: &mut Chance| chance.percent(percent).then(|| chance.draw());
        Self {
            forged: which(faults.forged_signature, chance),
            left_out: which(faults.missing_auth_event, chance),
            version: which(faults.wrong_version, chance),
            members_omitted: chance.percent(faults.members_omitted),
            servers_unnamed: chance.percent(faults.servers_unnamed),
        }
    }

    /// The answer as it arrives, and what is wrong with it, if anything is.
    pub fn tell(self, path: &str, body: &Bytes) -> Option<(Bytes, Vec<&'static str>)> {
        let kind = Kind::of(path)?;
        let mut answer: Value = serde_json::from_slice(body).ok()?;
        let mut told = Vec::new();
        if let Some(which) = self.version.filter(|_| kind == Kind::MakeJoin) {
            told.extend(name_version(&mut answer, which).then_some("wrong room version"));
        }
        if let Some(which) = self.left_out.filter(|_| kind.is_state()) {
            told.extend(leave_out(&mut answer, which).then_some("auth event left out"));
        }
        if let Some(which) = self.forged {
            told.extend(forge(&mut answer, kind, which).then_some("forged signature"));
        }
        if kind == Kind::SendJoin {
            let omitted = answer["members_omitted"] == true;
            if self.members_omitted && !omitted {
                omit_nobody(&mut answer);
                told.push("nobody omitted");
            }
            if let (true, Some(answer)) = (self.servers_unnamed && omitted, answer.as_object_mut())
            {
                answer.remove("servers_in_room");
                told.push("servers unnamed");
            }
        }
        (!told.is_empty()).then(|| (Bytes::from(answer.to_string()), told))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    MakeJoin,
    SendJoin,
    State,
    Backfill,
    MissingEvents,
}

impl Kind {
    fn of(path: &str) -> Option<Self> {
        let path = path.strip_prefix("/_matrix/federation/")?;
        let (_version, path) = path.split_once('/')?;
        Some(match path.split(['/', '?']).next()? {
            "make_join" => Self::MakeJoin,
            "send_join" => Self::SendJoin,
            "state" => Self::State,
            "backfill" => Self::Backfill,
            "get_missing_events" => Self::MissingEvents,
            _ => return None,
        })
    }

    fn is_state(self) -> bool {
        matches!(self, Self::SendJoin | Self::State)
    }

    /// Where an answer of this kind has PDUs.
    fn sections(self) -> &'static [&'static str] {
        match self {
            Self::MakeJoin => &[],
            Self::SendJoin => &["state", "auth_chain"],
            Self::State => &["pdus", "auth_chain"],
            Self::Backfill => &["pdus"],
            Self::MissingEvents => &["events"],
        }
    }
}

fn name_version(answer: &mut Value, which: u64) -> bool {
    let Some(right) = answer["room_version"].as_str() else {
        return false;
    };
    let wrong: Vec<_> = RoomVersion::ALL
        .iter()
        .map(|version| version.as_str())
        .chain([UNHEARD_OF])
        .filter(|version| *version != right)
        .collect();
    answer["room_version"] = wrong[which as usize % wrong.len()].into();
    true
}

fn leave_out(answer: &mut Value, which: u64) -> bool {
    let Some(chain) = answer["auth_chain"].as_array_mut() else {
        return false;
    };
    if !chain.is_empty() {
        chain.remove(which as usize % chain.len());
        return true;
    }
    false
}

/// One character of each signature of a PDU is another.
fn forge(answer: &mut Value, kind: Kind, which: u64) -> bool {
    let count = |section: &str| answer[section].as_array().map_or(0, Vec::len);
    let total: usize = kind.sections().iter().map(|section| count(section)).sum();
    if total == 0 {
        return false;
    }
    let mut nth = which as usize % total;
    for section in kind.sections() {
        let Some(pdus) = answer[*section].as_array_mut() else {
            continue;
        };
        if let Some(pdu) = pdus.get_mut(nth) {
            let by_server = pdu["signatures"].as_object_mut();
            let by_key = by_server.into_iter().flat_map(|all| all.values_mut());
            for signature in by_key.filter_map(Value::as_object_mut).flatten() {
                let (_key, signature) = signature;
                let text = signature.as_str().unwrap_or_default();
                let first = if text.starts_with('A') { 'B' } else { 'A' };
                *signature = format!("{first}{}", text.get(1..).unwrap_or_default()).into();
            }
            return true;
        }
        nth -= pdus.len();
    }
    false
}

fn omit_nobody(answer: &mut Value) {
    answer["members_omitted"] = true.into();
    let members = answer["state"].as_array().into_iter().flatten();
    let joined = members
        .filter(|pdu| pdu["type"] == "m.room.member" && pdu["content"]["membership"] == "join");
    let mut servers: Vec<_> = joined
        .filter_map(|pdu| Some(pdu["sender"].as_str()?.split_once(':')?.1.to_owned()))
        .collect();
    servers.sort();
    servers.dedup();
    answer["servers_in_room"] = json!(servers);
}
