//! Any text as an event of any version: no panic, and what was accepted is accepted again.

#![no_main]

use libfuzzer_sys::fuzz_target;
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;

fuzz_target!(|input: (u8, &str)| {
    let (version, text) = input;
    let version = RoomVersion::ALL[usize::from(version) % RoomVersion::ALL.len()];
    let Ok((pdu, signed)) = Pdu::parse_with_signed(text, version) else {
        return;
    };
    assert_eq!(pdu.signing_bytes(), signed);
    let mut again = Pdu::parse(&pdu.json, version).expect("what was accepted stays so");
    // A redacted form may be all that its hash was of.
    assert!(pdu.redacted || !again.redacted);
    again.redacted = pdu.redacted;
    assert_eq!(again, pdu);
    let stored = Pdu::parse_trusted(&pdu.json, version, pdu.event_id.clone(), pdu.redacted);
    assert_eq!(stored.as_ref(), Ok(&pdu));
    let _ = (
        pdu.membership(),
        pdu.content_value(),
        protocol::signature::needed_keys(&pdu),
    );
});
