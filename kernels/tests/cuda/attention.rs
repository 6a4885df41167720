//! Attention of single rows: lengths around the ends of blocks and splits, groups, windows, head sizes, every type.

use super::{
    on_devices,
    support::{
        Blocks, KV_DTYPES, Numbers, Order, WEIGHT_DTYPES, assert_close,
        cuda::{Buffer, DeviceBlocks, block_table, elements, floats, rounded, tolerance},
        shape,
    },
};
use tidemill_kernels::{
    cuda::{Attention, Driver, KvShape, launches},
    kv::KvDtype,
    matrix::WeightDtype,
    reference,
    step::{AttentionParams, SequenceRows},
};

struct Case {
    dtype: WeightDtype,
    kv_dtype: KvDtype,
    query_heads: usize,
    kv_heads: usize,
    head_size: usize,
    window: Option<usize>,
    /// Positions of the rows, one sequence each.
    positions: &'static [usize],
}

#[test]
fn every_type_and_head_size() {
    on_devices(|device| {
        for (dtype, kv_dtype) in WEIGHT_DTYPES.into_iter().flat_map(|a| KV_DTYPES.map(|b| (a, b))) {
            for (query_heads, kv_heads, head_size) in [(1, 1, 8), (4, 2, 64), (5, 1, 80), (3, 1, 256)] {
                let positions = &[0, 15, 16, 70];
                let case =
                    Case { dtype, kv_dtype, query_heads, kv_heads, head_size, window: None, positions };
                check(device, &case);
            }
        }
    });
}

#[test]
fn splits_and_windows() {
    on_devices(|device| {
        for window in [None, Some(1), Some(17), Some(600)] {
            for positions in [&[511, 512][..], &[3, 1100]] {
                let (dtype, kv_dtype) = (WeightDtype::F32, KvDtype::Bf16);
                let case =
                    Case { dtype, kv_dtype, query_heads: 6, kv_heads: 2, head_size: 128, window, positions };
                check(device, &case);
            }
        }
    });
}

fn check(device: &dyn Driver, case: &Case) {
    let &Case { dtype, kv_dtype, query_heads, kv_heads, head_size, window, positions } = case;
    let mut numbers = Numbers::new(60);
    let shape = shape(kv_dtype, 2, 16, kv_heads, head_size, Order::HeadToken);
    let width = query_heads * head_size;
    // Query, key and value of a row lie side by side.
    let stride = width + 16;
    let fused: Vec<f32> = numbers.vector(positions.len() * stride).iter().map(|x| 4.0 * x).collect();
    let fused = rounded(&fused, dtype);
    let query: Vec<f32> = fused.chunks(stride).flat_map(|row| row[..width].to_vec()).collect();
    let blocks: Vec<Blocks> = positions
        .iter()
        .map(|&position| {
            let (length, blocks) = (position + 1, Blocks::new(shape, position + 1));
            let all =
                SequenceRows { first_row: 0, rows: length, first_position: 0, blocks: &blocks.addresses };
            let row = length * kv_heads * head_size;
            reference::write_kv(&shape, 1, &numbers.vector(row), &numbers.vector(row), &[all]);
            blocks
        })
        .collect();
    let sequences: Vec<SequenceRows<'_>> = blocks
        .iter()
        .zip(positions)
        .enumerate()
        .map(|(row, (blocks, &position))| SequenceRows {
            first_row: row,
            rows: 1,
            first_position: position,
            blocks: &blocks.addresses,
        })
        .collect();
    let scale = (head_size as f32).sqrt().recip();
    let params = AttentionParams { query_heads, scale, sliding_window: window };
    let mut expected = vec![f32::NAN; query.len()];
    reference::attention(&mut expected, &query, &shape, 1, &sequences, params);

    let rows = positions.len();
    let longest = positions.iter().max().expect("there are rows") + 1;
    let splits = Attention::splits(longest as u32);
    let blocks_per_sequence = longest.div_ceil(shape.block_len);
    let paged: Vec<DeviceBlocks<'_>> =
        blocks.iter().map(|blocks| DeviceBlocks::copy_of(device, shape, blocks)).collect();
    let table = block_table(&paged, blocks_per_sequence);
    let table = Buffer::new(device, &table);
    let query = elements(device, &fused, dtype);
    let out = Buffer::empty(device, rows * width * dtype.bytes());
    let partials =
        Buffer::empty(device, rows * query_heads * splits as usize * (head_size + 2) * size_of::<f32>());
    let positions: Vec<u32> = positions.iter().map(|&position| position as u32).collect();
    let positions = Buffer::new(device, &positions);
    let sequences = Buffer::new(device, &(0..rows as u32).collect::<Vec<_>>());
    let parameters = Attention {
        out: out.address(),
        query: query.address(),
        blocks: table.address(),
        positions: positions.address(),
        sequences: sequences.address(),
        partials: partials.address(),
        shape: KvShape::new(&shape),
        dtype: dtype.into(),
        layer: 1,
        blocks_per_sequence: blocks_per_sequence as u32,
        query_heads: query_heads as u32,
        query_stride: stride as u32,
        window: window.unwrap_or(0) as u32,
        splits,
        scale: Attention::scale(scale),
    };
    let (attend, join) = launches::attention(rows as u32, &parameters);
    device.launch(&attend).expect("kernels run");
    if let Some(join) = join {
        device.launch(&join).expect("kernels run");
    }
    let name = format!(
        "{dtype:?} on {kv_dtype:?}, {query_heads}/{kv_heads} heads of {head_size}, window {window:?}, up to {longest}"
    );
    assert_close(&floats(&out, dtype), &expected, tolerance(dtype), &name);
}
