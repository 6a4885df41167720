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

/// Sorts `spans` by target and joins those that continue each other at both ends, up to `limit` bytes each: one
/// huge write would hold up those of other peers.
pub fn coalesce(spans: &mut Vec<Span>, limit: u64) {
    // Spans come in runs, which a stable sort merges instead of comparing them anew.
    spans.sort_by_key(|span| span.target);
    spans.dedup_by(|next, merged| {
        let continues = merged.source.checked_add(merged.len) == Some(next.source)
            && merged.target.checked_add(merged.len) == Some(next.target);
        let joins = continues && merged.len.saturating_add(next.len) <= limit;
        if joins {
            merged.len += next.len;
        }
        joins
    });
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
        ];
        for (name, mut spans, expected) in rows {
            coalesce(&mut spans, 64);
            assert_eq!(spans, expected, "{name}");
        }
    }

    proptest! {
        /// Whatever is given, the same bytes go to the same places.
        #[test]
        fn the_copy_stays_the_same(pieces in prop::collection::vec((0u64..40, 1u64..6), 0..40), limit in 1u64..20) {
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
            spans.reverse();
            coalesce(&mut spans, limit);
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
