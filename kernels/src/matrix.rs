//! Weights, packed once when they are loaded, in the type that they come in.
//!
//! A packed matrix is cut into panels of [`PANEL`] outputs; a panel holds its outputs' weights input by input:
//! `[panel][input][output]`. A vector register then holds neighbouring outputs, so that each output is summed over the
//! inputs in their order, alone in its lane: its bits depend on its own row and column and on nothing else.
//!
//! bf16 panels hold outputs in the order 0 8 1 9 2 10 …: read as 32-bit lanes, the upper half is outputs 8 to 15 and
//! the lower half, shifted up, outputs 0 to 7. Two instructions widen a whole panel row.

use crate::aligned::AlignedBuffer;
use bytemuck::AnyBitPattern;
use half::{bf16, f16};

/// Outputs per panel.
pub(crate) const PANEL: usize = 16;

/// Type of stored weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightDtype {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16.
    Bf16,
}

/// A row-major matrix `[outputs][inputs]` as it lies in a file: little-endian, of any alignment.
#[derive(Clone, Copy, Debug)]
pub struct MatrixSource<'a> {
    /// `outputs * inputs * dtype.bytes()` bytes.
    pub bytes: &'a [u8],
    /// Type of the elements.
    pub dtype: WeightDtype,
}

/// A weight matrix in the layout of the CPU kernels.
#[derive(Debug)]
pub struct PackedMatrix {
    outputs: usize,
    inputs: usize,
    dtype: WeightDtype,
    panels: AlignedBuffer,
}

/// A table of row vectors: token embeddings that are not shared with the output matrix.
#[derive(Debug)]
pub struct Embedding {
    width: usize,
    dtype: WeightDtype,
    rows: AlignedBuffer,
}

impl PackedMatrix {
    /// Packs a matrix of `outputs` rows and `inputs` columns.
    ///
    /// # Panics
    ///
    /// When the source does not have exactly `outputs * inputs` elements.
    pub fn pack(outputs: usize, inputs: usize, source: MatrixSource<'_>) -> Self {
        Self::pack_on(1, outputs, inputs, source)
    }

    /// The same, with the panels of a large matrix shared out among `threads` threads: a single one can neither fault
    /// in the pages nor move the bytes as fast as memory allows.
    ///
    /// # Panics
    ///
    /// When the source does not have exactly `outputs * inputs` elements.
    pub fn pack_on(threads: usize, outputs: usize, inputs: usize, source: MatrixSource<'_>) -> Self {
        source.assert_holds(outputs, inputs);
        let panel_count = outputs.div_ceil(PANEL);
        let panel_bytes = PANEL * inputs * source.dtype.bytes();
        let mut panels = AlignedBuffer::zeroed(panel_count * panel_bytes);
        let threads = if source.bytes.len() < SHARED_FROM { 1 } else { threads };
        // At least one byte, for matrices without inputs.
        let share = (panel_count.div_ceil(threads.max(1)) * panel_bytes).max(1);
        let pack = |panels: &mut [u8], source_bytes: &[u8]| match source.dtype {
            WeightDtype::F32 => pack_panels::<4>(panels, source_bytes, inputs, natural_order),
            WeightDtype::F16 => pack_panels::<2>(panels, source_bytes, inputs, natural_order),
            WeightDtype::Bf16 => pack_panels::<2>(panels, source_bytes, inputs, paired_order),
        };
        std::thread::scope(|scope| {
            let mut shares = panels.as_mut_slice::<u8>().chunks_mut(share).zip(source.bytes.chunks(share));
            let own = shares.next();
            for (panels, source) in shares {
                scope.spawn(move || pack(panels, source));
            }
            if let Some((panels, source)) = own {
                pack(panels, source);
            }
        });
        Self { outputs, inputs, dtype: source.dtype, panels }
    }

    /// Rows of the source: length of an output row.
    pub const fn outputs(&self) -> usize {
        self.outputs
    }

    /// Columns of the source: length of an input row.
    pub const fn inputs(&self) -> usize {
        self.inputs
    }

    /// Type of the stored weights.
    pub const fn dtype(&self) -> WeightDtype {
        self.dtype
    }

    /// Bytes held.
    pub const fn bytes(&self) -> usize {
        self.panels.len()
    }

