//! The forward pass on a GPU, which the emulator is here: against transformers, and tokens chosen there against the
//! sampler of the CPU.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::bench::{Bench, Storage, Work, distance, fixture, goldens};
use super::formats;
use super::quantized::cosine;
use super::test_gpu::TestGpu;
use tidemill_engine::handle::{LoadFormat, ModelSource, Quantization};
use tidemill_engine::memory::{Asked, DevicePool, RankHeads, block_shape};
use tidemill_engine::models::{LoadOptions, Model};
use tidemill_engine::runner::{
    Batch, BatchSequence, CudaRank, CudaRanks, CudaRunner, Flight, LogitsWanted, OutcomeRow, RowTask, RunnerLimits,
};
use tidemill_engine::weights::Shard;
use tidemill_engine::sampler::{History, Sampled, Sampler, chosen, logprobs_of, on_device};
use tidemill_engine_core::request::{Logprobs, SamplingParams, StopConditions};
use tidemill_kernels::cuda::emulator::Order;
use tidemill_kernels::cuda::fake::Fake;
use tidemill_kernels::cuda::hopper::BlockRange;
use tidemill_kernels::cuda::{DeviceAddress, Driver, LogprobsRow, SampleRow};
use tidemill_kernels::matrix::WeightDtype;
use tidemill_kvtransfer_proto::layout::{AxisOrder, HeadRange, KvDtype, KvLayout};
use tidemill_kvtransfer_proto::units::{BlockCount, BlockId, BlockLen};

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
    llama_yarn: "llama-yarn",
    mistral: "mistral",
    qwen2: "qwen2",
    qwen2_window: "qwen2-window",
    qwen3: "qwen3",
    qwen3_yarn: "qwen3-yarn",
}

/// A runner on a device, and its blocks.
pub(super) struct Gpu {
    pub(super) runner: CudaRunner,
    pool: DevicePool,
    blocks_given: u32,
}

/// A sequence's place in the cache.
pub(super) struct Place {
    blocks: Vec<DeviceAddress>,
    pub(super) len: usize,
}

impl Gpu {
    fn new(driver: Arc<dyn Driver>, name: &str, storage: Storage, graph_sizes: &[usize]) -> Self {
        Self::of(driver, &ModelSource::Folder(fixture(name)), None, storage, graph_sizes)
    }

    pub(super) fn of(
        driver: Arc<dyn Driver>,
        source: &ModelSource,
        quantization: Option<Quantization>,
        storage: Storage,
        graph_sizes: &[usize],
    ) -> Self {
        // What is embedded in a test is a configuration alone.
        let format = match source {
            ModelSource::Embedded(_) => LoadFormat::Dummy { seed: 1 },
            _ => LoadFormat::Safetensors,
        };
        let options = LoadOptions { threads: 2, format, quantization };
        let model = Model::load_on(&driver, options, source, &mut |_| {}).expect("the fixture loads");
        let block_len = BlockLen::new(storage.block_len).expect("a power of two");
        let shape = block_shape(&model.kv_layout(storage.dtype, block_len, storage.order));
        let pool = DevicePool::new(&driver, shape.block_bytes(), BlockCount(BLOCKS)).expect("memory");
        let limits = RunnerLimits { max_tokens: 64, max_seqs: 4, max_model_len: 128 };
        let mut runner = CudaRunner::new(Arc::new(model), driver, shape, limits, graph_sizes).expect("memory");
        runner.set_blocks(pool.range(&shape));
        // A prompt of a fixture has few rows, and a step of decode fewer.
        runner.set_library_rows(Some(4));
        Self { runner, pool, blocks_given: 0 }
    }

