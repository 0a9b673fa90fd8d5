//! The binary: reads settings, opens the store, opens the doors. Wiring only.

mod config;
mod listen;
mod metrics;
mod telemetry;

use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};
use federation::{HyperTransport, IpRanges, TransportOptions};
use homeserver::appservice::Appservices;
use homeserver::clock::SystemClock;
use homeserver::config::{Config, JoinSettings, Limits, Registration, ServerNotices};
use homeserver::{Homeserver, Wire};
use protocol::id::{ServerName, UserId};
use protocol::room_version::RoomVersion;
use protocol::signature::SigningKey;
use storage::Store;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::{RegistrationMode, Settings, Verification};

/// See docs/decisions/0010-allocator.md; how many arenas it has is set in `.cargo/config.toml`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Requests under way at a stop get this long to end.
const STOP_MAX: Duration = Duration::from_secs(10);

/// Work on a thread of its own that nobody waits for gets this long.
const BLOCKING_MAX: Duration = Duration::from_secs(1);

#[derive(Parser)]
#[command(
    name = "vestibule",
    version,
    about = "A Matrix homeserver that lets people into a room at once"
)]
struct Cli {
    /// Settings; later files are laid over earlier ones. Default: ./vestibule.toml, if it is there.
    #[arg(long, short, global = true, value_name = "FILE")]
    config: Vec<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the server.
    Serve,
    /// Print an annotated settings file with every default.
    GenerateConfig {
        /// The server's name, such as example.org.
        #[arg(long)]
        server_name: Option<String>,
    },
    /// Read the settings and say whether they are good.
    CheckConfig,
    /// Make a local account. The password is asked for unless it is given.
    CreateUser {
        /// The part of the user id before the colon.
        name: String,
        /// Better typed in: command lines can be seen by others.
        #[arg(long)]
        password: Option<String>,
        /// May use the admin API.
        #[arg(long)]
        admin: bool,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vestibule: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    if let Command::GenerateConfig { server_name } = &cli.command {
        print!("{}", config::annotated(server_name.as_deref()));
        return Ok(());
    }
    let files = if cli.config.is_empty() {
        config::default_files()
    } else {
        cli.config.clone()
    };
    let settings = config::load(&files, config::environment().into_iter())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    match cli.command {
        Command::CheckConfig => {
            prepare(&settings)?;
            println!("The settings are good.");
            Ok(())
        }
        Command::CreateUser {
            name,
            password,
            admin,
        } => {
            let password = password.map_or_else(ask_password, Ok)?;
            runtime.block_on(create_user(&settings, &name, &password, admin))
        }
        Command::Serve => {
            telemetry::start(&settings.log)?;
            let served = runtime.block_on(serve(&settings));
            // Whoever asked for a hash or a thumbnail that is still being made has gone.
            runtime.shutdown_timeout(BLOCKING_MAX);
            served
        }
        Command::GenerateConfig { .. } => Ok(()),
    }
}

// -- serving --------------------------------------------------------------------------------------

async fn serve(settings: &Settings) -> anyhow::Result<()> {
    let homeserver = open(settings).await?;
    homeserver
        .start()
        .await
        .context("cannot take up what was under way")?;
    let router = vestibule_http::router(homeserver.clone());
    let client_router = match settings.client.federation {
        true => router.clone(),
        false => vestibule_http::client_router(homeserver.clone()),
    };
    let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
    for address in &settings.client.listen {
        listen::serve(
            *address,
            None,
            client_router.clone(),
            tracker.clone(),
            stop.clone(),
        )
        .await?;
    }
    if !settings.federation.listen.is_empty() {
        let tls = tls(settings, &homeserver.config().server_name)?;
        for address in &settings.federation.listen {
            listen::serve(
                *address,
                Some(tls.clone()),
                router.clone(),
                tracker.clone(),
                stop.clone(),
            )
            .await?;
        }
    }
    if !settings.metrics.listen.is_empty() {
        let router = metrics::router(homeserver.clone())?;
        for address in &settings.metrics.listen {
            let (tracker, stop) = (tracker.clone(), stop.clone());
            listen::serve(*address, None, router.clone(), tracker, stop).await?;
        }
    }
    tracing::info!(server = %homeserver.config().server_name, version = env!("CARGO_PKG_VERSION"), "ready");
    stop_asked().await?;
    tracing::info!("stopping");
    stop.cancel();
    tracker.close();
    if tokio::time::timeout(STOP_MAX, tracker.wait())
        .await
        .is_err()
    {
        tracing::info!("some requests did not end in time");
    }
    if tokio::time::timeout(STOP_MAX, homeserver.stop())
        .await
        .is_err()
    {
        let under_way = homeserver.under_way();
        tracing::warn!(
            ?under_way,
            "background work did not end in time; it goes on at the next start"
        );
    }
    Ok(())
}

async fn stop_asked() -> anyhow::Result<()> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        _ = terminate.recv() => Ok(()),
        interrupted = tokio::signal::ctrl_c() => Ok(interrupted?),
    }
}

fn tls(settings: &Settings, name: &ServerName) -> anyhow::Result<tokio_rustls::TlsAcceptor> {
    match (
        &settings.federation.tls_certificate,
        &settings.federation.tls_private_key,
    ) {
        (Some(certificate), Some(key)) => listen::tls_from_files(certificate, key),
        _ => {
            tracing::warn!("no certificate is set: other servers will not trust this one's own");
            listen::tls_self_signed(name.host())
        }
    }
}

