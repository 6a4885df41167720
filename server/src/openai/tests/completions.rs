//! `/v1/completions`, `/tokenize` and `/detokenize`.

use serde_json::{Value, json};

use super::support::{front, streamed_text, with};

const TEXT: &str = "/v1/completions";

#[tokio::test]
async fn a_continuation_has_the_form_of_the_api() {
    let front = front(&["abcdefghijklmnopqrstuvwxyz"]);
    let answer = front.ask(TEXT, &json!({"prompt": "Hello", "seed": 0})).await;
    assert_eq!(answer["object"], "text_completion");
    assert!(answer["id"].as_str().unwrap().starts_with("cmpl-"));
    let choice = json!({
        "index": 0, "text": "abcdefghijklmnop", "logprobs": null, "finish_reason": "length", "stop_reason": null
    });
    assert_eq!(answer["choices"], json!([choice]), "sixteen tokens, unless told otherwise");
    assert_eq!(answer["usage"]["prompt_tokens"], 2, "a beginning is added");
    let asked = front.generator.asked.lock().unwrap();
    assert_eq!(asked[0].prompt, [0, 277]);
}

#[tokio::test]
async fn prompts_may_be_texts_or_tokens_one_or_many() {
    let rows: &[(&str, Value, &[&[u32]])] = &[
        ("a text", json!("Hello"), &[&[0, 277]]),
        ("texts", json!(["Hello", "a"]), &[&[0, 277], &[0, 69]]),
        ("tokens", json!([277, 69]), &[&[277, 69]]),
        ("lists of tokens", json!([[277], [69, 70]]), &[&[277], &[69, 70]]),
    ];
    for (rule, prompt, expected) in rows {
        let front = front(&["x"]);
        let answer = front.ask(TEXT, &json!({"prompt": prompt, "seed": 0})).await;
        let asked: Vec<Vec<u32>> =
            front.generator.asked.lock().unwrap().iter().map(|one| one.prompt.clone()).collect();
        assert_eq!(asked, *expected, "{rule}");
        assert_eq!(answer["choices"].as_array().unwrap().len(), expected.len(), "{rule}");
        assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 3 * expected.len(), "{rule}");
    }
    let front = front(&["x"]);
    front.ask(TEXT, &json!({"prompt": "Hello", "seed": 0, "add_special_tokens": false})).await;
    assert_eq!(front.generator.asked.lock().unwrap()[0].prompt, [277]);
}

#[tokio::test]
async fn choices_are_numbered_prompt_by_prompt() {
    let front = front(&["first", "second"]);
    let body = json!({"prompt": ["a", "b"], "n": 2, "seed": 0});
    let whole = front.ask(TEXT, &body).await;
    let texts: Vec<&str> =
        whole["choices"].as_array().unwrap().iter().map(|it| it["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["first", "second", "first", "second"]);
    let chunks = front.stream(TEXT, with(body, json!({"stream_options": {"include_usage": true}}))).await;
    assert_eq!(
        [0, 1, 2, 3].map(|index| streamed_text(&chunks, index)),
        ["first", "second", "first", "second"]
    );
    assert_eq!(chunks.last().unwrap()["usage"], whole["usage"]);
}

#[tokio::test]
async fn log_probabilities_are_lists_of_the_same_length() {
    let front = front(&["ab"]);
    let answer = front.ask(TEXT, &json!({"prompt": "Hello", "seed": 0, "logprobs": 1})).await;
    let expected = json!({
        "text_offset": [0, 1, 2],
        "token_logprobs": [-0.25, -0.25, -0.25],
        "tokens": ["a", "b", "<|end_turn|>"],
        "top_logprobs": [{"f": -0.5, "a": -0.25}, {"g": -0.5, "b": -0.25}, {"$": -0.5, "<|end_turn|>": -0.25}],
    });
    let got = &answer["choices"][0]["logprobs"];
    for list in ["text_offset", "token_logprobs", "tokens"] {
        assert_eq!(got[list], expected[list]);
    }
    assert_eq!(got["top_logprobs"].as_array().unwrap().len(), 3);
    assert_eq!(got["top_logprobs"][0]["a"], json!(-0.25), "the chosen token is always there");
    assert_eq!(got["top_logprobs"][0].as_object().unwrap().len(), 2);
}

#[tokio::test]
async fn an_echo_puts_the_prompt_first() {
    let front = front(&["xy"]);
    let body = json!({"prompt": "Hello a", "seed": 0, "echo": true, "logprobs": 0});
    let whole = front.ask(TEXT, &body).await;
    let choice = &whole["choices"][0];
    assert_eq!(choice["text"], "Hello axy");
    let logprobs = &choice["logprobs"];
    assert_eq!(logprobs["tokens"], json!(["<|begin|>", "Hello", " a", "x", "y", "<|end_turn|>"]));
    assert_eq!(logprobs["text_offset"], json!([0, 0, 5, 7, 8, 9]));
    assert_eq!(logprobs["token_logprobs"], json!([null, -0.25, -0.25, -0.25, -0.25, -0.25]));
    let chunks = front.stream(TEXT, body).await;
    assert_eq!(streamed_text(&chunks, 0), "Hello axy");
    assert_eq!(chunks[0]["choices"][0]["logprobs"]["tokens"], json!(["<|begin|>", "Hello", " a", "x"]));
    let tokens = front.ask(TEXT, &json!({"prompt": [277, 69], "seed": 0, "echo": true})).await;
    assert_eq!(tokens["choices"][0]["text"], "Helloaxy");
}

#[tokio::test]
async fn an_echo_alone_scores_a_text() {
    let front = front(&["xy"]);
    let body = json!({"prompt": "Hello a", "seed": 0, "echo": true, "logprobs": 1, "max_tokens": 0});
    let answer = front.ask(TEXT, &body).await;
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("Hello a"), &json!("length")));
    assert_eq!(choice["logprobs"]["tokens"], json!(["<|begin|>", "Hello", " a"]));
    assert_eq!(answer["usage"]["completion_tokens"], 0);
    assert_eq!(streamed_text(&front.stream(TEXT, body).await, 0), "Hello a");
}

#[tokio::test]
async fn texts_become_tokens_and_tokens_texts() {
    let front = front(&[]);
    let answer = front.ask("/tokenize", &json!({"prompt": "Hello a", "return_token_strs": true})).await;
    assert_eq!((&answer["tokens"], &answer["count"]), (&json!([0, 277, 266]), &json!(3)));
    assert_eq!((&answer["token_strs"][2], &answer["max_model_len"]), (&json!("Ġa"), &json!(128)));
    let answer = front.ask("/tokenize", &json!({"messages": [{"role": "user", "content": "Hi"}]})).await;
    assert_eq!(
        (&answer["tokens"][0], &answer["tokens"][1]),
        (&json!(0), &json!(2)),
        "one beginning, from the template"
    );
    let text = front.ask("/detokenize", &json!({"tokens": answer["tokens"]})).await;
    assert_eq!(text["prompt"], "<|begin|><|turn|>user\nHi<|end_turn|>\n<|turn|>assistant\n");
}
