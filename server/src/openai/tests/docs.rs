//! The description of the API says what the API does.

use std::collections::{BTreeMap, BTreeSet};

use axum::body::Body;
use axum::http::{Method, Request, StatusCode, header};
use serde::de::value::Error;
use serde::de::{self, Deserializer, IntoDeserializer, Visitor};
use serde::{Deserialize, forward_to_deserialize_any};
use serde_json::{Value, json};

use super::support::{front, question, with};
use crate::openai::Serving;
use crate::openai::docs::describe;
use crate::openai::request::{
    ChatFields, CompletionFields, ContentPart, ConversationFields, DetokenizeFields, Message, ResponseFormat,
    SharedFields, StreamOptions, TokenizeFields, ToolCall, ToolFunction,
};

#[tokio::test]
async fn what_is_described_is_there() {
    let front = front(&["hello"]);
    // The examples are for real models.
    front.generator.health.lock().unwrap().serving = Serving::Yes { max_model_len: 2048 };
    let description = describe("1.2.3");
    for (path, operations) in description["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            let method = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
            let path = path.replace("{name}", "org/alias");
            let media = &operation["requestBody"]["content"]["application/json"];
            let body = if media.is_null() { Body::empty() } else { media["example"].to_string().into() };
            let request = Request::builder().method(&method).uri(&path);
            let request = request.header(header::CONTENT_TYPE, "application/json").body(body).unwrap();
            let answer = front.send(request).await;
            assert_eq!(answer.status, StatusCode::OK, "{method} {path}: {}", answer.text);
        }
    }
}

#[test]
fn the_fields_of_requests_are_those_that_are_read() {
    let description = describe("1.2.3");
    let read: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("SharedFields", fields::<SharedFields>()),
        ("StreamOptions", fields::<StreamOptions>()),
        ("ResponseFormat", fields::<ResponseFormat>()),
        ("ConversationFields", fields::<ConversationFields>()),
        ("Message", fields::<Message>()),
        ("ContentPart", fields::<ContentPart>()),
        ("ToolCall", fields::<ToolCall>()),
        ("ToolFunction", fields::<ToolFunction>()),
        ("ChatFields", fields::<ChatFields>()),
        ("CompletionFields", fields::<CompletionFields>()),
        ("TokenizeFields", fields::<TokenizeFields>()),
        ("DetokenizeFields", fields::<DetokenizeFields>()),
    ]);
    for (name, read) in read {
        let described = description["components"]["schemas"][name]["properties"].as_object().unwrap();
        let described: BTreeSet<&str> = described.keys().map(String::as_str).collect();
        assert_eq!(described, read.iter().copied().collect(), "{name}");
    }
}

#[tokio::test]
async fn answers_have_the_form_that_is_described() {
    let front = front(&["hello world"]);
    let description = Description(describe("1.2.3"));
    let plain = json!({"prompt": ["Hi", "Ho"], "seed": 0, "logprobs": 2, "echo": true, "prompt_logprobs": 1});
    let chat = question(json!({"logprobs": true, "top_logprobs": 2, "prompt_logprobs": 1}));
    let streamed = json!({"stream_options": {"include_usage": true}});
    #[rustfmt::skip]
    let rows = [
        ("ChatCompletion", front.ask("/v1/chat/completions", &chat).await),
        ("ChatCompletion", front.ask("/v1/chat/completions", &question(json!({"stop": "wor"}))).await),
        ("Completion", front.ask("/v1/completions", &plain).await),
        ("TokenizeResponse", front.ask("/tokenize", &json!({"prompt": "Hi", "return_token_strs": true})).await),
        ("DetokenizeResponse", front.ask("/detokenize", &json!({"tokens": [70, 71]})).await),
        ("ModelList", front.get("/v1/models").await.json()),
        ("Model", front.get("/v1/models/org/alias").await.json()),
        ("Health", front.get("/health").await.json()),
        ("Ready", front.get("/ready").await.json()),
        ("Version", front.get("/version").await.json()),
        ("Error", front.post("/v1/completions", &json!({"prompt": "Hi", "n": 0})).await.json()),
        ("Error", front.get("/nothing").await.json()),
    ];
    for (name, answer) in rows {
        description.check(name, &answer);
    }
    let chat = question(with(streamed.clone(), json!({"logprobs": true})));
    for chunk in front.stream("/v1/chat/completions", chat).await {
        description.check("ChatCompletionChunk", &chunk);
    }
    for chunk in front.stream("/v1/completions", with(json!({"prompt": "Hi", "logprobs": 1}), streamed)).await
    {
        description.check("Completion", &chunk);
    }
}

