//! From the logits of a step to what it produced for each sequence.
//!
//! The token behind each row is sampled as if no guess had been made, with the draw of its own position and with the
//! guesses before it as history. A guess is right when it is that token; at the first wrong one the rows behind it are
//! those of another text and are left alone. So guesses cannot change what a request answers, only how many tokens of it a
//! step gives.

use tidemill_engine_core::plan::Work;
use tidemill_engine_core::request::{Logprobs, RequestId, TokenId};

use crate::driver::Active;
use crate::runner::LogitsRow;
use crate::sampler::{History, SampleError, Sampled, Sampler, logprobs};

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
        let Share { tokens, active, .. } = share;
        let next = row.position as usize + 1;
        let parts = &active.request;
        if let Some(count) = parts.sampling.prompt_logprobs
            && next < parts.prompt_len
            && next == active.prompt_logprobs.len() + self.prompt_logprobs.len() + 1
        {
            self.prompt_logprobs.extend(logprobs(row.logits, tokens[next], count).ok());
        }
        if let Some(guesses) = self.guesses_before(next, share) {
            self.sample(row.logits, guesses, share, sampler);
        }
    }

    /// Takes a row of the sequence whose next token was chosen where the logits are.
    pub(crate) fn take_token(
        &mut self,
        position: u32,
        token: Result<TokenId, SampleError>,
        share: Share<'_>,
    ) {
        if let Some(guesses) = self.guesses_before(position as usize + 1, share) {
            self.keep(guesses, token.map(|token| Sampled { token, logprobs: None }));
        }
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
