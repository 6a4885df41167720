//! The value of `--speculative-config`: JSON with vLLM's names.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tidemill_engine::handle::{GuessMethod, MOST_DRAFTED, SpeculationSettings};

/// How tokens are guessed. Displayed as it would be typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SpeculativeConfig {
    /// What the engine is told.
    pub(crate) settings: SpeculationSettings,
    /// The model that guesses, where one does.
    pub(crate) draft_model: Option<DraftName>,
}

/// A draft model as named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DraftName {
    /// A folder, or an id of the hub.
    pub(crate) model: String,
    /// Branch, tag or commit of one of the hub.
    pub(crate) revision: Option<String>,
}

/// As typed.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Typed {
    #[serde(skip_serializing_if = "Option::is_none")]
    method: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    revision: Option<String>,
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
        // As in vLLM, a model alone says how.
        let method = typed.method.as_deref().or_else(|| typed.model.as_ref().map(|_| DRAFT_MODEL));
        match method {
            Some(NGRAM) => typed.ngram(),
            Some(DRAFT_MODEL) => typed.draft_model(),
            Some(method) => {
                Err(format!("method: `{method}` is not supported: {NGRAM} and {DRAFT_MODEL} are"))
            }
            None => Err(format!("missing field `method`; try {EXAMPLE}")),
        }
    }
}

impl Typed {
    fn ngram(&self) -> Result<SpeculativeConfig, String> {
        refuse(NGRAM, &[("model", self.model.is_some()), ("revision", self.revision.is_some())])?;
        // As in vLLM, one of the two stands for both.
        let (shortest, longest) = match (self.prompt_lookup_min, self.prompt_lookup_max) {
            (None, None) => DEFAULT_MATCH,
            (shortest, longest) => (shortest.or(longest).unwrap_or(1), longest.or(shortest).unwrap_or(1)),
        };
        let longest_match = in_bounds("prompt_lookup_max", longest, LONGEST_MATCH)?;
        let shortest_match = in_bounds("prompt_lookup_min", shortest, longest)?;
        let method = GuessMethod::PromptLookup { shortest_match, longest_match };
        Ok(SpeculativeConfig { settings: self.settings(method, DEFAULT_TOKENS)?, draft_model: None })
    }

    fn draft_model(self) -> Result<SpeculativeConfig, String> {
        let lookups = [
            ("prompt_lookup_max", self.prompt_lookup_max.is_some()),
            ("prompt_lookup_min", self.prompt_lookup_min.is_some()),
        ];
        refuse(DRAFT_MODEL, &lookups)?;
        let settings = self.settings(GuessMethod::DraftModel, DEFAULT_TOKENS_OF_A_MODEL)?;
        let model = self.model.filter(|model| !model.is_empty());
        let model = model.ok_or("model: a draft_model needs one, a folder or an id of the hub")?;
        Ok(SpeculativeConfig { settings, draft_model: Some(DraftName { model, revision: self.revision }) })
    }

    fn settings(&self, method: GuessMethod, default_tokens: u32) -> Result<SpeculationSettings, String> {
        let most = self.num_speculative_tokens.unwrap_or(default_tokens);
        Ok(SpeculationSettings {
            method,
            most: in_bounds("num_speculative_tokens", most, MOST_DRAFTED)?,
            adaptive: self.adaptive.unwrap_or(true),
        })
    }
}

impl fmt::Display for SpeculativeConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SpeculationSettings { method, most, adaptive } = self.settings;
        let common =
            Typed { num_speculative_tokens: Some(most), adaptive: Some(adaptive), ..Typed::default() };
        let typed = match (method, self.draft_model.clone()) {
            (GuessMethod::PromptLookup { shortest_match, longest_match }, _) => Typed {
                method: Some(NGRAM.to_owned()),
                prompt_lookup_max: Some(longest_match),
                prompt_lookup_min: Some(shortest_match),
                ..common
            },
            (GuessMethod::DraftModel, draft) => {
                let (model, revision) = draft.map(|it| (it.model, it.revision)).unzip();
                let revision = revision.flatten();
                Typed { method: Some(DRAFT_MODEL.to_owned()), model, revision, ..common }
            }
        };
        f.write_str(&serde_json::to_string(&typed).map_err(|_| fmt::Error)?)
    }
}

/// Refuses fields that mean nothing to a method, when they are there.
fn refuse(method: &str, fields: &[(&str, bool)]) -> Result<(), String> {
    match fields.iter().find(|(_, is_there)| *is_there) {
        Some((field, _)) => Err(format!("{field}: means nothing to method {method}")),
        None => Ok(()),
    }
}

fn in_bounds(field: &str, number: u32, most: u32) -> Result<u32, String> {
    let fits = (1..=most).contains(&number);
    if fits { Ok(number) } else { Err(format!("{field}: from 1 to {most}, not {number}")) }
}

/// The method that copies what followed the last tokens where they occurred before.
const NGRAM: &str = "ngram";

/// The method that asks a smaller model.
const DRAFT_MODEL: &str = "draft_model";

/// Guesses of a draft model where nobody says how many: it computes one after another.
const DEFAULT_TOKENS_OF_A_MODEL: u32 = 5;

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
            let method = GuessMethod::PromptLookup { shortest_match, longest_match };
            let settings = SpeculationSettings { method, most, adaptive };
            Ok(SpeculativeConfig { settings, draft_model: None })
        };
        let drafts = |most, model: &str, revision: Option<&str>| {
            let settings = SpeculationSettings { method: GuessMethod::DraftModel, most, adaptive: true };
            let draft_model = DraftName { model: model.into(), revision: revision.map(str::to_owned) };
            Ok(SpeculativeConfig { settings, draft_model: Some(draft_model) })
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
            (r#"{"method": "eagle"}"#,                                          Err("method: `eagle` is not supported: ngram and draft_model are")),
            (r#"{"method": "draft_model", "model": "a/b"}"#,                    drafts(5, "a/b", None)),
            (r#"{"model": "./x", "num_speculative_tokens": 3, "revision": "r"}"#, drafts(3, "./x", Some("r"))),
            (r#"{"method": "draft_model"}"#,                                    Err("model: a draft_model needs one")),
            (r#"{"method": "draft_model", "model": ""}"#,                       Err("model: a draft_model needs one")),
            (r#"{"method": "draft_model", "model": "a/b", "prompt_lookup_max": 3}"#, Err("prompt_lookup_max: means nothing")),
            (r#"{"method": "ngram", "model": "a/b"}"#,                          Err("model: means nothing to method ngram")),
            (r#"{"num_speculative_tokens": 8}"#,                                Err("missing field `method`")),
            (r#"{"method": "ngram", "tokens": 8}"#,                             Err("unknown field `tokens`")),
            (r#"{"method": "ngram""#,                                           Err("EOF")),
            (r#"{"method": "ngram"} x"#,                                        Err("trailing characters")),
            ("ngram",                                                           Err("expected")),
        ];
        for (text, expected) in rows {
            match (text.parse::<SpeculativeConfig>(), expected) {
                (Ok(found), Ok(expected)) => {
                    assert_eq!(found, expected, "{text}");
                    assert_eq!(found.to_string().parse(), Ok(found), "{text}: typed again");
                }
                (Err(found), Err(expected)) => assert!(found.contains(expected), "{text}: {found}"),
                (found, expected) => panic!("{text}: {found:?}, not {expected:?}"),
            }
        }
    }
}
