//! The same request gives the same answer on two workers as on one: tokens, log-probabilities, usage, finish reasons
//! and error bodies, bit for bit, for every family, over every transport and every lossless pair of layouts.

use serde_json::{Value, json};
use tidemill_tests::client::{Client, Reply, comparable};
use tidemill_tests::deployment::{Deployment, eventually};
use tidemill_tests::fixtures;

/// Ways to split that must make no difference; each row is the flags of `serve`.
#[rustfmt::skip]
const SPLITS: [(&str, &[&str]); 13] = [
    ("shared memory, in place",             &["--transport", "shm"]),
    ("shared memory, copied",               &["--transport", "shm", "--no-in-place"]),
    ("tcp",                                 &["--transport", "tcp"]),
    ("tcp, full digests",                   &["--transport", "tcp", "--digest", "full"]),
    ("shared memory, blocks of 16 to 64",   &["--transport", "shm", "--prefill-block-size", "16", "--decode-block-size", "64"]),
    ("tcp, blocks of 16 to 64",             &["--transport", "tcp", "--prefill-block-size", "16", "--decode-block-size", "64"]),
    ("shared memory, blocks of 64 to 16",   &["--transport", "shm", "--prefill-block-size", "64", "--decode-block-size", "16"]),
    ("tcp, blocks of 64 to 16",             &["--transport", "tcp", "--prefill-block-size", "64", "--decode-block-size", "16"]),
    ("shared memory, axis order turned",    &["--transport", "shm", "--prefill-axis-order", "head-token", "--decode-axis-order", "token-head"]),
    ("tcp, axis order and length turned",   &["--transport", "tcp", "--prefill-axis-order", "token-head", "--decode-axis-order", "head-token",
                                              "--prefill-block-size", "16", "--decode-block-size", "32"]),
    ("shared memory, all guesses made",     &["--transport", "shm", "--speculative-config", GUESSES]),
    ("tcp, all guesses made",               &["--transport", "tcp", "--speculative-config", GUESSES]),
    ("shared memory, another model guesses", &["--transport", "shm", "--speculative-config", DRAFT]),
];

/// Whether they pay or not, so that right and wrong ones are met.
const GUESSES: &str =
    r#"{"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3, "adaptive": false}"#;

/// Stands for the `--speculative-config` of a draft model, which differs from family to family.
const DRAFT: &str = "draft";

/// A draft model of the same vocabulary: one family guesses for all others; one has a vocabulary of its own, and itself.
fn draft_for(model: &str) -> String {
    let draft = if model == "qwen2" { model } else { "llama2" };
    let folder = fixtures::model(draft);
    json!({ "method": "draft_model", "adaptive": false, "model": folder }).to_string()
}

/// Every family in turn, so that at most one whole and one split deployment per test thread run at a time.
async fn family_is_equal(model: &str) {
    let folder = fixtures::model(model);
    let folder = folder.to_str().expect("the repository's path is UTF-8");
    let whole = Deployment::start(&[folder, "--colocated"]);
    let expected = answers(&whole.client).await;
    assert!(expected.iter().filter(|(_, reply)| reply.status == 200).count() > 8, "{model}: {expected:?}");
    for (split, flags) in SPLITS {
        let mut arguments = vec![folder, "--require-transport"];
        let draft = draft_for(model);
        arguments.extend(flags.iter().map(|flag| if *flag == DRAFT { draft.as_str() } else { flag }));
        let deployment = Deployment::start(&arguments);
        let found = answers(&deployment.client).await;
        for ((name, expected), (_, found)) in expected.iter().zip(&found) {
            assert_eq!(expected, found, "{model}, {split}: {name}");
        }
        let handoffs = deployment.client.metric("tidemill_handoff_total", "").await;
        assert!(handoffs > 0.0, "{model}, {split}: nothing was handed over\n{}", deployment.log());
        let fallbacks = deployment.client.metric("tidemill_fallbacks_total", "").await;
        assert!(fallbacks == 0.0, "{model}, {split}: {fallbacks} fallbacks\n{}", deployment.log());
        let guesses = deployment.client.metric("vllm:spec_decode_num_draft_tokens_total", "").await;
        assert_eq!(
            guesses > 0.0,
            flags.contains(&"--speculative-config"),
            "{model}, {split}: {guesses} guesses"
        );
        eventually(&format!("{model}, {split}: the ledger closes"), LIMIT, || deployment.client.is_idle())
            .await;
    }
}

