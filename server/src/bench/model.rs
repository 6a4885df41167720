//! `tidemill bench model`: how fast forward passes are, beside what this machine could do at most.
//!
//! The engine's runner, of the processor or of a GPU, is called as a library: no HTTP, no scheduler. Before every timed pass the machine's limits are
//! measured anew, and a share of a limit is always that of its neighbour in time, since on machines with other
//! guests both move together.

mod engine;
mod passes;
mod shapes;

use std::io::BufRead;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, ensure};
use clap::Args;
use indicatif::{MultiProgress, ProgressBar};
use serde_json::{Value, json};
use tidemill_engine::device_name::DeviceName;
use tidemill_engine::handle::{EngineConfig, Isa, LoadFormat, LoadProgress, ModelSource, Quantization, Role};
use tidemill_engine::models::{LoadOptions, Model};
use tidemill_kernels::cpu::{Arithmetic, Cpu, CpuOptions};

use super::limits::{Limits, Yardstick, weights_name};
use super::machine;
use super::statistics::Distribution;
use crate::flags::{LoadFormatName, ModelFlags};
use crate::model_source;
use engine::Subject;
use passes::{Pass, Passes, Work};
use shapes::Shape;

/// `tidemill bench model`.
#[derive(Args, Clone, Debug)]
pub(crate) struct ModelBenchFlags {
    #[command(flatten)]
    model: ModelFlags,
    /// A well-known shape instead, with weights from a seed
    #[arg(long, env = "TIDEMILL_SHAPE", value_enum, conflicts_with_all = ["positional", "model"])]
    shape: Option<Shape>,
    /// Where weights come from; those of a shape are always dummy
    #[arg(long, env = "TIDEMILL_LOAD_FORMAT", value_enum, default_value_t)]
    load_format: LoadFormatName,
    /// Make weights smaller and faster while they are loaded: int8, fp8, int4 (in groups of 32), int4-g64 or int4-g128
    #[arg(long, env = "TIDEMILL_QUANTIZATION", value_name = "KIND", value_parser = Quantization::from_str)]
    quantization: Option<Quantization>,
    /// What to compute on: cpu, cuda:N for GPU N, or auto for the first GPU where it is of use, else the CPU
    #[arg(long, env = "TIDEMILL_DEVICE", value_name = "NAME", default_value_t, value_parser = crate::flags::device)]
    device: DeviceName,
    /// Launch each step of a GPU kernel by kernel, without graphs
    #[arg(long, env = "TIDEMILL_ENFORCE_EAGER")]
    enforce_eager: bool,
    /// Instructions to compute with, such as avx2 or portable [default: the fastest there are]
    #[arg(long, env = "TIDEMILL_CPU_ISA", value_name = "NAME", value_parser = crate::flags::cpu_isa)]
    cpu_isa: Option<Isa>,
    /// Seed of dummy weights
    #[arg(long, env = "TIDEMILL_SEED", default_value = "0")]
    seed: u64,
    /// Threads that compute [default: one per core]
    #[arg(long, env = "TIDEMILL_THREADS", value_name = "N", value_parser = positive())]
    threads: Option<u32>,
    /// Lengths of prompts, comma-separated
    #[arg(
        long,
        env = "TIDEMILL_PREFILL_LEN",
        value_name = "TOKENS",
        value_delimiter = ',',
        default_value = "128,512,2048",
        value_parser = positive()
    )]
    prefill_len: Vec<u32>,
    /// Sequences that are decoded together, comma-separated
    #[arg(
        long,
        env = "TIDEMILL_DECODE_BATCH",
        value_name = "N",
        value_delimiter = ',',
        default_value = "1,8,16,64",
        value_parser = positive()
    )]
    decode_batch: Vec<u32>,
    /// Tokens that each of them has before
    #[arg(long, env = "TIDEMILL_DECODE_CONTEXT", value_name = "TOKENS", default_value = "128")]
    decode_context: u32,
    /// Tokens in one step; longer prompts are computed in chunks
    #[arg(
        long,
        env = "TIDEMILL_MAX_NUM_BATCHED_TOKENS",
        value_name = "TOKENS",
        default_value = "512",
        value_parser = positive()
    )]
    max_num_batched_tokens: u32,
    /// How often each is measured; the median counts
    #[arg(long, env = "TIDEMILL_RUNS", value_name = "N", default_value = "5", value_parser = positive())]
    runs: u32,
    /// Print JSON instead of text
    #[arg(long, env = "TIDEMILL_JSON")]
    json: bool,
    /// Measure once for each line on stdin, such as `prefill 512` or `decode 16`, and answer with a line of JSON: for
    /// comparisons in which others take their turns in between
    #[arg(long, env = "TIDEMILL_IN_TURNS")]
    in_turns: bool,
}

