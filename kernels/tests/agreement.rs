//! Every operation on every instruction set against `reference`.
//!
//! Tolerances are relative to the greatest element expected. An f32 has 1.2e-7; sums of products of a few hundred
//! terms differ by some of those when they are summed in another order.

mod support;

use support::{
    Blocks, KV_DTYPES, Numbers, Order, QUANTIZATIONS, WEIGHT_DTYPES, assert_close, assert_same_bits, cpus,
    packed, shape, source, stored,
};
use tidemill_kernels::{
    cpu::{Isa, Projection},
    kv::KvDtype,
    matrix::{Embedding, PackedMatrix, Quantization, WeightDtype, WeightFormat},
    reference,
    step::{AttentionParams, RopeTable, SequenceRows},
};

const THREADS: usize = 3;

#[test]
fn matmul() {
    #[rustfmt::skip]
    let rows = [
        // rows, inputs, outputs
        (   1,      1,       1),
        (   1,      7,       1),
        (   1,    300,       7),
        (   1,     64,      64),
        (   1,    129,     300),
        (   2,     33,      40),
        (   3,    300,      65),
        (   4,      8,      16),
        (   5,     17,      15),
        (   6,     64,     100),
        (   7,    100,      33),
        (  11,    130,      50),
        (  13,     65,     128),
        (  16,    600,      90),
        ( 100,    256,      48),
        ( 200,     31,     300),
        ( 270,     31,     130),
    ];
    let mut numbers = Numbers::new(1);
    for (rows, inputs, outputs) in rows {
        for dtype in WEIGHT_DTYPES {
            let bytes = stored(&numbers.vector(outputs * inputs), dtype);
            let w = reference::widen_matrix(source(&bytes, dtype));
            let packed = PackedMatrix::pack(outputs, inputs, source(&bytes, dtype));
            let (x, bias) = (numbers.vector(rows * inputs), numbers.vector(outputs));
            for (bias, cpu) in
                [None, Some(&*bias)].into_iter().flat_map(|bias| cpus(THREADS).map(move |cpu| (bias, cpu)))
            {
                let name = format!("{rows}x{inputs}x{outputs} {dtype:?} on {}", cpu.describe());
                let mut expected = vec![f32::NAN; rows * outputs];
                // Instructions for bf16 take both factors in it.
                let rounds = dtype == WeightDtype::Bf16 && matches!(cpu.isa(), Isa::Amx | Isa::Avx512Bf16);
                let rounded: Vec<f32> = x.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
                reference::matmul(&mut expected, if rounds { &rounded } else { &x }, &w, inputs, bias);
                let mut actual = vec![f32::NAN; rows * outputs];
                cpu.matmul(&mut actual, &x, &packed, bias);
                // A sum of one element may cancel most of its terms.
                assert_close(&actual, &expected, 4e-6, &name);

                let residual = numbers.vector(rows * outputs);
                let mut sum = residual.clone();
                cpu.matmul_add(&mut sum, &x, &packed, bias);
                reference::add(&mut actual, &residual);
                assert_same_bits(&sum, &actual, &format!("{name}, added"));
            }
        }
    }
}

