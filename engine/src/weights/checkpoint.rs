//! Tensors in safetensors files: one file, or shards with an index.

use std::collections::{BTreeMap, BTreeSet};

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::Value;
use tidemill_kernels::matrix::WeightDtype;

use super::TensorSource;
use super::packed::{self, PackedParts};
use super::tensor::{PlainTensor, Tensor};
use super::tensors::{TensorSpec, is_ignored, projection_of, weight};
use crate::models::{FileBytes, ModelError, ModelFiles, ModelSpec, Packing, parse_json};

/// The open files of a checkpoint.
#[derive(Debug)]
pub(super) struct CheckpointFiles {
    /// What errors call the whole: the one file, or the index.
    label: String,
    /// Label and content of each file, by name.
    files: BTreeMap<String, (String, FileBytes)>,
    /// Which file holds which tensor; `None` when there is one file.
    weight_map: Option<BTreeMap<String, String>>,
}

/// Every tensor of a checkpoint, by name.
#[derive(Debug)]
pub(super) struct Checkpoint<'a> {
    label: &'a str,
    tensors: BTreeMap<String, TensorView<'a>>,
    packing: Option<Packing>,
}

impl CheckpointFiles {
    /// Finds and maps the files.
    pub(super) fn open(model: ModelFiles<'_>) -> Result<Self, ModelError> {
        let Some(index) = model.read_if_present(INDEX_FILE)? else {
            let file = (model.label(SINGLE_FILE), model.map(SINGLE_FILE)?);
            let files = BTreeMap::from([(SINGLE_FILE.into(), file)]);
            return Ok(Self { label: model.label(SINGLE_FILE), files, weight_map: None });
        };
        let label = model.label(INDEX_FILE);
        let weight_map = read_weight_map(&label, &index)?;
        let mut files = BTreeMap::new();
        for name in weight_map.values() {
            if !files.contains_key(name) {
                files.insert(name.clone(), (model.label(name), model.map(name)?));
            }
        }
        Ok(Self { label, files, weight_map: Some(weight_map) })
    }

    /// Reads the headers of all files, whose matrices may be packed.
    pub(super) fn checkpoint(&self, packing: Option<Packing>) -> Result<Checkpoint<'_>, ModelError> {
        let mut tensors = BTreeMap::new();
        for (name, (label, bytes)) in &self.files {
            let file = SafeTensors::deserialize(bytes)
                .map_err(|source| ModelError::Weights { file: label.clone(), source })?;
            for (tensor, view) in file.tensors() {
                // A tensor is taken from the shard that the index names, should another hold a copy.
                if self.weight_map.as_ref().is_none_or(|map| map.get(&tensor) == Some(name)) {
                    tensors.insert(tensor, view);
                }
            }
        }
        Ok(Checkpoint { label: &self.label, tensors, packing })
    }
}

impl<'a> Checkpoint<'a> {
    /// Checks that the files hold exactly the tensors that `spec` asks for, each of its shape and of a type that is read.
    pub(super) fn check(&self, spec: &ModelSpec, wanted: &[TensorSpec]) -> Result<(), ModelError> {
        let (mut missing, mut known) = (Vec::new(), BTreeSet::new());
        for TensorSpec { name, shape } in wanted {
            if let Some((packing, parts)) = self.parts_of(name) {
                packed::open(packing, &parts, shape)?;
                known.extend(parts.names());
            } else if let Some(view) = self.tensors.get(name) {
                if view.shape() != shape {
                    let (expected, found) = (shape.clone(), view.shape().into());
                    return Err(ModelError::WrongShape { tensor: name.clone(), expected, found });
                }
                dtype(name, view)?;
                known.insert(name.clone());
            } else {
                missing.push(&**name);
            }
        }
        if let Some((count, names)) = listed(missing.into_iter()) {
            return Err(ModelError::MissingTensors { file: self.label.into(), count, names });
        }
        let names = self.tensors.keys().map(String::as_str);
        let unexpected = names
            .filter(|name| !known.contains(*name) && !is_ignored(spec, name) && !self.is_empty_bias(name));
        if let Some((count, names)) = listed(unexpected) {
            return Err(ModelError::UnexpectedTensors { file: self.label.into(), count, names });
        }
        Ok(())
    }

    /// Bytes of all tensors that will be read.
    pub(super) fn bytes(&self, wanted: &[TensorSpec]) -> u64 {
        let bytes = |name: &str| match self.parts_of(name) {
            Some((_, parts)) => parts.bytes(),
            None => self.tensors[name].data().len() as u64,
        };
        wanted.iter().map(|tensor| bytes(&tensor.name)).sum()
    }

    /// The parts of a matrix that is packed.
    fn parts_of(&self, name: &str) -> Option<(Packing, PackedParts<'_, 'a>)> {
        let packing = self.packing?;
        let parts = PackedParts::find(packing, &self.tensors, projection_of(name)?)?;
        Some((packing, parts))
    }

    /// Whether this is a bias of zeros, which tools for GPTQ add to projections that have none.
    fn is_empty_bias(&self, name: &str) -> bool {
        let is_packed =
            || name.strip_suffix(".bias").is_some_and(|part| self.parts_of(&weight(part)).is_some());
        is_packed() && self.tensors[name].data().iter().all(|byte| *byte == 0)
    }
}

impl TensorSource for Checkpoint<'_> {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor<'_>, ModelError> {
        if let Some((packing, parts)) = self.parts_of(name) {
            return packed::open(packing, &parts, shape).map(Tensor::Quantized);
        }
        let view = &self.tensors[name];
        Ok(Tensor::Plain(PlainTensor { bytes: view.data().into(), dtype: dtype(name, view)? }))
    }
}

fn dtype(name: &str, view: &TensorView<'_>) -> Result<WeightDtype, ModelError> {
    packed::dtype_of(view).ok_or_else(|| ModelError::WrongDtype {
        tensor: name.into(),
        found: format!("{:?}", view.dtype()),
        supported: "BF16, F16, F32".into(),
    })
}

fn read_weight_map(label: &str, index: &[u8]) -> Result<BTreeMap<String, String>, ModelError> {
    let value = parse_json(label, index)?;
    let bad = |field: &str, expected: &str, found: &Value| ModelError::BadField {
        file: label.into(),
        field: field.into(),
        expected: expected.into(),
        found: found.to_string(),
    };
    let Some(map) = value.get("weight_map") else {
        return Err(ModelError::MissingField { file: label.into(), field: "weight_map".into() });
    };
    let entries = map.as_object().ok_or_else(|| bad("weight_map", "an object", map))?;
    let entry = |(tensor, file): (&String, &Value)| match file.as_str() {
        // A shard lies beside its index; a path could name any file of the machine.
        Some(name) if !name.contains(['/', '\\']) => Ok((tensor.clone(), name.to_owned())),
        _ => Err(bad(&format!("weight_map.{tensor}"), "the name of a file in the same folder", file)),
    };
    entries.iter().map(entry).collect()
}

/// How many names there are and the first few of them; `None` when there is none.
pub(super) fn listed<'a>(names: impl Iterator<Item = &'a str>) -> Option<(usize, String)> {
    let names: Vec<&str> = names.collect();
    let shown = names.iter().take(MOST_LISTED).copied().collect::<Vec<_>>().join(", ");
    let more = if MOST_LISTED < names.len() { ", …" } else { "" };
    (!names.is_empty()).then(|| (names.len(), format!("{shown}{more}")))
}

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
const MOST_LISTED: usize = 5;
