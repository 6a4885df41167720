//! Attention of prompts: whole and in chunks behind a prefix, several sequences in a step, groups, windows, head sizes, every type.

use super::{
    on_devices,
    support::{
        Blocks, KV_DTYPES, Numbers, Order, assert_close, assert_same_bits,
        cuda::{Buffer, DeviceBlocks, elements, floats, rounded, tolerance},
        shape,
    },
};
use tidemill_kernels::{
    cuda::{
        Attention, DeviceAddress, Driver, KvShape, Launch, PromptAttention, PromptTile, hopper::BlockRange,
        launches,
    },
    kv::{KvBlockShape, KvDtype},
    matrix::WeightDtype,
    reference,
    step::{AttentionParams, SequenceRows},
};

pub(super) struct Case {
    pub(super) dtype: WeightDtype,
    pub(super) kv_dtype: KvDtype,
    pub(super) query_heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_size: usize,
    pub(super) window: Option<usize>,
    /// Of each sequence: the position of its first row in the step, and rows.
    pub(super) chunks: &'static [(usize, usize)],
}

/// What a kernel is launched with: tiles, rows, and blocks besides.
pub(super) type Launcher<'a> = &'a dyn Fn(u32, u32, &BlockRange, &PromptAttention) -> Option<Launch>;

impl Case {
    fn shape(&self) -> KvBlockShape {
        shape(self.kv_dtype, 2, 16, self.kv_heads, self.head_size, Order::TokenHead)
    }

    fn scale(&self) -> f32 {
        (self.head_size as f32).sqrt().recip()
    }

    pub(super) fn width(&self) -> usize {
        self.query_heads * self.head_size
    }
}

#[test]
fn every_type_and_head_size() {
    on_devices(|device| {
        for dtype in [WeightDtype::F16, WeightDtype::Bf16] {
            for kv_dtype in KV_DTYPES {
                for (query_heads, kv_heads, head_size) in [(1, 1, 8), (2, 1, 64), (1, 1, 80), (2, 2, 96)] {
                    let chunks = &[(0, 3), (5, 20)];
                    let window = None;
                    check(
                        device,
                        &Case { dtype, kv_dtype, query_heads, kv_heads, head_size, window, chunks },
                    );
                }
            }
            for (query_heads, kv_heads, head_size) in [(2, 1, 128), (1, 1, 256)] {
                let (kv_dtype, window, chunks) = (KvDtype::Bf16, None, &[(0, 1), (30, 18)]);
                check(device, &Case { dtype, kv_dtype, query_heads, kv_heads, head_size, window, chunks });
            }
        }
    });
}

#[test]
fn chunks_prefixes_and_windows() {
    on_devices(|device| {
        for window in [None, Some(1), Some(17), Some(64), Some(500)] {
            for chunks in [&[(0, 64)][..], &[(0, 65)], &[(63, 2), (64, 1)], &[(130, 66)]] {
                let (dtype, kv_dtype, head_size) = (WeightDtype::Bf16, KvDtype::Bf16, 64);
                check(
                    device,
                    &Case { dtype, kv_dtype, query_heads: 1, kv_heads: 1, head_size, window, chunks },
                );
            }
        }
    });
}

/// A row is the same in whatever chunk it comes.
#[test]
fn chunks_make_no_difference() {
    on_devices(|device| {
        for window in [None, Some(40)] {
            let case = |chunks| Case {
                dtype: WeightDtype::Bf16,
                kv_dtype: KvDtype::Bf16,
                query_heads: 2,
                kv_heads: 1,
                head_size: 64,
                window,
                chunks,
            };
            let (whole, _) = run(device, &case(&[(0, 100)]));
            for chunks in [&[(0, 37)][..], &[(37, 63)], &[(99, 1)]] {
                let case = case(chunks);
                let (part, _) = run(device, &case);
                let (first, rows) = chunks[0];
                let expected = &whole[first * case.width()..(first + rows) * case.width()];
                assert_same_bits(&part, expected, &format!("{chunks:?}, window {window:?}"));
            }
        }
    });
}

#[test]
fn f32_is_for_the_other_kernel() {
    let case = Case {
        dtype: WeightDtype::F32,
        kv_dtype: KvDtype::F32,
        query_heads: 1,
        kv_heads: 1,
        head_size: 64,
        window: None,
        chunks: &[],
    };
    let null = DeviceAddress::NULL;
    let parameters = parameters(&case, null, null, null, null, 1);
    assert_eq!(launches::attend_prompts(WeightDtype::F32, 1, &parameters), None);
}

#[test]
fn rows_are_cut_into_tiles() {
    let tile = |first_row, rows, first_position| PromptTile { first_row, rows, first_position, sequence: 3 };
    let rows: [(u32, &[PromptTile]); 4] = [
        (0, &[]),
        (1, &[tile(10, 1, 7)]),
        (64, &[tile(10, 64, 7)]),
        (130, &[tile(10, 64, 7), tile(74, 64, 71), tile(138, 2, 135)]),
    ];
    for (count, expected) in rows {
        assert_eq!(PromptTile::cut(10, count, 7, 3).collect::<Vec<_>>(), expected, "{count} rows");
    }
}

fn check(device: &dyn Driver, case: &Case) {
    check_by(device, case, &usual(case));
}

