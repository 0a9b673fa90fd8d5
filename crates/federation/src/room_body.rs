//! The bodies of send_join and /state, cut into events as they arrive.
//!
//! Such a body may be hundreds of megabytes, so it is never held: a bracket counter finds where each
//! event ends, and what is inside is for the checks to judge. Memory is one event and one window.

use protocol::id::ServerName;
use room::effect::{RawPdu, Section, SentJoin};
use serde::Deserialize;
use serde_json::value::RawValue;

/// A window is handed on when it has this many events, which is one batch of signatures: the larger it is, the
/// fewer terms of the batch are keys…
pub const WINDOW_EVENTS: usize = 3072;
/// …or this many bytes, whichever comes first.
pub const WINDOW_BYTES: usize = 4 << 20;
/// Synapse's cap too; Matrix HQ in 2022 was some 200 MB (J-49).
pub const BODY_BYTES_MAX: usize = 500 << 20;
/// Canonical events are at most 64 KiB; escapes and `unsigned` can make the wire form larger.
pub const EVENT_BYTES_MAX: usize = 1 << 20;
/// Far above any room known.
pub const EVENTS_MAX: usize = 2_000_000;
/// `servers_in_room` of a room of 30,000 servers, and the join event.
const OTHER_BYTES_MAX: usize = 8 << 20;
/// Top-level keys; real bodies have six.
const KEYS_MAX: usize = 64;
const KEY_BYTES_MAX: usize = 256;
/// Serde stops at 128 levels as well.
const DEPTH_MAX: u32 = 128;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyKind {
    /// `{state, auth_chain, event?, members_omitted?, servers_in_room?}`
    SendJoinV2,
    /// `[200, {…}]` with the same keys.
    SendJoinV1,
    /// `{pdus, auth_chain}`
    State,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    #[error("the body is not what the endpoint gives: {0}")]
    Malformed(&'static str),
    #[error("the body is too large: {0}")]
    TooLarge(&'static str),
    #[error("the body ends too early")]
    Truncated,
}

use BodyError::{Malformed, TooLarge, Truncated};

/// Takes chunks, gives windows.
pub struct RoomBody {
    kind: BodyKind,
    at: At,
    bytes: usize,
    events: usize,
    /// Keys seen so far.
    keys: Vec<String>,
    /// The piece at hand, as far as it came in earlier chunks.
    piece: Vec<u8>,
    window: Vec<RawPdu>,
    window_section: Section,
    window_bytes: usize,
    ready: Vec<(Section, Vec<RawPdu>)>,
    event: Option<Vec<u8>>,
    members_omitted: Option<Vec<u8>>,
    servers_in_room: Option<Vec<u8>>,
}

/// Where in the document the next byte stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Start,
    /// After `[` of the v1 form: the status.
    Status,
    /// After the status's comma.
    Inner,
    /// After `{`: a key or the end.
    FirstKey,
    /// After a comma: a key.
    NextKey,
    Key {
        escaped: bool,
    },
    Colon,
    Value,
    /// A number, `true`, `false` or `null`.
    Scalar,
    /// A string, object or array that is not a list of events.
    Other(Nesting),
    /// After a value: a comma or the end.
    AfterValue,
    /// Within a list of events; whether an event, a comma, or either the first event or the end is due.
    List {
        section: Section,
        due: Due,
    },
    Event {
        section: Section,
        nesting: Nesting,
    },
    /// After the object of the v1 form.
    CloseV1,
    End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    EventOrEnd,
    Event,
    CommaOrEnd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Nesting {
    depth: u32,
    in_string: bool,
    escaped: bool,
}

impl RoomBody {
    pub fn new(kind: BodyKind) -> Self {
        Self {
            kind,
            at: At::Start,
            bytes: 0,
            events: 0,
            keys: Vec::new(),
            piece: Vec::new(),
            window: Vec::new(),
            window_section: Section::State,
            window_bytes: 0,
            ready: Vec::new(),
            event: None,
            members_omitted: None,
            servers_in_room: None,
        }
    }

    /// Takes the next chunk. After an error the body is of no use.
    pub fn feed(&mut self, chunk: &[u8]) -> Result<(), BodyError> {
        self.bytes += chunk.len();
        if self.bytes > BODY_BYTES_MAX {
            return Err(TooLarge("all of it"));
        }
        let mut rest = chunk;
        while let Some(&byte) = rest.first() {
            let used = match self.at {
                At::Event { section, nesting } => self.event(rest, section, nesting)?,
                At::Other(nesting) => self.other(rest, nesting)?,
                At::Scalar => self.scalar(rest)?,
                At::Key { escaped } => self.key(byte, escaped)?,
                _ if matches!(byte, b' ' | b'\t' | b'\n' | b'\r') => 1,
                at => self.punctuation(at, byte)?,
            };
            rest = &rest[used..];
        }
        Ok(())
    }

    /// Full windows since the last call.
    pub fn take_ready(&mut self) -> Vec<(Section, Vec<RawPdu>)> {
        std::mem::take(&mut self.ready)
    }

    /// After the last chunk: the rest of the events, and what the other keys said.
    pub fn finish(mut self) -> Result<(Vec<(Section, Vec<RawPdu>)>, SentJoin), BodyError> {
        if self.at != At::End {
            return Err(Truncated);
        }
        let needed: [&str; 2] = match self.kind {
            BodyKind::State => ["pdus", "auth_chain"],
            BodyKind::SendJoinV1 | BodyKind::SendJoinV2 => ["state", "auth_chain"],
        };
        if !needed.iter().all(|key| self.keys.iter().any(|k| k == key)) {
            return Err(Malformed("a list of events is missing"));
        }
        self.flush();
        let sent = SentJoin {
            event: self.event.map(raw_object).transpose()?.flatten(),
            members_omitted: self
                .members_omitted
                .map(|raw| parse::<Option<bool>>(&raw))
                .transpose()?
                .flatten()
                .unwrap_or(false),
            servers_in_room: self
                .servers_in_room
                .map(|raw| server_names(&raw))
                .transpose()?
                .flatten(),
        };
        Ok((self.ready, sent))
    }

    /// A byte of structure. Says how many bytes it used, which is none if the byte opens a piece that
    /// is read from its first byte on.
    fn punctuation(&mut self, at: At, byte: u8) -> Result<usize, BodyError> {
        let (next, used) = match (at, byte) {
            (At::Start, b'[') if self.kind == BodyKind::SendJoinV1 => (At::Status, 1),
            (At::Start, b'{') if self.kind != BodyKind::SendJoinV1 => (At::FirstKey, 1),
            (At::Status, b'0'..=b'9') => (At::Status, 1),
            (At::Status, b',') => (At::Inner, 1),
            (At::Inner, b'{') => (At::FirstKey, 1),
            (At::FirstKey | At::NextKey, b'"') => (At::Key { escaped: false }, 1),
            (At::FirstKey | At::AfterValue, b'}') => (self.closed(), 1),
            (At::Colon, b':') => (At::Value, 1),
            (At::AfterValue, b',') => (At::NextKey, 1),
            (At::CloseV1, b']') => (At::End, 1),
            (At::Value, b'[') if self.section().is_some() => {
                let section = self.section().expect("the guard saw it");
                let due = Due::EventOrEnd;
                (At::List { section, due }, 1)
            }
            (At::Value, b'{' | b'[' | b'"') => (At::Other(Nesting::START), 0),
            (At::Value, b'-' | b'0'..=b'9' | b't' | b'f' | b'n') => (At::Scalar, 0),
            (At::List { section, due }, b'{') if due != Due::CommaOrEnd => {
                let nesting = Nesting::START;
                (At::Event { section, nesting }, 0)
            }
            (
                At::List {
                    section,
                    due: Due::CommaOrEnd,
                },
                b',',
            ) => {
                let due = Due::Event;
                (At::List { section, due }, 1)
            }
            (At::List { due, .. }, b']') if due != Due::Event => (At::AfterValue, 1),
            _ => return Err(Malformed("unexpected character")),
        };
        self.at = next;
        Ok(used)
    }

    fn closed(&self) -> At {
        match self.kind {
            BodyKind::SendJoinV1 => At::CloseV1,
            BodyKind::SendJoinV2 | BodyKind::State => At::End,
        }
    }

    /// The section that the list under the present key is.
    fn section(&self) -> Option<Section> {
        match (self.kind, self.keys.last()?.as_str()) {
            (BodyKind::State, "pdus") | (BodyKind::SendJoinV1 | BodyKind::SendJoinV2, "state") => {
                Some(Section::State)
            }
            (_, "auth_chain") => Some(Section::AuthChain),
            _ => None,
        }
    }

    fn key(&mut self, byte: u8, escaped: bool) -> Result<usize, BodyError> {
        if byte == b'"' && !escaped {
            let mut quoted = vec![b'"'];
            quoted.append(&mut self.piece);
            quoted.push(b'"');
            let key: String =
                serde_json::from_slice(&quoted).map_err(|_| Malformed("a bad key"))?;
            // With two lists of one name, two readers may see two rooms.
            if self.keys.contains(&key) {
                return Err(Malformed("a key twice"));
            }
            if self.keys.len() == KEYS_MAX {
                return Err(TooLarge("too many keys"));
            }
            self.keys.push(key);
            self.at = At::Colon;
            return Ok(1);
        }
        if self.piece.len() == KEY_BYTES_MAX {
            return Err(TooLarge("a key"));
        }
        self.piece.push(byte);
        self.at = At::Key {
            escaped: byte == b'\\' && !escaped,
        };
        Ok(1)
    }

    fn scalar(&mut self, rest: &[u8]) -> Result<usize, BodyError> {
        let end = rest
            .iter()
            .position(|b| !matches!(b, b'a'..=b'z' | b'E' | b'0'..=b'9' | b'-' | b'+' | b'.'));
        self.extend_piece(
            &rest[..end.unwrap_or(rest.len())],
            KEY_BYTES_MAX,
            "a number",
        )?;
        if end.is_some() {
            self.value_ended()?;
        }
        Ok(end.unwrap_or(rest.len()))
    }

    fn other(&mut self, rest: &[u8], mut nesting: Nesting) -> Result<usize, BodyError> {
        let end = nesting.scan(rest)?;
        let used = end.unwrap_or(rest.len());
        self.extend_piece(&rest[..used], OTHER_BYTES_MAX, "a value")?;
        match end {
            Some(_) => self.value_ended()?,
            None => self.at = At::Other(nesting),
        }
        Ok(used)
    }

    fn value_ended(&mut self) -> Result<(), BodyError> {
        let raw = std::mem::take(&mut self.piece);
        let key = self.keys.last().map(String::as_str).unwrap_or_default();
        let join = self.kind != BodyKind::State;
        // An empty list as some languages write it.
        if self.section().is_some() && raw != b"null" {
            return Err(Malformed("a list of events that is no list"));
        }
        match key {
            "event" if join => self.event = Some(raw),
            "members_omitted" if join => self.members_omitted = Some(raw),
            "servers_in_room" if join => self.servers_in_room = Some(raw),
            _ => {}
        }
        self.at = At::AfterValue;
        Ok(())
    }

    fn event(
        &mut self,
        rest: &[u8],
        section: Section,
        mut nesting: Nesting,
    ) -> Result<usize, BodyError> {
        let Some(used) = nesting.scan(rest)? else {
            self.extend_piece(rest, EVENT_BYTES_MAX, "an event")?;
            self.at = At::Event { section, nesting };
            return Ok(rest.len());
        };
        if self.piece.is_empty() {
            // The common case: the whole event lies in this chunk and is copied once.
            if used > EVENT_BYTES_MAX {
                return Err(TooLarge("an event"));
            }
            self.push(section, &rest[..used])?;
        } else {
            self.extend_piece(&rest[..used], EVENT_BYTES_MAX, "an event")?;
            let piece = std::mem::take(&mut self.piece);
            self.push(section, &piece)?;
            self.piece = piece;
            self.piece.clear();
        }
        let due = Due::CommaOrEnd;
        self.at = At::List { section, due };
        Ok(used)
    }

    fn push(&mut self, section: Section, event: &[u8]) -> Result<(), BodyError> {
        self.events += 1;
        if self.events > EVENTS_MAX {
            return Err(TooLarge("too many events"));
        }
        let event = std::str::from_utf8(event).map_err(|_| Malformed("not UTF-8"))?;
        if self.window_section != section {
            self.flush();
            self.window_section = section;
        }
        self.window.push(event.into());
        self.window_bytes += event.len();
        if self.window.len() >= WINDOW_EVENTS || self.window_bytes >= WINDOW_BYTES {
            self.flush();
        }
        Ok(())
    }

    fn flush(&mut self) {
        if !self.window.is_empty() {
            let window = std::mem::take(&mut self.window);
            self.ready.push((self.window_section, window));
            self.window_bytes = 0;
        }
    }

    fn extend_piece(
        &mut self,
        bytes: &[u8],
        max: usize,
        what: &'static str,
    ) -> Result<(), BodyError> {
        if self.piece.len() + bytes.len() > max {
            return Err(TooLarge(what));
        }
        self.piece.extend_from_slice(bytes);
        Ok(())
    }
}

impl Nesting {
    const START: Self = Self {
        depth: 0,
        in_string: false,
        escaped: false,
    };

    /// Goes on to the end of the value that was begun; `Some(n)` if it ends after `n` of these bytes.
    fn scan(&mut self, bytes: &[u8]) -> Result<Option<usize>, BodyError> {
        let mut at = 0;
        while at < bytes.len() {
            if self.in_string {
                if self.escaped {
                    self.escaped = false;
                    at += 1;
                    continue;
                }
                let Some(found) = memchr::memchr2(b'"', b'\\', &bytes[at..]) else {
                    return Ok(None);
                };
                at += found + 1;
                if bytes[at - 1] == b'\\' {
                    self.escaped = true;
                    continue;
                }
                self.in_string = false;
                if self.depth == 0 {
                    return Ok(Some(at));
                }
                continue;
            }
            at += 1;
            match bytes[at - 1] {
                b'"' => self.in_string = true,
                b'{' | b'[' => {
                    self.depth += 1;
                    if self.depth > DEPTH_MAX {
                        return Err(Malformed("nested too deeply"));
                    }
                }
                b'}' | b']' => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        return Ok(Some(at));
                    }
                }
                _ => {}
            }
        }
        Ok(None)
    }
}

