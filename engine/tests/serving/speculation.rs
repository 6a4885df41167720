//! Guesses change nothing but speed: the same tokens and log-probabilities, bit for bit, with and without them.
//!
//! Here every guess that can be made is made, whether it pays or not, so that right and wrong ones are met everywhere. The
//! random models repeat themselves when they are greedy, and hardly ever when they are not.

use tidemill_engine::handle::{GuessMethod, Quantization, SpeculationSettings};

use super::*;

#[test]
fn every_family_answers_as_without() {
    let models =
        ["llama2", "llama3", "mistral", "qwen2", "qwen2-window", "qwen3", "llama-bias", "llama-yarn"];
    for model in models {
        let plain = start(config(model, Role::Hybrid));
        let guessing = start(guessing(config(model, Role::Hybrid)));
        agree(model, &plain, &guessing, (0..12).map(varied));
        assert!(0 < accepted(&guessing), "{model}: some guesses are right");
        closes(&guessing);
    }
}

#[test]
fn quantised_weights_answer_as_without() {
    for quantization in [Quantization::Int8, Quantization::Int4 { group: 32 }] {
        let with_weights =
            || EngineConfig { quantization: Some(quantization), ..config("llama3", Role::Hybrid) };
        let plain = start(with_weights());
        let guessing = start(guessing(with_weights()));
        agree(&format!("{quantization:?}"), &plain, &guessing, (0..9).map(varied));
        assert!(0 < accepted(&guessing), "{quantization:?}: some guesses are right");
        closes(&guessing);
    }
}

#[test]
fn neither_batch_nor_chunk_nor_cache_nor_preemption_nor_dtype_matters() {
    #[rustfmt::skip]
    let rows: [(&str, Change); 8] = [
        ("as it is",              |_| {}),
        ("in chunks of 7",        |it| it.max_num_batched_tokens = 7),
        ("one by one",            |it| it.max_num_seqs = 1),
        ("without a prefix cache", |it| it.prefix_cache = false),
        ("in blocks of 1",        |it| it.block_len = 1),
        ("in blocks of 64",       |it| it.block_len = 64),
        ("heads before tokens",   |it| it.axis_order = AxisOrder::HeadToken),
        ("in so little memory that sequences are preempted", |it| it.kv_cache_memory = Some(26 * 16 * BYTES_PER_TOKEN)),
    ];
    for dtype in [None, Some(KvDtype::Int8)] {
        let with_dtype = || EngineConfig { kv_cache_dtype: dtype, ..config("llama3", Role::Hybrid) };
        let plain = start(with_dtype());
        for (row, change) in rows {
            let mut config = guessing(with_dtype());
            change(&mut config);
            let guessing = start(config);
            for round in ["cold", "warm"] {
                agree(&format!("{row}, {round}, {dtype:?}"), &plain, &guessing, (0..9).map(varied));
            }
            assert!(0 < accepted(&guessing), "{row}, {dtype:?}: some guesses are right");
            if row.contains("preempted") && dtype.is_none() {
                assert!(0 < guessing.status().counters.preemptions, "{row}: {:?}", guessing.status());
            }
            closes(&guessing);
        }
    }
}

#[test]
fn whatever_a_request_asks_for_it_gets_as_without() {
    type Ask = fn(&mut Request);
    #[rustfmt::skip]
    let rows: [(&str, Ask); 16] = [
        ("nothing else",              |_| {}),
        ("a repetition penalty",      |it| it.sampling.repetition_penalty = 1.3),
        ("presence and frequency",    |it| (it.sampling.presence_penalty, it.sampling.frequency_penalty) = (0.4, 0.3)),
        ("a penalty that rewards repetition", |it| it.sampling.frequency_penalty = -0.5),
        ("a bias",                    |it| it.sampling.logit_bias = vec![(7, 3.0), (9, -3.0)]),
        ("top-k",                     |it| it.sampling.top_k = Some(3)),
        ("top-p and min-p",           |it| (it.sampling.top_p, it.sampling.min_p) = (0.7, 0.05)),
        ("a low temperature",         |it| it.sampling.temperature = 0.05),
        ("no log-probabilities",      |it| it.sampling.logprobs = None),
        ("those of the prompt",       |it| it.sampling.prompt_logprobs = Some(1)),
        ("one token",                 |it| it.stop = StopConditions::after(1)),
        ("two tokens",                |it| it.stop = StopConditions::after(2)),
        ("an end within a draft",     |it| it.stop = StopConditions::after(23)),
        ("stop tokens",               |it| it.stop.stop_token_ids = (0..256).step_by(5).collect()),
        ("an end of the text",        |it| (it.stop.eos_token_ids, it.stop.ignore_eos) = ((0..256).step_by(3).collect(), false)),
        ("no stop before the thirtieth", |it| (it.stop.stop_token_ids, it.stop.min_tokens) = ((0..256).step_by(5).collect(), 30)),
    ];
    let plain = start(config("qwen3", Role::Hybrid));
    let guessing = start(guessing(config("qwen3", Role::Hybrid)));
    for (row, ask) in rows {
        let requests = (0..8).map(|which| {
            let mut request = varied(which);
            ask(&mut request);
            request
        });
        agree(row, &plain, &guessing, requests);
    }
    assert!(0 < accepted(&guessing), "some guesses are right");
    let sums = guessing.status().counters.speculation;
    assert!(sums.accepted < sums.drafted, "and some are wrong");
    closes(&guessing);
}

