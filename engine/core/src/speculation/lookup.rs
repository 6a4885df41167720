//! Prompt lookup: where were the last tokens of a sequence seen before, and what came after them?
//!
//! Every run of `shortest` tokens is chained to the one before with the same tokens, as in compressors of the LZ77 family, so
//! that a search looks at a few places and never at the whole prompt. What was found is followed as long as it goes on
//! being right: each right token makes the match longer, and the longer it is the more its next token can be trusted.

use std::collections::BTreeMap;
use std::num::NonZeroU32;

use crate::request::TokenId;

/// The places of one sequence, as far as it has been followed.
#[derive(Clone, Debug)]
pub(super) struct Lookup {
    shortest: usize,
    longest: usize,
    /// Tokens taken in.
    seen: usize,
    /// Hash of a run of `shortest` tokens → the place behind its latest occurrence.
    latest: BTreeMap<u64, NonZeroU32>,
    /// For the run that ends before place `shortest + n`: the place behind an earlier one of the same hash.
    earlier: Vec<Option<NonZeroU32>>,
    found: Option<Match>,
}

/// An earlier place that looks like the end of the sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Match {
    /// Where the token is that followed there.
    pub(super) next: usize,
    /// How many tokens before it are equal.
    pub(super) length: usize,
}

impl Lookup {
    /// A match has at least `shortest` tokens, and one of `longest` is not searched to be bettered.
    pub(super) fn new(shortest: u32, longest: u32) -> Self {
        assert!(0 < shortest && shortest <= longest, "a match has a token");
        Self {
            shortest: shortest as usize,
            longest: longest as usize,
            seen: 0,
            latest: BTreeMap::new(),
            earlier: Vec::new(),
            found: None,
        }
    }

    /// Takes in what is new of `tokens`. `judge` is told of each output token that was predicted: how long the match was
    /// and whether it was right. That costs nothing and needs no draft, so there is always a measured acceptance.
    pub(super) fn follow(
        &mut self,
        tokens: &[TokenId],
        prompt_len: usize,
        mut judge: impl FnMut(usize, bool),
    ) {
        while self.seen < tokens.len() {
            let token = tokens[self.seen];
            let before = self.found.take();
            let went_on = before.filter(|it| tokens[it.next] == token);
            if let Some(it) = before {
                judge(it.length, went_on.is_some());
            }
            self.seen += 1;
            let seen = &tokens[..self.seen];
            if prompt_len <= self.seen {
                // Nothing is predicted within the prompt.
                let longer = went_on.map(|it| Match { next: it.next + 1, length: it.length + 1 });
                self.found = match longer {
                    Some(it) if self.longest <= it.length => Some(it),
                    other => self.search(seen, other),
                };
            }
            self.index(seen);
        }
    }

    /// What is known of the end of the sequence.
    pub(super) const fn found(&self) -> Option<Match> {
        self.found
    }

    /// The tokens that would follow if the sequence went on as it did at the match. Where that reaches the end of the
    /// sequence it goes on with itself: so a loop is predicted for as long as one likes.
    pub(super) fn draft(&self, tokens: &[TokenId], count: usize) -> Vec<TokenId> {
        let Some(Match { next, .. }) = self.found else { return Vec::new() };
        let mut draft = Vec::with_capacity(count);
        for place in next..next + count {
            let token = tokens.get(place).copied().unwrap_or_else(|| draft[place - tokens.len()]);
            draft.push(token);
        }
        draft
    }

    /// The longest match among the latest places, or `known` when none is longer.
    fn search(&self, seen: &[TokenId], known: Option<Match>) -> Option<Match> {
        let mut best = known;
        let mut place = self.run(seen).and_then(|run| self.latest.get(&run).copied());
        for _ in 0..PLACES {
            let Some(next) = place.map(|place| place.get() as usize) else { break };
            let backwards = seen[..next].iter().rev().zip(seen.iter().rev());
            let length = backwards.take(LONGEST_COMPARED).take_while(|(one, other)| one == other).count();
            if self.shortest <= length && best.is_none_or(|it| it.length < length) {
                best = Some(Match { next, length });
                if self.longest <= length {
                    break;
                }
            }
            place = self.earlier[next - self.shortest];
        }
        best
    }

