//! Handoffs from device to device: between fake GPUs of one process, whose memory is shared as that of two processes is.

use std::sync::Arc;

use super::cuda::{Gpus, ids, small_config, small_request, whole};
use super::test_gpu::TestGpu;
use super::*;
use tidemill_engine::handle::DeviceWay;
use tidemill_kernels::cuda::emulator::Order;
use tidemill_kernels::cuda::fake::Fake;

/// How a worker's handoffs leave its device for another one, and reach it from there.
fn device_ways(worker: &EngineHandle, other: &EngineHandle) -> [DeviceWay; 2] {
    let links = worker.meet_peers(vec![peer(other)]);
    [links[0].devices.to_peer, links[0].devices.from_peer]
}

fn hands_over_as_whole(pair: &Pair, expected: &[Vec<TokenId>], row: &str) {
    for round in ["cold", "warm"] {
        let submit_one = |which| pair.submit_request(&small_request(which, Part::Whole));
        let streams: Vec<_> = (0..expected.len() as u32).map(submit_one).collect();
        for (streams, expected) in streams.into_iter().zip(expected) {
            assert_eq!(&ids(&pair.output(streams)), expected, "{row}, {round}");
        }
    }
    closes(&pair.prefill);
    closes(&pair.decode);
    let counters = pair.prefill.status().counters;
    assert_eq!(counters.handoffs, 2 * expected.len() as u64, "{row}: {counters:?}");
}

#[test]
fn split_between_gpus_equals_whole_by_copies_between_them_and_where_there_are_none() {
    use DeviceWay::{NoDevice, PeerCopy, Staging};
    type Gpu = Option<fn() -> Fake>;
    type Row<'a> = (&'a str, [Gpu; 2], TransportChoice, Change, Change, [DeviceWay; 2]);
    let (shm, tcp) = (TransportChoice::SharedMemory, TransportChoice::Tcp);
    let fake: Gpu = Some(|| Fake::new(Order::Forwards));
    let alone: Gpu = Some(|| Fake::new(Order::Forwards).without_sharing());
    let same: Change = |_| {};
    #[rustfmt::skip]
    let rows: [Row<'_>; 8] = [
        // what is shown                   prefill, decode  transport  changes in either                              to decode, from it
        ("two GPUs",                       [fake, fake],    shm,       same, same,                                    [PeerCopy, PeerCopy]),
        ("two GPUs, in chunks of 7",       [fake, fake],    shm,       |it| it.max_num_batched_tokens = 7, same,      [PeerCopy, PeerCopy]),
        ("two GPUs, every byte compared",  [fake, fake],    shm,       same, |it| it.digest = DigestCoverage::Full,   [PeerCopy, PeerCopy]),
        ("one of them shares nothing",     [fake, alone],   shm,       same, same,                                    [Staging, Staging]),
        ("blocks of another length",       [fake, fake],    shm,       same, |it| it.block_len = 32,                  [Staging, Staging]),
        ("over TCP",                       [fake, fake],    tcp,       same, same,                                    [Staging, Staging]),
        ("GPU to CPU",                     [fake, None],    shm,       same, same,                                    [Staging, Staging]),
        ("CPU to GPU",                     [None, fake],    shm,       same, same,                                    [NoDevice, NoDevice]),
    ];
    let expected = whole();
    let mut gpus = Gpus::default();
    for (row, on, transport, change_prefill, change_decode, ways) in rows {
        let (mut prefill, mut decode) = (small_config(Role::Prefill), small_config(Role::Decode));
        for config in [&mut prefill, &mut decode] {
            config.transport = transport;
            // What is worse than this way is an error, as ever; how devices are reached is none of it.
            config.require_transport = true;
        }
        change_prefill(&mut prefill);
        change_decode(&mut decode);
        let mut begin = |gpu: Gpu, config| match gpu {
            Some(gpu) => gpus.start_on(TestGpu::Fake(Arc::new(gpu())), config),
            None => start(config),
        };
        let pair = Pair { prefill: begin(on[0], prefill), decode: begin(on[1], decode) };
        pair.link();
        assert_eq!(device_ways(&pair.prefill, &pair.decode), ways, "{row}");
        hands_over_as_whole(&pair, &expected, row);
    }
    gpus.end();
}

