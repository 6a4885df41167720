//! Engines of several ranks, each on a device of its own, which the emulator is here: they answer as ranks of the CPU do, with the same
//! bits whatever else runs, and hand over to and from any other number of ranks of either kind. Nothing is left on any device.

use std::sync::Arc;

use tidemill_engine::handle::{CudaGraphs, DeviceChoice, LoadFormat, Quantization};
use tidemill_kernels::cuda::emulator::{Kernels, Order};
use tidemill_kernels::cuda::fake::Fake;
use tidemill_kernels::cuda::{CudaError, Driver};

use super::cuda::{REQUESTS, ends, small_config, small_request};
use super::ranks::assert_close;
use super::*;

/// Engines and their devices, which are looked at when all have ended.
#[derive(Default)]
struct Machine(Vec<(Vec<Arc<Fake>>, EngineHandle)>);

impl Machine {
    /// On so many devices; none: ranks of the CPU, as many as the configuration says.
    fn start(&mut self, gpus: usize, config: EngineConfig) -> EngineHandle {
        let fakes = fakes(gpus);
        let engine = start(on(&fakes, config));
        self.0.push((fakes, engine.clone()));
        engine
    }

    fn end(self) {
        for (fakes, engine) in self.0 {
            closes(&engine);
            engine.clone().shutdown();
            ends(&engine);
            fakes.iter().for_each(|fake| fake.assert_nothing_left());
        }
    }
}

/// Whose threads take turns in one order here and in another there.
fn fakes(count: usize) -> Vec<Arc<Fake>> {
    let orders = [Order::Forwards, Order::Backwards, Order::Random(1), Order::Random(2)];
    orders.into_iter().cycle().take(count).map(|order| Arc::new(Fake::new(order))).collect()
}

fn on(fakes: &[Arc<Fake>], config: EngineConfig) -> EngineConfig {
    let drivers: Vec<Arc<dyn Driver>> = fakes.iter().map(|fake| Arc::clone(fake) as _).collect();
    match &drivers[..] {
        [] => config,
        [one] => EngineConfig { device: DeviceChoice::Cuda(Arc::clone(one)), tensor_parallel: 1, ..config },
        all => {
            let tensor_parallel = all.len() as u32;
            EngineConfig { device: DeviceChoice::CudaRanks(drivers), tensor_parallel, ..config }
        }
    }
}

fn all_at_once(engine: &EngineHandle) -> Vec<Output> {
    let submit_one = |which| submit(engine, told(which), None);
    let streams: Vec<_> = (0..REQUESTS).map(submit_one).collect();
    streams.into_iter().map(output).collect()
}

/// With log-probabilities in any case.
fn told(which: u32) -> Request {
    let request = small_request(which, Part::Whole);
    Request { sampling: SamplingParams { logprobs: Some(2), ..request.sampling.clone() }, ..request }
}

