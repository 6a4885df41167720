//! Several ranks of one model: its weights are those of one rank, cut; its answers those of transformers; its bits those that it
//! has however a sequence is cut and batched.

use std::path::{Path, PathBuf};

use tidemill_engine::handle::{LoadFormat, ModelSource, Quantization};
use tidemill_engine::models::{LoadOptions, Model, ModelError};
use tidemill_engine::weights::{LayerWeights, Linear, Weights};
use tidemill_kernels::cpu::Isa;
use tidemill_kernels::matrix::PackedMatrix;
use tidemill_kvtransfer_proto::layout::{AxisOrder, KvDtype};

use super::bench::{Bench, Storage, exact_isa, fixture, goldens, model};
use super::parity::{CONTINUED, Company, Cut, MODELS, all_bits, check_goldens_on};

fn load(
    source: &ModelSource,
    ranks: usize,
    quantization: Option<Quantization>,
) -> Result<Model<Vec<Weights>>, ModelError> {
    let options = LoadOptions { threads: 2, format: LoadFormat::Safetensors, quantization };
    Model::load_ranks(options, &vec![Vec::new(); ranks], source, &mut |_| {})
}

fn shared(name: &str, ranks: usize) -> Model<Vec<Weights>> {
    let source = ModelSource::Folder(fixture(name));
    load(&source, ranks, None).unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
fn logits_and_greedy_tokens_are_those_of_transformers() {
    for name in MODELS {
        for ranks in [2, 4] {
            check_goldens_on(Bench::of_ranks(shared(name, ranks), exact_isa(), Storage::PLAIN), name);
        }
    }
}

#[test]
fn bits_do_not_depend_on_cuts_batches_or_blocks() {
    #[rustfmt::skip]
    let rows = [
        ("chunks of 7",                         16, AxisOrder::TokenHead, Cut::Chunks(7),  Company::Alone),
        ("prefill, then decode in one batch",   16, AxisOrder::TokenHead, Cut::Decode,     Company::Together),
        ("unequal chunks in blocks of 4",       4,  AxisOrder::HeadToken, Cut::Unequal,    Company::Together),
    ];
    for (name, ranks) in [("llama2", 4), ("llama-bias", 2), ("qwen2-window", 4), ("qwen3", 2)] {
        let sequences: Vec<Vec<u32>> = goldens(name)
            .into_iter()
            .map(|golden| [&golden.prompt[..], &golden.greedy[..CONTINUED]].concat())
            .collect();
        for dtype in [KvDtype::F32, KvDtype::Int8] {
            let bench = |storage| Bench::of_ranks(shared(name, ranks), Isa::detect(), storage);
            let mut whole = bench(Storage { dtype, ..Storage::PLAIN });
            let expected = all_bits(&mut whole, &sequences, Cut::Whole, Company::Alone);
            for (row, block_len, order, cut, company) in rows {
                let mut bench = bench(Storage { dtype, block_len, order });
                let bits = all_bits(&mut bench, &sequences, cut, company);
                assert!(bits == expected, "{name}, {ranks} ranks: {row}, {dtype:?}");
            }
        }
    }
}

/// Before ranks first sum anything, they have the bits of one rank; and blocks are the same whoever writes them.
#[test]
fn the_first_layer_lies_in_blocks_bit_for_bit_however_many_ranks_write_it() {
    for name in ["llama2", "qwen3", "llama-bf16-new-keys"] {
        let tokens = goldens(name).pop().expect("the prompt of 300 is last").prompt;
        for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Int8, KvDtype::Fp8] {
            for order in [AxisOrder::TokenHead, AxisOrder::HeadToken] {
                let storage = Storage { dtype, order, block_len: 16 };
                let written = |mut bench: Bench| -> Vec<Vec<Vec<u8>>> {
                    let mut place = bench.place(tokens.len());
                    bench.extend(&mut place, &tokens);
                    let blocks = place.blocks.len() as u32 / 2;
                    (0..2)
                        .map(|layer| (0..blocks).map(|block| bench.layer_of(block, layer)).collect())
                        .collect()
                };
                let expected = written(Bench::new(&model(name), storage));
                for ranks in [1, 2, 4] {
                    let found = written(Bench::of_ranks(shared(name, ranks), Isa::detect(), storage));
                    assert!(found[0] == expected[0], "{name}, {ranks} ranks: {dtype:?}, {order:?}");
                    assert!(
                        found[1].iter().flatten().any(|byte| *byte != 0),
                        "{name}: the second is there too"
                    );
                }
            }
        }
    }
}

