//! What a split costs the second token.
//!
//! Between two deployments the first token of the same prompt differs by more than what is sought: a process keeps the pages that
//! it was given, near or far apart, and with them its speed. So the same worker computes every prompt, for the decode worker in
//! one request and for itself in the next, behind front ends that differ in nothing but the workers that they know.

use std::time::Duration;

use anyhow::ensure;
use tidemill_tests::deployment::Deployment;

use crate::report::{Row, Target};
use crate::timing::{Noise, median, middle, quantile};
use crate::whole_system::{first_two, runtime};

pub(crate) fn measure(rounds: usize) -> anyhow::Result<Vec<Row>> {
    let mut starts = Vec::new();
    for start in 0..STARTS {
        let pairs = runtime()?.block_on(one_start(start * 1000, rounds))?;
        starts.push(pairs);
    }
    Ok(vec![row(&starts)])
}

/// When the first and the second token came of the same prompt, split and not.
#[derive(Clone, Copy)]
struct Pair {
    split: (Duration, Duration),
    whole: (Duration, Duration),
}

async fn one_start(first: u32, pairs: usize) -> anyhow::Result<Vec<Pair>> {
    let split = Deployment::start(&[
        "--no-enable-prefix-caching",
        "--max-num-batched-tokens",
        "512",
        "--transport",
        "shm",
        "--prefill-cores",
        "0",
        "--decode-cores",
        "1",
    ]);
    let prefill = split.addresses("prefill");
    ensure!(prefill.len() == 1, "prefill workers at {prefill:?}");
    let whole = Deployment::route(&prefill);
    let mut measured = Vec::new();
    for which in 0..pairs as u32 + WARM_UP {
        let prompt = first + which;
        // Whoever comes second finds caches that the other has left, so each is it in turn.
        let pair = if which % 2 == 0 {
            let split = first_two(&split.client, prompt).await?;
            Pair { split, whole: first_two(&whole.client, prompt).await? }
        } else {
            let whole = first_two(&whole.client, prompt).await?;
            Pair { split: first_two(&split.client, prompt).await?, whole }
        };
        if WARM_UP <= which {
            measured.push(pair);
        }
    }
    let handed_over = split.client.metric("tidemill_handoff_total", "").await;
    let asked = f64::from(pairs as u32 + WARM_UP);
    // The last one may still be on its way to the metrics.
    ensure!((asked - 1.0..=asked).contains(&handed_over), "{handed_over} of {asked} were handed over");
    Ok(measured)
}

fn row(starts: &[Vec<Pair>]) -> Row {
    let all: Vec<Pair> = starts.concat();
    let of = |pick: fn(&Pair) -> Duration| milliseconds(median(&all.iter().map(pick).collect::<Vec<_>>()));
    let ttft = of(|it| it.whole.0);
    let second = |it: &Pair| difference(it.split.1, it.whole.1);
    let first = |it: &Pair| difference(it.split.0, it.whole.0);
    let pause = |it: &Pair| difference(it.split.1 - it.split.0, it.whole.1 - it.whole.0);
    let exposed = middle(all.iter().map(second).collect());
    let (least, most) = interval(starts, |pairs| middle(pairs.iter().map(second).collect()));
    let (least_quick, most_quick) = interval(starts, quickest);
    let each: Vec<String> =
        starts.iter().map(|pairs| format!("{:.2}", middle(pairs.iter().map(second).collect()))).collect();
    Row {
        measure: "exposed transfer: second token, split − colocated, 2k tokens, shm".to_owned(),
        value: exposed,
        unit: "ms",
        limit: Some((ttft, "TTFT, colocated")),
        target: Some(Target::Share { measured: exposed / ttft, at_most: 0.01 }),
        note: format!(
            "demo model, one core a worker, one prefill worker for both; {} pairs in turns, {} starts; 95 % of resampled medians \
             within {least:.2} and {most:.2} ms ({:.2} and {:.2} %); of it first token {:.2} ms, first to second {:.2} ms; between the \
             quickest quarters of both {:.2} ms, within {least_quick:.2} and {most_quick:.2} ms ({:.2} and {:.2} %); first → second token: \
             split {:.1} → {:.1} ms, colocated {:.1} → {:.1} ms; medians of starts: {} ms",
            all.len(),
            starts.len(),
            least / ttft * 100.0,
            most / ttft * 100.0,
            middle(all.iter().map(first).collect()),
            middle(all.iter().map(pause).collect()),
            quickest(&all),
            least_quick / ttft * 100.0,
            most_quick / ttft * 100.0,
            of(|it| it.split.0),
            of(|it| it.split.1),
            of(|it| it.whole.0),
            of(|it| it.whole.1),
            each.join(", ")
        ),
    }
}

/// What disturbs a request only makes it later, and most requests are disturbed: the difference between those
/// of either kind that were disturbed least, a quarter of all being quicker.
fn quickest(pairs: &[Pair]) -> f64 {
    let quarter = |pick: fn(&Pair) -> Duration| {
        milliseconds(quantile(&pairs.iter().map(pick).collect::<Vec<_>>(), 0.25))
    };
    quarter(|it| it.split.1) - quarter(|it| it.whole.1)
}

/// Between which values something would mostly lie, had others of the same starts been measured, and other pairs of each: starts are drawn
/// with replacement, then pairs of each (a bootstrap in two stages).
fn interval(starts: &[Vec<Pair>], value: impl Fn(&[Pair]) -> f64) -> (f64, f64) {
    let mut noise = Noise::new();
    let mut values = Vec::new();
    for _ in 0..RESAMPLES {
        let mut drawn = Vec::new();
        for _ in starts {
            let pairs = &starts[noise.below(starts.len())];
            drawn.extend(pairs.iter().map(|_| pairs[noise.below(pairs.len())]));
        }
        values.push(value(&drawn));
    }
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values[(share * (values.len() - 1) as f64) as usize];
    (at(0.025), at(0.975))
}

/// In milliseconds.
fn difference(one: Duration, other: Duration) -> f64 {
    milliseconds(one) - milliseconds(other)
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Starts of both workers, for there are pages of the KV cache too. In each there is a pair a round.
const STARTS: u32 = 6;
/// Pairs of each start that do not count: pages are touched for the first time.
const WARM_UP: u32 = 2;
const RESAMPLES: usize = 2000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_holds_the_median_and_knows_how_much_it_is_worth() {
        let pair = |micros: u64| Pair {
            split: (Duration::ZERO, Duration::from_micros(micros)),
            whole: (Duration::ZERO, Duration::ZERO),
        };
        let second =
            |pairs: &[Pair]| middle(pairs.iter().map(|it| difference(it.split.1, it.whole.1)).collect());
        let steady = vec![vec![pair(1000); 8]; 4];
        assert_eq!(interval(&steady, second), (1.0, 1.0));
        let differing: Vec<Vec<Pair>> = (0..4).map(|start| vec![pair(1000 + start * 1000); 8]).collect();
        let (least, most) = interval(&differing, second);
        assert!(least <= 2.0 && 3.0 <= most, "starts differ: {least} to {most}");
    }
}
