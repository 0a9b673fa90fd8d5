//! Pairs of benchmarks, and their table: what we take, what the limit takes, how many times that is.

use std::time::{Duration, Instant};

use criterion::Criterion;

pub struct Report<'c> {
    criterion: &'c mut Criterion,
    rows: Vec<Row>,
}

struct Row {
    what: &'static str,
    ours: Option<Duration>,
    limit: &'static str,
    limits: Option<Duration>,
    /// What each of the two did in a pass.
    items: u32,
}

/// One pass, which takes its own time.
pub type Pass<'a> = &'a mut dyn FnMut() -> Duration;

impl<'c> Report<'c> {
    pub fn new(criterion: &'c mut Criterion) -> Self {
        Self {
            criterion,
            rows: Vec::new(),
        }
    }

    /// Measures a step and its limit, each over as many items in a pass.
    pub fn pair(
        &mut self,
        what: &'static str,
        items: usize,
        ours: Pass<'_>,
        limit: &'static str,
        limits: Pass<'_>,
    ) {
        let ours = self.best(what, "", ours);
        let limits = self.best(what, "/limit", limits);
        self.rows.push(Row {
            what,
            ours,
            limit,
            limits,
            items: u32::try_from(items).unwrap_or(u32::MAX),
        });
    }

    /// The shortest pass: on a machine with other work that strays least.
    fn best(&mut self, what: &str, which: &str, pass: Pass<'_>) -> Option<Duration> {
        let mut best: Option<Duration> = None;
        self.criterion
            .bench_function(&format!("{what}{which}"), |bencher| {
                bencher.iter_custom(|times| {
                    let mut all = Duration::ZERO;
                    for _ in 0..times {
                        let took = pass();
                        best = Some(best.map_or(took, |best| best.min(took)));
                        all += took;
                    }
                    all
                });
            });
        best
    }

    /// As Markdown.
    pub fn print(&self) {
        println!("| step | each | limit | each | ratio |\n| --- | ---: | --- | ---: | ---: |");
        for row in &self.rows {
            let each = |took: Option<Duration>| took.map(|took| took / row.items);
            let (ours, limits) = (each(row.ours), each(row.limits));
            let ratio = match (ours, limits) {
                (Some(ours), Some(limits)) => {
                    format!("{:.1}", ours.as_secs_f64() / limits.as_secs_f64())
                }
                _ => continue,
            };
            println!(
                "| {} | {} | {} | {} | {ratio} |",
                row.what,
                show(ours),
                row.limit,
                show(limits)
            );
        }
    }
}

fn show(took: Option<Duration>) -> String {
    let nanos = took.unwrap_or_default().as_secs_f64() * 1e9;
    match nanos {
        _ if nanos < 1e3 => format!("{nanos:.0} ns"),
        _ if nanos < 1e5 => format!("{:.2} us", nanos / 1e3),
        _ if nanos < 1e7 => format!("{:.0} us", nanos / 1e3),
        _ => format!("{:.1} ms", nanos / 1e6),
    }
}

/// How long it takes.
pub fn time<T>(work: impl FnOnce() -> T) -> Duration {
    let start = Instant::now();
    std::hint::black_box(work());
    start.elapsed()
}
