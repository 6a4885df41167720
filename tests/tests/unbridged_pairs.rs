//! Two workers whose caches nothing bridges: known when they meet, not when the first request fails.

use std::process::Command;

use serde_json::json;
use tidemill_tests::deployment::{Deployment, binary};
use tidemill_tests::fixtures;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_are_not_split_over_them_from_the_first_one_on() {
    let model = fixtures::model("llama3");
    let deployment = Deployment::start(&[&[model.to_str().expect("UTF-8")], &CACHES[..]].concat());
    let body = json!({ "prompt": [5, 6, 7, 8], "max_tokens": 3, "ignore_eos": true });
    let reply = deployment.client.post("/v1/completions", &body).await;
    assert_eq!((reply.status, &reply.body["usage"]["completion_tokens"]), (200, &json!(3)), "{reply:?}");
    let (_, metrics) = deployment.client.get("/metrics").await;
    for row in [
        "tidemill_fallbacks_total{reason=\"unlinked\"} 1",
        "tidemill_handoff_failures_total{worker=\"prefill-0\"} 0",
        "tidemill_handoff_failures_total{worker=\"decode-0\"} 0",
    ] {
        assert!(metrics.contains(row), "{row} is not in\n{metrics}");
    }
    assert!(deployment.log().contains("dtype differs"), "{}", deployment.log());
}

#[test]
fn serve_ends_where_their_handoffs_are_required() {
    let model = fixtures::model("llama3");
    let mut serve = Command::new(binary());
    serve.args(["serve", "--port", "0"]).arg(model).args(CACHES).args([
        "--transport",
        "tcp",
        "--require-transport",
    ]);
    let ended = serve.output().expect("the binary starts");
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(1), "{said}");
    assert!(said.contains("prefill-0 cannot hand over to decode-0: dtype differs"), "{said}");
}

/// Eight bits hold no f32.
const CACHES: [&str; 4] = ["--prefill-kv-cache-dtype", "int8", "--decode-kv-cache-dtype", "f32"];
