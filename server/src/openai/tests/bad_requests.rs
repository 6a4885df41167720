//! One row for each way in which a request can be wrong.

use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use serde_json::{Value, json};

use super::support::{Front, config, front, json_request, model_text, question, with};
use crate::generation::GenerationError;

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// Rule, path, body, and what the error says: status, param, code.
type Row = (&'static str, &'static str, Value, u16, Value, Value);

fn shared_rows() -> Vec<Row> {
    let invalid = |rule, field: &'static str, value: Value| -> Row {
        (rule, CHAT, question(json!({field: value})), 400, json!(field), Value::Null)
    };
    let wrong_type = |rule, fields: Value, param: &'static str| -> Row {
        (rule, CHAT, question(fields), 400, json!(param), json!("invalid_type"))
    };
    let unsupported = |rule, fields: Value, param: &'static str| -> Row {
        (rule, CHAT, question(fields), 400, json!(param), json!("unsupported_value"))
    };
    vec![
        wrong_type("a text is no number", json!({"temperature": "hot"}), "temperature"),
        wrong_type("a number is no text", json!({"user": 7}), "user"),
        wrong_type("a fraction is no count", json!({"max_tokens": 1.5}), "max_tokens"),
        wrong_type("a number is no switch", json!({"stream": 1}), "stream"),
        wrong_type("a list with a wrong item", json!({"stop": ["a", 7]}), "stop[1]"),
        wrong_type(
            "a nested switch",
            json!({"stream_options": {"include_usage": "yes"}}),
            "stream_options.include_usage",
        ),
        wrong_type("a nested value", json!({"logit_bias": {"5": "much"}}), "logit_bias.5"),
        wrong_type("messages that are none", json!({"messages": "Hi"}), "messages"),
        wrong_type(
            "content that is none",
            json!({"messages": [{"role": "user", "content": 7}]}),
            "messages[0].content",
        ),
        wrong_type(
            "a part that is none",
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]}),
            "messages[0].content[0].text",
        ),
        wrong_type("tools that are none", json!({"tools": ["hammer"]}), "tools[0]"),
        wrong_type("a template's variables", json!({"chat_template_kwargs": 1}), "chat_template_kwargs"),
        invalid("too hot", "temperature", json!(2.1)),
        invalid("colder than nothing", "temperature", json!(-0.1)),
        invalid("more than everything", "top_p", json!(1.5)),
        invalid("less than all tokens", "top_k", json!(-2)),
        invalid("a share above one", "min_p", json!(1.1)),
        invalid("a penalty of nothing", "repetition_penalty", json!(0)),
        invalid("a large penalty", "presence_penalty", json!(2.5)),
        invalid("a large negative penalty", "frequency_penalty", json!(-2.5)),
        invalid("a bias for what is no token", "logit_bias", json!({"x": 1})),
        invalid("a bias outside the vocabulary", "logit_bias", json!({"288": 1})),
        invalid("a bias beyond the limit", "logit_bias", json!({"5": 101})),
        invalid("no answers", "n", json!(0)),
        invalid("too many answers", "n", json!(129)),
        invalid("no tokens", "max_tokens", json!(0)),
        invalid("fewer than no tokens", "max_completion_tokens", json!(-1)),
        invalid("a minimum above the maximum", "min_tokens", json!(1000)).with_body(json!({"max_tokens": 5})),
        invalid("an empty stop string", "stop", json!("")),
        invalid("too many stop strings", "stop", json!(vec!["a"; 17])),
        invalid("a long stop string", "stop", json!("a".repeat(1025))),
        invalid("too many alternatives", "top_logprobs", json!(21)).with_body(json!({"logprobs": true})),
        invalid("alternatives to nothing", "top_logprobs", json!(2)),
        invalid("options of a stream that is none", "stream_options", json!({"include_usage": true})),
        invalid("no messages", "messages", json!([])),
        unsupported("forced tools", json!({"tool_choice": "required"}), "tool_choice"),
        unsupported("a named tool", json!({"tool_choice": {"type": "function"}}), "tool_choice"),
        unsupported("JSON answers", json!({"response_format": {"type": "json_object"}}), "response_format"),
        unsupported("guided answers", json!({"guided_json": {}}), "guided_json"),
        unsupported("answers to choose from", json!({"best_of": 3}), "best_of"),
        unsupported(
            "logprobs of a streamed prompt",
            json!({"prompt_logprobs": 1, "stream": true}),
            "prompt_logprobs",
        ),
        unsupported(
            "pictures",
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "messages[0].content[0].type",
        ),
    ]
}

trait WithBody {
    fn with_body(self, more: Value) -> Self;
}

