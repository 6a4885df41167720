//! What `/metrics` says, and the only place that knows the names.
//!
//! One value per front end instead of the process-wide recorder, so that tests stay apart. Names that dashboards of
//! vLLM read are kept (`vllm:*`, labels `model_name` and `engine`, the latter being the worker's name where a worker
//! is meant); what vLLM has no name for is `tidemill_*`. Workers report sums since their own start, so their counters
//! grow here by differences: a restarted worker starts again at zero and ours must not.

mod links;
mod names;
mod request;
mod worker;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use metrics::{Counter, Histogram, counter, gauge, histogram, with_local_recorder};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use tidemill_engine::handle::{Counters, CreditLoad, Ledger, Role};
use tidemill_engine_core::journey::FALLBACKS;

use self::worker::WorkerSeries;

pub(crate) use request::{Outcome, RequestRecord};

/// All metrics of one front end.
pub(crate) struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    model: String,
    requests: Requests,
    /// By name.
    workers: Mutex<BTreeMap<String, WorkerSeries>>,
    observations: AtomicU64,
}

/// Handles of what is recorded for each request, looked up once.
struct Requests {
    prompt_tokens: Counter,
    generation_tokens: Counter,
    success: [(Outcome, Counter); 4],
    request_prompt_tokens: Histogram,
    request_generation_tokens: Histogram,
    time_to_first_token: Histogram,
    inter_token_latency: Histogram,
    e2e_latency: Histogram,
    queue_time: Histogram,
    prefill_time: Histogram,
    decode_time: Histogram,
    inference_time: Histogram,
    params_n: Histogram,
    params_max_tokens: Histogram,
}

/// A worker's state, as it told the router.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WorkerStatusSnapshot<'a> {
    /// The worker's name.
    pub(crate) worker: &'a str,
    /// Its role.
    pub(crate) role: Role,
    /// The number of this start of the worker.
    pub(crate) instance: u64,
    /// Sequences that compute.
    pub(crate) running: u32,
    /// Requests that wait.
    pub(crate) waiting: u32,
    /// Where its blocks are.
    pub(crate) ledger: Ledger,
    /// Sums since its start.
    pub(crate) counters: Counters,
    /// What peers may send to it, and what waits for leave.
    pub(crate) credit: CreditLoad,
}

impl Metrics {
    /// Metrics of a front end that serves `model`.
    pub(crate) fn new(model: &str) -> Self {
        let mut builder = PrometheusBuilder::new();
        for &(name, buckets) in names::BUCKETS {
            builder = builder
                .set_buckets_for_metric(Matcher::Full(name.to_owned()), buckets)
                .expect("no list of buckets is empty");
        }
        let recorder = builder.build_recorder();
        let handle = recorder.handle();
        let requests = with_local_recorder(&recorder, || {
            names::describe();
            // A counter that appears with its first event is missed by whoever looks for a rise.
            for reason in FALLBACKS.into_iter().chain([TRANSPORT_FALLBACK]) {
                counter!(names::FALLBACKS, "reason" => reason).absolute(0);
            }
            for reason in REFUSALS {
                counter!(names::REFUSALS, "reason" => reason).absolute(0);
            }
            drop(histogram!(names::RECOVERY));
            Requests::register(model)
        });
        let model = model.to_owned();
        let (workers, observations) = (Mutex::default(), AtomicU64::new(0));
        Self { recorder, handle, model, requests, workers, observations }
    }

    /// The text that Prometheus reads.
    pub(crate) fn render(&self) -> String {
        self.handle.render()
    }

    /// Records what a living worker reported.
    pub(crate) fn record_worker_status(&self, status: &WorkerStatusSnapshot<'_>) {
        let mut workers = self.workers();
        let known = workers.get_mut(status.worker).filter(|it| it.is_of(status.role));
        let series = match known {
            Some(series) => series,
            None => {
                let last = workers.remove(status.worker).map(WorkerSeries::into_last);
                let series = with_local_recorder(&self.recorder, || {
                    WorkerSeries::register(&self.model, status.worker, status.role, last)
                });
                workers.entry(status.worker.to_owned()).or_insert(series)
            }
        };
        let accepted_at = series.record(status);
        drop(workers);
        for (place, value) in accepted_at {
            let (model, engine) = (self.model.clone(), status.worker.to_owned());
            let place = place.to_string();
            with_local_recorder(&self.recorder, || {
                counter!(
                    names::SPECULATION_ACCEPTED_AT,
                    "model_name" => model, "engine" => engine, "position" => place
                )
                .increment(value);
            });
        }
    }

    /// Records that a worker is gone; its gauges say so until it reports again.
    pub(crate) fn record_worker_down(&self, worker: &str, role: Role) {
        with_local_recorder(&self.recorder, || {
            gauge!(names::WORKER_UP, "worker" => worker.to_owned(), "role" => role.as_str()).set(0.0);
            let (model, engine) = (self.model.clone(), worker.to_owned());
            gauge!(names::RUNNING, "model_name" => model.clone(), "engine" => engine.clone()).set(0.0);
            gauge!(names::WAITING, "model_name" => model, "engine" => engine).set(0.0);
        });
    }