/// Sums of whole numbers and the same roundings after them: every instruction set gives the reference's bits.
#[test]
fn quantized_matmul() {
    #[rustfmt::skip]
    let rows = [
        // rows, inputs, outputs
        (   1,      1,       1),
        (   1,    300,       7),
        (   1,   1024,      80),
        (   2,     33,      40),
        (   3,    300,      65),
        (   4,    128,      16),
        (   5,     17,      15),
        (   7,    100,      33),
        (  11,    130,      50),
        (  13,     65,     128),
        (  16,    600,      90),
        ( 100,    256,      48),
        ( 115,     31,     300),
        ( 270,     31,     130),
    ];
    let mut numbers = Numbers::new(9);
    for (rows, inputs, outputs) in rows {
        let values = numbers.vector(outputs * inputs);
        let w = reference::widen_matrix(source(&stored(&values, WeightDtype::Bf16), WeightDtype::Bf16));
        let (x, bias) = (numbers.vector(rows * inputs), numbers.vector(outputs));
        for quantization in QUANTIZATIONS {
            let matrix = packed(2, outputs, inputs, &values, WeightFormat::Quantized(quantization));
            for bias in [None, Some(&*bias)] {
                let mut expected = vec![f32::NAN; rows * outputs];
                reference::matmul_quantized(&mut expected, &x, &w, inputs, quantization, bias);
                for cpu in cpus(THREADS) {
                    let name = format!("{rows}x{inputs}x{outputs} {quantization} on {}", cpu.describe());
                    let mut actual = vec![f32::NAN; rows * outputs];
                    cpu.matmul(&mut actual, &x, &matrix, bias);
                    assert_agrees(&actual, &expected, quantization, &name);
                    cpu.matmul_add(&mut actual, &x, &matrix, bias);
                    let doubled: Vec<f32> = expected.iter().map(|x| x + x).collect();
                    assert_agrees(&actual, &doubled, quantization, &format!("{name}, added"));
                }
            }
        }
    }
}

/// Sums of whole numbers have equal bits; those of fp8 are rounded, in an order that instructions choose.
fn assert_agrees(actual: &[f32], expected: &[f32], quantization: Quantization, name: &str) {
    match quantization {
        Quantization::Fp8 => assert_close(actual, expected, 2e-6, name),
        Quantization::Int8 | Quantization::Int4 { .. } => assert_same_bits(actual, expected, name),
    }
}

/// Every code as a weight, times numbers that fp8 has: products and sums are whole, so that nothing is rounded anywhere.
#[test]
fn every_code_is_multiplied_as_the_number_that_it_is() {
    let (inputs, outputs) = (70, 256);
    // A code in one place of each row, which moves: units and halves of units all have their turn.
    let matrix = PackedMatrix::of_steps_on(1, outputs, inputs, Quantization::Fp8, &|row, codes, scales| {
        codes.fill(0);
        codes[row % inputs] = (row as u8).cast_signed();
        scales.fill(0.5);
    });
    for rows in [1, 5, 13] {
        let x = vec![-448.0; rows * inputs];
        for cpu in cpus(1) {
            let mut actual = vec![f32::NAN; rows * outputs];
            cpu.matmul(&mut actual, &x, &matrix, None);
            for (output, found) in actual.iter().enumerate() {
                let expected = -224.0 * reference::e4m3_to_f32((output % outputs) as u8);
                let is_same = *found == expected || found.is_nan() && expected.is_nan();
                assert!(is_same, "{:#x}: {found}, not {expected}, on {}", output % outputs, cpu.describe());
            }
        }
    }
}

/// Products of one `x` with several matrices, of one format and of several, are those with each of them.
#[test]
fn matmul_each() {
    let mut numbers = Numbers::new(12);
    let inputs = 70;
    for rows in [1, 3, 40] {
        let x = numbers.vector(rows * inputs);
        let stored = |dtype| WeightFormat::Stored(dtype);
        let int8 = WeightFormat::Quantized(Quantization::Int8);
        for formats in [
            [int8; 3],
            [WeightFormat::Quantized(Quantization::Fp8); 3],
            [stored(WeightDtype::F32); 3],
            [stored(WeightDtype::Bf16), int8, int8],
            [stored(WeightDtype::Bf16), stored(WeightDtype::F16), stored(WeightDtype::Bf16)],
        ] {
            let outputs = [100, 7, 33];
            let bias = numbers.vector(outputs[1]);
            let matrices: Vec<PackedMatrix> = formats
                .iter()
                .zip(outputs)
                .map(|(&format, outputs)| {
                    packed(1, outputs, inputs, &numbers.vector(outputs * inputs), format)
                })
                .collect();
            for cpu in cpus(THREADS) {
                let [mut a, mut b, mut c] = outputs.map(|outputs| vec![f32::NAN; rows * outputs]);
                cpu.matmul_each(
                    &x,
                    [
                        Projection { out: &mut a, w: &matrices[0], bias: None },
                        Projection { out: &mut b, w: &matrices[1], bias: Some(&bias) },
                        Projection { out: &mut c, w: &matrices[2], bias: None },
                    ],
                );
                for (index, actual) in [a, b, c].into_iter().enumerate() {
                    let mut expected = vec![f32::NAN; rows * outputs[index]];
                    let bias = if index == 1 { Some(&*bias) } else { None };
                    cpu.matmul(&mut expected, &x, &matrices[index], bias);
                    let name = format!("{rows} rows, {:?} on {}", formats[index], cpu.describe());
                    assert_same_bits(&actual, &expected, &name);
                }
            }
        }
    }
}

