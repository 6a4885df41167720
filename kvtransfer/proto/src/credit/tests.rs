//! One row per rule of who gets leave and when.

use super::*;

/// Happenings, and the grants that follow, as `handoff:bytes`. `o1@5/30` opens handoff 1, due at 5, of 30 bytes;
/// `1+10` asks for ten bytes more; `1-10` says that ten have ended; `s1` stops it and `c1` closes it. The limit is 20.
#[test]
fn who_gets_leave() {
    #[rustfmt::skip]
    let rows = [
        // what is shown                                     happenings                                        grants
        ("what fits is granted at once",                     "o1@5/30 1+20",                                   "1:20"),
        ("the next wish waits for room",                     "o1@5/30 1+20 1+10",                              "1:20"),
        ("… until enough has ended",                         "o1@5/30 1+20 1+10 1-5 1-5",                      "1:20 1:30"),
        ("two share what there is",                          "o1@5/30 o2@9/30 1+10 2+10",                      "1:10 2:10"),
        ("the earlier deadline comes first",                 "o1@5/30 o2@9/30 o3@7/30 1+20 2+9 3+9 1-20",      "1:20 3:9 2:9"),
        ("… though it asked last",                           "o9@1/20 9+20 o1@5/30 o2@3/30 1+20 2+20 c9",      "9:20 2:20"),
        ("of equals the older handoff",                      "o9@1/20 9+20 o2@5/30 o1@5/30 2+20 1+20 c9",      "9:20 1:20"),
        ("nobody overtakes, not even with less",             "o1@1/30 o2@5/30 o3@9/30 1+10 2+15 3+5",          "1:10"),
        ("a wish is granted whole",                          "o1@1/30 o2@5/30 1+10 2+15 1-4",                  "1:10"),
        ("… and then the smaller one behind it",             "o1@1/30 o2@5/30 o3@9/30 1+10 2+15 3+5 1-10",     "1:10 2:15 3:5"),
        ("one that is too long waits until it is alone",     "o1@1/30 o2@5/90 1+10 2+90 1-9",                  "1:10"),
        ("… and has it then",                                "o1@1/30 o2@5/90 1+10 2+90 1-10",                 "1:10 2:90"),
        ("what was stopped gets no more",                    "o1@1/30 o2@5/30 1+20 2+20 s2 1-20",              "1:20"),
        ("… and holds what it has",                          "o1@1/30 o2@5/30 1+20 2+20 s1",                   "1:20"),
        ("… also if it still says that some has ended",      "o1@1/30 o2@5/30 1+20 2+20 s1 1-20",              "1:20 2:20"),
        ("… until it is closed",                             "o1@1/30 o2@5/30 1+20 2+20 s1 c1",                "1:20 2:20"),
        ("a close gives all back",                           "o1@1/30 o2@5/30 1+20 2+20 c1",                   "1:20 2:20"),
        ("… and ends its waiting",                           "o1@1/30 o2@5/30 o3@9/30 1+20 2+20 3+20 c2 1-20", "1:20 3:20"),
        ("what comes too late means nothing",                "o1@1/30 c1 1+10",                                ""),
        ("more than it has is no wish",                      "o1@1/30 1+31",                                   "fault"),
        ("less than before is none",                         "o1@1/30 1+10 1+-1",                              "1:10 fault"),
        ("nobody gives back what was not granted",           "o1@1/30 1+10 1-11",                              "1:10 fault"),
        ("… nor takes that back",                            "o1@1/30 1+10 1-5 1--1",                          "1:10 fault"),
    ];
    for (name, happenings, expected) in rows {
        let mut scene = Scene { pool: CreditPool::new(20), asks: BTreeMap::new() };
        let grants: Vec<String> = happenings.split(' ').flat_map(|word| scene.happens(word)).collect();
        assert_eq!(grants.join(" "), expected, "{name}");
    }
}

struct Scene {
    pool: CreditPool,
    asks: BTreeMap<u64, Ask>,
}

impl Scene {
    fn happens(&mut self, word: &str) -> Vec<String> {
        let number = |text: &str| text.parse::<i64>().unwrap();
        let handoff = |text: &str| HandoffId(text.parse().unwrap());
        let ask = |of: &str, more: i64, ended: i64, asks: &mut BTreeMap<u64, Ask>| {
            let ask = asks.entry(handoff(of).0).or_insert(Ask { ended: 0, wanted: 0 });
            ask.wanted = ask.wanted.wrapping_add_signed(more);
            ask.ended = ask.ended.wrapping_add_signed(ended);
            (handoff(of), *ask)
        };
        let mut told = Vec::new();
        let said = if let Some(order) = word.strip_prefix('o') {
            let (which, terms) = order.split_once('@').unwrap();
            let (due, size) = terms.split_once('/').unwrap();
            let deadline = Moment(Duration::from_secs(number(due).unsigned_abs()));
            self.pool.open(handoff(which), 77, deadline, number(size).unsigned_abs());
            None
        } else if let Some(which) = word.strip_prefix('s') {
            self.pool.stop(handoff(which));
            None
        } else if let Some(which) = word.strip_prefix('c') {
            self.pool.close(handoff(which));
            None
        } else if let Some((which, more)) = word.split_once('+') {
            Some(ask(which, number(more), 0, &mut self.asks))
        } else {
            let (which, ended) = word.split_once('-').expect("a happening");
            Some(ask(which, 0, number(ended), &mut self.asks))
        };
        if let Some((handoff, ask)) = said
            && self.pool.ask(handoff, ask).is_err()
        {
            told.push("fault".to_owned());
        }
        while let Some(grant) = self.pool.next_grant() {
            told.push(format!("{}:{}", grant.handoff.0, grant.bytes));
        }
        told
    }
}

