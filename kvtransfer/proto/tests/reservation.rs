//! Whatever happens to a reservation, in whatever order: rules that hold after each event.

use proptest::prelude::*;
use tidemill_kvtransfer_proto::digest::Seal;
use tidemill_kvtransfer_proto::error::CommitFault;
use tidemill_kvtransfer_proto::message::{Commit, Filled};
use tidemill_kvtransfer_proto::reservation::{
    Reservation, ReservationAction as Action, ReservationEvent as Event, ReservationState as State,
};
use tidemill_kvtransfer_proto::transport::{RemoteRange, stamp};
use tidemill_kvtransfer_proto::units::{BlockId, BlockRef, Epoch, HandoffId, TokenCount};

const HANDOFF: HandoffId = HandoffId(3);
const TOKENS: TokenCount = TokenCount(48);
const BLOCK: usize = 4096;

fn targets() -> Vec<BlockRef> {
    [(4, 7), (9, 1), (5, 2)]
        .map(|(block, epoch)| BlockRef { block: BlockId(block), epoch: Epoch(epoch) })
        .into()
}

const DIGESTS: [u64; 3] = [1, 2, 3];

/// The seal of all targets.
fn seal() -> u64 {
    let mut seal = Seal::new(HANDOFF);
    seal.add(&targets(), &DIGESTS);
    seal.value()
}

/// One or two of the blocks as they are named ahead of the commit, in one of several with a mistake.
fn filled() -> impl Strategy<Value = Filled> {
    (0..3usize, 1..=2usize, 0..8u32).prop_map(|(first, count, mistake)| {
        let end = 3.min(first + count);
        let (mut targets, mut digests) = (targets()[first..end].to_vec(), DIGESTS[first..end].to_vec());
        match mistake {
            0 => targets[0].epoch.0 -= 1,
            1 => digests.push(4),
            _ => {}
        }
        Filled { handoff: HANDOFF, first: first as u32, targets, digests }
    })
}

/// A commit that goes on from some block and fits, or one that differs in one thing.
fn commit() -> impl Strategy<Value = Commit> {
    (0..=3usize, 0..10u32).prop_map(|(first, mistake)| {
        let mut commit = Commit {
            handoff: HANDOFF,
            tokens: TOKENS,
            first: first as u32,
            targets: targets()[first..].to_vec(),
            digests: DIGESTS[first..].to_vec(),
            seal: seal(),
            payload: vec![9],
            in_place: false,
        };
        match mistake {
            0 => commit.tokens = TokenCount(47),
            1 => commit.digests.push(4),
            2 => drop(commit.targets.pop()),
            3 => commit.seal += 1,
            4 => commit.targets.iter_mut().for_each(|it| it.epoch.0 -= 1),
            _ => {}
        }
        commit
    })
}

