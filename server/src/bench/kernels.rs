//! `tidemill bench kernels`: each operation on each instruction set of this machine, or on a GPU, beside the limit that was measured
//! right before it on the same threads or the same device.

mod gpu;
mod operations;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use indicatif::ProgressBar;
use serde_json::{Value, json};
use tidemill_engine::device_name::DeviceName;
use tidemill_kernels::cpu::{Cpu, CpuOptions, Isa};

use super::limits::Yardstick;
use super::machine;
use super::statistics::Distribution;
use operations::Operation;

/// `tidemill bench kernels`.
#[derive(Args, Clone, Debug)]
pub(crate) struct KernelBenchFlags {
    /// What to compute on: cpu, cuda:N for GPU N, or auto for the first GPU where it is of use, else the CPU
    #[arg(long, env = "TIDEMILL_DEVICE", value_name = "NAME", default_value_t, value_parser = crate::flags::device)]
    device: DeviceName,
    /// Threads that compute [default: one per core]
    #[arg(long, env = "TIDEMILL_THREADS", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    threads: Option<u32>,
    /// Only instruction sets whose name contains this [default: all that this machine has]
    #[arg(long, env = "TIDEMILL_CPU_ISA", value_name = "TEXT")]
    cpu_isa: Option<String>,
    /// Only operations whose name contains this
    #[arg(long, env = "TIDEMILL_ONLY", value_name = "TEXT")]
    only: Option<String>,
    /// How often each is measured; the median counts
    #[arg(long, env = "TIDEMILL_RUNS", value_name = "N", default_value = "5", value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Print JSON instead of text
    #[arg(long, env = "TIDEMILL_JSON")]
    json: bool,
}

/// An operation on an instruction set, measured several times.
#[derive(Clone, Debug)]
struct Row {
    /// Instructions of a processor, or a GPU.
    on: String,
    name: String,
    unit: &'static str,
    /// What the limit is of.
    what: String,
    /// Bytes or operations per second.
    rate: f64,
    limit: f64,
    /// Rate ÷ limit, run by run, at the median.
    share: f64,
}

/// Measures and prints.
#[expect(clippy::print_stdout, reason = "the report is the program's output")]
pub(super) fn run(flags: &KernelBenchFlags) -> anyhow::Result<ExitCode> {
    let load_before = machine::load();
    let device = flags.device.open(1).with_context(|| format!("--device {}", flags.device))?;
    let rows = match device.gpus().first() {
        None => on_cpu(flags)?,
        Some(driver) => {
            let wanted = |operation: &gpu::Operation| flags.wants(&operation.name());
            let operations: Vec<gpu::Operation> = gpu::Operation::all().into_iter().filter(wanted).collect();
            anyhow::ensure!(!operations.is_empty(), "there is no such operation");
            gpu::measure(driver, &operations, flags.runs)?
        }
    };
    if flags.json {
        let report = json!({
            "version": crate::VERSION, "processor": machine::processor(), "threads": flags.threads,
            "runs": flags.runs, "load_before": load_before, "load_after": machine::load(),
            "rows": rows.iter().map(Row::json).collect::<Vec<_>>(),
        });
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(ExitCode::SUCCESS);
    }
    println!("{}; load {load_before} → {}\n", machine::processor(), machine::load());
    println!("{:<14}{:<34}{:>10}{:>12}{:>10}  limit", "instructions", "operation", "", "limit", "of limit");
    rows.iter().for_each(|row| println!("{}", row.line()));
    Ok(ExitCode::SUCCESS)
}

impl KernelBenchFlags {
    fn wants(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|text| name.contains(text.as_str()))
    }
}

fn on_cpu(flags: &KernelBenchFlags) -> anyhow::Result<Vec<Row>> {
    let named = |isa: &Isa| flags.cpu_isa.as_ref().is_none_or(|text| isa.to_string().contains(text.as_str()));
    let isas: Vec<Isa> = Isa::ALL.into_iter().filter(|isa| isa.is_available()).filter(named).collect();
    anyhow::ensure!(!isas.is_empty(), "this machine has no such instructions");
    let wanted = |operation: &Operation| flags.wants(&operation.name());
    let operations: Vec<Operation> = Operation::all().into_iter().filter(wanted).collect();
    anyhow::ensure!(!operations.is_empty(), "there is no such operation");
    measure(flags, &isas, &operations)
}