    /// Unpacks row `index` of the source: an embedding that is tied to the output matrix.
    ///
    /// Reads a whole panel, sixteen rows, for the one: some ten microseconds, so nothing beside a step.
    ///
    /// # Panics
    ///
    /// When `index` is no row or `out` is not `inputs` long.
    pub fn row(&self, index: usize, out: &mut [f32]) {
        assert!(index < self.outputs, "row {index} of a matrix of {}", self.outputs);
        assert_eq!(out.len(), self.inputs, "a row has as many elements as the matrix has inputs");
        let (panel, lane) = (index / PANEL, index % PANEL);
        match self.dtype {
            WeightDtype::F32 => unpack_lane(out, self.panel::<f32>(panel), lane, |stored| stored),
            WeightDtype::F16 => {
                unpack_lane(out, self.panel::<u16>(panel), lane, |stored| f16::from_bits(stored).to_f32());
            }
            WeightDtype::Bf16 => {
                let lane = paired_order(lane);
                unpack_lane(out, self.panel::<u16>(panel), lane, |stored| bf16::from_bits(stored).to_f32());
            }
        }
    }

    /// One panel: per input, a row of [`PANEL`] outputs. `T` is as wide as the stored type.
    pub(crate) fn panel<T: AnyBitPattern>(&self, index: usize) -> &[[T; PANEL]] {
        let panels = self.panels.as_slice::<T>().as_chunks::<PANEL>().0;
        &panels[index * self.inputs..(index + 1) * self.inputs]
    }
}

impl Embedding {
    /// Copies a table of `rows` vectors of `width` elements.
    ///
    /// # Panics
    ///
    /// When the source does not have exactly `rows * width` elements.
    pub fn new(rows: usize, width: usize, source: MatrixSource<'_>) -> Self {
        source.assert_holds(rows, width);
        let mut copy = AlignedBuffer::zeroed(source.bytes.len());
        copy.as_mut_slice::<u8>().copy_from_slice(source.bytes);
        Self { width, dtype: source.dtype, rows: copy }
    }

    /// Reads row `index`.
    ///
    /// # Panics
    ///
    /// When `index` is no row or `out` is not `width` long.
    pub fn row(&self, index: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.width, "a row has the width of the table");
        let row = index * self.width..(index + 1) * self.width;
        match self.dtype {
            WeightDtype::F32 => out.copy_from_slice(&self.rows.as_slice::<f32>()[row]),
            WeightDtype::F16 => widen(out, &self.rows.as_slice::<f16>()[row], f16::to_f32),
            WeightDtype::Bf16 => widen(out, &self.rows.as_slice::<bf16>()[row], bf16::to_f32),
        }
    }

    /// Bytes held.
    pub const fn bytes(&self) -> usize {
        self.rows.len()
    }
}

impl MatrixSource<'_> {
    fn assert_holds(&self, rows: usize, columns: usize) {
        assert_eq!(self.bytes.len(), rows * columns * self.dtype.bytes(), "a matrix of {rows} x {columns}");
    }
}

impl WeightDtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

fn widen<T: Copy>(out: &mut [f32], row: &[T], convert: impl Fn(T) -> f32) {
    for (out, &stored) in out.iter_mut().zip(row) {
        *out = convert(stored);
    }
}

fn unpack_lane<T: Copy>(out: &mut [f32], panel: &[[T; PANEL]], lane: usize, convert: impl Fn(T) -> f32) {
    for (out, outputs) in out.iter_mut().zip(panel) {
        *out = convert(outputs[lane]);
    }
}

/// Copies rows of `inputs` elements of `BYTES` bytes into panels; `order` maps an output to its place in the panel row.
fn pack_panels<const BYTES: usize>(
    panels: &mut [u8],
    source: &[u8],
    inputs: usize,
    order: impl Fn(usize) -> usize,
) {
    if inputs == 0 {
        return;
    }
    let panels = panels.as_chunks_mut::<BYTES>().0;
    let rows = source.as_chunks::<BYTES>().0;
    for (panel, rows) in panels.chunks_exact_mut(PANEL * inputs).zip(rows.chunks(PANEL * inputs)) {
        let places = panel.as_chunks_mut::<PANEL>().0;
        for (block, places) in places.chunks_mut(PACK_INPUTS).enumerate() {
            for (output, row) in rows.chunks_exact(inputs).enumerate() {
                let lane = order(output);
                for (place, element) in places.iter_mut().zip(&row[block * PACK_INPUTS..]) {
                    place[lane] = *element;
                }
            }
        }
    }
}

const fn natural_order(output: usize) -> usize {
    output
}

const fn paired_order(output: usize) -> usize {
    2 * (output % 8) + output / 8
}

/// Bytes from which on threads are worth their start.
const SHARED_FROM: usize = 1 << 20;

/// Inputs that are packed at a time: their part of a panel stays in the first-level cache while each output's turn comes.
const PACK_INPUTS: usize = 128;
