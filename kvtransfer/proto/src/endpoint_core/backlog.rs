//! Writes that wait to be posted.
//!
//! Layers of a block are computed one after the other and lie side by side. Where they wait anyway, those of one block
//! become one write: a long copy is faster than several short ones, and each write costs the same to post and to settle.

use std::collections::{BTreeMap, VecDeque};

use super::writing::WriteSource;
use crate::transport::RemoteRange;

/// Writes of one handoff, in the order in which they are posted.
#[derive(Clone, Debug)]
pub(super) struct Backlog<S> {
    writes: VecDeque<(S, RemoteRange)>,
    /// How many were taken so far: the number of the first of `writes`.
    taken: u64,
    /// By the offset behind its last byte at the peer, the number of a write that may grow.
    ends: BTreeMap<u64, u64>,
}

impl<S> Default for Backlog<S> {
    fn default() -> Self {
        Self { writes: VecDeque::new(), taken: 0, ends: BTreeMap::new() }
    }
}

impl<S: WriteSource> Backlog<S> {
    /// How many wait.
    pub(super) fn len(&self) -> usize {
        self.writes.len()
    }

    /// The next one.
    pub(super) fn front(&self) -> Option<&(S, RemoteRange)> {
        self.writes.front()
    }

    /// Adds writes as they are.
    pub(super) fn extend(&mut self, writes: Vec<(S, RemoteRange)>) {
        self.writes.extend(writes);
    }

    /// Adds writes; one that continues another within its block of `block` bytes makes that longer, up to `limit` bytes.
    /// Returns by how many there are more.
    pub(super) fn join(&mut self, writes: Vec<(S, RemoteRange)>, block: u64, limit: u64) -> u32 {
        let before = self.writes.len();
        for (source, range) in writes {
            let number = self.ends.get(&range.offset).copied();
            let place = number.and_then(|it| usize::try_from(it.checked_sub(self.taken)?).ok());
            let longer =
                place.and_then(|place| joined(self.writes.get(place)?, &source, &range, block, limit));
            let end = range.offset + u64::from(range.len);
            if let (Some(number), Some(place), Some(longer)) = (number, place, longer) {
                self.ends.remove(&range.offset);
                self.ends.insert(end, number);
                self.writes[place] = longer;
            } else {
                self.ends.insert(end, self.taken + self.writes.len() as u64);
                self.writes.push_back((source, range));
            }
        }
        u32::try_from(self.writes.len() - before).expect("a reservation is bounded by its frame")
    }

    /// Takes the next one.
    pub(super) fn pop_front(&mut self) -> Option<(S, RemoteRange)> {
        let write = self.writes.pop_front()?;
        self.taken += 1;
        if self.writes.is_empty() {
            self.ends.clear();
        }
        Some(write)
    }

    /// Puts one back that was just taken.
    pub(super) fn push_front(&mut self, write: (S, RemoteRange)) {
        self.taken -= 1;
        self.writes.push_front(write);
    }
}

