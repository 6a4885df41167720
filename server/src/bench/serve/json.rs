//! The result as JSON, with the field names of `vllm bench serve --save-result`, so that scripts that read those files
//! read these.

use serde_json::{Map, Value, json};

use super::Report;
use super::flags::Metric;
use super::outcome::Outcome;

/// One object. What is not vLLM's is under `tidemill`.
pub(super) fn value(report: &Report<'_>) -> Value {
    let Report { summary, flags, .. } = report;
    let mut fields = Map::new();
    let mut set = |name: &str, value: Value| drop(fields.insert(name.to_owned(), value));
    set("date", json!(report.started.strftime("%Y%m%d-%H%M%S").to_string()));
    set("backend", json!("openai"));
    set("endpoint_type", json!("openai"));
    set("model_id", json!(report.model));
    set("tokenizer_id", json!(report.model));
    set("num_prompts", json!(report.planned));
    set("request_rate", rate(flags.load.request_rate.map(|rate| rate.0)));
    set("burstiness", rate(Some(flags.load.burstiness.0)));
    set("max_concurrency", json!(flags.load.max_concurrency));
    for (name, value) in &flags.result.metadata {
        set(name, json!(value));
    }
    set("duration", json!(summary.duration.as_secs_f64()));
    set("completed", json!(summary.completed));
    set("failed", json!(summary.failed()));
    set("total_input_tokens", json!(summary.input_tokens));
    set("total_output_tokens", json!(summary.output_tokens));
    set("request_throughput", json!(summary.request_throughput()));
    set("request_goodput", json!(summary.goodput()));
    set("output_throughput", json!(summary.output_throughput()));
    set("total_token_throughput", json!(summary.total_throughput()));
    set("max_output_tokens_per_s", json!(summary.most_tokens_in_a_second));
    set("max_concurrent_requests", json!(summary.most_in_flight));
    for metric in Metric::ALL {
        let (key, numbers) = (metric.key(), summary.metric(metric));
        set(&format!("mean_{key}_ms"), json!(numbers.mean()));
        set(&format!("median_{key}_ms"), json!(numbers.median()));
        set(&format!("std_{key}_ms"), json!(numbers.std()));
        for &percent in &flags.result.metric_percentiles {
            set(&format!("p{percent}_{key}_ms"), json!(numbers.percentile(percent)));
        }
    }
    if flags.result.save_detailed {
        details(report.outcomes, &mut set);
    }
    let failures: Map<String, Value> = summary
        .failures
        .iter()
        .map(|(kind, one)| (kind.to_string(), json!({"count": one.count, "example": one.example})))
        .collect();
    let settings: Map<String, Value> =
        report.settings.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
    set(
        "tidemill",
        json!({
            "version": crate::VERSION,
            "url": report.url,
            "settings": settings,
            "failures": failures,
            "generator_lateness_ms": {
                "mean": summary.lateness.mean(),
                "p99": summary.lateness.percentile(99.0),
                "max": summary.lateness.max(),
            },
            "interrupted": report.interrupted,
            "answers_without_usage": summary.uncounted,
        }),
    );
    Value::Object(fields)
}

/// Each request's numbers in the order of their arrival, seconds as in vLLM's files; zero and empty for failed ones.
fn details(outcomes: &[Outcome], set: &mut dyn FnMut(&str, Value)) {
    let mut ordered: Vec<&Outcome> = outcomes.iter().collect();
    ordered.sort_by_key(|outcome| (outcome.planned, outcome.sent));
    let all =
        |number: &dyn Fn(&Outcome) -> Value| Value::Array(ordered.iter().map(|one| number(one)).collect());
    set("input_lens", all(&|one| json!(one.prompt_tokens())));
    set("output_lens", all(&|one| json!(one.result.as_ref().map_or(0, |answer| answer.output_tokens()))));
    set("ttfts", all(&|one| json!(one.result.as_ref().map_or(0.0, |answer| answer.first.as_secs_f64()))));
    set(
        "itls",
        all(&|one| match &one.result {
            Ok(answer) => answer.gaps.iter().map(|gap| gap.as_secs_f64()).collect(),
            Err(_) => json!([]),
        }),
    );
    set("start_times", all(&|one| json!(one.sent.as_secs_f64())));
    set(
        "errors",
        all(&|one| match &one.result {
            Ok(_) => json!(""),
            Err(failure) => json!(format!("{}: {}", failure.kind, failure.message)),
        }),
    );
}

/// JSON has no infinity; vLLM writes this.
fn rate(rate: Option<f64>) -> Value {
    match rate {
        Some(rate) if rate.is_infinite() => json!("inf"),
        rate => json!(rate),
    }
}
