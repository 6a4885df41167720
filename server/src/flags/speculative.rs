//! The value of `--speculative-config`: JSON with vLLM's names.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tidemill_engine::handle::{MOST_DRAFTED, SpeculationSettings};

/// How tokens are guessed. Displayed as it would be typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SpeculativeConfig(pub(crate) SpeculationSettings);

/// As typed.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Typed {
    method: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    num_speculative_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_lookup_max: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_lookup_min: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    adaptive: Option<bool>,
}

impl FromStr for SpeculativeConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut json = serde_json::Deserializer::from_str(text);
        let typed: Typed = serde_path_to_error::deserialize(&mut json).map_err(|error| {
            let field = error.path().to_string();
            let place = if field == "." { String::new() } else { format!("{field}: ") };
            format!("{place}{}; try {EXAMPLE}", error.inner())
        })?;
        json.end().map_err(|error| format!("{error}; try {EXAMPLE}"))?;
        if typed.method != NGRAM {
            return Err(format!("method: `{}` is not supported: {NGRAM} is", typed.method));
        }
        let in_bounds = |field, number, most| {
            let fits = (1..=most).contains(&number);
            if fits { Ok(number) } else { Err(format!("{field}: from 1 to {most}, not {number}")) }
        };
        let most = typed.num_speculative_tokens.unwrap_or(DEFAULT_TOKENS);
        // As in vLLM, one of the two stands for both.
        let (shortest, longest) = match (typed.prompt_lookup_min, typed.prompt_lookup_max) {
            (None, None) => DEFAULT_MATCH,
            (shortest, longest) => (shortest.or(longest).unwrap_or(1), longest.or(shortest).unwrap_or(1)),
        };
        let settings = SpeculationSettings {
            most: in_bounds("num_speculative_tokens", most, MOST_DRAFTED)?,
            longest_match: in_bounds("prompt_lookup_max", longest, LONGEST_MATCH)?,
            shortest_match: in_bounds("prompt_lookup_min", shortest, longest)?,
            adaptive: typed.adaptive.unwrap_or(true),
        };
        Ok(Self(settings))
    }
}

impl fmt::Display for SpeculativeConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SpeculationSettings { most, shortest_match, longest_match, adaptive } = self.0;
        let typed = Typed {
            method: NGRAM.to_owned(),
            num_speculative_tokens: Some(most),
            prompt_lookup_max: Some(longest_match),
            prompt_lookup_min: Some(shortest_match),
            adaptive: Some(adaptive),
        };
        f.write_str(&serde_json::to_string(&typed).map_err(|_| fmt::Error)?)
    }
}

/// The method that copies what followed the last tokens where they occurred before.
const NGRAM: &str = "ngram";

/// Guesses where nobody says how many: fewer are made where fewer pay.
const DEFAULT_TOKENS: u32 = 8;

/// Shortest and longest match where nobody says: short ones are guessed from only while they are often right.
const DEFAULT_MATCH: (u32, u32) = (2, 5);

/// A longer match says no more about the next token.
const LONGEST_MATCH: u32 = 32;

const EXAMPLE: &str = r#"'{"method": "ngram", "num_speculative_tokens": 8}'"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configs() {
        let settings = |most, shortest_match, longest_match, adaptive| {
            Ok(SpeculationSettings { most, shortest_match, longest_match, adaptive })
        };
        #[rustfmt::skip]
        let rows = [
            (r#"{"method": "ngram"}"#,                                          settings(8, 2, 5, true)),
            (r#"{"method": "ngram", "num_speculative_tokens": 3}"#,             settings(3, 2, 5, true)),
            (r#"{"method": "ngram", "prompt_lookup_max": 4}"#,                  settings(8, 4, 4, true)),
            (r#"{"method": "ngram", "prompt_lookup_min": 3}"#,                  settings(8, 3, 3, true)),
            (r#"{"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 1}"#, settings(8, 1, 4, true)),
            (r#"{"method": "ngram", "adaptive": false}"#,                       settings(8, 2, 5, false)),
            (r#"{"method": "ngram", "num_speculative_tokens": 0}"#,             Err("num_speculative_tokens: from 1 to 32, not 0")),
            (r#"{"method": "ngram", "num_speculative_tokens": 33}"#,            Err("num_speculative_tokens: from 1 to 32, not 33")),
            (r#"{"method": "ngram", "num_speculative_tokens": "8"}"#,           Err("num_speculative_tokens: invalid type: string")),
            (r#"{"method": "ngram", "prompt_lookup_max": 99}"#,                 Err("prompt_lookup_max: from 1 to 32, not 99")),
            (r#"{"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 3}"#, Err("prompt_lookup_min: from 1 to 2, not 3")),
            (r#"{"method": "eagle"}"#,                                          Err("method: `eagle` is not supported: ngram is")),
            (r#"{"num_speculative_tokens": 8}"#,                                Err("missing field `method`")),
            (r#"{"method": "ngram", "tokens": 8}"#,                             Err("unknown field `tokens`")),
            (r#"{"method": "ngram""#,                                           Err("EOF")),
            (r#"{"method": "ngram"} x"#,                                        Err("trailing characters")),
            ("ngram",                                                           Err("expected")),
        ];
        for (text, expected) in rows {
            match (text.parse::<SpeculativeConfig>(), expected) {
                (Ok(found), Ok(expected)) => {
                    assert_eq!(found.0, expected, "{text}");
                    assert_eq!(found.to_string().parse(), Ok(found), "{text}: typed again");
                }
                (Err(found), Err(expected)) => assert!(found.contains(expected), "{text}: {found}"),
                (found, expected) => panic!("{text}: {found:?}, not {expected:?}"),
            }
        }
    }
}
