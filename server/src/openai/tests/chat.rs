//! `/v1/chat/completions`: texts, stop conditions, streams, log-probabilities.

use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::atomic::Ordering;

use super::support::{EOS, Front, config, front, model_text, question, streamed_text, with};
use crate::generation::GenerationError;

const CHAT: &str = "/v1/chat/completions";

#[tokio::test]
async fn an_answer_has_the_form_of_the_api() {
    let front = front(&["Hello, the thing"]);
    let answer = front.ask(CHAT, &question(json!({"unknown_field": {"is": "ignored"}}))).await;
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], "tiny");
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert!(answer["created"].is_u64());
    let choice = &answer["choices"][0];
    assert_eq!(
        choice["message"],
        json!({"role": "assistant", "content": "Hello, the thing", "refusal": null})
    );
    assert_eq!((&choice["finish_reason"], &choice["logprobs"]), (&json!("stop"), &Value::Null));
    let usage = &answer["usage"];
    let sum = usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap();
    assert_eq!(usage["total_tokens"], sum);
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 3);
}

#[tokio::test]
async fn the_prompt_is_the_templates_text_with_one_beginning() {
    let front = front(&["fine"]);
    front.ask(CHAT, &question(json!({}))).await;
    let asked = front.generator.asked.lock().unwrap();
    let text = crate::tokenizer::tests::byte_level().decode(&asked[0].prompt, false).unwrap();
    assert_eq!(text, "<|begin|><|turn|>user\nHi<|end_turn|>\n<|turn|>assistant\n");
}

#[tokio::test]
async fn messages_reach_the_template_as_it_expects_them() {
    let template = "{{ messages | tojson }}{{ tools | length if tools else '' }}{{ mood }}";
    let config_file = json!({"chat_template": template}).to_string();
    let text = model_text(&[("tokenizer_config.json", &config_file)]);
    let mut limits = config();
    limits.body.bytes = 1 << 20;
    let front = Front::new(limits, text, |generator| generator, &["fine"]);
    front.generator.health.lock().unwrap().serving = crate::openai::Serving::Yes { max_model_len: 4096 };
    let call = json!({"type": "function", "id": "x", "function": {"name": "f", "arguments": "{\"b\": 1, \"a\": 2}"}});
    let body = json!({
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
            {"role": "assistant", "content": null, "tool_calls": [call]},
        ],
        "tools": [{"type": "function"}],
        "tool_choice": "auto",
        "chat_template_kwargs": {"mood": "glad"},
        "seed": 0,
    });
    front.ask(CHAT, &body).await;
    let asked = front.generator.asked.lock().unwrap();
    let expected = concat!(
        r#"[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a\nb", "name": "Ann"}, "#,
        r#"{"role": "assistant", "tool_calls": [{"type": "function", "id": "x", "#,
        r#""function": {"name": "f", "arguments": {"b": 1, "a": 2}}}]}]1glad"#
    );
    assert_eq!(crate::tokenizer::tests::byte_level().decode(&asked[0].prompt, false).unwrap(), expected);
}

