//! AMX: products of whole tiles, sixteen rows of sixty-four bytes each (Intel SDM, volume 1, chapter 18).
//!
//! Kernels are written against [`Tiles`]. The instructions are one implementation; a model of them in plain loops, which
//! does what the manual says, is another, so that the kernels are tested on machines without AMX too.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod instructions;
#[cfg(test)]
mod model;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) use instructions::{Amx, is_available};
#[cfg(test)]
pub(crate) use model::ModelTiles;

/// Rows of a tile.
pub(crate) const TILE_ROWS: usize = 16;

/// Units of 32 bits in a row of a tile.
pub(crate) const TILE_UNITS: usize = 16;

/// A tile in memory.
pub(crate) type Tile = [[u32; TILE_UNITS]; TILE_ROWS];

/// Eight tile registers, named by number.
pub(crate) trait Tiles {
    /// `tile = 0`
    fn zero<const TILE: u8>(&mut self);
    /// Reads a tile.
    fn load<const TILE: u8>(&mut self, from: &Tile);
    /// Writes a tile.
    fn store<const TILE: u8>(&mut self, to: &mut Tile);
    /// `SUM[m][n] += Σ_k A[m][k] * B[k][n]` over units of two bf16, f32 sums.
    fn add_bf16<const SUM: u8, const A: u8, const B: u8>(&mut self);
    /// `SUM[m][n] += Σ_k A[m][k] * B[k][n]` over units of four int8, i32 sums that wrap around.
    fn add_int8<const SUM: u8, const A: u8, const B: u8>(&mut self);
}