/// A pass, measured several times.
#[derive(Clone, Debug)]
struct Row {
    pass: Pass,
    /// Tokens per second of each run.
    rates: Distribution,
    /// What the machine allowed, at the median.
    limit: f64,
    /// Which of its limits that is.
    bound: &'static str,
    /// Rate ÷ limit, run by run, at the median.
    share: f64,
    /// Seconds that asking for a step took, before anybody waited for it.
    asking: f64,
}

/// One run of a pass.
#[derive(Clone, Copy, Debug)]
struct Sample {
    rate: f64,
    limit: f64,
    bound: &'static str,
    asking: f64,
}

/// Measures the model and prints what came of it.
#[expect(clippy::print_stdout, reason = "the report is the program's output")]
pub(super) fn run(flags: &ModelBenchFlags) -> anyhow::Result<ExitCode> {
    let load_before = machine::load();
    let bars = MultiProgress::new();
    let (name, source) = source(flags, &bars)?;
    let subject = subject(flags, &source, &bars)?;
    let passes = passes(flags);
    ensure!(!passes.is_empty(), "there is nothing to measure");
    let device = subject.device();
    let mut yardstick = yardstick(&subject)?;
    let mut bench = Passes::new(subject, &passes, flags.max_num_batched_tokens, flags.decode_context)?;
    if flags.in_turns {
        return in_turns(&passes, &mut bench, &mut yardstick, std::io::stdin().lock());
    }
    let format = bench.format();
    let arithmetic = bench.arithmetic().map(Arithmetic::name);
    let rows = measure(flags, &passes, &mut bench, &mut yardstick)?;
    let limits = yardstick.median();
    let weights_bytes = bench.work(Pass::Decode(1)).bytes;
    if flags.json {
        let rows: Vec<Value> = rows.iter().map(|row| row.json(&bench.work(row.pass))).collect();
        let report = json!({
            "version": crate::VERSION, "model": name, "weights": weights_name(format), "arithmetic": arithmetic,
            "device": device, "context": flags.decode_context, "chunk": flags.max_num_batched_tokens, "processor": machine::processor(), "runs": flags.runs,
            "load_before": load_before, "load_after": machine::load(),
            "read_bytes_per_s": limits.read, "flop_per_s": limits.flop, "rows": rows,
        });
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "{name}, {} weights, {:.3} GB read in a step of one sequence",
        weights_name(format),
        weights_bytes / 1e9
    );
    println!("{}; {device}; load {load_before} → {}", machine::processor(), machine::load());
    match arithmetic {
        Some(arithmetic) => println!(
            "limits measured in between: {:.2} GB/s read, {:.1} G multiplications and additions of {arithmetic} per second\n",
            limits.read / 1e9,
            limits.flop / 1e9
        ),
        None => println!(
            "limits: copies read and write {:.2} GB/s in between, a product of 8192³ makes {:.0} GFLOP/s (inf: no library)\n",
            limits.read / 1e9,
            limits.flop / 1e9
        ),
    }
    println!("{:<22}{:>12}{:>12}{:>12}{:>12}{:>10}  by", "", "tokens/s", "min", "max", "limit", "of limit");
    rows.iter().for_each(|row| println!("{}", row.line()));
    Ok(ExitCode::SUCCESS)
}

