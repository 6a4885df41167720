//! From the rows of a file to panels.
//!
//! Whatever the type, a panel is a table of small cells: cell `(unit, output)` holds the consecutive inputs of one
//! output that the kernels take at a time. Packing therefore is one transposition for all types.

use super::{MatrixSource, PANEL, Quantization, WeightDtype, WeightFormat};
use crate::cpu::{encode_e4m3, encode_int8};
use half::{bf16, f16};

/// What the threads that pack a matrix share out: the same panels of each.
pub(super) struct Panels<'a> {
    pub(super) panels: &'a mut [u8],
    /// Of quantised weights; see [`super::PackedMatrix`].
    pub(super) scales: &'a mut [u8],
    pub(super) corrections: &'a mut [i32],
}

/// What one panel takes of each; the corrections in numbers, all else in bytes.
#[derive(Clone, Copy)]
pub(super) struct PanelSizes {
    pub(super) panel: usize,
    pub(super) scales: usize,
    pub(super) corrections: usize,
}

impl<'a> Panels<'a> {
    /// Pieces of `count` panels each; the last may have fewer.
    pub(super) fn split(self, count: usize, sizes: PanelSizes) -> impl Iterator<Item = Self> {
        // At least one, for matrices without inputs, scales or corrections.
        let part = |per_panel: usize| (count * per_panel).max(1);
        let mut scales = self.scales.chunks_mut(part(sizes.scales));
        let mut corrections = self.corrections.chunks_mut(part(sizes.corrections));
        self.panels.chunks_mut(part(sizes.panel)).map(move |panels| Panels {
            panels,
            scales: scales.next().unwrap_or_default(),
            corrections: corrections.next().unwrap_or_default(),
        })
    }
}

/// Packs the rows of some panels, whose last one may not be full.
pub(super) fn pack(to: Panels<'_>, rows: &[u8], inputs: usize, dtype: WeightDtype, format: WeightFormat) {
    let Panels { panels, scales, corrections } = to;
    let row_bytes = inputs * dtype.bytes();
    if row_bytes == 0 {
        return;
    }
    let panel_bytes = format.panel_bytes(inputs);
    let mut rows_of_panels = rows.chunks(PANEL * row_bytes);
    let panels = panels.chunks_exact_mut(panel_bytes).zip(&mut rows_of_panels);
    match format {
        WeightFormat::Stored(WeightDtype::F16) => {
            panels.for_each(|(panel, rows)| transpose::<2>(panel, rows, row_bytes));
        }
        // f32, or two of bf16.
        WeightFormat::Stored(WeightDtype::F32 | WeightDtype::Bf16) => {
            panels.for_each(|(panel, rows)| transpose::<4>(panel, rows, row_bytes));
        }
        WeightFormat::Quantized(Quantization::Int8) => {
            let mut quantizer = Int8Quantizer::new(inputs);
            let scales = bytemuck::cast_slice_mut::<u8, f32>(scales).chunks_mut(PANEL);
            let corrections = corrections.chunks_mut(PANEL);
            for (((panel, rows), scales), corrections) in panels.zip(scales).zip(corrections) {
                let cells = quantizer.quantize(rows, dtype, scales, corrections);
                transpose::<4>(panel, cells, inputs);
            }
        }
        WeightFormat::Quantized(Quantization::Fp8) => {
            let (mut values, mut codes) = (vec![0.0; inputs], vec![0; PANEL * inputs]);
            let scales = bytemuck::cast_slice_mut::<u8, f32>(scales).chunks_mut(PANEL);
            for ((panel, rows), scales) in panels.zip(scales) {
                let rows = rows.chunks_exact(row_bytes);
                let count = rows.len();
                for ((row, codes), scale) in rows.zip(codes.chunks_exact_mut(inputs)).zip(scales) {
                    widen_row(&mut values, row, dtype);
                    *scale = encode_e4m3(&values, codes);
                }
                transpose::<4>(panel, &codes[..count * inputs], inputs);
            }
        }
        WeightFormat::Quantized(Quantization::Int4 { group }) => {
            let mut quantizer = Int4Quantizer::new(inputs, group);
            let row_bytes = quantizer.row_bytes();
            let scales = bytemuck::cast_slice_mut::<u8, u16>(scales);
            let scales = scales.chunks_mut(PANEL * inputs.div_ceil(group));
            for ((panel, rows), scales) in panels.zip(scales) {
                let cells = quantizer.quantize(rows, dtype, scales);
                transpose::<4>(panel, cells, row_bytes);
            }
        }
    }
}

