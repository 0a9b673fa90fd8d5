//! Creating a room: from the request of a client to the events that a room begins with.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#post_matrixclientv3createroom>

use protocol::id::{RoomAlias, RoomId, UserId};
use protocol::room_version::RoomVersion;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::Homeserver;
use crate::error::{MatrixError, Result};
use crate::rooms::Draft;
use crate::send::state_draft;

/// Events in `initial_state`.
const INITIAL_STATE_MAX: usize = 1000;
/// Users invited by one request.
const INVITES_MAX: usize = 100;

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct CreateRoom {
    pub visibility: Option<Visibility>,
    pub room_alias_name: Option<String>,
    pub name: Option<String>,
    pub topic: Option<String>,
    pub invite: Vec<String>,
    pub room_version: Option<String>,
    pub creation_content: Option<Map<String, Value>>,
    pub initial_state: Vec<InitialState>,
    pub preset: Option<Preset>,
    pub is_direct: bool,
    pub power_level_content_override: Option<Map<String, Value>>,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Visibility {
    Public,
    Private,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Preset {
    PrivateChat,
    TrustedPrivateChat,
    PublicChat,
}

#[derive(Clone, Debug, Deserialize)]
pub struct InitialState {
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(default)]
    pub state_key: String,
    pub content: Map<String, Value>,
}

/// `(displayname, avatar_url)` of the creator.
pub type Profile = (Option<String>, Option<String>);

/// The profile of one of our users. Who has none has no name, and that is all.
pub(crate) async fn profile_of(homeserver: &Homeserver, user: &UserId) -> Result<Profile> {
    let profile = homeserver.local_profile(user).await?.unwrap_or_default();
    let text = |key: &str| profile.get(key).and_then(Value::as_str).map(str::to_owned);
    Ok((text("displayname"), text("avatar_url")))
}

/// What a request comes to, before anything is made.
struct Plan {
    version: RoomVersion,
    drafts: Vec<Draft>,
    invites: Vec<UserId>,
}

/// Makes the room, its alias and its entry in the room list, and invites whom it should.
pub async fn create_room(
    homeserver: &Homeserver,
    creator: &UserId,
    request: CreateRoom,
) -> Result<RoomId> {
    let alias = match &request.room_alias_name {
        Some(name) => Some(local_alias(homeserver, name)?),
        None => None,
    };
    if let Some(alias) = &alias
        && homeserver.directory().local_alias(alias).await?.is_some()
    {
        return Err(MatrixError::room_in_use("The alias is taken"));
    }
    let profile = profile_of(homeserver, creator).await?;
    let version = version_of(request.room_version.as_deref(), homeserver.config())?;
    let plan = plan(creator, version, profile, alias.as_ref(), &request)?;
    let room = homeserver
        .rooms()
        .create(creator, plan.version, plan.drafts)
        .await?;
    if let Some(alias) = &alias {
        homeserver.directory().add(alias, &room, creator).await?;
    }
    if request.visibility == Some(Visibility::Public) {
        homeserver.directory().list(&room, true).await?;
    }
    for target in &plan.invites {
        let invited = homeserver
            .rooms()
            .invite(creator, &room, target, None, request.is_direct)
            .await;
        // The room stands already; one unreachable server must not make the request a failure.
        if let Err(error) = invited {
            tracing::warn!(%room, %target, %error, "invite of createRoom failed");
        }
    }
    Ok(room)
}

/// Makes a room with further events after its own, all in one commit.
pub(crate) async fn create_with(
    homeserver: &Homeserver,
    creator: &UserId,
    request: &CreateRoom,
    further: Vec<Draft>,
) -> Result<RoomId> {
    let profile = profile_of(homeserver, creator).await?;
    let version = version_of(request.room_version.as_deref(), homeserver.config())?;
    let mut plan = plan(creator, version, profile, None, request)?;
    plan.drafts.extend(further);
    homeserver
        .rooms()
        .create(creator, plan.version, plan.drafts)
        .await
}

fn version_of(asked: Option<&str>, config: &crate::config::Config) -> Result<RoomVersion> {
    let Some(text) = asked else {
        return Ok(config.default_room_version);
    };
    RoomVersion::parse(text).ok_or_else(|| {
        MatrixError::unsupported_room_version(format!("Room version {text:?} is not supported"))
    })
}

fn local_alias(homeserver: &Homeserver, name: &str) -> Result<RoomAlias> {
    let bad = || MatrixError::invalid_param("room_alias_name is no local part of an alias");
    if name.is_empty()
        || name.contains(':')
        || name.starts_with('#')
        || name.contains(char::is_whitespace)
    {
        return Err(bad());
    }
    RoomAlias::parse(&format!("#{name}:{}", homeserver.config().server_name)).map_err(|_| bad())
}

fn plan(
    creator: &UserId,
    version: RoomVersion,
    profile: Profile,
    alias: Option<&RoomAlias>,
    request: &CreateRoom,
) -> Result<Plan> {
    if request.initial_state.len() > INITIAL_STATE_MAX || request.invite.len() > INVITES_MAX {
        return Err(MatrixError::invalid_param("too much for one room"));
    }
    let invites = request
        .invite
        .iter()
        .map(|user| {
            UserId::parse(user)
                .map_err(|_| MatrixError::invalid_param(format!("{user:?} is no user id")))
        })
        .collect::<Result<Vec<_>>>()?;
    let preset = request.preset.unwrap_or(match request.visibility {
        Some(Visibility::Public) => Preset::PublicChat,
        _ => Preset::PrivateChat,
    });
    let create = create_content(creator, version, preset, &invites, request)?;
    let levels = power_levels(creator, version, preset, &invites, &create, request)?;

    let mut drafts = Drafts {
        sender: creator,
        list: Vec::new(),
    };
    drafts.add("m.room.create", "", Value::Object(create));
    drafts.add(
        "m.room.member",
        creator.as_str(),
        member_content(profile, request.is_direct),
    );
    drafts.add("m.room.power_levels", "", Value::Object(levels));
    if let Some(alias) = alias {
        drafts.add("m.room.canonical_alias", "", json!({"alias": alias}));
    }
    let in_initial_state = |kind: &str| {
        request
            .initial_state
            .iter()
            .any(|event| event.kind == kind && event.state_key.is_empty())
    };
    let (join_rule, guests) = match preset {
        Preset::PublicChat => ("public", false),
        Preset::PrivateChat | Preset::TrustedPrivateChat => ("invite", true),
    };
    if !in_initial_state("m.room.join_rules") {
        drafts.add("m.room.join_rules", "", json!({"join_rule": join_rule}));
    }
    if !in_initial_state("m.room.history_visibility") {
        drafts.add(
            "m.room.history_visibility",
            "",
            json!({"history_visibility": "shared"}),
        );
    }
    if guests && !in_initial_state("m.room.guest_access") {
        drafts.add(
            "m.room.guest_access",
            "",
            json!({"guest_access": "can_join"}),
        );
    }
    for event in &request.initial_state {
        match event.kind.as_str() {
            "m.room.create" | "m.room.member" => {
                return Err(MatrixError::bad_json(format!(
                    "initial_state may not hold {}",
                    event.kind
                )));
            }
            // The power levels are already in, with these merged in.
            "m.room.power_levels" if event.state_key.is_empty() => {}
            // The explicit keys win over initial_state.
            "m.room.topic" if request.topic.is_some() && event.state_key.is_empty() => {}
            "m.room.name" if request.name.is_some() && event.state_key.is_empty() => {}
            kind => drafts.add(kind, &event.state_key, Value::Object(event.content.clone())),
        }
    }
    if let Some(name) = &request.name {
        drafts.add("m.room.name", "", json!({"name": name}));
    }
    if let Some(topic) = &request.topic {
        drafts.add("m.room.topic", "", topic_content(topic));
    }
    Ok(Plan {
        version,
        drafts: drafts.list,
        invites,
    })
}

pub(crate) fn topic_content(topic: &str) -> Value {
    json!({"topic": topic, "m.topic": {"m.text": [{"body": topic}]}})
}

struct Drafts<'a> {
    sender: &'a UserId,
    list: Vec<Draft>,
}

