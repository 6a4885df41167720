//! Models: a Hugging Face folder or a GGUF file becomes a shape, weights and defaults.
//!
//! All families share one decoder skeleton ([`ModelSpec`] describes it); what tells them apart is data, in `families`.

mod error;
mod families;
mod fields;
mod files;
mod generation;
mod gguf;
mod packing;
mod rope;
mod spec;

use std::panic::resume_unwind;
use std::sync::Arc;

use tidemill_kernels::cpu::on_cores;
use tidemill_kernels::cuda::Driver;
use tidemill_kernels::matrix::WeightDtype;
use tidemill_kvtransfer_proto::layout::{AxisOrder, HeadRange, KvDtype, KvLayout};
use tidemill_kvtransfer_proto::units::BlockLen;

use crate::handle::{LoadFormat, LoadProgress, ModelSource, Quantization};
use crate::weights::{self, DeviceWeights, Shard, Weights};

pub use error::ModelError;
pub(crate) use fields::parse as parse_json;
pub use files::{FileBytes, ModelFiles};
pub use generation::GenerationDefaults;
pub use gguf::GgufModel;
pub(crate) use gguf::ROPE_FACTORS;
pub(crate) use packing::{Packing, Share};
pub use rope::{RopeScaling, RopeSpec};
pub use spec::ModelSpec;

/// A model, ready to run on the device that holds its weights `W`: a CPU where nothing is said.
#[derive(Debug)]
pub struct Model<W = Weights> {
    /// Its shape.
    pub spec: ModelSpec,
    /// How its makers want it sampled.
    pub generation: GenerationDefaults,
    /// Its weights.
    pub weights: W,
    /// Type that the weights come in.
    pub dtype: WeightDtype,
    /// Equal for two workers exactly when their K and V for equal tokens are, up to rounding: 32 hexadecimal digits.
    pub fingerprint: String,
}

/// How weights are loaded.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// Threads that read and pack them; they change no number.
    pub threads: usize,
    /// How they come to be.
    pub format: LoadFormat,
    /// How they are made smaller (`docs/decisions/0010`); `None` keeps them as they come.
    pub quantization: Option<Quantization>,
}

