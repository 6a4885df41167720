//! Whole engines in one process: requests go in, tokens come out, blocks come back, whatever the way.

tidemill_kernels::where_emulated! {
    mod cuda;
    mod cuda_ranks;
    mod devices;
    #[path = "../support/test_gpu.rs"]
    mod test_gpu;
}
mod draft_model;
mod ranks;
mod speculation;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use tidemill_engine::engine::EngineHandle;
use tidemill_engine::handle::{
    DigestCoverage, EngineConfig, EngineEvent, ModelSource, Peer, Recovery, Role, TransportChoice,
};
use tidemill_engine_core::request::{
    Logprobs, Part, Request, RequestId, SamplingParams, StopConditions, TokenId,
};
use tidemill_kvtransfer_proto::layout::{AxisOrder, KvDtype};
use tidemill_kvtransfer_proto::units::{HandoffId, TokenCount};

/// A token and its log-probabilities.
type Output = Vec<(TokenId, Option<Logprobs>)>;
/// What a row of a table changes in the settings.
type Change = fn(&mut EngineConfig);

#[test]
fn neither_batch_nor_chunk_nor_cache_nor_preemption_changes_a_token() {
    let model = "llama3";
    let alone = start(config(model, Role::Hybrid));
    let expected: Vec<Output> = (0..6).map(|which| whole(&alone, which)).collect();
    #[rustfmt::skip]
    let rows: [(&str, Change); 5] = [
        ("all at once",                 |_| {}),
        ("in chunks of 7",              |it| it.max_num_batched_tokens = 7),
        ("without a prefix cache",      |it| it.prefix_cache = false),
        ("in blocks of 64",             |it| it.block_len = 64),
        ("in so little memory that sequences are preempted", |it| it.kv_cache_memory = Some(26 * 16 * BYTES_PER_TOKEN)),
    ];
    for (row, change) in rows {
        let mut config = config(model, Role::Hybrid);
        change(&mut config);
        let engine = start(config);
        for round in ["cold", "warm"] {
            let streams: Vec<_> =
                (0..6).map(|which| submit(&engine, request(which, Part::Whole), None)).collect();
            for (stream, expected) in streams.into_iter().zip(&expected) {
                assert_eq!(&output(stream), expected, "{row}, {round}");
            }
        }
        if row.contains("preempted") {
            assert!(0 < engine.status().counters.preemptions, "{row}: {:?}", engine.status());
        }
        closes(&engine);
    }
}

#[test]
fn split_equals_whole_over_each_way_and_layout() {
    let expected: Vec<Output> = {
        let alone = start(config("qwen3", Role::Hybrid));
        (0..6).map(|which| whole(&alone, which)).collect()
    };
    let shm = TransportChoice::SharedMemory;
    let tcp = TransportChoice::Tcp;
    #[rustfmt::skip]
    let rows: [(&str, TransportChoice, Change, Change); 7] = [
        ("in place",                    shm, |_| {},                            |_| {}),
        ("copied",                      shm, |p| p.in_place = false,            |d| d.in_place = false),
        ("tcp",                         tcp, |_| {},                            |d| d.digest = DigestCoverage::Full),
        ("blocks of 16 to 64",          shm, |_| {},                            |d| d.block_len = 64),
        ("blocks of 64 to 16, tcp",     tcp, |p| p.block_len = 64,              |_| {}),
        ("axes turned",                 shm, |p| p.axis_order = AxisOrder::HeadToken, |d| d.axis_order = AxisOrder::TokenHead),
        ("small chunks, tcp",           tcp, |p| p.max_num_batched_tokens = 20, |_| {}),
    ];
    for (row, transport, change_prefill, change_decode) in rows {
        let mut prefill = config("qwen3", Role::Prefill);
        let mut decode = config("qwen3", Role::Decode);
        (prefill.transport, decode.transport) = (transport, transport);
        change_prefill(&mut prefill);
        change_decode(&mut decode);
        let pair = Pair::start(prefill, decode);
        for round in ["cold", "warm"] {
            let streams: Vec<_> = (0..6).map(|which| pair.submit(which)).collect();
            for (streams, expected) in streams.into_iter().zip(&expected) {
                assert_eq!(&pair.output(streams), expected, "{row}, {round}");
            }
        }
        let counters = pair.prefill.status().counters;
        assert_eq!(counters.handoffs, 12, "{row}: {counters:?}");
        assert_eq!(counters.handoff_in_place == 12, row == "in place", "{row}: {counters:?}");
        closes(&pair.prefill);
        closes(&pair.decode);
    }
}

