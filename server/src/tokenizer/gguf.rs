//! A tokenizer from a GGUF file's metadata, told as the `tokenizer.json` that the library reads.
//!
//! A file has the vocabulary and names how texts are cut before that; the rules behind the names are those of the
//! published tokenizers.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value, json};
use tidemill_engine::gguf::{GgufError, GgufFile};

/// The content of a `tokenizer.json`.
///
/// # Errors
///
/// When the file lacks a part of it, or asks for a kind that is not supported.
pub(crate) fn tokenizer_json(file: &GgufFile) -> Result<Value, GgufError> {
    let vocabulary = Vocabulary::read(file)?;
    match file.header().text(MODEL)? {
        Some("gpt2") => byte_level(&vocabulary),
        Some("llama") => pieces(&vocabulary),
        found => Err(unsupported(MODEL, found, "gpt2, llama")),
    }
}

/// The content of a `tokenizer_config.json`: special tokens and the chat template.
///
/// # Errors
///
/// When a token is not in the vocabulary, or a template is no text.
pub(crate) fn tokenizer_config(file: &GgufFile) -> Result<Map<String, Value>, GgufError> {
    let vocabulary = Vocabulary::read(file)?;
    let mut config = Map::new();
    for (name, field) in [
        ("bos", "bos_token"),
        ("eos", "eos_token"),
        ("unknown", "unk_token"),
        ("padding", "pad_token"),
        ("seperator", "sep_token"), // So the format spells it.
    ] {
        if let Some((_, token)) = vocabulary.special(name)? {
            config.insert(field.into(), token.into());
        }
    }
    let header = file.header();
    let mut templates = Vec::new();
    if header.value(TEMPLATE_NAMES).is_some() {
        for name in file.texts(TEMPLATE_NAMES)? {
            let key = format!("{TEMPLATE}.{name}");
            let text = header.text(&key)?.ok_or(GgufError::Missing { key })?;
            templates.push(json!({"name": name, "template": text}));
        }
    }
    match header.text(TEMPLATE)? {
        Some(default) if templates.is_empty() => {
            config.insert("chat_template".into(), default.into());
        }
        default => {
            templates.extend(default.map(|text| json!({"name": "default", "template": text})));
            if !templates.is_empty() {
                config.insert("chat_template".into(), templates.into());
            }
        }
    }
    Ok(config)
}

/// The tokens of a file.
struct Vocabulary<'a> {
    file: &'a GgufFile,
    tokens: Vec<&'a str>,
    kinds: Vec<Kind>,
}

/// What a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Made by merges, or a single byte.
    Made,
    /// Found in a text as it is, before anything else, and a part of it.
    Whole,
    /// The same, and no part of the text.
    Control,
}

impl<'a> Vocabulary<'a> {
    fn read(file: &'a GgufFile) -> Result<Self, GgufError> {
        let tokens = file.texts(TOKENS)?;
        let kinds = if file.header().value(TYPES).is_none() {
            vec![Kind::Made; tokens.len()]
        } else {
            let kind = |number: f64| match number {
                // Unknown, control.
                2.0 | 3.0 => Kind::Control,
                // Added by the makers.
                4.0 => Kind::Whole,
                _ => Kind::Made,
            };
            file.numbers(TYPES)?.into_iter().map(kind).collect()
        };
        if kinds.len() != tokens.len() {
            return Err(GgufError::wrong(TYPES, format!("as long as {TOKENS}, {}", tokens.len())));
        }
        Ok(Self { file, tokens, kinds })
    }

    /// A special token by what it is for, and its id.
    fn special(&self, name: &str) -> Result<Option<(usize, &'a str)>, GgufError> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = self.file.header().count(&key)? else { return Ok(None) };
        let known = usize::try_from(id).ok().and_then(|id| Some((id, *self.tokens.get(id)?)));
        known.map(Some).ok_or_else(|| {
            GgufError::wrong(&key, format!("below {}, the number of tokens", self.tokens.len()))
        })
    }

    fn ids(&self) -> Map<String, Value> {
        self.tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), id.into())).collect()
    }

    /// The tokens that are found before anything else.
    fn added(&self) -> Vec<Value> {
        let tokens =
            self.tokens.iter().zip(&self.kinds).enumerate().filter(|(_, (_, kind))| **kind != Kind::Made);
        tokens
            .map(|(id, (token, kind))| {
                json!({
                    "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": *kind == Kind::Control,
                })
            })
            .collect()
    }

    /// What puts the tokens of beginning and end around a text; absent flags mean `begins` and not.
    fn around(&self, begins: bool) -> Result<Value, GgufError> {
        let header = self.file.header();
        let mut known = Map::new();
        let mut token = |name: &str, flag: &str, default: bool| -> Result<Vec<Value>, GgufError> {
            if !header.flag(&format!("tokenizer.ggml.{flag}"))?.unwrap_or(default) {
                return Ok(Vec::new());
            }
            let Some((id, token)) = self.special(name)? else { return Ok(Vec::new()) };
            known.insert(token.into(), json!({"id": token, "ids": [id], "tokens": [token]}));
            Ok(vec![json!({"SpecialToken": {"id": token, "type_id": 0}})])
        };
        let (begin, end) = (token("bos", "add_bos_token", begins)?, token("eos", "add_eos_token", false)?);
        let text = |id: &str| vec![json!({"Sequence": {"id": id, "type_id": 0}})];
        let single = [begin.clone(), text("A"), end.clone()].concat();
        let pair = [single.clone(), begin, text("B"), end].concat();
        Ok(json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": known}))
    }
}

