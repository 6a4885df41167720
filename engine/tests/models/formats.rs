//! Checkpoints of few bits: what their weights stand for, against what their makers' code says, and the logits of whole
//! models, against transformers on those weights.
//!
//! Two bounds: steps that are kept differ by the rounding of scales alone, what is rounded again by half a step of int8.
//! Logits differ by that and by int8 activations.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;
use safetensors::SafeTensors;
use serde::Deserialize;
use tempfile::TempDir;
use tidemill_engine::handle::{LoadFormat, ModelSource, Quantization};
use tidemill_engine::models::{LoadOptions, Model, ModelError};
use tidemill_engine::runner::LogitsWanted;
use tidemill_engine::weights::LayerWeights;
use tidemill_kernels::matrix::{PackedMatrix, WeightDtype, WeightFormat};

use super::bench::{Bench, Storage, Work};

pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/quantized").join(name)
}

pub(crate) fn source(folder: &Path) -> ModelSource {
    let file = folder.join("model.gguf");
    if file.is_file() { ModelSource::Gguf(file) } else { ModelSource::Folder(folder.into()) }
}

fn load(folder: &Path, quantization: Option<Quantization>) -> Result<Model, ModelError> {
    let options = LoadOptions { threads: 2, format: LoadFormat::Safetensors, quantization };
    Model::load_with(options, &source(folder), &mut |_| {})
}

fn loaded(name: &str) -> Arc<Model> {
    Arc::new(load(&fixture(name), None).unwrap_or_else(|error| panic!("{name}: {}", told(&error))))
}

/// An error and its causes.
fn told(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

const INT8: WeightFormat = WeightFormat::Quantized(Quantization::Int8);
const INT4: WeightFormat = WeightFormat::Quantized(Quantization::Int4 { group: 32 });
const F16: WeightFormat = WeightFormat::Stored(WeightDtype::F16);

/// How a matrix differs from what it stands for.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Error {
    /// Not at all.
    None,
    /// By the rounding of scales to bf16, or of sums to f32.
    Scales,
    /// By half a step of int8.
    HalfStep,
}

