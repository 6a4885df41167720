//! Tensors of a GGUF file, by the names and in the order of rows that checkpoints of transformers have.

use std::borrow::Cow;

use tidemill_kernels::matrix::WeightDtype;

use super::TensorSource;
use super::checkpoint::listed;
use super::gguf_blocks::{group_of, unpack};
use super::tensor::{Groups, PlainTensor, QuantizedMatrix, Steps, Tensor, exact_format};
use super::tensors::{
    DOWN, EMBEDDING, FINAL_NORM, GATE, HEAD, INPUT_NORM, KEY, KEY_NORM, MLP_NORM, OUTPUT, QUERY, QUERY_NORM,
    TensorSpec, UP, VALUE, layer_of,
};
use crate::gguf::{GgufTensor, TensorType};
use crate::models::{GgufModel, ModelError, ModelSpec, ROPE_FACTORS};

/// The tensors of a file.
#[derive(Debug)]
pub(super) struct GgufTensors<'a> {
    model: &'a GgufModel,
    heads: usize,
    kv_heads: usize,
}

/// From the rows of a matrix of transformers to those of a file.
#[derive(Clone, Copy, Debug)]
struct RowOrder {
    /// Rows of a head whose elements lie in pairs; `None` where the order is the same.
    pairs: Option<usize>,
}

impl<'a> GgufTensors<'a> {
    /// Checks that the file holds exactly the tensors that `spec` asks for, each of its shape and of a type that is read.
    pub(super) fn check(
        model: &'a GgufModel,
        spec: &ModelSpec,
        wanted: &[TensorSpec],
    ) -> Result<Self, ModelError> {
        let tensors = model.file.header().tensors();
        let label = || model.file.label().to_owned();
        let names: Vec<String> = wanted.iter().map(|tensor| name_in_file(&tensor.name)).collect();
        let missing = names.iter().map(String::as_str).filter(|name| !tensors.contains_key(*name));
        if let Some((count, names)) = listed(missing) {
            return Err(ModelError::MissingTensors { file: label(), count, names });
        }
        let has_place = |name: &str| name == ROPE_FACTORS || names.iter().any(|known| known == name);
        let unexpected = tensors.keys().map(String::as_str).filter(|name| !has_place(name));
        if let Some((count, names)) = listed(unexpected) {
            return Err(ModelError::UnexpectedTensors { file: label(), count, names });
        }
        for (wanted, name) in wanted.iter().zip(&names) {
            let GgufTensor { shape, kind, .. } = &tensors[name];
            if *shape != wanted.shape {
                return Err(ModelError::WrongShape {
                    tensor: name.clone(),
                    expected: wanted.shape.clone(),
                    found: shape.clone(),
                });
            }
            let is_read = plain(*kind).is_some() || (shape.len() == 2 && group_of(*kind).is_some());
            if !is_read {
                let supported =
                    if shape.len() == 2 { TensorType::supported() } else { "F32, F16, BF16".into() };
                let (tensor, found) = (name.clone(), kind.to_string());
                return Err(ModelError::WrongDtype { tensor, found, supported });
            }
        }
        Ok(Self { model, heads: spec.heads, kv_heads: spec.kv_heads })
    }

    /// Bytes of all tensors that will be read.
    pub(super) fn bytes(&self, wanted: &[TensorSpec]) -> Result<u64, ModelError> {
        let length =
            |tensor: &TensorSpec| self.data(&name_in_file(&tensor.name)).map(|data| data.len() as u64);
        wanted.iter().map(length).sum()
    }

    fn data(&self, name: &str) -> Result<&'a [u8], ModelError> {
        self.model.file.data_of(name).map_err(|source| self.model.error(source))
    }

    /// How the rows of a tensor lie.
    fn order(&self, name: &str, rows: usize) -> RowOrder {
        let heads = match layer_of(name) {
            Some((_, part)) if part.starts_with(QUERY) => self.heads,
            Some((_, part)) if part.starts_with(KEY) => self.kv_heads,
            _ => return RowOrder { pairs: None },
        };
        RowOrder { pairs: self.model.has_pairs().then(|| rows / heads) }
    }
}

