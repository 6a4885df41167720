//! Two virtual machines joined by wires, as `tests/rdma/run-pair` starts them: processes on either, and what the wires
//! do to their frames.
//!
//! A test runs on the first host and starts its processes on both through an agent (`tests/rdma/guest/agent`), which is
//! reached over a wire of its own that no test cuts.

use std::env;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::fixtures::tests_folder;

/// The two hosts, for one test at a time: what a test does to a wire all others would feel.
#[derive(Debug)]
pub struct Pair {
    _alone: MutexGuard<'static, ()>,
}

/// The second host while it is without power. It comes up again when this is dropped.
#[derive(Debug)]
pub struct Crashed<'a> {
    _pair: &'a Pair,
}

/// One of the hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// Where the test runs.
    First,
    /// The other one.
    Second,
}

/// A process on one of the hosts. Killed when dropped.
#[derive(Debug)]
pub struct HostProcess {
    what: String,
    connection: TcpStream,
    log: Arc<Mutex<String>>,
    lines: Receiver<Output>,
    status: Option<i32>,
}

#[derive(Debug)]
enum Output {
    Line(String),
    Status(i32),
}

impl Pair {
    /// Both hosts, as soon as no other test has them, with whole wires.
    ///
    /// # Panics
    ///
    /// Where there is no second host.
    pub fn take() -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        assert!(
            env::var_os("RDMA_VM_PEER").is_some(),
            "this test needs two hosts with RDMA devices: CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER=tests/rdma/run-pair"
        );
        // A test that failed has poisoned nothing: what it did to the wires is undone here.
        let pair = Self { _alone: ALONE.lock().unwrap_or_else(PoisonError::into_inner) };
        pair.restore();
        pair
    }

    /// From now on every frame on all wires is lost without a word, in both directions.
    pub fn cut(&self) {
        self.wires(&WIRES, &["cut"]);
    }

    /// The same on one wire, the one between the devices of that number.
    pub fn cut_wire(&self, number: usize) {
        self.wires(&WIRES[number..=number], &["cut"]);
    }

    /// Makes the wires whole again.
    pub fn restore(&self) {
        self.wires(&WIRES, &["restore"]);
    }

    /// Ends the second host as a loss of power does: its machine is killed, and nothing there closes a connection.
    pub fn crash_second(&self) -> Crashed<'_> {
        wish("crash");
        Crashed { _pair: self }
    }

    /// What `tc-netem` calls by these words happens to every frame on all wires: `["delay", "5ms"]`.
    pub fn worsen(&self, how: &[&str]) {
        self.wires(&WIRES, &[&["netem"], how].concat());
    }

    fn wires(&self, numbers: &[&str], what: &[&str]) {
        let tool = tests_folder().join("rdma/guest/wire");
        let tool = tool.to_str().expect("the repository's path is UTF-8");
        for host in Host::BOTH {
            for wire in numbers {
                host.run(&[&[tool, *wire], what].concat());
            }
        }
    }
}

impl Drop for Crashed<'_> {
    fn drop(&mut self) {
        wish("start");
    }
}

/// Has something done to the second host's machine by `tests/rdma/run-pair`, which takes the file away when it is done.
fn wish(name: &str) {
    let folder = env::var_os("RDMA_VM_WISHES").expect("set on hosts of a pair");
    let (path, draft) = (Path::new(&folder).join(name), Path::new(&folder).join(format!("{name}.draft")));
    // Not under its name at once: making a file is two requests to the host where its folder is a network file system,
    // and a wish that is granted between them is gone when the second one asks for it.
    fs::write(&draft, "").expect("that folder can be written to");
    fs::rename(&draft, &path).expect("that folder can be written to");
    let deadline = Instant::now() + START_LIMIT;
    while path.exists() && Instant::now() < deadline {
        thread::park_timeout(Duration::from_millis(5));
    }
    assert!(!path.exists() || thread::panicking(), "run-pair does not grant `{name}`");
}

impl Host {
    /// Both of them.
    pub const BOTH: [Self; 2] = [Self::First, Self::Second];

