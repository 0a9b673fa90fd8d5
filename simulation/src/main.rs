//! Runs seeds: `simulation [machine|room|house] [--seeds N] [--from N] [--seed N] [--liveness] [--trace]`.

use std::collections::BTreeMap;
use std::ops::Range;
use std::process::ExitCode;
use std::sync::Mutex;

use simulation::fixture::Fixture;
use simulation::house::Mode;
use simulation::{house, machine, room};

const SEEDS: u64 = 10_000;
/// Of so many seeds of whole servers one is run twice, to prove that the seed is all that there is.
const TWICE_EVERY: u64 = 20;

struct Options {
    seeds: Range<u64>,
    liveness: bool,
    trace: bool,
}

fn main() -> ExitCode {
    let mut level = None;
    let mut options = Options {
        seeds: 0..SEEDS,
        liveness: false,
        trace: false,
    };
    let mut from = 0;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let number = |text: Option<String>| text.and_then(|text| text.parse::<u64>().ok());
        match arg.as_str() {
            "machine" | "room" | "house" => level = Some(arg),
            "--liveness" => options.liveness = true,
            "--trace" => options.trace = true,
            "--seeds" => match number(args.next()) {
                Some(n) => options.seeds = 0..n,
                None => return usage(),
            },
            "--from" => match number(args.next()) {
                Some(n) => from = n,
                None => return usage(),
            },
            "--seed" => match number(args.next()) {
                Some(n) => options.seeds = n..n + 1,
                None => return usage(),
            },
            _ => return usage(),
        }
    }
    options.seeds = options.seeds.start + from..options.seeds.end + from;
    let mut tally = Tally::default();
    match level.as_deref() {
        Some("machine") => run_machine(&options, &options.seeds, &mut tally),
        Some("room") => run_room(&options, &options.seeds, &mut tally),
        Some(_) => run_house(&options, &options.seeds, &mut tally),
        None => {
            // A room of machines takes longer than one machine, and a house longer than a room.
            run_machine(&options, &options.seeds, &mut tally);
            run_room(&options, &options.some(5), &mut tally);
            run_house(&options, &options.some(100), &mut tally);
        }
    }
    println!("{} passed, {} failed", tally.passed, tally.failed);
    match tally.failed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn usage() -> ExitCode {
    eprintln!(
        "usage: simulation [machine|room|house] [--seeds N] [--from N] [--seed N] [--liveness] [--trace]"
    );
    ExitCode::FAILURE
}

impl Options {
    /// The first of so many seeds.
    fn some(&self, of: u64) -> Range<u64> {
        let count = self.seeds.end - self.seeds.start;
        self.seeds.start..self.seeds.start + count.div_ceil(of)
    }
}

#[derive(Default)]
struct Tally {
    passed: u64,
    failed: u64,
}

impl Tally {
    fn add(&mut self, level: &str, seed: u64, result: Result<(), String>) {
        match result {
            Ok(()) => self.passed += 1,
            Err(broken) => {
                self.failed += 1;
                println!("{level} seed {seed}: {broken}");
            }
        }
    }
}

fn run_machine(options: &Options, seeds: &Range<u64>, tally: &mut Tally) {
    let fixture = Fixture::new();
    let mut ends: BTreeMap<machine::End, u64> = BTreeMap::new();
    for seed in seeds.clone() {
        let result = match (machine::run(&fixture, seed), machine::run(&fixture, seed)) {
            (Ok(a), Ok(b)) if a.trace == b.trace => {
                if options.trace {
                    println!("{}", a.trace);
                }
                *ends.entry(a.end).or_default() += 1;
                Ok(())
            }
            (Err((broken, trace)), _) => {
                if options.trace {
                    println!("{trace}");
                }
                Err(broken)
            }
            _ => Err("the same seed gave another trace".to_owned()),
        };
        tally.add("machine", seed, result);
    }
    for (end, count) in ends {
        println!("machine: {count:>6} {end:?}");
    }
}

fn run_room(options: &Options, seeds: &Range<u64>, tally: &mut Tally) {
    let (mut servers, mut events) = (0, 0);
    for seed in seeds.clone() {
        let result = match (room::run(seed), room::run(seed)) {
            (Ok(a), Ok(b)) if a.trace == b.trace => {
                if options.trace {
                    println!("{}", a.trace);
                }
                servers += a.servers_in_room;
                events += a.events;
                Ok(())
            }
            (Err((broken, trace)), _) => {
                if options.trace {
                    println!("{trace}");
                }
                Err(broken)
            }
            _ => Err("the same seed gave another trace".to_owned()),
        };
        tally.add("room", seed, result);
    }
    println!("room: {servers} servers in rooms and {events} events in the end");
}

/// What the workers of a level share.
struct Shared<'a> {
    seeds: Range<u64>,
    tally: &'a mut Tally,
    servers: usize,
    promised: usize,
    requests: u64,
}

/// Seeds do not know of each other, so there is one at a time for each processor.
fn run_house(options: &Options, seeds: &Range<u64>, tally: &mut Tally) {
    let mode = match options.liveness {
        true => Mode::Liveness,
        false => Mode::Safety,
    };
    let shared = Mutex::new(Shared {
        seeds: seeds.clone(),
        tally,
        servers: 0,
        promised: 0,
        requests: 0,
    });
    let workers = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let next = shared.lock().map(|mut shared| shared.seeds.next());
                    let Ok(Some(seed)) = next else {
                        return;
                    };
                    let result = run_house_seed(seed, mode, options.trace);
                    let mut shared = shared.lock().expect("printing does not panic");
                    let result = result.map(|run| {
                        shared.servers += run.servers_in_room;
                        shared.promised += run.promised;
                        shared.requests += run.requests;
                    });
                    shared.tally.add("house", seed, result);
                }
            });
        }
    });
    if let Ok(shared) = shared.into_inner() {
        println!(
            "house: {} servers in rooms, {} events and {} requests between servers",
            shared.servers, shared.promised, shared.requests
        );
    }
}

fn run_house_seed(seed: u64, mode: Mode, trace: bool) -> Result<house::Run, String> {
    let run = house::run(seed, mode, trace);
    if trace {
        match &run {
            Ok(run) => println!("{}", run.trace),
            Err((_, trace)) => println!("{trace}"),
        }
    }
    let run = run.map_err(|(broken, _)| broken)?;
    if seed.is_multiple_of(TWICE_EVERY) && house::run(seed, mode, trace).as_ref() != Ok(&run) {
        return Err("the same seed gave another trace".to_owned());
    }
    Ok(run)
}
