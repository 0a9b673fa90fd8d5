//! The members of a full answer that nobody waits for.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use protocol::glance;
use protocol::id::{ServerName, UserId};

use crate::effect::{RawPdu, Section};

/// Member events that came and are not looked at so far. What they say of themselves is believed only
/// as far as it tells which of them to look at, and which servers there may be.
#[derive(Default)]
pub(super) struct Held {
    /// Members that were let through.
    passed: usize,
    /// `None` where the event was released.
    events: Vec<Option<(Section, RawPdu)>>,
    of_user: BTreeMap<Arc<str>, Vec<usize>>,
    /// Servers with a member that has joined, in the state.
    servers: BTreeSet<ServerName>,
}

impl Held {
    /// Keeps the members among these beyond the first `pass`, and gives the rest back.
    pub fn sort(&mut self, section: Section, pdus: Vec<RawPdu>, pass: usize) -> Vec<RawPdu> {
        let mut through = Vec::new();
        for pdu in pdus {
            match glance::member(&pdu) {
                Some(_) if self.passed < pass => {
                    self.passed += 1;
                    through.push(pdu);
                }
                Some(member) => {
                    if member.joined
                        && section == Section::State
                        && let Ok(user) = UserId::parse(&member.user)
                    {
                        self.servers.insert(user.server_name());
                    }
                    let at = self.events.len();
                    let user = member.user.as_ref().into();
                    self.of_user.entry(user).or_default().push(at);
                    self.events.push(Some((section, pdu)));
                }
                None => through.push(pdu),
            }
        }
        through
    }

    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    pub fn servers(&self) -> &BTreeSet<ServerName> {
        &self.servers
    }

    /// The users of this server that something is held of.
    pub fn users_of(&self, server: &ServerName) -> impl Iterator<Item = Arc<str>> {
        let end = format!(":{server}");
        self.of_user
            .keys()
            .filter(move |user| user.ends_with(&end))
            .cloned()
    }

    /// Lets go of what is held of these users.
    pub fn release(&mut self, users: &BTreeSet<Arc<str>>) -> Vec<(Section, RawPdu)> {
        let mut released = Vec::new();
        for user in users {
            for at in self.of_user.remove(user).unwrap_or_default() {
                released.extend(self.events[at].take());
            }
        }
        released
    }

    pub fn rest(&self) -> impl Iterator<Item = (Section, RawPdu)> + '_ {
        self.events.iter().flatten().cloned()
    }

    /// Lets go of all.
    pub fn release_all(&mut self) -> Vec<(Section, RawPdu)> {
        self.of_user.clear();
        std::mem::take(&mut self.events)
            .into_iter()
            .flatten()
            .collect()
    }
}
