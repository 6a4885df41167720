//! Whole engines on a GPU, which the emulator is here: the same tokens as on the CPU, whatever else runs, and by every way
//! of a handoff between the two. Nothing of the device's memory is left at the end.

use super::test_gpu::TestGpu;
use super::*;
use std::sync::Arc;

use tidemill_engine::handle::{CudaGraphs, DeviceChoice, LoadFormat, Quantization};
use tidemill_kernels::cuda::CudaError;
use tidemill_kernels::cuda::emulator::Order;
use tidemill_kernels::cuda::fake::Fake;

/// Engines on devices that are looked at when all have ended.
#[derive(Default)]
pub(super) struct Gpus(Vec<(TestGpu, EngineHandle)>);

impl Gpus {
    pub(super) fn start(&mut self, config: EngineConfig) -> EngineHandle {
        self.start_on(TestGpu::new(Order::Forwards), config)
    }

    pub(super) fn start_on(&mut self, gpu: TestGpu, config: EngineConfig) -> EngineHandle {
        let engine = start(EngineConfig { device: DeviceChoice::Cuda(gpu.driver()), ..config });
        self.0.push((gpu, engine.clone()));
        engine
    }

    /// Looks at the device of one that was shut down.
    pub(super) fn end_of(&mut self, engine: &EngineHandle) {
        let instance = engine.describe().instance;
        let place = self.0.iter().position(|(_, it)| it.describe().instance == instance);
        let (gpu, engine) = self.0.swap_remove(place.expect("it was started here"));
        ends(&engine);
        gpu.assert_nothing_left();
    }

    /// Ends all.
    pub(super) fn end(self) {
        for (gpu, engine) in self.0 {
            closes(&engine);
            engine.clone().shutdown();
            ends(&engine);
            gpu.assert_nothing_left();
        }
    }
}

/// The engine thread ends, and all that it had is dropped before.
pub(super) fn ends(engine: &EngineHandle) {
    let deadline = Instant::now() + LIMIT;
    while engine.is_alive() {
        assert!(Instant::now() < deadline, "the engine thread does not end");
        std::thread::yield_now();
    }
}

/// Prompts from one token to several blocks, some of which begin alike. Every third is chosen by the host, the others on the
/// device.
pub(super) fn small_request(which: u32, part: Part) -> Request {
    let length = [1, 14, 16, 37][which as usize % 4];
    let tokens: Vec<TokenId> = (0..length).map(|index| 3 + (index * 7 + index / 16 * which) % 200).collect();
    let sampling = SamplingParams {
        temperature: if which.is_multiple_of(2) { 0.0 } else { 0.9 },
        seed: which.into(),
        logprobs: (which % 3 == 2).then_some(2),
        repetition_penalty: if which == 4 { 1.1 } else { 1.0 },
        ..SamplingParams::default()
    };
    Request {
        prompt_len: TokenCount(length),
        tokens,
        sampling,
        stop: StopConditions::after(SMALL_OUTPUT),
        ..request(which, part)
    }
}

pub(super) fn small_config(role: Role) -> EngineConfig {
    EngineConfig {
        max_num_batched_tokens: 64,
        max_model_len: Some(64),
        kv_cache_memory: Some(24 * 16 * BYTES_PER_TOKEN),
        ..config("llama3", role)
    }
}

pub(super) fn ids(output: &Output) -> Vec<TokenId> {
    output.iter().map(|(token, _)| *token).collect()
}

/// What one worker on the CPU answers.
pub(super) fn whole() -> Vec<Vec<TokenId>> {
    let alone = start(small_config(Role::Hybrid));
    let one = |which| output(submit(&alone, small_request(which, Part::Whole), None));
    (0..REQUESTS).map(|which| ids(&one(which))).collect()
}

