//! A server that has a big room answers others: the resident's side of joins.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use federation::request_auth;
use protocol::build::sign;
use protocol::id::ServerName;
use protocol::room_version::RoomVersion;
use serde_json::{Value, json};

use crate::client::{Client, escaped, http};
use crate::contest::ContestArguments;
use crate::generated::{Signer, fake_server};
use crate::join::conditions;
use crate::resident::{Alone, Kept, ShapeArguments};
use crate::servers::{Program, Running, Server, directory};
use crate::table::{Figures, Table, Unit};
use crate::usage;
use crate::wire::Faults;

/// How often each question is asked after the first time: once, and again while that is quick.
const WARM_MAX: usize = 5;
const QUICK: Duration = Duration::from_secs(5);

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    shape: ShapeArguments,
    #[command(flatten)]
    contest: ContestArguments,
}

/// What is asked, and what its rows are called: time cold and warm, bytes, rise of the memory.
struct Question {
    kind: Kind,
    rows: [&'static str; 4],
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    MakeJoin,
    PartialSendJoin,
    FullSendJoin,
    StateIds,
    State,
}

const QUESTIONS: [Question; 5] = [
    Question {
        kind: Kind::MakeJoin,
        rows: [
            "make_join, cold",
            "make_join, warm",
            "make_join, bytes",
            "make_join, memory rise",
        ],
    },
    Question {
        kind: Kind::PartialSendJoin,
        rows: [
            "partial send_join, cold",
            "partial send_join, warm",
            "partial send_join, bytes",
            "partial send_join, memory rise",
        ],
    },
    Question {
        kind: Kind::FullSendJoin,
        rows: [
            "full send_join, cold",
            "full send_join, warm",
            "full send_join, bytes",
            "full send_join, memory rise",
        ],
    },
    Question {
        kind: Kind::StateIds,
        rows: [
            "state_ids, cold",
            "state_ids, warm",
            "state_ids, bytes",
            "state_ids, memory rise",
        ],
    },
    Question {
        kind: Kind::State,
        rows: [
            "state, cold",
            "state, warm",
            "state, bytes",
            "state, memory rise",
        ],
    },
];

pub async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let _alone = Alone::get()?;
    let kept = Kept::get(&arguments.shape.shape()).await?;
    println!("{}", kept.describe());
    let (mut versions, mut servers) = (Vec::new(), Vec::new());
    for program in arguments.contest.programs()? {
        let label = arguments.contest.label(&program);
        let mut runs = Vec::new();
        for _ in 0..arguments.contest.repeat {
            let (version, figures) = measure(&arguments.contest, &program, &kept).await?;
            if runs.is_empty() {
                versions.push(version);
            }
            runs.push(figures);
        }
        let alone = [(label, runs)];
        Table::of(String::new(), &alone).print();
        servers.extend(alone);
    }
    let table = Table::of(format!("Serving {}", kept.describe()), &servers);
    table.print();
    println!("\n{}", conditions(&versions, arguments.contest.repeat));
    table.save(&directory("bench")?, "serve")
}

/// The server gets the room by joining it, whichever it is.
async fn measure(
    contest: &ContestArguments,
    program: &Program,
    kept: &Kept,
) -> anyhow::Result<(String, Figures)> {
    let http = http()?;
    let runs = directory("bench")?.join("serve");
    let home = runs.join(program.to_string());
    let first = kept
        .run(&runs.join("first"), &http, Faults::default())
        .await?;
    let server = contest.set_up(program, &home, &first.server.name).await?;
    let mut running = server.start(&http).await?;
    println!("{} joins, and is asked then", contest.label(program));
    let password = format!("{:016x}", rand::random::<u64>());
    let guest = Client::register(&http, &server, "guest", &password).await?;
    let room = escaped(&kept.room);
    let via = escaped(&first.server.name);
    let path = format!("join/{room}?server_name={via}&via={via}");
    guest.post(&path, json!({})).await?;
    guest.get_raw(&format!("rooms/{room}/members")).await?;
    let version = server.version(&http).await?;

    let mut asker = Asker {
        http,
        server,
        signer: fake_server(0)?,
        room: kept.room.clone(),
        users: 0,
        joined: String::new(),
    };
    let mut figures = Vec::new();
    for question in &QUESTIONS {
        // Nothing in memory, as far as the server can help it.
        running.stop().await?;
        running = asker.server.start(&asker.http).await?;
        figures.extend(asker.put(question, &running).await?);
    }
    running.stop().await?;
    Ok((version, figures))
}

