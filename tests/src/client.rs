//! A plain HTTP client: status, JSON body, and server-sent events.
//!
//! Deliberately not an OpenAI SDK: the tests see the bytes that the server sends. The official SDK has its own
//! suite in `tests/sdk`.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::StreamExt;
use serde_json::{Value, json};

/// Talks to one server.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    base: String,
}

/// What a request came to.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// HTTP status.
    pub status: u16,
    /// The body; for a stream the list of its events without `[DONE]`.
    pub body: Value,
    /// The header `Retry-After` of a refusal.
    pub retry_after: Option<String>,
}

impl Client {
    /// A client for the server at `base`, such as `http://127.0.0.1:8000`.
    pub fn new(base: &str) -> Self {
        let http = reqwest::Client::builder()
            .timeout(REQUEST_LIMIT)
            .build()
            .expect("a client without special settings");
        Self { http, base: base.to_owned() }
    }

    /// The server's base URL.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// POST of a JSON body; a body with `"stream": true` is read to its end.
    pub async fn post(&self, path: &str, body: &Value) -> Reply {
        self.try_post(path, body).await.expect("the server answers")
    }

    /// The same, for servers that may be gone.
    pub async fn try_post(&self, path: &str, body: &Value) -> reqwest::Result<Reply> {
        let response = self.http.post(format!("{}{path}", self.base)).json(body).send().await?;
        let status = response.status().as_u16();
        let streamed = response
            .headers()
            .get("content-type")
            .is_some_and(|value| value.as_bytes().starts_with(b"text/event-stream"));
        let retry_after = response.headers().get("retry-after");
        let retry_after = retry_after.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
        let text = response.text().await?;
        let body = if streamed {
            Value::Array(events(&text))
        } else {
            serde_json::from_str(&text).unwrap_or(Value::String(text))
        };
        Ok(Reply { status, body, retry_after })
    }

    /// Starts a stream and returns its events one by one, so that the test can leave in the middle.
    pub async fn stream(
        &self,
        path: &str,
        body: &Value,
    ) -> (u16, impl futures::Stream<Item = Value> + Unpin + use<>) {
        let response = self
            .http
            .post(format!("{}{path}", self.base))
            .json(body)
            .send()
            .await
            .expect("the server answers");
        let status = response.status().as_u16();
        let mut pending = String::new();
        let events = response.bytes_stream().flat_map(move |chunk| {
            pending.push_str(&String::from_utf8_lossy(&chunk.unwrap_or_default()));
            let whole = pending.rfind("\n\n").map_or(0, |end| end + 2);
            let text: String = pending.drain(..whole).collect();
            futures::stream::iter(events(&text))
        });
        (status, Box::pin(events))
    }

    /// GET of a path: status and text.
    pub async fn get(&self, path: &str) -> (u16, String) {
        let response = self.http.get(format!("{}{path}", self.base)).send().await;
        match response {
            Ok(response) => (response.status().as_u16(), response.text().await.unwrap_or_default()),
            Err(_) => (0, String::new()),
        }
    }

    /// All samples of `/metrics`: `name{labels}` → value.
    pub async fn metrics(&self) -> BTreeMap<String, f64> {
        let (_, text) = self.get("/metrics").await;
        text.lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| line.rsplit_once(' '))
            .filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?)))
            .collect()
    }

    /// The sum over all label sets of the metric `name` whose labels contain `label`.
    ///
    /// # Panics
    ///
    /// When the server answers, but knows no such metric: a name with a mistake would otherwise be a zero.
    pub async fn metric(&self, name: &str, label: &str) -> f64 {
        let metrics = self.metrics().await;
        let mut of_name = metrics.iter().filter(|(key, _)| key.split('{').next() == Some(name)).peekable();
        assert!(metrics.is_empty() || of_name.peek().is_some(), "there is no metric {name}");
        of_name.filter(|(key, _)| key.contains(label)).map(|(_, value)| value).sum()
    }

    /// A completion of token ids, greedy unless `extra` says otherwise.
    pub async fn complete(&self, prompt: &[u32], max_tokens: u32, extra: Value) -> Reply {
        let mut body = json!({
            "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true, "logprobs": 2,
        });
        merge(&mut body, extra);
        self.post("/v1/completions", &body).await
    }

    /// Asks a chat question and returns the answer's text.
    ///
    /// # Panics
    ///
    /// When the server refuses.
    pub async fn chat(&self, messages: &Value) -> String {
        let reply = self.post("/v1/chat/completions", &json!({"messages": messages, "temperature": 0})).await;
        assert_eq!(reply.status, 200, "{}", reply.body);
        reply.body["choices"][0]["message"]["content"].as_str().expect("an answer has a text").to_owned()
    }

    /// Whether no worker runs or waits for anything and every block is free or cached.
    pub async fn is_idle(&self) -> bool {
        let metrics = self.metrics().await;
        let sum = |name: &str, label: &str| -> f64 {
            let matches = |key: &&String| key.starts_with(name) && key.contains(label);
            metrics.iter().filter(|(key, _)| matches(key)).map(|(_, value)| value).sum()
        };
        let busy = ["held", "reserved", "quarantined"].map(|state| sum("tidemill_blocks", state));
        let unused = sum("tidemill_blocks", "free") + sum("tidemill_blocks", "cached");
        busy == [0.0; 3]
            && 0.0 < unused
            && sum("vllm:num_requests_running", "") == 0.0
            && sum("vllm:num_requests_waiting", "") == 0.0
    }
}

/// Puts every field of `extra` into `body`.
pub fn merge(body: &mut Value, extra: Value) {
    let (Value::Object(body), Value::Object(extra)) = (body, extra) else { return };
    body.extend(extra);
}

/// An answer without what may differ between two equal ones: its id and its time.
pub fn comparable(mut reply: Reply) -> Reply {
    let strip = |body: &mut Value| {
        if let Value::Object(fields) = body {
            for field in ["id", "created", "system_fingerprint"] {
                fields.remove(field);
            }
        }
    };
    match &mut reply.body {
        Value::Array(events) => events.iter_mut().for_each(strip),
        body => strip(body),
    }
    reply
}

fn events(text: &str) -> Vec<Value> {
    text.split("\n\n")
        .filter_map(|event| event.trim_start().strip_prefix("data: "))
        .filter(|data| *data != "[DONE]")
        .map(|data| serde_json::from_str(data).unwrap_or_else(|_| Value::String(data.to_owned())))
        .collect()
}

const REQUEST_LIMIT: Duration = Duration::from_secs(120);