#[test]
fn a_gpu_answers_as_the_cpu_does_whatever_else_runs() {
    let expected = whole();
    #[rustfmt::skip]
    let rows: [(&str, Change, bool); 5] = [
        // name                     change                                              steps overlap
        ("all at once",             |_| {},                                             true),
        ("in chunks of 7",          |it| it.max_num_batched_tokens = 7,                 true),
        ("launch by launch",        |it| it.cuda_graphs = CudaGraphs::Off,              true),
        ("step after step",         |it| it.async_scheduling = false,                   false),
        ("with guesses",            |it| *it = speculation::guessing(it.clone()),       false),
    ];
    let mut gpus = Gpus::default();
    for (row, change, overlap) in rows {
        let mut config = small_config(Role::Hybrid);
        change(&mut config);
        let engine = gpus.start(config);
        let submit_one = |which| submit(&engine, small_request(which, Part::Whole), None);
        let streams: Vec<_> = (0..REQUESTS).map(submit_one).collect();
        for (stream, expected) in streams.into_iter().zip(&expected) {
            assert_eq!(&ids(&output(stream)), expected, "{row}");
        }
        // From the prefix cache.
        assert_eq!(&ids(&output(submit_one(3))), &expected[3], "{row}, warm");
        let counters = engine.status().counters;
        assert!(0 < counters.prefix_hits, "{row}: {counters:?}");
        assert_eq!(0 < counters.overlapped_steps, overlap, "{row}: {counters:?}");
    }
    gpus.end();
}

/// An engine on a fake device, which is looked at while it serves.
fn watched(config: EngineConfig) -> (Arc<Fake>, EngineHandle) {
    let fake = Arc::new(Fake::new(Order::Forwards));
    let device = DeviceChoice::Cuda(Arc::clone(&fake) as _);
    (fake, start(EngineConfig { device, ..config }))
}

#[test]
fn the_next_step_is_asked_for_before_one_is_waited_for_once() {
    for graphs in [CudaGraphs::Usual, CudaGraphs::Off] {
        for prompt_logprobs in [None, Some(3)] {
            let row = format!("{graphs:?}, {prompt_logprobs:?}");
            let (fake, engine) =
                watched(EngineConfig { cuda_graphs: graphs.clone(), ..small_config(Role::Hybrid) });
            let mut request = small_request(1, Part::Whole);
            request.stop = StopConditions::after(12);
            request.sampling.logprobs = prompt_logprobs;
            request.sampling.prompt_logprobs = prompt_logprobs;
            let before = fake.calls().waits;
            let (_, stream) = submit(&engine, request, None);
            let is_end = |event: &EngineEvent| matches!(event, EngineEvent::Finished { .. });
            while !is_end(&stream.recv_timeout(LIMIT).expect("an event in time")) {}
            closes(&engine);
            let counters = engine.status().counters;
            assert_eq!((counters.steps, counters.overlapped_steps), (12, 11), "{row}");
            assert_eq!(fake.calls().waits - before, 12, "{row}: once for each step");
            let waits = fake.waits();
            let (last, others) = waits.split_last().expect("it waits");
            // That the last token is the last is known before.
            assert_eq!((others.len(), *last), (11, 0), "{row}");
            assert!(others.iter().all(|behind| 0 < *behind), "{row}: {waits:?}");
            engine.clone().shutdown();
            ends(&engine);
            fake.assert_nothing_left();
        }
    }
}

#[test]
fn who_ends_by_surprise_ends_with_the_same_token() {
    let alone = start(small_config(Role::Hybrid));
    let long = |which| Request { stop: StopConditions::after(12), ..small_request(which, Part::Whole) };
    let requests: Vec<Request> = [0, 1, 3]
        .map(|which| {
            let tokens = ids(&output(submit(&alone, long(which), None)));
            let stop = StopConditions { stop_token_ids: vec![tokens[4]], ..StopConditions::after(12) };
            Request { stop, ..long(which) }
        })
        .into();
    let all = |engine: &EngineHandle| -> Vec<Output> {
        let fresh = |request: &Request| Request {
            id: RequestId(NEXT.fetch_add(1, Ordering::Relaxed)),
            ..request.clone()
        };
        let streams: Vec<_> = requests.iter().map(|it| submit(engine, fresh(it), None)).collect();
        streams.into_iter().map(output).collect()
    };
    let expected = all(&alone);
    assert!(expected.iter().all(|output| output.len() <= 5), "{expected:?}");
    let (fake, engine) = watched(small_config(Role::Hybrid));
    for round in ["cold", "warm"] {
        assert_eq!(all(&engine), expected, "{round}");
        closes(&engine);
    }
    let counters = engine.status().counters;
    assert_eq!(counters.generation_tokens, 2 * expected.iter().map(|it| it.len() as u64).sum::<u64>());
    engine.clone().shutdown();
    ends(&engine);
    fake.assert_nothing_left();
}

