//! What a run came to: rates, latencies, and what failed.

use std::collections::BTreeMap;
use std::time::Duration;

use super::flags::{Metric, Objective};
use super::load::Run;
use super::outcome::{Answer, FailureKind, Outcome};
use crate::bench::statistics::{Distribution, most_at_once};

/// A run, summed up. Latencies are in milliseconds.
#[derive(Clone, Debug)]
pub(super) struct Summary {
    pub(super) completed: usize,
    pub(super) failures: BTreeMap<FailureKind, Failures>,
    pub(super) duration: Duration,
    /// Of answered requests.
    pub(super) input_tokens: u64,
    pub(super) output_tokens: u64,
    /// Answered requests within all objectives; `None` without any.
    pub(super) good: Option<usize>,
    pub(super) ttft: Distribution,
    pub(super) tpot: Distribution,
    pub(super) itl: Distribution,
    pub(super) e2el: Distribution,
    /// How late the generator itself was.
    pub(super) lateness: Distribution,
    /// How long requests waited for a place among those in flight.
    pub(super) waited: Distribution,
    /// The most requests in flight at once.
    pub(super) most_in_flight: usize,
    /// The most output tokens of a second, counted from the start.
    pub(super) most_tokens_in_a_second: usize,
    /// Answers whose tokens the server did not count.
    pub(super) uncounted: usize,
}

/// Failures of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failures {
    pub(super) count: usize,
    /// What the first of them said.
    pub(super) example: String,
}

impl Summary {
    pub(super) fn of(run: &Run, objectives: &[Objective]) -> Self {
        let answered = || run.outcomes.iter().filter_map(|one| Some((one, one.result.as_ref().ok()?)));
        let answers = || answered().map(|(_, answer)| answer);
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        let good = answers().filter(|answer| is_good(answer, objectives)).count();
        Self {
            completed: answers().count(),
            failures: failures(&run.outcomes),
            duration: run.duration,
            input_tokens: answered().map(|(outcome, _)| u64::from(outcome.prompt_tokens())).sum(),
            output_tokens: answers().map(|answer| u64::from(answer.output_tokens())).sum(),
            good: (!objectives.is_empty()).then_some(good),
            ttft: Distribution::new(answers().map(|answer| ms(answer.first))),
            tpot: Distribution::new(answers().filter_map(Answer::per_output_token).map(ms)),
            itl: Distribution::new(answers().flat_map(|answer| &answer.gaps).map(|gap| ms(*gap))),
            e2el: Distribution::new(answers().map(|answer| ms(answer.last))),
            lateness: Distribution::new(
                run.outcomes.iter().map(|one| ms(one.issued.saturating_sub(one.planned))),
            ),
            waited: Distribution::new(run.outcomes.iter().map(|one| ms(one.sent.saturating_sub(one.issued)))),
            most_in_flight: most_at_once(
                run.outcomes.iter().map(|one| (one.sent.as_secs_f64(), one.ended.as_secs_f64())),
            ),
            most_tokens_in_a_second: most_in_a_second(run),
            uncounted: answers().filter(|answer| answer.usage.is_none()).count(),
        }
    }

    pub(super) const fn metric(&self, metric: Metric) -> &Distribution {
        match metric {
            Metric::Ttft => &self.ttft,
            Metric::Tpot => &self.tpot,
            Metric::Itl => &self.itl,
            Metric::E2el => &self.e2el,
        }
    }

    pub(super) fn failed(&self) -> usize {
        self.failures.values().map(|failures| failures.count).sum()
    }

    /// So much in a second of the run; zero for a run without length.
    pub(super) fn per_second(&self, count: f64) -> f64 {
        let seconds = self.duration.as_secs_f64();
        if 0.0 < seconds { count / seconds } else { 0.0 }
    }

    pub(super) fn request_throughput(&self) -> f64 {
        self.per_second(self.completed as f64)
    }

    pub(super) fn output_throughput(&self) -> f64 {
        self.per_second(self.output_tokens as f64)
    }

    pub(super) fn total_throughput(&self) -> f64 {
        self.per_second((self.input_tokens + self.output_tokens) as f64)
    }

    pub(super) fn goodput(&self) -> Option<f64> {
        self.good.map(|good| self.per_second(good as f64))
    }
}

/// An answer of a single token has no time per output token, and so is within any limit of it.
fn is_good(answer: &Answer, objectives: &[Objective]) -> bool {
    objectives.iter().all(|objective| {
        let time = match objective.metric {
            Metric::Ttft => answer.first,
            Metric::E2el => answer.last,
            Metric::Tpot | Metric::Itl => answer.per_output_token().unwrap_or_default(),
        };
        time.as_secs_f64() * 1000.0 <= objective.at_most_ms
    })
}

fn failures(outcomes: &[Outcome]) -> BTreeMap<FailureKind, Failures> {
    let mut failures: BTreeMap<FailureKind, Failures> = BTreeMap::new();
    for failure in outcomes.iter().filter_map(|outcome| outcome.result.as_ref().err()) {
        let new = || Failures { count: 0, example: failure.message.clone() };
        failures.entry(failure.kind).or_insert_with(new).count += 1;
    }
    failures
}

fn most_in_a_second(run: &Run) -> usize {
    let mut seconds = vec![0.0; run.duration.as_secs() as usize + 1];
    for (at, tokens) in tokens_over_time(&run.outcomes) {
        if let Some(second) = seconds.get_mut(at as usize) {
            *second += tokens;
        }
    }
    seconds.into_iter().fold(0.0, f64::max).round() as usize
}

