//! Push rules: what each user wants to hear of.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#push-rules>

use protocol::id::UserId;
use ruma_common::OwnedUserId;
use ruma_common::push::{
    Action, AnyPushRuleRef, ConditionalPushRuleInit, InsertPushRuleError, NewConditionalPushRule,
    NewPatternedPushRule, NewPushRule, NewSimplePushRule, PatternedPushRuleInit, PushCondition,
    RemovePushRuleError, RuleKind, Ruleset, SoundTweakValue, Tweak,
};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use storage::account_data::GLOBAL;

use crate::Homeserver;
use crate::error::{MatrixError, Result};

/// The account data that holds a user's rules.
pub(crate) const PUSH_RULES: &str = "m.push_rules";
const KINDS: [&str; 5] = ["override", "content", "room", "sender", "underride"];
/// Rules are looked at for every event, so a user may not pile them up.
const RULES_BYTES_MAX: usize = 512 << 10;

/// A rule as a client writes it.
#[derive(Clone, Debug, Deserialize)]
pub struct NewRule {
    #[serde(default)]
    pub actions: Vec<Value>,
    #[serde(default)]
    pub conditions: Vec<Value>,
    pub pattern: Option<String>,
}

/// The rules that everybody begins with.
fn defaults(user: &UserId) -> Ruleset {
    let Ok(id) = OwnedUserId::try_from(user.as_str()) else {
        return Ruleset::new();
    };
    let mut rules = Ruleset::server_default(&id);
    add_rules_on_words(&mut rules, user.localpart());
    rules
}

/// The specification dropped these three with version 1.17, but many clients and bridges still send messages
/// without `m.mentions`, and their mentions would be silent. Events with `m.mentions` are not subject to
/// them, which the crate sees to.
fn add_rules_on_words(rules: &mut Ruleset, localpart: &str) {
    let highlight = vec![
        Action::Notify,
        Action::SetTweak(Tweak::Highlight(true.into())),
    ];
    let loud = [
        vec![
            Action::Notify,
            Action::SetTweak(Tweak::Sound(SoundTweakValue::Default)),
        ],
        highlight[1..].to_vec(),
    ]
    .concat();
    let display_name = ConditionalPushRuleInit {
        actions: loud.clone(),
        default: true,
        enabled: true,
        rule_id: ".m.rule.contains_display_name".to_owned(),
        conditions: conditions(json!([{ "kind": "contains_display_name" }])),
    };
    let everybody = ConditionalPushRuleInit {
        actions: highlight,
        default: true,
        enabled: true,
        rule_id: ".m.rule.roomnotif".to_owned(),
        conditions: conditions(json!([
            { "kind": "event_match", "key": "content.body", "pattern": "@room" },
            { "kind": "sender_notification_permission", "key": "room" },
        ])),
    };
    let user_name = PatternedPushRuleInit {
        actions: loud,
        default: true,
        enabled: true,
        rule_id: ".m.rule.contains_user_name".to_owned(),
        pattern: localpart.to_owned(),
    };
    for (rule, after) in [
        (display_name, ".m.rule.is_user_mention"),
        (everybody, ".m.rule.is_room_mention"),
    ] {
        let place = rules.override_.get_index_of(after).map_or(0, |n| n + 1);
        rules.override_.shift_insert(place, rule.into());
    }
    rules.content.insert(user_name.into());
}

fn conditions(list: Value) -> Vec<PushCondition> {
    serde_json::from_value(list).expect("these are conditions")
}

/// What a new account's account data says.
pub(crate) fn default_content(user: &UserId) -> String {
    content(&defaults(user)).to_string()
}

/// Reads stored rules; what the server has learnt since they were stored is added.
pub(crate) fn read(user: &UserId, stored: Option<&str>) -> Ruleset {
    let known = stored
        .and_then(|text| serde_json::from_str::<Value>(text).ok())
        .and_then(|content| Ruleset::deserialize(&content["global"]).ok());
    match known {
        Some(mut rules) => {
            rules.update_with_server_default(defaults(user));
            rules
        }
        None => defaults(user),
    }
}

/// `{global: {…}}` with a list for every kind, empty or not: clients count on all five.
fn content(rules: &Ruleset) -> Value {
    let mut global = serde_json::to_value(rules).unwrap_or_else(|_| json!({}));
    for kind in KINDS {
        if global.get(kind).is_none() {
            global[kind] = json!([]);
        }
    }
    json!({ "global": global })
}

fn parse_kind(kind: &str) -> Result<RuleKind> {
    if KINDS.contains(&kind) {
        return Ok(RuleKind::from(kind));
    }
    Err(MatrixError::not_found("There is no such kind of push rule"))
}

