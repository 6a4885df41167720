//! The forward pass against transformers, and against itself: the same bits however a sequence is cut, batched and stored.

use std::sync::Arc;

use super::bench::{Bench, Golden, Storage, Work, distance, fixture, goldens, model, quantized_model};
use tidemill_engine::handle::Quantization;
use tidemill_engine::models::Model;
use tidemill_engine::runner::LogitsWanted;
use tidemill_engine::sampler::{History, Sampler, logprobs};
use tidemill_engine_core::request::{SamplingParams, StopConditions};
use tidemill_kernels::matrix::WeightDtype;
use tidemill_kvtransfer_proto::layout::{AxisOrder, KvDtype};

/// Makes each check a test of each fixture model.
macro_rules! for_every_model {
    ($($name:ident: $folder:literal,)*) => {
        pub(super) const MODELS: &[&str] = &[$($folder),*];
        mod logits_and_greedy_tokens_are_those_of_transformers {
            $(#[test] fn $name() { super::check_goldens($folder); })*
        }
        mod bits_do_not_depend_on_cuts_batches_or_blocks {
            $(#[test] fn $name() { super::check_bits($folder); })*
        }
        mod narrow_kv_stays_within_bounds {
            $(#[test] fn $name() { super::check_narrow_kv($folder); })*
        }
    };
}

for_every_model! {
    llama2: "llama2",
    llama3: "llama3",
    llama_bf16_new_keys: "llama-bf16-new-keys",
    llama_bias: "llama-bias",
    llama_f16_old_keys: "llama-f16-old-keys",
    llama_linear: "llama-linear",
    llama_sharded: "llama-sharded",
    llama_yarn: "llama-yarn",
    llama_yarn_all_fields: "llama-yarn-all-fields",
    mistral: "mistral",
    qwen2: "qwen2",
    qwen2_window: "qwen2-window",
    qwen3: "qwen3",
    qwen3_yarn: "qwen3-yarn",
}

#[test]
fn no_fixture_model_is_forgotten() {
    let folders = std::fs::read_dir(fixture("")).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<String> = folders
        .filter(|folder| folder.join("goldens.json").exists())
        .map(|folder| folder.file_name().unwrap().to_str().unwrap().to_owned())
        .collect();
    found.sort_unstable();
    let mut tested = MODELS.to_vec();
    tested.sort_unstable();
    assert_eq!(found, tested);
}

fn check_goldens(name: &str) {
    check_goldens_on(Bench::exact(&model(name), Storage::PLAIN), name);
}

pub(super) fn check_goldens_on(mut bench: Bench, name: &str) {
    let mut sampler = Sampler::new(bench.vocab_size());
    let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let stop = StopConditions::after(u32::MAX);
    let goldens = goldens(name);
    let lengths: Vec<usize> = goldens.iter().map(|golden| golden.prompt.len()).collect();
    assert_eq!(lengths, [1, 15, 16, 17, 300], "{name}");
    for golden in goldens {
        let length = golden.prompt.len();
        let mut place = bench.place(length + golden.greedy.len());
        let work = Work { place: &mut place, tokens: &golden.prompt };
        let rows = bench.step(&mut [work], LogitsWanted::All).remove(0);
        for (row, expected) in rows.iter().rev().zip(golden.logits.iter().rev()) {
            let far = distance(row, expected);
            assert!(far < 1e-4, "{name}: logits after {length} tokens differ by {far:e}");
        }
        let mut last = rows.last().expect("a row per token").clone();
        let mut output = Vec::new();
        for (position, (&expected, logprob)) in golden.greedy.iter().zip(&golden.logprobs).enumerate() {
            let history = History { prompt: &golden.prompt, output: &output };
            let sampled = sampler.sample(&last, history, &greedy, &stop, position as u32);
            let token = sampled.expect("logits are numbers").token;
            assert_eq!(token, expected, "{name}: token {position} after {length}");
            let found = logprobs(&last, token, 0).expect("logits are numbers").chosen;
            assert!(
                (found - logprob).abs() < 1e-3,
                "{name}: token {position} after {length}: {found} {logprob}"
            );
            output.push(token);
            last = bench.extend(&mut place, &[token]);
        }
    }
}

/// How sequences are cut into steps.
#[derive(Clone, Copy, Debug)]
pub(super) enum Cut {
    /// All at once.
    Whole,
    /// This many tokens per step.
    Chunks(usize),
    /// Sequence by sequence another number of tokens per step.
    Unequal,
    /// The prompt at once, then token by token.
    Decode,
}

/// Which sequences share a step.
#[derive(Clone, Copy, Debug)]
pub(super) enum Company {
    /// None.
    Alone,
    /// All that are not finished.
    Together,
}

/// Greedy tokens that are computed after each prompt.
pub(super) const CONTINUED: usize = 12;

impl Cut {
    fn step(self, sequence: usize, done: usize, len: usize) -> usize {
        let tokens = match self {
            Self::Whole => len,
            Self::Chunks(tokens) => tokens,
            Self::Unequal => [1, 3, 64, 7, 33][sequence],
            Self::Decode if done == 0 => len - CONTINUED,
            Self::Decode => 1,
        };
        tokens.min(len - done)
    }
}

/// The logits of every position of every sequence, as bits.
pub(super) fn all_bits(
    bench: &mut Bench,
    sequences: &[Vec<u32>],
    cut: Cut,
    company: Company,
) -> Vec<Vec<Vec<u32>>> {
    let mut places: Vec<_> = sequences.iter().map(|tokens| bench.place(tokens.len())).collect();
    let mut bits = vec![Vec::new(); sequences.len()];
    loop {
        let mut members = Vec::new();
        let mut work = Vec::new();
        for (index, (place, tokens)) in places.iter_mut().zip(sequences).enumerate() {
            let (done, len) = (place.len, tokens.len());
            let has_room = work.is_empty() || matches!(company, Company::Together);
            if done < len && has_room {
                members.push(index);
                work.push(Work { place, tokens: &tokens[done..done + cut.step(index, done, len)] });
            }
        }
        if work.is_empty() {
            return bits;
        }
        for (rows, member) in bench.step(&mut work, LogitsWanted::All).into_iter().zip(members) {
            bits[member]
                .extend(rows.into_iter().map(|row| row.into_iter().map(f32::to_bits).collect::<Vec<_>>()));
        }
    }
}

/// The last layer leaves out rows whose logits nobody wants: those of the others, and what later steps read of K and V,
/// stay what they are.
#[test]
fn bits_do_not_depend_on_whose_logits_are_wanted() {
    use LogitsWanted::{All, Last, None, Tail};
    #[rustfmt::skip]
    let rows: [(&str, [LogitsWanted; 3]); 5] = [
        ("the last of each",                        [Last,    Last,    Last]),
        ("none of the first",                       [None,    Last,    Tail(3)]),
        ("none of the one in the middle",           [Tail(2), None,    All]),
        ("none of the last",                        [All,     Tail(5), None]),
        ("none at all",                             [None,    None,    None]),
    ];
    for name in ["llama3", "mistral", "qwen3"] {
        let model = model(name);
        let prompts = goldens(name).into_iter().map(|golden| golden.prompt);
        let sequences: Vec<Vec<u32>> = prompts.filter(|prompt| 5 < prompt.len()).take(3).collect();
        assert_eq!(sequences.len(), 3, "{name} has three prompts with a tail of five before the last token");
        let mut bench = Bench::new(&model, Storage::PLAIN);
        let whole = all_bits(&mut bench, &sequences, Cut::Whole, Company::Together);
        for (row, wanted) in rows {
            let mut bench = Bench::new(&model, Storage::PLAIN);
            let mut places: Vec<_> = sequences.iter().map(|tokens| bench.place(tokens.len())).collect();
            // All but the last token, then that one, which reads the K and V of all others.
            for wanted in [wanted, [Last; 3]] {
                let mut work: Vec<_> = places
                    .iter_mut()
                    .zip(&sequences)
                    .map(|(place, tokens)| {
                        let (done, end) = (place.len, tokens.len() - usize::from(place.len == 0));
                        Work { place, tokens: &tokens[done..end] }
                    })
                    .collect();
                let found = bench.step_each(&mut work, &wanted);
                for (index, found) in found.iter().enumerate() {
                    let end = places[index].len;
                    let count = match wanted[index] {
                        None => 0,
                        Last => 1,
                        Tail(count) => count,
                        All => end,
                    };
                    let bits: Vec<Vec<u32>> =
                        found.iter().map(|row| row.iter().map(|x| x.to_bits()).collect()).collect();
                    assert!(bits == whole[index][end - count..end], "{name}: {row}, sequence {index}");
                }
            }
        }
    }
}

fn check_bits(name: &str) {
    check_bits_of(&model(name), name);
}

#[test]
fn bits_of_quantized_models_do_not_depend_on_cuts_batches_or_blocks() {
    for quantization in [Quantization::Int8, Quantization::Fp8, Quantization::Int4 { group: 32 }] {
        check_bits_of(&quantized_model("qwen2", quantization), "qwen2");
    }
}

fn check_bits_of(model: &Arc<Model>, name: &str) {
    use AxisOrder::{HeadToken, TokenHead};
    use Company::{Alone, Together};
    let continued = |golden: Golden| [&golden.prompt[..], &golden.greedy[..CONTINUED]].concat();
    let sequences: Vec<Vec<u32>> = goldens(name).into_iter().map(continued).collect();
    #[rustfmt::skip]
    let rows = [
        ("chunks of 1",                         16, TokenHead, Cut::Chunks(1),  Alone),
        ("chunks of 7",                         16, TokenHead, Cut::Chunks(7),  Alone),
        ("chunks of 16",                        16, TokenHead, Cut::Chunks(16), Alone),
        ("chunks of 64",                        16, TokenHead, Cut::Chunks(64), Alone),
        ("all prompts in one batch",            16, TokenHead, Cut::Whole,      Together),
        ("prefill, then decode in one batch",   16, TokenHead, Cut::Decode,     Together),
        ("unequal chunks in one batch",         16, TokenHead, Cut::Unequal,    Together),
        ("blocks of 64",                        64, TokenHead, Cut::Unequal,    Together),
        ("blocks of 4",                         4,  TokenHead, Cut::Unequal,    Together),
        ("heads first",                         16, HeadToken, Cut::Whole,      Alone),
        ("heads first, blocks of 64",           64, HeadToken, Cut::Unequal,    Together),
        ("heads first, blocks of 4",            4,  HeadToken, Cut::Unequal,    Together),
    ];
    for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8, KvDtype::Fp8] {
        let mut bench = Bench::new(model, Storage { dtype, ..Storage::PLAIN });
        let whole = all_bits(&mut bench, &sequences, Cut::Whole, Alone);
        for (row, block_len, order, cut, company) in rows {
            let mut bench = Bench::new(model, Storage { dtype, block_len, order });
            let bits = all_bits(&mut bench, &sequences, cut, company);
            assert!(bits == whole, "{name}: {row}, {dtype:?}");
        }
    }
}

#[test]
fn a_shared_prefix_gives_the_bits_of_a_recomputed_one() {
    for name in ["llama3", "mistral", "qwen2-window"] {
        let model = model(name);
        let mut bench = Bench::new(&model, Storage::PLAIN);
        let long = goldens(name).pop().expect("the prompt of 300 is last").prompt;
        let mut first = bench.place(long.len());
        let expected = bench.extend(&mut first, &long);
        for shared in [16, 160, 288] {
            let mut second = bench.place(long.len());
            second.blocks[..shared / 16].copy_from_slice(&first.blocks[..shared / 16]);
            second.len = shared;
            let found = bench.extend(&mut second, &long[shared..]);
            let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&found), bits(&expected), "{name}: {shared} tokens shared");
        }
    }
}