/// Instructions that add products of bytes in 16 bits must not reach their end.
#[test]
fn the_greatest_steps_do_not_saturate() {
    let (rows, inputs, outputs) = (5, 4096, 17);
    for (x_sign, w_sign) in [(1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0)] {
        let (x, w) = (vec![x_sign; rows * inputs], vec![w_sign; outputs * inputs]);
        for quantization in QUANTIZATIONS {
            let matrix = packed(1, outputs, inputs, &w, WeightFormat::Quantized(quantization));
            let mut expected = vec![f32::NAN; rows * outputs];
            reference::matmul_quantized(&mut expected, &x, &w, inputs, quantization, None);
            assert_close(&expected, &vec![x_sign * w_sign * 4096.0; rows * outputs], 1e-6, "the reference");
            for cpu in cpus(1) {
                let mut actual = vec![f32::NAN; rows * outputs];
                cpu.matmul(&mut actual, &x, &matrix, None);
                let name = format!("{x_sign} times {w_sign}, {quantization} on {}", cpu.describe());
                // Of fp8, too: sums are whole numbers.
                assert_same_bits(&actual, &expected, &name);
            }
        }
    }
}

/// Weights that come quantised may have the step -128, which none that is quantised here has.
#[test]
fn the_least_step_is_multiplied_as_others_are() {
    let (rows, inputs, outputs) = (5, 4096, 17);
    let step = |row: usize, input: usize| if (row + input).is_multiple_of(3) { -128i8 } else { 127 };
    let matrix = PackedMatrix::of_steps_on(1, outputs, inputs, Quantization::Int8, &|row, steps, scales| {
        steps.iter_mut().enumerate().for_each(|(input, out)| *out = step(row, input));
        scales.fill(0.5);
    });
    for sign in [1.0, -1.0] {
        let x = vec![sign; rows * inputs];
        let sum = |row: usize| (0..inputs).map(|input| 127 * i32::from(step(row, input))).sum::<i32>();
        let output = |row: usize| sign * sum(row) as f32 * 0.5 * (1.0 / 127.0);
        let expected: Vec<f32> = (0..rows).flat_map(|_| (0..outputs).map(output)).collect();
        for cpu in cpus(1) {
            let mut actual = vec![f32::NAN; rows * outputs];
            cpu.matmul(&mut actual, &x, &matrix, None);
            assert_same_bits(&actual, &expected, &format!("{sign} on {}", cpu.describe()));
        }
    }
}