impl Drafts<'_> {
    fn add(&mut self, kind: &str, state_key: &str, content: Value) {
        self.list
            .push(state_draft(self.sender.clone(), kind, state_key, content));
    }
}

fn member_content((displayname, avatar_url): Profile, is_direct: bool) -> Value {
    let mut content = json!({"membership": "join"});
    for (key, value) in [("displayname", displayname), ("avatar_url", avatar_url)] {
        if let Some(value) = value {
            content[key] = Value::from(value);
        }
    }
    if is_direct {
        content["is_direct"] = Value::from(true);
    }
    content
}

/// Whether the creators of rooms of this version stand above all power levels.
pub fn privileged_creators(version: RoomVersion) -> bool {
    version >= RoomVersion::V12
}

fn create_content(
    creator: &UserId,
    version: RoomVersion,
    preset: Preset,
    invites: &[UserId],
    request: &CreateRoom,
) -> Result<Map<String, Value>> {
    let mut content = request.creation_content.clone().unwrap_or_default();
    content.insert("room_version".to_owned(), Value::from(version.as_str()));
    if version < RoomVersion::V11 {
        content.insert("creator".to_owned(), Value::from(creator.as_str()));
    } else {
        content.remove("creator");
    }
    if privileged_creators(version) {
        let mut creators = additional_creators(&content)?;
        if preset == Preset::TrustedPrivateChat {
            for user in invites {
                if !creators.contains(user) {
                    creators.push(user.clone());
                }
            }
        }
        creators.retain(|user| user != creator);
        if creators.is_empty() {
            content.remove("additional_creators");
        } else {
            content.insert("additional_creators".to_owned(), json!(creators));
        }
    }
    Ok(content)
}

