//! Any bytes as a send_join or /state body: no panic, the same outcome however they are cut, and what a JSON
//! parser accepts comes out as that sees it.

#![no_main]

use federation::room_body::{BodyKind, RoomBody};
use libfuzzer_sys::fuzz_target;
use room::effect::{Section, SentJoin};
use serde_json::Value;

type Outcome = Option<(Vec<(bool, String)>, SentJoin)>;

fn read(kind: BodyKind, bytes: &[u8], piece: usize) -> Outcome {
    let mut reader = RoomBody::new(kind);
    let mut events = Vec::new();
    let mut take = |windows: Vec<(Section, Vec<_>)>| {
        for (section, pdus) in windows {
            let state = section == Section::State;
            events.extend(
                pdus.iter()
                    .map(|pdu: &std::sync::Arc<str>| (state, pdu.to_string())),
            );
        }
    };
    for chunk in bytes.chunks(piece) {
        reader.feed(chunk).ok()?;
        take(reader.take_ready());
    }
    let (rest, sent) = reader.finish().ok()?;
    take(rest);
    Some((events, sent))
}

fuzz_target!(|input: (u8, u8, &[u8])| {
    let (kind, piece, bytes) = input;
    let kind = match kind % 3 {
        0 => BodyKind::SendJoinV2,
        1 => BodyKind::SendJoinV1,
        _ => BodyKind::State,
    };
    let whole = read(kind, bytes, bytes.len().max(1));
    assert_eq!(read(kind, bytes, usize::from(piece) + 1), whole);

    let (Some((events, _)), Ok(Value::Object(body))) = (whole, serde_json::from_slice(bytes))
    else {
        return;
    };
    let key = if kind == BodyKind::State {
        "pdus"
    } else {
        "state"
    };
    for (state, key) in [(true, key), (false, "auth_chain")] {
        let ours = events.iter().filter(|(of_state, _)| *of_state == state);
        let ours: Vec<Value> = ours
            .filter_map(|(_, text)| serde_json::from_str(text).ok())
            .collect();
        let theirs = body.get(key).and_then(Value::as_array);
        assert_eq!(ours, theirs.cloned().unwrap_or_default());
    }
});
