//! The reference itself, against values worked out by hand.

mod support;

use support::{Blocks, Order, assert_close, assert_same_bits, shape};
use tidemill_kernels::{
    kv::KvDtype,
    matrix::Quantization,
    reference,
    step::{AttentionParams, RopeTable, SequenceRows, TokenSpan},
};

#[test]
fn matmul_multiplies_by_the_transposed_matrix_and_adds_the_bias() {
    let mut out = [f32::NAN; 4];
    // Two rows, three inputs, two outputs.
    let (x, w) = ([1.0, 2.0, 3.0, 0.5, 0.0, -1.0], [1.0, 0.0, 2.0, 0.0, 10.0, 0.0]);
    reference::matmul(&mut out, &x, &w, 3, Some(&[100.0, 200.0]));
    assert_eq!(out, [107.0, 220.0, 98.5, 200.0]);
}

#[test]
fn quantized_steps_and_their_products() {
    let mut steps = [0; 4];
    let scale = reference::quantize_int8(&[63.5, -63.5, 0.25, 0.75], &mut steps);
    assert_eq!((scale, steps), (0.5, [127, -127, 0, 2]), "halves go to the even neighbour");
    let scale = reference::quantize_int4(&[-2.0, 2.0, 0.3, 0.1], &mut steps);
    assert_eq!((scale.to_f32(), steps), (0.25, [-8, 7, 1, 0]), "the first of the greatest becomes -8");
    let scale = reference::quantize_int4(&[3.0, -4.0, 4.0, 0.0], &mut steps);
    assert_eq!((scale.to_f32(), steps), (0.5, [6, -8, 7, 0]));
    let scale = reference::quantize_int4(&[1.0, 4.0, 0.0, 0.0], &mut steps);
    assert_eq!((scale.to_f32(), steps), (-0.5, [-2, -8, 0, 0]), "scales may be negative");
    assert_eq!(reference::quantize_int4(&[0.0; 4], &mut steps).to_f32(), 0.0);
    assert_eq!(steps, [0; 4]);

    // One row: steps 127 and 64 of scale 1/127; weights: steps 127, -127 of scale 2/127; and 7, -8 of scale 1/4.
    let (x, w) = ([1.0, 0.5], [2.0, -2.0]);
    let mut out = [f32::NAN];
    reference::matmul_quantized(&mut out, &x, &w, 2, Quantization::Int8, Some(&[10.0]));
    let expected = (127.0 * 127.0 - 64.0 * 127.0) * (2.0 / 127.0) / 127.0 + 10.0;
    assert_close(&out, &[expected], 1e-7, "int8");
    reference::matmul_quantized(&mut out, &x, &w, 2, Quantization::Int4 { group: 32 }, None);
    // The greatest is 2, so that the scale is -1/4 and the steps are -8 and 7 (8 is cut).
    assert_close(&out, &[(127.0 * -8.0 + 64.0 * 7.0) * -0.25 / 127.0], 1e-7, "int4");
}

#[test]
fn products_of_eight_bits_of_floating_point() {
    let mut codes = [0; 4];
    let scale = reference::quantize_e4m3(&[896.0, -34.0, 1.0 / 256.0, 0.0], &mut codes);
    assert_eq!((scale, codes), (2.0, [0x7e, 0xd8, 1, 0]), "a tie goes to the even neighbour");
    // One row: 256 and 144, which is nearest to 140, of scale 1/256; weights: 448 and -448 of scale 1/128.
    let (x, w) = ([1.0, 140.0 / 256.0], [3.5, -3.5]);
    let mut out = [f32::NAN];
    reference::matmul_quantized(&mut out, &x, &w, 2, Quantization::Fp8, Some(&[10.0]));
    assert_eq!(out[0], (256.0 * 448.0 - 144.0 * 448.0) / 128.0 / 256.0 + 10.0);
}