    /// Records that a dead worker was started again.
    pub(crate) fn record_worker_restart(&self, worker: &str) {
        with_local_recorder(&self.recorder, || {
            counter!(names::WORKER_RESTARTS, "worker" => worker.to_owned()).increment(1);
        });
    }

    /// Records how many ranks a worker has, once it is known.
    pub(crate) fn record_ranks(&self, worker: &str, ranks: u32) {
        with_local_recorder(&self.recorder, || {
            gauge!(names::WORKER_RANKS, "worker" => worker.to_owned()).set(f64::from(ranks));
        });
    }

    /// Records how a worker's cache is made, once it is known.
    pub(crate) fn record_cache_config(&self, worker: &str, block_len: u32, blocks: u32) {
        with_local_recorder(&self.recorder, || {
            gauge!(
                names::CACHE_CONFIG,
                "model_name" => self.model.clone(),
                "engine" => worker.to_owned(),
                "block_size" => block_len.to_string(),
                "num_gpu_blocks" => blocks.to_string(),
            )
            .set(1.0);
        });
    }

    /// Records that something was done in a worse way than intended, and why ("transport", "prefill_lost", …).
    pub(crate) fn record_fallback(&self, reason: &'static str) {
        with_local_recorder(&self.recorder, || counter!(names::FALLBACKS, "reason" => reason).increment(1));
    }

    /// Records how long a request was with a worker, or in a handoff, that had failed.
    pub(crate) fn record_recovery(&self, waited: Duration) {
        with_local_recorder(&self.recorder, || histogram!(names::RECOVERY).record(waited));
        self.observed(1);
    }

    /// Records one value that a worker measured; `name` is as in the protocol. Unknown names come from newer workers
    /// and are dropped.
    pub(crate) fn record_sample(&self, worker: &str, name: &str, value: f64) {
        let Some(place) = names::SAMPLES.iter().position(|(short, _)| *short == name) else { return };
        match self.workers().get(worker) {
            Some(series) => series.samples[place].record(value),
            // It measured something before its first status.
            None => with_local_recorder(&self.recorder, || {
                let (model, engine) = (self.model.clone(), worker.to_owned());
                histogram!(names::SAMPLES[place].1, "model_name" => model, "engine" => engine).record(value);
            }),
        }
        self.observed(1);
    }

    /// Records that a request was refused before it reached a worker, and why.
    pub(crate) fn record_refusal(&self, reason: &'static str) {
        with_local_recorder(&self.recorder, || counter!(names::REFUSALS, "reason" => reason).increment(1));
    }

    fn workers(&self) -> MutexGuard<'_, BTreeMap<String, WorkerSeries>> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Folds raw observations into buckets now and then: the exporter keeps each one until somebody reads
    /// `/metrics`, and nobody may.
    fn observed(&self, count: u64) {
        let before = self.observations.fetch_add(count, Ordering::Relaxed);
        if before / OBSERVATIONS_KEPT != (before + count) / OBSERVATIONS_KEPT {
            self.handle.run_upkeep();
        }
    }
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").field("model", &self.model).finish_non_exhaustive()
    }
}

impl Requests {
    fn register(model: &str) -> Self {
        let model = model.to_owned();
        let count = |name: &'static str| counter!(name, "model_name" => model.clone(), "engine" => FRONT_END);
        let distribution =
            |name: &'static str| histogram!(name, "model_name" => model.clone(), "engine" => FRONT_END);
        let ended = |outcome: Outcome| {
            let (model, reason) = (model.clone(), outcome.name());
            let counter = counter!(
                names::REQUEST_SUCCESS,
                "model_name" => model, "engine" => FRONT_END, "finished_reason" => reason
            );
            (outcome, counter)
        };
        Self {
            prompt_tokens: count(names::PROMPT_TOKENS),
            generation_tokens: count(names::GENERATION_TOKENS),
            success: [Outcome::Stop, Outcome::Length, Outcome::Abort, Outcome::Error].map(ended),
            request_prompt_tokens: distribution(names::REQUEST_PROMPT_TOKENS),
            request_generation_tokens: distribution(names::REQUEST_GENERATION_TOKENS),
            time_to_first_token: distribution(names::TIME_TO_FIRST_TOKEN),
            inter_token_latency: distribution(names::INTER_TOKEN_LATENCY),
            e2e_latency: distribution(names::E2E_LATENCY),
            queue_time: distribution(names::QUEUE_TIME),
            prefill_time: distribution(names::PREFILL_TIME),
            decode_time: distribution(names::DECODE_TIME),
            inference_time: distribution(names::INFERENCE_TIME),
            params_n: distribution(names::PARAMS_N),
            params_max_tokens: distribution(names::PARAMS_MAX_TOKENS),
        }
    }
}

/// The `engine` label of what the front end itself measures; vLLM's name for its first engine.
const FRONT_END: &str = "0";

/// Reason of a link that goes another way than the one intended.
const TRANSPORT_FALLBACK: &str = "transport";

/// Why the front end refuses a request before a worker sees it.
const REFUSALS: [&str; 2] = ["unavailable", "busy"];

/// Raw observations kept before they are folded: eight bytes each.
const OBSERVATIONS_KEPT: u64 = 1 << 16;

#[cfg(test)]
mod tests;