impl RowOrder {
    /// Where row `row` lies. In a file the elements that turn together are neighbours, in a checkpoint half a head apart.
    const fn place(self, row: usize) -> usize {
        let Some(head_size) = self.pairs else { return row };
        let (head, element) = (row / head_size, row % head_size);
        let half = head_size / 2;
        head * head_size + element % half * 2 + element / half
    }
}

impl TensorSource for GgufTensors<'_> {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor<'_>, ModelError> {
        let file_name = name_in_file(name);
        let kind = self.model.file.header().tensors()[&file_name].kind;
        let bytes = self.data(&file_name)?;
        let rows = shape[0];
        let order = self.order(name, rows);
        let row_bytes = bytes.len() / rows.max(1);
        let row = move |index: usize| &bytes[order.place(index) * row_bytes..][..row_bytes];
        if let Some(dtype) = plain(kind) {
            let bytes = match order.pairs {
                None => Cow::Borrowed(bytes),
                Some(_) => Cow::Owned((0..rows).flat_map(row).copied().collect()),
            };
            return Ok(Tensor::Plain(PlainTensor { bytes, dtype }));
        }
        let group = group_of(kind).expect("types have been checked");
        let inputs = shape[1];
        let bits = if kind == TensorType::Q4_0 { Some(4) } else { None };
        Ok(Tensor::Quantized(QuantizedMatrix {
            kind: kind.to_string(),
            inputs,
            groups: Groups::Of(group),
            steps: Steps::Whole,
            exact: bits.and_then(|bits| exact_format(bits, group, inputs)),
            unpack: Box::new(move |index, out| unpack(kind, row(index), out)),
            parts: vec![(format!("{kind} {order:?}"), bytes)],
        }))
    }
}

/// The type in memory of a type that is no block of few bits.
const fn plain(kind: TensorType) -> Option<WeightDtype> {
    match kind {
        TensorType::F32 => Some(WeightDtype::F32),
        TensorType::F16 => Some(WeightDtype::F16),
        TensorType::BF16 => Some(WeightDtype::Bf16),
        _ => None,
    }
}

/// What a file calls a tensor of a checkpoint.
fn name_in_file(name: &str) -> String {
    let known = |name: &str| NAMES.iter().find(|(known, _)| *known == name).map(|(_, name)| *name);
    if let Some((layer, part)) = layer_of(name) {
        // A part is a norm's whole name, or a projection's with `.weight` or `.bias` after it.
        let (part, what) = match known(part) {
            Some(whole) => return format!("blk.{layer}.{whole}"),
            None => part.rsplit_once('.').expect("a projection's tensors have two words"),
        };
        return format!("blk.{layer}.{}.{what}", known(part).expect("every part has a name"));
    }
    known(name).expect("every tensor has a name").into()
}

const NAMES: [(&str, &str); 14] = [
    (EMBEDDING, "token_embd.weight"),
    (FINAL_NORM, "output_norm.weight"),
    (HEAD, "output.weight"),
    (INPUT_NORM, "attn_norm.weight"),
    (MLP_NORM, "ffn_norm.weight"),
    (QUERY_NORM, "attn_q_norm.weight"),
    (KEY_NORM, "attn_k_norm.weight"),
    (QUERY, "attn_q"),
    (KEY, "attn_k"),
    (VALUE, "attn_v"),
    (OUTPUT, "attn_output"),
    (GATE, "ffn_gate"),
    (UP, "ffn_up"),
    (DOWN, "ffn_down"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_have_the_names_of_the_format() {
        let rows = [
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("model.norm.weight", "output_norm.weight"),
            ("lm_head.weight", "output.weight"),
            ("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight"),
            ("model.layers.12.self_attn.q_proj.bias", "blk.12.attn_q.bias"),
            ("model.layers.3.self_attn.q_norm.weight", "blk.3.attn_q_norm.weight"),
            ("model.layers.3.mlp.down_proj.weight", "blk.3.ffn_down.weight"),
        ];
        for (name, expected) in rows {
            assert_eq!(name_in_file(name), expected);
        }
    }

    #[test]
    fn rows_in_pairs_are_found() {
        let order = RowOrder { pairs: Some(6) };
        let places: Vec<usize> = (0..12).map(|row| order.place(row)).collect();
        assert_eq!(places, [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]);
        assert_eq!(RowOrder { pairs: None }.place(7), 7);
    }
}
