//! Blocks of one layout into another, against an oracle that looks at single elements.

mod support;

use proptest::prelude::*;
use support::{Blocks, ISAS, KV_DTYPES, Numbers, Order, cpu, shape};
use tidemill_kernels::{
    kv::{BlockAddress, KvBlockShape, KvDtype},
    reference,
    step::{HeadSpan, SequenceRows, TokenSpan},
};

#[derive(Clone, Debug)]
struct Case {
    from: KvBlockShape,
    to: KvBlockShape,
    tokens: usize,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    let order = || prop_oneof![Just(Order::TokenHead), Just(Order::HeadToken)];
    let block_len = || (0..=6u32).prop_map(|power| 1usize << power);
    let side = move || (0..KV_DTYPES.len(), block_len(), order());
    // Any size, and those that have ways of their own.
    let head_size = prop_oneof![4 => 1..=40usize, 1 => Just(64), 1 => Just(128)];
    (side(), side(), 1..=3usize, 1..=4usize, head_size, 1..=100usize, any::<u64>()).prop_map(
        |(from, to, layers, heads, head_size, tokens, seed)| Case {
            from: shape(KV_DTYPES[from.0], layers, from.1, heads, head_size, from.2),
            to: shape(KV_DTYPES[to.0], layers, to.1, heads, head_size, to.2),
            tokens,
            seed,
        },
    )
}

/// A sequence of `tokens` tokens in blocks of `shape`, all layers written.
fn sequence(shape: KvBlockShape, tokens: usize, seed: u64) -> Blocks {
    let blocks = Blocks::new(shape, tokens);
    let mut numbers = Numbers::new(seed);
    let elements = tokens * shape.kv_heads * shape.head_size;
    for layer in 0..shape.layers {
        let rows = SequenceRows { first_row: 0, rows: tokens, first_position: 0, blocks: &blocks.addresses };
        reference::write_kv(&shape, layer, &numbers.vector(elements), &numbers.vector(elements), &[rows]);
    }
    blocks
}

fn read(
    shape: &KvBlockShape,
    blocks: &[BlockAddress],
    layer: usize,
    position: usize,
    head: usize,
) -> [Vec<f32>; 2] {
    let block = blocks[position / shape.block_len];
    reference::read_kv(shape, block, layer, position % shape.block_len, head).into()
}

/// What a row becomes when it is stored as `to`: computed by the scalar conversions of `half` alone.
fn expected_row(from: KvDtype, to: KvDtype, row: &[f32]) -> Vec<f32> {
    if from == to {
        return row.to_vec();
    }
    let greatest = row.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    let (scale, power) = (greatest / 127.0, reference::e4m3_scale(greatest));
    row.iter()
        .map(|&x| match to {
            KvDtype::F32 => x,
            KvDtype::F16 => half::f16::from_f32(x).to_f32(),
            KvDtype::Bf16 => half::bf16::from_f32(x).to_f32(),
            KvDtype::Int8 if scale == 0.0 => 0.0,
            KvDtype::Int8 => scale * (x * (1.0 / scale)).round_ties_even(),
            KvDtype::Fp8 => power * reference::e4m3_to_f32(reference::f32_to_e4m3(x / power)),
        })
        .collect()
}

/// By how much a number can change when it is stored as `dtype` in a row whose greatest number is `greatest`: half a
/// unit in the last place, or half a step of the row's scale.
fn rounding(dtype: KvDtype, x: f32, greatest: f32) -> f32 {
    match dtype {
        KvDtype::F32 => 0.0,
        KvDtype::F16 => (x.abs() * 2f32.powi(-11)).max(2f32.powi(-25)),
        KvDtype::Bf16 => x.abs() * 2f32.powi(-8),
        // The step itself and the way to it are rounded to f32, hence a little more than half.
        KvDtype::Int8 => greatest / 127.0 * 0.5001,
        // A sixteenth of the number, or half a step of the least numbers, whose scale is at most twice the greatest over 448.
        KvDtype::Fp8 => (x.abs() / 16.0).max(greatest / 448.0 * 2.0 / 1024.0),
    }
}

/// Whether every number of one type is one of the other.
fn embeds(from: KvDtype, to: KvDtype) -> bool {
    let to_all_of_e4m3 = from == KvDtype::Fp8 && matches!(to, KvDtype::Bf16 | KvDtype::F32);
    from == to || (to == KvDtype::F32 && from != KvDtype::Int8) || to_all_of_e4m3
}

