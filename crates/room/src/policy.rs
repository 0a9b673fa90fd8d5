//! Policy servers: a room may name a server without whose signature no event is recommended (joins.md R-67).
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#policy-servers>
//!
//! What that server says of an event is a fact like others, only that it is asked for over federation.

use std::sync::Arc;
use std::time::Duration;

use protocol::build;
use protocol::id::ServerName;
use protocol::pdu::Pdu;
use protocol::signature::{self, POLICY_KEY_ID, VerifyKey};
use serde_json::{Map, Value};

use crate::effect::{AskError, Head, StateKey};
use crate::facts::{Facts, Got};
use crate::refusal::Refusal;
use crate::template::Own;

/// A client, or a room's other events, wait meanwhile.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(10);

const KIND: &str = "m.room.policy";

/// The key of the state event that says so. It must have been numbered for [`vet`].
pub(crate) fn key() -> StateKey {
    (KIND.into(), "".into())
}

struct PolicyServer {
    name: ServerName,
    key: VerifyKey,
}

/// The event as it may go into the room: with the policy server's signature, where the room uses one; or why
/// it is not recommended. The signature is asked for once, if it is missing or wrong.
pub(crate) fn vet(
    facts: &Facts,
    own: &Own,
    head: &Head,
    pdu: &Arc<Pdu>,
) -> Got<Result<Arc<Pdu>, Refusal>> {
    // The way out of the hands of a policy server that is gone.
    if pdu.is(KIND, "") {
        return Ok(Ok(pdu.clone()));
    }
    let Some(server) = of(facts, own, head)? else {
        return Ok(Ok(pdu.clone()));
    };
    if server.has_signed(pdu) {
        return Ok(Ok(pdu.clone()));
    }
    // Nobody here judges events.
    if server.name == own.name {
        let refusal = "the room takes this server for a policy server, which it is not";
        return Ok(Err(Refusal::forbidden(refusal)));
    }
    Ok(match facts.word_of(&server.name, pdu)? {
        Ok(signatures) => server.signed(pdu, signatures).ok_or_else(|| {
            Refusal::forbidden("the signature of the room's policy server is not right")
        }),
        Err(AskError::Refused {
            status,
            errcode,
            error,
            body,
        }) => {
            // Its words, as they are.
            let mut refusal = Refusal::new(*status, errcode, error.clone());
            let mut extra: Map<String, Value> = serde_json::from_str(body).unwrap_or_default();
            extra.retain(|key, _| key != "errcode" && key != "error");
            refusal.extra = extra;
            Err(refusal)
        }
        Err(AskError::Unreachable { .. }) => Err(Refusal::bad_gateway(
            "the room's policy server does not answer",
        )),
    })
}

/// The policy server that the room uses as it stands; it must have a member, as far as we can see.
fn of(facts: &Facts, own: &Own, head: &Head) -> Got<Option<PolicyServer>> {
    let key = key();
    let events = facts.state_events(&head.state, std::slice::from_ref(&key))?;
    let Some(server) = events.get(&key).and_then(|(_, pdu)| named(pdu)) else {
        return Ok(None);
    };
    let in_partial = head.partial.as_ref().is_some_and(|marker| {
        marker.joined_via == server.name || marker.servers_in_room.contains(&server.name)
    });
    let joined = in_partial
        || match server.name == own.name {
            true => !head.local_joined.is_empty(),
            false => facts.hosts()?.contains(&server.name),
        };
    Ok(Some(server).filter(|_| joined))
}

fn named(pdu: &Pdu) -> Option<PolicyServer> {
    let content = pdu.content_value();
    let via = content.get("via")?.as_str()?;
    let key = content.get("public_keys")?.get("ed25519")?.as_str()?;
    Some(PolicyServer {
        name: ServerName::parse(via).ok()?,
        key: VerifyKey::parse(key).ok()?,
    })
}

impl PolicyServer {
    fn has_signed(&self, pdu: &Pdu) -> bool {
        signature::is_signed_by(pdu, &self.name, POLICY_KEY_ID, &self.key)
    }

    /// The event with the signature out of an answer, if that is right.
    fn signed(&self, pdu: &Pdu, signatures: &Map<String, Value>) -> Option<Arc<Pdu>> {
        let by_server = signatures.get(self.name.as_str())?;
        let signature = by_server.get(POLICY_KEY_ID)?.as_str()?;
        let signed = build::with_signature(pdu, &self.name, POLICY_KEY_ID, signature).ok()?;
        self.has_signed(&signed).then(|| Arc::new(signed))
    }
}
