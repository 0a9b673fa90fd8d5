//! Any bytes through both modes of canonical JSON: no panic, and what is canonical stays as it is.

#![no_main]

use libfuzzer_sys::fuzz_target;
use protocol::canonical_json::canonicalise;

fuzz_target!(|bytes: &[u8]| {
    let strict = canonicalise(bytes, true);
    let lenient = canonicalise(bytes, false);
    if let Ok(strict) = strict {
        assert_eq!(canonicalise(&strict, true).as_ref(), Ok(&strict));
        assert_eq!(
            lenient.as_ref(),
            Ok(&strict),
            "what is strict is lenient too"
        );
    }
    if let Ok(lenient) = lenient {
        assert_eq!(canonicalise(&lenient, false).as_ref(), Ok(&lenient));
        assert!(serde_json::from_slice::<serde_json::Value>(&lenient).is_ok());
    }
});