#[tokio::test]
async fn what_a_request_leaves_open_the_model_decides() {
    let generation_config = json!({
        "eos_token_id": [1, 4], "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1,
    });
    let text = model_text(&[("generation_config.json", &generation_config.to_string())]);
    let front = Front::new(config(), text, |generator| generator, &["fine"]);
    front.ask(CHAT, &question(json!({}))).await;
    front
        .ask(
            CHAT,
            &question(json!({"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0.25, "max_tokens": 9})),
        )
        .await;
    front.ask(CHAT, &question(json!({"seed": null, "max_completion_tokens": 7, "max_tokens": 9}))).await;
    front.ask(CHAT, &question(json!({"seed": null}))).await;
    let asked = front.generator.asked.lock().unwrap();
    let [silent, told, random, again] = asked.as_slice() else { panic!("four requests") };
    assert_eq!((silent.sampling.temperature, silent.sampling.top_p), (0.6, 0.9));
    assert_eq!((silent.sampling.top_k, silent.sampling.repetition_penalty), (Some(20), 1.1));
    assert_eq!(silent.stop.eos_token_ids, [1, EOS, 4], "of the tokenizer and of the configuration");
    assert_eq!(silent.stop.max_tokens as usize, 128 - silent.prompt.len(), "the rest of the context");
    assert_eq!((told.sampling.temperature, told.sampling.top_p, told.sampling.top_k), (0.0, 1.0, None));
    assert_eq!((told.sampling.min_p, told.sampling.seed, told.stop.max_tokens), (0.25, 0, 9));
    assert_eq!(random.stop.max_tokens, 7, "the newer name counts");
    assert_ne!(random.sampling.seed, again.sampling.seed, "without a seed each request has its own");
}

/// Answer text, fields of the request; the text, finish reason and stop reason that come back.
#[tokio::test]
async fn answers_end_where_they_should() {
    let rows: &[(&str, &str, Value, &str, &str, Value)] = &[
        ("at the model's end", "Hello", json!({}), "Hello", "stop", Value::Null),
        ("at the length", "abcdef", json!({"max_tokens": 3}), "abc", "length", Value::Null),
        ("at a stop string", "abcdef", json!({"stop": "d"}), "abc", "stop", json!("d")),
        (
            "at a stop string over several tokens",
            "one two three",
            json!({"stop": ["o th", "x"]}),
            "one tw",
            "stop",
            json!("o th"),
        ),
        (
            "with the stop string",
            "abcdef",
            json!({"stop": "cd", "include_stop_str_in_output": true}),
            "abcd",
            "stop",
            json!("cd"),
        ),
        ("at a stop token", "abcdef", json!({"stop_token_ids": [71]}), "ab", "stop", json!(71)),
        (
            "with the stop token",
            "abcdef",
            json!({"stop_token_ids": [71], "include_stop_str_in_output": true}),
            "abc",
            "stop",
            json!(71),
        ),
        ("not before the minimum", "abab", json!({"stop": "b", "min_tokens": 3}), "aba", "stop", json!("b")),
        (
            "on past the model's end",
            "ab",
            json!({"ignore_eos": true, "max_tokens": 5}),
            "abab",
            "length",
            Value::Null,
        ),
        ("what held back comes at the end", "abcX", json!({"stop": "XYZ"}), "abcX", "stop", Value::Null),
        ("special tokens are no text", "a<|pad|>b", json!({}), "ab", "stop", Value::Null),
        (
            "unless asked for, but not the end",
            "a<|pad|>b",
            json!({"skip_special_tokens": false}),
            "a<|pad|>b",
            "stop",
            Value::Null,
        ),
        (
            "a character that was cut off",
            "é",
            json!({"max_tokens": 1, "stop": "x"}),
            "é",
            "length",
            Value::Null,
        ),
    ];
    for (rule, text, more, expected, finish, stop_reason) in rows {
        let front = front(&[text]);
        let body = question(more.clone());
        let whole = front.ask(CHAT, &body).await;
        let choice = &whole["choices"][0];
        assert_eq!(choice["message"]["content"], *expected, "{rule}");
        assert_eq!(
            (&choice["finish_reason"], &choice["stop_reason"]),
            (&json!(finish), stop_reason),
            "{rule}"
        );
        let chunks = front.stream(CHAT, body).await;
        assert_eq!(streamed_text(&chunks, 0), *expected, "{rule}, streamed");
        let last = &chunks.last().unwrap()["choices"][0];
        assert_eq!(
            (&last["finish_reason"], &last["stop_reason"]),
            (&json!(finish), stop_reason),
            "{rule}, streamed"
        );
        let tally = &front.generator.tally;
        assert_eq!(tally.open.load(Ordering::SeqCst), 0, "{rule}");
    }
}

#[tokio::test]
async fn a_stop_string_cancels_what_the_workers_would_still_do() {
    let front = front(&["abcdef"]);
    front.ask(CHAT, &question(json!({"stop": "b"}))).await;
    assert_eq!(front.generator.tally.cancelled.load(Ordering::SeqCst), 1);
    front.ask(CHAT, &question(json!({}))).await;
    assert_eq!(
        front.generator.tally.cancelled.load(Ordering::SeqCst),
        1,
        "an answer that ended is not cancelled"
    );
}

#[tokio::test]
async fn a_stream_has_role_deltas_reason_and_usage() {
    let front = front(&["ab"]);
    let chunks = front.stream(CHAT, question(json!({"stream_options": {"include_usage": true}}))).await;
    let choices: Vec<Value> = chunks.iter().map(|chunk| chunk["choices"].clone()).collect();
    let piece = |delta: Value| json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": null}]);
    let end =
        json!([{"index": 0, "delta": {}, "logprobs": null, "finish_reason": "stop", "stop_reason": null}]);
    let expected = [
        piece(json!({"role": "assistant", "content": ""})),
        piece(json!({"content": "a"})),
        piece(json!({"content": "b"})),
        end,
        json!([]),
    ];
    assert_eq!(choices, expected);
    assert!(
        chunks
            .iter()
            .all(|chunk| chunk["id"] == chunks[0]["id"] && chunk["object"] == "chat.completion.chunk")
    );
    let whole = front.ask(CHAT, &question(json!({}))).await;
    assert_eq!(chunks.last().unwrap()["usage"], whole["usage"]);
    assert!(chunks[..4].iter().all(|chunk| chunk.get("usage") == Some(&Value::Null)));
    let plain = front.stream(CHAT, question(json!({}))).await;
    assert!(plain.iter().all(|chunk| chunk.get("usage").is_none()));
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let counted = front.stream(CHAT, question(json!({"stream_options": options}))).await;
    let counts: Vec<u64> =
        counted.iter().map(|chunk| chunk["usage"]["completion_tokens"].as_u64().unwrap()).collect();
    assert_eq!(counts, [0, 1, 2, 3, 3]);
}

#[tokio::test]
async fn several_answers_have_seeds_of_their_own() {
    let front = front(&["first", "second", "third"]);
    let body = question(json!({"n": 3, "seed": 1}));
    let whole = front.ask(CHAT, &body).await;
    let texts: Vec<&Value> =
        whole["choices"].as_array().unwrap().iter().map(|choice| &choice["message"]["content"]).collect();
    assert_eq!(texts, ["second", "third", "first"]);
    let chunks = front.stream(CHAT, with(body, json!({"stream_options": {"include_usage": true}}))).await;
    assert_eq!([0, 1, 2].map(|index| streamed_text(&chunks, index)), ["second", "third", "first"]);
    assert_eq!(chunks.last().unwrap()["usage"], whole["usage"]);
    let asked = front.generator.asked.lock().unwrap();
    assert_eq!(asked.iter().map(|one| one.sampling.seed).collect::<Vec<_>>(), [1, 2, 3, 1, 2, 3]);
}

#[tokio::test]
async fn log_probabilities_name_tokens_and_their_bytes() {
    let front = front(&["a\u{65e5}"]);
    let body = question(json!({"logprobs": true, "top_logprobs": 2}));
    let whole = front.ask(CHAT, &body).await;
    let content = whole["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    let texts: Vec<&str> = content.iter().map(|entry| entry["token"].as_str().unwrap()).collect();
    assert_eq!(texts, ["a", r"bytes:\xe6\x97", r"bytes:\xa5", "<|end_turn|>"]);
    assert_eq!(content[1]["bytes"], json!([0xe6, 0x97]));
    assert_eq!(content[0]["logprob"], json!(-0.25));
    assert_eq!(content[0]["top_logprobs"].as_array().unwrap().len(), 2);
    assert_eq!(content[0]["top_logprobs"][1]["logprob"], json!(-1.5));
    let chunks = front.stream(CHAT, body).await;
    let streamed: Vec<Value> = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array())
        .flat_map(|content| content.iter().cloned())
        .collect();
    assert_eq!(streamed, content, "those of a held token come with the text that it waited for");
    assert_eq!(
        front.ask(CHAT, &question(json!({"logprobs": true}))).await["choices"][0]["logprobs"]["content"][0]["top_logprobs"],
        json!([])
    );
}

#[tokio::test]
async fn log_probabilities_of_the_prompt_skip_its_first_token() {
    let front = front(&["a"]);
    let answer = front.ask(CHAT, &question(json!({"prompt_logprobs": 1}))).await;
    let logprobs = answer["prompt_logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len() as u64, answer["usage"]["prompt_tokens"].as_u64().unwrap());
    assert_eq!(logprobs[0], Value::Null);
    assert_eq!(logprobs[1]["2"], json!({"logprob": -0.25, "rank": 1, "decoded_token": "<|turn|>"}));
}

#[tokio::test]
async fn a_stream_that_breaks_says_why() {
    let error = GenerationError::Internal("worker lost".to_owned());
    let set_up = |generator: super::memory_generator::MemoryGenerator| generator.failing(2, error);
    let front = Front::new(config(), model_text(&[]), set_up, &["abcdef"]);
    let chunks = front.stream(CHAT, question(json!({}))).await;
    assert_eq!(streamed_text(&chunks[..chunks.len() - 1], 0), "ab");
    assert_eq!(chunks.last().unwrap()["error"]["message"], "worker lost");
    assert_eq!(chunks.last().unwrap()["error"]["type"], "server_error");
    let whole = front.post(CHAT, &question(json!({}))).await;
    assert_eq!((whole.status.as_u16(), &whole.json()["error"]["message"]), (500, &json!("worker lost")));
}

proptest! {
    // Few cases of many texts, since reading the model's files takes longest.
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn streamed_and_whole_answers_are_the_same_text(
        texts in prop::collection::vec("[ab日🙂 é]{1,12}", 20),
        stop in prop::option::of("[ab日é]{1,2}"),
        max_tokens in 1u32..30,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let front = front(&texts.iter().map(String::as_str).collect::<Vec<_>>());
            for (seed, text) in texts.iter().enumerate() {
                let body = question(json!({"stop": stop, "max_tokens": max_tokens, "seed": seed}));
                let choice = front.ask(CHAT, &body).await["choices"][0].clone();
                let content = choice["message"]["content"].as_str().unwrap();
                prop_assert_eq!(streamed_text(&front.stream(CHAT, body).await, 0), content);
                prop_assert!(text.starts_with(content.trim_end_matches(char::REPLACEMENT_CHARACTER)));
                let until_stop = stop.as_ref().map_or(text.as_str(), |stop| text.split(stop.as_str()).next().unwrap());
                if choice["finish_reason"] == "stop" {
                    prop_assert_eq!(content, until_stop);
                }
            }
            Ok(())
        })?;
    }
}
