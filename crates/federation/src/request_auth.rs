//! The X-Matrix header, both ways.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#request-authentication>

use base64::Engine as _;
use base64::alphabet;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use base64::engine::{DecodePaddingMode, DecodePaddingMode::Indifferent};
use protocol::canonical_json::to_canonical_lenient;
use protocol::id::ServerName;
use protocol::signature::{SigningKey, VerifyKey};
use serde_json::{Map, Value};

/// Two names of 230 bytes, a key id and a signature, every byte escaped.
const HEADER_BYTES_MAX: usize = 4096;
const KEY_ID_BYTES_MAX: usize = 128;

/// What stands in an `Authorization: X-Matrix` header (R-2a).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XMatrix {
    pub origin: ServerName,
    pub destination: Option<ServerName>,
    pub key: String,
    pub signature: String,
}

/// Why a request is not taken for whom it claims to be. All are 401 `M_UNAUTHORIZED` (R-2).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    #[error("no X-Matrix authorization")]
    Missing,
    #[error("malformed X-Matrix authorization: {0}")]
    Malformed(&'static str),
    #[error("the request is meant for {0}")]
    WrongDestination(ServerName),
    #[error("the key {key} of {server} could not be found, or is not valid now")]
    UnknownKey { server: ServerName, key: String },
    #[error("the signature of {0} is wrong")]
    BadSignature(ServerName),
    #[error("the body is not JSON")]
    NotJson,
}

impl XMatrix {
    pub fn parse(header: &str) -> Result<Self, AuthError> {
        if header.len() > HEADER_BYTES_MAX {
            return Err(AuthError::Malformed("too long"));
        }
        let header = header.trim();
        let (scheme, parameters) = header.split_once([' ', '\t']).unwrap_or((header, ""));
        if !scheme.eq_ignore_ascii_case("X-Matrix") {
            return Err(AuthError::Missing);
        }
        let (mut origin, mut destination, mut key, mut signature) = (None, None, None, None);
        for (name, value) in parse_parameters(parameters)? {
            let slot = match name.to_ascii_lowercase().as_str() {
                "origin" => &mut origin,
                "destination" => &mut destination,
                "key" => &mut key,
                // The prose of the spec calls it `signature`, its examples and everybody `sig`.
                "sig" | "signature" => &mut signature,
                _ => continue,
            };
            if slot.replace(value).is_some() {
                return Err(AuthError::Malformed("a parameter twice"));
            }
        }
        let server = |text: String| {
            ServerName::parse(&text).map_err(|_| AuthError::Malformed("not a server name"))
        };
        let key = key.ok_or(AuthError::Malformed("no key"))?;
        if key.len() > KEY_ID_BYTES_MAX {
            return Err(AuthError::Malformed("a key id too long"));
        }
        Ok(Self {
            origin: server(origin.ok_or(AuthError::Malformed("no origin"))?)?,
            destination: destination.map(server).transpose()?,
            key,
            signature: signature.ok_or(AuthError::Malformed("no sig"))?,
        })
    }

    /// Lower case, one space, no blanks at commas, everything quoted: what older servers read.
    pub fn to_header(&self) -> String {
        let mut header = format!("X-Matrix origin=\"{}\"", self.origin);
        if let Some(destination) = &self.destination {
            header.push_str(&format!(",destination=\"{destination}\""));
        }
        header.push_str(&format!(",key=\"{}\",sig=\"{}\"", self.key, self.signature));
        header
    }

    /// Whether the signature is right, given the key that the header names.
    pub fn verify(
        &self,
        key: &VerifyKey,
        method: &str,
        uri: &str,
        own: &ServerName,
        content: Option<Value>,
    ) -> Result<(), AuthError> {
        let bad = || AuthError::BadSignature(self.origin.clone());
        // Old senders leave the destination out of the header, but sign it nonetheless.
        let destination = self.destination.as_ref().unwrap_or(own);
        let signed =
            signed_form(method, uri, &self.origin, destination, content).ok_or_else(bad)?;
        let signature: [u8; 64] = BASE64
            .decode(&self.signature)
            .ok()
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or_else(bad)?;
        if key.verify(signed.as_bytes(), &signature) {
            Ok(())
        } else {
            Err(bad())
        }
    }
}

