//! Any text as an X-Matrix header: no panic, and what is read is read alike when written again.

#![no_main]

use federation::request_auth::XMatrix;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|header: &str| {
    let Ok(read) = XMatrix::parse(header) else {
        return;
    };
    // We write no escapes, as the spec asks of senders: what needs them is never ours to write.
    if [&read.key, &read.signature]
        .iter()
        .any(|t| t.contains(['"', '\\']))
    {
        return;
    }
    let written = read.to_header();
    if written.len() <= 4096 {
        assert_eq!(XMatrix::parse(&written), Ok(read));
    }
});
