//! The server that is measured, and the requests that it gets.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{RequestBuilder, Response};
use serde_json::{Map, Value, json};

use super::flags::{PromptFlags, ServerFlags};
use super::outcome::{Answer, Failure, FailureKind};
use super::prompts::{Form, WordLength, sample};
use super::stream::{Listener, message};

/// A server and what every request to it has in common.
#[derive(Debug)]
pub(super) struct Client {
    http: reqwest::Client,
    /// Without `/v1`.
    base: String,
    endpoint: String,
    is_chat: bool,
    api_key: Option<String>,
    timeout: Duration,
    /// Fields of every request.
    common: Map<String, Value>,
    pub(super) model: String,
    /// Tokens of prompt and answer that fit, where the server says so.
    pub(super) max_model_len: Option<u32>,
}

/// A request, ready to be sent.
#[derive(Clone, Debug)]
pub(super) struct Body(Vec<u8>);

impl Client {
    /// Asks the server for its models and settles what requests will look like.
    ///
    /// # Errors
    ///
    /// When the flags make no request, or no server answers.
    pub(super) async fn connect(flags: &ServerFlags, prompts: &PromptFlags) -> anyhow::Result<Self> {
        let url = flags.base_url.trim_end_matches('/');
        let url = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        reqwest::Url::parse(&url).with_context(|| format!("--base-url: `{url}` is not a URL"))?;
        let endpoint = format!("/{}", flags.endpoint.trim_start_matches('/'));
        let base = match url.strip_suffix("/v1") {
            Some(base) if endpoint.starts_with("/v1/") => base.to_owned(),
            _ => url,
        };
        let is_chat = endpoint.ends_with("/chat/completions");
        if !endpoint.ends_with("/completions") {
            bail!("--endpoint: `{endpoint}` ends neither with /completions nor with /chat/completions");
        }
        let http = reqwest::Client::builder().default_headers(headers(&flags.header)?).build()?;
        let mut client = Self {
            http,
            base,
            endpoint,
            is_chat,
            api_key: flags.api_key.clone(),
            timeout: flags.request_timeout,
            common: Map::new(),
            model: String::new(),
            max_model_len: None,
        };
        (client.model, client.max_model_len) = client.choose_model(flags.model.as_deref()).await?;
        client.common.insert("model".into(), json!(client.model));
        client.common.insert("temperature".into(), json!(prompts.temperature));
        if prompts.ignore_eos {
            client.common.insert("ignore_eos".into(), json!(true));
        }
        client.common.extend(flags.extra_body.clone().unwrap_or_default());
        Ok(client)
    }

    /// Where requests go.
    pub(super) fn url(&self) -> String {
        format!("{}{}", self.base, self.endpoint)
    }

    /// What prompts can be made of: tokens where the server says which it has, otherwise text.
    ///
    /// # Errors
    ///
    /// When the server cannot answer a short request.
    pub(super) async fn prompt_form(&self, wants_text: bool) -> anyhow::Result<Form> {
        if !self.is_chat
            && !wants_text
            && let Some(vocabulary) = self.vocabulary().await
        {
            return Ok(Form::Tokens(vocabulary));
        }
        let mut lengths = Vec::new();
        let is_narrow = self.max_model_len.is_some_and(|longest| longest < NARROW);
        for words in if is_narrow { SHORT_SAMPLES } else { SAMPLES } {
            let body = self.body(&Value::String(sample(words)), 1, false);
            let asked = async {
                let response = self.send(body).await.map_err(|failure| {
                    anyhow!("{} to a first short request: {}", failure.kind, failure.message)
                })?;
                response.json::<Value>().await.context("the first short answer")
            };
            let answer =
                tokio::time::timeout(self.timeout, asked).await.context("a first short request")??;
            lengths.extend(answer["usage"]["prompt_tokens"].as_u64().map(|tokens| (words, tokens)));
        }
        let measured = match lengths[..] {
            [short, long] => WordLength::between(short, long),
            _ => None,
        };
        Ok(Form::Text(measured.unwrap_or_else(|| {
            eprintln!(
                "warning: the server does not count prompts: lengths are guessed at {GUESS} tokens a word"
            );
            WordLength { tokens_per_word: GUESS, overhead: 0.0 }
        })))
    }

    /// The request for an answer of at most `output_tokens`.
    pub(super) fn body(&self, prompt: &Value, output_tokens: u32, stream: bool) -> Body {
        let mut body = Map::new();
        if self.is_chat {
            body.insert("messages".into(), json!([{"role": "user", "content": prompt}]));
            body.insert("max_completion_tokens".into(), json!(output_tokens));
        } else {
            body.insert("prompt".into(), prompt.clone());
            body.insert("max_tokens".into(), json!(output_tokens));
        }
        if stream {
            body.insert("stream".into(), json!(true));
            body.insert("stream_options".into(), json!({"include_usage": true}));
        }
        body.extend(self.common.clone());
        Body(serde_json::to_vec(&body).expect("numbers and text are always JSON"))
    }

