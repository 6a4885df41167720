//! A decoder's weights, packed for the kernels while they are read.
//!
//! Tensors are taken one by one from a checkpoint or made from a seed; each is hashed into the model's fingerprint, packed
//! and let go, so that at no time more than one tensor exists twice. All threads work on the same one.

mod checkpoint;
mod dummy;
mod fingerprint;
mod tensors;

use std::borrow::Cow;

use tidemill_kernels::matrix::{Embedding, MatrixSource, PackedMatrix, WeightDtype};
use tidemill_kernels::reference::widen_matrix;

use crate::handle::{LoadFormat, LoadProgress, Quantization};
use crate::models::{LoadOptions, ModelError, ModelFiles, ModelSpec};
use checkpoint::CheckpointFiles;
use dummy::Dummy;
use fingerprint::Fingerprint;
use tensors::{
    DOWN, EMBEDDING, FINAL_NORM, GATE, HEAD, INPUT_NORM, KEY, KEY_NORM, MLP_NORM, OUTPUT, QUERY, QUERY_NORM,
    TensorSpec, UP, VALUE, bias, layer_prefix, weight,
};

/// All weights of a decoder.
#[derive(Debug)]
pub struct Weights {
    /// The embedding, never quantised, unless it is also the head.
    pub embedding: Option<Embedding>,
    /// The decoder layers, first to last.
    pub layers: Vec<LayerWeights>,
    /// Scale of the norm before the head: `[hidden]`.
    pub final_norm: Vec<f32>,
    /// `[vocabulary][hidden]`.
    pub head: PackedMatrix,
}

/// Weights of one decoder layer.
#[derive(Debug)]
pub struct LayerWeights {
    /// Scale of the norm before attention: `[hidden]`.
    pub input_norm: Vec<f32>,
    /// `[query heads * head size][hidden]`.
    pub query: Linear,
    /// `[KV heads * head size][hidden]`.
    pub key: Linear,
    /// `[KV heads * head size][hidden]`.
    pub value: Linear,
    /// Scales of the norms of each head of query and key, `[head size]` each.
    pub head_norms: Option<HeadNorms>,
    /// `[hidden][query heads * head size]`.
    pub output: Linear,
    /// Scale of the norm before the feed-forward part: `[hidden]`.
    pub mlp_norm: Vec<f32>,
    /// `[intermediate][hidden]`.
    pub gate: Linear,
    /// `[intermediate][hidden]`.
    pub up: Linear,
    /// `[hidden][intermediate]`.
    pub down: Linear,
}

/// Scales of the norms of each head.
#[derive(Debug)]
pub struct HeadNorms {
    /// For the query.
    pub query: Vec<f32>,
    /// For the key.
    pub key: Vec<f32>,
}

/// A projection.
#[derive(Debug)]
pub struct Linear {
    /// Its matrix.
    pub matrix: PackedMatrix,
    /// Added to its output.
    pub bias: Option<Vec<f32>>,
}

/// Weights and what was learned while they were read.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) weights: Weights,
    pub(crate) fingerprint: String,
    /// Type of the embedding, which stands for that of the model.
    pub(crate) dtype: WeightDtype,
}

/// Where tensors come from.
trait TensorSource {
    /// The tensor of that name and shape.
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor<'_>, ModelError>;
}

/// One tensor, row by row, little-endian.
struct Tensor<'a> {
    bytes: Cow<'a, [u8]>,
    dtype: WeightDtype,
}