/// When tokens came, in seconds from the start, and how many with each event. Tokens that the server counted are
/// spread evenly over an answer's events.
pub(super) fn tokens_over_time(outcomes: &[Outcome]) -> impl Iterator<Item = (f64, f64)> {
    outcomes.iter().filter_map(|one| Some((one.sent, one.result.as_ref().ok()?))).flat_map(
        |(sent, answer)| {
            let events = answer.gaps.len() + 1;
            let tokens = f64::from(answer.output_tokens()) / events as f64;
            let mut now = (sent + answer.first).as_secs_f64();
            let later = answer.gaps.iter().map(move |gap| {
                now += gap.as_secs_f64();
                (now, tokens)
            });
            std::iter::once(((sent + answer.first).as_secs_f64(), tokens)).chain(later)
        },
    )
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::bench::serve::outcome::{Failure, Usage};

    /// A request sent at `at_ms`, whose first token took `first_ms`, and whose events came `gap_ms` apart.
    pub(crate) fn answered(at_ms: u64, first_ms: u64, gap_ms: &[u64], usage: Option<(u32, u32)>) -> Outcome {
        let ms = Duration::from_millis;
        let gaps: Vec<Duration> = gap_ms.iter().map(|&gap| ms(gap)).collect();
        let last = ms(first_ms) + gaps.iter().sum::<Duration>();
        let usage =
            usage.map(|(prompt_tokens, completion_tokens)| Usage { prompt_tokens, completion_tokens });
        Outcome {
            planned: ms(at_ms),
            issued: ms(at_ms + 1),
            sent: ms(at_ms + 3),
            ended: ms(at_ms + 3) + last,
            wanted: (10, 9),
            result: Ok(Answer { first: ms(first_ms), gaps, last, usage }),
        }
    }

    pub(crate) fn failed(at_ms: u64, kind: FailureKind, message: &str) -> Outcome {
        let result = Err(Failure::new(kind, message));
        Outcome { result, ..answered(at_ms, 5, &[], None) }
    }

    pub(crate) fn run_of(outcomes: Vec<Outcome>) -> Run {
        let duration = outcomes.iter().map(|one| one.ended).max().unwrap_or_default();
        Run { outcomes, duration, interrupted: false }
    }

    fn objective(text: &str) -> Objective {
        text.parse().expect("an objective")
    }

    #[test]
    fn a_run_is_summed_up() {
        let run = run_of(vec![
            answered(0, 100, &[10, 20], Some((7, 5))),
            answered(500, 300, &[], Some((9, 1))),
            answered(1000, 200, &[797], None),
            failed(100, FailureKind::Status(500), "oh"),
            failed(200, FailureKind::Status(500), "no"),
            failed(300, FailureKind::Cut, "gone"),
        ]);
        let summary = Summary::of(&run, &[]);
        assert_eq!((summary.completed, summary.failed(), summary.uncounted), (3, 3, 1));
        assert_eq!((summary.input_tokens, summary.output_tokens), (7 + 9 + 10, 5 + 1 + 2));
        assert_eq!(summary.ttft.sorted(), [100.0, 200.0, 300.0]);
        assert_eq!(summary.tpot.sorted(), [30.0 / 4.0, 797.0], "by counted tokens; one token has none");
        assert_eq!(summary.itl.sorted(), [10.0, 20.0, 797.0]);
        assert_eq!(summary.e2el.sorted(), [130.0, 300.0, 997.0]);
        assert_eq!((summary.lateness.max(), summary.waited.max()), (1.0, 2.0));
        assert_eq!(summary.duration, Duration::from_secs(2));
        assert!((summary.request_throughput() - 1.5).abs() < 1e-9);
        assert!((summary.total_throughput() - 17.0).abs() < 1e-9);
        assert_eq!((summary.good, summary.goodput()), (None, None));
        assert_eq!(summary.most_tokens_in_a_second, 6);
        let kinds: Vec<_> =
            summary.failures.iter().map(|(kind, one)| (kind.to_string(), one.count)).collect();
        assert_eq!(kinds, [("HTTP 500".to_owned(), 2), ("stream cut off".to_owned(), 1)]);
        assert_eq!(summary.failures[&FailureKind::Status(500)].example, "oh");
    }

    #[test]
    fn goodput_counts_requests_within_every_limit() {
        let run = || {
            run_of(vec![
                answered(0, 100, &[10, 10], Some((5, 3))),
                answered(0, 200, &[50, 50], Some((5, 3))),
                answered(0, 900, &[], Some((5, 1))),
                failed(0, FailureKind::TimedOut, "late"),
            ])
        };
        #[rustfmt::skip]
        let rows: [(&str, &[&str], usize); 6] = [
            ("all are in time",                  &["ttft:1000"],             3),
            ("the limit itself is within",       &["ttft:200"],              2),
            ("one token has no time per token",  &["tpot:10"],               2),
            ("end to end",                       &["e2el:120"],              1),
            ("each limit counts",                &["ttft:200", "tpot:20"],   1),
            ("none",                             &["ttft:1"],                0),
        ];
        for (name, objectives, good) in rows {
            let objectives: Vec<Objective> = objectives.iter().map(|text| objective(text)).collect();
            let summary = Summary::of(&run(), &objectives);
            assert_eq!(summary.good, Some(good), "{name}");
            assert!((summary.goodput().expect("asked for") - good as f64 / 0.903).abs() < 1e-9, "{name}");
        }
    }

    #[test]
    fn nothing_can_be_summed_up() {
        let summary = Summary::of(&run_of(Vec::new()), &[objective("ttft:1")]);
        assert_eq!((summary.completed, summary.failed(), summary.good), (0, 0, Some(0)));
        assert_eq!(summary.request_throughput().to_bits(), 0.0_f64.to_bits());
        assert!(summary.ttft.mean().is_nan());
    }
}