#[test]
fn a_name_that_is_used_again_at_once_is_another_request() {
    let expected = whole();
    let (fake, engine) = watched(small_config(Role::Hybrid));
    for round in 0..12 {
        let request = Request { stop: StopConditions::after(20), ..small_request(1, Part::Whole) };
        let id = request.id;
        let (_, stream) = submit(&engine, request, None);
        for _ in 0..round % 4 {
            // At another step each round.
            drop(stream.recv_timeout(LIMIT).expect("an event in time"));
        }
        engine.cancel(id);
        let again = Request { id, ..small_request(3, Part::Whole) };
        assert_eq!(&ids(&output(submit(&engine, again, None))), &expected[3], "{round}");
    }
    closes(&engine);
    engine.clone().shutdown();
    ends(&engine);
    fake.assert_nothing_left();
}

#[test]
fn who_loses_its_blocks_starts_over_with_the_same_tokens() {
    let long = |which: u32| Request { stop: StopConditions::after(28), ..small_request(1 + 4 * which, Part::Whole) };
    let config = EngineConfig {
        kv_cache_memory: Some(4 * 16 * BYTES_PER_TOKEN),
        prefix_cache: false,
        ..small_config(Role::Hybrid)
    };
    let answers = |engine: &EngineHandle| -> Vec<Vec<TokenId>> {
        let streams: Vec<_> = (0..3).map(|which| submit(engine, long(which), None)).collect();
        streams.into_iter().map(|stream| ids(&output(stream))).collect()
    };
    let expected = answers(&start(small_config(Role::Hybrid)));
    let mut gpus = Gpus::default();
    let engine = gpus.start(config);
    assert_eq!(answers(&engine), expected);
    closes(&engine);
    assert!(0 < engine.status().counters.preemptions, "{:?}", engine.status());
    gpus.end();
}

#[test]
fn split_between_kinds_of_devices_equals_whole() {
    let expected = whole();
    let (shm, tcp) = (TransportChoice::SharedMemory, TransportChoice::Tcp);
    #[rustfmt::skip]
    let rows: [(&str, [bool; 2], TransportChoice, Change, Change); 5] = [
        ("GPU to CPU",                  [true, false], shm, |_| {},                 |_| {}),
        ("CPU to GPU",                  [false, true], shm, |_| {},                 |_| {}),
        ("GPU to GPU, tcp",             [true, true],  tcp, |_| {},                 |_| {}),
        ("GPU to CPU, blocks 16 to 32", [true, false], tcp, |_| {},                 |d| d.block_len = 32),
        ("CPU to GPU in chunks, axes turned", [false, true], shm, |p| p.max_num_batched_tokens = 7, |d| {
            d.axis_order = AxisOrder::HeadToken;
        }),
    ];
    let mut gpus = Gpus::default();
    for (row, on_gpu, transport, change_prefill, change_decode) in rows {
        let (mut prefill, mut decode) = (small_config(Role::Prefill), small_config(Role::Decode));
        (prefill.transport, decode.transport) = (transport, transport);
        change_prefill(&mut prefill);
        change_decode(&mut decode);
        let mut start = |is_gpu, config| if is_gpu { gpus.start(config) } else { start(config) };
        let pair = Pair { prefill: start(on_gpu[0], prefill), decode: start(on_gpu[1], decode) };
        pair.link();
        // Decode has some blocks in its prefix cache that it has computed itself; whoever computes in place reads them there.
        let alone = output(submit(&pair.decode, small_request(3, Part::Whole), None));
        assert_eq!(&ids(&alone), &expected[3], "{row}, decode alone");
        for round in ["cold", "warm"] {
            let submit_one = |which| pair.submit_request(&small_request(which, Part::Whole));
            let streams: Vec<_> = (0..REQUESTS).map(submit_one).collect();
            for (streams, expected) in streams.into_iter().zip(&expected) {
                assert_eq!(&ids(&pair.output(streams)), expected, "{row}, {round}");
            }
        }
        closes(&pair.prefill);
        closes(&pair.decode);
        let counters = pair.prefill.status().counters;
        assert_eq!(counters.handoffs, 2 * u64::from(REQUESTS), "{row}: {counters:?}");
        // A CPU computes in the arena of a GPU's worker, where the layout is the same.
        assert_eq!(counters.handoff_in_place != 0, row == "CPU to GPU", "{row}: {counters:?}");
    }
    gpus.end();
}

