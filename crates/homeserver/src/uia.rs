//! User-interactive authentication: an action that wants to be proved again.
//!
//! <https://spec.matrix.org/v1.18/client-server-api/#user-interactive-authentication-api>

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use protocol::id::UserId;
use serde_json::{Value, json};

use crate::Homeserver;
use crate::error::{MatrixError, Result};

/// Sessions under way; the oldest goes when another begins.
const SESSIONS_MAX: usize = 10_000;

/// One step of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    Dummy,
    Password,
    RegistrationToken,
}

impl Stage {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Dummy => "m.login.dummy",
            Self::Password => "m.login.password",
            Self::RegistrationToken => "m.login.registration_token",
        }
    }
}

/// The flows that are offered; any one of them, completed, is enough.
pub type Flows = &'static [&'static [Stage]];

pub const PASSWORD: Flows = &[&[Stage::Password]];

/// The stage of this name, if one of the flows has it.
fn offered(flows: Flows, kind: &str) -> Option<Stage> {
    flows
        .iter()
        .flat_map(|flow| flow.iter().copied())
        .find(|stage| stage.as_str() == kind)
}

#[derive(Default)]
pub(crate) struct Sessions {
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    /// Ordered by age through the number in front.
    by_age: BTreeMap<u64, String>,
    sessions: BTreeMap<String, Session>,
    count: u64,
}

struct Session {
    number: u64,
    completed: BTreeSet<Stage>,
    /// What has been proved holds only for the action that asked for it.
    action: String,
    /// The registration token, counted when the account is made.
    token: Option<String>,
}

/// What came out of a completed flow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proof {
    pub registration_token: Option<String>,
}

impl Sessions {
    fn begin(&self, action: &str) -> String {
        let id = crate::accounts::random_token();
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.sessions.len() >= SESSIONS_MAX
            && let Some((_, oldest)) = open.by_age.pop_first()
        {
            open.sessions.remove(&oldest);
        }
        open.count += 1;
        let session = Session {
            number: open.count,
            completed: BTreeSet::new(),
            action: action.to_owned(),
            token: None,
        };
        open.by_age.insert(session.number, id.clone());
        open.sessions.insert(id.clone(), session);
        id
    }

    /// Runs `f` on a session of this action.
    fn with<T>(&self, id: &str, action: &str, f: impl FnOnce(&mut Session) -> T) -> Option<T> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.sessions
            .get_mut(id)
            .filter(|session| session.action == action)
            .map(f)
    }

    fn end(&self, id: &str) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(session) = open.sessions.remove(id) {
            open.by_age.remove(&session.number);
        }
    }
}

impl Homeserver {
    /// Lets the action pass when `auth` completes one of the flows; else the error is the challenge.
    /// `action` names what is to be done and for whom: a session is good for nothing else. `user` is who
    /// must prove to be himself; nobody when an account is being made.
    pub async fn authenticate_again(
        &self,
        action: &str,
        user: Option<&UserId>,
        auth: Option<&Value>,
        flows: Flows,
    ) -> Result<Proof> {
        let sessions = &self.inner.uia;
        let Some(auth) = auth.filter(|auth| auth.is_object()) else {
            return Err(self.challenge(&sessions.begin(action), action, flows));
        };
        let session = auth["session"]
            .as_str()
            .filter(|id| sessions.with(id, action, |_| ()).is_some())
            .map_or_else(|| sessions.begin(action), str::to_owned);
        let kind = auth["type"].as_str();
        if let Some(stage) = kind.and_then(|kind| offered(flows, kind)) {
            match self.pass(stage, user, auth).await {
                Ok(()) => {
                    let token = (stage == Stage::RegistrationToken)
                        .then(|| auth["token"].as_str().map(str::to_owned))
                        .flatten();
                    sessions.with(&session, action, |session| {
                        session.completed.insert(stage);
                        session.token = token.or(session.token.take());
                    });
                }
                Err(refused) if refused.status == 401 => {
                    let mut challenge = self.challenge(&session, action, flows);
                    challenge.errcode = refused.errcode;
                    challenge.message = refused.message;
                    return Err(challenge);
                }
                Err(refused) => return Err(refused),
            }
        } else if kind.is_some() {
            let mut challenge = self.challenge(&session, action, flows);
            challenge.errcode = "M_UNRECOGNIZED".into();
            challenge.message = "This is no stage of the flows".to_owned();
            return Err(challenge);
        }
        let proof = sessions.with(&session, action, |session| {
            flows
                .iter()
                .any(|flow| flow.iter().all(|stage| session.completed.contains(stage)))
                .then(|| Proof {
                    registration_token: session.token.clone(),
                })
        });
        let Some(proof) = proof.flatten() else {
            return Err(self.challenge(&session, action, flows));
        };
        sessions.end(&session);
        Ok(proof)
    }

    async fn pass(&self, stage: Stage, user: Option<&UserId>, auth: &Value) -> Result<()> {
        match stage {
            Stage::Dummy => Ok(()),
            Stage::RegistrationToken => {
                let token = auth["token"].as_str().unwrap_or_default().to_owned();
                if self.registration_token_is_usable(token).await? {
                    return Ok(());
                }
                Err(MatrixError::new(
                    401,
                    "M_UNAUTHORIZED",
                    "This registration token is not valid",
                ))
            }
            Stage::Password => {
                let Some(user) = user else {
                    return Err(MatrixError::forbidden("There is no user yet"));
                };
                let named = self.user_of_identifier(auth)?;
                if named.as_ref().is_some_and(|named| named != user) {
                    return Err(MatrixError::forbidden(
                        "This is another user than the one logged in",
                    ));
                }
                let Some(password) = auth["password"].as_str() else {
                    return Err(MatrixError::new(
                        401,
                        "M_MISSING_PARAM",
                        "The password is missing",
                    ));
                };
                if self.password_matches(user, password.to_owned()).await? {
                    return Ok(());
                }
                Err(MatrixError::new(401, "M_FORBIDDEN", "Invalid password"))
            }
        }
    }

    fn challenge(&self, session: &str, action: &str, flows: Flows) -> MatrixError {
        let flows: Vec<Value> = flows
            .iter()
            .map(|flow| json!({ "stages": flow.iter().map(|stage| stage.as_str()).collect::<Vec<_>>() }))
            .collect();
        let completed: Vec<&str> = self
            .inner
            .uia
            .with(session, action, |session| {
                session
                    .completed
                    .iter()
                    .map(|stage| stage.as_str())
                    .collect()
            })
            .unwrap_or_default();
        MatrixError::new(401, "", "")
            .with("session", session)
            .with("flows", flows)
            .with("params", json!({}))
            .with("completed", completed)
    }
}
