//! The work on some rows of one sequence and some KV heads: key tile after key tile, and in each head after head.

use super::{
    Attention, KEY_PANELS, KEY_TILE, SEGMENT, Work,
    ahead::{Ahead, StoredSequence, steps_per_row},
    dots::{Dots, Panels, StoredRows, multiply},
    softmax::{add_state, finish},
    workspace::{Dimensions, Parts, States},
};
use crate::{
    cpu::simd::{Simd, padded},
    kv_rows::Part,
    matrix::PANEL,
};
use std::{array, ops::Range};

/// Rows and heads at work.
pub(super) struct Tile<'a, D> {
    pub(super) dots: D,
    stored: StoredSequence<'a>,
    heads: Range<usize>,
    /// The one whose turn it is.
    head: usize,
    /// Position of the first row; the others follow.
    first_position: usize,
    group: usize,
    /// Of each head.
    queries: usize,
    pub(super) parts: Parts<'a>,
    pub(super) ahead: Ahead<'a>,
}

impl<'a, D: Dots> Tile<'a, D> {
    /// Does a chunk of work.
    #[inline(always)]
    pub(super) fn attend(work: Work<'_>, dots: D) {
        let Work { of, chunk, out, states, workspace } = work;
        let sequence = &of.sequences[chunk.sequence];
        let (group, heads) = (of.group(), chunk.heads.clone());
        let queries = chunk.rows.len() * group;
        let dimensions = Dimensions::new(heads.len() * queries, of.shape.head_size, D::UNIT);
        let first_position = sequence.first_position + chunk.rows.start;
        let last = sequence.first_position + chunk.rows.end - 1;
        let first = of.params.first_key(first_position);
        let segments = match &chunk.segment {
            Some(segment) => segment.index..segment.index + 1,
            None => first / SEGMENT..last / SEGMENT + 1,
        };
        let seen = first.max(segments.start * SEGMENT)..(last + 1).min(segments.end * SEGMENT);
        let stored = StoredSequence { of: &of, sequence };
        let ahead = Ahead::new(stored, heads.clone(), seen.clone(), steps_per_row(dimensions, queries));
        let (parts, head) = (workspace.parts(dimensions), heads.start);
        let mut tile = Tile { dots, stored, heads, head, first_position, group, queries, parts, ahead };
        tile.load_queries(&chunk.rows);
        for segment in segments {
            tile.segment(seen.start.max(segment * SEGMENT)..seen.end.min((segment + 1) * SEGMENT));
            if chunk.segment.is_none() {
                tile.add_segment(segment);
            }
        }
        if let Some(segment) = &chunk.segment {
            let lines = &*tile.parts.states.lines;
            let first = segment.first_state * dimensions.state_lines();
            // SAFETY: each segment of each tile has states of its own.
            unsafe { states.part(first..first + lines.len()) }.copy_from_slice(lines);
            return;
        }
        for (nth, head) in chunk.heads.enumerate() {
            for (index, row) in chunk.rows.clone().enumerate() {
                // SAFETY: a tile writes the query heads of its KV heads in its own rows; no other tile has both.
                let out = unsafe { out.part(of.elements(sequence, head, row)) };
                for (query, out) in out.chunks_exact_mut(of.shape.head_size).enumerate() {
                    let slot = nth * queries + index * group + query;
                    finish(dots.simd(), tile.parts.whole.of(slot), out);
                }
            }
        }
    }

    #[inline(always)]
    fn load_queries(&mut self, rows: &Range<usize>) {
        let StoredSequence { of, sequence } = self.stored;
        let mut rows_of_q = self.parts.q.chunks_exact_mut(self.parts.dimensions.elements);
        for head in self.heads.clone() {
            for row in rows.clone() {
                let elements = of.q[of.elements(sequence, head, row)].chunks_exact(of.shape.head_size);
                for (q, factors) in elements.zip(&mut rows_of_q) {
                    factors.fill(0.0);
                    for (elements, factors) in q.chunks(PANEL).zip(factors.chunks_exact_mut(PANEL)) {
                        let elements = self.dots.simd().panel_f32(&padded(elements));
                        self.dots.factors(elements, bytemuck::cast_slice_mut(factors));
                    }
                }
            }
        }
    }

    /// Sums up what all rows see of one segment.
    #[inline(always)]
    fn segment(&mut self, seen: Range<usize>) {
        self.parts.states.clear();
        let first_tile = seen.start / KEY_TILE * KEY_TILE;
        for start in (first_tile..seen.end).step_by(KEY_TILE) {
            let loaded = seen.start.max(start)..seen.end.min(start + KEY_TILE);
            self.ahead.reach(loaded.end);
            for head in self.heads.clone() {
                self.head = head;
                self.keys(start, &loaded);
            }
        }
    }

