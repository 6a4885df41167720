//! Rows of what a reservation lets in, and of how it ends.

use super::*;
use crate::digest::Seal;
use crate::units::Epoch;

const HANDOFF: HandoffId = HandoffId(7);

fn target(block: u32, epoch: u64) -> BlockRef {
    BlockRef { block: BlockId(block), epoch: Epoch(epoch) }
}

fn targets() -> Vec<BlockRef> {
    vec![target(4, 1), target(5, 9), target(2, 3)]
}

const DIGESTS: [u64; 3] = [10, 11, 12];

fn seal() -> u64 {
    let mut seal = Seal::new(HANDOFF);
    seal.add(&targets(), &DIGESTS);
    seal.value()
}

fn filled(first: usize, count: usize) -> Filled {
    let targets = targets()[first..first + count].to_vec();
    let digests = DIGESTS[first..first + count].to_vec();
    Filled { handoff: HANDOFF, first: first as u32, targets, digests }
}

/// A commit that goes on from there.
fn rest(first: usize) -> Commit {
    let Filled { first, targets, digests, .. } = filled(first, 3 - first);
    let (tokens, seal) = (TokenCount(40), seal());
    Commit { handoff: HANDOFF, tokens, first, targets, digests, seal, payload: vec![1], in_place: false }
}

fn commit() -> Commit {
    rest(0)
}

/// A reservation in one of the states, reached the way it is in life.
fn reservation(state: &str) -> Reservation {
    let mut it = Reservation::new(HANDOFF, TokenCount(40), targets()).unwrap();
    let path: &[&str] = match state {
        "reserved" => &[],
        "filling" => &["announced"],
        "verifying" => &["announced", "commit"],
        "filling-2" => &["announced", "filled-2"],
        "proven-2" => &["announced", "filled-2", "verified-2"],
        "proven-3" => &["announced", "filled-2", "verified-2", "filled-1", "verified-1"],
        "verifying-2" => &["announced", "filled-2", "commit-1"],
        "verifying-3" => &["announced", "filled-2", "filled-1", "commit-0", "verified-2"],
        "committed" => &["announced", "commit", "verified"],
        "committed-quiet" => &["announced", "commit", "verified", "quiet"],
        "quarantined" => &["announced", "cancel"],
        "reading" => &["to-read", "reading"],
        "read" => &["to-read", "reading", "read"],
        "read-committed" => &["to-read", "reading", "read", "commit", "verified"],
        "reading-quarantined" => &["to-read", "reading", "cancel"],
        "released" => &["cancel"],
        other => panic!("no state {other}"),
    };
    for name in path {
        it.apply(event(name));
    }
    it
}

fn event(name: &str) -> Event {
    let reason = || "r".to_owned();
    match name {
        "announced" => Event::Announced,
        "to-read" => Event::AnnouncedToRead,
        "reading" => Event::Reading { pieces: 2 },
        "read" => Event::Read { pieces: 2 },
        "declined" => Event::Declined { reason: reason() },
        "commit" => Event::Commit(commit()),
        "commit:epoch" => {
            let mut commit = commit();
            commit.targets[1].epoch = Epoch(8);
            Event::Commit(commit)
        }
        "commit:tokens" => Event::Commit(Commit { tokens: TokenCount(39), ..commit() }),
        "commit:fewer" => Event::Commit(Commit { targets: targets()[..2].to_vec(), ..commit() }),
        "commit:digests" => Event::Commit(Commit { digests: vec![1], ..commit() }),
        "commit:seal" => Event::Commit(Commit { seal: 7, ..commit() }),
        "commit-1" => Event::Commit(rest(2)),
        "commit-0" => Event::Commit(rest(3)),
        "commit-0:seal" => Event::Commit(Commit { seal: 7, ..rest(3) }),
        "filled-2" => Event::Filled(filled(0, 2)),
        "filled-1" => Event::Filled(filled(2, 1)),
        "filled-0" => Event::Filled(filled(0, 0)),
        "filled:epoch" => {
            let mut filled = filled(0, 2);
            filled.targets[1].epoch = Epoch(8);
            Event::Filled(filled)
        }
        "filled:digests" => Event::Filled(Filled { digests: vec![10], ..filled(0, 2) }),
        "filled:more" => {
            let mut filled = filled(0, 3);
            filled.targets.push(target(9, 9));
            filled.digests.push(13);
            Event::Filled(filled)
        }
        "verified" => Event::Verified { targets: 3, outcome: Ok(()) },
        "verified-2" => Event::Verified { targets: 2, outcome: Ok(()) },
        "verified-1" => Event::Verified { targets: 1, outcome: Ok(()) },
        "differs" => Event::Verified { targets: 2, outcome: Err(CommitFault::Digest { index: 1 }) },
        "adopt" => Event::Adopt,
        "refuse" => Event::Refuse { reason: reason() },
        "cancel" => Event::Cancel,
        "quiet" => Event::Quiet { reason: reason() },
        "lost" => Event::PeerLost { peer: "p".into(), reason: reason() },
        "proven" => Event::QuietProven,
        other => panic!("no event {other}"),
    }
}