/// How much of the product of random numbers quantisation keeps: a bound for each kind.
#[test]
fn quantized_products_are_near_those_of_f32() {
    let (rows, inputs, outputs) = (20, 2048, 64);
    let mut numbers = Numbers::new(10);
    let (x, w) = (numbers.vector(rows * inputs), numbers.vector(outputs * inputs));
    let mut exact = vec![f32::NAN; rows * outputs];
    reference::matmul(&mut exact, &x, &w, inputs, None);
    let bounds = [0.9999, 0.999, 0.997, 0.997, 0.996];
    for (quantization, bound) in QUANTIZATIONS.into_iter().zip(bounds) {
        let mut rounded = vec![f32::NAN; rows * outputs];
        reference::matmul_quantized(&mut rounded, &x, &w, inputs, quantization, None);
        let dot =
            |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let cosine = dot(&exact, &rounded) / (dot(&exact, &exact) * dot(&rounded, &rounded)).sqrt();
        assert!(bound < cosine && cosine < 1.0, "{quantization}: cosine {cosine}");
    }
}

#[test]
fn rows_of_quantized_matrices() {
    let mut numbers = Numbers::new(11);
    for (rows, width) in [(1, 1), (7, 5), (16, 64), (33, 300)] {
        let values = numbers.vector(rows * width);
        let exact = reference::widen_matrix(source(&stored(&values, WeightDtype::Bf16), WeightDtype::Bf16));
        for quantization in QUANTIZATIONS {
            let matrix = packed(1, rows, width, &values, WeightFormat::Quantized(quantization));
            for (index, exact) in exact.chunks_exact(width).enumerate() {
                let expected: Vec<f32> = match quantization {
                    Quantization::Int8 => {
                        let mut steps = vec![0; width];
                        let scale = reference::quantize_int8(exact, &mut steps);
                        steps.iter().map(|&step| scale * f32::from(step)).collect()
                    }
                    Quantization::Fp8 => {
                        let mut codes = vec![0; width];
                        let scale = reference::quantize_e4m3(exact, &mut codes);
                        codes.iter().map(|&code| scale * reference::e4m3_to_f32(code)).collect()
                    }
                    Quantization::Int4 { group } => exact
                        .chunks(group)
                        .flat_map(|exact| {
                            let mut steps = vec![0; exact.len()];
                            let scale = reference::quantize_int4(exact, &mut steps).to_f32();
                            steps.into_iter().map(move |step| scale * f32::from(step))
                        })
                        .collect(),
                };
                let mut row = vec![f32::NAN; width];
                matrix.row(index, &mut row);
                assert_same_bits(&row, &expected, &format!("row {index} of {rows}x{width} {quantization}"));
            }
        }
    }
}

#[test]
fn rows_of_packed_and_of_plain_matrices() {
    let mut numbers = Numbers::new(2);
    for (rows, width) in [(1, 1), (7, 5), (16, 8), (33, 300)] {
        for dtype in WEIGHT_DTYPES {
            let bytes = stored(&numbers.vector(rows * width), dtype);
            let expected = reference::widen_matrix(source(&bytes, dtype));
            let packed = PackedMatrix::pack(rows, width, source(&bytes, dtype));
            let plain = Embedding::new(rows, width, source(&bytes, dtype));
            for (index, expected) in expected.chunks_exact(width).enumerate() {
                let mut row = vec![f32::NAN; width];
                packed.row(index, &mut row);
                assert_same_bits(&row, expected, &format!("packed row {index} of {rows}x{width} {dtype:?}"));
                row.fill(f32::NAN);
                plain.row(index, &mut row);
                assert_same_bits(&row, expected, &format!("plain row {index} of {rows}x{width} {dtype:?}"));
            }
        }
    }
}

#[test]
fn rms_norm() {
    let mut numbers = Numbers::new(3);
    for (rows, width) in [(1, 1), (2, 7), (3, 8), (1, 31), (5, 64), (40, 300), (3, 4097)] {
        let (x, weight) = (numbers.vector(rows * width), numbers.vector(width));
        let mut expected = vec![f32::NAN; rows * width];
        reference::rms_norm(&mut expected, &x, &weight, 1e-5);
        for cpu in cpus(THREADS) {
            let name = format!("{rows}x{width} on {}", cpu.describe());
            let mut actual = vec![f32::NAN; rows * width];
            cpu.rms_norm(&mut actual, &x, &weight, 1e-5);
            assert_close(&actual, &expected, 2e-6, &name);
            let mut in_place = x.clone();
            cpu.rms_norm_in_place(&mut in_place, &weight, 1e-5);
            assert_same_bits(&in_place, &actual, &name);
        }
    }
}