/// The kernel that every GPU has.
fn usual(case: &Case) -> impl Fn(u32, u32, &BlockRange, &PromptAttention) -> Option<Launch> {
    let dtype = case.dtype;
    move |tiles, _, _, parameters| launches::attend_prompts(dtype, tiles, parameters)
}

pub(super) fn check_by(device: &dyn Driver, case: &Case, launcher: Launcher<'_>) {
    let (actual, expected) = run_by(device, case, launcher);
    let &Case { dtype, kv_dtype, query_heads, kv_heads, head_size, window, chunks } = case;
    let name = format!(
        "{dtype:?} on {kv_dtype:?}, {query_heads}/{kv_heads} heads of {head_size}, window {window:?}, {chunks:?}"
    );
    assert_close(&actual, &expected, 2.0 * tolerance(dtype), &name);
}

/// What the kernel makes of it, and the reference. All rows are those of one long sequence or several like it, so that the
/// same position has the same numbers in any chunk.
fn run(device: &dyn Driver, case: &Case) -> (Vec<f32>, Vec<f32>) {
    run_by(device, case, &usual(case))
}

/// The same by the kernel that `launcher` chooses.
pub(super) fn run_by(device: &dyn Driver, case: &Case, launcher: Launcher<'_>) -> (Vec<f32>, Vec<f32>) {
    let &Case { dtype, kv_heads, head_size, query_heads, window, chunks, .. } = case;
    let (shape, width) = (case.shape(), case.width());
    let stride = width + 16;
    let longest = chunks.iter().map(|(first, rows)| first + rows).max().expect("there are chunks");
    let mut numbers = Numbers::new(61);
    let kv_row = kv_heads * head_size;
    let [keys, values] = [(); 2].map(|()| numbers.vector(POSITIONS * kv_row));
    let fused: Vec<f32> = numbers.vector(POSITIONS * stride).iter().map(|x| 4.0 * x).collect();
    let fused = rounded(&fused, dtype);
    let blocks: Vec<Blocks> = chunks
        .iter()
        .map(|&(first, rows)| {
            let (length, blocks) = (first + rows, Blocks::new(shape, first + rows));
            let all =
                SequenceRows { first_row: 0, rows: length, first_position: 0, blocks: &blocks.addresses };
            let [keys, values] = [&keys, &values].map(|it| &it[..length * kv_row]);
            reference::write_kv(&shape, 1, keys, values, &[all]);
            blocks
        })
        .collect();
    let mut sequences = Vec::new();
    let (mut query, mut padded, mut tiles) = (Vec::new(), Vec::new(), Vec::new());
    for (index, (blocks, &(first, rows))) in blocks.iter().zip(chunks).enumerate() {
        let first_row = query.len() / width;
        for row in fused.chunks(stride).skip(first).take(rows) {
            query.extend_from_slice(&row[..width]);
            padded.extend_from_slice(row);
        }
        tiles.extend(PromptTile::cut(first_row as u32, rows as u32, first as u32, index as u32));
        let blocks = &blocks.addresses;
        sequences.push(SequenceRows { first_row, rows, first_position: first, blocks });
    }
    let params = AttentionParams { query_heads, scale: case.scale(), sliding_window: window };
    let mut expected = vec![f32::NAN; query.len()];
    reference::attention(&mut expected, &query, &shape, 1, &sequences, params);

    let blocks_per_sequence = longest.div_ceil(shape.block_len);
    // All sequences in one range, which has more than theirs.
    let paged =
        DeviceBlocks::new(device, shape, blocks.iter().map(|it| it.addresses.len()).sum::<usize>() + 3);
    let mut given = paged.addresses().into_iter();
    let mut table = Vec::new();
    for blocks in &blocks {
        for block in 0..blocks.addresses.len() {
            let to = given.next().expect("there are as many");
            device.upload(to, blocks.bytes(block)).expect("the device has it");
            table.push(to);
        }
        table.resize(table.len().next_multiple_of(blocks_per_sequence), DeviceAddress::NULL);
    }
    let (table, tiles_there) = (Buffer::new(device, &table), Buffer::new(device, &tiles));
    let padded = elements(device, &padded, dtype);
    let out = Buffer::empty(device, query.len() * dtype.bytes());
    let parameters = parameters(
        case,
        out.address(),
        padded.address(),
        table.address(),
        tiles_there.address(),
        blocks_per_sequence as u32,
    );
    let rows = (query.len() / width) as u32;
    let launch = launcher(tiles.len() as u32, rows, &paged.range(), &parameters).expect("it takes the case");
    device.launch(&launch).expect("kernels run");
    (floats(&out, dtype), expected)
}

/// Positions that have numbers: more than any row uses.
const POSITIONS: usize = 320;

fn parameters(
    case: &Case,
    out: DeviceAddress,
    query: DeviceAddress,
    blocks: DeviceAddress,
    tiles: DeviceAddress,
    blocks_per_sequence: u32,
) -> PromptAttention {
    PromptAttention {
        out,
        query,
        blocks,
        tiles,
        shape: KvShape::new(&case.shape()),
        layer: 1,
        blocks_per_sequence,
        query_heads: case.query_heads as u32,
        query_stride: (case.width() + 16) as u32,
        window: case.window.unwrap_or(0) as u32,
        scale: Attention::scale(case.scale()),
    }
}
