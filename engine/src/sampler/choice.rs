//! From adjusted logits to one token: temperature, min-p, top-k, top-p, draw.
//!
//! All filters keep a head of the tokens in falling order of probability (equal ones by rising id), so one partly sorted
//! list serves them all: it is sorted only as far as somebody looks. Sums are taken in f64 and in a fixed order.

use std::cmp::Ordering;

use tidemill_engine_core::request::{SamplingParams, TokenId};

/// Memory for one choice.
#[derive(Debug)]
pub(super) struct Candidates {
    /// Likelihood of each token of the vocabulary relative to the most likely one's.
    weights: Vec<f64>,
    /// Tokens: the first `sorted` are the most likely ones, in order.
    order: Vec<TokenId>,
    sorted: usize,
}

/// The head of the order that the filters keep.
#[derive(Clone, Copy, Debug)]
struct Kept {
    tokens: usize,
    /// Sum of their weights.
    total: f64,
}

/// The first of the greatest logits, of which none is no number.
///
/// In two passes that the compiler turns into vector instructions, since a vocabulary has up to some hundred thousand
/// tokens and each guessed row goes through them.
pub(super) fn greedy(logits: &[f32]) -> TokenId {
    let greatest = greatest(logits);
    let holds_it = |piece: &[f32]| piece.iter().fold(false, |found, logit| found | (*logit == greatest));
    let piece = logits.chunks(PIECE).position(holds_it).expect("a vocabulary has tokens");
    let within = logits[piece * PIECE..].iter().position(|logit| *logit == greatest);
    (piece * PIECE + within.expect("the piece holds it")) as TokenId
}

/// The greatest logit; minus infinity where there is none.
pub(super) fn greatest(logits: &[f32]) -> f32 {
    let greater = |a: f32, b: f32| if a < b { b } else { a };
    let (pieces, rest) = logits.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for piece in pieces {
        lanes = std::array::from_fn(|lane| greater(lanes[lane], piece[lane]));
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, greater)
}

impl Candidates {
    pub(super) fn new(vocab_size: usize) -> Self {
        Self { weights: Vec::with_capacity(vocab_size), order: Vec::with_capacity(vocab_size), sorted: 0 }
    }

    /// Chooses the token at which the running sum of probabilities, most likely first, passes `uniform`.
    ///
    /// `logits` has a greatest element, and it is finite.
    pub(super) fn draw(&mut self, logits: &[f32], params: &SamplingParams, uniform: f64) -> TokenId {
        self.weigh(logits, params.temperature);
        // The most likely token has weight 1, so one token is kept whatever a request asks for.
        let mut kept = self.keep_likely(f64::from(params.min_p).min(1.0));
        if let Some(top_k) = params.top_k.filter(|top_k| 0 < *top_k) {
            kept = self.keep_first(top_k as usize, kept);
        }
        if params.top_p < 1.0 {
            kept = self.keep_mass(f64::from(params.top_p), kept);
        }
        let place = self.reach(uniform * kept.total, kept.tokens);
        self.order[place]
    }

    fn weigh(&mut self, logits: &[f32], temperature: f32) {
        let greatest = greatest(logits);
        // Subtracted before it is divided: no temperature can then overflow.
        let weight = |&logit: &f32| (f64::from(logit - greatest) / f64::from(temperature)).exp();
        self.weights.clear();
        self.weights.extend(logits.iter().map(weight));
        self.order.clear();
        self.order.extend(0..logits.len() as TokenId);
        self.sorted = 0;
    }

    /// Keeps tokens of at least this share of the greatest probability.
    fn keep_likely(&self, min_p: f64) -> Kept {
        let kept = self.weights.iter().filter(|weight| min_p <= **weight && 0.0 < **weight);
        let (tokens, total) = kept.fold((0, 0.0), |(tokens, total), weight| (tokens + 1, total + weight));
        Kept { tokens, total }
    }

    /// Keeps this many tokens, and those that are as likely as the last of them.
    fn keep_first(&mut self, top_k: usize, kept: Kept) -> Kept {
        if kept.tokens <= top_k {
            return kept;
        }
        self.sort(top_k);
        let last = self.weight(top_k - 1);
        let mut tokens = top_k;
        while tokens < kept.tokens {
            self.sort(tokens + 1);
            if self.weight(tokens) < last {
                break;
            }
            tokens += 1;
        }
        Kept { tokens, total: (0..tokens).map(|place| self.weight(place)).sum() }
    }

    /// Keeps the fewest tokens that have at least this share of what is kept so far.
    fn keep_mass(&mut self, top_p: f64, kept: Kept) -> Kept {
        let mut total = 0.0;
        for place in 0..kept.tokens {
            self.sort(place + 1);
            total += self.weight(place);
            if top_p * kept.total <= total {
                return Kept { tokens: place + 1, total };
            }
        }
        Kept { total, ..kept }
    }

    /// The first place at which the running sum is above `target`; the last of `tokens` when rounding left none.
    fn reach(&mut self, target: f64, tokens: usize) -> usize {
        let mut total = 0.0;
        for place in 0..tokens {
            self.sort(place + 1);
            total += self.weight(place);
            if target < total {
                return place;
            }
        }
        tokens - 1
    }

    fn weight(&self, place: usize) -> f64 {
        self.weights[self.order[place] as usize]
    }

    /// Sorts at least the first `places`, growing in steps so that a draw among the likely tokens, which nearly all are,
    /// costs one pass over the vocabulary.
    fn sort(&mut self, places: usize) {
        if places <= self.sorted {
            return;
        }
        let target = places.max(FIRST_SORTED).max(GROWTH * self.sorted).min(self.order.len());
        let weights = &self.weights;
        let falling = |a: &TokenId, b: &TokenId| -> Ordering {
            weights[*b as usize].total_cmp(&weights[*a as usize]).then(a.cmp(b))
        };
        let rest = &mut self.order[self.sorted..];
        let count = target - self.sorted;
        if count < rest.len() {
            rest.select_nth_unstable_by(count, falling);
        }
        rest[..count].sort_unstable_by(falling);
        self.sorted = target;
    }
}

/// Comparisons that go side by side.
const LANES: usize = 32;

/// Logits that are looked through at once.
const PIECE: usize = 256;

const FIRST_SORTED: usize = 64;
const GROWTH: usize = 8;