    /// The same of several ranks.
    pub(super) fn of_ranks(
        drivers: &[Arc<dyn Driver>],
        name: &str,
        storage: Storage,
        graph_sizes: &[usize],
    ) -> Self {
        let options = LoadOptions { threads: 2, format: LoadFormat::Safetensors, quantization: None };
        let source = ModelSource::Folder(fixture(name));
        let model = Model::load_ranks_on(drivers, options, &source, &mut |_| {}).expect("the fixture loads");
        let (whole, shards) = model.into_shards();
        let block_len = BlockLen::new(storage.block_len).expect("a power of two");
        let layout = whole.kv_layout(storage.dtype, block_len, storage.order);
        let heads = Shard::all(drivers.len()).zip(drivers).map(|(shard, driver)| {
            let heads = shard.kv_heads(&whole.spec);
            let range = HeadRange { first: heads.start as u16, count: heads.len() as u16 };
            RankHeads {
                driver: Arc::clone(driver),
                shape: block_shape(&KvLayout { heads: range, ..layout.clone() }),
                first: heads.start,
                is_read: shard.stores_kv(&whole.spec),
            }
        });
        let heads: Vec<RankHeads> = heads.collect();
        let asked = Arc::new(Asked::new(drivers.len() - 1));
        let pool = DevicePool::of_ranks(&block_shape(&layout), &heads, BlockCount(BLOCKS), &asked).expect("memory");
        let ranks = heads.iter().zip(shards).zip(pool.firsts()).map(|((rank, model), first)| CudaRank {
            driver: Arc::clone(&rank.driver),
            model,
            blocks: BlockRange { first, count: BLOCKS, shape: rank.shape },
        });
        let ranks = CudaRanks {
            spec: &whole.spec,
            ranks: ranks.collect(),
            limits: RunnerLimits { max_tokens: 64, max_seqs: 4, max_model_len: 128 },
            graph_sizes,
            library_rows: Some(4),
            asked,
        };
        Self { runner: ranks.start().expect("memory"), pool, blocks_given: 0 }
    }

    /// Blocks for a sequence, from both ends of the pool in turn.
    pub(super) fn place(&mut self, tokens: usize) -> Place {
        let count = tokens.div_ceil(self.runner.shape().block_len);
        let blocks = (0..count).map(|_| {
            let nth = self.blocks_given;
            self.blocks_given += 1;
            let id = if nth.is_multiple_of(2) { nth / 2 } else { BLOCKS - 1 - nth / 2 };
            self.pool.address(BlockId(id))
        });
        Place { blocks: blocks.collect(), len: 0 }
    }

    /// One step; each sequence's logits, or tokens where the device chooses.
    pub(super) fn step(
        &mut self,
        work: &[(&Place, &[u32])],
        wanted: LogitsWanted,
        task: &dyn Fn(usize) -> Option<RowTask>,
    ) -> Vec<Vec<Row>> {
        let sequences: Vec<BatchSequence<'_, DeviceAddress>> = work
            .iter()
            .map(|&(place, tokens)| BatchSequence {
                tokens,
                first_position: place.len as u32,
                blocks: &place.blocks,
                logits: wanted,
            })
            .collect();
        let mut rows: Vec<Vec<Row>> = work.iter().map(|_| Vec::new()).collect();
        let mut layers = Vec::new();
        let batch = Batch { sequences: &sequences };
        let tasks = |sequence, _| task(sequence);
        let outcome = self.runner.step(&batch, &tasks, &mut |done| layers.extend(done)).expect("it runs");
        let take = |row: OutcomeRow<'_>| match row {
            OutcomeRow::Logits(row) => rows[row.sequence].push(Row::Logits(row.logits.to_vec())),
            OutcomeRow::Made { sequence, token, logprobs, .. } => {
                let logprobs = logprobs.map(|it| logprobs_of(&it.sum, it.likely).expect("numbers"));
                rows[sequence].push(Row::Made(token, logprobs));
            }
        };
        outcome.for_each(take).expect("it runs");
        assert!(layers.iter().copied().eq(0..self.runner.model().spec.layers), "each layer once, in order");
        rows
    }
}

#[derive(Debug)]
pub(super) enum Row {
    Logits(Vec<f32>),
    Made(u32, Option<Logprobs>),
}

impl Row {
    pub(super) fn logits(&self) -> &[f32] {
        match self {
            Self::Logits(logits) => logits,
            Self::Made(token, _) => panic!("token {token} where logits were wanted"),
        }
    }
}

fn check(name: &str) {
    let gpu = TestGpu::new(Order::Forwards);
    check_on(gpu.driver(), name);
    gpu.assert_nothing_left();
    // The same with a library, and for more of the products than usually.
    let fake = Arc::new(Fake::new(Order::Forwards).with_library());
    check_on(Arc::clone(&fake) as _, name);
    assert!(0 < fake.calls().products, "{name}: prompts are multiplied by the library");
    fake.assert_nothing_left();
}

pub(super) fn check_on(driver: Arc<dyn Driver>, name: &str) {
    let (storage, bound) = storage_and_bound(name);
    check_gpu(Gpu::new(driver, name, storage, &[1, 4]), name, bound);
}

