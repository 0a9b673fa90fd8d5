//! Logs: one line per thing that happened, as text or JSON. Never a token, never a message's body.

use tracing_subscriber::EnvFilter;

use crate::config::{Log, LogFormat};

pub fn start(log: &Log) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&log.level)?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match log.format {
        LogFormat::Text => subscriber.init(),
        LogFormat::Json => subscriber.json().init(),
    }
    Ok(())
}