/// K and V in fewer bits: close to transformers' f32, and not by accident equal to it.
fn check_narrow_kv(name: &str) {
    let model = model(name);
    // About twice what the worst of the fixture models shows.
    let rows = [(KvDtype::F16, 5e-3), (KvDtype::Bf16, 4e-2), (KvDtype::Int8, 8e-2), (KvDtype::Fp8, 4e-1)];
    for (dtype, bound) in rows {
        let mut bench = Bench::exact(&model, Storage { dtype, ..Storage::PLAIN });
        for golden in goldens(name) {
            let length = golden.prompt.len();
            let mut place = bench.place(length);
            let last = bench.extend(&mut place, &golden.prompt);
            let far = distance(&last, golden.logits.last().expect("the last position is always there"));
            assert!((1e-5..bound).contains(&far), "{name}: {dtype:?} KV, {length} tokens: {far:e}");
        }
    }
}

/// Instructions for bf16 round activations: as close as K and V in bf16 are, or equal where weights are of another type
/// or the machine has no such instructions.
#[test]
fn bf16_instructions_stay_within_bounds() {
    for name in MODELS {
        let model = model(name);
        let (mut fast, mut exact) =
            (Bench::new(&model, Storage::PLAIN), Bench::exact(&model, Storage::PLAIN));
        for golden in goldens(name) {
            let logits = |bench: &mut Bench| {
                let mut place = bench.place(golden.prompt.len());
                bench.extend(&mut place, &golden.prompt)
            };
            let far = distance(&logits(&mut fast), &logits(&mut exact));
            let bound = if model.dtype == WeightDtype::Bf16 { 4e-2 } else { f32::MIN_POSITIVE };
            assert!(far < bound, "{name}: {} tokens: {far:e}", golden.prompt.len());
        }
    }
}
