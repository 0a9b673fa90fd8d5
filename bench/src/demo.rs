//! The demo: two servers on loopback, one of which joins a big room on the other, step by step.

mod generated;

use std::io::Write as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail, ensure};
use clap::builder::FalseyValueParser;
use indicatif::{ProgressBar, ProgressStyle};
use protocol::id::UserId;
use serde_json::{Value, json};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

/// A server that doesn't answer by then doesn't start.
const START_MAX: Duration = Duration::from_secs(60);
const START_POLL: Duration = Duration::from_millis(50);
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
    // The servers end with this process's answer, whichever way it goes.
    tokio::select! {
        outcome = show(&arguments) => outcome,
        stopped = stop_asked() => stopped,
    }
}

async fn stop_asked() -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        _ = terminate.recv() => Ok(()),
        interrupted = tokio::signal::ctrl_c() => Ok(interrupted?),
    }
}

async fn show(arguments: &Arguments) -> anyhow::Result<()> {
    let program = std::env::current_exe()?;
    let programs = program.parent().context("the program lies nowhere")?;
    let home = programs
        .parent()
        .context("no target directory")?
        .join("demo");
    if home.exists() {
        std::fs::remove_dir_all(&home).with_context(|| format!("in {}", home.display()))?;
    }
    let vestibule = programs.join("vestibule");
    let http = reqwest::Client::builder().no_proxy().build()?;
    let password = format!("{:016x}", rand::random::<u64>());

    let resident = Server::set_up(&vestibule, &home.join("resident"), None)?;
    let joiner = Server::set_up(&vestibule, &home.join("joiner"), Some(&resident.name))?;
    let host = resident.create_user("host", &password).await?;
    let guest = joiner.create_user("guest", &password).await?;

    let start = Instant::now();
    let now_ms = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
    let room = generated::make(
        &resident.home.join("vestibule.db"),
        &resident.home.join("signing.key"),
        &host,
        arguments.members,
        i64::try_from(now_ms)?,
    )
    .await?;
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
    let path = format!("/_matrix/client/v3/directory/room/{}", in_path(&alias));
    at_home.put(&path, json!({ "room_id": room })).await?;
    let client = Client::log_in(&http, &joiner, &guest, &password).await?;
    client
        .join(&alias, room.as_str(), arguments.members)
        .await?;

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

// -- servers --------------------------------------------------------------------------------------

struct Server {
    program: PathBuf,
    home: PathBuf,
    name: String,
    url: String,
}

impl Server {
    /// Writes the settings. A server that shall know keys of others from somewhere gets a notary.
    fn set_up(program: &Path, home: &Path, notary: Option<&str>) -> anyhow::Result<Self> {
        std::fs::create_dir_all(home)?;
        let (client, federation) = (free_port()?, free_port()?);
        let name = format!("localhost:{federation}");
        let url = format!("http://localhost:{client}");
        let settings = format!(
            "[server]\nname = \"{name}\"\npublic_base_url = \"{url}\"\n\
            signing_key_path = \"signing.key\"\n\
            [database]\nurl = \"sqlite:vestibule.db\"\n\
            [media]\npath = \"media\"\n\
            [client]\nlisten = [\"127.0.0.1:{client}\"]\n\
            [federation]\nlisten = [\"127.0.0.1:{federation}\"]\n\
            verify_tls = false\nallow_ip_ranges = [\"127.0.0.0/8\"]\n\
            trusted_key_servers = {}\n",
            json!(Vec::from_iter(notary))
        );
        std::fs::write(home.join("vestibule.toml"), settings)?;
        Ok(Self {
            program: program.to_owned(),
            home: home.to_owned(),
            name,
            url,
        })
    }

    /// In its own directory and without settings from the environment.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(arguments)
            .current_dir(&self.home)
            .env_clear()
            .kill_on_drop(true);
        command
    }

    /// With an administrator's rights, as the progress of joins is for those.
    async fn create_user(&self, name: &str, password: &str) -> anyhow::Result<UserId> {
        let (input, mut typed) = std::io::pipe()?;
        writeln!(typed, "{password}")?;
        drop(typed);
        let created = self
            .command(&["create-user", "--admin", name])
            .stdin(input)
            .stderr(Stdio::inherit())
            .output()
            .await
            .with_context(|| format!("cannot run {}", self.program.display()))?;
        ensure!(created.status.success(), "no user was made");
        Ok(UserId::parse(String::from_utf8(created.stdout)?.trim())?)
    }

    async fn start(&self, http: &reqwest::Client) -> anyhow::Result<Child> {
        let log = std::fs::File::create(self.home.join("log"))?;
        let mut child = self
            .command(&["serve"])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let start = Instant::now();
        let health = format!("{}/health", self.url);
        while start.elapsed() < START_MAX {
            if let Some(status) = child.try_wait()? {
                bail!(
                    "{} ended: {status}; see {}/log",
                    self.name,
                    self.home.display()
                );
            }
            if let Ok(answer) = http.get(&health).send().await
                && answer.status().is_success()
            {
                return Ok(child);
            }
            tokio::time::sleep(START_POLL).await;
        }
        bail!(
            "{} does not start; see {}/log",
            self.name,
            self.home.display()
        )
    }
}

