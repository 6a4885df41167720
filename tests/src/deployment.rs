//! A `tidemill serve` with its workers, started for one test and ended with it.
//!
//! Workers are found as a person would find them, by their role in the process list, so that the tests also hold
//! `serve` to that promise.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, Once};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use rustix::process::{Pid, Signal, kill_process};

use crate::client::Client;

/// A running front end and its workers.
#[derive(Debug)]
pub struct Deployment {
    process: Child,
    log: Arc<Mutex<Vec<(Instant, String)>>>,
    /// A client for it.
    pub client: Client,
}

/// A worker process, as the process list shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerProcess(Pid);

impl Deployment {
    /// Runs `tidemill serve --port 0 …` and waits until it is ready.
    ///
    /// # Panics
    ///
    /// When it is not ready within [`START_LIMIT`]; the message has its log.
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_with(arguments, &[])
    }

    /// The same with environment variables.
    pub fn start_with(arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        Self::run("serve", arguments, environment)
    }

    /// Runs `tidemill route --port 0 …`: another front end, over some of the workers of a deployment that lives longer.
    ///
    /// # Panics
    ///
    /// As [`start`](Self::start).
    pub fn route(workers: &[String]) -> Self {
        Self::run("route", &["--workers", &workers.join(",")], &[])
    }

    fn run(command: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        let mut process = Command::new(binary())
            .args([command, "--port", "0"])
            .args(arguments)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let log = Arc::new(Mutex::new(Vec::new()));
        let (lines, banner) = channel();
        let stdout = process.stdout.take().expect("piped above");
        let stderr = process.stderr.take().expect("piped above");
        for pipe in [Box::new(stdout) as Box<dyn std::io::Read + Send>, Box::new(stderr)] {
            let (log, lines) = (Arc::clone(&log), lines.clone());
            thread::spawn(move || {
                for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                    log.lock().expect("no test thread panics with it").push((Instant::now(), line.clone()));
                    let _ = lines.send(line); // Nobody listens once the address is known.
                }
            });
        }
        drop(lines);
        let address = wait_for_address(&banner);
        let Some(address) = address else {
            let _ = process.kill();
            let _ = process.wait();
            panic!("no address from `tidemill {command} {}`:\n{}", arguments.join(" "), text(&log));
        };
        Self { process, log, client: Client::new(&address) }
    }

    /// Everything it has printed so far.
    pub fn log(&self) -> String {
        text(&self.log)
    }

    /// Where routers reach its workers whose names begin with `role`, as its log tells.
    pub fn addresses(&self, role: &str) -> Vec<String> {
        let log = self.log();
        let serves = log.lines().filter(|line| line.contains("worker serves"));
        let words = |line: &str, key: &str| {
            line.split_whitespace().find_map(|word| word.strip_prefix(key)).map(str::to_owned)
        };
        let ours = serves.filter(|line| words(line, "worker=").is_some_and(|name| name.starts_with(role)));
        ours.filter_map(|line| words(line, "address=")).collect()
    }

    /// When it last printed a line with `words` in it.
    pub fn last_said(&self, words: &str) -> Option<Instant> {
        let log = self.log.lock().expect("no test thread panics with the log");
        log.iter().rev().find(|(_, line)| line.contains(words)).map(|(at, _)| *at)
    }

    /// Its workers of `role` ("prefill", "decode", "hybrid") that live now.
    pub fn workers(&self, role: &str) -> Vec<WorkerProcess> {
        let children = format!("/proc/{0}/task", self.process.id());
        let tasks =
            fs::read_dir(children).map(|tasks| tasks.flatten().collect()).unwrap_or_else(|_| Vec::new());
        tasks
            .iter()
            .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
            .flat_map(|pids| pids.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
            .filter(|pid| {
                let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let command = String::from_utf8_lossy(&command).replace('\0', " ");
                command.contains(" worker ") && command.contains(&format!("--role {role}"))
            })
            .filter_map(|pid| Some(WorkerProcess(Pid::from_raw(pid.parse().ok()?)?)))
            .collect()
    }

    /// Resident memory of all its processes, in bytes.
    pub fn resident_bytes(&self) -> u64 {
        let own = self.process.id().to_string();
        let workers = ["prefill", "decode", "hybrid"].into_iter().flat_map(|role| self.workers(role));
        let workers = workers.map(|worker| worker.0.as_raw_nonzero().to_string());
        workers.chain([own]).map(|pid| resident(&pid)).sum()
    }

    /// Sends SIGTERM, which lets it finish what runs.
    pub fn ask_to_end(&self) {
        kill_process(Pid::from_child(&self.process), Signal::TERM).expect("it is our child");
    }

    /// Waits for its end and returns its exit code, or nothing if a signal ended it.
    pub fn exit_code(mut self) -> Option<i32> {
        self.process.wait().expect("it is our child").code()
    }
}

