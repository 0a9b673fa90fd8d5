//! Joining a big room on another server, through the client API.

use std::time::{Duration, Instant};

use anyhow::ensure;
use serde_json::{Value, json};

use crate::client::{Client, escaped, http, next_batch};
use crate::contest::ContestArguments;
use crate::resident::{Alone, Kept, Resident, ShapeArguments};
use crate::servers::{Program, directory};
use crate::table::{Figures, Row, Table, Unit};
use crate::usage;
use crate::wire::Faults;

/// How long a server is watched after it knows all members.
const AFTERWARDS: Duration = Duration::from_secs(30);
/// A join that takes longer has failed.
const JOIN_MAX: Duration = Duration::from_secs(1200);
/// Members of the rooms of a sweep. The last have about 200,000 events.
const SWEEP: [usize; 4] = [1000, 10_000, 50_000, 120_000];
/// The room from which is known what any join costs.
const SWEEP_LEAST: usize = 10;
/// Members for each server in a sweep, as the room of 50,000 on 2,000 has them: with as many servers whatever the room,
/// small ones would be about keys.
const SWEEP_MEMBERS_EACH: usize = 25;

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    shape: ShapeArguments,
    #[command(flatten)]
    contest: ContestArguments,
    #[command(flatten)]
    faults: Faults,
    /// Rooms of 1,000 to 120,000 members, and what an event costs in each.
    #[arg(long)]
    sweep: bool,
}

pub async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let _alone = Alone::get()?;
    if arguments.sweep {
        return sweep(&arguments).await;
    }
    let kept = Kept::get(&arguments.shape.shape()).await?;
    let (versions, servers) = measure_all(&arguments, &kept).await?;
    let title = format!("Joining {}", kept.describe());
    let table = Table::of(title, &servers);
    table.print();
    let conditions = conditions(&versions, arguments.contest.repeat);
    println!("\n{conditions}{}", arguments.faults.describe());
    table.save(&directory("bench")?, "join")
}

pub fn conditions(versions: &[String], repeat: usize) -> String {
    format!(
        "{}; load average {} at the end; {}; runs of each: {repeat}",
        usage::machine(),
        usage::load(),
        versions.join(", "),
    )
}

async fn sweep(arguments: &Arguments) -> anyhow::Result<()> {
    let least = sweep_one(arguments, SWEEP_LEAST).await?;
    let mut table = Table {
        title: "Cost of an event of the state and its auth chain".to_owned(),
        columns: least.columns.clone(),
        rows: Vec::new(),
    };
    let of_least = least.values[1].clone();
    for (what, values) in SWEEP_LEAST_ROWS.into_iter().zip(least.values) {
        let unit = Unit::Seconds;
        table.rows.push(Row { what, unit, values });
    }
    for (members, [time_row, cpu_row, beyond_row]) in SWEEP.into_iter().zip(SWEEP_ROWS) {
        let Swept { values, events, .. } = sweep_one(arguments, members).await?;
        let [time, cpu] = values;
        let each = |seconds: Option<f64>| seconds.map(|seconds| seconds * 1e6 / events as f64);
        let beyond = cpu.iter().zip(&of_least);
        let beyond = beyond.map(|(cpu, least)| each(Some((*cpu)? - (*least)?)));
        let beyond: Vec<Option<f64>> = beyond.collect();
        let time = time.into_iter().map(each).collect();
        let cpu = cpu.into_iter().map(each).collect();
        for (what, values) in [(time_row, time), (cpu_row, cpu), (beyond_row, beyond)] {
            let unit = Unit::Micros;
            table.rows.push(Row { what, unit, values });
        }
    }
    table.print();
    table.save(&directory("bench")?, "sweep")
}

/// One room of a sweep.
struct Swept {
    columns: Vec<String>,
    /// Seconds until all members are known and of CPU until then, for each column.
    values: [Vec<Option<f64>>; 2],
    events: usize,
}

async fn sweep_one(arguments: &Arguments, members: usize) -> anyhow::Result<Swept> {
    let mut shape = arguments.shape.clone();
    shape.members = members;
    shape.servers = members.div_ceil(SWEEP_MEMBERS_EACH);
    let kept = Kept::get(&shape.shape()).await?;
    let (_, servers) = measure_all(arguments, &kept).await?;
    let table = Table::of(String::new(), &servers);
    let values = [FULL, CPU].map(|what| {
        let row = table.rows.iter().find(|row| row.what == what);
        row.map_or_else(|| vec![None; servers.len()], |row| row.values.clone())
    });
    Ok(Swept {
        columns: servers.into_iter().map(|(name, _)| name).collect(),
        values,
        events: kept.events(),
    })
}

const FULL: &str = "all members known";
const CPU: &str = "CPU until then";
const SWEEP_LEAST_ROWS: [&str; 2] = ["10 members, in all: time", "10 members, in all: CPU"];
/// Time, CPU, and CPU beyond what the smallest room takes.
const SWEEP_ROWS: [[&str; 3]; 4] = [
    [
        "1,000 members: time",
        "1,000 members: CPU",
        "1,000 members: CPU beyond the least",
    ],
    [
        "10,000 members: time",
        "10,000 members: CPU",
        "10,000 members: CPU beyond the least",
    ],
    [
        "50,000 members: time",
        "50,000 members: CPU",
        "50,000 members: CPU beyond the least",
    ],
    [
        "120,000 members: time",
        "120,000 members: CPU",
        "120,000 members: CPU beyond the least",
    ],
];