#[test]
fn a_cancelled_request_frees_both_sides() {
    let mut gpus = Gpus::default();
    let mut prefill = small_config(Role::Prefill);
    prefill.max_num_batched_tokens = 16;
    let pair = Pair { prefill: gpus.start(prefill), decode: gpus.start(small_config(Role::Decode)) };
    pair.link();
    for round in 0..8 {
        let (prefill, decode) = pair.submit_request(&small_request(3, Part::Whole));
        for _ in 0..round {
            std::thread::yield_now(); // Meets other stages in other rounds; none must matter.
        }
        pair.decode.cancel(decode.0);
        pair.prefill.cancel(prefill.0);
    }
    closes(&pair.prefill);
    closes(&pair.decode);
    let output = pair.output(pair.submit_request(&small_request(0, Part::Whole)));
    assert_eq!(output.len(), SMALL_OUTPUT as usize, "it still serves");
    gpus.end();
}

/// What a row changes in the settings.
type Asked<'a> = &'a dyn Fn(&mut EngineConfig);

/// What a GPU cannot do is told before weights are read; where `auto` was asked for the CPU computes instead.
#[test]
fn what_a_gpu_cannot_do_is_refused_or_left_to_the_cpu() {
    let folder = tempfile::tempdir().expect("there is room");
    let odd_heads = SMALL_CONFIG.replace("\"head_dim\": 16", "\"head_dim\": 12");
    std::fs::write(folder.path().join("config.json"), odd_heads).expect("there is room");
    let odd_heads = |it: &mut EngineConfig| {
        it.model = ModelSource::Folder(folder.path().to_owned());
        it.load_format = LoadFormat::Dummy { seed: 1 };
    };
    const ENOUGH: usize = 4 << 30;
    #[rustfmt::skip]
    let rows: [(&str, usize, Asked<'_>, Option<&str>); 9] = [
        ("nothing more",              ENOUGH,    &|_| {},                                                 None),
        ("smaller weights in the room of large ones", 300 << 10, &|it| {
            it.quantization = Some(Quantization::Int4 { group: 32 });
            it.kv_cache_memory = Some(16 * 16 * BYTES_PER_TOKEN);
        }, None),
        ("heads of no whole packs",   ENOUGH,    &odd_heads,                                              Some("heads of 12 elements")),
        ("ranks",                     ENOUGH,    &|it| it.tensor_parallel = 2,                            Some("--tensor-parallel-size 2 takes a GPU for each rank")),
        ("very long steps",           ENOUGH,    &|it| it.max_num_batched_tokens = 70_000,                Some("steps of up to 70000 tokens")),
        ("no room for weights",       300 << 10, &|_| {},                                                 Some("weights of 345344 bytes")),
        ("no room for blocks",        500 << 10, &|_| {},                                                 Some("a KV cache of 196608 bytes")),
        ("no room for one sequence",  350 << 10, &|it| it.kv_cache_memory = None,                         Some("a KV cache of 32768 bytes")),
        ("room for one sequence",     2 << 20,   &|it| it.kv_cache_memory = None,                         None),
    ];
    for (row, capacity, change, expected) in rows {
        let mut config = small_config(Role::Hybrid);
        change(&mut config);
        let fake = Arc::new(Fake::new(Order::Forwards).with_capacity(capacity));
        config.device = DeviceChoice::Cuda(Arc::clone(&fake) as _);
        let settled = config.settle_device();
        match expected {
            None => assert!(settled.is_ok_and(|gpu| gpu.is_some()), "{row}"),
            Some(expected) => {
                let error = settled.err().unwrap_or_else(|| panic!("{row} is taken"));
                assert!(error.to_string().contains(expected), "{row}: {error}");
                let error = EngineHandle::start(config.clone(), &mut |_| {}).map(drop).expect_err(row);
                assert!(error.to_string().contains(expected), "{row}: {error}");
            }
        }
        config.device = DeviceChoice::CudaOrCpu(Arc::clone(&fake) as _);
        let settled = config.settle_device().unwrap_or_else(|error| panic!("{row}: {error}"));
        assert_eq!(settled.is_none(), expected.is_some(), "{row}");
        drop(settled);
        let calls = fake.calls();
        assert_eq!((calls.allocations, calls.copies), (0, 0), "{row}: nothing was asked of the GPU");
        if expected.is_some() {
            let engine = start(config);
            assert!(!engine.describe().device.contains("emulated"), "{row}: {}", engine.describe().device);
            closes(&engine);
        }
        fake.assert_nothing_left();
    }
}

/// Whole, and split between both kinds of devices, whose workers pair because they compute the same.
#[test]
fn in_fewer_bits_a_gpu_answers_as_the_cpu_does() {
    let mut gpus = Gpus::default();
    for quantization in [Quantization::Int8, Quantization::Int4 { group: 32 }] {
        let config = |role| EngineConfig { quantization: Some(quantization), ..small_config(role) };
        let alone = start(config(Role::Hybrid));
        let answers = |engine: &EngineHandle| -> Vec<Vec<TokenId>> {
            let streams: Vec<_> =
                (0..REQUESTS).map(|which| submit(engine, small_request(which, Part::Whole), None)).collect();
            streams.into_iter().map(|stream| ids(&output(stream))).collect()
        };
        let expected = answers(&alone);
        assert_eq!(answers(&gpus.start(config(Role::Hybrid))), expected, "{quantization}");
        let pair = Pair { prefill: gpus.start(config(Role::Prefill)), decode: start(config(Role::Decode)) };
        pair.link();
        for (which, expected) in (0..REQUESTS).zip(&expected) {
            let found = pair.output(pair.submit_request(&small_request(which, Part::Whole)));
            assert_eq!(&ids(&found), expected, "{quantization}, split: {which}");
        }
    }
    gpus.end();
}

#[test]
fn a_gpu_without_room_for_a_step_is_an_error_that_leaves_nothing() {
    // Weights and blocks fit, and no more.
    let fake = Arc::new(Fake::new(Order::Forwards).with_capacity(540 << 10));
    let device = DeviceChoice::Cuda(Arc::clone(&fake) as _);
    let config = EngineConfig { device, ..small_config(Role::Hybrid) };
    let error = EngineHandle::start(config, &mut |_| {}).map(drop).expect_err("it has less");
    assert!(format!("{error:?}").contains("OutOfMemory"), "{error:?}");
    fake.assert_nothing_left();
}

#[test]
fn a_gpu_that_fails_ends_its_requests_and_its_worker() {
    let fake = Arc::new(Fake::new(Order::Forwards));
    let device = DeviceChoice::Cuda(Arc::clone(&fake) as _);
    let engine = start(EngineConfig { device, ..small_config(Role::Hybrid) });
    fake.fail_after(12, CudaError::OutOfMemory { bytes: 1 });
    let (_, stream) = submit(&engine, small_request(1, Part::Whole), None);
    loop {
        match stream.recv_timeout(LIMIT) {
            Ok(EngineEvent::Token { .. }) => {}
            Ok(EngineEvent::Failed { recovery: Recovery::Reroute, message }) => {
                assert!(message.contains("the device failed"), "{message}");
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    ends(&engine);
}

pub(super) const REQUESTS: u32 = 5;
const SMALL_OUTPUT: u32 = 5;
/// The shape of the model, of which there are no weights.
const SMALL_CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "vocab_size": 288, "hidden_size": 64,
    "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu", "dtype": "float32"}"#;
