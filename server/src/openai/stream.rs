//! Server-sent events: the answers of a request as they grow, each piece marked with its choice's index.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::http::{HeaderValue, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, BoxStream, SelectAll};
use futures::{Stream, StreamExt};
use serde_json::Value;
use tidemill_engine_core::request::Logprobs;

use super::answer::Piece;
use super::error::ApiError;
use super::sequence::Sequence;
use crate::admission::Permit;
use crate::generation::GenerationError;

/// How an endpoint writes its pieces.
pub(crate) trait Chunks: Send + 'static {
    /// Writes one piece of one choice, in one or more chunks.
    fn piece(&mut self, told: &Told) -> Vec<Value>;

    /// Writes what comes after all choices ended.
    fn end(&mut self) -> Option<Value>;
}

/// A piece, and where it belongs.
#[derive(Debug)]
pub(crate) struct Told {
    /// The choice.
    pub(crate) index: u32,
    /// The piece.
    pub(crate) piece: Piece,
    /// Output tokens of the choice so far.
    pub(crate) count: u32,
    /// Log-probabilities of the prompt, with the first piece, when asked for.
    pub(crate) prompt_logprobs: Option<Vec<Logprobs>>,
}

/// Everything a stream holds on to. Dropped when the client goes away, and with it every sequence.
struct Outgoing<C> {
    choices: SelectAll<BoxStream<'static, Result<Told, GenerationError>>>,
    chunks: C,
    ready: VecDeque<Event>,
    ended: bool,
    _permit: Permit,
}

/// The response that streams `sequences`.
pub(crate) fn respond<C: Chunks>(sequences: Vec<Sequence>, chunks: C, permit: Permit) -> Response {
    let choices = stream::select_all(sequences.into_iter().map(|sequence| told(sequence).boxed()));
    let outgoing = Outgoing { choices, chunks, ready: VecDeque::new(), ended: false, _permit: permit };
    let events = stream::unfold(outgoing, |mut outgoing| async {
        let event = outgoing.next().await?;
        Some((Ok::<_, Infallible>(event), outgoing))
    });
    let mut response = Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response();
    // Proxies such as nginx collect a response before they pass it on, unless told not to.
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

impl<C: Chunks> Outgoing<C> {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.ended {
                return None;
            }
            match self.choices.next().await {
                Some(Ok(told)) => self.ready.extend(self.chunks.piece(&told).iter().map(event)),
                Some(Err(error)) => {
                    let body = serde_json::to_string(&ApiError::from(error).body());
                    self.ready.push_back(Event::default().data(body.expect("strings alone are JSON")));
                    self.choices.clear();
                    self.end();
                }
                None => {
                    self.ready.extend(self.chunks.end().as_ref().map(event));
                    self.end();
                }
            }
        }
    }

    fn end(&mut self) {
        self.ended = true;
        self.ready.push_back(Event::default().data("[DONE]"));
    }
}

fn told(sequence: Sequence) -> impl Stream<Item = Result<Told, GenerationError>> {
    stream::unfold(sequence, |mut sequence| async {
        let piece = sequence.next().await?;
        let told = piece.map(|piece| Told {
            index: sequence.index,
            piece,
            count: sequence.count(),
            prompt_logprobs: sequence.take_prompt_logprobs(),
        });
        Some((told, sequence))
    })
}

fn event(chunk: &Value) -> Event {
    Event::default().data(chunk.to_string())
}

/// Pause after which a comment shows that the connection lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
