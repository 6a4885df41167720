//! Matrix products in fewer bits: rows of int8 and weights of int8 and int4, rows and weights of fp8.

use super::{
    on_devices,
    support::{
        Numbers, WEIGHT_DTYPES, assert_close, assert_same_bits,
        cuda::{Buffer, elements, floats, rounded, tolerance},
    },
};
use tidemill_kernels::{
    cuda::{
        DeviceAddress, Driver, QuantizeRows, QuantizedProduct, launches,
        weights::{QuantizedRows, padded, scale_stride},
    },
    matrix::{MatrixSource, PackedMatrix, Quantization, WeightDtype},
    reference,
};

const QUANTIZATIONS: [Quantization; 5] = [
    Quantization::Int8,
    Quantization::Fp8,
    Quantization::Int4 { group: 32 },
    Quantization::Int4 { group: 64 },
    Quantization::Int4 { group: 128 },
];

struct Case {
    dtype: WeightDtype,
    out: WeightDtype,
    quantization: Quantization,
    inputs: usize,
    x: Vec<f32>,
    w: Vec<f32>,
    bias: Option<Vec<f32>>,
    /// What `out` has before, where the product is added to it.
    before: Option<Vec<f32>>,
}

fn quantized(
    device: &dyn Driver,
    x: &[f32],
    width: usize,
    dtype: WeightDtype,
    quantization: Quantization,
) -> (Vec<u8>, Vec<f32>) {
    let rows = x.len() / width;
    let x = elements(device, x, dtype);
    let steps = Buffer::empty(device, rows * padded(width));
    let scales = Buffer::empty(device, rows * size_of::<f32>());
    let parameters = QuantizeRows {
        steps: steps.address(),
        scales: scales.address(),
        x: x.address(),
        width: width as u32,
        padded: padded(width) as u32,
    };
    device
        .launch(&launches::quantize_rows(dtype, quantization, rows as u32, &parameters))
        .expect("kernels run");
    (steps.read(), scales.read())
}

fn multiply(device: &dyn Driver, case: &Case) -> Vec<f32> {
    let &Case { dtype, out: to, quantization, inputs, .. } = case;
    let (rows, outputs) = (case.x.len() / inputs, case.w.len() / inputs);
    let (steps, scales) = quantized(device, &case.x, inputs, dtype, quantization);
    let [x, x_scales] = [Buffer::new(device, &steps), Buffer::new(device, &scales)];
    let weights = QuantizedRows::quantize(2, outputs, inputs, quantization, &|row, values| {
        values.copy_from_slice(&case.w[row * inputs..(row + 1) * inputs]);
    });
    let [w, w_scales] = [Buffer::new(device, &weights.steps), Buffer::new(device, &weights.scales)];
    let bias = case.bias.as_ref().map(|bias| elements(device, bias, dtype));
    let out = match &case.before {
        Some(before) => elements(device, before, to),
        None => Buffer::empty(device, rows * outputs * to.bytes()),
    };
    let (group, stride) = match quantization {
        Quantization::Int8 | Quantization::Fp8 => (0, 0),
        Quantization::Int4 { group } => (group, scale_stride(outputs)),
    };
    let parameters = QuantizedProduct {
        out: out.address(),
        x: x.address(),
        x_scales: x_scales.address(),
        w: w.address(),
        w_scales: w_scales.address(),
        bias: bias.as_ref().map_or(DeviceAddress::NULL, Buffer::address),
        rows: rows as u32,
        inputs: padded(inputs) as u32,
        outputs: outputs as u32,
        group: group as u32,
        scale_stride: stride as u32,
        out_dtype: to.into(),
        bias_dtype: dtype.into(),
        adds: u32::from(case.before.is_some()),
    };
    device.launch(&launches::multiply_quantized(quantization, &parameters)).expect("kernels run");
    floats(&out, to)
}

#[test]
fn rows_become_steps_and_a_scale() {
    on_devices(|device| {
        for dtype in WEIGHT_DTYPES {
            for width in [1, 128, 300] {
                let mut x = rounded(&Numbers::new(75).vector(3 * width), dtype);
                // A row of nothing.
                x[width..2 * width].fill(0.0);
                for quantization in [Quantization::Int8, Quantization::Fp8] {
                    let (steps, scales) = quantized(device, &x, width, dtype, quantization);
                    for (row, x) in x.chunks(width).enumerate() {
                        let mut expected = vec![0u8; padded(width)];
                        let row_steps = &mut expected[..width];
                        let scale = match quantization {
                            Quantization::Fp8 => reference::quantize_e4m3(x, row_steps),
                            _ => reference::quantize_int8(x, bytemuck::cast_slice_mut(row_steps)),
                        };
                        let name = format!("row {row} of {width}, {dtype:?}, {quantization}");
                        assert_eq!(scales[row].to_bits(), scale.to_bits(), "{name}");
                        assert_eq!(
                            &steps[row * padded(width)..(row + 1) * padded(width)],
                            expected,
                            "{name}"
                        );
                    }
                }
            }
        }
    });
}

