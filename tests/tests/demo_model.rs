//! What a person sees first: `tidemill serve` without a model answers questions, and answers them right.

use serde_json::Value;
use tidemill_tests::client::Client;
use tidemill_tests::deployment::Deployment;

/// Right answers of the twenty held-out questions that every variant must give.
const ENOUGH: usize = 18;

#[tokio::test]
async fn the_demo_model_is_right_split_and_whole_and_in_fewer_bits() {
    #[rustfmt::skip]
    let rows: [(&str, &[&str]); 12] = [
        ("split",                               &[]),
        ("split over tcp",                      &["--transport", "tcp"]),
        ("colocated",                           &["--colocated"]),
        ("bf16 prefill, int8 decode",           &["--decode-kv-cache-dtype", "int8"]),
        ("bf16 prefill, fp8 decode",            &["--decode-kv-cache-dtype", "fp8"]),
        ("fp8 keys and values",                 &["--kv-cache-dtype", "fp8_e4m3"]),
        ("int8 weights",                        &["--quantization", "int8"]),
        ("fp8 weights",                         &["--quantization", "fp8"]),
        ("fp8 all over",                        &["--quantization", "fp8", "--kv-cache-dtype", "fp8", "--colocated"]),
        ("int4 weights",                        &["--quantization", "int4", "--colocated"]),
        ("two ranks prefill, one decodes",      &["--prefill-tensor-parallel-size", "2"]),
        ("two ranks of int4 weights",           &["--quantization", "int4", "--colocated", "--tensor-parallel-size", "2"]),
    ];
    for (name, flags) in rows {
        let deployment = Deployment::start(flags);
        let right = right_answers(&deployment.client, name).await;
        assert!(ENOUGH <= right, "{name}: {right} of 20 right");
    }
}

async fn right_answers(client: &Client, variant: &str) -> usize {
    let questions = tidemill_tests::fixtures::tests_folder().join("../models/demo/questions.json");
    let questions = std::fs::read_to_string(questions).expect("the demo model has its questions");
    let questions: Vec<Value> = serde_json::from_str(&questions).expect("a list of questions");
    assert_eq!(questions.len(), 20);
    let mut right = 0;
    for question in questions {
        let answer = client.chat(&question["messages"]).await;
        let expected = question["expect"].as_str().expect("a question has an expected answer");
        let is_right = match question["match"].as_str() {
            Some("equals") => answer.trim() == expected,
            _ => answer.contains(expected),
        };
        if !is_right {
            eprintln!("{variant}: {}: expected {expected:?}, got {answer:?}", question["name"]);
        }
        right += usize::from(is_right);
    }
    right
}
