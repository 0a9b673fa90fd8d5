//! The server that has the big room: made once for each shape, copied for each run.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, ensure};
use protocol::id::UserId;
use protocol::room_version::RoomVersion;
use serde_json::{Value, json};

use crate::client::Client;
use crate::generated::{self, Shape};
use crate::servers::{Plan, Program, Running, Server, directory, vestibule};
use crate::usage::now_ms;
use crate::wire::{Faults, Wire};

/// Of the format that the generator writes; rooms of another one are made anew.
const FORMAT: u32 = 2;
/// The first port of those that residents are named with, one for each shape. The kernel gives higher ones to
/// connections.
const PORTS_FROM: u64 = 21_000;
const PORTS: u64 = 10_000;
/// Written last, so a directory without it is half made.
const SUMMARY: &str = "room.json";

#[derive(clap::Args, Clone, Debug)]
pub struct ShapeArguments {
    /// Members of the room.
    #[arg(long, default_value_t = 50_000)]
    pub members: usize,
    /// Servers that the members are on, none of which answers.
    #[arg(long, default_value_t = 2000)]
    pub servers: usize,
    /// Members that have changed their profile. A quarter when left out.
    #[arg(long)]
    profile_changes: Option<usize>,
    /// Users that have left. A fifth of the members when left out.
    #[arg(long)]
    leaves: Option<usize>,
    /// Users that are banned. A fiftieth of the members when left out.
    #[arg(long)]
    bans: Option<usize>,
    /// Places where the room's history forks and merges again.
    #[arg(long, default_value_t = 20)]
    forks: usize,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

impl ShapeArguments {
    pub fn shape(&self) -> Shape {
        Shape {
            version: RoomVersion::V10,
            members: self.members,
            servers: self.servers.min(self.members),
            profile_changes: self.profile_changes.unwrap_or(self.members / 4),
            leaves: self.leaves.unwrap_or(self.members / 5),
            bans: self.bans.unwrap_or(self.members / 50),
            forks: self.forks.min(self.members / 4),
            seed: self.seed,
        }
    }
}

/// A room on disk, with its server.
#[derive(Clone, Debug)]
pub struct Kept {
    home: PathBuf,
    name_port: u16,
    host: UserId,
    password: String,
    servers: usize,
    pub room: String,
    pub members: usize,
    pub state_events: usize,
    pub auth_chain_events: usize,
    pub bytes: usize,
}

impl Kept {
    /// From the disk, or made.
    pub async fn get(shape: &Shape) -> anyhow::Result<Self> {
        // What an older program stored, and this one brought up to date, lacks what this one would have stored.
        let schema = storage::migrations::newest();
        let number = fingerprint(&format!("{FORMAT} {schema} {shape:?}"));
        let home = directory("bench")?.join(format!("room-{number:016x}"));
        if !home.join(SUMMARY).exists() {
            make(&home, shape, u16::try_from(PORTS_FROM + number % PORTS)?).await?;
        }
        let summary: Value = serde_json::from_slice(&std::fs::read(home.join(SUMMARY))?)?;
        let text = |key: &str| summary[key].as_str().context("a summary without it");
        let count = |key: &str| {
            let number = summary[key].as_u64().context("a summary without it")?;
            anyhow::Ok(usize::try_from(number)?)
        };
        Ok(Self {
            name_port: u16::try_from(count("port")?)?,
            host: UserId::parse(text("host")?)?,
            password: text("password")?.to_owned(),
            servers: shape.servers,
            room: text("room")?.to_owned(),
            members: shape.members,
            state_events: count("state_events")?,
            auth_chain_events: count("auth_chain_events")?,
            bytes: count("bytes")?,
            home,
        })
    }

    pub fn events(&self) -> usize {
        self.state_events + self.auth_chain_events
    }

    pub fn describe(&self) -> String {
        format!(
            "{} members on {} servers, version 10: {} state events, {} more in the auth chain, {:.0} MB",
            self.members,
            self.servers,
            self.state_events,
            self.auth_chain_events,
            self.bytes as f64 / 1e6
        )
    }

    /// A copy of the server, running behind a wire.
    pub async fn run(
        &self,
        home: &Path,
        http: &reqwest::Client,
        faults: Faults,
    ) -> anyhow::Result<Resident> {
        clear(home)?;
        for file in std::fs::read_dir(&self.home)? {
            let file = file?;
            if file.file_type()?.is_file() {
                let copy = home.join(file.file_name());
                std::fs::copy(file.path(), &copy)?;
                // Or the first commit of the resident waits until all of it is on the disk.
                File::open(copy)?.sync_all()?;
            }
        }
        let mut plan = Plan::new(Program::Vestibule(vestibule()?), home.to_owned());
        plan.name_port = Some(self.name_port);
        plan.log_level = "warn";
        let server = Server::set_up(&plan)?;
        let database = home.join("vestibule.db");
        let name = self.host.server_name();
        generated::publish_keys(&database, &name, self.servers, now_ms()?).await?;
        let wire = Wire::lay(self.name_port, server.federation_port, faults)
            .await
            .with_context(|| format!("port {} is in use", self.name_port))?;
        let running = server.start(http).await?;
        let host = Client::log_in(http, &server, &self.host, &self.password).await?;
        Ok(Resident {
            server,
            wire,
            host,
            _running: running,
        })
    }
}

/// A running server with the room.
pub struct Resident {
    pub server: Server,
    pub wire: Wire,
    /// The room's creator.
    pub host: Client,
    _running: Running,
}

async fn make(home: &Path, shape: &Shape, port: u16) -> anyhow::Result<()> {
    let start = Instant::now();
    clear(home)?;
    let mut plan = Plan::new(Program::Vestibule(vestibule()?), home.to_owned());
    plan.name_port = Some(port);
    let server = Server::set_up(&plan)?;
    let password = format!("{:016x}", rand::random::<u64>());
    let host = server.create_user("host", &password).await?;
    let database = home.join("vestibule.db");
    let key = home.join("signing.key");
    let made = generated::make(&database, &key, &host, shape).await?;
    let summary = json!({
        "port": port,
        "host": host,
        "password": password,
        "room": made.id,
        "state_events": made.state_events,
        "auth_chain_events": made.auth_chain_events,
        "bytes": made.bytes,
    });
    std::fs::write(home.join(SUMMARY), summary.to_string())?;
    println!(
        "generated a room of {} members in {:.0} s; it is kept in {}",
        shape.members,
        start.elapsed().as_secs_f64(),
        home.display()
    );
    Ok(())
}

/// Held while a benchmark with servers runs: two at a time would use the same files, and measure each other.
pub struct Alone(#[expect(dead_code, reason = "it is the lock that counts")] File);

impl Alone {
    pub fn get() -> anyhow::Result<Self> {
        let home = directory("bench")?;
        std::fs::create_dir_all(&home)?;
        let lock = File::create(home.join("lock"))?;
        lock.try_lock().context("another benchmark runs")?;
        Ok(Self(lock))
    }
}

/// An empty directory.
pub fn clear(home: &Path) -> anyhow::Result<()> {
    if home.exists() {
        std::fs::remove_dir_all(home).with_context(|| format!("in {}", home.display()))?;
    }
    std::fs::create_dir_all(home)?;
    ensure!(home.is_dir(), "{} is no directory", home.display());
    Ok(())
}

/// FNV-1a, which is the same tomorrow.
fn fingerprint(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