/// K and V of the type of the weights, and how far logits may be from those of transformers.
pub(super) fn storage_and_bound(name: &str) -> (Storage, f32) {
    let dtype = Model::load(&ModelSource::Folder(fixture(name)), LoadFormat::Safetensors, &mut |_| {})
        .expect("the fixture loads")
        .dtype;
    let (dtype, bound) = match dtype {
        WeightDtype::F32 => (KvDtype::F32, 1e-4),
        WeightDtype::F16 => (KvDtype::F16, 1e-2),
        // Every result between two operations is rounded to 8 bits, as K and V are.
        WeightDtype::Bf16 => (KvDtype::Bf16, 8e-2),
    };
    (Storage { dtype, block_len: 16, order: AxisOrder::HeadToken }, bound)
}

pub(super) fn check_gpu(mut gpu: Gpu, name: &str, bound: f32) {
    let goldens = goldens(name);
    // Beyond the window of those that have one.
    let continued = if gpu.runner.model().spec.windows[1].is_some() { 24 } else { 6 };
    let golden = &goldens[3];
    let length = golden.prompt.len();
    let tokens = [&golden.prompt[..], &golden.greedy[..continued]].concat();
    let mut place = gpu.place(128);
    gpu.step(&[(&place, &tokens[..10])], LogitsWanted::None, &|_| None);
    place.len = 10;
    let rows = gpu.step(&[(&place, &tokens[10..])], LogitsWanted::Tail(continued + 1), &|_| None).remove(0);
    let prompt = golden.logits.last().expect("the last position is always there");
    let far = distance(rows[0].logits(), prompt);
    assert!(far < bound, "{name}: logits after {length} tokens differ by {far:e}");
    for (row, &expected) in rows.iter().zip(&golden.greedy) {
        // What is greatest by less than the error may not be.
        let logits = row.logits();
        let greatest = logits.iter().fold(0.0f32, |greatest, x| greatest.max(*x));
        assert!(greatest - logits[expected as usize] <= bound * greatest, "{name}: {expected} is greedy");
    }
    place.len = tokens.len();
    check_choices(&mut gpu, name, &place, golden.greedy[continued], goldens[0].prompt[0]);
}

/// The same step with logits and with tokens that the device chooses, in a batch of two.
fn check_choices(gpu: &mut Gpu, name: &str, place: &Place, next: u32, first: u32) {
    let other = gpu.place(16);
    let work = [(place, &[next][..]), (&other, &[first][..])];
    let logits = gpu.step(&work, LogitsWanted::Last, &|_| None);
    let mut sampler = Sampler::new(gpu.runner.model().spec.vocab_size);
    let stop = StopConditions::after(1);
    let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let warm = SamplingParams { temperature: 0.8, seed: 11, ..SamplingParams::default() };
    let filtered = SamplingParams { top_k: Some(40), top_p: 0.9, min_p: 0.01, seed: 5, ..warm.clone() };
    let told = SamplingParams { logprobs: Some(7), ..warm.clone() };
    let all_told = SamplingParams { logprobs: Some(LogprobsRow::MOST), ..greedy.clone() };
    for params in [greedy, warm, filtered, told, all_told] {
        for position in 0..2 {
            let row = on_device(&params, &stop, position).expect("the device can");
            let expected = logits.iter().map(|rows| {
                sampler.sample(rows[0].logits(), History::default(), &params, &stop, position)
            });
            let expected: Vec<Sampled> = expected.map(|it| it.expect("logits are numbers")).collect();
            let found = gpu.step(&work, LogitsWanted::Last, &|_| Some(row));
            let found: Vec<Sampled> = found.iter().map(|rows| sampled(&rows[0])).collect();
            assert_eq!(found, expected, "{name}: {params:?}");
            // One by the device, one by the host, in one step.
            let mixed = gpu.step(&work, LogitsWanted::Last, &|sequence| (sequence == 1).then_some(row));
            assert_eq!(mixed[0][0].logits(), logits[0][0].logits(), "{name}");
            assert_eq!(sampled(&mixed[1][0]), expected[1], "{name}: {params:?}");
        }
    }
}