    /// Sends a request that streams and listens to its end.
    pub(super) async fn ask(&self, body: Body) -> Result<Answer, Failure> {
        let sent = Instant::now();
        let listened = async {
            let mut response = self.send(body).await?;
            let mut listener = Listener::default();
            loop {
                match response.chunk().await {
                    Ok(Some(bytes)) => listener.hear(&bytes, sent.elapsed())?,
                    Ok(None) => return listener.finish(),
                    Err(error) => return Err(Failure::new(FailureKind::Cut, chain(&error))),
                }
            }
        };
        tokio::time::timeout(self.timeout, listened).await.unwrap_or_else(|_| {
            let message = format!("no whole answer within {:.0} s", self.timeout.as_secs_f64());
            Err(Failure::new(FailureKind::TimedOut, message))
        })
    }

    async fn send(&self, Body(body): Body) -> Result<Response, Failure> {
        let request = self.http.post(self.url()).header("content-type", "application/json").body(body);
        let response = self.authorized(request).send().await;
        let response = response.map_err(|error| Failure::new(FailureKind::Unreachable, chain(&error)))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let text = response.text().await.unwrap_or_default();
        let said = match serde_json::from_str::<Value>(&text) {
            Ok(body) if !body["error"].is_null() => message(&body["error"]),
            _ => text.trim().chars().take(LONGEST_MESSAGE).collect(),
        };
        Err(Failure::new(FailureKind::Status(status.as_u16()), said))
    }

    /// The model's name, and its longest sequence where it is told.
    async fn choose_model(&self, wanted: Option<&str>) -> anyhow::Result<(String, Option<u32>)> {
        let request = self.http.get(format!("{}/v1/models", self.base)).timeout(QUESTION_LIMIT);
        let listed = match self.authorized(request).send().await {
            Ok(response) => response,
            Err(error) if error.is_connect() => {
                bail!(
                    "no server answers at {}: start one with `tidemill serve`, or name it with --base-url",
                    self.base
                )
            }
            Err(error) => return Err(anyhow!(error).context("the list of models")),
        };
        let models: Value = match listed.status().is_success() {
            true => listed.json().await.unwrap_or_default(),
            false if wanted.is_some() => Value::Null,
            false => bail!("{}/v1/models says {}: name the model with --model", self.base, listed.status()),
        };
        let models = models["data"].as_array().map_or(&[][..], Vec::as_slice);
        let entry = match wanted {
            Some(wanted) => models.iter().find(|entry| entry["id"] == wanted),
            None => models.first(),
        };
        let name = wanted.or_else(|| entry?["id"].as_str());
        let name = name.ok_or_else(|| anyhow!("{} lists no model: name one with --model", self.base))?;
        let longest = entry.and_then(|entry| entry["max_model_len"].as_u64()?.try_into().ok());
        Ok((name.to_owned(), longest))
    }

    /// Some tokens that the server has, none of them special; `None` where it does not say.
    async fn vocabulary(&self) -> Option<Vec<u32>> {
        let body =
            json!({"model": self.model, "prompt": sample(VOCABULARY_WORDS), "add_special_tokens": false});
        let request = self.http.post(format!("{}/tokenize", self.base)).json(&body).timeout(QUESTION_LIMIT);
        let response = self.authorized(request).send().await.ok()?.error_for_status().ok()?;
        let answer: Value = response.json().await.ok()?;
        let tokens: BTreeSet<u32> =
            answer["tokens"].as_array()?.iter().filter_map(|id| id.as_u64()?.try_into().ok()).collect();
        (LEAST_VOCABULARY <= tokens.len()).then(|| tokens.into_iter().collect())
    }

    fn authorized(&self, request: RequestBuilder) -> RequestBuilder {
        match &self.api_key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }
}

fn headers(given: &[(String, String)]) -> anyhow::Result<HeaderMap> {
    let mut headers = HeaderMap::new();
    for (name, value) in given {
        let parsed = || -> anyhow::Result<(HeaderName, HeaderValue)> { Ok((name.parse()?, value.parse()?)) };
        let (name, value) =
            parsed().with_context(|| format!("--header: `{name}` with this value is no header"))?;
        headers.append(name, value);
    }
    Ok(headers)
}

/// An error with its causes; reqwest's own text leaves them out.
fn chain(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// What needs no computing is answered within this.
const QUESTION_LIMIT: Duration = Duration::from_secs(30);
/// Words of the two prompts by which the length of words is measured.
const SAMPLES: [usize; 2] = [16, 96];
/// The same for servers of short contexts.
const SHORT_SAMPLES: [usize; 2] = [2, 10];
/// Tokens up to which a context is short.
const NARROW: u32 = 1024;
/// Tokens a word where nobody says.
const GUESS: f64 = 1.3;
/// Words among which all are that prompts are made of.
const VOCABULARY_WORDS: usize = 2000;
/// With fewer tokens prompts would be too much alike.
const LEAST_VOCABULARY: usize = 16;
/// Characters of a server's message that are kept.
const LONGEST_MESSAGE: usize = 200;