#[tokio::test]
async fn the_page_stands_alone() {
    let front = front(&["hello"]);
    let page = front.get("/docs").await;
    assert_eq!(page.status, StatusCode::OK);
    assert!(page.headers[header::CONTENT_TYPE].to_str().unwrap().starts_with("text/html"));
    let policy = page.headers[header::CONTENT_SECURITY_POLICY].to_str().unwrap();
    assert!(policy.contains("default-src 'none'") && policy.contains("connect-src 'self'"), "{policy}");
    assert!(!page.text.contains("://"), "nothing from elsewhere");
    assert_eq!(front.get("/openapi.json").await.json()["info"]["version"], "1.2.3");
}

/// The description, as a judge of answers.
struct Description(Value);

impl Description {
    fn check(&self, schema: &str, answer: &Value) {
        let schema = json!({"$ref": format!("#/components/schemas/{schema}")});
        self.check_value(&schema, answer, &mut vec![schema["$ref"].to_string()]);
    }

    fn check_value(&self, schema: &Value, value: &Value, path: &mut Vec<String>) {
        if let Some(reference) = schema["$ref"].as_str() {
            let target = self.0.pointer(reference.strip_prefix('#').unwrap());
            return self.check_value(target.unwrap_or_else(|| panic!("{reference}")), value, path);
        }
        let types: Vec<&str> = match &schema["type"] {
            Value::Array(types) => types.iter().filter_map(Value::as_str).collect(),
            one => one.as_str().into_iter().collect(),
        };
        let is_integer = value.is_i64() || value.is_u64();
        let fits = types.iter().any(|name| *name == type_name(value) || *name == "integer" && is_integer);
        assert!(fits, "{path:?}: {value} is not {types:?}");
        if let Some(allowed) = schema["enum"].as_array() {
            assert!(allowed.contains(value), "{path:?}: {value} is not one of {allowed:?}");
        }
        for required in schema["required"].as_array().into_iter().flatten().filter(|_| value.is_object()) {
            assert!(value.get(required.as_str().unwrap()).is_some(), "{path:?}: {required} is missing");
        }
        if let (Some(object), Some(properties)) = (value.as_object(), schema["properties"].as_object()) {
            for (key, value) in object {
                let property =
                    properties.get(key).unwrap_or_else(|| panic!("{path:?}: {key} is not described"));
                path.push(key.clone());
                self.check_value(property, value, path);
                path.pop();
            }
        }
        if let (Some(list), Some(items)) = (value.as_array(), schema.get("items")) {
            for value in list {
                self.check_value(items, value, path);
            }
        }
    }
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// The names that a struct's fields have in JSON.
fn fields<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    let mut names: &'static [&'static str] = &[];
    let read = T::deserialize(FieldNames(&mut names));
    assert!(read.is_err() && !names.is_empty(), "a struct with named fields");
    names
}

/// Reads nothing but the names of the fields that are asked for.
struct FieldNames<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for FieldNames<'_> {
    type Error = Error;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Error> {
        *self.0 = fields;
        Err(de::Error::custom("only the names are wanted"))
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        ().into_deserializer().deserialize_any(visitor)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}