/// All tokens of a sequence, converted block by block.
fn convert(
    cpu: &tidemill_kernels::cpu::Cpu,
    source: &Blocks,
    from: &KvBlockShape,
    to: KvBlockShape,
    tokens: usize,
) -> Blocks {
    let target = Blocks::new(to, tokens);
    for (index, &block) in target.addresses.iter().enumerate() {
        let first = index * to.block_len;
        let count = to.block_len.min(tokens - first);
        let span = TokenSpan { shape: from, blocks: &source.addresses, first, count };
        cpu.convert_block(image(block, &to), &to, 0..to.layers, span, 0);
    }
    target
}

/// The bytes of a block that one operation at a time is given.
fn image(block: BlockAddress, shape: &KvBlockShape) -> &'static mut [u8] {
    // SAFETY: the bytes of one block of a `Blocks`, which outlives the operation that the slice is made for.
    unsafe { std::slice::from_raw_parts_mut(block.as_ptr(), shape.block_bytes()) }
}

/// Every pair of layouts, there and back: block length, order of axes and type on either side.
#[test]
fn every_pair_of_layouts_there_and_back_is_the_same_within_the_rounding() {
    let (tokens, layers, heads, head_size) = (37, 2, 2, 20);
    let sides: Vec<KvBlockShape> = KV_DTYPES
        .into_iter()
        .flat_map(|dtype| [1, 4, 16, 64].map(|block_len| (dtype, block_len)))
        .flat_map(|(dtype, block_len)| {
            [Order::TokenHead, Order::HeadToken].map(|order| (dtype, block_len, order))
        })
        .map(|(dtype, block_len, order)| shape(dtype, layers, block_len, heads, head_size, order))
        .collect();
    for cpu in support::cpus(1) {
        for from in &sides {
            let source = sequence(*from, tokens, 7);
            for to in &sides {
                let there = convert(&cpu, &source, from, *to, tokens);
                let back = convert(&cpu, &there, to, *from, tokens);
                for (layer, position, head) in places(layers, tokens, heads) {
                    let was = read(from, &source.addresses, layer, position, head);
                    let is = read(from, &back.addresses, layer, position, head);
                    for (was, is) in was.iter().zip(&is) {
                        let greatest = was.iter().fold(0.0f32, |max, x| max.max(x.abs()));
                        for (&was, &is) in was.iter().zip(is) {
                            let bound = if embeds(from.dtype, to.dtype) {
                                0.0
                            } else {
                                let there = rounding(to.dtype, was, greatest);
                                there + rounding(from.dtype, was.abs() + there, greatest + there)
                            };
                            assert!(
                                (was - is).abs() <= bound,
                                "{was} became {is}: {from:?} to {to:?} and back"
                            );
                        }
                    }
                }
            }
        }
    }
}

fn places(layers: usize, tokens: usize, heads: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..layers).flat_map(move |layer| {
        (0..tokens).flat_map(move |position| (0..heads).map(move |head| (layer, position, head)))
    })
}

/// One worker with all heads, two with half of them each, and one again: the bytes of a plain conversion.
#[test]
fn tensor_parallel_workers_split_and_join_heads() {
    let (tokens, layers, head_size) = (41, 2, 12);
    for cpu in support::cpus(1) {
        for dtype in KV_DTYPES {
            for (wide_order, narrow_order) in [Order::TokenHead, Order::HeadToken]
                .into_iter()
                .flat_map(|a| [(a, Order::TokenHead), (a, Order::HeadToken)])
            {
                let wide = shape(dtype, layers, 16, 6, head_size, wide_order);
                let narrow = shape(dtype, layers, 8, 3, head_size, narrow_order);
                let source = sequence(wide, tokens, 5);
                let ranks = [0, 3].map(|first| {
                    let rank = Blocks::new(narrow, tokens);
                    convert_heads(
                        &cpu,
                        (&source, &wide),
                        (&rank, &narrow),
                        tokens,
                        HeadSpan { from: first, to: 0, count: 3 },
                    );
                    rank
                });
                let joined = Blocks::new(wide, tokens);
                for (rank, first) in ranks.iter().zip([0, 3]) {
                    convert_heads(
                        &cpu,
                        (rank, &narrow),
                        (&joined, &wide),
                        tokens,
                        HeadSpan { from: 0, to: first, count: 3 },
                    );
                }
                let plain = convert(&cpu, &source, &wide, wide, tokens);
                for block in 0..plain.addresses.len() {
                    assert!(
                        joined.bytes(block) == plain.bytes(block),
                        "block {block}, {dtype:?}, {wide_order:?}, {narrow_order:?}"
                    );
                }
            }
        }
    }
}

