//! Micro-benchmarks: each step an event goes through, beside the least that this machine can do for it.
//!
//! `./dev bench micro`, with `-- PART OF A NAME` for some of them.

mod corpus;
mod law;
mod report;
mod store;

use std::time::Duration;

use criterion::Criterion;

use crate::report::Report;

fn main() -> anyhow::Result<()> {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .sample_size(20)
        .configure_from_args();
    let mut report = Report::new(&mut criterion);
    law::measure(&mut report)?;
    store::measure(&mut report)?;
    report.print();
    criterion.final_summary();
    Ok(())
}
