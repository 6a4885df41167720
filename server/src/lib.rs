//! The `tidemill` binary: HTTP front end, router, supervisor of workers, worker process, command line.
//!
//! The only crate that knows HTTP, JSON, OpenAI or text. It moves token ids to workers and back; what a worker does
//! with them is the engine's business, and which worker gets them is decided by `engine-core`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;

use crate::flags::{Cli, Command};

mod admission;
mod bench;
mod chat;
mod chat_template;
mod convert;
mod doctor;
mod draft_model;
mod event_lines;
mod flags;
mod front;
mod generation;
mod http;
mod logging;
mod metrics;
mod model_source;
mod openai;
mod proto;
mod report;
mod route;
mod router;
mod serve;
mod shutdown;
mod tokenizer;
mod worker;
mod worker_link;
mod worker_process;

/// Runs the program as the command line says.
pub fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Serve(flags) => serve::run(&flags),
        Command::Worker(flags) => worker_process::run(&flags),
        Command::Route(flags) => route::run(&flags),
        Command::Chat(flags) => chat::run(&flags),
        Command::Bench(command) => bench::run(&command),
        Command::Doctor(flags) => doctor::run(&flags),
        Command::Completions { shell } => {
            flags::print_completions(shell);
            Ok(ExitCode::SUCCESS)
        }
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

/// Version and build, as `--version` and `/version` say.
pub(crate) const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("TIDEMILL_BUILD"), ")");
