//! Products of queries with keys and of weights with values: one loop for both.
//!
//! A *line* holds one unit (an f32, or two bf16) of each of sixteen outputs, so that outputs lie across lanes and every
//! output is one chain of multiply-adds in the order of its units. Keys are turned for that: their outputs are
//! positions, their units pieces of the head. The outputs of values are elements of the head, their units positions.

use super::ahead::{Ahead, UNITS_PER_STEP};
use crate::{cpu::simd::Simd, kv::KvDtype, matrix::PANEL};
use bytemuck::Pod;

/// One unit of each of sixteen outputs: f32, or the bits of pairs of bf16.
pub(super) type Line = [f32; PANEL];

/// Stored rows of sixteen neighbouring positions; empty where there is none to read, which counts as zeros.
pub(super) type StoredRows<'a> = [&'a [u8]; PANEL];

/// Sixteen sums in registers.
pub(super) type Sums<D> = <<D as Dots>::Simd as Simd>::Panel;

/// How keys, values and their factors are held, and how they are multiplied. All methods are inlined into code for the
/// instructions.
pub(super) trait Dots: Copy {
    /// For all that is not a product.
    type Simd: Simd;
    /// A line in a register.
    type Held: Copy;
    /// What one unit of sixteen outputs is multiplied by. Takes [`UNIT`](Self::UNIT) times the room of an f32.
    type Factor: Pod;
    /// Elements of a unit.
    const UNIT: usize;
    /// Whether keys are turned, so that those of sixteen positions make a line for each unit; else the lines of one key
    /// follow those of another.
    const TURNS_KEYS: bool;

    /// The instructions.
    fn simd(self) -> Self::Simd;
    /// Reads a line.
    fn hold(self, line: &Line) -> Self::Held;
    /// Adds the products of a unit with those of sixteen outputs.
    fn add(self, sums: Sums<Self>, factor: Self::Factor, line: Self::Held) -> Sums<Self>;
    /// Sixteen elements of a query, or weights of sixteen positions, to factors.
    fn factors(self, numbers: Sums<Self>, factors: &mut [Self::Factor]);
    /// Lines of sixteen keys, as many as the head has units. Scales are left out.
    fn keys(self, dtype: KvDtype, rows: &StoredRows<'_>, lines: &mut [Line]);
    /// Lines of sixteen values, those of their positions in each of the head's `panels`, which are `panel_lines` apart.
    fn values(self, dtype: KvDtype, rows: &StoredRows<'_>, lines: &mut [Line], panels: Panels);
}

/// Where the lines of sixteen values go.
#[derive(Clone, Copy)]
pub(super) struct Panels {
    pub(super) count: usize,
    /// From one panel to the next.
    pub(super) lines: usize,
    /// The first line of the positions at hand in each panel.
    pub(super) first: usize,
}

/// `sums + factors · lines`, unit by unit in order.
#[inline(always)]
pub(super) fn multiply<D: Dots, const ROWS: usize, const COLUMNS: usize>(
    dots: D,
    mut sums: [[Sums<D>; COLUMNS]; ROWS],
    factors: [&[D::Factor]; ROWS],
    lines: [&[Line]; COLUMNS],
    ahead: &mut Ahead<'_>,
) -> [[Sums<D>; COLUMNS]; ROWS] {
    let count = lines[0].len();
    assert!(factors.iter().all(|of| of.len() == count), "as many factors as units");
    assert!(lines.iter().all(|of| of.len() == count), "as many lines as units");
    for unit in 0..count {
        if unit.is_multiple_of(UNITS_PER_STEP) {
            ahead.step(dots.simd());
        }
        // No closure from here on: it would not have the instructions, and calls would be left in the loop. No checks
        // either: between them all factors are read first, and then there is no register left for the sums.
        let mut held = [dots.hold(&lines[0][unit]); COLUMNS];
        for column in 1..COLUMNS {
            // SAFETY: every slice is `count` long.
            held[column] = dots.hold(unsafe { lines[column].get_unchecked(unit) });
        }
        for row in 0..ROWS {
            // SAFETY: every slice is `count` long.
            let factor = unsafe { *factors[row].get_unchecked(unit) };
            for column in 0..COLUMNS {
                sums[row][column] = dots.add(sums[row][column], factor, held[column]);
            }
        }
    }
    sums
}

/// Everything in f32.
#[derive(Clone, Copy)]
pub(super) struct Wide<S>(pub(super) S);

impl<S: Simd> Dots for Wide<S> {
    type Simd = S;
    type Held = S::Panel;
    type Factor = f32;
    const UNIT: usize = 1;
    const TURNS_KEYS: bool = S::IS_ROOMY;

    #[inline(always)]
    fn simd(self) -> S {
        self.0
    }

    #[inline(always)]
    fn hold(self, line: &Line) -> S::Panel {
        self.0.panel_f32(line)
    }

    #[inline(always)]
    fn add(self, sums: S::Panel, factor: f32, line: S::Panel) -> S::Panel {
        self.0.panel_mul_add(factor, line, sums)
    }

    #[inline(always)]
    fn factors(self, numbers: S::Panel, factors: &mut [f32]) {
        self.0.panel_store(numbers, factors.try_into().expect("one factor per number"));
    }

    #[inline(always)]
    fn keys(self, dtype: KvDtype, rows: &StoredRows<'_>, lines: &mut [Line]) {
        match dtype {
            KvDtype::F32 => keys::<S, StoredF32>(self.0, rows, lines),
            KvDtype::F16 => keys::<S, StoredF16>(self.0, rows, lines),
            KvDtype::Bf16 => keys::<S, StoredBf16>(self.0, rows, lines),
            KvDtype::Int8 => keys::<S, StoredInt8>(self.0, rows, lines),
            KvDtype::Fp8 => keys::<S, StoredFp8>(self.0, rows, lines),
        }
    }

    #[inline(always)]
    fn values(self, dtype: KvDtype, rows: &StoredRows<'_>, lines: &mut [Line], panels: Panels) {
        match dtype {
            KvDtype::F32 => values::<S, StoredF32>(self.0, rows, lines, panels),
            KvDtype::F16 => values::<S, StoredF16>(self.0, rows, lines, panels),
            KvDtype::Bf16 => values::<S, StoredBf16>(self.0, rows, lines, panels),
            KvDtype::Int8 => values::<S, StoredInt8>(self.0, rows, lines, panels),
            KvDtype::Fp8 => values::<S, StoredFp8>(self.0, rows, lines, panels),
        }
    }
}

#[inline(always)]
fn keys<S: Simd, E: Stored>(simd: S, rows: &StoredRows<'_>, lines: &mut [Line]) {
    if !S::IS_ROOMY {
        for (lines, row) in lines.chunks_exact_mut(lines.len() / PANEL).zip(rows) {
            for (index, line) in lines.iter_mut().enumerate() {
                simd.panel_store(E::panel(simd, row, index), line);
            }
        }
        return;
    }
    for (index, lines) in lines.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
        let mut panels = [simd.panel_zero(); PANEL];
        for (elements, row) in panels.iter_mut().zip(rows) {
            *elements = E::panel(simd, row, index);
        }
        for (line, column) in lines.iter_mut().zip(simd.transpose(panels)) {
            simd.panel_store(column, line);
        }
    }
}

#[inline(always)]
fn values<S: Simd, E: Stored>(simd: S, rows: &StoredRows<'_>, lines: &mut [Line], panels: Panels) {
    for (position, row) in rows.iter().enumerate() {
        for index in 0..panels.count {
            let line = &mut lines[index * panels.lines + panels.first + position];
            simd.panel_store(E::panel(simd, row, index), line);
        }
    }
}

/// Bytes `BYTES * index..` of a row: where it ends before, zeros follow in `padding`.
#[inline(always)]
pub(super) fn piece<'a, const BYTES: usize>(
    row: &'a [u8],
    index: usize,
    padding: &'a mut [u8; BYTES],
) -> &'a [u8; BYTES] {
    let start = index * BYTES;
    if let Some(whole) = row.get(start..start + BYTES) {
        return whole.try_into().expect("as many bytes as the range is long");
    }
    let rest = &row[start.min(row.len())..];
    padding[..rest.len()].copy_from_slice(rest);
    padding
}

