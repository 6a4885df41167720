//! The small tokenizer of the fixtures, one made here with SentencePiece's habits, and random tokens.

use std::path::Path;
use std::sync::{Arc, LazyLock};

use proptest::prelude::*;
use serde_json::{Value as Json, json};

use super::*;

/// The byte-level tokenizer that all fixture models share.
pub(crate) fn byte_level() -> Arc<Tokenizer> {
    static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/tokenizer/tokenizer.json");
        Arc::new(Tokenizer::from_json(&std::fs::read(path).unwrap()).unwrap())
    });
    Arc::clone(&TOKENIZER)
}

/// A tokenizer like Llama 2's: `▁` for a space, a token for each byte, a leading space that vanishes.
fn pieces() -> Arc<Tokenizer> {
    static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(make_pieces);
    Arc::clone(&TOKENIZER)
}

fn make_pieces() -> Arc<Tokenizer> {
    let mut vocab = serde_json::Map::new();
    for name in ["<unk>", "<s>", "</s>"] {
        vocab.insert(name.to_owned(), json!(vocab.len()));
    }
    for byte in 0..=255 {
        vocab.insert(format!("<0x{byte:02X}>"), json!(vocab.len()));
    }
    for name in ["▁", "a", "b", "e", "l", "o", "H", "▁a", "lo", "▁H", "é", "▁b"] {
        vocab.insert(name.to_owned(), json!(vocab.len()));
    }
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let file = json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
            "merges": [["▁", "a"], ["l", "o"], ["▁", "H"], ["▁", "b"]]},
    });
    Arc::new(Tokenizer::from_json(file.to_string().as_bytes()).unwrap())
}

/// The pieces in which the text of `ids` arrives, the last one from the end of the text.
fn told(tokenizer: &Arc<Tokenizer>, ids: &[TokenId], skip_special_tokens: bool) -> Vec<String> {
    let mut decoder = TextDecoder::new(Arc::clone(tokenizer), skip_special_tokens);
    let mut told: Vec<String> = ids.iter().map(|&id| decoder.push(id)).collect();
    told.push(decoder.finish());
    told
}

#[test]
fn encoding_and_decoding_are_those_of_the_library_in_python() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/tokenizer_goldens.json");
    let goldens: Json = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let tokenizer = byte_level();
    let ids =
        |row: &Json, field: &str| -> Vec<TokenId> { serde_json::from_value(row[field].clone()).unwrap() };
    let rows = goldens["encode"].as_array().unwrap();
    assert!(!rows.is_empty());
    for row in rows {
        let (name, text) = (row["name"].as_str().unwrap(), row["text"].as_str().unwrap());
        assert_eq!(tokenizer.encode(text, false).unwrap(), ids(row, "ids"), "{name}");
        assert_eq!(tokenizer.encode(text, true).unwrap(), ids(row, "ids_with_special"), "{name}");
        for (skip, expected) in [(false, &row["decoded"]), (true, &row["decoded_skip_special"])] {
            assert_eq!(told(&tokenizer, &ids(row, "ids"), skip).concat(), *expected, "{name}, skip {skip}");
        }
    }
}

#[test]
fn every_prefix_of_the_tokens_has_the_text_of_the_library_in_python() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/tokenizer_goldens.json");
    let goldens: Json = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let tokenizer = byte_level();
    let rows = goldens["decode"].as_array().unwrap();
    assert!(!rows.is_empty());
    for row in rows {
        let ids: Vec<TokenId> = serde_json::from_value(row["ids"].clone()).unwrap();
        let prefixes = row["prefixes"].as_array().unwrap();
        assert_eq!(prefixes.len(), ids.len() + 1);
        for (length, expected) in prefixes.iter().enumerate() {
            assert_eq!(
                told(&tokenizer, &ids[..length], false).concat(),
                *expected,
                "{} {length}",
                row["name"]
            );
        }
    }
}

#[test]
fn a_character_leaves_when_its_last_byte_arrives() {
    for tokenizer in [byte_level(), pieces()] {
        let ids = tokenizer.encode("é…🙂", false).unwrap();
        let told = told(&tokenizer, &ids, true);
        assert!(4 < ids.len(), "the characters have no tokens of their own: {ids:?}");
        assert_eq!(told.concat(), "é…🙂");
        assert!(told.iter().all(|piece| !piece.contains(char::REPLACEMENT_CHARACTER)), "{told:?}");
        assert_eq!(told.last().unwrap(), "", "nothing is left for the end");
    }
}

#[test]
fn spaces_stay_where_they_were() {
    let tokenizer = pieces();
    let ids = tokenizer.encode("Hello a b", false).unwrap();
    assert!(2 < ids.len(), "the file's truncation is off");
    assert_eq!(told(&tokenizer, &ids, true).concat(), "Hello a b");
    assert_eq!(told(&tokenizer, &ids[1..], true).concat(), tokenizer.decode(&ids[1..], true).unwrap());
}

#[test]
fn bytes_that_never_become_a_character_do_not_hold_the_text_for_ever() {
    let tokenizer = pieces();
    let byte = |byte: u32| byte + 3;
    let ids = [byte(0xff), byte(0xff), byte(0xff), byte(0xff), tokenizer.id_of("a").unwrap()];
    assert_eq!(told(&tokenizer, &ids, true).concat(), "\u{fffd}\u{fffd}\u{fffd}\u{fffd}a");
    let late = [byte(0xc3), byte(0xa9), byte(0xff), tokenizer.id_of("a").unwrap()];
    assert_eq!(told(&tokenizer, &late, true), ["", "é", "", "\u{fffd}a", ""]);
    assert_eq!(told(&tokenizer, &[byte(0xc3)], true), ["", "\u{fffd}"]);
}

#[test]
fn a_token_of_half_a_character_shows_its_bytes() {
    let tokenizer = byte_level();
    let ids = tokenizer.encode("a\u{65e5}", false).unwrap();
    let texts: Vec<TokenText> = ids.iter().map(|&id| tokenizer.token_text(id)).collect();
    assert_eq!(texts[0], TokenText { text: "a".into(), bytes: vec![b'a'] });
    assert_eq!(texts[1], TokenText { text: r"bytes:\xe6\x97".into(), bytes: vec![0xe6, 0x97] });
    let all: Vec<u8> = texts.into_iter().flat_map(|text| text.bytes).collect();
    assert_eq!(all, "a\u{65e5}".as_bytes());
    let pieces = pieces();
    assert_eq!(pieces.token_text(pieces.id_of("▁H").unwrap()).text, " H");
    assert_eq!(pieces.token_text(pieces.id_of("<0x0A>").unwrap()).bytes, b"\n");
}

#[test]
fn the_byte_alphabet_is_one_to_one() {
    let mut bytes: Vec<u8> = (0..0x150).filter_map(char::from_u32).filter_map(byte_of).collect();
    bytes.sort_unstable();
    assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
}

proptest! {
    #[test]
    fn any_tokens_give_the_text_of_decoding_at_once(
        ids in prop::collection::vec(0u32..290, 0..40), skip in any::<bool>()
    ) {
        let tokenizer = byte_level();
        prop_assert_eq!(told(&tokenizer, &ids, skip).concat(), tokenizer.decode(&ids, skip).unwrap());
    }

    #[test]
    fn any_text_comes_back_from_pieces(text in "[ab eloHé🙂日 ]{0,20}") {
        let tokenizer = pieces();
        let ids = tokenizer.encode(&text, false).unwrap();
        prop_assert_eq!(told(&tokenizer, &ids, true).concat(), tokenizer.decode(&ids, true).unwrap());
    }
}