#[test]
fn ranks_answer_as_those_of_the_cpu_do_and_with_the_same_bits_whatever_else_runs() {
    #[rustfmt::skip]
    let rows: [(&str, Change, bool); 5] = [
        // name                     change                                              steps overlap
        ("all at once",             |_| {},                                             true),
        ("in chunks of 7",          |it| it.max_num_batched_tokens = 7,                 true),
        ("launch by launch",        |it| it.cuda_graphs = CudaGraphs::Off,              true),
        ("step after step",         |it| it.async_scheduling = false,                   false),
        ("with guesses",            |it| *it = speculation::guessing(it.clone()),       false),
    ];
    for (ranks, rows) in [(2, &rows[..]), (4, &rows[..2])] {
        let of_cpu = start(EngineConfig { tensor_parallel: ranks, ..small_config(Role::Hybrid) });
        let cpu: Vec<Output> = (0..REQUESTS).map(|which| output(submit(&of_cpu, told(which), None))).collect();
        let mut expected: Option<Vec<Output>> = None;
        let mut machine = Machine::default();
        for &(row, change, overlap) in rows {
            let row = format!("{ranks} ranks, {row}");
            let mut config = small_config(Role::Hybrid);
            change(&mut config);
            let engine = machine.start(ranks as usize, config);
            let description = engine.describe();
            assert_eq!(description.tensor_parallel, ranks, "{row}");
            assert!(description.device.starts_with(&format!("{ranks} x emulated GPU")), "{row}");
            // From the prefix cache too, once.
            let rounds = if expected.is_none() { 2 } else { 1 };
            for round in 0..rounds {
                let found = all_at_once(&engine);
                for (found, cpu) in found.iter().zip(&cpu) {
                    assert_close(found, cpu, &format!("{row}, {round}"));
                }
                assert_eq!(&found, expected.get_or_insert_with(|| found.clone()), "{row}, {round}");
            }
            // Alone, without one beside it whose tokens the host chooses.
            let expected = expected.as_ref().expect("just seen");
            assert_eq!(output(submit(&engine, told(3), None)), expected[3], "{row}, alone");
            let counters = engine.status().counters;
            assert_eq!(0 < counters.overlapped_steps, overlap, "{row}: {counters:?}");
        }
        for (fakes, _) in &machine.0 {
            let asked: Vec<_> = fakes.iter().map(|fake| fake.calls()).collect();
            // Both sums of each of the two layers, and logits, of each step that is no graph.
            assert!(asked.iter().all(|calls| calls.collectives == asked[0].collectives), "{asked:?}");
            assert!(0 < asked[0].collectives, "{asked:?}");
        }
        machine.end();
    }
}

/// On one of the devices, whichever the first is: its thread is the one that everybody waits for.
#[test]
fn the_host_waits_for_the_first_rank_once_a_step() {
    for graphs in [CudaGraphs::Usual, CudaGraphs::Off] {
        let fakes = fakes(2);
        let engine = start(on(&fakes, EngineConfig { cuda_graphs: graphs.clone(), ..small_config(Role::Hybrid) }));
        let before = fakes[0].calls();
        let request = Request { stop: StopConditions::after(12), ..small_request(1, Part::Whole) };
        assert_eq!(output(submit(&engine, request, None)).len(), 12);
        closes(&engine);
        let counters = engine.status().counters;
        assert_eq!((counters.steps, counters.overlapped_steps), (12, 11), "{graphs:?}");
        let after = fakes[0].calls();
        assert_eq!((after.waits - before.waits, after.allocations), (12, before.allocations), "{graphs:?}");
        assert_eq!(0 < after.replays, graphs == CudaGraphs::Usual, "{after:?}");
        let waits = fakes[0].waits();
        let (last, others) = waits.split_last().expect("it waits");
        assert_eq!((others.len(), *last), (11, 0), "{graphs:?}");
        assert!(others.iter().all(|behind| 0 < *behind), "{graphs:?}: {waits:?}");
        engine.clone().shutdown();
        ends(&engine);
        fakes.iter().for_each(|fake| fake.assert_nothing_left());
    }
}

#[test]
fn in_fewer_bits_ranks_answer_as_one_gpu_does() {
    let int4 = Quantization::Int4 { group: 32 };
    #[rustfmt::skip]
    let rows = [
        (2, Some(Quantization::Int8), None),
        (4, Some(Quantization::Int8), None),
        (2, Some(int4),               None),
        (2, Some(Quantization::Fp8),  None),
        (4, Some(Quantization::Fp8),  None),
        (2, None,                     Some(KvDtype::Int8)),
        (4, None,                     Some(KvDtype::Fp8)),
    ];
    let mut machine = Machine::default();
    for (ranks, quantization, kv_cache_dtype) in rows {
        let row = format!("{ranks} ranks, {quantization:?}, {kv_cache_dtype:?}");
        let config = || EngineConfig { quantization, kv_cache_dtype, ..small_config(Role::Hybrid) };
        // Each rank rounds its share of a row in steps of its own, on either kind of device.
        let of_cpu = start(EngineConfig { tensor_parallel: ranks, ..config() });
        let on_gpus = machine.start(ranks as usize, config());
        assert_eq!(of_cpu.describe().fingerprint, on_gpus.describe().fingerprint, "{row}");
        for which in [1, 3] {
            let [expected, found] =
                [&of_cpu, &on_gpus].map(|engine| output(submit(engine, told(which), None)));
            assert_near(&found, &expected, &format!("{row}: {which}"));
        }
    }
    machine.end();
}

