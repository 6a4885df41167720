//! Fewer, longer writes: neighbours on both sides become one.
//!
//! The cost of posting a write hardly depends on its length, and a fragmented pool of 16-token blocks makes
//! thousands of them; but whatever is contiguous at the source and at the target need not be cut.

/// A copy of `len` bytes from `source` to `target`, offsets in two memories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Offset of the first byte to read.
    pub source: u64,
    /// Offset of the first byte to write.
    pub target: u64,
    /// How many bytes.
    pub len: u64,
}

/// Spans that are joined while they come.
///
/// Pieces of a prompt come layer by layer: neighbours in memory are far apart in time, and to sort thousands of them
/// costs more than to post what they amount to. But each piece continues the last one of its own block. So every
/// block has a lane, which knows the run that its next piece may continue.
#[derive(Debug)]
pub struct Runs {
    spans: Vec<Span>,
    /// Of each lane the last of its spans.
    last: Vec<usize>,
    limit: u64,
}

impl Span {
    /// Takes `next` in, if it continues this span at both ends and the two are at most `limit` bytes.
    fn join(&mut self, next: &Self, limit: u64) -> bool {
        let continues = self.source.checked_add(self.len) == Some(next.source)
            && self.target.checked_add(self.len) == Some(next.target);
        let joins = continues && self.len.saturating_add(next.len) <= limit;
        if joins {
            self.len += next.len;
        }
        joins
    }
}

impl Runs {
    /// No spans, in `lanes` lanes. Spans grow up to `limit` bytes each: one huge write would hold up those of other
    /// peers.
    pub fn new(lanes: usize, limit: u64) -> Self {
        Self { spans: Vec::new(), last: vec![usize::MAX; lanes], limit }
    }

    /// Adds a span, in whatever order; those of one lane are joined at once where they come in order.
    ///
    /// # Panics
    ///
    /// When there is no such lane.
    pub fn add(&mut self, lane: usize, span: Span) {
        let last = &mut self.last[lane];
        let joined = self.spans.get_mut(*last).is_some_and(|run| run.join(&span, self.limit));
        if !joined {
            *last = self.spans.len();
            self.spans.push(span);
        }
    }

    /// All spans, sorted by target; those that continue each other at both ends are one, up to the limit.
    pub fn into_spans(self) -> Vec<Span> {
        let Self { mut spans, limit, .. } = self;
        spans.sort_unstable_by_key(|span| span.target);
        spans.dedup_by(|next, run| run.join(next, limit));
        spans
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn span(source: u64, target: u64, len: u64) -> Span {
        Span { source, target, len }
    }

    #[test]
    fn what_joins() {
        #[rustfmt::skip]
        let rows = [
            ("neighbours on both sides",     vec![span(0, 100, 8), span(8, 108, 8)],                    vec![span(0, 100, 16)]),
            ("in any order",                 vec![span(8, 108, 8), span(0, 100, 8)],                    vec![span(0, 100, 16)]),
            ("not with a gap at the source", vec![span(0, 100, 8), span(9, 108, 8)],                    vec![span(0, 100, 8), span(9, 108, 8)]),
            ("not with a gap at the target", vec![span(0, 100, 8), span(8, 109, 8)],                    vec![span(0, 100, 8), span(8, 109, 8)]),
            ("not beyond the limit",         vec![span(0, 0, 60), span(60, 60, 60), span(120, 120, 4)], vec![span(0, 0, 60), span(60, 60, 64)]),
            ("nothing of nothing",           vec![],                                                    vec![]),
        ];
        for (name, spans, expected) in rows {
            assert_eq!(joined(&spans, 64, |_| 0, 1), expected, "{name}");
            assert_eq!(joined(&spans, 64, |index| index, 3), expected, "{name}, each in its own lane");
        }
    }

    fn joined(spans: &[Span], limit: u64, lane: impl Fn(usize) -> usize, lanes: usize) -> Vec<Span> {
        let mut runs = Runs::new(lanes, limit);
        for (index, span) in spans.iter().enumerate() {
            runs.add(lane(index), *span);
        }
        runs.into_spans()
    }

    #[test]
    fn layers_of_blocks_are_joined_as_they_come() {
        let mut runs = Runs::new(3, 1 << 20);
        for layer in 0..10 {
            for block in 0..3 {
                runs.add(
                    block as usize,
                    span(1000 * block + 10 * layer, 5000 - 1000 * block + 10 * layer, 10),
                );
            }
        }
        assert_eq!(runs.spans.len(), 3, "nothing is left to sort but one run for each block");
        assert_eq!(runs.into_spans(), [span(2000, 3000, 100), span(1000, 4000, 100), span(0, 5000, 100)]);
    }

    proptest! {
        /// Whatever is given, the same bytes go to the same places.
        #[test]
        fn the_copy_stays_the_same(
            pieces in prop::collection::vec((0u64..40, 1u64..6), 0..40),
            limit in 1u64..20,
            lanes in 1usize..5,
            order in any::<u64>(),
        ) {
            // Targets of a handoff never overlap, so each piece gets its own stretch of them.
            let mut target = 0;
            let mut spans = Vec::new();
            for (gap, len) in pieces {
                let source = target + gap / 20 * 1000; // Most pieces continue the one before.
                spans.push(span(source, target, len));
                target += len + u64::from(gap % 7 == 0);
            }
            let bytes = |spans: &[Span]| {
                let mut pairs: Vec<(u64, u64)> =
                    spans.iter().flat_map(|s| (0..s.len).map(|i| (s.target + i, s.source + i))).collect();
                pairs.sort_unstable();
                pairs
            };
            let before = bytes(&spans);
            let longest = spans.iter().map(|span| span.len).max().unwrap_or(0);
            // In order, in the opposite one, or in some other.
            match order % 3 {
                0 => {}
                1 => spans.reverse(),
                _ => spans.sort_by_key(|span| span.target.wrapping_mul(order | 1)),
            }
            let spans = joined(&spans, limit, |index| index % lanes, lanes);
            prop_assert_eq!(before, bytes(&spans));
            prop_assert!(spans.iter().all(|span| span.len <= limit.max(longest)));
            for pair in spans.windows(2) {
                let continues = pair[0].source + pair[0].len == pair[1].source
                    && pair[0].target + pair[0].len == pair[1].target;
                prop_assert!(!continues || limit < pair[0].len + pair[1].len, "left apart: {:?}", pair);
            }
        }
    }
}
