//! Products and attention by what Hopper has, beside the same references.

use super::{
    on_hoppers,
    product::{Case as ProductCase, check_company, multiply_by},
    prompt_attention::{Case, check_by, run_by},
    support::assert_same_bits,
};
use tidemill_kernels::{
    cuda::{
        ComputeCapability, DeviceAddress, DeviceIdentity, Driver, Launch, Product, PromptAttention,
        Properties,
        hopper::{self, BlockRange},
    },
    kv::KvDtype,
    matrix::WeightDtype,
};

fn multiply(device: &dyn Driver, case: &ProductCase) -> Vec<f32> {
    multiply_by(device, case, |parameters| {
        let launch = hopper::multiply(device.properties(), case.dtype, false, parameters);
        launch.expect("whole packs of 16 bits")
    })
}

#[test]
fn products_of_any_size() {
    on_hoppers(|device| {
        for dtype in [WeightDtype::F16, WeightDtype::Bf16] {
            for size in [
                // More stages than the ring has, and the last of them not full.
                (65, 456, 40, false, true),
                (70, 72, 3, true, false),
                (129, 64, 131, true, true),
                // Several tiles for each block, wide ones and narrow ones.
                (300, 136, 264, true, true),
                (130, 520, 700, false, false),
            ] {
                let case = ProductCase::new(size, dtype, dtype, 173);
                case.check(&multiply(device, &case));
            }
        }
    });
}

#[test]
fn a_row_of_a_product_is_the_same_in_any_company() {
    on_hoppers(|device| {
        let parts = [(0, 1), (70, 66), (3, 129)];
        check_company([140, 328, 48], 174, &parts, |case| multiply(device, case));
    });
}

#[test]
fn a_product_takes_the_tiles_that_keep_the_gpu_busy() {
    let properties = properties(hopper::CAPABILITY);
    for (rows, outputs, kernel, blocks) in [
        (2048, 14336, "multiply_wide_256_bf16", 132),
        (2048, 4096, "multiply_wide_256_bf16", 132),
        (128, 4096, "multiply_wide_128_bf16", 32),
        (65, 256, "multiply_wide_128_bf16", 2),
    ] {
        let parameters = Product { rows, outputs, ..product() };
        let launch = hopper::multiply(&properties, WeightDtype::Bf16, false, &parameters).expect("it fits");
        let expected = (kernel, [blocks.min((rows.div_ceil(128)) * outputs.div_ceil(128)), 1, 1]);
        assert_eq!((launch.kernel, launch.grid), expected, "{rows} rows, {outputs} outputs");
        assert!(launch.shared_bytes <= properties.shared_bytes, "{kernel}");
    }
}

#[test]
fn what_is_not_for_hopper_is_for_the_other_kernels() {
    let properties = properties(hopper::CAPABILITY);
    let of = |properties: &Properties, dtype, to_f32, product: Product| {
        hopper::multiply(properties, dtype, to_f32, &product).is_some()
    };
    assert!(of(&properties, WeightDtype::Bf16, false, product()));
    for (major, minor) in [(8, 0), (8, 9), (10, 0), (12, 0)] {
        let other = self::properties(ComputeCapability { major, minor });
        assert!(!of(&other, WeightDtype::Bf16, false, product()), "{major}.{minor}");
    }
    assert!(!of(&properties, WeightDtype::F32, false, product()));
    assert!(!of(&properties, WeightDtype::Bf16, true, product()));
    assert!(!of(&properties, WeightDtype::Bf16, false, Product { inputs: 9, ..product() }));
    assert!(!of(&properties, WeightDtype::Bf16, false, Product { x: DeviceAddress(8), ..product() }));
}

fn product() -> Product {
    let null = DeviceAddress::NULL;
    Product { out: null, x: null, w: null, bias: null, rows: 128, inputs: 64, outputs: 64, adds: 0 }
}

fn properties(compute_capability: ComputeCapability) -> Properties {
    Properties {
        name: "a GPU".to_owned(),
        compute_capability,
        multiprocessors: 132,
        memory_bandwidth: 0,
        shared_bytes: 227 << 10,
        identity: DeviceIdentity::default(),
    }
}

// ---- Attention --------------------------------------------------------------------------------------------------------------

fn launcher(
    device: &dyn Driver,
    dtype: WeightDtype,
) -> impl Fn(u32, u32, &BlockRange, &PromptAttention) -> Option<Launch> {
    move |tiles, rows, blocks, prompt| {
        hopper::attend_prompts(device.properties(), dtype, tiles, rows, blocks, prompt)
    }
}

const CASE: Case = Case {
    dtype: WeightDtype::Bf16,
    kv_dtype: KvDtype::Bf16,
    query_heads: 2,
    kv_heads: 1,
    head_size: 64,
    window: None,
    chunks: &[],
};

#[test]
fn attention_of_both_types_and_heads() {
    on_hoppers(|device| {
        for (dtype, kv_dtype) in [(WeightDtype::F16, KvDtype::F16), (WeightDtype::Bf16, KvDtype::Bf16)] {
            for (query_heads, kv_heads, head_size) in [(2, 1, 64), (6, 2, 64), (4, 2, 128)] {
                let chunks = &[(0, 3), (120, 20)];
                let case = Case { dtype, kv_dtype, query_heads, kv_heads, head_size, chunks, ..CASE };
                check_by(device, &case, &launcher(device, dtype));
            }
        }
    });
}

#[test]
fn attention_of_chunks_prefixes_and_windows() {
    on_hoppers(|device| {
        for window in [None, Some(1), Some(17), Some(128), Some(200)] {
            for chunks in [&[(0, 64)][..], &[(0, 65)], &[(63, 2), (127, 2)], &[(240, 66)]] {
                check_by(device, &Case { window, chunks, ..CASE }, &launcher(device, CASE.dtype));
            }
        }
    });
}

#[test]
fn chunks_make_no_difference_to_attention() {
    on_hoppers(|device| {
        for window in [None, Some(40)] {
            let run =
                |chunks| run_by(device, &Case { window, chunks, ..CASE }, &launcher(device, CASE.dtype)).0;
            let whole = run(&[(0, 150)]);
            for chunks in [&[(0, 37)][..], &[(37, 113)], &[(149, 1)]] {
                let (first, rows) = chunks[0];
                let expected = &whole[first * CASE.width()..(first + rows) * CASE.width()];
                assert_same_bits(&run(chunks), expected, &format!("{chunks:?}, window {window:?}"));
            }
        }
    });
}