/// The first token's log-probability, before one that differs by rounding could lead elsewhere.
fn assert_near(found: &Output, expected: &Output, row: &str) {
    let chosen = |output: &Output| (output[0].0, output[0].1.as_ref().expect("asked for").chosen);
    let ((token, found), (expected_token, expected)) = (chosen(found), chosen(expected));
    assert_eq!(token, expected_token, "{row}");
    assert!((found - expected).abs() < 0.1, "{row}: {found} instead of {expected}");
}

/// How many ranks, and whether each is a GPU.
type Side = (bool, u32);

#[test]
fn any_number_of_ranks_hands_over_to_any_other_on_either_kind_of_device() {
    let (shm, tcp) = (TransportChoice::SharedMemory, TransportChoice::Tcp);
    const GPU: bool = true;
    const CPU: bool = false;
    #[rustfmt::skip]
    let rows: [(&str, Side, Side, TransportChoice, Change, Change); 9] = [
        ("two to one",              (GPU, 2), (GPU, 1), shm, |_| {},                             |_| {}),
        ("one to two",              (GPU, 1), (GPU, 2), tcp, |_| {},                             |_| {}),
        ("four to two, in chunks",  (GPU, 4), (GPU, 2), shm, |p| p.max_num_batched_tokens = 7,   |_| {}),
        ("two to four",             (GPU, 2), (GPU, 4), tcp, |_| {},                             |_| {}),
        ("to a CPU",                (GPU, 2), (CPU, 1), shm, |_| {},                             |_| {}),
        ("to two ranks of a CPU, axes turned", (GPU, 4), (CPU, 2), tcp, |_| {}, |d| d.axis_order = AxisOrder::HeadToken),
        ("from a CPU, in its place", (CPU, 1), (GPU, 2), shm, |_| {},                            |_| {}),
        ("from four ranks of a CPU, blocks of 32", (CPU, 4), (GPU, 2), shm, |p| p.block_len = 32, |_| {}),
        ("in int8, axes turned",    (GPU, 2), (GPU, 2), tcp, |p| p.kv_cache_dtype = Some(KvDtype::Int8), |d| {
            (d.kv_cache_dtype, d.axis_order) = (Some(KvDtype::Int8), AxisOrder::HeadToken);
        }),
    ];
    let expected = [None, Some(KvDtype::Int8)].map(|kv_cache_dtype| -> Vec<Output> {
        let alone = start(EngineConfig { kv_cache_dtype, ..small_config(Role::Hybrid) });
        (0..REQUESTS).map(|which| output(submit(&alone, told(which), None))).collect()
    });
    let mut machine = Machine::default();
    for (row, of_prefill, of_decode, transport, change_prefill, change_decode) in rows {
        let mut start = |role, (is_gpu, ranks), change: Change| {
            let mut config = EngineConfig { tensor_parallel: ranks, transport, ..small_config(role) };
            change(&mut config);
            machine.start(if is_gpu { ranks as usize } else { 0 }, config)
        };
        let pair = Pair {
            prefill: start(Role::Prefill, of_prefill, change_prefill),
            decode: start(Role::Decode, of_decode, change_decode),
        };
        pair.link();
        let expected = &expected[usize::from(row.contains("int8"))];
        let rounds = if of_prefill == of_decode { 2 } else { 1 };
        for round in 0..rounds {
            let streams: Vec<_> = (0..REQUESTS).map(|which| pair.submit_request(&told(which))).collect();
            for (streams, expected) in streams.into_iter().zip(expected) {
                let found = pair.output(streams);
                if row.contains("int8") {
                    assert_near(&found, expected, row);
                } else {
                    assert_close(&found, expected, &format!("{row}, {round}"));
                }
            }
        }
        closes(&pair.prefill);
        closes(&pair.decode);
        let counters = pair.prefill.status().counters;
        assert_eq!(counters.handoffs, rounds * u64::from(REQUESTS), "{row}: {counters:?}");
        assert_eq!(counters.handoff_in_place != 0, row.contains("in its place"), "{row}: {counters:?}");
    }
    machine.end();
}