fn measure(
    flags: &ModelBenchFlags,
    passes: &[Pass],
    bench: &mut Passes,
    yardstick: &mut Yardstick,
) -> anyhow::Result<Vec<Row>> {
    let bar = ProgressBar::new(u64::from(flags.runs) * passes.len() as u64).with_style(super::bar_style());
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); passes.len()];
    for &pass in passes {
        bar.set_message(format!("warming up: {}", pass.name()));
        bar.tick();
        bench.warm_up(pass)?;
    }
    // Round by round, so that what disturbs the machine for a while disturbs every pass alike.
    for _ in 0..flags.runs {
        for (&pass, samples) in passes.iter().zip(&mut samples) {
            bar.set_message(pass.name());
            let work = bench.work(pass);
            let (fastest, bound) = work.at_best(yardstick.measure(bench.arithmetic())?);
            let rate = work.tokens / bench.time(pass)?.as_secs_f64();
            let (limit, asking) = (work.tokens / fastest, bench.asking().as_secs_f64());
            samples.push(Sample { rate, limit, bound, asking });
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    Ok(passes.iter().zip(samples).map(|(&pass, samples)| Row::new(pass, &samples)).collect())
}

/// Measures one of `passes` for each line of `asked`. The answers begin once all are warm.
#[expect(clippy::print_stdout, reason = "the answers are the program's output")]
fn in_turns(
    passes: &[Pass],
    bench: &mut Passes,
    yardstick: &mut Yardstick,
    asked: impl BufRead,
) -> anyhow::Result<ExitCode> {
    passes.iter().try_for_each(|&pass| bench.warm_up(pass))?;
    println!("{}", json!({"ready": true}));
    for line in asked.lines() {
        let line = line.context("stdin")?;
        let pass = passes.iter().copied().find(|pass| pass.asked_as() == line.trim());
        let pass = pass.with_context(|| {
            let known: Vec<String> = passes.iter().map(|pass| pass.asked_as()).collect();
            format!("`{}` is not among what was announced: {}", line.trim(), known.join(", "))
        })?;
        let work = bench.work(pass);
        let (fastest, bound) = work.at_best(yardstick.measure(bench.arithmetic())?);
        let rate = work.tokens / bench.time(pass)?.as_secs_f64();
        println!(
            "{}",
            json!({"tokens_per_s": rate, "limit_tokens_per_s": work.tokens / fastest, "limited_by": bound})
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn source(flags: &ModelBenchFlags, bars: &MultiProgress) -> anyhow::Result<(String, ModelSource)> {
    if let Some(shape) = flags.shape {
        return Ok((crate::flags::typed(shape), shape.source()));
    }
    let resolved = model_source::resolve(&flags.model, bars)?;
    Ok((resolved.name, resolved.source))
}

/// Loads the model where it is to compute.
fn subject(flags: &ModelBenchFlags, source: &ModelSource, bars: &MultiProgress) -> anyhow::Result<Subject> {
    let device = flags.device.open(1).with_context(|| format!("--device {}", flags.device))?;
    let config = EngineConfig {
        device,
        quantization: flags.quantization,
        max_num_batched_tokens: flags.max_num_batched_tokens,
        ..EngineConfig::new("bench", Role::Hybrid, source.clone())
    };
    let format = match (flags.shape, flags.load_format) {
        (None, LoadFormatName::Safetensors) => LoadFormat::Safetensors,
        _ => LoadFormat::Dummy { seed: flags.seed },
    };
    let threads = flags.threads.map(|threads| threads as usize);
    let cpu = Arc::new(Cpu::new(CpuOptions { threads, isa: flags.cpu_isa, ..CpuOptions::default() })?);
    let options = LoadOptions { threads: cpu.threads(), format, quantization: flags.quantization };
    let bar = bars.add(ProgressBar::new(0).with_style(super::bar_style()));
    let mut progress = |progress: LoadProgress| {
        bar.set_length(progress.total >> 20);
        bar.set_position(progress.done >> 20);
        bar.set_message(format!("MiB, {}", progress.stage));
    };
    let gpu = config.settle_device()?.and_then(|gpus| gpus.into_iter().next());
    let subject = match gpu {
        None => Subject::Cpu(Arc::new(Model::load_with(options, source, &mut progress)?), cpu),
        Some(driver) => {
            let model = Arc::new(Model::load_on(&driver, options, source, &mut progress)?);
            Subject::Gpu { model, driver, graphs: !flags.enforce_eager }
        }
    };
    bar.finish_and_clear();
    Ok(subject)
}

/// What measures the limits of the device that computes.
fn yardstick(subject: &Subject) -> anyhow::Result<Yardstick> {
    Ok(match subject {
        Subject::Cpu(_, cpu) => Yardstick::new(Arc::clone(cpu)),
        Subject::Gpu { driver, .. } => Yardstick::on_gpu(driver)?,
    })
}

fn passes(flags: &ModelBenchFlags) -> Vec<Pass> {
    let prefills = flags.prefill_len.iter().map(|&tokens| Pass::Prefill(tokens));
    prefills.chain(flags.decode_batch.iter().map(|&batch| Pass::Decode(batch))).collect()
}

impl Pass {
    fn asked_as(self) -> String {
        match self {
            Self::Prefill(tokens) => format!("prefill {tokens}"),
            Self::Decode(batch) => format!("decode {batch}"),
        }
    }

    fn name(self) -> String {
        match self {
            Self::Prefill(tokens) => format!("prefill {tokens}"),
            Self::Decode(batch) => format!("decode, batch {batch}"),
        }
    }
}

impl Work {
    /// Seconds that it takes at least, and which limit says so: reading and computing can go on at the same time.
    fn at_best(&self, limits: Limits) -> (f64, &'static str) {
        let (reading, computing) = (self.bytes / limits.read, self.flop / limits.flop);
        if computing < reading { (reading, "bytes") } else { (computing, "FLOP") }
    }
}

impl Row {
    fn new(pass: Pass, samples: &[Sample]) -> Self {
        let of = |number: fn(&Sample) -> f64| Distribution::new(samples.iter().map(number));
        Self {
            pass,
            rates: of(|it| it.rate),
            limit: of(|it| it.limit).median(),
            bound: samples.last().map_or("", |it| it.bound),
            share: of(|it| it.rate / it.limit).median(),
            asking: of(|it| it.asking).median(),
        }
    }

    fn line(&self) -> String {
        let (rates, name) = (&self.rates, self.pass.name());
        format!(
            "{name:<22}{:>12.1}{:>12.1}{:>12.1}{:>12.1}{:>8.1} %  {}",
            rates.median(),
            rates.percentile(0.0),
            rates.max(),
            self.limit,
            self.share * 100.0,
            self.bound
        )
    }

    fn json(&self, work: &Work) -> Value {
        let (phase, size) = match self.pass {
            Pass::Prefill(tokens) => ("prefill", tokens),
            Pass::Decode(batch) => ("decode", batch),
        };
        json!({
            "phase": phase, "size": size, "tokens_per_s": self.rates.median(), "runs": self.rates.sorted(),
            "limit_tokens_per_s": self.limit, "limited_by": self.bound, "share_of_limit": self.share,
            "bytes": work.bytes, "flop": work.flop, "asking_s": self.asking,
        })
    }
}

fn positive() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=MOST)
}

/// Tokens, sequences, threads or runs that make sense.
const MOST: i64 = 1 << 20;

/// For `--help`.
pub(super) const EXAMPLES: &str = "\
Examples:
  tidemill bench model --shape llama-1.1b             weights from a seed; nothing is downloaded
  tidemill bench model --shape llama-0.4b --quantization int8 --threads 1 --json
  tidemill bench model ./Qwen3-0.6B --prefill-len 512 --decode-batch 1,16
  tidemill bench model --shape llama-3-8b --device cuda:0 --decode-batch 1,64 --decode-context 1024";

#[cfg(test)]
mod tests;