/// Reads or makes all weights of a decoder.
pub(crate) fn load(
    spec: &ModelSpec,
    files: ModelFiles<'_>,
    options: LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Loaded, ModelError> {
    let wanted = tensors::tensors(spec);
    match options.format {
        LoadFormat::Safetensors => {
            let files = CheckpointFiles::open(files)?;
            let mut checkpoint = files.checkpoint()?;
            checkpoint.check(spec, &wanted)?;
            let total = checkpoint.bytes(&wanted);
            read_all(spec, &mut checkpoint, total, options, progress)
        }
        LoadFormat::Dummy { seed } => {
            let elements: u64 = wanted.iter().map(TensorSpec::elements).sum();
            let total = elements * spec.dtype.bytes() as u64;
            let mut dummy = Dummy { seed, dtype: spec.dtype, threads: options.threads };
            read_all(spec, &mut dummy, total, options, progress)
        }
    }
}

fn read_all(
    spec: &ModelSpec,
    source: &mut dyn TensorSource,
    total: u64,
    options: LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Loaded, ModelError> {
    let fingerprint = Fingerprint::of(spec, options.quantization, total);
    Loading { spec, source, fingerprint, options, progress, done: 0, total }.run()
}

/// The head has 8 bits where all else has 4: its errors are those of the logits.
const fn head_quantization(quantization: Quantization) -> Quantization {
    match quantization {
        Quantization::Int8 | Quantization::Int4 { .. } => Quantization::Int8,
    }
}

/// Takes the tensors one by one, and keeps account of them.
struct Loading<'a> {
    spec: &'a ModelSpec,
    source: &'a mut dyn TensorSource,
    fingerprint: Fingerprint,
    options: LoadOptions,
    progress: &'a mut dyn FnMut(LoadProgress),
    done: u64,
    total: u64,
}

impl Loading<'_> {
    fn run(mut self) -> Result<Loaded, ModelError> {
        let spec = self.spec;
        let table = [spec.vocab_size, spec.hidden_size];
        self.report();
        let embed = |source: MatrixSource<'_>| Embedding::new(table[0], table[1], source);
        let pack_head = self.packer(table, self.options.quantization.map(head_quantization));
        let (embedding, head, dtype) = match (spec.tied_embeddings, self.options.quantization) {
            (true, None) => {
                let pack = |source: MatrixSource<'_>| (pack_head(source), source.dtype);
                let (head, dtype) = self.take(EMBEDDING, &table, pack)?;
                (None, Some(head), dtype)
            }
            (true, Some(_)) => {
                let pack = |source: MatrixSource<'_>| (embed(source), pack_head(source), source.dtype);
                let (embedding, head, dtype) = self.take(EMBEDDING, &table, pack)?;
                (Some(embedding), Some(head), dtype)
            }
            (false, _) => {
                let pack = |source: MatrixSource<'_>| (embed(source), source.dtype);
                let (embedding, dtype) = self.take(EMBEDDING, &table, pack)?;
                (Some(embedding), None, dtype)
            }
        };
        let layers = (0..spec.layers).map(|layer| self.layer(layer)).collect::<Result<_, _>>()?;
        let final_norm = self.vector(FINAL_NORM, spec.hidden_size)?;
        let head = match head {
            Some(head) => head,
            None => self.take(HEAD, &table, pack_head)?,
        };
        let weights = Weights { embedding, layers, final_norm, head };
        Ok(Loaded { weights, fingerprint: self.fingerprint.text(), dtype })
    }

    fn layer(&mut self, layer: usize) -> Result<LayerWeights, ModelError> {
        let spec = self.spec;
        let (hidden, inner) = (spec.hidden_size, spec.intermediate_size);
        let (query, kv) = (spec.query_size(), spec.kv_size());
        let prefix = layer_prefix(layer);
        let named = |part: &str| format!("{prefix}{part}");
        let weights = LayerWeights {
            input_norm: self.vector(&named(INPUT_NORM), hidden)?,
            query: self.linear(&named(QUERY), [query, hidden], spec.qkv_bias)?,
            key: self.linear(&named(KEY), [kv, hidden], spec.qkv_bias)?,
            value: self.linear(&named(VALUE), [kv, hidden], spec.qkv_bias)?,
            head_norms: if spec.qk_norm {
                let query = self.vector(&named(QUERY_NORM), spec.head_size)?;
                Some(HeadNorms { query, key: self.vector(&named(KEY_NORM), spec.head_size)? })
            } else {
                None
            },
            output: self.linear(&named(OUTPUT), [hidden, query], spec.output_bias)?,
            mlp_norm: self.vector(&named(MLP_NORM), hidden)?,
            gate: self.linear(&named(GATE), [inner, hidden], spec.mlp_bias)?,
            up: self.linear(&named(UP), [inner, hidden], spec.mlp_bias)?,
            down: self.linear(&named(DOWN), [hidden, inner], spec.mlp_bias)?,
        };
        Ok(weights)
    }

    fn linear(&mut self, part: &str, shape: [usize; 2], has_bias: bool) -> Result<Linear, ModelError> {
        let matrix = self.matrix(&weight(part), shape)?;
        let bias = if has_bias { Some(self.vector(&bias(part), shape[0])?) } else { None };
        Ok(Linear { matrix, bias })
    }

    fn matrix(&mut self, name: &str, shape: [usize; 2]) -> Result<PackedMatrix, ModelError> {
        let pack = self.packer(shape, self.options.quantization);
        self.take(name, &shape, pack)
    }

    /// Packs a matrix of `shape`.
    fn packer(
        &self,
        [outputs, inputs]: [usize; 2],
        quantization: Option<Quantization>,
    ) -> impl Fn(MatrixSource<'_>) -> PackedMatrix + use<> {
        let threads = self.options.threads;
        move |source| match quantization {
            None => PackedMatrix::pack_on(threads, outputs, inputs, source),
            Some(quantization) => PackedMatrix::quantize_on(threads, outputs, inputs, source, quantization),
        }
    }

    fn vector(&mut self, name: &str, elements: usize) -> Result<Vec<f32>, ModelError> {
        self.take(name, &[elements], widen_matrix)
    }

    fn take<T>(
        &mut self,
        name: &str,
        shape: &[usize],
        pack: impl FnOnce(MatrixSource<'_>) -> T,
    ) -> Result<T, ModelError> {
        let tensor = self.source.tensor(name, shape)?;
        self.fingerprint.add(name, shape, tensor.dtype, &tensor.bytes);
        self.done += tensor.bytes.len() as u64;
        let packed = pack(MatrixSource { bytes: &tensor.bytes, dtype: tensor.dtype });
        self.report();
        Ok(packed)
    }

    fn report(&mut self) {
        (self.progress)(LoadProgress { stage: "reading weights", done: self.done, total: self.total });
    }
}