impl WithBody for Row {
    fn with_body(mut self, more: Value) -> Self {
        self.2 = with(self.2, more);
        self
    }
}

fn endpoint_rows() -> Vec<Row> {
    let missing = json!("missing_required_parameter");
    let exceeded = json!("context_length_exceeded");
    let role_only = json!([{"role": "user"}]);
    let bad_call =
        json!([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]);
    let call = "messages[0].tool_calls[0].function.arguments";
    let long = "word ".repeat(200);
    vec![
        ("no messages field", CHAT, json!({"model": "tiny"}), 400, json!("messages"), missing.clone()),
        (
            "no role",
            CHAT,
            question(json!({"messages": [{"content": "Hi"}]})),
            400,
            json!("messages[0].role"),
            missing.clone(),
        ),
        (
            "no content",
            CHAT,
            question(json!({"messages": role_only})),
            400,
            json!("messages[0].content"),
            missing.clone(),
        ),
        (
            "arguments that are no JSON",
            CHAT,
            question(json!({"messages": bad_call})),
            400,
            json!(call),
            Value::Null,
        ),
        (
            "another model",
            CHAT,
            question(json!({"model": "gpt"})),
            404,
            json!("model"),
            json!("model_not_found"),
        ),
        (
            "a long conversation",
            CHAT,
            question(json!({"messages": [{"role": "user", "content": long}]})),
            400,
            json!("messages"),
            exceeded.clone(),
        ),
        (
            "a long answer",
            CHAT,
            question(json!({"max_tokens": 127})),
            400,
            json!("messages"),
            exceeded.clone(),
        ),
        ("no prompt", TEXT, json!({}), 400, json!("prompt"), missing.clone()),
        (
            "a prompt of numbers that are no tokens",
            TEXT,
            json!({"prompt": [-1]}),
            400,
            json!("prompt[0]"),
            json!("invalid_type"),
        ),
        ("a mixed prompt", TEXT, json!({"prompt": ["a", 7]}), 400, json!("prompt"), json!("invalid_type")),
        (
            "an empty list of prompts",
            TEXT,
            json!({"prompt": []}),
            400,
            json!("prompt"),
            json!("invalid_type"),
        ),
        (
            "an empty prompt",
            TEXT,
            json!({"prompt": "", "add_special_tokens": false}),
            400,
            json!("prompt"),
            Value::Null,
        ),
        (
            "a token outside the vocabulary",
            TEXT,
            json!({"prompt": [5, 288]}),
            400,
            json!("prompt"),
            Value::Null,
        ),
        ("too many prompts", TEXT, json!({"prompt": vec!["a"; 129]}), 400, json!("prompt"), Value::Null),
        (
            "nothing at all",
            TEXT,
            json!({"prompt": "a", "max_tokens": 0}),
            400,
            json!("max_tokens"),
            Value::Null,
        ),
        (
            "many alternatives",
            TEXT,
            json!({"prompt": "a", "logprobs": 21}),
            400,
            json!("logprobs"),
            Value::Null,
        ),
        (
            "a switch for a count",
            TEXT,
            json!({"prompt": "a", "logprobs": true}),
            400,
            json!("logprobs"),
            json!("invalid_type"),
        ),
        (
            "a suffix",
            TEXT,
            json!({"prompt": "a", "suffix": "b"}),
            400,
            json!("suffix"),
            json!("unsupported_value"),
        ),
        ("a long prompt", TEXT, json!({"prompt": "a".repeat(200)}), 400, json!("prompt"), exceeded.clone()),
        (
            "a long continuation",
            TEXT,
            json!({"prompt": "a", "max_tokens": 500}),
            400,
            json!("prompt"),
            exceeded,
        ),
        ("nothing to tokenize", "/tokenize", json!({}), 400, json!("prompt"), missing.clone()),
        ("no tokens to read", "/detokenize", json!({}), 400, json!("tokens"), missing),
        (
            "tokens that are none",
            "/detokenize",
            json!({"tokens": [1, 999]}),
            400,
            json!("tokens"),
            Value::Null,
        ),
        ("no object", CHAT, json!([]), 400, Value::Null, json!("invalid_json")),
        ("no such page", "/v1/nothing", json!({}), 404, Value::Null, json!("not_found")),
        ("no such method", "/v1/models", json!({}), 405, Value::Null, json!("method_not_allowed")),
        (
            "a long body",
            TEXT,
            json!({"prompt": "a".repeat(20 << 10)}),
            413,
            Value::Null,
            json!("body_too_large"),
        ),
    ]
}

