//! Turning blocks of one layout into blocks of another, as the sender does before it writes them.

use std::cell::RefCell;

use tidemill_engine::memory::Arena;
use tidemill_kernels::cpu::{Cpu, CpuOptions};
use tidemill_kernels::kv::{BlockAddress, KvBlockShape};
use tidemill_kernels::step::{HeadSpan, SequenceRows, TokenSpan};
use tidemill_kvtransfer::{Region, Slab};
use tidemill_kvtransfer_proto::layout::{AxisOrder, HeadRange, KvDtype, KvLayout};
use tidemill_kvtransfer_proto::units::{BlockCount, BlockId, TokenCount};

use crate::report::{Row, Target};
use crate::timing::{cpu_time, gigabytes_per_second, in_turns, median, ratio};
use crate::workers::billion;

/// A change of layout: how many workers share the heads on either side, and the two layouts.
struct Change {
    name: &'static str,
    ranks: u16,
    from: KvLayout,
    to: KvLayout,
}

pub(crate) fn measure(rounds: usize) -> anyhow::Result<Vec<Row>> {
    let base = |block_len, dtype| KvLayout { head_size: 128, ..billion(block_len, dtype) };
    let half = KvLayout { heads: HeadRange { first: 0, count: 4 }, ..base(16, KvDtype::Bf16) };
    let head_token = KvLayout { order: AxisOrder::HeadToken, ..base(16, KvDtype::Bf16) };
    let changes = [
        Change { name: "bf16 to int8", ranks: 1, from: base(16, KvDtype::Bf16), to: base(16, KvDtype::Int8) },
        Change {
            name: "blocks of 16 to 64",
            ranks: 1,
            from: base(16, KvDtype::Bf16),
            to: base(64, KvDtype::Bf16),
        },
        Change {
            name: "two tensor-parallel ranks to one",
            ranks: 2,
            from: half.clone(),
            to: base(16, KvDtype::Bf16),
        },
        Change {
            name: "one rank to two, one of them",
            ranks: 1,
            from: base(16, KvDtype::Bf16),
            to: half.clone(),
        },
        Change { name: "token-head to head-token", ranks: 1, from: base(16, KvDtype::Bf16), to: head_token },
        Change {
            name: "all at once: two ranks, bf16, 16 to one, int8, 64",
            ranks: 2,
            from: half,
            to: base(64, KvDtype::Int8),
        },
    ];
    changes.iter().map(|change| change.measure(rounds)).collect()
}

impl Change {
    fn measure(&self, rounds: usize) -> anyhow::Result<Row> {
        let cpu = Cpu::new(CpuOptions { threads: Some(1), ..CpuOptions::default() })?;
        let sources: Vec<(Arena, Vec<BlockAddress>)> =
            (0..self.ranks).map(|_| source(&cpu, &self.from)).collect::<Result<_, _>>()?;
        let target = Arena::new(self.to.clone(), BlockCount(1))?;
        let blocks = TOKENS.div_ceil(self.to.block_len.tokens() as usize);
        // As in a handoff: one layer of all blocks, in staging memory that is used again for the next layer.
        let mut image = Slab::new(blocks * target.shape().layer_stride)?;
        let images = RefCell::new(image.as_mut_slice());
        // Everything that is read, and everything that is written.
        let heads = usize::from(self.from.heads.count.min(self.to.heads.count));
        let read = usize::from(self.ranks) * TOKENS * per_token(&self.from, heads);
        let written = usize::from(self.ranks) * TOKENS * per_token(&self.to, heads);
        // A memcpy of n bytes moves 2 n.
        let bytes = usize::midpoint(read, written);
        let memory: Vec<&Region> = sources.iter().map(|(arena, _)| &**arena.region()).collect();
        let mut limit = Limit { memory, bytes, at: (0, 0) };
        // Both are one thread's work: its CPU time is not disturbed by whoever else has the core for a while.
        let (memcpy, converted) = in_turns(
            rounds,
            || cpu_time(|| limit.copy(&mut images.borrow_mut())),
            || cpu_time(|| self.convert(&cpu, &sources, &target, &mut images.borrow_mut())),
        );
        Ok(Row {
            measure: format!("layout conversion, {}", self.name),
            value: gigabytes_per_second(bytes, median(&converted)),
            unit: "GB/s",
            limit: Some((
                gigabytes_per_second(bytes, median(&memcpy)),
                "memcpy, as many bytes of the same memory",
            )),
            target: Some(Target::Ratio { measured: ratio(&converted, &memcpy), at_least: 0.7 }),
            note: format!(
                "{} MiB read, {} MiB written into staging memory layer by layer, CPU of one thread",
                read >> 20,
                written >> 20
            ),
        })
    }

