//! From the logits of a step to what it produced for each sequence.
//!
//! The token behind each row is sampled as if no guess had been made, with the draw of its own position and with the
//! guesses before it as history. A guess is right when it is that token; at the first wrong one the rows behind it are
//! those of another text and are left alone. So guesses cannot change what a request answers, only how many tokens of it a
//! step gives.

use tidemill_engine_core::plan::Work;
use tidemill_engine_core::request::{Logprobs, RequestId, TokenId};

use crate::driver::Active;
use crate::runner::{LogitsRow, RowLogprobs};
use crate::sampler::{History, SampleError, Sampled, Sampler, chosen, logprobs, logprobs_of};

/// What a step produced for one sequence.
#[derive(Debug)]
pub(crate) struct StepResult {
    pub(crate) request: RequestId,
    /// The next token, and one more for each leading guess that was right.
    pub(crate) sampled: Vec<Sampled>,
    /// Why there is no next token, where one was to be sampled.
    pub(crate) failure: Option<String>,
    pub(crate) prompt_logprobs: Vec<Logprobs>,
}

/// A sequence's share of a step, as the sampler sees it.
#[derive(Clone, Copy)]
pub(crate) struct Share<'a> {
    pub(crate) work: &'a Work,
    /// All tokens that are known.
    pub(crate) tokens: &'a [TokenId],
    /// The guesses at those that follow.
    pub(crate) draft: &'a [TokenId],
    pub(crate) active: &'a Active,
}

impl StepResult {
    pub(crate) const fn new(request: RequestId) -> Self {
        Self { request, sampled: Vec::new(), failure: None, prompt_logprobs: Vec::new() }
    }

    /// Takes the rows of the sequence in order of position.
    pub(crate) fn take(&mut self, row: &LogitsRow<'_>, share: Share<'_>, sampler: &mut Sampler) {
        let next = row.position as usize + 1;
        if let Some(count) = self.prompt_logprobs_wanted(next, share) {
            self.prompt_logprobs.extend(logprobs(row.logits, share.tokens[next], count).ok());
        }
        if let Some(guesses) = self.guesses_before(next, share) {
            self.sample(row.logits, guesses, share, sampler);
        }
    }

    /// Takes what was made of a row where the logits are: the next token that was chosen, and what its log-probabilities are made of.
    pub(crate) fn take_made(
        &mut self,
        position: u32,
        token: u32,
        logprobs: Option<RowLogprobs<'_>>,
        share: Share<'_>,
    ) {
        let next = position as usize + 1;
        let logprobs = || logprobs.map(|it| logprobs_of(&it.sum, it.likely)).transpose();
        if self.prompt_logprobs_wanted(next, share).is_some() {
            self.prompt_logprobs.extend(logprobs().ok().flatten());
        }
        if let Some(guesses) = self.guesses_before(next, share) {
            let sampled = |token| Ok(Sampled { token, logprobs: logprobs()? });
            self.keep(guesses, chosen(token).and_then(sampled));
        }
    }

    /// How many log-probabilities of the prompt's token at position `next` are wanted, where they are and were not told before.
    fn prompt_logprobs_wanted(&self, next: usize, Share { active, .. }: Share<'_>) -> Option<u32> {
        let parts = &active.request;
        let told = active.prompt_logprobs.len() + self.prompt_logprobs.len();
        parts.sampling.prompt_logprobs.filter(|_| next < parts.prompt_len && next == told + 1)
    }

    /// How many guesses are before the token at position `next`; `None` when it is known, or one of them was wrong.
    fn guesses_before(&self, next: usize, Share { work, draft, .. }: Share<'_>) -> Option<usize> {
        let known = (work.first.0 + work.count.0) as usize;
        let guesses = next.checked_sub(known).filter(|_| work.samples)?;
        let is_right = |guess: &TokenId| self.sampled.get(guesses - 1).is_some_and(|it| it.token == *guess);
        draft[..guesses].last().is_none_or(is_right).then_some(guesses)
    }

    /// Samples behind so many guesses, which were all right.
    fn sample(&mut self, logits: &[f32], guesses: usize, share: Share<'_>, sampler: &mut Sampler) {
        let Share { tokens, draft, active, .. } = share;
        let parts = &active.request;
        let (prompt, output) = tokens.split_at(parts.prompt_len);
        let index = u32::try_from(output.len() + guesses).expect("bounded by max_model_len");
        let guessed: Vec<TokenId>;
        let output = if guesses == 0 {
            output
        } else {
            guessed = [output, &draft[..guesses]].concat();
            &guessed
        };
        let history = History { prompt, output };
        self.keep(guesses, sampler.sample(logits, history, &parts.sampling, &parts.stop, index));
    }

    fn keep(&mut self, guesses: usize, sampled: Result<Sampled, SampleError>) {
        match sampled {
            Ok(sampled) => self.sampled.push(sampled),
            // Behind a guess it is met again by the next step, once the tokens before it have been told.
            Err(error) if guesses == 0 => self.failure = Some(error.to_string()),
            Err(_) => {}
        }
    }
}