#[test]
fn an_int8_cache_on_decode_stays_close() {
    let expected = whole(&start(config("llama3", Role::Hybrid)), 3);
    let mut decode = config("llama3", Role::Decode);
    decode.kv_cache_dtype = Some(KvDtype::Int8);
    let pair = Pair::start(config("llama3", Role::Prefill), decode);
    let found = pair.output(pair.submit(3));
    let first = |output: &Output| output[0].0;
    assert_eq!(first(&found), first(&expected), "prefill computes without loss");
    let chosen = |output: &Output| output[1].1.as_ref().expect("asked for").top[0].1;
    let difference = (chosen(&found) - chosen(&expected)).abs();
    assert!(difference < 0.25, "the best log-probability after it differs by {difference}");
}

#[test]
fn a_cancelled_request_frees_both_sides_at_every_stage() {
    for transport in [TransportChoice::SharedMemory, TransportChoice::Tcp] {
        let mut prefill = config("llama3", Role::Prefill);
        let mut decode = config("llama3", Role::Decode);
        prefill.max_num_batched_tokens = 16; // Several steps per prompt, so that there is time to cancel.
        (prefill.transport, decode.transport) = (transport, transport);
        let pair = Pair::start(prefill, decode);
        let mut left_alone = Vec::new();
        for round in 0..40_u64 {
            let which = 3 + u32::try_from(round % 3).expect("small");
            let (prefill, decode) = pair.submit(which);
            for _ in 0..round {
                std::thread::yield_now(); // Meets other stages in other rounds; none must matter.
            }
            match round % 4 {
                0 => pair.prefill.cancel(prefill.0), // Decode hears of it from prefill.
                1 => {
                    pair.decode.cancel(decode.0);
                    // Prefill hears of it from decode, unless decode has not announced itself yet: then the router,
                    // which knows of both, tells it.
                    left_alone.push(prefill.0);
                }
                2 => {
                    pair.decode.cancel(decode.0);
                    pair.prefill.cancel(prefill.0);
                }
                _ => {
                    pair.prefill.cancel(prefill.0);
                    pair.decode.cancel(decode.0);
                }
            }
        }
        for id in left_alone {
            pair.prefill.cancel(id);
        }
        closes(&pair.prefill);
        closes(&pair.decode);
        assert_eq!(pair.output(pair.submit(0)).len(), OUTPUT as usize, "it still serves");
    }
}

#[test]
fn two_workers_that_wait_for_each_others_blocks_get_untangled() {
    let (mut prefill, mut decode) = (config("llama3", Role::Prefill), config("llama3", Role::Decode));
    for config in [&mut prefill, &mut decode] {
        config.transport = TransportChoice::Tcp;
        config.kv_cache_memory = Some(20 * 16 * BYTES_PER_TOKEN); // Room for one of the prompts of fifteen blocks.
    }
    let pair = Pair::start(prefill, decode);
    let handoffs: Vec<HandoffId> = (0..2).map(|_| HandoffId(NEXT.fetch_add(1, Ordering::Relaxed))).collect();
    // Two prompts of fifteen blocks, of which they share three.
    let part = |engine: &EngineHandle, other: &EngineHandle, part| {
        let which = if part_handoff(part) == handoffs[0] { 5 } else { 11 };
        submit(engine, request(which, part), Some(peer(other)))
    };
    // Decode takes the second first, prefill the first.
    let (_, first) = part(&pair.prefill, &pair.decode, Part::PrefillFor(handoffs[0]));
    let second_on_decode = part(&pair.decode, &pair.prefill, Part::DecodeFrom(handoffs[1]));
    let (_, second) = part(&pair.prefill, &pair.decode, Part::PrefillFor(handoffs[1]));
    let (waits, _waits) = part(&pair.decode, &pair.prefill, Part::DecodeFrom(handoffs[0]));
    assert!(matches!(first.recv_timeout(LIMIT), Ok(EngineEvent::Token { index: 0, .. })));
    match first.recv_timeout(LIMIT) {
        Ok(EngineEvent::Failed { recovery: Recovery::Reroute, .. }) => {}
        other => panic!("the first is given up, not {other:?}"),
    }
    assert_eq!(output(second_on_decode).len(), OUTPUT as usize);
    assert!(matches!(second.recv_timeout(LIMIT), Ok(EngineEvent::Token { index: 0, .. })));
    pair.decode.cancel(waits);
    closes(&pair.prefill);
    closes(&pair.decode);
}