/// Some heads of all tokens; the first call for a block begins with zeros. Held against the reference as it goes.
fn convert_heads(
    cpu: &tidemill_kernels::cpu::Cpu,
    (source, from): (&Blocks, &KvBlockShape),
    (target, to): (&Blocks, &KvBlockShape),
    tokens: usize,
    heads: HeadSpan,
) {
    for (index, &block) in target.addresses.iter().enumerate() {
        let first = index * to.block_len;
        let count = to.block_len.min(tokens - first);
        let span = TokenSpan { shape: from, blocks: &source.addresses, first, count };
        let image = image(block, to);
        if heads.to == 0 {
            image.fill(0);
        }
        let mut plain = image.to_vec();
        reference::convert_heads(&mut plain, to, 0..to.layers, span, heads);
        cpu.convert_heads(image, to, 0..to.layers, span, heads);
        assert!(*image == *plain, "{heads:?} of {from:?} to {to:?}");
        if heads.count == to.kv_heads {
            // All heads of the target: one call fills a block, whatever was in it.
            let mut whole = vec![0xaa; plain.len()];
            cpu.convert_block(&mut whole, to, 0..to.layers, span, heads.from);
            assert!(whole == plain, "a whole block of {heads:?} of {from:?} to {to:?}");
            reference::convert_block(&mut whole, to, 0..to.layers, span, heads.from);
            assert!(whole == plain, "reference: a whole block of {heads:?} of {from:?} to {to:?}");
        }
    }
}