#[test]
fn where_a_gpu_does_not_reach_the_other_that_direction_alone_goes_through_the_host() {
    let expected = whole();
    let far = Fake::new(Order::Forwards);
    let near = Fake::new(Order::Forwards).without_reach_of(&far);
    let mut gpus = Gpus::default();
    let pair = Pair {
        prefill: gpus.start_on(TestGpu::Fake(Arc::new(near)), small_config(Role::Hybrid)),
        decode: gpus.start_on(TestGpu::Fake(Arc::new(far)), small_config(Role::Hybrid)),
    };
    pair.link();
    assert_eq!(device_ways(&pair.prefill, &pair.decode), [DeviceWay::Staging, DeviceWay::PeerCopy]);
    hands_over_as_whole(&pair, &expected, "staged");
    let back = Pair { prefill: pair.decode.clone(), decode: pair.prefill.clone() };
    hands_over_as_whole(&back, &expected, "copied");
    gpus.end();
}

#[test]
fn requests_that_are_cancelled_at_any_stage_of_a_copy_free_both_sides() {
    let expected = whole();
    let mut gpus = Gpus::default();
    let prefill = EngineConfig { max_num_batched_tokens: 16, ..small_config(Role::Prefill) };
    let pair = Pair { prefill: gpus.start(prefill), decode: gpus.start(small_config(Role::Decode)) };
    pair.link();
    assert_eq!(device_ways(&pair.prefill, &pair.decode)[0], DeviceWay::PeerCopy);
    for round in 0..24u32 {
        let (prefill, decode) = pair.submit_request(&small_request(3, Part::Whole));
        for _ in 0..round * round {
            std::thread::yield_now(); // Meets other stages in other rounds; none must matter.
        }
        let mut order = [(&pair.decode, decode.0), (&pair.prefill, prefill.0)];
        order.rotate_left(round as usize % 2);
        for (engine, id) in order {
            engine.cancel(id);
        }
    }
    closes(&pair.prefill);
    closes(&pair.decode);
    for (which, expected) in (0..).zip(&expected) {
        let found = pair.output(pair.submit_request(&small_request(which, Part::Whole)));
        assert_eq!(&ids(&found), expected, "{which}");
    }
    gpus.end();
}

/// The other side is told, and nothing of either device is left.
#[test]
fn a_worker_that_ends_while_its_gpu_copies_leaves_nothing_behind() {
    for is_prefill in [true, false] {
        for round in 0..6u32 {
            let mut gpus = Gpus::default();
            let prefill = EngineConfig { max_num_batched_tokens: 16, ..small_config(Role::Prefill) };
            let pair = Pair { prefill: gpus.start(prefill), decode: gpus.start(small_config(Role::Decode)) };
            pair.link();
            let (prefill, decode) = pair.submit_request(&small_request(3, Part::Whole));
            for _ in 0..round * 40 {
                std::thread::yield_now(); // Meets other stages in other rounds; none must matter.
            }
            let (goes, stays) =
                if is_prefill { (&pair.prefill, &pair.decode) } else { (&pair.decode, &pair.prefill) };
            goes.clone().shutdown();
            gpus.end_of(goes);
            // As a router does that learns of it.
            stays.cancel(if is_prefill { decode.0 } else { prefill.0 });
            // What the other has is free in the end, and it still computes.
            let alone = output(submit(stays, small_request(0, Part::Whole), None));
            assert_eq!(alone.len(), small_request(0, Part::Whole).stop.max_tokens as usize);
            closes(stays);
            gpus.end();
        }
    }
}
