//! The settings that the services read. Where they come from is the binary's business.

use std::path::PathBuf;
use std::time::Duration;

use federation::IpRanges;
use protocol::id::{ServerName, UserId};
use protocol::room_version::RoomVersion;
use protocol::signature::Verification;

use crate::processor::Processor;

#[derive(Clone, Debug)]
pub struct Config {
    pub server_name: ServerName,
    /// What clients should use, for the well-known file; `None`: not told.
    pub public_base_url: Option<String>,
    /// `host:port` where we listen for other servers, for the well-known file; `None`: not told.
    pub federation_address: Option<String>,
    pub default_room_version: RoomVersion,
    pub registration: Registration,
    /// A registration token that never runs out.
    pub registration_token: Option<String>,
    /// Enables `/_synapse/admin/v1/register`.
    pub registration_shared_secret: Option<String>,
    pub limits: Limits,
    pub join: JoinSettings,
    pub media_path: PathBuf,
    pub media_upload_bytes_max: u64,
    /// Where requests may go that users or other servers ask for: previews, push gateways.
    pub outbound_ip_ranges: IpRanges,
    pub appservice_files: Vec<PathBuf>,
    pub trusted_key_servers: Vec<ServerName>,
    /// How long a client's request may wait for a room to become full (C-35).
    pub full_state_wait_max: Duration,
    pub presence: bool,
    pub processor: Processor,
    /// Who speaks for the operators; `None`: nobody.
    pub server_notices: Option<ServerNotices>,
}

/// The user that notices come from, and the looks of their rooms.
#[derive(Clone, Debug)]
pub struct ServerNotices {
    pub user: UserId,
    pub display_name: Option<String>,
    pub avatar_url: Option<String>,
    pub room_name: Option<String>,
    pub room_topic: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registration {
    Closed,
    Open,
    /// Only with a registration token.
    Token,
}

#[derive(Clone, Debug)]
pub struct Limits {
    /// `false` lifts every rate limit.
    pub enabled: bool,
}

/// How joins and resyncs go beyond what every resident expects. Each is a setting because test suites
/// forbid requests that they do not know.
#[derive(Clone, Debug)]
pub struct JoinSettings {
    /// Send the same signed join to a second server when the first is silent for some seconds.
    pub race_send_join: bool,
    /// Of an answer that does not leave out the members, verify this many before the user is in, and the
    /// others behind.
    pub members_first: usize,
    /// Ask other servers for events that an answer to a join has badly signed, or without their auth events
    /// (J-59).
    pub ask_for_left_out: bool,
    /// Ask two servers for the ids of the full state, and compare (O-46).
    pub compare_donors: bool,
    /// After a resync, send the newest of our events to servers that it found in the room (O-2).
    pub tell_missed_servers: bool,
    /// Verify signatures in exact batches, or one at a time.
    pub verification: Verification,
}

impl Default for JoinSettings {
    fn default() -> Self {
        Self {
            race_send_join: true,
            members_first: 1000,
            ask_for_left_out: true,
            compare_donors: true,
            tell_missed_servers: true,
            verification: Verification::Batch,
        }
    }
}

impl Config {
    /// The defaults for a server of this name: closed registration, limits on.
    pub fn new(server_name: ServerName) -> Self {
        Self {
            server_name,
            public_base_url: None,
            federation_address: None,
            default_room_version: RoomVersion::V12,
            registration: Registration::Closed,
            registration_token: None,
            registration_shared_secret: None,
            limits: Limits { enabled: true },
            join: JoinSettings::default(),
            media_path: PathBuf::from("data/media"),
            media_upload_bytes_max: 50 << 20,
            outbound_ip_ranges: IpRanges::public_and(&[]).expect("no ranges to misread"),
            appservice_files: Vec::new(),
            trusted_key_servers: Vec::new(),
            full_state_wait_max: Duration::from_secs(120),
            presence: true,
            processor: Processor::Pool,
            server_notices: None,
        }
    }

    pub fn is_ours(&self, user: &UserId) -> bool {
        user.server_str() == self.server_name.as_str()
    }
}