fn render(it: &Reservation, actions: &[Action]) -> String {
    let state = match (&it.state, &it.commit) {
        (State::Filling, CommitProgress::Verifying { .. }) => "verifying".to_owned(),
        (state, _) => format!("{state:?}").to_lowercase(),
    };
    let actions = actions.iter().map(|action| match action {
        Action::Send(Message::Cancel { .. }) => "send-cancel".to_owned(),
        Action::Send(Message::Refused { .. }) => "send-refused".to_owned(),
        Action::Send(Message::Adopted { .. }) => "send-adopted".to_owned(),
        Action::Send(other) => format!("{other:?}"),
        Action::Verify { first: 0, digests } if digests.len() == 3 => "verify".to_owned(),
        Action::Verify { first, digests } => format!("verify:{first}+{}", digests.len()),
        Action::TellCommitted(_) => "committed!".to_owned(),
        Action::TellFailed(_) => "failed!".to_owned(),
        Action::TellReleased => "released!".to_owned(),
        Action::Forget => "forget".to_owned(),
    });
    std::iter::once(state).chain(actions).collect::<Vec<_>>().join(" ")
}

/// A row per state and event; `.` means that nothing changes and nothing is to be done.
#[test]
fn transitions() {
    #[rustfmt::skip]
    let rows = [
        ("reserved",        "announced",      "filling"),
        ("reserved",        "declined",       "."),
        ("reserved",        "filled-2",       "."),
        ("reserved",        "commit",         "."),
        ("reserved",        "verified",       "."),
        ("reserved",        "adopt",          "."),
        ("reserved",        "refuse",         "released released!"),
        ("reserved",        "cancel",         "released released!"),
        ("reserved",        "quiet",          "."),
        ("reserved",        "lost",           "released failed! released!"),
        ("reserved",        "proven",         "."),

        ("filling",         "announced",      "."),
        ("filling",         "declined",       "released failed! released!"),
        ("filling",         "commit",         "verifying verify"),
        ("filling",         "commit:epoch",   "quarantined send-refused failed!"),
        ("filling",         "commit:tokens",  "quarantined send-refused failed!"),
        ("filling",         "commit:fewer",   "quarantined send-refused failed!"),
        ("filling",         "commit:digests", "quarantined send-refused failed!"),
        ("filling",         "commit:seal",    "quarantined send-refused failed!"),
        ("filling",         "commit-1",       "quarantined send-refused failed!"),
        ("filling",         "commit-0",       "quarantined send-refused failed!"),
        ("filling",         "verified",       "."),
        ("filling",         "differs",        "."),
        ("filling",         "adopt",          "."),
        ("filling",         "refuse",         "quarantined send-cancel"),
        ("filling",         "cancel",         "quarantined send-cancel"),
        ("filling",         "quiet",          "released failed! released!"),
        ("filling",         "lost",           "quarantined failed!"),
        ("filling",         "proven",         "."),

        ("filling",         "filled-2",       "filling verify:0+2"),
        ("filling",         "filled-1",       "."),
        ("filling",         "filled-0",       "."),
        ("filling",         "filled:epoch",   "quarantined send-refused failed!"),
        ("filling",         "filled:digests", "quarantined send-refused failed!"),
        ("filling",         "filled:more",    "quarantined send-refused failed!"),
        ("filling-2",       "filled-2",       "."),
        ("filling-2",       "filled-1",       "filling verify:2+1"),
        ("filling-2",       "verified-2",     "filling"),
        ("filling-2",       "verified",       "."),
        ("filling-2",       "differs",        "quarantined send-refused failed!"),
        ("filling-2",       "commit",         "quarantined send-refused failed!"),
        ("filling-2",       "commit-1",       "verifying verify:2+1"),
        ("filling-2",       "cancel",         "quarantined send-cancel"),
        ("filling-2",       "lost",           "quarantined failed!"),
        ("filling-2",       "quiet",          "released failed! released!"),
        ("proven-2",        "verified-2",     "."),
        ("proven-2",        "commit-1",       "verifying verify:2+1"),
        ("proven-2",        "commit-0",       "quarantined send-refused failed!"),
        ("proven-3",        "commit-0",       "committed committed!"),
        ("proven-3",        "commit-0:seal",  "quarantined send-refused failed!"),
        ("proven-3",        "commit",         "quarantined send-refused failed!"),
        ("verifying-2",     "verified-2",     "verifying"),
        ("verifying-2",     "verified-1",     "verifying"),
        ("verifying-2",     "verified",       "committed committed!"),
        ("verifying-2",     "filled-1",       "."),
        ("verifying-2",     "differs",        "quarantined send-refused failed!"),
        ("verifying-3",     "verified-1",     "committed committed!"),
        ("verifying-3",     "verified-2",     "."),

        ("verifying",       "commit",         "."),
        ("verifying",       "filled-2",       "."),
        ("verifying",       "verified",       "committed committed!"),
        ("verifying",       "differs",        "quarantined send-refused failed!"),
        ("verifying",       "adopt",          "."),
        ("verifying",       "cancel",         "quarantined send-cancel"),
        ("verifying",       "lost",           "quarantined failed!"),
        ("verifying",       "proven",         "."),

        ("committed",       "announced",      "."),
        ("committed",       "declined",       "."),
        ("committed",       "commit",         "."),
        ("committed",       "verified",       "."),
        ("committed",       "differs",        "."),
        ("committed",       "adopt",          "released send-adopted forget"),
        ("committed",       "refuse",         "quarantined send-refused"),
        ("committed",       "cancel",         "quarantined send-refused"),
        ("committed",       "quiet",          "."),
        ("committed",       "lost",           "."),
        ("committed",       "proven",         "."),
        ("committed-quiet", "adopt",          "released send-adopted forget"),
        ("committed-quiet", "refuse",         "released send-refused released!"),

        ("quarantined",     "announced",      "."),
        ("quarantined",     "declined",       "released released!"),
        ("quarantined",     "commit",         "."),
        ("quarantined",     "verified",       "."),
        ("quarantined",     "adopt",          "."),
        ("quarantined",     "refuse",         "."),
        ("quarantined",     "cancel",         "."),
        ("quarantined",     "quiet",          "released released!"),
        ("quarantined",     "lost",           "."),
        ("quarantined",     "proven",         "released released!"),

        ("reserved",            "to-read",    "filling"),
        ("reading",             "reading",    "."),
        ("reading",             "read",       "."),
        ("reading",             "declined",   "quarantined failed!"),
        ("reading",             "commit",     "quarantined send-refused failed!"),
        ("reading",             "cancel",     "quarantined send-cancel"),
        ("reading",             "quiet",      "quarantined failed!"),
        ("reading",             "lost",       "quarantined failed!"),
        ("read",                "declined",   "released failed! released!"),
        ("read",                "commit",     "verifying verify"),
        ("read",                "cancel",     "released send-cancel released!"),
        ("read",                "quiet",      "released failed! released!"),
        ("read",                "lost",       "released failed! released!"),
        ("read-committed",      "adopt",      "released send-adopted forget"),
        ("read-committed",      "refuse",     "released send-refused released!"),
        ("reading-quarantined", "quiet",      "."),
        ("reading-quarantined", "declined",   "."),
        ("reading-quarantined", "proven",     "."),
        ("reading-quarantined", "read",       "released released!"),

        ("released",        "announced",      "."),
        ("released",        "declined",       "."),
        ("released",        "commit",         "."),
        ("released",        "verified",       "."),
        ("released",        "adopt",          "."),
        ("released",        "refuse",         "."),
        ("released",        "cancel",         "."),
        ("released",        "quiet",          "."),
        ("released",        "lost",           "."),
        ("released",        "proven",         "."),
    ];
    for (state, name, expected) in rows {
        let mut it = reservation(state);
        let before = render(&it, &[]);
        let actions = it.apply(event(name));
        let expected = if expected == "." { before } else { expected.to_owned() };
        assert_eq!(render(&it, &actions), expected, "{name} while {state}");
    }
}

