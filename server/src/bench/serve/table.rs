//! The result as text.

use std::fmt::Write;

use super::Report;
use crate::bench::statistics::Distribution;

/// The result in lines of at most eighty characters or so.
pub(super) fn text(report: &Report<'_>) -> String {
    let Report { summary, flags, settings, .. } = report;
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name:<36} {value}");
    };
    line("server", report.url.to_owned());
    line("model", report.model.to_owned());
    for (name, value) in settings {
        line(name, value.clone());
    }
    line("requests answered", summary.completed.to_string());
    for (kind, failures) in &summary.failures {
        line(
            &format!("requests failed: {kind}"),
            format!("{}  ({})", failures.count, one_line(&failures.example)),
        );
    }
    line("duration (s)", number(summary.duration.as_secs_f64()));
    line("input tokens", summary.input_tokens.to_string());
    line("output tokens", summary.output_tokens.to_string());
    line("requests per second", number(summary.request_throughput()));
    if let (Some(goodput), Some(good)) = (summary.goodput(), summary.good) {
        let of_all = 100.0 * good as f64 / (summary.completed + summary.failed()).max(1) as f64;
        line("good requests per second", format!("{}  ({of_all:.1} % of all)", number(goodput)));
    }
    line("output tokens per second", number(summary.output_throughput()));
    line("input + output tokens per second", number(summary.total_throughput()));
    line("most output tokens in a second", summary.most_tokens_in_a_second.to_string());
    line("most requests in flight", summary.most_in_flight.to_string());
    text.push('\n');
    let percents = &flags.result.metric_percentiles;
    let mut fixed = vec!["mean".to_owned(), "std".into()];
    if !percents.contains(&50.0) {
        fixed.insert(1, "median".to_owned());
    }
    let heads = fixed.into_iter().chain(percents.iter().map(|percent| format!("p{percent}")));
    let _ = writeln!(
        text,
        "{:<29}{}",
        "milliseconds",
        heads.map(|head| format!("{head:>10}")).collect::<String>()
    );
    for &metric in &flags.result.percentile_metrics {
        let _ = writeln!(text, "{:<29}{}", metric.title(), cells(summary.metric(metric), percents));
    }
    let _ = writeln!(text, "{:<29}{}", "lateness of the generator", cells(&summary.lateness, percents));
    if flags.load.max_concurrency.is_some() {
        let _ = writeln!(text, "{:<29}{}", "wait for --max-concurrency", cells(&summary.waited, percents));
    }
    for note in report.notes() {
        let _ = writeln!(text, "\nnote: {note}");
    }
    text
}

fn cells(distribution: &Distribution, percents: &[f64]) -> String {
    let mut fixed = vec![distribution.mean(), distribution.std()];
    if !percents.contains(&50.0) {
        fixed.insert(1, distribution.median());
    }
    let percentiles = percents.iter().map(|&percent| distribution.percentile(percent));
    fixed.into_iter().chain(percentiles).map(|value| format!("{:>10}", number(value))).collect()
}

/// Two digits after the point; a dash where there is no number.
pub(super) fn number(value: f64) -> String {
    if value.is_nan() { "-".to_owned() } else { format!("{value:.2}") }
}

/// A message without line ends, not too long.
pub(super) fn one_line(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    let text = words.join(" ");
    match text.char_indices().nth(160) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