/// The versions, and the figures by server.
async fn measure_all(
    arguments: &Arguments,
    kept: &Kept,
) -> anyhow::Result<(Vec<String>, Vec<(String, Vec<Figures>)>)> {
    println!("{}", kept.describe());
    let (mut versions, mut servers) = (Vec::new(), Vec::new());
    for program in arguments.contest.programs()? {
        let label = arguments.contest.label(&program);
        let mut runs = Vec::new();
        for _ in 0..arguments.contest.repeat {
            println!("joining with {label}");
            let (version, figures) = measure(arguments, &program, kept).await?;
            if runs.is_empty() {
                versions.push(version);
            }
            runs.push(figures);
        }
        let alone = [(label, runs)];
        Table::of(String::new(), &alone).print();
        servers.extend(alone);
    }
    Ok((versions, servers))
}

async fn measure(
    arguments: &Arguments,
    program: &Program,
    kept: &Kept,
) -> anyhow::Result<(String, Figures)> {
    let (contest, faults) = (&arguments.contest, arguments.faults);
    let http = http()?;
    let runs = directory("bench")?.join("join");
    let resident = kept.run(&runs.join("resident"), &http, faults).await?;
    let home = runs.join(program.to_string());
    let joiner = contest
        .set_up(program, &home, &resident.server.name)
        .await?;
    let running = joiner.start(&http).await?;
    let password = format!("{:016x}", rand::random::<u64>());
    let guest = Client::register(&http, &joiner, "guest", &password).await?;
    let version = joiner.version(&http).await?;

    let pid = running.pid()?;
    let cpu_before = usage::cpu_seconds(pid)?;
    let requests_before = resident.server.federation_requests(&http).await?;
    let (up_before, down_before) = resident.wire.bytes();
    let mut figures = tokio::time::timeout(JOIN_MAX, join(&guest, &resident, kept)).await??;
    let cpu_full = usage::cpu_seconds(pid)?;
    tokio::time::sleep(AFTERWARDS).await;
    let cpu_after = usage::cpu_seconds(pid)?;
    let (up, down) = resident.wire.bytes();
    let requests = resident.server.federation_requests(&http).await?;
    figures.extend([
        (CPU, Unit::Seconds, cpu_full - cpu_before),
        ("CPU in the 30 s after", Unit::Seconds, cpu_after - cpu_full),
        ("peak memory", Unit::Bytes, usage::peak_memory(pid)?),
        (
            "received from the resident",
            Unit::Bytes,
            (down - down_before) as f64,
        ),
        ("sent to the resident", Unit::Bytes, (up - up_before) as f64),
        (
            "requests to the resident",
            Unit::Count,
            requests - requests_before,
        ),
    ]);
    running.stop().await?;
    Ok((version, figures))
}

/// What the user sees, each since the join was asked for.
async fn join(guest: &Client, resident: &Resident, kept: &Kept) -> anyhow::Result<Figures> {
    let since = next_batch(&guest.sync(None).await?)?;
    let since_host = next_batch(&resident.host.sync(None).await?)?;
    let room = escaped(&kept.room);
    let start = Instant::now();
    let elapsed = || start.elapsed().as_secs_f64();

    let synced = async {
        let seen = |news: &Value| !news["rooms"]["join"][&kept.room].is_null();
        guest.sync_until(since, seen).await?;
        anyhow::Ok(elapsed())
    };
    let heard = async {
        let seen = |news: &Value| has_message(&news["rooms"]["join"][&kept.room]);
        resident.host.sync_until(since_host, seen).await?;
        anyhow::Ok(elapsed())
    };
    let joined = async {
        let via = escaped(&resident.server.name);
        let path = format!("join/{room}?server_name={via}&via={via}");
        guest.post(&path, json!({})).await?;
        let joined = elapsed();
        let path = format!("rooms/{room}/send/m.room.message/1");
        let message = json!({ "msgtype": "m.text", "body": "Hello" });
        let said = async {
            guest.put(&path, message).await?;
            anyhow::Ok(elapsed())
        };
        let members = async {
            let members = guest.get_raw(&format!("rooms/{room}/members")).await?;
            anyhow::Ok((elapsed(), members))
        };
        let (said, (full, members)) = tokio::try_join!(said, members)?;
        anyhow::Ok((joined, said, full, members))
    };
    let (synced, heard, (joined, said, full, members)) = tokio::try_join!(synced, heard, joined)?;
    let found = count_joined(&serde_json::from_slice(&members)?);
    let expected = kept.members + 1;
    ensure!(found == expected, "{found} members instead of {expected}");
    Ok(vec![
        ("join answered", Unit::Seconds, joined),
        ("room in the first lazy sync", Unit::Seconds, synced),
        ("message accepted", Unit::Seconds, said),
        ("message received by the resident", Unit::Seconds, heard),
        (FULL, Unit::Seconds, full),
    ])
}

fn has_message(room: &Value) -> bool {
    let events = room["timeline"]["events"].as_array();
    events.is_some_and(|events| events.iter().any(|event| event["type"] == "m.room.message"))
}

fn count_joined(members: &Value) -> usize {
    let events = members["chunk"].as_array().map_or(&[][..], Vec::as_slice);
    let joined = |event: &&Value| event["content"]["membership"] == "join";
    events.iter().filter(joined).count()
}
