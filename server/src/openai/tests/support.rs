//! A front end in memory, and ways to ask it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode, header};
use serde_json::{Value, json};
use tidemill_engine::handle::{EmbeddedFile, ModelSource};
use tower::ServiceExt;

use super::memory_generator::MemoryGenerator;
use crate::http::Access;
use crate::metrics::Metrics;
use crate::openai::{App, AppConfig, BodyLimits, ModelText, app};

/// `<|end_turn|>` of the fixture's tokenizer.
pub(crate) const EOS: u32 = 3;

/// A front end.
pub(crate) struct Front {
    pub(crate) router: axum::Router,
    pub(crate) generator: Arc<MemoryGenerator>,
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

/// The fixture's text files, with some of them replaced or added.
pub(crate) fn model_text(files: &[(&'static str, &str)]) -> ModelText {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/tokenizer");
    let kept = ["tokenizer.json", "tokenizer_config.json"].into_iter();
    let kept = kept.filter(|name| files.iter().all(|(replaced, _)| replaced != name));
    let kept = kept.map(|name| (name, std::fs::read(folder.join(name)).unwrap()));
    let given = files.iter().map(|&(name, content)| (name, content.as_bytes().to_vec()));
    // What is compiled into a binary lives for ever, and so does this.
    let embedded = kept.chain(given).map(|(name, bytes)| EmbeddedFile { name, bytes: bytes.leak() });
    let source = ModelSource::Embedded(embedded.collect::<Vec<_>>().leak());
    ModelText::load(&source, crate::chat_template::system_clock()).unwrap()
}

pub(crate) fn config() -> AppConfig {
    AppConfig {
        model_names: vec!["tiny".to_owned(), "org/alias".to_owned()],
        version: "1.2.3",
        max_requests: 8,
        body: BodyLimits { bytes: 16 << 10, time: Duration::from_secs(10) },
        access: Access::default(),
    }
}

/// A front end whose model answers with `texts`, chosen by seed.
pub(crate) fn front(texts: &[&str]) -> Front {
    Front::new(config(), model_text(&[]), |generator| generator, texts)
}

impl Front {
    pub(crate) fn new(
        config: AppConfig,
        text: ModelText,
        set_up: impl FnOnce(MemoryGenerator) -> MemoryGenerator,
        texts: &[&str],
    ) -> Self {
        let generator = Arc::new(set_up(MemoryGenerator::new(Arc::clone(&text.tokenizer), EOS, texts)));
        let metrics = Arc::new(Metrics::new("tiny"));
        let state = App::new(config, text, Arc::clone(&generator) as _, metrics);
        Self { router: app(state).unwrap(), generator }
    }

    pub(crate) async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap();
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        Answer { status: parts.status, headers: parts.headers, text }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).body(Body::empty()).unwrap()).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(json_request(path, body)).await
    }

    /// Posts, and wants JSON with status 200.
    pub(crate) async fn ask(&self, path: &str, body: &Value) -> Value {
        let answer = self.post(path, body).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
        answer.json()
    }

    /// Posts with `stream`, and wants chunks and then the end mark.
    pub(crate) async fn stream(&self, path: &str, mut body: Value) -> Vec<Value> {
        body["stream"] = json!(true);
        let answer = self.post(path, &body).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
        assert_eq!(answer.headers[header::CONTENT_TYPE], "text/event-stream");
        let mut events: Vec<&str> =
            answer.text.split_terminator("\n\n").map(|event| event.strip_prefix("data: ").unwrap()).collect();
        assert_eq!(events.pop(), Some("[DONE]"));
        events.into_iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }
}

pub(crate) fn json_request(path: &str, body: &Value) -> Request<Body> {
    let request = Request::post(path).header(header::CONTENT_TYPE, "application/json");
    request.body(Body::from(body.to_string())).unwrap()
}

/// A question, with more fields.
pub(crate) fn question(more: Value) -> Value {
    with(json!({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "seed": 0}), more)
}

/// `body` with the fields of `more` added or replaced.
pub(crate) fn with(mut body: Value, more: Value) -> Value {
    let Value::Object(more) = more else { panic!("fields are an object") };
    body.as_object_mut().unwrap().extend(more);
    body
}

/// The deltas of one choice, as one text.
pub(crate) fn streamed_text(chunks: &[Value], index: u64) -> String {
    let choices = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap());
    let of_index = choices.filter(|choice| choice["index"] == index);
    of_index.filter_map(|choice| choice["delta"]["content"].as_str().or(choice["text"].as_str())).collect()
}
