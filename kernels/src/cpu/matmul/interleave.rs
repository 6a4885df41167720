//! Rows side by side, as products read them.

use crate::{
    cpu::{
        amx::{TILE_ROWS, TILE_UNITS, Tile},
        simd::Simd,
    },
    matrix::PANEL,
};

/// From `[row][unit]` to `[unit][slot]`; slots without a row, and units beyond a row's, become zeros.
#[inline(always)]
pub(super) fn interleave<S: Simd>(simd: S, rows: &[u32], len: usize, units: &mut [u32], slots: usize) {
    let filled = len * slots;
    units[filled..].fill(0);
    if slots == 1 {
        return units[..len].copy_from_slice(rows);
    }
    if rows.len() < filled {
        units[..filled].fill(0);
    }
    match slots {
        2 => interleave_rows::<S, 2>(simd, rows, len, units),
        3 => interleave_rows::<S, 3>(simd, rows, len, units),
        4 => interleave_rows::<S, 4>(simd, rows, len, units),
        5 => interleave_rows::<S, 5>(simd, rows, len, units),
        6 => interleave_rows::<S, 6>(simd, rows, len, units),
        7 => interleave_rows::<S, 7>(simd, rows, len, units),
        8 => interleave_rows::<S, 8>(simd, rows, len, units),
        9 => interleave_rows::<S, 9>(simd, rows, len, units),
        10 => interleave_rows::<S, 10>(simd, rows, len, units),
        11 => interleave_rows::<S, 11>(simd, rows, len, units),
        TILE_ROWS => block_rows(rows, len, units),
        _ => interleave_rows::<S, 12>(simd, rows, len, units),
    }
}

/// From `[row][unit]` to the blocks of a tile of AMX.
#[inline(always)]
fn block_rows(rows: &[u32], len: usize, units: &mut [u32]) {
    let blocks: &mut [Tile] = bytemuck::cast_slice_mut(units);
    for (slot, row) in rows.chunks_exact(len).enumerate() {
        for (block, units) in blocks.iter_mut().zip(row.as_chunks::<TILE_UNITS>().0) {
            block[slot] = *units;
        }
    }
}

#[inline(always)]
fn interleave_rows<S: Simd, const SLOTS: usize>(simd: S, rows: &[u32], len: usize, units: &mut [u32]) {
    let units = units.as_chunks_mut::<SLOTS>().0;
    let turned = if S::IS_ROOMY { turn_rows(simd, rows, len, units) } else { 0 };
    for (slot, row) in rows.chunks_exact(len).enumerate() {
        for (unit, &element) in units[turned..].iter_mut().zip(&row[turned..]) {
            unit[slot] = element;
        }
    }
}

/// Units of sixteen at a time, turned in registers: one store for all slots instead of one for each. Returns how many.
#[inline(always)]
fn turn_rows<S: Simd, const SLOTS: usize>(
    simd: S,
    rows: &[u32],
    len: usize,
    units: &mut [[u32; SLOTS]],
) -> usize {
    let rows: &[f32] = bytemuck::cast_slice(rows);
    let blocks = units[..len].as_chunks_mut::<PANEL>().0;
    for (block, units) in blocks.iter_mut().enumerate() {
        // Bits that are moved and never computed with, whatever they would be as numbers.
        let mut panels = [simd.panel_zero(); PANEL];
        for (panel, row) in panels.iter_mut().zip(rows.chunks_exact(len)) {
            *panel = simd.panel_f32(&row.as_chunks().0[block]);
        }
        for (unit, panel) in units.iter_mut().zip(simd.transpose(panels)) {
            let mut slots = [0.0; PANEL];
            simd.panel_store(panel, &mut slots);
            let slots: &[u32; PANEL] = bytemuck::cast_ref(&slots);
            unit.copy_from_slice(&slots[..SLOTS]);
        }
    }
    blocks.len() * PANEL
}
