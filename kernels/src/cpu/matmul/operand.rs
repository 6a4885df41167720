//! `x` as the products read it: in tiles of rows, unit by unit, rounded to the form that goes with the weights.

use super::{
    MIN_CHUNK_WEIGHTS, ROWS_PER_BLOCK, ROWS_PER_TALL_BLOCK,
    integer::{INPUTS_PER_UNIT, PORTABLE_ROWS},
    interleave::interleave,
    lines::Rows,
};
use crate::{
    aligned::AlignedBuffer,
    cpu::{
        Isa,
        amx::{TILE_ROWS, Tile},
        e4m3::encode_in_bf16,
        encode_int8,
        kv_codec::to_bf16,
        level::Level,
        pool::Pool,
        shared_out::SharedOut,
        simd::{Kernel, Simd},
    },
    matrix::{PackedMatrix, Quantization, WeightDtype, WeightFormat},
};
use std::ops::Range;

/// What a unit of `x` holds, and how many rows make a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Form {
    units: Units,
    max_rows: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Units {
    /// One f32.
    F32,
    /// Two bf16.
    Bf16,
    /// Two bf16 that are numbers of E4M3, each row with a scale.
    E4m3,
    /// Four int8, each row with a scale; 128 is added to each where the instructions want that.
    Int8 { unsigned: bool },
    /// Four int8, likewise, and sums of each group.
    Grouped { group: usize },
}

/// How rows are cut into tiles.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tiling {
    pub(super) rows: usize,
    /// Rows of a tile; the last may have fewer.
    height: usize,
    /// Rows that a tile is computed with: those beyond its own are zeros, and nobody looks at what becomes of them.
    pub(super) slots: usize,
    pub(super) count: usize,
    form: Form,
}

/// Working memory of products.
#[derive(Debug)]
pub(crate) struct Memory {
    /// Rows one after another, where they are rounded.
    rounded: AlignedBuffer,
    /// `[tile][unit][slot]`
    units: AlignedBuffer,
    /// `[tile][slot]`
    scales: AlignedBuffer,
    /// `[tile][group][slot]`
    group_sums: AlignedBuffer,
}

/// `x`, arranged.
pub(super) struct Operand<'a> {
    pub(super) tiling: Tiling,
    units: &'a [u32],
    scales: &'a [f32],
    group_sums: &'a [i32],
    units_per_row: usize,
    groups: usize,
}

impl Form {
    /// The form that `x` needs for weights of a format.
    pub(super) fn of(format: WeightFormat, level: Level) -> Self {
        let (has_avx512, has_vnni) = match level {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Level::Amx(_) => (true, true),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16(_) | Level::Avx512Vnni(_) => (true, true),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(_) => (true, false),
            _ => (false, false),
        };
        if level.isa() == Isa::Amx {
            match format {
                WeightFormat::Stored(WeightDtype::Bf16) => {
                    return Self { units: Units::Bf16, max_rows: TILE_ROWS };
                }
                WeightFormat::Quantized(Quantization::Int8) => {
                    return Self { units: Units::Int8 { unsigned: false }, max_rows: TILE_ROWS };
                }
                _ => {}
            }
        }
        #[cfg(target_arch = "x86_64")]
        if let (WeightFormat::Stored(WeightDtype::Bf16), Level::Avx512Bf16(_)) = (format, level) {
            return Self { units: Units::Bf16, max_rows: ROOMY_ROWS };
        }
        let integer_rows = if has_vnni { ROOMY_ROWS } else { PORTABLE_ROWS };
        match format {
            WeightFormat::Stored(_) => {
                Self { units: Units::F32, max_rows: if has_avx512 { ROOMY_ROWS } else { NARROW_ROWS } }
            }
            WeightFormat::Quantized(Quantization::Fp8) => {
                Self { units: Units::E4m3, max_rows: if has_avx512 { ROOMY_ROWS } else { NARROW_ROWS } }
            }
            WeightFormat::Quantized(Quantization::Int8) => {
                Self { units: Units::Int8 { unsigned: has_vnni }, max_rows: integer_rows }
            }
            WeightFormat::Quantized(Quantization::Int4 { group }) => {
                Self { units: Units::Grouped { group }, max_rows: integer_rows }
            }
        }
    }

