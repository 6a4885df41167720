//! Workers whose ranks share a model, as real processes: they hand over to workers of other numbers of ranks, say how many they
//! are, and come back when they die.

use std::time::Duration;

use serde_json::json;
use tidemill_tests::client::Client;
use tidemill_tests::deployment::{Deployment, eventually};
use tidemill_tests::fixtures;

fn prompt(which: u32) -> Vec<u32> {
    (0..20 + 60 * which).map(|index| 3 + (index * 7 + index / 48 * which) % 200).collect()
}

/// The tokens of some greedy answers, as text.
async fn answers(client: &Client) -> Vec<String> {
    let mut texts = Vec::new();
    for which in 0..4 {
        let reply = client.complete(&prompt(which), 24, json!({ "temperature": 0 })).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        texts.push(reply.body["choices"][0]["text"].as_str().expect("an answer has text").to_owned());
    }
    texts
}

#[tokio::test]
async fn workers_of_other_numbers_of_ranks_hand_over_and_answer_as_one_does() {
    let folder = fixtures::model("qwen3");
    let folder = folder.to_str().expect("the repository's path is UTF-8");
    let expected = answers(&Deployment::start(&[folder, "--colocated"]).client).await;
    for (of_prefill, of_decode, transport) in [(2, 1, "shm"), (1, 2, "tcp"), (4, 2, "shm")] {
        let row = format!("{of_prefill} to {of_decode}, {transport}");
        let (prefill, decode) = (of_prefill.to_string(), of_decode.to_string());
        let flags = ["--prefill-tensor-parallel-size", &prefill, "--decode-tensor-parallel-size", &decode];
        let arguments = [&[folder, "--require-transport", "--transport", transport][..], &flags].concat();
        let deployment = Deployment::start(&arguments);
        let client = &deployment.client;
        assert_eq!(answers(client).await, expected, "{row}\n{}", deployment.log());
        let metric = async |name, label| client.metric(name, label).await;
        for (worker, ranks) in [("prefill-0", of_prefill), ("decode-0", of_decode)] {
            let found = metric("tidemill_worker_tensor_parallel_size", worker).await;
            assert!((found - f64::from(ranks)).abs() < 0.5, "{row}: {worker} has {found} ranks");
        }
        let handoffs = metric("tidemill_handoff_total", "").await;
        assert!(0.0 < handoffs, "{row}: nothing was handed over\n{}", deployment.log());
        let in_place = metric("tidemill_handoff_in_place_total", "").await;
        assert_eq!(0.0 < in_place, transport == "shm", "{row}: {in_place} of {handoffs} in place");
        assert!(metric("tidemill_fallbacks_total", "").await == 0.0, "{row}\n{}", deployment.log());
        eventually(&format!("{row}: the ledger closes"), LIMIT, || client.is_idle()).await;
    }
}

#[tokio::test]
async fn a_worker_of_two_ranks_that_dies_comes_back() {
    let folder = fixtures::model("llama3");
    let folder = folder.to_str().expect("the repository's path is UTF-8");
    let deployment = Deployment::start(&[folder, "--prefill-tensor-parallel-size", "2"]);
    let client = &deployment.client;
    let expected = answers(client).await;
    deployment.workers("prefill")[0].kill();
    // By decode alone, or split again: the same tokens.
    assert_eq!(answers(client).await, expected, "{}", deployment.log());
    let handoffs = client.metric("tidemill_handoff_total", "").await;
    eventually("requests are split again", LIMIT, || async {
        assert_eq!(answers(client).await, expected);
        handoffs < client.metric("tidemill_handoff_total", "").await
    })
    .await;
    eventually("the ledger closes", LIMIT, || client.is_idle()).await;
}

const LIMIT: Duration = Duration::from_secs(60);
