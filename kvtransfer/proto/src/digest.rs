//! Proof that the bytes which arrived are those that were sent.
//!
//! The digest of a block is the wrapping sum of the digests of its granules, one layer each. A sum, so that a
//! sender can add layers in whatever order and grouping it computes them; seeded with the block's position in
//! the handoff and the layer, so that swapped blocks or layers do not cancel out; and free of block numbers, so
//! that it survives the move from one pool to another.
//!
//! A granule counts as often as it is added: a sender must write each exactly once.

use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

use crate::layout::KvLayout;
use crate::units::{BlockRef, HandoffId};

/// How much of each granule a digest looks at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Coverage {
    /// The first and last cache line and some between, chosen anew for each handoff: notices every block or
    /// layer that is missing, stale or misplaced, at a cost that does not depend on its size.
    #[default]
    Sampled,
    /// Every byte.
    Full,
}

/// Which granule of a handoff.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Granule {
    /// The handoff.
    pub handoff: HandoffId,
    /// Position of its block among the targets.
    pub target: u32,
    /// Its number within the block.
    pub index: u32,
}

/// A digest over the names and digests of the blocks of a handoff, in their order. Both sides add the blocks as they are
/// named; who knows it at the end has named the same blocks, of the same epochs, with the same digests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seal(u64);

/// How a block is cut into granules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockShape {
    /// Bytes of a block.
    pub block: usize,
    /// Bytes of a granule, which is one layer; divides `block`.
    pub granule: usize,
}

/// Which bytes of a granule a digest looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// All of them.
    All,
    /// Lines of 64 bytes that begin there, one behind the other.
    Lines([usize; LINES]),
}

/// Digest of one granule of `len` bytes. `read(offset, buffer)` copies bytes of the granule into the buffer: the
/// memory can be shared with a peer, so it is never borrowed.
pub fn granule_digest(
    coverage: Coverage,
    granule: Granule,
    len: usize,
    mut read: impl FnMut(usize, &mut [u8]),
) -> u64 {
    let seed = granule.seed();
    if coverage == Coverage::Full || len <= SAMPLE {
        let mut hasher = Xxh3::with_seed(seed);
        let mut buffer = [0; CHUNK];
        let mut offset = 0;
        while offset < len {
            let part = &mut buffer[..CHUNK.min(len - offset)];
            read(offset, part);
            hasher.update(part);
            offset += part.len();
        }
        return hasher.digest();
    }
    let mut sample = [0; SAMPLE];
    granule.take_sample(len, &mut sample, read);
    xxh3_64_with_seed(&sample, seed)
}

/// Adds the digests of granules up, block by block.
///
/// Of some granules together it is found out which lines are looked at, then all of those are read, and then hashed: the
/// memory looks for as many of them at once as it can, instead of for one after the other. `P` says where a granule lies,
/// and `read(place, offset, buffer)` copies bytes of it into the buffer.
#[derive(Debug)]
pub struct BlockDigests<'a, P, R: FnMut(P, usize, &mut [u8])> {
    coverage: Coverage,
    /// Bytes of a granule.
    len: usize,
    /// One for each target.
    sums: &'a mut [u64],
    read: R,
    waiting: Vec<(Granule, P, [usize; LINES])>,
    samples: [[u8; SAMPLE]; BATCH],
}

impl<'a, P: Copy, R: FnMut(P, usize, &mut [u8])> BlockDigests<'a, P, R> {
    /// Adds to `sums`, of which there is one for each target. Granules have `len` bytes.
    pub fn new(coverage: Coverage, len: usize, sums: &'a mut [u64], read: R) -> Self {
        let (waiting, samples) = (Vec::with_capacity(BATCH), [[0; SAMPLE]; BATCH]);
        Self { coverage, len, sums, read, waiting, samples }
    }

    /// Adds a granule.
    ///
    /// # Panics
    ///
    /// At some time before this value is gone, when there is no such target.
    pub fn add(&mut self, granule: Granule, place: P) {
        if self.coverage == Coverage::Full || self.len <= SAMPLE {
            let read = |offset, buffer: &mut [u8]| (self.read)(place, offset, buffer);
            let digest = granule_digest(self.coverage, granule, self.len, read);
            return add_to(self.sums, granule, digest);
        }
        self.waiting.push((granule, place, granule.lines(self.len)));
        if self.waiting.len() == BATCH {
            self.look();
        }
    }

