//! `tidemill bench`: how fast a server, a model and a kernel are.

mod kernels;
mod limits;
mod machine;
mod model;
mod serve;
mod statistics;

use std::process::ExitCode;

use clap::Subcommand;
use indicatif::ProgressStyle;

/// `tidemill bench`.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Send a load to any OpenAI-compatible server and measure how it answers
    #[command(after_help = serve::EXAMPLES)]
    Serve(Box<serve::ServeBenchFlags>),
    /// Measure forward passes of a model on this machine, beside the machine's limits
    #[command(after_help = model::EXAMPLES)]
    Model(Box<model::ModelBenchFlags>),
    /// Measure each operation on each instruction set of this machine, beside the machine's limits
    #[command(after_help = kernels::EXAMPLES)]
    Kernels(kernels::KernelBenchFlags),
}

/// Measures what the command line says.
pub(crate) fn run(command: &BenchCommand) -> anyhow::Result<ExitCode> {
    match command {
        BenchCommand::Serve(flags) => serve::run(flags),
        BenchCommand::Model(flags) => model::run(flags),
        BenchCommand::Kernels(flags) => kernels::run(flags),
    }
}

/// How bars of measurements look.
fn bar_style() -> ProgressStyle {
    ProgressStyle::with_template("{elapsed_precise} {wide_bar} {pos}/{len}  {msg}")
        .expect("the template is well formed")
}
