//! The fake device does what a device does, and finds what is asked of it wrongly.

#![cfg(not(no_cpp_compiler))]

mod support;

use std::panic::{AssertUnwindSafe, catch_unwind};
use support::cuda::{Buffer, Pinned, floats};
use tidemill_kernels::cuda::{
    CudaError, DeviceAddress, Driver, Graph, Launch, MatrixProduct, Product, Queue, RmsNorm,
    emulator::Order,
    fake::{Calls, Fake},
    launches,
};
use tidemill_kernels::matrix::WeightDtype;

/// What is said about a mistake, and the mistake.
type Mistake<'a> = (&'a str, &'a dyn Fn(&Fake));

/// Every row has a device of its own.
fn check_mistakes(rows: &[Mistake<'_>]) {
    for (expected, mistake) in rows {
        let fake = Fake::new(Order::Forwards).with_capacity(1 << 20);
        let panic = catch_unwind(AssertUnwindSafe(|| mistake(&fake))).expect_err(expected);
        let message = panic.downcast::<String>().map_or_else(
            |panic| (*panic.downcast::<&str>().expect("a panic says something")).to_owned(),
            |it| *it,
        );
        assert!(message.contains(expected), "expected {expected:?}: {message}");
    }
}

/// Sets each of 64 numbers to one: they are all the same before.
fn norm(state: DeviceAddress, weight: DeviceAddress) -> Launch {
    let delta = DeviceAddress::NULL;
    let parameters = RmsNorm { out: state, state, delta, weight, width: 64, eps: 0.0 };
    launches::rms_norm(WeightDtype::F32, 1, &parameters)
}

fn capture(device: &dyn Driver, record: impl FnOnce()) -> Graph {
    device.begin_capture().expect("a fake records or panics");
    record();
    device.end_capture().expect("a fake records or panics")
}

#[test]
fn memory_that_is_used_wrongly_is_found() {
    check_mistakes(&[
        ("nothing was taken there", &|fake| {
            let address = fake.allocate(100).unwrap();
            fake.free(address).unwrap();
            fake.free(address).unwrap();
        }),
        ("nothing was taken there", &|fake| fake.free(fake.allocate(100).unwrap().offset(4)).unwrap()),
        ("nothing was taken there", &|fake| {
            let address = fake.allocate_pinned(100).unwrap();
            fake.free_pinned(address).unwrap();
            fake.free_pinned(address).unwrap();
        }),
        ("an allocation of no bytes", &|fake| drop(fake.allocate(0))),
        ("an allocation of no bytes", &|fake| drop(fake.allocate_pinned(0))),
        ("upload of 101 bytes", &|fake| fake.upload(fake.allocate(100).unwrap(), &[0; 101]).unwrap()),
        ("fill of 2 bytes", &|fake| fake.fill(fake.allocate(100).unwrap().offset(99), 2, 0).unwrap()),
        ("download of 1 bytes", &|fake| {
            fake.download(&mut [0], fake.allocate(100).unwrap().offset(100)).unwrap();
        }),
        ("some of which nobody wrote", &|fake| {
            fake.download(&mut [0; 100], fake.allocate(100).unwrap()).unwrap();
        }),
        ("outside of every allocation of pinned memory", &|fake| {
            fake.write_pinned(fake.allocate_pinned(8).unwrap().offset(1), &[0; 8]);
        }),
        ("some of which nobody wrote", &|fake| {
            fake.read_pinned(&mut [0; 8], fake.allocate_pinned(8).unwrap());
        }),
        ("upload of 9 bytes", &|fake| {
            let (device, pinned) = (fake.allocate(16).unwrap(), fake.allocate_pinned(8).unwrap());
            fake.start_upload(Queue::Compute, device, pinned, 9).unwrap();
        }),
        ("some of which nobody wrote", &|fake| {
            let (device, pinned) = (fake.allocate(8).unwrap(), fake.allocate_pinned(8).unwrap());
            fake.start_upload(Queue::Compute, device, pinned, 8).unwrap();
        }),
        ("which overlap", &|fake| {
            let device = fake.allocate(16).unwrap();
            fake.copy(Queue::Compute, device, device.offset(4), 8).unwrap();
        }),
        ("not given back: allocations of [100]", &|fake| {
            fake.allocate(100).unwrap();
            fake.assert_nothing_left();
        }),
        ("pinned memory was not given back: allocations of [100]", &|fake| {
            fake.allocate_pinned(100).unwrap();
            fake.assert_nothing_left();
        }),
    ]);
}

#[test]
fn memory_that_a_copy_uses_is_left_alone() {
    for queue in [Queue::Compute, Queue::Transfer] {
        check_mistakes(&[
            ("read of 8 bytes", &|fake| {
                let (device, pinned) = (filled(fake), Pinned::new(fake, &[0u64]));
                fake.start_download(queue, pinned.address(), device, 8).unwrap();
                pinned.read::<u64>();
            }),
            ("write of 8 bytes", &|fake| {
                let (device, pinned) = (filled(fake), Pinned::new(fake, &[0u64]));
                fake.start_upload(queue, device, pinned.address(), 8).unwrap();
                fake.write_pinned(pinned.address(), &[1; 8]);
            }),
            ("giving back of 8 bytes", &|fake| {
                let (device, pinned) = (filled(fake), fake.allocate_pinned(8).unwrap());
                fake.start_download(queue, pinned, device, 8).unwrap();
                fake.free_pinned(pinned).unwrap();
            }),
            ("read of 8 bytes", &|fake| {
                // A ticket from before the copy says nothing of it.
                let (device, pinned) = (filled(fake), Pinned::new(fake, &[0u64]));
                let ticket = fake.ticket(queue).unwrap();
                fake.start_download(queue, pinned.address(), device, 8).unwrap();
                fake.wait(ticket).unwrap();
                pinned.read::<u64>();
            }),
        ]);
    }
}

#[test]
fn the_computation_waits_for_a_transfer_only_where_it_is_told_to() {
    check_mistakes(&[
        ("fill of 4 bytes", &|fake| {
            let (device, pinned) = (filled(fake), Pinned::new(fake, &[0u64]));
            fake.start_download(Queue::Transfer, pinned.address(), device, 8).unwrap();
            fake.fill(device, 4, 0).unwrap();
        }),
        ("a copy is in flight", &|fake| {
            let (state, weight) = (Buffer::new(fake, &[2.0f32; 64]), Buffer::new(fake, &[1.0f32; 64]));
            let pinned = Pinned::new(fake, &[0u64]);
            fake.start_upload(Queue::Transfer, weight.address(), pinned.address(), 8).unwrap();
            fake.launch(&norm(state.address(), weight.address())).unwrap();
        }),
        ("a kernel wrote what it reads", &|fake| {
            let (state, weight) = (Buffer::new(fake, &[2.0f32; 64]), Buffer::new(fake, &[1.0f32; 64]));
            let pinned = Pinned::new(fake, &[0u64]);
            fake.start_download(Queue::Transfer, pinned.address(), state.address(), 8).unwrap();
            fake.launch(&norm(state.address(), weight.address())).unwrap();
            fake.synchronize().unwrap();
        }),
        ("giving back of 512 bytes", &|fake| {
            let device = filled(fake);
            fake.copy(Queue::Transfer, device, device.offset(256), 8).unwrap();
            fake.free(device).unwrap();
        }),
    ]);
    let fake = &Fake::new(Order::Forwards);
    let (state, weight) = (Buffer::new(fake, &[2.0f32; 64]), Buffer::new(fake, &[0.0f32; 64]));
    let pinned = Pinned::new(fake, &[3.0f32; 64]);
    fake.start_upload(Queue::Transfer, weight.address(), pinned.address(), 256).unwrap();
    let ticket = fake.ticket(Queue::Transfer).unwrap();
    fake.compute_after(ticket).unwrap();
    fake.launch(&norm(state.address(), weight.address())).unwrap();
    assert_eq!(floats(&state, WeightDtype::F32), [3.0; 64]);
    // Nothing has told the host that the transfer is over but the download, which came after it.
    fake.write_pinned(pinned.address(), &[0; 256]);
}

#[test]
fn a_transfer_reads_what_was_computed_before_it() {
    let fake = &Fake::new(Order::Forwards);
    let (device, pinned) = (Buffer::new(fake, &[7u64, 8, 9]), Pinned::new(fake, &[0u64; 2]));
    fake.fill(device.address(), 8, 1).unwrap();
    fake.start_download(Queue::Transfer, pinned.address(), device.address(), 16).unwrap();
    let ticket = fake.ticket(Queue::Transfer).unwrap();
    let mut asked = 0;
    while !fake.is_done(ticket).unwrap() {
        asked += 1;
    }
    assert!(0 < asked, "whoever takes one answer for granted is found out");
    assert_eq!(pinned.read::<u64>(), [0x0101_0101_0101_0101, 8]);
    assert!(fake.is_done(ticket).unwrap());
}

#[test]
fn tickets_order_the_host() {
    let fake = &Fake::new(Order::Forwards);
    let (device, pinned) = (Buffer::new(fake, &[5u64, 6]), Pinned::new(fake, &[0u64]));
    fake.start_download(Queue::Compute, pinned.address(), device.address().offset(8), 8).unwrap();
    let ticket = fake.ticket(Queue::Compute).unwrap();
    // The next step begins; the ticket is for what came before.
    fake.fill(device.address(), 16, 0).unwrap();
    fake.wait(ticket).unwrap();
    assert_eq!(pinned.read::<u64>(), [6]);
    fake.write_pinned(pinned.address(), &[1; 8]);
    fake.start_upload(Queue::Compute, device.address(), pinned.address(), 8).unwrap();
    fake.copy(Queue::Compute, device.address().offset(8), device.address(), 8).unwrap();
    assert_eq!(device.read::<u64>(), [0x0101_0101_0101_0101; 2]);
    let expected =
        Calls { allocations: 2, launches: 0, products: 0, replays: 0, collectives: 0, copies: 6, waits: 2 };
    assert_eq!(
        fake.calls(),
        expected,
        "an upload, two copies from and to pinned memory, a fill, a copy, a download"
    );
}

#[test]
fn a_replay_does_again_what_was_recorded() {
    let fake = &Fake::new(Order::Forwards);
    let (state, weight) = (Buffer::new(fake, &[2.0f32; 64]), Buffer::new(fake, &[1.0f32; 64]));
    let other = Buffer::new(fake, &[5.0f32; 64]);
    let (input, result) = (Pinned::new(fake, &[3.0f32; 64]), Pinned::new(fake, &[0.0f32; 64]));
    let graph = capture(fake, || {
        fake.start_upload(Queue::Compute, weight.address(), input.address(), 256).unwrap();
        fake.launch(&norm(state.address(), weight.address())).unwrap();
        fake.start_download(Queue::Compute, result.address(), state.address(), 256).unwrap();
    });
    assert_eq!((graph.launches, fake.launches().len()), (1, 0), "recorded and not carried out");
    let replayed = |weight: f32| {
        fake.write_pinned(input.address(), bytemuck::bytes_of(&[weight; 64]));
        fake.replay(graph).unwrap();
        fake.wait(fake.ticket(Queue::Compute).unwrap()).unwrap();
        result.read::<f32>()
    };
    assert_eq!(replayed(3.0), [3.0; 64]);
    assert_eq!(replayed(4.0), [4.0; 64], "pinned memory is read when it is carried out");
    fake.update(graph, 0, &norm(state.address(), other.address())).unwrap();
    assert_eq!(replayed(4.0), [5.0; 64], "with other parameters");
    assert_eq!((fake.calls().replays, fake.launches().len()), (3, 3));
    fake.free_graph(graph).unwrap();
}

#[test]
fn graphs_that_are_used_wrongly_are_found() {
    check_mistakes(&[
        ("whose memory was given back", &|fake| {
            let (state, weight) = (Buffer::new(fake, &[2.0f32; 64]), Buffer::new(fake, &[1.0f32; 64]));
            let graph = capture(fake, || fake.launch(&norm(state.address(), weight.address())).unwrap());
            drop(weight);
            fake.replay(graph).unwrap();
        }),
        ("whose memory was given back", &|fake| {
            // Another allocation has its address now.
            let state = Buffer::new(fake, &[2.0f32; 64]);
            let weight = fake.allocate(256).unwrap();
            let graph = capture(fake, || fake.launch(&norm(state.address(), weight)).unwrap());
            fake.free(weight).unwrap();
            assert_eq!(fake.allocate(256), Ok(weight));
            fake.replay(graph).unwrap();
        }),
        ("whose memory was given back", &|fake| {
            let (device, pinned) = (filled(fake), Pinned::new(fake, &[0u64]));
            let graph =
                capture(fake, || fake.start_upload(Queue::Compute, device, pinned.address(), 8).unwrap());
            drop(pinned);
            fake.replay(graph).unwrap();
        }),
        ("read of 8 bytes", &|fake| {
            let (device, pinned) = (filled(fake), Pinned::new(fake, &[0u64]));
            let graph =
                capture(fake, || fake.start_download(Queue::Compute, pinned.address(), device, 8).unwrap());
            fake.replay(graph).unwrap();
            pinned.read::<u64>();
        }),
        ("an allocation cannot be captured", &|fake| {
            capture(fake, || drop(fake.allocate(8)));
        }),
        ("giving memory back cannot be captured", &|fake| {
            let device = filled(fake);
            capture(fake, || fake.free(device).unwrap());
        }),
        ("an upload from memory that is not pinned", &|fake| {
            let device = filled(fake);
            capture(fake, || fake.upload(device, &[0]).unwrap());
        }),
        ("a download to memory that is not pinned", &|fake| {
            let device = filled(fake);
            capture(fake, || fake.download(&mut [0], device).unwrap());
        }),
        ("a ticket cannot be captured", &|fake| {
            capture(fake, || drop(fake.ticket(Queue::Compute)));
        }),
        ("waiting cannot be captured", &|fake| {
            capture(fake, || fake.synchronize().unwrap());
        }),
        ("a capture cannot be captured", &|fake| {
            capture(fake, || fake.begin_capture().unwrap());
        }),
        ("in the queue Transfer cannot be captured", &|fake| {
            let device = filled(fake);
            capture(fake, || fake.copy(Queue::Transfer, device, device.offset(256), 8).unwrap());
        }),
        ("fill of 513 bytes", &|fake| {
            let device = filled(fake);
            capture(fake, || fake.fill(device, 513, 0).unwrap());
        }),
        ("a capture of nothing", &|fake| {
            capture(fake, || ());
        }),
        ("no launch 1 in a graph of 1", &|fake| {
            let launch = norm(filled(fake), filled(fake));
            let graph = capture(fake, || fake.launch(&launch).unwrap());
            fake.update(graph, 1, &launch).unwrap();
        }),
        ("in the place of", &|fake| {
            let (state, weight) = (filled(fake), filled(fake));
            let graph = capture(fake, || fake.launch(&norm(state, weight)).unwrap());
            let mut other = norm(state, weight);
            other.kernel = "rms_norm_bf16";
            fake.update(graph, 0, &other).unwrap();
        }),
        ("is not there", &|fake| {
            let device = filled(fake);
            let graph = capture(fake, || fake.fill(device, 8, 0).unwrap());
            fake.free_graph(graph).unwrap();
            fake.replay(graph).unwrap();
        }),
        ("1 graphs, or a capture, were not given back", &|fake| {
            let device = filled(fake);
            capture(fake, || fake.fill(device, 8, 0).unwrap());
            fake.free(device).unwrap();
            fake.assert_nothing_left();
        }),
    ]);
}

#[test]
fn memory_has_an_end() {
    let fake = &Fake::new(Order::Forwards).with_capacity(10_000);
    assert_eq!(fake.allocate(10_001), Err(CudaError::OutOfMemory { bytes: 10_001 }));
    let device = fake.allocate(4000).unwrap();
    let graph = capture(fake, || fake.fill(device, 8, 0).unwrap());
    let memory = fake.memory().unwrap();
    assert_eq!((memory.total, memory.free), (10_000, 6000 - graph.bytes), "graphs take memory too");
    fake.begin_capture().unwrap();
    fake.fill(device, 8, 0).unwrap();
    let error = fake.end_capture().expect_err("there is no room for another graph").to_string();
    assert_eq!(error, format!("the GPU has no {} bytes of free memory", graph.bytes));
    fake.free_graph(graph).unwrap();
    fake.free(device).unwrap();
    fake.assert_nothing_left();
}

#[test]
fn a_device_that_fails_goes_on_failing() {
    let fake = &Fake::new(Order::Forwards);
    let gone =
        CudaError::Call { call: "cuStreamSynchronize", code: 719, name: "CUDA_ERROR_LAUNCH_FAILED".into() };
    let address = fake.allocate(8).unwrap();
    fake.fail_after(1, gone.clone());
    assert_eq!(fake.fill(address, 8, 0), Ok(()));
    assert_eq!(fake.fill(address, 8, 0), Err(gone.clone()));
    assert_eq!(fake.ticket(Queue::Compute), Err(gone.clone()));
    assert_eq!(gone.to_string(), "cuStreamSynchronize: CUDA_ERROR_LAUNCH_FAILED (719)");
    fake.free(address).unwrap();
}

/// 512 bytes of the device.
fn filled(device: &dyn Driver) -> DeviceAddress {
    let address = device.allocate(512).expect("there is room");
    device.fill(address, 512, 0).expect("there is room");
    address
}

/// A product of rows of ones, of four inputs each, which comes to fours.
fn product([out, x, w]: [DeviceAddress; 3], rows: u32) -> MatrixProduct {
    let bias = DeviceAddress::NULL;
    let product = Product { out, x, w, bias, rows, inputs: 4, outputs: 4, adds: 0 };
    MatrixProduct { dtype: WeightDtype::F32, to_f32: false, product }
}

#[test]
fn the_library_multiplies_what_it_takes() {
    for has_library in [false, true] {
        let fake = Fake::new(Order::Forwards);
        let fake = if has_library { fake.with_library() } else { fake };
        assert_eq!(fake.library().is_ok(), has_library);
        {
            let [x, w] = [8, 16].map(|count| Buffer::new(&fake, &vec![1.0f32; count]));
            let out = Buffer::new(&fake, &[0.5f32; 8]);
            let mut asked = product([out.address(), x.address(), w.address()], 2);
            assert_eq!(fake.multiply(&asked), Ok(has_library));
            assert_eq!(out.read::<f32>(), [if has_library { 4.0 } else { 0.5 }; 8]);
            asked.product.adds = 1;
            asked.product.bias = w.address();
            assert_eq!(fake.multiply(&asked), Ok(has_library));
            assert_eq!(out.read::<f32>(), [if has_library { 9.0 } else { 0.5 }; 8]);
            asked.product.x = x.address().offset(4);
            assert_eq!(fake.multiply(&asked), Ok(false), "between packs");
            // As part of a graph, as often as it is replayed.
            asked.product.x = x.address();
            if has_library {
                let graph = capture(&fake, || assert_eq!(fake.multiply(&asked), Ok(true)));
                assert_eq!((out.read::<f32>(), graph.launches), (vec![9.0; 8], 0));
                fake.replay(graph).unwrap();
                fake.replay(graph).unwrap();
                assert_eq!(out.read::<f32>(), [19.0; 8]);
                fake.free_graph(graph).unwrap();
            }
        }
        fake.assert_nothing_left();
    }
}

#[test]
fn products_that_are_asked_for_wrongly_are_found() {
    let full = |fake: &Fake, bytes: usize| {
        let address = fake.allocate(bytes).unwrap();
        fake.upload(address, &vec![0; bytes]).unwrap();
        address
    };
    let ask = |fake: &Fake, addresses| assert!(fake.multiply(&product(addresses, 2)).unwrap());
    let with_library = |mistake: &dyn Fn(&Fake)| {
        let fake = Fake::new(Order::Forwards).with_capacity(1 << 20).with_library();
        let panic = catch_unwind(AssertUnwindSafe(|| mistake(&fake))).expect_err("a mistake");
        panic.downcast::<String>().map_or_else(|_| String::new(), |it| *it)
    };
    let rows: [Mistake<'_>; 5] = [
        ("product of 32 bytes", &|fake| ask(fake, [full(fake, 31), full(fake, 32), full(fake, 64)])),
        ("product of 64 bytes", &|fake| ask(fake, [full(fake, 32), full(fake, 32), full(fake, 48)])),
        ("some of which nobody wrote", &|fake| {
            ask(fake, [full(fake, 32), fake.allocate(32).unwrap(), full(fake, 64)]);
        }),
        ("whose result overlaps an operand", &|fake| {
            let shared = full(fake, 64);
            ask(fake, [shared, shared.offset(16), full(fake, 64)]);
        }),
        ("whose memory was given back", &|fake| {
            let [out, x, w] = [32, 32, 64].map(|bytes| full(fake, bytes));
            let graph = capture(fake, || ask(fake, [out, x, w]));
            fake.free(x).unwrap();
            fake.replay(graph).unwrap();
        }),
    ];
    for (expected, mistake) in rows {
        let message = with_library(mistake);
        assert!(message.contains(expected), "expected {expected:?}: {message}");
    }
}

// ---- Memory of other processes -----------------------------------------------------------------------------------------------------

/// Memory of one fake, written with one value, and the same as another fake has it.
fn shared(owner: &Fake, other: &Fake, bytes: usize, value: u8) -> (DeviceAddress, DeviceAddress) {
    let memory = owner.allocate_shareable(bytes).expect("it has memory");
    owner.fill(memory, bytes, value).expect("it is there");
    let exported = owner.export(memory).expect("it is shareable");
    let imported = other.import(exported, bytes, owner.properties().identity);
    (memory, imported.expect("it is in reach"))
}

fn pair() -> (Fake, Fake) {
    (Fake::new(Order::Forwards), Fake::new(Order::Forwards))
}

#[test]
fn a_copy_to_another_device_is_there_when_it_was_waited_for() {
    let (decode, prefill) = pair();
    let (theirs, target) = shared(&decode, &prefill, 24, 7);
    let source = Buffer::new(&prefill, &[1u64, 2]);
    let read = || {
        let mut bytes = [0; 24];
        decode.download(&mut bytes, theirs).unwrap();
        *bytes.as_chunks::<8>().0.first_chunk::<3>().expect("three words")
    };
    let words = |words: [u64; 3]| words.map(u64::to_le_bytes);
    let sevens = u64::from_le_bytes([7; 8]);
    prefill.handoff_after_compute().unwrap();
    prefill.copy(Queue::Handoff, target.offset(8), source.address(), 16).unwrap();
    let ticket = prefill.ticket(Queue::Handoff).unwrap();
    assert!(!prefill.is_done(ticket).unwrap());
    prefill.synchronize().unwrap();
    assert_eq!(read(), words([sevens, 1, 2]));
    prefill.copy(Queue::Handoff, target, source.address(), 8).unwrap();
    assert_eq!(read(), words([sevens, 1, 2]), "nobody waited");
    prefill.wait(prefill.ticket(Queue::Handoff).unwrap()).unwrap();
    assert_eq!(read(), words([1, 1, 2]));
    // In whichever order.
    decode.free(theirs).unwrap();
    prefill.copy(Queue::Handoff, target, source.address(), 8).unwrap();
    prefill.synchronize().unwrap();
    prefill.free(target).unwrap();
    drop(source);
    decode.assert_nothing_left();
    prefill.assert_nothing_left();
}

/// Who looks after a copy and after digests has two questions in turn.
#[test]
fn who_asks_for_two_tickets_in_turn_comes_to_the_end_of_both() {
    let (decode, prefill) = pair();
    let (_, target) = shared(&decode, &prefill, 16, 0);
    let source = Buffer::new(&prefill, &[1u64, 2]);
    let copied = |offset| {
        prefill.copy(Queue::Handoff, target.offset(offset), source.address(), 8).unwrap();
        prefill.ticket(Queue::Handoff).unwrap()
    };
    let tickets = [copied(0), copied(8)];
    let asks = (1..10).find(|_| tickets.map(|it| prefill.is_done(it).unwrap()) == [true; 2]);
    assert!(asks.is_some_and(|asks| 1 < asks), "{asks:?}");
}

#[test]
fn a_handoff_goes_on_while_another_thread_captures() {
    let (decode, prefill) = pair();
    let (_, target) = shared(&decode, &prefill, 8, 0);
    let (source, state) = (Buffer::new(&prefill, &[1u64]), Buffer::new(&prefill, &[1.0f32; 64]));
    let graph = capture(&prefill, || {
        prefill.launch(&norm(state.address(), state.address())).unwrap();
        prefill.copy(Queue::Handoff, target, source.address(), 8).unwrap();
        let ticket = prefill.ticket(Queue::Handoff).unwrap();
        prefill.wait(ticket).unwrap();
    });
    assert_eq!(graph.launches, 1, "the copy is none of the graph");
    let mut bytes = [0; 8];
    prefill.download(&mut bytes, target).unwrap();
    assert_eq!(bytes, 1u64.to_le_bytes());
}

#[test]
fn memory_of_others_that_is_used_wrongly_is_found() {
    let other = || Fake::new(Order::Forwards);
    check_mistakes(&[
        ("outside of every allocation", &|fake| {
            let (_, target) = shared(&other(), fake, 16, 0);
            let source = Buffer::new(fake, &[0u64; 2]);
            fake.copy(Queue::Handoff, target.offset(8), source.address(), 16).unwrap();
        }),
        ("outside of every allocation", &|fake| {
            let (_, target) = shared(&other(), fake, 16, 0);
            let source = Buffer::new(fake, &[0u64; 2]);
            fake.free(target).unwrap();
            fake.copy(Queue::Handoff, target, source.address(), 16).unwrap();
        }),
        ("may be under way", &|fake| {
            let (_, target) = shared(&other(), fake, 16, 0);
            let source = Buffer::new(fake, &[0u64; 2]);
            fake.copy(Queue::Handoff, target, source.address(), 16).unwrap();
            fake.free(target).unwrap();
        }),
        ("may be under way", &|fake| {
            let (_, target) = shared(&other(), fake, 16, 0);
            let source = Buffer::new(fake, &[0u64; 2]);
            fake.copy(Queue::Handoff, target, source.address(), 16).unwrap();
            fake.fill(source.address(), 8, 1).unwrap();
        }),
        ("memory was not given back", &|fake| {
            shared(&other(), fake, 16, 0);
            fake.assert_nothing_left();
        }),
        ("where there are", &|fake| {
            let owner = other();
            let memory = owner.allocate_shareable(16).unwrap();
            owner.fill(memory, 16, 0).unwrap();
            drop(fake.import(owner.export(memory).unwrap(), 32, owner.properties().identity));
        }),
        ("that is not shareable", &|fake| drop(fake.export(fake.allocate(16).unwrap()))),
        ("some of which nobody wrote", &|fake| drop(fake.export(fake.allocate_shareable(16).unwrap()))),
        ("is given back, and nothing was taken there", &|fake| {
            let memory = fake.allocate_shareable(16).unwrap();
            fake.free(memory).unwrap();
            drop(fake.export(memory));
        }),
    ]);
}

#[test]
fn what_cannot_be_shared_is_refused() {
    let fake = Fake::new(Order::Forwards).without_sharing();
    assert!(matches!(fake.allocate_shareable(8), Err(CudaError::NotShareable { .. })));
    let (decode, prefill) = pair();
    let prefill = prefill.without_reach_of(&decode);
    let memory = decode.allocate_shareable(8).unwrap();
    decode.fill(memory, 8, 0).unwrap();
    let identity = decode.properties().identity;
    let outcome = prefill.import(decode.export(memory).unwrap(), 8, identity);
    assert!(matches!(outcome, Err(CudaError::Unreachable { .. })), "{outcome:?}");
    let no_memory = std::fs::File::open("/dev/null").unwrap().into();
    let outcome = prefill.import(no_memory, 8, prefill.properties().identity);
    assert!(matches!(outcome, Err(CudaError::Call { .. })), "{outcome:?}");
    prefill.assert_nothing_left();
}
