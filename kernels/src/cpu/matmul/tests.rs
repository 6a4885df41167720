//! Products by the model of AMX: what the machine would compute, here too.

use super::{Memory, Product, Store, multiply};
use crate::{
    cpu::{level::Level, pool::Pool, shared_out::SharedOut},
    matrix::{MatrixSource, PackedMatrix, Quantization, WeightDtype},
    reference,
};
use half::bf16;

/// Numbers between -1 and 1 that look random.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    })
    .take(count)
    .collect()
}

fn product(x: &[f32], w: &PackedMatrix, bias: &[f32], threads: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; x.len() / w.inputs() * w.outputs()];
    let mut pool = Pool::new(threads, &[]).unwrap();
    let mut memory = Memory::new();
    let product = Product { w, bias: Some(bias), store: Store::Replace, out: SharedOut::new(&mut out) };
    multiply(x, &[product], Level::AmxModel, &mut pool, &mut memory);
    out
}

#[test]
fn tiles_compute_what_the_reference_says_whatever_the_batch() {
    #[rustfmt::skip]
    let rows = [
        // rows, inputs, outputs
        (   1,      1,       1),
        (   1,    300,      40),
        (   3,     64,      16),
        (  16,     33,      33),
        (  17,    129,      65),
        (  40,    100,      48),
        ( 100,     65,      17),
    ];
    for (rows, inputs, outputs) in rows {
        let (x, bias) = (numbers(rows * inputs, 1), numbers(outputs, 2));
        let bytes: Vec<u8> =
            numbers(outputs * inputs, 3).iter().flat_map(|w| bf16::from_f32(*w).to_le_bytes()).collect();
        let source = MatrixSource { bytes: &bytes, dtype: WeightDtype::Bf16 };
        let wide = reference::widen_matrix(source);
        let name = format!("{rows}x{inputs}x{outputs}");
        let mut expected = vec![f32::NAN; rows * outputs];

        let int8 = PackedMatrix::quantize_on(1, outputs, inputs, source, Quantization::Int8);
        reference::matmul_quantized(&mut expected, &x, &wide, inputs, Quantization::Int8, Some(&bias));
        assert_eq!(product(&x, &int8, &bias, 1), expected, "{name}: int8 has the reference's bits");
        assert_eq!(product(&x, &int8, &bias, 3), expected, "{name}: on three threads too");

        let rounded: Vec<f32> = x.iter().map(|x| bf16::from_f32(*x).to_f32()).collect();
        reference::matmul(&mut expected, &rounded, &wide, inputs, Some(&bias));
        let plain = PackedMatrix::pack(outputs, inputs, source);
        let together = product(&x, &plain, &bias, 2);
        for (actual, expected) in together.iter().zip(&expected) {
            assert!((actual - expected).abs() < 1e-5, "{name}: bf16: {actual} is near {expected}");
        }
        for (x, together) in x.chunks_exact(inputs).zip(together.chunks_exact(outputs)) {
            assert_eq!(product(x, &plain, &bias, 1), together, "{name}: each row alone has the same bits");
        }
    }
}

#[test]
fn the_greatest_steps_fit_the_sums_of_tiles() {
    let (inputs, outputs) = (8192, 3);
    let bytes: Vec<u8> = vec![-1.0f32; outputs * inputs].iter().flat_map(|w| w.to_le_bytes()).collect();
    let source = MatrixSource { bytes: &bytes, dtype: WeightDtype::F32 };
    let w = PackedMatrix::quantize_on(1, outputs, inputs, source, Quantization::Int8);
    let out = product(&vec![1.0; inputs], &w, &[0.0; 3], 1);
    assert!(out.iter().all(|out| (out + 8192.0).abs() < 1e-2), "{out:?}");
}