fn event() -> impl Strategy<Value = Event> {
    let reason = || "r".to_owned();
    prop_oneof![
        3 => Just(Event::Announced),
        1 => Just(Event::Declined { reason: reason() }),
        4 => filled().prop_map(Event::Filled),
        4 => commit().prop_map(Event::Commit),
        6 => (1..=3usize).prop_map(|targets| Event::Verified { targets, outcome: Ok(()) }),
        1 => Just(Event::Verified { targets: 1, outcome: Err(CommitFault::Digest { index: 1 }) }),
        2 => Just(Event::Adopt),
        1 => Just(Event::Refuse { reason: reason() }),
        1 => Just(Event::Cancel),
        1 => Just(Event::Quiet { reason: reason() }),
        1 => Just(Event::PeerLost { peer: "p".into(), reason: reason() }),
        1 => Just(Event::QuietProven),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn rules_that_no_order_of_events_breaks(events in prop::collection::vec(event(), 0..25)) {
        let mut it = Reservation::new(HANDOFF, TOKENS, targets()).expect("distinct blocks");
        let (mut announced, mut quiet, mut good_commit) = (false, false, false);
        let (mut named, mut compared) = (0, 0);
        let (mut committed, mut over) = (0, 0);
        for event in events {
            let before = it.state();
            let expects_bytes = before == State::Filling && !good_commit;
            let actions = it.apply(event.clone());
            announced |= event == Event::Announced && before == State::Reserved;
            // The peer's word counts once there is something that it can be about.
            let says_quiet = matches!(event, Event::Declined { .. } | Event::Quiet { .. } | Event::QuietProven);
            quiet |= says_quiet && announced;
            match &event {
                Event::Filled(filled) if expects_bytes && filled.first as usize == named => {
                    let end = named + filled.targets.len();
                    let is_good = filled.targets == targets()[named..end] && filled.digests == DIGESTS[named..end];
                    prop_assert_eq!(is_good, it.state() == State::Filling, "it is examined at once");
                    named = if is_good { end } else { named };
                }
                Event::Commit(commit) if expects_bytes => {
                    good_commit = commit.first as usize == named
                        && commit.targets == targets()[named..]
                        && commit.digests == DIGESTS[named..]
                        && commit.tokens == TOKENS
                        && commit.seal == seal();
                    named = if good_commit { 3 } else { named };
                }
                Event::Verified { targets, outcome: Ok(()) } if before == State::Filling && compared + targets <= named => {
                    compared += targets;
                }
                _ => {}
            }
            for action in &actions {
                match action {
                    Action::TellCommitted(payload) => {
                        prop_assert!(good_commit && compared == 3, "committed without a proven commit");
                        prop_assert_eq!(payload, &[9]);
                        committed += 1;
                    }
                    Action::TellReleased => {
                        over += 1;
                        prop_assert!(!announced || quiet, "blocks that a peer may write to went back to the pool");
                    }
                    Action::Forget => {
                        over += 1;
                        prop_assert_eq!((event.clone(), committed), (Event::Adopt, 1));
                    }
                    Action::Send(_) | Action::Verify { .. } | Action::TellFailed(_) => {}
                }
            }
            prop_assert!(committed <= 1 && over <= 1, "told once: {committed} commits, {over} ends");
            prop_assert_eq!(over == 1, it.state() == State::Released, "released if and only if somebody was told");
            if before == State::Released {
                prop_assert!(actions.is_empty(), "what is over stays over: {:?}", actions);
            }
            let range = RemoteRange { handoff: HANDOFF, offset: 4 * BLOCK as u64, len: 10, stamp: stamp(&targets()[..1]) };
            let may_land = it.admit(&range, BLOCK).is_ok();
            let is_expected = it.state() == State::Filling && named == 0;
            prop_assert_eq!(may_land, is_expected, "bytes land only while expected");
        }
    }

    /// A write is admitted if and only if every block it touches is a target and its stamp names their epochs.
    #[test]
    fn only_targets_of_this_generation_are_written(
        first_block in 0u64..12, within in 0..BLOCK as u64, len in 1..3 * BLOCK as u32, old in any::<bool>(),
    ) {
        let mut it = Reservation::new(HANDOFF, TOKENS, targets()).expect("distinct blocks");
        it.apply(Event::Announced);
        let offset = first_block * BLOCK as u64 + within;
        let last_block = (offset + u64::from(len) - 1) / BLOCK as u64;
        let touched: Option<Vec<BlockRef>> = (first_block..=last_block)
            .map(|block| targets().into_iter().find(|target| u64::from(target.block.0) == block))
            .collect();
        let mut named = touched.clone().unwrap_or_else(|| targets()[..1].to_vec());
        named[0].epoch.0 -= u64::from(old);
        let range = RemoteRange { handoff: HANDOFF, offset, len, stamp: stamp(&named) };
        prop_assert_eq!(it.admit(&range, BLOCK).is_ok(), touched.is_some() && !old);
    }
}
