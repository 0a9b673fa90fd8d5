//! Starting: what an earlier life of this server left under way is taken up again.

use protocol::id::UserId;

use crate::Homeserver;
use crate::error::Result;

/// A token in the settings is good for so many registrations: practically, without end.
const TOKEN_USES: Option<i64> = None;

impl Homeserver {
    /// Takes up staged PDUs, waiting transactions, joins, resyncs and debts. To be called once, before the
    /// doors open.
    pub async fn start(&self) -> Result<()> {
        self.create_appservice_senders().await?;
        self.create_notices_user().await?;
        if let Some(token) = self.config().registration_token.clone() {
            self.store()
                .write(move |c| {
                    storage::accounts::put_registration_token(c, &token, TOKEN_USES, None)
                })
                .await?;
        }
        self.jobs().resume().await?;
        self.outgoing().resume().await?;
        self.resume_incoming().await?;
        self.tasks().resume().await?;
        self.mind_all_guests().await?;
        self.resume_leaving().await?;
        self.resume_pushing().await?;
        self.watch_presence();
        self.tell_appservices();
        Ok(())
    }

    /// Makes an account from the command line.
    pub async fn create_user(&self, name: &str, password: &str, admin: bool) -> Result<UserId> {
        let opened = self
            .register_by_admin(name, password.to_owned(), admin)
            .await?;
        Ok(opened.user)
    }

    /// Whether the store answers.
    pub async fn is_healthy(&self) -> bool {
        self.store()
            .read(|c| storage::streams::positions(c).map(drop))
            .await
            .is_ok()
    }
}
