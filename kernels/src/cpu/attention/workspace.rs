//! Working memory of one thread.

use super::{KEY_PANELS, KEY_TILE, QUERY_TILE, dots::Line};
use crate::{aligned::AlignedBuffer, matrix::PANEL};

/// Grows when it is reserved or first used.
#[derive(Debug)]
pub(crate) struct Workspace(AlignedBuffer);

/// How much of everything a tile has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dimensions {
    /// Rows times query heads.
    pub(super) queries: usize,
    /// Elements of a head, up to whole lines of units.
    pub(super) elements: usize,
    /// Elements of a unit.
    pub(super) unit: usize,
}

/// Named parts of a workspace.
pub(super) struct Parts<'a> {
    /// Keys of the tile: `[sixteen keys][unit of the head]`.
    pub(super) keys: &'a mut [Line],
    /// Values of the tile: `[sixteen elements][unit of keys]`.
    pub(super) values: &'a mut [Line],
    /// What scores of each key are multiplied by.
    pub(super) key_factors: &'a mut [Line],
    /// What weights of each key are multiplied by, for types with scales.
    pub(super) value_scales: &'a mut [Line],
    /// `[query][element of the head]`, as factors.
    pub(super) q: &'a mut [f32],
    /// Per query, scores and then weights of the tile's keys, as factors.
    pub(super) scores: &'a mut [[Line; KEY_PANELS]],
    /// Per query, what the sums so far are to be multiplied by.
    pub(super) rescale: &'a mut [f32],
    /// Per query, the state of the segment at hand.
    pub(super) states: States<'a>,
    /// Per query, the state of all segments before.
    pub(super) whole: States<'a>,
    pub(super) dimensions: Dimensions,
}

/// What some queries have summed up.
pub(super) struct States<'a> {
    /// Per query its sums of values, then its total of weights, then in all lanes its greatest score.
    pub(super) lines: &'a mut [Line],
    /// Lines of sums.
    pub(super) panels: usize,
}

impl Workspace {
    pub(crate) fn new() -> Self {
        Self(AlignedBuffer::zeroed(0))
    }

    /// Makes room for heads of `head_size` elements. (One KV head with more query heads than [`QUERY_TILE`] takes more.)
    pub(crate) fn reserve(&mut self, head_size: usize) {
        for unit in [1, 2] {
            self.parts(Dimensions::new(QUERY_TILE, head_size, unit));
        }
    }

    pub(super) fn parts(&mut self, dimensions: Dimensions) -> Parts<'_> {
        let Dimensions { queries, .. } = dimensions;
        let (units, panels, state) = (dimensions.units(), dimensions.panels(), dimensions.state_lines());
        let sizes = [
            KEY_PANELS * units,
            panels * dimensions.lines_of_panel(),
            2 * KEY_PANELS,
            queries * panels,
            queries * KEY_PANELS,
            queries.div_ceil(PANEL),
            2 * queries * state,
        ];
        let mut memory = self.0.grown::<Line>(sizes.iter().sum());
        let [keys, values, factors, q, scores, rescale, states] = sizes.map(|lines| {
            let (part, rest) = std::mem::take(&mut memory).split_at_mut(lines);
            memory = rest;
            part
        });
        let (key_factors, value_scales) = factors.split_at_mut(KEY_PANELS);
        let (states, whole) = states.split_at_mut(queries * state);
        Parts {
            keys,
            values,
            key_factors,
            value_scales,
            q: q.as_flattened_mut(),
            scores: scores.as_chunks_mut().0,
            rescale: rescale.as_flattened_mut(),
            states: States { lines: states, panels },
            whole: States { lines: whole, panels },
            dimensions,
        }
    }
}

impl Dimensions {
    pub(super) fn new(queries: usize, head_size: usize, unit: usize) -> Self {
        Self { queries, elements: head_size.next_multiple_of(PANEL * unit), unit }
    }

    /// Units of a query or key.
    pub(super) const fn units(self) -> usize {
        self.elements / self.unit
    }

    /// Sixteens of elements of a value.
    pub(super) const fn panels(self) -> usize {
        self.elements / PANEL
    }

    /// Lines of values of a panel: units of the tile's keys.
    pub(super) const fn lines_of_panel(self) -> usize {
        KEY_TILE / self.unit
    }

    /// Lines of the state of a query.
    pub(super) const fn state_lines(self) -> usize {
        States::lines(self.panels())
    }
}

impl States<'_> {
    /// Lines of the state of a query.
    pub(super) const fn lines(panels: usize) -> usize {
        panels + 2
    }

    /// The state of one query.
    #[inline(always)]
    pub(super) fn of(&mut self, query: usize) -> &mut [Line] {
        let lines = Self::lines(self.panels);
        &mut self.lines[query * lines..(query + 1) * lines]
    }

    /// Nothing seen yet.
    pub(super) fn clear(&mut self) {
        for state in self.lines.chunks_exact_mut(Self::lines(self.panels)) {
            state.fill([0.0; PANEL]);
            state[self.panels + 1] = [f32::NEG_INFINITY; PANEL];
        }
    }
}
