//! Homeservers as processes on loopback: ours, and Synapse to compare with.

use std::fmt;
use std::io::Write as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use protocol::id::UserId;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

/// A server that doesn't answer by then doesn't start.
const START_MAX: Duration = Duration::from_secs(60);
const START_POLL: Duration = Duration::from_millis(50);
/// One that is still there so long after it was asked to end is killed.
const END_MAX: Duration = Duration::from_secs(60);

#[derive(Clone, Debug)]
pub enum Program {
    /// The binary.
    Vestibule(PathBuf),
    /// The Python that has it.
    Synapse(PathBuf),
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vestibule(_) => "vestibule",
            Self::Synapse(_) => "synapse",
        })
    }
}

/// Our binary lies beside this program's own.
pub fn vestibule() -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe()?;
    let programs = program.parent().context("the program lies nowhere")?;
    Ok(programs.join("vestibule"))
}

/// A directory of this name beside those of the builds.
pub fn directory(name: &str) -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe()?;
    let target = program.parent().and_then(Path::parent);
    Ok(target.context("no target directory")?.join(name))
}

/// What a server is to be like.
#[derive(Clone, Debug)]
pub struct Plan {
    pub program: Program,
    pub home: PathBuf,
    /// The port in its name, where something passes on what comes; or that of its federation listener.
    pub name_port: Option<u16>,
    /// Who knows the keys of servers that don't answer.
    pub notary: Option<String>,
    /// A file in its home when left out.
    pub database: Option<String>,
    /// Whether anybody may make an account.
    pub open: bool,
    pub log_level: &'static str,
}

impl Plan {
    pub fn new(program: Program, home: PathBuf) -> Self {
        Self {
            program,
            home,
            name_port: None,
            notary: None,
            database: None,
            open: false,
            log_level: "info",
        }
    }
}

#[derive(Clone, Debug)]
pub struct Server {
    pub program: Program,
    pub home: PathBuf,
    pub name: String,
    /// Of the client API.
    pub url: String,
    pub federation_port: u16,
    /// Ours tells what it does there.
    metrics_port: u16,
}

impl Server {
    /// Writes the settings.
    pub fn set_up(plan: &Plan) -> anyhow::Result<Self> {
        std::fs::create_dir_all(&plan.home)?;
        let (client, federation) = (free_port()?, free_port()?);
        let server = Self {
            program: plan.program.clone(),
            home: plan.home.clone(),
            name: format!("localhost:{}", plan.name_port.unwrap_or(federation)),
            url: format!("http://localhost:{client}"),
            federation_port: federation,
            metrics_port: free_port()?,
        };
        match &plan.program {
            Program::Vestibule(_) => server.configure_vestibule(plan, client)?,
            Program::Synapse(_) => server.configure_synapse(plan, client)?,
        }
        Ok(server)
    }

    fn configure_vestibule(&self, plan: &Plan, client: u16) -> anyhow::Result<()> {
        let database = plan.database.as_deref().unwrap_or("sqlite:vestibule.db");
        let settings = format!(
            "[server]\nname = \"{}\"\npublic_base_url = \"{}\"\n\
            signing_key_path = \"signing.key\"\n\
            [database]\nurl = \"{database}\"\n\
            [media]\npath = \"media\"\n\
            [client]\nlisten = [\"127.0.0.1:{client}\"]\n\
            [federation]\nlisten = [\"127.0.0.1:{}\"]\n\
            verify_tls = false\nallow_ip_ranges = [\"127.0.0.0/8\"]\n\
            trusted_key_servers = {}\n\
            [limits]\nenabled = false\nfull_state_wait_seconds = 3600\n\
            [registration]\nmode = \"{}\"\n\
            [metrics]\nlisten = [\"127.0.0.1:{}\"]\n\
            [log]\nlevel = \"{}\"\n",
            self.name,
            self.url,
            self.federation_port,
            json!(Vec::from_iter(&plan.notary)),
            if plan.open { "open" } else { "closed" },
            self.metrics_port,
            plan.log_level,
        );
        std::fs::write(self.home.join("vestibule.toml"), settings)?;
        Ok(())
    }