    /// Adds the sums of a segment to those of the segments before it, for all rows that see it.
    #[inline(always)]
    fn add_segment(&mut self, segment: usize) {
        for slot in 0..self.heads.len() * self.queries {
            let seen = self.stored.of.segments(self.first_position + slot % self.queries / self.group);
            let (whole, state) = (self.parts.whole.of(slot), self.parts.states.of(slot));
            if segment == seen.start {
                whole.copy_from_slice(state);
            } else if seen.contains(&segment) {
                add_state(self.dots.simd(), whole, state);
            }
        }
    }

    /// Adds the keys of the tile that begins at `start` to the sums of all rows of a head.
    #[inline(always)]
    fn keys(&mut self, start: usize, loaded: &Range<usize>) {
        self.load_keys(start, loaded);
        let mut query = 0;
        while query < self.queries {
            let (panels, run) = self.run_of(start, query);
            if !panels.is_empty() {
                self.score(query..run, panels);
            }
            query = run;
        }
        self.load_values(start, loaded);
        // A weight of zero makes nothing of a value that is a number. Where one is not, rows that do not see it must not
        // even multiply it: what they give must not depend on whether it was there.
        if self.visible(start, 0) == self.visible(start, self.queries - 1) || self.values_are_finite() {
            self.add_values(start, 0..self.queries);
            return;
        }
        for query in (0..self.queries).step_by(self.group) {
            let keys = self.visible(start, query);
            self.load_values(start, &(start + keys.start..start + keys.end));
            self.add_values(start, query..query + self.group);
        }
    }

    /// The state, and the place in `q`, of one of the head's queries.
    #[inline(always)]
    pub(super) const fn slot(&self, query: usize) -> usize {
        (self.head - self.heads.start) * self.queries + query
    }

    /// Keys of a tile that a query sees, counted from the tile's start.
    #[inline(always)]
    fn visible(&self, start: usize, query: usize) -> Range<usize> {
        let position = self.first_position + query / self.group;
        let first = self.stored.of.params.first_key(position).clamp(start, start + KEY_TILE);
        let end = (position + 1).clamp(start, start + KEY_TILE);
        first - start..end - start
    }

    /// The panels of keys that a query sees any of, and the first query after it that sees others.
    #[inline(always)]
    fn run_of(&self, start: usize, query: usize) -> (Range<usize>, usize) {
        let panels = |query: usize| {
            let keys = self.visible(start, query);
            if keys.is_empty() { 0..0 } else { keys.start / PANEL..keys.end.div_ceil(PANEL) }
        };
        let own = panels(query);
        let mut end = query + self.group;
        while end < self.queries && panels(end) == own {
            end += self.group;
        }
        (own, end)
    }