impl WorkerProcess {
    /// The cores on which its thread that computes may run.
    ///
    /// # Panics
    ///
    /// When it has no such thread.
    pub fn engine_cores(self) -> BTreeSet<usize> {
        let threads = fs::read_dir(format!("/proc/{}/task", self.0.as_raw_nonzero())).expect("it lives");
        let engine = threads.flatten().map(|thread| thread.path()).find(|thread| {
            fs::read_to_string(thread.join("comm")).is_ok_and(|name| name.trim_end() == "engine")
        });
        let status = engine.expect("a thread of that name").join("status");
        let status = fs::read_to_string(status).expect("the thread lives");
        let cores = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        let number = |word: &str| word.trim().parse::<usize>().expect("a core's number");
        let ranges = cores.expect("the kernel lists them").split(',');
        ranges
            .flat_map(|range| {
                let (first, last) = range.split_once('-').unwrap_or((range, range));
                number(first)..=number(last)
            })
            .collect()
    }

    /// Lets it neither compute nor speak until [`wake`](Self::wake).
    pub fn freeze(self) {
        kill_process(self.0, Signal::STOP).expect("the worker lives and is ours");
    }

    /// Undoes [`freeze`](Self::freeze).
    pub fn wake(self) {
        kill_process(self.0, Signal::CONT).expect("the worker lives and is ours");
    }

    /// Ends it as the kernel would when memory runs out.
    pub fn kill(self) {
        kill_process(self.0, Signal::KILL).expect("the worker lives and is ours");
    }
}

impl Drop for Deployment {
    fn drop(&mut self) {
        if self.process.try_wait().ok().flatten().is_none() {
            let _ = kill_process(Pid::from_child(&self.process), Signal::TERM);
            let deadline = Instant::now() + STOP_LIMIT;
            while self.process.try_wait().ok().flatten().is_none() && Instant::now() < deadline {
                thread::park_timeout(Duration::from_millis(5)); // A child's end has no event without unsafe code.
            }
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
        if thread::panicking() {
            eprintln!("--- log of the deployment ---\n{}", self.log());
        }
    }
}

/// Waits for `condition`, which must come true within `limit`.
///
/// # Panics
///
/// When it does not; `what` says what was waited for.
pub async fn eventually<F: Future<Output = bool>>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> F,
) {
    let deadline = Instant::now() + limit;
    while !condition().await {
        assert!(Instant::now() < deadline, "still not after {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The binary under test, in the profile that the tests run in.
pub fn binary() -> PathBuf {
    static BUILD: Once = Once::new();
    let program = env::current_exe().expect("a program has a path");
    let folder = program.parent().expect("target/PROFILE, or target/PROFILE/deps for a test");
    let profile = if folder.ends_with("deps") { folder.parent().expect("target/PROFILE") } else { folder };
    let path = profile.join("tidemill");
    BUILD.call_once(|| {
        // `cargo test --workspace` has built it; `cargo test -p tidemill-tests` alone has not.
        if is_out_of_date(&path) {
            let mut build = Command::new(env!("CARGO"));
            build.args(["build", "--package", "tidemill", "--bin", "tidemill"]);
            if profile.ends_with("release") {
                build.arg("--release");
            }
            assert!(build.status().expect("cargo runs").success(), "the binary does not build");
        }
    });
    path
}

/// Whether the program is missing, or older than a source file that it was made of. `cargo build` lists those beside it;
/// where there is no list, `cargo test` of the whole workspace has made it, a moment ago.
fn is_out_of_date(program: &Path) -> bool {
    let modified = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified());
    let Ok(built) = modified(program) else { return true };
    let list = fs::read_to_string(program.with_extension("d")).unwrap_or_default();
    let sources = list.split_once(':').map_or("", |(_, sources)| sources);
    sources.split_whitespace().any(|source| modified(Path::new(source)).is_ok_and(|changed| changed > built))
}

fn wait_for_address(lines: &Receiver<String>) -> Option<String> {
    let deadline = Instant::now() + START_LIMIT;
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                if let Some(start) = line.find("http://127.0.0.1:")
                    && let Some(end) = line[start..].find("/v1")
                {
                    return Some(line[start..start + end].to_owned());
                }
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return None,
        }
    }
}

fn text(log: &Mutex<Vec<(Instant, String)>>) -> String {
    let log = log.lock().expect("no test thread panics with the log");
    log.iter().map(|(_, line)| format!("{line}\n")).collect()
}

fn resident(pid: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// A debug binary on a loaded machine may take this long.
const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(10);
