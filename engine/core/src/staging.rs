//! Pieces of prompts that wait for room to be converted in.
//!
//! A peer that reads takes what is converted for it out of a room that all such peers share. Who finds that full waits, and
//! nothing of it is lost. Nobody overtakes: room that is free for a moment too short for the first would otherwise go to
//! others for ever.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use tidemill_kvtransfer_proto::units::HandoffId;

/// Some layers of a block of the peer's, counted from the first that it is missing.
pub type Piece = (Range<usize>, u32);

/// Pieces in the order in which they get room: handoff by handoff, the one that waits longest first.
#[derive(Debug, Default)]
pub struct StagingQueue {
    order: VecDeque<HandoffId>,
    pieces: BTreeMap<HandoffId, VecDeque<Piece>>,
}

impl StagingQueue {
    /// Adds pieces to those of a handoff.
    pub fn add(&mut self, handoff: HandoffId, pieces: Vec<Piece>) {
        if pieces.is_empty() {
            return;
        }
        let waiting = self.pieces.entry(handoff).or_insert_with(|| {
            self.order.push_back(handoff);
            VecDeque::new()
        });
        waiting.extend(pieces);
    }

    /// Takes the next pieces, which fit into `room` bytes together, all of one handoff; `layer_bytes` says how long a layer of
    /// its peer's blocks is. `None` when nothing waits, or what comes next does not fit.
    pub fn take(
        &mut self,
        room: usize,
        layer_bytes: impl Fn(HandoffId) -> usize,
    ) -> Option<(HandoffId, Vec<Piece>)> {
        let handoff = *self.order.front()?;
        let waiting = self.pieces.get_mut(&handoff).expect("in order are those that have pieces");
        let mut fitting = room / layer_bytes(handoff);
        let mut taken = Vec::new();
        while 0 < fitting
            && let Some((layers, target)) = waiting.pop_front()
        {
            let middle = layers.end.min(layers.start + fitting);
            fitting -= middle - layers.start;
            if middle < layers.end {
                waiting.push_front((middle..layers.end, target));
            }
            taken.push((layers.start..middle, target));
        }
        if waiting.is_empty() {
            self.remove(handoff);
        }
        (!taken.is_empty()).then_some((handoff, taken))
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// Whether pieces of a handoff wait.
    pub fn has(&self, handoff: HandoffId) -> bool {
        self.pieces.contains_key(&handoff)
    }

    /// Nothing of a handoff is wanted any more.
    pub fn remove(&mut self, handoff: HandoffId) {
        if self.pieces.remove(&handoff).is_some() {
            self.order.retain(|it| *it != handoff);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `handoff:first..end@target` adds, `-handoff` removes, `=bytes` takes as often as something fits, each time that much,
    /// and `/bytes` once. A layer has ten bytes.
    #[test]
    fn who_gets_room() {
        #[rustfmt::skip]
        let rows = [
            ("all of it, where there is room",            "1:0..2@0 1:0..2@1 /40",            "1:0..2@0,0..2@1"),
            ("as much as there is room for",              "1:0..2@0 1:0..2@1 /20 /20",        "1:0..2@0 1:0..2@1"),
            ("some layers of a block",                    "1:0..3@0 /20 /20",                 "1:0..2@0 1:2..3@0"),
            ("no part of a layer",                        "1:0..1@0 /9 /10",                  "1:0..1@0"),
            ("one handoff at a time",                     "1:0..1@0 2:0..1@0 /40 /40",        "1:0..1@0 2:0..1@0"),
            ("the one that waits longest first",          "2:0..1@0 1:0..1@0 2:0..1@1 =40",   "2:0..1@0,0..1@1 1:0..1@0"),
            ("who has got all waits behind others anew",  "1:0..1@0 /10 2:0..1@0 1:0..1@1 =40", "1:0..1@0 2:0..1@0 1:0..1@1"),
            ("who is gone gets none",                     "1:0..1@0 2:0..1@0 -1 =40",         "2:0..1@0"),
            ("nothing for nobody",                        "1:0..1@0 -1 -1 =40",               ""),
        ];
        for (name, story, expected) in rows {
            let mut queue = StagingQueue::default();
            let mut got = Vec::new();
            let mut take = |queue: &mut StagingQueue, room: &str| {
                let found = queue.take(room.parse().unwrap(), |_| 10);
                let text = found.map(|(handoff, pieces)| {
                    let piece =
                        |(layers, target): &Piece| format!("{}..{}@{target}", layers.start, layers.end);
                    format!("{}:{}", handoff.0, pieces.iter().map(piece).collect::<Vec<_>>().join(","))
                });
                let is_something = text.is_some();
                got.extend(text);
                is_something
            };
            for word in story.split(' ') {
                if let Some(room) = word.strip_prefix('=') {
                    while take(&mut queue, room) {}
                } else if let Some(room) = word.strip_prefix('/') {
                    take(&mut queue, room);
                } else if let Some(handoff) = word.strip_prefix('-') {
                    queue.remove(HandoffId(handoff.parse().unwrap()));
                } else {
                    let (handoff, piece) = word.split_once(':').unwrap();
                    let (layers, target) = piece.split_once('@').unwrap();
                    let (first, end) = layers.split_once("..").unwrap();
                    let layers = first.parse().unwrap()..end.parse().unwrap();
                    let handoff = HandoffId(handoff.parse().unwrap());
                    queue.add(handoff, vec![(layers, target.parse().unwrap())]);
                    assert!(queue.has(handoff), "{name}");
                }
            }
            assert_eq!(got.join(" "), expected, "{name}");
            assert_eq!(queue.pieces.is_empty(), queue.is_empty(), "{name}");
        }
    }
}