#[test]
fn few_rows_and_all_of_who_asks_for_the_same_bits_are_multiplied_by_our_kernels() {
    let fake = Arc::new(Fake::new(Order::Forwards).with_library());
    let mut gpu = Gpu::new(Arc::clone(&fake) as _, "llama3", Storage::PLAIN, &[]);
    let prompt: Vec<u32> = (3..15).collect();
    for (most, are_the_librarys) in [(Some(11), true), (Some(12), false), (None, false)] {
        let before = fake.calls().products;
        gpu.runner.set_library_rows(most);
        let place = gpu.place(16);
        gpu.step(&[(&place, &prompt)], LogitsWanted::None, &|_| None);
        assert_eq!(before < fake.calls().products, are_the_librarys, "{most:?}");
    }
    drop(gpu);
    fake.assert_nothing_left();
}

#[test]
fn a_graph_gives_the_bits_of_its_launches() {
    let device = TestGpu::new(Order::Random(3));
    let storage = Storage { dtype: KvDtype::Bf16, ..Storage::PLAIN };
    let mut found = Vec::new();
    for sizes in [&[][..], &[1, 4]] {
        let mut gpu = Gpu::new(device.driver(), "llama-bf16-new-keys", storage, sizes);
        let mut places = [gpu.place(40), gpu.place(40), gpu.place(40)];
        let mut bits = Vec::new();
        // Rows come and go; one sequence gets to its second block.
        for step in 0..19_u32 {
            let count = [1, 3, 3, 2][step as usize % 4];
            let tokens: Vec<u32> = (0..3).map(|sequence| 3 + step * 5 + sequence).collect();
            let work: Vec<_> = places[..count].iter().zip(tokens.chunks(1)).collect();
            for row in gpu.step(&work, LogitsWanted::Last, &|_| None) {
                bits.extend(row[0].logits().iter().map(|logit| logit.to_bits()));
            }
            places[..count].iter_mut().for_each(|place| place.len += 1);
        }
        found.push(bits);
    }
    assert!(found[0] == found[1]);
    device.assert_nothing_left();
}

/// Two sequences go on greedily, each step with what the one before chose: told by the host, or taken on the device before the host knows.
#[test]
fn a_step_goes_on_with_tokens_that_the_host_does_not_know() {
    for sizes in [&[][..], &[1, 4]] {
        let fake = Arc::new(Fake::new(Order::Random(9)));
        let mut gpu = Gpu::new(Arc::clone(&fake) as _, "llama3", Storage::PLAIN, sizes);
        let first = [5, 60];
        let task = RowTask { sample: Some(SampleRow::default()), logprobs: None };
        let mut expected: Vec<Vec<u32>> = Vec::new();
        let mut places = [gpu.place(40), gpu.place(40)];
        for _ in 0..20 {
            let tokens = expected.last().map_or(first.to_vec(), Vec::clone);
            let work: Vec<_> = places.iter().zip(tokens.chunks(1)).collect();
            let rows = gpu.step(&work, LogitsWanted::Last, &|_| Some(task));
            expected.push(rows.iter().map(|rows| sampled(&rows[0]).token).collect());
            places.iter_mut().for_each(|place| place.len += 1);
        }
        gpu.blocks_given = 0;
        let places = [gpu.place(40), gpu.place(40)];
        let mut under_way: Option<Flight> = None;
        let mut found: Vec<Vec<u32>> = Vec::new();
        for step in 0..20_u32 {
            // The second sequence comes first, and back again: a token is found by its row.
            let order = if step % 3 == 2 { [1, 0] } else { [0, 1] };
            let before = if step % 3 == 0 && 0 < step { [1, 0] } else { [0, 1] };
            let zero = [0];
            let tokens = |sequence: usize| if step == 0 { &first[sequence..=sequence] } else { &zero[..] };
            let sequences = order.map(|sequence| BatchSequence {
                tokens: tokens(sequence),
                first_position: step,
                blocks: &places[sequence].blocks,
                logits: LogitsWanted::Last,
            });
            let row_before = |index: usize| before.iter().position(|it| *it == order[index]);
            let carried = |index| if step == 0 { None } else { row_before(index) };
            let batch = Batch { sequences: &sequences };
            let flight = gpu.runner.submit(&batch, &|_, _| Some(task), &carried, &mut |_| {}).expect("it runs");
            let mut take = |gpu: &mut Gpu, flight, order: [usize; 2]| {
                let mut tokens = vec![0; 2];
                let row = |row: OutcomeRow<'_>| match row {
                    OutcomeRow::Made { sequence, token, .. } => tokens[order[sequence]] = token,
                    OutcomeRow::Logits(_) => panic!("nobody asked for logits"),
                };
                gpu.runner.receive(flight, row).expect("it runs");
                found.push(tokens);
            };
            if let Some(before_it) = under_way.replace(flight) {
                take(&mut gpu, before_it, before);
            }
            if step == 19
                && let Some(last) = under_way.take()
            {
                take(&mut gpu, last, order);
            }
        }
        assert_eq!(found, expected, "{sizes:?}");
        let waits = fake.waits();
        assert!(waits[20..39].iter().all(|behind| 0 < *behind), "{waits:?}");
        drop(gpu);
        fake.assert_nothing_left();
    }
}

