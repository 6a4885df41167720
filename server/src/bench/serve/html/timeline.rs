//! The run over time: tokens, requests in flight, and every request from its arrival to its end.

use std::fmt::Write;

use super::escaped;
use super::plot::{Scale, line, open, short, text};
use crate::bench::serve::outcome::Outcome;
use crate::bench::serve::summary::tokens_over_time;
use crate::bench::serve::table::one_line;

/// The drawing, and how many requests one lane stands for.
pub(super) fn timeline(outcomes: &[Outcome], seconds: f64) -> (String, usize) {
    let mut ordered: Vec<&Outcome> = outcomes.iter().collect();
    ordered.sort_by_key(|outcome| (outcome.planned, outcome.sent));
    let every = ordered.len().div_ceil(MOST_LANES).max(1);
    let lanes: Vec<(usize, &Outcome)> = ordered.into_iter().enumerate().step_by(every).collect();
    let lane = (FULL_LANES / lanes.len().max(1) as f64).clamp(1.2, 12.0);
    let lanes_height = lane * lanes.len() as f64;
    let height = LANES_TOP + lanes_height + 44.0;
    let bottom = LANES_TOP + lanes_height + 6.0;
    let x = Scale::linear(seconds, LEFT, RIGHT);
    let mut svg = open(WIDTH, height, "The run over time");
    for tick in x.ticks(10.0) {
        line(&mut svg, "grid", (x.at(tick), TOP), (x.at(tick), bottom));
        text(&mut svg, "middle", "", (x.at(tick), bottom + 18.0), &short(tick));
    }
    text(&mut svg, "end", "", (RIGHT, bottom + 34.0), "seconds");
    let rates = token_rates(outcomes, seconds);
    panel(&mut svg, "Output tokens per second", TOP, &rates, &x, seconds);
    let flying = in_flight(outcomes, seconds);
    panel(&mut svg, "Requests in flight", TOP + PANEL + GAP, &flying, &x, seconds);
    text(&mut svg, "start", "strong", (LEFT, LANES_TOP - 8.0), "Requests, by arrival");
    for (place, (index, outcome)) in lanes.into_iter().enumerate() {
        request(&mut svg, &x, LANES_TOP + lane * (place as f64 + 0.5), lane * 0.72, index, outcome);
    }
    line(&mut svg, "axis", (LEFT, bottom), (RIGHT, bottom));
    (svg + "</svg>", every)
}

/// Values over equal times, as an area.
fn panel(svg: &mut String, name: &str, top: f64, values: &[f64], x: &Scale, seconds: f64) {
    let bottom = top + PANEL;
    let highest = values.iter().copied().fold(0.0, f64::max);
    let y = Scale::linear(highest * 1.08, bottom, top + 14.0);
    for tick in y.ticks(3.0) {
        line(svg, if tick == 0.0 { "axis" } else { "grid" }, (LEFT, y.at(tick)), (RIGHT, y.at(tick)));
        text(svg, "end", "", (LEFT - 8.0, y.at(tick) + 4.0), &short(tick));
    }
    text(svg, "start", "strong", (LEFT, top + 4.0), name);
    let width = seconds / values.len() as f64;
    let mut path = format!("M{:.1} {bottom:.1}", x.at(0.0));
    for (index, value) in values.iter().enumerate() {
        let _ = write!(path, " V{:.1} H{:.1}", y.at(*value), x.at((index + 1) as f64 * width));
    }
    let _ =
        write!(svg, "<path class=\"area\" d=\"{path} V{bottom:.1} Z\"/><path class=\"curve\" d=\"{path}\"/>");
}

