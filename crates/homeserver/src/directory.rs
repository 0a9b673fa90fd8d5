//! Aliases and the public room list.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#room-aliases>

use protocol::id::{RoomAlias, RoomId, ServerName, UserId};
use room::effect::AskError;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use storage::sync_reads;

use crate::Homeserver;
use crate::error::{MatrixError, Result};
use crate::room_summary::{Described, describe};
use crate::room_view::{Reader, RoomView};
use crate::send::state_draft;

/// Rooms of the list that are looked at.
const LISTED_MAX: i64 = 10_000;
/// Rooms in one page.
const PAGE_MAX: usize = 500;

pub struct Directory<'a> {
    homeserver: &'a Homeserver,
}

impl Homeserver {
    pub fn directory(&self) -> Directory<'_> {
        Directory { homeserver: self }
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct PublicRoomsAsked {
    pub limit: Option<usize>,
    pub since: Option<String>,
    pub filter: PublicRoomsFilter,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct PublicRoomsFilter {
    pub generic_search_term: Option<String>,
    /// `null` in it stands for rooms without a type.
    pub room_types: Option<Vec<Option<String>>>,
}

impl Directory<'_> {
    pub async fn local_alias(&self, alias: &RoomAlias) -> Result<Option<RoomId>> {
        let alias = alias.clone();
        let row = self
            .homeserver
            .store()
            .read(move |c| storage::directory::alias(c, &alias))
            .await?;
        Ok(row.map(|row| row.room))
    }

    /// The room and the servers to join it by. J-8 to J-11; C-23: of a partial room its approximation.
    pub async fn resolve(&self, alias: &RoomAlias) -> Result<(RoomId, Vec<ServerName>)> {
        let config = self.homeserver.config();
        let unknown = || MatrixError::not_found("There is no such alias");
        if alias.server_name() == config.server_name {
            let mut room = self.local_alias(alias).await?;
            if room.is_none() && self.homeserver.ask_appservices_for_alias(alias).await {
                room = self.local_alias(alias).await?;
            }
            let room = room.ok_or_else(unknown)?;
            let servers = self.servers_of(&room).await?;
            return Ok((room, servers));
        }
        let server = alias.server_name();
        let answer = self
            .homeserver
            .client()
            .query_directory(&server, alias)
            .await;
        match answer {
            Ok(answer) => Ok((answer.room_id, answer.servers)),
            Err(AskError::Refused { status: 404, .. }) => Err(unknown()),
            Err(error) => {
                tracing::info!(%alias, ?error, "an alias could not be looked up");
                Err(MatrixError::bad_gateway(format!(
                    "{server} could not be asked"
                )))
            }
        }
    }

    async fn servers_of(&self, room: &RoomId) -> Result<Vec<ServerName>> {
        let own = self.homeserver.config().server_name.clone();
        let room = room.clone();
        let mut servers = self
            .homeserver
            .store()
            .read(move |c| match storage::timeline::room(c, &room)? {
                Some(room) => sync_reads::servers(c, room.nid),
                None => Ok(Vec::new()),
            })
            .await?;
        if servers.is_empty() {
            return Ok(vec![own]);
        }
        if let Some(place) = servers.iter().position(|server| *server == own) {
            servers[..=place].rotate_right(1);
        }
        Ok(servers)
    }

    /// An alias made by a client.
    pub async fn create(&self, user: &UserId, alias: &RoomAlias, room: &RoomId) -> Result<()> {
        if alias.server_name() != self.homeserver.config().server_name {
            return Err(MatrixError::invalid_param(
                "The alias belongs to another server",
            ));
        }
        let services = self.homeserver.appservices();
        let own_service = services
            .iter()
            .find(|service| service.is_interested_in_user(user));
        if services.alias_is_reserved(alias.as_str(), own_service.map(AsRef::as_ref)) {
            return Err(MatrixError::exclusive(
                "This alias is reserved by an application service",
            ));
        }
        if !crate::membership::is_joined(self.homeserver, room, user).await? {
            return Err(MatrixError::forbidden("You are not in this room"));
        }
        self.add(alias, room, user).await
    }

    pub async fn add(&self, alias: &RoomAlias, room: &RoomId, creator: &UserId) -> Result<()> {
        let (alias, room, creator) = (alias.clone(), room.clone(), creator.clone());
        let added = self
            .homeserver
            .store()
            .write(move |c| storage::directory::add_alias(c, &alias, &room, &creator))
            .await?;
        if added {
            return Ok(());
        }
        Err(MatrixError::new(
            409,
            "M_UNKNOWN",
            "The alias exists already",
        ))
    }

    /// By who made it, by whom the room lets change its canonical alias, or by an administrator.
    pub async fn delete(&self, user: &UserId, alias: &RoomAlias) -> Result<()> {
        let unknown = || MatrixError::not_found("There is no such alias");
        if alias.server_name() != self.homeserver.config().server_name {
            return Err(unknown());
        }
        let asked = alias.clone();
        let row = self
            .homeserver
            .store()
            .read(move |c| storage::directory::alias(c, &asked))
            .await?
            .ok_or_else(unknown)?;
        if row.creator != *user && !self.may_list(user, &row.room).await? {
            return Err(MatrixError::forbidden("The alias is somebody else's"));
        }
        let removed = alias.clone();
        self.homeserver
            .store()
            .write(move |c| storage::directory::remove_alias(c, &removed))
            .await?;
        self.forget_canonical(user, alias, &row.room).await
    }

    /// Takes a deleted alias out of the room's canonical alias event, if the user may.
    async fn forget_canonical(
        &self,
        user: &UserId,
        alias: &RoomAlias,
        room: &RoomId,
    ) -> Result<()> {
        let reader = Reader {
            user: user.clone(),
            device: None,
        };
        let asked = room.clone();
        let event = self
            .homeserver
            .store()
            .read(move |c| {
                let Some(mut view) = RoomView::open(c, &asked, &reader)? else {
                    return Ok(None);
                };
                let state = view.room.state.clone();
                view.state_event(&state, "m.room.canonical_alias", "")
            })
            .await?;
        let Some(event) = event else {
            return Ok(());
        };
        let Value::Object(content) = event.content_value() else {
            return Ok(());
        };
        let Some(content) = without_alias(content, alias.as_str()) else {
            return Ok(());
        };
        let kind = "m.room.canonical_alias";
        let draft = state_draft(user.clone(), kind, "", Value::Object(content));
        if let Err(error) = self.homeserver.rooms().send(draft, room).await {
            tracing::info!(%room, %error, "a deleted alias stays the canonical one");
        }
        Ok(())
    }

    pub async fn aliases_of(&self, user: &UserId, room: &RoomId) -> Result<Vec<RoomAlias>> {
        let reader = Reader {
            user: user.clone(),
            device: None,
        };
        let room = room.clone();
        self.homeserver
            .store()
            .read(move |c| {
                let Some(mut view) = RoomView::open(c, &room, &reader)? else {
                    return Ok(None);
                };
                if !view.is_joined() && !view.world_readable()? {
                    return Ok(None);
                }
                storage::directory::aliases_of(c, &room).map(Some)
            })
            .await?
            .ok_or_else(|| MatrixError::forbidden("You are not in this room"))
    }

    pub async fn is_listed(&self, room: &RoomId) -> Result<bool> {
        let room = room.clone();
        let (known, listed) = self
            .homeserver
            .store()
            .read(move |c| {
                let known = storage::timeline::room(c, &room)?.is_some();
                Ok((known, storage::directory::is_listed(c, &room)?))
            })
            .await?;
        if !known {
            return Err(MatrixError::not_found("There is no such room"));
        }
        Ok(listed)
    }

    /// A client's wish to show or hide a room.
    pub async fn set_listed(&self, user: &UserId, room: &RoomId, listed: bool) -> Result<()> {
        self.is_listed(room).await?;
        if !self.may_list(user, room).await? {
            return Err(MatrixError::forbidden(
                "You may not change the room list for this room",
            ));
        }
        self.list(room, listed).await
    }

    pub async fn list(&self, room: &RoomId, listed: bool) -> Result<()> {
        let room = room.clone();
        self.homeserver
            .store()
            .write(move |c| storage::directory::set_listed(c, &room, listed))
            .await?;
        Ok(())
    }

    async fn may_list(&self, user: &UserId, room: &RoomId) -> Result<bool> {
        let reader = Reader {
            user: user.clone(),
            device: None,
        };
        let room = room.clone();
        let may = self
            .homeserver
            .store()
            .read(move |c| {
                if storage::accounts::get(c, &reader.user)?.is_some_and(|user| user.admin) {
                    return Ok(true);
                }
                let Some(mut view) = RoomView::open(c, &room, &reader)? else {
                    return Ok(false);
                };
                if !view.is_joined() {
                    return Ok(false);
                }
                let state = view.room.state.clone();
                let levels = view.power_levels(&state)?;
                Ok(levels.can_send(&reader.user, "m.room.canonical_alias", true))
            })
            .await?;
        Ok(may)
    }

    /// Our own list, or that of another server.
    pub async fn public_rooms(
        &self,
        server: Option<ServerName>,
        asked: PublicRoomsAsked,
    ) -> Result<Value> {
        if let Some(server) =
            server.filter(|server| *server != self.homeserver.config().server_name)
        {
            return self.remote_public_rooms(&server, asked).await;
        }
        let skip: usize = match asked.since.as_deref().filter(|since| !since.is_empty()) {
            None => 0,
            Some(since) => since
                .parse()
                .map_err(|_| MatrixError::invalid_param("since is no token of this server"))?,
        };
        let limit = asked.limit.unwrap_or(PAGE_MAX).clamp(1, PAGE_MAX);
        let rooms = self
            .homeserver
            .store()
            .read(move |c| {
                let mut rooms = Vec::new();
                for room in storage::directory::listed(c, LISTED_MAX)? {
                    rooms.extend(describe(c, &room)?);
                }
                Ok(rooms)
            })
            .await?;
        let mut rooms: Vec<Described> = rooms
            .into_iter()
            .filter(|room| matches(room, &asked.filter))
            .collect();
        let members = |room: &Described| room.body["num_joined_members"].as_i64().unwrap_or(0);
        rooms.sort_by(|a, b| {
            members(b)
                .cmp(&members(a))
                .then_with(|| a.room.cmp(&b.room))
        });
        let total = rooms.len();
        let chunk: Vec<Map<String, Value>> = rooms
            .into_iter()
            .skip(skip)
            .take(limit)
            .map(|room| room.body)
            .collect();
        let mut body = json!({ "chunk": chunk, "total_room_count_estimate": total });
        if skip + limit < total {
            body["next_batch"] = Value::from((skip + limit).to_string());
        }
        if skip > 0 {
            body["prev_batch"] = Value::from(skip.saturating_sub(limit).to_string());
        }
        Ok(body)
    }

    async fn remote_public_rooms(
        &self,
        server: &ServerName,
        asked: PublicRoomsAsked,
    ) -> Result<Value> {
        let mut body = Map::new();
        if let Some(limit) = asked.limit {
            body.insert("limit".to_owned(), Value::from(limit));
        }
        if let Some(since) = asked.since {
            body.insert("since".to_owned(), Value::from(since));
        }
        let mut filter = Map::new();
        if let Some(term) = asked.filter.generic_search_term {
            filter.insert("generic_search_term".to_owned(), Value::from(term));
        }
        if let Some(types) = asked.filter.room_types {
            filter.insert("room_types".to_owned(), json!(types));
        }
        if !filter.is_empty() {
            body.insert("filter".to_owned(), Value::Object(filter));
        }
        let answer = self
            .homeserver
            .client()
            .public_rooms(server, Value::Object(body))
            .await;
        answer.map_err(|error| {
            tracing::info!(%server, ?error, "a room list could not be fetched");
            MatrixError::bad_gateway(format!("{server} could not be asked"))
        })
    }
}

fn matches(room: &Described, filter: &PublicRoomsFilter) -> bool {
    let text = |key: &str| room.body.get(key).and_then(Value::as_str);
    if let Some(types) = &filter.room_types {
        let own = text("room_type");
        if !types.iter().any(|kind| kind.as_deref() == own) {
            return false;
        }
    }
    let Some(term) = filter
        .generic_search_term
        .as_deref()
        .filter(|term| !term.is_empty())
    else {
        return true;
    };
    let term = term.to_lowercase();
    ["name", "topic", "canonical_alias"]
        .into_iter()
        .filter_map(text)
        .any(|text| text.to_lowercase().contains(&term))
}

/// The content without this alias; `None` when it does not name it.
fn without_alias(mut content: Map<String, Value>, alias: &str) -> Option<Map<String, Value>> {
    let mut changed = false;
    if content.get("alias").is_some_and(|own| own == alias) {
        content.remove("alias");
        changed = true;
    }
    if let Some(Value::Array(others)) = content.get_mut("alt_aliases") {
        let before = others.len();
        others.retain(|other| other != alias);
        changed |= others.len() != before;
        if others.is_empty() {
            content.remove("alt_aliases");
        }
    }
    changed.then_some(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deleted_alias_goes_from_both_places() {
        let Value::Object(content) = json!({"alias": "#a:x", "alt_aliases": ["#a:x", "#b:x"]})
        else {
            unreachable!()
        };
        let left = without_alias(content.clone(), "#a:x").unwrap();
        assert_eq!(Value::Object(left), json!({"alt_aliases": ["#b:x"]}));
        assert_eq!(without_alias(content, "#c:x"), None);
    }
}
