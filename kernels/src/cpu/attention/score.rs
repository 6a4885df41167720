//! Products of queries with keys.
//!
//! Where a register holds sixteen outputs, scores lie across lanes and keys are turned for that. Elsewhere turning takes
//! longer than it saves: elements lie across lanes, and those of a product are added at its end.

use super::{
    dots::{Dots, multiply},
    tile::{Tile, columns_at_once, rows_at_once},
    workspace::Dimensions,
};
use crate::{
    cpu::simd::{LANES, Simd},
    matrix::PANEL,
};
use std::{array, ops::Range};

impl<D: Dots> Tile<'_, D> {
    /// Scores of some queries, all of which see keys of the same panels.
    #[inline(always)]
    pub(super) fn score(&mut self, queries: Range<usize>, panels: Range<usize>) {
        if !D::TURNS_KEYS {
            self.score_each(queries, panels.start * PANEL..panels.end * PANEL);
            return;
        }
        let mut query = queries.start;
        while query < queries.end {
            let rows = rows_at_once::<D::Simd>(queries.end - query);
            match rows {
                1 => self.score_rows::<1>(query, panels.clone()),
                2 => self.score_rows::<2>(query, panels.clone()),
                3 => self.score_rows::<3>(query, panels.clone()),
                4 => self.score_rows::<4>(query, panels.clone()),
                _ => self.score_rows::<6>(query, panels.clone()),
            }
            query += rows;
        }
    }

    #[inline(always)]
    fn score_rows<const ROWS: usize>(&mut self, query: usize, panels: Range<usize>) {
        let mut panel = panels.start;
        while panel < panels.end {
            let columns = columns_at_once::<D::Simd, ROWS>(panels.end - panel);
            match columns {
                4 => self.score_panels::<ROWS, 4>(query, panel),
                2 => self.score_panels::<ROWS, 2>(query, panel),
                _ => self.score_panels::<ROWS, 1>(query, panel),
            }
            panel += columns;
        }
    }

    #[inline(always)]
    fn score_panels<const ROWS: usize, const COLUMNS: usize>(&mut self, query: usize, panel: usize) {
        let Dimensions { elements, .. } = self.parts.dimensions;
        let (simd, units) = (self.dots.simd(), self.parts.dimensions.units());
        let slot = self.slot(query);
        let q = array::from_fn(|row| {
            bytemuck::cast_slice(&self.parts.q[(slot + row) * elements..(slot + row + 1) * elements])
        });
        let lines =
            array::from_fn(|column| &self.parts.keys[(panel + column) * units..(panel + column + 1) * units]);
        let zeros = [[simd.panel_zero(); COLUMNS]; ROWS];
        let sums = multiply::<D, ROWS, COLUMNS>(self.dots, zeros, q, lines, &mut self.ahead);
        for (row, sums) in sums.iter().enumerate() {
            for (column, &sum) in sums.iter().enumerate() {
                let factors = simd.panel_f32(&self.parts.key_factors[panel + column]);
                simd.panel_store(
                    simd.panel_mul(sum, factors),
                    &mut self.parts.scores[query + row][panel + column],
                );
            }
        }
    }

    /// Scores of keys that are held as they are stored, [`KEYS_AT_ONCE`] at a time.
    #[inline(always)]
    fn score_each(&mut self, queries: Range<usize>, keys: Range<usize>) {
        let mut query = queries.start;
        while query < queries.end {
            match queries.end - query {
                1 => self.score_keys::<1>(query, &keys),
                2 => self.score_keys::<2>(query, &keys),
                _ => self.score_keys::<3>(query, &keys),
            }
            query += 3;
        }
    }

    #[inline(always)]
    fn score_keys<const ROWS: usize>(&mut self, query: usize, keys: &Range<usize>) {
        let Dimensions { elements, .. } = self.parts.dimensions;
        let (simd, slot) = (self.dots.simd(), self.slot(query));
        let vectors = elements / LANES;
        let q: [&[[f32; LANES]]; ROWS] = array::from_fn(|row| {
            self.parts.q[(slot + row) * elements..(slot + row + 1) * elements].as_chunks().0
        });
        let factors = self.parts.key_factors.as_flattened();
        for first in keys.clone().step_by(KEYS_AT_ONCE) {
            self.ahead.step(simd);
            let stored = self.parts.keys.as_flattened();
            let k: [&[[f32; LANES]]; KEYS_AT_ONCE] = array::from_fn(|key| {
                stored[(first + key) * elements..(first + key + 1) * elements].as_chunks().0
            });
            let mut sums = [[simd.splat(0.0); KEYS_AT_ONCE]; ROWS];
            for vector in 0..vectors {
                for (key, k) in k.iter().enumerate() {
                    let k = simd.load(&k[vector]);
                    for (sums, q) in sums.iter_mut().zip(q) {
                        sums[key] = simd.mul_add(simd.load(&q[vector]), k, sums[key]);
                    }
                }
            }
            for (row, &sums) in sums.iter().enumerate() {
                let scores = self.parts.scores[query + row].as_flattened_mut();
                let places = first..first + KEYS_AT_ONCE;
                let scored = scores[places.clone()].iter_mut().zip(&factors[places]);
                for ((score, factor), sum) in scored.zip(simd.sums(sums)) {
                    *score = sum * factor;
                }
            }
        }
    }
}

/// Keys of a product whose elements lie across lanes: as many as are added up together.
const KEYS_AT_ONCE: usize = 4;
