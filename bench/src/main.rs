//! The benchmarks, each of which prints what it measured and on what, and the demo.

mod demo;
mod state;

use clap::{Parser, Subcommand};

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// Room state in the store: bytes for a change, time to read it back.
    State(state::Arguments),
    /// Two servers on loopback, one of which joins a big room on the other.
    Demo(demo::Arguments),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Arguments::parse().bench {
        Bench::State(arguments) => state::run(arguments).await,
        Bench::Demo(arguments) => demo::run(arguments).await,
    }
}