#[test]
fn a_request_that_cannot_be_is_refused_with_its_reason() {
    let engine = start(config("llama3", Role::Hybrid));
    let mut too_long = request(0, Part::Whole);
    too_long.tokens = vec![5; 600];
    too_long.prompt_len = TokenCount(600);
    let mut foreign = request(0, Part::Whole);
    foreign.tokens[0] = 100_000;
    #[rustfmt::skip]
    let rows = [
        ("longer than the model",   too_long,                                   "limit"),
        ("no such token",           foreign,                                    "vocabulary"),
        ("a handoff without peer",  request(0, Part::PrefillFor(HandoffId(1))), "peer"),
    ];
    for (row, request, word) in rows {
        let (_, stream) = submit(&engine, request, None);
        match stream.recv_timeout(LIMIT) {
            Ok(EngineEvent::Failed { recovery: Recovery::GiveUp, message }) => {
                assert!(message.contains(word), "{row}: {message}");
            }
            other => panic!("{row}: {other:?}"),
        }
    }
    closes(&engine);
}

#[test]
fn sums_do_not_fall_when_the_engine_stops() {
    let engine = start(config("llama3", Role::Hybrid));
    let (seen, sums) = std::sync::mpsc::channel();
    engine.watch(Box::new(move |status| seen.send(status.counters).unwrap_or_default()));
    whole(&engine, 0);
    closes(&engine);
    engine.shutdown();
    let sums: Vec<_> = sums.iter().collect(); // Ends with the engine, which drops the listener.
    assert!(sums.is_sorted_by_key(|it| (it.steps, it.prompt_tokens, it.generation_tokens)), "{sums:?}");
    assert!(0 < sums.last().expect("it computed").generation_tokens);
}

fn part_handoff(part: Part) -> HandoffId {
    match part {
        Part::PrefillFor(handoff) | Part::DecodeFrom(handoff) => handoff,
        Part::Whole => panic!("a whole request has no handoff"),
    }
}

struct Pair {
    prefill: EngineHandle,
    decode: EngineHandle,
}

type Stream = (RequestId, Receiver<EngineEvent>);

impl Pair {
    fn start(prefill: EngineConfig, decode: EngineConfig) -> Self {
        let pair = Self { prefill: start(prefill), decode: start(decode) };
        pair.link();
        pair
    }

    /// Connects the two where they are not, as a router does before it splits a request over them. On a machine with
    /// too much to do a link is lost now and then; a prompt that comes meanwhile is pushed, though it would have been
    /// computed in place over a link.
    fn link(&self) {
        for (engine, other) in [(&self.prefill, &self.decode), (&self.decode, &self.prefill)] {
            let links = engine.meet_peers(vec![peer(other)]);
            assert!(links.iter().all(|link| link.transport.is_ok()), "{links:?}");
        }
    }

    fn submit(&self, which: u32) -> (Stream, Stream) {
        self.submit_request(&request(which, Part::Whole))
    }

    fn submit_request(&self, request: &Request) -> (Stream, Stream) {
        self.link();
        let handoff = HandoffId(NEXT.fetch_add(1, Ordering::Relaxed));
        let part =
            |part| Request { id: RequestId(NEXT.fetch_add(1, Ordering::Relaxed)), part, ..request.clone() };
        let prefill = submit(&self.prefill, part(Part::PrefillFor(handoff)), Some(peer(&self.decode)));
        let decode = submit(&self.decode, part(Part::DecodeFrom(handoff)), Some(peer(&self.prefill)));
        (prefill, decode)
    }