#[test]
fn rms_norm_divides_by_the_root_of_the_mean_square() {
    let mut out = [f32::NAN; 4];
    reference::rms_norm(&mut out, &[3.0, -3.0, 6.0, 8.0], &[1.0, 2.0], 0.0);
    let root = 50f32.sqrt();
    assert_close(&out, &[1.0, -2.0, 6.0 / root, 16.0 / root], 1e-7, "rows of two");
    reference::rms_norm(&mut out[..1], &[3.0], &[1.0], 16.0);
    assert_eq!(out[0], 0.6, "eps is under the root");
}

#[test]
fn silu_is_x_times_the_logistic_function() {
    let mut out = [f32::NAN; 5];
    reference::silu_mul(&mut out, &[0.0, 1.0, -1.0, 100.0, -100.0], &[5.0, 1.0, 2.0, 1.0, 1.0]);
    assert_close(&out, &[0.0, 0.731_058_6, -0.537_882_8, 100.0, 0.0], 1e-7, "silu");
}

#[test]
fn rope_turns_pairs_half_a_head_apart() {
    let (cos, sin) = reference::rope_table(&[std::f32::consts::FRAC_PI_2, 0.0], 2, 2.0);
    let table = RopeTable { cos: &cos, sin: &sin, half: 2 };
    let mut x = [1.0, 2.0, 3.0, 4.0, 9.0, 1.0, 2.0, 3.0, 4.0, 9.0];
    reference::rope(&mut x, &[1, 0], table, 5);
    // A quarter turn of (1, 3) and none of (2, 4), both times the factor of 2; the fifth element is not rotated.
    assert_close(&x, &[-6.0, 4.0, 2.0, 8.0, 9.0, 2.0, 4.0, 6.0, 8.0, 9.0], 1e-7, "two tokens");
}

#[test]
fn int8_rows_are_stored_in_units_of_their_greatest_over_127() {
    let shape = shape(KvDtype::Int8, 1, 2, 1, 4, Order::TokenHead);
    let blocks = Blocks::new(shape, 2);
    let rows = SequenceRows { first_row: 0, rows: 2, first_position: 0, blocks: &blocks.addresses };
    // In units of 0.5: 127, -127, 0.5 and 1.5, which go to the even neighbour; then a row of zeros.
    let k = [63.5, -63.5, 0.25, 0.75, 0.0, 0.0, 0.0, 0.0];
    reference::write_kv(&shape, 0, &k, &k, &[rows]);
    assert_eq!(blocks.bytes(0)[..8], [127, 129, 0, 2, 0, 0, 0, 0]);
    let (key, value) = reference::read_kv(&shape, blocks.addresses[0], 0, 0, 0);
    assert_same_bits(&key, &[63.5, -63.5, 0.0, 1.0], "keys");
    assert_same_bits(&value, &key, "values");
}

#[test]
fn fp8_rows_are_stored_in_a_power_of_two() {
    let shape = shape(KvDtype::Fp8, 1, 3, 1, 4, Order::TokenHead);
    let blocks = Blocks::new(shape, 3);
    let rows = SequenceRows { first_row: 0, rows: 3, first_position: 0, blocks: &blocks.addresses };
    // In units of 1: the greatest, a tie between 16 and 18, the least number and half of it. What
    // rounds to more than the greatest takes twice the unit. A row of zeros.
    let k = [448.0, -17.0, 1.0 / 512.0, 1.0 / 1024.0, 464.5, 1.0, -2.0, 3.0, 0.0, 0.0, 0.0, 0.0];
    reference::write_kv(&shape, 0, &k, &k, &[rows]);
    assert_eq!(blocks.bytes(0)[..12], [0x7e, 0xd8, 1, 0, 0x77, 0x30, 0xb8, 0x3c, 0, 0, 0, 0]);
    let expected = [[448.0, -16.0, 1.0 / 512.0, 0.0], [480.0, 1.0, -2.0, 3.0], [0.0; 4]];
    for (token, expected) in expected.iter().enumerate() {
        let (key, value) = reference::read_kv(&shape, blocks.addresses[0], 0, token, 0);
        assert_same_bits(&key, expected, "keys");
        assert_same_bits(&value, &key, "values");
    }
}

