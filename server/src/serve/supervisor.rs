//! Keeps worker processes alive.
//!
//! A worker that ends is started again after a pause that grows while it keeps failing. One that fails before it ever
//! served is a mistake in the settings: then `serve` ends with its message instead of trying for ever. Workers end when
//! their stdin is let go of, also when this process is killed.

use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use tidemill_engine::handle::Role;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStderr, Command};
use tokio::sync::{Mutex, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;
use crate::report::Report;
use crate::router::Slot;

/// What a worker is started with.
#[derive(Clone, Debug)]
pub(super) struct WorkerPlan {
    pub(super) name: String,
    pub(super) role: Role,
    pub(super) arguments: Vec<String>,
}

/// All workers of this process.
#[derive(Debug)]
pub(super) struct Supervisor {
    stopped: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
    failures: Mutex<mpsc::Receiver<anyhow::Error>>,
}

/// One worker's keeper.
struct Keeper {
    plan: WorkerPlan,
    address: watch::Sender<Option<String>>,
    failures: mpsc::Sender<anyhow::Error>,
    bars: MultiProgress,
    metrics: Arc<Metrics>,
    stopped: CancellationToken,
}

impl Supervisor {
    /// Starts all workers. Returns where they will be found.
    pub(super) fn start(
        plans: Vec<WorkerPlan>,
        bars: &MultiProgress,
        metrics: &Arc<Metrics>,
    ) -> (Self, Vec<Slot>) {
        let stopped = CancellationToken::new();
        let (failures, failed) = mpsc::channel(plans.len().max(1));
        let (tasks, slots) = plans
            .into_iter()
            .map(|plan| {
                let (address, receiver) = watch::channel(None);
                let slot = Slot { name: plan.name.clone(), role: plan.role, address: receiver };
                let keeper = Keeper {
                    plan,
                    address,
                    failures: failures.clone(),
                    bars: bars.clone(),
                    metrics: Arc::clone(metrics),
                    stopped: stopped.clone(),
                };
                (tokio::spawn(keeper.keep()), slot)
            })
            .unzip();
        (Self { stopped, tasks, failures: Mutex::new(failed) }, slots)
    }

    /// Waits for a worker that failed before it ever served.
    pub(super) async fn first_failure(&self) -> anyhow::Error {
        match self.failures.lock().await.recv().await {
            Some(failure) => failure,
            None => std::future::pending().await,
        }
    }

    /// Ends all workers and waits for them.
    pub(super) async fn stop(self) {
        self.stopped.cancel();
        futures::future::join_all(self.tasks).await;
    }
}

impl Keeper {
    async fn keep(self) {
        let mut has_served = false;
        let mut pause = RESTART_FIRST;
        loop {
            let started = Instant::now();
            let outcome = tokio::select! {
                outcome = self.run_once(&mut has_served) => outcome,
                () = self.stopped.cancelled() => return,
            };
            self.address.send_replace(None);
            let why = outcome.unwrap_or_else(|error| error.to_string());
            if !has_served {
                let failure = anyhow::anyhow!("worker {} cannot start: {why}", self.plan.name);
                let _ = self.failures.send(failure).await;
                return;
            }
            pause = if STABLE < started.elapsed() { RESTART_FIRST } else { (pause * 2).min(RESTART_LAST) };
            tracing::warn!(worker = %self.plan.name, why, pause_ms = pause.as_millis(), "worker died: starting it again");
            self.metrics.record_worker_restart(&self.plan.name);
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.stopped.cancelled() => return,
            }
        }
    }

    /// One life of the worker. Returns how it ended; ends it when dropped.
    async fn run_once(&self, has_served: &mut bool) -> anyhow::Result<String> {
        // Killed when dropped: a worker has nothing to save, its requests were drained before.
        let mut life = self.spawn()?;
        let stdout = life.stdout.take().expect("piped when spawned");
        let mut lines = BufReader::new(stdout).lines();
        let stderr = life.stderr.take().expect("piped when spawned");
        let last_words = tokio::spawn(pass_on(stderr, self.bars.clone()));
        let mut loading = Loading::default();
        while let Some(line) = lines.next_line().await? {
            match serde_json::from_str(&line) {
                Ok(Report::Ready { address }) => {
                    *has_served = true;
                    loading.end();
                    tracing::info!(worker = %self.plan.name, %address, pid = life.id(), "worker serves");
                    self.address.send_replace(Some(address.to_string()));
                }
                Ok(Report::Progress { stage, done, total }) => {
                    loading.show(&self.plan.name, &self.bars, &stage, done, total);
                }
                Err(_) => tracing::info!(worker = %self.plan.name, "{line}"),
            }
        }
        loading.end();
        let status = life.wait().await?;
        let last_words = last_words.await.ok().flatten();
        Ok(last_words.unwrap_or_else(|| status.to_string()))
    }

    fn spawn(&self) -> anyhow::Result<Child> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(&self.plan.arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A signal from the terminal is for this process, which tells the workers when it is time.
            .process_group(0)
            .kill_on_drop(true);
        // Settings come as arguments; a variable meant for this process must not contradict them.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("TIDEMILL_") {
                command.env_remove(name);
            }
        }
        Ok(command.spawn()?)
    }
}

/// What a person sees of a worker that loads.
#[derive(Default)]
struct Loading {
    stage: String,
    /// One for each stage, made by `bars` so that log lines can make room for it.
    bar: Option<ProgressBar>,
}

impl Loading {
    fn show(&mut self, worker: &str, bars: &MultiProgress, stage: &str, done: u64, total: u64) {
        if self.stage != stage {
            self.end();
            stage.clone_into(&mut self.stage);
            if bars.is_hidden() {
                tracing::info!(worker, stage, total, "starting");
            } else {
                let style = ProgressStyle::with_template("{msg:<32!} {wide_bar} {bytes}/{total_bytes}")
                    .expect("the template is well formed");
                let bar =
                    ProgressBar::new(total).with_style(style).with_message(format!("{worker}: {stage}"));
                self.bar = Some(bars.add(bar));
            }
        }
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        }
    }

    fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        self.end();
    }
}

/// Shows what a worker logs without tearing the bars. What it says about its own end is returned instead.
async fn pass_on(stderr: ChildStderr, bars: MultiProgress) -> Option<String> {
    let mut lines = BufReader::new(stderr).split(b'\n');
    let mut last_words = None;
    while let Ok(Some(line)) = lines.next_segment().await {
        let line = String::from_utf8_lossy(&line);
        match line.strip_prefix("error: ") {
            Some(error) => last_words = Some(error.to_owned()),
            None => bars.suspend(|| eprintln!("{line}")),
        }
    }
    last_words
}

const RESTART_FIRST: Duration = Duration::from_millis(50);
const RESTART_LAST: Duration = Duration::from_secs(10);
/// A worker that has lived this long did not die of its settings.
const STABLE: Duration = Duration::from_secs(30);