    /// The decode side reports the first token too; both reports must be equal.
    fn output(&self, ((_, prefill), (_, decode)): (Stream, Stream)) -> Output {
        let all = output((RequestId(0), decode));
        match prefill.recv_timeout(LIMIT) {
            Ok(EngineEvent::Token { id, index: 0, logprobs }) => assert_eq!((id, logprobs), all[0]),
            other => panic!("the prefill side reports the first token, not {other:?}"),
        }
        assert_eq!(prefill.recv_timeout(LIMIT), Ok(EngineEvent::HandedOver));
        all
    }
}

fn fixture(model: &str) -> PathBuf {
    // Of this checkout, which need not be where the test was built.
    let package = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&package).join("../tests/fixtures/models").join(model)
}

fn config(model: &str, role: Role) -> EngineConfig {
    let folder = fixture(model);
    EngineConfig {
        max_num_seqs: 8,
        max_waiting: 100,
        kv_cache_memory: Some(4 << 20),
        threads: Some(1),
        require_transport: true,
        ..EngineConfig::new(format!("{role:?}"), role, ModelSource::Folder(folder))
    }
}

fn start(config: EngineConfig) -> EngineHandle {
    EngineHandle::start(config, &mut |_| {}).expect("the fixture can be served")
}

fn peer(engine: &EngineHandle) -> Peer {
    let it = engine.describe();
    Peer { name: it.name.clone(), instance: it.instance, address: it.handoff_address }
}

/// Prompts from one token to more than a dozen blocks, some of which begin alike; greedy and sampled.
fn request(which: u32, part: Part) -> Request {
    let length = [1, 16, 17, 60, 150, 230][which as usize % 6];
    let tokens: Vec<TokenId> = (0..length).map(|index| 3 + (index * 7 + index / 48 * which) % 200).collect();
    Request {
        id: RequestId(NEXT.fetch_add(1, Ordering::Relaxed)),
        prompt_len: TokenCount(length),
        tokens,
        sampling: SamplingParams {
            temperature: if which.is_multiple_of(2) { 0.0 } else { 0.9 },
            seed: which.into(),
            logprobs: Some(2),
            ..SamplingParams::default()
        },
        stop: StopConditions::after(OUTPUT),
        part,
    }
}

fn submit(engine: &EngineHandle, request: Request, peer: Option<Peer>) -> Stream {
    let (events, stream) = channel();
    let id = request.id;
    let mut is_new = true;
    let sink = move |event| match event {
        EngineEvent::Begun => {
            assert!(std::mem::replace(&mut is_new, false), "a request begins once, and first")
        }
        event => {
            is_new = false;
            drop(events.send(event));
        }
    };
    engine.generate(request, peer, Box::new(sink));
    (id, stream)
}

fn whole(engine: &EngineHandle, which: u32) -> Output {
    output(submit(engine, request(which, Part::Whole), None))
}

fn output((_, stream): Stream) -> Output {
    let mut output = Output::new();
    loop {
        match stream.recv_timeout(LIMIT).expect("an event in time") {
            EngineEvent::Token { id, index, logprobs } => {
                assert_eq!(index as usize, output.len(), "tokens come in order, each once");
                output.push((id, logprobs));
            }
            EngineEvent::Finished { .. } => return output,
            other => panic!("{other:?} after {} tokens", output.len()),
        }
    }
}

/// Every block comes back. The engine asserts its whole ledger whenever it is idle; here it must get there.
fn closes(engine: &EngineHandle) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let status = engine.status();
        if status.running + status.waiting == 0 && status.ledger.used().0 == 0 {
            break;
        }
        assert!(engine.is_alive(), "the engine thread has panicked");
        assert!(Instant::now() < deadline, "blocks are missing: {status:?}");
        std::thread::yield_now();
    }
    assert!(engine.is_alive(), "the engine thread has panicked");
}

static NEXT: AtomicU64 = AtomicU64::new(1);

const LIMIT: Duration = Duration::from_secs(60);
/// Several blocks, so that sequences grow into one another's memory.
const OUTPUT: u32 = 60;
/// Of the small model: 2 layers × K and V × 2 heads × 16 elements × 4 bytes.
const BYTES_PER_TOKEN: u64 = 2 * 2 * 2 * 16 * 4;