#[test]
fn attention_weighs_values_by_the_softmax_of_scores() {
    let shape = shape(KvDtype::F32, 1, 2, 1, 2, Order::TokenHead);
    let blocks = Blocks::new(shape, 4);
    let rows = SequenceRows { first_row: 0, rows: 3, first_position: 0, blocks: &blocks.addresses };
    let k = [1.0, 0.0, 0.0, 1.0, 3f32.ln(), 0.0];
    let v = [1.0, 10.0, 2.0, 20.0, 4.0, 40.0];
    reference::write_kv(&shape, 0, &k, &v, &[rows]);
    let q = [7.0, 7.0, 0.0, 0.0, 2.0, 0.0];
    let attend = |sliding_window| {
        let mut out = [f32::NAN; 6];
        let params = AttentionParams { query_heads: 1, scale: 0.5, sliding_window };
        reference::attention(&mut out, &q, &shape, 0, &[rows], params);
        out
    };
    // One key; equal scores; scores 1, 0 and ln 3, whose exponentials are e, 1 and 3.
    let e = std::f32::consts::E;
    let last = (e + 2.0 + 12.0) / (e + 4.0);
    assert_close(&attend(None), &[1.0, 10.0, 1.5, 15.0, last, 10.0 * last], 1e-6, "all keys");
    assert_close(&attend(Some(2)), &[1.0, 10.0, 1.5, 15.0, 3.5, 35.0], 1e-6, "the last two keys");
    assert_close(&attend(Some(1)), &v, 1e-6, "its own key");
}

#[test]
fn convert_block_puts_tokens_into_their_slots_and_zeros_elsewhere() {
    let from = shape(KvDtype::F32, 1, 1, 1, 1, Order::TokenHead);
    let to = shape(KvDtype::Bf16, 1, 4, 1, 1, Order::HeadToken);
    let blocks = Blocks::new(from, 7);
    let rows = SequenceRows { first_row: 0, rows: 7, first_position: 0, blocks: &blocks.addresses };
    reference::write_kv(&from, 0, &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[-1.0; 7], &[rows]);
    let mut image = vec![0xff; 64];
    let span = TokenSpan { shape: &from, blocks: &blocks.addresses, first: 5, count: 2 };
    reference::convert_block(&mut image, &to, 0..1, span, 0);
    let halves: Vec<f32> =
        image.as_chunks().0.iter().map(|&bytes| half::bf16::from_le_bytes(bytes).to_f32()).collect();
    assert_eq!(halves[..8], [0.0, 5.0, 6.0, 0.0, 0.0, -1.0, -1.0, 0.0]);
    assert!(image[16..].iter().all(|&byte| byte == 0), "padding is zero");
}

#[test]
fn sampling_helpers() {
    let mut logits = [0.0, 3f32.ln(), f32::NEG_INFINITY];
    reference::log_softmax(&mut logits);
    assert_close(&logits[..2], &[0.25f32.ln(), 0.75f32.ln()], 1e-7, "probabilities of 1/4 and 3/4");
    assert_eq!(logits[2], f32::NEG_INFINITY, "what cannot be chosen stays so");
    let rows: [(&str, &[f32], Option<usize>); 5] = [
        ("the greatest", &[1.0, 3.0, 2.0], Some(1)),
        ("the first of equals", &[1.0, 3.0, 3.0], Some(1)),
        ("never NaN", &[f32::NAN, f32::NEG_INFINITY, f32::NAN], Some(1)),
        ("nothing of nothing", &[], None),
        ("nothing of NaN", &[f32::NAN], None),
    ];
    for (name, values, expected) in rows {
        assert_eq!(reference::argmax(values), expected, "{name}");
    }
}