/// Packs steps of one panel as they are, `rows` by row, with the scales of each row's groups.
pub(super) fn pack_steps(
    to: Panels<'_>,
    steps: &[i8],
    row_scales: &[f32],
    inputs: usize,
    quantization: Quantization,
) {
    let Panels { panels, scales, corrections } = to;
    match quantization {
        Quantization::Int8 => {
            bytemuck::cast_slice_mut::<u8, f32>(scales)[..row_scales.len()].copy_from_slice(row_scales);
            for (steps, correction) in steps.chunks_exact(inputs).zip(corrections) {
                *correction = correction_of(bytemuck::cast_slice(steps));
            }
            transpose::<4>(panels, bytemuck::cast_slice(steps), inputs);
        }
        Quantization::Fp8 => {
            bytemuck::cast_slice_mut::<u8, f32>(scales)[..row_scales.len()].copy_from_slice(row_scales);
            transpose::<4>(panels, bytemuck::cast_slice(steps), inputs);
        }
        Quantization::Int4 { group } => {
            let (groups, padded) = (inputs.div_ceil(group), inputs.next_multiple_of(group));
            let scales = bytemuck::cast_slice_mut::<u8, u16>(scales);
            let mut cells = vec![0; steps.len() / inputs * padded / 2];
            let mut row = vec![0; padded];
            let rows = steps.chunks_exact(inputs).zip(row_scales.chunks_exact(groups));
            for (output, ((steps, row_scales), cells)) in
                rows.zip(cells.chunks_exact_mut(padded / 2)).enumerate()
            {
                assert!(steps.iter().all(|step| (-8..8).contains(step)), "steps of int4 are from -8 to 7");
                row[..inputs].copy_from_slice(steps);
                pack_halves(cells, &row);
                for (index, scale) in row_scales.iter().enumerate() {
                    scales[index * PANEL + output] = bf16::from_f32(*scale).to_bits();
                }
            }
            transpose::<4>(panels, &cells, padded / 2);
        }
    }
}

/// Steps of int4 as halves of bytes: four bytes hold eight inputs, the first four in their low halves.
fn pack_halves(cells: &mut [u8], steps: &[i8]) {
    for (cell, steps) in cells.chunks_exact_mut(4).zip(steps.chunks_exact(8)) {
        for (lane, byte) in cell.iter_mut().enumerate() {
            let halves = [steps[lane], steps[lane + 4]].map(|step| (step + 8).cast_unsigned());
            *byte = halves[0] | halves[1] << 4;
        }
    }
}

/// What instructions that take inputs from 0 to 255 have counted too much.
fn correction_of(steps: &[u8]) -> i32 {
    // Wraps around for rows beyond 131072 inputs, which products refuse.
    let sum = steps.iter().fold(0i32, |sum, &step| sum.wrapping_add(i32::from(step.cast_signed())));
    sum.wrapping_mul(-128)
}

/// Copies rows of `row_bytes` bytes into a panel of cells of `CELL` bytes: `[cell][output]`. What of the last cell a row
/// does not fill stays zero.
fn transpose<const CELL: usize>(panel: &mut [u8], rows: &[u8], row_bytes: usize) {
    let places = panel.as_chunks_mut::<CELL>().0.as_chunks_mut::<PANEL>().0;
    for (block, places) in places.chunks_mut(PACK_CELLS).enumerate() {
        let first = block * PACK_CELLS * CELL;
        for (output, row) in rows.chunks_exact(row_bytes).enumerate() {
            let (cells, rest) = row[first.min(row_bytes)..].as_chunks::<CELL>();
            for (place, cell) in places.iter_mut().zip(cells) {
                place[output] = *cell;
            }
            if let Some(place) = places.get_mut(cells.len()) {
                place[output][..rest.len()].copy_from_slice(rest);
            }
        }
    }
}

/// Elements of a stored row as f32.
pub(super) fn widen_row(out: &mut [f32], row: &[u8], dtype: WeightDtype) {
    match dtype {
        WeightDtype::F32 => {
            for (out, bytes) in out.iter_mut().zip(row.as_chunks().0) {
                *out = f32::from_le_bytes(*bytes);
            }
        }
        WeightDtype::F16 => {
            for (out, bytes) in out.iter_mut().zip(row.as_chunks().0) {
                *out = f16::from_le_bytes(*bytes).to_f32();
            }
        }
        WeightDtype::Bf16 => {
            for (out, bytes) in out.iter_mut().zip(row.as_chunks().0) {
                *out = bf16::from_le_bytes(*bytes).to_f32();
            }
        }
    }
}