    fn look(&mut self) {
        let Self { sums, read, waiting, samples, .. } = self;
        for ((_, place, lines), sample) in waiting.iter().zip(&mut *samples) {
            for (&line, bytes) in lines.iter().zip(sample.as_chunks_mut::<LINE>().0) {
                read(*place, line, bytes);
            }
        }
        for ((granule, ..), sample) in waiting.drain(..).zip(&*samples) {
            add_to(sums, granule, xxh3_64_with_seed(sample, granule.seed()));
        }
    }

    /// Adds what is still missing.
    pub fn finish(mut self) {
        self.look();
    }
}

fn add_to(sums: &mut [u64], granule: Granule, digest: u64) {
    let sum = &mut sums[granule.target as usize];
    *sum = sum.wrapping_add(digest);
}

/// The granules, as (target, index), that a sampled digest looks at when the prompt was computed in the
/// targets themselves: the first, the last, and some between that change with the handoff. Prefill and decode then read the
/// same memory, where no byte can be lost on the way; what is left to notice is memory that is not what one of them
/// takes it for, and any place shows that. So the cost does not grow with the handoff.
pub fn spots(handoff: HandoffId, targets: usize, shape: BlockShape) -> Vec<(usize, usize)> {
    let per_block = shape.block / shape.granule;
    let all = targets * per_block;
    let mut numbers: Vec<usize> = if all <= SPOTS {
        (0..all).collect()
    } else {
        let choice = |spot: u64| {
            let number = xxh3_64_with_seed(&spot.to_le_bytes(), handoff.0) % all as u64;
            usize::try_from(number).expect("less than a usize")
        };
        [0, all - 1].into_iter().chain((2..SPOTS as u64).map(choice)).collect()
    };
    numbers.sort_unstable();
    numbers.dedup();
    numbers.into_iter().map(|number| (number / per_block, number % per_block)).collect()
}

impl Seal {
    /// Of no block yet.
    pub const fn new(handoff: HandoffId) -> Self {
        Self(handoff.0)
    }

    /// Adds the next blocks, with a digest for each.
    pub fn add(&mut self, targets: &[BlockRef], digests: &[u64]) {
        for (target, digest) in targets.iter().zip(digests) {
            let mut bytes = [0; 20];
            bytes[..4].copy_from_slice(&target.block.0.to_le_bytes());
            bytes[4..12].copy_from_slice(&target.epoch.0.to_le_bytes());
            bytes[12..].copy_from_slice(&digest.to_le_bytes());
            self.0 = xxh3_64_with_seed(&bytes, self.0);
        }
    }

    /// As it is sent.
    pub const fn value(self) -> u64 {
        self.0
    }
}

impl BlockShape {
    /// That of blocks of this layout.
    pub fn of(layout: &KvLayout) -> Self {
        Self { block: layout.block_bytes(), granule: layout.strides().layer }
    }

    /// Names a granule by where it is.
    ///
    /// # Panics
    ///
    /// When one of the two numbers exceeds `u32`: neither a reservation nor a block has that many parts.
    pub fn granule_of(self, handoff: HandoffId, target: usize, index: usize) -> Granule {
        let number = |it: usize| u32::try_from(it).expect("targets and granules are numbered in u32");
        Granule { handoff, target: number(target), index: number(index) }
    }
}

impl Granule {
    /// Which of its `len` bytes are looked at, for who takes the digest by other means: it is XXH3 of 64 bits of them, with the
    /// [`seed`](Self::seed).
    pub fn look(self, coverage: Coverage, len: usize) -> Look {
        if coverage == Coverage::Full || len <= SAMPLE { Look::All } else { Look::Lines(self.lines(len)) }
    }

    /// Distinct for each place of a block, equal for all handoffs: a digest can be compared across them.
    pub fn seed(self) -> u64 {
        (u64::from(self.target) << 32) | u64::from(self.index)
    }