    /// Stored rows of sixteen positions, those that are `loaded`.
    #[inline(always)]
    fn stored_rows(&mut self, part: Part, first: usize, loaded: &Range<usize>) -> StoredRows<'a> {
        let mut stored: StoredRows<'a> = [&[]; PANEL];
        for (position, stored) in (first..).zip(&mut stored) {
            self.ahead.step(self.dots.simd());
            if loaded.contains(&position) {
                *stored = self.stored.row(part, self.head, position);
            }
        }
        stored
    }

    /// Scales of sixteen positions; zero for those that are not `loaded`.
    #[inline(always)]
    fn scales(&self, part: Part, first: usize, loaded: &Range<usize>) -> [f32; PANEL] {
        let mut scales = [0.0; PANEL];
        for (position, scale) in (first..).zip(&mut scales) {
            if loaded.contains(&position) {
                *scale = self.stored.scale(part, self.head, position);
            }
        }
        scales
    }

    #[inline(always)]
    fn load_keys(&mut self, start: usize, loaded: &Range<usize>) {
        let of: &Attention<'_> = self.stored.of;
        let units = self.parts.dimensions.units();
        let factor = of.params.scale * std::f32::consts::LOG2_E;
        for panel in 0..KEY_PANELS {
            let first = start + panel * PANEL;
            let rows = self.stored_rows(Part::Key, first, loaded);
            let lines = &mut self.parts.keys[panel * units..(panel + 1) * units];
            self.dots.keys(of.shape.dtype, &rows, lines);
            self.parts.key_factors[panel] = if of.shape.dtype.has_scales() {
                self.scales(Part::Key, first, loaded).map(|scale| scale * factor)
            } else {
                [factor; PANEL]
            };
        }
    }

    #[inline(always)]
    fn load_values(&mut self, start: usize, loaded: &Range<usize>) {
        let shape = self.stored.of.shape;
        let dimensions = self.parts.dimensions;
        for panel in 0..KEY_PANELS {
            let first = start + panel * PANEL;
            let rows = self.stored_rows(Part::Value, first, loaded);
            let panels = Panels {
                count: dimensions.panels(),
                lines: dimensions.lines_of_panel(),
                first: panel * PANEL / D::UNIT,
            };
            self.dots.values(shape.dtype, &rows, self.parts.values, panels);
            if shape.dtype.has_scales() {
                self.parts.value_scales[panel] = self.scales(Part::Value, first, loaded);
            }
        }
    }

    /// Whether all values of the tile, and their scales, are numbers.
    #[inline(always)]
    fn values_are_finite(&self) -> bool {
        // Of bf16, an exponent of the first of a pair is where that of an f32 is not: both halves are looked at.
        let is_finite = |bits: u32| match D::UNIT {
            1 => bits & EXPONENT != EXPONENT,
            _ => bits & EXPONENT != EXPONENT && bits << 16 & EXPONENT != EXPONENT,
        };
        let values: &[u32] = bytemuck::cast_slice(&*self.parts.values);
        let scales = self.parts.value_scales.as_flattened();
        let is_scaled = self.stored.of.shape.dtype.has_scales();
        values.iter().fold(true, |finite, &bits| finite & is_finite(bits))
            && (!is_scaled || scales.iter().all(|scale| scale.is_finite()))
    }

    /// Turns the scores of some queries into weights, and adds the weighted values of the tile to their sums.
    #[inline(always)]
    fn add_values(&mut self, start: usize, queries: Range<usize>) {
        let is_scaled = self.stored.of.shape.dtype.has_scales();
        for query in queries.clone() {
            let keys = self.visible(start, query);
            if !keys.is_empty() {
                self.parts.weigh(self.dots, query, self.slot(query), keys, is_scaled);
            }
        }
        let mut query = queries.start;
        while query < queries.end {
            let (panels, run) = self.run_of(start, query);
            let run = run.min(queries.end);
            let units = panels.start * PANEL / D::UNIT..panels.end * PANEL / D::UNIT;
            while query < run && !units.is_empty() {
                let rows = rows_at_once::<D::Simd>(run - query);
                match rows {
                    1 => self.add_rows::<1>(query, &units),
                    2 => self.add_rows::<2>(query, &units),
                    3 => self.add_rows::<3>(query, &units),
                    4 => self.add_rows::<4>(query, &units),
                    _ => self.add_rows::<6>(query, &units),
                }
                query += rows;
            }
            query = run;
        }
    }

    #[inline(always)]
    fn add_rows<const ROWS: usize>(&mut self, query: usize, units: &Range<usize>) {
        let panels = self.parts.dimensions.panels();
        let mut panel = 0;
        while panel < panels {
            let columns = columns_at_once::<D::Simd, ROWS>(panels - panel);
            match columns {
                4 => self.add_panels::<ROWS, 4>(query, units, panel),
                2 => self.add_panels::<ROWS, 2>(query, units, panel),
                _ => self.add_panels::<ROWS, 1>(query, units, panel),
            }
            panel += columns;
        }
    }

    #[inline(always)]
    fn add_panels<const ROWS: usize, const COLUMNS: usize>(
        &mut self,
        query: usize,
        units: &Range<usize>,
        panel: usize,
    ) {
        let (simd, slot) = (self.dots.simd(), self.slot(query));
        let Parts { values, scores, rescale, states, dimensions, .. } = &mut self.parts;
        let per_panel = dimensions.lines_of_panel();
        let lines = array::from_fn(|column| {
            let first = (panel + column) * per_panel;
            &values[first + units.start..first + units.end]
        });
        let weights = array::from_fn(|row| {
            let weights: &[D::Factor] = bytemuck::cast_slice(scores[query + row].as_flattened());
            &weights[units.clone()]
        });
        let place = |row: usize| (slot + row) * States::lines(states.panels) + panel;
        let mut sums = [[simd.panel_zero(); COLUMNS]; ROWS];
        for (row, sums) in sums.iter_mut().enumerate() {
            let factor = simd.panel_splat(rescale[query + row]);
            let lines = &states.lines[place(row)..place(row) + COLUMNS];
            for (sum, line) in sums.iter_mut().zip(lines) {
                *sum = simd.panel_mul(simd.panel_f32(line), factor);
            }
        }
        let sums = multiply::<D, ROWS, COLUMNS>(self.dots, sums, weights, lines, &mut self.ahead);
        for (row, sums) in sums.into_iter().enumerate() {
            let place = place(row);
            for (line, sum) in states.lines[place..place + COLUMNS].iter_mut().zip(sums) {
                simd.panel_store(sum, line);
            }
        }
    }
}

/// Queries of a product, of those that are left. Where registers are few, those of six leave none for what they are
/// multiplied by.
#[inline(always)]
pub(super) fn rows_at_once<S: Simd>(left: usize) -> usize {
    match left {
        1..=4 => left,
        5 => 3,
        7 | 8 => 4,
        _ if S::IS_ROOMY => 6,
        _ => 4,
    }
}

/// Panels of a product, so that its sums fit the registers.
#[inline(always)]
pub(super) fn columns_at_once<S: Simd, const ROWS: usize>(left: usize) -> usize {
    let most = match ROWS {
        _ if S::IS_ROOMY => 4,
        1 => 4,
        2 => 2,
        _ => 1,
    };
    match left.min(most) {
        4.. => 4,
        2 | 3 => 2,
        _ => 1,
    }
}

const EXPONENT: u32 = 0x7f80_0000;
