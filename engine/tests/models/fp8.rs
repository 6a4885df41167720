//! Checkpoints that hold codes of E4M3, made here out of a fixture model as their makers write them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use super::bench::fixture;
use super::quantized::{cosine, logits};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;
use tidemill_engine::handle::{LoadFormat, ModelSource, Quantization};
use tidemill_engine::models::{LoadOptions, Model, ModelError};
use tidemill_kernels::matrix::{MatrixSource, PackedMatrix, WeightDtype, WeightFormat};
use tidemill_kernels::reference::{E4M3_GREATEST, e4m3_to_f32, f32_to_e4m3, widen_matrix};

/// Outputs and inputs of a block that shares a scale.
const BLOCK: usize = 24;

/// How a maker shares scales, and what it calls them.
struct Maker {
    name: &'static str,
    /// Outputs and inputs that share one.
    share: fn([usize; 2]) -> [usize; 2],
    scales: &'static str,
    /// Shape of the scales, of which there are so many along each axis.
    shape: fn([usize; 2]) -> Vec<usize>,
    config: fn() -> Value,
    format: Quantization,
}

const MAKERS: [Maker; 4] = [
    Maker {
        name: "compressed-tensors, per channel",
        share: |[_, inputs]| [1, inputs],
        scales: "weight_scale",
        shape: |counts| counts.to_vec(),
        config: || compressed("channel"),
        format: Quantization::Fp8,
    },
    Maker {
        name: "compressed-tensors, per tensor",
        share: |shape| shape,
        scales: "weight_scale",
        shape: |_| vec![1],
        config: || compressed("tensor"),
        format: Quantization::Fp8,
    },
    Maker {
        name: "fp8, per tensor",
        share: |shape| shape,
        scales: "weight_scale",
        shape: |_| vec![],
        config: || json!({"quant_method": "fp8", "activation_scheme": "static"}),
        format: Quantization::Fp8,
    },
    Maker {
        name: "fp8 in blocks",
        share: |_| [BLOCK, BLOCK],
        scales: "weight_scale_inv",
        shape: |counts| counts.to_vec(),
        config: || json!({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}),
        // Nothing holds these as they are.
        format: Quantization::Int8,
    },
];

fn compressed(strategy: &str) -> Value {
    let weights = json!({"type": "float", "num_bits": 8, "strategy": strategy, "symmetric": true});
    let activations = json!({"type": "float", "num_bits": 8, "strategy": "token", "dynamic": true});
    json!({
        "quant_method": "compressed-tensors", "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
    })
}

/// Tensors of a checkpoint: type, shape and content.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// The tensors of a fixture, with projections in codes; and what these stand for.
fn coded(maker: &Maker) -> (Tensors, BTreeMap<String, Vec<f32>>) {
    let bytes = fs::read(fixture(MODEL).join("model.safetensors")).expect("the fixture is committed");
    let file = SafeTensors::deserialize(&bytes).expect("the fixture is whole");
    let (mut tensors, mut stands_for) = (Tensors::new(), BTreeMap::new());
    for (name, view) in file.tensors() {
        if !name.ends_with("_proj.weight") {
            tensors.insert(name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()));
            continue;
        }
        let shape = [view.shape()[0], view.shape()[1]];
        let values = widen_matrix(MatrixSource { bytes: view.data(), dtype: dtype_of(view.dtype()) });
        let share = (maker.share)(shape);
        let counts = [shape[0].div_ceil(share[0]), shape[1].div_ceil(share[1])];
        let group = |index: usize| index / shape[1] / share[0] * counts[1] + index % shape[1] / share[1];
        let mut scales = vec![0.0f32; counts[0] * counts[1]];
        for (index, value) in values.iter().enumerate() {
            scales[group(index)] = scales[group(index)].max(value.abs() / E4M3_GREATEST);
        }
        let coded = values.iter().enumerate().map(|(index, value)| f32_to_e4m3(value / scales[group(index)]));
        let codes: Vec<u8> = coded.collect();
        let meant = codes.iter().enumerate().map(|(index, code)| e4m3_to_f32(*code) * scales[group(index)]);
        stands_for.insert(name.clone(), meant.collect());
        let stored = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        let part = name.strip_suffix("weight").expect("it ends so");
        tensors.insert(format!("{part}{}", maker.scales), (Dtype::F32, (maker.shape)(counts), stored));
        // What is there and not used: scales of activations and of the cache.
        let one = || (Dtype::F32, vec![1], 1f32.to_le_bytes().to_vec());
        tensors.insert(format!("{part}input_scale"), one());
        if let Some(attention) = name.strip_suffix("k_proj.weight") {
            tensors.insert(format!("{attention}k_scale"), one());
            tensors.insert(format!("{attention}v_scale"), one());
        }
        tensors.insert(name, (Dtype::F8_E4M3, shape.to_vec(), codes));
    }
    (tensors, stands_for)
}

fn dtype_of(dtype: Dtype) -> WeightDtype {
    match dtype {
        Dtype::F32 => WeightDtype::F32,
        Dtype::F16 => WeightDtype::F16,
        Dtype::BF16 => WeightDtype::Bf16,
        other => panic!("the fixture has {other:?}"),
    }
}

