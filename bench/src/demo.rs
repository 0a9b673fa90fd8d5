//! The demo: two servers on loopback, one of which joins a big room on the other, step by step.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::builder::FalseyValueParser;
use indicatif::{ProgressBar, ProgressStyle};
use protocol::room_version::RoomVersion;
use serde_json::{Value, json};

use crate::client::{Client, answer, escaped, http};
use crate::generated::{self, Shape};
use crate::servers::{Plan, Program, Server, directory, vestibule};
use crate::usage::now_ms;

const FAKE_SERVERS: usize = 100;
/// One record of the stream of joins is some hundred bytes.
const RECORD_BYTES_MAX: usize = 64 << 10;

#[derive(clap::Args)]
pub struct Arguments {
    /// Members of the room.
    #[arg(long, env = "DEMO_MEMBERS", default_value_t = 10_000)]
    members: usize,
    /// End when the room is full, instead of staying up.
    #[arg(long, env = "DEMO_EXIT", value_parser = FalseyValueParser::new())]
    exit: bool,
}

pub async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let home = directory("demo")?;
    if home.exists() {
        std::fs::remove_dir_all(&home).with_context(|| format!("in {}", home.display()))?;
    }
    let program = Program::Vestibule(vestibule()?);
    let http = http()?;
    let password = format!("{:016x}", rand::random::<u64>());

    let plan = Plan::new(program, home.join("resident"));
    let resident = Server::set_up(&plan)?;
    let joiner = Server::set_up(&Plan {
        home: home.join("joiner"),
        notary: Some(resident.name.clone()),
        ..plan
    })?;
    let host = resident.create_user("host", &password).await?;
    let guest = joiner.create_user("guest", &password).await?;

    let start = Instant::now();
    let database = resident.home.join("vestibule.db");
    let shape = Shape::plain(RoomVersion::V11, arguments.members, FAKE_SERVERS);
    let key = resident.home.join("signing.key");
    let room = generated::make(&database, &key, &host, &shape).await?.id;
    generated::publish_keys(&database, &host.server_name(), FAKE_SERVERS, now_ms()?).await?;
    println!(
        "generated {room}: {} members, each join signed, in {}",
        arguments.members,
        seconds(start.elapsed())
    );

    // Ended when dropped.
    let _running = [resident.start(&http).await?, joiner.start(&http).await?];
    println!(
        "{} holds the room, {} will join it",
        resident.name, joiner.name
    );

    let at_home = Client::log_in(&http, &resident, &host, &password).await?;
    let alias = format!("#demo:{}", resident.name);
    let path = format!("directory/room/{}", escaped(&alias));
    at_home.put(&path, json!({ "room_id": room })).await?;
    let client = Client::log_in(&http, &joiner, &guest, &password).await?;
    join(&client, &alias, room.as_str(), arguments.members).await?;

    if arguments.exit {
        return Ok(());
    }
    println!("\nIn your client:");
    println!("  homeserver  {}", joiner.url);
    println!("  user        {guest}");
    println!("  password    {password}");
    println!(
        "\nThe room is {alias}. Logs and data are in {}.",
        home.display()
    );
    println!("Ctrl-C ends both servers.");
    std::future::pending().await
}

/// Joins, and tells how it goes until the room is full.
async fn join(client: &Client, alias: &str, room: &str, members: usize) -> anyhow::Result<()> {
    let stream = format!("{}/_vestibule/admin/v1/joins/stream", client.url);
    let request = client.http.get(stream).bearer_auth(&client.token);
    let mut changes = request.send().await?.error_for_status()?;

    println!("\njoining {alias}");
    let bar = ProgressBar::new(members as u64).with_style(ProgressStyle::with_template(
        "  {bar:50} {pos} of {len} events of the state",
    )?);
    let start = Instant::now();
    let say = |what: &str| bar.suspend(|| println!("{} {what}", seconds(start.elapsed())));
    let path = format!("{}/_matrix/client/v3/join/{}", client.url, escaped(alias));
    let join = client.http.post(path).bearer_auth(&client.token);
    let mut joining = tokio::spawn(answer(join.json(&json!({}))));
    let (mut joined, mut full) = (false, false);
    let (mut unread, mut before) = (Vec::new(), String::new());
    while !(joined && full) {
        tokio::select! {
            outcome = &mut joining, if !joined => {
                outcome??;
                joined = true;
                say("the client is told that it is in: the room is usable");
            }
            chunk = changes.chunk(), if !full => {
                unread.extend(chunk?.context("the stream of joins ended")?);
                for job in records(&mut unread)? {
                    full |= progress(&job, &mut before, &bar, &say)?;
                }
            }
        }
    }
    bar.finish_and_clear();
    let path = format!("rooms/{}/joined_members", escaped(room));
    let found = client.get(&path).await?;
    let found = found["joined"].as_object().map_or(0, |joined| joined.len());
    println!("{} {found} members are known", seconds(start.elapsed()));
    ensure!(found == members + 1, "there should be {}", members + 1);
    Ok(())
}
/// Tells of a change of the join; whether the room is full.
fn progress(
    job: &Value,
    before: &mut String,
    bar: &ProgressBar,
    say: &impl Fn(&str),
) -> anyhow::Result<bool> {
    let text = |key: &str| job[key].as_str().unwrap_or_default();
    let (state, donor, error) = (text("state"), text("donor"), text("last_error"));
    if let (Some(have), Some(want)) = (
        job["progress"]["have"].as_u64(),
        job["progress"]["want"].as_u64(),
    ) {
        bar.set_length(want);
        bar.set_position(have);
    }
    let step = match state {
        "asking" | "resyncing" => format!("{state} {donor}"),
        "accepted" => format!("accepted by {donor}"),
        "failed" | "cancelled" => bail!("the join {state}: {error}"),
        "full" => "the room is full".to_owned(),
        other => other.to_owned(),
    };
    if *before != step {
        say(&step);
        *before = step;
    }
    Ok(state == "full")
}

/// Takes the whole records off a stream of server-sent events.
fn records(unread: &mut Vec<u8>) -> anyhow::Result<Vec<Value>> {
    let mut jobs = Vec::new();
    while let Some(end) = unread.windows(2).position(|two| two == b"\n\n") {
        let record: Vec<u8> = unread.drain(..end + 2).collect();
        for line in record.split(|byte| *byte == b'\n') {
            if let Some(data) = line.strip_prefix(b"data: ") {
                jobs.push(serde_json::from_slice(data)?);
            }
        }
    }
    ensure!(unread.len() < RECORD_BYTES_MAX, "an endless record");
    Ok(jobs)
}

fn seconds(time: Duration) -> String {
    format!("{:8.3} s", time.as_secs_f64())
}
