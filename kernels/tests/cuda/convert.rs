//! Blocks of one shape into blocks of another.

use super::{
    on_devices,
    support::{
        Blocks, KV_DTYPES, Numbers, Order,
        cuda::{Buffer, DeviceBlocks},
        shape,
    },
};
use tidemill_kernels::{
    cuda::{ConvertBlocks, Driver, KvShape, ZeroTail, launches},
    kv::{KvBlockShape, KvDtype},
    reference,
    step::{HeadSpan, SequenceRows, TokenSpan},
};

/// A sequence in blocks, all layers and rows written.
fn sequence(shape: KvBlockShape, tokens: usize) -> Blocks {
    let (blocks, mut numbers) = (Blocks::new(shape, tokens), Numbers::new(50));
    let elements = tokens * shape.kv_heads * shape.head_size;
    for layer in 0..shape.layers {
        let rows = SequenceRows { first_row: 0, rows: tokens, first_position: 0, blocks: &blocks.addresses };
        reference::write_kv(&shape, layer, &numbers.vector(elements), &numbers.vector(elements), &[rows]);
    }
    blocks
}

#[test]
fn blocks_of_every_type() {
    on_devices(|device| {
        for (from, to) in KV_DTYPES.into_iter().flat_map(|from| KV_DTYPES.map(|to| (from, to))) {
            for (lengths, heads, head_size, orders) in [
                ((16, 16), HeadSpan { from: 0, to: 0, count: 2 }, 16, [Order::TokenHead; 2]),
                ((4, 32), HeadSpan { from: 1, to: 0, count: 1 }, 80, [Order::TokenHead, Order::HeadToken]),
                ((32, 8), HeadSpan { from: 0, to: 2, count: 1 }, 21, [Order::HeadToken, Order::TokenHead]),
            ] {
                let source = shape(from, 3, lengths.0, 2, head_size, orders[0]);
                let target = shape(to, 3, lengths.1, 3, head_size, orders[1]);
                check(device, &source, &target, heads);
            }
        }
    });
}

fn check(device: &dyn Driver, source: &KvBlockShape, target: &KvBlockShape, heads: HeadSpan) {
    // Tokens 8 to 45 of 45, layers 1 and 2 of 3, in a slab of blocks that is zero where nothing is written.
    let (first, tokens, layers) = (8, 45, 1..3);
    let blocks = sequence(*source, tokens);
    let first_block = first / target.block_len;
    let slab = KvBlockShape { layers: layers.len(), ..*target };
    let count = tokens.div_ceil(target.block_len) - first_block;

    let from = DeviceBlocks::copy_of(device, *source, &blocks);
    let to = DeviceBlocks::new(device, slab, count);
    to.fill(0);
    let parameters = ConvertBlocks {
        from: from.table(),
        to: to.table(),
        from_shape: KvShape::new(source),
        to_shape: KvShape::new(&slab),
        first_token: first as u32,
        tokens: (tokens - first) as u32,
        first_layer: 1,
        to_first_layer: 0,
        layers: 2,
        first_head: heads.from as u32,
        to_first_head: heads.to as u32,
        heads: heads.count as u32,
    };
    device.launch(&launches::convert_blocks(&parameters)).expect("kernels run");

    for block in 0..count {
        let begin = ((first_block + block) * target.block_len).max(first);
        let end = ((first_block + block + 1) * target.block_len).min(tokens);
        let mut expected = vec![0; slab.block_bytes()];
        let span = TokenSpan { shape: source, blocks: &blocks.addresses, first: begin, count: end - begin };
        reference::convert_heads(&mut expected, target, layers.clone(), span, heads);
        assert!(to.bytes(block) == expected, "block {block} from {source:?} to {target:?}, {heads:?}");
    }
}