fn measure(flags: &KernelBenchFlags, isas: &[Isa], operations: &[Operation]) -> anyhow::Result<Vec<Row>> {
    let threads = flags.threads.map(|threads| threads as usize);
    let bar = ProgressBar::new((isas.len() * operations.len()) as u64).with_style(super::bar_style());
    let mut rows = Vec::new();
    for operation in operations {
        let mut bench = operation.prepare()?;
        for &isa in isas {
            bar.set_message(format!("{}, {isa}", operation.name()));
            bar.tick();
            let cpu = Arc::new(Cpu::new(CpuOptions { isa: Some(isa), threads, ..CpuOptions::default() })?);
            let mut yardstick = Yardstick::new(Arc::clone(&cpu));
            let bound = bench.bound(&cpu);
            bench.run(&cpu);
            let mut samples = Vec::new();
            for _ in 0..flags.runs {
                let limit = bound.limit(yardstick.measure(Some(bound.arithmetic()))?);
                let start = Instant::now();
                bench.run(&cpu);
                samples.push((bench.amount(bound) / start.elapsed().as_secs_f64(), limit));
            }
            rows.push(Row::new(isa.to_string(), operation.name(), bound.unit(), bound.what(), &samples));
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    Ok(rows)
}

impl Row {
    fn new(on: String, name: String, unit: &'static str, what: String, samples: &[(f64, f64)]) -> Self {
        let median = |number: fn(&(f64, f64)) -> f64| Distribution::new(samples.iter().map(number)).median();
        let (rate, limit) = (median(|(rate, _)| *rate), median(|(_, limit)| *limit));
        Self { on, name, unit, what, rate, limit, share: median(|(rate, limit)| rate / limit) }
    }

    fn line(&self) -> String {
        let Self { on, name, unit, what, rate, limit, share } = self;
        format!(
            "{on:<14}{name:<34}{:>10.1}{:>12.1}{:>8.1} %  {unit}, {what}",
            rate / 1e9,
            limit / 1e9,
            share * 100.0
        )
    }

    fn json(&self) -> Value {
        json!({
            "isa": self.on, "operation": self.name, "unit": self.unit, "rate": self.rate / 1e9,
            "limit": self.limit / 1e9, "limited_by": self.what, "share_of_limit": self.share,
        })
    }
}

const QUERY_HEADS: usize = 32;
const KV_HEADS: usize = 8;
const HEAD: usize = 128;
const BLOCK: usize = 16;

/// For `--help`.
pub(super) const EXAMPLES: &str = "\
Examples:
  tidemill bench kernels                                 everything, on every instruction set
  tidemill bench kernels --threads 1 --cpu-isa avx512
  tidemill bench kernels --only 'matmul 1 row' --json
  tidemill bench kernels --device cuda:0";

#[cfg(test)]
mod tests {
    use tidemill_kvtransfer_proto::layout::KvDtype;

    use super::*;

    #[test]
    fn the_smallest_operation_is_measured_on_every_instruction_set() {
        let flags = KernelBenchFlags {
            device: DeviceName::Cpu,
            threads: Some(1),
            cpu_isa: None,
            only: None,
            runs: 2,
            json: false,
        };
        let isas: Vec<Isa> = Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect();
        let operations = [
            Operation::Norm { rows: 4 },
            Operation::Attention { sequences: 2, rows: 1, context: 40, dtype: KvDtype::Int8 },
        ];
        let rows = measure(&flags, &isas, &operations).expect("the machine has them");
        assert_eq!(rows.len(), 2 * isas.len());
        for row in rows {
            assert!(0.0 < row.rate && 0.0 < row.limit && row.share.is_finite(), "{row:?}");
            assert!(row.line().contains(&row.name), "{}", row.line());
        }
    }
}