/// The requests, each with a name, in an order that meets the prefix cache both empty and filled.
async fn answers(client: &Client) -> Vec<(&'static str, Reply)> {
    let prompt =
        |length: u32| -> Vec<u32> { (0..length).map(|index| 3 + (index * 7 + length) % 200).collect() };
    let completion = "/v1/completions";
    let long = prompt(300);
    let with = |prompt: &[u32], extra: Value| {
        let mut body =
            json!({"prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": true, "logprobs": 3});
        tidemill_tests::client::merge(&mut body, extra);
        body
    };
    #[rustfmt::skip]
    let requests = [
        ("one token",                   completion, with(&prompt(1), json!({}))),
        ("one less than a block",       completion, with(&prompt(15), json!({}))),
        ("a block",                     completion, with(&prompt(16), json!({}))),
        ("one more than a block",       completion, with(&prompt(17), json!({}))),
        ("many blocks",                 completion, with(&long, json!({}))),
        ("many blocks again, cached",   completion, with(&long, json!({}))),
        ("a prefix that is cached",     completion, with(&long[..200], json!({}))),
        ("sampled with a seed",         completion, with(&prompt(40), json!({"temperature": 1.0, "top_p": 0.9, "seed": 7}))),
        ("sampled with penalties",      completion, with(&prompt(33), json!({"temperature": 0.8, "top_k": 20, "min_p": 0.02, "seed": 8,
            "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2, "logit_bias": {"5": 2.0}}))),
        ("three choices",               completion, with(&prompt(20), json!({"temperature": 1.0, "seed": 9, "n": 3}))),
        ("stop strings",                completion, with(&prompt(22), json!({"stop": ["e", "in", " "]}))),
        ("stop tokens after ten",       completion, with(&prompt(23), json!({"stop_token_ids": (3..250).step_by(4).collect::<Vec<u32>>(), "min_tokens": 10}))),
        ("one output token",            completion, with(&prompt(18), json!({"max_tokens": 1}))),
        ("echo with log-probabilities", completion, with(&prompt(18), json!({"echo": true}))),
        ("streamed with usage",         completion, with(&prompt(21), json!({"stream": true, "stream_options": {"include_usage": true}}))),
        ("too long",                    completion, with(&prompt(300), json!({"max_tokens": 1_000_000}))),
        ("no such model",               completion, with(&prompt(3), json!({"model": "other"}))),
        ("a wrong type",                completion, with(&prompt(3), json!({"temperature": "hot"}))),
    ];
    let mut replies = Vec::new();
    for (name, path, body) in requests {
        let mut reply = comparable(client.post(path, &body).await);
        forget_cache_hits(&mut reply.body);
        if reply.body.is_array() {
            reply.body = joined(&reply.body);
        }
        replies.push((name, reply));
    }
    replies
}

/// Where the prefix was found depends on which worker has seen it; the text does not.
fn forget_cache_hits(body: &mut Value) {
    match body {
        Value::Object(fields) => {
            fields.remove("prompt_tokens_details");
            fields.values_mut().for_each(forget_cache_hits);
        }
        Value::Array(items) => items.iter_mut().for_each(forget_cache_hits),
        _ => {}
    }
}

/// A stream as one value: how tokens were grouped into events depends on timing, their sequence does not.
fn joined(events: &Value) -> Value {
    let choices = || events.as_array().into_iter().flatten().filter_map(|event| event["choices"].get(0));
    let text: String = choices().filter_map(|choice| choice["text"].as_str()).collect();
    let list = |field: &str| -> Vec<Value> {
        choices().filter_map(|choice| choice["logprobs"][field].as_array().cloned()).flatten().collect()
    };
    let finish: Vec<&Value> =
        choices().map(|choice| &choice["finish_reason"]).filter(|it| !it.is_null()).collect();
    let usage =
        events.as_array().into_iter().flatten().map(|event| &event["usage"]).rfind(|it| !it.is_null());
    json!({"text": text, "tokens": list("tokens"), "logprobs": list("token_logprobs"), "finish": finish, "usage": usage})
}

/// One test per family, so that they run side by side and a failure names its family.
macro_rules! families {
    ($($test:ident => $folder:literal),* $(,)?) => {
        $(#[tokio::test]
        async fn $test() {
            family_is_equal($folder).await;
        })*

        #[test]
        fn every_fixture_has_its_test() {
            let tested = [$($folder),*];
            let missing: Vec<String> =
                fixtures::models().into_iter().filter(|name| !tested.contains(&name.as_str())).collect();
            assert!(missing.is_empty(), "models without a test here: {missing:?}");
        }
    };
}

families! {
    llama_bf16_new_keys => "llama-bf16-new-keys",
    llama_bias => "llama-bias",
    llama_f16_old_keys => "llama-f16-old-keys",
    llama_linear => "llama-linear",
    llama_sharded => "llama-sharded",
    llama_yarn => "llama-yarn",
    llama_yarn_all_fields => "llama-yarn-all-fields",
    llama2 => "llama2",
    llama3 => "llama3",
    mistral => "mistral",
    qwen2 => "qwen2",
    qwen2_window => "qwen2-window",
    qwen3 => "qwen3",
    qwen3_yarn => "qwen3-yarn",
}

const LIMIT: std::time::Duration = std::time::Duration::from_secs(5);
