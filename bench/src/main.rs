//! The benchmarks. Each prints what it measured and on what; none asserts.

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
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Arguments::parse().bench {
        Bench::State(arguments) => state::run(arguments).await,
    }
}
