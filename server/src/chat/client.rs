//! The few calls of the OpenAI API that a conversation needs.

use anyhow::{Context, anyhow, bail};
use futures::{Stream, StreamExt, stream};
use reqwest::{RequestBuilder, Response, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::event_lines::EventLines;

/// A server.
#[derive(Debug)]
pub(super) struct Client {
    http: reqwest::Client,
    /// Ends with `/v1`.
    base: String,
    api_key: Option<String>,
}

/// What a stream says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// More of the answer.
    Text(String),
    /// Why it ended.
    Ended(String),
    /// Tokens of prompt and answer.
    Usage { prompt_tokens: u64, completion_tokens: u64 },
}

impl Client {
    /// A client of the server at `url`, with or without `/v1` at its end.
    pub(super) fn new(url: &str, api_key: Option<String>) -> anyhow::Result<Self> {
        let url = url.trim_end_matches('/');
        let url = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        reqwest::Url::parse(&url).with_context(|| format!("'{url}' is not a URL"))?;
        let base = if url.ends_with("/v1") { url } else { format!("{url}/v1") };
        Ok(Self { http: reqwest::Client::builder().build()?, base, api_key })
    }

    /// The name of the first model that the server lists.
    pub(super) async fn first_model(&self) -> anyhow::Result<String> {
        let list: Value = self.send(self.http.get(format!("{}/models", self.base))).await?.json().await?;
        let first = list["data"][0]["id"].as_str();
        first.map(str::to_owned).ok_or_else(|| anyhow!("{} lists no model", self.base))
    }

    /// Asks for an answer to `body`, a chat completion, and streams it.
    pub(super) async fn ask(
        &self,
        mut body: Value,
    ) -> anyhow::Result<impl Stream<Item = anyhow::Result<Said>> + Unpin + use<>> {
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true});
        let request = self.http.post(format!("{}/chat/completions", self.base)).json(&body);
        let bytes = self.send(request).await?.bytes_stream();
        let mut lines = EventLines::default();
        let events = bytes.flat_map(move |portion| {
            let said: Vec<anyhow::Result<Said>> = match portion {
                Ok(bytes) => lines.push(&bytes).iter().flat_map(|data| said(data)).collect(),
                Err(error) => vec![Err(anyhow!(error).context("the answer broke off"))],
            };
            stream::iter(said)
        });
        Ok(events.boxed())
    }

    async fn send(&self, request: RequestBuilder) -> anyhow::Result<Response> {
        let request = match &self.api_key {
            Some(key) => request.bearer_auth(key),
            None => request,
        };
        let response = request.send().await.map_err(|error| {
            if error.is_connect() {
                anyhow!(
                    "no server answers at {}: start one with `tidemill serve`, or name another with --url",
                    self.base
                )
            } else {
                anyhow!(error)
            }
        })?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let text = response.text().await.unwrap_or_default();
        let message = serde_json::from_str::<Value>(&text).ok();
        let message =
            message.as_ref().and_then(|body| body["error"]["message"].as_str()).unwrap_or(text.trim());
        match status {
            StatusCode::UNAUTHORIZED => bail!("{message} Give it with --api-key."),
            _ => bail!("{} says {status}: {message}", self.base),
        }
    }
}

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<ChunkChoice>,
    usage: Option<ChunkUsage>,
    error: Option<ChunkError>,
}

#[derive(Deserialize)]
struct ChunkChoice {
    #[serde(default)]
    delta: ChunkDelta,
    finish_reason: Option<String>,
}

#[derive(Default, Deserialize)]
struct ChunkDelta {
    content: Option<String>,
}

#[derive(Deserialize)]
struct ChunkUsage {
    prompt_tokens: u64,
    completion_tokens: u64,
}

#[derive(Deserialize)]
struct ChunkError {
    message: String,
}

/// What the data of one event says.
fn said(data: &str) -> Vec<anyhow::Result<Said>> {
    if data == "[DONE]" {
        return Vec::new();
    }
    let chunk: Chunk = match serde_json::from_str(data) {
        Ok(chunk) => chunk,
        Err(error) => {
            return vec![Err(anyhow!(error).context("the server sent what is no chunk of an answer"))];
        }
    };
    if let Some(error) = chunk.error {
        return vec![Err(anyhow!("the answer broke off: {}", error.message))];
    }
    let mut said = Vec::new();
    for choice in chunk.choices {
        said.extend(choice.delta.content.filter(|text| !text.is_empty()).map(Said::Text));
        said.extend(choice.finish_reason.map(Said::Ended));
    }
    said.extend(chunk.usage.map(|usage| Said::Usage {
        prompt_tokens: usage.prompt_tokens,
        completion_tokens: usage.completion_tokens,
    }));
    said.into_iter().map(Ok).collect()
}
