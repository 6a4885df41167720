//! Products by tiles of sixteen rows and sixteen outputs: int8 and bf16 on AMX.
//!
//! Two tiles of rows times two panels keep four tiles of sums busy with four loads. A tile of bf16 sums even and odd
//! inputs of thirty-two by themselves and then adds both to the sum so far, in this order for every row, and rows do not
//! meet: their bits do not depend on the tile that they are in.

use super::{Chunk, integer::in_f32, lines::scaled};
use crate::{
    cpu::{
        amx::{TILE_ROWS, Tile, Tiles},
        simd::Simd,
    },
    matrix::{PANEL, WeightFormat},
};

impl Chunk<'_> {
    /// Computes the chunk. `x` is arranged in tiles of [`TILE_ROWS`].
    #[inline(always)]
    pub(super) fn multiply_tiles<S: Simd, T: Tiles>(&self, simd: S, registers: &mut T) {
        let mut panel = self.panels.start;
        while panel < self.panels.end {
            let two_panels = panel + 2 <= self.panels.end;
            let mut tile = self.tiles.start;
            while tile < self.tiles.end {
                let two_tiles = tile + 2 <= self.tiles.end;
                match (two_tiles, two_panels) {
                    (true, true) => self.block::<S, T, 2, 2>(simd, registers, tile, panel),
                    (true, false) => self.block::<S, T, 2, 1>(simd, registers, tile, panel),
                    (false, true) => self.block::<S, T, 1, 2>(simd, registers, tile, panel),
                    (false, false) => self.block::<S, T, 1, 1>(simd, registers, tile, panel),
                }
                tile += 1 + usize::from(two_tiles);
            }
            panel += 1 + usize::from(two_panels);
        }
    }

    #[inline(always)]
    fn block<S: Simd, T: Tiles, const TILES: usize, const PANELS: usize>(
        &self,
        simd: S,
        registers: &mut T,
        tile: usize,
        panel: usize,
    ) {
        let x: [&[Tile]; TILES] = std::array::from_fn(|index| self.operand.blocks(tile + index));
        let w: [&[Tile]; PANELS] = std::array::from_fn(|index| self.product.w.panel(panel + index));
        let is_int8 = matches!(self.product.w.format(), WeightFormat::Quantized(_));
        registers.zero::<0>();
        registers.zero::<1>();
        registers.zero::<2>();
        registers.zero::<3>();
        for block in 0..x[0].len() {
            registers.load::<6>(&w[0][block]);
            registers.load::<4>(&x[0][block]);
            add::<T, 0, 4, 6>(registers, is_int8);
            if PANELS == 2 {
                registers.load::<7>(&w[PANELS - 1][block]);
                add::<T, 1, 4, 7>(registers, is_int8);
            }
            if TILES == 2 {
                registers.load::<5>(&x[TILES - 1][block]);
                add::<T, 2, 5, 6>(registers, is_int8);
                if PANELS == 2 {
                    add::<T, 3, 5, 7>(registers, is_int8);
                }
            }
        }
        let mut sums: Sums = Sums([[0; PANEL]; TILE_ROWS]);
        registers.store::<0>(&mut sums.0);
        self.finish(simd, &sums.0, tile, panel);
        if PANELS == 2 {
            registers.store::<1>(&mut sums.0);
            self.finish(simd, &sums.0, tile, panel + 1);
        }
        if TILES == 2 {
            registers.store::<2>(&mut sums.0);
            self.finish(simd, &sums.0, tile + 1, panel);
            if PANELS == 2 {
                registers.store::<3>(&mut sums.0);
                self.finish(simd, &sums.0, tile + 1, panel + 1);
            }
        }
    }

    /// Turns the sums of one tile and panel into outputs.
    #[inline(always)]
    fn finish<S: Simd>(&self, simd: S, sums: &Tile, tile: usize, panel: usize) {
        let rows = self.operand.tiling.rows_of(tile);
        match self.product.w.format() {
            WeightFormat::Quantized(_) => {
                let scales = self.product.w.output_scales(panel);
                for ((row, sums), x_scale) in rows.zip(sums).zip(self.operand.scales_of(tile)) {
                    self.store(
                        simd,
                        row,
                        panel,
                        &scaled(in_f32(sums.map(u32::cast_signed)), scales, *x_scale),
                    );
                }
            }
            WeightFormat::Stored(_) => {
                for (row, sums) in rows.zip(sums) {
                    self.store(simd, row, panel, &sums.map(f32::from_bits));
                }
            }
        }
    }
}

#[inline(always)]
fn add<T: Tiles, const SUM: u8, const A: u8, const B: u8>(registers: &mut T, is_int8: bool) {
    if is_int8 {
        registers.add_int8::<SUM, A, B>();
    } else {
        registers.add_bf16::<SUM, A, B>();
    }
}

/// Tiles that straddle cache lines are stored at half the speed.
#[repr(align(64))]
struct Sums(Tile);