    /// Its address on the first wire.
    pub fn address(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, self.number())
    }

    /// Its address on the wire that is never cut.
    pub fn management_address(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 78, 0, self.number())
    }

    /// Starts a program; its first word is a path, or a name to be searched for.
    ///
    /// # Panics
    ///
    /// When the host's agent does not answer.
    pub fn start(self, command: &[&str]) -> HostProcess {
        let what = format!("{self:?}: {}", command.join(" "));
        let mut connection = self.connect().unwrap_or_else(|error| panic!("{what}: no agent: {error}"));
        let request = json!({"command": command});
        writeln!(connection, "{request}").expect("the agent reads");
        let reader = BufReader::new(connection.try_clone().expect("a socket can be cloned"));
        let log = Arc::new(Mutex::new(String::new()));
        let (sender, lines) = channel();
        let kept = Arc::clone(&log);
        thread::spawn(move || {
            for answer in reader.lines().map_while(Result::ok) {
                let answer: Value = serde_json::from_str(&answer).expect("the agent speaks JSON");
                let output = match answer["status"].as_i64() {
                    Some(status) => Output::Status(i32::try_from(status).expect("a status is small")),
                    None => Output::Line(answer["line"].as_str().unwrap_or("").to_owned()),
                };
                if let Output::Line(line) = &output {
                    kept.lock().expect("nobody panics with the log").push_str(&format!("{line}\n"));
                }
                let _ = sender.send(output); // The test may be done with it.
            }
        });
        HostProcess { what, connection, log, lines, status: None }
    }

    /// Runs a program to its end and returns what it printed.
    ///
    /// # Panics
    ///
    /// When it fails.
    pub fn run(self, command: &[&str]) -> String {
        let mut process = self.start(command);
        let status = process.wait(START_LIMIT);
        assert_eq!(status, Some(0), "{}:\n{}", process.what, process.log());
        process.log()
    }

    /// Packets that its RDMA devices have sent so far, by the kernel's own count.
    pub fn rdma_packets_sent(self) -> u64 {
        self.sum("/sys/class/infiniband/*/ports/1/hw_counters/sent_pkts")
    }

    /// The same, of the device on that wire alone.
    pub fn rdma_packets_sent_on(self, wire: usize) -> u64 {
        self.sum(&format!("/sys/class/infiniband/rxe{wire}/ports/1/hw_counters/sent_pkts"))
    }

    /// Bytes that have come over a wire so far.
    pub fn bytes_received_on(self, wire: usize) -> u64 {
        let device = if env::var_os("RDMA_VM").is_some_and(|kind| kind == "uml") { "vec" } else { "eth" };
        self.sum(&format!("/sys/class/net/{device}{wire}/statistics/rx_bytes"))
    }

    /// The sum of the kernel's counters at these paths.
    fn sum(self, paths: &str) -> u64 {
        let counters = self.run(&["sh", "-c", &format!("cat {paths}")]);
        counters.lines().map(|count| count.parse::<u64>().expect("a counter is a number")).sum()
    }

    fn number(self) -> u8 {
        match self {
            Self::First => 1,
            Self::Second => 2,
        }
    }

    /// Agents start beside the test.
    fn connect(self) -> io::Result<TcpStream> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let attempt =
                TcpStream::connect_timeout(&(self.management_address(), AGENT_PORT).into(), START_LIMIT);
            match attempt {
                Err(_) if Instant::now() < deadline => thread::park_timeout(Duration::from_millis(50)),
                _ => return attempt,
            }
        }
    }
}

impl HostProcess {
    /// Waits for a line that has `part` in it, and returns what follows `part` as far as the next blank.
    ///
    /// # Panics
    ///
    /// When it ends first, or no such line comes in time; the message has its output.
    pub fn wait_for(&mut self, part: &str) -> String {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Output::Line(line)) => {
                    if let Some((_, rest)) = line.split_once(part) {
                        return rest.split_whitespace().next().unwrap_or("").to_owned();
                    }
                }
                Ok(Output::Status(status)) => {
                    self.status = Some(status);
                    panic!("{} ended with {status} before it printed `{part}`:\n{}", self.what, self.log());
                }
                Err(_) => {
                    panic!("{} did not print `{part}` within {START_LIMIT:?}:\n{}", self.what, self.log())
                }
            }
        }
    }

    /// Ends it as the kernel would when memory runs out.
    pub fn kill(&mut self) {
        let signal = json!({"signal": 9});
        writeln!(self.connection, "{signal}").expect("the agent reads");
        let status = self.wait(START_LIMIT);
        assert_eq!(status, Some(-9), "{} was to be killed", self.what);
    }

    /// Its status, negative after a signal; `None` if it goes on for longer than `limit`.
    pub fn wait(&mut self, limit: Duration) -> Option<i32> {
        let deadline = Instant::now() + limit;
        while self.status.is_none() {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Output::Line(_)) => {}
                Ok(Output::Status(status)) => self.status = Some(status),
                Err(RecvTimeoutError::Timeout) => return None,
                Err(RecvTimeoutError::Disconnected) => panic!("{}: its agent is gone", self.what),
            }
        }
        self.status
    }

    /// Everything it has printed so far.
    pub fn log(&self) -> String {
        self.log.lock().expect("nobody panics with the log").clone()
    }
}

impl Drop for HostProcess {
    fn drop(&mut self) {
        let _ = self.connection.shutdown(Shutdown::Both); // The agent kills it.
        if thread::panicking() {
            eprintln!("--- {} ---\n{}", self.what, self.log());
        }
    }
}

/// The binary under test, which both hosts find at the same path.
///
/// # Panics
///
/// When it has not been built: a host's files are read-only.
pub fn binary() -> PathBuf {
    let path = env::current_exe().expect("a test has a path");
    let path = path.ancestors().nth(2).expect("target/PROFILE/deps/test").join("tidemill");
    assert!(path.exists(), "{} is not there; `cargo build -p tidemill` makes it", path.display());
    path
}

/// Those that are not for the agents, as `tests/rdma/guest/wire` numbers them.
const WIRES: [&str; 2] = ["0", "1"];
/// Port of `tests/rdma/guest/agent`.
const AGENT_PORT: u16 = 7;
/// A debug binary in an emulated machine on a loaded host may take this long.
const START_LIMIT: Duration = Duration::from_secs(60);
