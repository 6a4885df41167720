//! A KV cache that is too small for what is asked at once: sequences lose their blocks and are computed again, prompts
//! are found in the prefix cache or not any more, and every answer is the one that a request gets alone.

use std::time::Duration;

use serde_json::{Value, json};
use tidemill_tests::client::Client;
use tidemill_tests::deployment::{Deployment, eventually};
use tidemill_tests::fixtures;

#[tokio::test]
async fn answers_are_the_same_in_one_worker() {
    every_family(&["--colocated"]).await;
}

#[tokio::test]
async fn answers_are_the_same_over_shared_memory() {
    every_family(&["--transport", "shm", "--require-transport"]).await;
}

#[tokio::test]
async fn answers_are_the_same_over_tcp() {
    every_family(&["--transport", "tcp", "--require-transport"]).await;
}

async fn every_family(flags: &[&str]) {
    for model in ["llama2", "llama3", "llama-bf16-new-keys", "mistral", "qwen2", "qwen3"] {
        answers_are_the_same(model, flags).await;
    }
}

async fn answers_are_the_same(model: &str, flags: &[&str]) {
    let case = format!("{model}, {flags:?}");
    let folder = fixtures::model(model);
    let folder = folder.to_str().expect("UTF-8");
    let mut expected = Vec::new();
    {
        let roomy = Deployment::start(&[folder, "--colocated", "--no-enable-prefix-caching"]);
        for which in 0..PROMPTS.len() {
            expected.push(ask(&roomy.client, which).await.0);
        }
        assert_eq!(preemptions(&roomy.client).await, 0.0, "{case}: the expected answers are undisturbed");
    }
    let bytes = (BLOCKS * block_bytes(model)).to_string();
    let mut arguments = vec![folder, "--max-model-len", "304", "--kv-cache-memory", &bytes];
    arguments.extend(flags);
    let deployment = Deployment::start(&arguments);
    let client = &deployment.client;
    // Whether two of them grow at the same moment depends on when they arrive.
    for round in 0..ROUNDS {
        let answers = futures::future::join_all((0..PROMPTS.len()).map(|which| ask(client, which))).await;
        for (which, (answer, _)) in answers.iter().enumerate() {
            assert_eq!(
                *answer,
                expected[which],
                "{case}, round {round}, prompt {which}\n{}",
                deployment.log()
            );
        }
        eventually(&format!("{case}: the ledger closes"), LIMIT, || client.is_idle()).await;
        if 0.0 < preemptions(client).await {
            break;
        }
    }
    assert!(0.0 < preemptions(client).await, "{case}: nobody was preempted\n{}", deployment.log());
    // The longest one has just been asked, so that its blocks are the last to go.
    let longest = 3;
    ask(client, longest).await;
    let (answer, cached) = ask(client, longest).await;
    assert_eq!(answer, expected[longest], "{case}: cached");
    assert!(0 < cached, "{case}: nothing was found in the prefix cache\n{}", deployment.log());
}

async fn preemptions(client: &Client) -> f64 {
    client.metric("vllm:num_preemptions_total", "").await
}

/// The answer to a prompt, and how many of its tokens were cached.
async fn ask(client: &Client, which: usize) -> (Value, u64) {
    let prompt: Vec<usize> =
        (0..PROMPTS[which]).map(|index| 3 + (index * 7 + index / 48 * which) % 200).collect();
    let temperature = if which.is_multiple_of(2) { 0.0 } else { 0.9 };
    let reply = client
        .post(
            "/v1/completions",
            &json!({
                "prompt": prompt, "max_tokens": 70, "temperature": temperature, "seed": which,
                "ignore_eos": true, "logprobs": 2,
            }),
        )
        .await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let cached = reply.body["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
    (reply.body["choices"][0].clone(), cached)
}

/// Bytes of a block of 16 tokens in the model's own type.
fn block_bytes(model: &str) -> u64 {
    let config = std::fs::read_to_string(fixtures::model(model).join("config.json")).expect("a fixture");
    let config: Value = serde_json::from_str(&config).expect("JSON");
    let number = |key: &str| config[key].as_u64();
    let heads = number("num_attention_heads").expect("every model has heads");
    let head_dim = number("head_dim").or_else(|| Some(number("hidden_size")? / heads)).expect("a size");
    let kind = config["dtype"].as_str().or_else(|| config["torch_dtype"].as_str());
    let element = if kind == Some("float32") { 4 } else { 2 };
    let layers = number("num_hidden_layers").expect("every model has layers");
    16 * layers * 2 * number("num_key_value_heads").unwrap_or(heads) * head_dim * element
}

/// Tokens of each prompt: together much more than the cache holds, each alone less.
const PROMPTS: [usize; 6] = [17, 60, 150, 230, 100, 200];
/// Blocks of a worker's cache.
const BLOCKS: u64 = 26;
const ROUNDS: u32 = 6;
/// Not a promise about speed: the bound after which something counts as stuck on a loaded machine.
const LIMIT: Duration = Duration::from_secs(20);
