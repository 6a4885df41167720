//! Prompts out of nothing: as long as asked for, and alike where asked for.
//!
//! A prompt is a list of parts, and a part's content follows from its key alone, so that prompts with the same parts
//! at their beginning share it as real ones do. Where the server tells its tokens (`/tokenize`), a prompt is a list of
//! token ids and exactly as long as wanted; otherwise it is text, whose length was measured before.

use serde_json::{Value, json};

use super::draws::Draws;

/// A piece of a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) content: Content,
    pub(super) tokens: u32,
}

/// What a piece says: pieces that are equal here say the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// The beginning of all prompts.
    Shared,
    /// Like every piece with this hash.
    Hashed(u64),
    /// Of the n-th request alone.
    Own(u64),
}

/// Writes prompts.
#[derive(Clone, Debug)]
pub(super) struct Writer {
    seed: u64,
    form: Form,
}

/// What prompts are made of.
#[derive(Clone, Debug)]
pub(super) enum Form {
    /// Tokens that the server has.
    Tokens(Vec<u32>),
    /// Words.
    Text(WordLength),
}

/// How many tokens words are, to a server.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct WordLength {
    pub(super) tokens_per_word: f64,
    /// Tokens that come with every prompt, such as those of a chat template.
    pub(super) overhead: f64,
}

impl Writer {
    pub(super) const fn new(seed: u64, form: Form) -> Self {
        Self { seed, form }
    }

    /// The prompt: a list of ids or a string, as the API takes it.
    pub(super) fn write(&self, parts: &[Part]) -> Value {
        match &self.form {
            Form::Tokens(vocabulary) => {
                let tokens = parts.iter().flat_map(|part| {
                    let mut draws = self.draws(part.content);
                    (0..part.tokens).map(move |_| vocabulary[draws.below(vocabulary.len())])
                });
                json!(tokens.collect::<Vec<u32>>())
            }
            Form::Text(length) => Value::String(self.text(parts, *length)),
        }
    }

    fn text(&self, parts: &[Part], length: WordLength) -> String {
        let mut text = String::new();
        for (index, part) in parts.iter().enumerate() {
            // What comes with every prompt comes off its last part, so that the others stay alike.
            let overhead = if index + 1 == parts.len() { length.overhead } else { 0.0 };
            let words = ((f64::from(part.tokens) - overhead) / length.tokens_per_word).round().max(1.0);
            verses(&mut text, self.draws(part.content), words as usize);
        }
        text
    }

    fn draws(&self, content: Content) -> Draws {
        match content {
            Content::Shared => Draws::new(self.seed, SHARED),
            Content::Hashed(hash) => Draws::new(Draws::new(self.seed, HASHED).bits(), hash),
            Content::Own(index) => Draws::new(Draws::new(self.seed, OWN).bits(), index),
        }
    }
}

impl WordLength {
    /// From two prompts' lengths in words and in tokens. `None` where they make no sense.
    pub(super) fn between(short: (usize, u64), long: (usize, u64)) -> Option<Self> {
        let tokens_per_word = (long.1.checked_sub(short.1)? as f64) / (long.0.checked_sub(short.0)? as f64);
        let overhead = short.1 as f64 - tokens_per_word * short.0 as f64;
        let is_sane = tokens_per_word.is_finite() && 0.1 < tokens_per_word;
        is_sane.then_some(Self { tokens_per_word, overhead: overhead.max(0.0) })
    }
}

/// So many words of sample text, for measurements.
pub(super) fn sample(words: usize) -> String {
    let mut text = String::new();
    verses(&mut text, Draws::new(0, SAMPLE), words);
    text
}

/// Adds words in lines, the first of each in capitals.
fn verses(text: &mut String, mut draws: Draws, words: usize) {
    for index in 0..words {
        let word = WORDS[draws.below(WORDS.len())];
        match index % WORDS_PER_LINE {
            0 => {
                text.push_str(&word[..1].to_uppercase());
                text.push_str(&word[1..]);
            }
            _ => text.push_str(word),
        }
        let ends_line = index % WORDS_PER_LINE == WORDS_PER_LINE - 1 || index + 1 == words;
        text.push_str(if ends_line { ",\n" } else { " " });
    }
}

const SHARED: u64 = 2;
const HASHED: u64 = 3;
const OWN: u64 = 4;
const SAMPLE: u64 = 5;

const WORDS_PER_LINE: usize = 8;

