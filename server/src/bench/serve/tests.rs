//! Runs against servers that behave and servers that do not.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use clap::Parser;
use futures::stream;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::outcome::{FailureKind, Usage};
use super::*;
use crate::openai::tests::support;

#[derive(Parser)]
struct Typed {
    #[command(flatten)]
    flags: ServeBenchFlags,
}

fn flags(url: &str, more: &str) -> ServeBenchFlags {
    let typed = ["bench", "--base-url", url, "--disable-tqdm"].into_iter().chain(more.split_whitespace());
    Typed::parse_from(typed).flags
}

async fn listening(router: Router) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    format!("http://{address}")
}

/// What a server does with its n-th streamed request, counted from 0.
type Behaviour = fn(usize) -> Response;

/// A server that answers short questions well and streams as told.
async fn behaving(behaviour: Behaviour) -> String {
    let models = || async { axum::Json(json!({"data": [{"id": "m", "max_model_len": 4096}]})) };
    let asked = Arc::new(AtomicUsize::new(0));
    let complete = move |State(asked): State<Arc<AtomicUsize>>, axum::Json(body): axum::Json<Value>| async move {
        if body["stream"] == json!(true) {
            return behaviour(asked.fetch_add(1, Ordering::Relaxed));
        }
        let words = body["prompt"].as_str().unwrap().split_whitespace().count();
        axum::Json(json!({"usage": {"prompt_tokens": 2 * words + 1}})).into_response()
    };
    let router = Router::new()
        .route("/v1/models", get(models))
        .route("/v1/completions", post(complete))
        .with_state(asked);
    listening(router).await
}

/// A stream of these pieces, and then its end.
fn pieces(pieces: &[&str]) -> Response {
    let pieces: Vec<Bytes> = pieces.iter().map(|piece| Bytes::from((*piece).to_owned())).collect();
    let stream = stream::iter(pieces.into_iter().map(Ok::<_, std::io::Error>));
    ([("content-type", "text/event-stream")], Body::from_stream(stream)).into_response()
}

const TOKEN: &str = "data: {\"choices\": [{\"text\": \"a\", \"finish_reason\": null}]}\n\n";
const END: &str = "data: {\"choices\": [{\"text\": \"\", \"finish_reason\": \"length\"}]}\n\n";
const USAGE: &str = "data: {\"choices\": [], \"usage\": {\"prompt_tokens\": 9, \"completion_tokens\": 3}}\n\ndata: [DONE]\n\n";