    /// Its defaults, but no rate limits, and everything within this machine.
    fn configure_synapse(&self, plan: &Plan, client: u16) -> anyhow::Result<()> {
        let certificate = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
        std::fs::write(self.home.join("tls.crt"), certificate.cert.pem())?;
        let key = certificate.signing_key.serialize_pem();
        std::fs::write(self.home.join("tls.key"), key)?;
        let home = self.home.display();
        let unlimited = json!({ "per_second": 9999, "burst_count": 9999 });
        let listener = |port: u16, tls: bool, names: &str| {
            json!({
                "port": port, "tls": tls, "bind_addresses": ["127.0.0.1"], "type": "http",
                "resources": [{ "names": [names] }],
            })
        };
        let notary = |name: &String| json!({ "server_name": name, "accept_keys_insecurely": true });
        let settings = json!({
            "server_name": self.name,
            "public_baseurl": self.url,
            "report_stats": false,
            "pid_file": format!("{home}/pid"),
            "log_config": format!("{home}/log.json"),
            "signing_key_path": format!("{home}/signing.key"),
            "macaroon_secret_key": "bench",
            "media_store_path": format!("{home}/media"),
            "enable_registration": plan.open,
            "enable_registration_without_verification": plan.open,
            "bcrypt_rounds": 4,
            "tls_certificate_path": format!("{home}/tls.crt"),
            "tls_private_key_path": format!("{home}/tls.key"),
            "listeners": [
                listener(client, false, "client"),
                listener(self.federation_port, true, "federation"),
            ],
            "database": { "name": "sqlite3", "args": { "database": format!("{home}/homeserver.db") } },
            "trusted_key_servers": Vec::from_iter(plan.notary.as_ref().map(notary)),
            "suppress_key_server_warning": true,
            "federation_verify_certificates": false,
            "federation_ip_range_blacklist": [],
            "rc_federation": { "reject_limit": 99999, "concurrent": 10, "sleep_limit": 99999 },
            "rc_message": unlimited,
            "rc_registration": unlimited,
            "rc_login": { "address": unlimited, "account": unlimited, "failed_attempts": unlimited },
            "rc_joins": { "local": unlimited, "remote": unlimited },
            "rc_joins_per_room": unlimited,
        });
        let log = json!({
            "version": 1,
            "handlers": { "console": { "class": "logging.StreamHandler" } },
            "root": { "level": plan.log_level.to_uppercase().replace("WARN", "WARNING"), "handlers": ["console"] },
            "disable_existing_loggers": false,
        });
        // JSON is YAML.
        std::fs::write(self.home.join("homeserver.yaml"), settings.to_string())?;
        std::fs::write(self.home.join("log.json"), log.to_string())?;
        let key = protocol::signature::SigningKey::generate(rand::random(), "bench")?;
        std::fs::write(self.home.join("signing.key"), key.to_line() + "\n")?;
        Ok(())
    }

    /// In its own directory and without settings from the environment.
    fn command(&self, arguments: &[&str]) -> Command {
        let (Program::Vestibule(program) | Program::Synapse(program)) = &self.program;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .current_dir(&self.home)
            .env_clear()
            .kill_on_drop(true);
        command
    }

    /// Of a Vestibule that doesn't run. With an administrator's rights, as the progress of joins is for those.
    pub async fn create_user(&self, name: &str, password: &str) -> anyhow::Result<UserId> {
        let (input, mut typed) = std::io::pipe()?;
        writeln!(typed, "{password}")?;
        drop(typed);
        let created = self
            .command(&["create-user", "--admin", name])
            .stdin(input)
            .stderr(Stdio::inherit())
            .output()
            .await
            .with_context(|| format!("cannot run {:?}", self.program))?;
        ensure!(created.status.success(), "no user was made");
        Ok(UserId::parse(String::from_utf8(created.stdout)?.trim())?)
    }

    pub async fn start(&self, http: &reqwest::Client) -> anyhow::Result<Running> {
        let path = self.home.join("log");
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(&path)?;
        let arguments: &[&str] = match self.program {
            Program::Vestibule(_) => &["serve"],
            Program::Synapse(_) => &[
                "-m",
                "synapse.app.homeserver",
                "--config-path",
                "homeserver.yaml",
            ],
        };
        let mut child = self
            .command(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot run {:?}", self.program))?;
        let start = Instant::now();
        let versions = format!("{}/_matrix/client/versions", self.url);
        while start.elapsed() < START_MAX {
            if let Some(status) = child.try_wait()? {
                bail!("{} ended: {status}; see {}", self.name, path.display());
            }
            if let Ok(answer) = http.get(&versions).send().await
                && answer.status().is_success()
                && TcpStream::connect(("127.0.0.1", self.federation_port))
                    .await
                    .is_ok()
            {
                return Ok(Running { child });
            }
            tokio::time::sleep(START_POLL).await;
        }
        bail!("{} does not start; see {}", self.name, path.display())
    }

    /// Requests that a running Vestibule has answered to other servers.
    pub async fn federation_requests(&self, http: &reqwest::Client) -> anyhow::Result<f64> {
        let url = format!("http://127.0.0.1:{}/metrics", self.metrics_port);
        let metrics = http.get(url).send().await?.error_for_status()?;
        let metrics = metrics.text().await?;
        let ours = |line: &&str| {
            line.starts_with("vestibule_http_requests_total{")
                && ["/_matrix/federation/", "/_matrix/key/"]
                    .iter()
                    .any(|path| line.contains(path))
        };
        let counts = metrics.lines().filter(ours);
        let counts = counts.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        Ok(counts.sum())
    }

    /// The program's own words for its version.
    pub async fn version(&self, http: &reqwest::Client) -> anyhow::Result<String> {
        let url = format!(
            "https://localhost:{}/_matrix/federation/v1/version",
            self.federation_port
        );
        let answer: Value = http.get(url).send().await?.json().await?;
        let text = |key: &str| answer["server"][key].as_str().unwrap_or("?").to_owned();
        Ok(format!("{} {}", text("name"), text("version")))
    }
}

/// A process that ends when this is dropped.
pub struct Running {
    child: Child,
}

impl Running {
    /// Its number; nothing if it has ended.
    pub fn pid(&self) -> anyhow::Result<u32> {
        self.child.id().context("the server has ended")
    }

    /// Gracefully.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        let asked = Command::new("kill").arg(self.pid()?.to_string()).status();
        ensure!(asked.await?.success(), "cannot end a server");
        if tokio::time::timeout(END_MAX, self.child.wait())
            .await
            .is_err()
        {
            self.child.kill().await?;
        }
        Ok(())
    }
}

/// Free a moment ago, that is.
pub fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