/// Plain words that most tokenizers know.
const WORDS: [&str; 96] = [
    "the",
    "river",
    "turns",
    "a",
    "mill",
    "at",
    "night",
    "and",
    "every",
    "stone",
    "remembers",
    "water",
    "when",
    "light",
    "is",
    "low",
    "we",
    "walk",
    "along",
    "old",
    "road",
    "to",
    "see",
    "how",
    "wind",
    "moves",
    "over",
    "fields",
    "of",
    "corn",
    "no",
    "bird",
    "sings",
    "but",
    "one",
    "small",
    "bell",
    "rings",
    "far",
    "from",
    "any",
    "house",
    "my",
    "friend",
    "said",
    "that",
    "time",
    "runs",
    "like",
    "tide",
    "in",
    "out",
    "again",
    "with",
    "boats",
    "upon",
    "it",
    "sun",
    "rises",
    "red",
    "behind",
    "hill",
    "where",
    "trees",
    "stand",
    "green",
    "their",
    "leaves",
    "speak",
    "soft",
    "words",
    "for",
    "all",
    "who",
    "hear",
    "them",
    "then",
    "day",
    "begins",
    "bread",
    "warm",
    "hands",
    "cold",
    "morning",
    "open",
    "door",
    "home",
    "long",
    "way",
    "under",
    "stars",
    "still",
    "sea",
    "white",
    "sand",
    "sleeps",
];

#[cfg(test)]
mod tests {
    use super::*;

    const ONE_EACH: WordLength = WordLength { tokens_per_word: 1.0, overhead: 0.0 };

    fn part(content: Content, tokens: u32) -> Part {
        Part { content, tokens }
    }

    fn tokens(writer: &Writer, parts: &[Part]) -> Vec<u32> {
        serde_json::from_value(writer.write(parts)).expect("ids")
    }

    #[test]
    fn ids_are_as_many_as_asked_and_of_the_vocabulary() {
        let writer = Writer::new(1, Form::Tokens(vec![10, 20, 30]));
        let made = tokens(&writer, &[part(Content::Shared, 5), part(Content::Own(0), 300)]);
        assert_eq!(made.len(), 305);
        assert!([10, 20, 30].iter().all(|id| made.contains(id)) && made.iter().all(|id| id % 10 == 0));
    }

    #[test]
    fn parts_are_shared_by_their_key_alone() {
        let shared = part(Content::Hashed(7), 40);
        for form in [Form::Tokens((0..1000).collect()), Form::Text(ONE_EACH)] {
            let writer = Writer::new(1, form.clone());
            let write =
                |writer: &Writer, own| writer.write(&[shared, part(Content::Own(own), 40)]).to_string();
            let (first, second) = (write(&writer, 1), write(&writer, 2));
            assert_eq!(first, write(&writer, 1), "the same again");
            let alike = first.bytes().zip(second.bytes()).take_while(|(a, b)| a == b).count();
            let alone = writer.write(&[shared]).to_string();
            assert!(alone.len() - 3 <= alike, "{first} and {second} begin with {alone}");
            assert!(alike < first.len() - 20, "{first} and {second} differ after it");
            assert_ne!(first, write(&Writer::new(2, form), 1), "another seed");
        }
    }

    #[test]
    fn a_hash_is_not_a_request() {
        let writer = Writer::new(1, Form::Text(ONE_EACH));
        let contents = [Content::Shared, Content::Hashed(0), Content::Own(0), Content::Own(1)];
        let texts: Vec<Value> = contents.iter().map(|&content| writer.write(&[part(content, 30)])).collect();
        assert!(texts.iter().enumerate().all(|(at, text)| !texts[..at].contains(text)), "{texts:?}");
    }

    #[test]
    fn words_are_counted_by_what_was_measured() {
        let length = WordLength::between((10, 33), (110, 233)).expect("two tokens a word");
        assert_eq!(length, WordLength { tokens_per_word: 2.0, overhead: 13.0 });
        let text =
            Writer::new(1, Form::Text(length)).write(&[part(Content::Shared, 20), part(Content::Own(3), 53)]);
        assert_eq!(text.as_str().map(|text| text.split_whitespace().count()), Some(10 + 20));
        assert_eq!(sample(25).split_whitespace().count(), 25);
        for senseless in [((10, 33), (110, 33)), ((10, 33), (110, 3)), ((10, 33), (10, 43))] {
            assert_eq!(WordLength::between(senseless.0, senseless.1), None, "{senseless:?}");
        }
    }
}