#[test]
fn the_load_is_what_is_out_and_what_waits() {
    let mut scene = Scene { pool: CreditPool::new(20), asks: BTreeMap::new() };
    for (happening, expected) in [
        ("o1@1/30", (0, 0, 0)),
        ("1+15", (15, 0, 0)),
        ("o2@2/30", (15, 0, 0)),
        ("2+10", (15, 10, 1)),
        ("1+6", (15, 16, 2)),
        ("1-9", (12, 10, 1)),
        ("c1", (10, 0, 0)),
        ("s2", (10, 0, 0)),
        ("c2", (0, 0, 0)),
    ] {
        scene.happens(happening);
        let CreditLoad { granted_bytes, waiting_bytes, waiting_handoffs } = scene.pool.load();
        assert_eq!((granted_bytes, waiting_bytes, waiting_handoffs), expected, "after {happening}");
    }
}

/// Who holds leave and lets it lie is found, and nobody else is.
#[test]
fn a_peer_that_writes_nothing_is_found() {
    let mut scene = Scene { pool: CreditPool::new(20), asks: BTreeMap::new() };
    let still = |scene: &mut Scene, second| {
        scene.pool.is_standing_still(77, Duration::from_secs(10), Moment(Duration::from_secs(second)))
    };
    assert!(!still(&mut scene, 0) && !still(&mut scene, 100), "it has nothing");
    scene.happens("o1@1/90");
    scene.happens("1+10");
    assert!(!still(&mut scene, 100), "it has just got it");
    assert!(!still(&mut scene, 110), "ten seconds are allowed");
    assert!(still(&mut scene, 111));
    scene.happens("1-1");
    assert!(!still(&mut scene, 112) && still(&mut scene, 123), "a sign of life, and none any more");
    scene.happens("1-9");
    assert!(!still(&mut scene, 124) && !still(&mut scene, 999), "all has ended");
    scene.happens("1+10");
    assert!(!still(&mut scene, 1000) && still(&mut scene, 1011));
    scene.happens("s1");
    assert!(!still(&mut scene, 1012), "nobody expects it to go on");
}

#[test]
fn a_line_asks_for_whole_writes_in_runs() {
    const MIB: u64 = 1 << 20;
    #[rustfmt::skip]
    let rows = [
        // what is shown                            pushes, in MiB                         asks, each granted
        ("short writes go together",                vec![vec![1, 1], vec![1]],             vec![3]),
        ("as far as a run may go",                  vec![vec![3, 3, 3, 3]],                vec![6, 12]),
        ("a run ends where the next would be long", vec![vec![1; 20]],                     vec![8, 16, 20]),
        ("runs of several pushes are joined",       vec![vec![2, 2], vec![2, 2], vec![2]], vec![8, 10]),
        ("a long write goes alone",                 vec![vec![1, 30, 1]],                  vec![1, 31, 32]),
        ("nothing pushed, nothing asked",           vec![vec![]],                          vec![]),
    ];
    for (name, pushes, expected) in rows {
        let mut line = CreditLine::default();
        for push in pushes {
            line.push(push.into_iter().map(|len: u64| len * MIB));
        }
        let mut asks = Vec::new();
        while let Some(ask) = line.take_ask() {
            assert_eq!(line.take_ask(), None, "{name}: one wish at a time");
            assert!(!line.grant(ask.wanted + 1) && !line.grant(0), "{name}: only what was asked for counts");
            assert!(line.grant(ask.wanted) && !line.grant(ask.wanted), "{name}: and that once");
            asks.push(ask.wanted / MIB);
        }
        assert_eq!(asks, expected, "{name}");
    }
}

#[test]
fn a_line_says_what_has_ended_when_it_is_much_or_all() {
    let mut line = CreditLine::default();
    let told = |ended, wanted| Some(Ask { ended, wanted });
    line.push([700_000; 4].into_iter());
    assert!(!line.covers(1), "nothing without leave");
    assert_eq!(line.take_ask(), told(0, 2_800_000));
    assert!(line.grant(2_800_000));
    for _ in 0..3 {
        assert!(line.covers(700_000));
        line.post(700_000);
    }
    line.end(700_000);
    assert_eq!(line.take_ask(), None, "not worth a message");
    line.end(700_000);
    assert_eq!(line.take_ask(), told(1_400_000, 2_800_000), "much");
    line.end(700_000);
    assert_eq!(line.take_ask(), told(2_100_000, 2_800_000), "all that was under way");
    assert_eq!(line.take_ask(), None, "said once");
    assert!(line.covers(700_000) && !line.covers(700_001));
}
