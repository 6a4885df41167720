//! The `tidemill` binary: HTTP front end, router, supervisor of workers, worker process, command line.
//!
//! The only crate that knows HTTP, JSON, OpenAI or text. It moves token ids to workers and back; what a worker does
//! with them is the engine's business, and which worker gets them is decided by `engine-core`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;

use crate::flags::Cli;

mod admission;
mod chat;
mod chat_template;
mod convert;
mod flags;
mod generation;
mod http;
mod logging;
mod metrics;
mod openai;
mod proto;
mod router;
mod shutdown;
mod tokenizer;
mod worker;
mod worker_link;

/// Runs the program as the command line says.
pub fn main() -> ExitCode {
    let _ = Cli::parse();
    ExitCode::SUCCESS
}

/// Version and build, as `--version` and `/version` say.
pub(crate) const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("TIDEMILL_BUILD"), ")");
