//! Matrix products on tensor cores.

use super::{
    on_devices,
    product::{Case, check_company, multiply_by},
};
use tidemill_kernels::{
    cuda::{DeviceAddress, Driver, Product, launches},
    matrix::WeightDtype,
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
            for size in [
                (1, 8, 1, false, false),
                (5, 456, 34, false, true),
                (17, 72, 3, true, false),
                (65, 168, 65, true, true),
                (129, 40, 131, true, false),
            ] {
                let out = if to_f32 { WeightDtype::F32 } else { dtype };
                let case = Case::new(size, dtype, out, 73);
                case.check(&multiply(device, &case));
            }
        }
    });
}

#[test]
fn a_row_is_the_same_in_any_company() {
    on_devices(|device| {
        let parts = [(0, 1), (70, 1), (130, 1), (3, 16), (60, 17), (10, 64)];
        check_company([131, 456, 5], 74, &parts, |case| multiply(device, case));
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
