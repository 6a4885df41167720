//! A decoder's weights, made what the device's kernels take while they are read.
//!
//! Tensors are taken one by one from a checkpoint or made from a seed; each is hashed into the model's fingerprint, put
//! where the device wants it and let go, so that at no time more than one tensor exists twice. All threads work on the same
//! one.

mod checkpoint;
mod dummy;
mod fingerprint;
mod formats;
mod gguf;
mod gguf_blocks;
mod packed;
mod packer;
mod shard;
mod tensor;
mod tensors;
mod uploaded;

use std::ops::Range;
use std::sync::Arc;

use tidemill_kernels::cuda;
use tidemill_kernels::matrix::{Embedding, PackedMatrix, WeightDtype};

use crate::handle::{LoadFormat, LoadProgress, ModelSource, Quantization};
use crate::models::{GgufModel, LoadOptions, ModelError, ModelFiles, ModelSpec};
use checkpoint::CheckpointFiles;
use dummy::Dummy;
use fingerprint::Fingerprint;
use gguf::GgufTensors;
use packer::Packer;
pub use shard::Shard;
use shard::{Cut, Part};
use tensor::{PlainTensor, Tensor};
use tensors::{
    DOWN, EMBEDDING, FINAL_NORM, GATE, HEAD, INPUT_NORM, KEY, KEY_NORM, MLP_NORM, OUTPUT, QUERY, QUERY_NORM,
    TensorSpec, UP, VALUE, bias, layer_prefix, weight,
};
use uploaded::Uploader;
pub use uploaded::{DeviceMatrix, DeviceSteps, DeviceTensor, DeviceWeights};

/// All weights of a decoder, where a device wants them: matrices `M`, vectors `V`, the embedding `E`; those of the CPU where
/// nothing is said.
#[derive(Debug)]
pub struct Weights<M = PackedMatrix, V = Vec<f32>, E = Embedding> {
    /// The embedding, never quantised, unless it is also the head. Of several ranks of a CPU only the first has it, of GPUs each.
    pub embedding: Option<E>,
    /// The decoder layers, first to last.
    pub layers: Vec<LayerWeights<M, V>>,
    /// Scale of the norm before the head: `[hidden]`.
    pub final_norm: V,
    /// `[vocabulary][hidden]`.
    pub head: M,
}

/// Weights of one decoder layer.
#[derive(Debug)]
pub struct LayerWeights<M = PackedMatrix, V = Vec<f32>> {
    /// Scale of the norm before attention: `[hidden]`.
    pub input_norm: V,
    /// `[query heads * head size][hidden]`.
    pub query: Linear<M, V>,
    /// `[KV heads * head size][hidden]`.
    pub key: Linear<M, V>,
    /// `[KV heads * head size][hidden]`.
    pub value: Linear<M, V>,
    /// Scales of the norms of each head of query and key, `[head size]` each.
    pub head_norms: Option<HeadNorms<V>>,
    /// `[hidden][query heads * head size]`.
    pub output: Linear<M, V>,
    /// Scale of the norm before the feed-forward part: `[hidden]`.
    pub mlp_norm: V,
    /// `[intermediate][hidden]`.
    pub gate: Linear<M, V>,
    /// `[intermediate][hidden]`.
    pub up: Linear<M, V>,
    /// `[hidden][intermediate]`.
    pub down: Linear<M, V>,
}

/// Scales of the norms of each head.
#[derive(Debug)]
pub struct HeadNorms<V = Vec<f32>> {
    /// For the query.
    pub query: V,
    /// For the key.
    pub key: V,
}

/// A projection.
#[derive(Debug)]
pub struct Linear<M = PackedMatrix, V = Vec<f32>> {
    /// Its matrix.
    pub matrix: M,
    /// Added to its output.
    pub bias: Option<V>,
}

