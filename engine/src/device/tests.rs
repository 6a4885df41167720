//! Blocks go up to several ranks and come down from them, byte for byte.

use std::sync::Arc;

use tidemill_kernels::cuda::Driver;
use tidemill_kernels::cuda::emulator::Order;
use tidemill_kernels::cuda::fake::Fake;
use tidemill_kvtransfer_proto::layout::{AxisOrder, HeadRange, KvDtype, KvLayout};
use tidemill_kvtransfer_proto::units::{BlockCount, BlockId, BlockLen, BlockRef, Epoch};

use super::{LayerRange, Parts};
use crate::memory::{Arena, Asked, DevicePool, RankHeads, block_shape};

const BLOCKS: u32 = 4;
const HEADS: usize = 4;

fn layout(dtype: KvDtype, order: AxisOrder) -> KvLayout {
    KvLayout {
        model: String::new(),
        layers: 3,
        kv_heads: HEADS as u16,
        heads: HeadRange { first: 0, count: HEADS as u16 },
        head_size: 16,
        dtype,
        block_len: BlockLen::new(8).expect("a power of two"),
        order,
    }
}

/// Eight ranks of four heads have each of them twice.
fn pool(fakes: &[Arc<Fake>], layout: &KvLayout) -> DevicePool {
    let ranks = fakes.len();
    let of_rank = |(rank, fake): (usize, &Arc<Fake>)| {
        let (first, count) = (rank * HEADS / ranks, HEADS.div_ceil(ranks));
        let heads = HeadRange { first: first as u16, count: count as u16 };
        let shape = block_shape(&KvLayout { heads, ..layout.clone() });
        let driver = Arc::clone(fake) as Arc<dyn Driver>;
        RankHeads { driver, shape, first, is_read: (rank * HEADS).is_multiple_of(ranks) }
    };
    let ranks: Vec<RankHeads> = fakes.iter().enumerate().map(of_rank).collect();
    let asked = Arc::new(Asked::new(ranks.len() - 1));
    DevicePool::of_ranks(&block_shape(layout), &ranks, BlockCount(BLOCKS), &asked).expect("memory")
}

fn arena(layout: &KvLayout, filled: bool) -> Arena {
    let arena = Arena::new(layout.clone(), BlockCount(BLOCKS)).expect("memory");
    let shape = *arena.shape();
    for block in (0..BLOCKS).filter(|_| filled) {
        arena.write(BlockId(block), 0..shape.block_bytes(), |bytes| {
            // What is behind a layer's rows stays zero.
            let rows = layout.strides().value_scale_offset
                + if shape.dtype.has_scales() { 4 * HEADS * shape.block_len } else { 0 };
            for (index, byte) in bytes.iter_mut().enumerate().filter(|(it, _)| it % shape.layer_stride < rows) {
                *byte = (index as u32 * 31 + block * 7 + index as u32 / 251) as u8;
            }
        });
    }
    arena
}

#[test]
fn what_goes_up_to_ranks_comes_down_again() {
    for (ranks, dtype, order) in [
        (2, KvDtype::Bf16, AxisOrder::TokenHead),
        (2, KvDtype::Int8, AxisOrder::HeadToken),
        (4, KvDtype::Fp8, AxisOrder::TokenHead),
        (8, KvDtype::F32, AxisOrder::HeadToken),
    ] {
        let row = format!("{ranks} ranks, {dtype:?}, {order:?}");
        let layout = layout(dtype, order);
        let fakes: Vec<_> = (0..ranks).map(|_| Arc::new(Fake::new(Order::Forwards))).collect();
        let mut pool = pool(&fakes, &layout);
        let full = arena(&layout, true);
        let all: Vec<BlockRef> = (0..BLOCKS).map(|it| BlockRef { block: BlockId(it), epoch: Epoch(1) }).collect();
        pool.bring_up(&all, all.len(), &full).expect("it runs");
        let parts = |blocks: &[u32], layers: std::ops::Range<usize>| -> Parts {
            blocks.iter().map(|it| (BlockId(*it), LayerRange::from(layers.clone()))).collect()
        };
        let bytes = |arena: &Arena, block: u32| arena.read(BlockId(block), <[u8]>::to_vec);
        // At once, and by the landing, in parts.
        let [at_once, landed] = [(); 2].map(|()| arena(&layout, false));
        pool.bring_down(&parts(&[0, 1, 2, 3], 0..3), &at_once).expect("it runs");
        let mut used = 0;
        for layers in [0..1, 1..3] {
            let descent = pool.start_down(&parts(&[1, 3], layers), &landed, &mut used).expect("it runs");
            pool.land(descent.expect("there is room"), &landed).expect("it runs");
        }
        for block in 0..BLOCKS {
            assert!(bytes(&at_once, block) == bytes(&full, block), "{row}, block {block}");
            let is_landed = bytes(&landed, block) == bytes(&full, block);
            assert_eq!(is_landed, block % 2 == 1, "{row}, block {block} by the landing");
        }
        // Half of the landing is taken.
        let none = pool.start_down(&parts(&[0, 1, 2], 0..3), &landed, &mut used).expect("it runs");
        assert!(none.is_none(), "{row}: there is no room");
        assert_eq!(used, pool.landing().bytes() / 2, "{row}: and nothing is taken");
        drop(pool);
        fakes.iter().for_each(|fake| fake.assert_nothing_left());
    }
}