/// K and V in fewer bits than the weights, in blocks of either order: as close to transformers as on the CPU.
#[test]
fn narrow_kv_stays_within_bounds() {
    let golden = &goldens("llama3")[3];
    for (dtype, order, bound) in [
        (KvDtype::F16, AxisOrder::TokenHead, 5e-3),
        (KvDtype::Int8, AxisOrder::HeadToken, 8e-2),
        (KvDtype::Fp8, AxisOrder::HeadToken, 4e-1),
    ] {
        let device = TestGpu::new(Order::Random(5));
        let mut gpu = Gpu::new(device.driver(), "llama3", Storage { dtype, block_len: 4, order }, &[]);
        let place = gpu.place(golden.prompt.len());
        let rows = gpu.step(&[(&place, &golden.prompt)], LogitsWanted::Last, &|_| None);
        let far = distance(rows[0][0].logits(), golden.logits.last().expect("the last position"));
        assert!((1e-5..bound).contains(&far), "{dtype:?}: {far:e}");
        drop(gpu);
        device.assert_nothing_left();
    }
}

#[test]
fn the_host_waits_once_for_a_step_whose_tokens_the_device_chooses() {
    let fake = Arc::new(Fake::new(Order::Backwards));
    let mut gpu = Gpu::new(Arc::clone(&fake) as _, "llama3", Storage::PLAIN, &[2]);
    let [mut first, mut second] = [gpu.place(16), gpu.place(16)];
    let row = Some(RowTask { sample: Some(SampleRow::default()), logprobs: None });
    for step in 0..4_u32 {
        let before = fake.calls();
        gpu.step(&[(&first, &[3 + step][..]), (&second, &[9][..])], LogitsWanted::Last, &|_| row);
        let calls = fake.calls();
        assert_eq!(calls.waits - before.waits, 1, "step {step}");
        assert_eq!(calls.allocations, before.allocations, "step {step}");
        // The first time launch by launch, the second time recorded, then asked for in one call.
        if 1 < step {
            assert_eq!((calls.launches, calls.replays), (before.launches, before.replays + 1), "step {step}");
        }
        first.len += 1;
        second.len += 1;
    }
    drop(gpu);
    fake.assert_nothing_left();
}

/// Prompts and single tokens in one step, on tensor cores: a row has the same bits whatever else is in the step, and in
/// whatever chunk of its prompt it comes.
#[test]
fn rows_on_tensor_cores_are_the_same_in_any_company() {
    for name in ["llama-bf16-new-keys", "llama-f16-old-keys"] {
        let fake = Arc::new(Fake::new(Order::Random(7)));
        let storage = Storage { dtype: KvDtype::Bf16, block_len: 8, ..Storage::PLAIN };
        let mut gpu = Gpu::new(Arc::clone(&fake) as _, name, storage, &[]);
        let prompt: Vec<u32> = (0..40).map(|index| 3 + index * 7 % 200).collect();
        let mut bits = |chunks: &[usize], with_others: bool| {
            gpu.blocks_given = 0;
            let mut place = gpu.place(prompt.len());
            let [mut before, mut behind] = [gpu.place(8), gpu.place(8)];
            let mut found = Vec::new();
            for chunk in chunks {
                let tokens = &prompt[place.len..place.len + chunk];
                let work = [(&before, &[5][..]), (&place, tokens), (&behind, &[9][..])];
                let (work, index) = if with_others { (&work[..], 1) } else { (&work[1..2], 0) };
                let rows = gpu.step(work, LogitsWanted::All, &|_| None).swap_remove(index);
                found.extend(rows.iter().flat_map(Row::logits).map(|logit| logit.to_bits()));
                place.len += chunk;
                before.len += 1;
                behind.len += 1;
            }
            found
        };
        let alone = bits(&[40], false);
        for (chunks, with_others) in [(&[40][..], true), (&[7, 2, 31], false), (&[13, 3, 24], true)] {
            assert!(bits(chunks, with_others) == alone, "{name}: {chunks:?}, with others: {with_others}");
        }
        drop(gpu);
        let launched: BTreeSet<&str> = fake.launches().iter().map(|launch| launch.kernel).collect();
        let has = |part: &str| launched.iter().any(|kernel| kernel.starts_with(part));
        assert!(["attend_prompt_", "attention_", "multiply_few_", "multiply_some_"].into_iter().all(has));
        assert!(!has("multiply_row"), "{launched:?}");
        fake.assert_nothing_left();
    }
}

