//! Who may touch a block, in every order in which two workers' threads can do things.
//!
//! Block ownership passes between four threads by messages alone: the prefill engine, which may store right into
//! the decode worker's memory; the prefill endpoint, which copies; the decode endpoint; and the decode engine, which
//! gives blocks out again. Production's own [`Reservation`] and [`Sender`] run here between queues, and a search
//! visits every state that small configurations can reach: each thread may take its next step at any moment, the
//! decode engine may cancel or refuse and the prefill engine give up whenever it likes, the connection may break and
//! the prefill worker die at each point.
//!
//! [`Reservation`]: tidemill_kvtransfer_proto::reservation::Reservation
//! [`Sender`]: tidemill_kvtransfer_proto::sender::Sender

mod decode;
mod prefill;
mod world;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt::{self, Write};

use world::{Config, Faults, Move, Planted, Wire, World};
use xxhash_rust::xxh3::Xxh3;

/// What a search came to.
#[derive(Debug)]
struct Searched {
    states: usize,
    /// States in which nothing is left to do; all were checked to be proper ends.
    ends: usize,
    adopted_all: bool,
    released_all: bool,
}

/// Visits every state that `config` can reach.
///
/// # Errors
///
/// A rule was broken: which, and the moves that led there.
fn search(config: Config) -> Result<Searched, String> {
    let first = World::new(config);
    // Where each state came from, so that a violation can be told as a story.
    let mut seen: BTreeMap<u128, Option<(u128, Move)>> = BTreeMap::from([(key(&first), None)]);
    let mut open = vec![first];
    let mut searched = Searched { states: 0, ends: 0, adopted_all: false, released_all: false };
    while let Some(world) = open.pop() {
        searched.states += 1;
        let here = key(&world);
        let moves = world.moves();
        if moves.is_empty() {
            searched.ends += 1;
            world.check_end().map_err(|broken| story(&seen, here, None, &broken))?;
            searched.adopted_all |= world.adopted() == config.handoffs;
            searched.released_all |= world.adopted() == 0;
        }
        for step in moves {
            let mut next = world.clone();
            next.make(step).map_err(|broken| story(&seen, here, Some(step), &broken))?;
            if let Entry::Vacant(place) = seen.entry(key(&next)) {
                place.insert(Some((here, step)));
                open.push(next);
            }
        }
    }
    Ok(searched)
}

/// A state by its text: 128 bits, so that two states in a search of millions do not share a key.
fn key(world: &World) -> u128 {
    struct Hashing(Xxh3);
    impl Write for Hashing {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            self.0.update(text.as_bytes());
            Ok(())
        }
    }
    let mut hashing = Hashing(Xxh3::new());
    write!(hashing, "{world:?}").expect("a hasher takes everything");
    hashing.0.digest128()
}

fn story(
    seen: &BTreeMap<u128, Option<(u128, Move)>>,
    mut at: u128,
    last: Option<Move>,
    broken: &str,
) -> String {
    let mut moves: Vec<Move> = last.into_iter().collect();
    while let Some(&Some((before, step))) = seen.get(&at) {
        moves.push(step);
        at = before;
    }
    let moves: String = moves.iter().rev().map(|step| format!("  {step:?}\n")).collect();
    format!("{broken}, after:\n{moves}")
}

const TWO: Config = Config {
    handoffs: 2,
    blocks: 2,
    blocks_each: 1,
    wire: Wire::InPlace,
    faults: Faults { cancels: 0, abandons: 0, breaks: 0, kills: 0, losses: 0 },
    overtaking: false,
    planted: None,
};

/// Two handoffs that want the same two blocks: the second begins when the first has given its blocks back.
const SAME_BLOCKS: Config = Config { blocks_each: 2, ..TWO };

const NONE: Faults = TWO.faults;