fn no_rule() -> MatrixError {
    MatrixError::not_found("There is no such push rule")
}

impl Homeserver {
    /// `{global: {…}}`
    pub async fn push_rules(&self, user: &UserId) -> Result<Value> {
        Ok(content(&self.ruleset(user).await?))
    }

    /// The rules of one kind.
    pub async fn push_rules_of_kind(&self, user: &UserId, kind: &str) -> Result<Value> {
        parse_kind(kind)?;
        Ok(self.push_rules(user).await?["global"][kind].take())
    }

    pub async fn push_rule(&self, user: &UserId, kind: &str, rule_id: &str) -> Result<Value> {
        let (rules, kind) = (self.ruleset(user).await?, parse_kind(kind)?);
        let rule = rules.get(kind, rule_id).ok_or_else(no_rule)?;
        let shown = match rule {
            AnyPushRuleRef::Override(rule) | AnyPushRuleRef::Underride(rule) => {
                serde_json::to_value(rule)
            }
            AnyPushRuleRef::Content(rule) => serde_json::to_value(rule),
            AnyPushRuleRef::Room(rule) => serde_json::to_value(rule),
            AnyPushRuleRef::Sender(rule) => serde_json::to_value(rule),
            _ => return Err(no_rule()),
        };
        shown.map_err(|_| MatrixError::internal("The push rule could not be shown"))
    }

    async fn ruleset(&self, user: &UserId) -> Result<Ruleset> {
        let owner = user.clone();
        let stored = self
            .store()
            .read(move |c| storage::account_data::get(c, &owner, GLOBAL, PUSH_RULES));
        Ok(read(user, stored.await?.as_deref()))
    }

    /// Makes or replaces a rule of the user's own.
    pub async fn put_push_rule(
        &self,
        user: &UserId,
        kind: &str,
        rule_id: &str,
        rule: NewRule,
        after: Option<String>,
        before: Option<String>,
    ) -> Result<()> {
        let rule = build(&parse_kind(kind)?, rule_id, rule)?;
        self.change_push_rules(user, move |rules| {
            rules
                .insert(rule.clone(), after.as_deref(), before.as_deref())
                .map_err(|error| match error {
                    InsertPushRuleError::UnknownRuleId => no_rule(),
                    other => MatrixError::invalid_param(other.to_string()),
                })
        })
        .await
    }

    pub async fn delete_push_rule(&self, user: &UserId, kind: &str, rule_id: &str) -> Result<()> {
        let (kind, rule_id) = (parse_kind(kind)?, rule_id.to_owned());
        self.change_push_rules(user, move |rules| {
            rules
                .remove(kind.clone(), &rule_id)
                .map_err(|error| match error {
                    RemovePushRuleError::NotFound => no_rule(),
                    other => MatrixError::invalid_param(other.to_string()),
                })
        })
        .await
    }

    pub async fn enable_push_rule(
        &self,
        user: &UserId,
        kind: &str,
        rule_id: &str,
        enabled: bool,
    ) -> Result<()> {
        let (kind, rule_id) = (parse_kind(kind)?, rule_id.to_owned());
        self.change_push_rules(user, move |rules| {
            rules
                .set_enabled(kind.clone(), &rule_id, enabled)
                .map_err(|_| no_rule())
        })
        .await
    }

    pub async fn set_push_actions(
        &self,
        user: &UserId,
        kind: &str,
        rule_id: &str,
        actions: &[Value],
    ) -> Result<()> {
        let (kind, rule_id, actions) = (
            parse_kind(kind)?,
            rule_id.to_owned(),
            parse_actions(actions)?,
        );
        self.change_push_rules(user, move |rules| {
            rules
                .set_actions(kind.clone(), &rule_id, actions.clone())
                .map_err(|_| no_rule())
        })
        .await
    }

    async fn change_push_rules(
        &self,
        user: &UserId,
        change: impl Fn(&mut Ruleset) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let owner = user.clone();
        let outcome = self.store().write(move |c| {
            let stored = storage::account_data::get(c, &owner, GLOBAL, PUSH_RULES)?;
            let mut rules = read(&owner, stored.as_deref());
            if let Err(refused) = change(&mut rules) {
                return Ok(Err(refused));
            }
            let text = content(&rules).to_string();
            if text.len() > RULES_BYTES_MAX {
                return Ok(Err(MatrixError::too_large("There are too many push rules")));
            }
            storage::account_data::set(c, &owner, GLOBAL, PUSH_RULES, &text).map(|_| Ok(()))
        });
        outcome.await??;
        self.notifier().wake_user(user);
        Ok(())
    }
}

fn parse_actions(actions: &[Value]) -> Result<Vec<Action>> {
    actions
        .iter()
        .map(|action| {
            Action::deserialize(action).map_err(|_| MatrixError::bad_json("This is no push action"))
        })
        .collect()
}

