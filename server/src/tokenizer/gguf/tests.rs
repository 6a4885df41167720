//! Tokenizers of GGUF files against the library's own file of the same tokenizer, and against SentencePiece.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tidemill_engine_core::request::TokenId;

use super::*;
use crate::tokenizer::Tokenizer;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
}

fn file(name: &str) -> GgufFile {
    GgufFile::open(&fixtures().join("quantized").join(name).join("model.gguf")).expect("the fixture is whole")
}

fn tokenizer(name: &str) -> Tokenizer {
    let json = tokenizer_json(&file(name)).expect("its kind is supported").to_string();
    Tokenizer::from_json(json.as_bytes()).expect("the library reads it")
}

/// Rows of goldens: a name, a text, the other fields.
fn goldens(name: &str) -> Vec<(String, String, Value)> {
    let bytes = std::fs::read(fixtures().join(name)).expect("goldens are committed");
    let goldens: Value = serde_json::from_slice(&bytes).expect("goldens are JSON");
    let text = |row: &Value, field: &str| row[field].as_str().expect("a text").to_owned();
    let rows = goldens["encode"].as_array().expect("a list");
    rows.iter().map(|row| (text(row, "name"), text(row, "text"), row.clone())).collect()
}

fn ids(row: &Value, field: &str) -> Vec<TokenId> {
    serde_json::from_value(row[field].clone()).expect("a list of ids")
}

#[test]
fn a_byte_level_tokenizer_is_the_one_of_its_json() {
    let rows = goldens("tokenizer_goldens.json");
    // In texts of ASCII letters the two ways to cut differ by digits alone.
    for (model, digits_in_threes) in [("gguf-q4_0", true), ("gguf-q8_0", false)] {
        let tokenizer = tokenizer(model);
        let mut compared = 0;
        for (name, text, row) in &rows {
            let found = tokenizer.encode(text, false).expect("texts can be encoded");
            let composed = name != "combining marks";
            if digits_in_threes || (composed && !text.contains(|it: char| it.is_ascii_digit())) {
                assert_eq!(found, ids(row, "ids"), "{model}: {name}");
                let found = tokenizer.encode(text, true).expect("texts can be encoded");
                assert_eq!(found, ids(row, "ids_with_special"), "{model}: {name}");
                compared += 1;
            }
            let decoded = tokenizer.decode(&ids(row, "ids"), true).expect("ids can be decoded");
            assert_eq!(decoded, row["decoded_skip_special"], "{model}: {name}");
        }
        assert!(10 < compared, "{model}: {compared} texts");
    }
    let composed = tokenizer("gguf-q8_0");
    assert_eq!(composed.encode("e\u{301}", false).ok(), composed.encode("é", false).ok());
}

#[test]
fn a_tokenizer_of_pieces_is_that_of_sentencepiece() {
    let tokenizer = tokenizer("gguf-plain");
    let rows = goldens("pieces_goldens.json");
    assert!(10 < rows.len());
    for (name, text, row) in rows {
        let expected = ids(&row, "ids");
        assert_eq!(tokenizer.encode(&text, false).expect("texts can be encoded"), expected, "{name}");
        let with_special = tokenizer.encode(&text, true).expect("texts can be encoded");
        assert_eq!(with_special, [&[1], &expected[..]].concat(), "{name}");
        assert_eq!(tokenizer.decode(&expected, true).expect("ids can be decoded"), row["decoded"], "{name}");
    }
}

#[test]
fn special_tokens_and_templates_are_read() {
    let config = tokenizer_config(&file("gguf-q4_0")).expect("it is whole");
    let folder = fixtures().join("models/llama3/tokenizer_config.json");
    let expected: Value =
        serde_json::from_slice(&std::fs::read(folder).expect("it is committed")).expect("JSON");
    for field in ["bos_token", "eos_token", "pad_token", "chat_template"] {
        assert_eq!(config[field], expected[field], "{field}");
    }
    let config = tokenizer_config(&file("gguf-plain")).expect("it is whole");
    assert_eq!(
        (&config["bos_token"], &config["eos_token"], &config["unk_token"]),
        (&json!("<s>"), &json!("</s>"), &json!("<unk>"))
    );
    assert!(!config.contains_key("chat_template"));
}

#[test]
fn kinds_that_are_not_supported_are_named() {
    #[rustfmt::skip]
    let rows = [
        ("another way to cut",      "llama-bpe",            "llama-bpx",            "`tokenizer.ggml.pre` is llama-bpx, which is not supported; supported: llama-bpe, llama3"),
        ("no way to cut",           "tokenizer.ggml.pre",   "tokenizer.ggml.prx",   "`tokenizer.ggml.pre` is not there"),
        ("another model",           "gpt2",                 "gpt3",                 "`tokenizer.ggml.model` is gpt3, which is not supported; supported: gpt2, llama"),
        ("no merges",               "tokenizer.ggml.merges", "tokenizer.ggml.merget", "there is no value `tokenizer.ggml.merges`"),
    ];
    for (name, from, to, expected) in rows {
        let mut bytes = std::fs::read(fixtures().join("quantized/gguf-q4_0/model.gguf"))
            .expect("the fixture is committed");
        let place =
            bytes.windows(from.len()).position(|window| window == from.as_bytes()).expect("it is there");
        bytes[place..place + to.len()].copy_from_slice(to.as_bytes());
        let copy = tempfile::NamedTempFile::new().expect("a temporary file");
        std::fs::write(copy.path(), bytes).expect("it can be written");
        let file = GgufFile::open(copy.path()).expect("its header is whole");
        let error = tokenizer_json(&file).expect_err(name).to_string();
        assert!(error.contains(expected), "{name}: {error}");
    }
}