impl Weights {
    /// Bytes of all matrices and the embedding.
    pub fn bytes(&self) -> usize {
        let layer = |layer: &LayerWeights| -> usize {
            let LayerWeights { query, key, value, output, gate, up, down, .. } = layer;
            [query, key, value, output, gate, up, down].iter().map(|linear| linear.matrix.bytes()).sum()
        };
        let table = self.embedding.as_ref().map_or(0, Embedding::bytes);
        table + self.layers.iter().map(layer).sum::<usize>() + self.head.bytes()
    }

    /// Writes the state that a token begins with.
    pub fn embed(&self, token: u32, state: &mut [f32]) {
        match &self.embedding {
            Some(table) => table.row(token as usize, state),
            None => self.head.row(token as usize, state),
        }
    }
}

/// Weights and what was learned while they were read.
#[derive(Debug)]
pub(crate) struct Loaded<W = Weights> {
    pub(crate) weights: W,
    pub(crate) fingerprint: String,
    /// Type of the embedding, which stands for that of the model.
    pub(crate) dtype: WeightDtype,
}

/// Where tensors come from.
trait TensorSource {
    /// The tensor of that name and shape.
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor<'_>, ModelError>;
}

/// What becomes of tensors: how a device holds them. The embedding comes first.
trait Store {
    type Matrix;
    type Vector;
    type Table;

    /// A part of a matrix of a layer.
    fn matrix(&mut self, part: &Part<'_>, tensor: &Tensor<'_>) -> Result<Self::Matrix, ModelError>;

    /// A part of the head.
    fn head(&mut self, part: &Part<'_>, tensor: &Tensor<'_>) -> Result<Self::Matrix, ModelError>;

