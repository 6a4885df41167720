//! `cargo xtask simulate`: runs schedules of the simulator on all cores, and prints the trace of one that fails.

use std::any::Any;
use std::io::{IsTerminal, Write};
use std::panic::{self, AssertUnwindSafe};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tidemill_engine_core::simulator::{self, Faults, Options, Summary, Trace};

/// What is asked for on the command line.
#[derive(Clone, Copy, Debug)]
struct Order {
    seeds: u64,
    first_seed: u64,
    faults: Faults,
    jobs: usize,
    /// Print the trace of the first seed even if it does not fail.
    trace: bool,
}

/// Runs what the arguments say.
pub fn main(arguments: &[&str]) -> ExitCode {
    let order = match parse(arguments) {
        Ok(order) => order,
        Err(message) => {
            eprintln!("simulate: {message}");
            return ExitCode::from(2);
        }
    };
    if cfg!(debug_assertions) {
        // Twenty times as fast.
        return again_in_release(arguments);
    }
    if order.trace {
        return print_trace(order);
    }
    run(order)
}

fn again_in_release(arguments: &[&str]) -> ExitCode {
    let status = Command::new(env!("CARGO"))
        .args(["run", "--release", "--quiet", "--package", "xtask", "--", "simulate"])
        .args(arguments)
        .status()
        .expect("cargo, which runs this, can be run");
    if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn parse(arguments: &[&str]) -> Result<Order, String> {
    let jobs = thread::available_parallelism().map_or(1, usize::from);
    let mut order = Order { seeds: 20_000, first_seed: 0, faults: Faults::all(), jobs, trace: false };
    let mut rest = arguments.iter();
    while let Some(flag) = rest.next() {
        if *flag == "--trace" {
            order.trace = true;
            continue;
        }
        let value = rest.next().ok_or_else(|| format!("`{flag}` needs a value"))?;
        let number = || value.parse::<u64>().map_err(|_| format!("`{flag}` needs a number, not `{value}`"));
        match *flag {
            "--seeds" => order.seeds = number()?,
            "--first-seed" => order.first_seed = number()?,
            "--jobs" => order.jobs = usize::try_from(number()?).unwrap_or(1).max(1),
            "--faults" => order.faults = Faults::parse(value)?,
            other => return Err(format!("`{other}` is no flag of simulate")),
        }
    }
    Ok(order)
}

fn run(order: Order) -> ExitCode {
    let started = Instant::now();
    let options = Options { faults: order.faults, mischief: None };
    let (next, end) = (AtomicU64::new(order.first_seed), order.first_seed.saturating_add(order.seeds));
    let failure: Mutex<Option<u64>> = Mutex::new(None);
    let total = Mutex::new(Summary::default());
    let done = AtomicU64::new(0);
    // A failing schedule is run again for its trace; its first panic need not be seen.
    panic::set_hook(Box::new(|_| {}));
    thread::scope(|scope| {
        for _ in 0..order.jobs {
            scope.spawn(|| {
                let mut sum = Summary::default();
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if end <= seed || failure.lock().expect("no panic under it").is_some() {
                        break;
                    }
                    match attempt(seed, options, &mut Trace::default()) {
                        Ok(summary) => sum.add(&summary),
                        Err(_) => {
                            let mut failure = failure.lock().expect("no panic under it");
                            *failure = Some(failure.map_or(seed, |other| other.min(seed)));
                        }
                    }
                    done.fetch_add(1, Ordering::Relaxed);
                }
                total.lock().expect("no panic under it").add(&sum);
            });
        }
        report_progress(&done, order.seeds, &failure);
    });
    let total = total.into_inner().expect("no panic under it");
    let seconds = started.elapsed().as_secs_f64();
    if let Some(seed) = failure.into_inner().expect("no panic under it") {
        return report_failure(seed, options);
    }
    println_all(&format!("{total}\n{seconds:.1} s on {} threads", order.jobs));
    let missing = total.missing(order.faults);
    if !missing.is_empty() {
        let names: Vec<&str> = missing.iter().map(|it| it.name()).collect();
        eprintln!("simulate: asked for, but never happened: {}", names.join(", "));
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn attempt(seed: u64, options: Options, trace: &mut Trace) -> Result<Summary, String> {
    panic::catch_unwind(AssertUnwindSafe(|| simulator::run(seed, options, trace)))
        .map_err(|payload| words(&*payload))
}

fn words(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().cloned();
    text.or_else(|| payload.downcast_ref::<&str>().map(|it| (*it).to_owned())).unwrap_or_default()
}

fn report_progress(done: &AtomicU64, seeds: u64, failure: &Mutex<Option<u64>>) {
    let every = if std::io::stderr().is_terminal() { 1 } else { 30 };
    let mut last = Instant::now();
    loop {
        let count = done.load(Ordering::Relaxed);
        if seeds <= count || failure.lock().expect("no panic under it").is_some() {
            return;
        }
        if Duration::from_secs(every) <= last.elapsed() {
            last = Instant::now();
            eprintln!("simulate: {count} of {seeds} schedules");
        }
        thread::park_timeout(Duration::from_millis(20));
    }
}

fn report_failure(seed: u64, options: Options) -> ExitCode {
    let mut trace = Trace::recording();
    let message = attempt(seed, options, &mut trace).expect_err("a seed fails every time");
    for line in trace.lines() {
        println_all(line);
    }
    println_all(&format!("seed {seed} fails: {message}"));
    ExitCode::FAILURE
}

fn print_trace(order: Order) -> ExitCode {
    let mut trace = Trace::recording();
    panic::set_hook(Box::new(|_| {}));
    let outcome = attempt(order.first_seed, Options { faults: order.faults, mischief: None }, &mut trace);
    for line in trace.lines() {
        println_all(line);
    }
    match outcome {
        Ok(summary) => {
            println_all(&summary.to_string());
            ExitCode::SUCCESS
        }
        Err(message) => {
            println_all(&format!("seed {} fails: {message}", order.first_seed));
            ExitCode::FAILURE
        }
    }
}

fn println_all(line: &str) {
    // A reader that has seen enough has closed its end.
    let _ = writeln!(std::io::stdout(), "{line}");
}
