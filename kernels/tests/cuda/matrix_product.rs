//! Matrix products on tensor cores.

use super::{
    on_devices,
    product::{Case, multiply_by},
    support::{
        Numbers, assert_close, assert_same_bits,
        cuda::{rounded, tolerance},
    },
};
use tidemill_kernels::{
    cuda::{DeviceAddress, Driver, Product, launches},
    matrix::WeightDtype,
    reference,
};

fn multiply(device: &dyn Driver, case: &Case) -> Vec<f32> {
    multiply_by(device, case, |parameters| {
        let launch = launches::multiply_tiles(case.dtype, case.out != case.dtype, parameters);
        launch.expect("whole packs of 16 bits")
    })
}

#[test]
fn few_rows_and_many() {
    on_devices(|device| {
        for (dtype, to_f32) in
            [WeightDtype::F16, WeightDtype::Bf16].into_iter().flat_map(|it| [(it, false), (it, true)])
        {
            for (rows, inputs, outputs, has_bias, adds) in [
                (1, 8, 1, false, false),
                (5, 456, 34, false, true),
                (17, 72, 3, true, false),
                (65, 168, 65, true, true),
                (129, 40, 131, true, false),
            ] {
                let out = if to_f32 { WeightDtype::F32 } else { dtype };
                let mut numbers = Numbers::new(73);
                let mut values = |len, dtype| rounded(&numbers.vector(len), dtype);
                let case = Case {
                    dtype,
                    inputs,
                    x: values(rows * inputs, dtype),
                    w: values(outputs * inputs, dtype),
                    bias: has_bias.then(|| values(outputs, dtype)),
                    before: adds.then(|| values(rows * outputs, out)),
                    out,
                };
                let mut expected = vec![f32::NAN; rows * outputs];
                reference::matmul(&mut expected, &case.x, &case.w, inputs, case.bias.as_deref());
                if let Some(before) = &case.before {
                    reference::add(&mut expected, before);
                }
                let name = format!("{rows}x{inputs}x{outputs} {dtype:?} to {out:?}, {has_bias}, {adds}");
                assert_close(&multiply(device, &case), &expected, tolerance(out), &name);
            }
        }
    });
}

#[test]
fn a_row_is_the_same_in_any_company() {
    on_devices(|device| {
        let (dtype, rows, inputs, outputs, mut numbers) = (WeightDtype::Bf16, 131, 456, 5, Numbers::new(74));
        let [x, w] = [rows, outputs].map(|count| rounded(&numbers.vector(count * inputs), dtype));
        let part = |first: usize, count: usize| {
            let x = x[first * inputs..(first + count) * inputs].to_vec();
            let case = Case { dtype, inputs, x, w: w.clone(), bias: None, before: None, out: dtype };
            multiply(device, &case)
        };
        let together = part(0, rows);
        for (first, count) in [(0, 1), (70, 1), (130, 1), (3, 16), (60, 17), (10, 64)] {
            let expected = &together[first * outputs..(first + count) * outputs];
            assert_same_bits(&part(first, count), expected, &format!("{count} rows from {first} on"));
        }
    });
}

#[test]
fn what_tensor_cores_do_not_take_is_for_the_other_kernel() {
    let null = DeviceAddress::NULL;
    let right = Product { out: null, x: null, w: null, bias: null, rows: 1, inputs: 8, outputs: 1, adds: 0 };
    let launch = |dtype, parameters: Product| launches::multiply_tiles(dtype, false, &parameters);
    assert!(launch(WeightDtype::Bf16, right).is_some());
    assert_eq!(launches::product(WeightDtype::F32, true, &right).kernel, "multiply_row_f32");
    assert_eq!(launch(WeightDtype::F32, right), None);
    assert_eq!(launch(WeightDtype::Bf16, Product { inputs: 9, ..right }), None);
    assert_eq!(launch(WeightDtype::Bf16, Product { x: DeviceAddress(2), ..right }), None);
}