/// Rows that no model makes: the fast way of a type hands them to the slow one.
#[test]
fn odd_numbers_are_stored_as_the_reference_stores_them() {
    let rows: [(&str, [f32; 9]); 7] = [
        ("zeros", [0.0; 9]),
        ("subnormal", [1e-44, -3e-44, 2e-45, 0.0, 1e-40, 0.0, 0.0, 0.0, 0.0]),
        ("a scale that is subnormal", [1e-37, -5e-38, 1e-39, 0.0, 0.0, 0.0, 0.0, 0.0, 1e-38]),
        ("not a number", [f32::NAN, 1.0, -2.0, 3.0, 0.5, 0.25, -0.125, 1e-9, 2.0]),
        ("infinite", [f32::INFINITY, 1.0, f32::NEG_INFINITY, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
        ("the greatest", [f32::MAX, f32::MIN, 1.0, -1.0, 1e38, 0.0, 0.0, 0.0, -1e38]),
        ("ties", [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5]),
    ];
    let froms = [KvDtype::F32, KvDtype::Bf16].map(|dtype| shape(dtype, 1, 1, 1, 9, Order::TokenHead));
    let wide = [KvDtype::F32, KvDtype::Bf16].map(|dtype| shape(dtype, 1, 1, 1, 64, Order::TokenHead));
    for (name, values) in rows {
        for from in froms.iter().chain(&wide) {
            // The odd numbers come last: whoever looks at the first few only misses them.
            let mut row = vec![0.0; from.head_size];
            row[from.head_size - 9..].copy_from_slice(&values);
            for dtype in KV_DTYPES {
                check_row(name, &row, from, dtype);
            }
        }
    }
}

/// One row of `from`, stored as `dtype` by every CPU as the reference stores it.
fn check_row(name: &str, row: &[f32], from: &KvBlockShape, dtype: KvDtype) {
    let source = Blocks::new(*from, 1);
    let rows = SequenceRows { first_row: 0, rows: 1, first_position: 0, blocks: &source.addresses };
    reference::write_kv(from, 0, row, row, &[rows]);
    let to = shape(dtype, 1, 1, 1, from.head_size, Order::TokenHead);
    let span = TokenSpan { shape: from, blocks: &source.addresses, first: 0, count: 1 };
    let mut plain = vec![0; to.block_bytes()];
    reference::convert_block(&mut plain, &to, 0..1, span, 0);
    for cpu in support::cpus(1) {
        let mut image = vec![0; to.block_bytes()];
        cpu.convert_block(&mut image, &to, 0..1, span, 0);
        let (from, cpu) = (from.dtype, cpu.describe());
        assert!(image == plain, "{name} of {from:?} as {dtype:?} on {cpu}: {image:?}, not {plain:?}");
    }
}

/// Rows are converted several at a time; one that needs more care is among them.
#[test]
fn an_odd_row_among_others_is_stored_as_the_reference_stores_it() {
    let (tokens, heads) = (3, 5);
    for (head_size, order) in [(64, Order::TokenHead), (128, Order::TokenHead), (128, Order::HeadToken)] {
        let from = shape(KvDtype::Bf16, 1, 4, heads, head_size, order);
        let to = shape(KvDtype::Int8, 1, 4, heads, head_size, Order::TokenHead);
        for (odd, value) in (0..tokens * heads)
            .flat_map(|odd| [f32::NAN, f32::INFINITY, 1e-40, 0.0].map(|value| (odd, value)))
        {
            let mut rows = Numbers::new(3).vector(tokens * heads * head_size);
            rows[odd * head_size..(odd + 1) * head_size].fill(value);
            let source = Blocks::new(from, tokens);
            let written =
                SequenceRows { first_row: 0, rows: tokens, first_position: 0, blocks: &source.addresses };
            reference::write_kv(&from, 0, &rows, &rows, &[written]);
            let span = TokenSpan { shape: &from, blocks: &source.addresses, first: 0, count: tokens };
            let mut plain = vec![0; to.block_bytes()];
            reference::convert_block(&mut plain, &to, 0..1, span, 0);
            for cpu in support::cpus(1) {
                let mut image = vec![0xaa; to.block_bytes()];
                cpu.convert_block(&mut image, &to, 0..1, span, 0);
                assert!(image == plain, "row {odd} of {value}, {head_size} elements, on {}", cpu.describe());
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    #[test]
    fn every_element_arrives(case in cases()) {
        let Case { from, to, tokens, seed } = case;
        let source = sequence(from, tokens, seed);
        for isa in ISAS {
            let Some(cpu) = cpu(isa, 1) else { continue };
            let target = Blocks::new(to, tokens);
            for (index, &block) in target.addresses.iter().enumerate() {
                let first = index * to.block_len;
                let count = to.block_len.min(tokens - first);
                let span = TokenSpan { shape: &from, blocks: &source.addresses, first, count };
                // Layer groups of one and of the rest, as a push that follows the computation sends them.
                for layers in [0..1, 1..to.layers] {
                    let mut image = vec![0xaa; layers.len() * to.layer_stride];
                    cpu.convert_block(&mut image, &to, layers.clone(), span, 0);
                    let mut plain = vec![0x55; image.len()];
                    reference::convert_block(&mut plain, &to, layers.clone(), span, 0);
                    prop_assert!(image == plain, "{isa} and reference differ in layers {layers:?}");
                    // SAFETY: the bytes of these layers of one block, which belongs to `target`.
                    let bytes = unsafe {
                        std::slice::from_raw_parts_mut(
                            block.as_ptr().wrapping_add(layers.start * to.layer_stride), image.len())
                    };
                    bytes.copy_from_slice(&image);
                }
            }
            for layer in 0..to.layers {
                for position in 0..tokens {
                    for head in 0..to.kv_heads {
                        let was = read(&from, &source.addresses, layer, position, head);
                        let is = read(&to, &target.addresses, layer, position, head);
                        for (was, is) in was.iter().zip(&is) {
                            prop_assert_eq!(&expected_row(from.dtype, to.dtype, was), is);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_lossless_way_there_and_back_is_the_same_bytes(case in cases()) {
        let Case { from, to, tokens, seed } = case;
        let to = shape(
            if from.dtype == KvDtype::Int8 { KvDtype::Int8 } else { KvDtype::F32 },
            to.layers, to.block_len, to.kv_heads, to.head_size, Order::HeadToken,
        );
        let cpu = support::cpus(1).next().unwrap();
        let source = sequence(from, tokens, seed);
        let there = convert(&cpu, &source, &from, to, tokens);
        let back = convert(&cpu, &there, &to, from, tokens);
        // What the source never wrote came back as zeros: compare what a clean source would hold.
        let clean = convert(&cpu, &source, &from, from, tokens);
        for block in 0..back.addresses.len() {
            prop_assert!(back.bytes(block) == clean.bytes(block), "block {}", block);
        }
    }

    #[test]
    fn a_zeroed_tail_leaves_the_head_alone(case in cases(), from_token in 0..64usize) {
        let shape = case.from;
        let from_token = from_token % (shape.block_len + 1);
        let blocks = sequence(shape, shape.block_len, case.seed);
        let kept = sequence(shape, shape.block_len, case.seed);
        let cpu = support::cpus(1).next().unwrap();
        cpu.zero_tail(&shape, blocks.addresses[0], from_token);
        for layer in 0..shape.layers {
            for token in 0..shape.block_len {
                for head in 0..shape.kv_heads {
                    let is = read(&shape, &blocks.addresses, layer, token, head);
                    let was = read(&shape, &kept.addresses, layer, token, head);
                    if token < from_token {
                        prop_assert_eq!(&is, &was);
                    } else {
                        prop_assert!(is.iter().flatten().all(|&x| x == 0.0));
                    }
                }
            }
        }
    }
}
