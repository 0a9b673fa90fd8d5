//! Accounts: making them, logging in and out, and who a token belongs to.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#client-authentication>

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use protocol::id::UserId;
use rand::RngExt as _;
use serde_json::Value;
use sha2::{Digest, Sha256};
use storage::account_data::GLOBAL;
use storage::accounts as table;
use storage::accounts::Purpose;

use crate::Homeserver;
pub use crate::appservice::Appservice;
use crate::config::Registration;
use crate::device_lists;
use crate::error::{MatrixError, Result};
use crate::limits::Limit;
use crate::push_rules::{self, PUSH_RULES};
use crate::uia::{Flows, Stage};

/// How long an access token lives when the client can refresh it.
const ACCESS_TOKEN_LIFE_MS: i64 = 5 * 60 * 1000;
/// A device's last sight is written once in this time.
const NOTE_EVERY_MS: i64 = 5 * 60 * 1000;
/// Devices whose last sight is remembered; beyond, all are written again.
const NOTED_MAX: usize = 10_000;
const LOGIN_TOKEN_LIFE_MS: i64 = 2 * 60 * 1000;
const OPENID_TOKEN_LIFE_MS: i64 = 3600 * 1000;
/// Long enough for any client's own ids; the whole identifier space of devices is ours to store.
const DEVICE_ID_BYTES_MAX: usize = 255;

/// What a request brought to prove who is calling.
#[derive(Clone)]
pub struct Credentials {
    pub token: String,
    /// Whom an application service wants to be.
    pub user: Option<String>,
    pub device: Option<String>,
    /// Where the request came from, if that is known.
    pub address: Option<IpAddr>,
}

/// When each device was last noted in the store.
#[derive(Default)]
pub(crate) struct NotedDevices(Mutex<HashMap<(UserId, String), i64>>);

/// Who is calling.
#[derive(Clone, Debug)]
pub struct Caller {
    pub user: UserId,
    /// `None` for an application service that names no device.
    pub device: Option<String>,
    pub guest: bool,
    pub admin: bool,
    pub appservice: Option<Arc<Appservice>>,
}

/// What a client asks for when it logs in or registers.
#[derive(Clone, Debug, Default)]
pub struct Session {
    pub device_id: Option<String>,
    pub display_name: Option<String>,
    pub wants_refresh_token: bool,
}

/// A session that was opened or refreshed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    pub user: UserId,
    pub device: String,
    pub access_token: String,
    pub refresh_token: Option<String>,
    pub expires_in_ms: Option<i64>,
}

#[derive(Clone, Debug, Default)]
pub struct NewAccount {
    pub username: Option<String>,
    pub password: Option<String>,
    /// `None` with `inhibit_login`.
    pub session: Option<Session>,
}

/// 256 random bits.
pub(crate) fn random_token() -> String {
    let bytes: [u8; 32] = rand::rng().random();
    URL_SAFE_NO_PAD.encode(bytes)
}

fn random_device_id() -> String {
    let mut rng = rand::rng();
    (0..10)
        .map(|_| char::from(rng.random_range(b'A'..=b'Z')))
        .collect()
}