fn build(kind: &RuleKind, rule_id: &str, rule: NewRule) -> Result<NewPushRule> {
    let id = rule_id.to_owned();
    let actions = parse_actions(&rule.actions)?;
    let conditions = || {
        rule.conditions
            .iter()
            .map(|condition| {
                PushCondition::deserialize(condition)
                    .map_err(|_| MatrixError::bad_json("This is no push condition"))
            })
            .collect::<Result<Vec<_>>>()
    };
    let wrong_id =
        || MatrixError::invalid_param("The id of this kind of rule is the id of what it is about");
    Ok(match kind {
        RuleKind::Override => {
            NewPushRule::Override(NewConditionalPushRule::new(id, conditions()?, actions))
        }
        RuleKind::Underride => {
            NewPushRule::Underride(NewConditionalPushRule::new(id, conditions()?, actions))
        }
        RuleKind::Content => {
            let pattern = rule
                .pattern
                .ok_or_else(|| MatrixError::missing_param("pattern is missing"))?;
            NewPushRule::Content(NewPatternedPushRule::new(id, pattern, actions))
        }
        RuleKind::Room => {
            let room = id.try_into().map_err(|_| wrong_id())?;
            NewPushRule::Room(NewSimplePushRule::new(room, actions))
        }
        RuleKind::Sender => {
            let user = id.try_into().map_err(|_| wrong_id())?;
            NewPushRule::Sender(NewSimplePushRule::new(user, actions))
        }
        _ => {
            return Err(MatrixError::invalid_param(
                "There is no such kind of push rule",
            ));
        }
    })
}

/// The actions as stored with an event.
pub(crate) fn actions_json(actions: &[Action]) -> Value {
    serde_json::to_value(actions).unwrap_or_else(|_| Value::Array(Vec::new()))
}

/// The tweaks of stored actions, for a push gateway.
pub(crate) fn tweaks(actions: &Value) -> Map<String, Value> {
    actions
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|action| {
            let name = action.get("set_tweak")?.as_str()?.to_owned();
            Some((
                name,
                action.get("value").cloned().unwrap_or(Value::Bool(true)),
            ))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alice() -> UserId {
        UserId::parse("@alice:example.org").unwrap()
    }

    #[test]
    fn every_kind_has_its_list_and_rules_survive_storing() {
        let mut rules = defaults(&alice());
        let rule = NewRule {
            actions: vec![json!("dont_notify")],
            conditions: Vec::new(),
            pattern: None,
        };
        let rule = build(&RuleKind::Sender, "@bob:example.org", rule).unwrap();
        rules.insert(rule, None, None).unwrap();
        let stored = content(&rules).to_string();
        let again = content(&read(&alice(), Some(&stored)));
        assert_eq!(again.to_string(), stored);
        assert_eq!(again["global"]["sender"][0]["actions"][0], "dont_notify");
        for kind in KINDS {
            assert!(again["global"][kind].is_array(), "{kind}");
        }
        assert_eq!(again["global"]["override"][0]["rule_id"], ".m.rule.master");
    }

    #[test]
    fn mentions_by_words_have_their_place_and_survive_storing() {
        let rules = content(&defaults(&alice()));
        let ids = |kind: &str| -> Vec<String> {
            let rules = rules["global"][kind].as_array().unwrap();
            let id = |rule: &Value| rule["rule_id"].as_str().unwrap().to_owned();
            rules.iter().map(id).collect()
        };
        let overrides = ids("override");
        let at = |id: &str| overrides.iter().position(|other| other == id).unwrap();
        assert_eq!(
            at(".m.rule.is_user_mention") + 1,
            at(".m.rule.contains_display_name")
        );
        assert_eq!(at(".m.rule.is_room_mention") + 1, at(".m.rule.roomnotif"));
        assert_eq!(ids("content"), [".m.rule.contains_user_name"]);
        assert_eq!(rules["global"]["content"][0]["pattern"], "alice");
        let stored = rules.to_string();
        assert_eq!(content(&read(&alice(), Some(&stored))).to_string(), stored);
    }

    #[test]
    fn a_rule_that_makes_no_sense_is_refused() {
        let rule = |actions| NewRule {
            actions,
            conditions: Vec::new(),
            pattern: None,
        };
        assert!(build(&RuleKind::Room, "no room", rule(Vec::new())).is_err());
        assert!(build(&RuleKind::Content, "x", rule(Vec::new())).is_err());
        assert!(build(&RuleKind::Room, "!r:x", rule(vec![json!(3)])).is_err());
        assert!(parse_kind("overide").is_err());
    }
}