#[test]
fn a_rank_that_fails_ends_its_worker_and_leaves_nobody_waiting() {
    for bad in 0..2 {
        // In its first step, in a later one, and at each call of one that is a graph.
        for after in [3, 40].into_iter().chain(110..116) {
            let row = format!("rank {bad} after {after} calls");
            let fakes = fakes(2);
            let engine = start(on(&fakes, small_config(Role::Hybrid)));
            fakes[bad].fail_after(after, CudaError::OutOfMemory { bytes: 1 });
            let request = Request { stop: StopConditions::after(25), ..small_request(1, Part::Whole) };
            let (_, stream) = submit(&engine, request, None);
            let message = loop {
                match stream.recv_timeout(LIMIT) {
                    Ok(EngineEvent::Begun | EngineEvent::Token { .. }) => {}
                    Ok(EngineEvent::Failed { recovery: Recovery::Reroute, message }) => break message,
                    other => panic!("{row}: {other:?}"),
                }
            };
            let expected = format!("the device failed: GPU of rank {bad}: the GPU has no 1 bytes of free memory");
            assert_eq!(message, expected, "{row}");
            ends(&engine);
        }
    }
}

/// Its kernels are none of those that are asked for, which is a bug, and so a panic.
#[test]
fn a_rank_that_panics_ends_its_worker_and_leaves_nobody_waiting() {
    for bad in 0..3 {
        let mut fakes = fakes(3);
        fakes[bad] = Arc::new(Fake::new(Order::Forwards).with_kernels(Kernels::Planted));
        let folder = of_heads(9);
        let engine = start(on(&fakes, of_folder(&folder)));
        let (_, stream) = submit(&engine, small_request(1, Part::Whole), None);
        while let Ok(event) = stream.recv_timeout(LIMIT) {
            assert!(matches!(event, EngineEvent::Begun), "rank {bad}: {event:?}");
        }
        ends(&engine);
    }
}

/// A model of so many query heads, two KV heads, and a vocabulary that no number of ranks divides.
fn of_heads(heads: u32) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("there is room");
    let config = format!(
        r#"{{"architectures": ["LlamaForCausalLM"], "vocab_size": 293, "hidden_size": 64, "intermediate_size": 112,
        "num_hidden_layers": 2, "num_attention_heads": {heads}, "num_key_value_heads": {}, "head_dim": 16,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu", "dtype": "float32"}}"#,
        if heads == 8 { 2 } else { heads }
    );
    std::fs::write(folder.path().join("config.json"), config).expect("there is room");
    folder
}

fn of_folder(folder: &tempfile::TempDir) -> EngineConfig {
    EngineConfig {
        model: ModelSource::Folder(folder.path().to_owned()),
        load_format: LoadFormat::Dummy { seed: 7 },
        ..small_config(Role::Hybrid)
    }
}