#[test]
fn element_by_element() {
    let mut numbers = Numbers::new(4);
    for len in [0, 1, 7, 8, 9, 300, 20_001] {
        let gate: Vec<f32> = numbers.vector(len).iter().map(|x| 20.0 * x).collect();
        let up = numbers.vector(len);
        let mut silu = vec![f32::NAN; len];
        reference::silu_mul(&mut silu, &gate, &up);
        let mut sum = gate.clone();
        reference::add(&mut sum, &up);
        for cpu in cpus(THREADS) {
            let name = format!("{len} on {}", cpu.describe());
            let mut actual = vec![f32::NAN; len];
            cpu.silu_mul(&mut actual, &gate, &up);
            for ((actual, expected), gate) in actual.iter().zip(&silu).zip(&gate) {
                assert!(
                    (actual - expected).abs() <= 1e-6 * expected.abs(),
                    "{name}: silu({gate}) is {actual}"
                );
            }
            let mut actual = gate.clone();
            cpu.add(&mut actual, &up);
            assert_same_bits(&actual, &sum, &name);
        }
    }
}

#[test]
fn rope() {
    let mut numbers = Numbers::new(5);
    for (tokens, heads, head_size, half) in [(1, 1, 2, 1), (3, 2, 16, 8), (40, 5, 80, 40), (7, 3, 24, 6)] {
        let frequencies: Vec<f32> =
            (0..half).map(|pair| 10_000f32.powf(-(pair as f32) / half as f32)).collect();
        let (cos, sin) = reference::rope_table(&frequencies, 500, 1.0);
        let table = RopeTable { cos: &cos, sin: &sin, half };
        let positions: Vec<u32> = (0..tokens).map(|_| (numbers.bits() % 500) as u32).collect();
        let x = numbers.vector(tokens * heads * head_size);
        let mut expected = x.clone();
        reference::rope(&mut expected, &positions, table, head_size);
        for cpu in cpus(THREADS) {
            let mut actual = x.clone();
            cpu.rope(&mut actual, &positions, table, head_size);
            assert_same_bits(
                &actual,
                &expected,
                &format!("{tokens}x{heads}x{head_size} on {}", cpu.describe()),
            );
        }
    }
}

#[test]
fn log_softmax() {
    let mut numbers = Numbers::new(6);
    for len in [1, 7, 8, 300, 32_001] {
        let logits: Vec<f32> = numbers.vector(len).iter().map(|x| 30.0 * x).collect();
        let mut expected = logits.clone();
        reference::log_softmax(&mut expected);
        for cpu in cpus(1) {
            let mut actual = logits.clone();
            cpu.log_softmax(&mut actual);
            assert_close(&actual, &expected, 3e-7, &format!("{len} on {}", cpu.describe()));
        }
    }
}

/// Values whose conversion is delicate: ties, subnormals, the ends of each range, and what is no number.
fn delicate() -> Vec<f32> {
    let mut values =
        vec![0.0, -0.0, 1.0, 65504.0, 65519.9, 65520.0, 1e-8, 6e-8, -6.1e-5, 3.4e38, 1e-40, f32::NAN];
    values.extend([f32::INFINITY, f32::NEG_INFINITY]);
    for bits in [0x3f80_8000u32, 0x3f81_8000, 0x3f80_7fff, 0x3f80_8001, 0x7f7f_8000, 0x3f80_1000, 0x3f80_3000]
    {
        values.push(f32::from_bits(bits));
    }
    values
}

