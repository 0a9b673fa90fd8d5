//! Events on the wire: canonical JSON, format, hashes and signatures.

mod batch;
mod canonical_json;
mod common;
mod events;
mod versions;
