//! Chores of the repository: `cargo xtask <chore>`.

use std::path::Path;
use std::process::ExitCode;

use xtask::measure_start;

const USAGE: &str = "\
Usage: cargo xtask <CHORE>

Chores:
  simulate [--seeds N] [--first-seed S] [--faults all|none|LIST] [--jobs J] [--trace]
          run N schedules of the cluster simulator; stops at the first seed that fails and prints its trace
  tidy    check crate arrows, lengths of files and functions, SAFETY comments and leftovers
          (`cargo test` runs it too; `--shrink` rewrites the list of known offenders)
  measure-start [BINARY]
          serve the demo model a few times, and print how long it takes until the first answer and how much
          memory the idle processes hold; without BINARY, of a release build made now";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["tidy"] => report(&xtask::tidy::check(&xtask::root())),
        ["tidy", "--shrink"] => report(&xtask::tidy::shrink(&xtask::root())),
        ["simulate", rest @ ..] => xtask::simulate::main(rest),
        ["measure-start"] => {
            measured(measure_start::build(&xtask::root()).and_then(|it| measure_start::print(&it)))
        }
        ["measure-start", binary] => measured(measure_start::print(Path::new(binary))),
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn measured(outcome: anyhow::Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("measure-start: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn report(findings: &[String]) -> ExitCode {
    for finding in findings {
        eprintln!("tidy: {finding}");
    }
    if findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