/// Four neighbours have the same KV head, parts of rows are of two sizes, and so are those of the vocabulary.
#[test]
fn eight_ranks_answer_as_one_does_and_hand_over() {
    let folder = of_heads(8);
    let config = |role| EngineConfig { role, name: format!("{role:?}"), ..of_folder(&folder) };
    let alone = start(config(Role::Hybrid));
    let expected: Vec<Output> =
        (0..REQUESTS).map(|which| output(submit(&alone, told(which), None))).collect();
    let mut machine = Machine::default();
    let eight = machine.start(8, config(Role::Hybrid));
    for (found, expected) in all_at_once(&eight).iter().zip(&expected) {
        assert_close(found, expected, "eight ranks");
    }
    for (of_prefill, of_decode) in [(8, 2), (1, 8)] {
        let pair = Pair {
            prefill: machine.start(of_prefill, config(Role::Prefill)),
            decode: machine.start(of_decode, config(Role::Decode)),
        };
        pair.link();
        for (which, expected) in (0..REQUESTS).zip(&expected) {
            let found = pair.output(pair.submit_request(&told(which)));
            assert_close(&found, expected, &format!("{of_prefill} to {of_decode}"));
        }
        assert_eq!(pair.prefill.status().counters.handoffs, u64::from(REQUESTS));
    }
    machine.end();
}

#[test]
fn what_ranks_of_gpus_cannot_do_is_refused_or_left_to_the_cpu() {
    let small = |capacity: usize| Arc::new(Fake::new(Order::Forwards).with_capacity(capacity));
    let enough = || small(4 << 30);
    let alone = || Arc::new(Fake::new(Order::Forwards).without_exchange());
    #[rustfmt::skip]
    let rows: [(&str, Vec<Arc<Fake>>, u32, &str); 6] = [
        ("more ranks than GPUs",    vec![enough()],                         2, "--tensor-parallel-size 2 takes a GPU for each rank, and 1 are there"),
        ("more GPUs than ranks",    vec![enough(), enough(), enough()],     2, "and 3 are there"),
        ("heads that do not divide", vec![enough(), enough(), enough()],    3, "--tensor-parallel-size 3 does not divide the model's 4 query heads"),
        ("nothing to sum by",       vec![enough(), alone()],                2, "several GPUs need NCCL"),
        ("weights",                 vec![enough(), small(150 << 10)],       2, "weights of 210176 bytes"),
        ("blocks",                  vec![small(300 << 10), enough()],       2, "a KV cache of 98304 bytes"),
    ];
    for (row, fakes, ranks, expected) in rows {
        let drivers: Vec<Arc<dyn Driver>> = fakes.iter().map(|fake| Arc::clone(fake) as _).collect();
        let with = |device| EngineConfig { device, tensor_parallel: ranks, ..small_config(Role::Hybrid) };
        let config = with(DeviceChoice::CudaRanks(drivers.clone()));
        let error = EngineHandle::start(config, &mut |_| {}).map(drop).expect_err(row).to_string();
        assert!(error.contains(expected), "{row}: {error}");
        let settled = with(DeviceChoice::CudaRanksOrCpu(drivers)).settle_device();
        assert!(settled.is_ok_and(|gpus| gpus.is_none()), "{row}: the CPU computes");
        assert!(fakes.iter().all(|fake| fake.calls().allocations == 0), "{row}: nothing was asked of the GPUs");
    }
}

/// Weights and blocks fit, and no more: on the second of two.
#[test]
fn a_rank_without_room_for_a_step_is_an_error_that_leaves_nothing() {
    let of = |capacity: usize| Arc::new(Fake::new(Order::Forwards).with_capacity(capacity));
    let fakes = [of(4 << 30), of(340 << 10)];
    let error = EngineHandle::start(on(&fakes, small_config(Role::Hybrid)), &mut |_| {}).map(drop);
    let error = format!("{:?}", error.expect_err("it has less"));
    assert!(error.contains("rank: 1, error: OutOfMemory"), "{error}");
    fakes.iter().for_each(|fake| fake.assert_nothing_left());
}
