//! `tidemill bench serve` against `tidemill serve`: what it says of the run is what the server says of it too.

use std::process::Command;

use serde_json::{Value, json};
use tidemill_tests::deployment::{Deployment, binary};

#[tokio::test]
async fn a_load_is_answered_and_counted_as_the_server_counts() {
    let deployment = Deployment::start(&[]);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let report = folder.path().join("report.html");
    let output = Command::new(binary())
        .args(["bench", "serve", "--base-url", deployment.client.base(), "--seed", "3"])
        .args(["--num-prompts", "24", "--request-rate", "40", "--burstiness", "0.5", "--num-warmups", "1"])
        .args(["--random-input-len", "60", "--random-output-len", "12", "--random-range-ratio", "0.5"])
        .args(["--random-prefix-len", "32", "--ignore-eos", "--goodput", "ttft:600000", "e2el:600000"])
        .args(["--save-result", "--save-detailed", "--result-filename", "result.json", "--result-dir"])
        .arg(folder.path())
        .arg("--report")
        .arg(&report)
        .output()
        .expect("the binary starts");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let result = std::fs::read_to_string(folder.path().join("result.json")).expect("the result is saved");
    let result: Value = serde_json::from_str(&result).expect("the result is JSON");
    assert_eq!((&result["completed"], &result["failed"]), (&json!(24), &json!(0)), "{said}");
    assert_eq!(
        result["request_goodput"], result["request_throughput"],
        "every request is within such limits"
    );
    let sum = |field: &str| -> u64 {
        result[field].as_array().expect("a list").iter().filter_map(Value::as_u64).sum()
    };
    assert_eq!(sum("output_lens"), result["total_output_tokens"].as_u64().expect("a number"));
    assert_eq!(sum("input_lens"), result["total_input_tokens"].as_u64().expect("a number"));
    // The server counts the warm-up too: it is the first request once more.
    let with_warm_up = |field: &str| (sum(field) + result[field][0].as_u64().expect("a length")) as f64;
    let served = deployment.client.metric("vllm:prompt_tokens_total", "").await;
    assert_eq!(with_warm_up("input_lens"), served, "{said}");
    let generated = deployment.client.metric("vllm:generation_tokens_total", "").await;
    assert_eq!(with_warm_up("output_lens"), generated, "{said}");
    assert!(0.0 < result["median_ttft_ms"].as_f64().expect("a time"));
    assert!(said.contains("Time to first token") && said.contains("requests answered"), "{said}");
    assert!(std::fs::read_to_string(report).expect("the page is there").contains("<svg"));
}

#[tokio::test]
async fn requests_that_do_not_fit_are_failures_with_the_servers_words() {
    let deployment = Deployment::start(&["--colocated", "--max-model-len", "64"]);
    let run = |length: &str| {
        let arguments = ["--num-prompts", "3", "--random-input-len", length, "--random-output-len", "8"];
        let output = Command::new(binary())
            .args(["bench", "serve", "--base-url", deployment.client.base()])
            .args(arguments)
            .output()
            .expect("the binary starts");
        let (said, warned) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        (output.status.success(), said.into_owned(), warned.into_owned())
    };
    let (is_success, said, warned) = run("200");
    assert!(!is_success, "{said}");
    assert!(said.contains("requests failed: HTTP 400") && said.contains("3  ("), "{said}");
    assert!(warned.contains("3 of 3 requests are longer than the server's 64 tokens"), "{warned}");
    assert!(warned.contains("no request was answered"), "{warned}");
    let (is_success, said, _) = run("40");
    assert!(is_success && !said.contains("failed"), "{said}");
}