#[tokio::test]
async fn a_wrong_request_is_told_what_is_wrong_and_where() {
    let front = front(&["fine"]);
    let mut failures = Vec::new();
    for (rule, path, body, status, param, code) in shared_rows().into_iter().chain(endpoint_rows()) {
        let answer = front.post(path, &body).await;
        let error = serde_json::from_str::<Value>(&answer.text).unwrap_or_default();
        let error = &error["error"];
        let message = error["message"].as_str().unwrap_or_default();
        if answer.status.as_u16() != status
            || error["param"] != param
            || error["code"] != code
            || message.is_empty()
        {
            failures.push(format!("{rule}: {} {}", answer.status, answer.text));
        }
    }
    assert!(failures.is_empty(), "{} wrong answers\n{}", failures.len(), failures.join("\n"));
    assert!(front.generator.asked.lock().unwrap().is_empty(), "no worker hears of it");
}

#[tokio::test]
async fn what_is_no_json_is_refused() {
    let front = front(&["fine"]);
    let broken =
        Request::post(CHAT).header(header::CONTENT_TYPE, "application/json").body(Body::from("{\"a\":"));
    let answer = front.send(broken.unwrap()).await;
    assert_eq!(
        (answer.status, &answer.json()["error"]["code"]),
        (StatusCode::BAD_REQUEST, &json!("invalid_json"))
    );
    let form = Request::post(CHAT).header(header::CONTENT_TYPE, "text/plain").body(Body::from("{}"));
    assert_eq!(front.send(form.unwrap()).await.status, StatusCode::UNSUPPORTED_MEDIA_TYPE);
    let body = question(json!({})).to_string();
    let charset = Request::post(CHAT).header(header::CONTENT_TYPE, "application/json; charset=utf-8");
    assert_eq!(front.send(charset.body(Body::from(body)).unwrap()).await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_body_that_never_ends_is_given_up() {
    let mut config = config();
    config.body.time = std::time::Duration::ZERO;
    let front = Front::new(config, model_text(&[]), |generator| generator, &["fine"]);
    let body = Body::from_stream(futures::stream::pending::<Result<bytes::Bytes, std::io::Error>>());
    let request = Request::post(CHAT).header(header::CONTENT_TYPE, "application/json").body(body).unwrap();
    assert_eq!(front.send(request).await.status, StatusCode::REQUEST_TIMEOUT);
}

#[tokio::test]
async fn a_body_without_an_announced_length_is_bounded_too() {
    let front = front(&["fine"]);
    let chunks =
        futures::stream::repeat_with(|| Ok::<_, std::io::Error>(bytes::Bytes::from_static(&[b' '; 1024])));
    let request = Request::post(CHAT).header(header::CONTENT_TYPE, "application/json");
    let answer = front.send(request.body(Body::from_stream(chunks)).unwrap()).await;
    assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
}

#[tokio::test]
async fn what_a_template_refuses_is_the_clients_to_read() {
    let template = "{{ raise_exception('Roles must alternate') }}";
    let config_file = json!({"chat_template": template}).to_string();
    let text = model_text(&[("tokenizer_config.json", &config_file)]);
    let front = Front::new(config(), text, |generator| generator, &["fine"]);
    let answer = front.post(CHAT, &question(json!({}))).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    assert_eq!(answer.json()["error"]["message"], "Roles must alternate");
}

#[tokio::test]
async fn a_model_without_a_template_says_so() {
    let text = model_text(&[("tokenizer_config.json", "{}")]);
    let front = Front::new(config(), text, |generator| generator, &["fine"]);
    let answer = front.post(CHAT, &question(json!({}))).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    assert!(
        answer.json()["error"]["message"].as_str().unwrap().contains("no chat template"),
        "{}",
        answer.text
    );
    assert_eq!(front.post(TEXT, &json!({"prompt": "a", "seed": 0})).await.status, StatusCode::OK);
}

#[tokio::test]
async fn refusals_of_the_workers_have_their_own_status() {
    let rows = [
        (GenerationError::Busy { retry_after_s: 7 }, 429, Some("7"), "rate_limit_exceeded"),
        (GenerationError::Unavailable("decode is gone".into()), 503, Some("1"), "service_unavailable"),
        (GenerationError::Internal("broken".into()), 500, None, "internal_error"),
    ];
    for (error, status, retry_after, code) in rows {
        let refusal = error.clone();
        let front = Front::new(config(), model_text(&[]), |generator| generator.refusing(refusal), &["fine"]);
        for stream in [false, true] {
            let answer = front.send(json_request(CHAT, &question(json!({"stream": stream})))).await;
            assert_eq!(answer.status.as_u16(), status, "{error}");
            let header = answer.headers.get(header::RETRY_AFTER).map(|value| value.to_str().unwrap());
            assert_eq!(header, retry_after, "{error}");
            assert_eq!(answer.json()["error"]["code"], code, "{error}");
        }
    }
}
