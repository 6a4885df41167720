//! Handoffs that change the type of the KV cache, and its block length on the way: nothing is refused, nothing is done
//! in another way, and the answers stay near those of one worker in the model's own type.
//!
//! What is compared is what both workers say behind the same tokens: the log-probability of every token of the whole
//! answer up to and including the first place where the other one chose differently. There the choice of the whole one
//! must be among the best of the other, nearly as likely as it was: only near ties may be decided the other way.

use serde_json::{Value, json};
use tidemill_tests::client::Client;
use tidemill_tests::deployment::{Deployment, eventually};
use tidemill_tests::fixtures;

/// Each way between two types of numbers: prefill's and decode's.
const FLOATS: [[&str; 2]; 6] =
    [["bf16", "f16"], ["f16", "bf16"], ["bf16", "f32"], ["f32", "bf16"], ["f16", "f32"], ["f32", "f16"]];
const TO_INT8: [[&str; 2]; 3] = [["bf16", "int8"], ["f16", "int8"], ["f32", "int8"]];
const TO_FP8: [[&str; 2]; 3] = [["bf16", "fp8"], ["f16", "fp8"], ["f32", "fp8"]];
const BLOCKS: [[&str; 2]; 2] = [["16", "64"], ["64", "16"]];

#[tokio::test]
async fn every_pair_of_types_over_shared_memory() {
    every_pair_of_types("shm").await;
}

#[tokio::test]
async fn every_pair_of_types_over_tcp() {
    every_pair_of_types("tcp").await;
}

/// One model of each kind that writes its cache in a way of its own: a head for each query, windows, biases, norms
/// of queries and keys, weights in half precision.
#[tokio::test]
async fn every_family_to_int8() {
    let families = [
        ("llama2", NEAR_INT8),
        ("llama-yarn", NEAR_INT8),
        ("mistral", NEAR_INT8),
        ("qwen2", NEAR_INT8_WITH_BIASES),
        ("qwen3", NEAR_INT8),
        ("qwen3-yarn", NEAR_INT8),
    ];
    for ((model, bound), transport) in families.into_iter().zip(["shm", "tcp"].into_iter().cycle()) {
        let expected = expected(model).await;
        let blocks = if transport == "shm" { BLOCKS[0] } else { BLOCKS[1] };
        compare(model, transport, ["auto", "int8"], blocks, &expected, bound).await;
    }
}

async fn every_pair_of_types(transport: &str) {
    let expected = expected("llama3").await;
    let floats = FLOATS.map(|types| (types, NEAR));
    let to_int8 = TO_INT8.map(|types| (types, NEAR_INT8));
    let to_fp8 = TO_FP8.map(|types| (types, NEAR_FP8));
    for (types, bound) in floats.into_iter().chain(to_int8).chain(to_fp8) {
        for blocks in BLOCKS {
            compare("llama3", transport, types, blocks, &expected, bound).await;
        }
    }
}

/// What one worker answers, with the cache in the type of the model.
async fn expected(model: &str) -> Vec<Answer> {
    let folder = fixtures::model(model);
    let whole = Deployment::start(&[folder.to_str().expect("UTF-8"), "--colocated"]);
    answers(&whole.client).await
}

async fn compare(
    model: &str,
    transport: &str,
    types: [&str; 2],
    blocks: [&str; 2],
    expected: &[Answer],
    bound: f64,
) {
    let case = format!("{model}, {transport}, {types:?}, blocks of {blocks:?}");
    let folder = fixtures::model(model);
    let mut flags = vec![folder.to_str().expect("UTF-8"), "--require-transport", "--transport", transport];
    flags.extend(["--prefill-kv-cache-dtype", types[0], "--decode-kv-cache-dtype", types[1]]);
    flags.extend(["--prefill-block-size", blocks[0], "--decode-block-size", blocks[1]]);
    let deployment = Deployment::start(&flags);
    let found = answers(&deployment.client).await;
    let mut worst = 0.0_f64;
    for (expected, found) in expected.iter().zip(&found) {
        let shared =
            expected.tokens.iter().zip(&found.tokens).take_while(|(one, other)| one == other).count();
        assert!(0 < shared, "{case}: the first token is another one, so that nothing is compared");
        for place in 0..expected.tokens.len().min(shared + 1) {
            let token = &expected.tokens[place];
            let said = found.best[place][token].as_f64();
            let Some(said) = said else {
                panic!("{case}: {token:?} is not among the best at {place}: {}", found.best[place])
            };
            worst = worst.max((said - expected.chosen[place]).abs());
        }
    }
    eprintln!("{case}: at most {worst:.4} apart");
    assert!(worst <= bound, "{case}: {worst} apart\n{}", deployment.log());
    eventually(&format!("{case}: all are handed over"), LIMIT, || async {
        deployment.client.metric("tidemill_handoff_total", "").await >= f64::from(PROMPTS)
    })
    .await;
    for failures in
        ["tidemill_handoff_failures_total", "tidemill_handoff_refusals_total", "tidemill_fallbacks_total"]
    {
        assert_eq!(
            deployment.client.metric(failures, "").await,
            0.0,
            "{case}: {failures}\n{}",
            deployment.log()
        );
    }
    eventually(&format!("{case}: the ledger closes"), LIMIT, || deployment.client.is_idle()).await;
}

/// The tokens of an answer, their log-probabilities, and the best ones at each place by token.
struct Answer {
    tokens: Vec<String>,
    chosen: Vec<f64>,
    best: Vec<Value>,
}

/// Answers to prompts of less than a block, of a few and of many.
async fn answers(client: &Client) -> Vec<Answer> {
    let mut answers = Vec::new();
    for length in [11, 100, 300] {
        let prompt: Vec<u32> = (0..length).map(|index| 3 + (index * 7 + length) % 200).collect();
        let extra = json!({"logprobs": 5});
        let reply = client.complete(&prompt, 40, extra).await;
        assert_eq!(reply.status, 200, "{}", reply.body);
        let said = &reply.body["choices"][0]["logprobs"];
        let list = |field: &str| said[field].as_array().expect("a list for each token").clone();
        answers.push(Answer {
            tokens: list("tokens").iter().map(|token| token.as_str().expect("a text").to_owned()).collect(),
            chosen: list("token_logprobs").iter().map(|it| it.as_f64().expect("a number")).collect(),
            best: list("top_logprobs"),
        });
    }
    assert_eq!(answers.len(), PROMPTS as usize);
    answers
}

const PROMPTS: u32 = 3;
/// Among floats: bf16 rounds by 2⁻⁹ of a number, which these models turn into less than this.
const NEAR: f64 = 0.06;
/// To int8: a number is rounded by 1/254 of the largest one of its row.
const NEAR_INT8: f64 = 0.15;
/// To fp8: each number is rounded by 1/16 of itself.
const NEAR_FP8: f64 = 0.6;
/// Biases of keys make the largest one of a row many times the others. One worker with an int8 cache is further off.
const NEAR_INT8_WITH_BIASES: f64 = 0.7;
const LIMIT: std::time::Duration = std::time::Duration::from_secs(20);