/// Signs a request of ours. `None` if the content has no canonical form, which is the caller's fault.
pub fn sign(
    key: &SigningKey,
    method: &str,
    uri: &str,
    own: &ServerName,
    destination: &ServerName,
    content: Option<Value>,
) -> Option<XMatrix> {
    let signed = signed_form(method, uri, own, destination, content)?;
    Some(XMatrix {
        origin: own.clone(),
        destination: Some(destination.clone()),
        key: key.key_id().to_owned(),
        signature: key.sign(signed.as_bytes()),
    })
}

/// Lenient about numbers: events of old room versions may hold floats, and travel in transactions.
fn signed_form(
    method: &str,
    uri: &str,
    origin: &ServerName,
    destination: &ServerName,
    content: Option<Value>,
) -> Option<String> {
    let mut object = Map::new();
    if let Some(content) = content {
        object.insert("content".into(), content);
    }
    object.insert("destination".into(), destination.as_str().into());
    object.insert("method".into(), method.into());
    object.insert("origin".into(), origin.as_str().into());
    object.insert("uri".into(), uri.into());
    to_canonical_lenient(&Value::Object(object)).ok()
}

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(INDIFFERENT)
        .with_decode_allow_trailing_bits(true),
);
const INDIFFERENT: DecodePaddingMode = Indifferent;

/// `name=value, name="quoted \" value"`, by RFC 9110 §11.4, with colons in bare values too.
fn parse_parameters(text: &str) -> Result<Vec<(&str, String)>, AuthError> {
    let mut parameters = Vec::new();
    let mut rest = text.trim_start_matches([' ', '\t', ',']);
    while !rest.is_empty() {
        let (name, after) = rest.split_once('=').ok_or(AuthError::Malformed("no `=`"))?;
        let name = name.trim_matches([' ', '\t']);
        if name.is_empty() || name.contains([',', '"', ' ', '\t']) {
            return Err(AuthError::Malformed("a bad name"));
        }
        let after = after.trim_start_matches([' ', '\t']);
        let (value, after) = match after.strip_prefix('"') {
            Some(quoted) => quoted_value(quoted)?,
            None => {
                let end = after.find([',', ' ', '\t']).unwrap_or(after.len());
                if after[..end].contains(['"', '\\', '=']) && name != "sig" {
                    return Err(AuthError::Malformed("a bad value"));
                }
                (after[..end].to_owned(), &after[end..])
            }
        };
        parameters.push((name, value));
        let after = after.trim_start_matches([' ', '\t']);
        if !after.is_empty() && !after.starts_with(',') {
            return Err(AuthError::Malformed("no comma between parameters"));
        }
        rest = after.trim_start_matches([' ', '\t', ',']);
    }
    Ok(parameters)
}