/// Everything but the doors.
async fn open(settings: &Settings) -> anyhow::Result<Homeserver> {
    let (config, transport, appservices) = prepare(settings)?;
    let key = signing_key(&settings.server.signing_key_path)?;
    let url = &settings.database.url;
    if let Some(directory) = url
        .strip_prefix("sqlite:")
        .map(Path::new)
        .and_then(Path::parent)
        && directory != Path::new("")
    {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
    }
    let options = storage::Options {
        server_name: config.server_name.clone(),
        ..storage::Options::default()
    };
    let store = Store::open(url, options)
        .await
        .context("cannot open the database")?;
    let wire = Wire {
        transport: Arc::new(transport),
        key,
        old_keys: Vec::new(),
    };
    Ok(Homeserver::new(
        config,
        Arc::new(SystemClock::default()),
        store,
        appservices,
        wire,
    ))
}

/// What can be checked without touching the disk's data.
fn prepare(settings: &Settings) -> anyhow::Result<(Config, HyperTransport, Appservices)> {
    let mut config = config_of(settings)?;
    let ip_ranges = IpRanges::public_and(&settings.federation.allow_ip_ranges)
        .context("federation.allow_ip_ranges")?;
    config.outbound_ip_ranges = ip_ranges.clone();
    let transport = HyperTransport::new(&TransportOptions {
        verify_tls: settings.federation.verify_tls,
        extra_ca_files: settings.federation.extra_ca.iter().cloned().collect(),
        ip_ranges,
    })
    .context("cannot set up connections to other servers")?;
    let appservices = Appservices::load(&config.appservice_files, &config.server_name)
        .context("appservices.files")?;
    Ok((config, transport, appservices))
}

fn config_of(settings: &Settings) -> anyhow::Result<Config> {
    let name = settings.server.name.as_deref().unwrap_or_default();
    let mut config = Config::new(ServerName::parse(name)?);
    config
        .public_base_url
        .clone_from(&settings.server.public_base_url);
    config
        .federation_address
        .clone_from(&settings.server.federation_address);
    config.default_room_version = RoomVersion::parse(&settings.server.default_room_version)
        .context("server.default_room_version is not a known version")?;
    config.registration = match settings.registration.mode {
        RegistrationMode::Closed => Registration::Closed,
        RegistrationMode::Open => Registration::Open,
        RegistrationMode::Token => Registration::Token,
    };
    config
        .registration_token
        .clone_from(&settings.registration.token);
    config
        .registration_shared_secret
        .clone_from(&settings.registration.shared_secret);
    config.limits = Limits {
        enabled: settings.limits.enabled,
    };
    config.full_state_wait_max = Duration::from_secs(settings.limits.full_state_wait_seconds);
    config.join = JoinSettings {
        race_send_join: settings.join.race_send_join,
        members_first: settings.join.members_first,
        ask_for_left_out: settings.join.ask_for_left_out,
        compare_donors: settings.join.compare_donors,
        tell_missed_servers: settings.join.tell_missed_servers,
        verification: match settings.join.verification {
            Verification::Batch => protocol::signature::Verification::Batch,
            Verification::Single => protocol::signature::Verification::Single,
        },
    };
    config.media_path.clone_from(&settings.media.path);
    config.media_upload_bytes_max = settings.media.max_upload_bytes;
    config
        .appservice_files
        .clone_from(&settings.appservices.files);
    config.trusted_key_servers = settings
        .federation
        .trusted_key_servers
        .iter()
        .map(|name| {
            ServerName::parse(name)
                .with_context(|| format!("federation.trusted_key_servers: {name}"))
        })
        .collect::<anyhow::Result<_>>()?;
    config.presence = settings.server.presence;
    config.server_notices = server_notices_of(settings, &config.server_name)?;
    Ok(config)
}

fn server_notices_of(
    settings: &Settings,
    server: &ServerName,
) -> anyhow::Result<Option<ServerNotices>> {
    let notices = &settings.server_notices;
    let Some(localpart) = &notices.localpart else {
        return Ok(None);
    };
    let user = UserId::parse(&format!("@{localpart}:{server}"))
        .with_context(|| format!("server_notices.localpart {localpart:?} makes no user id"))?;
    Ok(Some(ServerNotices {
        user,
        display_name: notices.display_name.clone(),
        avatar_url: notices.avatar_url.clone(),
        room_name: notices.room_name.clone(),
        room_topic: notices.room_topic.clone(),
    }))
}

/// Reads the signing key, or makes one at the first start: readable by its owner only, and on disk before
/// anything is signed with it.
fn signing_key(path: &Path) -> anyhow::Result<SigningKey> {
    match std::fs::read_to_string(path) {
        Ok(line) => SigningKey::parse(line.trim())
            .ok()
            .with_context(|| format!("{} is not a signing key", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => make_signing_key(path),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

fn make_signing_key(path: &Path) -> anyhow::Result<SigningKey> {
    use std::os::unix::fs::OpenOptionsExt as _;
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
    }
    let version: u16 = rand::random();
    let key = SigningKey::generate(rand::random(), &format!("a_{version:04x}"))
        .ok()
        .context("cannot make a signing key")?;
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    writeln!(file, "{}", key.to_line())?;
    file.sync_all()?;
    Ok(key)
}

// -- accounts -------------------------------------------------------------------------------------

async fn create_user(
    settings: &Settings,
    name: &str,
    password: &str,
    admin: bool,
) -> anyhow::Result<()> {
    if password.is_empty() {
        bail!("an empty password will not do");
    }
    let homeserver = open(settings).await?;
    let user = homeserver
        .create_user(name, password, admin)
        .await
        .map_err(|error| anyhow::anyhow!("{}", error.message))?;
    println!("{user}");
    Ok(())
}

fn ask_password() -> anyhow::Result<String> {
    if std::io::stdin().is_terminal() {
        eprint!("Password: ");
        std::io::stderr().flush()?;
    }
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}
