//! Who may touch a block, in every order in which two workers' threads can do things.
//!
//! Block ownership passes between four threads by messages alone: the prefill engine, which may store right into
//! the decode worker's memory; the prefill endpoint, which copies; the decode endpoint; and the decode engine, which
//! gives blocks out again. Both endpoints are production's own [`EndpointCore`], between queues, and a search visits
//! every state that small configurations can reach: each thread may take its next step at any moment, the decode
//! engine may cancel or refuse and the prefill engine give up whenever it likes, the connection may break and the
//! prefill worker die at each point.
//!
//! [`EndpointCore`]: tidemill_kvtransfer_proto::endpoint_core::EndpointCore

mod content;
mod decode;
mod moves;
mod prefill;
mod settings;
mod world;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use moves::Move;
use world::{Config, Faults, Planted, Wire, World};

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
    let mut first = World::new(config);
    // Where each state came from, so that a violation can be told as a story.
    let mut seen: BTreeMap<u128, Option<(u128, Move)>> = BTreeMap::from([(first.key(), None)]);
    let mut open = vec![first];
    let mut searched = Searched { states: 0, ends: 0, adopted_all: false, released_all: false };
    while let Some(mut world) = open.pop() {
        searched.states += 1;
        let here = world.key();
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
            if let Entry::Vacant(place) = seen.entry(next.key()) {
                place.insert(Some((here, step)));
                open.push(next);
            }
        }
    }
    Ok(searched)
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
    let three = Config { handoffs: 3, faults: Faults { cancels: 1, ..NONE }, ..TWO };
    let all = Config { faults: everything, ..SAME_BLOCKS };
    #[rustfmt::skip]
    let rows = [
        ("side by side, undisturbed",                TWO),
        ("side by side, cancelled or given up",      Config { faults: Faults { cancels: 1, abandons: 1, ..NONE }, ..TWO }),
        ("the same blocks, each cancelled",          Config { faults: cancels, ..SAME_BLOCKS }),
        ("the same blocks, one given up",            Config { faults: gives_up, ..SAME_BLOCKS }),
        ("the same blocks over a broken connection", Config { faults: breaks, ..SAME_BLOCKS }),
        ("the same blocks of a worker that dies",    Config { faults: dies, ..SAME_BLOCKS }),
        ("the same blocks, everything at once",      all),
        ("three that share two blocks",              three),
        ("the same, three times over",               Config { handoffs: 3, faults: Faults { cancels: 1, ..NONE }, ..SAME_BLOCKS }),
    ];
    let mut total = 0;
    for wire in Wire::ALL {
        for (name, config) in rows {
            // Ways that take credit have two messages more, and with them as many states as all others together.
            if wire.takes_credit() && (config == three || config == all) {
                continue;
            }
            let is_wide = matches!(wire, Wire::Admitted | Wire::Read);
            let most = if is_wide { 1 - config.faults.breaks } else { u8::MAX };
            let cancels = config.faults.cancels.min(most);
            let config = Config { faults: Faults { cancels, ..config.faults }, ..config };
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

/// TCP keeps the order of control messages and loses none; the machines do not need that to be safe. A message that is
/// lost, or leave to write that comes before what it is for, can keep a handoff waiting: only safety is checked then.
#[test]
fn messages_that_overtake_or_vanish_mix_nothing() {
    let disturbed = Faults { cancels: 1, losses: 1, ..NONE };
    for wire in Wire::ALL {
        let blocks = if wire.takes_credit() { 1 } else { 2 };
        let config = Config { wire, faults: disturbed, overtaking: true, blocks, blocks_each: blocks, ..TWO };
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
        ("a device is taken for quiet that can still write", Planted::AccessIsLeft,      Wire::Device,   breaks,   foreign),
        ("a cancel is taken for quiet, a device",           Planted::FreeOnCancel,       Wire::Device,   cancels,  foreign),
        ("blocks that are read are free when the engine stops", Planted::FreeOffered,    Wire::Read,     cancels,  "prefill does not hold"),
        ("… or when the connection is gone",                Planted::FreeOfferedOnLoss,  Wire::Read,     breaks,   "prefill does not hold"),
        ("reads count as done when they are posted",        Planted::SettleWhenFetched,  Wire::Read,     cancels,  "prefill does not hold"),
    ];
    for (name, planted, wire, config, expected) in rows {
        let broken = search(Config { wire, planted: Some(planted), ..config }).expect_err(name);
        println!("{name}: {broken}");
        assert!(broken.contains(expected), "{name}: found as {broken}");
    }
}
