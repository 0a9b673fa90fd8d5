//! Profiles: ours are set here and told to our rooms; those of others are asked for.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#profiles>

use std::time::Duration;

use protocol::id::UserId;
use room::effect::AskError;
use serde_json::{Map, Value};
use storage::profiles as table;

use crate::Homeserver;
use crate::error::{MatrixError, Result};

/// What other servers take too.
const DISPLAYNAME_CHARS_MAX: usize = 256;
const AVATAR_URL_BYTES_MAX: usize = 1000;
const FIELD_NAME_BYTES_MAX: usize = 255;
/// <https://spec.matrix.org/v1.18/client-server-api/#profiles>: all fields together.
const PROFILE_BYTES_MAX: usize = 65_536;

/// The fields that member events carry.
const IN_MEMBER_EVENTS: [&str; 2] = ["displayname", "avatar_url"];

impl Homeserver {
    /// All fields of a profile.
    pub async fn profile(&self, user: &UserId) -> Result<Map<String, Value>> {
        if !self.config().is_ours(user) {
            return self.remote_profile(user, None).await;
        }
        let mut fields = self.local_profile(user).await?;
        if fields.is_none() && self.ask_appservices_for_user(user).await {
            fields = self.local_profile(user).await?;
        }
        fields.ok_or_else(|| MatrixError::not_found("There is no such profile"))
    }

    /// One field; `M_NOT_FOUND` when there is no user. A user without the field answers `None`.
    pub async fn profile_field(&self, user: &UserId, name: &str) -> Result<Option<Value>> {
        let mut fields = if self.config().is_ours(user) {
            self.profile(user).await?
        } else {
            self.remote_profile(user, Some(name)).await?
        };
        Ok(fields.remove(name))
    }

    /// The profile of one of our users; `None` when there is no such user.
    pub async fn local_profile(&self, user: &UserId) -> Result<Option<Map<String, Value>>> {
        let user = user.clone();
        let fields = self
            .store()
            .read(move |c| match storage::accounts::get(c, &user)? {
                Some(account) if !account.erased => table::all(c, &user).map(Some),
                _ => Ok(None),
            })
            .await?;
        Ok(fields.map(|fields| {
            fields
                .into_iter()
                .filter_map(|(name, value)| Some((name, serde_json::from_str(&value).ok()?)))
                .collect()
        }))
    }

    /// Sets a field, or removes it with `None`, and tells the user's rooms.
    pub async fn set_profile_field(
        &self,
        user: &UserId,
        name: &str,
        value: Option<Value>,
    ) -> Result<()> {
        if !self.config().is_ours(user) {
            return Err(MatrixError::forbidden(
                "This profile belongs to another server",
            ));
        }
        if name.is_empty() || name.len() > FIELD_NAME_BYTES_MAX {
            return Err(MatrixError::new(
                400,
                "M_KEY_TOO_LARGE",
                "The field's name is too long",
            ));
        }
        let value = value.filter(|value| !value.is_null());
        if IN_MEMBER_EVENTS.contains(&name) {
            let text = value.as_ref().map(|value| value.as_str().ok_or(()));
            let Ok(text) = text.transpose() else {
                return Err(MatrixError::invalid_param(format!(
                    "{name} is not a string"
                )));
            };
            let too_long = text.is_some_and(|text| match name {
                "displayname" => text.chars().count() > DISPLAYNAME_CHARS_MAX,
                _ => text.len() > AVATAR_URL_BYTES_MAX,
            });
            if too_long {
                return Err(MatrixError::invalid_param(format!("{name} is too long")));
            }
        }
        let before = self.profile(user).await?;
        if before.get(name) == value.as_ref() {
            return Ok(());
        }
        let mut after = before;
        match &value {
            Some(value) => after.insert(name.to_owned(), value.clone()),
            None => after.remove(name),
        };
        if Value::Object(after).to_string().len() > PROFILE_BYTES_MAX {
            return Err(MatrixError::new(
                400,
                "M_PROFILE_TOO_LARGE",
                "The profile is too large",
            ));
        }
        let (owner, field) = (user.clone(), name.to_owned());
        self.store()
            .write(move |c| match &value {
                Some(value) => table::set(c, &owner, &field, &value.to_string()),
                None => table::remove(c, &owner, &field),
            })
            .await?;
        if IN_MEMBER_EVENTS.contains(&name) {
            self.rooms().update_profile(user).await?;
        }
        Ok(())
    }
}

/// A remote profile is not worth waiting for longer: clients ask for many.
const REMOTE_TIMEOUT: Duration = Duration::from_secs(10);

impl Homeserver {
    async fn remote_profile(
        &self,
        user: &UserId,
        field: Option<&str>,
    ) -> Result<Map<String, Value>> {
        let server = user.server_name();
        let ask = self.client().query_profile(&server, user, field);
        match tokio::time::timeout(REMOTE_TIMEOUT, ask).await {
            Ok(Ok(Value::Object(fields))) => Ok(fields),
            Ok(Err(AskError::Refused { status: 404, .. })) => {
                Err(MatrixError::not_found("There is no such profile"))
            }
            _ => Err(MatrixError::bad_gateway("The user's server does not tell")),
        }
    }
}
