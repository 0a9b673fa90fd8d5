//! The benchmarks, each of which prints what it measured and on what, and the demo.

mod client;
mod contest;
mod demo;
mod generated;
mod join;
mod plot;
mod resident;
mod resolve;
mod serve;
mod servers;
mod state;
mod table;
mod usage;
mod wire;

use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// Joining a big room on another server.
    Join(join::Arguments),
    /// A server that has a big room answers others.
    Serve(serve::Arguments),
    /// Room state in the store: bytes for a change, time to read it back.
    State(state::Arguments),
    /// Two servers on loopback, one of which joins a big room on the other.
    Demo(demo::Arguments),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // Servers end with this process's answer, whichever way it goes.
    tokio::select! {
        outcome = run(Arguments::parse().bench) => outcome,
        stopped = stop_asked() => stopped,
    }
}

async fn run(bench: Bench) -> anyhow::Result<()> {
    match bench {
        Bench::Join(arguments) => join::run(arguments).await,
        Bench::Serve(arguments) => serve::run(arguments).await,
        Bench::State(arguments) => state::run(arguments).await,
        Bench::Demo(arguments) => demo::run(arguments).await,
    }
}

async fn stop_asked() -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        _ = terminate.recv() => Ok(()),
        interrupted = tokio::signal::ctrl_c() => Ok(interrupted?),
    }
}
