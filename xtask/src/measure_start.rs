//! How long `tidemill serve` takes from its start to the first answer, and how much memory it holds while it waits.
//!
//! Measured from outside, on the release build and the demo model: a process is started, its banner read, a question
//! asked over HTTP. Memory is what the kernel says of each process in `smaps_rollup`: *resident* counts every page
//! that a process has mapped, the *proportional share* divides pages among those that map them, so that only the latter
//! can be added up.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

/// One start.
#[derive(Clone, Debug)]
struct Sample {
    banner: Duration,
    answer: Duration,
    /// Name, resident KiB and proportional KiB of each process, the front end first.
    processes: Vec<(String, u64, u64)>,
}

/// Builds for release. Returns the binary.
///
/// # Errors
///
/// When the build fails.
pub fn build(root: &Path) -> anyhow::Result<PathBuf> {
    let build =
        Command::new(env!("CARGO")).args(["build", "--release", "--quiet"]).current_dir(root).status()?;
    ensure!(build.success(), "the release build failed");
    Ok(root.join("target/release/tidemill"))
}

/// Measures each shape several times, and prints a table.
///
/// # Errors
///
/// When the server does not start or answers wrongly.
#[expect(clippy::print_stdout, reason = "the table is what the chore is for")]
pub fn print(binary: &Path) -> anyhow::Result<()> {
    println!("| | to the banner | to the first answer | resident, per process | proportional, all |");
    println!("|---|---|---|---|---|");
    for (name, flags) in SHAPES {
        let samples: Vec<Sample> =
            (0..RUNS).map(|_| measure(binary, flags)).collect::<anyhow::Result<_>>().context(*name)?;
        let banner = median(samples.iter().map(|it| it.banner));
        let answer = median(samples.iter().map(|it| it.answer));
        let worst = samples.iter().map(|it| it.answer).max().unwrap_or_default();
        let mut by_memory = samples;
        by_memory.sort_by_key(Sample::proportional);
        let typical = &by_memory[by_memory.len() / 2];
        let each: Vec<String> = typical
            .processes
            .iter()
            .map(|(name, resident, _)| format!("{name} {}", mebibytes(*resident)))
            .collect();
        println!(
            "| {name} | {:.2} s | {:.2} s (at most {:.2} s) | {} | {} |",
            banner.as_secs_f64(),
            answer.as_secs_f64(),
            worst.as_secs_f64(),
            each.join(", "),
            mebibytes(typical.proportional())
        );
    }
    println!("\nMedians of {RUNS} starts; memory {} s after the first answer.", IDLE.as_secs());
    Ok(())
}

impl Sample {
    fn proportional(&self) -> u64 {
        self.processes.iter().map(|(_, _, proportional)| proportional).sum()
    }
}

fn measure(binary: &Path, flags: &[&str]) -> anyhow::Result<Sample> {
    let started = Instant::now();
    let mut server = Command::new(binary)
        .args(["serve", "--port", "0", "--log-level", "error"])
        .args(flags)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let sample = observe(&mut server, started);
    kill_process(Pid::from_child(&server), Signal::TERM)?;
    let status = server.wait()?;
    let sample = sample?;
    ensure!(status.success(), "the server ended with {status}");
    Ok(sample)
}

#[expect(clippy::disallowed_methods, reason = "idle memory is what is there after a while without work")]
fn observe(server: &mut Child, started: Instant) -> anyhow::Result<Sample> {
    let stdout = server.stdout.take().context("stdout was piped")?;
    let mut lines = BufReader::new(stdout).lines();
    let address = loop {
        let line = lines.next().context("the server ended without a banner")??;
        if let Some((_, rest)) = line.split_once("http://")
            && let Some((address, _)) = rest.split_once("/v1")
        {
            break address.to_owned();
        }
    };
    let banner = started.elapsed();
    let reply = ask(&address)?;
    let answer = started.elapsed();
    ensure!(reply.contains("12"), "7 + 5 is not in {reply}");
    // Nothing else may be in the pipe's way while memory is looked at.
    thread::spawn(move || lines.for_each(drop));
    thread::sleep(IDLE);
    let own = server.id();
    let mut processes = vec![("front end".to_owned(), own)];
    for child in children(own)? {
        processes.push((role(child)?, child));
    }
    let memory = |(name, pid): (String, u32)| {
        let (resident, proportional) = memory(pid)?;
        Ok((name, resident, proportional))
    };
    let processes = processes.into_iter().map(memory).collect::<anyhow::Result<_>>()?;
    Ok(Sample { banner, answer, processes })
}

fn ask(address: &str) -> anyhow::Result<String> {
    let body = r#"{"messages": [{"role": "user", "content": "What is 7 + 5?"}], "temperature": 0}"#;
    let mut connection = TcpStream::connect(address)?;
    write!(
        connection,
        "POST /v1/chat/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )?;
    let mut reply = String::new();
    connection.read_to_string(&mut reply)?;
    match reply.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 200") => Ok(body.to_owned()),
        _ => bail!("not an answer: {reply}"),
    }
}

fn children(pid: u32) -> anyhow::Result<Vec<u32>> {
    let mut found = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(task?.path().join("children"))?;
        found.extend(text.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
    }
    found.sort_unstable();
    Ok(found)
}

/// What follows `--role` on a worker's command line.
fn role(pid: u32) -> anyhow::Result<String> {
    let command = fs::read_to_string(format!("/proc/{pid}/cmdline"))?;
    let mut words = command.split('\0').skip_while(|word| *word != "--role");
    Ok(words.nth(1).context("a child without a role")?.to_owned())
}

/// Resident and proportional KiB.
fn memory(pid: u32) -> anyhow::Result<(u64, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let field = |name: &str| -> anyhow::Result<u64> {
        let line =
            text.lines().find_map(|line| line.strip_prefix(name)).context("a field of smaps_rollup")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    };
    Ok((field("Rss:")?, field("Pss:")?))
}

fn median(values: impl Iterator<Item = Duration>) -> Duration {
    let mut values: Vec<Duration> = values.collect();
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or_default()
}

fn mebibytes(kibibytes: u64) -> String {
    format!("{} MiB", kibibytes.div_ceil(1024))
}

const SHAPES: &[(&str, &[&str])] = &[("prefill and decode", &[]), ("`--colocated`", &["--colocated"])];
const RUNS: usize = 5;
const IDLE: Duration = Duration::from_secs(2);