fn parse<'a, T: Deserialize<'a>>(raw: &'a [u8]) -> Result<T, BodyError> {
    serde_json::from_slice(raw).map_err(|_| Malformed("a value of the wrong kind"))
}

fn raw_object(raw: Vec<u8>) -> Result<Option<RawPdu>, BodyError> {
    let raw: Option<&RawValue> = parse(&raw)?;
    Ok(raw
        .map(RawValue::get)
        .filter(|text| text.starts_with('{'))
        .map(RawPdu::from))
}

/// Names that are none are left out: one bad entry is no reason to lose a join.
fn server_names(raw: &[u8]) -> Result<Option<Vec<ServerName>>, BodyError> {
    let names: Option<Vec<serde_json::Value>> = parse(raw)?;
    Ok(names.map(|names| {
        names
            .iter()
            .filter_map(|name| ServerName::parse(name.as_str()?).ok())
            .collect()
    }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Outcome = Result<(Vec<(Section, String)>, SentJoin), BodyError>;

    /// Reads `body` cut at these places, which wrap around.
    fn read(kind: BodyKind, body: &[u8], cuts: &[usize]) -> Outcome {
        let mut reader = RoomBody::new(kind);
        let mut rest = body;
        let mut windows = Vec::new();
        let mut cuts = cuts.iter().cycle();
        while !rest.is_empty() {
            let cut = cuts.next().map_or(rest.len(), |c| *c).clamp(1, rest.len());
            reader.feed(&rest[..cut])?;
            windows.extend(reader.take_ready());
            rest = &rest[cut..];
        }
        let (last, sent) = reader.finish()?;
        windows.extend(last);
        for (_, window) in &windows {
            assert!(window.len() <= WINDOW_EVENTS);
        }
        let events = windows
            .into_iter()
            .flat_map(|(section, pdus)| pdus.into_iter().map(move |p| (section, p.to_string())))
            .collect();
        Ok((events, sent))
    }

    fn check(kind: BodyKind, body: &str, expected: Result<&[(Section, &str)], BodyError>) {
        for cuts in [&[usize::MAX][..], &[1], &[2, 3], &[7]] {
            let got = read(kind, body.as_bytes(), cuts).map(|(events, _)| events);
            let expected = expected
                .clone()
                .map(|e| e.iter().map(|(s, p)| (*s, (*p).to_owned())).collect());
            assert_eq!(got, expected, "{body} cut at {cuts:?}");
        }
    }

    use Section::{AuthChain, State};

    #[test]
    fn events_come_out_as_they_stood() {
        check(
            BodyKind::SendJoinV2,
            r#" { "origin" : "a}]\"" , "auth_chain":[ {"a": "}\\"} ,{} ],"x":[{"state":[1]},2],
               "state":[{"b":[[{"c":"\"{"}]]}],"event":{"e":1},"members_omitted":true} "#,
            Ok(&[
                (AuthChain, r#"{"a": "}\\"}"#),
                (AuthChain, "{}"),
                (State, r#"{"b":[[{"c":"\"{"}]]}"#),
            ]),
        );
        check(
            BodyKind::State,
            r#"{"pdus":[{}],"auth_chain":[]}"#,
            Ok(&[(State, "{}")]),
        );
        check(
            BodyKind::SendJoinV1,
            r#"[200, {"state":[{}],"auth_chain":null}]"#,
            Ok(&[(State, "{}")]),
        );
        // An escaped key is the same key.
        check(
            BodyKind::SendJoinV2,
            r#"{"st\u0061te":[{}],"auth_chain":[]}"#,
            Ok(&[(State, "{}")]),
        );
    }

    #[test]
    fn what_is_no_such_body_is_refused() {
        let v2 = BodyKind::SendJoinV2;
        for bad in [
            "[]",
            "null",
            r#"{"state":[1],"auth_chain":[]}"#,
            r#"{"state":[{}{}],"auth_chain":[]}"#,
            r#"{"state":[,{}],"auth_chain":[]}"#,
            r#"{"state":[{},],"auth_chain":[]}"#,
            r#"{"state":{},"auth_chain":[]}"#,
            r#"{"state":7,"auth_chain":[]}"#,
            r#"{"state":[],"auth_chain":[]},"#,
            r#"{"state":[],"auth_chain":[]}{}"#,
            r#"{,"state":[],"auth_chain":[]}"#,
            r#"{"state":[],"auth_chain":[],}"#,
            r#"{"state" [],"auth_chain":[]}"#,
            r#"{"state":[]}"#,
            r#"{"auth_chain":[]}"#,
            r#"{"state":[],"auth_chain":[],"members_omitted":"no"}"#,
            r#"{"state":[],"auth_chain":[],"servers_in_room":{}}"#,
        ] {
            for cuts in [&[usize::MAX][..], &[1]] {
                let got = read(v2, bad.as_bytes(), cuts);
                assert!(matches!(got, Err(Malformed(_))), "{bad}: {got:?}");
            }
        }
        check(
            v2,
            r#"{"state":[{}],"auth_chain":[],"state":[]}"#,
            Err(Malformed("a key twice")),
        );
        check(
            v2,
            r#"{"auth_chain":[],"auth_ch\u0061in":[]}"#,
            Err(Malformed("a key twice")),
        );
    }

    #[test]
    fn a_truncated_body_is_noticed_wherever_it_breaks_off() {
        let body = r#"[200,{"state":[{"a":"b\\"}],"auth_chain":[{}],"members_omitted":false}]"#;
        for end in 0..body.len() {
            let got = read(BodyKind::SendJoinV1, &body.as_bytes()[..end], &[3]);
            assert_eq!(got, Err(Truncated), "cut off at {end}");
        }
    }

    #[test]
    fn the_other_keys_are_collected() {
        let body = r#"{"state":[],"auth_chain":[],"event":{"type": "x"},"members_omitted":true,
            "servers_in_room":["a.org","not a server",3,"b.org:1"]}"#;
        let (_, sent) = read(BodyKind::SendJoinV2, body.as_bytes(), &[5]).unwrap();
        let name = |text| ServerName::parse(text).unwrap();
        assert_eq!(
            sent,
            SentJoin {
                event: Some(r#"{"type": "x"}"#.into()),
                members_omitted: true,
                servers_in_room: Some(vec![name("a.org"), name("b.org:1")]),
            }
        );
    }

    #[test]
    fn hostile_sizes_are_stopped() {
        let v2 = BodyKind::SendJoinV2;
        let deep = format!(r#"{{"state":[{{"a":{}"#, "[".repeat(200));
        let fat = format!(
            r#"{{"state":[{{"a":"{}"}}],"auth_chain":[]}}"#,
            "x".repeat(EVENT_BYTES_MAX)
        );
        let key = format!(r#"{{"{}":1}}"#, "k".repeat(KEY_BYTES_MAX + 1));
        let number = format!(r#"{{"n":{}}}"#, "1".repeat(KEY_BYTES_MAX + 1));
        let keys: Vec<String> = (0..=KEYS_MAX).map(|k| format!(r#""{k}":1"#)).collect();
        let many = format!("{{{}}}", keys.join(","));
        for (body, error) in [
            (deep, Malformed("nested too deeply")),
            (fat, TooLarge("an event")),
            (key, TooLarge("a key")),
            (number, TooLarge("a number")),
            (many, TooLarge("too many keys")),
        ] {
            for cuts in [&[usize::MAX][..], &[1000]] {
                assert_eq!(read(v2, body.as_bytes(), cuts), Err(error.clone()));
            }
        }
    }

    #[test]
    fn windows_are_full_but_bounded() {
        let events = vec![r#"{"a":1}"#; 3 * WINDOW_EVENTS + 232].join(",");
        let body = format!(r#"{{"state":[{events}],"auth_chain":[{events}]}}"#);
        let mut reader = RoomBody::new(BodyKind::SendJoinV2);
        reader.feed(body.as_bytes()).unwrap();
        let (windows, _) = reader.finish().unwrap();
        let sizes: Vec<usize> = windows.iter().map(|(_, w)| w.len()).collect();
        let full = WINDOW_EVENTS;
        assert_eq!(sizes, [full, full, full, 232, full, full, full, 232]);
    }

    fn json() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            any::<String>().prop_map(Into::into),
            "[\\[\\]{}\",:\\\\]{0,6}".prop_map(Into::into),
        ];
        leaf.prop_recursive(4, 24, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Into::into),
                prop::collection::btree_map(any::<String>(), inner, 0..5)
                    .prop_map(|m| serde_json::Value::Object(m.into_iter().collect())),
            ]
        })
    }

    fn object() -> impl Strategy<Value = serde_json::Value> {
        prop::collection::btree_map(any::<String>(), json(), 0..5)
            .prop_map(|m| serde_json::Value::Object(m.into_iter().collect()))
    }

    proptest! {
        #[test]
        fn any_cutting_gives_what_a_json_parser_sees(
            state in prop::collection::vec(object(), 0..6),
            chain in prop::collection::vec(object(), 0..6),
            extra in json(),
            pretty: bool,
            cuts in prop::collection::vec(1_usize..40, 1..20),
        ) {
            let body = serde_json::json!({
                "state": state, "auth_chain": chain, "x": extra, "members_omitted": true,
            });
            let body = if pretty {
                serde_json::to_string_pretty(&body)
            } else {
                serde_json::to_string(&body)
            }.unwrap();
            let (events, sent) = read(BodyKind::SendJoinV2, body.as_bytes(), &cuts).unwrap();
            let of = |wanted: Section| -> Vec<serde_json::Value> {
                events
                    .iter()
                    .filter(|(section, _)| *section == wanted)
                    .map(|(_, text)| serde_json::from_str(text).unwrap())
                    .collect()
            };
            prop_assert_eq!(of(State), state);
            prop_assert_eq!(of(AuthChain), chain);
            prop_assert!(sent.members_omitted);
        }

        #[test]
        fn any_bytes_in_any_cutting_have_one_outcome(
            bytes in "[\\[\\]{}\",:\\\\ a1]{0,40}",
            cuts in prop::collection::vec(1_usize..9, 1..8),
        ) {
            for kind in [BodyKind::SendJoinV2, BodyKind::SendJoinV1, BodyKind::State] {
                let whole = read(kind, bytes.as_bytes(), &[usize::MAX]);
                prop_assert_eq!(read(kind, bytes.as_bytes(), &cuts), whole);
            }
        }
    }
}