/// A server whose users come to the room.
struct Asker {
    http: reqwest::Client,
    server: Server,
    signer: Signer,
    room: String,
    /// So far.
    users: usize,
    /// The event of the last of them.
    joined: String,
}

struct Answered {
    seconds: f64,
    bytes: usize,
    body: Vec<u8>,
}

impl Asker {
    async fn put(&mut self, question: &Question, running: &Running) -> anyhow::Result<Figures> {
        let pid = running.pid()?;
        // Reading our keys, connecting and the like is none of the question.
        self.ask(
            "GET",
            "/_matrix/federation/v1/query/profile?user_id=%40nobody%3Alocalhost",
            None,
        )
        .await
        .ok();
        let memory = usage::memory(pid)?;
        let (cold, bytes) = self.once(question.kind).await?;
        let mut warm = Vec::new();
        let start = Instant::now();
        while warm.is_empty() || (warm.len() < WARM_MAX && start.elapsed() < QUICK) {
            warm.push(self.once(question.kind).await?.0);
        }
        warm.sort_by(f64::total_cmp);
        let rise = (usage::peak_memory(pid)? - memory).max(0.0);
        let [cold_row, warm_row, bytes_row, rise_row] = question.rows;
        Ok(vec![
            (cold_row, Unit::Seconds, cold),
            (warm_row, Unit::Seconds, warm[warm.len() / 2]),
            (bytes_row, Unit::Bytes, bytes as f64),
            (rise_row, Unit::Bytes, rise),
        ])
    }

    /// Seconds and bytes.
    async fn once(&mut self, kind: Kind) -> anyhow::Result<(f64, usize)> {
        let answered = match kind {
            Kind::MakeJoin => self.make_join().await?.0,
            Kind::PartialSendJoin => self.send_join(true).await?,
            Kind::FullSendJoin => self.send_join(false).await?,
            Kind::StateIds => self.state("state_ids").await?,
            Kind::State => self.state("state").await?,
        };
        Ok((answered.seconds, answered.bytes))
    }

    async fn make_join(&mut self) -> anyhow::Result<(Answered, Value)> {
        self.users += 1;
        let user = format!("@newcomer{}:{}", self.users, self.signer.name);
        let path = format!(
            "/_matrix/federation/v1/make_join/{}/{}?ver=10",
            escaped(&self.room),
            escaped(&user)
        );
        let answered = self.ask("GET", &path, None).await?;
        let template = serde_json::from_slice(&answered.body)?;
        Ok((answered, template))
    }

    async fn send_join(&mut self, partial: bool) -> anyhow::Result<Answered> {
        let (_, mut template) = self.make_join().await?;
        let mut event = std::mem::take(template["event"].as_object_mut().context("no event")?);
        event.insert("origin_server_ts".to_owned(), usage::now_ms()?.into());
        let pdu = sign(event, &self.signer.key, &self.signer.name, RoomVersion::V10)?;
        self.joined = pdu.event_id.as_str().to_owned();
        let path = format!(
            "/_matrix/federation/v2/send_join/{}/{}?omit_members={partial}",
            escaped(&self.room),
            escaped(&self.joined)
        );
        self.ask("PUT", &path, Some(serde_json::from_str(&pdu.json)?))
            .await
    }

    /// Before the last join.
    async fn state(&self, what: &str) -> anyhow::Result<Answered> {
        let path = format!(
            "/_matrix/federation/v1/{what}/{}?event_id={}",
            escaped(&self.room),
            escaped(&self.joined)
        );
        self.ask("GET", &path, None).await
    }

    async fn ask(
        &self,
        method: &str,
        path: &str,
        content: Option<Value>,
    ) -> anyhow::Result<Answered> {
        let to = ServerName::parse(&self.server.name)?;
        let Signer { name, key } = &self.signer;
        let signature = request_auth::sign(key, method, path, name, &to, content.clone());
        let signature = signature.context("content without a canonical form")?;
        let url = format!("https://localhost:{}{path}", self.server.federation_port);
        let mut request = self
            .http
            .request(method.parse()?, url)
            .header("authorization", signature.to_header());
        if let Some(content) = content {
            request = request.json(&content);
        }
        let start = Instant::now();
        let answer = request.send().await?;
        let status = answer.status();
        let body = answer.bytes().await?.to_vec();
        let seconds = start.elapsed().as_secs_f64();
        let beginning = || String::from_utf8_lossy(&body[..body.len().min(300)]).into_owned();
        ensure!(status.is_success(), "{path}: {status}: {}", beginning());
        Ok(Answered {
            seconds,
            bytes: body.len(),
            body,
        })
    }
}
