//! `tidemill bench`: how fast a server is.

mod serve;
mod statistics;

use std::process::ExitCode;

use clap::Subcommand;

/// `tidemill bench`.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Send a load to any OpenAI-compatible server and measure how it answers
    #[command(after_help = serve::EXAMPLES)]
    Serve(Box<serve::ServeBenchFlags>),
}

/// Measures what the command line says.
pub(crate) fn run(command: &BenchCommand) -> anyhow::Result<ExitCode> {
    match command {
        BenchCommand::Serve(flags) => serve::run(flags),
    }
}