#[test]
fn admission() {
    let range = |offset, len, covered: &[BlockRef]| RemoteRange {
        handoff: HANDOFF,
        offset,
        len,
        stamp: stamp(covered),
    };
    let (four, five, two) = (target(4, 1), target(5, 9), target(2, 3));
    #[rustfmt::skip]
    let rows = [
        ("a part of a target lands",         "filling",     range(410, 20, &[four]),         Ok(())),
        ("two adjacent targets at once",     "filling",     range(400, 200, &[four, five]),  Ok(())),
        ("the last target",                  "filling",     range(299, 1, &[two]),           Ok(())),
        ("an older epoch is stale",          "filling",     range(410, 20, &[target(4, 0)]), Err(WriteFault::Stale)),
        ("so is one of several",             "filling",     range(400, 200, &[four, two]),   Err(WriteFault::Stale)),
        ("a block of somebody else",         "filling",     range(300, 10, &[four]),         Err(WriteFault::Outside)),
        ("reaching into one",                "filling",     range(590, 20, &[five]),         Err(WriteFault::Outside)),
        ("nothing is no write",              "filling",     range(410, 0, &[]),              Err(WriteFault::Outside)),
        ("the end of the address space",     "filling",     range(u64::MAX, 20, &[four]),    Err(WriteFault::Outside)),
        ("before the announcement",          "reserved",    range(410, 20, &[four]),         Err(WriteFault::NotExpected)),
        ("a target that is said to be final", "filling-2",  range(410, 20, &[four]),         Err(WriteFault::NotExpected)),
        ("one that is not",                  "filling-2",   range(299, 1, &[two]),           Ok(())),
        ("while digests are compared",       "verifying",   range(410, 20, &[four]),         Err(WriteFault::NotExpected)),
        ("after the commit",                 "committed",   range(410, 20, &[four]),         Err(WriteFault::NotExpected)),
        ("after a cancel",                   "quarantined", range(410, 20, &[four]),         Err(WriteFault::NotExpected)),
    ];
    for (name, state, range, expected) in rows {
        assert_eq!(reservation(state).admit(&range, 100), expected, "{name}");
    }
}

#[test]
fn a_block_is_reserved_once() {
    let new = |targets| Reservation::new(HANDOFF, TokenCount(1), targets).is_ok();
    assert!(new(vec![target(1, 1), target(2, 1)]));
    assert!(!new(vec![target(1, 1), target(1, 2)]), "a block twice");
    assert!(!new(vec![]), "no block");
}
