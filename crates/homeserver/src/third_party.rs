//! Invites to an e-mail address or the like, once it belongs to a user (joins.md R-65, J-82).
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#third-party-invites>

use protocol::id::{RoomId, ServerName, UserId};
use serde::Deserialize;
use serde_json::{Value, json};
use storage::federation_reads;

use crate::Homeserver;
use crate::error::{MatrixError, Result};
use crate::limits::Limit;

/// Invites of one identifier that an identity server may hand over at once.
const INVITES_MAX: usize = 50;

/// What an identity server signed: that this user owns the invited identifier.
#[derive(Clone, Debug, Deserialize)]
struct Signed {
    mxid: UserId,
    token: String,
}

/// One of the invites that wait for an identifier.
#[derive(Clone, Debug, Deserialize)]
pub struct BoundInvite {
    pub room_id: RoomId,
    pub sender: UserId,
    pub signed: Value,
}

impl Homeserver {
    /// `PUT /exchange_third_party_invite/{roomId}`: another server's user turns out to be whom one of ours
    /// invited; we issue the invite proper.
    pub async fn exchange_third_party_invite(
        &self,
        origin: &ServerName,
        room: &RoomId,
        event: &Value,
    ) -> Result<()> {
        self.reads_of(origin.clone()).knock_on(room).await?;
        let content = &event["content"];
        if event["type"] != "m.room.member" || content["membership"] != "invite" {
            return Err(MatrixError::invalid_param("That is no invite"));
        }
        let target = event["state_key"]
            .as_str()
            .and_then(|user| UserId::parse(user).ok())
            .ok_or_else(|| MatrixError::invalid_param("state_key is no user id"))?;
        if target.server_str() != origin.as_str() {
            return Err(MatrixError::forbidden("The user is not one of yours"));
        }
        let signed = content["third_party_invite"]["signed"].clone();
        self.issue(room, &target, signed).await
    }

    /// `PUT /3pid/onbind`: an identifier now belongs to this user of ours. Anybody can claim that; the
    /// signatures within are what counts.
    pub async fn take_bound_invites(&self, invites: Vec<BoundInvite>) -> Result<()> {
        self.limit(Limit::RemoteJoin, "3pid/onbind")?;
        if invites.len() > INVITES_MAX {
            return Err(MatrixError::too_large("Too many invites at once"));
        }
        for invite in invites {
            let Ok(signed) = Signed::deserialize(&invite.signed) else {
                continue;
            };
            if !self.config().is_ours(&signed.mxid) {
                continue;
            }
            let redeemed = self
                .redeem(&invite.room_id, &signed.mxid, &invite.sender, invite.signed)
                .await;
            if let Err(error) = redeemed {
                tracing::info!(room = %invite.room_id, user = %signed.mxid, %error, "an invite by identifier came to nothing");
            }
        }
        Ok(())
    }

    /// J-82: what a client presents when it joins by such an invite.
    pub(crate) async fn redeem_for(
        &self,
        room: &RoomId,
        user: &UserId,
        signed: Value,
    ) -> Result<()> {
        let sender = signed["sender"]
            .as_str()
            .and_then(|sender| UserId::parse(sender).ok())
            .ok_or_else(|| MatrixError::invalid_param("third_party_signed names no sender"))?;
        self.redeem(room, user, &sender, signed).await
    }

    /// Has the invite of one of our users issued: by us, or by the server of whoever sent the first invite.
    async fn redeem(
        &self,
        room: &RoomId,
        user: &UserId,
        sender: &UserId,
        signed: Value,
    ) -> Result<()> {
        if self.config().is_ours(sender) {
            return self.issue(room, user, signed).await;
        }
        let event = json!({
            "type": "m.room.member",
            "room_id": room,
            "sender": sender,
            "state_key": user,
            "content": {
                "membership": "invite",
                "third_party_invite": { "display_name": "", "signed": signed },
            },
        })
        .to_string();
        let mut servers = vec![sender.server_name()];
        servers.extend(room.server_name());
        servers.dedup();
        servers.retain(|server| *server != self.config().server_name);
        for server in servers {
            let asked = self
                .client()
                .exchange_third_party_invite(&server, room, &event);
            match asked.await {
                Ok(()) => return Ok(()),
                Err(error) => tracing::debug!(%server, ?error, "no invite was issued"),
            }
        }
        Err(MatrixError::bad_gateway("The invite could not be redeemed"))
    }

    /// Issues the invite in a room of ours. Whether the signature is right is for the auth rules to say.
    async fn issue(&self, room: &RoomId, target: &UserId, signed: Value) -> Result<()> {
        let proof = Signed::deserialize(&signed)
            .map_err(|_| MatrixError::invalid_param("The signed part is malformed"))?;
        if proof.mxid != *target {
            return Err(MatrixError::forbidden("That was signed for another user"));
        }
        let (asked, token) = (room.clone(), proof.token);
        let offer = self
            .store()
            .read(move |c| {
                let Some(room) = storage::rooms::known(c, &asked)? else {
                    return Ok(None);
                };
                federation_reads::current_event(c, room.nid, "m.room.third_party_invite", &token)
            })
            .await?
            .ok_or_else(|| MatrixError::forbidden("There is no such invite"))?;
        if !self.config().is_ours(&offer.sender) {
            return Err(MatrixError::forbidden("That invite is another server's"));
        }
        let content = json!({
            "membership": "invite",
            "third_party_invite": {
                "display_name": offer.content_get("display_name").unwrap_or_else(|| "".into()),
                "signed": signed,
            },
        });
        let sender = offer.sender.clone();
        self.rooms()
            .invite_with(&sender, room, target, content)
            .await
    }
}