    /// As [`Dots::HAS_ALL_HEIGHTS`](super::lines::Dots::HAS_ALL_HEIGHTS) of the products that want it.
    const fn has_all_heights(self) -> bool {
        !matches!(self.units, Units::F32)
    }

    /// Whether tiles of seven and eight rows take three panels at once.
    const fn has_three_panels(self) -> bool {
        self.max_rows == ROOMY_ROWS && matches!(self.units, Units::Bf16 | Units::Int8 { .. })
    }
}

impl Tiling {
    fn new(rows: usize, form: Form) -> Self {
        let Form { units, max_rows } = form;
        // Sums of groups take registers beside those of steps.
        let highest = match units {
            Units::Grouped { .. } => max_rows.min(GROUPED_ROWS),
            // Eight rows of three panels read fewer bytes for each product than twelve of two.
            _ if form.has_three_panels() && max_rows < rows => THREE_PANEL_ROWS,
            _ => max_rows,
        };
        // Tiles of AMX always have all their rows; others are cut evenly.
        let height = if max_rows == TILE_ROWS { TILE_ROWS } else { rows.div_ceil(rows.div_ceil(highest)) };
        let slots =
            if max_rows == ROOMY_ROWS && !form.has_all_heights() { ROOMY_SLOTS[height] } else { height };
        Self { rows, height, slots, count: rows.div_ceil(height), form }
    }

    /// The rows of a tile.
    pub(super) fn rows_of(&self, tile: usize) -> Range<usize> {
        tile * self.height..((tile + 1) * self.height).min(self.rows)
    }

    /// Low tiles take several panels at once: a multiply-add takes four cycles and one or two begin in each, so that few
    /// registers of sums leave the units idle. A single row waits for memory alone, which gives one stream of lines
    /// faster than four of them.
    pub(super) const fn panels_at_once(&self) -> usize {
        match (self.form.max_rows, self.slots) {
            // Sums of groups take registers beside those of steps.
            (ROOMY_ROWS, _) if matches!(self.form.units, Units::Grouped { .. }) => 1,
            (ROOMY_ROWS, 1) if self.form.has_all_heights() => 1,
            (_, 1) | (ROOMY_ROWS, 2..=6) => 4,
            (ROOMY_ROWS, 7 | THREE_PANEL_ROWS) if self.form.has_three_panels() => 3,
            (ROOMY_ROWS | TILE_ROWS, _) | (_, 2 | 3) => 2,
            _ => 1,
        }
    }

    pub(super) const fn tiles_per_block(&self) -> usize {
        if self.panels_at_once() == 3 {
            ROWS_PER_TALL_BLOCK / THREE_PANEL_ROWS
        } else {
            ROWS_PER_BLOCK / self.form.max_rows
        }
    }
}

impl Memory {
    pub(crate) fn new() -> Self {
        let empty = || AlignedBuffer::zeroed(0);
        Self { rounded: empty(), units: empty(), scales: empty(), group_sums: empty() }
    }

    /// Makes room for `rows` rows of `inputs` inputs in any form.
    pub(crate) fn reserve(&mut self, rows: usize, inputs: usize) {
        // The worst tiling has tiles of nine rows that are computed as twelve; those of AMX have sixteen.
        let slots = rows + rows.div_ceil(3) + TILE_ROWS;
        let inputs = inputs.next_multiple_of(WIDEST_PADDING);
        self.rounded.grown::<u32>(rows * inputs / 2);
        self.units.grown::<u32>(slots * inputs);
        self.scales.grown::<f32>(slots);
        self.group_sums.grown::<i32>(slots * inputs / SMALLEST_GROUP);
    }

