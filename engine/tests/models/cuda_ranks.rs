//! Several ranks, each on a device of its own, which the emulator is here: logits and tokens are those of transformers.

use std::sync::Arc;

use super::bench::{Storage, fixture};
use super::cuda::{Gpu, check_gpu, storage_and_bound};
use tidemill_engine::handle::ModelSource;
use tidemill_engine::models::Model;
use tidemill_engine::weights::{DeviceMatrix, DeviceTensor, DeviceWeights};
use tidemill_engine::handle::LoadFormat;
use tidemill_engine::models::LoadOptions;
use tidemill_engine::runner::LogitsWanted;
use tidemill_kernels::cuda::Driver;
use tidemill_kernels::cuda::emulator::Order;
use tidemill_kernels::cuda::fake::Fake;
use tidemill_kernels::cuda::hopper::CAPABILITY;
use tidemill_kvtransfer_proto::layout::{AxisOrder, KvDtype};

/// Makes the check a test of each fixture model.
macro_rules! for_every_model {
    ($($name:ident: $folder:literal,)*) => {
        mod logits_and_tokens_are_those_of_transformers_and_of_the_sampler {
            $(#[test] fn $name() { super::check($folder); })*
        }
    };
}

for_every_model! {
    llama2: "llama2",
    llama3: "llama3",
    llama_bf16_new_keys: "llama-bf16-new-keys",
    llama_bias: "llama-bias",
    llama_f16_old_keys: "llama-f16-old-keys",
    qwen2: "qwen2",
    qwen2_window: "qwen2-window",
    qwen3: "qwen3",
}

fn check(name: &str) {
    let (storage, bound) = storage_and_bound(name);
    for ranks in [2, 4] {
        // In one of them with a library.
        let fakes = fakes(ranks, ranks == 4);
        let gpu = Gpu::of_ranks(&drivers(&fakes), name, storage, &[1, 4]);
        check_gpu(gpu, name, bound);
        let calls: Vec<_> = fakes.iter().map(|fake| fake.calls()).collect();
        assert!(0 < calls[0].collectives && 0 < calls[0].replays, "{name}: {calls:?}");
        assert!(calls.iter().all(|it| it.replays == calls[0].replays), "{name}: {calls:?}");
        assert_eq!(calls.iter().all(|it| 0 < it.products), ranks == 4, "{name}: {calls:?}");
        fakes.iter().for_each(|fake| fake.assert_nothing_left());
    }
}

fn fakes(count: usize, with_library: bool) -> Vec<Arc<Fake>> {
    let orders = [Order::Forwards, Order::Random(4)].into_iter().cycle().take(count);
    let fake = |order| if with_library { Fake::new(order).with_library() } else { Fake::new(order) };
    orders.map(|order| Arc::new(fake(order))).collect()
}

fn drivers(fakes: &[Arc<Fake>]) -> Vec<Arc<dyn Driver>> {
    fakes.iter().map(|fake| Arc::clone(fake) as _).collect()
}

/// What Hopper alone has is taken by each rank, for its part.
#[test]
fn ranks_on_hopper_are_within_the_bounds_of_transformers() {
    let fakes: Vec<Arc<Fake>> =
        (0..2).map(|_| Arc::new(Fake::new(Order::Forwards).with_compute_capability(CAPABILITY))).collect();
    let name = "llama-bf16-new-keys";
    let (storage, bound) = storage_and_bound(name);
    check_gpu(Gpu::of_ranks(&drivers(&fakes), name, storage, &[1, 4]), name, bound);
    for fake in fakes {
        assert!(fake.launches().iter().any(|it| it.kernel.starts_with("multiply_wide_")));
        fake.assert_nothing_left();
    }
}

/// A graph of all ranks sums what its launches sum.
#[test]
fn a_graph_gives_the_bits_of_its_launches() {
    let storage = Storage { dtype: KvDtype::Bf16, order: AxisOrder::TokenHead, ..Storage::PLAIN };
    let mut found = Vec::new();
    for sizes in [&[][..], &[1, 4]] {
        let fakes = fakes(2, false);
        let mut gpu = Gpu::of_ranks(&drivers(&fakes), "llama-bf16-new-keys", storage, sizes);
        let mut places = [gpu.place(40), gpu.place(40), gpu.place(40)];
        let mut bits = Vec::new();
        for step in 0..12_u32 {
            let count = [1, 3, 3, 2][step as usize % 4];
            let tokens: Vec<u32> = (0..3).map(|sequence| 3 + step * 5 + sequence).collect();
            let work: Vec<_> = places[..count].iter().zip(tokens.chunks(1)).collect();
            for row in gpu.step(&work, LogitsWanted::Last, &|_| None) {
                bits.extend(row[0].logits().iter().map(|logit| logit.to_bits()));
            }
            places[..count].iter_mut().for_each(|place| place.len += 1);
        }
        drop(gpu);
        fakes.iter().for_each(|fake| fake.assert_nothing_left());
        found.push(bits);
    }
    assert!(found[0] == found[1]);
}

/// What ranks hold together is the model, and each has the embedding.
#[test]
fn ranks_share_matrices_and_each_has_the_embedding() {
    for name in ["llama3", "qwen3", "llama2"] {
        let options = LoadOptions { threads: 2, format: LoadFormat::Safetensors, quantization: None };
        let source = ModelSource::Folder(fixture(name));
        let one = fakes(1, false);
        let whole = Model::load_on(&drivers(&one)[0], options, &source, &mut |_| {}).expect(name);
        let fakes = fakes(2, false);
        let shared = Model::load_ranks_on(&drivers(&fakes), options, &source, &mut |_| {}).expect(name);
        assert_eq!(shared.fingerprint, whole.fingerprint, "{name}");
        let matrices = |weights: &DeviceWeights| -> usize {
            let layer = |it: &tidemill_engine::weights::LayerWeights<DeviceMatrix, DeviceTensor>| {
                [&it.query, &it.output, &it.gate, &it.up, &it.down].map(|it| it.matrix.bytes()).iter().sum::<usize>()
            };
            weights.layers.iter().map(layer).sum::<usize>() + weights.head.bytes()
        };
        let of_ranks: usize = shared.weights.iter().map(matrices).sum();
        assert_eq!(of_ranks, matrices(&whole.weights), "{name}");
        let table = whole.spec.vocab_size * whole.spec.hidden_size * whole.dtype.bytes();
        for weights in &shared.weights {
            assert_eq!(weights.embedding.as_ref().map(DeviceTensor::bytes), Some(table), "{name}");
        }
        let (whole, shards) = shared.into_shards();
        assert_eq!(shards.iter().map(|it| it.spec.heads).sum::<usize>(), whole.spec.heads, "{name}");
        drop(shards);
        fakes.iter().for_each(|fake| fake.assert_nothing_left());
    }
}
