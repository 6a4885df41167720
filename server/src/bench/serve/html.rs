//! The result as one HTML page: no script, no font, nothing that a network is needed for.

mod plot;
mod timeline;

use std::fmt::Write;

use super::Report;
use super::flags::Metric;
use super::table::{number, one_line};
use crate::bench::statistics::Distribution;
use plot::cumulative;
use timeline::timeline;

/// The whole page.
pub(super) fn page(report: &Report<'_>) -> String {
    let mut page = String::new();
    // Writing to a string cannot fail, here and below.
    let _ = write!(
        page,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>{model}: serving benchmark</title><style>{}</style></head><body><main>\
         <header><h1>{model}</h1><p>{} · {}</p></header>",
        include_str!("html/style.css"),
        escaped(report.url),
        report.started.strftime("%Y-%m-%d %H:%M %Z"),
        model = escaped(report.model),
    );
    tiles(&mut page, report);
    let notes = report.notes();
    if !notes.is_empty() {
        let notes: String = notes.iter().map(|note| format!("<li>{}</li>", escaped(note))).collect();
        let _ = write!(page, "<ul class=\"notes\">{notes}</ul>");
    }
    if 0 < report.summary.completed {
        page.push_str("<div class=\"pair\">");
        Metric::ALL.iter().for_each(|&metric| latency(&mut page, report, metric));
        page.push_str("</div>");
    }
    over_time(&mut page, report);
    failures(&mut page, report);
    facts(&mut page, report);
    let _ = writeln!(page, "<footer>tidemill {}</footer></main></body></html>", escaped(crate::VERSION));
    page
}

fn tiles(page: &mut String, report: &Report<'_>) {
    let summary = &report.summary;
    let all = summary.completed + summary.failed();
    let mut tiles = vec![
        ("", number(summary.request_throughput()), "requests per second"),
        ("", number(summary.output_throughput()), "output tokens per second"),
        ("", number(summary.total_throughput()), "input + output tokens per second"),
    ];
    let good = summary.good.map(|good| 100.0 * good as f64 / all.max(1) as f64);
    if let Some(percent) = good {
        let class = if percent < 90.0 { "bad" } else { "good" };
        tiles.push((class, format!("{percent:.1} %"), "of requests within the objectives"));
    }
    tiles.push(("", format!("{} s", number(summary.duration.as_secs_f64())), "duration"));
    tiles.push(("", summary.completed.to_string(), "requests answered"));
    if 0 < summary.failed() {
        tiles.push(("bad", summary.failed().to_string(), "requests failed"));
    }
    page.push_str("<div class=\"tiles\">");
    for (class, value, name) in tiles {
        let _ = write!(page, "<div class=\"tile {class}\"><b>{value}</b><span>{name}</span></div>");
    }
    page.push_str("</div>");
}

fn latency(page: &mut String, report: &Report<'_>, metric: Metric) {
    let about = match metric {
        Metric::Ttft => "From sending a request to its first token.",
        Metric::Tpot => "Per request: the time after the first token, by the tokens that the server counted.",
        Metric::Itl => "Between two events of a stream, over all requests.",
        Metric::E2el => "From sending a request to the end of its answer.",
    };
    let _ = write!(page, "<section><h2>{}</h2><p class=\"about\">{about}</p>", metric.title());
    let numbers = report.summary.metric(metric);
    if numbers.is_empty() {
        page.push_str("<p>No answer had more than one token.</p></section>");
        return;
    }
    let result = &report.flags.result;
    let limit = result.goodput.iter().find(|objective| objective.metric == metric);
    let percents = &result.metric_percentiles;
    page.push_str(&cumulative(metric, numbers, percents, limit.map(|limit| limit.at_most_ms)));
    let rows = [(String::new(), numbers)];
    latency_table(page, &rows, percents);
    page.push_str("</section>");
}

fn latency_table(page: &mut String, rows: &[(String, &Distribution)], percents: &[f64]) {
    let heads: String = percents.iter().map(|percent| format!("<th>p{percent}</th>")).collect();
    let _ = write!(
        page,
        "<div class=\"wide\"><table><tr><th>ms</th><th>mean</th><th>std</th>{heads}<th>max</th></tr>"
    );
    for (name, numbers) in rows {
        let percentiles = percents.iter().map(|&percent| numbers.percentile(percent));
        let values = [numbers.mean(), numbers.std()].into_iter().chain(percentiles).chain([numbers.max()]);
        let cells: String = values.map(|value| format!("<td>{}</td>", number(value))).collect();
        let _ = write!(page, "<tr><td>{name}</td>{cells}</tr>");
    }
    page.push_str("</table></div>");
}

fn over_time(page: &mut String, report: &Report<'_>) {
    let seconds = report.summary.duration.as_secs_f64();
    if report.outcomes.is_empty() || seconds <= 0.0 {
        return;
    }
    let (drawing, every) = timeline(report.outcomes, seconds);
    let shown = match every {
        1 => "Every request is a line".to_owned(),
        every => format!("One request in {every} is a line"),
    };
    let _ = write!(
        page,
        "<section><h2>Over time</h2><p class=\"about\">{shown}; point at it for its numbers.</p>{drawing}\
         <p class=\"key\"><span><i style=\"background:var(--first)\"></i>until the first token</span>\
         <span><i style=\"background:var(--rest)\"></i>the rest of the answer</span>\
         <span><i style=\"background:var(--muted)\"></i>not sent yet</span>\
         <span><i style=\"background:var(--bad)\"></i>failed</span></p></section>"
    );
}

fn failures(page: &mut String, report: &Report<'_>) {
    if report.summary.failures.is_empty() {
        return;
    }
    page.push_str("<section><h2>Failed requests</h2><table class=\"facts\">");
    for (kind, failures) in &report.summary.failures {
        let (kind, example) = (escaped(&kind.to_string()), escaped(&one_line(&failures.example)));
        let _ = write!(page, "<tr><th>{} × {kind}</th><td>{example}</td></tr>", failures.count);
    }
    page.push_str("</table></section>");
}

fn facts(page: &mut String, report: &Report<'_>) {
    let summary = &report.summary;
    page.push_str("<div class=\"pair\"><section><h2>The load</h2><table class=\"facts\">");
    for (name, value) in &report.settings {
        let _ = write!(page, "<tr><th>{}</th><td>{}</td></tr>", escaped(name), escaped(value));
    }
    page.push_str("</table></section><section><h2>What came of it</h2><table class=\"facts\">");
    let rows = [
        ("input tokens", summary.input_tokens.to_string()),
        ("output tokens", summary.output_tokens.to_string()),
        ("most output tokens in a second", summary.most_tokens_in_a_second.to_string()),
        ("most requests in flight", summary.most_in_flight.to_string()),
    ];
    for (name, value) in rows {
        let _ = write!(page, "<tr><th>{name}</th><td>{value}</td></tr>");
    }
    page.push_str("</table><h2 style=\"margin-top:16px\">The generator itself</h2>");
    let mut rows = vec![("late".to_owned(), &summary.lateness)];
    if report.flags.load.max_concurrency.is_some() {
        rows.push(("waited".to_owned(), &summary.waited));
    }
    latency_table(page, &rows, &report.flags.result.metric_percentiles);
    page.push_str("</section></div>");
}

/// Text that is no markup, whatever is in it.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