/// A type of stored elements.
trait Stored {
    /// Elements `16 * index..` of a row as f32, zeros from its end on.
    fn panel<S: Simd>(simd: S, row: &[u8], index: usize) -> S::Panel;
}

struct StoredF32;
struct StoredF16;
struct StoredBf16;
/// In steps: the scale is left out.
struct StoredInt8;
/// Without the scale, too.
struct StoredFp8;

impl Stored for StoredF32 {
    #[inline(always)]
    fn panel<S: Simd>(simd: S, row: &[u8], index: usize) -> S::Panel {
        let mut padding = [0; PANEL * size_of::<f32>()];
        let mut elements = [0.0; PANEL];
        for (element, bytes) in elements.iter_mut().zip(piece(row, index, &mut padding).as_chunks().0) {
            *element = f32::from_ne_bytes(*bytes);
        }
        simd.panel_f32(&elements)
    }
}

impl Stored for StoredF16 {
    #[inline(always)]
    fn panel<S: Simd>(simd: S, row: &[u8], index: usize) -> S::Panel {
        let mut padding = [0; PANEL * size_of::<u16>()];
        let mut elements = [0; PANEL];
        for (element, bytes) in elements.iter_mut().zip(piece(row, index, &mut padding).as_chunks().0) {
            *element = u16::from_ne_bytes(*bytes);
        }
        simd.panel_f16(&elements)
    }
}

impl Stored for StoredBf16 {
    #[inline(always)]
    fn panel<S: Simd>(simd: S, row: &[u8], index: usize) -> S::Panel {
        let mut padding = [0; PANEL * size_of::<u16>()];
        let mut elements = [0.0; PANEL];
        for (element, bytes) in elements.iter_mut().zip(piece(row, index, &mut padding).as_chunks().0) {
            *element = f32::from_bits(u32::from(u16::from_ne_bytes(*bytes)) << 16);
        }
        simd.panel_f32(&elements)
    }
}

impl Stored for StoredInt8 {
    #[inline(always)]
    fn panel<S: Simd>(simd: S, row: &[u8], index: usize) -> S::Panel {
        let mut padding = [0; PANEL];
        simd.panel_i8(piece(row, index, &mut padding))
    }
}

impl Stored for StoredFp8 {
    #[inline(always)]
    fn panel<S: Simd>(simd: S, row: &[u8], index: usize) -> S::Panel {
        let mut padding = [0; PANEL];
        simd.panel_e4m3(piece(row, index, &mut padding))
    }
}
