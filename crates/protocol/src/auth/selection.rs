//! Which state events an event's rules read, and so may stand in its `auth_events` (V-17).
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#auth-events-selection>

use serde_json::Value;

use crate::event_set::StateKey;
use crate::id::UserId;
use crate::pdu::Pdu;
use crate::room_version::{RoomVersion, Rules};

/// The keys whose events, as far as there are any, an event like this has as auth events.
pub fn auth_types(
    version: RoomVersion,
    kind: &str,
    sender: &UserId,
    state_key: Option<&str>,
    content: &Value,
) -> Vec<StateKey> {
    let get = |key: &str| content.get(key).cloned();
    Selection::new(version.rules(), kind, sender, state_key, &get).keys()
}

/// The same for an event that is there already.
pub fn auth_types_of(pdu: &Pdu) -> Vec<StateKey> {
    Selection::of(pdu.version.rules(), pdu).keys()
}

pub(super) struct Selection<'a> {
    /// A create event stands on nothing.
    nothing: bool,
    create: bool,
    sender: &'a str,
    target: Option<&'a str>,
    join_rules: bool,
    token: Option<String>,
    authoriser: Option<String>,
}

impl<'a> Selection<'a> {
    pub(super) fn of(rules: &Rules, pdu: &'a Pdu) -> Self {
        let state_key = pdu.state_key.as_deref();
        Self::new(rules, &pdu.kind, &pdu.sender, state_key, &|key| {
            pdu.content_get(key)
        })
    }

    fn new(
        rules: &Rules,
        kind: &str,
        sender: &'a UserId,
        state_key: Option<&'a str>,
        content: &dyn Fn(&str) -> Option<Value>,
    ) -> Self {
        let mut selection = Self {
            nothing: kind == "m.room.create",
            create: rules.create_in_auth_events,
            sender: sender.as_str(),
            target: None,
            join_rules: false,
            token: None,
            authoriser: None,
        };
        if kind != "m.room.member" {
            return selection;
        }
        selection.target = state_key;
        let membership = content("membership");
        let membership = membership.as_ref().and_then(Value::as_str);
        selection.join_rules = matches!(membership, Some("join" | "invite" | "knock"));
        if membership == Some("invite") {
            selection.token = content("third_party_invite")
                .as_ref()
                .and_then(|invite| invite.get("signed")?.get("token")?.as_str())
                .map(str::to_owned);
        }
        if membership == Some("join") && rules.restricted {
            selection.authoriser = content("join_authorised_via_users_server")
                .as_ref()
                .and_then(Value::as_str)
                .map(str::to_owned);
        }
        selection
    }

    pub(super) fn has(&self, kind: &str, state_key: &str) -> bool {
        if self.nothing {
            return false;
        }
        match kind {
            "m.room.create" => self.create && state_key.is_empty(),
            "m.room.power_levels" => state_key.is_empty(),
            "m.room.join_rules" => self.join_rules && state_key.is_empty(),
            "m.room.third_party_invite" => self.token.as_deref() == Some(state_key),
            "m.room.member" => {
                state_key == self.sender
                    || self.target == Some(state_key)
                    || self.authoriser.as_deref() == Some(state_key)
            }
            _ => false,
        }
    }

    fn keys(&self) -> Vec<StateKey> {
        if self.nothing {
            return Vec::new();
        }
        let mut keys: Vec<StateKey> = Vec::new();
        let mut add = |kind: &str, state_key: &str| {
            let key = (kind.into(), state_key.into());
            if !keys.contains(&key) {
                keys.push(key);
            }
        };
        if self.create {
            add("m.room.create", "");
        }
        add("m.room.power_levels", "");
        if self.join_rules {
            add("m.room.join_rules", "");
        }
        let members = [Some(self.sender), self.target, self.authoriser.as_deref()];
        for user in members.into_iter().flatten() {
            add("m.room.member", user);
        }
        if let Some(token) = &self.token {
            add("m.room.third_party_invite", token);
        }
        keys
    }
}