/// Memory for one panel of int8 rows.
struct Int8Quantizer {
    values: Vec<f32>,
    steps: Vec<u8>,
}

impl Int8Quantizer {
    fn new(inputs: usize) -> Self {
        Self { values: vec![0.0; inputs], steps: vec![0; PANEL * inputs] }
    }

    /// The quantised rows of one panel, row by row.
    fn quantize(
        &mut self,
        rows: &[u8],
        dtype: WeightDtype,
        scales: &mut [f32],
        corrections: &mut [i32],
    ) -> &[u8] {
        let inputs = self.values.len();
        let rows = rows.chunks_exact(inputs * dtype.bytes());
        let count = rows.len();
        let outputs = rows.zip(self.steps.chunks_exact_mut(inputs)).zip(scales).zip(corrections);
        for (((row, steps), scale), correction) in outputs {
            widen_row(&mut self.values, row, dtype);
            *scale = encode_int8(&self.values, steps);
            *correction = correction_of(steps);
        }
        &self.steps[..count * inputs]
    }
}

/// Memory for one panel of int4 rows.
struct Int4Quantizer {
    /// Padded with zeros to whole groups.
    values: Vec<f32>,
    steps: Vec<i8>,
    cells: Vec<u8>,
    inputs: usize,
    group: usize,
}

impl Int4Quantizer {
    fn new(inputs: usize, group: usize) -> Self {
        let padded = inputs.next_multiple_of(group);
        Self {
            values: vec![0.0; padded],
            steps: vec![0; group],
            cells: vec![0; PANEL * padded / 2],
            inputs,
            group,
        }
    }

    const fn row_bytes(&self) -> usize {
        self.values.len() / 2
    }

    /// The quantised rows of one panel, row by row.
    fn quantize(&mut self, rows: &[u8], dtype: WeightDtype, scales: &mut [u16]) -> &[u8] {
        let row_bytes = self.row_bytes();
        let mut count = 0;
        for (output, row) in rows.chunks_exact(self.inputs * dtype.bytes()).enumerate() {
            widen_row(&mut self.values[..self.inputs], row, dtype);
            let cells = &mut self.cells[output * row_bytes..(output + 1) * row_bytes];
            let groups = self.values.chunks_exact(self.group).zip(cells.chunks_exact_mut(self.group / 2));
            for (index, (values, cells)) in groups.enumerate() {
                let scale = quantize_int4(values, &mut self.steps);
                scales[index * PANEL + output] = scale.to_bits();
                pack_halves(cells, &self.steps);
            }
            count += 1;
        }
        &self.cells[..count * row_bytes]
    }
}

/// One group of weights to steps from -8 to 7, as [`reference::quantize_int4`](crate::reference::quantize_int4) says.
pub(crate) fn quantize_int4(values: &[f32], steps: &mut [i8]) -> bf16 {
    let greatest =
        values.iter().fold(0.0f32, |most, &value| if most.abs() < value.abs() { value } else { most });
    let scale = bf16::from_f32(greatest / -8.0);
    let wide = scale.to_f32();
    if wide.abs() < f32::MIN_POSITIVE {
        steps.fill(0);
        return bf16::ZERO;
    }
    let inverse = 1.0 / wide;
    for (step, value) in steps.iter_mut().zip(values) {
        // The sum has room for no fraction: it rounds, and its last byte is the result.
        let rounded = (value * inverse + NO_FRACTION).to_bits() as i8;
        *step = rounded.clamp(-8, 7);
    }
    scale
}

impl MatrixSource<'_> {
    pub(super) fn assert_holds(&self, rows: usize, columns: usize) {
        assert_eq!(self.bytes.len(), rows * columns * self.dtype.bytes(), "a matrix of {rows} x {columns}");
    }
}

/// 1.5 * 2^23: between 2^23 and 2^24 neighbouring numbers are one apart.
const NO_FRACTION: f32 = 12_582_912.0;

/// Cells that are packed at a time: their part of a panel stays in the first-level cache while each output's turn comes.
const PACK_CELLS: usize = 128;