async fn outcomes(url: &str, more: &str) -> (Workload, String, Run) {
    let flags = flags(url, more);
    let workload = Workload::plan(&flags.load, &flags.prompts).unwrap();
    let (_, form, run) = measure(&flags, &workload).await.unwrap();
    (workload, form, run)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prompts_are_exactly_as_long_as_wanted_where_the_server_tells_its_tokens() {
    let front = support::front(&["one two three four five"]);
    let url = listening(front.router.clone()).await;
    let flags = "--num-prompts 6 --max-concurrency 4 --random-input-len 30 --random-range-ratio 0.5 --random-output-len 4";
    let (workload, form, run) = outcomes(&url, flags).await;
    assert!(form.starts_with("token ids"), "{form}");
    let asked = front.generator.asked.lock().unwrap();
    let sorted = |mut lengths: Vec<u32>| {
        lengths.sort_unstable();
        lengths
    };
    let wanted = sorted(workload.requests.iter().map(workload::Planned::input_tokens).collect());
    assert_eq!(sorted(asked.iter().map(|one| one.prompt.len() as u32).collect()), wanted);
    let counted =
        |one: &Outcome| one.result.as_ref().unwrap_or_else(|failure| panic!("{failure:?}")).usage.unwrap();
    assert_eq!(sorted(run.outcomes.iter().map(|one| counted(one).prompt_tokens).collect()), wanted);
    assert!(run.outcomes.iter().all(|one| counted(one).completion_tokens <= one.wanted.1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chat_prompts_are_text_of_the_measured_length() {
    let front = support::front(&["fine"]);
    let url = listening(front.router.clone()).await;
    let flags = "--endpoint /v1/chat/completions --num-prompts 3 --max-concurrency 2 --random-input-len 100 --random-output-len 4";
    let (_, form, run) = outcomes(&url, flags).await;
    assert!(form.starts_with("text"), "{form}");
    for outcome in &run.outcomes {
        let tokens = f64::from(outcome.prompt_tokens());
        assert!((tokens - 100.0).abs() < 25.0, "{tokens} tokens, {:?}", outcome.result);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failures_are_counted_by_kind_and_answers_beside_them_stay() {
    let url = behaving(|index| match index % 5 {
        0 => pieces(&[TOKEN, END, USAGE]),
        1 => {
            (StatusCode::INTERNAL_SERVER_ERROR, "{\"error\": {\"message\": \"out of luck\"}}").into_response()
        }
        2 => pieces(&[TOKEN, TOKEN]),
        3 => pieces(&[TOKEN, END, "data: [DONE]\n\n"]),
        _ => pieces(&[TOKEN, "data: {\"error\": {\"message\": \"lost\"}}\n\n"]),
    })
    .await;
    let (_, form, run) =
        outcomes(&url, "--num-prompts 10 --random-input-len 101 --random-output-len 3").await;
    assert!(form.contains("2.00 tokens a word"), "{form}");
    let summary = Summary::of(&run, &[]);
    let kinds = [
        (FailureKind::Status(500), "out of luck"),
        (FailureKind::Reported, "lost"),
        (FailureKind::Cut, "finish"),
    ];
    for (kind, message) in kinds {
        let failures = &summary.failures[&kind];
        assert_eq!(failures.count, 2, "{kind}");
        assert!(failures.example.contains(message), "{kind}: {}", failures.example);
    }
    assert_eq!((summary.completed, summary.failed(), summary.uncounted), (4, 6, 2));
    assert_eq!(summary.output_tokens, 2 * 3 + 2, "usage where there is one, otherwise events");
    assert_eq!(summary.input_tokens, 2 * 9 + 2 * 101);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_server_and_a_silent_one_are_told_apart() {
    let silent =
        behaving(|_| Body::from_stream(stream::pending::<Result<Bytes, std::io::Error>>()).into_response());
    let (_, _, run) = outcomes(&silent.await, "--num-prompts 2 --request-timeout 0.2").await;
    let kinds: Vec<FailureKind> =
        run.outcomes.iter().map(|one| one.result.as_ref().unwrap_err().kind).collect();
    assert_eq!(kinds, [FailureKind::TimedOut; 2]);
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let flags = flags(&format!("http://{gone}"), "--num-prompts 1");
    let workload = Workload::plan(&flags.load, &flags.prompts).unwrap();
    let error = measure(&flags, &workload).await.expect_err("nobody listens");
    assert!(format!("{error:#}").contains("tidemill serve"), "{error:#}");
}

/// No answer begins before all requests have come: a generator that waited for answers would never get one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn arrivals_do_not_wait_for_answers() {
    const ALL: usize = 40;
    let all_came = Arc::new(tokio::sync::Barrier::new(ALL));
    let models = || async { axum::Json(json!({"data": [{"id": "m"}]})) };
    let complete = move |axum::Json(body): axum::Json<Value>| {
        let all_came = Arc::clone(&all_came);
        async move {
            if body["stream"] != json!(true) {
                return axum::Json(json!({"usage": {"prompt_tokens": 5}})).into_response();
            }
            all_came.wait().await;
            pieces(&[TOKEN, END, USAGE])
        }
    };
    let router = Router::new().route("/v1/models", get(models)).route("/v1/completions", post(complete));
    let url = listening(router).await;
    let (_, _, run) = outcomes(&url, "--num-prompts 40 --request-rate 400 --request-timeout 60").await;
    assert_eq!(run.outcomes.len(), ALL);
    for outcome in &run.outcomes {
        let answer = outcome.result.as_ref().unwrap_or_else(|failure| panic!("{failure:?}"));
        assert_eq!(answer.usage, Some(Usage { prompt_tokens: 9, completion_tokens: 3 }));
        assert!(outcome.planned <= outcome.issued && outcome.issued <= outcome.sent, "{outcome:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_are_in_flight_than_allowed() {
    let in_flight = Arc::new(Mutex::new((0, 0)));
    let seen = Arc::clone(&in_flight);
    let models = || async { axum::Json(json!({"data": [{"id": "m"}]})) };
    let complete = move |axum::Json(body): axum::Json<Value>| {
        let in_flight = Arc::clone(&in_flight);
        async move {
            if body["stream"] != json!(true) {
                return axum::Json(json!({"usage": {"prompt_tokens": 5}})).into_response();
            }
            {
                let mut counts = in_flight.lock().unwrap();
                counts.0 += 1;
                counts.1 = counts.0.max(counts.1);
            }
            tokio::task::yield_now().await;
            in_flight.lock().unwrap().0 -= 1;
            pieces(&[TOKEN, END, USAGE])
        }
    };
    let router = Router::new().route("/v1/models", get(models)).route("/v1/completions", post(complete));
    let url = listening(router).await;
    let (_, _, run) = outcomes(&url, "--num-prompts 50 --max-concurrency 3").await;
    assert_eq!(run.outcomes.iter().filter(|one| one.result.is_ok()).count(), 50);
    let most = seen.lock().unwrap().1;
    assert!((1..=3).contains(&most), "{most} at once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_saved_is_whole() {
    let url = behaving(|index| match index {
        1 => StatusCode::SERVICE_UNAVAILABLE.into_response(),
        _ => pieces(&[TOKEN, TOKEN, END, USAGE]),
    })
    .await;
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().display();
    let flags = flags(
        &url,
        &format!(
            "--num-prompts 4 --goodput ttft:60000 tpot:0 --save-result --save-detailed --result-dir {at}/new \
             --result-filename r.json --report {at}/r.html --metadata host=here --metric-percentiles 50,99.9"
        ),
    );
    let workload = Workload::plan(&flags.load, &flags.prompts).unwrap();
    let (client, form, run) = measure(&flags, &workload).await.unwrap();
    let report = Report {
        flags: &flags,
        url: "http://host/<script>",
        model: &client.model,
        started: Zoned::now(),
        planned: 4,
        settings: settings(&flags, &workload, form),
        summary: Summary::of(&run, &flags.result.goodput),
        outcomes: &run.outcomes,
        interrupted: true,
        remarks: Vec::new(),
    };
    save(&report).unwrap();
    let text = table::text(&report);
    for part in
        ["requests answered                    3", "HTTP 503", "interrupted", "p99.9", "Time to first token"]
    {
        assert!(text.contains(part), "`{part}` is missing in {text}");
    }
    let json: Value =
        serde_json::from_str(&fs::read_to_string(folder.path().join("new/r.json")).unwrap()).unwrap();
    assert_eq!(
        (&json["completed"], &json["failed"], &json["total_output_tokens"]),
        (&json!(3), &json!(1), &json!(9))
    );
    assert_eq!((&json["request_rate"], &json["host"]), (&Value::Null, &json!("here")));
    assert_eq!(json["tidemill"]["failures"]["HTTP 503"]["count"], json!(1));
    for key in
        ["mean_ttft_ms", "median_tpot_ms", "std_itl_ms", "p50_e2el_ms", "p99.9_ttft_ms", "request_goodput"]
    {
        assert!(json[key].is_number(), "{key} in {json}");
    }
    assert_eq!(json["ttfts"].as_array().map(Vec::len), Some(4));
    let page = fs::read_to_string(folder.path().join("r.html")).unwrap();
    for part in ["<!doctype html>", "p99.9", "HTTP 503", "&lt;script&gt;", "</html>"] {
        assert!(page.contains(part), "`{part}` is missing in the page");
    }
    for outside in ["<script", "src=", "href=", "@import", "url("] {
        assert!(!page.contains(outside), "the page needs nothing from elsewhere, but has {outside}");
    }
    for tag in ["section", "svg", "table", "div", "tr", "td", "th", "p"] {
        let opened = page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
        assert_eq!(opened, page.matches(&format!("</{tag}>")).count(), "<{tag}> is closed");
    }
}