/// The value up to the closing quote, unescaped, and what follows.
fn quoted_value(text: &str) -> Result<(String, &str), AuthError> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' => match characters.next() {
                Some((_, escaped)) => value.push(escaped),
                None => break,
            },
            other => value.push(other),
        }
    }
    Err(AuthError::Malformed("a quote that is not closed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> ServerName {
        ServerName::parse(text).unwrap()
    }

    fn parsed() -> XMatrix {
        XMatrix {
            origin: name("a.org:1"),
            destination: Some(name("b.org")),
            key: "ed25519:k".into(),
            signature: "c2ln+/".into(),
        }
    }

    #[test]
    fn every_allowed_spelling_is_read_alike() {
        for header in [
            r#"X-Matrix origin="a.org:1",destination="b.org",key="ed25519:k",sig="c2ln+/""#,
            r#"x-matrix   ORIGIN=a.org:1 , Destination=b.org,	KEY=ed25519:k,sig=c2ln+/"#,
            r#"X-Matrix sig="c2ln+/",key="ed25519\:\k",destination=b.org,origin="a.\org:1""#,
            r#"X-Matrix origin="a.org:1",x="y,\"z",destination="b.org",key="ed25519:k",,sig="c2ln+/","#,
        ] {
            assert_eq!(XMatrix::parse(header), Ok(parsed()), "{header}");
        }
        let bare = r#"X-Matrix origin=a.org:1,key=ed25519:k,sig="c2ln+/""#;
        assert_eq!(
            XMatrix::parse(bare),
            Ok(XMatrix {
                destination: None,
                ..parsed()
            })
        );
    }

    #[test]
    fn what_is_written_is_read_back() {
        assert_eq!(XMatrix::parse(&parsed().to_header()), Ok(parsed()));
        assert_eq!(
            parsed().to_header(),
            r#"X-Matrix origin="a.org:1",destination="b.org",key="ed25519:k",sig="c2ln+/""#
        );
    }

    #[test]
    fn nonsense_is_malformed() {
        for header in [
            "X-Matrix",
            "X-Matrix ",
            "X-Matrix origin",
            r#"X-Matrix origin="a.org"#,
            r#"X-Matrix origin="a.org\"#,
            r#"X-Matrix origin="a.org",origin="b.org",key="k",sig="s""#,
            r#"X-Matrix origin="a b",key="k",sig="s""#,
            r#"X-Matrix origin="a.org"key="k",sig="s""#,
            r#"X-Matrix origin="a.org",key="k""#,
            r#"X-Matrix origin="a.org",sig="s""#,
            r#"X-Matrix key="k",sig="s""#,
            r#"X-Matrix ="x",origin="a.org",key="k",sig="s""#,
            r#"X-Matrix origin=a"b,key="k",sig="s""#,
        ] {
            let got = XMatrix::parse(header);
            assert!(
                matches!(got, Err(AuthError::Malformed(_))),
                "{header}: {got:?}"
            );
        }
        for header in ["", "Bearer x", "Basic origin=a.org"] {
            assert_eq!(XMatrix::parse(header), Err(AuthError::Missing), "{header}");
        }
    }

    /// The seed of the specification's test vectors.
    fn key() -> SigningKey {
        SigningKey::parse("ed25519 1 YJDBA9Xnr2sVqXD9Vj7XVUnmFZcZrlw8Md7kMW+3XA1").unwrap()
    }

    #[test]
    fn a_signed_request_is_verified_and_any_change_noticed() {
        let (own, there) = (name("a.org"), name("b.org"));
        let content = || Some(serde_json::json!({"b": 1, "a": {"float": 1.5}}));
        let uri = "/_matrix/federation/v1/x?a=%2F";
        let header = sign(&key(), "PUT", uri, &own, &there, content()).unwrap();
        let public = key().verify_key();
        let check = |header: &XMatrix, method, uri, own: &ServerName, content| {
            header.verify(&public, method, uri, own, content).is_ok()
        };
        assert!(check(&header, "PUT", uri, &there, content()));
        let silent = XMatrix {
            destination: None,
            ..header.clone()
        };
        assert!(check(&silent, "PUT", uri, &there, content()));
        assert!(!check(&silent, "PUT", uri, &own, content()));
        assert!(!check(&header, "POST", uri, &there, content()));
        assert!(!check(
            &header,
            "PUT",
            "/_matrix/federation/v1/x?a=/",
            &there,
            content()
        ));
        assert!(!check(&header, "PUT", uri, &there, None));
        assert!(!check(
            &header,
            "PUT",
            uri,
            &there,
            Some(serde_json::json!({}))
        ));
        let forged = XMatrix {
            origin: name("c.org"),
            ..header.clone()
        };
        assert!(!check(&forged, "PUT", uri, &there, content()));
        let broken = XMatrix {
            signature: "!".into(),
            ..header
        };
        assert!(!check(&broken, "PUT", uri, &there, content()));
    }

    #[test]
    fn the_signature_is_that_of_the_json_signing_algorithm() {
        // The same object, signed as any other JSON object.
        let (own, there) = (name("a.org"), name("b.org"));
        let header = sign(&key(), "GET", "/x", &own, &there, None).unwrap();
        let mut object = serde_json::json!({
            "method": "GET", "uri": "/x", "origin": "a.org", "destination": "b.org",
        })
        .as_object()
        .unwrap()
        .clone();
        key().sign_json(&mut object, &own).unwrap();
        assert_eq!(object["signatures"]["a.org"]["ed25519:1"], header.signature);
    }
}