/// Whole numbers are added without rounding there and here, so what differs is what differs in more bits too.
#[test]
fn in_fewer_bits_logits_are_those_of_the_cpu() {
    let int4 = |group| Some(Quantization::Int4 { group });
    let llama = || ModelSource::Folder(fixture("llama3"));
    let checkpoint = |name| formats::source(&formats::fixture(name));
    let rows = [
        ("int8", llama(), Some(Quantization::Int8)),
        ("fp8", llama(), Some(Quantization::Fp8)),
        ("int4 in groups of 32", llama(), int4(32)),
        ("int4 in groups of 64", llama(), int4(64)),
        ("int4 in groups of 128", llama(), int4(128)),
        ("GPTQ whose groups are named", checkpoint("gptq-int4-order"), None),
        ("AWQ", checkpoint("awq"), None),
        ("compressed int8", checkpoint("compressed-int8"), None),
        ("compressed int4", checkpoint("compressed-int4"), None),
        ("Q4_0", checkpoint("gguf-q4_0"), None),
        ("several kinds of GGUF", checkpoint("gguf-k"), None),
    ];
    let prompt: Vec<u32> = (0..37).map(|index| 3 + index * 11 % 200).collect();
    for (name, source, quantization) in rows {
        // What is embedded in a test is a configuration alone.
        let format = match source {
            ModelSource::Embedded(_) => LoadFormat::Dummy { seed: 1 },
            _ => LoadFormat::Safetensors,
        };
        let options = LoadOptions { threads: 2, format, quantization };
        let model = Arc::new(Model::load_with(options, &source, &mut |_| {}).expect("the fixture loads"));
        let mut bench = Bench::exact(&model, Storage::PLAIN);
        let mut place = bench.place(64);
        let mut expected = bench.step(&mut [Work { place: &mut place, tokens: &prompt }], LogitsWanted::All);
        expected[0].push(bench.extend(&mut place, &[4]));

        let fake = Arc::new(Fake::new(Order::Forwards));
        let mut gpu = Gpu::of(Arc::clone(&fake) as _, &source, quantization, Storage::PLAIN, &[1]);
        assert_eq!(gpu.runner.model().fingerprint, model.fingerprint, "{name}: workers pair");
        let mut place = gpu.place(64);
        let mut found = gpu.step(&[(&place, &prompt[..])], LogitsWanted::All, &|_| None).remove(0);
        place.len = prompt.len();
        found.extend(gpu.step(&[(&place, &[4][..])], LogitsWanted::All, &|_| None).remove(0));
        for (position, (found, expected)) in found.iter().zip(&expected[0]).enumerate() {
            let is_near = match gpu.runner.model().dtype {
                WeightDtype::F32 => distance(found.logits(), expected) < 1e-3,
                // What a type of 16 bits rounds becomes other steps now and then.
                WeightDtype::F16 => 0.999 < cosine(found.logits(), expected),
                WeightDtype::Bf16 => 0.99 < cosine(found.logits(), expected),
            };
            assert!(is_near, "{name}: logits at {position}");
        }
        drop(gpu);
        assert!(fake.launches().iter().any(|launch| launch.module == "quantized_product"), "{name}");
        fake.assert_nothing_left();
    }
}

fn sampled(row: &Row) -> Sampled {
    match row {
        Row::Made(token, logprobs) => {
            Sampled { token: chosen(*token).expect("logits are numbers"), logprobs: logprobs.clone() }
        }
        Row::Logits(_) => panic!("logits where a token was wanted"),
    }
}

/// Blocks of a pool: some more than the sequences take.
const BLOCKS: u32 = 16;