#[test]
fn every_order_of_two_handoffs_keeps_blocks_apart() {
    let cancels = Faults { cancels: 2, ..NONE };
    let gives_up = Faults { cancels: 1, abandons: 1, ..NONE };
    let breaks = Faults { cancels: 1, breaks: 1, ..NONE };
    let dies = Faults { cancels: 1, kills: 1, ..NONE };
    let everything = Faults { cancels: 1, abandons: 1, breaks: 1, ..NONE };
    #[rustfmt::skip]
    let rows = [
        ("side by side, undisturbed",                TWO),
        ("side by side, cancelled or given up",      Config { faults: Faults { cancels: 1, abandons: 1, ..NONE }, ..TWO }),
        ("the same blocks, each cancelled",          Config { faults: cancels, ..SAME_BLOCKS }),
        ("the same blocks, one given up",            Config { faults: gives_up, ..SAME_BLOCKS }),
        ("the same blocks over a broken connection", Config { faults: breaks, ..SAME_BLOCKS }),
        ("the same blocks of a worker that dies",    Config { faults: dies, ..SAME_BLOCKS }),
        ("the same blocks, everything at once",      Config { faults: everything, ..SAME_BLOCKS }),
        ("three that share two blocks",              Config { handoffs: 3, faults: Faults { cancels: 1, ..NONE }, ..TWO }),
        ("the same, three times over",               Config { handoffs: 3, faults: Faults { cancels: 1, ..NONE }, ..SAME_BLOCKS }),
    ];
    let mut total = 0;
    for wire in [Wire::InPlace, Wire::Copied, Wire::Admitted] {
        for (name, config) in rows {
            if wire == Wire::Admitted && config.handoffs == 3 && config.blocks_each == 1 {
                continue; // As many states as all others together.
            }
            let searched = search(Config { wire, ..config })
                .unwrap_or_else(|broken| panic!("{wire:?}, {name}: {broken}"));
            println!("{wire:?}, {name}: {} states, {} ends", searched.states, searched.ends);
            assert!(searched.adopted_all, "{wire:?}, {name}: some order hands everything over");
            let is_disturbed = config.faults != NONE;
            assert!(!is_disturbed || searched.ends > 1, "{wire:?}, {name}: faults lead to other ends");
            total += searched.states;
        }
    }
    println!("{total} states");
    assert!(100_000 < total, "the search is worth its name: {total} states");
}

/// TCP keeps the order of control messages and loses none; the machines do not need that to be safe. A message
/// that is lost can leave a handoff waiting, so only safety is checked then.
#[test]
fn messages_that_overtake_or_vanish_mix_nothing() {
    let disturbed = Faults { cancels: 1, losses: 1, ..NONE };
    for wire in [Wire::InPlace, Wire::Copied, Wire::Admitted] {
        let config = Config { wire, faults: disturbed, overtaking: true, ..SAME_BLOCKS };
        let searched = search(config).unwrap_or_else(|broken| panic!("{wire:?}: {broken}"));
        println!("{wire:?}, overtaking and lost: {} states, {} ends", searched.states, searched.ends);
        assert!(searched.adopted_all && searched.released_all, "{wire:?}: {searched:?}");
    }
}

/// The search is searched: each mistake is found.
#[test]
fn planted_mistakes_are_found() {
    let cancels = Config { faults: Faults { cancels: 1, ..NONE }, ..SAME_BLOCKS };
    let breaks = Config { faults: Faults { breaks: 1, ..NONE }, ..SAME_BLOCKS };
    let gives_up = Config { faults: Faults { abandons: 1, ..NONE }, ..SAME_BLOCKS };
    let foreign = "stores into a block that";
    #[rustfmt::skip]
    let rows = [
        ("a cancel is taken for quiet",                     Planted::FreeOnCancel,       Wire::InPlace,  cancels,  foreign),
        ("a cancel is taken for quiet, copies",             Planted::FreeOnCancel,       Wire::Copied,   cancels,  foreign),
        ("a lost peer is taken for a quiet one",            Planted::FreeOnLoss,         Wire::InPlace,  breaks,   foreign),
        ("the engine computes on after it gave up",         Planted::StoreAfterAbandon,  Wire::InPlace,  gives_up, foreign),
        ("writes count as done when they are posted",       Planted::SettleWhenPosted,   Wire::Copied,   cancels,  foreign),
        ("admission does not look at the reservation",      Planted::AdmitEverything,    Wire::Admitted, cancels,  foreign),
        ("nobody asks who is quiet when the connection is back", Planted::NobodyAsks,    Wire::InPlace,  breaks,   "is stuck"),
        ("the connection comes back and says nobody is busy", Planted::NobodyIsBusy,     Wire::InPlace,  breaks,   foreign),
    ];
    for (name, planted, wire, config, expected) in rows {
        let broken = search(Config { wire, planted: Some(planted), ..config }).expect_err(name);
        println!("{name}: {broken}");
        assert!(broken.contains(expected), "{name}: found as {broken}");
    }
}