#[test]
fn few_rows_and_many() {
    on_devices(|device| {
        for quantization in QUANTIZATIONS {
            for (dtype, out, rows, inputs, outputs, has_bias, adds) in [
                (WeightDtype::F32, WeightDtype::F32, 1, 1, 1, true, true),
                (WeightDtype::Bf16, WeightDtype::Bf16, 16, 1440, 34, false, true),
                (WeightDtype::F16, WeightDtype::F32, 3, 200, 9, false, false),
                (WeightDtype::F16, WeightDtype::F16, 17, 300, 65, true, false),
                (WeightDtype::Bf16, WeightDtype::Bf16, 65, 640, 131, true, true),
            ] {
                let mut numbers = Numbers::new(76);
                let mut values = |len, dtype| rounded(&numbers.vector(len), dtype);
                let case = Case {
                    dtype,
                    out,
                    quantization,
                    inputs,
                    x: values(rows * inputs, dtype),
                    w: values(outputs * inputs, dtype),
                    bias: has_bias.then(|| values(outputs, dtype)),
                    before: adds.then(|| values(rows * outputs, out)),
                };
                let mut expected = vec![f32::NAN; rows * outputs];
                let Case { x, w, bias, .. } = &case;
                reference::matmul_quantized(&mut expected, x, w, inputs, quantization, bias.as_deref());
                if let Some(before) = &case.before {
                    reference::add(&mut expected, before);
                }
                let name = format!("{quantization}: {rows}x{inputs}x{outputs}, {dtype:?} to {out:?}");
                assert_close(&multiply(device, &case), &expected, tolerance(out), &name);
            }
        }
    });
}

#[test]
fn a_row_is_the_same_in_any_company() {
    on_devices(|device| {
        for quantization in [Quantization::Int8, Quantization::Fp8, Quantization::Int4 { group: 32 }] {
            let (dtype, rows, inputs, outputs) = (WeightDtype::Bf16, 131, 256, 5);
            let mut numbers = Numbers::new(77);
            let [x, w] = [rows, outputs].map(|count| rounded(&numbers.vector(count * inputs), dtype));
            let part = |first: usize, count: usize| {
                let x = x[first * inputs..(first + count) * inputs].to_vec();
                let w = w.clone();
                let case = Case { dtype, out: dtype, quantization, inputs, x, w, bias: None, before: None };
                multiply(device, &case)
            };
            let together = part(0, rows);
            for (first, count) in [(0, 1), (130, 1), (60, 17)] {
                let expected = &together[first * outputs..(first + count) * outputs];
                let name = format!("{quantization}: {count} rows from {first} on");
                assert_same_bits(&part(first, count), expected, &name);
            }
        }
    });
}

/// Weights are the same numbers as those of the CPU: rows of which one input alone is not zero bring them out.
#[test]
fn weights_are_those_of_the_cpu() {
    on_devices(|device| {
        for quantization in QUANTIZATIONS {
            let (inputs, outputs, dtype) = (96, 3, WeightDtype::F32);
            let w = Numbers::new(78).vector(outputs * inputs);
            let source = MatrixSource { bytes: bytemuck::cast_slice(&w), dtype };
            let packed = PackedMatrix::quantize_on(1, outputs, inputs, source, quantization);
            let mut x = vec![0.0; inputs * inputs];
            x.iter_mut().step_by(inputs + 1).for_each(|one| *one = 112.0);
            let case = Case { dtype, out: dtype, quantization, inputs, x, w, bias: None, before: None };
            let found = multiply(device, &case);
            let mut row = vec![0.0; inputs];
            for output in 0..outputs {
                packed.row(output, &mut row);
                let column: Vec<f32> =
                    found.iter().skip(output).step_by(outputs).map(|x| x / 112.0).collect();
                assert_close(&column, &row, 1e-6, &format!("{quantization}: output {output}"));
            }
        }
    });
}
