//! What a worker reports, and the series that it goes to. A status comes fifty times a second from each worker: series are
//! looked up once.

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use tidemill_engine::handle::{Counters, Ledger, Role};
use tidemill_kvtransfer_proto::units::BlockCount;

use super::{WorkerStatusSnapshot, names};

/// The series of one worker.
pub(super) struct WorkerSeries {
    role: Role,
    last: LastReport,
    /// In the order of [`GAUGES`].
    gauges: [Gauge; GAUGES.len()],
    /// In the order of [`BLOCK_STATES`].
    blocks: [Gauge; BLOCK_STATES.len()],
    /// In the order of [`COUNTERS`].
    counters: [Counter; COUNTERS.len()],
    /// In the order of [`names::SAMPLES`].
    pub(super) samples: [Histogram; names::SAMPLES.len()],
    up: Gauge,
}

/// Which start of a worker reported last, and what.
pub(super) struct LastReport {
    instance: u64,
    counters: Counters,
}

/// Labels of a series.
#[derive(Clone, Copy)]
enum Labels {
    /// As vLLM labels it: the model, and the worker as its engine.
    Engine,
    /// Our own: the worker.
    Worker,
}

type GaugeRow = (&'static str, Labels, fn(&WorkerStatusSnapshot<'_>) -> f64);
type BlocksRow = (&'static str, fn(&Ledger) -> BlockCount);
type CounterRow = (&'static str, Labels, fn(&Counters) -> u64);

const GAUGES: [GaugeRow; 6] = [
    (names::RUNNING, Labels::Engine, |it| f64::from(it.running)),
    (names::WAITING, Labels::Engine, |it| f64::from(it.waiting)),
    (names::CACHE_USAGE, Labels::Engine, |it| {
        f64::from(it.ledger.used().0) / f64::from(it.ledger.total.0.max(1))
    }),
    (names::GRANTED_BYTES, Labels::Worker, |it| it.credit.granted_bytes as f64),
    (names::WAITING_BYTES, Labels::Worker, |it| it.credit.waiting_bytes as f64),
    (names::WAITING_HANDOFFS, Labels::Worker, |it| it.credit.waiting_handoffs as f64),
];

const BLOCK_STATES: [BlocksRow; 5] = [
    ("free", |it| it.free),
    ("cached", |it| it.cached),
    ("held", |it| it.held),
    ("reserved", |it| it.reserved),
    ("quarantined", |it| it.quarantined),
];

const COUNTERS: [CounterRow; 16] = [
    (names::PREFIX_QUERIES, Labels::Engine, |it| it.prefix_queries),
    (names::PREFIX_HITS, Labels::Engine, |it| it.prefix_hits),
    (names::PREEMPTIONS, Labels::Engine, |it| it.preemptions),
    (names::SPECULATION_DRAFTS, Labels::Engine, |it| it.speculation.drafts),
    (names::SPECULATION_DRAFTED, Labels::Engine, |it| it.speculation.drafted),
    (names::SPECULATION_ACCEPTED, Labels::Engine, |it| it.speculation.accepted),
    (names::SPECULATION_HELD_BACK, Labels::Worker, |it| it.speculation.held_back),
    (names::STEPS, Labels::Worker, |it| it.steps),
    (names::OVERLAPPED_STEPS, Labels::Worker, |it| it.overlapped_steps),
    (names::COMPUTED_PROMPT_TOKENS, Labels::Worker, |it| it.prompt_tokens),
    (names::HANDOFFS, Labels::Worker, |it| it.handoffs),
    (names::HANDOFF_BYTES, Labels::Worker, |it| it.handoff_bytes),
    (names::HANDOFF_WRITES, Labels::Worker, |it| it.handoff_writes),
    (names::HANDOFF_FAILURES, Labels::Worker, |it| it.handoff_failures),
    (names::HANDOFF_REFUSALS, Labels::Worker, |it| it.handoff_refusals),
    (names::HANDOFF_IN_PLACE, Labels::Worker, |it| it.handoff_in_place),
];

impl WorkerSeries {
    /// Looks the series up in the recorder of this thread. `last` is what is known of the worker under another role.
    pub(super) fn register(model: &str, worker: &str, role: Role, last: Option<LastReport>) -> Self {
        let (model, worker) = (|| model.to_owned(), || worker.to_owned());
        // It is there from the start, like all others.
        counter!(names::WORKER_RESTARTS, "worker" => worker()).increment(0);
        Self {
            role,
            last: last.unwrap_or(LastReport { instance: 0, counters: Counters::default() }),
            gauges: GAUGES.map(|(name, labels, _)| match labels {
                Labels::Engine => gauge!(name, "model_name" => model(), "engine" => worker()),
                Labels::Worker => gauge!(name, "worker" => worker()),
            }),
            blocks: BLOCK_STATES
                .map(|(state, _)| gauge!(names::BLOCKS, "worker" => worker(), "state" => state)),
            counters: COUNTERS.map(|(name, labels, _)| match labels {
                Labels::Engine => counter!(name, "model_name" => model(), "engine" => worker()),
                Labels::Worker => counter!(name, "worker" => worker()),
            }),
            samples: names::SAMPLES
                .map(|(_, name)| histogram!(name, "model_name" => model(), "engine" => worker())),
            up: gauge!(names::WORKER_UP, "worker" => worker(), "role" => role.as_str()),
        }
    }

    /// Whether these are the series of the worker in that role.
    pub(super) fn is_of(&self, role: Role) -> bool {
        self.role == role
    }

    pub(super) fn into_last(self) -> LastReport {
        self.last
    }

    /// Records a status. Returns by how much guesses that were right have grown, with their place in the draft.
    pub(super) fn record(&mut self, status: &WorkerStatusSnapshot<'_>) -> Vec<(usize, u64)> {
        if self.last.instance != status.instance {
            self.last = LastReport { instance: status.instance, counters: Counters::default() };
        }
        let before = std::mem::replace(&mut self.last.counters, status.counters);
        for (gauge, (_, _, value)) in self.gauges.iter().zip(GAUGES) {
            gauge.set(value(status));
        }
        for (gauge, (_, blocks)) in self.blocks.iter().zip(BLOCK_STATES) {
            gauge.set(f64::from(blocks(&status.ledger).0));
        }
        self.up.set(1.0);
        // A sum that fell can only be a worker's mistake; it counts as no change.
        for (counter, (_, _, sum)) in self.counters.iter().zip(COUNTERS) {
            counter.increment(sum(&status.counters).saturating_sub(sum(&before)));
        }
        let (now, before) = (status.counters.speculation.accepted_at, before.speculation.accepted_at);
        let grown = now.iter().zip(before).map(|(now, before)| now.saturating_sub(before)).enumerate();
        grown.filter(|(_, value)| 0 < *value).collect()
    }
}
