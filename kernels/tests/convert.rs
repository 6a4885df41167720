//! Blocks of one layout into another, against an oracle that looks at single elements.

mod support;

use proptest::prelude::*;
use support::{Blocks, ISAS, KV_DTYPES, Numbers, Order, cpu, shape};
use tidemill_kernels::{
    kv::{BlockAddress, KvBlockShape, KvDtype},
    reference,
    step::{SequenceRows, TokenSpan},
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
    (side(), side(), 1..=3usize, 1..=4usize, 1..=40usize, 1..=100usize, any::<u64>()).prop_map(
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
    let scale = row.iter().fold(0.0f32, |max, x| max.max(x.abs())) / 127.0;
    row.iter()
        .map(|&x| match to {
            KvDtype::F32 => x,
            KvDtype::F16 => half::f16::from_f32(x).to_f32(),
            KvDtype::Bf16 => half::bf16::from_f32(x).to_f32(),
            KvDtype::Int8 if scale == 0.0 => 0.0,
            KvDtype::Int8 => scale * (x / scale).round_ties_even(),
        })
        .collect()
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
                    cpu.convert_block(&mut image, &to, layers.clone(), span);
                    let mut plain = vec![0x55; image.len()];
                    reference::convert_block(&mut plain, &to, layers.clone(), span);
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
        let convert = |from: &KvBlockShape, source: &Blocks, to: KvBlockShape| {
            let target = Blocks::new(to, tokens);
            for (index, &block) in target.addresses.iter().enumerate() {
                let first = index * to.block_len;
                let count = to.block_len.min(tokens - first);
                let span = TokenSpan { shape: from, blocks: &source.addresses, first, count };
                // SAFETY: the bytes of one block, which belongs to `target`.
                let image = unsafe { std::slice::from_raw_parts_mut(block.as_ptr(), to.block_bytes()) };
                cpu.convert_block(image, &to, 0..to.layers, span);
            }
            target
        };
        let there = convert(&from, &source, to);
        let back = convert(&to, &there, from);
        // What the source never wrote came back as zeros: compare what a clean source would hold.
        let clean = convert(&from, &source, from);
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