    /// Rounds and arranges the rows of `x` for products with `w`, on all threads.
    pub(super) fn arrange<'a>(
        &'a mut self,
        x: &'a [f32],
        w: &PackedMatrix,
        form: Form,
        pool: &mut Pool,
        level: Level,
    ) -> Operand<'a> {
        let (inputs, padded) = (w.inputs(), w.padded_inputs());
        let tiling = Tiling::new(x.len() / inputs, form);
        let units_per_row = padded / form.units.inputs();
        let groups = match form.units {
            Units::Grouped { group } => padded / group,
            _ => 0,
        };
        let slots = tiling.count * tiling.slots;
        if form.units == Units::F32 && tiling.rows == 1 && inputs == padded {
            let units = bytemuck::cast_slice(x);
            return Operand { tiling, units, scales: &[], group_sums: &[], units_per_row, groups };
        }
        let is_rounded = form.units != Units::F32;
        let rounded = self.rounded.grown::<u32>(if is_rounded { tiling.rows * units_per_row } else { 0 });
        let units = self.units.grown::<u32>(slots * units_per_row);
        let has_scales = matches!(form.units, Units::E4m3 | Units::Int8 { .. } | Units::Grouped { .. });
        let scales = self.scales.grown::<f32>(if has_scales { slots } else { 0 });
        let group_sums = self.group_sums.grown::<i32>(slots * groups);
        {
            let (rounded, units) = (SharedOut::new(rounded), SharedOut::new(units));
            let (scales, group_sums) = (SharedOut::new(scales), SharedOut::new(group_sums));
            let group = MIN_CHUNK_WEIGHTS.div_ceil(padded * tiling.slots);
            pool.for_each(tiling.count.div_ceil(group), |_, chunk| {
                for tile in chunk * group..((chunk + 1) * group).min(tiling.count) {
                    let rows = tiling.rows_of(tile);
                    let x = &x[rows.start * inputs..rows.end * inputs];
                    let part = |per_slot: usize| {
                        tile * tiling.slots * per_slot..(tile + 1) * tiling.slots * per_slot
                    };
                    let rounded_rows =
                        if is_rounded { rows.start * units_per_row..rows.end * units_per_row } else { 0..0 };
                    // SAFETY: the rows of tiles are disjoint, and each tile is in one chunk.
                    let rounded = unsafe { rounded.part(rounded_rows) };
                    // SAFETY: as above.
                    let units = unsafe { units.part(part(units_per_row)) };
                    // SAFETY: as above.
                    let scales = unsafe { scales.part(part(usize::from(has_scales))) };
                    // SAFETY: as above.
                    let group_sums = unsafe { group_sums.part(part(groups)) };
                    let slots = tiling.slots;
                    level.run(ArrangeTile { x, inputs, form, slots, rounded, units, scales, group_sums });
                }
            });
        }
        Operand { tiling, units, scales, group_sums, units_per_row, groups }
    }
}

impl Operand<'_> {
    /// One tile, of as many slots as `ROWS`.
    #[inline(always)]
    pub(super) fn rows<const ROWS: usize>(&self, tile: usize) -> Rows<'_, ROWS> {
        debug_assert_eq!(ROWS, self.tiling.slots, "tiles of {ROWS} rows");
        let slots = tile * ROWS..(tile + 1) * ROWS;
        let units = slots.start * self.units_per_row..slots.end * self.units_per_row;
        let groups = slots.start * self.groups..slots.end * self.groups;
        Rows {
            units: self.units[units].as_chunks().0,
            scales: if self.scales.is_empty() { &[] } else { &self.scales[slots] },
            group_sums: self.group_sums[groups].as_chunks().0,
        }
    }
}

impl Operand<'_> {
    /// One tile of AMX in blocks of sixteen units: `[block][slot][unit]`.
    #[inline(always)]
    pub(super) fn blocks(&self, tile: usize) -> &[Tile] {
        let units = TILE_ROWS * self.units_per_row;
        bytemuck::cast_slice(&self.units[tile * units..(tile + 1) * units])
    }

    /// Scales of the rows of one tile.
    #[inline(always)]
    pub(super) fn scales_of(&self, tile: usize) -> &[f32] {
        &self.scales[tile * self.tiling.slots..(tile + 1) * self.tiling.slots]
    }
}

