//! Runs seeds: `simulation [machine|room] [--seeds N] [--from N] [--seed N] [--trace]`.

use std::collections::BTreeMap;
use std::process::ExitCode;

use simulation::fixture::Fixture;
use simulation::{machine, room};

const SEEDS: u64 = 10_000;

struct Options {
    seeds: std::ops::Range<u64>,
    trace: bool,
}

fn main() -> ExitCode {
    let mut level = None;
    let mut options = Options {
        seeds: 0..SEEDS,
        trace: false,
    };
    let mut from = 0;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let number = |text: Option<String>| text.and_then(|text| text.parse::<u64>().ok());
        match arg.as_str() {
            "machine" | "room" => level = Some(arg),
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
    if level.as_deref() != Some("room") {
        run_machine(&options, &mut tally);
    }
    if level.as_deref() != Some("machine") {
        // A house of servers takes longer than one machine; alone it runs as many seeds as asked for.
        if level.is_none() {
            options.seeds.end =
                options.seeds.start + (options.seeds.end - options.seeds.start).div_ceil(5);
        }
        run_room(&options, &mut tally);
    }
    println!("{} passed, {} failed", tally.passed, tally.failed);
    match tally.failed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn usage() -> ExitCode {
    eprintln!("usage: simulation [machine|room] [--seeds N] [--from N] [--seed N] [--trace]");
    ExitCode::FAILURE
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

fn run_machine(options: &Options, tally: &mut Tally) {
    let fixture = Fixture::new();
    let mut ends: BTreeMap<machine::End, u64> = BTreeMap::new();
    for seed in options.seeds.clone() {
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

fn run_room(options: &Options, tally: &mut Tally) {
    let (mut servers, mut events) = (0, 0);
    for seed in options.seeds.clone() {
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
