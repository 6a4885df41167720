//! Devices that sum up and exchange what they have: on the fake, whose ranks are threads that meet.

#![cfg(not(no_cpp_compiler))]

mod support;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    thread,
};
use support::cuda::Buffer;
use tidemill_kernels::cuda::{
    Collective, CudaError, DeviceAddress, Driver, GroupId, Member, Queue, emulator::Order, fake::Fake,
};
use tidemill_kernels::matrix::WeightDtype;

/// What one of two ranks does wrongly, with eight bytes of its memory.
type Mistake = dyn Fn(&Fake, Member, DeviceAddress) + Sync;

/// What each rank's thread comes to. Panics with the first panic of one, once all have ended.
fn ranks<T: Send>(count: u32, body: impl Fn(&Fake, Member) -> T + Sync) -> Vec<T> {
    let group = Fake::new(Order::Forwards).new_group().expect("a fake has groups");
    let of_rank = |rank| {
        let fake = Fake::new(Order::Forwards);
        let member = fake.join(&group, rank, count).expect("all ranks join");
        let outcome = catch_unwind(AssertUnwindSafe(|| body(&fake, member)));
        if outcome.is_err() {
            fake.abandon(member);
        }
        fake.leave(member).expect("a place is given back");
        fake.assert_nothing_left();
        outcome
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..count).map(|rank| scope.spawn(move || of_rank(rank))).collect();
        let ends: Vec<_> = threads.into_iter().map(|thread| thread.join().expect("caught")).collect();
        ends.into_iter().map(|end| end.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

fn message(panic: Box<dyn std::any::Any + Send>) -> String {
    let text = panic.downcast::<String>().map(|it| *it);
    text.unwrap_or_else(|panic| (*panic.downcast::<&str>().expect("a panic says something")).to_owned())
}

#[test]
fn sums_are_the_same_in_every_rank() {
    for count in [1, 2, 4] {
        let sums = ranks(count, |fake, member| {
            let own: Vec<f32> = (0..100u16).map(|it| f32::from(it) + 1000.0 * member.rank as f32).collect();
            let buffer = Buffer::new(fake, &own);
            let sum = Collective::Sum { address: buffer.address(), elements: 100, dtype: WeightDtype::F32 };
            fake.collect(member, sum).unwrap();
            buffer.read::<f32>()
        });
        let of_ranks = (0..count).map(|rank| 1000.0 * rank as f32).sum::<f32>();
        let expected: Vec<f32> = (0..100u16).map(|it| f32::from(it) * count as f32 + of_ranks).collect();
        assert!(sums.iter().all(|sum| *sum == expected), "{count} ranks");
    }
}

#[test]
fn sums_in_sixteen_bits_are_rounded() {
    for (dtype, one, small, sum) in [
        // 1 + 2^-8 lies between two numbers of bf16, of which the even one is taken; f16 has it.
        (WeightDtype::Bf16, 0x3f80u16, 0x3b80u16, 0x3f80u16),
        (WeightDtype::F16, 0x3c00, 0x1c00, 0x3c04),
    ] {
        let sums = ranks(2, |fake, member| {
            let buffer = Buffer::new(fake, &[[one, small][member.rank as usize]; 8]);
            fake.collect(member, Collective::Sum { address: buffer.address(), elements: 8, dtype }).unwrap();
            buffer.read::<u16>()
        });
        assert_eq!(sums, [[sum; 8]; 2], "{dtype:?}");
    }
}

#[test]
fn parts_are_gathered_and_spread() {
    let outcomes = ranks(3, |fake, member| {
        let rank = u64::from(member.rank);
        let (own, all) = (Buffer::new(fake, &[rank, rank + 10]), Buffer::new(fake, &[99u64; 6]));
        let gather = Collective::Gather { to: all.address(), from: own.address(), bytes: 16 };
        fake.collect(member, gather).unwrap();
        fake.collect(member, Collective::Spread { address: own.address().offset(8), bytes: 8 }).unwrap();
        assert_eq!(fake.calls().collectives, 2);
        (all.read::<u64>(), own.read::<u64>())
    });
    for (rank, (all, own)) in (0u64..).zip(outcomes) {
        assert_eq!((all, own), (vec![0, 10, 1, 11, 2, 12], vec![rank, 10]), "rank {rank}");
    }
}

#[test]
fn a_replay_meets_again() {
    let sums = ranks(2, |fake, member| {
        let buffer = Buffer::new(fake, &[1.0f32 + member.rank as f32]);
        fake.begin_capture().unwrap();
        let sum = Collective::Sum { address: buffer.address(), elements: 1, dtype: WeightDtype::F32 };
        fake.collect(member, sum).unwrap();
        let graph = fake.end_capture().unwrap();
        assert_eq!(buffer.read::<f32>(), [1.0 + member.rank as f32], "nothing was carried out");
        for _ in 0..3 {
            fake.replay(graph).unwrap();
        }
        fake.free_graph(graph).unwrap();
        buffer.read::<f32>()
    });
    assert_eq!(sums, [[12.0], [12.0]], "three, six, twelve");
}

#[test]
fn a_rank_that_fails_leaves_nobody_waiting() {
    let outcomes = ranks(3, |fake, member| {
        let buffer = Buffer::new(fake, &[1.0f32]);
        let sum = Collective::Sum { address: buffer.address(), elements: 1, dtype: WeightDtype::F32 };
        if member.rank == 1 {
            fake.abandon(member);
        }
        fake.collect(member, sum)
    });
    assert_eq!(outcomes, vec![Err(CudaError::GroupAbandoned); 3]);
}

/// What goes to peers leaves a rank's memory while the rank waits for others.
#[test]
fn a_rank_that_waits_for_others_does_not_keep_its_device_from_other_threads() {
    let (asked, heard) = std::sync::mpsc::channel();
    let heard = std::sync::Mutex::new(heard);
    let sums = ranks(2, |fake, member| {
        let buffer = Buffer::new(fake, &[1.0f32 + member.rank as f32]);
        let sum = Collective::Sum { address: buffer.address(), elements: 1, dtype: WeightDtype::F32 };
        let (kept, landing) = (Buffer::new(fake, &[7u64]), support::cuda::Pinned::new(fake, &[0u64]));
        if member.rank == 0 {
            // The other one comes when it hears of the copy.
            thread::scope(|scope| {
                let beside = scope.spawn(|| {
                    while fake.calls().collectives == 0 {
                        thread::yield_now();
                    }
                    let (to, from) = (landing.address(), kept.address());
                    fake.start_download(Queue::Transfer, to, from, 8).unwrap();
                    fake.wait(fake.ticket(Queue::Transfer).unwrap()).unwrap();
                    asked.send(landing.read::<u64>()).unwrap();
                });
                fake.collect(member, sum).unwrap();
                beside.join().unwrap();
            });
        } else {
            assert_eq!(heard.lock().unwrap().recv().unwrap(), [7]);
            fake.collect(member, sum).unwrap();
        }
        buffer.read::<f32>()
    });
    assert_eq!(sums, [[3.0], [3.0]]);
}

#[test]
fn ranks_that_do_not_ask_for_the_same_are_found() {
    fn of_rank(fake: &Fake, member: Member, address: DeviceAddress, elements: [usize; 2]) {
        let elements = elements[member.rank as usize];
        drop(fake.collect(member, Collective::Sum { address, elements, dtype: WeightDtype::F32 }));
    }
    let rows: [(&str, &Mistake); 6] = [
        ("rank 1 for Some(Sum", &|fake, member, address| of_rank(fake, member, address, [1, 2])),
        ("rank 1 for Some(Spread", &|fake, member, address| {
            let collective = match member.rank {
                0 => Collective::Sum { address, elements: 1, dtype: WeightDtype::F32 },
                _ => Collective::Spread { address, bytes: 4 },
            };
            drop(fake.collect(member, collective));
        }),
        ("which overlap", &|fake, member, address| {
            let gather = Collective::Gather { to: address, from: address.offset(4), bytes: 4 };
            drop(fake.collect(member, gather));
        }),
        ("sum of ranks of 16 bytes", &|fake, member, address| of_rank(fake, member, address, [4, 4])),
        ("and a graph uses it", &|fake, member, address| {
            fake.begin_capture().unwrap();
            of_rank(fake, member, address, [1, 1]);
            fake.end_capture().unwrap();
            fake.leave(member).unwrap();
        }),
        ("groups were not left", &|fake, _, _| fake.assert_nothing_left()),
    ];
    for (expected, wrong) in rows {
        let group = Fake::new(Order::Forwards).new_group().unwrap();
        let found = thread::scope(|scope| {
            let threads = [0, 1].map(|rank| {
                scope.spawn(move || {
                    let fake = Fake::new(Order::Forwards);
                    let member = fake.join(&group, rank, 2).unwrap();
                    let address = fake.allocate(8).unwrap();
                    fake.fill(address, 8, 0).unwrap();
                    let wrong = catch_unwind(AssertUnwindSafe(|| wrong(&fake, member, address)));
                    wrong.map_err(message)
                })
            });
            threads.map(|thread| thread.join().expect("caught"))
        });
        assert!(
            found.iter().any(|end| end.as_ref().is_err_and(|said| said.contains(expected))),
            "{expected:?}: {found:?}"
        );
    }
}

#[test]
fn a_group_takes_as_many_as_it_has_places() {
    let fake = Fake::new(Order::Forwards);
    let join = |group: &GroupId, rank, ranks| {
        catch_unwind(AssertUnwindSafe(|| fake.join(group, rank, ranks))).map_err(message)
    };
    let group = fake.new_group().unwrap();
    assert!(join(&group, 1, 1).is_err_and(|said| said.contains("rank 1 of 1")));
    let member = join(&group, 0, 1).expect("has a place").unwrap();
    assert!(join(&group, 0, 1).is_err_and(|said| said.contains("is not there, or no more")));
    fake.leave(member).unwrap();
    let left = catch_unwind(AssertUnwindSafe(|| fake.leave(member))).map_err(message);
    assert!(left.is_err_and(|said| said.contains("is in no group")));
}
