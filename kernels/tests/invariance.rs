//! The bits of a row depend on the row alone: not on the batch, the chunking, the blocks or the threads.
//!
//! This is what makes prefill and decode on two workers give the same tokens as one worker.

mod support;

use support::{Blocks, ISAS, KV_DTYPES, Numbers, Order, assert_same_bits, cpu, cpus, formats, packed, shape};
use tidemill_kernels::{
    cpu::{Cpu, Isa},
    kv::{KvBlockShape, KvDtype},
    matrix::PackedMatrix,
    step::{AttentionParams, SequenceRows},
};

#[test]
fn a_row_of_a_product_is_the_same_in_any_batch() {
    let (inputs, outputs, rows) = (301, 333, 110);
    let mut numbers = Numbers::new(1);
    let x = numbers.vector(rows * inputs);
    for format in formats() {
        let w = packed(1, outputs, inputs, &numbers.vector(outputs * inputs), format);
        for isa in ISAS {
            let Some(alone) = cpu(isa, 1) else { continue };
            let mut expected = vec![f32::NAN; rows * outputs];
            for (out, x) in expected.chunks_exact_mut(outputs).zip(x.chunks_exact(inputs)) {
                alone.matmul(out, x, &w, None);
            }
            for threads in 1..=3 {
                let cpu = cpu(isa, threads).unwrap();
                for batch in [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 109, 110] {
                    for first in [0, rows - batch] {
                        let mut actual = vec![f32::NAN; batch * outputs];
                        cpu.matmul(&mut actual, &x[first * inputs..(first + batch) * inputs], &w, None);
                        let expected = &expected[first * outputs..(first + batch) * outputs];
                        assert_same_bits(
                            &actual,
                            expected,
                            &format!("{batch} rows of {format:?}, {isa}, {threads}"),
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_matrix_is_packed_the_same_on_any_number_of_threads() {
    // Large enough to be shared out, with a last panel that is not full.
    let (outputs, inputs) = (1003, 530);
    let mut numbers = Numbers::new(3);
    let values = numbers.vector(outputs * inputs);
    let x = numbers.vector(inputs);
    for format in formats() {
        let expected = packed(1, outputs, inputs, &values, format);
        let rows = |matrix: &PackedMatrix| -> Vec<f32> {
            let mut rows = vec![f32::NAN; outputs * inputs];
            rows.chunks_exact_mut(inputs).enumerate().for_each(|(index, row)| matrix.row(index, row));
            // The product also reads what rows do not show.
            let mut product = vec![f32::NAN; outputs];
            cpus(1).next().expect("there is always one").matmul(&mut product, &x, matrix, None);
            rows.extend(product);
            rows
        };
        for threads in [2, 3, 7, 100] {
            let matrix = packed(threads, outputs, inputs, &values, format);
            assert_same_bits(&rows(&matrix), &rows(&expected), &format!("{format:?}, {threads} threads"));
        }
    }
}

#[test]
fn a_normalised_row_and_an_activation_are_the_same_in_any_batch() {
    let (width, rows) = (301, 110);
    let mut numbers = Numbers::new(2);
    let (x, up, weight) = (numbers.vector(rows * width), numbers.vector(rows * width), numbers.vector(width));
    for cpu in cpus(3) {
        let mut normalised = vec![f32::NAN; rows * width];
        cpu.rms_norm(&mut normalised, &x, &weight, 1e-6);
        let mut activated = vec![f32::NAN; rows * width];
        cpu.silu_mul(&mut activated, &x, &up);
        for row in 0..rows {
            let elements = row * width..(row + 1) * width;
            let mut alone = vec![f32::NAN; width];
            cpu.rms_norm(&mut alone, &x[elements.clone()], &weight, 1e-6);
            assert_same_bits(&alone, &normalised[elements.clone()], "rms_norm");
            cpu.silu_mul(&mut alone, &x[elements.clone()], &up[elements.clone()]);
            assert_same_bits(&alone, &activated[elements], "silu_mul");
        }
    }
}

/// The sets whose attention differs.
const ATTENTION_ISAS: [Isa; 4] = [Isa::Avx512Bf16, Isa::Avx512, Isa::Avx2, Isa::Portable];
const QUERY_HEADS: usize = 6;
const KV_HEADS: usize = 2;
const HEAD_SIZE: usize = 40;
const TOKENS: usize = 210;

struct Prompt {
    tokens: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Prompt {
    fn new(tokens: usize) -> Self {
        let mut numbers = Numbers::new(3);
        let mut vector = |heads: usize| numbers.vector(tokens * heads * HEAD_SIZE);
        Self { tokens, q: vector(QUERY_HEADS), k: vector(KV_HEADS), v: vector(KV_HEADS) }
    }
}

/// Computes a prompt in chunks of the lengths that `chunks` goes round in, beside another sequence when `crowded`.
fn run(
    cpu: &Cpu,
    shape: &KvBlockShape,
    prompt: &Prompt,
    chunks: &[usize],
    window: Option<usize>,
    crowded: bool,
) -> Vec<f32> {
    let blocks = Blocks::new(*shape, prompt.tokens);
    let other_blocks = Blocks::new(*shape, 40);
    let params = AttentionParams { query_heads: QUERY_HEADS, scale: 0.3, sliding_window: window };
    let mut out = Vec::new();
    let mut done = 0;
    for &chunk in chunks.iter().cycle() {
        let rows = chunk.min(prompt.tokens - done);
        if rows == 0 {
            break;
        }
        let first_row = if crowded { 11 } else { 0 };
        // The other sequence: some of the prompt's own rows, at positions of their own.
        let step = |all: &[f32], heads: usize| {
            let row = heads * HEAD_SIZE;
            [&all[..first_row * row], &all[done * row..(done + rows) * row]].concat()
        };
        let sequences = [
            SequenceRows {
                first_row: 0,
                rows: first_row,
                first_position: 29,
                blocks: &other_blocks.addresses,
            },
            SequenceRows { first_row, rows, first_position: done, blocks: &blocks.addresses },
        ];
        let other_past =
            SequenceRows { first_row: 0, rows: 29, first_position: 0, blocks: &other_blocks.addresses };
        cpu.write_kv(shape, 0, &prompt.k, &prompt.v, &[other_past]);
        cpu.write_kv(shape, 0, &step(&prompt.k, KV_HEADS), &step(&prompt.v, KV_HEADS), &sequences);
        let q = step(&prompt.q, QUERY_HEADS);
        let mut step_out = vec![f32::NAN; q.len()];
        cpu.attention(&mut step_out, &q, shape, 0, &sequences, params);
        out.extend_from_slice(&step_out[first_row * QUERY_HEADS * HEAD_SIZE..]);
        done += rows;
    }
    out
}

/// Whole on one thread is what all other ways must equal.
fn check_attention(isa: Isa, dtype: KvDtype, window: Option<usize>) {
    let Some(alone) = cpu(isa, 1) else { return };
    let prompt = Prompt::new(TOKENS);
    let shape_of = |block_len, order| shape(dtype, 1, block_len, KV_HEADS, HEAD_SIZE, order);
    let expected = run(&alone, &shape_of(16, Order::TokenHead), &prompt, &[TOKENS], window, false);
    assert!(expected.iter().all(|x| x.is_finite()), "no stale key was looked at");
    // All ways with one type; with the others, which differ in nothing but how a row is read, on several threads.
    let threads = if dtype == KvDtype::Bf16 { 1..=3 } else { 3..=3 };
    let cpus: Vec<Cpu> = threads.filter_map(|threads| cpu(isa, threads)).collect();
    for block_len in [4, 16, 64] {
        for order in [Order::TokenHead, Order::HeadToken] {
            for (name, chunks) in
                [("whole", &[TOKENS][..]), ("chunked", &[37, 64, 1, 90, 5]), ("one by one", &[1])]
            {
                for (cpu, crowded) in cpus.iter().rev().zip([true, true, false]) {
                    let actual = run(cpu, &shape_of(block_len, order), &prompt, chunks, window, crowded);
                    let name = format!(
                        "{isa} {dtype:?} window {window:?} blocks of {block_len} {order:?} {name}, {} threads, crowded: {crowded}",
                        cpu.threads()
                    );
                    assert_same_bits(&actual, &expected, &name);
                }
            }
        }
    }
}

#[test]
fn attention_is_the_same_however_it_is_cut() {
    for isa in ATTENTION_ISAS {
        for dtype in KV_DTYPES {
            for window in [None, Some(50)] {
                check_attention(isa, dtype, window);
            }
        }
    }
}

/// Contexts that are longer than what is summed up in one piece, whole and split over threads: prompts in chunks, and
/// decodes, which are split where prompts are not.
#[test]
fn long_attention_is_the_same_on_any_number_of_threads() {
    let prompt = Prompt::new(1300);
    for isa in ATTENTION_ISAS {
        let Some(alone) = cpu(isa, 1) else { continue };
        let cpus: Vec<Cpu> = (1..=3).filter_map(|threads| cpu(isa, threads)).collect();
        for dtype in KV_DTYPES {
            let shape = shape(dtype, 1, 16, KV_HEADS, HEAD_SIZE, Order::TokenHead);
            for window in [None, Some(600)] {
                let expected = run(&alone, &shape, &prompt, &[prompt.tokens], window, false);
                assert!(expected.iter().all(|x| x.is_finite()), "no stale key was looked at");
                for cpu in &cpus {
                    // Decodes from just before and just after the ends of pieces.
                    for chunks in [&[505, 14, 1][..], &[1000, 20, 1, 1, 1, 1, 1]] {
                        let actual = run(cpu, &shape, &prompt, chunks, window, true);
                        let name = format!(
                            "{isa} {dtype:?} window {window:?} {chunks:?}, {} threads",
                            cpu.threads()
                        );
                        assert_same_bits(&actual, &expected, &name);
                    }
                }
            }
        }
    }
}

/// Values that are no numbers spoil the rows that see them and no others.
#[test]
fn what_a_row_does_not_see_does_not_change_it() {
    let prompt = Prompt::new(100);
    let row = KV_HEADS * HEAD_SIZE;
    let mut spoiled = Prompt::new(100);
    spoiled.v[70 * row..71 * row].fill(f32::INFINITY);
    spoiled.k[70 * row..71 * row].fill(f32::NAN);
    for isa in ATTENTION_ISAS {
        let Some(cpu) = cpu(isa, 2) else { continue };
        for dtype in KV_DTYPES {
            let shape = shape(dtype, 1, 16, KV_HEADS, HEAD_SIZE, Order::TokenHead);
            for window in [None, Some(9)] {
                let expected = run(&cpu, &shape, &prompt, &[100], window, false);
                let actual = run(&cpu, &shape, &spoiled, &[100], window, false);
                let width = QUERY_HEADS * HEAD_SIZE;
                let sees = |row: usize| 70 <= row && window.is_none_or(|window| row < 70 + window);
                for row in 0..100 {
                    let (actual, expected) =
                        (&actual[row * width..(row + 1) * width], &expected[row * width..(row + 1) * width]);
                    if sees(row) {
                        assert!(actual.iter().all(|x| !x.is_finite()), "{isa} {dtype:?}: row {row} sees it");
                    } else {
                        assert_same_bits(actual, expected, &format!("{isa} {dtype:?} {window:?}: row {row}"));
                    }
                }
            }
        }
    }
}