/// How a byte-level tokenizer cuts a text.
struct Cut {
    /// Names in files.
    names: &'static [&'static str],
    /// What a piece is; `None` leaves it to the library's own, which is GPT-2's.
    piece: Option<&'static str>,
    /// Whether each digit is a piece before that.
    digits: bool,
    /// Whether texts are brought to their composed form.
    composed: bool,
    /// Whether a piece that is a token is taken without merges.
    whole_tokens: bool,
    /// Whether a text begins with a token of its own unless the file says otherwise.
    begins: bool,
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

#[rustfmt::skip]
const CUTS: [Cut; 5] = [
    Cut { names: &["llama-bpe", "llama3", "llama-v3"], piece: Some(LLAMA3), digits: false, composed: false, whole_tokens: true, begins: true },
    Cut { names: &["qwen2", "deepseek-r1-qwen"], piece: Some(QWEN2), digits: false, composed: true, whole_tokens: false, begins: false },
    Cut { names: &["tekken"], piece: Some(TEKKEN), digits: false, composed: false, whole_tokens: true, begins: true },
    Cut { names: &["smollm"], piece: None, digits: true, composed: false, whole_tokens: false, begins: false },
    Cut { names: &["gpt-2"], piece: None, digits: false, composed: false, whole_tokens: false, begins: false },
];

fn byte_level(vocabulary: &Vocabulary<'_>) -> Result<Value, GgufError> {
    let found = vocabulary.file.header().text(PRE)?;
    let Some(cut) = CUTS.iter().find(|cut| found.is_some_and(|found| cut.names.contains(&found))) else {
        let names: Vec<&str> = CUTS.iter().flat_map(|cut| cut.names).copied().collect();
        return Err(unsupported(PRE, found, &names.join(", ")));
    };
    let mut cuts = Vec::new();
    if cut.digits {
        cuts.push(json!({"type": "Digits", "individual_digits": true}));
    }
    if let Some(piece) = cut.piece {
        cuts.push(
            json!({"type": "Split", "pattern": {"Regex": piece}, "behavior": "Isolated", "invert": false}),
        );
    }
    cuts.push(byte_step(cut.piece.is_none()));
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocabulary.added(),
        "normalizer": if cut.composed { json!({"type": "NFC"}) } else { Value::Null },
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
        "post_processor": vocabulary.around(cut.begins)?,
        "decoder": byte_step(true),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": cut.whole_tokens,
            "vocab": vocabulary.ids(),
            "merges": vocabulary.file.texts("tokenizer.ggml.merges")?,
        },
    }))
}

fn byte_step(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

/// A tokenizer of SentencePiece that merges pairs: the file has the pieces and how early each was made.
fn pieces(vocabulary: &Vocabulary<'_>) -> Result<Value, GgufError> {
    let file = vocabulary.file;
    let header = file.header();
    let scores = file.numbers(SCORES)?;
    if scores.len() != vocabulary.tokens.len() {
        return Err(GgufError::wrong(SCORES, format!("as long as {TOKENS}, {}", vocabulary.tokens.len())));
    }
    let prefix = header.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocabulary.added(),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "post_processor": vocabulary.around(true)?,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": vocabulary.special("unknown")?.map(|(_, token)| token),
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true,
            "ignore_merges": false,
            "vocab": vocabulary.ids(),
            "merges": merges(vocabulary, &scores),
        },
    }))
}

/// Every pair of pieces whose union is a piece, the one that was made first in front.
fn merges(vocabulary: &Vocabulary<'_>, scores: &[f64]) -> Vec<[String; 2]> {
    let made = |id: &usize| vocabulary.kinds[*id] == Kind::Made;
    let known: HashMap<&str, usize> = vocabulary
        .tokens
        .iter()
        .enumerate()
        .map(|(id, token)| (*token, id))
        .filter(|(_, id)| made(id))
        .collect();
    let mut all = Vec::new();
    let mut seen = HashSet::new();
    for (id, token) in vocabulary.tokens.iter().enumerate().filter(|(id, _)| made(id)) {
        if !seen.insert(token) {
            continue;
        }
        for (cut, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(cut);
            if let (Some(first), Some(second)) = (known.get(left), known.get(right)) {
                all.push((scores[id], id, *first, *second));
            }
        }
    }
    all.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| (a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
    let name = |id: usize| vocabulary.tokens[id].to_owned();
    all.into_iter().map(|(_, _, first, second)| [name(first), name(second)]).collect()
}

fn unsupported(key: &str, found: Option<&str>, supported: &str) -> GgufError {
    GgufError::Unsupported {
        key: key.into(),
        found: found.unwrap_or("not there").into(),
        supported: supported.into(),
    }
}

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const TEMPLATE: &str = "tokenizer.chat_template";
const TEMPLATE_NAMES: &str = "tokenizer.chat_templates";
/// What SentencePiece writes for a space.
const SPACE: &str = "▁";

#[cfg(test)]
mod tests;