    /// The embedding.
    fn embedding(&mut self, shape: [usize; 2], tensor: &Tensor<'_>) -> Result<Self::Table, ModelError>;

    /// A scale or a bias.
    fn vector(&mut self, tensor: &PlainTensor<'_>) -> Result<Self::Vector, ModelError>;

    /// Whether a table that is also the head is held once for both.
    fn shares_table(&self, tensor: &Tensor<'_>) -> bool;

    /// Whether the first rank has the embedding for all.
    fn reads_table_of_first(&self) -> bool;

    /// Everything is there.
    fn finish(&mut self) -> Result<(), ModelError>;
}

/// Weights as a store holds them.
type Held<S> = Weights<<S as Store>::Matrix, <S as Store>::Vector, <S as Store>::Table>;

/// Reads or makes all weights of a decoder, for the CPU.
pub(crate) fn load(
    spec: &ModelSpec,
    model: &ModelSource,
    options: LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Loaded, ModelError> {
    load_shard(Shard::WHOLE, spec, model, options, progress)
}

/// The same for one of several ranks, whose parts together are the model. The fingerprint is that of the whole.
pub(crate) fn load_shard(
    shard: Shard,
    spec: &ModelSpec,
    model: &ModelSource,
    options: LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Loaded, ModelError> {
    let mut packer = Packer::new(options.threads, options.quantization, shard);
    load_into(&mut packer, shard, spec, model, options, progress)
}

/// The same for a GPU.
pub(crate) fn load_on(
    driver: &Arc<dyn cuda::Driver>,
    shard: Shard,
    spec: &ModelSpec,
    model: &ModelSource,
    options: LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Loaded<DeviceWeights>, ModelError> {
    let mut uploader = Uploader::new(driver, options.threads, options.quantization, shard);
    load_into(&mut uploader, shard, spec, model, options, progress)
}

/// Bytes of all weights, each in the type that the configuration names.
pub(crate) fn plain_bytes(spec: &ModelSpec) -> u64 {
    let elements: u64 = tensors::tensors(spec).iter().map(TensorSpec::elements).sum();
    elements * spec.dtype.bytes() as u64
}

/// The least that weights of one of so many GPUs take, should their matrices be made smaller: half a byte or a byte for each element,
/// and no scales.
pub(crate) fn least_bytes(spec: &ModelSpec, quantization: Option<Quantization>, ranks: usize) -> u64 {
    let bytes = |tensor: &TensorSpec| {
        let elements = tensor.elements() / if is_cut(tensor) { ranks as u64 } else { 1 };
        match quantization {
            Some(Quantization::Int8 | Quantization::Fp8) if is_cut(tensor) => elements,
            Some(Quantization::Int4 { .. }) if is_cut(tensor) => elements / 2,
            _ => elements * spec.dtype.bytes() as u64,
        }
    };
    tensors::tensors(spec).iter().map(bytes).sum()
}

/// Whether a tensor is a matrix that ranks share, and that is made smaller: all but the embedding.
fn is_cut(tensor: &TensorSpec) -> bool {
    tensor.shape.len() == 2 && tensor.name != EMBEDDING
}

fn load_into<S: Store>(
    store: &mut S,
    shard: Shard,
    spec: &ModelSpec,
    model: &ModelSource,
    options: LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Loaded<Held<S>>, ModelError> {
    let wanted = tensors::tensors(spec);
    match (options.format, model) {
        (LoadFormat::Safetensors, ModelSource::Gguf(path)) => {
            let model = GgufModel::open(path)?;
            let mut tensors = GgufTensors::check(&model, spec, &wanted)?;
            let total = tensors.bytes(&wanted)?;
            read_all(store, shard, spec, (&mut tensors, total), options, progress)
        }
        (LoadFormat::Safetensors, _) => {
            let files = CheckpointFiles::open(ModelFiles::of(model))?;
            let mut checkpoint = files.checkpoint(spec.packing)?;
            checkpoint.check(spec, &wanted)?;
            let total = checkpoint.bytes(&wanted);
            read_all(store, shard, spec, (&mut checkpoint, total), options, progress)
        }
        (LoadFormat::Dummy { seed }, _) => {
            let total = plain_bytes(spec);
            let mut dummy = Dummy { seed, dtype: spec.dtype, threads: options.threads };
            read_all(store, shard, spec, (&mut dummy, total), options, progress)
        }
    }
}

fn read_all<S: Store>(
    store: &mut S,
    shard: Shard,
    spec: &ModelSpec,
    (source, total): (&mut dyn TensorSource, u64),
    options: LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Loaded<Held<S>>, ModelError> {
    let fingerprint = Fingerprint::of(spec, options.quantization, total);
    Loading { shard, spec, source, fingerprint, store, progress, done: 0, total }.run()
}

/// Takes the tensors one by one, and keeps account of them.
struct Loading<'a, S> {
    shard: Shard,
    spec: &'a ModelSpec,
    source: &'a mut dyn TensorSource,
    fingerprint: Fingerprint,
    store: &'a mut S,
    progress: &'a mut dyn FnMut(LoadProgress),
    done: u64,
    total: u64,
}

impl<S: Store> Loading<'_, S> {
    fn run(mut self) -> Result<Loaded<Held<S>>, ModelError> {
        let (shard, spec) = (self.shard, self.spec);
        let table = [spec.vocab_size, spec.hidden_size];
        let part = Part::new(HEAD, table, &Cut::Outputs(shard.vocabulary(spec)));
        self.report();
        let (embedding, head, dtype) = self.take(EMBEDDING, &table, |store, tensor| {
            let is_shared = spec.tied_embeddings && store.shares_table(tensor);
            let is_elsewhere = is_shared || (0 < shard.rank && store.reads_table_of_first());
            let embedding = if is_elsewhere { None } else { Some(store.embedding(table, tensor)?) };
            let head = if spec.tied_embeddings { Some(store.head(&part, tensor)?) } else { None };
            Ok((embedding, head, tensor.dtype()))
        })?;
        let layers = (0..spec.layers).map(|layer| self.layer(layer)).collect::<Result<_, _>>()?;
        let final_norm = self.vector(FINAL_NORM, spec.hidden_size)?;
        let head = match head {
            Some(head) => head,
            None => self.take(HEAD, &table, |store, tensor| store.head(&part, tensor))?,
        };
        self.store.finish()?;
        let weights = Weights { embedding, layers, final_norm, head };
        Ok(Loaded { weights, fingerprint: self.fingerprint.text(), dtype })
    }

    fn layer(&mut self, layer: usize) -> Result<LayerWeights<S::Matrix, S::Vector>, ModelError> {
        let (shard, spec) = (self.shard, self.spec);
        let (hidden, inner) = (spec.hidden_size, spec.intermediate_size);
        let (query, kv) = (spec.query_size(), spec.kv_size());
        let (queries, keys) = (shard.query(spec), shard.key_or_value(spec));
        let features = shard.features(spec);
        let outputs = |part: &Range<usize>| Cut::Outputs(part.clone());
        let prefix = layer_prefix(layer);
        let named = |part: &str| format!("{prefix}{part}");
        let weights = LayerWeights {
            input_norm: self.vector(&named(INPUT_NORM), hidden)?,
            query: self.linear(&named(QUERY), [query, hidden], &outputs(&queries), spec.qkv_bias)?,
            key: self.linear(&named(KEY), [kv, hidden], &outputs(&keys), spec.qkv_bias)?,
            value: self.linear(&named(VALUE), [kv, hidden], &outputs(&keys), spec.qkv_bias)?,
            head_norms: if spec.qk_norm {
                let query = self.vector(&named(QUERY_NORM), spec.head_size)?;
                Some(HeadNorms { query, key: self.vector(&named(KEY_NORM), spec.head_size)? })
            } else {
                None
            },
            output: self.linear(&named(OUTPUT), [hidden, query], &Cut::Inputs(queries), spec.output_bias)?,
            mlp_norm: self.vector(&named(MLP_NORM), hidden)?,
            gate: self.linear(&named(GATE), [inner, hidden], &outputs(&features), spec.mlp_bias)?,
            up: self.linear(&named(UP), [inner, hidden], &outputs(&features), spec.mlp_bias)?,
            down: self.linear(&named(DOWN), [hidden, inner], &Cut::Inputs(features), spec.mlp_bias)?,
        };
        Ok(weights)
    }

    fn linear(
        &mut self,
        part: &str,
        shape: [usize; 2],
        cut: &Cut,
        has_bias: bool,
    ) -> Result<Linear<S::Matrix, S::Vector>, ModelError> {
        let name = weight(part);
        let kept = Part::new(&name, shape, cut);
        let matrix = self.take(&name, &shape, |store, tensor| store.matrix(&kept, tensor))?;
        let is_kept = matches!(cut, Cut::Outputs(_)) || self.shard.rank == 0;
        let bias = match has_bias {
            true => Some(self.elements(&bias(part), shape[0], &kept.rows)?).filter(|_| is_kept),
            false => None,
        };
        Ok(Linear { matrix, bias })
    }

    fn vector(&mut self, name: &str, elements: usize) -> Result<S::Vector, ModelError> {
        self.elements(name, elements, &(0..elements))
    }

    /// Some elements of a vector.
    fn elements(&mut self, name: &str, all: usize, kept: &Range<usize>) -> Result<S::Vector, ModelError> {
        self.take(name, &[all], |store, tensor| match tensor {
            Tensor::Plain(plain) => store.vector(&plain.elements(kept)),
            Tensor::Quantized(matrix) => unreachable!("a vector is no matrix: {matrix:?}"),
        })
    }

    fn take<T>(
        &mut self,
        name: &str,
        shape: &[usize],
        keep: impl FnOnce(&mut S, &Tensor<'_>) -> Result<T, ModelError>,
    ) -> Result<T, ModelError> {
        let tensor = self.source.tensor(name, shape)?;
        for (kind, bytes) in tensor.parts() {
            self.fingerprint.add(name, shape, &kind, bytes);
            self.done += bytes.len() as u64;
        }
        let kept = keep(self.store, &tensor)?;
        drop(tensor);
        self.report();
        Ok(kept)
    }

    fn report(&mut self) {
        (self.progress)(LoadProgress { stage: "reading weights", done: self.done, total: self.total });
    }
}