/// A copy of the fixture with other tensors, and with `quantization_config`.
fn folder(tensors: &Tensors, packing: Option<Value>) -> TempDir {
    let folder = tempfile::tempdir().expect("a place for temporary files");
    for entry in fs::read_dir(fixture(MODEL)).expect("the fixture is committed") {
        let path = entry.expect("the fixture can be listed").path();
        let name = path.file_name().expect("it is a file");
        fs::copy(&path, folder.path().join(name)).expect("it can be copied");
    }
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).expect("shape and bytes agree"))
    });
    let bytes = safetensors::serialize(views, None).expect("it can be written");
    fs::write(folder.path().join("model.safetensors"), bytes).expect("the copy can be written");
    let path = folder.path().join("config.json");
    let mut config: Value =
        serde_json::from_slice(&fs::read(&path).expect("it is there")).expect("it is JSON");
    if let Some(packing) = packing {
        config["quantization_config"] = packing;
    }
    fs::write(&path, config.to_string()).expect("the copy can be written");
    folder
}

fn load(folder: &Path) -> Result<Arc<Model>, ModelError> {
    let options = LoadOptions { threads: 2, format: LoadFormat::Safetensors, quantization: None };
    Model::load_with(options, &ModelSource::Folder(folder.into()), &mut |_| {}).map(Arc::new)
}

fn values(matrix: &PackedMatrix) -> Vec<f32> {
    let mut values = vec![0.0; matrix.outputs() * matrix.inputs()];
    for (row, out) in values.chunks_exact_mut(matrix.inputs()).enumerate() {
        matrix.row(row, out);
    }
    values
}

#[test]
fn codes_are_computed_with_as_they_come() {
    let prompt: Vec<u32> = (0..40).map(|index| 3 + index * 11 % 200).collect();
    for maker in &MAKERS {
        let (tensors, stands_for) = coded(maker);
        let model = load(folder(&tensors, Some((maker.config)())).path()).expect(maker.name);
        for (layer, weights) in model.weights.layers.iter().enumerate() {
            let parts = [("self_attn.q_proj", &weights.query), ("mlp.down_proj", &weights.down)];
            for (part, linear) in parts {
                let expected = &stands_for[&format!("model.layers.{layer}.{part}.weight")];
                let name = format!("{}: {part} of layer {layer}", maker.name);
                assert_eq!(linear.matrix.format(), WeightFormat::Quantized(maker.format), "{name}");
                let found = values(&linear.matrix);
                let inputs = linear.matrix.inputs();
                for (found, expected) in found.chunks(inputs).zip(expected.chunks(inputs)) {
                    let greatest = expected.iter().fold(0.0f32, |most, value| most.max(value.abs()));
                    let half_step = greatest / 254.0 * 1.001;
                    let bound = if maker.format == Quantization::Fp8 { 0.0 } else { half_step };
                    let near = |(a, b): (&f32, &f32)| (a - b).abs() <= bound;
                    assert!(found.iter().zip(expected).all(near), "{name}");
                }
            }
        }
        // The same weights in f32: what is left is the rounding of activations.
        let mut plain = tensors;
        plain.retain(|name, _| !name.contains("_scale"));
        for (name, values) in stands_for {
            let shape = plain[&name].1.clone();
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            plain.insert(name, (Dtype::F32, shape, bytes));
        }
        let plain = load(folder(&plain, None).path()).expect("a plain checkpoint");
        let (found, expected) = (logits(&model, &prompt), logits(&plain, &prompt));
        let cosine = cosine(&found.concat(), &expected.concat());
        assert!((0.98..1.0).contains(&cosine), "{}: a cosine of {cosine}", maker.name);
    }
}

#[test]
fn codes_whose_scales_do_not_fit_are_refused() {
    type Change = fn(&mut Tensors);
    fn of(tensors: &mut Tensors, suffix: &str) -> String {
        let name = tensors.keys().find(|name| name.ends_with(suffix)).expect("there is one");
        name.clone()
    }
    #[rustfmt::skip]
    let rows: [(&str, Change, &str); 3] = [
        ("none",            |it| { let name = of(it, "weight_scale"); it.remove(&name); }, "weight_scale` cannot be unpacked: it is missing"),
        ("too few",         |it| { let name = of(it, "weight_scale"); it.insert(name, (Dtype::F32, vec![3, 1], vec![0; 12])); }, "weight_scale` cannot be unpacked: its shape is [3, 1]"),
        ("of another type", |it| { let name = of(it, "weight_scale"); it.insert(name, (Dtype::F8_E4M3, vec![1], vec![0])); }, "weight_scale` cannot be unpacked: it is stored as F8_E4M3"),
    ];
    for (name, change, expected) in rows {
        let (mut tensors, _) = coded(&MAKERS[0]);
        change(&mut tensors);
        let error = load(folder(&tensors, Some((MAKERS[0].config)())).path()).map(drop).expect_err(name);
        assert!(error.to_string().contains(expected), "{name}: {error}");
    }
}

const MODEL: &str = "llama3";