#[test]
fn answers_of_one_prompt_differ_as_without() {
    let plain = start(config("llama2", Role::Hybrid));
    let guessing = start(guessing(config("llama2", Role::Hybrid)));
    let requests = (0..6).map(|seed| {
        let mut request = varied(5);
        (request.sampling.temperature, request.sampling.seed) = (0.3, seed);
        request
    });
    agree("six answers", &plain, &guessing, requests);
    closes(&guessing);
}

#[test]
fn decode_guesses_behind_every_kind_of_handoff() {
    let plain = start(config("qwen3", Role::Hybrid));
    let (shm, tcp) = (TransportChoice::SharedMemory, TransportChoice::Tcp);
    #[rustfmt::skip]
    let rows: [(&str, TransportChoice, Change); 4] = [
        ("in place",        shm, |_| {}),
        ("copied",          shm, |it| it.in_place = false),
        ("tcp",             tcp, |_| {}),
        ("tcp, in chunks",  tcp, |it| it.max_num_batched_tokens = 20),
    ];
    for (row, transport, change) in rows {
        let [mut prefill, mut decode] =
            [Role::Prefill, Role::Decode].map(|role| guessing(config("qwen3", role)));
        (prefill.transport, decode.transport) = (transport, transport);
        change(&mut prefill);
        change(&mut decode);
        let pair = Pair::start(prefill, decode);
        for round in ["cold", "warm"] {
            let requests: Vec<Request> = (0..9).map(varied).collect();
            let expected: Vec<Output> =
                requests.iter().map(|request| output(submit(&plain, renamed(request), None))).collect();
            let streams: Vec<_> = requests.iter().map(|request| pair.submit_request(request)).collect();
            for (streams, expected) in streams.into_iter().zip(expected) {
                assert_eq!(pair.output(streams), expected, "{row}, {round}");
            }
        }
        assert!(0 < accepted(&pair.decode), "{row}: some guesses are right");
        assert_eq!(accepted(&pair.prefill), 0, "{row}: prefill has nothing to guess");
        closes(&pair.prefill);
        closes(&pair.decode);
    }
}

#[test]
fn the_sums_add_up() {
    let engine = start(guessing(config("llama3", Role::Hybrid)));
    agree("alone", &start(config("llama3", Role::Hybrid)), &engine, [varied(4)]);
    closes(&engine);
    let counters = engine.status().counters;
    let sums = counters.speculation;
    assert!(0 < sums.drafts && sums.drafts <= sums.drafted && sums.accepted <= sums.drafted, "{sums:?}");
    assert_eq!(sums.accepted_at.iter().sum::<u64>(), sums.accepted, "each has its place");
    assert!(sums.accepted_at.is_sorted_by(|before, after| before >= after), "{sums:?}");
    assert_eq!(counters.generation_tokens, u64::from(OUTPUT));
    // The first token comes with the prompt; every right guess saves a step.
    assert_eq!(counters.steps, u64::from(OUTPUT) - sums.accepted);
}

/// Makes every guess that can be made.
pub(crate) fn guessing(mut config: EngineConfig) -> EngineConfig {
    config.speculation = Some(SpeculationSettings { method: LOOKUP, most: 6, adaptive: false });
    config
}

/// All at once, on both.
pub(crate) fn agree(
    row: &str,
    plain: &EngineHandle,
    guessing: &EngineHandle,
    requests: impl IntoIterator<Item = Request>,
) {
    let requests: Vec<Request> = requests.into_iter().collect();
    let submit_all = |engine: &EngineHandle| -> Vec<Stream> {
        requests.iter().map(|request| submit(engine, renamed(request), None)).collect()
    };
    let (expected, found) = (submit_all(plain), submit_all(guessing));
    for (number, (expected, found)) in expected.into_iter().zip(found).enumerate() {
        assert_eq!(everything(found), everything(expected), "{row}: request {number}");
    }
}

/// All events of a request but its beginning.
pub(crate) fn everything((_, stream): Stream) -> Vec<EngineEvent> {
    let mut events = Vec::new();
    loop {
        let event = stream.recv_timeout(LIMIT).expect("an event in time");
        let event = match event {
            // What a prefix cache had depends on when the others came.
            EngineEvent::Finished { reason, .. } => EngineEvent::Finished { reason, cached_tokens: 0 },
            event => event,
        };
        events.push(event);
        match events.last() {
            Some(EngineEvent::Finished { .. }) => return events,
            Some(EngineEvent::Failed { .. }) => panic!("{events:?}"),
            _ => {}
        }
    }
}

/// Greedy, hardly random, and random ones by turns.
pub(crate) fn varied(which: u32) -> Request {
    let mut request = request(which, Part::Whole);
    request.sampling.temperature = [0.0, 0.2, 0.9][which as usize % 3];
    request
}

pub(crate) fn renamed(request: &Request) -> Request {
    Request { id: RequestId(NEXT.fetch_add(1, Ordering::Relaxed)), ..request.clone() }
}

pub(crate) fn accepted(engine: &EngineHandle) -> u64 {
    engine.status().counters.speculation.accepted
}

const LOOKUP: GuessMethod = GuessMethod::PromptLookup { shortest_match: 1, longest_match: 3 };
