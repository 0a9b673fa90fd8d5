//! Membership: who may join, invite, leave, kick, ban and knock.

use std::ops::Deref;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde_json::{Map, Value};

use super::{Membership, Refused, Room, creator, enough, refuse};
use crate::canonical_json::to_canonical_lenient;
use crate::id::UserId;
use crate::pdu::Pdu;
use crate::signature::VerifyKey;

const BASE64_CONFIG: GeneralPurposeConfig = GeneralPurposeConfig::new()
    .with_decode_padding_mode(DecodePaddingMode::Indifferent)
    .with_decode_allow_trailing_bits(true);
const BASE64: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, BASE64_CONFIG);
const BASE64_URL: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, BASE64_CONFIG);

/// An identity server lists one or two keys and signs once. More combinations than this are not tried.
const THIRD_PARTY_CHECKS_MAX: usize = 64;

pub(super) fn check<P: Deref<Target = Pdu>>(
    room: &mut Room<'_, P>,
    pdu: &Pdu,
) -> Result<(), Refused> {
    let Some(target) = pdu.state_key.as_deref() else {
        return refuse("a membership needs a state key");
    };
    match Membership::of(pdu) {
        Membership::Join => join(room, pdu, target),
        Membership::Invite => invite(room, pdu, target),
        Membership::Leave => leave(room, pdu, target),
        Membership::Ban => ban(room, pdu, target),
        Membership::Knock if room.rules.knock => knock(room, pdu, target),
        _ => refuse("the membership is missing or unknown"),
    }
}

fn join<P: Deref<Target = Pdu>>(
    room: &mut Room<'_, P>,
    pdu: &Pdu,
    target: &str,
) -> Result<(), Refused> {
    // V-15: never one of the additional creators.
    if pdu.prev_events == [room.create.event_id.clone()]
        && creator(room.version, room.create).is_some_and(|creator| creator.as_str() == target)
    {
        return Ok(());
    }
    if pdu.sender.as_str() != target {
        return refuse("nobody can join for somebody else");
    }
    let membership = room.membership(target);
    if membership == Membership::Ban {
        return refuse("the user is banned");
    }
    let expected = matches!(membership, Membership::Invite | Membership::Join);
    match JoinRule::of(room) {
        JoinRule::Public => Ok(()),
        JoinRule::Invite | JoinRule::Knock if expected => Ok(()),
        JoinRule::Restricted | JoinRule::KnockRestricted if expected => Ok(()),
        JoinRule::Restricted | JoinRule::KnockRestricted => join_authorised(room, pdu),
        JoinRule::Invite | JoinRule::Knock => refuse("the user is not invited"),
        JoinRule::Unknown => refuse("the join rule lets nobody in"),
    }
}

fn join_authorised<P: Deref<Target = Pdu>>(
    room: &mut Room<'_, P>,
    pdu: &Pdu,
) -> Result<(), Refused> {
    let Some(authoriser) = pdu
        .content_get_str("join_authorised_via_users_server")
        .and_then(|user| UserId::parse(&user).ok())
    else {
        return refuse("the user is not invited and nobody authorises the join");
    };
    if room.membership(authoriser.as_str()) != Membership::Join {
        return refuse("who authorises the join is not in the room");
    }
    let power = room.power();
    if power.read_user(authoriser.as_str())? < power.read_invite()? {
        return refuse("who authorises the join may not invite");
    }
    Ok(())
}

fn invite<P: Deref<Target = Pdu>>(
    room: &mut Room<'_, P>,
    pdu: &Pdu,
    target: &str,
) -> Result<(), Refused> {
    if let Some(invite) = pdu.content_get("third_party_invite") {
        return third_party_invite(room, pdu, target, &invite);
    }
    if room.membership(pdu.sender.as_str()) != Membership::Join {
        return refuse("the sender is not in the room");
    }
    if matches!(room.membership(target), Membership::Join | Membership::Ban) {
        return refuse("the invited user is in the room or banned");
    }
    let power = room.power();
    let level = power.read_user(pdu.sender.as_str())?;
    enough(level >= power.read_invite()?, "to invite")
}

fn third_party_invite<P: Deref<Target = Pdu>>(
    room: &Room<'_, P>,
    pdu: &Pdu,
    target: &str,
    invite: &Value,
) -> Result<(), Refused> {
    if room.membership(target) == Membership::Ban {
        return refuse("the invited user is banned");
    }
    let Some(signed) = invite.get("signed").and_then(Value::as_object) else {
        return refuse("the third-party invite is not signed");
    };
    let text = |key: &str| signed.get(key).and_then(Value::as_str);
    let (Some(mxid), Some(token)) = (text("mxid"), text("token")) else {
        return refuse("the third-party invite names no user or no token");
    };
    if mxid != target {
        return refuse("the third-party invite is for another user");
    }
    let Some(stated) = (room.get)("m.room.third_party_invite", token) else {
        return refuse("the room has no third-party invite with this token");
    };
    if stated.sender != pdu.sender {
        return refuse("the third-party invite is of another sender");
    }
    if is_signed(signed, &public_keys(&stated)) {
        return Ok(());
    }
    refuse("no key of the third-party invite has signed it")
}