/// Free a moment ago, that is.
fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

// -- a client -------------------------------------------------------------------------------------

#[derive(Clone)]
struct Client {
    http: reqwest::Client,
    url: String,
    token: String,
}

impl Client {
    async fn log_in(
        http: &reqwest::Client,
        server: &Server,
        user: &UserId,
        password: &str,
    ) -> anyhow::Result<Self> {
        let mut client = Self {
            http: http.clone(),
            url: server.url.clone(),
            token: String::new(),
        };
        let request = http.post(format!("{}/_matrix/client/v3/login", server.url));
        let login = json!({
            "type": "m.login.password",
            "identifier": { "type": "m.id.user", "user": user },
            "password": password,
        });
        let answer = answer(request.json(&login)).await?;
        client.token = answer["access_token"]
            .as_str()
            .context("a login without a token")?
            .to_owned();
        Ok(client)
    }

    async fn put(&self, path: &str, body: Value) -> anyhow::Result<Value> {
        let request = self.http.put(format!("{}{path}", self.url));
        answer(request.bearer_auth(&self.token).json(&body)).await
    }

    async fn get(&self, path: &str) -> anyhow::Result<Value> {
        let request = self.http.get(format!("{}{path}", self.url));
        answer(request.bearer_auth(&self.token)).await
    }

    /// Joins, and tells how it goes until the room is full.
    async fn join(&self, alias: &str, room: &str, members: usize) -> anyhow::Result<()> {
        let stream = format!("{}/_vestibule/admin/v1/joins/stream", self.url);
        let request = self.http.get(stream).bearer_auth(&self.token);
        let mut changes = request.send().await?.error_for_status()?;

        println!("\njoining {alias}");
        let bar = ProgressBar::new(members as u64).with_style(ProgressStyle::with_template(
            "  {bar:50} {pos} of {len} events of the state",
        )?);
        let start = Instant::now();
        let say = |what: &str| bar.suspend(|| println!("{} {what}", seconds(start.elapsed())));
        let path = format!("{}/_matrix/client/v3/join/{}", self.url, in_path(alias));
        let join = self.http.post(path).bearer_auth(&self.token);
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
        let path = format!("/_matrix/client/v3/rooms/{}/joined_members", in_path(room));
        let found = self.get(&path).await?;
        let found = found["joined"].as_object().map_or(0, |joined| joined.len());
        println!("{} {found} members are known", seconds(start.elapsed()));
        ensure!(found == members + 1, "there should be {}", members + 1);
        Ok(())
    }
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

async fn answer(request: reqwest::RequestBuilder) -> anyhow::Result<Value> {
    let answer = request.send().await?;
    let (status, url) = (answer.status(), answer.url().path().to_owned());
    let body = answer.text().await?;
    ensure!(status.is_success(), "{url}: {status}: {body}");
    Ok(serde_json::from_str(&body)?)
}

/// The characters that ids of the demo have and a path has not.
fn in_path(id: &str) -> String {
    id.replace('#', "%23")
        .replace('!', "%21")
        .replace(':', "%3A")
}

fn seconds(time: Duration) -> String {
    format!("{:8.3} s", time.as_secs_f64())
}