impl Units {
    const fn inputs(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::Bf16 | Self::E4m3 => 2,
            Self::Int8 { .. } | Self::Grouped { .. } => INPUTS_PER_UNIT,
        }
    }
}

/// The rows of one tile on their way.
struct ArrangeTile<'a> {
    x: &'a [f32],
    inputs: usize,
    form: Form,
    slots: usize,
    /// The tile's rows, one after another.
    rounded: &'a mut [u32],
    units: &'a mut [u32],
    scales: &'a mut [f32],
    group_sums: &'a mut [i32],
}

impl Kernel for ArrangeTile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { x, inputs, form, slots, rounded, units, scales, group_sums } = self;
        let rows = x.len() / inputs;
        let units_per_row = units.len() / slots;
        if form.units == Units::F32 {
            return interleave(simd, bytemuck::cast_slice(x), inputs, units, slots);
        }
        if form.units == Units::Bf16 {
            for (x, line) in x.chunks_exact(inputs).zip(rounded.chunks_exact_mut(units_per_row)) {
                let (halves, padding) = bytemuck::cast_slice_mut::<u32, u16>(line).split_at_mut(inputs);
                for (half, x) in halves.iter_mut().zip(x) {
                    *half = to_bf16(*x);
                }
                padding.fill(0);
            }
            return interleave(simd, rounded, units_per_row, units, slots);
        }
        scales[rows..].fill(0.0);
        if form.units == Units::E4m3 {
            let lines = x.chunks_exact(inputs).zip(rounded.chunks_exact_mut(units_per_row)).zip(scales);
            for ((x, line), scale) in lines {
                let (halves, padding) = bytemuck::cast_slice_mut::<u32, u16>(line).split_at_mut(inputs);
                *scale = encode_in_bf16(x, halves);
                padding.fill(0);
            }
            return interleave(simd, rounded, units_per_row, units, slots);
        }
        group_sums.fill(0);
        let lines = x.chunks_exact(inputs).zip(rounded.chunks_exact_mut(units_per_row)).zip(scales);
        for (slot, ((x, line), scale)) in lines.enumerate() {
            let steps = bytemuck::cast_slice_mut::<u32, u8>(line);
            let (steps, padding) = steps.split_at_mut(inputs);
            *scale = encode_int8(x, steps);
            padding.fill(0);
            match form.units {
                Units::Int8 { unsigned: true } => {
                    for unit in line {
                        *unit ^= SIGNS;
                    }
                }
                Units::Grouped { group } => {
                    let steps = bytemuck::cast_slice::<u32, i8>(line);
                    let sums = group_sums.chunks_exact_mut(slots);
                    for (steps, sums) in steps.chunks_exact(group).zip(sums) {
                        sums[slot] = -8 * steps.iter().map(|&step| i32::from(step)).sum::<i32>();
                    }
                }
                _ => {}
            }
        }
        interleave(simd, rounded, units_per_row, units, slots);
    }
}

/// Rows of the highest tile with thirty-two registers: twelve rows of two panels.
pub(super) const ROOMY_ROWS: usize = 12;

/// Rows of the highest tile of three panels.
const THREE_PANEL_ROWS: usize = 8;

/// Rows of the highest tile with sixteen registers, two for a panel: six rows of one.
pub(super) const NARROW_ROWS: usize = 6;

/// Rows of the highest tile of int4.
const GROUPED_ROWS: usize = 8;

/// How many rows a tile is computed with, by its height.
const ROOMY_SLOTS: [usize; ROOMY_ROWS + 1] = [0, 1, 2, 4, 4, 6, 6, 8, 8, 12, 12, 12, 12];

/// Inputs that the most padded weights come in multiples of.
const WIDEST_PADDING: usize = 128;

/// Inputs of the smallest int4 group.
const SMALLEST_GROUP: usize = 32;

/// The sign of each of four bytes: turning it adds 128.
const SIGNS: u32 = 0x8080_8080;