    fn convert(&self, cpu: &Cpu, sources: &[(Arena, Vec<BlockAddress>)], target: &Arena, image: &mut [u8]) {
        for layer in 0..target.shape().layers {
            for (index, image) in image.chunks_exact_mut(target.shape().layer_stride).enumerate() {
                self.convert_layer(cpu, sources, target.shape(), (index, layer), image);
            }
        }
    }

    fn convert_layer(
        &self,
        cpu: &Cpu,
        sources: &[(Arena, Vec<BlockAddress>)],
        shape: &KvBlockShape,
        (block, layer): (usize, usize),
        image: &mut [u8],
    ) {
        let first = block * shape.block_len;
        let count = shape.block_len.min(TOKENS - first);
        for (rank, (arena, blocks)) in sources.iter().enumerate() {
            let from = arena.shape();
            let span = TokenSpan { shape: from, blocks, first, count };
            if shape.kv_heads <= from.kv_heads {
                cpu.convert_block(image, shape, layer..layer + 1, span, 0);
            } else {
                let heads = HeadSpan { from: 0, to: rank * from.kv_heads, count: from.kv_heads };
                cpu.convert_heads(image, shape, layer..layer + 1, span, heads);
            }
        }
    }
}

/// `memcpy` of as many bytes: of the memory that the conversion reads, in order, into the memory that it writes. Each time
/// it goes on where it stopped, so that no byte is nearer than those that the conversion reads.
struct Limit<'a> {
    memory: Vec<&'a Region>,
    bytes: usize,
    at: (usize, usize),
}

impl Limit<'_> {
    fn copy(&mut self, image: &mut [u8]) {
        let mut left = self.bytes;
        while 0 < left {
            let (which, offset) = self.at;
            let region = self.memory[which];
            let len = image.len().min(left).min(region.len() - offset);
            region.read(offset, std::hint::black_box(&mut image[..len]));
            left -= len;
            self.at = (which, offset + len);
            if offset + len == region.len() {
                self.at = ((which + 1) % self.memory.len(), 0);
            }
        }
    }
}

/// Bytes of one token in so many heads.
fn per_token(layout: &KvLayout, heads: usize) -> usize {
    let scale = if layout.dtype.has_scales() { size_of::<f32>() } else { 0 };
    let row = usize::from(layout.head_size) * layout.dtype.bytes() + scale;
    2 * usize::from(layout.layers) * heads * row
}

/// A sequence in blocks that lie scattered.
fn source(cpu: &Cpu, layout: &KvLayout) -> anyhow::Result<(Arena, Vec<BlockAddress>)> {
    let count = TokenCount(TOKENS as u32).blocks_to_hold(layout.block_len);
    let arena = Arena::new(layout.clone(), BlockCount(count.0.next_power_of_two()))?;
    let all = arena.blocks().0;
    let blocks: Vec<BlockAddress> =
        (0..count.0).map(|index| arena.address(BlockId((index * 5 + 3) % all))).collect();
    let elements = TOKENS * usize::from(layout.heads.count) * usize::from(layout.head_size);
    let values: Vec<f32> =
        (0..elements).map(|index| ((index * 7919 % 4093) as f32 - 2046.0) / 1000.0).collect();
    for layer in 0..usize::from(layout.layers) {
        let rows = SequenceRows { first_row: 0, rows: TOKENS, first_position: 0, blocks: &blocks };
        cpu.write_kv(arena.shape(), layer, &values, &values, &[rows]);
    }
    Ok((arena, blocks))
}

/// 64 MiB in the smaller of the layouts above.
const TOKENS: usize = 1024;