#[test]
fn write_kv() {
    let mut numbers = Numbers::new(7);
    for dtype in KV_DTYPES {
        for (heads, head_size, order) in
            [(2, 16, Order::TokenHead), (3, 21, Order::HeadToken), (1, 80, Order::TokenHead)]
        {
            let shape = shape(dtype, 2, 16, heads, head_size, order);
            let row = heads * head_size;
            let (mut k, v) = (numbers.vector(40 * row), numbers.vector(40 * row));
            if !dtype.has_scales() {
                k[..21].copy_from_slice(&delicate());
            }
            k[30 * row..31 * row].fill(0.0);
            for cpu in cpus(THREADS) {
                let (expected, actual) = (Blocks::new(shape, 64), Blocks::new(shape, 64));
                let sequences = |blocks| {
                    [(1, 20, 5), (21, 19, 44)].map(|(first_row, rows, first_position)| SequenceRows {
                        first_row,
                        rows,
                        first_position,
                        blocks,
                    })
                };
                reference::write_kv(&shape, 1, &k, &v, &sequences(&expected.addresses));
                cpu.write_kv(&shape, 1, &k, &v, &sequences(&actual.addresses));
                for block in 0..4 {
                    assert!(actual.bytes(block) == expected.bytes(block), "{shape:?} on {}", cpu.describe());
                }
            }
        }
    }
}

/// Attention over sequences of some lengths, each with some of its last rows in the step.
struct AttentionCase {
    dtype: KvDtype,
    /// Of queries and of K and V.
    heads: (usize, usize),
    head_size: usize,
    block_len: usize,
    window: Option<usize>,
    /// Length and how many of its rows are in the step.
    lengths: Vec<(usize, usize)>,
}

impl AttentionCase {
    /// Fills blocks, and compares every instruction set with the reference.
    fn check(&self) {
        let mut numbers = Numbers::new(8);
        let Self { dtype, heads: (query_heads, kv_heads), head_size, block_len, .. } = *self;
        let shape = shape(dtype, 2, block_len, kv_heads, head_size, Order::TokenHead);
        let blocks: Vec<Blocks> =
            self.lengths.iter().map(|&(length, _)| Blocks::new(shape, length)).collect();
        for (&(length, _), blocks) in self.lengths.iter().zip(&blocks) {
            let [k, v] = [0, 1].map(|_| numbers.vector(length * kv_heads * head_size));
            let all =
                SequenceRows { first_row: 0, rows: length, first_position: 0, blocks: &blocks.addresses };
            reference::write_kv(&shape, 1, &k, &v, &[all]);
        }
        let mut end = 0;
        let sequences: Vec<SequenceRows<'_>> = self
            .lengths
            .iter()
            .zip(&blocks)
            .map(|(&(length, rows), blocks)| {
                end += rows;
                let (first_row, first_position) = (end - rows, length - rows);
                SequenceRows { first_row, rows, first_position, blocks: &blocks.addresses }
            })
            .collect();
        let q: Vec<f32> = numbers.vector(end * query_heads * head_size).iter().map(|x| 4.0 * x).collect();
        let scale = (head_size as f32).sqrt().recip();
        let params = AttentionParams { query_heads, scale, sliding_window: self.window };
        let mut expected = vec![f32::NAN; q.len()];
        reference::attention(&mut expected, &q, &shape, 1, &sequences, params);
        for cpu in cpus(THREADS) {
            // Instructions for bf16 take queries and weights of softmax as two bf16: all but their last seven bits.
            let is_split = matches!(dtype, KvDtype::Bf16 | KvDtype::Int8 | KvDtype::Fp8)
                && matches!(cpu.isa(), Isa::Amx | Isa::Avx512Bf16);
            let tolerance = if is_split { 2e-5 } else { 2e-6 };
            let mut actual = vec![f32::NAN; q.len()];
            cpu.attention(&mut actual, &q, &shape, 1, &sequences, params);
            let name = format!(
                "{dtype:?} {:?} heads of {head_size}, blocks of {block_len}, window {:?} on {}",
                self.heads,
                self.window,
                cpu.describe()
            );
            assert_close(&actual, &expected, tolerance, &name);
        }
    }
}