fn digest(token: &str) -> String {
    Sha256::digest(token.as_bytes())
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

impl Homeserver {
    /// Who is calling with this token.
    pub async fn authenticate(&self, credentials: &Credentials) -> Result<Caller> {
        if let Some(service) = self.appservices().with_token(&credentials.token) {
            return self.as_appservice(Arc::clone(service), credentials).await;
        }
        let token = digest(&credentials.token);
        let key = token.clone();
        let owner = self
            .store()
            .read(move |c| table::token_owner(c, &key))
            .await?;
        let Some(owner) = owner else {
            return Err(
                MatrixError::unknown_token("Unknown access token").with("soft_logout", false)
            );
        };
        if owner
            .expires_ms
            .is_some_and(|at| at <= self.clock().unix_ms())
        {
            return Err(MatrixError::unknown_token("The access token has expired")
                .with("soft_logout", true));
        }
        if owner.locked {
            return Err(
                MatrixError::new(401, "M_USER_LOCKED", "This account is locked")
                    .with("soft_logout", true),
            );
        }
        if let Some(old) = owner.supersedes.clone() {
            self.store()
                .write(move |c| table::end_superseded(c, &token, &old))
                .await?;
        }
        self.note_device(&owner.user, &owner.device, credentials.address);
        Ok(Caller {
            user: owner.user,
            device: Some(owner.device),
            guest: owner.guest,
            admin: owner.admin,
            appservice: None,
        })
    }

    /// <https://spec.matrix.org/v1.18/application-service-api/#identity-assertion>
    async fn as_appservice(
        &self,
        service: Arc<Appservice>,
        credentials: &Credentials,
    ) -> Result<Caller> {
        let user = match &credentials.user {
            None => service.sender.clone(),
            Some(named) => UserId::parse(named)
                .ok()
                .filter(|user| self.config().is_ours(user) && service.is_interested_in_user(user))
                .ok_or_else(|| {
                    MatrixError::forbidden("The application service may not be this user")
                })?,
        };
        let known = user.clone();
        let account = self.store().read(move |c| table::get(c, &known)).await?;
        match account {
            Some(account) if account.deactivated => {
                return Err(MatrixError::new(
                    403,
                    "M_USER_DEACTIVATED",
                    "This user is deactivated",
                ));
            }
            None if user != service.sender => {
                return Err(MatrixError::forbidden(
                    "The application service has not registered this user",
                ));
            }
            _ => {}
        }
        if let Some(device) = credentials.device.clone() {
            let owner = user.clone();
            let found = self
                .store()
                .read(move |c| storage::devices::get(c, &owner, &device))
                .await?;
            if found.is_none() {
                return Err(MatrixError::new(
                    400,
                    "M_UNKNOWN_DEVICE",
                    "This user has no such device",
                ));
            }
        }
        Ok(Caller {
            user,
            device: credentials.device.clone(),
            guest: false,
            admin: false,
            appservice: Some(service),
        })
    }

    /// The application service's own user exists without registration.
    pub async fn create_appservice_senders(&self) -> Result<()> {
        for service in self.appservices().iter() {
            let (user, id, now_ms) = (
                service.sender.clone(),
                service.id.clone(),
                self.clock().unix_ms(),
            );
            self.store()
                .write(move |c| {
                    let new = table::User {
                        created_ms: now_ms,
                        appservice: Some(id.clone()),
                        ..table::User::default()
                    };
                    table::create(c, &user, &new)
                })
                .await?;
        }
        Ok(())
    }

    /// The user id that a wanted name makes, if it is allowed and free.
    pub async fn check_username(
        &self,
        username: &str,
        service: Option<&Appservice>,
    ) -> Result<UserId> {
        let user = self.parse_username(username, service)?;
        let wanted = user.clone();
        if self
            .store()
            .read(move |c| table::get(c, &wanted))
            .await?
            .is_some()
        {
            return Err(MatrixError::user_in_use("This user name is taken"));
        }
        Ok(user)
    }

    /// <https://spec.matrix.org/v1.18/appendices/#user-identifiers>
    fn parse_username(&self, username: &str, service: Option<&Appservice>) -> Result<UserId> {
        let localpart = username.to_ascii_lowercase();
        let plain = |byte: u8| {
            byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._=-/+".contains(&byte)
        };
        if localpart.is_empty() || !localpart.bytes().all(plain) {
            return Err(MatrixError::invalid_username(
                "A user name can only have the characters a-z, 0-9, and . _ = - / +",
            ));
        }
        if localpart.starts_with('_') && service.is_none() {
            return Err(MatrixError::invalid_username(
                "A user name may not begin with _",
            ));
        }
        let user = UserId::parse(&format!("@{localpart}:{}", self.config().server_name))
            .map_err(|_| MatrixError::invalid_username("The user name is too long"))?;
        if self.appservices().user_is_reserved(&user, service) {
            return Err(MatrixError::exclusive(
                "This user name is reserved by an application service",
            ));
        }
        if service.is_some_and(|service| !service.is_interested_in_user(&user)) {
            return Err(MatrixError::exclusive(
                "This user name is outside of the application service's names",
            ));
        }
        Ok(user)
    }

    fn registration_flows(&self) -> Result<Flows> {
        match self.config().registration {
            Registration::Closed => Err(MatrixError::forbidden(
                "Registration is closed on this server",
            )),
            Registration::Open => Ok(&[&[Stage::Dummy]]),
            Registration::Token => Ok(&[&[Stage::RegistrationToken]]),
        }
    }

    /// `POST /register` with `kind=user`.
    pub async fn register(
        &self,
        new: NewAccount,
        auth: Option<&Value>,
    ) -> Result<(UserId, Option<Opened>)> {
        let flows = self.registration_flows()?;
        let username = match &new.username {
            Some(wanted) => Some(self.check_username(wanted, None).await?),
            None => None,
        };
        let proof = self
            .authenticate_again("register", None, auth, flows)
            .await?;
        let password = new
            .password
            .ok_or_else(|| MatrixError::missing_param("A password is needed"))?;
        let hash = self.inner.passwords.hash(password).await?;
        let user = match username {
            Some(user) => user,
            None => self.parse_username(&random_device_id(), None)?,
        };
        let account = table::User {
            password_hash: Some(hash),
            ..table::User::default()
        };
        self.create_account(&user, account, proof.registration_token)
            .await?;
        let opened = match new.session {
            Some(session) => Some(self.open_session(&user, session).await?),
            None => None,
        };
        Ok((user, opened))
    }

    /// `POST /register` with `kind=guest`. Guests are welcome where anybody may register.
    pub async fn register_guest(&self) -> Result<Opened> {
        if self.config().registration != Registration::Open {
            return Err(MatrixError::guest_access_forbidden(
                "Guests are not welcome on this server",
            ));
        }
        let number: u64 = rand::rng().random();
        let user = self.parse_username(&number.to_string(), None)?;
        let account = table::User {
            guest: true,
            ..table::User::default()
        };
        self.create_account(&user, account, None).await?;
        let session = Session {
            device_id: Some("guest_device".to_owned()),
            ..Session::default()
        };
        self.open_session(&user, session).await
    }

    /// `POST /register` by an application service.
    pub async fn register_for_appservice(
        &self,
        service: &Appservice,
        username: &str,
        session: Option<Session>,
    ) -> Result<(UserId, Option<Opened>)> {
        let user = self.check_username(username, Some(service)).await?;
        let account = table::User {
            appservice: Some(service.id.clone()),
            ..table::User::default()
        };
        self.create_account(&user, account, None).await?;
        let opened = match session {
            Some(session) => Some(self.open_session(&user, session).await?),
            None => None,
        };
        Ok((user, opened))
    }

    /// An account made by an administrator's tool, which has proved itself elsewhere.
    pub async fn register_by_admin(
        &self,
        username: &str,
        password: String,
        admin: bool,
    ) -> Result<Opened> {
        let user = self.check_username(username, None).await?;
        let hash = self.inner.passwords.hash(password).await?;
        let account = table::User {
            password_hash: Some(hash),
            admin,
            ..table::User::default()
        };
        self.create_account(&user, account, None).await?;
        self.open_session(&user, Session::default()).await
    }

    /// The row, the profile and the push rules of a new account, in one transaction.
    async fn create_account(
        &self,
        user: &UserId,
        mut account: table::User,
        registration_token: Option<String>,
    ) -> Result<()> {
        let now_ms = self.clock().unix_ms();
        account.created_ms = now_ms;
        let user = user.clone();
        let displayname = Value::from(user.localpart()).to_string();
        let rules = push_rules::default_content(&user);
        let created = self
            .store()
            .write(move |c| {
                if !table::create(c, &user, &account)? {
                    return Ok(false);
                }
                if let Some(token) = &registration_token
                    && !table::use_registration_token(c, token, now_ms)?
                {
                    return Err(storage::Error::Refused("registration token".to_owned()));
                }
                storage::account_data::set(c, &user, GLOBAL, PUSH_RULES, &rules)?;
                if !account.guest {
                    storage::profiles::set(c, &user, "displayname", &displayname)?;
                }
                Ok(true)
            })
            .await;
        match created {
            Ok(true) => Ok(()),
            Ok(false) => Err(MatrixError::user_in_use("This user name is taken")),
            Err(storage::Error::Refused(_)) => Err(MatrixError::unauthorized(
                "This registration token is used up",
            )),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes (or takes over) the device and gives it tokens.
    pub async fn open_session(&self, user: &UserId, session: Session) -> Result<Opened> {
        let device = session
            .device_id
            .filter(|id| !id.is_empty())
            .unwrap_or_else(random_device_id);
        if device.len() > DEVICE_ID_BYTES_MAX {
            return Err(MatrixError::invalid_param("The device id is too long"));
        }
        let opened = Opened {
            user: user.clone(),
            device,
            access_token: random_token(),
            refresh_token: session.wants_refresh_token.then(random_token),
            expires_in_ms: session.wants_refresh_token.then_some(ACCESS_TOKEN_LIFE_MS),
        };
        let now_ms = self.clock().unix_ms();
        let (new, name) = (opened.clone(), session.display_name);
        let own = self.config().server_name.clone();
        let audience = self
            .store()
            .write(move |c| {
                let (user, device) = (&new.user, &new.device);
                let created = storage::devices::create(c, user, device, name.as_deref(), now_ms)?;
                table::drop_tokens_of_device(c, user, device)?;
                put_tokens(c, &new, now_ms, None)?;
                if !created {
                    return Ok(None);
                }
                device_lists::record(c, &own, user, &[device]).map(Some)
            })
            .await?;
        if let Some(audience) = audience {
            self.tell_device_lists(user, &audience);
        }
        Ok(opened)
    }

    /// `POST /refresh`
    pub async fn refresh(&self, refresh_token: &str) -> Result<Opened> {
        let (old, now_ms) = (digest(refresh_token), self.clock().unix_ms());
        let (access, refresh) = (random_token(), random_token());
        let opened = self
            .store()
            .write(move |c| {
                let Some((user, device)) = table::use_refresh(c, &old)? else {
                    return Ok(None);
                };
                let opened = Opened {
                    user,
                    device,
                    access_token: access.clone(),
                    refresh_token: Some(refresh.clone()),
                    expires_in_ms: Some(ACCESS_TOKEN_LIFE_MS),
                };
                put_tokens(c, &opened, now_ms, Some(&old))?;
                Ok(Some(opened))
            })
            .await?;
        opened.ok_or_else(|| {
            MatrixError::unknown_token("Unknown refresh token").with("soft_logout", false)
        })
    }

    /// `POST /login` with `m.login.password`.
    pub async fn login_with_password(&self, body: &Value, session: Session) -> Result<Opened> {
        let refused = || MatrixError::forbidden("Invalid user name or password");
        let Some(named) = self.user_of_identifier(body)? else {
            return Err(MatrixError::missing_param(
                "It is not said which user logs in",
            ));
        };
        let Some(password) = body["password"].as_str() else {
            return Err(MatrixError::missing_param("The password is missing"));
        };
        self.limit(Limit::Password, named.as_str())?;
        let user = self.existing_user(&named).await?.ok_or_else(refused)?;
        if !self.password_matches(&user, password.to_owned()).await? {
            return Err(refused());
        }
        self.open_session(&user, session).await
    }

    /// `POST /login` with `m.login.token`.
    pub async fn login_with_token(&self, token: &str, session: Session) -> Result<Opened> {
        let (token, now_ms) = (digest(token), self.clock().unix_ms());
        let user = self
            .store()
            .write(move |c| table::take_short(c, &token, Purpose::Login, now_ms))
            .await?;
        let user = user.ok_or_else(|| MatrixError::forbidden("Invalid login token"))?;
        self.open_session(&user, session).await
    }

    /// `POST /login` with `m.login.application_service`.
    pub async fn login_for_appservice(
        &self,
        service: &Appservice,
        body: &Value,
        session: Session,
    ) -> Result<Opened> {
        let named = self
            .user_of_identifier(body)?
            .unwrap_or_else(|| service.sender.clone());
        if !service.is_interested_in_user(&named) {
            return Err(MatrixError::forbidden(
                "The application service may not be this user",
            ));
        }
        let user = self.existing_user(&named).await?.ok_or_else(|| {
            MatrixError::forbidden("The application service has not registered this user")
        })?;
        self.open_session(&user, session).await
    }

    /// A token with which the user can log in once more, on another device.
    pub async fn make_login_token(&self, user: &UserId) -> Result<(String, i64)> {
        self.make_short_token(user, Purpose::Login, LOGIN_TOKEN_LIFE_MS)
            .await
    }

    /// A token that proves the user's identity to somebody else, for an hour.
    pub async fn make_openid_token(&self, user: &UserId) -> Result<(String, i64)> {
        self.make_short_token(user, Purpose::OpenId, OPENID_TOKEN_LIFE_MS)
            .await
    }

    async fn make_short_token(
        &self,
        user: &UserId,
        purpose: Purpose,
        life_ms: i64,
    ) -> Result<(String, i64)> {
        let token = random_token();
        let (user, key, now_ms) = (user.clone(), digest(&token), self.clock().unix_ms());
        self.store()
            .write(move |c| table::put_short(c, &key, purpose, &user, now_ms + life_ms, now_ms))
            .await?;
        Ok((token, life_ms))
    }

    /// Whose OpenID token this is.
    pub async fn openid_user(&self, token: &str) -> Result<Option<UserId>> {
        let (token, now_ms) = (digest(token), self.clock().unix_ms());
        Ok(self
            .store()
            .read(move |c| table::short_owner(c, &token, Purpose::OpenId, now_ms))
            .await?)
    }

    pub async fn registration_token_is_usable(&self, token: String) -> Result<bool> {
        let now_ms = self.clock().unix_ms();
        Ok(self
            .store()
            .read(move |c| table::registration_token_is_usable(c, &token, now_ms))
            .await?)
    }

    /// Whom a login or UIA body names: `identifier`, or the older `user`. Not looked up.
    pub(crate) fn user_of_identifier(&self, body: &Value) -> Result<Option<UserId>> {
        let name = match &body["identifier"] {
            Value::Object(identifier) => match identifier.get("type").and_then(Value::as_str) {
                Some("m.id.user") => identifier.get("user").and_then(Value::as_str),
                Some("m.id.thirdparty" | "m.id.phone") => {
                    return Err(MatrixError::forbidden(
                        "Third-party identifiers are not known here",
                    ));
                }
                _ => return Err(MatrixError::unknown("Unknown login identifier type")),
            },
            _ => body["user"].as_str(),
        };
        let Some(name) = name else { return Ok(None) };
        let whole = match name.strip_prefix('@') {
            Some(_) => name.to_owned(),
            None => format!("@{name}:{}", self.config().server_name),
        };
        let user = UserId::parse(&whole)
            .map_err(|_| MatrixError::forbidden("Invalid user name or password"))?;
        if !self.config().is_ours(&user) {
            return Err(MatrixError::forbidden(
                "This user belongs to another server",
            ));
        }
        Ok(Some(user))
    }

    /// The account of this name, or of its lower-case form.
    async fn existing_user(&self, named: &UserId) -> Result<Option<UserId>> {
        let lower = format!(
            "@{}:{}",
            named.localpart().to_lowercase(),
            named.server_str()
        );
        let mut names = vec![named.clone()];
        names.extend(UserId::parse(&lower));
        let found = self
            .store()
            .read(move |c| {
                for name in &names {
                    if let Some(account) = table::get(c, name)? {
                        return Ok(Some((name.clone(), account.deactivated)));
                    }
                }
                Ok(None)
            })
            .await?;
        match found {
            Some((_, true)) => Err(MatrixError::new(
                403,
                "M_USER_DEACTIVATED",
                "This account has been deactivated",
            )),
            Some((user, false)) => Ok(Some(user)),
            None => Ok(None),
        }
    }

    pub(crate) async fn password_matches(&self, user: &UserId, password: String) -> Result<bool> {
        let user = user.clone();
        let account = self.store().read(move |c| table::get(c, &user)).await?;
        match account.and_then(|account| account.password_hash) {
            Some(hash) => self.inner.passwords.matches(password, hash).await,
            None => Ok(false),
        }
    }

    /// Whether one of our accounts has this name and is not deactivated.
    pub async fn user_exists(&self, user: &UserId) -> Result<bool> {
        let user = user.clone();
        let account = self.store().read(move |c| table::get(c, &user)).await?;
        Ok(account.is_some_and(|account| !account.deactivated))
    }

    /// `POST /account/password`: the new password, and out with the other devices if so wished.
    pub async fn change_password(
        &self,
        user: &UserId,
        password: String,
        keep_device: Option<&str>,
        logout_devices: bool,
    ) -> Result<()> {
        let hash = self.inner.passwords.hash(password).await?;
        let (owner, kept) = (user.clone(), keep_device.unwrap_or_default().to_owned());
        let others = self
            .store()
            .write(move |c| {
                table::set_password(c, &owner, Some(&hash))?;
                let devices = storage::devices::list(c, &owner)?;
                Ok(devices
                    .into_iter()
                    .map(|d| d.device_id)
                    .filter(|id| *id != kept)
                    .collect::<Vec<_>>())
            })
            .await?;
        if logout_devices {
            self.delete_devices(user, others).await?;
        }
        Ok(())
    }

    /// `POST /account/deactivate`: nobody can log in any more, and what the account held is let go.
    pub async fn deactivate(&self, user: &UserId, erase: bool) -> Result<()> {
        let owner = user.clone();
        self.store()
            .write(move |c| {
                table::deactivate(c, &owner, erase)?;
                if erase {
                    storage::profiles::remove_all(c, &owner)?;
                }
                Ok(())
            })
            .await?;
        self.delete_all_devices(user).await?;
        self.leave_everything(user.clone());
        Ok(())
    }

    /// At boot: what a stop may have kept from happening.
    pub(crate) async fn resume_leaving(&self) -> Result<()> {
        let users = self
            .store()
            .read(storage::accounts::deactivated_members)
            .await?;
        for user in users {
            self.leave_everything(user);
        }
        Ok(())
    }

    /// Behind the request: some rooms are other servers' to let go of, and those can be slow.
    fn leave_everything(&self, user: UserId) {
        let hs = self.clone();
        self.spawn_until_stop("leave_everything", async move {
            let who = user.clone();
            let memberships = hs
                .store()
                .read(move |c| storage::sync_reads::memberships(c, &who))
                .await;
            let memberships = match memberships {
                Ok(memberships) => memberships,
                Err(error) => {
                    tracing::error!(%user, %error, "the rooms of a deactivated user are not known");
                    return;
                }
            };
            for membership in memberships {
                if !matches!(membership.membership.as_str(), "join" | "invite" | "knock") {
                    continue;
                }
                let room = membership.room;
                if let Err(error) = hs.rooms().leave(&user, &room, None).await {
                    tracing::warn!(%user, %room, %error, "a deactivated user could not leave");
                }
            }
        });
    }

    /// Notes now and then that a device was heard of: the list of devices shows it.
    fn note_device(&self, user: &UserId, device: &str, address: Option<IpAddr>) {
        let now_ms = self.clock().unix_ms();
        let mut noted = self
            .inner
            .noted_devices
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let key = (user.clone(), device.to_owned());
        if noted
            .get(&key)
            .is_some_and(|at_ms| now_ms - at_ms < NOTE_EVERY_MS)
        {
            return;
        }
        if noted.len() >= NOTED_MAX {
            noted.clear();
        }
        noted.insert(key.clone(), now_ms);
        drop(noted);
        let store = self.store().clone();
        self.spawn_to_end("note_device", async move {
            let (user, device) = key;
            let address = address.map(|address| address.to_string());
            let noted = store.write(move |c| {
                storage::devices::seen(c, &user, &device, now_ms, address.as_deref())
            });
            if let Err(error) = noted.await {
                tracing::warn!(%error, "the last sight of a device could not be noted");
            }
        });
    }
}

fn put_tokens(
    c: &mut dyn storage::Conn,
    opened: &Opened,
    now_ms: i64,
    supersedes: Option<&str>,
) -> storage::Result<()> {
    let access = digest(&opened.access_token);
    let expires_ms = opened.expires_in_ms.map(|life_ms| now_ms + life_ms);
    table::put_token(
        c,
        &access,
        &opened.user,
        &opened.device,
        expires_ms,
        supersedes,
    )?;
    if let Some(refresh) = &opened.refresh_token {
        table::put_refresh(c, &digest(refresh), &opened.user, &opened.device, &access)?;
    }
    Ok(())
}
