//! Engines of several ranks: the same bits whatever else runs, and handoffs between engines of different numbers of ranks.

use super::*;
use tidemill_engine::engine::EngineError;

fn ranked(model: &str, role: Role, ranks: u32) -> EngineConfig {
    EngineConfig { tensor_parallel: ranks, threads: Some(ranks as usize), ..config(model, role) }
}

/// The same tokens, and log-probabilities that differ by rounding alone.
pub(super) fn assert_close(found: &Output, expected: &Output, row: &str) {
    let tokens = |output: &Output| output.iter().map(|(token, _)| *token).collect::<Vec<_>>();
    assert_eq!(tokens(found), tokens(expected), "{row}");
    for ((token, found), (_, expected)) in found.iter().zip(expected) {
        let chosen = |logprobs: &Option<Logprobs>| logprobs.as_ref().expect("asked for").chosen;
        let (found, expected) = (chosen(found), chosen(expected));
        assert!((found - expected).abs() < 1e-3, "{row}: token {token}: {found} instead of {expected}");
    }
}

#[test]
fn neither_batch_nor_chunk_nor_cache_nor_preemption_nor_guesses_change_a_bit() {
    let one: Vec<Output> = {
        let alone = start(config("llama3", Role::Hybrid));
        (0..6).map(|which| whole(&alone, which)).collect()
    };
    #[rustfmt::skip]
    let rows: [(&str, Change); 5] = [
        ("all at once",                 |_| {}),
        ("in chunks of 7",              |it| it.max_num_batched_tokens = 7),
        ("in blocks of 64, axes turned", |it| (it.block_len, it.axis_order) = (64, AxisOrder::HeadToken)),
        ("with guesses",                |it| *it = speculation::guessing(it.clone())),
        ("in so little memory that sequences are preempted", |it| it.kv_cache_memory = Some(26 * 16 * BYTES_PER_TOKEN)),
    ];
    for ranks in [2, 4] {
        let alone = start(ranked("llama3", Role::Hybrid, ranks));
        assert_eq!(alone.describe().tensor_parallel, ranks);
        assert!(alone.describe().device.contains(&format!("{ranks} ranks of 1 thread")));
        let expected: Vec<Output> = (0..6).map(|which| whole(&alone, which)).collect();
        for (found, one) in expected.iter().zip(&one) {
            assert_close(found, one, &format!("{ranks} ranks"));
        }
        for (row, change) in rows {
            let mut config = ranked("llama3", Role::Hybrid, ranks);
            change(&mut config);
            let engine = start(config);
            for round in ["cold", "warm"] {
                let streams: Vec<_> =
                    (0..6).map(|which| submit(&engine, request(which, Part::Whole), None)).collect();
                for (stream, expected) in streams.into_iter().zip(&expected) {
                    assert_eq!(&output(stream), expected, "{ranks} ranks, {row}, {round}");
                }
            }
            if row.contains("preempted") {
                assert!(0 < engine.status().counters.preemptions, "{row}: {:?}", engine.status());
            }
            closes(&engine);
        }
    }
}

/// Blocks are the same whoever writes them, so what goes over is not converted for the number of ranks: it is computed in place
/// where that is possible at all. What comes out has the bits of the way that it was computed: the prompt by as many ranks as
/// prefill has, the rest by as many as decode has, whatever the way of the handoff. From one number alone it differs by rounding.
#[test]
fn prefill_and_decode_may_have_different_numbers_of_ranks() {
    let (shm, tcp) = (TransportChoice::SharedMemory, TransportChoice::Tcp);
    #[rustfmt::skip]
    let ways: [(&str, TransportChoice, Change, Change); 6] = [
        ("in place",                    shm, |_| {},                            |_| {}),
        ("copied",                      shm, |p| p.in_place = false,            |d| d.in_place = false),
        ("tcp",                         tcp, |_| {},                            |d| d.digest = DigestCoverage::Full),
        ("blocks of 16 to 64",          shm, |_| {},                            |d| d.block_len = 64),
        ("axes turned",                 shm, |p| p.axis_order = AxisOrder::HeadToken, |d| d.axis_order = AxisOrder::TokenHead),
        ("small chunks, tcp",           tcp, |p| p.max_num_batched_tokens = 20, |_| {}),
    ];
    let alone: Vec<(u32, Vec<Output>)> = [1, 2, 4]
        .map(|ranks| {
            let engine = start(ranked("qwen3", Role::Hybrid, ranks));
            (ranks, (0..6).map(|which| whole(&engine, which)).collect())
        })
        .into();
    let alone = |ranks| &alone.iter().find(|(of, _)| *of == ranks).expect("it was started").1;
    for (of_prefill, of_decode) in [(2, 1), (1, 2), (4, 2), (2, 4), (2, 2)] {
        let mut expected: Vec<Output> = Vec::new();
        for (way, transport, change_prefill, change_decode) in ways {
            let row = format!("{of_prefill} to {of_decode} ranks, {way}");
            let mut prefill = ranked("qwen3", Role::Prefill, of_prefill);
            let mut decode = ranked("qwen3", Role::Decode, of_decode);
            (prefill.transport, decode.transport) = (transport, transport);
            change_prefill(&mut prefill);
            change_decode(&mut decode);
            let pair = Pair::start(prefill, decode);
            let streams: Vec<_> = (0..6).map(|which| pair.submit(which)).collect();
            let found: Vec<Output> = streams.into_iter().map(|streams| pair.output(streams)).collect();
            for (which, found) in found.iter().enumerate() {
                assert_eq!(found[0], alone(of_prefill)[which][0], "{row}: prefill has the first token");
                assert_close(found, &alone(of_decode)[which], &row);
            }
            if expected.is_empty() {
                expected = found;
            } else {
                assert_eq!(found, expected, "{row}");
            }
            if of_prefill == of_decode {
                assert_eq!(&expected, alone(of_decode), "{row}: split equals whole");
            }
            let counters = pair.prefill.status().counters;
            assert_eq!(counters.handoffs, 6, "{row}: {counters:?}");
            assert_eq!(counters.handoff_in_place == 6, way == "in place", "{row}: {counters:?}");
            closes(&pair.prefill);
            closes(&pair.decode);
        }
    }
}

#[test]
fn a_cancelled_request_frees_both_sides_of_unequal_ranks() {
    let mut prefill = ranked("llama3", Role::Prefill, 4);
    prefill.max_num_batched_tokens = 16;
    let pair = Pair::start(prefill, ranked("llama3", Role::Decode, 2));
    for round in 0..20 {
        let (prefill, decode) = pair.submit(3 + round % 3);
        for _ in 0..round {
            std::thread::yield_now(); // Meets other stages in other rounds; none must matter.
        }
        pair.decode.cancel(decode.0);
        pair.prefill.cancel(prefill.0);
    }
    closes(&pair.prefill);
    closes(&pair.decode);
    assert_eq!(pair.output(pair.submit(0)).len(), OUTPUT as usize, "it still serves");
}

#[test]
fn what_ranks_cannot_share_is_refused_with_the_flag() {
    for ranks in [3, 8] {
        let error = EngineHandle::start(ranked("llama3", Role::Hybrid, ranks), &mut |_| {}).map(drop);
        match error {
            Err(EngineError::Setting(text)) => {
                let expected =
                    format!("--tensor-parallel-size {ranks} does not divide the model's 4 query heads");
                assert_eq!(text, expected);
            }
            other => panic!("{ranks} ranks: {other:?}"),
        }
    }
}
