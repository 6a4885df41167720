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
    kv::KvBlockShape,
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