    fn take_sample(self, len: usize, sample: &mut [u8; SAMPLE], mut read: impl FnMut(usize, &mut [u8])) {
        for (line, offset) in sample.chunks_exact_mut(LINE).zip(self.lines(len)) {
            read(offset, line);
        }
    }

    /// Where the sampled lines start. A different choice for each handoff, so that no byte of a block that is
    /// handed over again and again stays unseen for ever.
    fn lines(self, len: usize) -> [usize; LINES] {
        let whole_lines = len / LINE;
        let mut choice = xxh3_64_with_seed(&self.seed().to_le_bytes(), self.handoff.0);
        let mut lines = [0; LINES];
        lines[LINES - 1] = len - LINE;
        for line in &mut lines[1..LINES - 1] {
            *line = usize::try_from(choice % whole_lines as u64).expect("less than a usize") * LINE;
            choice = choice.rotate_right(32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
        lines
    }
}

/// Bytes of a cache line.
const LINE: usize = 64;
/// Lines of a granule that a sampled digest looks at.
const LINES: usize = 4;
/// Bytes of a sample.
const SAMPLE: usize = LINES * LINE;
/// Granules looked at of a handoff that moved nothing.
const SPOTS: usize = 16;
/// Samples taken before they are hashed: more lines than a core can have under way.
const BATCH: usize = 16;
/// Bytes hashed at a time.
const CHUNK: usize = 8192;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{BlockId, Epoch};

    const GRANULE: Granule = Granule { handoff: HandoffId(1), target: 2, index: 3 };

    fn digest(coverage: Coverage, granule: Granule, bytes: &[u8]) -> u64 {
        granule_digest(coverage, granule, bytes.len(), |offset, buffer| {
            buffer.copy_from_slice(&bytes[offset..offset + buffer.len()]);
        })
    }

    #[test]
    fn what_a_digest_notices() {
        let bytes: Vec<u8> = (0..20_000u32).map(|index| (index % 251) as u8).collect();
        let with = |at: usize| {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1;
            bytes
        };
        let moved = Granule { target: 3, index: 2, ..GRANULE };
        let other = Granule { handoff: HandoffId(9), ..GRANULE };
        for coverage in [Coverage::Sampled, Coverage::Full] {
            let honest = digest(coverage, GRANULE, &bytes);
            assert_eq!(honest, digest(coverage, GRANULE, &bytes.clone()), "{coverage:?}: it is a function");
            assert_ne!(honest, digest(coverage, GRANULE, &with(0)), "{coverage:?}: the first line counts");
            assert_ne!(honest, digest(coverage, GRANULE, &with(19_999)), "{coverage:?}: so does the last");
            assert_ne!(honest, digest(coverage, moved, &bytes), "{coverage:?}: the place counts");
        }
        let full = digest(Coverage::Full, GRANULE, &bytes);
        assert_ne!(full, digest(Coverage::Full, GRANULE, &with(10_001)), "every byte counts when full");
        assert_eq!(full, digest(Coverage::Full, other, &bytes), "full digests do not depend on the handoff");
        let tiny = [1, 2, 3];
        assert_ne!(digest(Coverage::Sampled, GRANULE, &tiny), digest(Coverage::Sampled, GRANULE, &[1, 2, 4]));
    }

    #[test]
    fn a_seal_names_blocks_epochs_digests_and_their_order() {
        let block = |block, epoch| BlockRef { block: BlockId(block), epoch: Epoch(epoch) };
        let of = |handoff, targets: &[BlockRef], digests: &[u64]| {
            let mut seal = Seal::new(HandoffId(handoff));
            seal.add(targets, digests);
            seal.value()
        };
        let (one, other) = (block(1, 5), block(2, 6));
        let seal = of(1, &[one, other], &[7, 8]);
        let mut in_parts = Seal::new(HandoffId(1));
        in_parts.add(&[one], &[7]);
        in_parts.add(&[], &[]);
        in_parts.add(&[other], &[8]);
        assert_eq!(in_parts.value(), seal, "it does not matter in how many parts blocks are named");
        #[rustfmt::skip]
        let rows = [
            ("another handoff",  of(2, &[one, other], &[7, 8])),
            ("another block",    of(1, &[block(3, 5), other], &[7, 8])),
            ("an older epoch",   of(1, &[block(1, 4), other], &[7, 8])),
            ("other bytes",      of(1, &[one, other], &[7, 9])),
            ("another order",    of(1, &[other, one], &[8, 7])),
            ("a block less",     of(1, &[one], &[7])),
        ];
        for (name, different) in rows {
            assert_ne!(different, seal, "{name}");
        }
    }

    #[test]
    fn spots_are_few_and_change_with_the_handoff() {
        let shape = BlockShape { block: 1000, granule: 100 };
        let of = |handoff: u64, targets: usize| spots(HandoffId(handoff), targets, shape);
        assert_eq!(
            of(1, 1),
            (0..10).map(|index| (0, index)).collect::<Vec<_>>(),
            "a small handoff is looked at whole"
        );
        let (large, other) = (of(1, 5000), of(2, 5000));
        assert!(large.len() <= SPOTS && SPOTS / 2 < large.len(), "{large:?}");
        assert_eq!((large[0], *large.last().unwrap()), ((0, 0), (4999, 9)), "both ends are always looked at");
        assert_ne!(large, other);
        assert_eq!(large, of(1, 5000), "both sides choose the same");
    }

    #[test]
    fn the_digests_of_blocks_are_the_sums_of_those_of_their_granules() {
        let bytes: Vec<u8> = (0..40_000u32).map(|index| (index * 31 % 251) as u8).collect();
        for coverage in [Coverage::Sampled, Coverage::Full] {
            for (count, len) in [(0, 300), (1, 300), (16, 300), (35, 300), (5, 100), (7, 5000)] {
                let granule = |it: usize| Granule { target: it as u32 % 3, index: it as u32, ..GRANULE };
                let mut expected = [7u64; 3];
                for it in 0..count {
                    let digest = digest(coverage, granule(it), &bytes[it * len..(it + 1) * len]);
                    expected[it % 3] = expected[it % 3].wrapping_add(digest);
                }
                let mut sums = [7; 3];
                let read = |it: usize, offset: usize, buffer: &mut [u8]| {
                    buffer.copy_from_slice(&bytes[it * len + offset..][..buffer.len()]);
                };
                let mut digests = BlockDigests::new(coverage, len, &mut sums, read);
                for it in 0..count {
                    digests.add(granule(it), it);
                }
                digests.finish();
                assert_eq!(sums, expected, "{coverage:?}, {count} of {len} bytes");
            }
        }
    }

    #[test]
    fn who_looks_where_it_is_told_takes_the_same_digest() {
        let bytes: Vec<u8> = (0..20_000u32).map(|index| (index % 251) as u8).collect();
        for (coverage, len) in [
            (Coverage::Full, 20_000),
            (Coverage::Sampled, 20_000),
            (Coverage::Sampled, 257),
            (Coverage::Sampled, 256),
            (Coverage::Full, 64),
        ] {
            let looked_at = match GRANULE.look(coverage, len) {
                Look::All => bytes[..len].to_vec(),
                Look::Lines(lines) => {
                    lines.iter().flat_map(|&line| bytes[line..line + LINE].to_vec()).collect()
                }
            };
            let expected = digest(coverage, GRANULE, &bytes[..len]);
            assert_eq!(
                xxh3_64_with_seed(&looked_at, GRANULE.seed()),
                expected,
                "{coverage:?} of {len} bytes"
            );
        }
    }

    #[test]
    fn sampled_lines_lie_inside_and_change_with_the_handoff() {
        let mut seen = std::collections::BTreeSet::new();
        for handoff in 0..200 {
            for len in [257, 300, 4096, 10_000] {
                let granule = Granule { handoff: HandoffId(handoff), ..GRANULE };
                for offset in granule.lines(len) {
                    assert!(offset + LINE <= len, "line at {offset} of {len}");
                    if len == 4096 {
                        seen.insert(offset / LINE);
                    }
                }
            }
        }
        assert_eq!(seen.len(), 4096 / LINE, "in 200 handoffs each line was looked at");
    }
}
