//! A decoder's weights, packed for the kernels while they are read.
//!
//! Tensors are taken one by one from a checkpoint or made from a seed; each is hashed into the model's fingerprint, packed
//! and let go, so that at no time more than one tensor exists twice. All threads work on the same one.

mod checkpoint;
mod dummy;
mod fingerprint;
mod gguf;
mod gguf_blocks;
mod packed;
mod packer;
mod tensor;
mod tensors;

use tidemill_kernels::matrix::{Embedding, PackedMatrix, WeightDtype};

use crate::handle::{LoadFormat, LoadProgress, ModelSource};
use crate::models::{GgufModel, LoadOptions, ModelError, ModelFiles, ModelSpec};
use checkpoint::CheckpointFiles;
use dummy::Dummy;
use fingerprint::Fingerprint;
use gguf::GgufTensors;
use packer::Packer;
use tensor::Tensor;
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

/// Reads or makes all weights of a decoder.
pub(crate) fn load(
    spec: &ModelSpec,
    model: &ModelSource,
    options: LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Loaded, ModelError> {
    let wanted = tensors::tensors(spec);
    match (options.format, model) {
        (LoadFormat::Safetensors, ModelSource::Gguf(path)) => {
            let model = GgufModel::open(path)?;
            let mut tensors = GgufTensors::check(&model, spec, &wanted)?;
            let total = tensors.bytes(&wanted)?;
            read_all(spec, &mut tensors, total, options, progress)
        }
        (LoadFormat::Safetensors, _) => {
            let files = CheckpointFiles::open(ModelFiles::of(model))?;
            let mut checkpoint = files.checkpoint(spec.packing)?;
            checkpoint.check(spec, &wanted)?;
            let total = checkpoint.bytes(&wanted);
            read_all(spec, &mut checkpoint, total, options, progress)
        }
        (LoadFormat::Dummy { seed }, _) => {
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
    let packer = Packer::new(options.threads, options.quantization);
    Loading { spec, source, fingerprint, packer, progress, done: 0, total }.run()
}

/// Takes the tensors one by one, and keeps account of them.
struct Loading<'a> {
    spec: &'a ModelSpec,
    source: &'a mut dyn TensorSource,
    fingerprint: Fingerprint,
    packer: Packer,
    progress: &'a mut dyn FnMut(LoadProgress),
    done: u64,
    total: u64,
}

impl Loading<'_> {
    fn run(mut self) -> Result<Loaded, ModelError> {
        let spec = self.spec;
        let table = [spec.vocab_size, spec.hidden_size];
        self.report();
        let (embedding, head, dtype) = self.take(EMBEDDING, &table, |packer, tensor| {
            let dtype = packer.dtype(tensor);
            let head = spec.tied_embeddings.then(|| packer.head(table, tensor));
            let is_shared = spec.tied_embeddings && packer.shares_table(tensor);
            let embedding = (!is_shared).then(|| packer.embedding(table, tensor));
            (embedding, head, dtype)
        })?;
        let layers = (0..spec.layers).map(|layer| self.layer(layer)).collect::<Result<_, _>>()?;
        let final_norm = self.vector(FINAL_NORM, spec.hidden_size)?;
        let head = match head {
            Some(head) => head,
            None => self.take(HEAD, &table, |packer, tensor| packer.head(table, tensor))?,
        };
        self.packer.report();
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
        self.take(name, &shape, |packer, tensor| packer.matrix(shape, tensor))
    }

    fn vector(&mut self, name: &str, elements: usize) -> Result<Vec<f32>, ModelError> {
        self.take(name, &[elements], |_, tensor| match tensor {
            Tensor::Plain(plain) => plain.widened(),
            Tensor::Quantized(matrix) => unreachable!("a vector is no matrix: {matrix:?}"),
        })
    }

    fn take<T>(
        &mut self,
        name: &str,
        shape: &[usize],
        pack: impl FnOnce(&mut Packer, &Tensor<'_>) -> T,
    ) -> Result<T, ModelError> {
        let tensor = self.source.tensor(name, shape)?;
        for (kind, bytes) in tensor.parts() {
            self.fingerprint.add(name, shape, &kind, bytes);
            self.done += bytes.len() as u64;
        }
        let packed = pack(&mut self.packer, &tensor);
        drop(tensor);
        self.report();
        Ok(packed)
    }

    fn report(&mut self) {
        (self.progress)(LoadProgress { stage: "reading weights", done: self.done, total: self.total });
    }
}