fn public_keys(third_party_invite: &Pdu) -> Vec<VerifyKey> {
    let single = third_party_invite.content_get("public_key");
    let list = third_party_invite.content_get("public_keys");
    let listed = list
        .as_ref()
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.get("public_key"));
    single
        .iter()
        .chain(listed)
        .take(THIRD_PARTY_CHECKS_MAX)
        .filter_map(|key| decode(key.as_str()?)?.try_into().ok())
        .filter_map(|bytes| VerifyKey::from_bytes(bytes).ok())
        .collect()
}

fn is_signed(signed: &Map<String, Value>, keys: &[VerifyKey]) -> bool {
    let mut rest = signed.clone();
    rest.remove("unsigned");
    let Some(Value::Object(servers)) = rest.remove("signatures") else {
        return false;
    };
    let Ok(message) = to_canonical_lenient(&Value::Object(rest)) else {
        return false;
    };
    servers
        .values()
        .filter_map(Value::as_object)
        .flatten()
        .filter(|(key_id, _)| key_id.starts_with("ed25519:"))
        .filter_map(|(_, signature)| decode(signature.as_str()?)?.try_into().ok())
        .flat_map(|signature: [u8; 64]| keys.iter().map(move |key| (key, signature)))
        .take(THIRD_PARTY_CHECKS_MAX)
        .any(|(key, signature)| key.verify(message.as_bytes(), &signature))
}

/// Identity servers write either alphabet.
fn decode(text: &str) -> Option<Vec<u8>> {
    BASE64
        .decode(text)
        .or_else(|_| BASE64_URL.decode(text))
        .ok()
}

fn leave<P: Deref<Target = Pdu>>(
    room: &mut Room<'_, P>,
    pdu: &Pdu,
    target: &str,
) -> Result<(), Refused> {
    let own = room.membership(pdu.sender.as_str());
    if pdu.sender.as_str() == target {
        return match own {
            Membership::Invite | Membership::Join => Ok(()),
            Membership::Knock if room.rules.knock => Ok(()),
            _ => refuse("who is not in the room can not leave it"),
        };
    }
    if own != Membership::Join {
        return refuse("the sender is not in the room");
    }
    let power = room.power();
    let level = power.read_user(pdu.sender.as_str())?;
    if room.membership(target) == Membership::Ban {
        enough(level >= power.read_ban()?, "to lift a ban")?;
    }
    enough(level >= power.read_kick()?, "to kick")?;
    enough(power.read_user(target)? < level, "to kick this user")
}

fn ban<P: Deref<Target = Pdu>>(
    room: &mut Room<'_, P>,
    pdu: &Pdu,
    target: &str,
) -> Result<(), Refused> {
    if room.membership(pdu.sender.as_str()) != Membership::Join {
        return refuse("the sender is not in the room");
    }
    let power = room.power();
    let level = power.read_user(pdu.sender.as_str())?;
    enough(level >= power.read_ban()?, "to ban")?;
    enough(power.read_user(target)? < level, "to ban this user")
}

/// V-16.
fn knock<P: Deref<Target = Pdu>>(
    room: &mut Room<'_, P>,
    pdu: &Pdu,
    target: &str,
) -> Result<(), Refused> {
    if !matches!(
        JoinRule::of(room),
        JoinRule::Knock | JoinRule::KnockRestricted
    ) {
        return refuse("the join rule allows no knocking");
    }
    if pdu.sender.as_str() != target {
        return refuse("nobody can knock for somebody else");
    }
    match room.membership(target) {
        Membership::Ban => refuse("the user is banned"),
        Membership::Invite | Membership::Join => refuse("the user need not knock"),
        _ => Ok(()),
    }
}

enum JoinRule {
    Public,
    Invite,
    Knock,
    Restricted,
    KnockRestricted,
    /// None that this room version has.
    Unknown,
}

impl JoinRule {
    fn of<P: Deref<Target = Pdu>>(room: &Room<'_, P>) -> Self {
        // V-23: where nothing is said, the rule is `invite`.
        let Some(event) = (room.get)("m.room.join_rules", "") else {
            return Self::Invite;
        };
        if event.content_raw("join_rule").is_none() {
            return Self::Invite;
        }
        match event.content_get_str("join_rule").as_deref() {
            Some("public") => Self::Public,
            Some("invite") => Self::Invite,
            Some("knock") if room.rules.knock => Self::Knock,
            Some("restricted") if room.rules.restricted => Self::Restricted,
            Some("knock_restricted") if room.rules.knock_restricted => Self::KnockRestricted,
            _ => Self::Unknown,
        }
    }
}