impl Model {
    /// Reads a model's configuration and weights, and tells `progress` about it now and then.
    ///
    /// # Errors
    ///
    /// [`ModelError`] names the file, field or tensor that is at fault.
    pub fn load(
        source: &ModelSource,
        format: LoadFormat,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ModelError> {
        Self::load_with(LoadOptions { threads: 1, format, quantization: None }, source, progress)
    }

    /// The same, on several threads and in fewer bits.
    ///
    /// # Errors
    ///
    /// As [`load`](Self::load).
    pub fn load_with(
        options: LoadOptions,
        source: &ModelSource,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ModelError> {
        Self::read(source, |spec| weights::load(spec, source, options, progress))
    }
}

impl Model<Vec<Weights>> {
    /// The same, shared by as many ranks as there are lists of cores: each reads its part with its share of the threads, kept to
    /// its cores, so that its weights lie near to where they are computed with.
    ///
    /// # Errors
    ///
    /// As [`load`](Model::load), and when so many ranks cannot share the model.
    pub fn load_ranks(
        options: LoadOptions,
        cores: &[Vec<usize>],
        source: &ModelSource,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ModelError> {
        Self::read(source, |spec| {
            if let Some(reason) = Shard::refusal(cores.len(), spec) {
                return Err(ModelError::Shape { reason });
            }
            let options = LoadOptions { threads: options.threads.div_ceil(cores.len()), ..options };
            load_parts(cores.len(), progress, |shard, progress| {
                let cores = &cores[shard.rank];
                on_cores(cores, || weights::load_shard(shard, spec, source, options, progress))
                    .map_err(|error| ModelError::Cores { cores: cores.clone(), source: error })?
            })
        })
    }
}

impl Model<Vec<DeviceWeights>> {
    /// The same, shared by as many ranks as there are GPUs.
    ///
    /// # Errors
    ///
    /// As [`load`](Model::load), what a device says, and when so many ranks cannot share the model.
    pub fn load_ranks_on(
        gpus: &[Arc<dyn Driver>],
        options: LoadOptions,
        source: &ModelSource,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ModelError> {
        Self::read(source, |spec| {
            if let Some(reason) = Shard::refusal(gpus.len(), spec) {
                return Err(ModelError::Shape { reason });
            }
            let options = LoadOptions { threads: options.threads.div_ceil(gpus.len()), ..options };
            load_parts(gpus.len(), progress, |shard, progress| {
                weights::load_on(&gpus[shard.rank], shard, spec, source, options, progress)
            })
        })
    }
}

/// Has each of some ranks load its part, all at once; progress is the first one's.
fn load_parts<W: Send>(
    ranks: usize,
    progress: &mut dyn FnMut(LoadProgress),
    load: impl Fn(Shard, &mut dyn FnMut(LoadProgress)) -> Result<weights::Loaded<W>, ModelError> + Sync,
) -> Result<weights::Loaded<Vec<W>>, ModelError> {
    let mut shards = Shard::all(ranks);
    let first = shards.next().expect("no ranks are refused");
    let load = &load;
    let (first, others) = std::thread::scope(|scope| {
        let others: Vec<_> = shards.map(|shard| scope.spawn(move || load(shard, &mut |_| {}))).collect();
        let first = load(first, progress);
        let others: Vec<_> =
            others.into_iter().map(|it| it.join().unwrap_or_else(|panic| resume_unwind(panic))).collect();
        (first, others)
    });
    let first = first?;
    let mut weights = vec![first.weights];
    for other in others {
        weights.push(other?.weights);
    }
    Ok(weights::Loaded { weights, fingerprint: first.fingerprint, dtype: first.dtype })
}

impl<W> Model<Vec<W>> {
    /// The whole without weights, and what each rank computes with: its weights, and the shape of its part.
    pub fn into_shards(self) -> (Model<()>, Vec<Arc<Model<W>>>) {
        let Self { spec, generation, weights, dtype, fingerprint } = self;
        let whole = Model { spec, generation, weights: (), dtype, fingerprint };
        let shard = |(shard, weights): (Shard, W)| {
            let Model { generation, fingerprint, .. } = &whole;
            let spec = shard.spec(&whole.spec);
            let (generation, fingerprint) = (generation.clone(), fingerprint.clone());
            Arc::new(Model { spec, generation, weights, dtype, fingerprint })
        };
        let shards = Shard::all(weights.len()).zip(weights).map(shard).collect();
        (whole, shards)
    }
}

impl Model<DeviceWeights> {
    /// The same for a GPU, whose kernels compute in the type of the embedding.
    ///
    /// # Errors
    ///
    /// As [`load`](Model::load), and what the device says.
    pub fn load_on(
        driver: &Arc<dyn Driver>,
        options: LoadOptions,
        source: &ModelSource,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ModelError> {
        Self::read(source, |spec| weights::load_on(driver, Shard::WHOLE, spec, source, options, progress))
    }
}

impl<W> Model<W> {
    /// A model whose weights `load` brings to where they are computed with.
    fn read(
        source: &ModelSource,
        load: impl FnOnce(&ModelSpec) -> Result<weights::Loaded<W>, ModelError>,
    ) -> Result<Self, ModelError> {
        let spec = ModelSpec::read(source)?;
        let generation = GenerationDefaults::read(source)?;
        let weights::Loaded { weights, fingerprint, dtype } = load(&spec)?;
        Ok(Self { spec, generation, weights, dtype, fingerprint })
    }

    /// Every token that ends a text: those of `generation_config.json`, then those that only `config.json` names.
    pub fn eos_token_ids(&self) -> Vec<u32> {
        let mut ids = self.generation.eos_token_ids.clone();
        for id in &self.spec.eos_token_ids {
            if !ids.contains(id) {
                ids.push(*id);
            }
        }
        ids
    }

    /// The type of K and V that loses nothing that the weights do not lose either.
    pub const fn kv_dtype(&self) -> KvDtype {
        match self.dtype {
            WeightDtype::F32 => KvDtype::F32,
            WeightDtype::F16 => KvDtype::F16,
            WeightDtype::Bf16 => KvDtype::Bf16,
        }
    }

    /// The layout of this model's KV blocks on a worker that holds all heads.
    pub fn kv_layout(&self, dtype: KvDtype, block_len: BlockLen, order: AxisOrder) -> KvLayout {
        let bounded = |number| u16::try_from(number).expect("the spec's parser bounds it");
        let kv_heads = bounded(self.spec.kv_heads);
        KvLayout {
            model: self.fingerprint.clone(),
            layers: bounded(self.spec.layers),
            kv_heads,
            heads: HeadRange { first: 0, count: kv_heads },
            head_size: bounded(self.spec.head_size),
            dtype,
            block_len,
            order,
        }
    }
}

impl ModelSpec {
    /// Reads a model's `config.json`, or the metadata of its GGUF file.
    ///
    /// # Errors
    ///
    /// As for [`parse`](Self::parse), and when there is no such file.
    pub fn read(source: &ModelSource) -> Result<Self, ModelError> {
        if let ModelSource::Gguf(path) = source {
            return GgufModel::open(path)?.spec();
        }
        let files = ModelFiles::of(source);
        Self::parse(&files.label(CONFIG_FILE), &files.read(CONFIG_FILE)?)
    }
}

impl GenerationDefaults {
    /// Reads a model's `generation_config.json`, which it need not have, and a GGUF file has not.
    ///
    /// # Errors
    ///
    /// As for [`parse`](Self::parse).
    pub fn read(source: &ModelSource) -> Result<Self, ModelError> {
        let files = ModelFiles::of(source);
        match files.read_if_present(GENERATION_FILE)? {
            Some(bytes) => Self::parse(&files.label(GENERATION_FILE), &bytes),
            None => Ok(Self::default()),
        }
    }
}

const CONFIG_FILE: &str = "config.json";
const GENERATION_FILE: &str = "generation_config.json";
