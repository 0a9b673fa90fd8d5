//! Joins as other suites see them (Complement's, sytest's): each row of joins.md part 6 by its number (`u_…`), and
//! what residents must refuse or keep to, by that of the requirement (`r_…`).
//!
//! | rows | what | where |
//! |---|---|---|
//! | 1–6 | whom to ask, and state that can not be verified | [`handshake`] |
//! | 7–10 | send_join and send_leave take their own kind; the partial answer | [`served`] |
//! | 11 | users of application services | [`handshake`] |
//! | 12–17 | restricted rooms | [`restricted`] |
//! | 18 | hierarchies of restricted rooms | [`restricted`] |
//! | 19, 20 | knocking | [`knocking`] |
//! | 21 | send_knock takes knocks | [`served`] |
//! | 22 | what stands on rejected events | [`receiving`] |
//! | 23 | event_auth | [`served`] |
//! | 24, 25 | gaps, filled and not | [`receiving`] |
//! | 26 | serving get_missing_events | [`served`] |
//! | 27–29 | oversized events, holes in auth chains, refused events that come again | [`receiving`] |
//! | 30 | server ACLs | [`receiving`] |
//! | 31–33 | invites, refused, taken back, after a ban | [`invites`], `doors/rooms.rs` |
//! | 34 | aliases of any letters | [`beside`] |
//! | 35–42 | version 12 | [`versions`] |
//! | 43 | state resolution 2.1 against lies | [`receiving`] |
//! | 44, 47 | what invitees are shown | [`invites`] |
//! | 45 | sytest's joins | [`handshake`], [`served`], [`hostile`] |
//! | 46 | the first PDU after a join | [`handshake`] |
//! | 48, 49 | device lists, history | [`beside`] |
//! | 50 | forks; typing, presence | [`receiving`], [`beside`]; time to event: `doors/rooms.rs` |
//! | 51 | unknown endpoints, our keys | [`served`] |
//! | 52 | summaries and hierarchies; unwanted invites | [`beside`], [`invites`] |
//!
//! Policy servers are in [`policy`]. More of 1, 2 and 31 with a real Synapse: `tests/interop`. What happens while a room is partial: `tests/partial`.

mod beside;
#[path = "../common/dag.rs"]
#[expect(dead_code, reason = "each test target uses a part of it")]
mod dag;
mod handshake;
mod hostile;
mod invites;
mod knocking;
#[path = "../common/network.rs"]
mod network;
mod policy;
mod receiving;
#[path = "../common/resident.rs"]
#[expect(dead_code, reason = "each test target uses a part of it")]
mod resident;
mod restricted;
mod served;
#[path = "../common/stage.rs"]
#[expect(dead_code, reason = "each test target uses a part of it")]
mod stage;
mod versions;
mod ways;
#[path = "../common/world.rs"]
#[expect(dead_code, reason = "each test target uses a part of it")]
mod world;
