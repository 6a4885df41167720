//! Measures what Tidemill promises about speed, each number beside what limits it.
//!
//! `cargo run --release -p tidemill-bench -- handoff` prints one table and appends one JSON line for each row to a
//! file. A number and its limit are taken in turns within one run, and medians are compared: on a machine that
//! does other things too, only ratios of neighbours in time mean anything.
#![forbid(unsafe_code)]

mod conversion;
mod copied;
mod digests;
mod direct_worker;
mod exposed;
mod owner_change;
mod posting;
mod ranks;
mod report;
mod speculation;
mod tcp;
mod timing;
mod whole_system;
mod workers;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use report::{Report, Row};

#[derive(Parser)]
#[command(about = "How fast Tidemill is, beside what limits it")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Everything about moving KV cache from one worker to another
    Handoff {
        /// Only groups whose name contains this: copied, owner, tcp, posting, conversion, digest, exposed, router, killed
        #[arg(long, value_name = "TEXT")]
        only: Option<String>,
        /// Repetitions of each measurement
        #[arg(long, value_name = "N", default_value_t = 31)]
        rounds: usize,
        /// Where to append one JSON line for each row
        #[arg(long, value_name = "FILE", default_value = "benches/results/handoff.jsonl")]
        out: PathBuf,
    },
    /// What it costs to share a model among ranks
    Ranks {
        /// Only groups whose name contains this: ranks
        #[arg(long, value_name = "TEXT")]
        only: Option<String>,
        /// Repetitions of each measurement
        #[arg(long, value_name = "N", default_value_t = 31)]
        rounds: usize,
        /// Where to append one JSON line for each row
        #[arg(long, value_name = "FILE", default_value = "benches/results/ranks.jsonl")]
        out: PathBuf,
    },
    /// What guessing several tokens in a step gains
    Speculation {
        /// Only groups whose name contains this: demo, widened, dummy, draft
        #[arg(long, value_name = "TEXT")]
        only: Option<String>,
        /// Repetitions of each measurement
        #[arg(long, value_name = "N", default_value_t = 15)]
        rounds: usize,
        /// Where to append one JSON line for each row
        #[arg(long, value_name = "FILE", default_value = "benches/results/speculation.jsonl")]
        out: PathBuf,
    },
}

/// One group of rows: what `--only` chooses by, and how they are measured.
type Group = (&'static str, fn(usize) -> anyhow::Result<Vec<Row>>);

const HANDOFF: [Group; 9] = [
    ("copied", copied::measure),
    ("owner", owner_change::measure),
    ("tcp", tcp::measure),
    ("posting", posting::measure),
    ("conversion", conversion::measure),
    ("digest", digests::measure),
    ("exposed", exposed::measure),
    ("router", whole_system::router),
    ("killed", whole_system::killed),
];

const SPECULATION: [Group; 4] = [
    ("demo", speculation::measure_demo),
    ("widened", speculation::measure_widened),
    ("dummy", speculation::measure_dummy),
    ("draft", speculation::drafted::measure),
];

const RANKS: [Group; 1] = [("ranks", ranks::measure)];

fn main() -> ExitCode {
    let (groups, only, rounds, out): (&[Group], _, _, _) = match Cli::parse().command {
        Command::Handoff { only, rounds, out } => (&HANDOFF, only, rounds, out),
        Command::Ranks { only, rounds, out } => (&RANKS, only, rounds, out),
        Command::Speculation { only, rounds, out } => (&SPECULATION, only, rounds, out),
    };
    let mut report = Report::begin();
    let mut is_whole = true;
    for &(name, measure) in groups {
        if only.as_ref().is_some_and(|only| !name.contains(only.as_str())) {
            continue;
        }
        eprintln!("measuring: {name}");
        match measure(rounds.max(3)) {
            Ok(rows) => report.add(rows),
            Err(error) => {
                eprintln!("{name} could not be measured: {error:#}");
                is_whole = false;
            }
        }
    }
    report.print();
    if let Err(error) = report.append(&out) {
        eprintln!("{}: {error}", out.display());
        is_whole = false;
    }
    if is_whole { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
