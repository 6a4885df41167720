//! The rotary embedding and what is written into blocks.

use super::{
    on_devices,
    support::{
        Blocks, KV_DTYPES, Numbers, Order, WEIGHT_DTYPES, assert_close,
        cuda::{Buffer, DeviceBlocks, elements, floats, rounded, tolerance},
        shape,
    },
};
use tidemill_kernels::{
    cuda::{Driver, KvShape, RopeAndWrite, launches},
    kv::KvDtype,
    matrix::WeightDtype,
    reference,
    step::{RopeTable, SequenceRows},
};

/// Query heads, KV heads, elements of a head, half of those that are turned.
const HEADS: [(usize, usize, usize, usize); 4] =
    [(1, 1, 2, 1), (6, 2, 16, 8), (4, 1, 80, 20), (3, 3, 128, 64)];

#[test]
fn rope_and_write() {
    on_devices(|device| {
        for (dtype, kv_dtype) in WEIGHT_DTYPES.into_iter().flat_map(|a| KV_DTYPES.map(|b| (a, b))) {
            for ((query_heads, kv_heads, head_size, half), order) in
                HEADS.into_iter().zip([Order::TokenHead, Order::HeadToken].into_iter().cycle())
            {
                check(device, dtype, kv_dtype, (query_heads, kv_heads), (head_size, half), order);
            }
        }
    });
}

fn check(
    device: &dyn Driver,
    dtype: WeightDtype,
    kv_dtype: KvDtype,
    (query_heads, kv_heads): (usize, usize),
    (head_size, half): (usize, usize),
    order: Order,
) {
    let mut numbers = Numbers::new(30);
    let shape = shape(kv_dtype, 2, 16, kv_heads, head_size, order);
    // Two sequences: a chunk that begins within a block, and one row of decode.
    let spans = [(0, 9, 12), (9, 1, 33)];
    let (rows, blocks_per_sequence) = (10, 3);
    let (query_width, kv_width) = (query_heads * head_size, kv_heads * head_size);
    let stride = query_width + 2 * kv_width;
    let mut fused = rounded(&numbers.vector(rows * stride), dtype);
    fused[2 * stride + query_width..][..kv_width].fill(0.0);
    let frequencies: Vec<f32> = (0..half).map(|pair| 100f32.powf(-(pair as f32) / half as f32)).collect();
    let (cos, sin) = reference::rope_table(&frequencies, 40, 1.0);

    let part = |first: usize, width: usize| -> Vec<f32> {
        fused.chunks(stride).flat_map(|row| row[first..first + width].to_vec()).collect()
    };
    let (mut query, mut key) = (part(0, query_width), part(query_width, kv_width));
    let value = part(query_width + kv_width, kv_width);
    let positions: Vec<u32> =
        spans.iter().flat_map(|&(_, rows, first)| (first..first + rows).map(|p| p as u32)).collect();
    let table = RopeTable { cos: &cos, sin: &sin, half };
    reference::rope(&mut query, &positions, table, head_size);
    reference::rope(&mut key, &positions, table, head_size);
    let blocks = [21, 34].map(|tokens| Blocks::new(shape, tokens));
    let sequences = [0, 1].map(|index| {
        let (first_row, rows, first_position) = spans[index];
        SequenceRows { first_row, rows, first_position, blocks: &blocks[index].addresses }
    });
    reference::write_kv(&shape, 1, &key, &value, &sequences);

    let on_device = elements(device, &fused, dtype);
    let at = |element: usize| on_device.address().offset(element * dtype.bytes());
    let paged = DeviceBlocks::new(device, shape, 2 * blocks_per_sequence);
    let tables = [&cos, &sin].map(|table| Buffer::new(device, table));
    let rows_of: Vec<u32> =
        spans.iter().zip(0..).flat_map(|(&(_, rows, _), index)| vec![index; rows]).collect();
    let (positions, rows_of) = (Buffer::new(device, &positions), Buffer::new(device, &rows_of));
    let parameters = RopeAndWrite {
        query: at(0),
        key: at(query_width),
        value: at(query_width + kv_width),
        cos: tables[0].address(),
        sin: tables[1].address(),
        positions: positions.address(),
        sequences: rows_of.address(),
        blocks: paged.table(),
        shape: KvShape::new(&shape),
        layer: 1,
        blocks_per_sequence: blocks_per_sequence as u32,
        query_heads: query_heads as u32,
        half: half as u32,
        query_stride: stride as u32,
        kv_stride: stride as u32,
    };
    device.launch(&launches::rope_and_write(dtype, rows as u32, &parameters)).expect("kernels run");
    let name =
        format!("{dtype:?} into {kv_dtype:?}, {query_heads}/{kv_heads} heads of {head_size}, {order:?}");
    let turned: Vec<f32> =
        floats(&on_device, dtype).chunks(stride).flat_map(|row| row[..query_width].to_vec()).collect();
    assert_close(&turned, &query, tolerance(dtype), &name);
    for (index, blocks) in blocks.iter().enumerate() {
        for block in 0..blocks.addresses.len() {
            let found = paged.bytes(index * blocks_per_sequence + block);
            assert!(found == blocks.bytes(block), "{name}: block {block} of sequence {index}");
        }
    }
}