fn request(svg: &mut String, x: &Scale, y: f64, thick: f64, index: usize, outcome: &Outcome) {
    let planned = outcome.planned.as_secs_f64();
    let (sent, ended) = (outcome.sent.as_secs_f64(), outcome.ended.as_secs_f64());
    let mut bar = |class: &str, width: f64, from: f64, to: f64| {
        // Short ones are drawn at least a hair wide.
        let (from, to) = (x.at(from), x.at(to).max(x.at(from) + 0.6));
        let _ = write!(
            svg,
            "<line class=\"{class}\" stroke-width=\"{width:.1}\" x1=\"{from:.1}\" y1=\"{y:.1}\" x2=\"{to:.1}\" y2=\"{y:.1}\"/>"
        );
    };
    let title = match &outcome.result {
        Ok(answer) => {
            let first = sent + answer.first.as_secs_f64();
            bar("held", thick * 0.3, planned, sent);
            bar("first", thick, sent, first);
            bar("rest", thick, first, ended);
            let (first, last) = (answer.first.as_secs_f64() * 1e3, answer.last.as_secs_f64() * 1e3);
            let (input, output) = (outcome.prompt_tokens(), answer.output_tokens());
            format!(
                "request {index}: {input} → {output} tokens, first after {first:.0} ms, all after {last:.0} ms"
            )
        }
        Err(failure) => {
            bar("held", thick * 0.3, planned, sent);
            bar("failed", thick, sent, ended);
            format!("request {index}: {}: {}", failure.kind, one_line(&failure.message))
        }
    };
    // One transparent line over all of it carries the words.
    let (from, to) = (x.at(planned), x.at(ended).max(x.at(planned) + 2.0));
    let _ = write!(
        svg,
        "<line stroke=\"transparent\" stroke-width=\"{thick:.1}\" x1=\"{from:.1}\" y1=\"{y:.1}\" x2=\"{to:.1}\" \
         y2=\"{y:.1}\"><title>{}</title></line>",
        escaped(&title)
    );
}

fn token_rates(outcomes: &[Outcome], seconds: f64) -> Vec<f64> {
    let mut bins = vec![0.0; BINS];
    let width = seconds / BINS as f64;
    for (at, tokens) in tokens_over_time(outcomes) {
        bins[((at / width) as usize).min(BINS - 1)] += tokens / width;
    }
    bins
}

/// How many were in flight on average in each bin.
fn in_flight(outcomes: &[Outcome], seconds: f64) -> Vec<f64> {
    let width = seconds / BINS as f64;
    let mut bins = vec![0.0; BINS];
    for outcome in outcomes {
        let (sent, ended) = (outcome.sent.as_secs_f64(), outcome.ended.as_secs_f64());
        let (first, last) = ((sent / width) as usize, ((ended / width) as usize).min(BINS - 1));
        for (index, bin) in bins.iter_mut().enumerate().take(last + 1).skip(first) {
            let (begin, end) = (index as f64 * width, (index + 1) as f64 * width);
            *bin += (ended.min(end) - sent.max(begin)).max(0.0) / width;
        }
    }
    bins
}

const WIDTH: f64 = 1120.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = WIDTH - 12.0;
const TOP: f64 = 16.0;
/// Height of each panel, and the space below it.
const PANEL: f64 = 110.0;
const GAP: f64 = 30.0;
const LANES_TOP: f64 = TOP + 2.0 * (PANEL + GAP) + 10.0;
/// Height of all requests together, as far as lanes can be made to fit.
const FULL_LANES: f64 = 420.0;
const MOST_LANES: usize = 350;
const BINS: usize = 160;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::serve::outcome::FailureKind;
    use crate::bench::serve::summary::tests::{answered, failed};

    #[test]
    fn areas_hold_all_tokens_and_all_time_in_flight() {
        let outcomes = [answered(0, 100, &[400, 500], Some((9, 30))), answered(1000, 500, &[], Some((9, 1)))];
        let seconds = 2.0;
        let width = seconds / BINS as f64;
        let tokens: f64 = token_rates(&outcomes, seconds).iter().map(|rate| rate * width).sum();
        assert!((tokens - 31.0).abs() < 1e-9, "{tokens}");
        let flown: f64 = in_flight(&outcomes, seconds).iter().map(|count| count * width).sum();
        assert!((flown - 1.5).abs() < 1e-9, "{flown}");
    }

    #[test]
    fn every_request_has_a_lane_until_there_are_too_many() {
        let few = [answered(0, 10, &[5], Some((3, 2))), failed(5, FailureKind::Cut, "<gone>")];
        let (svg, every) = timeline(&few, 1.0);
        assert_eq!((every, svg.matches("<title>").count()), (1, 2));
        assert!(svg.contains("3 → 2 tokens") && svg.contains("&lt;gone&gt;"), "{svg}");
        let many: Vec<Outcome> = (0..1000).map(|at| answered(at, 10, &[5], None)).collect();
        let (svg, every) = timeline(&many, 1.0);
        assert_eq!((every, svg.matches("<title>").count()), (3, 334));
    }
}