/// The two as one, if `source` and `range` continue the first at both ends and neither leaves its block.
fn joined<S: WriteSource>(
    first: &(S, RemoteRange),
    source: &S,
    range: &RemoteRange,
    block: u64,
    limit: u64,
) -> Option<(S, RemoteRange)> {
    let (from, to) = first;
    let len = to.len.checked_add(range.len).filter(|&len| u64::from(len) <= limit)?;
    let last = to.offset + u64::from(len) - 1;
    let continues = to.offset + u64::from(to.len) == range.offset
        && to.offset / block == last / block
        && from.memory() == source.memory()
        && from.offset() + from.len() == source.offset();
    if !continues {
        return None;
    }
    let from = from.range(from.offset(), from.len() + source.len())?;
    // Within one block the stamp is that of the block.
    Some((from, RemoteRange { len, ..*to }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::HandoffId;

    /// A range of one of some memories.
    #[derive(Clone, Debug, PartialEq)]
    struct Piece {
        memory: usize,
        offset: usize,
        len: usize,
    }

    impl WriteSource for Piece {
        fn memory(&self) -> usize {
            self.memory
        }
        fn offset(&self) -> usize {
            self.offset
        }
        fn len(&self) -> usize {
            self.len
        }
        fn range(&self, offset: usize, len: usize) -> Option<Self> {
            Some(Self { offset, len, ..*self })
        }
        fn in_region(&self) -> Option<u64> {
            Some(self.offset as u64)
        }
        fn read(&self, _: usize, buffer: &mut [u8]) {
            buffer.fill(0);
        }
    }

    /// `memory:source>target+len`.
    fn write(text: &str) -> (Piece, RemoteRange) {
        let (memory, rest) = text.split_once(':').unwrap();
        let (source, rest) = rest.split_once('>').unwrap();
        let (target, len) = rest.split_once('+').unwrap();
        let number = |text: &str| text.parse::<usize>().unwrap();
        let (offset, len) = (number(target) as u64, number(len));
        let source = Piece { memory: number(memory), offset: number(source), len };
        let stamp = 1 + offset / BLOCK;
        (source, RemoteRange { handoff: HandoffId(1), offset, len: len as u32, stamp })
    }

    fn render(backlog: &Backlog<Piece>) -> String {
        let texts = backlog.writes.iter().map(|(source, range)| {
            assert_eq!((source.len, range.stamp), (range.len as usize, 1 + range.offset / BLOCK));
            format!("{}:{}>{}+{}", source.memory, source.offset, range.offset, range.len)
        });
        texts.collect::<Vec<_>>().join(" ")
    }

    const BLOCK: u64 = 100;

    #[test]
    fn what_joins_while_it_waits() {
        #[rustfmt::skip]
        let rows = [
            // what is shown                             what comes, "-" being one that is posted        what waits
            ("the next layer of a block",                "0:0>300+10 0:10>310+10",                       "0:0>300+20"),
            ("… of each of several",                     "0:0>300+10 0:50>700+10 0:10>310+10 0:60>710+10", "0:0>300+20 0:50>700+20"),
            ("… and the one after that",                 "0:0>300+10 0:10>310+10 0:20>320+10",           "0:0>300+30"),
            ("not what is posted already",               "0:0>300+10 - 0:10>310+10",                     "0:10>310+10"),
            ("… but what came behind it",                "0:0>300+10 0:50>700+10 - 0:10>310+10 0:60>710+10", "0:50>700+20 0:10>310+10"),
            ("not with a gap at the source",             "0:0>300+10 0:11>310+10",                       "0:0>300+10 0:11>310+10"),
            ("not with a gap at the target",             "0:0>300+10 0:10>311+10",                       "0:0>300+10 0:10>311+10"),
            ("not out of another memory",                "0:0>300+10 1:10>310+10",                       "0:0>300+10 1:10>310+10"),
            ("not into the next block",                  "0:0>390+10 0:10>400+10",                       "0:0>390+10 0:10>400+10"),
            ("not beyond the limit",                     "0:0>300+40 0:40>340+11 0:51>351+9",            "0:0>300+40 0:40>340+20"),
        ];
        for (name, happenings, expected) in rows {
            let mut backlog = Backlog::default();
            let mut count = 0;
            for word in happenings.split(' ') {
                if word == "-" {
                    backlog.pop_front().unwrap();
                    count -= 1;
                } else {
                    count += backlog.join(vec![write(word)], BLOCK, 50);
                }
            }
            assert_eq!(render(&backlog), expected, "{name}");
            assert_eq!(backlog.len(), count as usize, "{name}: counted");
        }
    }

    #[test]
    fn one_that_is_put_back_can_grow() {
        let mut backlog = Backlog::default();
        backlog.join(vec![write("0:0>300+10"), write("0:50>700+10")], BLOCK, 50);
        let taken = backlog.pop_front().unwrap();
        backlog.push_front(taken);
        assert_eq!(backlog.join(vec![write("0:10>310+10"), write("0:60>710+10")], BLOCK, 50), 0);
        assert_eq!(render(&backlog), "0:0>300+20 0:50>700+20");
    }
}