/// All codes of E4M3 on their way to f32, and numbers of every sign and exponent on theirs to E4M3.
#[test]
fn every_number_of_eight_bits() {
    on_devices(|device| {
        let (codes, width) = (shape(KvDtype::Fp8, 1, 1, 1, 256, Order::TokenHead), 256);
        let floats = shape(KvDtype::F32, 1, 1, 1, 256, Order::TokenHead);
        let source = Blocks::new(codes, 1);
        let all: Vec<u8> = (0..=255).collect();
        // SAFETY: the elements and scales of one block that nobody else looks at.
        let bytes =
            unsafe { std::slice::from_raw_parts_mut(source.addresses[0].as_ptr(), codes.block_bytes()) };
        bytes.fill(0);
        bytes[..width].copy_from_slice(&all);
        bytes[width..2 * width].copy_from_slice(&all);
        for offset in [codes.key_scale_offset, codes.value_scale_offset] {
            bytes[offset..offset + 4].copy_from_slice(&1f32.to_ne_bytes());
        }
        let found = converted(device, &source, codes, floats, 1);
        for code in 0..=255_u8 {
            let value =
                f32::from_ne_bytes(found[0][4 * usize::from(code)..][..4].try_into().expect("four bytes"));
            let expected = reference::e4m3_to_f32(code);
            assert!(
                value.to_bits() == expected.to_bits() || value.is_nan() && expected.is_nan(),
                "{code:#x}: {value}"
            );
        }

        // Each row has the greatest number, so that its scale is one, and what is beyond it, too: rows of infinities are apart.
        let edges = (0..=u32::MAX >> 19).flat_map(|top| {
            [(top << 18).wrapping_sub(1), top << 18, (top << 18) + 1, (top << 18) + 0x1_2345]
        });
        let numbers = edges.map(f32::from_bits).filter(|it| it.abs() <= 448.0 || it.is_nan());
        let mut values: Vec<f32> = numbers.flat_map(|it| [it, -it]).collect();
        values.resize(values.len().next_multiple_of(width - 1), 0.0);
        let rows: Vec<f32> = values.chunks(width - 1).flat_map(|row| [row, &[448.0][..]].concat()).collect();
        let tokens = rows.len() / width;
        let source = Blocks::new(floats, tokens);
        let written =
            SequenceRows { first_row: 0, rows: tokens, first_position: 0, blocks: &source.addresses };
        reference::write_kv(&floats, 0, &rows, &rows, &[written]);
        for (row, found) in rows.chunks(width).zip(converted(device, &source, floats, codes, tokens)) {
            for (&value, &code) in row.iter().zip(&found) {
                assert_eq!(code, reference::f32_to_e4m3(value), "{value:e}, {:#x}", value.to_bits());
            }
        }
        let beyond =
            [f32::INFINITY, f32::MAX, -1e30, f32::NEG_INFINITY, f32::NAN, 2f32.powi(120), -449.0, 0.0];
        let narrow =
            [KvDtype::F32, KvDtype::Fp8].map(|dtype| shape(dtype, 1, 1, 1, beyond.len(), Order::TokenHead));
        let source = Blocks::new(narrow[0], 1);
        let written = SequenceRows { first_row: 0, rows: 1, first_position: 0, blocks: &source.addresses };
        reference::write_kv(&narrow[0], 0, &beyond, &beyond, &[written]);
        let found = converted(device, &source, narrow[0], narrow[1], 1);
        assert_eq!(found[0][..8], [0x7e, 0x78, 0x80, 0xfe, 0x7f, 0x38, 0x80, 0], "what is beyond");
    });
}

/// The bytes of blocks of one token each.
fn converted(
    device: &dyn Driver,
    source: &Blocks,
    from: KvBlockShape,
    to: KvBlockShape,
    tokens: usize,
) -> Vec<Vec<u8>> {
    let blocks = DeviceBlocks::copy_of(device, from, source);
    let target = DeviceBlocks::new(device, to, tokens);
    target.fill(0);
    let parameters = ConvertBlocks {
        from: blocks.table(),
        to: target.table(),
        from_shape: KvShape::new(&from),
        to_shape: KvShape::new(&to),
        first_token: 0,
        tokens: tokens as u32,
        first_layer: 0,
        to_first_layer: 0,
        layers: 1,
        first_head: 0,
        to_first_head: 0,
        heads: 1,
    };
    device.launch(&launches::convert_blocks(&parameters)).expect("kernels run");
    (0..tokens).map(|block| target.bytes(block)).collect()
}

#[test]
fn zero_tail() {
    on_devices(|device| {
        for dtype in KV_DTYPES {
            let shape = shape(dtype, 2, 8, 3, 21, Order::HeadToken);
            let blocks = sequence(shape, 24);
            let on_device = DeviceBlocks::copy_of(device, shape, &blocks);
            let from_token = Buffer::new(device, &[3u32, 8, 0]);
            let parameters = ZeroTail {
                blocks: on_device.table(),
                from_token: from_token.address(),
                shape: KvShape::new(&shape),
                layers: 2,
                reserved: 0,
            };
            device.launch(&launches::zero_tail(3, &parameters)).expect("kernels run");
            for (block, from_token) in [3, 8, 0].into_iter().enumerate() {
                reference::zero_tail(&shape, blocks.addresses[block], from_token);
                assert!(on_device.bytes(block) == blocks.bytes(block), "{dtype:?} block {block}");
            }
        }
    });
}