    /// Makes the run that ends `seen` findable.
    fn index(&mut self, seen: &[TokenId]) {
        let Some(run) = self.run(seen) else { return };
        let place = u32::try_from(seen.len()).ok().and_then(NonZeroU32::new);
        let place = place.expect("max_model_len bounds a sequence below 2^32 tokens, and it has one");
        self.earlier.push(self.latest.insert(run, place));
    }

    /// Hash of the run that ends `seen`; different runs may share one, since what is found is compared.
    fn run(&self, seen: &[TokenId]) -> Option<u64> {
        let start = seen.len().checked_sub(self.shortest)?;
        let mix = |hash: u64, token: &TokenId| {
            let mixed = (hash ^ u64::from(*token)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            mixed ^ (mixed >> 32)
        };
        Some(seen[start..].iter().fold(0, mix))
    }
}

/// Places that a search looks at.
const PLACES: usize = 32;

/// Tokens that a search compares at a place; more say nothing more about the next one.
const LONGEST_COMPARED: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    /// Text stands for tokens; the prompt ends at `|`. What is drafted behind the last token, and the length of the match.
    #[test]
    fn drafts() {
        #[rustfmt::skip]
        let rows = [
            // name                                            shortest, longest  text                draft, length
            ("nothing was seen before",                        1, 4, "|abcdef",           "",       0),
            ("what followed follows again",                    2, 4, "abcdefgh|abc",      "defghabc", 3),
            ("a match shorter than asked for is none",         3, 4, "abcdef|xxab",       "",       0),
            ("the longest match wins",                         1, 4, "xbcDEFGHIJ abcKLMNOPQ ybcd|abc", "KLMNOPQ ", 3),
            ("of equal ones the latest",                       2, 4, "abCCCCCCCC abDDDDDDDD|ab", "DDDDDDDD", 2),
            ("one long enough is not bettered",                1, 2, "zzabCCCCCCCC abDDDDDDDD zzab|", "DDDDDDDD", 2),
            ("a loop goes on",                                 1, 4, "|xyxy",             "xyxyxyxy", 2),
            ("one token can match",                            1, 1, "abc|a",             "bcabcabc", 1),
            ("the prompt's own end can match",                 2, 4, "abcdefghijab|",     "cdefghij", 2),
            ("a wrong guess ends a match",                     2, 4, "abcdefgh|abcX",     "",       0),
        ];
        for (row, shortest, longest, text, expected, length) in rows {
            let prompt_len = text.find('|').unwrap();
            let tokens: Vec<TokenId> = text.bytes().filter(|it| *it != b'|').map(TokenId::from).collect();
            let mut at_once = Lookup::new(shortest, longest);
            at_once.follow(&tokens, prompt_len.max(1), |_, _| {});
            let drafted: String =
                at_once.draft(&tokens, 8).iter().map(|it| char::from(u8::try_from(*it).unwrap())).collect();
            assert_eq!(
                (drafted.as_str(), at_once.found().map_or(0, |it| it.length)),
                (expected, length),
                "{row}"
            );

            let mut one_by_one = Lookup::new(shortest, longest);
            for seen in 1..=tokens.len() {
                one_by_one.follow(&tokens[..seen], prompt_len.max(1), |_, _| {});
            }
            assert_eq!(one_by_one.draft(&tokens, 8), at_once.draft(&tokens, 8), "{row}, one by one");
        }
    }

    #[test]
    fn each_prediction_of_output_is_judged_once() {
        let tokens: Vec<TokenId> = "abcdefabcdXfab".bytes().map(TokenId::from).collect();
        let mut judged = Vec::new();
        Lookup::new(2, 4).follow(&tokens, 6, |length, right| judged.push((length, right)));
        assert_eq!(judged, [(2, true), (3, true), (4, false), (2, true)]);
        judged.clear();
        Lookup::new(2, 4).follow(&tokens, tokens.len(), |length, right| judged.push((length, right)));
        assert_eq!(judged, [], "a prompt is not predicted");
    }

    #[test]
    fn runs_of_the_same_hash_are_compared() {
        let mut lookup = Lookup::new(2, 4);
        lookup.follow(&[1, 2, 3, 4, 5], 1, |_, _| {});
        let run = lookup.run(&[8, 9]).unwrap();
        lookup.latest.insert(run, NonZeroU32::new(3).unwrap()); // As if (2, 3) had that hash.
        lookup.follow(&[1, 2, 3, 4, 5, 8, 9], 1, |_, _| {});
        assert_eq!(lookup.found(), None);
    }
}