/// A row of a matrix whose outputs, or inputs, are shared.
fn row_of(shards: &[&PackedMatrix], row: usize) -> Vec<f32> {
    let mut row = row;
    let mut values = Vec::new();
    let inputs = shards[0].inputs();
    let by_outputs = shards.iter().all(|shard| shard.inputs() == inputs) && row < outputs(shards);
    for shard in shards {
        if by_outputs && shard.outputs() <= row {
            row -= shard.outputs();
            continue;
        }
        let mut part = vec![0.0; shard.inputs()];
        shard.row(row, &mut part);
        values.extend(part);
        if by_outputs {
            break;
        }
    }
    values
}

fn outputs(shards: &[&PackedMatrix]) -> usize {
    shards.iter().map(|shard| shard.outputs()).sum()
}

type Part = (&'static str, fn(&LayerWeights) -> &Linear);

const BY_OUTPUTS: [Part; 5] = [
    ("query", |it| &it.query),
    ("key", |it| &it.key),
    ("value", |it| &it.value),
    ("gate", |it| &it.gate),
    ("up", |it| &it.up),
];
const BY_INPUTS: [Part; 2] = [("output", |it| &it.output), ("down", |it| &it.down)];

/// Checks that the ranks' parts together are the whole, value by value.
fn check_together(name: &str, whole: &Weights, shards: &[Weights]) {
    for (layer, expected) in whole.layers.iter().enumerate() {
        let rows_of = |linear: &Linear| -> Vec<Vec<f32>> {
            let all = |row| row_of(&[&linear.matrix], row);
            (0..linear.matrix.outputs()).map(all).collect()
        };
        for (part, of) in BY_OUTPUTS {
            let linears: Vec<&Linear> = shards.iter().map(|shard| of(&shard.layers[layer])).collect();
            let mut found: Vec<Vec<f32>> = linears.iter().flat_map(|linear| rows_of(linear)).collect();
            let mut biases: Vec<f32> = linears.iter().filter_map(|it| it.bias.clone()).flatten().collect();
            let expected = of(expected);
            let repeated = found.len() / expected.matrix.outputs();
            if 1 < repeated {
                // Neighbours have the same KV head.
                let head = linears[0].matrix.outputs();
                let first = |index: &usize| (index / head).is_multiple_of(repeated);
                biases = (0..biases.len()).filter(first).map(|index| biases[index]).collect();
                found = (0..found.len()).filter(first).map(|index| found[index].clone()).collect();
            }
            assert!(found == rows_of(expected), "{name}: {part} of layer {layer}");
            assert_eq!(biases, expected.bias.clone().unwrap_or_default(), "{name}: {part} of layer {layer}");
        }
        for (part, of) in BY_INPUTS {
            let linears: Vec<&Linear> = shards.iter().map(|shard| of(&shard.layers[layer])).collect();
            let rows: Vec<Vec<Vec<f32>>> = linears.iter().map(|linear| rows_of(linear)).collect();
            let expected = of(expected);
            let found: Vec<Vec<f32>> = (0..expected.matrix.outputs())
                .map(|row| rows.iter().flat_map(|rows| rows[row].clone()).collect())
                .collect();
            assert!(found == rows_of(expected), "{name}: {part} of layer {layer}");
            let biases: Vec<_> = linears.iter().map(|it| it.bias.as_ref()).collect();
            assert_eq!(biases[0], expected.bias.as_ref(), "{name}: {part} of layer {layer}");
            assert!(biases[1..].iter().all(Option::is_none), "{name}: biases are added once");
        }
    }
    let heads: Vec<&PackedMatrix> = shards.iter().map(|shard| &shard.head).collect();
    assert_eq!(outputs(&heads), whole.head.outputs(), "{name}: each token has a rank");
    for token in 0..whole.head.outputs() {
        assert_eq!(row_of(&heads, token), row_of(&[&whole.head], token), "{name}: token {token}");
    }
}

fn quantized(name: &str) -> ModelSource {
    let folder: PathBuf =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/quantized").join(name);
    let file = folder.join("model.gguf");
    if file.is_file() { ModelSource::Gguf(file) } else { ModelSource::Folder(folder) }
}

#[test]
fn the_parts_of_all_ranks_are_the_whole_model() {
    let int4 = Some(Quantization::Int4 { group: 32 });
    #[rustfmt::skip]
    let rows = [
        ("llama-bias",              ModelSource::Folder(fixture("llama-bias")),     None,                       [true, true]),
        ("llama2",                  ModelSource::Folder(fixture("llama2")),         None,                       [true, true]),
        ("qwen2",                   ModelSource::Folder(fixture("qwen2")),          None,                       [true, true]),
        ("llama3 in int8",          ModelSource::Folder(fixture("llama3")),         Some(Quantization::Int8),   [true, true]),
        ("llama3 in fp8",           ModelSource::Folder(fixture("llama3")),         Some(Quantization::Fp8),    [true, true]),
        // Four ranks have 16 inputs of the output projection each.
        ("llama3 in int4",          ModelSource::Folder(fixture("llama3")),         int4,                       [true, false]),
        ("gguf-q4_0",               quantized("gguf-q4_0"),                         None,                       [true, false]),
        ("gguf-q8_0",               quantized("gguf-q8_0"),                         None,                       [true, true]),
        ("gguf-k",                  quantized("gguf-k"),                            None,                       [true, true]),
        ("gguf-plain",              quantized("gguf-plain"),                        None,                       [true, true]),
        ("compressed-int8",         quantized("compressed-int8"),                   None,                       [true, true]),
        ("compressed-int4",         quantized("compressed-int4"),                   None,                       [true, false]),
        ("compressed-int4-zeros",   quantized("compressed-int4-zeros"),             None,                       [true, true]),
        ("gptq-int4",               quantized("gptq-int4"),                         None,                       [true, false]),
        ("gptq-int4-order",         quantized("gptq-int4-order"),                   None,                       [true, true]),
        ("gptq-int8",               quantized("gptq-int8"),                         None,                       [true, true]),
        ("awq",                     quantized("awq"),                               None,                       [true, true]),
    ];
    for (name, source, quantization, is_possible) in rows {
        let options = LoadOptions { threads: 2, format: LoadFormat::Safetensors, quantization };
        let whole = Model::load_with(options, &source, &mut |_| {}).expect(name);
        for (ranks, is_possible) in [2, 4].into_iter().zip(is_possible) {
            match load(&source, ranks, quantization) {
                Ok(model) => {
                    assert!(is_possible, "{name}, {ranks} ranks");
                    assert_eq!(model.fingerprint, whole.fingerprint, "{name}: it is the same model");
                    check_together(name, &whole.weights, &model.weights);
                }
                Err(error) => {
                    assert!(!is_possible, "{name}, {ranks} ranks: {error}");
                    let text = error.to_string();
                    let parts =
                        ["_proj.weight` cannot be cut for --tensor-parallel-size", "no whole groups of 32"];
                    assert!(parts.iter().all(|part| text.contains(part)), "{name}: {text}");
                }
            }
        }
    }
}

#[test]
fn a_model_that_so_many_ranks_cannot_share_is_refused() {
    let source = ModelSource::Folder(fixture("llama3"));
    for (ranks, expected) in
        [(3, "--tensor-parallel-size 3 does not divide the model's 4 query heads"), (8, "4 query heads")]
    {
        let error = load(&source, ranks, None).map(drop).expect_err("heads are not cut");
        assert!(error.to_string().contains(expected), "{error}");
    }
}