/// The additional creators that a create event's content names (U-36).
pub fn additional_creators(content: &Map<String, Value>) -> Result<Vec<UserId>> {
    let bad = || MatrixError::bad_json("additional_creators must be a list of user ids");
    let Some(value) = content.get("additional_creators") else {
        return Ok(Vec::new());
    };
    value
        .as_array()
        .ok_or_else(bad)?
        .iter()
        .map(|user| {
            let user = user.as_str().ok_or_else(bad)?;
            UserId::parse(user).map_err(|_| bad())
        })
        .collect()
}

fn power_levels(
    creator: &UserId,
    version: RoomVersion,
    preset: Preset,
    invites: &[UserId],
    create: &Map<String, Value>,
    request: &CreateRoom,
) -> Result<Map<String, Value>> {
    let privileged = privileged_creators(version);
    let mut users = Map::new();
    if !privileged {
        users.insert(creator.to_string(), Value::from(100));
        if preset == Preset::TrustedPrivateChat {
            users.extend(
                invites
                    .iter()
                    .map(|user| (user.to_string(), Value::from(100))),
            );
        }
    }
    let invite = if preset == Preset::PublicChat { 50 } else { 0 };
    let tombstone = if privileged { 150 } else { 100 };
    let Value::Object(mut levels) = json!({
        "users": users,
        "users_default": 0,
        "events": {
            "m.room.name": 50,
            "m.room.power_levels": 100,
            "m.room.history_visibility": 100,
            "m.room.canonical_alias": 50,
            "m.room.avatar": 50,
            "m.room.tombstone": tombstone,
            "m.room.server_acl": 100,
            "m.room.encryption": 100,
        },
        "events_default": 0,
        "state_default": 50,
        "ban": 50,
        "kick": 50,
        "redact": 50,
        "invite": invite,
        "historical": 100,
    }) else {
        return Err(MatrixError::internal("power levels are an object"));
    };
    let from_initial_state = request
        .initial_state
        .iter()
        .filter(|event| event.kind == "m.room.power_levels" && event.state_key.is_empty())
        .map(|event| &event.content);
    for over in from_initial_state.chain(&request.power_level_content_override) {
        for (key, value) in over {
            levels.insert(key.clone(), value.clone());
        }
    }
    if privileged {
        let named = |user: &str| levels["users"].get(user).is_some();
        if named(creator.as_str())
            || additional_creators(create)?
                .iter()
                .any(|u| named(u.as_str()))
        {
            return Err(MatrixError::bad_json(
                "The creators of a room stand above its power levels and may not be in them",
            ));
        }
    }
    Ok(levels)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(version: RoomVersion, request: Value) -> Result<Plan> {
        let creator = UserId::parse("@alice:hs1").unwrap();
        let request: CreateRoom = serde_json::from_value(request).unwrap();
        plan(&creator, version, (None, None), None, &request)
    }

    fn kinds(plan: &Plan) -> Vec<&str> {
        plan.drafts
            .iter()
            .map(|draft| draft.kind.as_str())
            .collect()
    }

    #[test]
    fn a_public_chat_begins_with_exactly_five_events() {
        let plan = planned(RoomVersion::V11, json!({"preset": "public_chat"})).unwrap();
        assert_eq!(
            kinds(&plan),
            [
                "m.room.create",
                "m.room.member",
                "m.room.power_levels",
                "m.room.join_rules",
                "m.room.history_visibility"
            ]
        );
        assert_eq!(plan.drafts[2].content["invite"], 50);
        assert_eq!(plan.drafts[2].content["users"]["@alice:hs1"], 100);
    }

    #[test]
    fn initial_state_takes_the_place_of_the_preset() {
        let plan = planned(
            RoomVersion::V11,
            json!({
                "preset": "public_chat",
                "topic": "explicit",
                "initial_state": [
                    {"type": "m.room.history_visibility", "content": {"history_visibility": "joined"}},
                    {"type": "m.room.topic", "content": {"topic": "lost"}}
                ]
            }),
        )
        .unwrap();
        let of = |kind: &str| -> Vec<&Value> {
            let events = plan.drafts.iter().filter(|d| d.kind == kind);
            events.map(|d| &d.content).collect()
        };
        assert_eq!(
            of("m.room.history_visibility"),
            [&json!({"history_visibility": "joined"})]
        );
        assert_eq!(of("m.room.topic")[0]["topic"], "explicit");
        assert_eq!(of("m.room.topic").len(), 1);
    }

    #[test]
    fn creators_of_version_12_are_not_in_the_power_levels() {
        let plan = planned(
            RoomVersion::V12,
            json!({"preset": "trusted_private_chat", "invite": ["@bob:hs1"],
                "creation_content": {"additional_creators": ["@carol:hs1"], "creator": "@x:y"}}),
        )
        .unwrap();
        let create = &plan.drafts[0].content;
        assert_eq!(
            create["additional_creators"],
            json!(["@carol:hs1", "@bob:hs1"])
        );
        assert_eq!(create.get("creator"), None);
        let levels = &plan.drafts[2].content;
        assert_eq!(levels["users"], json!({}));
        assert_eq!(levels["events"]["m.room.tombstone"], 150);
        let over = json!({"power_level_content_override": {"users": {"@alice:hs1": 100}}});
        assert_eq!(
            planned(RoomVersion::V12, over).err().map(|e| e.status),
            Some(400)
        );
    }

    #[test]
    fn additional_creators_must_be_user_ids() {
        for bad in [
            json!("x"),
            json!(["@foo:example.com", 42]),
            json!(["@invalid:dom$ain$.com"]),
        ] {
            let request = json!({"creation_content": {"additional_creators": bad}});
            assert!(planned(RoomVersion::V12, request).is_err());
        }
    }
}
