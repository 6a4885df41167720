//! Schedules of the simulated cluster, and proof that its checks find what they are for.

use std::panic::{self, AssertUnwindSafe};

use tidemill_engine_core::simulator::{Fault, Faults, Mischief, Options, Summary, Trace, run};

/// Runs a schedule; the message of the check that failed, if one did.
fn attempt(seed: u64, options: Options, trace: &mut Trace) -> Result<Summary, String> {
    panic::catch_unwind(AssertUnwindSafe(|| run(seed, options, trace))).map_err(|payload| {
        let text = payload.downcast_ref::<String>().cloned();
        text.or_else(|| payload.downcast_ref::<&str>().map(|it| (*it).to_owned())).unwrap_or_default()
    })
}

fn run_all(seeds: std::ops::Range<u64>, faults: Faults) -> Summary {
    let mut sum = Summary::default();
    for seed in seeds {
        sum.add(&run(seed, Options { faults, mischief: None }, &mut Trace::default()));
    }
    sum
}

#[test]
fn a_cluster_without_faults_answers_everything_without_a_second_attempt() {
    let sum = run_all(0..60, Faults::none());
    assert_eq!((sum.answered, sum.failed, sum.cancelled), (sum.requests, 0, 0));
    assert_eq!((sum.turned_down, sum.late, sum.links_lost), (0, 0, 0), "{sum}");
    assert!(sum.handoffs.iter().all(|count| 10 < *count), "{sum}");
    assert!(10 < sum.in_place && 10 < sum.converted && 0 < sum.named_ahead, "{sum}");
    assert!(10 < sum.staged && 10 < sum.short_of_room, "{sum}");
}

/// Were anything on the way from a request to its first token found only by looking for it now and then, or after a time
/// that is up, some request among so many would wait that long. The steps of the slowest schedule take a tenth of this,
/// and the shortest of all periods and limits (a heartbeat) is longer.
#[test]
fn a_first_token_waits_for_computation_and_messages_and_for_no_clock() {
    let sum = run_all(0..200, Faults::none());
    assert!(sum.first_token < 100_000, "{} µs until a first token: {sum}", sum.first_token);
}

#[test]
fn a_cluster_under_all_faults_gives_no_wrong_answer_and_leaks_nothing() {
    let sum = run_all(1_000..1_120, Faults::all());
    assert_eq!(sum.missing(Faults::all()), [], "each fault happens: {sum}");
    assert!(0 < sum.quarantines && 0 < sum.replays && 0 < sum.late, "{sum}");
}

#[test]
fn each_fault_happens_alone_and_no_other_with_it() {
    for fault in Fault::ALL {
        let faults = Faults::none().with(fault);
        let sum = run_all(0..25, faults);
        assert_eq!(sum.missing(faults), [], "{sum}");
        let others = Fault::ALL.into_iter().filter(|it| *it != fault);
        assert!(others.into_iter().all(|it| sum.injected[it as usize] == 0), "{}: {sum}", fault.name());
    }
}

/// Schedules in which a driver's work was once left undone, here by the simulator's own.
#[test]
fn schedules_that_once_failed() {
    #[rustfmt::skip]
    let rows = [
        ("writes that are lost in silence end with their link",             84),
        ("a process that dies after its link was severed is noticed too",   127_978),
        ("what ends between a handshake and its link is said to be quiet",  806_389),
        ("what was computed before its peer reserved is not called final",  25_061),
        ("who leaves what it is offered notices a lost write of its own",   24_586),
    ];
    for (name, seed) in rows {
        let outcome = attempt(seed, Options { faults: Faults::all(), mischief: None }, &mut Trace::default());
        assert!(outcome.is_ok(), "{name}: {outcome:?}");
    }
}

#[test]
fn a_seed_gives_the_same_schedule_every_time() {
    let options = Options { faults: Faults::all(), mischief: None };
    let (mut first, mut second) = (Trace::recording(), Trace::recording());
    assert_eq!(run(7, options, &mut first), run(7, options, &mut second));
    assert!(!first.lines().is_empty() && first.lines() == second.lines());
}

/// The checker is checked: each bug that is planted is found within a few thousand schedules, by the check that is
/// there for it.
#[test]
fn planted_bugs_are_found() {
    #[rustfmt::skip]
    let rows = [
        // what is planted                                       its name                   what a check says
        ("writes land without being admitted",                   Mischief::SkipEpochCheck,  &["is not lent to it"][..]),
        ("commit goes before the last completion",               Mischief::CommitEarly,     &["commits what it has not written"]),
        ("blocks are freed when time is over, quiet or not",     Mischief::FreeOnTimeout,   &["is not lent to it"]),
        ("a block is announced to two handoffs",                 Mischief::ReuseBlock,      &["is not lent to it", "commits what it has not written", "foreign byte"]),
        ("leases never end",                                     Mischief::ForgetReaper,    &["outlives its lease"]),
        ("everybody has credit who asks for it",                 Mischief::GrantToAll,      &["which lends credit for"]),
        ("blocks are freed that a peer still reads",             Mischief::FreeOffered,     &["is not held for it"]),
        ("a read counts as complete when it is posted",          Mischief::ReadEarly,       &["commits what it has not written", "is not lent to it"]),
        ("… and nobody looks at digests",                        Mischief::SkipDigest,      &["foreign byte", "is not lent to it"]),
        ("copies make room that a peer still reads",             Mischief::ReuseStaging,    &["a copy of worker", "commits what it has not written"]),
        ("blocks are called final before they are computed",     Mischief::NameEarly,       &["a final block finds a foreign byte", "commits what it has not written"]),
        ("blocks are stored into that were called final",        Mischief::StoreAgain,      &["foreign byte"]),
        ("a reader may take for ever",                           Mischief::KeepOffers,      &["though nobody reads it"]),
    ];
    for (name, mischief, checks) in rows {
        let options = Options { faults: Faults::all(), mischief: Some(mischief) };
        let found = (0..6_000).find_map(|seed| attempt(seed, options, &mut Trace::default()).err());
        let message = found.unwrap_or_else(|| panic!("{name}: not found"));
        println!("{name}: {message}");
        assert!(checks.iter().any(|check| message.contains(check)), "{name}: found as: {message}");
    }
}
