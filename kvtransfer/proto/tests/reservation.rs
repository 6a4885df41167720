//! Whatever happens to a reservation, in whatever order: rules that hold after each event.

use proptest::prelude::*;
use tidemill_kvtransfer_proto::error::CommitFault;
use tidemill_kvtransfer_proto::message::Commit;
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

/// A commit that fits, or one that differs in one thing.
fn commit() -> impl Strategy<Value = Commit> {
    let good = Commit {
        handoff: HANDOFF,
        tokens: TOKENS,
        targets: targets(),
        digests: vec![1, 2, 3],
        payload: vec![9],
        in_place: false,
    };
    prop_oneof![
        4 => Just(good.clone()),
        1 => Just(Commit { tokens: TokenCount(47), ..good.clone() }),
        1 => Just(Commit { digests: vec![1, 2], ..good.clone() }),
        1 => Just(Commit { targets: targets()[1..].to_vec(), ..good.clone() }),
        1 => (0..3usize).prop_map(move |index| {
            let mut commit = good.clone();
            commit.targets[index].epoch.0 -= 1;
            commit
        }),
    ]
}

fn event() -> impl Strategy<Value = Event> {
    let reason = || "r".to_owned();
    prop_oneof![
        3 => Just(Event::Announced),
        1 => Just(Event::Declined { reason: reason() }),
        4 => commit().prop_map(Event::Commit),
        3 => Just(Event::Verified { outcome: Ok(()) }),
        1 => Just(Event::Verified { outcome: Err(CommitFault::Digest { index: 1 }) }),
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
        let (mut announced, mut quiet, mut good_commit, mut verified) = (false, false, false, false);
        let (mut committed, mut over) = (0, 0);
        for event in events {
            let before = it.state();
            let expects_bytes = before == State::Filling && !good_commit;
            let actions = it.apply(event.clone());
            announced |= event == Event::Announced && before == State::Reserved;
            // The peer's word counts once there is something that it can be about.
            let says_quiet = matches!(event, Event::Declined { .. } | Event::Quiet { .. } | Event::QuietProven);
            quiet |= says_quiet && announced;
            if let Event::Commit(commit) = &event && expects_bytes {
                good_commit = commit.targets == targets() && commit.tokens == TOKENS && commit.digests.len() == 3;
            }
            verified |= good_commit && event == (Event::Verified { outcome: Ok(()) });
            for action in &actions {
                match action {
                    Action::TellCommitted(payload) => {
                        prop_assert!(good_commit && verified, "committed without a proven commit");
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
                    Action::Send(_) | Action::Verify(_) | Action::TellFailed(_) => {}
                }
            }
            prop_assert!(committed <= 1 && over <= 1, "told once: {committed} commits, {over} ends");
            prop_assert_eq!(over == 1, it.state() == State::Released, "released if and only if somebody was told");
            if before == State::Released {
                prop_assert!(actions.is_empty(), "what is over stays over: {:?}", actions);
            }
            let range = RemoteRange { handoff: HANDOFF, offset: 4 * BLOCK as u64, len: 10, stamp: stamp(&targets()[..1]) };
            let may_land = it.admit(&range, BLOCK).is_ok();
            prop_assert_eq!(may_land, it.state() == State::Filling && !good_commit, "bytes land only while expected");
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