/// Each projection of a layer, by its name in the goldens.
fn projections(layer: &LayerWeights) -> [(&'static str, &PackedMatrix); 7] {
    [
        ("self_attn.q_proj", &layer.query.matrix),
        ("self_attn.k_proj", &layer.key.matrix),
        ("self_attn.v_proj", &layer.value.matrix),
        ("self_attn.o_proj", &layer.output.matrix),
        ("mlp.gate_proj", &layer.gate.matrix),
        ("mlp.up_proj", &layer.up.matrix),
        ("mlp.down_proj", &layer.down.matrix),
    ]
}

/// Some rows of what a tensor stands for: the first two, one behind the middle, and the last.
fn expected_rows(goldens: &SafeTensors<'_>, name: &str) -> Vec<Vec<f32>> {
    let rows = goldens.tensor(&format!("rows.{name}")).unwrap_or_else(|error| panic!("{name}: {error}"));
    let numbers: Vec<f32> =
        rows.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    numbers.chunks(numbers.len() / 4).map(<[f32]>::to_vec).collect()
}

fn check_rows(name: &str, matrix: &PackedMatrix, expected: &[Vec<f32>], error: Error) {
    let last = matrix.outputs() - 1;
    for (row, expected) in [0, 1, matrix.outputs() / 2 + 1, last].into_iter().zip(expected) {
        let mut found = vec![0.0; matrix.inputs()];
        matrix.row(row, &mut found);
        let greatest = expected.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        let bound = |value: f32| match error {
            Error::None => 0.0,
            // bf16 has eight bits: half of the last one at most, and a little for rounding in f32.
            Error::Scales => value.abs() / 256.0 * 1.001,
            Error::HalfStep => greatest / 254.0 * 1.001,
        };
        for (input, (found, expected)) in found.iter().zip(expected).enumerate() {
            let far = (found - expected).abs();
            assert!(
                far <= bound(*expected),
                "{name}: row {row}, input {input}: {found} instead of {expected}"
            );
        }
        assert!(0.0 < greatest, "{name}: row {row} says something");
    }
}

#[test]
fn weights_are_what_their_formats_stand_for() {
    use Error::{HalfStep, None, Scales};
    // The first layer's projections in their order; other layers and the head are looked at below.
    #[rustfmt::skip]
    let rows: [(&str, [(WeightFormat, Error); 7]); 11] = [
        ("gguf-q4_0",               [(INT4, Scales); 7]),
        ("gguf-q8_0",               [(INT8, HalfStep); 7]),
        ("gguf-k",                  [(INT8, HalfStep); 7]),
        ("gguf-plain",              [(WeightFormat::Stored(WeightDtype::F32), None), (WeightFormat::Stored(WeightDtype::Bf16), None),
                                     (WeightFormat::Stored(WeightDtype::F32), None), (F16, None), (F16, None), (F16, None), (F16, None)]),
        ("compressed-int8",         [(INT8, None); 7]),
        ("compressed-int4",         [(INT4, Scales); 7]),
        ("compressed-int4-zeros",   [(INT8, HalfStep); 7]),
        ("gptq-int4",               [(INT4, Scales); 7]),
        ("gptq-int4-order",         [(INT8, HalfStep); 7]),
        ("gptq-int8",               [(INT8, None); 7]),
        ("awq",                     [(INT8, HalfStep); 7]),
    ];
    for (name, layer) in rows {
        let model = loaded(name);
        let goldens =
            std::fs::read(fixture(name).join("goldens.safetensors")).expect("goldens are committed");
        let goldens = SafeTensors::deserialize(&goldens).expect("goldens are whole");
        for ((part, matrix), (format, error)) in projections(&model.weights.layers[0]).into_iter().zip(layer)
        {
            assert_eq!(matrix.format(), format, "{name}: {part}");
            let expected = expected_rows(&goldens, &format!("model.layers.0.{part}.weight"));
            check_rows(&format!("{name}: {part}"), matrix, &expected, error);
        }
        let table = expected_rows(&goldens, "model.embed_tokens.weight");
        match &model.weights.embedding {
            Option::None => check_rows(name, &model.weights.head, &table, None),
            Some(embedding) => {
                for (row, expected) in [0, 1].into_iter().zip(&table) {
                    let mut found = vec![0.0; expected.len()];
                    embedding.row(row, &mut found);
                    let far = found.iter().zip(expected).all(|(a, b)| (a - b).abs() <= b.abs() / 256.0);
                    assert!(far, "{name}: the embedding is rounded to bf16 at most");
                }
            }
        }
    }
}

#[test]
fn a_file_may_have_a_type_for_each_tensor() {
    let model = loaded("gguf-q4_0");
    let goldens =
        std::fs::read(fixture("gguf-q4_0").join("goldens.safetensors")).expect("goldens are committed");
    let goldens = SafeTensors::deserialize(&goldens).expect("goldens are whole");
    let formats = [INT8, INT8, INT8, INT8, INT4, INT4, INT4];
    for ((part, matrix), format) in projections(&model.weights.layers[1]).into_iter().zip(formats) {
        assert_eq!(matrix.format(), format, "{part}");
        let error = if format == INT8 { Error::HalfStep } else { Error::Scales };
        let expected = expected_rows(&goldens, &format!("model.layers.1.{part}.weight"));
        check_rows(part, matrix, &expected, error);
    }
    check_rows("head", &model.weights.head, &expected_rows(&goldens, "lm_head.weight"), Error::HalfStep);
}

#[derive(Deserialize)]
struct Golden {
    prompt: Vec<u32>,
    greedy: Vec<u32>,
}

fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.expect("there is a vocabulary").0 as u32
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn logits_and_greedy_tokens_are_those_of_transformers() {
    #[rustfmt::skip]
    let rows = [
        ("gguf-q4_0",               0.999),
        ("gguf-q8_0",               0.999),
        ("gguf-k",                  0.999),
        ("gguf-plain",              0.999_99),
        ("compressed-int8",         0.999),
        ("compressed-int4",         0.999),
        ("compressed-int4-zeros",   0.999),
        ("gptq-int4",               0.999),
        ("gptq-int4-order",         0.999),
        ("gptq-int8",               0.999),
        ("awq",                     0.999),
    ];
    for (name, bound) in rows {
        let model = loaded(name);
        let read = |file| std::fs::read(fixture(name).join(file)).expect("goldens are committed");
        let golden: Golden = serde_json::from_slice(&read("goldens.json")).expect("goldens are JSON");
        let goldens = read("goldens.safetensors");
        let goldens = SafeTensors::deserialize(&goldens).expect("goldens are whole");
        let expected = goldens.tensor("logits").expect("logits are there");
        let expected: Vec<f32> =
            expected.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();

        let mut bench = Bench::exact(&model, Storage::PLAIN);
        let mut place = bench.place(golden.prompt.len() + golden.greedy.len());
        let work = Work { place: &mut place, tokens: &golden.prompt };
        let rows = bench.step(&mut [work], LogitsWanted::All).remove(0);
        let cosine = cosine(&rows.concat(), &expected);
        assert!((bound..=1.000_001).contains(&cosine), "{name}: a cosine of {cosine}");
        let mut last = rows.last().expect("a row per token").clone();
        for (position, expected) in golden.greedy.iter().enumerate() {
            assert_eq!(argmax(&last), *expected, "{name}: token {position}");
            last = bench.extend(&mut place, &[*expected]);
        }
    }
}

#[test]
fn a_quantization_that_is_asked_for_is_what_is_held() {
    let asked = Quantization::Int4 { group: 32 };
    for name in ["gguf-q4_0", "gguf-k", "gptq-int8", "awq"] {
        let model = load(&fixture(name), Some(asked)).expect(name);
        for (part, matrix) in projections(&model.weights.layers[0]) {
            assert_eq!(matrix.format(), INT4, "{name}: {part}");
        }
        assert_eq!(model.weights.head.format(), INT8, "{name}: the head keeps eight bits");
        assert_ne!(model.fingerprint, loaded(name).fingerprint, "{name}");
    }
}

#[test]
fn a_gguf_file_says_what_a_config_would() {
    let model = loaded("gguf-q4_0");
    let spec = &model.spec;
    assert_eq!((spec.architecture, spec.layers, spec.heads, spec.kv_heads), ("LlamaForCausalLM", 2, 4, 2));
    assert_eq!((spec.vocab_size, spec.hidden_size, spec.intermediate_size), (288, 64, 96));
    assert!(!spec.tied_embeddings && !spec.qkv_bias);
    assert_eq!(model.eos_token_ids(), [3]);
    let config =
        ModelSource::Folder(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models/llama3"));
    let config = tidemill_engine::models::ModelSpec::read(&config).expect("the fixture is whole");
    let theta = tidemill_engine::models::RopeSpec { theta: 10_000.0, ..config.rope };
    let frequencies = spec.rope.inverse_frequencies(16);
    for (found, expected) in frequencies.iter().zip(theta.inverse_frequencies(16)) {
        assert!((found / expected - 1.0).abs() < 1e-6, "{found} instead of {expected}");
    }
    let qwen = loaded("gguf-q8_0");
    assert!(qwen.spec.tied_embeddings && qwen.spec.qkv_bias && !qwen.spec.qk_norm);
    let qwen3 = loaded("gguf-k");
    assert!(qwen3.spec.qk_norm && qwen3.spec.head_size == 64);
}

/// A copy of a fixture of which one file was changed.
fn changed(name: &str, file: &str, change: impl FnOnce(&mut Vec<u8>)) -> TempDir {
    let folder = tempfile::tempdir().expect("a place for temporary files");
    for entry in std::fs::read_dir(fixture(name)).expect("the fixture is committed") {
        let path = entry.expect("the fixture can be listed").path();
        std::fs::copy(&path, folder.path().join(path.file_name().expect("it is a file")))
            .expect("it can be copied");
    }
    let path = folder.path().join(file);
    let mut bytes = std::fs::read(&path).expect("the fixture has it");
    change(&mut bytes);
    std::fs::write(path, bytes).expect("the copy can be written");
    folder
}

/// Replaces a text by one of the same length.
fn replace(bytes: &mut [u8], from: &str, to: &str) {
    assert_eq!(from.len(), to.len(), "{from} and {to}");
    let place = bytes.windows(from.len()).position(|window| window == from.as_bytes());
    let place = place.unwrap_or_else(|| panic!("{from} is there"));
    bytes[place..place + to.len()].copy_from_slice(to.as_bytes());
}

/// Sets the type of a tensor.
fn set_type(bytes: &mut [u8], tensor: &str, kind: u32) {
    let place =
        bytes.windows(tensor.len()).position(|window| window == tensor.as_bytes()).expect("it is there");
    let dimensions = place + tensor.len();
    let count = u32::from_le_bytes(bytes[dimensions..dimensions + 4].try_into().expect("four bytes"));
    let at = dimensions + 4 + 8 * count as usize;
    bytes[at..at + 4].copy_from_slice(&kind.to_le_bytes());
}

#[test]
fn broken_gguf_files_are_told_what_is_wrong() {
    type Change = fn(&mut Vec<u8>);
    #[rustfmt::skip]
    let rows: [(&str, Change, &[&str]); 9] = [
        ("cut short", |bytes| bytes.truncate(bytes.len() - 1000), &["model.gguf cannot be read as GGUF", "goes beyond", "is the download complete?"]),
        ("another family", |bytes| replace(bytes, "llama", "llamb"), &["unknown architecture llamb", "llama, qwen2, qwen3"]),
        ("no layers", |bytes| replace(bytes, "llama.block_count", "llama.block_cound"), &["there is no value `llama.block_count`"]),
        ("a type that is not read", |bytes| set_type(bytes, "blk.0.attn_q.weight", 10), &["`blk.0.attn_q.weight` is stored as Q2_K", "Q4_0", "Q8_0", "Q4_K", "Q6_K"]),
        ("a type that nobody knows", |bytes| set_type(bytes, "blk.0.attn_q.weight", 1234), &["is stored as type 1234"]),
        ("a norm of few bits", |bytes| set_type(bytes, "blk.0.attn_norm.weight", 8), &["`blk.0.attn_norm.weight` is stored as Q8_0; supported: F32, F16, BF16"]),
        ("a tensor of another name", |bytes| replace(bytes, "blk.1.ffn_up.weight", "blk.9.ffn_up.weight"), &["lacks 1 tensors", "blk.1.ffn_up.weight"]),
        ("a table of another type", |bytes| set_type(bytes, "rope_freqs.weight", 1), &["`rope_freqs.weight` is not 8 numbers above 0 in F32"]),
        ("no embedding", |bytes| replace(bytes, "token_embd.weight", "token_embc.weight"), &["there is no tensor `token_embd.weight`"]),
    ];
    for (name, change, expected) in rows {
        let folder = changed("gguf-q4_0", "model.gguf", change);
        let text = told(&load(folder.path(), None).expect_err(name));
        for part in expected {
            assert!(text.contains(part), "{name}: {part:?} in {text:?}");
        }
    }
}

/// The first of a file's parts.
const FIRST_PART: &str = "model-00001-of-00003.gguf";

#[test]
fn a_file_in_parts_is_the_whole() {
    let whole = loaded("gguf-q4_0");
    let first = ModelSource::Gguf(fixture("gguf-q4_0-parts").join(FIRST_PART));
    let options = LoadOptions { threads: 2, format: LoadFormat::Safetensors, quantization: None };
    let joined =
        Model::load_with(options, &first, &mut |_| {}).unwrap_or_else(|error| panic!("{}", told(&error)));
    assert_eq!(joined.spec, whole.spec);
    assert_eq!(joined.weights.layers.len(), whole.weights.layers.len());
    for (joined, whole) in joined.weights.layers.iter().zip(&whole.weights.layers) {
        for ((name, joined), (_, whole)) in projections(joined).into_iter().zip(projections(whole)) {
            let rows = |matrix: &PackedMatrix| {
                let mut rows = vec![vec![0.0; matrix.inputs()]; matrix.outputs()];
                rows.iter_mut().enumerate().for_each(|(index, row)| matrix.row(index, row));
                rows
            };
            assert_eq!(rows(joined), rows(whole), "{name}");
        }
    }
}

#[test]
fn broken_parts_are_told_what_is_wrong() {
    type Change = fn(&Path);
    const SECOND: &str = "model-00002-of-00003.gguf";
    const THIRD: &str = "model-00003-of-00003.gguf";
    #[rustfmt::skip]
    let rows: [(&str, &str, Change, &[&str]); 7] = [
        ("one is missing", FIRST_PART, |folder| std::fs::remove_file(folder.join(THIRD)).expect("it is there"), &["its part", THIRD, "it cannot be opened", "No such file"]),
        ("one is cut short", FIRST_PART, |folder| alter(folder, SECOND, |bytes| bytes.truncate(bytes.len() - 100)), &["its part", SECOND, "goes beyond", "is the download complete?"]),
        ("one is another", FIRST_PART, |folder| copy(folder, THIRD, SECOND), &["its part", SECOND, "`split.no` is not 1"]),
        ("one is of a model of more parts", FIRST_PART, |folder| alter(folder, SECOND, |bytes| set_u16(bytes, "split.count", 4)), &["its part", SECOND, "`split.count` is not 3"]),
        ("the second is named", SECOND, |_| (), &["it is part 2 of 3; name the first one, model-00001-of-00003.gguf"]),
        ("another name", "model.gguf", |folder| copy(folder, FIRST_PART, "model.gguf"), &["it is one of 3 parts", "-00001-of-00003.gguf"]),
        ("more tensors than there are", FIRST_PART, |folder| alter(folder, FIRST_PART, |bytes| set_u16(bytes, "split.tensors.count", 23)), &["`split.tensors.count` is not 22"]),
    ];
    for (row, name, change, expected) in rows {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for part in [FIRST_PART, SECOND, THIRD] {
            std::fs::copy(fixture("gguf-q4_0-parts").join(part), folder.path().join(part))
                .expect("it can be copied");
        }
        change(folder.path());
        let options = LoadOptions { threads: 1, format: LoadFormat::Safetensors, quantization: None };
        let source = ModelSource::Gguf(folder.path().join(name));
        let text = told(&Model::load_with(options, &source, &mut |_| {}).expect_err(row));
        for part in expected {
            assert!(text.contains(part), "{row}: {part:?} in {text:?}");
        }
    }
}

fn alter(folder: &Path, name: &str, change: impl Fn(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(folder.join(name)).expect("it was copied");
    change(&mut bytes);
    std::fs::write(folder.join(name), bytes).expect("it can be written");
}

fn copy(folder: &Path, from: &str, to: &str) {
    std::fs::copy(folder.join(from), folder.join(to)).expect("it can be copied");
}

/// Sets the number behind a key, in its two lowest bytes.
fn set_u16(bytes: &mut [u8], key: &str, number: u16) {
    let place = bytes.windows(key.len()).position(|window| window == key.as_bytes()).expect("it is there");
    // A word says of which type the value is.
    let at = place + key.len() + 4;
    bytes[at..at + 2].copy_from_slice(&number.to_le_bytes());
}

#[test]
fn quantization_configs_that_are_not_read_are_named() {
    #[rustfmt::skip]
    let rows = [
        ("another method",          "awq",                  r#""quant_method": "awq""#,         r#""quant_method": "hqq""#,         "`quantization_config.quant_method` is \"hqq\", which is not supported; supported: compressed-tensors, fp8, gptq, awq"),
        ("another version",         "awq",                  r#""version": "gemm""#,             r#""version": "gemv""#,             "`quantization_config.version` is \"gemv\""),
        ("three bits",              "gptq-int4",            r#""bits": 4"#,                     r#""bits": 3"#,                     "`quantization_config.bits` is 3, which is not supported; supported: 4, 8"),
        ("another format",          "compressed-int4",      r#""format": "pack-quantized""#,    r#""format": "marlin-24""#,         "`quantization_config.format` is \"marlin-24\""),
        ("numbers of another type", "compressed-int8",      r#""type": "int""#,                 r#""type": "complex""#,             "weights.type` is \"complex\""),
        ("four bits of floating type", "compressed-int4",   r#""type": "int""#,                 r#""type": "float""#,               "weights.num_bits` is 4, which is not supported; supported: 8"),
        ("blocks of nothing",       "awq",                  r#""quant_method": "awq""#,         r#""quant_method": "fp8", "weight_block_size": [128, 0]"#, "`quantization_config.weight_block_size` is"),
        ("two bits of fraction",    "awq",                  r#""quant_method": "awq""#,         r#""quant_method": "fp8", "fmt": "e5m2""#, "`quantization_config.fmt` is \"e5m2\""),
        ("a group that is none",    "gptq-int4",            r#""group_size": 32"#,              r#""group_size": 12"#,              "`quantization_config.group_size` is 12"),
        ("groups of another size",  "gptq-int4",            r#""group_size": 32"#,              r#""group_size": 64"#,              "_proj.qzeros` cannot be unpacked: its shape is"),
        ("more bits than there are", "gptq-int4",           r#""bits": 4"#,                     r#""bits": 8"#,                     "_proj.qweight` cannot be unpacked: its shape is"),
    ];
    for (name, model, from, to, expected) in rows {
        let folder = changed(model, "config.json", |bytes| {
            let text = String::from_utf8(bytes.clone()).expect("JSON is text");
            assert!(text.contains(from), "{name}: {from}");
            *bytes = text.replace(from, to).into_bytes();
        });
        let text = told(&load(folder.path(), None).expect_err(name));
        assert!(text.contains(expected), "{name}: {expected:?} in {text:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever stands in a file, it is read or refused: no panic, and no memory for what is not there.
    #[test]
    fn changed_headers_are_read_or_refused(
        name in prop::sample::select(vec!["gguf-q4_0", "gguf-plain", "gptq-int4-order", "awq", "compressed-int4-zeros"]),
        changes in prop::collection::vec((0..6000usize, any::<u8>()), 1..6),
    ) {
        let file = if name.starts_with("gguf") { "model.gguf" } else { "model.safetensors" };
        let folder = changed(name, file, |bytes| {
            for (place, byte) in &changes {
                let place = place % bytes.len();
                bytes[place] = *byte;
            }
        });
        if let Ok(model) = load(folder.path(), None) {
            prop_assert_eq!(model.weights.layers.len(), model.spec.layers);
        }
    }
}
