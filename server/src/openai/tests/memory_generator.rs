//! A generator without workers: it answers with a text that the seed chooses, obeys stop conditions, and counts who
//! went away.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use futures::future::BoxFuture;
use futures::{FutureExt, stream};
use tidemill_engine_core::request::{FinishReason, Logprobs, TokenId};
use tokio::sync::Semaphore;

use crate::generation::{Generation, GenerationError, GenerationEvent};
use crate::openai::{ClusterHealth, Generator, Serving, Started, WorkerHealth};
use crate::tokenizer::Tokenizer;

/// The generator.
pub(crate) struct MemoryGenerator {
    tokenizer: Arc<Tokenizer>,
    /// Answers; the seed says which.
    texts: Vec<String>,
    /// The token at the end of each.
    eos: TokenId,
    /// What ends each answer after so many tokens, before its end.
    failure: Option<(usize, GenerationError)>,
    /// One permit for each event; unlimited unless a test wants to hold answers back.
    pub(crate) pace: Arc<Semaphore>,
    /// What was asked.
    pub(crate) asked: Mutex<Vec<Generation>>,
    pub(crate) tally: Arc<Tally>,
    pub(crate) health: Mutex<ClusterHealth>,
    refusal: Option<GenerationError>,
}

/// How sequences ended.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Sequences that exist.
    pub(crate) open: AtomicUsize,
    /// Sequences that were dropped before their end.
    pub(crate) cancelled: AtomicUsize,
    changed: tokio::sync::Notify,
}

impl MemoryGenerator {
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, eos: TokenId, texts: &[&str]) -> Self {
        let worker = |name: &str, role| WorkerHealth { name: name.to_owned(), role, alive: true };
        let workers = vec![worker("prefill-0", "prefill"), worker("decode-0", "decode")];
        let health = ClusterHealth { workers, serving: Serving::Yes { max_model_len: 128 } };
        Self {
            tokenizer,
            texts: texts.iter().map(ToString::to_string).collect(),
            eos,
            failure: None,
            pace: Arc::new(Semaphore::new(Semaphore::MAX_PERMITS)),
            asked: Mutex::default(),
            tally: Arc::default(),
            health: Mutex::new(health),
            refusal: None,
        }
    }

    /// Lets answers wait until the test adds permits to `pace`.
    pub(crate) fn held_back(mut self) -> Self {
        self.pace = Arc::new(Semaphore::new(0));
        self
    }

    /// Lets each answer fail after so many tokens.
    pub(crate) fn failing(mut self, after: usize, error: GenerationError) -> Self {
        self.failure = Some((after, error));
        self
    }

    /// Lets each request be refused.
    pub(crate) fn refusing(mut self, error: GenerationError) -> Self {
        self.refusal = Some(error);
        self
    }

    fn events(&self, generation: &Generation) -> VecDeque<GenerationEvent> {
        let text = &self.texts[usize::try_from(generation.sampling.seed).unwrap() % self.texts.len()];
        let mut tokens = self.tokenizer.encode(text, false).unwrap();
        tokens.push(self.eos);
        let mut events = VecDeque::new();
        if let Some(alternatives) = generation.sampling.prompt_logprobs {
            let of = generation.prompt.iter().skip(1).map(|&id| logprobs(id, alternatives)).collect();
            events.push_back(GenerationEvent::PromptLogprobs(of));
        }
        for (index, id) in (0..).zip(tokens.into_iter().cycle()) {
            if let Some((after, error)) = &self.failure
                && usize::try_from(index).unwrap() == *after
            {
                events.push_back(GenerationEvent::Failed(error.clone()));
                break;
            }
            let logprobs = generation.sampling.logprobs.map(|alternatives| logprobs(id, alternatives));
            events.push_back(GenerationEvent::Token { id, logprobs });
            if let Some(reason) = generation.stop.reason(id, index) {
                events.push_back(GenerationEvent::Finished { reason, cached_tokens: 3 });
                break;
            }
        }
        events
    }
}

/// Made up, but different for different tokens.
pub(crate) fn logprobs(id: TokenId, alternatives: u32) -> Logprobs {
    let top = (0..alternatives).map(|rank| (5 + (id + rank) % 200, -0.5 - rank as f32)).collect();
    Logprobs { chosen: -0.25, rank: 1, top }
}

impl Generator for MemoryGenerator {
    fn generate(&self, generation: Generation) -> BoxFuture<'_, Result<Started, GenerationError>> {
        async move {
            if let Some(refusal) = &self.refusal {
                return Err(refusal.clone());
            }
            let sequence = Running {
                events: self.events(&generation),
                pace: Arc::clone(&self.pace),
                guard: Guard::new(Arc::clone(&self.tally)),
            };
            self.asked.lock().unwrap().push(generation);
            let events = stream::unfold(sequence, |mut sequence| async {
                sequence.pace.acquire().await.unwrap().forget();
                let event = sequence.events.pop_front()?;
                sequence.guard.ended |=
                    matches!(event, GenerationEvent::Finished { .. } | GenerationEvent::Failed(_));
                Some((event, sequence))
            });
            Ok(Started { begun: Some(Instant::now()), events: Box::pin(events) })
        }
        .boxed()
    }

    fn health(&self) -> ClusterHealth {
        self.health.lock().unwrap().clone()
    }
}

struct Running {
    events: VecDeque<GenerationEvent>,
    pace: Arc<Semaphore>,
    guard: Guard,
}

/// Counts the end of a sequence.
struct Guard {
    tally: Arc<Tally>,
    ended: bool,
}

impl Guard {
    fn new(tally: Arc<Tally>) -> Self {
        tally.open.fetch_add(1, Ordering::SeqCst);
        tally.changed.notify_waiters();
        Self { tally, ended: false }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.tally.open.fetch_sub(1, Ordering::SeqCst);
        if !self.ended {
            self.tally.cancelled.fetch_add(1, Ordering::SeqCst);
        }
        self.tally.changed.notify_waiters();
    }
}

impl Tally {
    /// Waits until so many sequences are open.
    pub(crate) async fn until_open(&self, count: usize) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if self.open.load(Ordering::SeqCst) == count {
                return;
            }
            changed.await;
        }
    }
}

#[test]
fn the_generator_obeys_the_conditions_it_is_given() {
    use tidemill_engine_core::request::{SamplingParams, StopConditions};
    let tokenizer = crate::tokenizer::tests::byte_level();
    let generator = MemoryGenerator::new(tokenizer, 3, &["ab"]);
    let asked = |max_tokens| Generation {
        prompt: vec![5],
        sampling: SamplingParams::default(),
        stop: StopConditions {
            ignore_eos: false,
            eos_token_ids: vec![3],
            ..StopConditions::after(max_tokens)
        },
    };
    let last = |max_tokens| generator.events(&asked(max_tokens)).pop_back();
    let finished = |reason| Some(GenerationEvent::Finished { reason, cached_tokens: 3 });
    assert_eq!(last(1), finished(FinishReason::Length));
    assert_eq!(last(9), finished(FinishReason::Stop(None)));
}