#[test]
fn attention() {
    for dtype in KV_DTYPES {
        #[rustfmt::skip]
        let rows = [
            // heads, head size, blocks, window
            ((1, 1),       1,     16,    None),
            ((2, 2),      16,      4,    None),
            ((4, 2),      21,     16,    Some(1)),
            ((3, 1),      32,      1,    Some(5)),
            ((6, 2),      40,     64,    None),
            ((6, 1),      64,     16,    Some(50)),
            ((8, 2),      64,     32,    None),
            ((7, 1),      80,     16,    None),
            ((3, 3),      96,     16,    Some(16)),
            ((6, 2),     128,     16,    Some(64)),
            ((8, 1),     128,    128,    None),
            ((4, 2),     256,     16,    None),
            ((64, 1),      8,     16,    Some(1000)),
        ];
        for (heads, head_size, block_len, window) in rows {
            // A whole prompt, one decode, a chunk, a single token, a whole block, and the first token of the next one.
            let lengths = vec![(70, 70), (200, 1), (130, 9), (1, 1), (16, 16), (17, 1)];
            AttentionCase { dtype, heads, head_size, block_len, window, lengths }.check();
        }
    }
}

/// Contexts that are longer than what is summed up in one piece: at its ends, and with so few heads that threads share
/// one sequence.
#[test]
fn attention_over_long_contexts() {
    for dtype in KV_DTYPES {
        for (heads, window) in [((2, 1), None), ((8, 2), None), ((2, 1), Some(700))] {
            for length in [512, 513, 1300] {
                let lengths = vec![(length, 1)];
                AttentionCase { dtype, heads, head_size: 64, block_len: 16, window, lengths }.check();
            }
            let lengths = vec![(1100, 30), (3, 1), (520, 9), (1025, 1)];
            AttentionCase { dtype, heads, head_size: 32, block_len: 16, window, lengths }.check();
        }
    }
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    let cpu = cpus(1).next().unwrap();
    let w = PackedMatrix::pack(2, 3, source(&stored(&[0.0; 6], WeightDtype::F32), WeightDtype::F32));
    let shape = shape(KvDtype::F32, 1, 4, 1, 8, Order::TokenHead);
    let blocks = Blocks::new(shape, 4);
    let too_long = SequenceRows { first_row: 0, rows: 5, first_position: 0, blocks: &blocks.addresses };
    let params = AttentionParams { query_heads: 1, scale: 1.0, sliding_window: None };
    type Call<'a> = Box<dyn Fn() + 'a>;
    let rows: [(&str, Call<'_>); 6] = [
        ("x is not whole rows", Box::new(|| cpu.matmul(&mut [0.0; 2], &[0.0; 4], &w, None))),
        ("out has too few rows", Box::new(|| cpu.matmul(&mut [0.0; 2], &[0.0; 6], &w, None))),
        ("bias is too short", Box::new(|| cpu.matmul(&mut [0.0; 2], &[0.0; 3], &w, Some(&[0.0])))),
        ("weight is longer than a row", Box::new(|| cpu.rms_norm_in_place(&mut [0.0; 4], &[0.0; 3], 0.0))),
        (
            "rows go on after the blocks",
            Box::new(|| {
                cpu.write_kv(&shape, 0, &[0.0; 40], &[0.0; 40], &[too_long]);
            }),
        ),
        (
            "two sequences share a row",
            Box::new(|| {
                let one = SequenceRows { rows: 1, ..too_long };
                cpu.attention(&mut [0.0; 16], &[0.0; 16], &shape, 0, &[one, one], params);
            }),
        ),
    ];
    for (name, call) in rows {
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)).is_err(), "{name}");
    }
}
