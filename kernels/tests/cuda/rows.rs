//! Operations on rows: embedding, norm, gate.

use super::{
    on_devices,
    support::{
        Numbers, WEIGHT_DTYPES, assert_close, assert_same_bits,
        cuda::{Buffer, elements, floats, rounded, tolerance},
    },
};
use tidemill_kernels::{
    cuda::{DeviceAddress, Embed, Join, RmsNorm, SiluMul, launches},
    reference,
};

#[test]
fn embedding() {
    on_devices(|device| {
        for dtype in WEIGHT_DTYPES {
            for (vocabulary, width) in [(1, 1), (7, 5), (16, 8), (300, 257), (5, 4096)] {
                let mut numbers = Numbers::new(20);
                let table = rounded(&numbers.vector(vocabulary * width), dtype);
                let mut tokens: Vec<u32> =
                    (0..9).map(|_| (numbers.bits() % vocabulary as u64) as u32).collect();
                // Some by their place among what was chosen; where none could be chosen the first token stands in.
                let mut chosen: Vec<u32> = tokens.iter().copied().rev().collect();
                let mut named = tokens.clone();
                for (row, name) in named.iter_mut().enumerate().filter(|(row, _)| row % 3 == 1) {
                    *name = Embed::OF_CHOSEN | (8 - row as u32);
                }
                chosen[8 - 4] = u32::MAX;
                tokens[4] = 0;
                let (on_device, ids) = (elements(device, &table, dtype), Buffer::new(device, &named));
                let chosen = Buffer::new(device, &chosen);
                let out = Buffer::empty(device, 9 * width * dtype.bytes());
                let parameters = Embed {
                    out: out.address(),
                    table: on_device.address(),
                    tokens: ids.address(),
                    chosen: chosen.address(),
                    width: width as u32,
                    vocabulary: vocabulary as u32,
                };
                device.launch(&launches::embed(dtype, 9, &parameters)).expect("kernels run");
                let expected: Vec<f32> = tokens
                    .iter()
                    .flat_map(|&token| table[token as usize * width..][..width].to_vec())
                    .collect();
                assert_same_bits(&floats(&out, dtype), &expected, &format!("{vocabulary}x{width} {dtype:?}"));
            }
        }
    });
}

#[test]
fn rms_norm() {
    on_devices(|device| {
        for dtype in WEIGHT_DTYPES {
            for (rows, width) in [(1, 1), (2, 7), (3, 8), (5, 64), (4, 300), (2, 4097), (1, 16_384)] {
                for (adds, in_place) in [(false, false), (true, false), (true, true)] {
                    let mut numbers = Numbers::new(21);
                    let [state, delta] = [0, 1].map(|_| rounded(&numbers.vector(rows * width), dtype));
                    let weight = rounded(&numbers.vector(width), dtype);
                    let mut sum = state.clone();
                    if adds {
                        reference::add(&mut sum, &delta);
                        sum = rounded(&sum, dtype);
                    }
                    let mut expected = vec![f32::NAN; rows * width];
                    reference::rms_norm(&mut expected, &sum, &weight, 1e-5);

                    let [state, delta, weight] =
                        [&state, &delta, &weight].map(|values| elements(device, values, dtype));
                    let other = Buffer::empty(device, rows * width * dtype.bytes());
                    let out = if in_place { &state } else { &other };
                    let parameters = RmsNorm {
                        out: out.address(),
                        state: state.address(),
                        delta: if adds { delta.address() } else { DeviceAddress::NULL },
                        weight: weight.address(),
                        width: width as u32,
                        eps: 1e-5,
                    };
                    device.launch(&launches::rms_norm(dtype, rows as u32, &parameters)).expect("kernels run");
                    let name = format!("{rows}x{width} {dtype:?}, adds: {adds}, in place: {in_place}");
                    assert_close(&floats(out, dtype), &expected, tolerance(dtype), &name);
                    if !in_place {
                        assert_same_bits(&floats(&state, dtype), &sum, &name);
                    }
                }
            }
        }
    });
}

#[test]
fn silu_mul() {
    on_devices(|device| {
        for dtype in WEIGHT_DTYPES {
            for (rows, width, stride) in [(1, 1, 1), (3, 7, 14), (2, 8, 16), (2, 300, 608), (2, 4100, 4100)] {
                let mut numbers = Numbers::new(22);
                let gate: Vec<f32> = numbers.vector(rows * stride).iter().map(|x| 6.0 * x).collect();
                let (gate, up) = (rounded(&gate, dtype), rounded(&numbers.vector(rows * stride), dtype));
                let cut = |values: &[f32]| -> Vec<f32> {
                    values.chunks(stride).flat_map(|row| row[..width].to_vec()).collect()
                };
                let mut expected = vec![f32::NAN; rows * width];
                reference::silu_mul(&mut expected, &cut(&gate), &cut(&up));

                let [gate, up] = [&gate, &up].map(|values| elements(device, values, dtype));
                let out = Buffer::empty(device, rows * width * dtype.bytes());
                let parameters = SiluMul {
                    out: out.address(),
                    gate: gate.address(),
                    up: up.address(),
                    width: width as u32,
                    stride: stride as u32,
                };
                device.launch(&launches::silu_mul(dtype, rows as u32, &parameters)).expect("kernels run");
                let name = format!("{rows}x{width} of {stride} {dtype:?}");
                assert_close(&floats(&out, dtype), &expected, tolerance(dtype), &name);
            }
        }
    });
}

#[test]
fn join() {
    on_devices(|device| {
        for (rows, width, ranks) in [(1, 1, 1), (2, 7, 2), (3, 10, 4), (4, 288, 8), (1, 3, 3), (5, 1001, 7)] {
            let mut numbers = Numbers::new(23);
            let whole = numbers.vector(rows * width);
            let first = |rank: usize| rank * width / ranks;
            // What lies behind a rank's part belongs to nobody.
            let stride = rows * width.div_ceil(ranks) + 3;
            let mut parts = vec![f32::NAN; ranks * stride];
            for rank in 0..ranks {
                let own = first(rank)..first(rank + 1);
                let to = parts[rank * stride..].chunks_mut(own.len());
                for (row, to) in whole.chunks(width).zip(to) {
                    to.copy_from_slice(&row[own.clone()]);
                }
            }
            let (parts, out) = (Buffer::new(device, &parts), Buffer::empty(device, rows * width * 4));
            let parameters = Join {
                out: out.address(),
                parts: parts.address(),
                width: width as u32,
                ranks: ranks as u32,
                stride: stride as u32,
                reserved: 0,
            };
            device.launch(&launches::join(rows as u32, &parameters)).expect("kernels run");
            assert_same_bits(&out.read::<f32>(), &whole, &format!("{rows}x{width} of {ranks}"));
        }
    });
}
