//! Paths made anew on real devices. Run by `tests/rdma/run`.

use std::num::NonZeroU32;
use std::time::Instant;

use tidemill_kvtransfer_proto::path::PathEnd;
use tidemill_kvtransfer_proto::transport::{Completion, Post, Transport, WriteId};

use super::renewal::NotEnded;
use super::tests::{Pair, impatient, pattern, range, wait};

const LEN: usize = 2 << 20;

/// Passes on what the sides have to say to each other of their paths; ours speaks first of new ones.
fn talk(pair: &mut Pair) {
    let (ours, theirs) = (&mut pair.ours.transport, &mut pair.theirs.transport);
    for path in ours.take_news() {
        assert!(theirs.fence(path));
    }
    for path in theirs.take_news() {
        assert!(ours.fence(path));
    }
    for path in ours.take_proven() {
        assert!(theirs.hear_up(path));
    }
    for (path, end) in ours.renew() {
        if let Some(answer) = theirs.hear_anew(path, &end, false).expect("it has ended there too") {
            assert_eq!(ours.hear_anew(path, &answer, true), Ok(None));
        }
    }
    assert_eq!(theirs.take_proven(), [], "only who speaks first tries paths out");
}

/// Lets both sides work and talk until `until` says so.
fn work(pair: &mut Pair, what: &str, until: impl Fn(&Pair) -> bool) {
    while !until(pair) {
        wait(&mut pair.ours.transport);
        pair.ours.transport.poll(&mut Vec::new());
        pair.theirs.transport.poll(&mut Vec::new());
        talk(pair);
        assert!(Instant::now() < pair.deadline, "in time: {what}");
    }
}

/// Which paths are up on both sides.
fn up(pair: &Pair) -> Vec<bool> {
    let (ours, theirs) = (pair.ours.transport.paths(), pair.theirs.transport.paths());
    ours.iter().zip(&theirs).map(|(ours, theirs)| ours.is_up && theirs.is_up).collect()
}

fn write(pair: &mut Pair, id: u64, seed: usize) {
    let source = pair.source(&pattern(seed, LEN));
    let mut done = Vec::new();
    assert_eq!(pair.ours.transport.post_write(WriteId(id), source, range(0, LEN)), Post::Accepted);
    pair.work(&mut done, "a write lands", |_, done| !done.is_empty());
    assert_eq!(done, [Completion { id: WriteId(id), outcome: Ok(()) }]);
    let mut seen = vec![0; LEN];
    pair.theirs.arena.read(0, &mut seen);
    assert!(seen == pattern(seed, LEN), "write {id}");
}

#[test]
#[ignore = "needs a verbs device: tests/rdma/run"]
fn a_path_that_has_ended_is_made_anew_and_can_carry_everything() {
    let mut pair = Pair::new(LEN, &impatient());
    let count = pair.ours.transport.paths().len();
    assert!(2 <= count, "several paths");
    for round in 0..3 {
        assert!(pair.theirs.transport.fence(0), "its end goes there");
        talk(&mut pair);
        assert!(!pair.ours.transport.paths()[0].is_up, "it has ended on both sides");
        write(&mut pair, 2 * round, 1);
        work(&mut pair, "it is made anew", |pair| up(pair).iter().all(|is_up| *is_up));
        // It is the only one.
        let before = pair.ours.transport.paths()[0].delivered;
        for path in 1..u32::try_from(count).unwrap() {
            assert!(pair.ours.transport.fence(path) && pair.theirs.transport.fence(path));
        }
        assert_eq!(up(&pair).iter().filter(|is_up| **is_up).count(), 1);
        write(&mut pair, 2 * round + 1, 2);
        assert_eq!(pair.ours.transport.paths()[0].delivered - before, LEN as u64, "round {round}");
        work(&mut pair, "so are the others", |pair| up(pair).iter().all(|is_up| *is_up));
    }
}

#[test]
#[ignore = "needs a verbs device: tests/rdma/run"]
fn nothing_goes_over_a_path_before_bytes_came_over_it() {
    let mut pair = Pair::new(LEN, &impatient());
    assert!(pair.ours.transport.fence(0) && pair.theirs.transport.fence(0));
    let answer = |pair: &mut Pair| {
        let (path, end) = loop {
            wait(&mut pair.ours.transport);
            pair.ours.transport.poll(&mut Vec::new());
            assert!(Instant::now() < pair.deadline, "it is tried again");
            pair.ours.transport.take_news();
            pair.theirs.transport.take_news();
            if let Some(anew) = pair.ours.transport.renew().pop() {
                break anew;
            }
        };
        assert_eq!(path, 0);
        pair.theirs.transport.hear_anew(0, &end, false).unwrap().expect("it has a port")
    };
    // The answer leads to no queue pair that there is.
    let wrong = PathEnd { queue_pair: NonZeroU32::new(0xab_cdef), ..answer(&mut pair) };
    assert_eq!(pair.ours.transport.hear_anew(0, &wrong, true), Ok(None));
    assert!(!up(&pair)[0], "on trial on both sides");
    write(&mut pair, 0, 1);
    assert_eq!(pair.ours.transport.paths()[0].delivered, 0, "a write takes the others");
    let mut news = Vec::new();
    while news.is_empty() {
        wait(&mut pair.ours.transport);
        pair.ours.transport.poll(&mut Vec::new());
        news = pair.ours.transport.take_news();
        assert!(Instant::now() < pair.deadline, "the trial fails");
    }
    assert_eq!(news, [0]);
    assert!(pair.theirs.transport.fence(0));
    assert_eq!(pair.theirs.transport.take_news(), [0]);
    assert!(pair.ours.transport.fence(0));
    // The next attempt is as good as the first.
    work(&mut pair, "it is made anew", |pair| up(pair).iter().all(|is_up| *is_up));
}

#[test]
#[ignore = "needs a verbs device: tests/rdma/run"]
fn what_has_not_ended_is_not_made_anew() {
    let mut pair = Pair::new(LEN, &impatient());
    let end = PathEnd {
        queue_pair: NonZeroU32::new(17),
        first_packet: 1,
        gid: [1; 16],
        lid: 0,
        is_infiniband: false,
        mtu_log2: 12,
        reads: 1,
        arena_address: 0,
        arena_key: 0,
    };
    let theirs = &mut pair.theirs.transport;
    assert_eq!(theirs.hear_anew(0, &end, false), Err(NotEnded), "it works");
    assert_eq!(theirs.hear_anew(99, &end, false), Err(NotEnded), "there is none");
    assert_eq!(theirs.hear_anew(0, &end, true), Err(NotEnded), "an answer to nothing");
    assert!(theirs.fence(0));
    let unfit = PathEnd { mtu_log2: 99, ..end };
    assert_eq!(theirs.hear_anew(0, &unfit, false), Ok(None), "nothing can be connected to that");
    assert_eq!(theirs.take_news(), [0, 0], "its end, and that it has no other");
    assert!(theirs.hear_up(0) && !theirs.paths()[0].is_up, "word of a path that there is not");
    assert!(!theirs.hear_up(99));
    theirs.sever();
    assert!(theirs.renew().is_empty(), "nothing of a connection that is over is made anew");
}
